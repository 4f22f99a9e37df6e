"""Builds a bundle's engines from its graphs into `engines/TARGET/`, for TensorRT and TensorRT for RTX.

Before anything is parsed, the operators are checked against what this TensorRT supports. Before anything is built, it
is checked that every input is read, and that the layers compute in the types that the bundle asks for. Afterwards it is
checked that the engine multiplies in these types, where its file says so, and that it fits the memory of its target.
Engines of classic TensorRT are built on the GPU that runs them. A decoder is built as a whole, which is two engines, or
by layer. Then every engine that is finished is kept, so that a build that was killed goes on after it.
"""

from __future__ import annotations

import dataclasses
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from trol_edge._version import __version__
from trol_edge.bundle.engines import (
    ENGINES,
    FORMAT_VERSION,
    GIVEN,
    PART,
    EngineInfo,
    EngineSet,
    Key,
    Range,
    differences,
    folder_of,
    left_out,
    names_of,
    read,
    write,
)
from trol_edge.bundle.folder import digest_of, new_folder, sha256_of, unfinished_folder
from trol_edge.bundle.layer_graphs import HIDDEN, QUERY, Parts
from trol_edge.bundle.manifest import Bundle, GraphInfo
from trol_edge.bundle.names import WEIGHTS
from trol_edge.bundle.program_counts import ProgramCounts
from trol_edge.bundle.programs import counts_of
from trol_edge.bundle.sizes import build_bytes, cache_bytes, engine_weight_bytes, shared_weights, shares_matrices
from trol_edge.bundle.targets import Target, is_gpu, refusals
from trol_edge.bundle.targets import target as target_of
from trol_edge.errors import BackendError, BundleError, UsageError
from trol_edge.machine.identity import available_memory
from trol_edge.program import text
from trol_edge.program.model import Program
from trol_edge.runtimes.cuda import Gpu, devices
from trol_edge.runtimes.trt.api import Library, Network, Shape, load
from trol_edge.runtimes.trt.begun import Begun
from trol_edge.runtimes.trt.products import require_products

SHORT = 64  # length of a follow-up question in tokens; longer chunks use the second profile
COUNTED = ("MATRIX_MULTIPLY", "CONVOLUTION", "DEQUANTIZE", "QUANTIZE", "ATTENTION_INPUT")

Progress = Callable[[str, int, int], None]  # (what, done, total)


@dataclasses.dataclass(frozen=True)
class Build:
    """The result of a build.

    reason: why it was done, or why not ("up to date"). form: why by layer, if that was chosen.
    """

    engines: EngineSet
    folder: Path
    built: bool
    reason: str
    form: str = ""


