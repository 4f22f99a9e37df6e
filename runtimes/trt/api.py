"""Wraps TensorRT's Python API. No other file touches it, so differences between its versions are handled here.

The same code drives `tensorrt` (10.3 to 11.x) and `tensorrt_rtx` (1.7). tests/test_trt_api.py type-checks this file
against the real bindings of every supported version: each class, method, keyword, property and enum member, with the
arguments passed. Two rules make that possible. A method that touches the library says `trt = self.module` first, and
what exists in some versions only is in a method marked `@only`.

Running an engine: not yet run on a GPU.
"""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

from trol_edge.bundle.trt_operators import Version
from trol_edge.errors import BackendError

if TYPE_CHECKING:
    import tensorrt as trt

Shape = tuple[int, ...]
F = TypeVar("F", bound=Callable[..., Any])
CLASSIC, RTX = "tensorrt", "tensorrt_rtx"
# TensorRT's names of types -> numpy's, which a bundle uses. Only types that numpy has.
DTYPES = {"FLOAT": "float32", "HALF": "float16", "INT64": "int64", "INT32": "int32", "INT8": "int8", "BOOL": "bool"}
NO_GPU = "is there an NVIDIA GPU and driver? Run `trol-edge doctor` to find out"
DTYPES |= {"BF16": "bfloat16", "FP8": "float8_e4m3fn", "INT4": "int4", "UINT8": "uint8"}
_SINCE: dict[Callable[..., Any], tuple[Version | None, Version | None]] = {}  # methods marked by `only`


def only(classic: Version | None = None, rtx: Version | None = None) -> Callable[[F], F]:
    """Mark a method that needs at least these versions; None means that the library never has it.

    Callers check `has` first.
    """

    def mark(function: F) -> F:
        _SINCE[function] = (classic, rtx)
        return function

    return mark


@dataclasses.dataclass(frozen=True)
class EngineTensor:
    """An input or output. dtype is numpy's name; dynamic dimensions of the shape are -1.

    profiles: smallest, best and largest shape in each optimization profile (for inputs of an engine only).
    alias: the input whose memory an output is written to, if TensorRT says that there is one.
    """

    name: str
    is_input: bool
    dtype: str
    shape: Shape
    profiles: tuple[tuple[Shape, Shape, Shape], ...] = ()
    alias: str | None = None


@dataclasses.dataclass(frozen=True)
class LayerInfo:
    """A layer of a network, with its kind ("MATRIX_MULTIPLY") and the dtypes of its inputs and outputs."""

    kind: str
    name: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]


class Library:
    """One imported TensorRT."""

    def __init__(self, module: Any) -> None:
        self.module = module
        self.rtx = module.__name__.startswith(RTX)
        self.version: Version = tuple(int(part) for part in module.__version__.split(".")[:3])
        self.messages: list[str] = []  # errors that the library logged, the newest last
        self._logger = self._make_logger()

    @property
    def title(self) -> str:
        """ "TensorRT 10.3.0" or "TensorRT for RTX 1.7.1"."""
        return f"TensorRT {'for RTX ' if self.rtx else ''}{'.'.join(map(str, self.version))}"

    def has(self, method: Callable[..., Any]) -> bool:
        """Whether this version can run a method marked `@only`."""
        since = _SINCE[method][1 if self.rtx else 0]
        return since is not None and self.version >= since

    def _make_logger(self) -> trt.ILogger:
        trt = self.module
        messages = self.messages

        class Logger(trt.ILogger):  # type: ignore[name-defined,misc]
            """Keeps errors, because other messages are not for users."""

            def __init__(self) -> None:
                trt.ILogger.__init__(self)

            def log(self, severity: trt.ILogger.Severity, msg: str) -> None:  # type: ignore[name-defined]
                if severity in (trt.ILogger.Severity.ERROR, trt.ILogger.Severity.INTERNAL_ERROR):
                    messages.append(msg)

        return Logger()

    def fail(self, what: str, advice: str, cause: BaseException | None = None) -> NoReturn:
        """Raise a BackendError with the last messages of the library and advice."""
        said = "; ".join(" ".join(message.split())[:400] for message in self.messages[-2:]) or "it said nothing more"
        self.messages.clear()
        if "outofmemory" in said.lower().replace(" ", "").replace("_", ""):
            advice = "memory is short: close sessions and other programs, or export with lower precision or --context"
        raise BackendError(f"{self.title} could not {what}: {said}; {advice}") from cause

    def parse(self, graph: Path, model: bytes | None = None) -> Network:
        """Read an ONNX file (and the weights file beside it) into a strongly typed network. Raises BackendError.

        model: read these bytes instead, which would be such a file.
        """
        trt = self.module
        self.messages.clear()
        try:
            builder = trt.Builder(self._logger)
        except TypeError as error:  # raised by the bindings if the library returns null
            self.fail("start its builder", NO_GPU, error)
        definition = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
        parser = trt.OnnxParser(definition, self._logger)
        read = parser.parse_from_file(str(graph)) if model is None else parser.parse(model, str(graph))
        if not read:
            for fault in [parser.get_error(i) for i in range(parser.num_errors)]:
                self.messages.append(f"{fault.node_operator()} {fault.node_name()}: {fault.desc()}")
            self.fail(f"read {graph.name}", "export the bundle again for this target")
        return Network(self, builder, definition, parser)

    def open(self, plan: Any, name: str) -> Engine:
        """Load the bytes of an engine, whose hash must have been checked, because a plan is code; `name` is its file's.

        plan: an object with the buffer protocol, which is not kept. Raises BackendError.
        """
        trt = self.module
        self.messages.clear()
        try:
            runtime = trt.Runtime(self._logger)
        except TypeError as error:
            self.fail("start", NO_GPU, error)
        engine = runtime.deserialize_cuda_engine(plan)
        if engine is None:
            self.fail(f"load {name}", "build the engines again on this machine: `trol-edge build`")
        return Engine(self, runtime, engine)


