"""Runs the reference with second passes left out, and measures what that does to the logits.

Runs that leave out different layers are the same up to the first layer in which they differ, and go through it once.
Weights are streamed: all runs pass a layer before the next one is read. Calibration keeps the hidden states between
layers on disk, and the search for a traversal, which has few runs, in memory.

Axes: S tokens of a prompt, D hidden, R rows whose logits are compared, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from trol_edge.bundle.spec import ModelSpec
from trol_edge.calibration.samples import Progress
from trol_edge.export.gates import Gates, Loss
from trol_edge.export.reference.checkpoint import Checkpoint
from trol_edge.export.reference.layerwise import Layerwise, rope_of
from trol_edge.export.reference.model import EagerAttention

Layers = tuple[int, ...]  # in order


class Runs:
    """Which runs there are, by the layers whose second pass is left out, and what they share.

    before[i]: the runs that differ below layer i, each named by the layers below i that are left out.
    """

    def __init__(self, chosen: Iterable[Layers], layers: int) -> None:
        self.chosen = tuple(chosen)
        self.before: list[list[Layers]] = [[()]]
        for i in range(layers):
            self.before.append([after for run in self.before[i] for after in self._after(run, i)])

    def _after(self, run: Layers, layer: int) -> list[Layers]:
        """What becomes of a run in a layer: itself with the second pass, or without it, or both."""
        alike = [c for c in self.chosen if tuple(i for i in c if i < layer) == run]
        twice = [run] if any(layer not in c for c in alike) else []
        return [*twice, *([(*run, layer)] if any(layer in c for c in alike) else [])]

    def through(
        self, model: Layerwise, module: Any, layer: int, run: Layers, x: Tensor, images: NDArray[np.bool_]
    ) -> list[Tensor]:
        """Take a run's hidden states x [S, D] through a layer; returns one for each run that it becomes."""
        after = self._after(run, layer)
        o1, _, mixed = model.traverse(
            module, 0, x[None], lora_mask(model.spec, images), causal(model.spec, len(x)), twice=run in after
        )
        return [(mixed if each == run else o1)[0] for each in after]


def causal(spec: ModelSpec, length: int) -> EagerAttention:
    """Attention over a prompt from its first token on."""
    attend = EagerAttention(spec, *rope_of(spec, length))
    attend.positions = torch.arange(length)
    return attend


def lora_mask(spec: ModelSpec, images: NDArray[np.bool_]) -> Tensor | None:
    """The image tokens [1, S, 1] for the low-rank parts; None where there is nothing for them."""
    return torch.from_numpy(images).float()[None, :, None] if spec.lora_rank and images.any() else None


def alone_and_from_top(layers: int) -> list[Layers]:
    """The runs of a calibration: nothing left out, each layer alone, and from the top layer down to each."""
    alone = [(i,) for i in range(layers)]
    return [(), *alone, *(tuple(range(i, layers)) for i in range(layers - 1))]


def losses(source: Checkpoint, runs: Runs, rows: Sequence[Sequence[Tensor]]) -> list[Loss]:
    """What each run but the first, which leaves nothing out, does to the logits.

    rows[run][sample]: what the output layer reads, after the last norm, [R, D], in the order of `runs.before[-1]`,
    which begins with that run.
    """
    sizes = [len(sample) for sample in rows[0]]
    nats, same = divergence(source, torch.stack([torch.cat(list(run)) for run in rows]))
    found = {}
    for i, run in enumerate(runs.before[-1]):
        means = [float(part.mean()) for part in nats[i].split(sizes)]
        found[run] = Loss(run, max(0.0, float(np.mean(means))), float(same[i].double().mean()))
    return [found[run] for run in runs.chosen if run]


def divergence(source: Checkpoint, runs: Tensor) -> tuple[Tensor, Tensor]:
    """Compare the logits of runs [N, R, D] with those of the first; the output layer is streamed twice.

    Returns the divergence from the first in nats, float64, and whether the most probable token is the same, both
    [N, R].
    """
    total = torch.full(runs.shape[:2], -torch.inf, dtype=torch.float64)  # logarithm of the sum of exponentials
    best, top = total.clone(), torch.zeros(runs.shape[:2], dtype=torch.int64)
    for start, block in source.blocks("decoder.lm_head.weight"):
        weight = block.float()
        for i, rows in enumerate(runs):
            logits = F.linear(rows, weight).double()
            total[i] = torch.logaddexp(total[i], logits.logsumexp(-1))
            value, place = logits.max(-1)
            better = value > best[i]
            best[i], top[i] = torch.where(better, value, best[i]), torch.where(better, place + start, top[i])
    nats = torch.zeros_like(total)
    for _, block in source.blocks("decoder.lm_head.weight"):
        weight = block.float()
        p = F.linear(runs[0], weight).double() - total[0][:, None]
        for i, rows in enumerate(runs):
            q = F.linear(rows, weight).double() - total[i][:, None]
            nats[i] += (p.exp() * (p - q)).sum(-1)
    return nats, top == top[:1]


class Measure:
    """Measures any choice of second passes that are left out, in float32, on the prompts that a calibration kept."""

    def __init__(self, source: Checkpoint, gates: Gates, progress: Progress = lambda what, done, total: None) -> None:
        self.source, self.gates, self.progress = source, gates, progress
        self.model = Layerwise(source)
        self.count = gates.state.left_out
        self.wanted: list[Tensor] | None = None

    @torch.no_grad()
    def __call__(self, layers: Layers) -> Loss:
        """Leave out the second passes of these layers. Every call reads the decoder's weights once."""
        chosen = [layers] if self.wanted else [(), layers]
        runs = Runs(chosen, self.source.spec.num_layers)
        rows = self._rows(runs)
        if self.wanted is None:
            self.wanted = rows[0]
        found = rows[runs.before[-1].index(layers)]
        return losses(self.source, Runs([(), layers], self.source.spec.num_layers), [self.wanted, found])[0]

    def _rows(self, runs: Runs) -> list[list[Tensor]]:
        spec = self.source.spec
        prompts = self.gates.prompts[: self.count]
        hidden = [[torch.from_numpy(self.gates.embedded(k, spec.hidden_size)) for k in range(self.count)]]
        for i in range(spec.num_layers):
            with self.model.part(f"decoder.layers.{i}") as layer:
                following: list[list[Tensor]] = [[] for _ in runs.before[i + 1]]
                for k, prompt in enumerate(prompts):
                    place = 0
                    for run, states in zip(runs.before[i], hidden, strict=True):
                        for x in runs.through(self.model, layer, i, run, states[k], prompt.images):
                            following[place].append(x)
                            place += 1
                hidden = following
            self.progress("traversal", i + 1, spec.num_layers)
        with self.model.part("decoder.norm") as norm:
            return [[norm(x[p.question - 1 :]) for x, p in zip(run, prompts, strict=True)] for run in hidden]
