"""Loads `trol-edge serve` on this machine: many clients of all kinds, and what the server costs above a Runtime.

    python -m tests.bench.load build/trol-nano --seconds 300

The server is a process of its own. Every answer is compared with one that a Runtime of this process made alone before.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import contextlib
import http.client
import io
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from trol_edge.errors import TrolEdgeError
from trol_edge.measure.soak import Slope, judge
from trol_edge.runtime import Runtime

QUESTIONS = ("What is left of the red circle?", "Describe the scene.", "How many objects are there?")
OPTIONS = ("one", "two", "three", "none")
MAX_TOKENS = 24
BODY_MB = 1
PATH = "/v1/chat/completions"
START_S = 60.0
LONG = {"temperature": 4.0, "seed": 7, "max_tokens": 200}  # an answer that hardly ends by itself
# What the issue of the server asked for.
REQUEST_MS, TOKEN_MS, WAIT_RATIO = 2.0, 0.2, 3.0


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns 1 if an answer was wrong or memory grew."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle")
    parser.add_argument(
        "--seconds", type=float, default=300.0, help="Seconds of load; with 0 only the overhead is measured."
    )
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=200, help="Calls for each figure of the overhead.")
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args(arguments)
    try:
        result = measure(Path(given.bundle), given.seconds, given.clients, given.rounds)
    except TrolEdgeError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(json.dumps(result) if given.json else lines(result))
    return 1 if result["wrong"] or result["memory"]["flat"] is False else 0


def measure(bundle: Path, seconds: float, clients: int, rounds: int) -> dict[str, Any]:
    """Start a server, measure its overhead, then load it."""
    with Runtime(bundle, threads=1) as runtime:
        cases = Cases(runtime)
        command = [sys.executable, "-m", "trol_edge", "serve", str(bundle), "--port", "0", "--threads", "1"]
        command += ["--queue", str(2 * clients), "--max-body-mb", str(BODY_MB)]
        with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as server:
            try:
                port = listening(server)
                overhead = overhead_of(runtime, port, server.pid, cases, rounds)
                crew = Crew(port, cases, server.pid)
                if seconds > 0:
                    asyncio.run(crew.load(seconds, clients))
            finally:
                server.send_signal(signal.SIGTERM)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    server.wait(30)
                server.kill()
        if server.returncode != 0:
            crew.wrong.append(f"the server ended with {server.returncode}")
    slope: Slope | None = judge(crew.memory) if len(crew.memory) > 20 else None
    waits = crew.waits or [0.0]
    return {
        "seconds": seconds,
        "clients": clients,
        "calls": dict(sorted(crew.calls.items())),
        "wrong": crew.wrong[:20],
        "overhead_ms": overhead,
        "wait_ms": {"mean": statistics.fmean(waits), "longest": max(waits), "count": len(waits)},
        "memory": {
            "flat": None if slope is None else slope.flat,
            "mb_per_minute": None if slope is None else slope.mb_per_minute,
            "resident_mb": None if slope is None else slope.resident_bytes / 1e6,
        },
    }


def lines(result: dict[str, Any]) -> str:
    """The result in words."""
    over, wait, memory = result["overhead_ms"], result["wait_ms"], result["memory"]
    ratio = wait["longest"] / max(wait["mean"], 1e-9)
    overhead = (
        f"overhead, processor time (wall time): {over['request']:.2f} ({over['request_wall']:.2f}) ms per request, aim "
        f"{REQUEST_MS}; {over['token']:.3f} ({over['token_wall']:.3f}) ms per streamed token, aim {TOKEN_MS}; the "
        f"Runtime's own call takes {over['generate']:.2f} ms"
    )
    if not result["seconds"]:
        return overhead
    found = [
        f"{sum(result['calls'].values())} calls by {result['clients']} clients in {result['seconds']:.0f} s: "
        + ", ".join(f"{count} {kind}" for kind, count in result["calls"].items()),
        f"wrong: {len(result['wrong'])}" + "".join(f"\n  {line}" for line in result["wrong"]),
        overhead,
        f"waiting: mean {wait['mean']:.1f} ms, longest {wait['longest']:.1f} ms, {ratio:.1f} times the mean "
        f"(aim {WAIT_RATIO:.0f})",
    ]
    if memory["flat"] is None:
        found.append("memory: the run was too short to judge")
    else:
        found.append(
            f"memory: {memory['resident_mb']:.0f} MB, {memory['mb_per_minute']:+.2f} MB per minute, "
            f"{'flat' if memory['flat'] else 'it grows'}"
        )
    return "\n".join(found)


class Cases:
    """Questions with the answers that a Runtime gives to them alone."""

    def __init__(self, runtime: Runtime) -> None:
        dice = np.random.default_rng(0)
        frames = [dice.integers(0, 256, (*size, 3), dtype=np.uint8) for size in ((120, 160), (90, 64), (333, 200))]
        self.texts: dict[tuple[str, int], str] = {}
        self.turns: dict[tuple[str, int], tuple[str, str]] = {}
        self.chosen: dict[int, str] = {}
        self.urls: list[str] = []
        for at, frame in enumerate(frames):
            file = io.BytesIO()
            Image.fromarray(frame).save(file, "PNG")
            self.urls.append("data:image/png;base64," + base64.b64encode(file.getvalue()).decode())
            self.chosen[at] = str(runtime.choose(QUESTIONS[2], OPTIONS, frame))
            for question in QUESTIONS:
                self.texts[question, at] = str(runtime.generate(question, frame, max_new_tokens=MAX_TOKENS))
                with runtime.chat() as chat:
                    first = str(chat.ask(question, frame, max_new_tokens=MAX_TOKENS))
                    self.turns[question, at] = first, str(chat.ask(QUESTIONS[1], max_new_tokens=MAX_TOKENS))

    def message(self, question: str, at: int) -> dict[str, Any]:
        """A user's message."""
        picture = {"type": "image_url", "image_url": {"url": self.urls[at]}}
        return {"role": "user", "content": [picture, {"type": "text", "text": question}]}


