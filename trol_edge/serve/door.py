"""Binds the application to a socket: connections that neither ask nor read are closed, and signals end it in order."""

from __future__ import annotations

import asyncio
import json
import logging
import ssl
from collections import deque
from typing import Any

import httptools
import uvicorn
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from trol_edge.errors import RequestError, UsageError
from trol_edge.serve.answers import error_object
from trol_edge.serve.app import App
from trol_edge.serve.journal import JournalHandler

MOST_CONNECTIONS = 256
MOST_TOGETHER = 64  # requests of one connection that were sent before the first was answered
HEADER_S = 10.0  # time in which the headers of a request have to arrive
HEADER_BYTES = 64 << 10  # most that is read without an end of the headers, or a byte of the body
READER_S = 30.0  # time in which a client has to read something of what was sent
KEEP_ALIVE_S = 15
CLOSING_S = 5  # after the grace of running answers: time to send what is left


class Connection(HttpToolsProtocol):
    """A connection that is closed when its client keeps it busy with nothing.

    The parser calls the methods `on_...`; an error that one of them raises is answered 400.
    """

    _timer: asyncio.TimerHandle | None = None
    _blocked: asyncio.TimerHandle | None = None
    _heading = False  # whether a request has begun whose headers are not complete
    _silent = 0  # bytes since the parser last found the end of headers, or something of a body
    _broken: str | None = None  # why nothing more can be understood
    _asked: list[RequestResponseCycle]  # the requests that are not answered yet

    def connection_made(self, transport: Any) -> None:
        """Begin, unless there are too many already."""
        self._asked = []
        super().connection_made(transport)
        if len(self.connections) > MOST_CONNECTIONS:
            transport.abort()
        else:
            self._wait_for_headers()

    def data_received(self, data: bytes) -> None:
        """Take bytes; from the first to the end of the headers only so much time may pass."""
        if self._broken is not None:
            return
        self._silent += len(data)
        self._unset_keepalive_if_required()
        try:
            self._feed(data)
        except (httptools.HttpParserError, RequestError):
            self.send_400_response("Invalid HTTP request received.")
        if self._silent > HEADER_BYTES and self._broken is None:
            self.send_400_response(f"The request has more than {HEADER_BYTES} bytes of headers.")
        if self._answering and not self._heading:
            self._forget("_timer")
        elif self._timer is None:
            self._wait_for_headers()

    def connection_lost(self, exc: Exception | None) -> None:
        """End, and with it every request of this connection."""
        self._forget("_timer")
        self._forget("_blocked")
        super().connection_lost(exc)
        self._end(self._asked)

    def on_message_begin(self) -> None:
        """A request begins."""
        self._heading = True
        super().on_message_begin()

    def on_header(self, name: bytes, value: bytes) -> None:
        """Keep a header; those that follow a body are nobody's."""
        if self._heading:
            super().on_header(name, value)

    def on_headers_complete(self) -> None:
        """Begin to answer, or let the request wait for those that came before it."""
        self._heading, self._silent = False, 0
        if self.parser.should_upgrade():
            return  # it comes again without that wish
        self._asked = [cycle for cycle in self._asked if not cycle.response_complete]
        if len(self._asked) >= MOST_TOGETHER:
            raise RequestError(f"{len(self._asked)} requests are not answered yet; send no more before that")
        if [name for name, _ in self.headers].count(b"host") != 1:
            raise RequestError("a request names one host")
        super().on_headers_complete()
        self._asked.append(self.cycle)

    def on_body(self, body: bytes) -> None:
        """Take some of the body."""
        self._silent = 0
        super().on_body(body)

    def on_message_complete(self) -> None:
        """A request is whole."""
        if not self.parser.should_upgrade():
            super().on_message_complete()

    def pause_writing(self) -> None:
        """The client reads too slowly."""
        super().pause_writing()
        self._blocked = self.loop.call_later(READER_S, self.transport.abort)

    def resume_writing(self) -> None:
        """The client has read."""
        self._forget("_blocked")
        super().resume_writing()

    def on_response_complete(self) -> None:
        """Begin the next answer; after the last one before what is not HTTP, say so."""
        super().on_response_complete()
        if self._broken is not None and all(cycle.response_complete for cycle in self._asked):
            self._refuse(self._broken)

    def send_400_response(self, msg: str) -> None:
        """Answer what is not HTTP with an error object, once the requests that were whole before it are answered."""
        self._broken = msg
        cut = [cycle for cycle in self._asked if cycle.more_body and not cycle.response_complete]
        self._asked = [cycle for cycle in self._asked if cycle not in cut and not cycle.response_complete]
        self.pipeline = deque(entry for entry in self.pipeline if entry[0] not in cut)
        self._end(cut)
        if any(cycle.response_started for cycle in cut):
            self.transport.close()
        elif not self._asked:
            self._refuse(msg)

    def _refuse(self, reason: str) -> None:
        if not self.transport.is_closing():
            body = json.dumps(error_object(RequestError(reason, code="invalid_http"))).encode()
            head = "HTTP/1.1 400 Bad Request\r\ncontent-type: application/json\r\nconnection: close\r\n"
            self.transport.write(f"{head}content-length: {len(body)}\r\n\r\n".encode() + body)
            self.transport.close()

    def _feed(self, data: bytes) -> None:
        """Parse. A wish for another protocol (websocket, h2c) is dropped, because with it the parser reads no body."""
        try:
            self.parser.feed_data(data)
        except httptools.HttpParserUpgrade as upgrade:
            method = self.parser.get_method()
            if method == b"CONNECT":
                raise RequestError("this server is no proxy") from upgrade
            kept = [(name, value) for name, value in self.headers if name not in (b"upgrade", b"connection")]
            head = [method + b" " + self.url + b" HTTP/1.1", *(name + b": " + value for name, value in kept)]
            self.parser = httptools.HttpRequestParser(self)
            self._feed(b"\r\n".join(head) + b"\r\n\r\n" + data[upgrade.args[0] :])

    @property
    def _answering(self) -> bool:
        return self.cycle is not None and not self.cycle.response_complete

    @staticmethod
    def _end(cycles: list[RequestResponseCycle]) -> None:
        for cycle in cycles:
            cycle.disconnected = True
            cycle.message_event.set()

    def _wait_for_headers(self) -> None:
        self._timer = self.loop.call_later(HEADER_S, self._no_headers)

    def _no_headers(self) -> None:
        self._timer = None
        if self._answering:  # the next request has begun, and may end when this one is answered
            self._wait_for_headers()
        else:
            self.transport.close()

    def _forget(self, name: str) -> None:
        timer = getattr(self, name)
        if timer is not None:
            timer.cancel()
            setattr(self, name, None)


