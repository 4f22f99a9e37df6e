"""The bundle, one folder with all that a robot needs. It has no pickles, and opening it executes nothing.

    bundle.json             this manifest: what the model is, and size and sha256 of every other file
    vision.onnx ...         graphs; their weights are inputs (target cpu) or point into the weights file
    weights.safetensors     every tensor of the checkpoint once, Linear weights transposed: in the checkpoint's dtype,
                            or quantized as the manifest's plan says, with their scales beside them
    tokenizer.json          for the `tokenizers` library; without it, token level only
    selftest.safetensors    results of the FP32 reference, see selftest.py; without it, nothing to verify against
    signatures.json         who signed it, see signature.py; not hashed
    verified-*.json         written by the robot, not hashed; says that this machine's numbers were right, see verify/

A bundle is written beside its final place and renamed when complete, so a folder with a bundle.json is complete.
"""

from __future__ import annotations

import dataclasses
import fnmatch
import hashlib
import json
import math
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from trol_edge.bundle.cache_scales import EIGHT_BITS, scale_name, scale_names, scale_shape
from trol_edge.bundle.costs import Costs, wrong_counts
from trol_edge.bundle.derived import INT8, INT8_SCALE, NBITS, NBITS_SCALE
from trol_edge.bundle.folder import digest_of, sha256_of, taken_back
from trol_edge.bundle.graph_file import GraphFile, read_graph
from trol_edge.bundle.graph_sizes import Work, work
from trol_edge.bundle.names import (
    EMBEDDING,
    EMBEDDING_SCALE,
    HEAD,
    KINDS,
    LAYERS,
    LISTED_FILES,
    MANIFEST,
    MIX,
    SINGLE,
    WEIGHTS,
    cache_name,
)
from trol_edge.bundle.precision import CalibrationInfo, Part, PrecisionPlan
from trol_edge.bundle.signature import PublicKey, bundle_statement, public_keys, require
from trol_edge.bundle.spec import ModelSpec, TraversalChoice
from trol_edge.bundle.strict import from_dict
from trol_edge.bundle.weights import FLOATS, TensorInfo, WeightsFile
from trol_edge.errors import BundleError, UsageError
from trol_edge.numeric import shown
from trol_edge.prompt.images import ImageSpec
from trol_edge.prompt.template import PromptSpec
from trol_edge.reading import (
    MOST_SHOWN,
    guard,
    is_plain_name,
    listing,
    printable,
    read_json_value,
    read_plain,
    stays_inside,
)
from trol_edge.rope import TABLES

FORMAT = "trol-edge-bundle"
# 2: traverse continues from a prefix (slots, and a cache of the second pass), and there is a plan of precisions
FORMAT_VERSION = 2


@dataclasses.dataclass(frozen=True)
class FileInfo:
    """The size in bytes and the sha256 (hex) of a file of the bundle."""

    bytes: int
    sha256: str


@dataclasses.dataclass(frozen=True)
class Port:
    """An input or output of a graph. A str in shape names a dynamic dimension."""

    name: str
    dtype: str
    shape: tuple[int | str, ...]


@dataclasses.dataclass(frozen=True)
class GraphInfo:
    """One graph: its file, its inputs and outputs, the weights it reads, its operators (type -> count).

    `constants` are those of `weights` that the graph file itself points into the weights file; the others are inputs.
    `costs` are the counts of a run; None in bundles made before there were counts.
    """

    file: str
    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]
    weights: tuple[str, ...]
    constants: tuple[str, ...]
    operators: dict[str, int]
    costs: Costs | None = None

    @property
    def gives_rows(self) -> bool:
        """Whether it gives the new rows of its caches as outputs, for its caller to copy into place."""
        return any(port.name.startswith("new_") for port in self.outputs)


