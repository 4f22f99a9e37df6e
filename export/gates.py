"""What calibration saw of the gate, and what it cost to leave second passes out: read from a folder of statistics.

The gate's value s is the share of the second pass in a layer's output, per token (see `reference/layerwise.py`). Parts
of the folder (see `quantize/stats.py`) hold beside their points

decoder.embed        "prompts" in JSON, and of each its kinds [S] and, where second passes are left out, the decoder's
                     input as embedded/<k> [S, D]
decoder.layers.<i>   "gate" in JSON, by kind of token, and gate/<k> [S], s of the prompt's tokens
left_out.lm_head     "losses" in JSON

Folders that earlier versions wrote have none of it.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trol_edge.bundle.strict import from_dict
from trol_edge.errors import CalibrationError
from trol_edge.export.quantize.stats import CalibrationState, finished_state, open_part, part_path, read_meta

Float32 = NDArray[np.float32]

KINDS = ("image", "system", "text")  # of tokens; text is the question and answer, and the template around them
GATE_BINS = 20  # of the histogram, equal ones over 0..1
ACTIVE = 0.1  # the authors' figure is read with this limit
SHOWN = 4  # samples of which every token's s is kept
EMBED, LEFT_OUT = "decoder.embed", "left_out.lm_head"  # stages
ADVICE = "calibrate again, into another folder or with --force"


@dataclasses.dataclass(frozen=True)
class Gate:
    """The values of s in one layer, over all tokens of one kind in all samples."""

    tokens: int
    mean: float
    active: float  # share of the tokens with s > 0.1
    histogram: tuple[int, ...]  # tokens in each of 20 equal bins over 0..1


@dataclasses.dataclass(frozen=True)
class Loss:
    """What leaving out the second pass of some layers does to the logits, against those of the whole model.

    Over the last token of the prompt and the tokens of the answer, if the sample has one.
    """

    layers: tuple[int, ...]  # those without their second pass
    nats: float  # Kullback-Leibler divergence, the mean over samples
    same_top: float  # share of the rows whose most probable token stays


@dataclasses.dataclass(frozen=True)
class Prompt:
    """A sample of which single tokens are kept."""

    name: str
    question: int  # tokens before the answer
    kinds: NDArray[np.uint8]  # [S], places in KINDS

    @property
    def images(self) -> NDArray[np.bool_]:
        """The image tokens, [S]."""
        return self.kinds == KINDS.index("image")


@dataclasses.dataclass(frozen=True)
class Gates:
    """The gate of a checkpoint on the samples of a calibration. Arrays are read from disk when they are asked for."""

    folder: Path
    state: CalibrationState
    layers: tuple[Mapping[str, Gate], ...]  # by kind of token; a kind that no sample has is missing
    prompts: tuple[Prompt, ...]
    losses: tuple[Loss, ...]  # empty if nothing was left out

    @property
    def alone(self) -> dict[int, Loss]:
        """Layer -> what it costs to leave out its second pass alone."""
        return {loss.layers[0]: loss for loss in self.losses if len(loss.layers) == 1}

    @property
    def from_top(self) -> dict[int, Loss]:
        """Layer -> what it costs to leave out its second pass and those of all layers above it."""
        last = len(self.layers) - 1
        return {loss.layers[0]: loss for loss in self.losses if loss.layers[-1] == last and _is_row(loss.layers)}

    def values(self, prompt: int) -> Float32:
        """s of every layer and token of a prompt, [L, S]."""
        size = len(self.prompts[prompt].kinds)
        parts = (part_path(self.folder, f"decoder.layers.{i}") for i in range(len(self.layers)))
        return np.stack([read_array(part, f"gate/{prompt}", (size,)) for part in parts])

    def embedded(self, prompt: int, width: int) -> Float32:
        """The decoder's input of a prompt, [S, D]. width: D."""
        part = part_path(self.folder, EMBED)
        return read_array(part, f"embedded/{prompt}", (len(self.prompts[prompt].kinds), width))


