"""Makes outlier channels in a checkpoint without changing what it computes, to test quantization.

Large models grow a few activation channels that are 20 to 100 times larger than the rest; trol-nano is too small for
that. Here some channels of every norm are scaled up, and the columns of the Linears that read it are scaled down by the
same power of two. In float32 not a bit changes, but one scale per tensor no longer suits INT8 activations.

Keys have such channels, too. With `keys` it is theirs that grow, after every layer's rotary embedding, and the queries
that meet them shrink. One scale per head no longer suits 8-bit keys then.
"""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from trol_edge.bundle.folder import new_folder
from trol_edge.bundle.spec import ModelSpec
from trol_edge.bundle.weights import ITEM_BYTES
from trol_edge.calibration.samples import Progress
from trol_edge.errors import UsageError
from trol_edge.export.reference.checkpoint import FLOATS, Checkpoint

WEIGHTS = "model.safetensors"
NOT_COPIED = ("*.safetensors", "*.bin", "*.index.json", "trol_edge_source.json")
OURS = ("*.json", "*.safetensors", "*.pt", "*.model", "*.png", "*.md", "*.txt", "*.py", "LICENSE*")


def make_outliers(
    checkpoint: str | os.PathLike[str],
    folder: str | os.PathLike[str],
    *,
    factor: float = 50.0,
    channels: int = 4,
    keys: bool = False,
    seed: int = 0,
    overwrite: bool = False,
    progress: Progress = lambda what, done, total: None,
) -> dict[str, Any]:
    """Write a copy of a checkpoint with outlier channels after every norm, or in all keys, in the published layout.

    It is streamed. factor: how much larger the channels get; the nearest power of two is taken, because only that is
    exact. channels: number per norm, or pairs (that rotate together) per head of keys, chosen with `seed` for each. A
    tensor whose new values do not fit its stored dtype exactly is stored as float32.
    Returns {"factor", "norms", "channels", "widened": names of such tensors, "bytes"}.
    Raises UsageError for numbers out of range, CheckpointError and ExportError as export does.
    """
    if not 2 <= factor <= 1024 or channels < 1:
        raise UsageError(
            f"factor {factor} and {channels} channels: choose a factor of 2 to 1024, and 1 channel or more"
        )
    source = Checkpoint(checkpoint)
    power = 2.0 ** round(math.log2(factor))
    rng = np.random.default_rng(seed)
    scales = _of_keys(source, power, channels, rng) if keys else _scales(source, power, channels, rng)
    parameters = list(source.parameters)
    dtypes: dict[str, str] = {}
    for i, name in enumerate(parameters):
        stored = source.dtype(name)
        exact = name not in scales or all(_fits(b, FLOATS[stored]) for b in _blocks(source, name, scales))
        dtypes[name] = stored if exact else "F32"
        progress("check", i + 1, len(parameters))
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name in parameters:
        entry = source.parameters[name][1]
        start, end = end, end + math.prod(entry.shape) * ITEM_BYTES[dtypes[name]]
        header[source.parameters[name][0].name] = {
            "dtype": dtypes[name],
            "shape": list(entry.shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with new_folder(folder, overwrite, OURS) as target:
        for path in source.folder.iterdir():
            if path.is_file() and (path.stem == "trol_gating" or not any(path.match(n) for n in NOT_COPIED)):
                shutil.copyfile(path, target / path.name)
        with (target / WEIGHTS).open("wb") as f:
            f.write(len(text).to_bytes(8, "little") + text)
            for name in parameters:
                for block in _blocks(source, name, scales):
                    data = block.to(FLOATS[dtypes[name]]).contiguous().reshape(-1).view(torch.uint8)
                    f.write(data.numpy().data)
                progress("write", f.tell(), 8 + len(text) + end)
    return {
        "factor": power,
        "channels": channels,
        "norms": 0 if keys else len(_norms(source.spec, set(source.parameters))),
        "widened": [name for name in parameters if dtypes[name] != source.dtype(name)],
        "bytes": end,
    }


def _norms(spec: ModelSpec, parameters: set[str]) -> dict[str, list[str]]:
    """Every norm that only Linears read, with these Linears; names are without ".weight"."""
    found = {"decoder.norm": ["decoder.lm_head"]}
    for i in range(spec.num_layers):
        layer = f"decoder.layers.{i}"
        found[f"{layer}.attention_norm"] = [f"{layer}.qkv"]
        found[f"{layer}.mlp_norm"] = [f"{layer}.mlp.{name}" for name in ("gate", "up", "gate_up")]
    for i in range(spec.vision.num_layers):
        layer = f"vision.layers.{i}"
        found[f"{layer}.norm1"] = [f"{layer}.{name}" for name in ("q", "k", "v", "qkv")]
        found[f"{layer}.norm2"] = [f"{layer}.fc1"]
    found["vision.proj_norm"] = ["vision.proj1"]
    return {
        norm: [name for name in linears if f"{name}.weight" in parameters]
        for norm, linears in found.items()
        if f"{norm}.weight" in parameters
    }


def _of_keys(source: Checkpoint, power: float, channels: int, rng: np.random.Generator) -> dict[str, Tensor]:
    """Factors of the rows of each layer's qkv Linear, as published, [rows, 1]; of its low-rank B, too."""
    spec, parameters = source.spec, set(source.parameters)
    half, group = spec.head_dim // 2, spec.num_heads // spec.num_kv_heads
    if channels > half:
        raise UsageError(f"{channels} channels asked for, but a head has {half} pairs of them; choose fewer")
    scales: dict[str, Tensor] = {}
    for i in range(spec.num_layers):
        up = torch.ones(spec.num_kv_heads, 2, half)
        for head in up:
            head[:, torch.from_numpy(rng.choice(half, channels, replace=False))] = power
        rows = up.flatten(1)
        parts = (1 / rows.repeat_interleave(group, 0), rows, torch.ones_like(rows))  # queries, keys, values
        ours = torch.cat([part.flatten() for part in parts])
        for name in (f"decoder.layers.{i}.qkv.weight", f"decoder.layers.{i}.qkv.lora_b"):
            if name in parameters:
                order = source.parameters[name][0].rows
                published = ours if order is None else torch.empty_like(ours).index_copy(0, order, ours)
                scales[name] = published[:, None]
    return scales


def _scales(source: Checkpoint, power: float, channels: int, rng: np.random.Generator) -> dict[str, Tensor]:
    """Factors by which each changed parameter is multiplied along its last axis."""
    parameters = set(source.parameters)
    scales: dict[str, Tensor] = {}
    for norm, linears in _norms(source.spec, parameters).items():
        (size,) = source.shape(f"{norm}.weight")
        if channels > size:
            raise UsageError(f"{channels} channels asked for, but {norm} has {size}; choose fewer")
        up = torch.ones(size)
        up[torch.from_numpy(rng.choice(size, channels, replace=False))] = power
        for suffix in (".weight", ".bias"):
            if f"{norm}{suffix}" in parameters:
                scales[f"{norm}{suffix}"] = up
        for linear in linears:
            for suffix in (".weight", ".lora_a"):
                if f"{linear}{suffix}" in parameters:
                    scales[f"{linear}{suffix}"] = 1 / up
    return scales


def _blocks(source: Checkpoint, name: str, scales: dict[str, Tensor]) -> Iterator[Tensor]:
    """Yield the new values of a parameter in its published order, block by block."""
    for start, block in source.published_blocks(name):
        scale = scales.get(name)
        if scale is None:
            yield block
        else:
            by_row = block.dim() == 1 or scale.dim() == 2
            yield block.float() * (scale[start : start + len(block)] if by_row else scale)


def _fits(values: Tensor, dtype: torch.dtype) -> bool:
    return torch.equal(values.to(dtype).float(), values)
