"""The ASGI application: OpenAI's paths, health, metrics and the page."""

from __future__ import annotations

import asyncio
import contextlib
import json
import math
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, MutableMapping
from typing import Any

from trol_edge._version import __version__
from trol_edge.answering.results import Piece
from trol_edge.errors import RequestError, UnfinishedError
from trol_edge.prompt.tokenizer import Tokenizer
from trol_edge.runtime import Runtime
from trol_edge.serve import answers
from trol_edge.serve.host import Host, Job, Outcome
from trol_edge.serve.journal import Journal
from trol_edge.serve.line import Line
from trol_edge.serve.metrics import CONTENT_TYPE, Metrics
from trol_edge.serve.page import read_page
from trol_edge.serve.pictures import Sources
from trol_edge.serve.schema import ChatRequest, parse
from trol_edge.serve.security import check_key, check_origin, has_key, request_id
from trol_edge.serve.settings import Settings

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]

BODY_S = 30.0  # time in which a request's body has to arrive
# What is read of a body after its answer. Closed at once, the connection could be reset before its client reads that.
DRAIN_S, DRAIN_BYTES = 5.0, 64 << 20
COMPLETIONS, MODELS, READY, LIVE = "/v1/chat/completions", "/v1/models", "/health/ready", "/health/live"


