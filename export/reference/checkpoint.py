"""Read a published TroL checkpoint folder: every tensor accounted for before any work starts, none held in memory.

config.json                    sizes (Hugging Face names)
model.safetensors              or model-00001-of-0000N.safetensors + model.safetensors.index.json,
                               or pytorch_model.bin (older revisions)
trol_gating.pt                 the gate, one Linear repeated per layer (or trol_gating.safetensors)
clip_vision_config.json        optional; absent: CLIP ViT-L/14-336
generation_config.json         optional; its eos_token_id wins, as in the authors' code
tokenizer.json                 or tokenizer.model, added_tokens.json and tokenizer_config.json; optional: without
                               a tokenizer the bundle serves the token level only
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import math
import os
import pickle
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from trol_edge.bundle.folder import sha256_of
from trol_edge.bundle.spec import ModelSpec
from trol_edge.errors import CheckpointError
from trol_edge.export.reference import internlm2, phi3, tokenizer
from trol_edge.export.reference.family import Family, Source

log = logging.getLogger(__name__)

FAMILIES: tuple[Family, ...] = (internlm2.FAMILY, phi3.FAMILY)
FLOATS = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32}
# Rows are read in blocks of at most this many bytes, so that peak memory does not grow with the largest tensor.
BLOCK_BYTES = 64 << 20


@dataclasses.dataclass(frozen=True)
class Entry:
    """One tensor of the checkpoint: which file holds it, as what."""

    file: Path
    key: str  # name inside the file
    shape: tuple[int, ...]
    dtype: str  # safetensors name: "F16", "BF16", "F32", ...


class Checkpoint:
    """An opened checkpoint folder. Raises CheckpointError that lists everything that is wrong with it.

    `spec` and `family` describe the model, `parameters` maps each parameter name to (Source, Entry),
    `notes` holds remarks that a user should see (for example gates that differ between layers).
    """

    def __init__(self, folder: str | os.PathLike[str], family: str | None = None) -> None:
        self.folder = Path(folder)
        if not self.folder.is_dir():
            raise CheckpointError(f"{self.folder}: no such folder; give the folder that holds config.json")
        self.notes: list[str] = []
        self._pickles: dict[Path, dict[str, Tensor]] = {}
        config = self._json("config.json")
        self.family = _detect(config, self.folder)
        if family is not None and family != self.family.name:
            raise CheckpointError(f"{self.folder}: this is a {self.family.name} checkpoint, not {family}; check MODEL=")
        entries = self._entries()
        try:
            spec = self.family.model_spec(
                config,
                self._json("clip_vision_config.json", required=False),
                {name: entry.shape for name, entry in entries.items()},
            )
        except (LookupError, TypeError, ValueError, ZeroDivisionError) as error:
            raise CheckpointError(
                f"{self.folder}: config.json lacks or garbles a size ({type(error).__name__}: {error}); "
                "copy the published files again"
            ) from error
        self._check_sizes(spec)
        self.spec: ModelSpec = dataclasses.replace(spec, **self._token_ids(spec))  # type: ignore[arg-type]
        self._check_sizes(self.spec)
        self.parameters = self._match(entries)

    def _check_sizes(self, spec: ModelSpec) -> None:
        """What the config files say is used to compute shapes, so it has to be numbers first."""
        wrong = []
        for part in (spec, spec.vision):
            for field in dataclasses.fields(part):
                value = getattr(part, field.name)
                least = 0 if field.name in ("lora_rank", "eos_token_id", "image_token_id") else 1
                good_int = isinstance(value, int) and not isinstance(value, bool) and value >= least
                good_float = isinstance(value, float) and 0 < value < math.inf
                if (field.type == "int" and not good_int) or (field.type == "float" and not good_float):
                    wrong.append(f"{field.name} {value!r}")
        if wrong:
            raise CheckpointError(f"{self.folder}: unusable in its config files: {', '.join(wrong)}; copy them again")

    def _json(self, name: str, required: bool = True) -> Any:
        path = self.folder / name
        if not path.is_file():
            if required:
                raise CheckpointError(f"{path}: missing; copy it from the published checkpoint")
            return None
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{path}: not readable as JSON ({error}); copy it again") from error
        if not isinstance(data, dict):
            raise CheckpointError(f"{path}: expected a JSON object, found {type(data).__name__}; copy it again")
        return data

    def _token_ids(self, spec: ModelSpec) -> dict[str, int]:
        ids: dict[str, int] = {}
        added = tokenizer.added_ids(self.folder)
        generation = self._json("generation_config.json", required=False) or {}
        eos = generation.get("eos_token_id")
        if self.family.eos_from_tokenizer:
            # In old files a token is an object with its flags, else its text.
            named = (self._json("tokenizer_config.json", required=False) or {}).get("eos_token")
            eos = added.get(named["content"] if isinstance(named, dict) and "content" in named else str(named))
        if isinstance(eos, list):
            eos = eos[0] if eos else None
        if eos is not None:
            ids["eos_token_id"] = eos
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

    # -- which tensors there are ------------------------------------------------------------------------------

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
                files = [self.folder / str(name) for name in sorted(set(weight_map.values()))]
                missing = [f.name for f in files if not f.is_file()]
                if missing:
                    raise CheckpointError(f"{self.folder}: shards missing: {', '.join(missing)}; download them")
                return files
        raise CheckpointError(f"{self.folder}: neither model.safetensors (or its index) nor pytorch_model.bin found")

    def _pickle_entries(self, path: Path) -> dict[str, Entry]:
        tensors = self._pickles[path] = _load_pickle(path, mmap=True)
        names = {dtype: name for name, dtype in FLOATS.items()}
        return {k: Entry(path, k, tuple(t.shape), names.get(t.dtype, str(t.dtype))) for k, t in tensors.items()}

    def _match(self, entries: dict[str, Entry]) -> dict[str, tuple[Source, Entry]]:
        """Pair every parameter with its tensor; one error lists all that is missing, extra or wrong."""
        problems: list[str] = []
        matched: dict[str, tuple[Source, Entry]] = {}
        sources = self.family.sources(self.spec)
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
        if problems:
            # The folder is refused anyway, so look at the values too: one error should be enough to mend it.
            problems += [f"NaN or infinite: {name}" for name in self._not_finite(matched)]
            raise CheckpointError(
                f"{self.folder}: {len(problems)} problem(s) with the tensors of this {self.family.name} checkpoint:\n  "
                + "\n  ".join(problems)
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

        What was measured on one checkpoint (calibration) is checked against it. Reads all weights once: seconds per
        gigabyte.
        """
        digest = hashlib.sha256()
        gates = (self.folder / f"trol_gating{suffix}" for suffix in (".pt", ".safetensors"))
        for path in (self.folder / "config.json", next(p for p in gates if p.is_file()), *self._weight_files()):
            digest.update(bytes.fromhex(sha256_of(path)))
        return digest.hexdigest()

    # -- their values -----------------------------------------------------------------------------------------

    def shape(self, parameter: str) -> tuple[int, ...]:
        """Shape of a parameter as the modules have it."""
        if parameter in self._gate_tensors:
            return tuple(self._gate_tensors[parameter].shape)
        return self.parameters[parameter][0].shape

    def dtype(self, parameter: str) -> str:
        """Stored dtype of a parameter: "F16", "BF16" or "F32"."""
        if parameter in self._gate_tensors:
            dtype = self._gate_tensors[parameter].dtype
            return next(name for name, torch_dtype in FLOATS.items() if torch_dtype == dtype)
        return self.parameters[parameter][1].dtype

    def names(self) -> list[str]:
        """Every parameter: the embedding, then decoder, vision and gate."""
        return [*self.parameters, *self._gate_tensors]

    def blocks(self, parameter: str) -> Iterator[tuple[int, Tensor]]:
        """Yield (first row, rows) of a parameter in the model's order, each block at most BLOCK_BYTES."""
        if parameter in self._gate_tensors:
            yield 0, self._gate_tensors[parameter]
            return
        source, entry = self.parameters[parameter]
        adapt = self.family.adapt(parameter, entry.shape, self.spec) if entry.shape != source.shape else None
        if adapt or source.rows is not None:
            # Small enough for one block in every published model (at most 50 MB), and reordering needs all rows.
            whole = self._read(entry)
            whole = adapt(whole) if adapt else whole
            yield 0, whole if source.rows is None else whole[source.rows]
            return
        yield from self.published_blocks(parameter)

    def published_blocks(self, parameter: str) -> Iterator[tuple[int, Tensor]]:
        """As blocks, but of the tensor as it was published: its own order of rows, its own shape (not the gate)."""
        entry = self.parameters[parameter][1]
        rows = max(1, entry.shape[0]) if entry.shape else 1
        row_bytes = 4 * max(1, torch.Size(entry.shape[1:]).numel())
        step = max(2, BLOCK_BYTES // row_bytes // 2 * 2)  # even: two INT4 output channels share a byte
        for start in range(0, rows, step):
            yield start, self._read(entry, start, min(rows, start + step))

    def tensor(self, parameter: str) -> Tensor:
        """A whole parameter in its stored dtype."""
        return torch.cat([block for _, block in self.blocks(parameter)])

    def load_into(self, **modules: nn.Module) -> None:
        """Fill modules in FP32, e.g. load_into(decoder=..., vision=...): the small models of tests and training."""
        for prefix, module in modules.items():
            state = {k: self.tensor(f"{prefix}.{k}").float() for k in module.state_dict()}
            module.load_state_dict(state, assign=True)

    def _read(self, entry: Entry, start: int = 0, stop: int | None = None) -> Tensor:
        tensors = self._pickles.get(entry.file)
        if tensors is not None:
            return tensors[entry.key][start:stop] if entry.shape else tensors[entry.key]
        return _read_block(entry, start, stop)

    def _not_finite(self, matched: Mapping[str, tuple[Source, Entry]]) -> list[str]:
        bad = []
        for source, entry in matched.values():
            rows = entry.shape[0] if entry.shape else 1
            step = max(1, BLOCK_BYTES // (4 * max(1, torch.Size(entry.shape[1:]).numel())))
            if any(not is_finite(self._read(entry, i, min(rows, i + step))) for i in range(0, rows, step)):
                bad.append(source.name)
        return bad


def is_finite(tensor: Tensor) -> bool:
    """No NaN and no infinity among the values; isfinite().all() is ten times slower in half precision."""
    return all(bool(extreme.isfinite()) for extreme in torch.aminmax(tensor))  # NaN propagates


def _detect(config: Mapping[str, Any], folder: Path) -> Family:
    for family in FAMILIES:
        if family.matches(config):
            return family
    raise CheckpointError(
        f"{folder / 'config.json'}: not a TroL checkpoint (architectures {config.get('architectures')!r}); "
        "use BK-Lee/TroL-1.8B, BK-Lee/TroL-3.8B or BK-Lee/TroL-7B"
    )


def _safetensors_entries(path: Path) -> dict[str, Entry]:
    try:
        with safe_open(path, "pt") as f:
            slices = {k: f.get_slice(k) for k in f.keys()}  # noqa: SIM118 (not a dict)
            return {k: Entry(path, k, tuple(s.get_shape()), s.get_dtype()) for k, s in slices.items()}
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path}: truncated or not safetensors ({error}); download it again") from error


def _read_block(entry: Entry, start: int = 0, stop: int | None = None) -> Tensor:
    # Opened anew for each block: pages of a map that stays open would count as this process's memory.
    with safe_open(entry.file, "pt") as f:
        if not entry.shape:
            return f.get_tensor(entry.key).clone()
        return f.get_slice(entry.key)[start:stop]


def _load_pickle(path: Path, mmap: bool) -> dict[str, Tensor]:
    """Tensors of a pickle through torch's weights-only loader; anything else in it is refused."""
    try:
        data = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{path}: holds more than tensors, and unpickling that could run code; refused. Take the file from "
            f"the published checkpoint, or convert it to safetensors ({str(error).splitlines()[0]})"
        ) from error
    except (OSError, RuntimeError, EOFError, ValueError) as error:
        raise CheckpointError(f"{path}: truncated or not a PyTorch file ({error}); download it again") from error
    if not isinstance(data, dict) or not all(isinstance(k, str) and isinstance(t, Tensor) for k, t in data.items()):
        raise CheckpointError(f"{path}: expected a dict of tensors; download it again")
    return data
