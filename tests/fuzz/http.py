"""Requests to `trol-edge serve`: hostile bodies, addresses, headers, connections. It answers rightly, and lives on."""

from __future__ import annotations

import base64
import contextlib
import dataclasses
import functools
import http.client
import io
import json
import logging
import os
import socket
import struct
import sys
import threading
import time
import zlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from random import Random
from typing import Any

from PIL import Image

from tests.conftest import NANOS
from tests.fuzz.calls import PATTERNS, PROMPTS, SCHEMAS
from tests.fuzz.damage import NODES, altered, arguments, json_text, with_another_node
from tests.fuzz.material import QUESTION, TEXT_QUESTION, bundle, scene
from tests.fuzz.workers import say
from tests.serving import Served, serving, waited_for
from trol_edge import Runtime
from trol_edge.answering.results import Answer
from trol_edge.serve import app, door
from trol_edge.serve.answers import REASONS
from trol_edge.serve.journal import JournalHandler
from trol_edge.serve.pictures import Sources
from trol_edge.serve.schema import EXTENSIONS, KNOWN, LABELS, NEUTRAL, parse
from trol_edge.serve.security import Keys
from trol_edge.testing import ScriptedRuntime

NAME = "trol"
KEY = "a-key-of-the-fuzz-0123456789"
BODY_BYTES = 1 << 20
WAIT_S = 60.0  # for an answer, on a machine that is busy
TYPED = "Content-Type: application/json"
COMPLETE = f"POST {app.COMPLETIONS}"
# Addresses of a host that the operator named; none of them is public.
INNER = ("127.0.0.1", "10.0.0.1", "169.254.169.254", "0.0.0.0", "::1", "::ffff:127.0.0.1", "64:ff9b::7f00:1", "fe80::1")
HOSTS = (
    *("127.0.0.1", "127.1", "2130706433", "0x7f000001", "0177.0.0.1", "0", "[::1]", "[::ffff:127.0.0.1]", "[::]"),
    *("localhost", "LOCALHOST.", "169.254.169.254", "metadata.google.internal", "[fe80::1%25eth0]", "[", "", "."),
    *("pictures.test", "pictures.test.", "PICTURES.TEST", "pictures.test@127.0.0.1", "127.0.0.1#@pictures.test"),
    *("pictures.test:22", "pictures.test:99999", "pictures.test:x", "user:word@pictures.test", "pictures.test\\@evil"),
    *("127.0.0.1?pictures.test", "\u2460\u2461\u2466.0.0.1", "p\u0131ctures.test", "pictures.test%00.evil", "x" * 5000),
    *("pictures.test\r\nHost: evil", "pictures.test\t", "xn--", "\ud800"),
)
SCHEMES = (
    *("http", "https", "HTTP", "ftp", "gopher", "file", "FILE", "data", "javascript", "unix", "http+unix", "jar:http"),
    *("", " http", "http\n", "h\u0131ttp", "blob:http"),
)
FILES = (
    *("/etc/passwd", "/etc/hostname", "/dev/zero", "/dev/stdin", "/proc/self/environ", "/proc/self/fd/0", "/", ""),
    *("{open}/link.png", "{open}/sub/scene.png", "{open}/../closed/scene.png", "{open}/%2e%2e/closed/scene.png"),
    *(
        "{open}/pipe.png",
        "{open}",
        "{open}x/scene.png",
        "{open}/scene.png%00",
        "{open}/scene.png?a",
        "{closed}/scene.png",
    ),
    *(
        "{open}/" + "a/" * 3000,
        "{open}/" + "a" * 9000,
        "{open}/./../closed/scene.png",
        "{open}/%ff%fe",
        "{open}//../closed",
    ),
)
HEADERS = (
    *('X-Request-Id: a\tb"', "X-Request-Id: a\r\nX-Evil: 1", "X-Request-Id: " + "x" * 9000, "X-Request-Id: \x00"),
    *(
        "Host: evil.test",
        "Host: 127.0.0.1.evil.test",
        "Host: localhost:1@evil",
        "Host: [::1",
        "Host:",
        "Host: localhost",
    ),
    *(
        "Origin: http://evil.test",
        "Origin: null",
        "Origin: http://localhost",
        "Origin: \xff",
        "Transfer-Encoding: gzip",
    ),
    *("Transfer-Encoding: chunked, chunked", "Transfer-Encoding: identity", "Content-Length: 5", "Content-Length: -1"),
    *("Content-Length: 99999999999999999999999", "Content-Length: \u0661", "Content-Type: text/html", "Content-Type:"),
    *(
        "Content-Encoding: gzip",
        "Expect: 100-continue",
        "Expect: nonsense",
        "Upgrade: websocket\r\nConnection: Upgrade",
    ),
    *(
        "Connection: upgrade",
        "Connection: keep-alive",
        "Authorization: Bearer \xff",
        "Authorization: Basic eDp5",
        "A b: c",
    ),
    *(
        " folded: yes",
        "X: a\r\n b",
        ": nothing",
        "X" * 3000 + ": y",
        "X: " + "y" * 70_000,
        "Cookie: a=b\r\n" * 200 + "A: b",
    ),
    *("Accept-Encoding: br", "Range: bytes=0-1", "X-Forwarded-For: 127.0.0.1", "X-Http-Method-Override: DELETE"),
)
PATHS = (
    *("/", "/v1/models", "/v1/models/trol", "/v1/models/../../etc/passwd", "/health/live", "/health/ready", "/metrics"),
    *("/v1/chat/completions", "/v1/chat/completions/", "/v1/chat/completions?a=b", "/V1/CHAT/COMPLETIONS", "//", "*"),
    *(
        "/%2e%2e/%2e%2e/etc/passwd",
        "/a%0d%0aX-Evil:%201",
        "/%ff%fe",
        "/%00",
        "/" + "a" * 9000,
        "http://evil.test/",
        "x",
    ),
    *("/v1/embeddings", "/\xff", "/{}", "/metrics;a", "/?q=<script>"),
)
METHODS = ("GET", "HEAD", "POST", "PUT", "DELETE", "OPTIONS", "TRACE", "CONNECT", "PATCH", "PURGE", "get", "G\tT", "")


