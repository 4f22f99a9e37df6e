"""`make gpu-kit`: puts everything that a machine with a GPU and without a network needs into one folder.

Wheels are downloaded for that machine, not for this one. Bundles of both small models are exported here, and engines of
TensorRT for RTX are built here. Large files are cut into pieces, because the transfer may have a size limit.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import lzma
import os
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from run import KIT, KIT_VERSION, NANOS, PRECISIONS

import trol_edge
from trol_edge.bundle.folder import sha256_of
from trol_edge.errors import TrolEdgeError, UsageError

ROOT = Path(__file__).resolve().parents[2]
PYTHON = "3.12"
# Packages that machines for machine learning usually lack; the rest is taken from the machine (stage "machine" lists
# it). `unless`: not installed there if this module can be imported.
WHEELS: tuple[dict[str, str], ...] = (
    {"what": "cuda-bindings==13.0.3", "unless": "cuda.bindings.runtime"},
    {"what": "onnxruntime-gpu==1.31.1"},
    {"what": "tensorrt-rtx-cu13==1.7.1.116", "source": "plain Python"},  # the package itself exists as source only
    {"what": "tensorrt-rtx-cu13-bindings==1.7.1.116"},
    {"what": "tensorrt-rtx-cu13-libs==1.7.1.116"},
)
FROM_THE_MACHINE = ("numpy", "pillow", "tokenizers", "typer", "rich", "flatbuffers", "protobuf", "CUDA 13", "cuDNN 9")
FOR_EXPORT = ("torch", "onnx", "onnx-ir", "onnxscript", "safetensors", "sentencepiece")
GLIBC = ("2_39", "2_35", "2_34", "2_31", "2_28", "2_27", "2_24", "2_17")  # the versions in the names of wheels
JETSON_TARGETS = {
    "jetson-jp6": ("fp16", "int8", "int4"),
    "jetson-jp7": ("fp16", "int8", "int4", "fp8"),
    "jetson-jp72": ("fp16", "int8", "int4", "fp8"),
}
COPY_BYTES = 1 << 20
FILTERS = [{"id": lzma.FILTER_LZMA2, "preset": 6, "dict_size": 64 << 20}]


def make(folder: Path, piece_bytes: int, jetson: bool, wheels: bool, engines: bool, only: Sequence[str]) -> None:
    """Make the kit. Earlier downloads and exports are used again. Raises TrolEdgeError."""
    cache = folder.with_name(folder.name + "-cache")
    cache.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(folder, ignore_errors=True)
    pieces = folder / "pieces"
    pieces.mkdir(parents=True)
    files: dict[str, Any] = {}
    project = project_wheel(cache)
    files[project.name] = entry(project, pieces, piece_bytes, kind="wheel")
    packed = bundles(cache, jetson, engines, only)
    files[packed.name] = entry(packed, pieces, piece_bytes, kind="bundles")
    for wanted in WHEELS if wheels and not jetson else ():
        note(f"{wanted['what']} ...")
        wheel = downloaded(wanted["what"], cache, "source" in wanted)
        own = {"kind": "wheel", **{key: value for key, value in wanted.items() if key == "unless"}}
        if "-cp" in wheel.name:
            own["python"] = PYTHON
        files[wheel.name] = entry(wheel, pieces, piece_bytes, **own)
    for name in ("run.py", "stages.py"):
        shutil.copyfile(Path(__file__).with_name(name), folder / name)
    manifest = {
        "kit": KIT,
        "version": KIT_VERSION,
        "trol_edge": trol_edge.__version__,
        "commit": commit(),
        "machine": "aarch64" if jetson else "x86_64",
        "jetson": jetson,
        "from the machine": [*FROM_THE_MACHINE, *([] if jetson else FOR_EXPORT)],
        "files": files,
    }
    (folder / "manifest.json").write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    count = sum(len(found["pieces"]) for found in files.values())
    note(f"{folder}: {size / 1e6:.0f} MB in {count} pieces of at most {piece_bytes / 1e6:.0f} MB")
    note("carry the folder to the machine, and there: python3 run.py --budget 720")


def note(line: str) -> None:
    """Print a line about the current work."""
    print(line, file=sys.stderr, flush=True)


def entry(path: Path, pieces: Path, piece_bytes: int, **own: str) -> dict[str, Any]:
    """Cut a file into pieces and return its entry for the manifest."""
    whole, found = hashlib.sha256(), []
    for number, block in enumerate(parts(path, piece_bytes)):
        piece = pieces / f"{path.name}.{number:03}"
        digest = hashlib.sha256()
        with piece.open("wb") as out:
            for data in block:
                out.write(data)
                digest.update(data)
                whole.update(data)
        found.append({"name": piece.name, "bytes": piece.stat().st_size, "sha256": digest.hexdigest()})
    return {"bytes": path.stat().st_size, "sha256": whole.hexdigest(), "pieces": found, **own}


def parts(path: Path, size: int) -> Iterator[Iterator[bytes]]:
    """Yield a file in parts of at most `size` bytes, each as blocks."""

    def blocks(left: int) -> Iterator[bytes]:
        while left and (data := file.read(min(COPY_BYTES, left))):
            left -= len(data)
            yield data

    with path.open("rb") as file:
        for start in range(0, path.stat().st_size, size):
            file.seek(start)
            yield blocks(size)


def project_wheel(cache: Path) -> Path:
    """Build the project's own wheel again and return its path."""
    note("the project's wheel ...")
    out = cache / "project"
    shutil.rmtree(out, ignore_errors=True)
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "-w", os.fspath(out), os.fspath(ROOT)]
    called(command, "build the project's wheel")
    (wheel,) = out.glob("*.whl")
    return wheel


