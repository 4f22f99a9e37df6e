"""Folds scales that cancel: what makes a channel is divided, what reads it is multiplied, the model stays the same.

| channels read by | are made by | why that cancels |
|---|---|---|
| qkv; gate and up (or gate_up); lm_head | the weights of the norm before | a norm's last act is a product per channel |
| out | the value rows of qkv | attention mixes tokens, not channels; query heads of a group share theirs |
| down | the rows of up | silu(gate) * up is linear in up |
| vision q, k, v; fc1; proj1 after a norm | weight and bias of the norm before | |
| vision out | the value rows (and their bias) | |

Both passes of a traversal read one norm and one Linear, so one folding serves both. The gate reads the residual
stream, which no folding touches. Low-rank parts follow: columns of A with the weight's columns, rows of B with its
rows. fc2, and down after a fused activation, have no such maker, because the activation is not linear.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from trol_edge.bundle.spec import ModelSpec


@dataclasses.dataclass(frozen=True)
class Group:
    """Channels that are rescaled together.

    readers: Linear weights [out, K] whose columns are multiplied. makers: (parameter, first row) of what is divided.
    width: number of scales. Each is used by `repeat` heads of `head` columns in turn (K = repeat * width).
    """

    name: str
    readers: tuple[str, ...]
    makers: tuple[tuple[str, int], ...]
    width: int
    head: int = 0  # 0: a column is a channel
    repeat: int = 1

    @property
    def made_by_norm(self) -> bool:
        """Whether the channels are what a norm puts out: its weight, and its bias if it has one, make them."""
        return bool(self.makers) and self.makers[0][0] == f"{self.name}.weight"

    def columns(self, scale: Tensor) -> Tensor:
        """Turn scales per channel [width] into scales per column [K]."""
        if self.repeat == 1:
            return scale
        return scale.view(-1, 1, self.head).expand(-1, self.repeat, -1).reshape(-1)

    def channels(self, columns: Tensor) -> Tensor:
        """The largest value among each channel's columns: [K] -> [width]."""
        if self.repeat == 1:
            return columns
        return columns.view(-1, self.repeat, self.head).amax(1).reshape(-1)


def groups(spec: ModelSpec, names: Iterable[str]) -> list[Group]:
    """Find every group of a model whose parameters have these names."""
    present = set(names)
    d, e = spec.hidden_size, spec.head_dim
    out: list[Group] = []

    def readers(*points: str) -> tuple[str, ...]:
        candidates = [f"{point}.{part}" for point in points for part in ("weight", "lora_a")]
        return tuple(name for name in candidates if name in present)

    def makers(point: str, row: int, *parts: str) -> tuple[tuple[str, int], ...]:
        return tuple((f"{point}.{part}", row) for part in parts if f"{point}.{part}" in present)

    def after_norm(norm: str, width: int, *points: str) -> None:
        found = readers(*points)
        if found and f"{norm}.weight" in present:
            out.append(Group(norm, found, makers(norm, 0, "weight", "bias"), width))

    for i in range(spec.num_layers):
        layer = f"decoder.layers.{i}"
        after_norm(f"{layer}.attention_norm", d, f"{layer}.qkv")
        values = makers(f"{layer}.qkv", (spec.num_heads + spec.num_kv_heads) * e, "weight", "lora_b")
        group = spec.num_heads // spec.num_kv_heads
        out.append(Group(f"{layer}.values", readers(f"{layer}.out"), values, spec.num_kv_heads * e, e, group))
        mlp = f"{layer}.mlp"
        after_norm(f"{layer}.mlp_norm", d, f"{mlp}.gate", f"{mlp}.up", f"{mlp}.gate_up")
        up = makers(f"{mlp}.up", 0, "weight", "lora_b") or makers(f"{mlp}.gate_up", spec.intermediate_size, "weight")
        out.append(Group(f"{mlp}.product", readers(f"{mlp}.down"), up, spec.intermediate_size))
    after_norm("decoder.norm", d, "decoder.lm_head")
    v = spec.vision
    for i in range(v.num_layers):
        layer = f"vision.layers.{i}"
        after_norm(f"{layer}.norm1", v.hidden_size, *(f"{layer}.{p}" for p in ("q", "k", "v", "qkv")))
        after_norm(f"{layer}.norm2", v.hidden_size, f"{layer}.fc1")
        parts = ("weight", "bias")
        made = makers(f"{layer}.v", 0, *parts) or makers(f"{layer}.qkv", 2 * v.hidden_size, *parts)
        out.append(Group(f"{layer}.values", readers(f"{layer}.out"), made, v.hidden_size))
    after_norm("vision.proj_norm", 4 * v.hidden_size, "vision.proj1")
    return out


class Folding:
    """Chosen factors for the rows and columns of each parameter: float32, finite, above zero."""

    def __init__(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        self._shapes = shapes
        self.columns: dict[str, Tensor] = {}  # parameter -> [K]
        self.rows: dict[str, Tensor] = {}  # parameter -> [out]

    def add(self, group: Group, scale: Tensor) -> None:
        """Multiply what reads the group's channels by scale [width] and divide what makes them."""
        assert scale.shape == (group.width,) and bool(((scale > 0) & scale.isfinite()).all())
        for name in group.readers:
            assert name not in self.columns
            self.columns[name] = group.columns(scale)
        for name, first in group.makers:
            rows = self.rows.setdefault(name, torch.ones(self._shapes[name][0]))
            rows[first : first + group.width] /= scale

    def __contains__(self, parameter: str) -> bool:
        return parameter in self.columns or parameter in self.rows

    def apply(self, parameter: str, block: Tensor, first: int) -> Tensor:
        """Fold a block of a parameter's rows, which begins with row `first`; returns float32."""
        block = block.float()
        if (columns := self.columns.get(parameter)) is not None:
            block = block * columns
        if (rows := self.rows.get(parameter)) is not None:
            part = rows[first : first + len(block)]
            block = block * part.view(-1, *[1] * (block.dim() - 1))
        return block