def load(folder: str | os.PathLike[str], checkpoint_identity: str | None, layers: int | None = None) -> Gates:
    """Read what a finished calibration says of the gate.

    checkpoint_identity: see `Statistics.load`. layers: number of layers of the checkpoint, if it is at hand. Raises
    CalibrationError for a folder that `Statistics.load` refuses, that is damaged, or that an earlier version wrote.
    """
    path = Path(folder)
    state = finished_state(path, checkpoint_identity)
    names = [stage for stage in state.stages if stage.startswith("decoder.layers.")]
    meta = read_meta(part_path(path, EMBED))
    if "prompts" not in meta or not names or len(names) != (layers or len(names)):
        raise CalibrationError(f"{path}: says nothing about the gate, an earlier version wrote it; {ADVICE}")
    read = functools.partial(from_dict, error=CalibrationError, advice=f"{path} is damaged; {ADVICE}")
    gates = []
    for name in names:
        found = read_meta(part_path(path, name)).get("gate")
        gates.append(read(dict[str, Gate], found, f"gate of {name}"))
    told = read(tuple[_Told, ...], meta["prompts"], "prompts")
    kinds = [read_array(part_path(path, EMBED), f"kinds/{i}", None, np.uint8) for i in range(len(told))]
    losses: tuple[Loss, ...] = ()
    if state.left_out:
        losses = read(tuple[Loss, ...], read_meta(part_path(path, LEFT_OUT)).get("losses"), "losses")
    result = Gates(
        path,
        state,
        tuple(gates),
        tuple(Prompt(p.name, p.question, k) for p, k in zip(told, kinds, strict=True)),
        losses,
    )
    if problem := _problem(result):
        raise CalibrationError(f"{path}: damaged ({problem}); {ADVICE}")
    return result


@dataclasses.dataclass(frozen=True)
class _Told:
    """A prompt in JSON."""

    name: str
    question: int


def _problem(found: Gates) -> str:
    """What is wrong with the numbers, in words."""
    gates = [(kind, gate) for layer in found.layers for kind, gate in layer.items()]
    if not all(
        kind in KINDS
        and len(gate.histogram) == GATE_BINS
        and sum(gate.histogram) == gate.tokens > 0
        and 0 <= gate.mean <= 1
        and 0 <= gate.active <= 1
        for kind, gate in gates
    ):
        return "values of a gate"
    if not all(0 < p.question <= len(p.kinds) and p.kinds.max(initial=0) < len(KINDS) for p in found.prompts):
        return "tokens of a prompt"
    count = len(found.layers)
    if not all(
        loss.layers
        and list(loss.layers) == sorted(set(loss.layers))
        and 0 <= loss.layers[0] <= loss.layers[-1] < count
        and math.isfinite(loss.nats)
        and 0 <= loss.same_top <= 1
        for loss in found.losses
    ):
        return "losses"
    measured = found.alone.keys() == found.from_top.keys() == set(range(count))
    if found.state.left_out and not (measured and len(found.prompts) >= found.state.left_out):
        return "losses are missing"
    return ""


def _is_row(layers: tuple[int, ...]) -> bool:
    return layers == tuple(range(layers[0], layers[-1] + 1))


def read_array(path: Path, name: str, shape: tuple[int, ...] | None, dtype: Any = np.float32) -> NDArray[Any]:
    """Read an array of a part. shape: what it must have; None takes any of one axis. Raises CalibrationError."""
    with open_part(path) as file:
        array: NDArray[Any] = file[name]
        if array.dtype != dtype or (array.ndim != 1 if shape is None else array.shape != shape):
            raise ValueError(f"{name} is {array.dtype} {list(array.shape)}")
        if dtype == np.float32 and not np.isfinite(array).all():
            raise ValueError(f"{name} holds NaN or infinite values")
        return array