class Network:
    """A parsed graph that can be built into an engine."""

    def __init__(
        self, library: Library, builder: trt.Builder, definition: trt.INetworkDefinition, parser: trt.OnnxParser
    ) -> None:
        self.library, self.module = library, library.module
        self._builder, self._definition = builder, definition
        self._parser = parser  # the network refers to weights that the parser holds

    def tensors(self) -> list[EngineTensor]:
        """The inputs, then the outputs."""
        network = self._definition
        inputs = [network.get_input(i) for i in range(network.num_inputs)]
        outputs = [network.get_output(i) for i in range(network.num_outputs)]
        return [self._info(t, True) for t in inputs] + [self._info(t, False) for t in outputs]

    def _info(self, tensor: trt.ITensor, is_input: bool) -> EngineTensor:
        return EngineTensor(tensor.name, is_input, DTYPES[tensor.dtype.name], tuple(tensor.shape))

    def layers(self) -> list[LayerInfo]:
        """All layers, in order."""
        found = []
        for index in range(self._definition.num_layers):
            layer = self._definition.get_layer(index)
            inputs = [layer.get_input(i) for i in range(layer.num_inputs)]
            outputs = [layer.get_output(i) for i in range(layer.num_outputs)]
            kinds = [tuple(DTYPES[t.dtype.name] for t in ts if t is not None) for ts in (inputs, outputs)]
            found.append(LayerInfo(layer.type.name, layer.name, kinds[0], kinds[1]))
        return found

    def unused_inputs(self) -> list[str]:
        """Inputs that no layer reads; the parser silently drops what it does not understand."""
        read = set()
        for index in range(self._definition.num_layers):
            layer = self._definition.get_layer(index)
            read |= {t.name for i in range(layer.num_inputs) if (t := layer.get_input(i)) is not None}
        return [t.name for t in self.tensors() if t.is_input and t.name not in read]

    def leave_out(self, names: Collection[str]) -> None:
        """Let the engine not have these outputs, nor what only they need."""
        outputs = [self._definition.get_output(i) for i in range(self._definition.num_outputs)]
        for tensor in outputs:
            if tensor.name in names:
                self._definition.unmark_output(tensor)

    @only(classic=(10, 15), rtx=(1, 7))
    def let_attention_decompose(self) -> int:
        """Allow every Attention without a fused kernel (FP32, odd sizes) to be decomposed; returns their number."""
        trt = self.module
        count = 0
        for index in range(self._definition.num_layers):
            layer = self._definition.get_layer(index)
            if layer.type == trt.LayerType.ATTENTION_OUTPUT:
                layer.__class__ = trt.IAttentionOutputLayer  # how the bindings themselves cast from ILayer
                assert isinstance(layer, trt.IAttentionOutputLayer)
                layer.attention.decomposable = True
                count += 1
        return count

    def build(
        self,
        path: Path,
        profiles: Sequence[Mapping[str, tuple[Shape, Shape, Shape]]],
        workspace_bytes: int | None,
        progress: Callable[[str, int, int], None],
    ) -> None:
        """Build the engine into a file. TensorRT's phases are reported by progress(phase, done, steps).

        Raises BackendError if TensorRT refuses, lacks memory or cannot write.
        """
        trt = self.module
        config = self._builder.create_builder_config()
        if workspace_bytes is not None:
            config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, workspace_bytes)
        for shapes in profiles:
            profile = self._builder.create_optimization_profile()
            for name, (smallest, best, largest) in shapes.items():
                profile.set_shape(name, smallest, best, largest)
            if config.add_optimization_profile(profile) < 0:
                self.library.fail(f"take the profile {dict(shapes)}", "please report this")
        if self.library.has(Network.let_attention_decompose):
            self.let_attention_decompose()
        if not self.library.rtx:  # whose engines hold their programs as text
            config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED  # for `Engine.described`
        stopped: list[BaseException] = []
        config.progress_monitor = self._monitor(progress, stopped)
        if self.library.has(Network._stream):
            done = self._stream(config, path)
        else:
            plan = self._builder.build_serialized_network(self._definition, config)
            done = plan is not None
            if done:
                path.write_bytes(plan)
        if stopped:
            raise stopped[0]
        if not done:
            self.library.fail(
                f"build {path.name}", "if memory ran out: close other programs, or export with a smaller --context"
            )

    @only(classic=(10, 13), rtx=(1, 7))
    def _stream(self, config: trt.IBuilderConfig, path: Path) -> bool:
        """Build directly into the file, without a copy of the engine in memory."""
        trt = self.module
        failed: list[OSError] = []
        with path.open("wb") as file:

            class Writer(trt.IStreamWriter):  # type: ignore[name-defined,misc]
                """Writes each block to the file; a short count tells TensorRT to stop."""

                def __init__(self) -> None:
                    trt.IStreamWriter.__init__(self)

                def write(self, data: bytes) -> int:
                    try:
                        return file.write(data)
                    except OSError as error:
                        failed.append(error)
                        return 0

            done = self._builder.build_serialized_network_to_stream(self._definition, config, Writer())
        if failed:
            raise BackendError(f"{path.name} cannot be written ({failed[0].strerror}); make room") from failed[0]
        return done

    def _monitor(self, progress: Callable[[str, int, int], None], stopped: list[BaseException]) -> trt.IProgressMonitor:
        trt = self.module
        steps: dict[str, int] = {}

        class Monitor(trt.IProgressMonitor):  # type: ignore[name-defined,misc]
            """Reports phases. An exception (Ctrl-C, too) cancels the build and is raised when TensorRT has ended."""

            def __init__(self) -> None:
                trt.IProgressMonitor.__init__(self)

            def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
                steps[phase_name] = num_steps
                self._report(phase_name, 0)

            def step_complete(self, phase_name: str, step: int) -> bool:
                self._report(phase_name, step + 1)
                return not stopped

            def phase_finish(self, phase_name: str) -> None:
                self._report(phase_name, steps[phase_name])

            def _report(self, phase: str, done: int) -> None:
                try:
                    if not stopped:
                        progress(phase, done, steps[phase])
                except BaseException as error:
                    stopped.append(error)

        return Monitor()


