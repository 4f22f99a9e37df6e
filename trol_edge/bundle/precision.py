"""The types in which a bundle's weights are stored and computed. Pure data, written by export, read by everyone."""

from __future__ import annotations

import dataclasses
import math

PRECISIONS = ("fp32", "fp16", "int8", "int4", "fp8")
DYNAMIC = {"int8-dynamic": "int8", "int4-dynamic": "int4"}  # recipes without calibration -> precision of the decoder
RECIPES = (*PRECISIONS, *DYNAMIC)
QUANTIZED = ("int8", "int4", "fp8")
BLOCKS = (32, 64, 128)
BITS = {"int8": 8, "int4": 4, "fp8": 8}


@dataclasses.dataclass(frozen=True)
class LinearPlan:
    """How one Linear weight is treated.

    "fp32" and "fp16" multiply in floating point. "int8" and "fp8" have one scale per output channel, "int4" one per
    `block` inputs of an output channel. With `activations` the input is rounded too, with one scale found by
    calibration.
    """

    precision: str  # one of PRECISIONS
    block: int | None = None  # inputs that share a scale, one of BLOCKS; for int4 only
    activations: bool = False  # for int8 and fp8 only

    def problems(self) -> list[str]:
        """What is wrong with the plan, in words; empty if nothing is."""
        found = []
        if self.precision not in PRECISIONS:
            found.append(f"precision {self.precision!r} is not one of {', '.join(PRECISIONS)}")
        if self.precision == "int4" and self.block not in BLOCKS:
            found.append(f"block {self.block} of int4 is not one of {', '.join(map(str, BLOCKS))}")
        if self.precision != "int4" and self.block is not None:
            found.append(f"{self.precision} has no blocks, but block {self.block} is given")
        if self.activations and self.precision not in ("int8", "fp8"):
            found.append(f"{self.precision} rounds no activations")
        return found


@dataclasses.dataclass(frozen=True)
class PrecisionPlan:
    """How every Linear of a bundle is treated, and the type in which everything else is computed."""

    recipe: str  # one of RECIPES, or "mixed"
    compute: str  # "fp32" or "fp16", for all but quantized Linears (norms, attention, residual stream)
    linears: dict[str, LinearPlan]  # parameter -> treatment; "decoder.layers.0.qkv.weight", "....qkv.lora_a", ...
    observer: str | None = None  # method for activation scales; None: no activation is rounded
    scaling: bool = False  # channels were rescaled between Linears and the norms or Linears before them
    clipping: bool = False  # weight scales minimise the error instead of covering the largest weight
    kept_fp32: tuple[str, ...] = ()  # with compute "fp16": tensors that overflow and stay in float32
    embedding: str | None = None  # "int8": the table has 8 bits, and a scale per row; None: as the checkpoint has it
    kv: str | None = None  # "int8": keys and values are kept in 8 bits, see cache_scales.py; None: as they are computed

    @property
    def quantized(self) -> bool:
        """Whether any Linear is quantized."""
        return any(linear.precision in QUANTIZED for linear in self.linears.values())

    @property
    def can_share_weights(self) -> bool:
        """Whether two engines could read the decoder's matrices from one buffer. TensorRT takes no 4-bit inputs."""
        return all(p.precision != "int4" for name, p in self.linears.items() if name.startswith("decoder."))


@dataclasses.dataclass(frozen=True)
class CalibrationInfo:
    """Where the activation statistics came from."""

    samples: int
    checkpoint: str  # identity of the checkpoint that they are from


@dataclasses.dataclass(frozen=True)
class Part:
    """One part of a model, with its size, its Linears by precision, and the fewest bytes that it takes.

    `bytes` counts every number once at the bits of its precision, and the scales. A bundle that takes much more stores
    something twice.
    """

    numbers: int
    linears: dict[str, int]  # "int8" -> number of Linears
    bytes: int


def part_of(parameter: str) -> str:
    """The part of a model that a parameter belongs to."""
    if parameter.startswith("vision."):
        return "projector" if parameter.startswith("vision.proj") else "vision"
    if parameter.endswith((".lora_a", ".lora_b")):
        return "low-rank"
    if parameter.startswith("decoder.lm_head"):
        return "output layer"
    return "embedding" if parameter == "embedding" else "decoder"


def tensor_bytes(shape: tuple[int, ...], linear: LinearPlan | None, item_bytes: int, scale_bytes: int) -> int:
    """Bytes of a parameter [out, in] with its scales. item_bytes: bytes of a number that is not quantized."""
    numbers = math.prod(shape)
    if linear is None or linear.precision not in QUANTIZED:
        return numbers * item_bytes
    return numbers * BITS[linear.precision] // 8 + numbers // (linear.block or shape[1]) * scale_bytes
