"""The back end of ONNX Runtime, which runs on every CPU and, through its providers, also on GPUs.

In bundles of target cpu, weights are buffers that all sessions read (float32, or 8 bits if quantized), because the
graphs take them as inputs, and inputs are bound, not copied. 4-bit weights of a step are constants, which ONNX Runtime
reads from the file and packs; on processors with AMX 8-bit ones are, too. Graphs of all other targets contain their
weights. Any provider can run them, and each session has its own copy.
The KV cache is bound as past and as present, so it is written in place and nothing is copied per token.

"cuda" ran on an H200 (docs/gpu.md); "tensorrt" is not yet run on a GPU.
"""

from __future__ import annotations

import functools
import os
import threading
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trol_edge.answering.sampling import best_token
from trol_edge.backend import Backend, Placed
from trol_edge.bundle.cache_scales import restored, scale_name, scale_names, unusable
from trol_edge.bundle.derived import INT8, INT8_SCALE, NBITS, NBITS_SCALE, derive_int8, derived_parameters
from trol_edge.bundle.embedding import embedding_names
from trol_edge.bundle.engines import ENGINES
from trol_edge.bundle.graph_cut import cut, eight_bit_product
from trol_edge.bundle.graph_part import SinglePasses, with_constants
from trol_edge.bundle.graph_sizes import PREFILL_CHUNK
from trol_edge.bundle.manifest import Bundle, Port
from trol_edge.bundle.names import EMBEDDING, HEAD, LAYERS, MIX, WEIGHTS
from trol_edge.bundle.sizes import caches_of, cpu_bytes, embedding_bytes, state_bytes
from trol_edge.errors import BackendError, BundleError, UnfinishedError, UsageError
from trol_edge.lifetime import end_calls_at_exit, keep_in_forks, native
from trol_edge.machine.identity import available_memory, free_pages, has_amx, share_arenas
from trol_edge.numeric import is_one_of, shown
from trol_edge.rope import TABLES, RopeRows
from trol_edge.runtimes.layered import LayeredState, LayerSessions

try:
    import onnxruntime as ort
except ImportError as error:
    raise BackendError(f"onnxruntime is not usable here ({error}); pip install 'trol-edge[cpu]'") from error

end_calls_at_exit()
Float32 = NDArray[np.float32]
# Whether a session copies constants that it is given; older ones refer to them, so they have to stay.
COPIES_CONSTANTS = hasattr(ort.SessionOptions, "add_external_initializers_from_files_in_memory")
WHOLE = ("traverse", "traverse_text", "step")
OLDEST = (1, 23)  # first version with RMSNormalization, RotaryEmbedding and Attention of opset 23
# The user's name of a provider -> ONNX Runtime's name, and its name of the memory that the provider computes in.
PROVIDERS = {
    "cpu": ("CPUExecutionProvider", "cpu"),
    "cuda": ("CUDAExecutionProvider", "cuda"),
    "tensorrt": ("TensorrtExecutionProvider", "cuda"),
}


