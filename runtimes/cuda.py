"""CUDA: memory, copies, one stream, graphs. The only file that calls it, through pycuda or cuda-python.

pycuda is taken where it is installed, cuda-python (`cuda.bindings`) otherwise. Addresses and streams are plain ints,
as TensorRT takes them. Every call's status is checked. Not yet run on a GPU.
"""

from __future__ import annotations

import ctypes
import dataclasses
import importlib
import threading
from typing import Any, NoReturn, Protocol

import numpy as np
from numpy.typing import DTypeLike, NDArray

from trol_edge.errors import BackendError

COMPUTE_MAJOR, COMPUTE_MINOR = 75, 76  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_*


@dataclasses.dataclass(frozen=True)
class Device:
    """A GPU as the driver describes it. driver: newest CUDA that it serves, as (12, 6)."""

    name: str
    capability: str  # "8.7"
    memory_bytes: int
    driver: tuple[int, int]


class Cuda(Protocol):
    """What the back end needs of CUDA, on the first GPU. Every method raises BackendError where CUDA does."""

    stream: int
    graphs: bool  # whether capture and launch can be used

    def allocate(self, size: int) -> int:
        """Device memory of `size` bytes, zeroed; its address."""
        ...

    def free(self, pointer: int) -> None:
        """Give device memory back."""
        ...

    def memory(self) -> tuple[int, int]:
        """Bytes of device memory that are free, and that there are."""
        ...

    def pinned(self, shape: tuple[int, ...], dtype: DTypeLike) -> NDArray[Any]:
        """A page-locked host array, which copies read and write directly; it lives as long as this object."""
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

    def wait(self) -> None:
        """Wait until the stream is idle."""
        ...

    def begin_capture(self) -> None:
        """Record what is enqueued from now on instead of running it."""
        ...

    def end_capture(self) -> Any:
        """End recording; returns a graph for `launch`."""
        ...

    def launch(self, graph: Any) -> None:
        """Enqueue a recorded graph."""
        ...

    def close(self) -> None:
        """Give everything back that is still held."""
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
        self._host: list[int] = []
        self._graphs: list[Any] = []

    def _call(self, name: str, *arguments: Any) -> Any:
        status, *results = getattr(self._rt, name)(*arguments)
        if status != self._rt.cudaError_t.cudaSuccess:
            fail(name, getattr(status, "name", str(status)))
        return results[0] if len(results) == 1 else tuple(results)

    def allocate(self, size: int) -> int:
        """See Cuda."""
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
        size = int(np.prod(shape)) * np.dtype(dtype).itemsize
        pointer = int(self._call("cudaMallocHost", size))
        self._host.append(pointer)
        buffer = memoryview((ctypes.c_byte * size).from_address(pointer))
        array: NDArray[Any] = np.frombuffer(buffer, dtype).reshape(shape)
        array[...] = 0
        return array

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

    def wait(self) -> None:
        """See Cuda."""
        self._call("cudaStreamSynchronize", self._stream)

    def begin_capture(self) -> None:
        """See Cuda."""
        mode = self._rt.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal
        self._call("cudaStreamBeginCapture", self._stream, mode)

    def end_capture(self) -> Any:
        """See Cuda."""
        graph = self._call("cudaStreamEndCapture", self._stream)
        runnable = self._call("cudaGraphInstantiate", graph, 0)
        self._call("cudaGraphDestroy", graph)
        self._graphs.append(runnable)
        return runnable

    def launch(self, graph: Any) -> None:
        """See Cuda."""
        self._call("cudaGraphLaunch", graph, self._stream)

    def close(self) -> None:
        """See Cuda."""
        self.wait()
        for graph in self._graphs:
            self._call("cudaGraphExecDestroy", graph)
        for pointer in list(self._device):
            self.free(pointer)
        for pointer in self._host:
            self._call("cudaFreeHost", pointer)
        self._graphs, self._host = [], []
        self._call("cudaStreamDestroy", self._stream)


class PyCuda:
    """CUDA through pycuda, which has no graphs: a step is enqueued anew each time."""

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

    def allocate(self, size: int) -> int:
        """See Cuda."""
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

    def wait(self) -> None:
        """See Cuda."""
        self._do(self._stream.synchronize, "synchronize")

    def begin_capture(self) -> None:
        """See Cuda."""
        raise BackendError("pycuda has no CUDA graphs; install cuda-python, or open the Runtime without them")

    def end_capture(self) -> Any:
        """See Cuda."""
        self.begin_capture()

    def launch(self, graph: Any) -> None:
        """See Cuda."""
        self.begin_capture()

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
    if "memory" in status.lower():
        advice = "GPU memory is short: close other programs, or export with a smaller --context or lower precision"
    raise BackendError(f"CUDA: {call} failed ({status}); {advice}") from cause


def open_cuda() -> Cuda:
    """CUDA on the first GPU. Raises BackendError where there is no driver, no GPU, or neither library."""
    found = devices()
    if isinstance(found, str):
        raise BackendError(f"no usable NVIDIA GPU: {found}; run `trol-edge doctor`")
    try:
        return PyCuda(importlib.import_module("pycuda.driver"))
    except ImportError:
        pass
    for name in ("cuda.bindings.runtime", "cuda.cudart"):  # the second: cuda-python before 12.6
        try:
            return CudaPython(importlib.import_module(name))
        except ImportError:
            continue
    raise BackendError(
        "neither pycuda nor cuda-python is installed; pip install 'trol-edge[rtx]' or 'trol-edge[jetson]'"
    )


def devices(library: str = "libcuda.so.1") -> list[Device] | str:
    """GPUs of this machine, asked of the driver itself; or why there are none."""
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
        parts = []
        for attribute in (COMPUTE_MAJOR, COMPUTE_MINOR):
            ask("cuDeviceGetAttribute", ctypes.byref(value), attribute, device)
            parts.append(str(value.value))
        found.append(Device(text.value.decode(errors="replace"), ".".join(parts), size.value, version))
    return found or "the driver finds no GPU"
