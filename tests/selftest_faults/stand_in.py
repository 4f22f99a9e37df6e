"""Engines of the stand-in for a GPU (tests/trt_standin.py) for a bundle, outside of pytest."""

from __future__ import annotations

import contextlib
import dataclasses
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest import mock

from tests import trt_standin
from tests.selftest_faults.catalogue import Fault, swap
from tests.test_trt import add_engines
from trol_edge.bundle.engines import Key, folder_of, read, write
from trol_edge.bundle.manifest import Bundle
from trol_edge.bundle.names import WEIGHTS
from trol_edge.runtimes.cuda import CudaPython, Gpu
from trol_edge.runtimes.trt import backend
from trol_edge.runtimes.trt.api import Library

GPU = Gpu("stand-in for Orin", "8.7", 8 << 30, (12, 6))
TARGET = "tensorrt"


@contextlib.contextmanager
def machine() -> Iterator[Callable[[Path], None]]:
    """A machine with the stand-in; yields what builds the engines of a folder, as if here."""
    cuda = trt_standin.CudaRuntime()
    library = Library(trt_standin.module("tensorrt", "10.3.0", cuda))
    key = Key(TARGET, library.title, GPU.name, GPU.capability, "12.6")

    def build(folder: Path) -> None:
        if not (folder / "stale").exists():
            shutil.rmtree(folder / "engines", ignore_errors=True)
            add_engines(folder, key)
        (folder / "stale").unlink(missing_ok=True)

    with (
        mock.patch.object(backend, "load", lambda name: library),
        mock.patch.object(backend, "open_cuda", lambda: CudaPython(cuda)),
        mock.patch.object(backend, "devices", lambda: [GPU]),
    ):
        yield build


def stale(pristine: Path, others: Path, build: Callable[[Path], None]) -> Iterator[Fault]:
    """Engines that were built from other weights: with what says so, and with that forged.

    others: an empty folder for the bundles that they are built from.
    """
    for layer in range(Bundle(pristine).manifest.spec.num_layers):
        other = others / str(layer)
        shutil.copytree(pristine, other, ignore=shutil.ignore_patterns("verified-*", "engines"))
        swap(other, f"decoder.layers.{layer}.qkv.weight")
        build(other)
        for forged in (False, True):

            def plant(folder: Path, other: Path = other, forged: bool = forged) -> None:
                shutil.rmtree(folder / "engines", ignore_errors=True)
                shutil.copytree(other / "engines", folder / "engines")
                (folder / "stale").touch()
                if forged:
                    bundle = Bundle(folder)
                    engines = read(bundle, TARGET)
                    now = bundle.manifest.files[WEIGHTS].sha256
                    write(folder_of(bundle, TARGET), dataclasses.replace(engines, weights_sha256=now))

            place = rf"^traverse\.layers\.{layer}\." if forged else "^engines$"
            yield Fault("a stale engine", f"{'forged, ' if forged else ''}layer {layer}", place, plant)
