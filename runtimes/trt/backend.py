"""TensorRT on a GPU: engines, device buffers, one stream. Not yet run on a GPU.

Buffers are allocated once. The K/V cache is bound as past and as present, so an engine writes it in place. From
TensorRT 10.15 on that is the rule (KVCacheUpdate). Before, engines read caches and write none: they give their new rows
as outputs, which are copied into the caches after each run. The copy is no part of a step's CUDA graph, because it goes
to another place at every step. A traverse runs for at most GIVEN tokens at a time there, because its new rows need
memory. A decoder is two engines (`whole.py`), or one for each layer (`layers.py`). In the first case two layers may not
share a buffer, because TensorRT would not know about it, so both K/V sets are always kept.
Image features stay in device memory, and are copied within it to their places among the embeddings. A step uploads one
embedding and one position from page-locked memory, runs, and downloads the id of the best token; logits are downloaded
only when asked for. A step reads the filled rows of the cache, rounded up to a multiple of ROWS. As long as that number
stays, steps are one CUDA graph from the second on. Calls from several threads take turns.
"""

from __future__ import annotations

import dataclasses
import hashlib
import threading
import warnings
import weakref
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trol_edge.answering.sampling import best_token
from trol_edge.backend import Backend, Placed
from trol_edge.bundle.engines import EngineSet, Key, differences, read
from trol_edge.bundle.manifest import Bundle, GraphInfo, Port
from trol_edge.bundle.sizes import caches_of, shared_weights, state_bytes
from trol_edge.bundle.targets import target as target_of
from trol_edge.errors import BackendError, BundleError, UsageError
from trol_edge.lifetime import end_calls_at_exit, keep_in_forks, native
from trol_edge.machine.identity import available_memory
from trol_edge.rope import TABLES, RopeRows
from trol_edge.runtimes.cuda import Cuda, Gpu, devices, open_cuda
from trol_edge.runtimes.trt import weights as trt_weights
from trol_edge.runtimes.trt.api import Library, load
from trol_edge.runtimes.trt.layers import LayeredDecoder
from trol_edge.runtimes.trt.loaded import Loaded
from trol_edge.runtimes.trt.memory import Lease, Memory, copies
from trol_edge.runtimes.trt.whole import WholeDecoder

Float32 = NDArray[np.float32]
ROWS = 256  # a step reads a multiple of this number of rows, each of which needs a CUDA graph of its own


class DeviceFeatures:
    """Image features in device memory, float32 [N, T, D], or [T, D] for one picture. `numpy.asarray` downloads them.

    The memory is freed when neither this object nor a picture taken out of it is left.
    """

    dtype = np.dtype(np.float32)

    def __init__(self, backend: TrtBackend, shape: tuple[int, ...], pointer: int, lease: Lease) -> None:
        self.backend, self.shape, self.pointer, self._lease = backend, shape, pointer, lease

    @property
    def nbytes(self) -> int:
        """Bytes of device memory."""
        return int(np.prod(self.shape)) * self.dtype.itemsize

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, index: int) -> DeviceFeatures:
        """Take one picture out of [N, T, D]."""
        part = DeviceFeatures(self.backend, self.shape[1:], self.pointer, self._lease)
        part.pointer += range(len(self))[index] * part.nbytes  # raises IndexError, as a sequence must
        return part

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> NDArray[Any]:
        array = np.empty(self.shape, self.dtype)
        with native, self.backend.lock:
            self.backend.cuda.download(array, self.pointer)
            self.backend.cuda.wait()
        return array.astype(dtype or self.dtype, copy=False)