@dataclasses.dataclass(frozen=True)
class Manifest:
    """The contents of `bundle.json`."""

    format: str
    format_version: int
    model: str  # "trol-1.8b", or the checkpoint folder's name
    created_by: str  # "trol-edge 0.1.0"
    target: (
        str  # "cpu": floating point weights are float32 graph inputs; "onnx": graphs read the weights file themselves
    )
    context: int  # capacity of the KV cache: tokens of prompt and answer together
    spec: ModelSpec
    prompt: PromptSpec
    image: ImageSpec
    graphs: dict[str, GraphInfo]
    files: dict[str, FileInfo]
    checkpoint: dict[str, str]  # origin of the weights: folder, identity
    tools: dict[str, str]  # versions of the tools that made it
    notes: tuple[str, ...]
    parts: dict[str, Part]  # vision, projector, embedding, decoder, low-rank, output layer
    plan: PrecisionPlan  # how each Linear is stored and computed
    calibration: CalibrationInfo | None  # origin of the scales; None: nothing was calibrated
    # How far this precision is from FP32 on the self-test, by kind of value (largest drift; "tokens" is the share of
    # equal best tokens); None without a self-test, or in bundles that recorded the FP32 reference itself.
    distance: dict[str, float] | None = None
    traversal: TraversalChoice | None = None  # how spec.traversed was chosen; None: it was given
    # The oldest version, such as "1.27", of a library that runs the graphs, if it is newer than what this version needs
    # at all.
    requires: dict[str, str] = dataclasses.field(default_factory=dict)

    def too_old(self, library: str, version: str) -> str:
        """Why a version of a library cannot run the graphs, in words; "" if nothing is known against it."""
        oldest = self.requires.get(library, "0")
        if tuple(map(int, re.findall(r"\d+", version)[:2])) >= tuple(map(int, oldest.split("."))):
            return ""
        return f"needs {library} {oldest} or newer (for 8-bit keys and values), and {version} is installed"

    @property
    def passes(self) -> str:
        """The layers, and which of them have a second pass, in words."""
        layers, twice, choice = self.spec.num_layers, self.spec.traversed, self.traversal
        text = f"{layers} layers x 2 passes"
        if twice is not None:
            text = f"{layers} layers, second pass in {len(twice)} ({', '.join(map(str, twice))})"
        if choice is None:
            return text
        return f"{text}, chosen on {choice.samples} samples: {choice.nats:.1e} nats, at most {choice.max_nats:.1e}"


# Bundles in which this process found no contradiction, by hash: the sizes of their graphs' tensors. Opening one again
# takes a fifth of the time.
_consistent: dict[tuple[str, str], dict[str, Work]] = {}
MOST_KEPT = 32