class Server(uvicorn.Server):
    """A server that lets the running answer finish when it is asked to stop, and ends at the second time."""

    def __init__(self, app: App) -> None:
        """Raises UsageError for a certificate or a key that cannot be used."""
        settings = app.settings
        self._app, self._grace_s = app, settings.grace_s
        if settings.tls_cert is not None:
            try:
                ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(settings.tls_cert, settings.tls_key)
            except (OSError, ssl.SSLError) as error:
                raise UsageError(
                    f"--tls-cert {settings.tls_cert} with --tls-key {settings.tls_key} cannot be used ({error}); give "
                    "PEM files that belong together"
                ) from error
        logger = logging.getLogger("uvicorn")
        logger.handlers, logger.propagate = [JournalHandler(app.journal)], False
        logger.setLevel(logging.WARNING)
        super().__init__(
            uvicorn.Config(
                app,
                host=settings.host,
                port=settings.port,
                http=Connection,
                ws="none",
                lifespan="on",
                log_config=None,
                access_log=False,
                server_header=False,
                proxy_headers=False,
                timeout_keep_alive=KEEP_ALIVE_S,
                timeout_graceful_shutdown=int(settings.grace_s) + CLOSING_S,
                ssl_certfile=settings.tls_cert,
                ssl_keyfile=settings.tls_key,
            )
        )

    @property
    def port(self) -> int:
        """The port that is listened to, once `started`."""
        return int(self.servers[0].sockets[0].getsockname()[1])

    async def startup(self, sockets: Any = None) -> None:
        """Begin to listen, and say where. Raises UsageError for an address that is taken or not this machine's."""
        settings = self._app.settings
        try:
            await super().startup(sockets)
        except SystemExit as stop:
            raise UsageError(
                f"{settings.host}:{settings.port} cannot be listened to (the line before says why); give another --port"
            ) from stop
        scheme = "http" if settings.tls_cert is None else "https"
        host = f"[{settings.host}]" if ":" in settings.host else settings.host
        self._app.journal.write("listening", url=f"{scheme}://{host}:{self.port}", model=settings.name)

    async def main_loop(self) -> None:
        """Run until it is asked to stop."""
        await super().main_loop()
        self._app.drain(self._grace_s)

    def handle_exit(self, sig: int, frame: Any) -> None:
        """Stop in order, and at the second signal at once."""
        self.force_exit = self.should_exit
        self.should_exit = True