class OrtBackend:
    """The loaded graphs of one bundle. Thread-safe; its states are not, but any number of them may run at once."""

    def __init__(
        self,
        bundle: Bundle,
        threads: int | None = None,
        verify: bool = True,
        prefix_reuse: bool = True,
        provider: str = "cpu",
    ) -> None:
        """Load a bundle.

        threads: threads of one inference call (default: the physical cores). verify: hash the weights while loading.
        prefix_reuse: whether states keep the second pass's keys and values. provider: "cpu", "cuda" or "tensorrt"; the
        latter two take bundles of any target but cpu.

        Raises BackendError (ONNX Runtime too old, provider missing or without its libraries, not enough memory,
        graph refused), BundleError (altered file, a bundle that the provider cannot take) and UsageError.
        """
        version = tuple(int(part) for part in ort.__version__.split(".")[:2])
        if version < OLDEST:
            raise BackendError(f"onnxruntime {ort.__version__} is too old for opset 23; install 1.23.2 or newer")
        manifest = bundle.manifest
        if problem := manifest.too_old("onnxruntime", ort.__version__):
            raise BackendError(f"{bundle.folder}: {problem}; install a newer one, or export without --kv")
        _require_provider(bundle, provider)
        self.bundle, self.spec, self.context = bundle, manifest.spec, manifest.context
        self.prefix_reuse, self.provider, self.memory = prefix_reuse, provider, PROVIDERS[provider][1]
        self.second_layers = manifest.spec.second_layers
        self.identity = f"onnxruntime {ort.__version__}" + ("" if provider == "cpu" else f", {provider}")
        file = bundle.weights()
        self._tensors = file.tensors
        self._by_layer = LAYERS in manifest.graphs and self.memory == "cpu"
        # In a bundle with graphs of single passes the whole ones serve measurements, and are loaded by them.
        self._serving = {name: g for name, g in manifest.graphs.items() if not (self._by_layer and name in WHOLE)}
        used = {name for graph in self._serving.values() for name in graph.weights}
        scales = scale_names(self.spec) if manifest.plan.kv else []
        used |= set(scales)  # graphs of single passes name those of the first pass, and run the second with its own
        constants = {name for graph in self._serving.values() for name in graph.constants}
        inputs = used - constants  # ONNX Runtime finds the constants in the file itself
        derived = derived_parameters(inputs - set(file.tensors))
        sources = {parameter + suffix for parameter in derived for suffix in (NBITS, NBITS_SCALE)}
        kept = {name for name in inputs if not name.endswith((INT8, INT8_SCALE))}
        missing = [name for name in sorted(kept | sources | constants) if name not in file.tensors]
        if missing:
            raise BundleError(f"{file.path}: lacks {', '.join(missing[:5])}; export the bundle again")
        # Weights count once for all sessions, except those that graphs for a GPU contain, which count in each.
        held = [used] if manifest.target == "cpu" else [inputs, *(manifest.graphs[name].constants for name in ENGINES)]
        if self.memory == "cpu":
            self.weight_bytes = sum(cpu_bytes(bundle, names) for names in held)
            self.weight_bytes += embedding_bytes(bundle) if EMBEDDING not in kept else 0
            self.weight_bytes += 0 if manifest.target == "cpu" else manifest.files[WEIGHTS].bytes
        else:
            self.weight_bytes = sum(file.tensors[name].nbytes for names in held for name in names)
        self._require_memory()
        self._packed = {"step": self._worth_packing()}  # constants of a graph beside those that the manifest names
        self.weight_bytes += sum(self._tensors[name].nbytes for names in self._packed.values() for name in names)
        self._roomy = PREFILL_CHUNK  # tokens of a run for which there was memory
        share_arenas()
        table = embedding_names(file.tensors) - kept
        stored = set(table)
        if manifest.target == "cpu":
            stored |= constants - kept - sources
        sha256 = manifest.files[WEIGHTS].sha256 if verify else None
        # Graphs for a GPU take all weights from one image of the file, which sessions may refer to. Older versions of
        # ONNX Runtime cannot, and map the file themselves.
        self._image = file.image(sha256) if manifest.target != "cpu" and COPIES_CONSTANTS else None
        if self._image is None:
            arrays = file.load(kept | sources, sha256, stored)
        else:
            arrays = file.parts(self._image, kept | sources, stored)
        self.embedding: Mapping[str, NDArray[Any]] | None = {name: arrays.pop(name) for name in table} or None
        # What ONNX Runtime would otherwise read from the file by itself, after the hash was checked.
        self._constants = {name: arrays[name] for name in constants if name in arrays}
        for name in self._constants.keys() - kept - sources:
            del arrays[name]
        derive_int8(arrays, derived, keep=kept)
        self.cache_scales = {name: arrays[name] for name in scales}
        if wrong := list(unusable(self.cache_scales)):
            raise BundleError(f"{file.path}: {wrong[0]}; export the bundle again")
        self.weights = {name: ort.OrtValue.ortvalue_from_numpy(array) for name, array in arrays.items()}
        self._threads = threads or 0
        # Read now, because they may be changed until their first use. They are small: they hold no weights.
        self._models = {name: bundle.read(graph.file) for name, graph in manifest.graphs.items()}
        self._lock = threading.Lock()
        self.sessions: dict[str, Any] = {}
        keep_in_forks(self)
        # For measurements: further outputs of a graph that the manifest does not list, and who gets their values.
        self.watched: dict[str, tuple[str, ...]] = {}
        self.watcher: Callable[[str, dict[str, NDArray[Any]]], None] = lambda graph, values: None
        self.layers = self._load_layers() if self._by_layer else None
        for name in () if self._by_layer else ("traverse", "step"):
            self.graph(name)
        if COPIES_CONSTANTS:
            unloaded = [graph for name, graph in self._serving.items() if name not in self.sessions]
            needed = {weight for graph in unloaded for weight in graph.constants}
            self._constants = {name: array for name, array in self._constants.items() if name in needed}

    @property
    def takes_rotary(self) -> bool:
        """Whether the graphs take the rope tables as inputs, so that a state may have tables of its own."""
        return self.weights.keys() >= set(TABLES)

    @property
    def takes_traversal(self) -> bool:
        """Whether each layer is a session of its own."""
        return self.layers is not None

    @property
    def cache_bytes(self) -> int:
        """Bytes of one state's KV cache at full context: both sets, or one set and a layer's scratch."""
        return state_bytes(self.bundle.manifest, self.second_layers, self.prefix_reuse)

    @property
    def cache_ports(self) -> list[Port]:
        """The caches of a state: those of the first pass, then those of the second in the layers that have one."""
        return caches_of(self.bundle.manifest.graphs["traverse"], self.second_layers)

    def _working_bytes(self, tokens: int) -> int:
        """Most bytes of the tensors of a run over this many tokens, or one picture."""
        works = {name: work for name, work in self.bundle.work.items() if name in self._serving}
        kept = 0
        if self._by_layer:  # longer prompts are computed in parts, and have three hidden states of each token between
            kept, tokens = 3 * tokens * self.spec.hidden_size, min(tokens, PREFILL_CHUNK)
        return 4 * (kept + max(work.at(1 if name == "vision" else tokens) for name, work in works.items()))

    def _needed_bytes(self) -> int:
        """Bytes of the weights, one KV cache and a run over one chunk of a prompt."""
        return self.weight_bytes + self.cache_bytes + self._working_bytes(PREFILL_CHUNK)

    def _require_memory(self) -> None:
        if self.memory != "cpu":
            return  # the provider itself reports a lack of memory
        needed, free = self._needed_bytes(), available_memory()
        if free is not None and needed > free:
            working = self._working_bytes(PREFILL_CHUNK)
            raise BackendError(
                f"{self.bundle.folder}: needs {needed / 1e9:.1f} GB (weights {self.weight_bytes / 1e9:.1f}, "
                f"KV cache {self.cache_bytes / 1e9:.1f}, a run {working / 1e9:.1f}), but {free / 1e9:.1f} GB are free; "
                + ("" if self._by_layer else "export with --precision int4-dynamic, which takes least, or ")
                + "free memory, export with a smaller --context, use a smaller model"
                + (", or open it with prefix_reuse=False" if self.prefix_reuse else "")
            )

    def _worth_packing(self) -> tuple[str, ...]:
        """The 8-bit weights that steps should have as constants, which ONNX Runtime packs: one more copy of them.

        On a processor with AMX it lacks the kernel that reads them unpacked for one token, packs them in every step,
        and a step takes four times as long (docs/decisions.md). They stay as they are where memory is scarce.
        """
        step = self._serving.get("step")
        if step is None or self.memory != "cpu" or not has_amx():
            return ()
        inputs = [name for name in step.weights if name in self._tensors and name not in step.constants]
        found = [name for name in inputs if self._tensors[name].dtype == "I8" and len(self._tensors[name].shape) == 2]
        needed = self._needed_bytes() + sum(self._tensors[name].nbytes for name in found)
        free = available_memory()
        return tuple(found) if free is None or needed <= free else ()

    def require_room(self, tokens: int) -> None:
        """Raise BackendError if a run over this many tokens may take more memory than is free."""
        if tokens <= self._roomy or self.memory != "cpu":
            return
        needed, free = self._working_bytes(tokens), available_memory()
        if free is not None and needed > free:
            raise BackendError(
                f"{tokens} tokens at once may take {needed / 1e9:.1f} GB, but {free / 1e9:.1f} GB are free; give a "
                "smaller prefill_chunk, and open the bundle with prefix_reuse=True"
            )
        self._roomy = tokens

    def graph(self, name: str) -> Any:
        """The session of a graph, made on first use, because vision and traverse_text may never be used."""
        with self._lock:
            if name not in self.sessions:
                # ONNX Runtime plans memory once per combination of input shapes and never forgets a plan. With
                # prefixes and chunks of any length that would be a leak.
                options = self._session_options(mem_pattern=name == "step")
                graph = self.bundle.manifest.graphs[name]
                self._read_inputs(name)
                arrays = self._constants_of(name) if name not in self._serving else self._constants
                model: str | bytes = self._models[name]
                if packed := self._packed.get(name):
                    model = with_constants(self._models[name], {weight: self._tensors[weight] for weight in packed})
                    options.add_external_initializers(list(packed), [self.weights[weight] for weight in packed])
                given: Any = None  # what the options point to
                if graph.constants and (arrays or self._image is not None):
                    given = self._give_constants(options, graph.constants, arrays)
                elif graph.constants:
                    model = os.fspath(self.bundle.path(graph.file))  # its constants are found beside it
                providers = self.providers_of(name)
                self.sessions[name] = _call(f"load {graph.file}", open_session, model, options, providers)
                del given
                self._require_used(self.sessions[name])
            return self.sessions[name]

    def _load_layers(self) -> LayerSessions:
        """The sessions of the graphs of single passes, whose constants they take out of `_constants`."""
        sessions, passes = [], SinglePasses(self._models[LAYERS])
        for layer in range(self.spec.num_layers):
            names = passes.constants(layer) & self._constants.keys()
            model = passes.part(layer, {name: self._constants.pop(name) for name in names})
            options = self._session_options(mem_pattern=False)
            # Else each session would keep scratch memory of its own, and its threads would wait in a loop for work
            # while those of the next session work.
            options.enable_cpu_mem_arena = False
            options.add_session_config_entry("session.force_spinning_stop", "1")
            sessions.append(_call(f"load layer {layer}", open_unkept, model, options, ["CPUExecutionProvider"]))
            self.sessions[f"{LAYERS} {layer}"] = sessions[-1]
            del model
            free_pages()  # else holes that its copies leave add up to a third of the weights
        return LayerSessions(tuple(sessions), self.graph(MIX), self.graph(HEAD))

    def _constants_of(self, name: str) -> dict[str, NDArray[Any]]:
        """The constants of a graph as they are stored, from memory or the weights file."""
        names = self.bundle.manifest.graphs[name].constants
        arrays = {weight: self._constants[weight] for weight in names if weight in self._constants}
        if missing := [weight for weight in names if weight not in arrays]:
            sha256 = self.bundle.manifest.files[WEIGHTS].sha256
            arrays |= self.bundle.weights().load((), sha256, missing)
        return arrays

    def _read_inputs(self, name: str) -> None:
        """Load weights that a graph takes as inputs, and that no graph in use reads."""
        graph = self.bundle.manifest.graphs[name]
        if missing := set(graph.weights) - set(graph.constants) - self.weights.keys():
            arrays = self.bundle.weights().load(missing, self.bundle.manifest.files[WEIGHTS].sha256)
            self.weights |= {weight: ort.OrtValue.ortvalue_from_numpy(array) for weight, array in arrays.items()}

    def _give_constants(self, options: Any, names: Sequence[str], arrays: Mapping[str, NDArray[Any]]) -> Any:
        """Let a graph take its constants from memory, instead of the file that it names.

        Returns what has to live until the session is made, because the options only point to it.
        """
        if not COPIES_CONSTANTS:
            values = [ort.OrtValue.ortvalue_from_numpy(arrays[name]) for name in names]
            options.add_external_initializers(list(names), values)
            return values
        image = self._image
        if image is None:
            size = self.bundle.manifest.files[WEIGHTS].bytes
            image = np.zeros(size, np.uint8)  # of the file; pages of it that are never touched take no memory
            for name in names:
                start = self._tensors[name].offset
                image[start : start + arrays[name].nbytes] = arrays[name].reshape(-1).view(np.uint8)
        options.add_external_initializers_from_files_in_memory([WEIGHTS], [image], [image.nbytes])
        return image

    def _session_options(self, mem_pattern: bool) -> Any:
        options = ort.SessionOptions()
        options.log_severity_level = 3
        options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")  # for `placement`
        options.intra_op_num_threads, options.enable_mem_pattern = self._threads, mem_pattern
        if any(linear.precision == "fp8" for linear in self.bundle.manifest.plan.linears.values()):
            # No kernels multiply FP8, so nothing is lost; and 1.31 moves the rounding past operators without FP8.
            options.add_session_config_entry("session.disable_quant_qdq", "1")
        return options

    def placement(self) -> dict[str, dict[str, dict[str, int]]]:
        """Where operators run: graph -> ONNX Runtime's name of a provider -> operator -> count.

        Covers the graphs loaded so far. Raises BackendError if this ONNX Runtime cannot tell (before 1.24).
        """
        found: dict[str, dict[str, dict[str, int]]] = {}
        for name, session in self.sessions.items():
            if not hasattr(session, "get_provider_graph_assignment_info"):
                raise BackendError(
                    f"onnxruntime {ort.__version__} does not say where operators run; install 1.24 or newer"
                )
            for part in _call("say where operators run", session.get_provider_graph_assignment_info):
                operators = found.setdefault(name, {}).setdefault(part.ep_name, {})
                for node in part.get_nodes():
                    operators[node.op_type] = operators.get(node.op_type, 0) + 1
        return found

    def providers_of(self, name: str) -> list[Any]:
        """The provider of a graph with its options, followed by the CPU's for operators that it lacks."""
        if self.provider == "cpu":
            return ["CPUExecutionProvider"]
        # Allocate device memory in the sizes asked for, not in powers of two, because other programs need it, too.
        cuda = {"device_id": "0", "arena_extend_strategy": "kSameAsRequested"}
        options = dict(cuda) if self.provider == "cuda" else {"device_id": "0"}
        if self.provider == "tensorrt":
            # No engine cache, because an engine is a program, and ONNX Runtime would load one without checking a hash.
            options |= {"trt_fp16_enable": str(int(self.bundle.manifest.plan.compute == "fp16"))}
            options |= _profile(self.bundle, name)
        chain: list[Any] = [(PROVIDERS[self.provider][0], options)]
        if self.provider == "tensorrt":
            chain.append(("CUDAExecutionProvider", cuda))
        return [*chain, "CPUExecutionProvider"]

    def _require_used(self, session: Any) -> None:
        """Raise BackendError if ONNX Runtime fell back to another provider, which it reports on stderr only."""
        if session.get_providers()[0] != PROVIDERS[self.provider][0]:
            raise BackendError(
                f"onnxruntime {ort.__version__} could not start {PROVIDERS[self.provider][0]} (it printed why, and "
                "would compute on the CPU); check that there is an NVIDIA driver (`trol-edge doctor` does), and the "
                "CUDA, cuDNN and TensorRT libraries that this onnxruntime-gpu was built for"
            )

    def bind(self, name: str, values: Mapping[str, Any]) -> Any:
        """Make an IOBinding of a graph with its weights and `values` (OrtValue by input name) bound."""
        return self._bound(self.graph(name), name, values, self._packed.get(name, ()))

    def _bound(self, session: Any, name: str, values: Mapping[str, Any], packed: Collection[str] = ()) -> Any:
        binding, graph = session.io_binding(), self.bundle.manifest.graphs[name]
        constants = {*graph.constants, *packed}
        given = {weight: self.weights[weight] for weight in graph.weights if weight not in constants}
        for key, value in (given | dict(values)).items():
            binding.bind_ortvalue_input(key, value)
        return binding

    def run(self, name: str, binding: Any, shrink: bool = False) -> None:
        """Run a bound graph. shrink: free the scratch memory of a long prompt afterwards."""
        watched = self.watched.get(name, ())
        for output in watched:
            binding.bind_output(output)
        self.run_session(name, self.graph(name), binding, shrink)
        if watched:
            values = binding.get_outputs()[-len(watched) :]
            self.watcher(name, {key: value.numpy() for key, value in zip(watched, values, strict=True)})

    def run_session(self, name: str, session: Any, binding: Any, shrink: bool = False) -> None:
        """Run a session, of the graph `name` or a part of it. shrink: see `run`."""
        options = None
        if shrink and self.memory == "cpu":
            options = ort.RunOptions()
            options.add_run_config_entry("memory.enable_memory_arena_shrinkage", "cpu:0")
        _call(f"run {name}", session.run_with_iobinding, binding, options)

    def encode_image(self, pixel_values: Float32) -> Float32:
        """Encode pixel_values [N, 3, P, P] into image features [N, T, D].

        On a CPU, pictures or tiles are encoded one at a time. One already keeps every core busy, and the scratch memory
        of seven tiles of TroL-3.8B at once would be 1.6 GB instead of 0.2.
        """
        out = np.empty((len(pixel_values), self.spec.vision.tokens_per_image, self.spec.hidden_size), np.float32)
        at_once = 1 if self.memory == "cpu" else max(1, len(pixel_values))
        for i in range(0, len(pixel_values), at_once):
            binding = self.bind("vision", {"pixel_values": value_of(pixel_values[i : i + at_once])})
            # The output goes to the host, wherever it is computed.
            binding.bind_ortvalue_output("image_features", value_of(out[i : i + at_once]))
            self.run("vision", binding, shrink=i + at_once >= len(pixel_values))
        return out

    def new_state(self) -> OrtState:
        """Make an empty KV cache."""
        return OrtState(self)

    @property
    def saturates(self) -> bool:
        """Whether sums of two 8-bit products are clipped to 16 bits here: x86 without VNNI does that."""
        return self.memory == "cpu" and _saturates()

    def run_cut(
        self, name: str, cuts: Collection[str], feeds: Mapping[str, NDArray[Any]], state: Any
    ) -> dict[str, NDArray[Any]] | None:
        """See trol_edge.backend.Backend. The session lives as long as the call; it packs 4-bit weights once more."""
        if self.memory != "cpu" or self.bundle.manifest.target != "cpu":
            return None
        graph = self.bundle.manifest.graphs[name]
        options = self._session_options(mem_pattern=False)
        self._read_inputs(name)
        given = self._give_constants(options, graph.constants, self._constants_of(name)) if graph.constants else None
        session = _call(
            f"load {graph.file}", open_session, cut(self._models[name], cuts), options, ["CPUExecutionProvider"]
        )
        del given
        past = {port.name: state.past[port.name] for port in graph.inputs if port.name in state.past}
        binding = self._bound(session, name, past | {key: value_of(array) for key, array in feeds.items()})
        wanted = [f"{value}.computed" for value in cuts]
        wanted += [port.name for port in graph.outputs if port.name not in state.present]
        for port in graph.outputs:
            if port.name in state.present:
                binding.bind_ortvalue_output(port.name, state.present[port.name])
        for output in wanted:
            binding.bind_output(output)
        _call(f"run {name}", session.run_with_iobinding, binding)
        found = binding.get_outputs()[-len(wanted) :]
        return {key: value.numpy() for key, value in zip(wanted, found, strict=True)}