@dataclasses.dataclass(frozen=True)
class Reply:
    """One answer of the server."""

    status: int
    headers: http.client.HTTPMessage
    body: bytes


class Trials:
    """Sends one hostile or odd thing to a server in this process, and reads what comes back."""

    def __init__(self, place: Path) -> None:
        self.open = self.folders(place)
        self.picture = scene(NANOS[0]).read_bytes()
        self.reference = Runtime(bundle(), threads=1)
        self.answers: dict[bytes, Answer] = {}
        app.BODY_S, app.DRAIN_S, door.HEADER_S, door.READER_S = 2.0, 0.5, 2.0, 2.0  # type: ignore[misc]
        self.stack = contextlib.ExitStack()  # the servers run until the child ends
        self.served = self.serve(lambda reached: Runtime(bundle(), threads=1))
        self.locked = self.serve(lambda reached: ScriptedRuntime("yes"), keys=Keys([KEY]))
        self.seen = {id(served): 0 for served in (self.served, self.locked)}
        self.strays, self.inner = list[Any](), INNER[0]
        self.watch()
        self.kinds = [
            *(self.valid, self.valid, self.together, self.changed, self.changed, self.fields, self.fields, self.sizes),
            *(self.no_json, self.texts, self.pictures, self.pictures, self.addresses, self.addresses, self.grammars),
            *(self.headers, self.headers, self.paths, self.keys, self.broken, self.broken, self.pipelined),
            *(self.half_open, self.chunked, self.slow, self.cancelled, self.unread),
        ]

    def folders(self, place: Path) -> Path:
        """A folder that the server may read, beside one that it may not."""
        for name in ("open", "closed"):
            (place / name).mkdir()
            (place / name / "scene.png").write_bytes(scene(NANOS[0]).read_bytes())
        (place / "open" / "link.png").symlink_to(place / "closed" / "scene.png")
        (place / "open" / "sub").symlink_to(place / "closed")
        os.mkfifo(place / "open" / "pipe.png")
        return place / "open"

    def serve(self, make: Any, **more: Any) -> Served:
        """Start a server that lets nobody wait for long."""
        given = {"body_bytes": BODY_BYTES, "folders": (self.open,), "fetch_hosts": ("pictures.test",)}
        served = self.stack.enter_context(serving(make, name=NAME, **given, **more))
        assert served.app.host.state == "ready", served.app.host.reason
        served.server.config.timeout_keep_alive = 1
        logging.getLogger("asyncio").addHandler(JournalHandler(served.app.journal))
        return served

    def watch(self) -> None:
        """Let names of the web lead to inner addresses, and note whoever connects to anything but the servers."""
        real, ports = socket.getaddrinfo, {self.served.server.port, self.locked.server.port}

        def look_up(name: Any, port: Any, *more: Any, **options: Any) -> Any:
            if name in ("127.0.0.1", "localhost", None):
                return real(name, port, *more, **options)
            if name != "pictures.test":
                self.strays.append(name)
            family = socket.AF_INET6 if ":" in self.inner else socket.AF_INET
            return [(family, socket.SOCK_STREAM, 6, "", (self.inner, port))]

        def noted(event: str, args: Sequence[Any]) -> None:
            if event == "socket.connect" and args[1] not in {("127.0.0.1", port) for port in ports}:
                self.strays.append(args[1])

        socket.getaddrinfo = look_up
        sys.addaudithook(noted)

    def trial(self, rng: Random) -> str:
        """One thing; then the server is alive, idle, and has failed at nothing."""
        how = rng.choice(self.kinds)
        say(how.__name__)
        self.strays.clear()
        self.inner = rng.choice(INNER)
        end = how(rng)
        for served in (self.served, self.locked):
            (reply,) = self.spoken(request("GET /health/live"), served)
            assert json.loads(reply.body) == {"status": "alive"}
            waited_for(lambda served=served: served.app.line.inside == 0)
            lines = served.log[self.seen[id(served)] :]
            self.seen[id(served)] += len(lines)
            bad = [line for line in lines if line["level"] == "error" or line.get("status") == 500]
            assert not bad, f"the server failed: {bad}"
        assert not self.strays, f"it looked up or reached {self.strays}"
        return end

    # -- what is sent --------------------------------------------------------------------------------------------------

    def spoken(
        self, raw: bytes, served: Served | None = None, parts: Iterable[bytes] = (), method: str = "POST"
    ) -> list[Reply]:
        """What the server answers to bytes, until it closes the connection."""
        with self.connected(served) as connection:
            with contextlib.suppress(ConnectionError):  # what it answered before it closed can be read
                connection.sendall(raw)
                for part in parts:
                    connection.sendall(part)
            return replies(everything(connection), method)

    def connected(self, served: Served | None = None) -> socket.socket:
        """A connection to a server."""
        return socket.create_connection(("127.0.0.1", (served or self.served).server.port), timeout=WAIT_S)

    def asked(self, data: Any, *more: str) -> str:
        """Send a body, and judge the one answer."""
        raw = data if isinstance(data, bytes) else json.dumps(data).encode()
        (reply,) = self.spoken(request(COMPLETE, raw, TYPED, *more))
        return self.judged(reply)

    def judged(self, reply: Reply, method: str = "POST") -> str:
        """Whether it is an answer or an error object of a caller's fault, without a secret of the server's."""
        assert str(bundle()).encode() not in reply.body and b"Traceback" not in reply.body, reply
        assert "x-evil" not in reply.headers, reply
        if reply.status == 200:
            return "answered"
        assert 400 <= reply.status < 500 or reply.status in (503, 504), reply
        if method == "HEAD":
            return "refused"
        error = json.loads(reply.body)["error"]
        assert set(error) == {"message", "type", "param", "code"} and error["message"], reply
        assert len(reply.body) < 20_000, f"{len(reply.body)} bytes: {reply.body[:300]!r}"
        return "refused"

    def body(self, rng: Random, *urls: str, **more: Any) -> dict[str, Any]:
        """A good request of few tokens."""
        pictures = [{"type": "image_url", "image_url": {"url": url}} for url in urls]
        parts = [*pictures, {"type": "text", "text": rng.choice([QUESTION, TEXT_QUESTION])}]
        limits = {"max_tokens": rng.choice([1, 4, 8]), "deadline_ms": 60_000}
        return {"messages": [{"role": "user", "content": parts}], **limits, **more}

    def options(self, rng: Random) -> dict[str, Any]:
        """Fields that change an answer or how it is sent."""
        choices: list[dict[str, Any]] = [
            {}, {"stop": ["r", "st"]}, {"logprobs": True, "top_logprobs": 2}, {"temperature": 1.0, "seed": 7},
            {"response_format": {"type": "regex", "regex": "yes|no"}}, {"conversation": rng.choice("abc")},
            {"repetition_penalty": 1.3}, {"truncation": "auto"}, {"model": NAME, "n": 1, "user": "x"},
        ]  # fmt: skip
        return {**rng.choice(choices), "stream": rng.random() < 0.5}

    def good(self, rng: Random) -> dict[str, Any]:
        """A good request, with a picture or without."""
        picture = [data_url(self.picture), f"{self.open.as_uri()}/scene.png"]
        urls = [rng.choice(picture)] if rng.random() < 0.6 else []
        return self.body(rng, *urls, **self.options(rng))

    # -- what is right -------------------------------------------------------------------------------------------------

    def compared(self, raw: bytes, reply: Reply) -> None:
        """Assert that an answer of one turn is the Runtime's."""
        asked = parse(raw, NAME)
        sampled = float(asked.options.get("temperature") or 0) > 0 and "seed" not in asked.options
        if len(asked.turns) > 1 or asked.choose is not None or asked.yes_no or sampled:
            return
        text, reason = told(reply)
        if reason == "deadline":
            return
        turn = asked.turns[0]
        if raw not in self.answers:
            pictures = list(map(Sources((self.open,)).read, turn.urls))
            self.answers[raw] = self.reference.generate(turn.prompt, pictures, **asked.options)
        want = self.answers[raw]
        assert (text, reason) == (want.text, want.finish_reason), f"{text!r}, {reason} instead of {want!r}"

    def valid(self, rng: Random) -> str:
        """A good request has the Runtime's answer."""
        raw = json.dumps(self.good(rng)).encode()
        (reply,) = self.spoken(request(COMPLETE, raw, TYPED))
        assert reply.status == 200, reply
        self.compared(raw, reply)
        return "answered"

    def together(self, rng: Random) -> str:
        """Good requests and hostile ones at the same time."""
        found: dict[bytes, Reply] = {}

        def work(raw: bytes) -> None:
            (found[raw],) = self.spoken(request(COMPLETE, raw, TYPED))

        good = {json.dumps(self.good(rng)).encode() for _ in range(3)}
        hostile = {json_text(with_another_node(self.good(rng), rng), rng) for _ in range(2)} - good
        threads = [threading.Thread(target=work, args=(raw,)) for raw in (*good, *hostile)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for raw in good:
            assert found[raw].status == 200, found[raw]
            self.compared(raw, found[raw])
        assert all(self.judged(found[raw]) for raw in hostile)
        return "answered"

    # -- bodies --------------------------------------------------------------------------------------------------------

    def changed(self, rng: Random) -> str:
        """A good request with some nodes changed. If it is answered, then rightly."""
        data: Any = self.good(rng)
        for _ in range(rng.choice([1, 1, 1, 2, 3])):
            data = with_another_node(data, rng)
        raw = json_text(data, rng)
        say(repr(raw[:3000]))
        (reply,) = self.spoken(request(COMPLETE, raw, TYPED))
        if self.judged(reply) == "refused":
            return "refused"
        self.compared(raw, reply)
        return "answered"

    def fields(self, rng: Random) -> str:
        """Any value in any field."""
        names = [*KNOWN, *NEUTRAL, *LABELS, *EXTENSIONS, "num_beams", "images", "session", "", "\ud800", "__class__"]
        numbers = [float("1e308"), 10**400, 5e-324, -0.0, 2**63, 1e-9]
        values = [*NODES, *numbers, *(v for v in arguments() if isinstance(v, (str, float, int)) and type(v).__repr__)]
        given = {name: rng.choice(values) for name in rng.sample(names, rng.choice([1, 1, 2, 4]))}
        raw = self.plain(self.body(rng) | given)
        say(repr(raw[:3000]))
        (reply,) = self.spoken(request(COMPLETE, raw, TYPED))
        if self.judged(reply) == "answered":
            self.compared(raw, reply)
            return "answered"
        return "refused"

    def plain(self, data: Any) -> bytes:
        """JSON of anything; what has no form there is a text."""
        return json.dumps(data, default=lambda value: "?").encode("utf-8", "surrogatepass")

    def sizes(self, rng: Random) -> str:
        """A body around the limit, with its length said or in chunks; the answer is read after all was sent."""
        size = rng.choice([BODY_BYTES - 1, BODY_BYTES, BODY_BYTES + 1, 2 * BODY_BYTES, 8 * BODY_BYTES])
        inner = json.dumps(self.body(rng)).encode()
        raw = inner + b" " * (size - len(inner))
        chunked = rng.random() < 0.5
        say(f"{size} bytes, chunked: {chunked}")
        sent = in_chunks(raw, rng) if chunked else raw
        with self.connected() as connection:
            connection.sendall(head(COMPLETE, TYPED, *framing(len(raw), chunked)) + sent)
            time.sleep(rng.choice([0, 0.05]))
            (reply,) = replies(everything(connection))
        assert reply.status == (200 if size <= BODY_BYTES else 413), (size, reply)
        return self.judged(reply)

    def no_json(self, rng: Random) -> str:
        """No JSON, deep JSON, JSON of another type, and numbers without end."""
        given = [
            *(
                b"",
                b"{",
                b"[]",
                b"null",
                b"1e999",
                b"\xff\xfe{}",
                b"\xef\xbb\xbf{}",
                b"[" * 500_000,
                b'{"a":' * 150_000,
            ),
            *(b'{"seed": ' + b"9" * 900_000 + b"}", b'{"seed": 1e' + b"9" * 9000 + b"}", b"NaN", b'{"a": Infinity}'),
            *(b'"' + b"\\ud800" * 9000 + b'"', b"{}" * 1000, bytes(1000), rng.randbytes(rng.randrange(3000))),
            *("{}".encode("utf-16"), "{}".encode("utf-32"), b'{"messages": []' + b" " * 900_000, b"[1," * 300_000),
        ]
        assert self.asked(rng.choice(given)) == "refused"
        return "refused"

    def texts(self, rng: Random) -> str:
        """Hostile questions, answers and names, over turns."""
        texts = [prompt for prompt in PROMPTS if isinstance(prompt, str)]
        messages: list[dict[str, Any]] = []
        for _ in range(rng.choice([0, 0, 1, 2, 30, 600])):
            messages += [{"role": "user", "content": rng.choice(texts)}]
            messages += [{"role": "assistant", "content": rng.choice(texts)}]
        if rng.random() < 0.2:
            messages.insert(rng.randrange(len(messages) + 1), {"role": "system", "content": rng.choice(texts)})
        messages.append({"role": "user", "content": rng.choice(texts)})
        return self.asked(self.body(rng) | {"messages": messages} | self.options(rng))

    def pictures(self, rng: Random) -> str:
        """Damaged pictures, bombs, what is none, and very many."""
        how = rng.randrange(6)
        say(f"{how}")
        if how < 2:
            url = data_url(altered(self.picture, rng))
        elif how == 2:
            url = data_url(
                rng.choice([bomb(60_000), bomb(12_000), bomb(2**31 - 1), large("GIF"), large("TIFF"), large("PNG")])
            )
        elif how == 3:
            url = altered(data_url(self.picture).encode(), rng).decode("latin-1")
        elif how == 4:
            payload = rng.choice(
                ["@@@", "", "A", "AAAA", "=" * 5000, "\u0661" * 8, "QUJD\n", base64.b64encode(b"x").decode()]
            )
            kind = rng.choice(["image/png", "text/html", "", "image/svg+xml", "x" * 5000, "image/png;charset=\ud800"])
            url = f"data:{kind};base64,{payload}"
        else:
            return self.asked(self.body(rng, *[data_url(self.picture[:40])] * rng.choice([2, 30, 1000])))
        return self.asked(self.body(rng, url, stream=rng.random() < 0.5))

    def addresses(self, rng: Random) -> str:
        """Addresses that lead elsewhere; none of them is followed."""
        if rng.random() < 0.5:
            path = rng.choice(FILES).format(open=self.open, closed=self.open.parent / "closed")
            url = rng.choice(["file://", "file:", "FILE://", "file://localhost", "file://other", "file:////"]) + path
        else:
            url = f"{rng.choice(SCHEMES)}:{rng.choice(['//', '//', '//', '/', '', '////'])}{rng.choice(HOSTS)}"
            url += rng.choice(["", "/a.png", "/\r\nX: y", "/ a", "?a#b"])
        say(ascii(url[:300]))
        assert self.asked(self.body(rng, url)) == "refused"
        return "refused"

    def grammars(self, rng: Random) -> str:
        """Schemas that nothing satisfies, patterns without end."""
        form: dict[str, Any] = {"type": "regex", "regex": rng.choice(PATTERNS)}
        if rng.random() < 0.6:
            schema = rng.choice(SCHEMAS)
            for _ in range(rng.choice([0, 0, 0, 1, 200])):
                schema = {"type": "array", "items": schema}
            form = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
        raw = self.plain(self.body(rng, response_format=form, stream=rng.random() < 0.5) | {"deadline_ms": 5000})
        say(repr(raw[:500]))
        return self.asked(raw)

    # -- heads ---------------------------------------------------------------------------------------------------------

    def headers(self, rng: Random) -> str:
        """Hostile headers with a good request."""
        given = rng.sample(HEADERS, rng.choice([1, 1, 2, 3]))
        say(ascii(given)[:500])
        raw = json.dumps(self.body(rng)).encode()
        return self.any_of(self.spoken(request(COMPLETE, raw, TYPED, *given)))

    def paths(self, rng: Random) -> str:
        """Any method on any path, with a body or without."""
        line = f"{rng.choice(METHODS)} {rng.choice(PATHS)}"
        say(ascii(line[:300]))
        raw = rng.choice([b"", b"", b"{}", json.dumps(self.body(rng)).encode()])
        method = line.partition(" ")[0]
        sent = request(line, raw, *([TYPED] if rng.random() < 0.5 else []))
        return self.any_of(self.spoken(sent, method=method), method)

    def keys(self, rng: Random) -> str:
        """Wrong keys open nothing."""
        wrong = [
            *("", "Bearer", "Bearer ", f"Basic {KEY}", KEY, f"Bearer {KEY}x", f"Bearer {KEY[:-1]}", "Bearer \xff" * 9),
            *("Bearer " + "x" * 9000, f"Bearer  {KEY.upper()}", f"Bearer {KEY}, {KEY}", f"bearer\t{KEY}"),
        ]
        line = rng.choice([COMPLETE, "GET /metrics", "GET /v1/models", "GET /nothing"])
        raw = json.dumps(self.body(rng)).encode() if line == COMPLETE else b""
        more = [f"Authorization: {rng.choice(wrong)}"] if rng.random() < 0.9 else []
        (reply,) = self.spoken(request(line, raw, TYPED, *more), self.locked)
        assert reply.status == 401, reply
        (reply,) = self.spoken(
            request(COMPLETE, json.dumps(self.body(rng)).encode(), TYPED, f"Authorization: Bearer {KEY}"), self.locked
        )
        assert reply.status == 200, reply
        return "refused"

    # -- connections ---------------------------------------------------------------------------------------------------

    def any_of(self, found: list[Reply], method: str = "POST") -> str:
        """Judge every answer on a connection; none at all is a refusal, where what was sent need not be HTTP."""
        ends = [self.judged(reply, method) for reply in found]
        return ends[0] if ends else "refused"

    def broken(self, rng: Random) -> str:
        """Bytes that are no HTTP, or no longer."""
        raw = request(COMPLETE, json.dumps(self.body(rng)).encode(), TYPED)
        given = [
            altered(raw, rng),
            altered(raw, rng),
            raw[: rng.randrange(len(raw))],
            rng.randbytes(rng.randrange(3000)),
        ]
        given += [b"\x16\x03\x01\x02\x00\x01\x00", b"x" * 200_000, raw.replace(b"\r\n", b"\n"), b"\r\n" * 3000 + raw]
        given += [
            raw + rng.randbytes(50),
            b"GET / HTTP/1.1\r\n" + b"A: b\r\n" * 30_000,
            b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        ]
        sent = rng.choice(given)
        say(repr(sent[:1000]))
        return self.any_of(self.spoken(sent))

    def pipelined(self, rng: Random) -> str:
        """Several requests before the first answer: answers in order, until one ends the connection."""
        bodies = [json.dumps(self.good(rng)).encode() for _ in range(rng.choice([2, 3, 6]))]
        raw = b"".join(head(COMPLETE, TYPED, *framing(len(body), False), close=False) + body for body in bodies)
        raw += rng.choice([b"", b"GARBAGE\r\n\r\n", b"POST / HTTP/1.1\r\nHost: lo", request("GET /nothing")])
        found = self.spoken(raw)
        assert len(found) >= len(bodies), found
        for body, reply in zip(bodies, found, strict=False):
            assert reply.status == 200, reply
            self.compared(body, reply)
        self.any_of(found)
        return "answered"

    def half_open(self, rng: Random) -> str:
        """Connections that begin and stop, are left, reset or closed at one end."""
        raw = request(COMPLETE, json.dumps(self.good(rng)).encode(), TYPED)
        with contextlib.ExitStack() as stack:
            for _ in range(rng.choice([1, 3, 20])):
                connection = stack.enter_context(self.connected())
                connection.sendall(raw[: rng.choice([0, 1, 20, rng.randrange(len(raw)), len(raw)])])
                how = rng.randrange(4)
                if how == 0:
                    connection.shutdown(socket.SHUT_WR)
                elif how == 1:
                    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                    connection.close()
            return self.valid(rng)

    def chunked(self, rng: Random) -> str:
        """Chunks: whole, cut short, or with sizes that are none."""
        raw = json.dumps(self.good(rng)).encode()
        sent = in_chunks(raw, rng)
        how = rng.randrange(6)
        say(f"{how}")
        if how == 1:
            sent = sent[: rng.randrange(len(sent))]
        elif how == 2:
            sent = altered(sent, rng)
        elif how == 3:
            sent = (
                rng.choice([b"-5\r\n", b"FFFFFFFFFFFFFFFFFFFF\r\n", b"zz\r\n", b"5;" + b"x" * 70_000, b"\r\n\r\n"])
                + sent
            )
        elif how == 4:
            sent = sent[:-2] + b"X-Evil: trailer\r\n" * rng.choice([1, 5000]) + b"\r\n"
        elif how == 5:
            sent += b"0\r\n\r\n"
        found = self.spoken(head(COMPLETE, TYPED, *framing(0, True)) + sent)
        if how == 0:
            assert found[0].status == 200, found
            self.compared(raw, found[0])
        return self.any_of(found)

    def slow(self, rng: Random) -> str:
        """A body in pieces with time between them, which in the end is whole, or is not."""
        raw = request(COMPLETE, json.dumps(self.good(rng)).encode(), TYPED)
        count = rng.choice([2, 5, 20])
        cuts = sorted(rng.randrange(len(raw)) for _ in range(count))
        whole = rng.random() < 0.7
        parts = [raw[a:b] for a, b in zip([0, *cuts], [*cuts, len(raw)] if whole else cuts, strict=False)]

        def slowly() -> Iterable[bytes]:
            for part in parts:
                time.sleep(0.01)
                yield part

        found = self.spoken(b"", parts=slowly())
        if whole and not [reply for reply in found if reply.status == 408]:
            assert found and found[0].status == 200, found
        return self.any_of(found)

    def cancelled(self, rng: Random) -> str:
        """A client that leaves in the middle of an answer, or before it; the next one is served."""
        raw = request(COMPLETE, json.dumps(self.good(rng) | {"stream": True, "max_tokens": 200}).encode(), TYPED)
        with self.connected() as connection:
            connection.sendall(raw)
            most = rng.choice([0, 1, 300, 2000])
            if most:
                connection.recv(most)
            time.sleep(rng.choice([0, 0, 0.02, 0.1]))
            if rng.random() < 0.5:
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        return self.valid(rng)

    def unread(self, rng: Random) -> str:
        """A body that nobody wants, whole or never sent: the answer comes, and then the connection ends."""
        line = rng.choice(["GET /health/live", "POST /nothing", "POST /", "GET /v1/models", COMPLETE])
        size = rng.choice([10, 100_000, 3 << 20])
        raw = b"x" * rng.choice([0, size // 2, size])
        start = time.monotonic()
        (reply,) = self.spoken(head(line, "Content-Type: text/plain", *framing(size, False), close=False) + raw)
        assert reply.headers["connection"] == "close", reply
        assert time.monotonic() - start < WAIT_S / 2
        return self.judged(reply)


# -- HTTP --------------------------------------------------------------------------------------------------------------


def head(line: str, *headers: str, close: bool = True) -> bytes:
    """The head of a request."""
    own = [] if any(name.lower().startswith("host:") for name in headers) else ["Host: localhost"]
    every = [f"{line} HTTP/1.1", *own, *headers, *(["Connection: close"] if close else [])]
    return "".join(f"{part}\r\n" for part in [*every, ""]).encode("latin-1", "replace")


def framing(size: int, chunked: bool) -> list[str]:
    """The header that says where the body ends."""
    return ["Transfer-Encoding: chunked"] if chunked else [f"Content-Length: {size}"]


def request(line: str, body: bytes = b"", *headers: str) -> bytes:
    """A request whose connection ends after its answer."""
    return head(line, *headers, *(framing(len(body), False) if body else [])) + body


def in_chunks(data: bytes, rng: Random) -> bytes:
    """A chunked body."""
    size = max(1, len(data) // rng.choice([1, 3, 50]))
    parts = [data[i : i + size] for i in range(0, len(data), size)]
    return b"".join(b"%x\r\n%b\r\n" % (len(part), part) for part in parts) + b"0\r\n\r\n"


def everything(connection: socket.socket) -> bytes:
    """What comes until the connection ends. A connection that does not end is a failure."""
    found = b""
    try:
        while part := connection.recv(1 << 20):
            found += part
    except TimeoutError:
        raise AssertionError(f"the connection stays open after {found[:1000]!r}") from None
    except ConnectionError:
        say(f"reset after {len(found)} bytes")
    return found


class _Source(io.BytesIO):
    """Bytes as the socket of several answers."""

    def makefile(self, mode: str) -> _Source:
        """Itself, because the next answer begins where one ends."""
        return self

    def close(self) -> None:
        """Stay open."""


def replies(data: bytes, method: str = "POST") -> list[Reply]:
    """The answers in some bytes. Raises AssertionError if they are anything else."""
    source, found = _Source(data), list[Reply]()
    while source.tell() < len(data):
        answer = http.client.HTTPResponse(source, method=method)  # type: ignore[arg-type]
        try:
            answer.begin()
            found.append(Reply(answer.status, answer.headers, answer.read()))
        except http.client.HTTPException as error:
            raise AssertionError(f"no answer of HTTP ({error!r}): {data[:1000]!r}") from error
    return found


def told(reply: Reply) -> tuple[str, str]:
    """Text and reason of an answer, whole or a stream."""
    if "event-stream" not in reply.headers["content-type"]:
        data = json.loads(reply.body)
        (choice,) = data["choices"]
        reason = data["trol_edge"]["finish_reason"]
        assert choice["finish_reason"] == REASONS[reason]
        return choice["message"]["content"], reason
    *events, done, rest = reply.body.decode().split("\n\n")
    assert (done, rest) == ("data: [DONE]", ""), reply.body[-300:]
    chunks = [json.loads(event.removeprefix("data: ")) for event in events]
    text = "".join(choice["delta"].get("content") or "" for chunk in chunks for choice in chunk["choices"])
    (reason,) = [chunk["trol_edge"]["finish_reason"] for chunk in chunks if "trol_edge" in chunk]
    return text, reason


# -- pictures ----------------------------------------------------------------------------------------------------------


def data_url(raw: bytes) -> str:
    """A picture in its address."""
    return "data:image/png;base64," + base64.b64encode(raw).decode()


def bomb(side: int) -> bytes:
    """A PNG that says it is very large."""

    def chunk(name: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    first = chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + first + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")


@functools.cache
def large(kind: str) -> bytes:
    """A picture of 144 million pixels in few bytes."""
    out = io.BytesIO()
    Image.new("1" if kind != "GIF" else "L", (12_000, 12_000)).save(
        out, kind, **({"compression": "group4"} if kind == "TIFF" else {})
    )
    return out.getvalue()