def build(
    bundle: Bundle,
    target: str | None = None,
    *,
    memory_bytes: int | None = None,
    workspace_bytes: int | None = None,
    force: bool = False,
    by_layer: bool | None = None,
    library: Library | None = None,
    progress: Progress = lambda what, done, total: None,
) -> Build:
    """Add engines for a target (default: the bundle's own) to a bundle, unless its present ones are still valid.

    by_layer: one engine for each decoder layer, which is on the device once, and not two for the whole decoder. None
    chooses it on a board where whole engines would leave less than half of the memory free.
    memory_bytes: memory of the device, which engines and K/V cache must fit (default: that of the GPU found, if it is
    to run them). workspace_bytes: most scratch memory of one layer. library: TensorRT to use instead of importing the
    target's.
    Raises BackendError (no TensorRT, no GPU although one is needed, refused, too large) and BundleError.
    """
    entry = target_of(target or bundle.manifest.target)
    if not entry.gpu:
        raise BundleError(
            f"{bundle.folder}: made for target {entry.name}, which needs no engines; "
            "export with --target rtx (desktop) or jetson-jp6, jetson-jp7, jetson-trt11, tensorrt"
        )
    if not is_gpu(bundle.manifest.target):
        raise BundleError(
            f"{bundle.folder}: its graphs were made for target {bundle.manifest.target!r}; "
            f"export with --target {entry.name}"
        )
    library = library or load(entry.module)
    found = devices()
    device = found[0] if isinstance(found, list) else None
    key = key_here(entry, library, device)
    if memory_bytes is None and device is not None and not entry.rtx:
        memory_bytes = device.memory_bytes
    form = why_by_layer(bundle, device, memory_bytes) if by_layer is None else ""
    by_layer = bool(form) if by_layer is None else by_layer
    if by_layer and shares_matrices(bundle):
        raise UsageError(
            f"{bundle.folder}: exported with --shared-weights, which engines by layer have no use for, because each "
            "holds its own weights once; export it without, or build with --engines whole"
        )
    reason = why(bundle, key, by_layer) if not force else "asked for"
    final = folder_of(bundle, entry.name)
    if reason is None:
        return Build(read(bundle, entry.name), final, False, "up to date", form)
    _require_unaltered(bundle)
    weights, maker = bundle.manifest.files[WEIGHTS].sha256, f"trol-edge {__version__}"
    job = Job(bundle, library, workspace_bytes, progress)
    with new_folder(final, overwrite=True, ours=("*",)) as part:
        infos: dict[str, EngineInfo] = {}
        if by_layer:
            of = digest_of([dataclasses.asdict(key), _read_by(bundle), workspace_bytes, maker])
            with unfinished_folder(final) as kept:
                begun = Begun(kept, of, start_again=force)
                for name, graph in _parts(bundle):
                    infos[name] = begun.found(name) or begun.keep(name, job.build(name, graph, kept))
                    _require_memory(bundle, entry, infos, memory_bytes)
                begun.move(infos.values(), part)
        else:
            for name in ENGINES:
                infos[name] = job.build(name, Source.of(bundle, name), part)
                _require_memory(bundle, entry, infos, memory_bytes)
        _require_unaltered(bundle)
        engines = EngineSet(FORMAT_VERSION, maker, key, precision_of(bundle), weights, infos)
        write(part, engines)
    return Build(engines, final, True, reason, form)


def why_by_layer(bundle: Bundle, device: Gpu | None, memory_bytes: int | None) -> str:
    """Why engines by layer are better on a device; "" if whole ones are, or are the only ones that can be built.

    They are on a board, which shares its memory with the system, unless whole engines and the K/V cache take at most
    half of it. Their scratch memory, which is known only when they are built, is not counted.
    """
    if device is None or not device.integrated or memory_bytes is None or shares_matrices(bundle):
        return ""
    graphs = bundle.manifest.graphs
    weights = sum(engine_weight_bytes(bundle, graphs[name].constants) for name in ENGINES)
    needed = weights + cache_bytes(graphs["traverse"].inputs, bundle.manifest.context)
    if needed <= memory_bytes / 2:
        return ""
    try:
        Parts(bundle)
    except BundleError:
        return ""  # its passes do not compute alike
    return (
        f"engines by layer, because whole ones and the K/V cache would take {needed / 1e9:.2f} GB of the "
        f"{memory_bytes / 1e9:.2f} GB that this board shares with its system; --engines whole builds them anyway"
    )


def _read_by(bundle: Bundle) -> list[tuple[str, int, int, int]]:
    """What TensorRT reads: the hashes of files, and which they are on this disk since when.

    No other disk has the same. So a bundle from elsewhere cannot bring engines that a build here would go on with.
    """
    files = [WEIGHTS, *(bundle.manifest.graphs[name].file for name in ENGINES)]
    states = [(bundle.folder / file).stat() for file in files]
    hashes = [bundle.manifest.files[file].sha256 for file in files]
    return [(sha256, s.st_dev, s.st_ino, s.st_ctime_ns) for sha256, s in zip(hashes, states, strict=True)]