class OrtState:
    """One KV cache, and the buffers of a step, bound once.

    cache: float32, float16 or int8 [1, G, C, E] per layer, keys and values in turn, of the first pass. second: the same
    for the second pass, if the back end keeps it. The buffers never change their addresses; on a GPU they are
    OrtValues.
    """

    def __init__(self, backend: OrtBackend) -> None:
        self._backend = backend
        spec, graphs = backend.spec, backend.bundle.manifest.graphs
        # If graphs contain their weights, a zero mask replaces traverse_text and saves one more copy of them.
        self._text = "traverse_text" in graphs and backend.bundle.manifest.target == "cpu"
        past = backend.cache_ports
        present = [port.name.replace("past_", "present_", 1) for port in past]
        self._ports = past
        # Without reuse, every layer of a traverse writes its second pass into the same scratch and reads it at once.
        sets, second = 2 * spec.num_layers, 2 * len(backend.second_layers)
        own = second if backend.prefix_reuse else 2
        # Zeros and not empty, because a masked slot has weight 0, and 0 times a stray NaN would still be NaN.
        shape = (1, spec.num_kv_heads, backend.context, spec.head_dim)
        buffers: list[Any] = [np.zeros(shape, port.dtype) for port in past[: sets + own]]
        values = [value_of(array, backend.memory) for array in buffers]
        if backend.memory != "cpu":
            buffers = list(values)
        self.cache, self.second = buffers[:sets], buffers[sets:]
        values += values[-2:] * ((second - own) // 2)
        self.past = dict(zip((p.name for p in past), values, strict=True))
        self.present = dict(zip(present, values, strict=True))
        self._embedding = np.zeros((1, 1, spec.hidden_size), np.float32)
        self._position = np.zeros((1, 1), np.int64)
        self._slots = np.arange(backend.context, dtype=np.int64)
        self._logits = np.zeros((1, spec.vocab_size), np.float32)
        self.rope_offset = np.zeros(1, np.int64)  # rows of the rope tables to skip: 0, or to the long factor set
        self.long_rope_offset = spec.long_rope.short_rows(backend.context) if spec.long_rope else None
        self._one = {
            "inputs_embeds": value_of(self._embedding),
            "position_ids": value_of(self._position),
            "image_mask": value_of(np.zeros((1, 1, 1), np.float32)),
        }
        self._anew = {**self._one, "rope_offset": value_of(self.rope_offset)}  # inputs that change with every run
        self._rope: RopeRows | None = None  # tables of its own, from the first token that is not at its row on
        self._tables: dict[str, Any] = {}  # they as values
        self._step_one: Any = None  # bound at first use
        self._traverse_one: Any = None  # the same
        self._layered: LayeredState | None = None
        if backend.layers is not None:
            second_values = values[sets:]
            second_of = {layer: second_values[2 * i : 2 * i + 2] for i, layer in enumerate(backend.second_layers)}
            self._layered = LayeredState(
                backend.layers,
                backend.weights,
                lambda *given: backend.run_session(*given),  # which a measurement may replace
                value_of,
                values[:sets],
                second_of,
                self._logits,
                self._slots,
                PREFILL_CHUNK,
            )
        else:
            self._step_one = self._bind("step", self._one)

    def _bind(self, name: str, feeds: Mapping[str, Any]) -> Any:
        graph = self._backend.bundle.manifest.graphs[name]
        # A step for TensorRT says how many rows it reads; here it reads all of them.
        given = {"slots": value_of(self._slots), **self.past, **feeds, "rope_offset": value_of(self.rope_offset)}
        feeds = {p.name: given[p.name] for p in graph.inputs if p.name in given}
        binding = self._backend.bind(name, feeds | self._tables)
        binding.bind_ortvalue_output("logits", value_of(self._logits))
        for port in graph.outputs:
            if port.name in self.present:
                binding.bind_ortvalue_output(port.name, self.present[port.name])
            elif port.name != "logits" and not port.name.startswith("new_"):  # what the present caches hold, too
                binding.bind_output(port.name)
        return binding

    def _place(self, start: int, count: int, rotary: NDArray[np.int64] | int | None) -> None:
        """Let `count` rows from `start` on have the rotary embedding of these positions (None: of their rows)."""
        is_new, offset, backend = self._rope is None, int(self.rope_offset[0]), self._backend
        if self._rope is None:
            if rotary is None:
                return
            self._rope = RopeRows({name: backend.weights[name].numpy() for name in TABLES})
        changed = self._rope.place(offset + start, count, None if rotary is None else offset + rotary)
        if is_new or (changed and backend.memory != "cpu"):  # on a CPU the values refer to the arrays
            self._tables = {name: value_of(table) for name, table in self._rope.own.items()}
            for binding in (self._step_one, self._traverse_one):
                for name, table in self._tables.items() if binding is not None else ():
                    binding.bind_ortvalue_input(name, table)

    @property
    def step_binding(self) -> Any:
        """What a step runs, with its buffers bound."""
        self._step_one = self._step_one or self._bind("step", self._one)
        return self._step_one

    def _by_layer(
        self, graph: str, embeddings: Float32, start: int, image_mask: NDArray[np.bool_] | None
    ) -> Float32 | None:
        """Compute tokens layer by layer; None if the bundle or a measurement wants the whole graph."""
        if self._layered is None or self._backend.watched.get(graph):
            return None
        rows = np.zeros(0, np.int64) if image_mask is None else np.flatnonzero(image_mask).astype(np.int64)
        changing = {"rope_offset": self._anew["rope_offset"], **self._tables}
        self._layered.compute(embeddings, start, graph != "step", rows, changing)
        return self._logits[0]

    def _run_again(self, name: str, binding: Any) -> None:
        """Run a graph that was bound before, on the present contents of its input arrays."""
        if self._backend.memory != "cpu":  # inputs are copied to a device when they are bound, not when they run
            for port in self._backend.bundle.manifest.graphs[name].inputs:
                if port.name in self._anew:
                    binding.bind_ortvalue_input(port.name, self._anew[port.name])
        self._backend.run(name, binding)

    def traverse(
        self,
        embeddings: Float32,
        image_mask: NDArray[np.bool_] | None,
        long_rope: bool = False,
        start: int = 0,
        pictures: Sequence[Placed] = (),
        rotary: NDArray[np.int64] | None = None,
    ) -> Float32:
        """See trol_edge.backend.State; the returned array is overwritten by the next call."""
        for placed in pictures:
            rows = np.asarray(placed.features[placed.first : placed.first + placed.count])
            embeddings[placed.at : placed.at + placed.count] = rows
        self.rope_offset[0] = self.long_rope_offset if long_rope and self.long_rope_offset is not None else 0
        self._backend.require_room(len(embeddings))
        stop = start + len(embeddings)
        self._place(start, len(embeddings), rotary)
        name = "traverse_text" if self._text and image_mask is None else "traverse"
        if (logits := self._by_layer(name, embeddings, start, image_mask)) is not None:
            return logits
        if len(embeddings) == 1 and image_mask is None:  # decoding with both passes; only the length changes
            self._embedding[0], self._position[0, 0] = embeddings, start
            self._traverse_one = self._traverse_one or self._bind(name, self._one)
            self._traverse_one.bind_ortvalue_input("slots", value_of(self._slots[:stop]))
            self._run_again(name, self._traverse_one)
            return self._logits[0]
        mask = np.zeros(len(embeddings)) if image_mask is None else image_mask
        feeds = {
            "inputs_embeds": value_of(embeddings[None]),
            "position_ids": value_of(self._slots[None, start:stop]),
            "slots": value_of(self._slots[:stop]),
            "image_mask": value_of(mask.astype(np.float32)[None, :, None]),
        }
        self._backend.run(name, self._bind(name, feeds), shrink=True)
        return self._logits[0]

    def copy_rows(self, source: Any, start: int, stop: int, which: int) -> None:
        """Copy rows start..stop-1 of the first (which 0) or second set; the first also copies the choice of factors."""
        mine, theirs = (self.second, source.second) if which else (self.cache, source.cache)
        for to, of in zip(mine, theirs, strict=True):
            if isinstance(to, np.ndarray):
                to[:, :, start:stop] = of[:, :, start:stop]
            else:  # on a GPU; ONNX Runtime's Python copies only whole values between it and the host
                array = to.numpy()
                array[:, :, start:stop] = of.numpy()[:, :, start:stop]
                to.update_inplace(array)
        if not which:
            self.rope_offset[:] = source.rope_offset

    def rows(self, positions: NDArray[np.int32], which: int) -> list[Float32]:
        """See trol_edge.backend.State."""
        if which and not self._backend.prefix_reuse:
            return []
        found = []
        first = len(self.cache)
        ports, buffers = ((self._ports[:first], self.cache), (self._ports[first:], self.second))[which]
        for port, buffer in zip(ports, buffers, strict=True):
            array = buffer if isinstance(buffer, np.ndarray) else buffer.numpy()
            rows, scales = array[0][:, positions], self._backend.cache_scales.get(scale_name(port.name))
            rows = rows.astype(np.float32) if scales is None else restored(rows, scales)
            found.append(rows.swapaxes(0, 1).reshape(len(positions), -1))
        return found

    def step(self, embedding: Float32, position: int, rotary: int | None = None) -> Float32:
        """Run one pass over one token, embedding [D] in row `position`; the next call overwrites the logits [V]."""
        self._place(position, 1, rotary)
        if (logits := self._by_layer("step", embedding[None], position, None)) is not None:
            return logits
        self._embedding[0, 0] = embedding
        self._position[0, 0] = position
        self._run_again("step", self.step_binding)
        return self._logits[0]

    def step_token(self, embedding: Float32, position: int, rotary: int | None = None) -> int:
        """See trol_edge.backend.State."""
        return best_token(self.step(embedding, position, rotary))


def _require_provider(bundle: Bundle, provider: str) -> None:
    """Raise if there is no such provider, it is not installed, or it cannot take the bundle's graphs."""
    if not is_one_of(provider, tuple(PROVIDERS)):
        raise UsageError(f"provider {shown(provider)} is not one of {', '.join(PROVIDERS)}")
    if provider == "cpu":
        return
    if bundle.manifest.target == "cpu":
        raise BundleError(
            f"{bundle.folder}: made for target cpu, whose operators and weights are for ONNX Runtime on a CPU; to use "
            f"the {provider} provider, export with --target tensorrt"
        )
    name, there = PROVIDERS[provider][0], ort.get_available_providers()
    if name not in there:
        raise BackendError(
            f"onnxruntime {ort.__version__} here has {', '.join(there)}, and not {name}; pip uninstall onnxruntime, "
            "then pip install 'trol-edge[gpu]' (one at a time, because the two packages share a folder)"
        )
    ort.preload_dlls()  # loads CUDA and cuDNN from pip packages, if they are installed that way


def _profile(bundle: Bundle, name: str) -> dict[str, str]:
    """TensorRT's range of every dynamic input of a graph, without which each longer prompt would build a new engine."""
    manifest = bundle.manifest
    most = {"images": manifest.image.most_tiles, "tokens": manifest.context, "slots": manifest.context}
    sizes = {"min": dict.fromkeys(most, 1), "opt": {k: max(1, n // 2) for k, n in most.items()}, "max": most}
    ports = [p for p in manifest.graphs[name].inputs if any(isinstance(d, str) for d in p.shape)]
    return {
        f"trt_profile_{end}_shapes": ",".join(
            f"{p.name}:{'x'.join(str(d if isinstance(d, int) else size[d]) for d in p.shape)}" for p in ports
        )
        for end, size in sizes.items()
        if ports
    }


def value_of(array: NDArray[Any], memory: str = "cpu") -> Any:
    # On a CPU the value refers to the array's memory, so it must be contiguous and must live as long.
    return ort.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(array), memory, 0)


def open_session(model: str | bytes, options: Any, providers: list[Any]) -> Any:
    return ort.InferenceSession(model, options, providers=providers)


def open_unkept(model: bytes, options: Any, providers: list[Any]) -> Any:
    """Open a session of a model that has its weights in it, without keeping them.

    A session that is made from bytes keeps these as long as it lives. So it gets a file in memory, where there is one.
    """
    if not hasattr(os, "memfd_create") or not os.path.isdir("/proc/self/fd"):
        return open_session(model, options, providers)
    with os.fdopen(os.memfd_create("trol-edge"), "wb") as file:
        file.write(model)
        file.flush()
        return open_session(f"/proc/self/fd/{file.fileno()}", options, providers)


@functools.cache
def _saturates() -> bool:
    session = open_session(eight_bit_product(), ort.SessionOptions(), ["CPUExecutionProvider"])
    a, b = np.full((8, 64), 255, np.uint8), np.full((64, 32), 127, np.int8)
    (found,) = session.run(None, {"a": a, "b": b})
    return bool((found != 64 * 255 * 127).any())


def _call(what: str, function: Any, *args: Any) -> Any:
    try:
        with native:
            return function(*args)
    except UnfinishedError:
        raise
    except Exception as error:  # ONNX Runtime's exceptions have no common base class
        raise BackendError(f"onnxruntime {ort.__version__} could not {what}: {error}") from error


_: type[Backend] = OrtBackend  # lets type checkers confirm that it is one
