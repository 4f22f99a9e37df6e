"""Calls CUDA, through pycuda or cuda-python: memory, copies, one stream, graphs. No other file does.

pycuda is used if it is installed, cuda-python (`cuda.bindings`) otherwise. Addresses and streams are plain ints,
as TensorRT takes them. Every call's status is checked. Through cuda-python it ran on an H200, all
but `copy_rows` (docs/gpu.md); through pycuda it is not yet run on a GPU.
"""

from __future__ import annotations

import ctypes
import dataclasses
import importlib
import threading
import weakref
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NoReturn, Protocol

import numpy as np
from numpy.typing import DTypeLike, NDArray

from trol_edge.errors import BackendError

COMPUTE_MAJOR, COMPUTE_MINOR, INTEGRATED = 75, 76, 18  # values of CUdevice_attribute


@dataclasses.dataclass(frozen=True)
class Gpu:
    """A GPU as the driver describes it. driver: the newest CUDA version that the driver supports, as (12, 6)."""

    name: str
    capability: str  # "8.7"
    memory_bytes: int
    driver: tuple[int, int]
    integrated: bool = False  # whether it shares the system's memory, as a Jetson's does


class Cuda(Protocol):
    """The part of CUDA that the back end needs, on the first GPU. Every method raises BackendError if CUDA fails."""

    stream: int
    graphs: bool  # whether capture and launch can be used

    def allocate(self, size: int, what: str) -> int:
        """Allocate `size` bytes of zeroed device memory and return its address.

        A BackendError says how much was needed for `what`.
        """
        ...

    def free(self, pointer: int) -> None:
        """Free device memory."""
        ...

    def memory(self) -> tuple[int, int]:
        """Bytes of free and of total device memory."""
        ...

    def pinned(self, shape: tuple[int, ...], dtype: DTypeLike) -> NDArray[Any]:
        """A page-locked host array, which copies read and write directly. It is freed some time after its last use."""
        ...

    def upload(self, pointer: int, array: NDArray[Any]) -> None:
        """Enqueue a copy of a contiguous host array to the device; the array must stay as it is until `wait`."""
        ...

    def download(self, array: NDArray[Any], pointer: int) -> None:
        """Enqueue a copy from the device into a contiguous host array."""
        ...

    def copy(self, target: int, source: int, size: int) -> None:
        """Enqueue a copy of `size` bytes within the device."""
        ...

    def copy_rows(self, target: tuple[int, int], source: tuple[int, int], width: int, height: int) -> None:
        """Enqueue `height` copies of `width` bytes within the device, in one call.

        target and source: the first address, and bytes from one row to the next, which are at least `width`.
        """
        ...

    def wait(self) -> None:
        """Wait until the stream is idle."""
        ...

    def capture(self, enqueue: Callable[[], None]) -> Any:
        """Record what a function enqueues instead of running it; returns a graph for `launch`.

        The function must neither allocate nor wait, and copy from and to page-locked memory only. Its exceptions pass
        through, and the stream is then as it was before.
        """
        ...

    def launch(self, graph: Any) -> None:
        """Enqueue a recorded graph."""
        ...

    def drop(self, graph: Any) -> None:
        """Free a recorded graph."""
        ...

    def close(self) -> None:
        """Free everything that is still held."""
        ...


