"""The stages of the GPU kit. run.py runs each in a separate process and sends its arguments as JSON to stdin.

Every stage compares what the GPU computes with a known result: with the CPU's answer to the same question, with the
samples of the FP32 reference in the bundle, or with bytes that were sent to the GPU.
"""

from __future__ import annotations

import ctypes
import dataclasses
import fcntl
import functools
import gc
import importlib
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any

MB = 1 << 20
QUESTIONS = ("What is left of the red circle?", "Describe the scene.")
CONTEXT = 2048  # tokens of the large bundles' cache, which is TroL-1.8B's default
SIZE = (640, 480)  # size of the picture that is timed
TEXT_TOKENS = 16  # text tokens in the PyTorch reference's prompt, as in the profile's made-up question
TOKENS = 32  # length of a timed answer
RUNS = 5  # runs of everything that is timed
TIE = 0.05  # nats between two tokens whose order rounding may change
DISTRIBUTIONS = (
    "trol-edge", "numpy", "pillow", "tokenizers", "typer", "rich", "onnx", "onnx-ir", "onnxscript", "safetensors",
    "sentencepiece", "torch", "onnxruntime", "onnxruntime-gpu", "tensorrt", "tensorrt-rtx", "tensorrt-rtx-cu13-libs",
    "tensorrt-rtx-cu13-bindings", "cuda-python", "cuda-bindings", "pycuda", "nvidia-cudnn-cu13", "nvidia-cublas",
    "nvidia-cuda-runtime",
)  # fmt: skip
LIBRARIES = ("libcuda.so.1", "libcudart.so.13", "libcudart.so.12", "libcublas.so.13", "libcublas.so.12",
             "libcudnn.so.9", "libnvinfer.so.10", "libnvinfer.so.11", "libnvidia-ml.so.1")  # fmt: skip


class NotHere(Exception):
    """Something that this stage needs is missing, which neither proves nor disproves anything."""


class Record:
    """A stage's part of the result, written at every change."""

    def __init__(self, told: dict[str, Any]) -> None:
        self.kit, self.scratch, self.out = (Path(told[name]) for name in ("kit", "scratch", "out"))
        self.dry: bool = told["dry"]
        self._file = Path(told["file"])
        self._data: dict[str, Any] = {"status": "running", "line": "", "checks": [], "data": {}}

    def __setitem__(self, name: str, value: Any) -> None:
        self._data["data"][name] = value
        self._write()

    def check(self, name: str, good: bool, found: str = "") -> None:
        """Record whether something holds; the stage passes if all checks do."""
        self._data["checks"].append({"name": name, "good": bool(good), "found": "" if good else found})
        self._write()

    def end(self, status: str, line: str) -> None:
        """Record how the stage ended, in one line."""
        self._data |= {"status": status, "line": " ".join(line.split())[:600]}
        self._write()

    def verdict(self) -> tuple[str, str]:
        """The status, passed or failed, by the checks."""
        bad = [check for check in self._data["checks"] if not check["good"]]
        if bad:
            return "failed", "; ".join(f"{check['name']}: {check['found']}" for check in bad)
        return "passed", f"{len(self._data['checks'])} checks hold"

    def _write(self) -> None:
        part = self._file.with_suffix(".part")
        part.write_text(json.dumps(self._data, indent=1, default=str) + "\n", encoding="utf-8")
        part.replace(self._file)

    @property
    def provider(self) -> Any:
        """ONNX Runtime's provider that is tested."""
        return "cpu" if self.dry else "cuda"


# -- the machine -----------------------------------------------------------------------------------------------------


def machine(record: Record) -> None:
    """Record GPU, driver, CUDA, libraries, what the kit brought, memory bandwidth and matrix rate."""
    record["python"] = platform.python_version()
    record["system"] = f"{platform.system()} {platform.release()} {platform.machine()}"
    cpu = [line.split(":", 1)[1].strip() for line in lines_of("/proc/cpuinfo") if line.startswith("model name")]
    record["cpu"] = f"{cpu[0]}, {len(cpu)} threads" if cpu else platform.processor()
    record["memory_gb"] = round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9, 1)
    record["disk_free_gb"] = round(shutil.disk_usage(record.scratch).free / 1e9, 1)
    site = os.fspath(record.scratch / "site")
    found = {}
    for name in DISTRIBUTIONS:
        try:
            entry = metadata.distribution(name)
        except metadata.PackageNotFoundError:
            continue
        found[name] = f"{entry.version} ({'kit' if os.fspath(entry.locate_file('')).startswith(site) else 'machine'})"
    record["distributions"] = found
    record["libraries"] = [name for name in LIBRARIES if loads(name)]
    record.check("the project is importable", "trol-edge" in found, "trol-edge is not installed; see problems")
    if "trol-edge" not in found:
        return
    from trol_edge.machine.identity import read as identify

    record["identity"] = dataclasses.asdict(identify())
    device = require_gpu(record)
    record["gpu"] = dataclasses.asdict(device)
    fields = "name,driver_version,memory.total,clocks.max.sm,clocks.max.memory,power.limit,temperature.gpu"
    record["nvidia_smi"] = said("nvidia-smi", f"--query-gpu={fields}", "--format=csv")
    record["rates"] = rates()


