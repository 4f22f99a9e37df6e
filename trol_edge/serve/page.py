"""The page at /: one file, with headers that let nothing else in."""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import re
from pathlib import Path

SOURCE = Path(__file__).with_name("page.html")


@dataclasses.dataclass(frozen=True)
class Page:
    """The file, and the headers that it is sent with."""

    body: bytes
    headers: dict[str, str]


def read_page() -> Page:
    """Read the file. Its script and its style run by their hashes, so nothing that is put into it later would."""
    body = SOURCE.read_bytes()
    policy = [
        "default-src 'none'",
        f"script-src {_hash(body, b'script')}",
        f"style-src {_hash(body, b'style')}",
        "img-src data: blob:",
        "media-src blob: mediastream:",
        "connect-src 'self'",
        "frame-ancestors 'none'",
        "base-uri 'none'",
        "form-action 'none'",
    ]
    headers = {"content-security-policy": "; ".join(policy), "x-frame-options": "DENY"}
    return Page(
        body, headers | {"permissions-policy": "camera=(self), microphone=()", "referrer-policy": "no-referrer"}
    )


def _hash(body: bytes, tag: bytes) -> str:
    """The source expression for the one element of that kind."""
    (inner,) = re.findall(rb"<%s>(.*?)</%s>" % (tag, tag), body, re.S)
    return f"'sha256-{base64.b64encode(hashlib.sha256(inner).digest()).decode()}'"