class CudaPython:
    """CUDA through cuda-python's runtime API."""

    graphs = True

    def __init__(self, runtime: Any) -> None:
        self._rt = runtime
        self._call("cudaSetDevice", 0)
        self._stream = self._call("cudaStreamCreate")
        self.stream = int(self._stream)
        self._device: set[int] = set()
        self._host: set[int] = set()
        self._unused: deque[int] = deque()  # page-locked memory to which no array refers any more
        self._graphs: list[Any] = []

    def _call(self, name: str, *arguments: Any) -> Any:
        status, *results = getattr(self._rt, name)(*arguments)
        if status != self._rt.cudaError_t.cudaSuccess:
            fail(name, getattr(status, "name", str(status)))
        return results[0] if len(results) == 1 else tuple(results)

    def allocate(self, size: int, what: str) -> int:
        """See Cuda."""
        with _for(what, size, self.memory):
            pointer = int(self._call("cudaMalloc", size))
        self._device.add(pointer)
        self._call("cudaMemsetAsync", pointer, 0, size, self._stream)
        return pointer

    def free(self, pointer: int) -> None:
        """See Cuda."""
        self._device.discard(pointer)
        self._call("cudaFree", pointer)

    def memory(self) -> tuple[int, int]:
        """See Cuda."""
        free, total = self._call("cudaMemGetInfo")
        return int(free), int(total)

    def pinned(self, shape: tuple[int, ...], dtype: DTypeLike) -> NDArray[Any]:
        """See Cuda."""
        self._free_unused()
        size = int(np.prod(shape)) * np.dtype(dtype).itemsize
        pointer = int(self._call("cudaMallocHost", size))
        self._host.add(pointer)
        block = (ctypes.c_byte * size).from_address(pointer)
        # Only queued, not freed, because a garbage collection may run anywhere and must not disturb a capture.
        weakref.finalize(block, self._unused.append, pointer).atexit = False
        array: NDArray[Any] = np.frombuffer(memoryview(block), dtype).reshape(shape)
        array[...] = 0
        return array

    def _free_unused(self) -> None:
        while self._unused:
            pointer = self._unused.popleft()
            self._host.discard(pointer)
            self._call("cudaFreeHost", pointer)

    def upload(self, pointer: int, array: NDArray[Any]) -> None:
        """See Cuda."""
        kind = self._rt.cudaMemcpyKind.cudaMemcpyHostToDevice
        self._call("cudaMemcpyAsync", pointer, array.ctypes.data, array.nbytes, kind, self._stream)

    def download(self, array: NDArray[Any], pointer: int) -> None:
        """See Cuda."""
        kind = self._rt.cudaMemcpyKind.cudaMemcpyDeviceToHost
        self._call("cudaMemcpyAsync", array.ctypes.data, pointer, array.nbytes, kind, self._stream)

    def copy(self, target: int, source: int, size: int) -> None:
        """See Cuda."""
        kind = self._rt.cudaMemcpyKind.cudaMemcpyDeviceToDevice
        self._call("cudaMemcpyAsync", target, source, size, kind, self._stream)

    def copy_rows(self, target: tuple[int, int], source: tuple[int, int], width: int, height: int) -> None:
        """See Cuda."""
        kind = self._rt.cudaMemcpyKind.cudaMemcpyDeviceToDevice
        self._call("cudaMemcpy2DAsync", *target, *source, width, height, kind, self._stream)

    def wait(self) -> None:
        """See Cuda."""
        self._call("cudaStreamSynchronize", self._stream)

    def capture(self, enqueue: Callable[[], None]) -> Any:
        """See Cuda."""
        mode = self._rt.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal
        self._call("cudaStreamBeginCapture", self._stream, mode)
        try:
            enqueue()
        except BaseException:
            _, graph = self._rt.cudaStreamEndCapture(self._stream)  # its status says whether the capture failed
            if graph is not None and int(graph):
                self._rt.cudaGraphDestroy(graph)
            raise
        graph = self._call("cudaStreamEndCapture", self._stream)
        runnable = self._call("cudaGraphInstantiate", graph, 0)
        self._call("cudaGraphDestroy", graph)
        self._graphs.append(runnable)
        return runnable

    def launch(self, graph: Any) -> None:
        """See Cuda."""
        self._call("cudaGraphLaunch", graph, self._stream)

    def drop(self, graph: Any) -> None:
        """See Cuda."""
        self._graphs.remove(graph)
        self._call("cudaGraphExecDestroy", graph)

    def close(self) -> None:
        """See Cuda."""
        self.wait()
        for graph in list(self._graphs):
            self.drop(graph)
        for pointer in list(self._device):
            self.free(pointer)
        self._free_unused()  # memory of living arrays stays, because reading one must not end the process
        self._call("cudaStreamDestroy", self._stream)


class PyCuda:
    """CUDA through pycuda, which has no graphs, so every step is enqueued call by call."""

    graphs = False

    def __init__(self, driver: Any) -> None:
        self._drv = driver
        self._memory: dict[int, Any] = {}
        self._context: Any = None
        self._call("init")
        # The primary context, because TensorRT's CUDA runtime uses that one.
        self._context = self._do(lambda: driver.Device(0).retain_primary_context())
        self._here = threading.local()  # a context is current per thread
        self._stream = self._call("Stream")
        self.stream = int(self._stream.handle)

    def _call(self, name: str, *arguments: Any) -> Any:
        return self._do(lambda: getattr(self._drv, name)(*arguments), name)

    def _do(self, function: Any, name: str = "retain_primary_context") -> Any:
        try:
            if self._context is not None and not hasattr(self._here, "current"):
                self._context.push()
                self._here.current = True
            return function()
        except self._drv.Error as error:
            fail(name, str(error), error)

    def allocate(self, size: int, what: str) -> int:
        """See Cuda."""
        with _for(what, size, self.memory):
            memory = self._call("mem_alloc", size)
        pointer = int(memory)
        self._memory[pointer] = memory
        self._call("memset_d8_async", pointer, 0, size, self._stream)
        return pointer

    def free(self, pointer: int) -> None:
        """See Cuda."""
        self._do(self._memory.pop(pointer).free, "free")

    def memory(self) -> tuple[int, int]:
        """See Cuda."""
        free, total = self._call("mem_get_info")
        return int(free), int(total)

    def pinned(self, shape: tuple[int, ...], dtype: DTypeLike) -> NDArray[Any]:
        """See Cuda."""
        array: NDArray[Any] = self._call("pagelocked_zeros", shape, dtype)
        return array

    def upload(self, pointer: int, array: NDArray[Any]) -> None:
        """See Cuda."""
        self._call("memcpy_htod_async", pointer, array, self._stream)

    def download(self, array: NDArray[Any], pointer: int) -> None:
        """See Cuda."""
        self._call("memcpy_dtoh_async", array, pointer, self._stream)

    def copy(self, target: int, source: int, size: int) -> None:
        """See Cuda."""
        self._call("memcpy_dtod_async", target, source, size, self._stream)

    def copy_rows(self, target: tuple[int, int], source: tuple[int, int], width: int, height: int) -> None:
        """See Cuda."""
        copy = self._call("Memcpy2D")
        copy.set_dst_device(target[0])
        copy.set_src_device(source[0])
        copy.dst_pitch, copy.src_pitch, copy.width_in_bytes, copy.height = target[1], source[1], width, height
        self._do(lambda: copy(self._stream), "Memcpy2D")

    def wait(self) -> None:
        """See Cuda."""
        self._do(self._stream.synchronize, "synchronize")

    def capture(self, enqueue: Callable[[], None]) -> Any:
        """See Cuda."""
        raise BackendError("pycuda has no CUDA graphs; install cuda-python, or open the Runtime without them")

    def launch(self, graph: Any) -> None:
        """See Cuda."""
        self.capture(lambda: None)

    def drop(self, graph: Any) -> None:
        """See Cuda."""
        self.capture(lambda: None)

    def close(self) -> None:
        """See Cuda."""
        self.wait()
        for pointer in list(self._memory):
            self.free(pointer)
        self._do(self._context.pop, "pop")
        del self._here.current