def downloaded(what: str, cache: Path, source: bool) -> Path:
    """Download a wheel for the other machine's Python from the index. source: build it here from plain Python."""
    out = cache / "wheels" / what
    if source and not list(out.glob("*.whl")):
        command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "-w", os.fspath(out), what]
        called(command, f"make a wheel of {what}")
    if not list(out.glob("*.whl")):
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
        command += ["--python-version", PYTHON, "--implementation", "cp", "-d", os.fspath(out), what]
        command += [part for version in GLIBC for part in ("--platform", f"manylinux_{version}_x86_64")]
        called([*command, "--platform", "manylinux2014_x86_64"], f"download {what}")
    (wheel,) = out.glob("*.whl")
    return wheel


def called(command: Sequence[str], what: str, **more: Any) -> str:
    """Run a program and return its standard output. Raises TrolEdgeError with its last line if it fails."""
    done = subprocess.run(command, capture_output=True, text=True, **more)
    if done.returncode:
        last = (done.stderr or done.stdout).strip().splitlines()[-1:] or [f"exit status {done.returncode}"]
        raise TrolEdgeError(f"could not {what}: {last[0]}")
    return done.stdout


def bundles(cache: Path, jetson: bool, engines: bool, only: Sequence[str]) -> Path:
    """Make one tar file of all bundles and their pictures, in which equal weights are stored once."""
    out = cache / f"bundles-{sources()}"  # another exporter makes other bundles
    wanted = [
        (model, target, precision)
        for precision in PRECISIONS
        for model in NANOS
        for target in (JETSON_TARGETS if jetson else ("cpu", "tensorrt", "rtx"))
        if (precision in JETSON_TARGETS[target] if jetson else (target, precision) != ("cpu", "fp8"))
    ]
    names = [f"{model}-{target}-{precision}" for model, target, precision in wanted]
    if unknown := [name for name in only if name not in names]:
        raise UsageError(f"no such bundle: {', '.join(unknown)}; there are {', '.join(names)}")
    for name, (model, target, precision) in zip(names, wanted, strict=True):
        if only and name not in only:
            continue
        folder = out / name
        if not (folder / "bundle.json").is_file():
            note(f"export {name} ...")
            cli("export", model, "-o", os.fspath(folder), "--target", target, "--precision", precision)
        if target == "rtx" and engines:
            note(f"engines of {name} ...")
            cli("build", os.fspath(folder))
    chosen = hashlib.sha256(" ".join(only or names).encode()).hexdigest()[:12]
    packed = out / f"packed-{chosen}" / "bundles.tar.xz"
    packed.parent.mkdir(parents=True, exist_ok=True)
    if packed.is_file() and all(
        path.stat().st_mtime <= packed.stat().st_mtime for name in only or names for path in (out / name).rglob("*")
    ):
        return packed  # compressing it again would take minutes
    share(out)
    with lzma.open(packed, "wb", filters=FILTERS) as out_file, tarfile.open(fileobj=out_file, mode="w") as tar:
        for name in only or names:
            tar.add(out / name, f"bundles/{name}")
        checkpoints = ROOT / "export" / "checkpoints"
        for model in NANOS:
            tar.add(checkpoints / model / "scene.png", f"bundles/{model}.png")
        tar.add(checkpoints / NANOS[0], f"bundles/{NANOS[0]}-checkpoint")  # what a dry run exports
    return packed