class App:
    """One model over HTTP."""

    def __init__(self, settings: Settings, host: Host, journal: Journal) -> None:
        self.settings, self.host, self.journal = settings, host, journal
        self.line = Line(settings.queue)
        self.metrics = Metrics(host, self.line)
        self._sources = Sources(settings.folders, settings.fetch_hosts)
        self._page_file = read_page()
        self._since = int(time.time())
        self._routes: dict[str, tuple[str, Callable[[Exchange], Awaitable[None]]]] = {
            "/": ("GET", self._page),
            COMPLETIONS: ("POST", self._complete),
            MODELS: ("GET", self._models),
            f"{MODELS}/{settings.name}": ("GET", self._model),
            LIVE: ("GET", self._live),
            READY: ("GET", self._ready),
            "/metrics": ("GET", self._metrics),
        }

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request, or the life of the server."""
        if scope["type"] == "lifespan":
            await self._live_on(receive, send)
        elif scope["type"] == "http":
            await self._serve(Exchange(scope, receive, send))

    def drain(self, grace_s: float) -> None:
        """Take no more calls, let the running one finish, and end it after grace_s. Call it in the event loop."""
        if self.host.state != "stopping":
            self.journal.write("stopping", waiting=self.line.waiting, inside=self.line.inside)
            self.host.state = "stopping"
            self.line.close()
            asyncio.get_running_loop().call_later(grace_s, self.host.stop_running)

    async def _live_on(self, receive: Receive, send: Send) -> None:
        await receive()
        loading = asyncio.ensure_future(self._load())
        await send({"type": "lifespan.startup.complete"})
        await receive()
        self.host.state = "stopping"
        await loading
        await self.host.close()
        self.journal.write("stopped")
        await send({"type": "lifespan.shutdown.complete"})

    async def _load(self) -> None:
        start = time.perf_counter()
        await self.host.load()
        level = "error" if self.host.state == "failed" else "info"
        seconds = round(time.perf_counter() - start, 3)
        self.journal.write(self.host.state, level, model=self.settings.name, reason=self.host.reason, seconds=seconds)

    async def _serve(self, exchange: Exchange) -> None:
        """Find the path, check who asks, and turn errors into objects; every answer is counted and logged."""
        method, handler = self._routes.get(exchange.path, ("", self._page))
        label = exchange.path if method else "other"
        try:
            check_origin(self.settings.keys, exchange.headers)
            if exchange.path not in ("/", LIVE, READY):
                check_key(self.settings.keys, exchange.headers)
            if not method:
                raise RequestError(f"there is no path {exchange.path!r}", status=404, code="not_found")
            if exchange.method not in (method, "HEAD" if method == "GET" else method):
                raise RequestError(f"{exchange.path} takes {method}", status=405, code="method_not_allowed")
            await handler(exchange)
        except asyncio.CancelledError:
            self.metrics.left += 1
            exchange.status = exchange.status or 499
            exchange.log["left"] = True
            if not exchange.gone:
                raise
        except Exception as error:  # the server lives on, whatever a request does
            exchange.log["error"] = type(error).__name__
            if self.journal.with_prompts or answers.error_status(error) >= 500:  # others may quote the question
                exchange.log["error"] += f": {error}"
            await exchange.fail(error)
        finally:
            self.metrics.requests[label, exchange.status] += 1
            self.journal.write(
                "request",
                request_id=exchange.id,
                method=exchange.method,
                path=exchange.path[:256],
                status=exchange.status,
                ms=round(1e3 * (time.perf_counter() - exchange.arrived), 2),
                **exchange.log,
            )

    # -- small answers -----------------------------------------------------------------------------------------------

    async def _page(self, exchange: Exchange) -> None:
        await exchange.answer(self._page_file.body, "text/html; charset=utf-8", headers=self._page_file.headers)

    async def _models(self, exchange: Exchange) -> None:
        await exchange.answer_json({"object": "list", "data": [self._described]})

    async def _model(self, exchange: Exchange) -> None:
        await exchange.answer_json(self._described)

    @property
    def _described(self) -> dict[str, Any]:
        found: dict[str, Any] = {"id": self.settings.name, "object": "model", "created": self._since}
        found |= {"owned_by": "trol-edge", "trol_edge_version": __version__}
        if self.host.runtime is not None:
            manifest = self.host.runtime.bundle.manifest
            found |= {"context": manifest.context, "precision": manifest.plan.recipe, "target": manifest.target}
        return found

    async def _live(self, exchange: Exchange) -> None:
        await exchange.answer_json({"status": "alive"})

    async def _ready(self, exchange: Exchange) -> None:
        state, reason = self.host.state, self.host.reason
        if reason and not has_key(self.settings.keys, exchange.headers):
            reason = "the server's log has it, and this answer to a request with a key"
        await exchange.answer_json({"status": state, "reason": reason}, 200 if state == "ready" else 503)

    async def _metrics(self, exchange: Exchange) -> None:
        sample = await asyncio.to_thread(self.metrics.sample)
        await exchange.answer(self.metrics.text(sample).encode(), CONTENT_TYPE)

    # -- completions -------------------------------------------------------------------------------------------------

    async def _complete(self, exchange: Exchange) -> None:
        runtime = self.host.require_ready()
        with self.line.admitted():
            kind = exchange.headers.get("content-type", "").partition(";")[0].strip().lower()
            if kind != "application/json":
                raise RequestError(
                    "the content-type should be application/json", status=415, code="invalid_content_type"
                )
            request = parse(await exchange.body(self.settings.body_bytes), self.settings.name)
            if self.journal.with_prompts:
                exchange.log["prompt"] = "".join(part for part in request.turns[-1].prompt if isinstance(part, str))
            exchange.log["stream"] = request.stream
            async with exchange.until_gone():
                await self._answer(exchange, request, runtime)

    async def _answer(self, exchange: Exchange, request: ChatRequest, runtime: Runtime) -> None:
        seconds = math.inf if request.deadline_ms is None else request.deadline_ms / 1e3
        deadline = exchange.arrived + seconds
        pictures = [[await self._picture(url) for url in turn.urls] for turn in request.turns]
        heading = answers.Heading(f"chatcmpl-{exchange.id}", int(time.time()), self.settings.name)
        text, with_logprobs = runtime.model.text, "logprobs" in request.options
        stream = _Stream(exchange, request, heading, text, with_logprobs) if request.stream else None
        job = Job(request, pictures, deadline, stream.deliver if stream else None)
        try:
            async with self.line.turn(deadline - time.perf_counter()):
                waited = time.perf_counter() - exchange.arrived
                self.metrics.wait.add(waited)
                exchange.log["wait_ms"] = round(1e3 * waited, 2)
                outcome = await self.host.run(job)
                outcome.queue_ms = 1e3 * waited
        except UnfinishedError as error:
            if request.choose is not None or request.yes_no:
                raise
            outcome = Outcome(finish_reason=error.reason)  # its turn did not come
        except BaseException:
            if stream is not None:
                stream.leave()
            raise
        self.metrics.finished(outcome, exchange.arrived, time.perf_counter())
        exchange.log |= {
            "finish_reason": outcome.finish_reason,
            "prompt_tokens": outcome.prompt_tokens,
            "cached_tokens": outcome.cached_tokens,
            "answer_tokens": len(outcome.token_ids),
        }
        if stream is None:
            await exchange.answer_json(answers.completion(heading, outcome, text, with_logprobs))
        else:
            await stream.finish(outcome)

    async def _picture(self, url: str) -> bytes:
        """Read a picture, in a thread of its own if that may take long."""
        if url[:5].lower() == "data:" and len(url) < 1 << 20:
            return self._sources.read(url)
        return await asyncio.to_thread(self._sources.read, url)


class _Stream:
    """The answer to one request in chunks, which a task sends while the worker computes."""

    def __init__(
        self, exchange: Exchange, request: ChatRequest, heading: answers.Heading, text: Tokenizer, with_logprobs: bool
    ) -> None:
        self._exchange, self._request, self._heading = exchange, request, heading
        self._chunks = answers.Chunks(heading, text, with_logprobs)
        self._loop = asyncio.get_running_loop()
        self._pieces: list[Piece] = []
        self._wake = asyncio.Event()
        self._sender: asyncio.Task[None] | None = None
        self._ended = False

    def deliver(self, piece: Piece) -> None:
        """Take a piece; called in the worker's thread."""
        self._pieces.append(piece)
        self._loop.call_soon_threadsafe(self._arrived)

    async def finish(self, outcome: Outcome) -> None:
        """Send what is left, and the end."""
        request, exchange = self._request, self._exchange
        self._ended = True
        if self._sender is not None:
            self._wake.set()
            await self._sender  # what it holds is sent when the client reads
        await self._send_pieces()
        if outcome.last is None and outcome.text:  # it was weighed, not made
            await exchange.stream(self._chunks.of(Piece(outcome.text, ())))
        await exchange.stream(answers.last_chunks(self._heading, outcome, request.stream_usage), more=False)

    def leave(self) -> None:
        """Send no more pieces."""
        self._ended = True
        if self._sender is not None:
            self._sender.cancel()

    def _arrived(self) -> None:
        if self._sender is None and not self._ended:
            self._sender = self._loop.create_task(self._send_all())
        self._wake.set()

    async def _send_all(self) -> None:
        while not self._ended:
            await self._wake.wait()
            self._wake.clear()
            await self._send_pieces()

    async def _send_pieces(self) -> None:
        """Send all pieces that are there; those that came while the last were sent go together."""
        while True:
            data = b"" if self._exchange.status else answers.first_chunk(self._heading)
            count = len(self._pieces)
            data += b"".join(map(self._chunks.of, self._pieces[:count]))
            del self._pieces[:count]
            if not data:
                return
            await self._exchange.stream(data)