class Bundle:
    """An opened bundle folder, with the manifest and the paths of files whose size (and hash) have been checked.

    Every file is checked against the others: graphs against the manifest, and both against the weights file.
    Raises BundleError if the folder is missing, incomplete, altered, contradicts itself or is of another version.
    The weights file is hashed while it is loaded, all other files here.
    """

    def __init__(self, folder: str | os.PathLike[str], trusted_keys: Sequence[PublicKey] | None = None) -> None:
        """Open a bundle. trusted_keys: ed25519 public keys, one of which must have signed it; None accepts any."""
        with guard(shown(folder), UsageError, "give the folder of a bundle", "not a path"):
            self.folder = Path(folder)
        self.trusted_keys = () if trusted_keys is None else public_keys(trusted_keys)
        path = self.folder / MANIFEST
        with guard(self.folder, BundleError, "give the folder of a bundle"):
            if not path.exists() and not (taken_back(self.folder) and path.exists()):
                raise BundleError(
                    f"{str(self.folder)[:MOST_SHOWN]}: no {MANIFEST} here, so this is not a (complete) bundle; "
                    "make one with `make engine` or `trol-edge export`"
                )
            if not stays_inside(path):
                raise BundleError(f"{path}: is a link to a place outside the bundle; copy the bundle again")
        data = read_json_value(path)
        if not isinstance(data, dict) or data.get("format") != FORMAT:
            raise BundleError(f"{path}: not a trol-edge bundle; make one with `trol-edge export`")
        if data.get("format_version") != FORMAT_VERSION:
            raise BundleError(
                f"{path}: bundle format {data.get('format_version')!r:.80}, but this version reads format "
                f"{FORMAT_VERSION}; export the bundle again with this version"
            )
        self.identity = data.pop("manifest_sha256", None)  # hash of the manifest, and so of every file that it lists
        if self.identity != digest_of(data):
            raise BundleError(f"{path}: altered since export (its own hash differs); copy or export the bundle again")
        self.require_signed(bundle_statement(str(self.identity)), "it")
        with guard(path):
            self.manifest: Manifest = from_dict(Manifest, data, str(path))
        self.work: dict[str, Work] = {}  # graph -> the sizes of its tensors
        with guard(self.folder):
            self._require(_wrong_names(self.manifest), "export the bundle again")
            self._require(self._wrong_files(), "copy the bundle again")
            self._require(_wrong_numbers(self.manifest), "export the bundle again")
            if WEIGHTS in self.manifest.files:
                self._require_consistent()

    def _require(self, problems: Iterator[str], advice: str) -> None:
        found = list(problems)
        if found:
            raise BundleError(f"{self.folder}: {listing(found)}; {advice}")

    def _wrong_files(self) -> Iterator[str]:
        for name, info in self.manifest.files.items():
            path = self.folder / name
            if not stays_inside(path):
                yield f"{name} is a link to a place outside the bundle"
            elif not path.is_file():
                yield f"{name} is not a regular file" if path.exists() else f"{name} is missing"
            elif path.stat().st_size != info.bytes:
                yield f"{name} has {path.stat().st_size} bytes instead of {info.bytes}"
            elif name != WEIGHTS and not self.is_unaltered(name):
                yield f"{name} was altered (sha256 differs)"

    def _require_consistent(self) -> None:
        """Compare manifest, graphs and weights with each other, unless this process has done it with the same ones."""
        weights = self.weights()
        key = (str(self.identity), weights.header_sha256)
        if key not in _consistent:
            self._require(self._contradictions(weights.tensors), "export the bundle again")
            while len(_consistent) >= MOST_KEPT:
                _consistent.pop(next(iter(_consistent)), None)
            _consistent[key] = self.work
        self.work = _consistent.get(key, self.work)

    def _contradictions(self, tensors: dict[str, TensorInfo]) -> Iterator[str]:
        """Yield where manifest, graphs and weights contradict each other."""
        manifest = self.manifest
        yield from _wrong_weights(manifest, tensors)
        numbers = sum(2 * t.nbytes if t.dtype == "U8" else math.prod(t.shape) for t in tensors.values())
        for name, info in manifest.graphs.items():
            file = read_graph(self.folder / info.file, WEIGHTS, manifest.files[info.file].sha256)
            yield from _wrong_graph(name, info, file, tensors)
            try:
                tiles = manifest.image.most_tiles
                self.work[name] = work(name, file, manifest.spec, tiles, manifest.context, numbers)
            except ValueError as error:
                yield f"graph {printable(name)[:80]}: {error}"

    def require_signed(self, statement: bytes, what: str) -> None:
        """Raise BundleError if there are trusted keys, and none of them signed a statement about `what`."""
        require(self.folder, self.trusted_keys, statement, what)

    def path(self, name: str) -> Path:
        """The path of a file. Raises BundleError if the manifest does not list it."""
        if name not in self.manifest.files:
            raise BundleError(f"{self.folder}: the manifest lists no {name}; export the bundle again")
        return self.folder / name

    def is_unaltered(self, name: str) -> bool:
        """Whether a file has the hash that the manifest has of it. It is read as a whole."""
        return sha256_of(self.path(name)) == self.manifest.files[name].sha256

    def read(self, name: str) -> bytes:
        """The bytes of a file, which are those that the manifest has the hash of, whatever became of the file since."""
        data = read_plain(self.path(name), most=self.manifest.files[name].bytes)
        if hashlib.sha256(data).hexdigest() != self.manifest.files[name].sha256:
            raise BundleError(f"{self.folder}: {name} was altered (sha256 differs); copy the bundle again")
        return data

    def text(self, name: str) -> str:
        """The text of a file in UTF-8, which is the one that the manifest has the hash of (see `read`)."""
        with guard(self.path(name), BundleError, "copy or export the bundle again", "not readable as text"):
            return self.read(name).decode("utf-8-sig")

    def weights(self) -> WeightsFile:
        """Open the weights file; its header is read and checked."""
        return WeightsFile(self.path(WEIGHTS))


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write bundle.json with its own hash in it. It is written last."""
    data = dataclasses.asdict(manifest)
    if not data["spec"]["more_end_ids"]:
        del data["spec"]["more_end_ids"]  # so that versions that know only one end can read it, too
    if data["spec"]["traversed"] is None:
        del data["spec"]["traversed"]  # the same for versions that pass every layer twice
    if data["plan"]["embedding"] is None:
        del data["plan"]["embedding"]  # and for those that round no table
    if data["plan"]["kv"] is None:
        del data["plan"]["kv"]  # and for those whose caches have no scales
    if not data["requires"]:
        del data["requires"]
    if data["traversal"] is None:
        del data["traversal"]  # and for those that do not choose
    data = json.loads(json.dumps(data))  # tuples become lists before hashing, as a reader gets them
    data["manifest_sha256"] = digest_of(data)
    (folder / MANIFEST).write_text(json.dumps(data, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


# -- checks of a manifest against itself and against the files it lists ------------------------------------------------

# Largest values in a manifest, far above any model that exists, so that nothing of an absurd size is allocated.
MOST = {
    "context": 1 << 24,
    "max_position_embeddings": 1 << 24,
    "vocab_size": 1 << 22,
    "embedding_rows": 1 << 22,
    "num_layers": 1 << 10,
    "num_heads": 1 << 12,
    "num_kv_heads": 1 << 12,
    "hidden_size": 1 << 17,
    "intermediate_size": 1 << 20,
    "head_dim": 1 << 12,
    "lora_rank": 1 << 14,
    "image_size": 1 << 13,
    "patch_size": 1 << 10,
    "tokens_per_image": 1 << 16,
    "size": 1 << 13,
    "max_tiles": 64,
    "original_max_position_embeddings": 1 << 24,
}
_FROM_ZERO = ("lora_rank", "eos_token_id", "image_token_id")


def wrong_sizes(part: object, where: str) -> Iterator[str]:
    """Describe numbers of a spec that no model has: counts below 1 (or 0), or above MOST."""
    for field in dataclasses.fields(part):  # type: ignore[arg-type]
        value = getattr(part, field.name)
        if field.type == "int":
            least, most = 0 if field.name in _FROM_ZERO else 1, MOST.get(field.name, MOST["embedding_rows"])
            if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most:
                yield f"{where}{field.name} {value!r:.80} is not {least}..{most}"
        elif field.type == "float" and not (isinstance(value, float) and 0 < value < float("inf")):
            yield f"{where}{field.name} {value!r:.80} is not a number above 0"


def _wrong_names(manifest: Manifest) -> Iterator[str]:
    for name in manifest.files:
        if not is_plain_name(name) or not any(fnmatch.fnmatchcase(name, known) for known in LISTED_FILES):
            yield f"its manifest lists {printable(name)[:80]!r}, which is not the name of a bundle's file"
    for graph, info in manifest.graphs.items():
        if info.file not in manifest.files or not info.file.endswith(".onnx"):
            yield f"its manifest does not list {printable(info.file)[:80]!r}, the file of graph {printable(graph)[:80]}"


def _wrong_numbers(manifest: Manifest) -> Iterator[str]:
    spec, most = manifest.spec, MOST["context"]
    yield from wrong_sizes(spec, "spec.")
    yield from wrong_sizes(spec.vision, "spec.vision.")
    yield from wrong_sizes(manifest.image, "image.")
    if manifest.plan.compute not in ("fp32", "fp16"):
        yield f"plan.compute {manifest.plan.compute!r:.80} is neither fp32 nor fp16"
    if manifest.plan.kv not in (None, EIGHT_BITS):
        yield f"plan.kv {manifest.plan.kv!r:.80} is not {EIGHT_BITS}"
    if manifest.plan.kv and manifest.target != "cpu":
        yield f"plan.kv {manifest.plan.kv} is for target cpu, not for {printable(manifest.target)[:80]}"
    if manifest.plan.kv and "onnxruntime" not in manifest.requires:
        yield "requires no version of onnxruntime, which 8-bit keys and values do"
    for library, version in manifest.requires.items():
        if library != "onnxruntime" or not re.fullmatch(r"\d{1,4}\.\d{1,4}", version):
            yield f"requires {printable(library)[:80]} {printable(version)[:80]}, which names no version that is known"
    for name, linear in manifest.plan.linears.items():
        yield from (f"plan of {printable(name)[:80]}: {problem:.200}" for problem in linear.problems())
    if spec.long_rope is not None:
        yield from wrong_sizes(spec.long_rope, "spec.long_rope.")
    for name, info in manifest.graphs.items():
        if info.costs is not None and (wrong := list(wrong_counts(info.costs))):
            yield f"the costs of graph {printable(name)[:80]} have {', '.join(wrong)}"
    if not 2 <= manifest.context <= min(most, max(2, spec.max_position_embeddings)):
        yield f"context {manifest.context} is not 2..{spec.max_position_embeddings} (max_position_embeddings)"
    if not 1 <= manifest.prompt.tokens_per_image == spec.vision.tokens_per_image:
        counts = f"{manifest.prompt.tokens_per_image} in prompt, {spec.vision.tokens_per_image} in spec.vision"
        yield f"tokens_per_image differ: {counts}"
    if spec.traversed is not None and not (
        spec.traversed
        and sorted(set(spec.traversed)) == list(spec.traversed)
        and 0 <= spec.traversed[0] <= spec.traversed[-1] < spec.num_layers
    ):
        yield f"spec.traversed {str(spec.traversed)[:80]} is not a rising list of layers 0..{spec.num_layers - 1}"
    choice = manifest.traversal
    if choice is not None and not (
        0 <= choice.nats <= choice.max_nats < math.inf and 0 <= choice.same_top <= 1 and choice.samples > 0
    ):
        yield f"traversal has numbers that no measurement gives ({str(choice)[:200]})"
    if spec.num_heads % max(1, spec.num_kv_heads):
        yield f"{spec.num_heads} heads share {spec.num_kv_heads} of keys and values"
    for token in (spec.eos_token_id, *spec.more_end_ids, spec.image_token_id):
        if not 0 <= token < spec.embedding_rows:
            yield f"token {token} (an end, or a picture's) is not in 0..{spec.embedding_rows - 1} (rows of embeddings)"
    if spec.long_rope is not None:
        factors = (spec.long_rope.short_factor, spec.long_rope.long_factor)
        if any(len(f) != spec.head_dim // 2 or not min(f, default=0) > 0 for f in factors):
            yield f"long_rope does not have {spec.head_dim // 2} factors above 0 in each set"


def _ports_of(manifest: Manifest) -> dict[str, tuple[int | str, ...]]:
    """Beginnings of ports' names, and their shapes by the spec; "" stands for any size."""
    spec, side = manifest.spec, manifest.image.size
    cache = (1, spec.num_kv_heads, manifest.context, spec.head_dim)
    return {
        "pixel_values": ("", 3, side, side),
        "image_features": ("", spec.vision.tokens_per_image, spec.hidden_size),
        "inputs_embeds": (1, "", spec.hidden_size),
        "hidden_": (1, "", spec.hidden_size),
        "first": (1, "", spec.hidden_size),
        "second": (1, "", spec.hidden_size),
        "mixed": (1, "", spec.hidden_size),
        "logits": (1, spec.vocab_size),
        "past_": cache,
        "present_": cache,
        "new_": (1, spec.num_kv_heads, "", spec.head_dim),
    }


