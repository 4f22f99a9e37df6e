"""A stand-in for TensorRT and CUDA, which runs an engine's source graph on ONNX Runtime and enforces their rules.

It is no GPU. Device memory is host memory with addresses of its own; work is queued and done only when the stream is
waited for, so that whoever reads too early reads old values. Broken rules (an address missing, unaligned or freed, a
shape outside its profile, past and present at two addresses, a wrong stream) make a call fail as the real one would:
TensorRT's return False and log an error, CUDA's return a status.

A graph with TensorScatter is one with KVCacheUpdate layers: each present is an alias of its past, which the engine
says (`get_aliased_input_tensor`), both must be bound to one address, and of the cache only the new rows are written.
New rows beyond the capacity fail the run, as an access beyond the memory would.

tests/test_trt.py compares its signatures with the real bindings'.
"""

from __future__ import annotations

import ctypes
import enum
import json
import types
from collections import Counter
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import onnxruntime

ALIGNMENT = 256
MOST_PITCH = (1 << 31) - 1  # cudaDeviceProp.memPitch
TYPES = {
    "tensor(float)": "FLOAT",
    "tensor(float16)": "HALF",
    "tensor(int64)": "INT64",
    "tensor(bool)": "BOOL",
    "tensor(int8)": "INT8",
}
NUMPY = {"FLOAT": "float32", "HALF": "float16", "INT64": "int64", "BOOL": "bool", "INT8": "int8"}


def engine_file(
    graph: Path, profiles: list[dict[str, list[int]]], without: Collection[str] = (), scratch: int = 0
) -> bytes:
    """A stand-in for a plan: which graph to run, without these outputs, and the ranges of its dynamic dimensions.

    scratch: bytes of memory that a run overwrites.
    """
    plan = {"graph": str(graph), "profiles": profiles, "without": sorted(without), "scratch": scratch}
    return json.dumps(plan).encode()


class Status(enum.Enum):
    """cudaError_t."""

    cudaSuccess = 0
    cudaErrorInvalidValue = 1
    cudaErrorMemoryAllocation = 2
    cudaErrorInvalidPitchValue = 12
    cudaErrorInsufficientDriver = 35
    cudaErrorIllegalAddress = 700
    cudaErrorStreamCaptureInvalidated = 901


class Kind(enum.Enum):
    """cudaMemcpyKind."""

    cudaMemcpyHostToDevice = 1
    cudaMemcpyDeviceToHost = 2
    cudaMemcpyDeviceToDevice = 3


class Mode(enum.Enum):
    """cudaStreamCaptureMode."""

    cudaStreamCaptureModeThreadLocal = 1


OK = Status.cudaSuccess


