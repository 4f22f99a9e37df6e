"""What strangers send to the server: an error object with the right status each time, and the server lives on."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import io
import json
import os
import socket
import ssl
import struct
import subprocess
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from tests.conftest import NANO
from tests.serving import Served, serving, waited_for
from trol_edge.errors import RequestError, UsageError
from trol_edge.runtime import Runtime
from trol_edge.serve import app, door, fetch
from trol_edge.serve.pictures import Sources
from trol_edge.serve.schema import parse
from trol_edge.serve.security import Keys, read_keys
from trol_edge.serve.settings import Settings
from trol_edge.testing import ScriptedRuntime

httpx = pytest.importorskip("httpx", reason="openai is not installed here")

SCENE = NANO / "scene.png"
KEY = "a-key-of-the-tests-0123456789"
PATH = "/v1/chat/completions"
CONNECT = socket.create_connection


def scripted(reached: Any) -> Runtime:
    return ScriptedRuntime("fine", step_s=0.001)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that the server may read, beside one that it may not."""
    made: Path = tmp_path_factory.mktemp("files")
    for name in ("open", "closed"):
        (made / name).mkdir()
        (made / name / "scene.png").write_bytes(SCENE.read_bytes())
    (made / "open" / "link.png").symlink_to(made / "closed" / "scene.png")
    (made / "open" / "sub").symlink_to(made / "closed")
    (made / "open" / "a #1.png").write_bytes(SCENE.read_bytes())
    os.mkfifo(made / "open" / "pipe.png")
    return made


@pytest.fixture(scope="module")
def served(folder: Path) -> Iterator[Served]:
    with serving(scripted, body_bytes=1 << 20, folders=(folder / "open",), fetch_hosts=("pictures.test",)) as found:
        yield found
        assert httpx.post(found.url + PATH, json=body("Still there?")).status_code == 200


def body(text: Any = "What?", *urls: str, **more: Any) -> dict[str, Any]:
    """A request."""
    pictures = [{"type": "image_url", "image_url": {"url": url}} for url in urls]
    return {"messages": [{"role": "user", "content": [*pictures, {"type": "text", "text": text}]}], **more}


def refusal(answer: Any) -> tuple[int, str | None, str | None]:
    """Status, code and field of an answer that is an error object."""
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"} and error["message"]
    assert answer.headers["x-request-id"]
    return answer.status_code, error["code"], error["param"]


def data(raw: bytes, kind: str = "image/png") -> str:
    return f"data:{kind};base64," + base64.b64encode(raw).decode()