def require_gpu(record: Record) -> Any:
    """The first GPU as the driver describes it. Raises NotHere if there is none."""
    from trol_edge.runtimes.cuda import devices

    found = devices()
    if isinstance(found, str):
        raise NotHere(f"needs an NVIDIA GPU: {found}")
    return found[0]


def rates() -> dict[str, Any]:
    """Measure bytes per second of a copy within the GPU, and FLOP per second of matmuls, with PyTorch."""
    try:
        torch = importlib.import_module("torch")
    except ImportError:
        return {"not measured": "PyTorch is not installed"}
    if not torch.cuda.is_available():
        return {"not measured": "this PyTorch has no CUDA"}
    half = torch.empty(1 << 30, dtype=torch.float16, device="cuda").normal_()
    other = torch.empty_like(half)
    copy = timed_on_gpu(torch, functools.partial(other.copy_, half))
    found = {"copy_gb_per_s, read and written": round(2 * half.nbytes / copy / 1e9)}
    del half, other
    for dtype in (torch.float16, torch.float32):
        a = torch.randn(8192, 8192, device="cuda").to(dtype)
        seconds = timed_on_gpu(torch, lambda a=a: a @ a)
        found[f"matmul_tflop_per_s, {dtype}, 8192".replace("torch.", "")] = round(2 * 8192**3 / seconds / 1e12, 1)
    return found


def timed_on_gpu(torch: Any, work: Callable[[], Any], repeats: int = 10) -> float:
    """The median seconds of some GPU work, after three runs for warm-up."""
    for _ in range(3):
        work()
    times = []
    for _ in range(repeats):
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        work()
        stop.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(stop) / 1e3)
    return statistics.median(times)


def lines_of(path: str) -> list[str]:
    """The lines of a text file; none if it cannot be read."""
    try:
        return Path(path).read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []


def loads(library: str) -> bool:
    """Whether the dynamic linker finds a library."""
    try:
        ctypes.CDLL(library)
    except OSError:
        return False
    return True


