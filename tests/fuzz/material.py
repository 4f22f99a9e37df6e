"""What the campaigns damage: the shipped checkpoints, bundles of them, and what these answer when nothing is wrong."""

from __future__ import annotations

import functools
import hashlib
import json
import os
import shutil
from pathlib import Path

from tests import kept
from tests.conftest import CHECKPOINTS, NANOS, installed
from tests.traces import remember
from trol_edge.bundle.folder import digest_of
from trol_edge.bundle.names import MANIFEST

QUESTION, TEXT_QUESTION = "What is left of the red star?", "Is there a star?"


def scene(model: str) -> Path:
    """The picture that ships with a model."""
    return CHECKPOINTS / model / "scene.png"


@functools.cache
def remember_traces() -> None:
    """Let exports of this process take traces that were made before."""
    from trol_edge.export.graphs import canonical

    canonical.trace_one = remember(canonical.trace_one)


def bundle(model: str = NANOS[0]) -> Path:
    """A bundle of a shipped model, made once and kept. To change files of it, copy it."""
    from trol_edge.export import pipeline

    def make(folder: Path) -> None:
        remember_traces()
        pipeline.export(CHECKPOINTS / model, folder)

    key = kept.digest([*kept.sources(pipeline.__name__), CHECKPOINTS / model, Path(__file__)], installed())
    return kept.folder("fuzz", key, make)


def copy(folder: Path, to: Path, link: bool = False) -> Path:
    """A copy of a folder's files, or hard links to them; what was at `to` is removed."""
    remove(to)
    to.mkdir()
    for path in folder.iterdir():
        (os.link if link else shutil.copyfile)(path, to / path.name)
    return to


def remove(path: Path) -> None:
    """Remove whatever is at a path."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def replace(path: Path, data: bytes) -> None:
    """New content under an old name, whose old file may have other names."""
    remove(path)
    path.write_bytes(data)


def seal(folder: Path) -> None:
    """Give a manifest, and every regular file that it lists, the hashes that fit, as whoever knows the format can."""
    data = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    if isinstance(data, dict):
        files = data.get("files")
        for name, info in files.items() if isinstance(files, dict) else ():
            if isinstance(info, dict) and "/" not in name and "\0" not in name and (folder / name).is_file():
                content = (folder / name).read_bytes()
                info |= {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
        data.pop("manifest_sha256", None)
        data["manifest_sha256"] = digest_of(data)
        replace(folder / MANIFEST, json.dumps(data).encode())