class Engine:
    """A loaded engine."""

    def __init__(self, library: Library, runtime: trt.Runtime, engine: trt.ICudaEngine) -> None:
        self.library, self.module = library, library.module
        self._runtime, self._engine = runtime, engine  # the engine must not outlive its runtime
        self.scratch_bytes = engine.device_memory_size_v2

    def tensors(self) -> list[EngineTensor]:
        """The inputs and outputs, in the engine's order."""
        trt = self.module
        engine = self._engine
        found = []
        for index in range(engine.num_io_tensors):
            name = engine.get_tensor_name(index)
            is_input = engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT
            profiles = []
            for number in range(engine.num_optimization_profiles if is_input else 0):
                smallest, best, largest = engine.get_tensor_profile_shape(name, number)
                profiles.append((tuple(smallest), tuple(best), tuple(largest)))
            dtype = DTYPES[engine.get_tensor_dtype(name).name]
            alias = None if is_input or not self.library.has(Engine._alias) else self._alias(name)
            shape = tuple(engine.get_tensor_shape(name))
            found.append(EngineTensor(name, is_input, dtype, shape, tuple(profiles), alias))
        return found

    @only(classic=(10, 15), rtx=(1, 7))
    def _alias(self, output: str) -> str | None:
        return self._engine.get_aliased_input_tensor(output) or None

    def context(self, kernels: Kernels | None = None, own_scratch: bool = True) -> Context:
        """Make an execution context. kernels: compiled ones, to use and to add to (TensorRT for RTX only).

        own_scratch: let it allocate its scratch memory. Without, `Context.scratch` must give it some before it runs.
        """
        trt = self.module
        self.library.messages.clear()
        if self.library.has(Engine._with_kernels):
            context = self._with_kernels(kernels or Kernels(), own_scratch)
        elif own_scratch:
            context = self._engine.create_execution_context()
        else:
            context = self._engine.create_execution_context(trt.ExecutionContextAllocationStrategy.USER_MANAGED)
        if context is None:
            self.library.fail("make an execution context", "free GPU memory, or export with a smaller --context")
        return Context(self, context)

    def described(self, context: Context) -> str:
        """What the library's inspector says about the engine at the shapes of a context, as JSON.

        That is names of layers only, unless the engine was built with details, as `Network.build` asks for.
        """
        trt = self.module
        inspector = self._engine.create_engine_inspector()
        inspector.execution_context = context.raw
        return inspector.get_engine_information(trt.LayerInformationFormat.JSON)

    @only(rtx=(1, 7))
    def _with_kernels(self, kernels: Kernels, own_scratch: bool) -> trt.IExecutionContext:
        trt = self.module
        config = self._engine.create_runtime_config()
        if not own_scratch:
            config.set_execution_context_allocation_strategy(trt.ExecutionContextAllocationStrategy.USER_MANAGED)
        config.set_runtime_cache(kernels.shared(config))
        return self._engine.create_execution_context(config)


