"""Activation statistics in memory: the reference on seeded random embeddings and pixels, hooks on every Linear."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from trol_edge.export.quantize.stats import BINS, ROWS, CalibrationState, PointStatistics, Statistics
from trol_edge.export.reference.checkpoint import Checkpoint
from trol_edge.export.reference.model import EagerAttention, LoraLinear, rope_tables

TOKENS = 48


def statistics_of(source: Checkpoint, identity: str | None = None) -> Statistics:
    """Statistics of one random picture and a prompt of 48 rows of the embedding table."""
    spec = source.spec
    decoder, vision = source.family.decoder(spec), source.family.vision(spec)
    source.load_into(decoder=decoder, vision=vision)
    inputs: dict[str, list[Tensor]] = {}
    largest: dict[str, float] = {}

    def watch(prefix: str, module: nn.Module) -> None:
        for name, part in module.named_modules():
            if isinstance(part, LoraLinear | nn.Linear):
                part.register_forward_hook(
                    lambda part, given, out, point=f"{prefix}.{name}": _note(point, given[0], out, inputs, largest)
                )

    watch("decoder", decoder)
    watch("vision", vision)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(spec.embedding_rows, (TOKENS,), generator=generator)
    attend = EagerAttention(spec, *rope_tables(spec.head_dim, spec.rope_theta, TOKENS))
    attend.positions = torch.arange(TOKENS)
    mask = (torch.arange(TOKENS) % 2).float()[None, :, None] if spec.lora_rank else None
    with torch.no_grad():
        x = decoder.traverse(source.tensor("embedding")[ids].float()[None], mask, attend)  # type: ignore[operator]
        decoder.logits(x)  # type: ignore[operator]
        vision(torch.randn(1, 3, spec.vision.image_size, spec.vision.image_size, generator=generator))
    points = {name: _point(torch.cat(rows), largest[name]) for name, rows in inputs.items()}
    peaks = {f"decoder.layers.{i}.residual": float(x.abs().max()) for i in range(spec.num_layers)}
    caches = {}
    for i in range(spec.num_layers):
        rows = [[cached[traversal][i] for traversal in (0, 1)] for cached in (attend.keys, attend.values)]
        caches[i] = np.array([[t[0].abs().amax(1).numpy() for t in kind if t is not None] for kind in rows])
    return Statistics(points, peaks, CalibrationState(identity or source.identity(), "", 1, ()), caches)


def _note(point: str, x: Tensor, out: Tensor, inputs: dict[str, list[Tensor]], largest: dict[str, float]) -> None:
    inputs.setdefault(point, []).append(x.reshape(-1, x.shape[-1]).clone())
    largest[point] = max(largest.get(point, 0.0), float(out.abs().max()))


def _point(x: Tensor, largest: float) -> PointStatistics:
    top = float(x.abs().max())
    histogram, _ = np.histogram(x.abs().numpy(), bins=BINS, range=(0, top or 1.0))
    return PointStatistics(
        count=len(x),
        absmax=x.abs().amax(0).numpy(),
        mean_abs=x.abs().mean(0).numpy(),
        mean_square=x.square().mean(0).numpy(),
        rows=x[:: max(1, len(x) // ROWS)][:ROWS].clone().numpy(),
        histogram=histogram,
        histogram_max=top,
        output_absmax=largest,
    )