class TrtBackend:
    """The engines of one bundle, which are loaded on the first GPU."""

    embedding: Mapping[str, NDArray[Any]] | None = None
    saturates = False

    def __init__(
        self,
        bundle: Bundle,
        threads: int | None = None,
        verify: bool = True,
        prefix_reuse: bool = True,
        *,
        library: Library | None = None,
        cuda: Cuda | None = None,
        device: Gpu | None = None,
        cuda_graphs: bool = True,
    ) -> None:
        """Load the engines of a bundle.

        threads is for a CPU and has no effect. verify: hash weights that engines share; engines are always hashed.
        library, cuda, device: used instead of what this machine has. cuda_graphs: capture the step.
        Raises BackendError (no TensorRT, driver or GPU, not enough memory), BundleError (no engines, altered ones, or
        engines for another GPU, driver or TensorRT) and UsageError (prefix_reuse=False, unless they are by layer).
        """
        self.bundle, self.spec, self.context = bundle, bundle.manifest.spec, bundle.manifest.context
        target = target_of(bundle.manifest.target)
        if "token" not in {port.name for port in bundle.manifest.graphs["step"].outputs}:
            raise BundleError(f"{bundle.folder}: its step does not say the best token; export the bundle again")
        self._built = engines = read(bundle, target.name)
        if not prefix_reuse and not engines.by_layer:
            raise UsageError(
                f"{bundle.folder}: prefix_reuse=False would save nothing with engines of the whole decoder, where each "
                "layer needs its own buffers for the second pass; leave it out, or build with --engines layers"
            )
        self.prefix_reuse, self.second_layers = prefix_reuse, self.spec.second_layers
        self.library = library or load(target.module)
        if device is None and cuda is None:
            found = devices()
            if isinstance(found, str):
                raise BackendError(f"no usable NVIDIA GPU: {found}; `trol-edge doctor` looks for the cause")
            device = found[0]
        self._require_fit(engines, device)
        built = hashlib.sha256("".join(sorted(e.sha256 for e in engines.engines.values())).encode()).hexdigest()
        gpu = f"{device.name}, driver {'.'.join(map(str, device.driver))}" if device else "a GPU"
        self.identity = f"{self.library.title} on {gpu}, engines {built[:12]}"
        self.cuda = cuda or open_cuda()
        self.cuda_graphs = cuda_graphs and self.cuda.graphs
        self._require_memory(device)
        self.lock = threading.RLock()
        keep_in_forks(self)  # CUDA cannot be used in a child either, and its destructors fail there
        end_calls_at_exit()  # registered after the libraries, which are loaded by now
        self.memory = Memory(self.cuda, self.context, bundle.manifest.image.most_tiles)
        self.loaded = Loaded(bundle, engines, self.library, self.cuda)
        graphs = bundle.manifest.graphs
        # Buffers that no state owns: the inputs of a traverse at their largest, and those of the vision engine.
        ports = (p for name in ("vision", "traverse") for p in (*graphs[name].inputs, *graphs[name].outputs))
        self._lease = self.memory.lease()
        own = [p for p in ports if not p.name.startswith(("past_", "present_", "new_"))]
        self.shared = self.memory.allocate(own, "what all sessions share", self._lease)
        decoder = LayeredDecoder if engines.by_layer else WholeDecoder
        self.decoder = decoder(bundle, self.loaded, self.memory, self._lease)
        self.loaded.open_contexts(["vision"])
        # Without reuse of prefixes all layers and all states use one pair of buffers for the second pass, in turn.
        self.scratch_caches = {} if prefix_reuse else self._scratch_caches()
        self.weights = trt_weights.upload(bundle, self.cuda, verify)
        self.shared |= self.weights
        self._slots = np.arange(self.context, dtype=np.int64)
        self.cuda.upload(self.shared["slots"], self._slots)  # every run reads the first of them
        self.cuda.wait()
        self._logits = self.cuda.pinned((1, self.spec.vocab_size), _dtype(graphs["traverse"], "logits"))
        self._closing = weakref.finalize(self, _close, self.cuda, self.loaded)
        self._closing.atexit = False  # the end of the process frees all, and must not take memory from a thread

    def _require_fit(self, engines: EngineSet, device: Gpu | None) -> None:
        target = target_of(engines.key.target)
        gpu = device or Gpu("", "", 0, (0, 0))
        key = Key(
            target.name, self.library.title, gpu.name, gpu.capability, ".".join(map(str, gpu.driver)) if device else ""
        )
        if problems := differences(self.bundle, engines, key):
            raise BundleError(
                f"{self.bundle.folder}: these engines cannot be used here ({'; '.join(problems)}); "
                f"build them again on this machine with `trol-edge build {self.bundle.folder}`"
            )
        if target.capabilities and device is not None and device.capability not in target.capabilities:
            raise BackendError(
                f"{device.name} has compute capability {device.capability}, but target {target.name} is for "
                f"{', '.join(target.capabilities)}; export for another target"
            )

    def _require_memory(self, device: Gpu | None) -> None:
        needed = self.weight_bytes + self.cache_bytes
        free, total = self.cuda.memory()
        if device is not None and device.integrated:
            free = max(
                free, available_memory() or 0
            )  # on such a board CUDA does not count memory that Linux could free, such as cached files
        if needed > free:
            raise BackendError(
                f"{self.bundle.folder}: needs {needed / 1e9:.2f} GB of GPU memory (K/V cache "
                f"{self.cache_bytes / 1e9:.2f}), but {free / 1e9:.2f} of {total / 1e9:.2f} are free; "
                "close other programs, or export with a lower precision or a smaller --context"
            )

    @property
    def takes_rotary(self) -> bool:
        """Whether the engines take the rope tables as inputs, so that a state may have tables of its own."""
        return self.weights.keys() >= set(TABLES)

    @property
    def takes_traversal(self) -> bool:
        """Whether each layer has engines of its own."""
        return self._built.by_layer

    @property
    def cache_ports(self) -> list[Port]:
        """The caches of a state: those of the first pass, then those of the second in the layers that have one."""
        return caches_of(self.bundle.manifest.graphs["traverse"], self.second_layers)

    @property
    def cache_bytes(self) -> int:
        """Bytes of one state's K/V cache: both sets, or the first and what is scratch for one layer of the second."""
        return state_bytes(self.bundle.manifest, self.second_layers, self.prefix_reuse)

    def _scratch_caches(self) -> dict[str, int]:
        """One pair of buffers for the second pass, under the names of all layers."""
        ports = [p for p in self.bundle.manifest.graphs["traverse"].inputs if p.name.startswith("past_second_")]
        kinds = {port.name.rpartition("_")[0]: port for port in ports}
        pair = [dataclasses.replace(port, name=kind) for kind, port in kinds.items()]
        found = self.memory.allocate(pair, "the second pass of one layer", self._lease)
        return {port.name: found[port.name.rpartition("_")[0]] for port in ports}

    @property
    def weight_bytes(self) -> int:
        """Bytes of the engines, and of the weights that they share."""
        engines = sum(engine.bytes for engine in self._built.engines.values())
        return engines + sum(tensor.nbytes for tensor in shared_weights(self.bundle).values())

    def encode_image(self, pixel_values: Float32) -> DeviceFeatures:
        """Encode pixel_values [N, 3, P, P] into image features [N, T, D] in device memory."""
        count, most = len(pixel_values), self.bundle.manifest.image.most_tiles
        shape = (count, self.spec.vision.tokens_per_image, self.spec.hidden_size)
        lease = self.memory.lease()
        port = Port("features", "float32", shape)
        with native, self.lock:
            pointer = self.memory.allocate([port], f"the features of {count} picture(s) or tile(s)", lease)["features"]
        features = DeviceFeatures(self, shape, pointer, lease)
        for start in range(0, count, most):
            part = np.ascontiguousarray(pixel_values[start : start + most], np.float32)
            rows = features[start]
            with native, self.lock:
                self.cuda.upload(self.shared["pixel_values"], part)
                self.loaded.run("vision", {"pixel_values": part.shape}, self.shared)
                self.cuda.copy(rows.pointer, self.shared["image_features"], len(part) * rows.nbytes)
                self.cuda.wait()  # `part` must live until the copy is done
        return features

    def traverse(
        self,
        cache: Mapping[str, int],
        embeddings: Float32,
        image_mask: NDArray[np.bool_] | None,
        rope_offset: int,
        start: int,
        pictures: Sequence[Placed],
    ) -> Float32:
        """Run both passes over embeddings [S, D] after `start` cached tokens; returns logits [V] of the last."""
        graph = self.bundle.manifest.graphs["traverse"]
        stop = start + len(embeddings)
        mask = np.zeros(len(embeddings), bool) if image_mask is None else image_mask
        given: dict[str, NDArray[Any]] = {
            "inputs_embeds": embeddings[None],
            "position_ids": self._slots[None, start:stop],
            "image_mask": mask[None, :, None],
            "rope_offset": np.array([rope_offset], np.int64),
        }
        feeds = {p.name: np.ascontiguousarray(given[p.name], p.dtype) for p in graph.inputs if p.name in given}
        dynamic = {p.name for p in graph.inputs if any(isinstance(d, str) for d in p.shape)}
        with native, self.lock:
            for name, array in feeds.items():
                self.cuda.upload(self.shared[name], array)
            kept = [self._place(placed) for placed in pictures]
            parts = {name: array for name, array in feeds.items() if name in dynamic}  # [1, S, ..]
            self.decoder.traverse({**self.shared, **cache}, parts, start, stop)
            self.cuda.download(self._logits, self.shared["logits"])
            self.cuda.wait()
            del kept
            return self._logits[0].astype(np.float32)

    def _place(self, placed: Placed) -> Any:
        """Enqueue the copy of image features among the embeddings; returns what must live until the stream is idle."""
        features, width = placed.features, self.spec.hidden_size * 4
        target, size = self.shared["inputs_embeds"] + placed.at * width, placed.count * width
        if isinstance(features, DeviceFeatures):
            if features.backend is not self:
                raise UsageError("these image features are in the memory of another Runtime; encode the picture here")
            self.cuda.copy(target, features.pointer + placed.first * width, size)
            return features
        rows = np.ascontiguousarray(features[placed.first : placed.first + placed.count], np.float32)
        self.cuda.upload(target, rows)
        return rows

    def new_state(self) -> TrtState:
        """Make empty K/V buffers for one sequence."""
        with native, self.lock:
            return TrtState(self)

    def run_cut(
        self, name: str, cuts: Collection[str], feeds: Mapping[str, NDArray[Any]], state: Any
    ) -> dict[str, NDArray[Any]] | None:
        """Engines are compiled, so they cannot be cut."""
        return None

    def require_open(self) -> None:
        """Raise BackendError after close, because a captured graph would use memory that was freed."""
        if not self._closing.alive:
            raise BackendError(f"{self.bundle.folder}: its engines have been closed; open the bundle again")

    def close(self) -> None:
        """Free all device and page-locked memory; states must not be used any more."""
        with self.lock:
            self._closing()


