"""Remembers which bundles passed on this machine, in a small file for each, so that only the first load replays."""

from __future__ import annotations

import json
import logging
import os
from pathlib import Path
from typing import Any

from trol_edge._version import __version__
from trol_edge.bundle.folder import digest_of, new_file
from trol_edge.bundle.manifest import Bundle
from trol_edge.bundle.names import VERIFIED
from trol_edge.errors import BundleError
from trol_edge.machine import identity
from trol_edge.reading import read_json

log = logging.getLogger(__name__)

SWITCH = "TROL_EDGE_SELFTEST"  # environment variable; "0" turns off the self-test at the first load


def wanted(selftest: bool | None) -> bool:
    """Whether a first load replays the self-test: the caller decides, or else the environment."""
    return os.environ.get(SWITCH, "1") != "0" if selftest is None else selftest


def passed_here(bundle: Bundle) -> list[str]:
    """The libraries with which this bundle passed its self-test on this machine, such as "onnxruntime 1.32.0"."""
    here, found = identity.read().fingerprint, set()
    for path in (path for place in places(bundle) for path in place.glob(VERIFIED)):
        data = _said(path)
        if (data.get("bundle"), data.get("machine")) == (bundle.identity, here):
            found.add(str(data.get("runs_on")))
    return sorted(found)


def _said(path: Path) -> dict[str, Any]:
    """The content of a record; empty if it cannot be read, or is a link to something else."""
    try:
        return {} if path.is_symlink() else read_json(path)
    except BundleError:
        return {}


def places(bundle: Bundle) -> list[Path]:
    """Folders for records, the preferred one first."""
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    return [bundle.folder, Path(cache) / "trol-edge"]


class Record:
    """The file that says that a bundle passed here.

    There is one file per key, and it is renamed into place, so that processes do not collide.
    """

    def __init__(self, bundle: Bundle, runs_on: str) -> None:
        self.places = places(bundle)
        self._key = {
            "bundle": bundle.identity,
            "target": bundle.manifest.target,
            "runs_on": runs_on,
            "trol_edge": __version__,
            "machine": identity.read().fingerprint,
        }
        self._name = VERIFIED.replace("*", digest_of(self._key)[:20])

    @property
    def exists(self) -> bool:
        return any(_said(place / self._name) == self._key for place in self.places)

    @property
    def writable(self) -> Path | None:
        """The first folder that can be written, or None."""
        for place in self.places:
            try:
                place.mkdir(parents=True, exist_ok=True)
            except OSError:
                continue
            if os.access(place, os.W_OK | os.X_OK):
                return place
        return None

    def write(self) -> None:
        place = self.writable
        if place is None:
            return
        try:
            with new_file(place / self._name) as part:
                part.write_text(json.dumps(self._key, indent=1) + "\n", encoding="utf-8")
        except OSError as error:
            log.warning("%s: the passed self-test could not be recorded (%s)", place, error)
