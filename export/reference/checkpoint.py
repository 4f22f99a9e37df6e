"""Reads a published TroL checkpoint folder. Every tensor is checked before any work starts; none is held in memory.

config.json                    sizes (Hugging Face names)
model.safetensors              or model-00001-of-0000N.safetensors + model.safetensors.index.json,
                               or pytorch_model.bin (older revisions)
trol_gating.pt                 the gate, one Linear repeated per layer (or trol_gating.safetensors)
clip_vision_config.json        optional; without it, CLIP ViT-L/14-336
generation_config.json         optional; its eos_token_id wins, as in the authors' code
tokenizer.json                 or tokenizer.model, added_tokens.json and tokenizer_config.json; optional: without
                               a tokenizer the bundle serves the token level only
"""

from __future__ import annotations

import dataclasses
import fnmatch
import hashlib
import logging
import os
import pickle
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from trol_edge.bundle.folder import sha256_of
from trol_edge.bundle.manifest import wrong_sizes
from trol_edge.bundle.names import MANIFEST
from trol_edge.bundle.spec import ModelSpec
from trol_edge.errors import CheckpointError
from trol_edge.export.reference import internlm2, phi3, tokenizer
from trol_edge.export.reference.config import end_tokens
from trol_edge.export.reference.family import Family, Source
from trol_edge.reading import (
    guard,
    is_plain_name,
    listing,
    open_plain,
    printable,
    read_json,
    reason,
    require_itself,
    stays_inside,
)

log = logging.getLogger(__name__)

FAMILIES: tuple[Family, ...] = (internlm2.FAMILY, phi3.FAMILY)
FLOATS = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32}
# Rows are read in blocks of at most this many bytes, so that peak memory does not grow with the largest tensor.
BLOCK_BYTES = 64 << 20
# Names of the files that are opened; an index may name further shards.
FILES = ("*config.json", "model.safetensors*", "pytorch_model.bin*", "trol_gating.*", "tokenizer*", "added_tokens.json")


@dataclasses.dataclass(frozen=True)
class Entry:
    """One tensor of the checkpoint: the file that holds it, and its name and type there."""

    file: Path
    key: str  # name inside the file
    shape: tuple[int, ...]
    dtype: str  # safetensors name: "F16", "BF16", "F32", ...