def said(*command: str) -> str:
    """The output of a command, or why it could not run."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"{command[0]}: {error}"
    return (done.stdout or done.stderr).strip()


# -- cuda.py ---------------------------------------------------------------------------------------------------------


def cuda(record: Record) -> None:
    """Test memory, copies, capture and errors, through cuda-python and, if it is installed, through pycuda."""
    from trol_edge.runtimes import cuda as room

    require_gpu(record)
    for name, make in (("cuda.bindings.runtime", room.CudaPython), ("pycuda.driver", room.PyCuda)):
        try:
            module = importlib.import_module(name)
        except ImportError as error:
            record[name] = f"not installed ({error})"
            if name.startswith("cuda."):
                record.check(name, False, f"not installed ({error}); Runtime could not use the GPU through it")
            continue
        opened: Any = make(module)
        record[name] = getattr(importlib.import_module(name.split(".")[0]), "__version__", None) or "installed"
        try:
            _memory(record, name, opened)
            _copies(record, name, opened)
            if opened.graphs:
                _capture(record, name, opened)
        finally:
            opened.close()


def _memory(record: Record, name: str, opened: Any) -> None:
    import numpy as np

    from trol_edge.errors import BackendError

    before, total = opened.memory()
    pointer = opened.allocate(256 * MB, "a test")
    down = opened.pinned((64 * MB,), np.float32)
    down[:] = 7
    opened.download(down, pointer)
    opened.wait()
    record.check(f"{name}: new memory is zeros", not down.any())
    held = before - opened.memory()[0]
    record.check(f"{name}: free memory falls by what is taken", held >= 256 * MB, f"by {held} bytes")
    opened.free(pointer)
    opened.wait()
    back = before - opened.memory()[0]
    record.check(f"{name}: and is given back", back < 128 * MB, f"{back} bytes are missing")
    try:
        opened.allocate(2 * total, "a test of what is too large")
    except BackendError as error:
        text = str(error)
        good = "needs" in text and "MB of GPU memory" in text and "close sessions" in text
        record.check(f"{name}: out of memory is said clearly", good, text)
        record[f"{name}, out of memory"] = text
    else:
        record.check(f"{name}: out of memory is said clearly", False, "twice the GPU's memory was given")
    pointer = opened.allocate(MB, "a test after that")
    opened.free(pointer)
    record.check(f"{name}: and the next allocation works", True)
    del down
    gc.collect()
    again = opened.pinned((16,), np.float32)
    record.check(f"{name}: page-locked memory is taken again after it was given back", not again.any())


def _copies(record: Record, name: str, opened: Any) -> None:
    import numpy as np

    size = 256 * MB
    up, down = opened.pinned((size // 4,), np.float32), opened.pinned((size // 4,), np.float32)
    up[:] = np.random.default_rng(0).standard_normal(size // 4, dtype=np.float32)
    a, b = opened.allocate(size, "a test"), opened.allocate(size, "a test")
    opened.upload(a, up)
    opened.copy(b, a, size)
    opened.download(down, b)
    opened.wait()
    record.check(f"{name}: what goes up, across and down is the same", np.array_equal(up, down))
    pageable = np.ascontiguousarray(up[: 4 * MB])
    opened.upload(a, pageable)
    opened.download(pageable[::-1].copy(), a)
    opened.wait()
    works: tuple[tuple[str, Callable[[], None]], ...] = (
        ("up", lambda: opened.upload(a, up)),
        ("within", lambda: opened.copy(b, a, size)),
        ("down", lambda: opened.download(down, b)),
    )
    found = {}
    for what, work in works:
        found[what] = round(size / timed(work, opened.wait) / 1e9, 1)
    record[f"{name}, GB/s of copies (page-locked; within: read once and written once)"] = found
    for pointer in (a, b):
        opened.free(pointer)


def timed(work: Callable[[], Any], wait: Callable[[], None] = lambda: None, repeats: int = 10) -> float:
    """The median seconds, after one run for warm-up."""
    times = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        work()
        wait()
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:])


def _capture(record: Record, name: str, opened: Any) -> None:
    import numpy as np

    a, b = opened.allocate(4096, "a test"), opened.allocate(4096, "a test")
    up, down = opened.pinned((1024,), np.float32), opened.pinned((1024,), np.float32)

    def copies() -> None:
        opened.upload(a, up)
        opened.copy(b, a, 4096)
        opened.download(down, b)

    graph = opened.capture(copies)
    opened.wait()
    record.check(f"{name}: a capture runs nothing", not down.any())
    same = True
    for value in range(1, 200):
        up[:] = value
        opened.launch(graph)
        opened.wait()
        same = same and bool((down == value).all())
    record.check(f"{name}: a launch reads what is there now", same)
    record[f"{name}, a launch and a wait, microseconds"] = round(1e6 * timed(lambda: opened.launch(graph), opened.wait))

    def broken() -> None:
        opened.upload(a, up)
        raise ValueError("a test")

    try:
        opened.capture(broken)
    except ValueError:
        up[:] = -1
        copies()
        opened.wait()
        record.check(f"{name}: a capture that fails leaves the stream as it was", bool((down == -1).all()))
    else:
        record.check(f"{name}: a capture that fails leaves the stream as it was", False, "its error was lost")
    opened.drop(graph)


# -- the small models ------------------------------------------------------------------------------------------------


def bundle_of(record: Record, name: str) -> Path:
    """A bundle that the kit brought. Raises NotHere if it did not arrive."""
    folder = record.scratch / "bundles" / name
    if not (folder / "bundle.json").is_file():
        raise NotHere(f"the kit's bundle {name} is not here")
    return folder


def picture_of(record: Record, model: str) -> Path:
    """The picture that a small model is asked about."""
    return record.scratch / "bundles" / f"{model}.png"


@dataclasses.dataclass(frozen=True)
class Tokens:
    """An answer, with its tokens and their lead over the second best in nats."""

    ids: list[int]
    margins: list[float]


def answers(runtime: Any, picture: Path) -> list[Tokens]:
    """Answer every question with the picture and without; the last answer uses both passes for each token."""
    asked = [(question, given, {}) for question in QUESTIONS for given in (picture, None)]
    asked.append((QUESTIONS[0], picture, {"answer_mode": "traverse", "max_new_tokens": 8}))
    found = []
    for question, given, options in asked:
        answer = runtime.generate(question, given, logprobs=2, **options)
        margins = [token.top[0][1] - token.top[1][1] for token in answer.logprobs]
        found.append(Tokens(list(answer.token_ids), margins))
    return found


def compared(record: Record, what: str, ours: list[Tokens], theirs: list[Tokens]) -> None:
    """Check that two sets of answers have the same tokens, up to a place where rounding decides.

    If two tokens are nearly tied, another order of summation may choose the other. Such a place is recorded with the
    distance of the two, and the answer is compared up to it.
    """
    ties, same = [], 0
    for i, (a, b) in enumerate(zip(ours, theirs, strict=True)):
        at = next((k for k, (x, y) in enumerate(zip(a.ids, b.ids, strict=False)) if x != y), None)
        if at is None:
            at = min(len(a.ids), len(b.ids))
            record.check(f"answer {i} ends where {what} does", len(a.ids) == len(b.ids), f"{a.ids} and {b.ids}")
        else:
            apart = b.margins[at]
            ties.append(f"answer {i}, token {at}: {a.ids[at]} here, {b.ids[at]} there, {apart:.2g} nats apart there")
            record.check(f"answer {i} equals {what} but for a tie", apart <= TIE, ties[-1])
        same += at
    record.check(f"tokens equal {what}", same > 0)
    record[f"equal tokens, {what}"] = f"{same} of {sum(len(b.ids) for b in theirs)}"
    record[f"ties, {what}"] = ties


def verified(record: Record, folder: Path, provider: Any) -> None:
    """Replay the bundle's self-test and keep the drift of its worst stage of each kind."""
    import re

    from trol_edge.verify.replay import verify

    report = verify(folder, provider=provider)
    worst: dict[str, float] = {}
    for stage in report.stages:
        kind = re.sub(r"layers\.\d+\.(pass[12]\.)?", "", stage.name)
        worst[kind] = max(worst.get(kind, 0.0), stage.drift)
    record["drift"] = worst
    record["stages"] = {stage.name: stage.drift for stage in report.stages}
    record["runs_on"] = report.runs_on
    record.check("the self-test", report.first_wrong is None, report.verdict)