def sources() -> str:
    """A digest of all code that has a part in a bundle or an engine."""
    digest = hashlib.sha256()
    for room in ("trol_edge", "export", "calibration", "runtimes"):
        for path in sorted((ROOT / room).rglob("*.py")):
            digest.update(path.read_bytes())
    return digest.hexdigest()[:12]


def share(folder: Path) -> None:
    """Hard-link equal files, which a tar file then holds once; bundles of two targets may have equal weights."""
    seen: dict[str, Path] = {}
    for path in sorted(path for path in folder.rglob("*") if path.is_file() and path.suffix != ".xz"):
        first = seen.setdefault(sha256_of(path), path)
        if not path.samefile(first):
            path.unlink()
            path.hardlink_to(first)


def cli(*arguments: str) -> None:
    """Run one command of trol-edge in a separate process."""
    called([sys.executable, "-m", "trol_edge", *arguments, "--json"], f"run trol-edge {arguments[0]}", cwd=ROOT)


def commit() -> str | None:
    """The commit of this checkout, marked if files differ from it, or None outside of a checkout."""
    try:
        found = called(["git", "describe", "--always", "--dirty", "--abbrev=12"], "ask git", cwd=ROOT)
    except (OSError, TrolEdgeError):
        return None
    return found.strip()


def main() -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], epilog="Example: make gpu-kit PIECE_MB=48")
    parser.add_argument("-o", "--output", type=Path, default=ROOT / "build" / "gpu-kit", help="Folder to make.")
    parser.add_argument("--piece-mb", type=float, default=48.0, help="Largest piece, in MB.  [default: 48]")
    parser.add_argument(
        "--jetson",
        action="store_true",
        help="Make a kit for a Jetson, with our wheel only and engines that are built there.",
    )
    parser.add_argument(
        "--no-wheels", action="store_true", help="Include only our own wheel, to try the script on a complete machine."
    )
    parser.add_argument("--no-engines", action="store_true", help="Build no engines of TensorRT for RTX.")
    parser.add_argument("--only", default="", help="Bundles to include, separated by commas.  [default: all]")
    options = parser.parse_args()
    if options.piece_mb < 0.1:
        parser.error(f"--piece-mb {options.piece_mb:g}: give at least 0.1")
    only = [name for name in options.only.split(",") if name]
    size, wheels, engines = round(options.piece_mb * 1e6), not options.no_wheels, not options.no_engines
    try:
        make(options.output.resolve(), size, options.jetson, wheels, engines, only)
    except (TrolEdgeError, OSError) as error:
        note(f"error: {error}")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
