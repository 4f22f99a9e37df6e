"""Writes a checkpoint of random weights in the published layout, for full-size runs without the real weights."""

from __future__ import annotations

import io
import json
import math
import os
from typing import Any

import numpy as np
import torch

from trol_edge.bundle.folder import new_folder
from trol_edge.errors import UsageError
from trol_edge.export.reference.hub import find
from trol_edge.export.storage import Progress

# Random values repeat after this many, because drawing billions would take minutes. A prime, so that rows differ.
POOL = 8_388_593
FILES = ("config.json", "trol_gating.pt", "model.safetensors")


def synth(
    model: str,
    folder: str | os.PathLike[str],
    *,
    seed: int = 0,
    overwrite: bool = False,
    progress: Progress = lambda what, done, total: None,
) -> dict[str, Any]:
    """Write random FP16 weights of a published model's shapes; returns {"tensors", "parameters", "bytes"}.

    There is no tokenizer, so its bundles serve the token level only. Peak memory is that of one block, for any model.
    Raises UsageError for an unknown model and ExportError if the folder cannot be written.
    """
    known = find(model)
    if not known.config:
        raise UsageError(f"{model} ships with its trained weights; give synth the name of a published model")
    tensors = known.family.published(known.config)
    spec = known.family.model_spec(known.config, None, tensors)
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in tensors.items():
        start, end = end, end + 2 * math.prod(shape)
        header[name] = {"dtype": "F16", "shape": list(shape), "data_offsets": [start, end]}
    rng = np.random.default_rng(seed)
    pool = rng.standard_normal(POOL, dtype=np.float32)
    pools: dict[tuple[float, float], Any] = {}
    with new_folder(folder, overwrite, FILES) as target:
        (target / "config.json").write_text(json.dumps(known.config, indent=1), encoding="utf-8")
        gate = {"weight": torch.from_numpy(pool[: spec.hidden_size].copy())[None].half(), "bias": torch.zeros(1).half()}
        saved = io.BytesIO()  # torch's own writer does not say that the disk is full
        torch.save({f"{i}.{key}": t for i in range(spec.num_layers) for key, t in gate.items()}, saved)
        (target / "trol_gating.pt").write_bytes(saved.getvalue())
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        with (target / "model.safetensors").open("wb") as f:
            f.write(len(text).to_bytes(8, "little") + text)
            for name, shape in tensors.items():
                count, offset = math.prod(shape), int(rng.integers(POOL))
                mean, deviation = key = _scale(name, shape)
                if key not in pools:
                    pools[key] = (mean + deviation * pool).astype(np.float16)
                while count:
                    part = pools[key][offset : offset + count]
                    f.write(part.tobytes())
                    count, offset = count - len(part), 0
                progress("synth", f.tell(), 8 + len(text) + end)
    return {"tensors": len(tensors), "parameters": sum(map(math.prod, tensors.values())), "bytes": end}


def _scale(name: str, shape: tuple[int, ...]) -> tuple[float, float]:
    """Mean and deviation that keep activations near one: norms and scales near 1, matrices 1/sqrt(inputs)."""
    if len(shape) > 1 and "embedding" not in name:
        return 0.0, 1 / math.sqrt(math.prod(shape[1:]))
    factor = len(shape) == 1 and not name.endswith((".bias", "_embedding"))
    return (1.0 if factor else 0.0), 0.02
