"""Gets the bytes of a picture from its address: in the request itself, below named folders, or from named hosts."""

from __future__ import annotations

import base64
import binascii
import os
import stat
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from urllib.parse import unquote, urlsplit

from trol_edge.numeric import shown
from trol_edge.serve.fetch import fetch, refuse

FILE_BYTES = 64 << 20  # largest picture file


class Sources:
    """Where pictures may come from. `read` may be called from several threads."""

    def __init__(self, folders: Sequence[Path] = (), hosts: Sequence[str] = ()) -> None:
        """folders: `file:` addresses may lead below these. hosts: `http:` and `https:` may lead to these names."""
        self._folders = [folder.resolve() for folder in folders]
        self._hosts = frozenset(host.lower() for host in hosts)

    def read(self, url: str) -> bytes:
        """Return the bytes at an address. Raises RequestError; whether they are a picture is not looked at."""
        kind = url[:6].partition(":")[0].lower()
        if kind == "data":
            return _decoded(url)
        if kind == "file":
            return self._from_file(url)
        if kind in ("http", "https"):
            return fetch(url, self._hosts, FILE_BYTES)
        refuse(f"the address {shown(url)} of a picture begins with none of data:, file:, http: and https:")

    def _from_file(self, url: str) -> bytes:
        parts = urlsplit(url)
        path = unquote(parts.path, errors="surrogateescape")
        if parts.netloc not in ("", "localhost") or parts.query or parts.fragment or not path.startswith("/"):
            refuse(f"{shown(url)} should be file:///FOLDER/NAME, with %23 and %3F for # and ?")
        if "\0" in path or ".." in PurePosixPath(path).parts:
            refuse(f"{shown(url)} has a part that no file may have")
        for folder in self._folders:
            if PurePosixPath(path).is_relative_to(folder):
                return _read_below(folder, PurePosixPath(path).relative_to(folder), url)
        refuse(f"{shown(url)} is in no folder that this server may read; its operator names them by --files")


def _decoded(url: str) -> bytes:
    header, comma, payload = url.partition(",")
    media = header[len("data:") :].lower()
    if not comma or not media.endswith(";base64"):
        refuse(f"the data address {shown(header)} should be data:image/...;base64,...")
    if not media.startswith(("image/", ";", "application/octet-stream")):
        refuse(f"the data address is of the type {shown(media.partition(';')[0])}, not of a picture")
    try:
        return base64.b64decode(payload, validate=True)
    except (binascii.Error, ValueError) as error:
        refuse(f"the data address is not base64 ({error})")


def _read_below(folder: Path, name: PurePosixPath, url: str) -> bytes:
    """Read a file below a folder. No part of its path is a link, and what was checked is what is read."""
    flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK
    opened: list[int] = []
    try:
        opened.append(os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC))
        for part in name.parts[:-1]:
            opened.append(os.open(part, flags | os.O_DIRECTORY, dir_fd=opened[-1]))
        opened.append(os.open(name.name, flags, dir_fd=opened[-1]))
        found = os.fstat(opened[-1])
        if not stat.S_ISREG(found.st_mode):
            refuse(f"{shown(url)} is not a file")
        with open(os.dup(opened[-1]), "rb") as file:
            data = file.read(FILE_BYTES + 1)
    except OSError as error:
        refuse(f"{shown(url)} cannot be read ({error.strerror}); links are not followed")
    finally:
        for descriptor in opened:
            os.close(descriptor)
    if len(data) > FILE_BYTES:
        refuse(f"{shown(url)} has more than {FILE_BYTES} bytes")
    return data