@dataclasses.dataclass(frozen=True)
class Source:
    """What an engine is built from: a file of the bundle, or a part that was cut from it (model; None: the file)."""

    path: Path
    info: GraphInfo
    model: bytes | None = None

    @classmethod
    def of(cls, bundle: Bundle, name: str) -> Source:
        """A graph of the bundle."""
        info = bundle.manifest.graphs[name]
        return cls(bundle.path(info.file), info)


def _parts(bundle: Bundle) -> Iterator[tuple[str, Source]]:
    """Vision, and the parts of the decoder one after the other."""
    parts = Parts(bundle)
    for name in names_of(bundle, by_layer=True):
        if name in bundle.manifest.graphs:
            yield name, Source.of(bundle, name)
        else:
            part = parts.cut(name)
            yield name, Source(bundle.path(part.info.file), part.info, part.model)


def _require_unaltered(bundle: Bundle) -> None:
    """Raise BundleError if what TensorRT reads is not what was exported: weights and graphs, which it opens itself.

    A self-test sees no single wrong number inside an engine. So it is made sure that none came from the files.
    """
    for file in (WEIGHTS, *(bundle.manifest.graphs[name].file for name in ENGINES)):
        if not bundle.is_unaltered(file):
            raise BundleError(
                f"{bundle.folder}: {file} was altered since export (sha256 differs), so no engines were built from it; "
                "copy the bundle again"
            )


def key_here(target: Target, library: Library, device: Gpu | None) -> Key:
    """The key to which engines built here and now are bound."""
    if not target.serves(library.version):
        raise BackendError(
            f"target {target.name} is for {target.library}, but {library.title} is installed; "
            "choose another target (`trol-edge targets` lists those that this machine can build)"
        )
    if target.rtx:
        return Key(target.name, library.title, "", "", "")
    if device is None:
        return Key(target.name, library.title, "", "", "")
    if target.capabilities is not None and device.capability not in target.capabilities:
        raise BackendError(
            f"target {target.name} is for GPUs of compute capability {' and '.join(target.capabilities)}, but this "
            f"machine has {device.name} ({device.capability}); choose another target"
        )
    return Key(target.name, library.title, device.name, device.capability, ".".join(map(str, device.driver)))


def why(bundle: Bundle, key: Key, by_layer: bool = False) -> str | None:
    """Why engines must be built, or None if those in the bundle are valid."""
    try:
        engines = read(bundle, key.target)
    except BundleError as error:
        return str(error)
    if engines.by_layer != by_layer:
        return f"built {'by layer' if engines.by_layer else 'whole'}, and now {'by layer' if by_layer else 'whole'}"
    folder = folder_of(bundle, key.target)
    for engine in engines.engines.values():
        path = folder / engine.file
        if not path.is_file() or path.stat().st_size != engine.bytes:
            return f"{engine.file} is missing or truncated"
    return "; ".join(differences(bundle, engines, key)) or None


def precision_of(bundle: Bundle) -> str:
    """The recipe that a bundle was exported with: fp32, fp16, int8, int4, fp8 or the name of a mixed one."""
    return bundle.manifest.plan.recipe


def compute_type(bundle: Bundle) -> str:
    """float32 or float16: the type that a bundle's graphs compute in."""
    return {"fp16": "float16", "fp32": "float32"}[bundle.manifest.plan.compute]