def listening(server: subprocess.Popen[str]) -> int:
    """The port of a server, once its model is ready."""
    port, until = 0, time.monotonic() + START_S
    assert server.stderr is not None
    for line in server.stderr:
        entry = json.loads(line) if line.startswith("{") else {}
        port = int(entry["url"].rpartition(":")[2]) if entry.get("event") == "listening" else port
        if entry.get("event") == "ready" or time.monotonic() > until:
            break
    # Nobody reads the rest, and a full pipe would block the server.
    threading.Thread(target=server.stderr.read, daemon=True).start()
    return port


def overhead_of(runtime: Runtime, port: int, pid: int, cases: Cases, rounds: int) -> dict[str, float]:
    """Milliseconds that a request and a streamed token take above Runtime.generate.

    The same question is asked over HTTP and directly, in turn. By processor time of the server, which others on the
    machine do not change much, and by wall time.
    """
    url = {"messages": [cases.message(QUESTIONS[0], 0)], "max_tokens": MAX_TOKENS}
    picture = base64.b64decode(cases.urls[0].partition(",")[2])
    long = {"messages": [{"role": "user", "content": QUESTIONS[1]}], **LONG}
    options: Any = {"temperature": LONG["temperature"], "seed": LONG["seed"], "max_new_tokens": LONG["max_tokens"]}
    connection = http.client.HTTPConnection("127.0.0.1", port)

    def over_http(body: bytes) -> None:
        connection.request("POST", PATH, body, {"content-type": "application/json"})
        connection.getresponse().read()

    def above(body: dict[str, Any], call: Callable[[], Any]) -> tuple[float, float, float]:
        """Wall time (median of the differences) and processor time (mean) above the call; and the call's own."""
        sent = json.dumps(body).encode()  # before the clock starts: it is the client's work
        over_http(sent)
        call()
        walls, own, before, own_s = [], [], processor_s_of(pid), 0.0
        for _ in range(rounds):
            start = time.perf_counter()
            over_http(sent)
            between, processor = time.perf_counter(), time.process_time()
            call()
            own_s += time.process_time() - processor
            own.append(1e3 * (time.perf_counter() - between))
            walls.append(1e3 * (between - start) - own[-1])
        return statistics.median(walls), 1e3 * (processor_s_of(pid) - before - own_s) / rounds, statistics.median(own)

    tokens = len(runtime.generate(QUESTIONS[1], **options).token_ids)
    wall, processor, own = above(url, lambda: runtime.generate(QUESTIONS[0], picture, max_new_tokens=MAX_TOKENS))
    long_wall, long_processor, _ = above({**long, "stream": True}, lambda: runtime.generate(QUESTIONS[1], **options))
    connection.close()
    return {
        "request": processor,
        "token": (long_processor - processor) / tokens,
        "request_wall": wall,
        "token_wall": (long_wall - wall) / tokens,
        "generate": own,
    }


def processor_s_of(pid: int) -> float:
    """Processor time of a process so far, in seconds."""
    fields = Path(f"/proc/{pid}/stat").read_text(encoding="ascii").rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