class Kernels:
    """What TensorRT for RTX compiles while engines run; it must live as long as their contexts.

    stored: those of an earlier run. cache: the library's own object, from the first context on; several engines may
    share it. Other libraries have none.
    """

    def __init__(self, stored: bytes | None = None) -> None:
        self.stored = stored
        self.cache: Any = None

    @only(rtx=(1, 7))
    def shared(self, config: trt.IRuntimeConfig) -> trt.IRuntimeCache:
        """The library's cache for another context."""
        if self.cache is None:
            cache = config.create_runtime_cache()
            if self.stored:
                cache.deserialize(self.stored)  # refused (False) if driver or GPU changed; compiled again then
            self.cache = cache
        found: trt.IRuntimeCache = self.cache
        return found

    def compiled(self) -> bytes | None:
        """All kernels so far, to be stored."""
        return None if self.cache is None else self._serialized()

    @only(rtx=(1, 7))
    def _serialized(self) -> bytes | None:
        cache: trt.IRuntimeCache = self.cache
        blob = cache.serialize()
        return None if blob is None else bytes(blob)


class Context:
    """An execution context: shapes and addresses of every tensor, and the call that runs it."""

    def __init__(self, engine: Engine, context: trt.IExecutionContext) -> None:
        self.engine, self.library, self.module = engine, engine.library, engine.module
        self.raw = context

    def scratch(self, pointer: int, size: int) -> None:
        """Give a context without memory of its own this block as scratch, which others may use between its runs."""
        self.raw.set_device_memory(pointer, size)

    def profile(self, index: int, stream: int) -> None:
        """Choose an optimization profile; shapes must be set again afterwards."""
        self._check(self.raw.set_optimization_profile_async(index, stream), f"take profile {index}")

    def shape(self, name: str, shape: Shape) -> None:
        """Set the shape of an input."""
        self._check(self.raw.set_input_shape(name, shape), f"take shape {list(shape)} for {name}")

    def address(self, name: str, pointer: int) -> None:
        """Set the device address of an input or output."""
        self._check(self.raw.set_tensor_address(name, pointer), f"take an address for {name}")

    def run(self, stream: int) -> None:
        """Enqueue on a stream. Raises BackendError if a shape is missing or TensorRT refuses."""
        self._check(self.raw.execute_async_v3(stream), "run")

    def capturable(self, stream: int) -> bool:
        """Whether a run may be captured into a CUDA graph now."""
        return not self.library.has(Context._asks_capturable) or self._asks_capturable(stream)

    @only(rtx=(1, 7))
    def _asks_capturable(self, stream: int) -> bool:
        return self.raw.is_stream_capturable(stream)

    def _check(self, done: bool, what: str) -> None:
        if not done:
            self.library.fail(what, "run `trol-edge doctor`, and build the engines again if it finds no fault")


def load(name: str) -> Library:
    """Import a TensorRT module. Raises BackendError if it is missing or does not start."""
    package = "tensorrt-rtx" if name == RTX else "tensorrt"
    try:
        return Library(importlib.import_module(name))
    except ImportError as error:
        advice = (
            "pip install 'trol-edge[rtx]'"
            if name == RTX
            else "on a Jetson it comes with JetPack (use its system Python: python3 -m venv --system-site-packages)"
        )
        raise BackendError(f"{package} is not usable here ({error}); {advice}") from error