def require_provider(record: Record) -> None:
    """Raise NotHere if ONNX Runtime has no CUDA provider."""
    if record.dry:
        return
    require_gpu(record)
    try:
        ort = importlib.import_module("onnxruntime")
    except ImportError as error:
        raise NotHere(f"needs onnxruntime-gpu ({error})") from error
    if "CUDAExecutionProvider" not in ort.get_available_providers():
        raise NotHere(f"needs onnxruntime-gpu; onnxruntime {ort.__version__} here has no CUDA provider")


def ort(record: Record, model: str, precision: str) -> None:
    """Test a small model on ONNX Runtime's CUDA provider: tokens, drift, operators on the CPU, memory, time."""
    import trol_edge

    require_provider(record)
    folder, picture = bundle_of(record, f"{model}-tensorrt-{precision}"), picture_of(record, model)
    with trol_edge.Runtime(folder, provider="cpu", selftest=False) as runtime:
        wanted = answers(runtime, picture)
    with device_memory(record), trol_edge.Runtime(folder, provider=record.provider, selftest=False) as runtime:
        start = time.perf_counter()
        found = answers(runtime, picture)
        record["first answers, s"] = round(time.perf_counter() - start, 2)
        compared(record, "the same graphs on the CPU", found, wanted)
        placement(record, runtime)
        latency(record, runtime, picture)
    verified(record, folder, record.provider)
    if precision != "fp8":  # a CPU has no kernels for it
        with trol_edge.Runtime(bundle_of(record, f"{model}-cpu-{precision}"), selftest=False) as runtime:
            other = answers(runtime, picture)
        alike = sum(a.ids == b.ids for a, b in zip(found, other, strict=True))
        record["answers equal to the bundle for a CPU"] = f"{alike} of {len(other)}"


def placement(record: Record, runtime: Any) -> None:
    """Record which operators ONNX Runtime left to the CPU, by graph."""
    backend: Any = runtime.model.backend
    left = {}
    for graph, providers in backend.placement().items():
        counts = {name: sum(operators.values()) for name, operators in providers.items()}
        left[graph] = {"nodes": counts, "on the CPU": providers.get("CPUExecutionProvider", {})}
    record["placement"] = left


def latency(record: Record, runtime: Any, picture: Path) -> None:
    """Record median milliseconds of an answer's parts. The second question finds picture and prefix cached."""
    parts: dict[str, list[float]] = {}
    for _ in range(RUNS):
        runtime.desk.vision_cache.clear()
        for which, question in zip(("first", "second"), QUESTIONS, strict=True):
            answer = runtime.generate(question, picture)
            times = dataclasses.asdict(answer.timings)
            times["step_ms"] = times["decode_ms"] / max(1, len(answer.token_ids) - 1)
            for name, value in times.items():
                parts.setdefault(f"{which} question, {name}", []).append(value)
    record["latency"] = {name: round(statistics.median(values), 3) for name, values in parts.items()}


@contextmanager
def device_memory(record: Record) -> Iterator[None]:
    """Record the peak of device memory inside the block, less the use before; nothing without a GPU."""
    probe = Nvml.open()
    if probe is None:
        yield
        return
    before, most, over = probe.used(), [0], threading.Event()

    def watch() -> None:
        while not over.wait(0.01):
            most[0] = max(most[0], probe.used())

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield
    finally:
        over.set()
        watcher.join()
        record["peak device memory, MB"] = round((max(most[0], probe.used()) - before) / 1e6)