def bomb() -> bytes:
    """A PNG of 60000 x 60000 pixels in some bytes."""

    def chunk(name: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    head = chunk(b"IHDR", struct.pack(">IIBBBBB", 60000, 60000, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", zlib.compress(b"\0" * 1000)) + chunk(b"IEND", b"")


USER = {"role": "user", "content": "What?"}
BODIES: list[tuple[Any, int, str | None, str | None]] = [
    (b"", 400, "invalid_json", None),
    (b"{", 400, "invalid_json", None),
    (b"[]", 400, "invalid_json", None),
    (b"\xff\xfe", 400, "invalid_json", None),
    (b'{"a": NaN}', 400, None, None),
    (b'{"seed": ' + b"9" * 5000 + b"}", 400, "invalid_json", None),
    (b"[" * 100_000, 400, "invalid_json", None),
    (b'{"messages": ' + b'{"a":' * 100_000, 400, "invalid_json", None),
    ({}, 400, "invalid_value", "messages"),
    ({"messages": []}, 400, "invalid_value", "messages"),
    ({"messages": [USER] * 1025}, 400, "invalid_value", "messages"),
    ({"messages": "What?"}, 400, "invalid_value", "messages"),
    ({"messages": ["What?"]}, 400, "invalid_value", "messages[0]"),
    ({"messages": [{"role": "robot", "content": "x"}]}, 400, "invalid_value", "messages[0].role"),
    ({"messages": [{"role": {}, "content": "x"}]}, 400, "invalid_value", "messages[0].role"),
    ({"messages": [{"role": "user"}]}, 400, "invalid_value", "messages[0].content"),
    ({"messages": [{"role": "user", "content": [{"type": "input_audio"}]}]}, 400, "unsupported_parameter", None),
    ({"messages": [{"role": "user", "content": " "}]}, 400, None, None),
    ({"messages": [{"role": "user", "content": "\ud800"}]}, 400, None, None),
    ({"messages": [USER, {"role": "assistant", "content": "x"}]}, 400, "invalid_value", "messages"),
    ({"messages": [{"role": "assistant", "content": "x"}, USER]}, 400, "invalid_value", "messages[0]"),
    ({"messages": [USER, {"role": "system", "content": "x"}, USER]}, 400, "invalid_value", "messages[1]"),
    ({"messages": [{**USER, "name": "me"}]}, 400, "unsupported_parameter", "messages[0].name"),
    (body(model="gpt-4"), 404, "model_not_found", "model"),
    (body(n=2), 400, "unsupported_value", "n"),
    (body(n=True), 400, "unsupported_value", "n"),
    (body(tools=[{"type": "function"}]), 400, "unsupported_value", "tools"),
    (body(frequency_penalty=0.5), 400, "unsupported_value", "frequency_penalty"),
    (body(num_beams=2), 400, "unsupported_parameter", "num_beams"),
    (body(temprature=1), 400, "unsupported_parameter", "temprature"),
    (body(image_tokens=0), 400, "invalid_value", None),
    (body(image_tokens=True), 400, "invalid_value", None),
    (body(max_tiles=2), 400, None, None),  # a model that does not cut pictures
    (body(session=1), 400, "unsupported_parameter", "session"),
    (body(temperature="warm"), 400, "invalid_value", None),
    (body(temperature=-1), 400, "invalid_value", None),
    (body(top_p=2), 400, "invalid_value", None),
    (body(seed=1.5), 400, "invalid_value", None),
    (body(stop=3), 400, None, None),
    (body(stop=["x"] * 300), 400, None, None),
    (body(max_tokens=0), 400, "invalid_value", "max_tokens"),
    (body(max_tokens=True), 400, "invalid_value", "max_tokens"),
    (body(max_tokens=2, max_completion_tokens=3), 400, "invalid_value", "max_tokens"),
    (body(stream="yes"), 400, "invalid_value", "stream"),
    (body(stream_options={"include_usage": True}), 400, "invalid_value", "stream_options"),
    (body(stream=True, stream_options={"x": 1}), 400, "unsupported_parameter", "stream_options.x"),
    (body(top_logprobs=2), 400, "invalid_value", "top_logprobs"),
    (body(logprobs=True, top_logprobs=50), 400, "invalid_value", None),
    (body(deadline_ms="1"), 400, "invalid_value", None),
    (body(answer_mode="fast"), 400, "invalid_value", None),
    (body(truncation="some"), 400, "invalid_value", "truncation"),
    (body(conversation="x" * 200), 400, "invalid_value", "conversation"),
    (body(conversation=7), 400, "invalid_value", "conversation"),
    (body(choose=["one"]), 400, "invalid_value", "choose"),
    (body(choose={"a": "b"}), 400, "invalid_value", "choose"),
    (body(choose=["a", "b"], yes_no=True), 400, "invalid_value", "yes_no"),
    (body(choose=["a", "b"], stop="x"), 400, "unsupported_parameter", "stop"),
    (body(response_format="json"), 400, "invalid_value", "response_format"),
    (body(response_format={"type": "xml"}), 400, "invalid_value", "response_format.type"),
    (body(response_format={"type": "json_schema"}), 400, "invalid_value", "response_format.json_schema"),
    (body(response_format={"type": "regex", "regex": "("}), 400, "invalid_value", "response_format.regex"),
    (body("x" * 100_000), 400, "context_length_exceeded", None),
    (body("What?", data(b"no picture")), 400, "invalid_image", None),
    (body("What?", data(SCENE.read_bytes()[:100])), 400, "invalid_image", None),
    (body("What?", data(bomb())), 400, "invalid_image", None),
    (body("What?", data(b"<svg/>", "text/html")), 400, "invalid_image_url", "image_url.url"),
    (body("What?", "data:image/png;base64,@@@"), 400, "invalid_image_url", "image_url.url"),
    (body("What?", "data:image/png,abc"), 400, "invalid_image_url", "image_url.url"),
    (body("What?", "data:"), 400, "invalid_image_url", "image_url.url"),
    (body("What?", ""), 400, "invalid_image_url", "image_url.url"),
    (body("What?", "ftp://pictures.test/a.png"), 400, "invalid_image_url", "image_url.url"),
    (body("What?", *[data(SCENE.read_bytes()[:20])] * 600), 400, "context_length_exceeded", None),
]


@pytest.mark.parametrize(("given", "status", "code", "param"), BODIES, ids=range(len(BODIES)))
def test_bad_bodies(served: Served, given: Any, status: int, code: str | None, param: str | None) -> None:
    """Each is refused by name."""
    raw = given if isinstance(given, bytes) else json.dumps(given).encode()
    found = refusal(httpx.post(served.url + PATH, content=raw, headers={"content-type": "application/json"}))
    assert found[0] == status
    assert code is None or found[1] == code
    assert param is None or found[2] == param


@pytest.mark.parametrize("streaming", [False, True])
def test_a_schema_that_nothing_satisfies(served: Served, streaming: bool) -> None:
    """Before a stream begins."""
    pytest.importorskip("llguidance")
    for schema in ({"type": "string", "enum": []}, {"type": "nothing"}, {"$ref": "#/nowhere"}, {"not": {}}):
        form = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
        answer = httpx.post(served.url + PATH, json=body(response_format=form, stream=streaming))
        assert refusal(answer)[0] == 400, schema
    deep: dict[str, Any] = {"type": "string"}
    for _ in range(300):
        deep = {"type": "array", "items": deep}
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": deep}}
    assert httpx.post(served.url + PATH, json=body(response_format=form)).status_code in (200, 400)


def test_large_and_mistyped_bodies(served: Served) -> None:
    """413 before a large body is read, also without a length; 415, 404, 405."""
    big = b"x" * (2 << 20)
    typed = {"content-type": "application/json"}
    assert refusal(httpx.post(served.url + PATH, content=big, headers=typed))[:2] == (413, "body_too_large")
    parts = iter([big[: 1 << 19]] * 4)
    assert refusal(httpx.post(served.url + PATH, content=parts, headers=typed))[:2] == (413, "body_too_large")
    assert refusal(httpx.post(served.url + PATH, content=b"{}"))[0] == 415
    assert refusal(httpx.post(f"{served.url}/v1/embeddings", json={}))[:2] == (404, "not_found")
    assert refusal(httpx.get(f"{served.url}/../../etc/passwd"))[0] == 404
    assert refusal(httpx.get(served.url + PATH))[:2] == (405, "method_not_allowed")
    assert refusal(httpx.request("PURGE", f"{served.url}/"))[0] == 405


# -- where pictures come from ------------------------------------------------------------------------------------------


def test_files_below_named_folders(served: Served, folder: Path) -> None:
    """What is in the folder is read; links, parents, other hosts and pipes are not."""
    inside = (folder / "open").as_uri()
    for url in (
        f"{inside}/scene.png",
        f"{inside}/a%20%231.png",
        inside.replace("file://", "file://localhost") + "/scene.png",
    ):
        assert httpx.post(served.url + PATH, json=body("What?", url)).status_code == 200, url
    wrong = [
        f"{inside}/link.png", f"{inside}/sub/scene.png", f"{inside}/../closed/scene.png",
        f"{inside}/%2e%2e/closed/scene.png", f"{inside}/pipe.png", f"{inside}/nothing.png", f"{inside}",
        f"{(folder / 'closed').as_uri()}/scene.png", f"{inside}x/scene.png", "file:///etc/passwd", "file:scene.png",
        f"{inside}/scene.png%00.txt", inside.replace("file://", "file://other") + "/scene.png", "FILE:///etc/passwd",
        f"{inside}/scene.png?x", "file:////etc/passwd", "file://", f"{inside}/" + "a/" * 3000, "file:///dev/zero",
    ]  # fmt: skip
    for url in wrong:
        answer = httpx.post(served.url + PATH, json=body("What?", url))
        assert refusal(answer) == (400, "invalid_image_url", "image_url.url"), url
    with pytest.raises(RequestError, match="no folder"):
        Sources().read(f"{inside}/scene.png")


NOT_PUBLIC = [
    "127.0.0.1", "127.1.2.3", "0.0.0.0", "10.0.0.1", "172.16.0.1", "192.168.1.1", "169.254.169.254", "100.64.0.1",
    "224.0.0.1", "255.255.255.255", "::1", "::", "::ffff:127.0.0.1", "::ffff:10.0.0.1", "fe80::1", "fe80::1%eth0",
    "fc00::1", "fd12:3456::1", "ff02::1", "2002:7f00:1::", "64:ff9b::7f00:1", "64:ff9b::a00:1", "2001:db8::1",
    "2001:0:53aa:64c:0:fbff:80ff:fffe", "nonsense", "",
]  # fmt: skip


@pytest.mark.parametrize("address", NOT_PUBLIC)
def test_addresses_that_are_not_public(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever name leads there, nothing is connected to; one such address among public ones is enough."""
    assert not fetch.is_public(address)
    asked: list[Any] = []

    def resolved(name: str, port: int, **more: Any) -> list[Any]:
        asked.append(name)
        return [(2, 1, 6, "", ("93.184.216.34", port)), (2, 1, 6, "", (address, port))]

    monkeypatch.setattr(socket, "getaddrinfo", resolved)
    monkeypatch.setattr(socket, "create_connection", lambda *_, **__: pytest.fail("a connection was made"))
    with pytest.raises(RequestError, match="not a public address"):
        fetch.fetch("http://pictures.test/a.png", {"pictures.test"}, 1000)
    assert asked == ["pictures.test"]


def test_public_addresses() -> None:
    """The rule forbids no ordinary address."""
    for address in ("93.184.216.34", "8.8.8.8", "2606:2800:220:1::1", "::ffff:8.8.8.8", "64:ff9b::808:808"):
        assert fetch.is_public(address), address


@pytest.mark.parametrize(
    "url",
    [
        "http://other.test/a.png", "http://127.0.0.1/a.png", "http://2130706433/", "http://0x7f.1/", "http://[::1]/",
        "http://[::ffff:127.0.0.1]/", "http://localhost/", "http://pictures.test.evil.test/", "http://pictures.test./",
        "http://pictures.test@evil.test/", "http://evil.test@pictures.test/", "http://pictures.test:22/",
        "http://pictures.test\\@evil.test/", "http://pictures.test#@evil.test/\r\nx", "http:///a.png", "http:a.png",
        "http://pictures.test:99999/", "http://pictures.test:x/", "https://evil.test/?http://pictures.test/",
        "http://pictures.test/\r\nHost: evil", "http://pictures.test/ a", "http://p\u0131ctures.test/", "http://[", "http://",
    ],
)  # fmt: skip
def test_addresses_that_are_refused(url: str, served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before any name is looked up."""
    real = socket.getaddrinfo

    def only_own(name: Any, *more: Any, **options: Any) -> Any:
        assert name == "127.0.0.1", f"{name} was looked up"
        return real(name, *more, **options)

    monkeypatch.setattr(socket, "getaddrinfo", only_own)
    found = refusal(httpx.post(served.url + PATH, json=body("What?", url)))
    assert found[0] in (400, 403) and found[1:] == ("invalid_image_url", "image_url.url")


class Web:
    """A web server of one answer, on this machine."""

    def __init__(self, answer: bytes, chunk_s: float = 0.0) -> None:
        import threading
        import time

        self.requests: list[bytes] = []
        self._listener = socket.create_server(("127.0.0.1", 0))

        def work() -> None:
            connection, _ = self._listener.accept()
            with connection:
                self.requests.append(connection.recv(65536))
                try:
                    for i in range(0, len(answer), 1000 if not chunk_s else 1):
                        connection.sendall(answer[i : i + (1000 if not chunk_s else 1)])
                        time.sleep(chunk_s)
                except OSError:
                    return

        threading.Thread(target=work, daemon=True).start()

    def lead_here(self, patch: pytest.MonkeyPatch) -> None:
        """Let a public name's checked address lead here."""
        real, port = CONNECT, self._listener.getsockname()[1]
        patch.setattr(fetch, "public_addresses", lambda name, port: ["203.0.113.1"])
        patch.setattr(socket, "create_connection", lambda address, timeout: real(("127.0.0.1", port), timeout))


def test_a_picture_by_http(monkeypatch: pytest.MonkeyPatch) -> None:
    """From a named host, with its name in the request; without redirects, without end, or forever it is refused."""
    picture = SCENE.read_bytes()
    ok = b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(picture) + picture
    web = Web(ok)
    web.lead_here(monkeypatch)
    assert fetch.fetch("http://pictures.test/a.png?b=c", {"pictures.test"}, 1 << 20) == picture
    assert web.requests[0].startswith(b"GET /a.png?b=c HTTP/1.1\r\nHost: pictures.test\r\n")
    for answer, said in (
        (b"HTTP/1.1 302 Found\r\nLocation: http://127.0.0.1/\r\nContent-Length: 0\r\n\r\n", "status 302"),
        (b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n", "status 404"),
        (ok, "more than 100 bytes"),
        (ok.replace(b"Content-Length: ", b"Content-Length: 9")[:100], "cut off"),
        (b"\x00\x01\x02" * 100, "cannot be fetched"),
    ):
        Web(answer).lead_here(monkeypatch)
        with pytest.raises(RequestError, match=said):
            fetch.fetch("http://pictures.test/a.png", {"pictures.test"}, 100)
    monkeypatch.setattr(fetch, "SECONDS", 0.3)
    Web(ok, chunk_s=0.02).lead_here(monkeypatch)
    with pytest.raises(RequestError, match=r"cut off|within"):
        fetch.fetch("http://pictures.test/a.png", {"pictures.test"}, 1 << 20)


# -- connections -------------------------------------------------------------------------------------------------------


def spoken(served: Served, raw: bytes, until: bytes = b"", timeout: float = 10.0) -> bytes:
    """What the server answers to bytes, until it closes the connection or `until` came."""
    with socket.create_connection(("127.0.0.1", served.server.port), timeout=timeout) as connection:
        found = b""
        with contextlib.suppress(ConnectionError):  # closed before everything was sent, or read
            connection.sendall(raw)
        with contextlib.suppress(ConnectionError):
            while part := connection.recv(65536):
                found += part
                if until and until in found:
                    break
        return found


def test_what_is_not_http(served: Served) -> None:
    """400 with an error object, and the connection is closed."""
    for raw in (b"\x16\x03\x01\x02\x00\x01\x00", b"GET / HTTP/1.1\r\n\r\n", b"GET  HTTP/9\r\n\r\n",
                b"GET / HTTP/1.1\r\nHost: localhost\r\nX: a\x00b\r\n\r\n", b"x" * 100_000,
                b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\n",
                b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: -5\r\n\r\n",
                b"GET / HTTP/1.1\r\nHost: localhost\r\nHost: localhost\r\n\r\n", b"\r\n" * 100_000,
                b"CONNECT a:1 HTTP/1.1\r\nHost: localhost\r\n\r\n",
                b"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\nContent-Length: 1\r\n\r\n",
                b"GET / HTTP/1.1\r\nHost: localhost\r\n" + b"A: b\r\n" * 400_000 + b"\r\n"):  # fmt: skip
        found = spoken(served, raw)
        assert found.startswith(b"HTTP/1.1 400") and b'"code": "invalid_http"' in found, raw[:40]


def test_pipelining(served: Served) -> None:
    """Requests that come together are answered in order."""
    head = b"GET %s HTTP/1.1\r\nHost: localhost\r\n\r\n"
    raw = head % b"/health/live" + head % b"/v1/models" + head % b"/nothing"
    found = spoken(served, raw, until=b"there is no path")
    assert found.index(b"alive") < found.index(b'"list"') < found.index(b"there is no path")
    one = json.dumps(body("What?")).encode()
    post = b"POST %s HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n%s"
    found = spoken(served, post % (PATH.encode(), len(one), one) * 2 + head % b"/health/live", until=b"alive")
    assert found.count(b'"content": "fine"') == 2
    for wrong in (b"GARBAGE\r\n\r\n", head % b"/health/live" * 100, head[:-4] + b"X" * 100_000):  # too many, too long
        found = spoken(served, post % (PATH.encode(), len(one), one) + wrong)
        assert 0 < found.index(b'"content": "fine"') < found.index(b'"code": "invalid_http"')
        assert found.count(b"HTTP/1.1 400") == 1


def test_headers_without_an_end(served: Served) -> None:
    """Of a request, of a chunk, and after a body: 400, whatever has come by then."""
    post = (
        b"POST %s HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n"
    )
    for begun, endless in (
        (b"GET /", b"a"),
        (b"GET / HTTP/1.1\r\nHost: localhost\r\nX: ", b"a"),
        (post % PATH.encode() + b"1;", b"a"),
        (post % PATH.encode() + b"1\r\n{\r\n0\r\n", b"A: b\r\n"),
    ):
        found = spoken(served, begun + endless * 1_000_000)
        assert found.startswith(b"HTTP/1.1 400") and b'"code": "invalid_http"' in found, begun


def test_what_follows_a_body_is_no_header(served: Served) -> None:
    """Nor does it change those before it."""
    one = json.dumps(body("What?")).encode()
    post = (
        b"POST %s HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n"
    )
    chunks = b"%x\r\n%s\r\n0\r\nContent-Type: text/html\r\nHost: evil.test\r\n\r\n" % (len(one), one)
    assert b'"content": "fine"' in spoken(served, post % PATH.encode() + chunks, until=b"fine")


def test_a_wish_for_another_protocol_is_not_heard(served: Served) -> None:
    """As Java's client sends it with every request: the request is answered, and the next one, too."""
    one = json.dumps(body("What?")).encode()
    post = b"POST %s HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: %d\r\n"
    wish = b"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAEAAEAA\r\n\r\n"
    live = b"GET /health/live HTTP/1.1\r\nHost: localhost\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n"
    found = spoken(served, (post % (PATH.encode(), len(one)) + wish + one) * 2 + live, until=b"alive")
    assert found.count(b'"content": "fine"') == 2


def test_pipelined_requests_end_with_their_client() -> None:
    """The first of them, too, which is being answered."""
    one = json.dumps(body("What?")).encode()
    post = b"POST %s HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n%s"
    with serving(lambda reached: ScriptedRuntime("x" * 200, step_s=0.01)) as slow:
        with socket.create_connection(("127.0.0.1", slow.server.port)) as gone:
            gone.sendall(post % (PATH.encode(), len(one), one) * 2)
            waited_for(lambda: slow.app.line.inside == 1)
        waited_for(lambda: slow.app.line.inside == 0)
        assert slow.app.metrics.left == 1


@pytest.mark.slow
def test_half_open_connections(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    """Clients that say nothing, begin a header, or never send their body, hold nothing for long."""
    monkeypatch.setattr(door, "HEADER_S", 0.2)
    monkeypatch.setattr(app, "BODY_S", 0.2)
    assert spoken(served, b"") == b""
    assert spoken(served, b"GET / HTTP/1.1\r\nHost: loc") == b""
    slow = b"POST %s HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: 99\r\n\r\n{"
    assert spoken(served, slow % PATH.encode()).startswith(b"HTTP/1.1 408")
    live = b"GET /health/live HTTP/1.1\r\nHost: localhost\r\n\r\n"
    monkeypatch.setattr(served.server.config, "timeout_keep_alive", 0.2)
    assert spoken(served, live + b"GET /hea").count(b"HTTP/1.1 200") == 1  # and then closed
    with socket.create_connection(("127.0.0.1", served.server.port)) as gone:
        gone.sendall(slow % PATH.encode())
        waited_for(lambda: served.app.line.inside == 1)
    waited_for(lambda: served.app.line.inside == 0)


def test_bodies_that_are_not_read(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    """The answer comes at once. The rest of the body is read for a while, so that its sender sees the answer."""
    large = b"POST %s HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n"
    with socket.create_connection(("127.0.0.1", served.server.port), timeout=10) as connection:
        connection.sendall(large % (PATH.encode(), 16 << 20))
        found = connection.recv(65536)
        assert found.startswith(b"HTTP/1.1 413")
        for _ in range(16):
            connection.sendall(b" " * (1 << 20))  # a connection that was reset would raise here
        while part := connection.recv(65536):
            found += part
        assert b"body_too_large" in found
    monkeypatch.setattr(app, "DRAIN_S", 0.5)
    monkeypatch.setattr(app, "DRAIN_BYTES", 1 << 20)
    with socket.create_connection(("127.0.0.1", served.server.port), timeout=10) as connection:
        connection.sendall(large % (PATH.encode(), 1 << 40))
        with pytest.raises(ConnectionError):
            for _ in range(300):
                connection.sendall(b" " * (1 << 20))
    begun = b"%s %s HTTP/1.1\r\nHost: localhost\r\nContent-Length: 99\r\n\r\n{"
    for method, path, status in ((b"GET", b"/health/live", b"200"), (b"POST", b"/", b"405"), (b"POST", b"/x", b"404")):
        found = spoken(served, begun % (method, path))  # which ends although the body never comes
        assert found.startswith(b"HTTP/1.1 " + status) and b"connection: close" in found.lower(), found


def test_a_body_that_is_no_http_ends_its_request(served: Served) -> None:
    """Nothing is said after the 400, and nothing fails."""
    start = len(served.log)
    post = (
        b"POST %s HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n"
    )
    for content in (b"zz\r\n", b"200001\r\n" + b" " * 0x200001 + b"\r\nzz\r\n"):  # the second is too large, as well
        found = spoken(served, post % PATH.encode() + content)
        assert found.count(b"HTTP/1.1 4") == 1, found
    waited_for(lambda: served.app.line.inside == 0)
    assert not [line for line in served.log[start:] if line["level"] == "error"]


@pytest.mark.slow
def test_slow_readers(monkeypatch: pytest.MonkeyPatch) -> None:
    """One who reads nothing blocks nobody, and is cut off."""
    monkeypatch.setattr(door, "READER_S", 0.3)
    with serving(lambda reached: ScriptedRuntime("x" * 3000, context=8192)) as served:
        one = json.dumps(body("What?", stream=True, logprobs=True, top_logprobs=20, max_tokens=3000)).encode()
        post = b"POST %s HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n%s"
        with socket.socket() as slow:
            slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            slow.connect(("127.0.0.1", served.server.port))
            slow.sendall(post % (PATH.encode(), len(one), one))
            waited_for(lambda: served.app.line.inside == 1)
            answer = httpx.post(served.url + PATH, json=body("What?", max_tokens=2), timeout=60)
            assert answer.json()["choices"][0]["message"]["content"] == "xx"
            waited_for(lambda: served.app.line.inside == 0)


def test_a_slow_reader_loses_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stream that waited for its reader until long after the last token is whole."""
    made = door.Connection.connection_made

    def small(self: door.Connection, transport: Any) -> None:
        transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        transport.set_write_buffer_limits(high=1024)
        made(self, transport)

    monkeypatch.setattr(door.Connection, "connection_made", small)
    with serving(lambda reached: ScriptedRuntime("x" * 200)) as served:
        one = json.dumps(body("What?", stream=True, logprobs=True, top_logprobs=20)).encode()
        post = b"POST %s HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nConnection: close\r\n"
        with socket.socket() as slow:
            slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            slow.connect(("127.0.0.1", served.server.port))
            slow.sendall(post % PATH.encode() + b"Content-Length: %d\r\n\r\n%s" % (len(one), one))
            waited_for(lambda: served.app.line.inside == 1)
            httpx.post(served.url + PATH, json=body("What?", max_tokens=2), timeout=60)  # after the stream's last token
            assert served.app.line.inside == 1
            slow.settimeout(60)
            found = b""
            while part := slow.recv(65536):
                found += part
        whole = "".join(line for line in found.decode().split("\r\n") if line.startswith("data") or "logprob" in line)
        assert whole.count('"top_logprobs"') == 200 and "data: [DONE]" in whole


def test_a_stream_whose_client_left_keeps_no_task(served: Served) -> None:
    """Each task of a stream ends with it."""
    one = json.dumps(body("What?", stream=True)).encode()
    post = b"POST %s HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n%s"
    loop = served.server.servers[0].get_loop()
    for _ in range(10):
        with socket.create_connection(("127.0.0.1", served.server.port)) as gone:
            gone.sendall(post % (PATH.encode(), len(one), one))
            gone.recv(1)
        waited_for(lambda: served.app.line.inside == 0)
    waited_for(lambda: not any("_Stream" in repr(task) for task in asyncio.all_tasks(loop)))


# -- who may ask -------------------------------------------------------------------------------------------------------


def test_keys(tmp_path: Path) -> None:
    """Everything but health and the page needs one; each is compared, and none is shown in the log."""
    path = tmp_path / "keys"
    path.write_text(f"# robots\nanother-key-0123456789\n{KEY}\n")
    with serving(scripted, keys=read_keys(path)) as served:
        for given in ({}, {"authorization": "Bearer wrong"}, {"authorization": f"Basic {KEY}"},
                      {"authorization": f"Bearer {KEY}x"}, {"authorization": "Bearer"},
                      {"authorization": KEY}):  # fmt: skip
            for answer in (
                httpx.post(served.url + PATH, json=body(), headers=given),
                httpx.get(f"{served.url}/metrics", headers=given),
                httpx.get(f"{served.url}/v1/models", headers=given),
            ):
                assert refusal(answer)[:2] == (401, "invalid_api_key")
                assert answer.headers["www-authenticate"] == "Bearer"
        good = {"authorization": f"Bearer {KEY}"}
        assert httpx.post(served.url + PATH, json=body(), headers=good).status_code == 200
        assert httpx.get(f"{served.url}/metrics", headers=good).status_code == 200
        assert httpx.get(f"{served.url}/health/ready").status_code == 200
        assert httpx.get(served.url).status_code == 200
        assert KEY not in json.dumps(served.log)


def test_why_a_model_failed_is_for_callers_with_a_key() -> None:
    """The reason names files of the server."""

    def fail(reached: Any) -> Runtime:
        raise UsageError("/opt/robot/secret/bundle.json is damaged")

    with serving(fail, keys=Keys([KEY])) as served:
        for headers, shown in (
            ({}, False),
            ({"authorization": "Bearer x"}, False),
            ({"authorization": f"Bearer {KEY}"}, True),
        ):
            answer = httpx.get(f"{served.url}/health/ready", headers=headers)
            assert answer.status_code == 503 and answer.json()["status"] == "failed" and answer.json()["reason"]
            assert ("/opt/robot" in answer.text) == shown
        assert "/opt/robot" in json.dumps(served.log)
    with serving(fail) as served:
        assert "/opt/robot" in httpx.get(f"{served.url}/health/ready").text


def test_every_key_is_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whichever fits, and however long the given one is: by hashes, in constant time."""
    import hmac

    compared: list[tuple[int, int]] = []
    real = hmac.compare_digest
    monkeypatch.setattr(hmac, "compare_digest", lambda a, b: compared.append((len(a), len(b))) or real(a, b))  # type: ignore[func-returns-value]
    keys = Keys(["first-key-0123456789", KEY])
    assert keys.fit("Bearer first-key-0123456789") and not keys.fit("Bearer x") and not keys.fit("")
    assert compared == [(32, 32)] * 6


def test_settings_that_are_refused(tmp_path: Path) -> None:
    """Above all an address that others can reach, without a key."""
    for host in ("0.0.0.0", "::", "192.0.2.1"):
        with pytest.raises(UsageError, match="can be reached from other machines"):
            Settings("x", host=host)
    assert Settings("x", host="0.0.0.0", keys=Keys([KEY])) and Settings("x", host="localhost")
    (tmp_path / "empty").write_text("# none\n")
    for wrong in ({"port": 70000}, {"queue": 0}, {"sessions": 0}, {"tls_cert": tmp_path},
                  {"folders": (tmp_path / "x",)}, {"host": "no.such.host.invalid"}, {"host": ""}):  # fmt: skip
        with pytest.raises(UsageError):
            Settings("x", **wrong)  # type: ignore[arg-type]
    for text in (tmp_path / "empty", tmp_path / "missing"):
        with pytest.raises(UsageError):
            read_keys(text)
    for key in ("short", "with a space in it, and long", "ü" * 20):
        with pytest.raises(UsageError):
            Keys([key])


def test_other_pages_in_the_browser(served: Served) -> None:
    """A page of another origin, and a foreign name that leads here, are refused."""
    for headers in ({"origin": "http://evil.test"}, {"origin": "null"}, {"host": "evil.test"},
                    {"host": f"evil.test:{served.server.port}"}, {"host": "127.0.0.1.evil.test"}):  # fmt: skip
        assert refusal(httpx.post(served.url + PATH, json=body(), headers=headers))[0] == 403
    for headers in ({"origin": served.url}, {"host": "localhost:1"}, {"host": "[::1]:80"}):
        assert httpx.post(served.url + PATH, json=body(), headers=headers).status_code == 200


def test_header_injection(served: Served) -> None:
    """Nothing a client sends begins a header or a log line of its own."""
    found = spoken(
        served, b'GET /health/live HTTP/1.1\r\nHost: localhost\r\nX-Request-Id: a\tb"\r\n\r\n', until=b"alive"
    )
    assert b'a\tb"' not in found
    answer = httpx.get(f"{served.url}/a%0d%0aX-Evil:%201%0a{{}}")
    assert refusal(answer)[0] == 404 and "x-evil" not in answer.headers
    assert all(set(line) >= {"time", "event"} for line in served.log)


def test_tls(tmp_path: Path) -> None:
    """https with a certificate of one's own; http to that port is no answer."""
    cert, key = tmp_path / "cert.pem", tmp_path / "key.pem"
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "1",
         "-subj", "/CN=localhost", "-addext", "subjectAltName=IP:127.0.0.1", "-keyout", key, "-out", cert],
        check=True, capture_output=True,
    )  # fmt: skip
    with serving(scripted, tls_cert=cert, tls_key=key) as served:
        trusted = ssl.create_default_context(cafile=str(cert))
        assert httpx.post(served.url + PATH, json=body(), verify=trusted).status_code == 200
        with pytest.raises(httpx.HTTPError):
            httpx.get(served.url.replace("https", "http"))
    with pytest.raises(UsageError, match="cannot be used"), serving(scripted, tls_cert=key, tls_key=cert):
        pass


def test_a_failing_backend_is_an_error_object() -> None:
    """Of the server, without its insides; whole and in a stream."""

    def fail(question: str) -> None:
        if question == "Fail?":
            raise ZeroDivisionError("a secret")

    with serving(lambda reached: ScriptedRuntime("fine", failure=fail)) as served:
        for stream in (False, True):
            answer = httpx.post(served.url + PATH, json=body("Fail?", stream=stream))
            assert refusal(answer)[0] == 500 and "secret" not in answer.text
        assert httpx.post(served.url + PATH, json=body()).status_code == 200
        assert "a secret" in json.dumps(served.log)


def test_large_pictures_are_refused_before_the_queue(served: Served) -> None:
    """A body within its limit may still hold a picture that no model takes."""
    buffer = io.BytesIO()
    Image.new("1", (20000, 20000)).save(buffer, "PNG")
    assert refusal(httpx.post(served.url + PATH, json=body("What?", data(buffer.getvalue()))))[1] == "invalid_image"


def test_parsing_never_fails_otherwise() -> None:
    """Random changes of a good request: an error of ours, or a request."""
    import random

    dice = random.Random(5)
    good = json.dumps(body("What?", "data:,", stream=True, stop=["a"], choose=["a", "b"], logprobs=True)).encode()
    values = [None, True, -1, 1e300, "", "x", [], {}, [[]], {"type": {}}, [None], "\ud800"]
    for i in range(3000):
        if i % 2:
            raw = bytearray(good)
            for _ in range(dice.randint(1, 4)):
                raw[dice.randrange(len(raw))] = dice.randrange(256)
            changed = bytes(raw)
        else:
            tree = json.loads(good)
            node: Any = tree
            while isinstance(node, (dict, list)) and node:
                keys = list(node) if isinstance(node, dict) else list(range(len(node)))
                at = dice.choice(keys)
                if dice.random() < 0.4 or not isinstance(node[at], (dict, list)):
                    node[at] = dice.choice(values)
                    break
                node = node[at]
            changed = json.dumps(tree).encode()
        try:
            parse(changed, "trol")
        except RequestError as error:
            assert error.status in (400, 404) and str(error)
