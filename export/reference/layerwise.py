"""Runs the PyTorch reference a part at a time, so that only the active part has its weights in memory.

Calibration gathers statistics that way, and export records the self-test. The caller keeps hidden states between the
parts. Axes are those of `model.py`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from trol_edge.bundle.spec import ModelSpec
from trol_edge.export.reference.family import Family
from trol_edge.export.reference.model import EagerAttention, rope_tables
from trol_edge.machine import identity

MATRICES = (".weight", ".lora_a", ".lora_b")


class Weights(Protocol):
    """Where the weights come from: a checkpoint, or something with the same parameters."""

    @property
    def spec(self) -> ModelSpec: ...

    @property
    def family(self) -> Family: ...

    def tensor(self, parameter: str, /) -> Tensor:
        """A whole parameter."""
        ...

    def blocks(self, parameter: str, /) -> Iterator[tuple[int, Tensor]]:
        """Yield (first row, rows) of a parameter."""
        ...


class Layerwise:
    """The modules of a checkpoint, without weights until `part` fills one of them. Use it under torch.no_grad().

    compute: the type of Linears and attention; sums, norms and the residual stream stay float32.
    """

    def __init__(self, source: Weights, compute: torch.dtype = torch.float32) -> None:
        self.source, self.spec, self.compute = source, source.spec, compute
        with torch.device("meta"):  # shapes only
            self._vision: Any = source.family.vision(self.spec)
            self._decoder: Any = source.family.decoder(self.spec)
        self.gate = tuple(source.tensor(f"decoder.gate.{n}").float() for n in ("weight", "bias"))

    @contextlib.contextmanager
    def part(self, stage: str) -> Iterator[Any]:
        """Yield the module of a stage, filled, and empty it again.

        "vision.embed" and "vision.features" are the tower with what its `embed` and its `features` need;
        "vision.layers.<i>", "decoder.layers.<i>" and "decoder.norm" are that module.
        """
        if stage in ("vision.embed", "vision.features"):
            prefix, module = "vision", self._vision
            last = stage == "vision.features"
            outside = [name for name in module.state_dict() if not name.startswith("layers.")]
            names = [name for name in outside if name.startswith("proj") == last]
        else:
            root, path = stage.split(".", 1)
            prefix, module = stage, {"vision": self._vision, "decoder": self._decoder}[root].get_submodule(path)
            names = list(module.state_dict())
        state = {}
        for name in names:
            tensor = self.source.tensor(f"{prefix}.{name}")
            # Norms, biases and scales act on the float32 stream; only matrices may have fewer bits.
            state[name] = tensor.to(self.compute if tensor.dim() > 1 and name.endswith(MATRICES) else torch.float32)
        module.load_state_dict(state, strict=prefix == stage, assign=True)
        del state
        try:
            with torch.autocast("cpu", torch.bfloat16, enabled=self.compute == torch.bfloat16):
                yield module
        finally:
            module.to("meta")
            identity.free_pages()  # after a trace, glibc kept 40 MB of each layer of TroL-1.8B

    def embeddings(self, ids: NDArray[np.int64]) -> Tensor:
        """Look up rows of the embedding table, float32 [S, D]."""
        used = np.unique(ids)
        table = torch.empty(len(used), self.spec.hidden_size)
        for start, block in self.source.blocks("embedding"):
            first, last = np.searchsorted(used, (start, start + len(block)))
            table[first:last] = block[torch.from_numpy(used[first:last] - start)].float()
        return table[torch.from_numpy(np.searchsorted(used, ids))]

    def traverse(
        self,
        layer: nn.Module,
        index: int,
        x: Tensor,
        image_mask: Tensor | None,
        attend: EagerAttention,
        twice: bool = True,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Both passes of a decoder layer over x [B, S, D], and their mixture, which the next layer reads.

        twice: whether the layer has a second pass; if not, all three are the first.
        """
        o1 = layer(x, image_mask, index, 0, attend)
        if not twice:
            return o1, o1, o1
        o2 = layer(o1, image_mask, index, 1, attend)
        s = self.share(o1)
        return o1, o2, o1 * (1 - s) + o2 * s

    def share(self, o1: Tensor) -> Tensor:
        """The gate, which is the share of the second pass in a layer's output, 0..1. o1 [B, S, D]; [B, S, 1]."""
        weight, bias = self.gate
        return 0.5 * torch.tanh((o1 * weight).sum(-1, keepdim=True) + bias) + 0.5


def rope_of(spec: ModelSpec, length: int, long: bool | None = None) -> tuple[Tensor, Tensor]:
    """cos and sin, [length, E/2] each. long: use the long factors (None: as for a prompt of this length)."""
    rope = spec.long_rope
    if rope is None:
        return rope_tables(spec.head_dim, spec.rope_theta, length)
    long = length > rope.original_max_position_embeddings if long is None else long
    factors = rope.long_factor if long else rope.short_factor
    return rope_tables(spec.head_dim, spec.rope_theta, length, factors, rope.amplitude)