class Nvml:
    """Reads the first GPU's memory in use from the driver's management library."""

    class _Memory(ctypes.Structure):
        _fields_ = (("total", ctypes.c_ulonglong), ("free", ctypes.c_ulonglong), ("used", ctypes.c_ulonglong))

    def __init__(self, library: Any, handle: Any) -> None:
        self._library, self._handle = library, handle

    @classmethod
    def open(cls) -> Nvml | None:
        """Open the library; None if it or a GPU is missing."""
        try:
            library = ctypes.CDLL("libnvidia-ml.so.1")
        except OSError:
            return None
        handle = ctypes.c_void_p()
        if library.nvmlInit_v2() or library.nvmlDeviceGetHandleByIndex_v2(0, ctypes.byref(handle)):
            return None
        return cls(library, handle)

    def used(self) -> int:
        """The bytes in use."""
        memory = self._Memory()
        self._library.nvmlDeviceGetMemoryInfo(self._handle, ctypes.byref(memory))
        return int(memory.used)


def soak(record: Record, model: str, seconds: float) -> None:
    """Run the soak test on ONNX Runtime's CUDA provider."""
    require_provider(record)
    soaked(record, bundle_of(record, f"{model}-tensorrt-fp16"), seconds, record.provider)


def soaked(record: Record, folder: Path, seconds: float, provider: Any) -> None:
    """Run the soak test with four threads; wrong answers and growing memory fail the stage."""
    from trol_edge.measure.soak import soak as run

    report = run(folder, seconds, lambda now, resident: None, provider=provider)
    record["soak"] = dataclasses.asdict(report)
    calls = sum(report.calls.values())
    record.check("the soak", report.passed, "; ".join(report.wrong[:3]) or f"memory is not flat: {report.slope}")
    record["soak, calls"] = f"{calls} in {report.seconds:.0f} s"


# -- TensorRT --------------------------------------------------------------------------------------------------------


def engine(record: Record, model: str, precision: str, soak_s: float) -> None:
    """Test engines of TensorRT, built here, or of TensorRT for RTX, brought: run, verify, capture, soak, or refusal."""
    require_gpu(record)
    ran = [_engine(record, model, precision, soak_s, module) for module in ("tensorrt", "tensorrt_rtx")]
    if not any(ran):
        raise NotHere("neither TensorRT nor TensorRT for RTX is installed here")


def _engine(record: Record, model: str, precision: str, soak_s: float, module: str) -> bool:
    """Test one library's engines; returns whether the library is installed."""
    import trol_edge
    from trol_edge.bundle.targets import TARGETS
    from trol_edge.errors import TrolEdgeError

    try:
        version = importlib.import_module(module).__version__
    except Exception as error:  # libraries fail at their import in many ways
        record[module] = f"not usable ({type(error).__name__}: {error})"
        return False
    record[module] = version
    number = tuple(int(part) for part in version.split(".")[:3])
    fitting = [name for name, entry in TARGETS.items() if entry.module == module and entry.serves(number)]
    brought = [name for name in fitting if (record.scratch / "bundles" / f"{model}-{name}-{precision}").is_dir()]
    if not brought:
        raise NotHere(f"the kit has no bundle of {model} in {precision} for {module} {version}")
    capability = require_gpu(record).capability
    able = [name for name in brought if capability in (TARGETS[name].capabilities or [capability])]
    target = (able or brought)[0]
    given, picture = bundle_of(record, f"{model}-{target}-{precision}"), picture_of(record, model)
    served = TARGETS[target].capabilities
    if served and capability not in served:  # the library's own message, in case it supports more by now
        words = _direct(module, given / "engines" / target / "step.engine")
        raise NotHere(f"target {target} serves {', '.join(served)}, this GPU is {capability}; {module} says: {words}")
    folder = record.scratch / "engines" / given.name
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(given, folder)  # engines and kernels are written there, so the kit's own keeps its hash
    build = [sys.executable, "-m", "trol_edge", "build", os.fspath(folder), "--json"]
    start = time.perf_counter()
    done = subprocess.run(build, capture_output=True, text=True)
    record[f"{module}, build or check, s"] = round(time.perf_counter() - start, 1)
    if done.returncode:
        record.check(f"{module}: build", False, (done.stderr or done.stdout).strip()[-500:])
        return True
    with trol_edge.Runtime(folder, provider="cpu", selftest=False) as runtime:
        wanted = answers(runtime, picture)
    try:
        with device_memory(record), trol_edge.Runtime(folder, selftest=False) as runtime:
            found = answers(runtime, picture)
            compared(record, f"the same graphs on the CPU ({module})", found, wanted)
            backend: Any = runtime.model.backend
            record[f"{module}, steps as one CUDA graph"] = backend.cuda_graphs
            latency(record, runtime, picture)
    except TrolEdgeError as error:
        record.check(f"{module}: load and run", False, f"{type(error).__name__}: {error}")
        return True
    verified(record, folder, None)
    if soak_s:
        soaked(record, folder, soak_s, None)
    return True


