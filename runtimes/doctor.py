"""Examines what this machine is, what it can build and run, and whether a bundle fits it, for `trol-edge doctor`."""

from __future__ import annotations

import dataclasses
import importlib.util
import os
import platform
import sys
from importlib import metadata
from pathlib import Path

from trol_edge import telemetry
from trol_edge._version import __version__
from trol_edge.bundle.engines import differences, read, verified
from trol_edge.bundle.manifest import Bundle
from trol_edge.bundle.names import SELFTEST, WEIGHTS
from trol_edge.bundle.sizes import cache_bytes, cpu_bytes, embedding_bytes
from trol_edge.bundle.targets import NOT_YET, TARGETS, Target
from trol_edge.bundle.trt_operators import Version
from trol_edge.bundle.weights import WeightsFile
from trol_edge.errors import BackendError, BundleError, TrolEdgeError
from trol_edge.machine import identity
from trol_edge.machine.identity import Jetson, Machine
from trol_edge.runtimes.cuda import Gpu, devices
from trol_edge.runtimes.trt.api import load
from trol_edge.runtimes.trt.build import key_here
from trol_edge.verify.passed import passed_here


@dataclasses.dataclass(frozen=True)
class Status:
    """Whether a target can be built for and run here. The reasons are empty if it can."""

    target: str
    found: str  # the library, such as "TensorRT for RTX 1.7.1"
    builds: bool
    why_no_build: str
    runs: bool
    why_no_run: str


@dataclasses.dataclass(frozen=True)
class Check:
    """One finding of the doctor. needed: whether what the user asked about fails if this is not good."""

    what: str
    good: bool
    text: str
    needed: bool = False


def status(target: Target, found: list[Gpu] | str) -> Status:
    """The status of one target. found: the GPUs, or why there are none."""
    version, title = _version(target)
    if version is None:
        return Status(target.name, "", False, title, False, title)
    if not target.serves(version):
        wants = " to below ".join(".".join(map(str, v)) for v in target.versions)
        why = f"{title} is installed, but this target is for {wants}"
        return Status(target.name, title, False, why, False, why)
    if not target.gpu:
        return Status(target.name, title, True, "", True, "")
    gpu = found[0] if isinstance(found, list) else None
    why_run = str(found) if gpu is None else ""
    if gpu is not None and target.capabilities is not None and gpu.capability not in target.capabilities:
        why_run = f"{gpu.name} has compute capability {gpu.capability}, not {' or '.join(target.capabilities)}"
    if not why_run and not any(is_there(name) for name in ("pycuda", "cuda")):
        why_run = "neither pycuda nor cuda-python is installed"
    why_build = "" if target.rtx else why_run
    return Status(target.name, title, not why_build, why_build, not why_run, why_run)


def _version(target: Target) -> tuple[Version | None, str]:
    """The version of a target's library and its title, or None and why there is none."""
    if not target.gpu:
        try:
            version = metadata.version(target.module)
        except metadata.PackageNotFoundError:
            return None, f"{target.module} is not installed: pip install 'trol-edge[cpu]'"
        return tuple(int(part) for part in version.split(".")[:2]), f"{target.library} {version}"
    try:
        library = load(target.module)
    except BackendError as error:
        return None, str(error)
    return library.version, library.title


