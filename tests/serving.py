"""Servers for the tests: in a thread of this process, on a free port of this machine."""

from __future__ import annotations

import io
import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from trol_edge.runtime import Runtime
from trol_edge.serve.app import App
from trol_edge.serve.door import Server
from trol_edge.serve.host import Host
from trol_edge.serve.journal import Journal
from trol_edge.serve.settings import Settings

PATIENCE_S = 60.0


class Served:
    """A running server, its address, and what it logged."""

    def __init__(self, app: App, server: Server, journal: io.StringIO) -> None:
        self.app, self.server, self._journal = app, server, journal

    @property
    def url(self) -> str:
        """The address without a path."""
        scheme = "http" if self.app.settings.tls_cert is None else "https"
        return f"{scheme}://127.0.0.1:{self.server.port}"

    @property
    def log(self) -> list[dict[str, Any]]:
        """The lines so far."""
        return [json.loads(line) for line in self._journal.getvalue().splitlines()]

    def requests(self) -> list[dict[str, Any]]:
        """The lines about requests."""
        return [line for line in self.log if line["event"] == "request"]


def waited_for(condition: Callable[[], Any]) -> Any:
    """What a condition gives once it is true."""
    until = time.monotonic() + PATIENCE_S
    while not (found := condition()):
        assert time.monotonic() < until, "it did not come"
        time.sleep(0.005)
    return found


@contextmanager
def serving(open_runtime: Callable[..., Runtime], *, ready: bool = True, **settings: Any) -> Iterator[Served]:
    """Serve what open_runtime gives, until the block ends."""
    chosen = Settings(**{"name": "trol", "port": 0, **settings})
    written = io.StringIO()
    app = App(chosen, Host(open_runtime, chosen.sessions), Journal(chosen.log_prompts, written))
    server = Server(app)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    served = Served(app, server, written)
    try:
        waited_for(lambda: server.started and (not ready or app.host.state in ("ready", "failed")))
        yield served
    finally:
        server.should_exit = True
        thread.join(PATIENCE_S)
        assert not thread.is_alive(), "the server hangs"