def _wrong_weights(manifest: Manifest, tensors: dict[str, TensorInfo]) -> Iterator[str]:
    """Yield where manifest and weights file contradict each other."""
    spec = manifest.spec
    if EMBEDDING in tensors and tensors[EMBEDDING].shape != (spec.embedding_rows, spec.hidden_size):
        found = list(tensors[EMBEDDING].shape)
        yield f"its {EMBEDDING} is {found} instead of [{spec.embedding_rows}, {spec.hidden_size}]"
    words, scale = tensors.get(EMBEDDING), tensors.get(EMBEDDING_SCALE)
    if manifest.plan.embedding or (words and words.dtype not in FLOATS):
        form = ("I8", "F32", (spec.embedding_rows,))
        if not words or not scale or (words.dtype, scale.dtype, scale.shape) != form:
            yield f"its {EMBEDDING} does not have 8 bits and a scale for each row"
    rows = manifest.context + (spec.long_rope.short_rows(manifest.context) if spec.long_rope else 0)
    for table in TABLES:
        if table in tensors and tensors[table].shape != (rows, spec.head_dim // 2):
            yield f"its {table} is {list(tensors[table].shape)} instead of [{rows}, {spec.head_dim // 2}]"
    for name in scale_names(spec) if manifest.plan.kv else ():
        scales = tensors.get(name)
        if scales is None or (scales.dtype, scales.shape) != ("F32", scale_shape(spec)):
            yield f"it has no {name}, float32 {list(scale_shape(spec))}, for 8-bit keys and values"
    tower = spec.vision
    patches = (tower.image_size // tower.patch_size) ** 2
    for name, rows in {
        "decoder.layers.0.out.weight": spec.num_heads * spec.head_dim,
        "decoder.layers.0.mlp.down.weight": spec.intermediate_size,
        "vision.layers.0.out.weight": tower.hidden_size,
        "vision.layers.0.fc2.weight": tower.intermediate_size,
    }.items():
        linear = _weight(name, tensors) or _weight(name + INT8, tensors)
        if not linear or linear[0] != rows:
            yield f"its {name} has {linear[0] if linear else 'no'} inputs instead of {rows}"
    positions = tensors.get("vision.positions")
    if positions is None or positions.shape[-2] not in (patches, patches + 1):
        yield f"its vision.positions is not for {patches} patches"
    wanted = _ports_of(manifest)
    for name in ("vision", "traverse", "step", *(SINGLE if SINGLE & manifest.graphs.keys() else ())):
        if name not in manifest.graphs:
            yield f"its manifest lists no graph {name}"
    if manifest.graphs.keys() >= SINGLE:
        yield from _wrong_passes(manifest)
    for name, info in manifest.graphs.items():
        for port in (*info.inputs, *info.outputs):
            shape = next((shape for start, shape in wanted.items() if port.name.startswith(start)), port.shape)
            if len(shape) != len(port.shape) or any(b not in ("", a) for a, b in zip(port.shape, shape, strict=True)):
                yield f"{port.name} of graph {name} is {list(port.shape)} instead of {list(shape)}"
        layers = sum(port.name.startswith("past_key") for port in info.inputs)
        passes = spec.num_layers + (len(spec.second_layers) if name not in ("step", LAYERS) else 0)
        past = sum(port.name.startswith("past_") for port in info.inputs)
        if past != (2 * passes if name in ("step", "traverse", "traverse_text", LAYERS) else 0):
            yield f"graph {name} has {past} inputs for the cache of {spec.num_layers} layers, {layers} of keys"
        if manifest.plan.kv:
            odd = [port for port in info.inputs if port.name.startswith("past_") and port.dtype != EIGHT_BITS]
            lacking = {scale_name(port.name) for port in info.inputs if port.name.startswith("past_")}
            lacking -= set(info.weights)
            if odd or lacking:
                yield f"graph {name} does not keep keys and values in 8 bits with their scales, as its plan says"
        elif any(port.dtype == EIGHT_BITS for port in info.inputs):
            yield f"graph {name} has inputs in 8 bits, which its plan does not say"
        caches, new = _caches(info.inputs, "past_"), _caches(info.outputs, "new_")
        if _caches(info.outputs, "present_") != caches:
            yield f"graph {name} does not have an output present_* for each input past_*, of its name and type"
        lengths = {port.shape[2] for port in info.outputs if port.name.startswith("new_") and len(port.shape) == 4}
        if new and (new != caches or lengths != {1 if name == "step" else "tokens"}):
            counted = printable(str(lengths))[:80]
            yield (
                f"graph {name} has {len(new)} outputs new_* of {counted} rows; it may have one for each input past_*, "
                f"of its type, with a row for each token"
            )


def _wrong_passes(manifest: Manifest) -> Iterator[str]:
    """Yield which ports graphs of single passes lack."""
    layers = range(manifest.spec.num_layers)
    inputs = {HEAD: {"inputs_embeds"}, MIX: {"first", "second"}, LAYERS: {"inputs_embeds", "position_ids", "slots"}}
    outputs = {HEAD: {"logits"}, MIX: {"mixed"}, LAYERS: {f"hidden_{i}" for i in layers}}
    inputs[LAYERS] |= {cache_name("past", kind, i, 0) for kind in KINDS for i in layers}
    outputs[LAYERS] |= {cache_name("present", kind, i, 0) for kind in KINDS for i in layers}
    for name, info in manifest.graphs.items():
        for wanted, ports in ((inputs, info.inputs), (outputs, info.outputs)):
            if lacking := wanted.get(name, set()) - {port.name for port in ports}:
                yield f"graph {name} has no port {min(lacking)}"


def _caches(ports: Sequence[Port], start: str) -> dict[str, str]:
    """What follows a beginning in the names of ports -> their types."""
    return {port.name.removeprefix(start): port.dtype for port in ports if port.name.startswith(start)}


def _weight(name: str, tensors: dict[str, TensorInfo]) -> tuple[int, ...] | None:
    """The shape of a weight as a graph reads it, stored or derived; None if the weights file lacks it."""
    if name in tensors:
        return tensors[name].shape
    packed = tensors.get(name.removesuffix(INT8).removesuffix(INT8_SCALE) + NBITS)
    scale = tensors.get(name.removesuffix(INT8).removesuffix(INT8_SCALE) + NBITS_SCALE)
    if packed is None or scale is None or len(packed.shape) != 3 or not name.endswith((INT8, INT8_SCALE)):
        return None
    channels, blocks, half = packed.shape
    if scale.shape != (channels * blocks,):
        return None
    return (blocks * half * 2, channels) if name.endswith(INT8) else (channels,)


def _wrong_graph(name: str, info: GraphInfo, file: GraphFile, tensors: dict[str, TensorInfo]) -> Iterator[str]:
    """Yield where a graph file contradicts the manifest or the weights file."""
    if info.operators != file.operators:
        yield f"{info.file} has other operators than the manifest says"
    weights = {w for w in info.weights if w not in info.constants}
    for what, listed, read in (("inputs", info.inputs, file.inputs), ("outputs", info.outputs, file.outputs)):
        ports = {port.name: (port.dtype, port.shape) for port in listed}
        there = {n: port for n, port in read.items() if n not in weights or what == "outputs"}
        names = ports.keys() | (there.keys() if what == "inputs" else set())  # further outputs do no harm
        if different := sorted(n for n in names if ports.get(n) != there.get(n)):
            yield f"{info.file} has other {what} than the manifest says ({printable(different[0])[:80]})"
    if lacking := [w for w in info.weights if _weight(w, tensors) is None]:
        yield f"{WEIGHTS} lacks {', '.join(printable(w)[:80] for w in lacking[:5])}"
    for weight in sorted(weights & file.inputs.keys()):
        shape = _weight(weight, tensors)
        if shape is not None and shape != file.inputs[weight][1]:
            found = f"{list(file.inputs[weight][1])} in {info.file} and {list(shape)} in {WEIGHTS}"
            yield f"{printable(weight)[:80]} is {found}"
    if absent := sorted(weights - file.inputs.keys()):
        yield f"{info.file} has no input for the weight {printable(absent[0])[:80]}"
    for weight, (offset, length) in file.outside.items():
        tensor = tensors.get(weight)
        if tensor is None or (tensor.offset, tensor.nbytes) != (offset, length):
            yield f"{info.file} reads {printable(weight)[:80]} where {WEIGHTS} does not have it"