def profiles(bundle: Bundle, graph: GraphInfo) -> tuple[dict[str, Range], ...]:
    """The ranges of a graph's dynamic dimensions, one entry per optimization profile; empty if it has none."""
    context, tiles = bundle.manifest.context, bundle.manifest.image.most_tiles
    names = {d for port in graph.inputs for d in port.shape if isinstance(d, str)}
    if not names:
        return ()
    if names == {"images"}:
        return ({"images": (1, tiles, tiles)},)
    if not names <= {"tokens", "slots"}:
        raise BundleError(f"{bundle.folder}: {graph.file} has unknown dynamic dimensions {sorted(names)}")
    if names == {"slots"}:
        return ({"slots": (1, max(1, context // 2), context)},)
    inputs = {port.name for port in graph.inputs}
    of_layer = bool({HIDDEN, QUERY} & inputs)
    gives = graph.gives_rows or (of_layer and bundle.manifest.graphs["traverse"].gives_rows)
    most = min(context, GIVEN if gives else context, PART if of_layer else context)
    short = min(SHORT, most)
    ranges = [(1, max(1, short // 2), short)]
    if HIDDEN in inputs:  # it has weights, and two profiles would hold them twice
        short = most
        ranges = [(1, most, most)]
    if most > short:
        ranges.append((short + 1, max(short + 1, most // 2 if most == context else most), most))
    found: list[dict[str, Range]] = []
    for tokens in ranges:
        slots = (tokens[0], max(tokens[1], context // 2), context)
        found.append({n: r for n, r in (("tokens", tokens), ("slots", slots)) if n in names})
    return tuple(found)


def shapes_of(graph: GraphInfo, ranges: Mapping[str, Range]) -> dict[str, tuple[Shape, Shape, Shape]]:
    """The smallest, best and largest shape of every input with a dynamic dimension."""
    found = {}
    for port in graph.inputs:
        if any(isinstance(d, str) for d in port.shape):
            sizes = [tuple(d if isinstance(d, int) else ranges[d][i] for d in port.shape) for i in range(3)]
            found[port.name] = (sizes[0], sizes[1], sizes[2])
    return found


@dataclasses.dataclass(frozen=True)
class Job:
    """What is alike for all engines of a build."""

    bundle: Bundle
    library: Library
    workspace_bytes: int | None
    progress: Progress

    def build(self, name: str, source: Source, folder: Path) -> EngineInfo:
        """Build one engine into a folder."""
        bundle, library, graph = self.bundle, self.library, source.info
        if problems := refusals(graph.operators, library.version, library.rtx):
            raise BackendError(
                f"{bundle.folder}: {graph.file}: {'; '.join(problems)}; export with the target of this machine's "
                "TensorRT (`trol-edge targets` says which)"
            )
        start = time.perf_counter()
        self.progress(f"{name}: parse", 0, 1)
        network = parse(library, source.path, graph, source.model)
        self.progress(f"{name}: parse", 1, 1)
        if unused := network.unused_inputs():
            raise BackendError(
                f"{graph.file}: {library.title} would ignore the input(s) {', '.join(unused)}, so its answers would be "
                "wrong; please report this"
            )
        _require_room(bundle, graph)
        layers = count_layers(network)
        require_precision(bundle, graph, layers)
        ranges = profiles(bundle, graph)
        file = f"{name}.engine"
        network.build(
            folder / file,
            [shapes_of(graph, r) for r in ranges],
            self.workspace_bytes,
            lambda phase, done, steps: self.progress(f"{name}: {phase}", done, steps),
        )
        programs = _programs(library, folder / file)
        products = require_products(bundle, graph, programs, ranges)
        return EngineInfo(
            file=file,
            bytes=(folder / file).stat().st_size,
            sha256=sha256_of(folder / file),
            graph_sha256=bundle.manifest.files[graph.file].sha256,
            weight_bytes=engine_weight_bytes(bundle, graph.constants),
            layers=layers,
            profiles=ranges,
            seconds=time.perf_counter() - start,
            programs=_counts(bundle, graph, programs, ranges),
            products=products,
        )


def parse(library: Library, path: Path, graph: GraphInfo, model: bytes | None = None) -> Network:
    """Read a graph into the network of its engine. model: a part that was cut from it. Raises BackendError."""
    network = library.parse(path, model)
    network.leave_out(left_out(graph))
    return network


def _programs(library: Library, path: Path) -> tuple[Program, ...]:
    """The programs of an engine, if its file says them; the inspector of classic TensorRT would have to load it."""
    try:
        return text.read(path) if library.rtx else ()
    except BundleError:
        return ()


def _counts(
    bundle: Bundle, graph: GraphInfo, programs: tuple[Program, ...], ranges: tuple[dict[str, Range], ...]
) -> tuple[ProgramCounts, ...]:
    """What an engine with these programs moves; empty if they do not say."""
    context = bundle.manifest.context
    try:
        return counts_of(graph, context, programs, ranges, shared_weights(bundle)) if programs else ()
    except (BundleError, UsageError):
        return ()


def _require_room(bundle: Bundle, graph: GraphInfo) -> None:
    """Raise BackendError if building would exhaust this machine's memory, because it would be killed silently."""
    needed, free = build_bytes(engine_weight_bytes(bundle, graph.constants)), available_memory(swap=True)
    if free is not None and needed > free:
        raise BackendError(
            f"{graph.file}: building its engine takes about {needed / 1e9:.1f} GB of memory, but {free / 1e9:.1f} GB "
            "are available here; close other programs, add swap, or export with a lower --precision"
        )


def count_layers(network: Network) -> dict[str, int]:
    """Count layers that multiply or change precision, by kind and type of their first input."""
    kinds = Counter(f"{x.kind} {x.inputs[0]}" for x in network.layers() if x.kind in COUNTED and x.inputs)
    return dict(sorted(kinds.items()))


def require_precision(bundle: Bundle, graph: GraphInfo, layers: Mapping[str, int]) -> None:
    """Raise BackendError if the network does not compute in the precision asked for.

    MATRIX_MULTIPLY layers must be of the type that the bundle computes in (others only where its plan keeps some in
    FP32), and every DequantizeLinear of the graph must have become a layer.
    """
    asked, precision = compute_type(bundle), precision_of(bundle)
    products = {kind.split()[1]: n for kind, n in layers.items() if kind.startswith("MATRIX_MULTIPLY")}
    allowed = {asked, "float32"} if bundle.manifest.plan.kept_fp32 else {asked}
    alone = bool(bundle.manifest.plan.kept_fp32) and graph.operators.get("MatMul") == 1  # the gate's may be kept
    some = bool(products.get(asked)) or (alone and bool(products)) or not graph.constants  # attention has no weights
    if not some or not set(products) <= allowed:
        raise BackendError(f"{graph.file}: {precision} asks for products in {asked}, the network has {products}")
    wanted = graph.operators.get("DequantizeLinear", 0)
    found = {kind.split()[1]: n for kind, n in layers.items() if kind.startswith("DEQUANTIZE")}
    if sum(found.values()) != wanted:
        raise BackendError(f"{graph.file}: {wanted} DequantizeLinear in the graph, the network has {found}")


def _require_memory(bundle: Bundle, target: Target, infos: Mapping[str, EngineInfo], memory_bytes: int | None) -> None:
    """Raise BackendError if engines and K/V cache are larger than the device's memory."""
    if memory_bytes is None:
        return
    engines = sum(info.bytes for info in infos.values())
    cache, shared = (
        cache_bytes(bundle.manifest.graphs["traverse"].inputs, bundle.manifest.context),
        sum(tensor.nbytes for tensor in shared_weights(bundle).values()),
    )
    if engines + shared + cache > memory_bytes:
        is_shared = shares_matrices(bundle)
        weights = f", the weights that they share {shared / 1e9:.2f} GB" if is_shared else ""
        sharing = ", with --shared-weights" if not is_shared and bundle.manifest.plan.can_share_weights else ""
        raise BackendError(
            f"{bundle.folder}: engines {', '.join(infos)} take {engines / 1e9:.2f} GB{weights} and the K/V cache "
            f"{cache / 1e9:.2f} GB, together {(engines + shared + cache) / 1e9:.2f}; the memory of target "
            f"{target.name} is {memory_bytes / 1e9:.2f} GB; export with a lower --precision{sharing} or a smaller "
            "--context"
        )
