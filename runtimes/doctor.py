"""What this machine can build and run, and whether a bundle fits it: the questions that `trol-edge doctor` asks."""

from __future__ import annotations

import dataclasses
import importlib.util
from importlib import metadata

from trol_edge.bundle import Bundle
from trol_edge.engines import differences, read, verified
from trol_edge.errors import BackendError, BundleError, TrolEdgeError
from trol_edge.runtimes.cuda import Device, devices
from trol_edge.runtimes.trt_api import load
from trol_edge.runtimes.trt_build import key_here
from trol_edge.targets import NOT_YET, TARGETS, Target
from trol_edge.trt_operators import Version


@dataclasses.dataclass(frozen=True)
class Status:
    """Whether a target can be built for and run here; the reasons are empty where it can."""

    target: str
    found: str  # the library, as "TensorRT for RTX 1.7.1"
    builds: bool
    why_no_build: str
    runs: bool
    why_no_run: str


@dataclasses.dataclass(frozen=True)
class Check:
    """One finding of the doctor."""

    what: str
    good: bool
    text: str


def status(target: Target, found: list[Device] | str) -> Status:
    """What there is for one target. found: the GPUs, or why there are none."""
    version, title = _version(target)
    if version is None:
        return Status(target.name, "", False, title, False, title)
    if not target.serves(version):
        wants = " to below ".join(".".join(map(str, v)) for v in target.versions)
        why = f"{title} is here, this target is for {wants}"
        return Status(target.name, title, False, why, False, why)
    if not target.gpu:
        return Status(target.name, title, True, "", True, "")
    gpu = found[0] if isinstance(found, list) else None
    why_run = str(found) if gpu is None else ""
    if gpu is not None and target.capabilities is not None and gpu.capability not in target.capabilities:
        why_run = f"{gpu.name} has compute capability {gpu.capability}, not {' or '.join(target.capabilities)}"
    if not why_run and not any(_there(name) for name in ("pycuda", "cuda")):
        why_run = "neither pycuda nor cuda-python is installed"
    why_build = "" if target.rtx else why_run
    return Status(target.name, title, not why_build, why_build, not why_run, why_run)


def _version(target: Target) -> tuple[Version | None, str]:
    """Version of a target's library and its title; or None and why not."""
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


def _there(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except (ImportError, ValueError):
        return False


def statuses() -> list[Status]:
    """Every target, as it stands on this machine."""
    found = devices()
    return [status(target, found) for target in TARGETS.values()]


def best() -> tuple[str, str]:
    """The target to take on this machine when none is named, and why."""
    runs = {s.target: s for s in statuses() if s.runs}
    # JetPack's own before the general one; TensorRT for RTX where there is a desktop GPU; a CPU last.
    for name in ("jetson-trt11", "jetson-jp7", "jetson-jp6", "rtx", "tensorrt"):
        if name in runs:
            return name, f"{runs[name].found} and a GPU are here ({NOT_YET})"
    why = {s.target: s.why_no_run for s in statuses()}
    return "cpu", f"no GPU target runs here: {why['rtx']}"


def examine(bundle: Bundle | None = None) -> list[Check]:
    """Driver, GPU, libraries, and with a bundle its engines: what fits together and what does not."""
    found = devices()
    checks = [
        Check("driver", False, found)
        if isinstance(found, str)
        else Check("driver", True, f"serves CUDA {'.'.join(map(str, found[0].driver))}")
    ]
    for gpu in found if isinstance(found, list) else ():
        checks.append(Check("GPU", True, f"{gpu.name}, capability {gpu.capability}, {gpu.memory_bytes / 1e9:.1f} GB"))
    bindings = [name for name in ("pycuda", "cuda") if _there(name)]
    checks.append(Check("CUDA from Python", bool(bindings), ", ".join(bindings) or "neither pycuda nor cuda-python"))
    for module in ("tensorrt", "tensorrt_rtx"):
        try:
            checks.append(Check(module, True, load(module).title))
        except BackendError as error:
            checks.append(Check(module, False, str(error)))
    if bundle is not None:
        checks += _bundle(bundle, found)
    return checks


def _bundle(bundle: Bundle, found: list[Device] | str) -> list[Check]:
    target = TARGETS.get(bundle.manifest.target)
    if target is None or not target.gpu:
        return [Check("bundle", True, f"for target {bundle.manifest.target}: it needs no engines")]
    try:
        engines = read(bundle, target.name)
        for name in engines.engines:
            verified(bundle, engines, name)
    except BundleError as error:
        return [Check("engines", False, str(error))]
    checks = [Check("engines", True, f"{', '.join(engines.engines)} by {engines.key.library}, hashes as recorded")]
    try:
        key = key_here(target, load(target.module), found[0] if isinstance(found, list) else None)
        problems = differences(bundle, engines, key)
        where = "for this GPU and driver" if isinstance(found, list) else "but there is no GPU to run them"
        text = "; ".join(problems) or f"built with this library of these graphs, {where}"
        checks.append(Check("fit", not problems, text))
    except TrolEdgeError as error:
        checks.append(Check("fit", False, str(error)))
    return checks