class Crew:
    """Clients of all kinds, and what they found."""

    def __init__(self, port: int, cases: Cases, pid: int) -> None:
        self._port, self._cases, self._pid = port, cases, pid
        self.calls: Counter[str] = Counter()
        self.wrong: list[str] = []
        self.waits: list[float] = []
        self.memory: list[tuple[float, int]] = []

    async def load(self, seconds: float, clients: int) -> None:
        """Let them work for some time."""
        start = time.monotonic()
        workers = [asyncio.create_task(self._work(seed, start + seconds)) for seed in range(clients)]
        while time.monotonic() - start < seconds:
            pages = int(Path(f"/proc/{self._pid}/statm").read_text(encoding="ascii").split()[1])
            self.memory.append((time.monotonic() - start, pages * os.sysconf("SC_PAGE_SIZE")))
            await asyncio.sleep(min(2.0, seconds / 30))
        await asyncio.gather(*workers)

    async def _work(self, seed: int, until: float) -> None:
        dice = random.Random(seed)
        kinds = [
            self._whole,
            self._stream,
            self._turns,
            self._choose,
            self._leave,
            self._oversize,
            self._slow,
            self._bad,
        ]
        while time.monotonic() < until and len(self.wrong) < 20:
            (kind,) = dice.choices(kinds, [4, 4, 2, 2, 2, 1, 1, 1])
            name = kind.__name__.strip("_")
            try:
                await asyncio.wait_for(kind(dice), 60)
            except Exception as error:
                self.wrong.append(f"{name}: {type(error).__name__}: {error}")
            self.calls[name] += 1

    def _case(self, dice: random.Random) -> tuple[str, int]:
        return dice.choice(QUESTIONS), dice.randrange(len(self._cases.urls))

    async def _open(self, body: Any, length: int | None = None) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        head = f"POST {PATH} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nConnection: close\r\n"
        reader, writer = await asyncio.open_connection("127.0.0.1", self._port, limit=1 << 24)
        writer.write(f"{head}Content-Length: {length or len(data)}\r\n\r\n".encode() + data)
        return reader, writer

    async def _call(self, body: Any, length: int | None = None) -> tuple[int, bytes]:
        """Status and body of one call. A server that still waits for the rest of a body is not waited for."""
        reader, writer = await self._open(body, length)
        head = (await reader.readuntil(b"\r\n\r\n")).lower()
        size = int(head.partition(b"content-length:")[2].split(b"\r\n")[0])
        found = await reader.readexactly(size)
        writer.close()
        return int(head.split()[1]), found

    def _asked(self, question: str, at: int, **more: Any) -> dict[str, Any]:
        return {"messages": [self._cases.message(question, at)], "max_tokens": MAX_TOKENS, **more}

    def _compare(self, kind: str, text: str, wanted: str) -> None:
        if text != wanted:
            self.wrong.append(f"{kind}: {text!r}, alone {wanted!r}")

    def _answer(self, status: int, body: bytes) -> str:
        data = json.loads(body)
        if status != 200:
            raise RuntimeError(f"status {status}: {data}")
        self.waits.append(data["trol_edge"]["queue_ms"])
        return str(data["choices"][0]["message"]["content"])

    async def _whole(self, dice: random.Random) -> None:
        question, at = self._case(dice)
        self._compare(
            "whole", self._answer(*await self._call(self._asked(question, at))), self._cases.texts[question, at]
        )

    async def _stream(self, dice: random.Random, pause_s: float = 0.0) -> None:
        question, at = self._case(dice)
        reader, writer = await self._open(self._asked(question, at, stream=True))
        raw = b""
        while part := await reader.read(64 if pause_s else 65536):
            raw += part
            await asyncio.sleep(pause_s)
        writer.close()
        text = ""
        for line in raw.split(b"\r\n"):  # chunks of HTTP, whose sizes are lines of their own
            for event in line.split(b"\n\n"):
                if event.startswith(b"data: {"):
                    data = json.loads(event[6:])
                    text += data["choices"][0]["delta"].get("content", "")
                    if "trol_edge" in data:
                        self.waits.append(data["trol_edge"]["queue_ms"])
        if not raw.rstrip().endswith(b"0") or b"[DONE]" not in raw:
            self.wrong.append(f"stream: it has no end: {raw[-80:]!r}")
        self._compare("stream", text, self._cases.texts[question, at])

    async def _slow(self, dice: random.Random) -> None:
        await self._stream(dice, 0.01)

    async def _turns(self, dice: random.Random) -> None:
        question, at = self._case(dice)
        first, second = self._cases.turns[question, at]
        asked = self._asked(question, at, conversation=f"c{dice.randrange(4)}")
        self._compare("turns", self._answer(*await self._call(asked)), first)
        asked["messages"] += [{"role": "assistant", "content": first}, {"role": "user", "content": QUESTIONS[1]}]
        self._compare("turns", self._answer(*await self._call(asked)), second)

    async def _choose(self, dice: random.Random) -> None:
        _, at = self._case(dice)
        asked = {"messages": [self._cases.message(QUESTIONS[2], at)], "choose": list(OPTIONS)}
        self._compare("choose", self._answer(*await self._call(asked)), self._cases.chosen[at])

    async def _leave(self, dice: random.Random) -> None:
        question, at = self._case(dice)
        reader, writer = await self._open(self._asked(question, at, stream=dice.random() < 0.5))
        await asyncio.sleep(dice.random() * 0.1)
        if dice.random() < 0.5:
            writer.transport.abort()
        writer.close()
        del reader

    async def _oversize(self, dice: random.Random) -> None:
        status, body = await self._call(b"x" * 1000, (BODY_MB << 20) + 1 + dice.randrange(1 << 30))
        if status != 413 or json.loads(body)["error"]["code"] != "body_too_large":
            self.wrong.append(f"oversize: {status} {body[:100]!r}")

    async def _bad(self, dice: random.Random) -> None:
        body = dice.choice([b"{", b"[]", b'{"messages": 3}', json.dumps(self._asked("x", 0, n=3)).encode()])
        status, found = await self._call(body)
        if status != 400 or "error" not in json.loads(found):
            self.wrong.append(f"bad: {status} {found[:100]!r}")


if __name__ == "__main__":
    sys.exit(main())