class Checkpoint:
    """An opened checkpoint folder. Raises a CheckpointError that lists everything that is wrong with it.

    `spec` and `family` describe the model, `parameters` maps each parameter name to (Source, Entry),
    `notes` holds remarks that a user should see (for example gates that differ between layers).
    """

    def __init__(self, folder: str | os.PathLike[str], family: str | None = None) -> None:
        self.folder = Path(folder)
        with guard(self.folder, CheckpointError, "give the folder that holds config.json"):
            if not self.folder.is_dir():
                raise CheckpointError(f"{self.folder}: no such folder; give the folder that holds config.json")
            if not (self.folder / "config.json").exists() and (what := _another_folder(self.folder)):
                raise CheckpointError(f"{self.folder}: {what}")
            if outside := [p.name for p in sorted(self.folder.iterdir()) if _is_read(p.name) and not stays_inside(p)]:
                raise CheckpointError(_outside(self.folder, outside))
        self.notes: list[str] = []
        self._pickles: dict[Path, dict[str, Tensor]] = {}
        config = self._json("config.json")
        self.family = _detect(config, self.folder)
        if family is not None and family != self.family.name:
            raise CheckpointError(f"{self.folder}: this is a {self.family.name} checkpoint, not {family}; check MODEL=")
        entries = self._entries()
        clip = self._json("clip_vision_config.json", required=False)
        advice = "copy the published files again"
        with guard(self.folder, CheckpointError, advice, "a size in config.json is missing or unusable"):
            shapes = {name: entry.shape for name, entry in entries.items()}
            spec = self.family.model_spec(config, clip, shapes)
        self._check_sizes(spec)
        with guard(self.folder, CheckpointError, advice, "a setting in config.json is missing or unusable"):
            self.notes += self.family.notes(config, clip, spec)
        with guard(self.folder, CheckpointError, advice, "the tokens in its config files are unusable"):
            self.spec: ModelSpec = dataclasses.replace(spec, **self._token_ids(spec))
        self._check_sizes(self.spec)
        with guard(self.folder, CheckpointError, advice, "its tensors are not usable"):
            self.parameters = self._match(entries)

    def _check_sizes(self, spec: ModelSpec) -> None:
        """Check that sizes in the config files are numbers, because shapes are computed from them."""
        wrong = [problem for part in (spec, spec.vision) for problem in wrong_sizes(part, "")]
        if not wrong and (spec.num_heads % spec.num_kv_heads or spec.vision.hidden_size % spec.vision.num_heads):
            wrong.append(f"num_attention_heads {spec.num_heads}, and {spec.vision.num_heads} of the tower")
        ends = (spec.eos_token_id, *spec.more_end_ids)
        wrong += [f"eos_token_id {token!r}" for token in ends if not wrong and token >= spec.embedding_rows]
        if wrong:
            raise CheckpointError(f"{self.folder}: unusable config files: {', '.join(wrong)}; copy them again")

    def _json(self, name: str, required: bool = True) -> Any:
        path = self.folder / name
        if not path.exists():
            if required:
                raise CheckpointError(f"{path}: missing; copy it from the published checkpoint")
            return None
        return read_json(path, CheckpointError, "copy it again")

    def _token_ids(self, spec: ModelSpec) -> dict[str, Any]:
        ids: dict[str, Any] = {}
        added = tokenizer.added_ids(self.folder)
        generation = self._json("generation_config.json", required=False) or {}
        ends = end_tokens(generation.get("eos_token_id")) or [spec.eos_token_id, *spec.more_end_ids]
        if self.family.eos_from_tokenizer:
            # In old files a token is an object with its flags, in newer ones its text.
            named = (self._json("tokenizer_config.json", required=False) or {}).get("eos_token")
            eos = added.get(named["content"] if isinstance(named, dict) and "content" in named else str(named))
            if eos is not None:  # it wins over a single one; all ids of a list end an answer
                ends = [eos, *(token for token in ends if token != eos and len(ends) > 1)]
        ids |= {"eos_token_id": ends[0], "more_end_ids": tuple(ends[1:])}
        name = self.family.prompt(spec).image
        image = added.get(name)
        if image is not None:
            if not 0 <= image < spec.embedding_rows:
                raise CheckpointError(
                    f"{self.folder}: {name} is token {image} of the tokenizer, but the embedding table has rows "
                    f"0..{spec.embedding_rows - 1}; the tokenizer files belong to another checkpoint"
                )
            ids["image_token_id"] = image
        return ids

    # -- finding the tensors ----------------------------------------------------------------------------------

    def _entries(self) -> dict[str, Entry]:
        entries: dict[str, Entry] = {}
        for path in self._weight_files():
            found = self._pickle_entries(path) if path.suffix == ".bin" else _safetensors_entries(path)
            for name in found.keys() & entries.keys():
                raise CheckpointError(f"{path}: tensor {name!r} is also in {entries[name].file}; remove one file")
            entries.update(found)
        return entries

    def _weight_files(self) -> list[Path]:
        for stem in ("model.safetensors", "pytorch_model.bin"):
            if (self.folder / stem).is_file():
                return [self.folder / stem]
            index = self.folder / f"{stem}.index.json"
            if index.is_file():
                weight_map = self._json(index.name).get("weight_map")
                known = isinstance(weight_map, dict) and all(isinstance(name, str) for name in weight_map.values())
                if not known or not weight_map:
                    raise CheckpointError(f"{index}: no weight_map; copy the index again")
                if strange := sorted({name for name in weight_map.values() if not is_plain_name(name)}):
                    raise CheckpointError(
                        f"{index}: names the file {printable(strange[0])[:80]!r}, which is not the name of a file "
                        "beside it; copy the index again"
                    )
                files = [self.folder / str(name) for name in sorted(set(weight_map.values()))]
                if outside := [f.name for f in files if not stays_inside(f)]:  # shards may have any name
                    raise CheckpointError(_outside(self.folder, outside))
                missing = [f.name for f in files if not f.is_file()]
                if missing:
                    raise CheckpointError(f"{self.folder}: shards missing: {', '.join(missing)}; download them")
                return files
        if shards := sorted(p.name for p in self.folder.glob("*-of-*") if p.suffix in (".safetensors", ".bin")):
            stem = "model.safetensors" if shards[0].endswith(".safetensors") else "pytorch_model.bin"
            raise CheckpointError(
                f"{self.folder}: has {len(shards)} shards ({shards[0]}, ...), but no index {stem}.index.json; "
                "download it, too"
            )
        if (self.folder / "adapter_config.json").exists():
            raise CheckpointError(f"{self.folder}: is an adapter (LoRA), not a model; merge it into its model and save")
        raise CheckpointError(f"{self.folder}: neither model.safetensors (or its index) nor pytorch_model.bin found")

    def _pickle_entries(self, path: Path) -> dict[str, Entry]:
        tensors = self._pickles[path] = _load_pickle(path, mmap=True)
        names = {dtype: name for name, dtype in FLOATS.items()}
        return {k: Entry(path, k, tuple(t.shape), names.get(t.dtype, str(t.dtype))) for k, t in tensors.items()}

    def _match(self, entries: dict[str, Entry]) -> dict[str, tuple[Source, Entry]]:
        """Pair every parameter with its tensor; one error lists everything that is missing, extra or wrong."""
        problems: list[str] = []
        matched: dict[str, tuple[Source, Entry]] = {}
        sources = self.family.sources(self.spec)
        if prefix := _prefix(entries, [source.name for source in sources.values()]):
            raise CheckpointError(
                f"{self.folder}: every tensor name begins with {printable(prefix)[:80]!r}, as a wrapper (of "
                "training or of an adapter) saves them; save the model inside it"
            )
        for parameter, source in sources.items():
            entry = entries.get(source.name)
            if entry is None:
                problems.append(f"missing: {source.name} {list(source.shape)}")
            elif entry.shape != source.shape and not self.family.adapt(parameter, entry.shape, self.spec):
                problems.append(f"wrong shape: {source.name} is {list(entry.shape)}, expected {list(source.shape)}")
            elif entry.dtype not in FLOATS:
                problems.append(f"wrong dtype: {source.name} is {entry.dtype}, expected one of {', '.join(FLOATS)}")
            else:
                matched[parameter] = (source, entry)
        rows, image = self.spec.embedding_rows, self.spec.image_token_id
        if image >= rows:
            problems.append(f"wrong shape: {sources['embedding'].name} has {rows} rows, none for image token {image}")
        known = {source.name for source in sources.values()}
        problems += [f"extra: {name}" for name in entries if name not in known and not self.family.unused(name)]
        try:
            gate = self._gate()
        except CheckpointError as error:
            problems.append(str(error))
        else:
            self._gate_tensors = gate
            problems += [f"NaN or infinite: {name}" for name, t in gate.items() if not is_finite(t)]
        if not problems:
            problems += [f"only zeros: {name}; was it downloaded completely?" for name in self._zeros(matched)]
        if problems:
            # The folder is refused anyway; check the values too, so that one error lists everything to repair.
            problems += [f"NaN or infinite: {name}" for name in self._not_finite(matched)]
            raise CheckpointError(
                f"{self.folder}: {len(problems)} problem(s) with the tensors of this {self.family.name} checkpoint:\n  "
                + listing(problems, "\n  ")
            )
        return matched

    def _gate(self) -> dict[str, Tensor]:
        path = self.folder / "trol_gating.pt"
        if path.is_file():
            tensors = _load_pickle(path, mmap=False)
        elif (path := path.with_suffix(".safetensors")).is_file():
            tensors = {k: _read_block(e) for k, e in _safetensors_entries(path).items()}
        else:
            raise CheckpointError(f"missing: {self.folder / 'trol_gating.pt'}")
        d, layers = self.spec.hidden_size, self.spec.num_layers
        wrong = [
            f"{name} should be float {shape}"
            for i in range(layers)
            for name, shape in ((f"{i}.weight", (1, d)), (f"{i}.bias", (1,)))
            if name not in tensors or tuple(tensors[name].shape) != shape or tensors[name].dtype not in FLOATS.values()
        ]
        extra = [
            name for name in tensors if name not in {f"{i}.{s}" for i in range(layers) for s in ("weight", "bias")}
        ]
        if wrong or extra:
            raise CheckpointError(f"{path}: {'; '.join(wrong + [f'extra {name}' for name in extra])}")
        last = {s: tensors[f"{layers - 1}.{s}"] for s in ("weight", "bias")}
        if any(not torch.equal(tensors[f"{i}.{s}"], last[s]) for i in range(layers) for s in last):
            self.notes.append(
                f"{path.name}: the gates of the {layers} layers differ; the authors' code has one gate for all "
                "layers and loads the last entry, and so does this bundle"
            )
            log.warning(self.notes[-1])
        return {f"decoder.gate.{s}": t for s, t in last.items()}

    def identity(self) -> str:
        """sha256 (hex) over the bytes of config.json, the gate and every weights file, whatever their names.

        Calibration statistics are checked against it. It reads all weights once, which takes seconds per gigabyte.
        """
        digest = hashlib.sha256()
        gates = (self.folder / f"trol_gating{suffix}" for suffix in (".pt", ".safetensors"))
        for path in (self.folder / "config.json", next(p for p in gates if p.is_file()), *self._weight_files()):
            digest.update(bytes.fromhex(sha256_of(path)))
        return digest.hexdigest()

    # -- reading them -----------------------------------------------------------------------------------------

    def shape(self, parameter: str) -> tuple[int, ...]:
        """The shape of a parameter in the modules."""
        if parameter in self._gate_tensors:
            return tuple(self._gate_tensors[parameter].shape)
        return self.parameters[parameter][0].shape

    def dtype(self, parameter: str) -> str:
        """The stored dtype of a parameter: "F16", "BF16" or "F32"."""
        if parameter in self._gate_tensors:
            dtype = self._gate_tensors[parameter].dtype
            return next(name for name, torch_dtype in FLOATS.items() if torch_dtype == dtype)
        return self.parameters[parameter][1].dtype

    def names(self) -> list[str]:
        """The names of all parameters: the embedding, then decoder, vision and gate."""
        return [*self.parameters, *self._gate_tensors]

    def blocks(self, parameter: str) -> Iterator[tuple[int, Tensor]]:
        """Yield (first row, rows) of a parameter in the model's order, each block at most BLOCK_BYTES."""
        if parameter in self._gate_tensors:
            yield 0, self._gate_tensors[parameter]
            return
        source, entry = self.parameters[parameter]
        adapt = self.family.adapt(parameter, entry.shape, self.spec) if entry.shape != source.shape else None
        if adapt or source.rows is not None:
            # Reordering needs all rows, and in every published model they are small enough for one block (50 MB).
            whole = self._read(entry)
            whole = adapt(whole) if adapt else whole
            yield 0, whole if source.rows is None else whole[source.rows]
            return
        yield from self.published_blocks(parameter)

    def published_blocks(self, parameter: str) -> Iterator[tuple[int, Tensor]]:
        """Like `blocks`, but for the tensor as published, with its own row order and shape (not for the gate)."""
        entry = self.parameters[parameter][1]
        rows = max(1, entry.shape[0]) if entry.shape else 1
        row_bytes = 4 * max(1, torch.Size(entry.shape[1:]).numel())
        step = max(2, BLOCK_BYTES // row_bytes // 2 * 2)  # even, because two INT4 output channels share a byte
        for start in range(0, rows, step):
            yield start, self._read(entry, start, min(rows, start + step))

    def tensor(self, parameter: str) -> Tensor:
        """Read a whole parameter in its stored dtype."""
        return torch.cat([block for _, block in self.blocks(parameter)])

    def load_into(self, **modules: nn.Module) -> None:
        """Fill modules in FP32, e.g. load_into(decoder=..., vision=...). Meant for the small models."""
        for prefix, module in modules.items():
            state = {k: self.tensor(f"{prefix}.{k}").float() for k in module.state_dict()}
            module.load_state_dict(state, assign=True)

    def _read(self, entry: Entry, start: int = 0, stop: int | None = None) -> Tensor:
        tensors = self._pickles.get(entry.file)
        if tensors is not None:
            return tensors[entry.key][start:stop] if entry.shape else tensors[entry.key]
        return _read_block(entry, start, stop)

    def _zeros(self, matched: Mapping[str, tuple[Source, Entry]]) -> list[str]:
        """Matrices of zeros only, which a download has not written yet. Checking one row is enough for most."""
        found: list[str] = []
        for parameter, (source, entry) in matched.items():
            if len(entry.shape) == 2 and entry.shape[0] > 1 and parameter.endswith("weight") and len(found) < 3:
                step = max(1, BLOCK_BYTES // (4 * max(1, entry.shape[1])))
                starts = [(0, 1), *((i, min(entry.shape[0], i + step)) for i in range(1, entry.shape[0], step))]
                if not any(bool(self._read(entry, *rows).any()) for rows in starts):
                    found.append(source.name)
        return found

    def _not_finite(self, matched: Mapping[str, tuple[Source, Entry]]) -> list[str]:
        bad = []
        for source, entry in matched.values():
            rows = entry.shape[0] if entry.shape else 1
            step = max(1, BLOCK_BYTES // (4 * max(1, torch.Size(entry.shape[1:]).numel())))
            if any(not is_finite(self._read(entry, i, min(rows, i + step))) for i in range(0, rows, step)):
                bad.append(source.name)
        return bad


def is_finite(tensor: Tensor) -> bool:
    """Whether no value is NaN or infinite. isfinite().all() would be ten times slower in half precision."""
    return all(bool(extreme.isfinite()) for extreme in torch.aminmax(tensor))  # NaN propagates


def _is_read(name: str) -> bool:
    """Whether a file of this name in a checkpoint's folder is opened."""
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in FILES)


def _outside(folder: Path, names: list[str]) -> str:
    return (
        f"{folder}: {printable(', '.join(names[:5]))} is a link to a place outside the folder and outside a hub's "
        "cache; put the file itself there"
    )


def _detect(config: Mapping[str, Any], folder: Path) -> Family:
    for family in FAMILIES:
        if family.matches(config):
            return family
    raise CheckpointError(
        f"{folder / 'config.json'}: not a TroL checkpoint (architectures {config.get('architectures')!r}); "
        "use BK-Lee/TroL-1.8B, BK-Lee/TroL-3.8B or BK-Lee/TroL-7B"
    )


def _another_folder(folder: Path) -> str | None:
    """Say what a folder without config.json seems to be, and which one may have been meant."""
    if (folder / MANIFEST).exists():
        return "is a bundle, which was exported already; give the checkpoint that it was made from"
    models = [folder] if (folder / "snapshots").is_dir() else sorted(folder.glob("models--*"))
    models += sorted(folder.glob("hub/models--*"))
    if snapshots := [path.parent for model in models for path in sorted(model.glob("snapshots/*/config.json"))]:
        return f"is a model hub's cache; give the folder of a snapshot, such as {snapshots[0]}"
    if below := sorted(folder.glob("*/config.json")):
        return f"has no config.json, but {below[0].parent} has; give that folder"
    if (above := folder.resolve().parent) != folder.resolve() and (above / "config.json").is_file():
        return f"has no config.json, but {above} above it has; give that folder"
    return None


def _prefix(entries: Collection[str], wanted: Collection[str]) -> str:
    """The common prefix of all wanted names in a file, or "" if there is none."""
    if any(name in entries for name in wanted):
        return ""
    found = {name.removesuffix(w) for w in wanted for name in entries if name.endswith(f".{w}")}
    return next((prefix for prefix in sorted(found) if all(prefix + w in entries for w in list(wanted)[:8])), "")


def _require_file(path: Path) -> None:
    """Raise CheckpointError if a weights file is not a regular file, or only a placeholder of one."""
    with open_plain(path, CheckpointError, "download it again") as file:
        require_itself(path, file.read(512), CheckpointError)


def _safetensors_entries(path: Path) -> dict[str, Entry]:
    _require_file(path)
    with guard(path, CheckpointError, "download it again", "truncated or not safetensors"), safe_open(path, "pt") as f:
        slices = {k: f.get_slice(k) for k in f.keys()}  # noqa: SIM118 (not a dict)
        return {k: Entry(path, k, tuple(s.get_shape()), s.get_dtype()) for k, s in slices.items()}


def _read_block(entry: Entry, start: int = 0, stop: int | None = None) -> Tensor:
    # Opened again for each block, because pages of a map that stays open would count as this process's memory.
    with safe_open(entry.file, "pt") as f:
        if not entry.shape:
            return f.get_tensor(entry.key).clone()
        return f.get_slice(entry.key)[start:stop]


def _load_pickle(path: Path, mmap: bool) -> dict[str, Tensor]:
    """Load the tensors of a pickle with torch's weights-only loader, which refuses anything else."""
    _require_file(path)
    with guard(path, CheckpointError, "download it again", "truncated or not a PyTorch file"):
        try:
            data = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
        except pickle.UnpicklingError as error:
            raise CheckpointError(
                f"{path}: holds more than tensors, and unpickling that could run code; refused. Take the file from "
                f"the published checkpoint, or convert it to safetensors ({reason(error)[:120]})"
            ) from error
        if not isinstance(data, dict) or not all(isinstance(k, str) and isinstance(t, Tensor) for k, t in data.items()):
            raise CheckpointError(f"{path}: expected a dict of tensors; download it again")
        # Tensors without numbers in memory, or in another form, would only fail later, when they are read.
        if odd := [k for k, t in data.items() if t.layout != torch.strided or t.device.type != "cpu" or t.is_quantized]:
            raise CheckpointError(
                f"{path}: {printable(odd[0])[:80]} is not a dense tensor in memory (it is sparse, quantized or meta); "
                "save the model again with its numbers"
            )
        return {name: tensor.detach() for name, tensor in data.items()}  # parameters are tensors as well