def _direct(module: str, path: Path) -> str:
    """What the library itself says about an engine, without our own checks of GPU and version."""
    trt = importlib.import_module(module)
    messages = []

    class Logger(trt.ILogger):  # type: ignore[misc,name-defined]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)

        def log(self, severity: Any, msg: str) -> None:
            if severity in (trt.ILogger.Severity.ERROR, trt.ILogger.Severity.INTERNAL_ERROR):
                messages.append(msg)

    try:
        made = trt.Runtime(Logger()).deserialize_cuda_engine(path.read_bytes())
        if made is not None:
            context = made.create_execution_context()
            messages.append(f"the engine was deserialised, its context is {context}")
    except Exception as error:
        messages.append(f"{type(error).__name__}: {error}")
    return "; ".join(" ".join(message.split()) for message in messages) or "nothing"


# -- the published sizes ---------------------------------------------------------------------------------------------


def prepare(record: Record, model: str, precision: str) -> None:
    """Make random weights of a published shape and a GPU bundle of them, without a GPU; record time and peak memory."""
    for name in ("torch", "onnx", "onnx_ir", "onnxscript", "safetensors"):
        try:
            importlib.import_module(name)
        except ImportError as error:
            raise NotHere(f"export needs {name}, which is not installed here ({error})") from error
    from trol_edge.export.pipeline import export
    from trol_edge.export.quantize.made_up import made_up_statistics
    from trol_edge.export.quantize.recipes import RecipeOptions
    from trol_edge.machine.identity import peak_memory

    bundle = large(record, model, precision)
    checkpoint = checkpoint_of(record, model)
    before = peak_memory()
    start = time.perf_counter()
    options = RecipeOptions(recipe=precision, scaling=False, clipping=False, sensitive=None, observer="minmax")
    phases: dict[str, float] = {}

    def progress(what: str, done: int, total: int) -> None:
        if what not in phases:
            phases[what] = round(time.perf_counter() - start, 1)
            record["phases of the export, s at their beginning"] = phases

    export(
        checkpoint,
        bundle,
        model=model,
        target="tensorrt",
        context=None if record.dry else CONTEXT,
        options=options,
        calibration=made_up_statistics,
        record_selftest=precision == "fp16",  # with made-up scales the loss by rounding would mean nothing
        overwrite=True,
        progress=progress,
    )
    record["export, s"] = round(time.perf_counter() - start, 1)
    record["export, peak memory, GB"] = round(peak_memory() / 1e9, 2)
    record["before it, GB"] = round(before / 1e9, 2)
    record["bundle, GB"] = round(sum(path.stat().st_size for path in bundle.rglob("*") if path.is_file()) / 1e9, 2)
    record.check("a bundle was written", (bundle / "bundle.json").is_file())


def checkpoint_of(record: Record, model: str) -> Path:
    """The folder of a published model's random weights, made on first use; in a dry run a shipped model."""
    if record.dry:
        folder = record.scratch / "bundles" / f"{model}-checkpoint"
        if not folder.is_dir():
            raise NotHere(f"the kit holds no checkpoint of {model}")
        return folder
    checkpoint = record.scratch / "large" / f"{model}-checkpoint"
    checkpoint.parent.mkdir(exist_ok=True)
    with (checkpoint.parent / f"{model}.lock").open("w") as lock:  # several stages read one checkpoint
        fcntl.flock(lock, fcntl.LOCK_EX)
        if (checkpoint / "config.json").is_file():
            return checkpoint
        free = shutil.disk_usage(record.scratch).free / 1e9
        needed = {"trol-1.8b": 14.0, "trol-3.8b": 24.0}[model]  # for the checkpoint and its bundles
        if free < needed:
            raise NotHere(f"{model} needs {needed:.0f} GB of disk below {record.scratch}, {free:.0f} are free")
        start = time.perf_counter()
        synth = ["synth", "--model", model, "-o", os.fspath(checkpoint), "--json"]
        subprocess.run([sys.executable, "-m", "trol_edge", *synth], check=True)
        record["synth, s"] = round(time.perf_counter() - start, 1)
    return checkpoint


def large(record: Record, model: str, precision: str) -> Path:
    """The folder of a bundle that `prepare` makes."""
    return record.scratch / "large" / f"{model}-{precision}"


def full(record: Record, model: str, precision: str) -> None:
    """Measure a published shape on ONNX Runtime's CUDA provider: vision, prefill, decode, second question, memory."""
    from trol_edge.measure.run import profile as measure
    from trol_edge.measure.samples import summary

    require_provider(record)
    bundle = large(record, model, precision)
    if not (bundle / "bundle.json").is_file():
        raise NotHere(f"the bundle of {model} in {precision} was not made; see the stage prepare-{model}-{precision}")
    with device_memory(record):
        found = measure(
            [bundle],
            sizes=[SIZE],
            tokens=TOKENS,
            warmup=1,
            runs=RUNS,
            starts=0,
            provider=record.provider,
            progress=print,
        )
    found.save(record.out / "profiles" / f"{model}-{precision}.json")
    record["rows"] = summary(found)
    record.check("it was measured", bool(found.bundles))
    if precision == "fp16":
        verified(record, bundle, record.provider)


