"""Who may ask: bearer keys, and which pages of a browser may reach a server without keys."""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from trol_edge.errors import RequestError, UsageError

SHORTEST_KEY = 16  # characters
_REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")


class Keys:
    """The keys that open the server; none leave it open. Compared by their hashes, each in constant time."""

    def __init__(self, keys: Sequence[str] = ()) -> None:
        """Raises UsageError for a key that is short, or that no header can hold."""
        for number, key in enumerate(keys, 1):
            if len(key) < SHORTEST_KEY or not key.isascii() or not key.isprintable() or " " in key:
                raise UsageError(
                    f"key {number} should have at least {SHORTEST_KEY} printable ASCII characters, without spaces"
                )
        self._digests = [hashlib.sha256(key.encode()).digest() for key in keys]

    def __len__(self) -> int:
        return len(self._digests)

    def fit(self, authorization: str) -> bool:
        """Whether an Authorization header holds one of the keys. Every key is compared, whichever fits."""
        kind, _, given = authorization.partition(" ")
        digest = hashlib.sha256(given.strip().encode("utf-8", "replace")).digest()
        found = [hmac.compare_digest(digest, known) for known in self._digests]
        return any(found) and kind.lower() == "bearer"


def read_keys(path: Path) -> Keys:
    """Read a file with one key per line; lines that begin with # are comments. Raises UsageError."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"--keys {path} cannot be read ({error})") from error
    keys = [line.strip() for line in lines if line.strip() and not line.lstrip().startswith("#")]
    if not keys:
        raise UsageError(f"--keys {path} holds no key; write one per line")
    try:
        return Keys(keys)
    except UsageError as error:
        raise UsageError(f"--keys {path}: {error} (comments and empty lines are not counted)") from error


def has_key(keys: Keys, headers: Mapping[str, str]) -> bool:
    """Whether a key fits, or none is needed."""
    return not keys or keys.fit(headers.get("authorization", ""))


def check_key(keys: Keys, headers: Mapping[str, str]) -> None:
    """Raise RequestError with status 401 unless a key fits, or none is needed."""
    if not has_key(keys, headers):
        raise RequestError(
            "the request has no valid key; send it as Authorization: Bearer KEY",
            status=401,
            code="invalid_api_key",
        )


def check_origin(keys: Keys, headers: Mapping[str, str]) -> None:
    """Refuse what other pages in this machine's browser send.

    Without a key only the loopback addresses and `localhost` are names of this server, so a foreign name that was made
    to lead here (DNS rebinding) is refused. A page of another origin is refused always.
    """
    host = headers.get("host", "")
    name = host.rpartition(":")[0] if re.search(r":\d+$", host) else host
    if not keys and not _is_own_name(name):
        raise RequestError(f"this server is not {host!r}; call it as localhost", status=403, code="wrong_host")
    origin = headers.get("origin")
    if origin is not None and origin.partition("://")[2] != host:
        raise RequestError("a page of another origin may not call this server", status=403, code="wrong_origin")


def _is_own_name(name: str) -> bool:
    if name == "localhost":
        return True
    try:
        return ipaddress.ip_address(name.strip("[]")).is_loopback
    except ValueError:
        return False


def request_id(given: str | None, made: str) -> str:
    """The caller's id of a request if it is a plain word, else the one that was made here."""
    return given if given is not None and _REQUEST_ID.fullmatch(given) else made
