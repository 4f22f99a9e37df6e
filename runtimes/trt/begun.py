"""Keeps the finished engines of a build that may be killed, for the next one to go on with.

Beside each engine is a note of it: what the build was of, what was built, and the hash of the note itself. It is
written after the engine, so an engine without one is not complete. An engine is used if its file has the hash in its
note, and its note is of this very build, with the same library, GPU, weights, graphs and settings.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from trol_edge.bundle.engines import EngineInfo
from trol_edge.bundle.folder import digest_of, new_file, sha256_of
from trol_edge.bundle.strict import from_dict
from trol_edge.errors import BundleError
from trol_edge.reading import is_plain_name, read_json_value


class Begun:
    """The folder of an unfinished build."""

    def __init__(self, folder: Path, of: str, start_again: bool = False) -> None:
        """of: a hash of what is built, and how. start_again: use nothing of what is there."""
        self._folder, self._of = folder, of
        if start_again:
            for path in folder.iterdir():
                path.unlink()

    def found(self, name: str) -> EngineInfo | None:
        """The engine of this name that an earlier build finished, if there is one."""
        try:
            data = read_json_value(self._note(name), BundleError, "build again")
            if not isinstance(data, dict) or data.pop("sha256", None) != digest_of(data) or data["of"] != self._of:
                return None
            info: EngineInfo = from_dict(EngineInfo, data["engine"], name)
            file = self._folder / info.file
            whole = is_plain_name(info.file) and file.stat().st_size == info.bytes and sha256_of(file) == info.sha256
        except (BundleError, KeyError, OSError):
            return None
        return info if whole else None

    def keep(self, name: str, info: EngineInfo) -> EngineInfo:
        """Note that an engine in the folder is finished."""
        data: dict[str, Any] = json.loads(json.dumps({"of": self._of, "engine": dataclasses.asdict(info)}))
        with new_file(self._note(name)) as part:
            part.write_text(json.dumps(data | {"sha256": digest_of(data)}), encoding="utf-8")
        return info

    def move(self, infos: Iterable[EngineInfo], target: Path) -> None:
        """Move all engines to where they stay."""
        for info in infos:
            (self._folder / info.file).replace(target / info.file)

    def _note(self, name: str) -> Path:
        return self._folder / f"{name}.json"