def torch(record: Record, model: str, compile_step: bool) -> None:
    """Measure the PyTorch reference in FP16 on the same card: eager, with a CUDA graph step, with a compiled step."""
    if not record.dry:
        require_gpu(record)
    module = importlib.import_module("torch")
    if not record.dry and not module.cuda.is_available():
        raise NotHere("this PyTorch has no CUDA")
    checkpoint = checkpoint_of(record, model)
    with device_memory(record), module.inference_mode():
        reference = Reference(module, checkpoint, "cpu" if record.dry else "cuda")
        record["prompt tokens"] = reference.length
        record["eager"] = eager = reference.measure()
        if not record.dry:
            record["step as one CUDA graph"] = reference.captured()
        if compile_step:
            try:
                record["step compiled"] = reference.compiled()
            except Exception as error:  # torch.compile needs a compiler that this machine may lack
                record["step compiled"] = f"not measured ({type(error).__name__}: {str(error)[:300]})"
    record.check("it was measured", eager["step_ms"] > 0)


class Reference:
    """The reference of the exporter, in half precision with a static cache and PyTorch's own attention kernels."""

    def __init__(self, torch: Any, checkpoint: Path, device: str) -> None:
        from trol_edge.export.reference.checkpoint import Checkpoint
        from trol_edge.export.reference.layerwise import rope_of
        from trol_edge.measure.bench import made_up
        from trol_edge.prompt.images import count_tiles

        self.torch, self.device = torch, device
        source = Checkpoint(checkpoint)
        self.spec = spec = source.spec
        half = self.half = torch.float16
        with torch.device("meta"):
            self.decoder: Any = source.family.decoder(spec)
            self.vision: Any = source.family.vision(spec)
        for prefix, module in (("decoder", self.decoder), ("vision", self.vision)):
            state = {name: source.tensor(f"{prefix}.{name}").to(device, half) for name in module.state_dict()}
            module.load_state_dict(state, assign=True)
        self.embedding = source.tensor("embedding").to(device, half)
        cos, sin = rope_of(spec, CONTEXT)
        self.cos, self.sin = cos.to(device, half), sin.to(device, half)
        settings = source.family.image(spec)
        tiles = count_tiles([made_up(*SIZE)], settings)[0]  # as many as the bundle's picture has
        image = tiles * spec.vision.tokens_per_image
        self.length = image + TEXT_TOKENS
        shape = 2, 2, spec.num_layers, 1, spec.num_kv_heads, CONTEXT, spec.head_dim  # keys and values of both passes
        self.cache = torch.zeros(shape, dtype=half, device=device)
        self.position = torch.zeros(1, dtype=torch.int64, device=device)
        self.columns = torch.arange(CONTEXT, device=device)
        self.pixels = torch.randn(tiles, 3, settings.size, settings.size, device=device, dtype=half)
        self.ids = torch.randint(3, spec.vocab_size, (self.length,), device=device)
        self.mask = torch.zeros(1, self.length, 1, device=device, dtype=half)
        self.mask[:, 8 : 8 + image] = 1

    def attend(self, qkv: Any, layer: int, traversal: int) -> Any:
        """One layer's attention. A prompt attends to itself, a token to the cache."""
        from trol_edge.export.reference.model import rotate

        torch, spec = self.torch, self.spec
        h, g, e = spec.num_heads, spec.num_kv_heads, spec.head_dim
        length = qkv.shape[1]
        q, k, v = (t.view(1, length, -1, e).transpose(1, 2) for t in qkv.split((h * e, g * e, g * e), dim=-1))
        attention = torch.nn.functional.scaled_dot_product_attention
        keys, values = self.cache[traversal, 0, layer], self.cache[traversal, 1, layer]
        if length > 1:
            cos, sin = self.cos[:length], self.sin[:length]
            q, k = rotate(q, cos, sin), rotate(k, cos, sin)
            keys[:, :, :length], values[:, :, :length] = k, v
            context = attention(q, k, v, is_causal=True, enable_gqa=True)
        else:
            cos, sin = self.cos[self.position], self.sin[self.position]
            q, k = rotate(q, cos, sin), rotate(k, cos, sin)
            keys.index_copy_(2, self.position, k)
            values.index_copy_(2, self.position, v)
            seen = (self.columns <= self.position)[None, None, None]
            context = attention(q, keys, values, attn_mask=seen, enable_gqa=True)
        return context.transpose(1, 2).reshape(1, length, h * e)

    def step(self, x: Any) -> Any:
        """Logits of one token's embedding [1, 1, D] at `self.position`."""
        return self.decoder.logits(self.decoder.step(x, self.attend))

    def prefill(self, features: Any) -> Any:
        """Logits after the prompt."""
        x = self.embedding[self.ids][None]
        image = features.flatten(0, 1)
        x[0, 8 : 8 + len(image)] = image
        return self.decoder.logits(self.decoder.traverse(x, self.mask, self.attend)[:, -1:])

    def wait(self) -> None:
        """Wait until the device is idle."""
        if self.device == "cuda":
            self.torch.cuda.synchronize()

    def decode(self, step: Callable[[Any], Any], logits: Any) -> list[float]:
        """Milliseconds of each step of a greedy answer."""
        times = []
        for i in range(TOKENS):
            start = time.perf_counter()
            token = int(logits[0, -1].argmax())
            self.position.fill_(self.length + i)
            logits = step(self.embedding[token][None, None])
            self.wait()
            times.append(1e3 * (time.perf_counter() - start))
        return times

    def measure(self) -> dict[str, Any]:
        """Measure median milliseconds, after one run for warm-up."""
        parts: dict[str, list[float]] = {"vision_ms": [], "prefill_ms": [], "step_ms": []}
        for run in range(RUNS + 1):
            start = time.perf_counter()
            features = self.vision(self.pixels)
            self.wait()
            seen = time.perf_counter()
            logits = self.prefill(features)
            self.wait()
            read = time.perf_counter()
            times = self.decode(self.step, logits)
            if run:
                parts["vision_ms"].append(1e3 * (seen - start))
                parts["prefill_ms"].append(1e3 * (read - seen))
                parts["step_ms"].append(statistics.median(times))
        return {name: round(statistics.median(values), 3) for name, values in parts.items()}

    def captured(self) -> dict[str, Any]:
        """Measure the step, captured and launched as one CUDA graph."""
        torch = self.torch
        given = self.embedding[:1][None].clone()
        logits = self.prefill(self.vision(self.pixels))
        self.position.fill_(self.length)
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            for _ in range(3):
                self.step(given)
        self.wait()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = self.step(given)

        def step(x: Any) -> Any:
            given.copy_(x)
            graph.replay()
            return out

        times = [self.decode(step, logits) for _ in range(RUNS)]
        return {"step_ms": round(statistics.median(map(statistics.median, times)), 3)}

    def compiled(self) -> dict[str, Any]:
        """Measure the compiled step; the first run compiles."""
        torch = self.torch
        torch._dynamo.mark_static_address(self.cache)  # written in place, so without this no CUDA graph is used
        start = time.perf_counter()
        step = torch.compile(self.step, mode="reduce-overhead", fullgraph=True)
        logits = self.prefill(self.vision(self.pixels))
        self.decode(step, logits)
        compile_s = time.perf_counter() - start
        times = [self.decode(step, logits) for _ in range(RUNS)]
        return {
            "step_ms": round(statistics.median(map(statistics.median, times)), 3),
            "compiling, s": round(compile_s, 1),
        }


