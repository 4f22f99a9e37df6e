"""The settings of a server, with their defaults, checked before anything is loaded."""

from __future__ import annotations

import dataclasses
import ipaddress
import socket
from collections.abc import Sequence
from pathlib import Path

from trol_edge.errors import UsageError
from trol_edge.serve.security import Keys


@dataclasses.dataclass(frozen=True)
class Settings:
    """What the operator decides. Raises UsageError for values that cannot be served."""

    name: str  # the model's name in requests and answers
    host: str = "127.0.0.1"
    port: int = 8000
    keys: Keys = dataclasses.field(default_factory=Keys)
    tls_cert: Path | None = None  # PEM files; both or none
    tls_key: Path | None = None
    queue: int = 16  # most calls that wait or run at a time; more are refused with 429
    sessions: int = 2  # conversations whose keys and values are kept, each in a K/V cache of its own
    body_bytes: int = 32 << 20  # largest request
    folders: Sequence[Path] = ()  # pictures may come from files below these
    fetch_hosts: Sequence[str] = ()  # and by http(s) from these hosts
    log_prompts: bool = False
    grace_s: float = 10.0  # time that running answers get after SIGTERM

    def __post_init__(self) -> None:
        for name, least in (("port", 0), ("queue", 1), ("sessions", 1), ("body_bytes", 1024)):
            if getattr(self, name) < least:
                raise UsageError(f"{name} {getattr(self, name)} should be at least {least}")
        if self.port > 65535:
            raise UsageError(f"port {self.port} should be at most 65535")
        if (self.tls_cert is None) != (self.tls_key is None):
            raise UsageError("TLS needs both a certificate and its key; give --tls-cert and --tls-key")
        if not self.keys and not is_loopback(self.host):
            raise UsageError(
                f"--host {self.host} can be reached from other machines, and no key protects it; give --keys FILE, "
                "or leave --host out to serve this machine only"
            )
        for folder in self.folders:
            if not folder.is_dir():
                raise UsageError(f"--files {folder} is not a folder")


def is_loopback(host: str) -> bool:
    """Whether every address of a host is this machine's own. Raises UsageError for a name that has none."""
    try:
        found = {str(entry[4][0]).partition("%")[0] for entry in socket.getaddrinfo(host or None, None)}
        return all(ipaddress.ip_address(address).is_loopback for address in found) and bool(host)
    except (OSError, ValueError) as error:
        raise UsageError(f"--host {host!r} has no address ({error})") from error