class TrtState:
    """The K/V buffers of one sequence, and a step that is bound to them once."""

    def __init__(self, backend: TrtBackend) -> None:
        self._backend = backend
        graphs, cuda = backend.bundle.manifest.graphs, backend.cuda
        caches = backend.cache_ports
        past = [p for p in caches if backend.prefix_reuse or not p.name.startswith("past_second_")]
        self._ports = {p.name: p for p in past}
        step = graphs["step"]
        own = [p for p in (*step.inputs, *step.outputs) if not p.name.startswith(("past_", "present_", "slots"))]
        new = [p for p in own if p.name.startswith("new_")]
        more = backend.decoder.step_ports
        self._lease = backend.memory.lease()
        what = f"a session ({'both K/V sets' if backend.prefix_reuse else 'one K/V set'} for {backend.context} tokens)"
        found = backend.memory.allocate((*past, *own, *more), what, self._lease)
        self._own = {p.name: found[p.name] for p in (*own, *more)}
        scratch = backend.scratch_caches
        self._cache = {p.name: found.get(p.name) or scratch[p.name] for p in caches}
        # Past and present are one buffer, because engines write in place.
        self._cache |= {name.replace("past_", "present_", 1): pointer for name, pointer in self._cache.items()}
        # Page-locked, so that copies are part of the captured graph, which reads and writes these addresses.
        shapes = {p.name: tuple(int(d) for d in p.shape) for p in own if p not in new}
        tables = shared_weights(backend.bundle)
        self._tables = [Port(t, "float32", tables[t].shape) for t in TABLES if t in tables]  # its own, see rope.py
        self._own |= backend.memory.allocate(self._tables, "rope tables", self._lease)
        for port in self._tables:
            cuda.copy(self._own[port.name], backend.shared[port.name], tables[port.name].nbytes)
        self._rope: RopeRows | None = None  # the tables on the host, from the first token that is not at its row on
        self._host = {p.name: cuda.pinned(shapes[p.name], p.dtype) for p in own if p not in new}
        self._new = copies(new, self._own, self._cache, backend.context)
        self._given = [p.name for p in step.inputs if p.name in self._host]
        rope = backend.spec.long_rope
        self._long_rows = rope.short_rows(backend.context) if rope else 0
        self._rope_offset = 0
        self.execution = backend.decoder.new_step({**backend.shared, **self._own, **self._cache})
        self._rows = 0  # that the next run reads
        self._runs = 0  # with this number of rows
        self._ran = False
        self._graph: Any = None

    def traverse(
        self,
        embeddings: Float32,
        image_mask: NDArray[np.bool_] | None,
        long_rope: bool = False,
        start: int = 0,
        pictures: Sequence[Placed] = (),
        rotary: NDArray[np.int64] | None = None,
    ) -> Float32:
        """See trol_edge.backend.State."""
        self._rope_offset = self._long_rows if long_rope else 0
        with native, self._backend.lock:
            self._place(start, len(embeddings), rotary)
        own = self._cache | {port.name: self._own[port.name] for port in self._tables}
        return self._backend.traverse(own, embeddings, image_mask, self._rope_offset, start, pictures)

    def step(self, embedding: Float32, position: int, rotary: int | None = None) -> Float32:
        """See trol_edge.backend.State; the returned array is overwritten by the next call."""
        with native, self._backend.lock:
            self._start(embedding, position, rotary)
            return self._logits()

    def step_token(self, embedding: Float32, position: int, rotary: int | None = None) -> int:
        """See trol_edge.backend.State; eight bytes are downloaded."""
        with native, self._backend.lock:
            self._start(embedding, position, rotary)
            self._finish()
            token = int(self._host["token"][0])
            return token if token >= 0 else best_token(self._logits())  # negative if a logit is not finite

    def _place(self, start: int, count: int, rotary: NDArray[np.int64] | int | None) -> None:
        """Let `count` rows from `start` on have the rotary embedding of these positions (None: of their rows).

        The lock must be held.
        """
        backend = self._backend
        if self._rope is None:
            if rotary is None:
                return
            tables = {port.name: np.empty([int(d) for d in port.shape], port.dtype) for port in self._tables}
            for name, table in tables.items():
                backend.cuda.download(table, backend.shared[name])
            backend.cuda.wait()
            self._rope = RopeRows(tables)
        first = self._rope_offset + start
        if self._rope.place(first, count, None if rotary is None else self._rope_offset + rotary):
            for name, table in self._rope.own.items():
                backend.cuda.upload(self._own[name] + first * table.strides[0], table[first : first + count])
            backend.cuda.wait()  # before the next call changes them

    def _start(self, embedding: Float32, position: int, rotary: int | None) -> None:
        """Enqueue a step."""
        backend = self._backend
        backend.require_open()
        self._place(position, 1, rotary)
        self._host["inputs_embeds"][0, 0] = embedding
        self._host["position_ids"][0, 0] = position
        if "rope_offset" in self._host:
            self._host["rope_offset"][0] = self._rope_offset
        self._read(min(backend.context, -(-(position + 1) // ROWS) * ROWS))
        # The first run of a shape is not captured, because TensorRT sets itself up in it.
        if self._graph is None and self._runs and backend.cuda_graphs:
            self._capture()
        if self._graph is not None:
            backend.cuda.launch(self._graph)
        else:
            self._enqueue()
        for copy in self._new:
            copy.enqueue(backend.cuda, position)
        self._runs += 1

    def _read(self, rows: int) -> None:
        """Let the next runs read this many rows of the cache."""
        if rows == self._rows:
            return
        if self._graph is not None:  # a graph may not run any more when its context has another shape
            self._lease.graphs.remove(self._graph)
            self._backend.cuda.drop(self._graph)
            self._graph = None
        self.execution.read(rows)
        self._rows, self._runs = rows, 0

    def _capture(self) -> None:
        """Make the step one CUDA graph, if TensorRT lets it."""
        backend = self._backend
        if not all(context.capturable(backend.cuda.stream) for context in self.execution.contexts.values()):
            return
        try:
            self._graph = backend.cuda.capture(self._enqueue)
            self._lease.graphs.append(self._graph)
        except BackendError as error:
            backend.cuda_graphs = False
            warnings.warn(f"steps run without a CUDA graph: {error}", RuntimeWarning, stacklevel=2)

    def _enqueue(self) -> None:
        cuda = self._backend.cuda
        for name in self._given:
            cuda.upload(self._own[name], self._host[name])
        self.execution.enqueue()
        cuda.download(self._host["token"], self._own["token"])

    def _logits(self) -> Float32:
        """Download the logits of the last step."""
        self._backend.cuda.download(self._host["logits"], self._own["logits"])
        self._finish()
        logits: Float32 = self._host["logits"][0].astype(np.float32, copy=False)
        return logits

    def _finish(self) -> None:
        self._backend.cuda.wait()
        if not self._ran:
            self._ran = True
            self._backend.loaded.keep_kernels()

    def copy_rows(self, source: Any, start: int, stop: int, which: int) -> None:
        """See trol_edge.backend.State. It makes one copy within the device per key or value head."""
        backend = self._backend
        with native, backend.lock:
            for name, port in self._ports.items():
                if name.startswith("past_second_") != bool(which):
                    continue
                _, heads, capacity, size = (int(d) for d in port.shape)
                row = size * np.dtype(port.dtype).itemsize
                for head in range(heads):
                    at = (head * capacity + start) * row
                    backend.cuda.copy(self._cache[name] + at, source._cache[name] + at, (stop - start) * row)
            backend.cuda.wait()
        if not which:
            self._rope_offset = source._rope_offset

    def rows(self, positions: NDArray[np.int32], which: int) -> list[Float32]:
        """See trol_edge.backend.State. Each buffer is downloaded as a whole."""
        backend, found = self._backend, []
        with native, backend.lock:
            for name, port in self._ports.items():
                if name.startswith("past_second_") == bool(which):
                    host = np.empty([int(d) for d in port.shape], port.dtype)
                    backend.cuda.download(host, self._cache[name])
                    backend.cuda.wait()
                    rows = host[0][:, positions].swapaxes(0, 1).reshape(len(positions), -1)
                    found.append(rows.astype(np.float32))
        return found


def _close(cuda: Cuda, loaded: Loaded) -> None:
    """Free all memory with all states and features, when the back end is closed or gone."""
    loaded.forget()
    cuda.close()


def _dtype(graph: GraphInfo, name: str) -> str:
    return next(p.dtype for p in (*graph.inputs, *graph.outputs) if p.name == name)


_: type[Backend] = TrtBackend  # lets type checkers confirm that it is one