def is_there(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except (ImportError, ValueError):
        return False


def statuses() -> list[Status]:
    """The status of every target on this machine."""
    found = devices()
    return [status(target, found) for target in TARGETS.values()]


def best() -> tuple[str, str]:
    """The default target on this machine, and why."""
    runs = {s.target: s for s in statuses() if s.runs}
    # JetPack's own target comes before the general one, TensorRT for RTX suits a desktop GPU, and a CPU is last.
    for name in ("jetson-trt11", "jetson-jp72", "jetson-jp7", "jetson-jp6", "rtx", "tensorrt"):
        if name in runs:
            return name, f"{runs[name].found} and a GPU are here ({NOT_YET})"
    why = {s.target: s.why_no_run for s in statuses()}
    return "cpu", f"no GPU target runs here: {why['rtx']}"


def examine(folder: str | os.PathLike[str] | None = None, root: str | os.PathLike[str] = "/") -> list[Check]:
    """Check whether machine, installation, driver, GPU, libraries, targets and a bundle fit together.

    A damaged bundle is a finding, not an error. root: the folder of the files that describe the machine.
    """
    here, found = identity.read(root), devices()
    checks = [*_machine(here), *_installation()]
    checks.append(
        Check("driver", False, found)
        if isinstance(found, str)
        else Check("driver", True, f"supports CUDA {'.'.join(map(str, found[0].driver))}")
    )
    for gpu in found if isinstance(found, list) else ():
        checks.append(Check("GPU", True, f"{gpu.name}, capability {gpu.capability}, {gpu.memory_bytes / 1e9:.1f} GB"))
    bindings = [name for name in ("pycuda", "cuda") if is_there(name)]
    how = "neither pycuda nor cuda-python; for a GPU: pip install 'trol-edge[jetson]' or 'trol-edge[rtx]'"
    checks.append(Check("CUDA from Python", bool(bindings), ", ".join(bindings) or how))
    for module in ("tensorrt", "tensorrt_rtx"):
        try:
            library = load(module)
            checks.append(Check(module, True, library.title))
            if module == "tensorrt" and here.jetson is not None:
                checks += _jetpack(here.jetson, library.version)
        except BackendError as error:
            checks.append(Check(module, False, str(error)))
    known = {status.target: status for status in statuses()}
    builds, runs = [s.target for s in known.values() if s.builds], [s.target for s in known.values() if s.runs]
    checks.append(
        Check(
            "targets", bool(runs), f"builds for {', '.join(builds) or 'none'}; runs {', '.join(runs) or 'none'}", True
        )
    )
    return checks if folder is None else [*checks, *_bundle(Path(folder), found, here, known)]


def _machine(here: Machine) -> list[Check]:
    parts = (here.model, here.cpu or f"{here.cores} cores", platform.machine(), here.system, f"Linux {here.kernel}")
    memory = f"{here.memory_bytes / 1e9:.1f} GB of memory, {here.available_bytes / 1e9:.1f} available"
    checks = [Check("machine", True, f"{', '.join(part for part in parts if part)}; {memory}")]
    board = here.jetson
    if board is None:
        return checks
    if not board.l4t:
        text = "no /etc/nv_tegra_release, so JetPack's version is not known (in a container, mount that file)"
        return [*checks, Check("Jetson", False, f"{board.module or 'unknown module'}; {text}")]
    if board.tensorrt is None:
        known = ", ".join(identity.JETPACKS)
        text = f"this version of trol-edge does not know which JetPack that is (it knows {known})"
        return [*checks, Check("Jetson", False, f"{board.module}, Jetson Linux {board.l4t}; {text}")]
    shipped = ".".join(map(str, board.tensorrt))
    text = f"{board.module} ({board.part}), JetPack {board.jetpack} (Jetson Linux {board.l4t}) with TensorRT {shipped}"
    serving = [target.name for target in TARGETS.values() if target.gpu and target.serves(board.tensorrt)]
    if not serving:
        return [
            *checks,
            Check("Jetson", False, f"{text}, which is too old for every target; install JetPack 6.1 or newer"),
        ]
    return [*checks, Check("Jetson", True, f"{text}: target {serving[-1]}")]


def _jetpack(board: Jetson, version: Version) -> list[Check]:
    """Check whether the TensorRT that Python finds is the one that JetPack shipped."""
    if board.tensorrt is None or version[:2] == board.tensorrt:
        return []
    ours, theirs = (".".join(map(str, v)) for v in (version, board.tensorrt))
    text = (
        f"Python finds TensorRT {ours}, but JetPack {board.jetpack} ships {theirs}; engines run with one of them only"
    )
    return [Check("TensorRT of JetPack", False, text)]


# Optional installation -> its modules, and what they are for.
EXTRAS = {
    "cpu": (("onnxruntime",), "bundles for a CPU"),
    "formats": (("llguidance",), "response_format="),
    "camera": (("cv2",), "the camera example"),
    "export": (("torch", "onnx", "onnx_ir", "onnxscript", "safetensors", "sentencepiece"), "export and calibrate"),
}


def _installation() -> list[Check]:
    """Check Python, this package and its optional parts."""
    python = sys.version_info[:2]
    good = (3, 10) <= python <= (3, 13)
    text = f"trol-edge {__version__} in {Path(__file__).resolve().parents[1]}, Python {platform.python_version()}"
    checks = [Check("trol-edge", good, text if good else f"{text}; it is made for Python 3.10 to 3.13", True)]
    for name, (modules, use) in EXTRAS.items():
        missing = [module for module in modules if not is_there(module)]
        if missing:
            text = f"not installed (no {', '.join(missing)}), needed for {use}; pip install 'trol-edge[{name}]'"
            checks.append(Check(f"extra {name}", False, text))
        else:
            checks.append(Check(f"extra {name}", True, f"installed, for {use}"))
    broken = _broken("onnxruntime")
    if broken:
        text = f"installed, but it cannot be imported ({broken}); pip install --force-reinstall 'trol-edge[cpu]'"
        checks.append(Check("onnxruntime", False, text, True))
    return [*checks, _telemetry()]


def _telemetry() -> Check:
    """Check whether ONNX Runtime may report home from this process."""
    if telemetry.too_late:
        text = (
            f"this program imported onnxruntime before trol_edge and without {telemetry.ONNXRUNTIME}=1, so it reports "
            "home; set the variable where the program starts, or import trol_edge first"
        )
        return Check("telemetry", False, text)
    return Check("telemetry", True, f"off ({telemetry.ONNXRUNTIME}=1 before the first import of onnxruntime)")


def _broken(module: str) -> str:
    """Why an installed module cannot be imported; "" if it can, or is not installed."""
    try:
        importlib.import_module(module)
    except ModuleNotFoundError:
        return ""
    except Exception as error:  # a wheel for another processor or Python fails in its own ways
        return f"{type(error).__name__}: {error}"
    return ""


def _bundle(folder: Path, found: list[Gpu] | str, here: Machine, known: dict[str, Status]) -> list[Check]:
    try:
        bundle = Bundle(folder)
        weights = bundle.weights()
    except TrolEdgeError as error:
        return [Check("bundle", False, str(error), True)]
    manifest = bundle.manifest
    text = (
        f"{manifest.model}, {manifest.plan.recipe} for target {manifest.target}, "
        f"{sum(info.bytes for info in manifest.files.values()) / 1e6:.1f} MB, made by {manifest.created_by}"
    )
    checks = [Check("bundle", True, text)]
    whole = bundle.is_unaltered(WEIGHTS)
    text = "as exported (sha256)" if whole else "altered since export (sha256 differs); copy the bundle again"
    checks.append(Check("weights", whole, text, True))
    status, target = known.get(manifest.target), TARGETS.get(manifest.target)
    if status is None or target is None:
        text = f"target {manifest.target!r} is for other tools; for a Runtime export with --target cpu"
        return [*checks, Check("runs here", False, text, True)]
    # Engines for a desktop GPU may be built on a machine without one.
    checks.append(Check("runs here", status.runs, status.why_no_run or f"with {status.found}", not status.builds))
    if target.gpu:
        checks += _engines(bundle, target, found)
    else:
        checks.append(_memory(bundle, weights, here))
        installed = _installed("onnxruntime")
        if installed and (problem := manifest.too_old("onnxruntime", installed)):
            checks.append(Check("onnxruntime for it", False, f"{problem}; install a newer one", True))
    if SELFTEST not in manifest.files:
        text = "the bundle has none, so its numbers cannot be checked here; export it again"
        return [*checks, Check("self-test", False, text)]
    passed = passed_here(bundle)
    text = (
        f"passed on this machine: {', '.join(passed)}"
        if passed
        else ("not yet passed on this machine; the first load replays it, or `trol-edge verify`")
    )
    return [*checks, Check("self-test", bool(passed), text)]


def _installed(module: str) -> str:
    """The version of a module; "" if it cannot be imported."""
    try:
        return str(importlib.import_module(module).__version__)
    except Exception:  # another check says why
        return ""


def _memory(bundle: Bundle, weights: WeightsFile, here: Machine) -> Check:
    """Compare loaded weights and a session's cache with the available memory."""
    manifest = bundle.manifest
    size = cpu_bytes(bundle, (name for graph in manifest.graphs.values() for name in graph.weights))
    size += embedding_bytes(bundle)
    cache = cache_bytes(manifest.graphs["traverse"].inputs, manifest.context)
    text = f"needs about {(size + cache) / 1e9:.1f} GB (weights {size / 1e9:.1f}, both K/V sets {cache / 1e9:.1f}"
    text += ", in 8 bits)" if manifest.plan.kv else ")"
    free = here.available_bytes
    if free and size + cache > free:
        text += f", but {free / 1e9:.1f} are available; close programs, export with a smaller --context or precision"
        return Check("memory", False, text, True)
    return Check("memory", True, f"{text}, {free / 1e9:.1f} are available")


def _engines(bundle: Bundle, target: Target, found: list[Gpu] | str) -> list[Check]:
    try:
        engines = read(bundle, target.name)
        for name in engines.engines:
            verified(bundle, engines, name)
    except BundleError as error:
        return [Check("engines", False, str(error), True)]
    built = f"{engines} by {engines.key.library}, hashes as recorded"
    checks = [Check("engines", True, built, True)]
    try:
        key = key_here(target, load(target.module), found[0] if isinstance(found, list) else None)
        problems = differences(bundle, engines, key)
        where = "for this GPU and driver" if isinstance(found, list) else "but there is no GPU to run them"
        text = "; ".join(problems) or f"built with this library of these graphs, {where}"
        checks.append(Check("fit", not problems, text, True))
    except TrolEdgeError as error:
        checks.append(Check("fit", False, str(error), True))
    return checks