class CudaRuntime:
    """`cuda.bindings.runtime`: functions that return (status, results...)."""

    cudaError_t, cudaMemcpyKind, cudaStreamCaptureMode = Status, Kind, Mode

    def __init__(self, total: int = 1 << 34) -> None:
        self.total = total
        self.scratch = 0  # what an execution context would take
        self.memory: dict[int, np.ndarray[Any, Any]] = {}
        self.host: dict[int, Any] = {}
        self.next = 1 << 40
        self.queue: list[Callable[[], None]] = []
        self.recording: list[Callable[[], None]] | None = None
        self.graphs: list[tuple[Callable[[], None], ...] | None] = []
        self.calls: list[str] = []
        self.bytes: Counter[str] = Counter()  # copied, by direction
        self.streams = {7}

    # -- memory

    def _find(self, pointer: int, size: int) -> np.ndarray[Any, Any]:
        for base, block in self.memory.items():
            if base <= pointer and pointer + size <= base + len(block):
                return block[pointer - base : pointer - base + size]
        raise IllegalAddress(f"{pointer:#x} + {size} is in no live allocation")

    def held(self) -> int:
        return sum(len(block) for block in self.memory.values())

    def cudaSetDevice(self, device: int) -> tuple[Status]:
        return (OK,)

    def cudaMemGetInfo(self) -> tuple[Status, int, int]:
        return OK, self.total - self.held(), self.total

    def cudaMalloc(self, size: int) -> tuple[Status, int | None]:
        if self.recording is not None:
            return Status.cudaErrorStreamCaptureInvalidated, None
        if size + self.held() > self.total:
            return Status.cudaErrorMemoryAllocation, None
        pointer = self.next
        self.next += -(-size // ALIGNMENT) * ALIGNMENT + ALIGNMENT
        self.memory[pointer] = np.full(size, 0x5A, np.uint8)  # never zeros by luck
        return OK, pointer

    def cudaFree(self, devPtr: int) -> tuple[Status]:
        if self.memory.pop(int(devPtr), None) is None:
            return (Status.cudaErrorInvalidValue,)
        return (OK,)

    def cudaMallocHost(self, size: int) -> tuple[Status, int]:
        block = (ctypes.c_byte * size)()
        pointer = ctypes.addressof(block)
        self.host[pointer] = block
        return OK, pointer

    def cudaFreeHost(self, ptr: int) -> tuple[Status]:
        return (OK if self.host.pop(int(ptr), None) is not None else Status.cudaErrorInvalidValue,)

    def _pinned(self, pointer: int) -> bool:
        return any(base <= pointer < base + len(block) for base, block in self.host.items())

    # -- the stream

    def cudaStreamCreate(self) -> tuple[Status, int]:
        self.streams.add(7)
        return OK, 7

    def cudaStreamDestroy(self, stream: int) -> tuple[Status]:
        self.streams.discard(int(stream))
        return (OK,)

    def enqueue(self, work: Callable[[], None], stream: int) -> bool:
        """Queue (or record) work; False for a stream that there is not."""
        if int(stream) not in self.streams:
            return False
        (self.queue if self.recording is None else self.recording).append(work)
        return True

    def _drain(self) -> Status:
        while self.queue:
            work = self.queue.pop(0)
            try:
                work()
            except IllegalAddress:
                self.queue.clear()
                return Status.cudaErrorIllegalAddress
        return OK

    def cudaStreamSynchronize(self, stream: int) -> tuple[Status]:
        if self.recording is not None:
            return (Status.cudaErrorStreamCaptureInvalidated,)
        self.calls.append("wait")
        return (self._drain(),)

    def cudaMemsetAsync(self, devPtr: int, value: int, count: int, stream: int) -> tuple[Status]:
        def work() -> None:
            self._find(devPtr, count)[:] = value

        return (OK if self.enqueue(work, stream) else Status.cudaErrorInvalidValue,)

    def cudaMemcpyAsync(self, dst: int, src: int, count: int, kind: Kind, stream: int) -> tuple[Status]:
        host = {Kind.cudaMemcpyHostToDevice: src, Kind.cudaMemcpyDeviceToHost: dst}.get(kind)
        if host is not None and not self._pinned(host) and self.recording is not None:
            return (Status.cudaErrorStreamCaptureInvalidated,)  # pageable memory cannot be captured
        self.calls.append(kind.name.removeprefix("cudaMemcpy"))

        def counted(work: Callable[[], None]) -> Callable[[], None]:
            def copy() -> None:
                self.bytes[kind.name.removeprefix("cudaMemcpy")] += count
                work()

            return copy

        def array(pointer: int) -> np.ndarray[Any, Any]:
            return np.frombuffer(memoryview((ctypes.c_byte * count).from_address(pointer)), np.uint8)

        if kind is Kind.cudaMemcpyHostToDevice and not self._pinned(src):
            staged = array(src).copy()  # pageable: staged before the call returns
            done = self.enqueue(counted(lambda: self._put(dst, staged)), stream)
        elif kind is Kind.cudaMemcpyHostToDevice:
            done = self.enqueue(counted(lambda: self._put(dst, array(src))), stream)
        elif kind is Kind.cudaMemcpyDeviceToHost:
            done = self.enqueue(counted(lambda: array(dst).__setitem__(slice(None), self._find(src, count))), stream)
        else:
            done = self.enqueue(counted(lambda: self._put(dst, self._find(src, count).copy())), stream)
        return (OK if done else Status.cudaErrorInvalidValue,)

    def cudaMemcpy2DAsync(
        self, dst: int, dpitch: int, src: int, spitch: int, width: int, height: int, kind: Kind, stream: int
    ) -> tuple[Status]:
        """Within the device only. Rows may not overlap: CUDA says cudaErrorInvalidPitchValue of a pitch below width."""
        if kind is not Kind.cudaMemcpyDeviceToDevice:
            return (Status.cudaErrorInvalidValue,)
        if not width <= min(dpitch, spitch) or max(dpitch, spitch) > MOST_PITCH:
            return (Status.cudaErrorInvalidPitchValue,)
        self.calls.append("2D")

        def work() -> None:
            self.bytes["2D"] += width * height
            for row in range(height):
                self._put(dst + row * dpitch, self._find(src + row * spitch, width).copy())

        return (OK if self.enqueue(work, stream) else Status.cudaErrorInvalidValue,)

    def _put(self, pointer: int, data: np.ndarray[Any, Any]) -> None:
        self._find(pointer, len(data))[:] = data

    # -- graphs

    def cudaStreamBeginCapture(self, stream: int, mode: Mode) -> tuple[Status]:
        if self.recording is not None or self.queue:
            return (Status.cudaErrorStreamCaptureInvalidated,)
        self.recording = []
        return (OK,)

    def cudaStreamEndCapture(self, stream: int) -> tuple[Status, Any]:
        if self.recording is None:
            return Status.cudaErrorStreamCaptureInvalidated, None
        self.graphs.append(tuple(self.recording))
        self.recording = None
        return OK, len(self.graphs)

    def cudaGraphInstantiate(self, graph: Any, flags: int) -> tuple[Status, Any]:
        return OK, -graph

    def cudaGraphDestroy(self, graph: Any) -> tuple[Status]:
        return (OK,)

    def cudaGraphExecDestroy(self, graphExec: Any) -> tuple[Status]:
        self.graphs[-graphExec - 1] = None
        return (OK,)

    def cudaGraphLaunch(self, graphExec: Any, stream: int) -> tuple[Status]:
        self.calls.append("launch")
        works = self.graphs[-graphExec - 1]
        if works is None:
            return (Status.cudaErrorInvalidValue,)
        for work in works:
            self.enqueue(work, stream)
        return (OK,)


class IllegalAddress(Exception):
    """Raised by queued work; the wait then returns a status, as it does on a GPU."""


class DataType(enum.Enum):
    """trt.DataType, with pybind's `name`."""

    FLOAT = 0
    HALF = 1
    INT64 = 2
    BOOL = 3
    INT8 = 4


class TensorIOMode(enum.Enum):
    """trt.TensorIOMode."""

    NONE = 0
    INPUT = 1
    OUTPUT = 2


class ExecutionContextAllocationStrategy(enum.Enum):
    """trt.ExecutionContextAllocationStrategy."""

    STATIC = 0
    USER_MANAGED = 2


class ILogger:
    """trt.ILogger."""

    class Severity(enum.Enum):
        """The severity of a message."""

        INTERNAL_ERROR = 0
        ERROR = 1
        WARNING = 2

    def __init__(self) -> None:
        pass

    def log(self, severity: Severity, msg: str) -> None:
        """To be overridden."""


class Runtime:
    """trt.Runtime."""

    cuda: CudaRuntime  # set by `module`

    def __init__(self, logger: ILogger) -> None:
        self.logger = logger

    def deserialize_cuda_engine(self, serialized_engine: Any) -> Any:
        """The engine, or None with an error logged where the plan is none."""
        try:
            plan = json.loads(bytes(serialized_engine))
        except ValueError:
            self.logger.log(ILogger.Severity.ERROR, "Serialization assertion failed: magic tag does not match")
            return None
        return ICudaEngine(plan, self.logger, self.cuda)


class ICudaEngine:
    """trt.ICudaEngine."""

    def __init__(self, plan: dict[str, Any], logger: ILogger, cuda: CudaRuntime) -> None:
        self.logger, self.cuda, self.profiles = logger, cuda, plan["profiles"]
        self.session = onnxruntime.InferenceSession(plan["graph"], providers=["CPUExecutionProvider"])
        self.inputs = {t.name: t for t in self.session.get_inputs()}
        self.outputs = {t.name: t for t in self.session.get_outputs() if t.name not in plan["without"]}
        self.names = [*self.inputs, *self.outputs]
        # KVCacheUpdate writes its cache input; no other kind of output shares memory with an input.
        in_place = b"TensorScatter" in Path(plan["graph"]).read_bytes()
        self.aliases = {n: n.replace("present_", "past_", 1) for n in self.outputs if in_place and "present_" in n}
        self.device_memory_size_v2 = plan.get("scratch", 0)
        self.num_io_tensors = len(self.names)
        self.num_optimization_profiles = max(1, len(self.profiles))

    def _tensor(self, name: str) -> Any:
        return self.inputs.get(name) or self.outputs[name]

    def get_tensor_name(self, index: int) -> str:
        return self.names[index]

    def get_tensor_mode(self, name: str) -> TensorIOMode:
        return TensorIOMode.INPUT if name in self.inputs else TensorIOMode.OUTPUT

    def get_tensor_dtype(self, name: str) -> DataType:
        return DataType[TYPES[self._tensor(name).type]]

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return tuple(d if isinstance(d, int) else -1 for d in self._tensor(name).shape)

    def get_tensor_profile_shape(self, name: str, profile_index: int) -> list[tuple[int, ...]]:
        sizes = self.profiles[profile_index] if self.profiles else {}
        shape = self._tensor(name).shape
        return [tuple(d if isinstance(d, int) else sizes[d][i] for d in shape) for i in range(3)]

    def get_aliased_input_tensor(self, name: str) -> str | None:
        return self.aliases.get(name)

    def create_runtime_config(self) -> Any:
        return IRuntimeConfig()

    def create_engine_inspector(self) -> Any:
        return EngineInspector(self)

    def create_execution_context(self, strategy: Any = None) -> Any:
        if getattr(strategy, "strategy", strategy) is ExecutionContextAllocationStrategy.USER_MANAGED:
            return IExecutionContext(self, strategy, own_scratch=False)
        if self.cuda.scratch > self.cuda.total - self.cuda.held():
            why = f"[executionContext.cpp] OutOfMemory: Requested size was {self.cuda.scratch} bytes."
            self.logger.log(ILogger.Severity.ERROR, why)
            return None
        return IExecutionContext(self, strategy)


class LayerInformationFormat(enum.Enum):
    """trt.LayerInformationFormat."""

    ONELINE = 0
    JSON = 1


class EngineInspector:
    """trt.EngineInspector: says what a test wants, once a context with all shapes is set."""

    said: ClassVar[str] = '{"Layers": ["a name", "another"], "Bindings": []}'

    def __init__(self, engine: ICudaEngine) -> None:
        self.engine = engine
        self.execution_context: IExecutionContext | None = None

    def get_engine_information(self, format: LayerInformationFormat) -> str:
        context = self.execution_context
        if context is None or any(context._shape_of(name) is None for name in self.engine.inputs):
            return "{}"
        return self.said if format is LayerInformationFormat.JSON else ""


class IRuntimeConfig:
    """trt.IRuntimeConfig of TensorRT for RTX."""

    def __init__(self) -> None:
        self.cache: IRuntimeCache | None = None
        self.strategy = ExecutionContextAllocationStrategy.STATIC

    def set_execution_context_allocation_strategy(self, strategy: Any = None) -> None:
        self.strategy = strategy

    def create_runtime_cache(self) -> Any:
        return IRuntimeCache()

    def set_runtime_cache(self, cache: Any = None) -> bool:
        self.cache = cache
        return True


class IRuntimeCache:
    """trt.IRuntimeCache: grows by what runs compile."""

    loaded: ClassVar[list[bytes]] = []  # what tests look at

    def __init__(self) -> None:
        self.kernels = b""

    def deserialize(self, blob: bytes) -> bool:
        self.kernels = bytes(blob)
        IRuntimeCache.loaded.append(self.kernels)
        return True

    def serialize(self) -> bytes:
        return self.kernels


class IExecutionContext:
    """trt.IExecutionContext."""

    def __init__(self, engine: ICudaEngine, config: Any, own_scratch: bool = True) -> None:
        self.engine, self.cuda = engine, engine.cuda
        self.own_scratch = own_scratch
        self.scratch: tuple[int, int] | None = None
        self.cache = getattr(config, "cache", None)
        self.profile_index = 0
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.addresses: dict[str, int] = {}
        self.runs = 0

    def _refuse(self, why: str) -> bool:
        self.engine.logger.log(ILogger.Severity.ERROR, why)
        return False

    def set_optimization_profile_async(self, profile_index: int, stream_handle: int) -> bool:
        if not 0 <= profile_index < self.engine.num_optimization_profiles:
            return self._refuse(f"profile {profile_index} does not exist")
        self.profile_index = profile_index
        self.shapes.clear()
        return True

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        if name not in self.engine.inputs:
            return self._refuse(f"{name} is no input")
        low, _, high = self.engine.get_tensor_profile_shape(name, self.profile_index)
        if len(shape) != len(low) or not all(a <= n <= b for a, n, b in zip(low, shape, high, strict=True)):
            return self._refuse(f"{name} {shape} is not within profile {self.profile_index}, {low} to {high}")
        self.shapes[name] = tuple(shape)
        return True

    def set_tensor_address(self, name: str, memory: int) -> bool:
        if name not in self.engine.names or not isinstance(memory, int):
            return self._refuse(f"{name} is no tensor")
        if memory % ALIGNMENT:
            return self._refuse(f"{memory:#x} is not aligned to {ALIGNMENT} bytes")
        self.addresses[name] = memory
        return True

    def set_device_memory(self, memory: int, size: int) -> None:
        self.scratch = memory, size

    def is_stream_capturable(self, stream: int) -> bool:
        return self.runs > 0

    def _shape_of(self, name: str) -> tuple[int, ...] | None:
        shape = self.engine.get_tensor_shape(name)
        return self.shapes.get(name) if -1 in shape else shape

    def execute_async_v3(self, stream_handle: int) -> bool:
        """Check every rule, then queue the graph."""
        engine = self.engine
        missing = [name for name in engine.names if name not in self.addresses]
        if missing:
            return self._refuse(f"address not set for {', '.join(missing)}")
        shapes = {name: self._shape_of(name) for name in engine.inputs}
        if None in shapes.values():
            return self._refuse(f"shape not set for {[n for n, s in shapes.items() if s is None]}")
        apart = [
            n
            for n in engine.outputs
            if n.startswith("present_") and self.addresses[n] != self.addresses[n.replace("present_", "past_", 1)]
        ]
        if apart:
            return self._refuse(f"{apart[0]} is not at the address of its past")
        others = [self.addresses[n] for n in engine.names if not n.startswith("present_")]
        if len(set(others)) != len(others):
            return self._refuse("two tensors share an address")
        needed, scratch = engine.device_memory_size_v2, self.scratch
        if needed and not self.own_scratch and (scratch is None or scratch[0] % ALIGNMENT or scratch[1] < needed):
            return self._refuse(f"no device memory of {needed} bytes was set")
        addresses = dict(self.addresses)
        if not self.cuda.recording and self.cache is not None:
            self.cache.kernels = b"kernels of " + ",".join(engine.outputs).encode()[:40]
        self.runs += 1

        def work() -> None:
            feeds = {}
            if needed and scratch is not None:
                self.cuda._find(scratch[0], needed)[:] = 0xA5  # whatever else is there is lost
            for name, shape in shapes.items():
                dtype = np.dtype(NUMPY[engine.get_tensor_dtype(name).name])
                assert shape is not None
                size = int(np.prod(shape)) * dtype.itemsize
                feeds[name] = self.cuda._find(addresses[name], size).view(dtype).reshape(shape)
            for name, past in engine.aliases.items():
                positions = feeds["position_ids"]
                if positions.max() >= feeds[past].shape[2]:
                    raise IllegalAddress(f"row {positions.max()} of {name}, which has {feeds[past].shape[2]}")
            binding = engine.session.io_binding()
            values = {n: onnxruntime.OrtValue.ortvalue_from_numpy(array) for n, array in feeds.items()}
            for name, value in values.items():
                binding.bind_ortvalue_input(name, value)
            for name in engine.outputs:
                if name in engine.aliases:
                    binding.bind_ortvalue_output(name, values[engine.aliases[name]])  # the same memory
                else:
                    binding.bind_output(name)
            engine.session.run_with_iobinding(binding)
            for name, value in zip(engine.outputs, binding.get_outputs(), strict=True):
                if name not in engine.aliases:
                    self.cuda._put(addresses[name], np.ascontiguousarray(value.numpy()).reshape(-1).view(np.uint8))

        if not self.cuda.enqueue(work, stream_handle):
            return self._refuse(f"stream {stream_handle} does not exist")
        return True


def module(name: str, version: str, cuda: CudaRuntime) -> Any:
    """A stand-in for `import tensorrt` (or tensorrt_rtx) of a version."""
    runtime = type("Runtime", (Runtime,), {"cuda": cuda})
    members = {"__version__": version, "ILogger": ILogger, "Runtime": runtime, "TensorIOMode": TensorIOMode}
    members |= {"LayerInformationFormat": LayerInformationFormat}
    members |= {"ExecutionContextAllocationStrategy": ExecutionContextAllocationStrategy}
    stand_in = types.ModuleType(name)
    vars(stand_in).update(members)
    return stand_in