def fail(call: str, status: str, cause: BaseException | None = None) -> NoReturn:
    """Raise the error for a CUDA call that failed."""
    advice = "run `trol-edge doctor`"
    if "InsufficientDriver" in status:
        advice = "the installed cuda-python is for a newer driver: pip install 'cuda-python<13', or update the driver"
    raise BackendError(f"CUDA: {call} failed ({status}); {advice}") from cause


@contextmanager
def _for(what: str, size: int, memory: Callable[[], tuple[int, int]]) -> Iterator[None]:
    """Make the error of a failed allocation say how much `what` needs, how much there is, and what to change."""
    try:
        yield
    except BackendError as error:
        free, total = memory()
        said = str(error).partition(";")[0]
        raise BackendError(
            f"{said}: {what} needs {size / 1e6:.1f} MB of GPU memory, but {free / 1e6:.1f} of {total / 1e6:.1f} MB are "
            "free; close sessions, forks and other programs, give a smaller vision_cache_bytes, or export with a lower "
            "precision or a smaller --context"
        ) from error


def open_cuda() -> Cuda:
    """Open CUDA on the first GPU. Raises BackendError if there is no driver, no GPU, or neither library."""
    found = devices()
    if isinstance(found, str):
        raise BackendError(f"no usable NVIDIA GPU: {found}; run `trol-edge doctor`")
    try:
        return PyCuda(importlib.import_module("pycuda.driver"))
    except ImportError:
        pass
    for name in ("cuda.bindings.runtime", "cuda.cudart"):  # the second name is cuda-python's before 12.6
        try:
            return CudaPython(importlib.import_module(name))
        except ImportError:
            continue
    raise BackendError(
        "neither pycuda nor cuda-python is installed; pip install 'trol-edge[rtx]' or 'trol-edge[jetson]'"
    )


def devices(library: str = "libcuda.so.1") -> list[Gpu] | str:
    """The GPUs of this machine, as the driver itself reports them, or why there are none."""
    try:
        driver = ctypes.CDLL(library)
    except OSError:
        return f"there is no NVIDIA driver ({library} is not found)"

    def ask(name: str, *arguments: Any) -> int:
        return int(getattr(driver, name)(*arguments))

    if status := ask("cuInit", 0):
        return f"the driver does not start (cuInit: error {status})"
    number = ctypes.c_int()
    ask("cuDriverGetVersion", ctypes.byref(number))
    version = (number.value // 1000, number.value % 1000 // 10)
    ask("cuDeviceGetCount", ctypes.byref(number))
    found = []
    for index in range(number.value):
        device, value, size = ctypes.c_int(), ctypes.c_int(), ctypes.c_size_t()
        ask("cuDeviceGet", ctypes.byref(device), index)
        text = ctypes.create_string_buffer(256)
        ask("cuDeviceGetName", text, 256, device)
        ask("cuDeviceTotalMem_v2", ctypes.byref(size), device)
        numbers = []
        for attribute in (COMPUTE_MAJOR, COMPUTE_MINOR, INTEGRATED):
            ask("cuDeviceGetAttribute", ctypes.byref(value), attribute, device)
            numbers.append(value.value)
        name, capability = text.value.decode(errors="replace"), f"{numbers[0]}.{numbers[1]}"
        found.append(Gpu(name, capability, size.value, version, bool(numbers[2])))
    return found or "the driver finds no GPU"
