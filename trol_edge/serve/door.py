"""Binds the application to a socket: connections that neither ask nor read are closed, and signals end it in order."""

from __future__ import annotations

import asyncio
import json
import logging
import ssl
from typing import Any

import h11
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from trol_edge.errors import RequestError, UsageError
from trol_edge.serve.answers import error_object
from trol_edge.serve.app import App
from trol_edge.serve.journal import JournalHandler

MOST_CONNECTIONS = 256
HEADER_S = 10.0  # time in which the headers of a request have to arrive
READER_S = 30.0  # time in which a client has to read something of what was sent
KEEP_ALIVE_S = 15
CLOSING_S = 5  # after the grace of running answers: time to send what is left


class Connection(H11Protocol):
    """A connection that is closed when its client keeps it busy with nothing."""

    _timer: asyncio.TimerHandle | None = None
    _blocked: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        """Begin, unless there are too many already."""
        super().connection_made(transport)
        if len(self.connections) > MOST_CONNECTIONS:
            transport.abort()
        else:
            self._wait_for_headers()

    def data_received(self, data: bytes) -> None:
        """Take bytes; from the first to the end of the headers only so much time may pass."""
        super().data_received(data)
        if self.conn.their_state is not h11.IDLE:
            self._forget("_timer")
        elif self._timer is None:
            self._wait_for_headers()

    def connection_lost(self, exc: Exception | None) -> None:
        """End."""
        self._forget("_timer")
        self._forget("_blocked")
        super().connection_lost(exc)

    def pause_writing(self) -> None:
        """The client reads too slowly."""
        super().pause_writing()
        self._blocked = self.loop.call_later(READER_S, self.transport.abort)

    def resume_writing(self) -> None:
        """The client has read."""
        self._forget("_blocked")
        super().resume_writing()

    def send_400_response(self, msg: str) -> None:
        """Answer what is not HTTP with an error object, and end the request that it was to be the body of."""
        if self.cycle is not None:
            self.cycle.disconnected = True
            self.cycle.message_event.set()
        body = json.dumps(error_object(RequestError(msg, code="invalid_http"))).encode()
        headers = [("content-type", "application/json"), ("content-length", str(len(body))), ("connection", "close")]
        try:
            for event in (h11.Response(status_code=400, headers=headers), h11.Data(data=body), h11.EndOfMessage()):
                self.transport.write(self.conn.send(event) or b"")
        except h11.LocalProtocolError:  # an answer has begun already
            pass
        self.transport.close()

    def _wait_for_headers(self) -> None:
        self._timer = self.loop.call_later(HEADER_S, self._no_headers)

    def _no_headers(self) -> None:
        self._timer = None
        if self.conn.their_state is h11.IDLE:
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