class Exchange:
    """One request and its answer."""

    def __init__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.arrived = time.perf_counter()
        self.method, self.path = str(scope["method"]), str(scope["path"])
        self.headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
        self.id = request_id(self.headers.get("x-request-id"), uuid.uuid4().hex)
        self.status = 0  # of the answer, once it has begun
        self.gone = False  # whether the client went away
        self.log: dict[str, Any] = {}
        self._receive, self._send = receive, send
        # whether some of the body is still to come
        self._unread = "transfer-encoding" in self.headers or self.headers.get("content-length", "0") != "0"

    async def body(self, most: int) -> bytes:
        """The whole body. Raises RequestError for one that is too large, too slow or cut off."""
        length = self.headers.get("content-length", "0")
        too_large = RequestError(
            f"the body has more than {most} bytes; send smaller pictures, or start the server with a larger "
            "--max-body-mb",
            status=413,
            code="body_too_large",
        )
        if not length.isdecimal() or int(length[:20]) > most:
            raise too_large
        parts: list[bytes] = []
        size, loop = 0, asyncio.get_running_loop()
        until = loop.time() + BODY_S
        while True:
            try:
                message = await asyncio.wait_for(self._receive(), max(until - loop.time(), 0))
            except asyncio.TimeoutError:
                raise RequestError(
                    f"the body did not arrive within {BODY_S:.0f} s", status=408, code="body_too_slow"
                ) from None
            if message["type"] == "http.disconnect":
                self.gone = True
                raise asyncio.CancelledError
            size += len(message.get("body", b""))
            if size > most:
                raise too_large
            parts.append(message.get("body", b""))
            if not message.get("more_body"):
                self._unread = False
                return b"".join(parts)

    @contextlib.asynccontextmanager
    async def until_gone(self) -> AsyncIterator[None]:
        """Cancel what is inside once the client goes away."""
        inside = asyncio.current_task()
        assert inside is not None

        async def watch() -> None:
            while (await self._receive())["type"] != "http.disconnect":
                pass
            self.gone = True
            inside.cancel()

        watcher = asyncio.ensure_future(watch())
        try:
            yield
        finally:
            watcher.cancel()

    async def answer(
        self, body: bytes, content_type: str, status: int = 200, headers: Mapping[str, str] | None = None
    ) -> None:
        """Send a whole answer. A connection whose body was not read is closed after it."""
        every = {"content-type": content_type, "content-length": str(len(body)), **(headers or {})}
        await self._begin(status, every | ({"connection": "close"} if self._unread else {}))
        await self._send({"type": "http.response.body", "body": body, "more_body": self._unread})
        if self._unread:
            await self._drain()
            await self._send({"type": "http.response.body", "body": b""})

    async def answer_json(self, data: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> None:
        """Send an object."""
        await self.answer(json.dumps(data).encode(), "application/json", status, headers)

    async def stream(self, data: bytes, more: bool = True) -> None:
        """Send a part of an event stream."""
        if not self.status:
            await self._begin(200, {"content-type": "text/event-stream; charset=utf-8", "x-accel-buffering": "no"})
        await self._send({"type": "http.response.body", "body": data, "more_body": more})

    async def fail(self, error: Exception) -> None:
        """Send an error, or end a stream that has begun with it."""
        if self.status:
            await self.stream(answers.event(answers.error_object(error)), more=False)
            return
        status = answers.error_status(error)
        headers: dict[str, str] = {}
        if isinstance(error, UnfinishedError):
            headers["x-should-retry"] = "false"  # a call that has missed its time is not worth another try
        if isinstance(error, RequestError) and error.retry_after_s is not None:
            headers["retry-after"] = str(error.retry_after_s)
        if status == 401:
            headers["www-authenticate"] = "Bearer"
        await self.answer_json(answers.error_object(error), status, headers)

    async def _drain(self) -> None:
        """Read on what the client sends, within bounds, so that it sees the answer."""
        if self.headers.get("expect", "").lower() == "100-continue":
            return  # its client waits, and has sent nothing

        async def read_on() -> None:
            left = DRAIN_BYTES
            while left > 0:
                message = await self._receive()
                if message["type"] == "http.disconnect" or not message.get("more_body"):
                    return
                left -= len(message.get("body", b""))

        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(read_on(), DRAIN_S)

    async def _begin(self, status: int, headers: Mapping[str, str]) -> None:
        self.status = status
        every = {**headers, "x-request-id": self.id, "x-content-type-options": "nosniff", "cache-control": "no-store"}
        raw = [(name.encode(), value.encode()) for name, value in every.items()]
        await self._send({"type": "http.response.start", "status": status, "headers": raw})
