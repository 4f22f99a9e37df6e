"""Fetches a picture by http(s) from hosts that the operator named, and from no address that is not public.

The name is looked up once, every address it has must be public, and the connection goes to the address that was
checked. Redirects are not followed, and proxies of the environment are not used.
"""

from __future__ import annotations

import contextlib
import http.client
import ipaddress
import re
import socket
import ssl
import threading
from collections.abc import Set
from typing import NoReturn
from urllib.parse import SplitResult, urlsplit

from trol_edge.errors import RequestError
from trol_edge.numeric import shown

SECONDS = 10.0  # from the connection to the last byte; each address has half of it to connect
PORTS = {"http": 80, "https": 443}


def fetch(url: str, hosts: Set[str], most_bytes: int) -> bytes:
    """Return what a server answers. Raises RequestError for other hosts, addresses, redirects, errors, and limits."""
    parts = _checked(url, hosts)
    name, port = str(parts.hostname), PORTS[parts.scheme]
    limit = _Limit(_connected(name, port, url))
    connection = http.client.HTTPConnection(name, port)  # its socket is made here, with a time limit
    try:
        if parts.scheme == "https":
            context = ssl.create_default_context()
            secured = context.wrap_socket(limit.sock, server_hostname=name, do_handshake_on_connect=False)
            limit.sock = secured
            secured.do_handshake()
        connection.sock = limit.sock
        target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
        connection.request("GET", target, headers={"Accept": "image/*", "Accept-Encoding": "identity"})
        answer = connection.getresponse()
        if answer.status != 200:
            refuse(f"{shown(url)} was answered with status {answer.status}; redirects are not followed")
        data = answer.read(most_bytes + 1)
        if limit.over or (answer.length and len(data) <= most_bytes):  # read() itself gives what there is
            refuse(f"{shown(url)} was cut off after {len(data)} bytes, or took more than {SECONDS:.0f} s")
    except (OSError, http.client.HTTPException, ValueError) as error:
        if isinstance(error, RequestError):
            raise
        refuse(f"{shown(url)} cannot be fetched within {SECONDS:.0f} s ({error})")
    finally:
        limit.close()
        connection.close()
    if len(data) > most_bytes:
        refuse(f"{shown(url)} has more than {most_bytes} bytes")
    return data


def public_addresses(name: str, port: int) -> list[str]:
    """The addresses of a name. Raises RequestError if one of them is not public."""
    try:
        found = [str(entry[4][0]) for entry in socket.getaddrinfo(name, port, type=socket.SOCK_STREAM)]
    except (OSError, UnicodeError) as error:
        refuse(f"the host {shown(name)} has no address ({error})")
    for address in found:
        if not is_public(address):
            refuse(f"the host {shown(name)} leads to {address}, which is not a public address", 403)
    return found


def is_public(address: str) -> bool:
    """Whether an address is on the public internet, also where one of IPv4 is written as one of IPv6."""
    try:
        found = ipaddress.ip_address(address.partition("%")[0])
    except ValueError:
        return False
    if isinstance(found, ipaddress.IPv6Address):
        inner = found.ipv4_mapped or found.sixtofour or (found.teredo[1] if found.teredo else None)
        if found in ipaddress.ip_network("64:ff9b::/96"):  # of networks that have IPv6 only
            inner = ipaddress.IPv4Address(int(found) & 0xFFFFFFFF)
        if inner is not None:
            return is_public(str(inner))
    return found.is_global and not found.is_multicast and not found.is_reserved


def _checked(url: str, hosts: Set[str]) -> SplitResult:
    """The parts of an address whose host is named. Raises RequestError."""
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError as error:
        refuse(f"{shown(url)} is not an address ({error})")
    if not url.isascii() or re.search(r"[\s\\\x00-\x20\x7f]", url) or parts.scheme not in PORTS:
        refuse(f"{shown(url)} is not an address; encode other characters by %")
    if parts.hostname is None or parts.hostname not in hosts:
        refuse(f"the host {shown(parts.hostname)} is not one that its operator named by --fetch-host", 403)
    if "@" in parts.netloc or port not in (None, PORTS[parts.scheme]):
        refuse(f"{shown(url)} should have neither a user nor another port than {PORTS[parts.scheme]}", 403)
    return parts


def _connected(name: str, port: int, url: str) -> socket.socket:
    error: OSError | None = None
    for address in public_addresses(name, port):
        try:
            return socket.create_connection((address, port), timeout=SECONDS / 2)
        except OSError as failed:
            error = failed
    refuse(f"{shown(url)} cannot be reached ({error})")


class _Limit:
    """Ends a connection whose time is over, wherever a thread waits for it."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock, self.over = sock, False
        self._timer = threading.Timer(SECONDS, self._cut)
        self._timer.daemon = True
        self._timer.start()

    def close(self) -> None:
        """Forget the time, and close the connection."""
        self._timer.cancel()
        self.sock.close()

    def _cut(self) -> None:
        self.over = True
        with contextlib.suppress(OSError):
            self.sock.shutdown(socket.SHUT_RDWR)


def refuse(message: str, status: int = 400) -> NoReturn:
    """The error for an address that is not read."""
    raise RequestError(message, status=status, code="invalid_image_url", param="image_url.url")