# -- the profile -----------------------------------------------------------------------------------------------------


def profile(record: Record) -> None:
    """Run `trol-edge profile` over all bundles that ran, small and large, for its JSON and page."""
    bundles = [record.scratch / "bundles" / f"{nano}-tensorrt-{p}" for nano in ("trol-nano", "trol-nano-phi3")
               for p in ("fp32", "fp16", "int8")]  # fmt: skip
    provider: list[str] = []
    if (record.scratch / "engines").is_dir() and not record.dry:
        ran = sorted((record.scratch / "engines").glob("*/verified-*.json"))
        bundles = [path.parent for path in ran] or bundles
    if not record.dry:
        require_gpu(record)
    if not any((record.scratch / "engines").glob("*/verified-*.json")):
        require_provider(record)
        bundles += sorted((record.scratch / "large").glob("*-fp16"))
        provider = ["--provider", record.provider]
    there = [os.fspath(path) for path in bundles if (path / "bundle.json").is_file()]
    if not there:
        raise NotHere("no bundle is here to profile")
    output = record.out / "profile"
    command = [sys.executable, "-m", "trol_edge", "profile", *there, *provider]
    command += ["--runs", str(RUNS), "--warmup", "1", "--starts", "0", "-o", os.fspath(output), "--json"]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        record.check("the profile", False, f"exit status {done.returncode}; see its log")
        return
    record["profile"] = json.loads(done.stdout)
    record.check("the page was written", (output / "profile.html").is_file())


STAGES: dict[str, Callable[..., None]] = {
    function.__name__: function for function in (machine, cuda, ort, engine, soak, prepare, full, torch, profile)
}


def main() -> int:
    """Run the stage that standard input names."""
    told = json.load(sys.stdin)
    record = Record(told)
    try:
        STAGES[told["function"]](record, **told["arguments"])
        record.end(*record.verdict())
    except NotHere as error:
        record.end("not run", str(error))
    except Exception as error:
        traceback.print_exc()
        record.end("error", f"{type(error).__name__}: {error}")
    return 0


if __name__ == "__main__":
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    status = main()
    sys.stdout.flush()
    os._exit(status)  # a library's threads must not hang or crash the end of a stage that is written
