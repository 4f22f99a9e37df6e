"""Turns a recipe's name or a JSON file into a plan that says how every Linear is treated.

| recipe | decoder Linears | LoRA | output layer | vision tower, projector | everything else |
|---|---|---|---|---|---|
| fp32 | the checkpoint's dtype, multiplied in FP32 | same | same | same | FP32 |
| fp16 | FP16 | FP16 | FP16 | FP16 | FP16, but FP32 where calibration saw values that FP16 cannot hold |
| int8 | W8A8 | A: W8A8, B: W8 | W8A8 | W8A8 | floating point |
| int8-dynamic (CPU only) | W8 | W8 | W8 | W8 | FP32 |
| int4 | W4 in blocks; W8 where that costs too much | as int8 | W8 | W8A8 | floating point |
| int4-dynamic (CPU only) | W4 in blocks | W8 | W8 | W8 | FP32 |
| fp8  | W8A8 in E4M3 | A: the same, B: FP16 | the same | the same | floating point |

W8A8: 8-bit weights with a scale per output channel, inputs rounded to 8 bits with one static scale per tensor.
W8 and W4 round weights only. On a CPU the input of a W8 product is rounded while it runs, with one scale per token, for
which int8-dynamic and int4-dynamic need no calibration. TensorRT has no product for W8, so its targets get W8A8
instead, but for a low-rank B. "Floating point" is FP32 for the CPU target, FP16 as in the recipe fp16 for the others.
Norms, biases, the gate, the patch convolution, rotary tables and attention are never quantized. The embedding has 8
bits with a scale per row in the recipes without calibration, and in the others it stays as it is.
"""

from __future__ import annotations

import dataclasses
import fnmatch
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from trol_edge.bundle import targets
from trol_edge.bundle.cache_scales import EIGHT_BITS
from trol_edge.bundle.precision import BLOCKS, DYNAMIC, PRECISIONS, QUANTIZED, RECIPES, LinearPlan, PrecisionPlan
from trol_edge.bundle.strict import from_dict
from trol_edge.errors import UsageError
from trol_edge.reading import guard, read_json_value

OBSERVERS = ("minmax", "percentile", "entropy", "mse")
EXPORT_TARGETS = ("cpu", "onnx", *filter(targets.is_gpu, targets.TARGETS))
GATE = "decoder.gate.weight"  # never quantized, because one column that all layers share saves nothing
SMALL = 500_000_000  # parameters, up to which FP32 is the default on a CPU


@dataclasses.dataclass(frozen=True)
class RecipeOptions:
    """What a user can choose. A mixed plan file has these keys. None leaves the choice to the recipe."""

    recipe: str = "fp32"  # one of RECIPES
    block: int | None = None  # inputs that share a scale of int4; None: 32, in int4-dynamic the largest that fits
    lm_head: str | None = None  # precision of the output layer
    vision: str | None = None  # precision of vision tower and projector
    lora: str | None = None  # precision of the low-rank parts
    observer: str = "mse"  # sets the activation scales: minmax, percentile, entropy or mse
    scaling: bool = True  # rescale channels where that cancels: SmoothQuant for int8 and fp8, AWQ for int4
    clipping: bool = True  # search weight scales of least error
    sensitive: float | None = 0.02  # int4: Linears with a larger output error (share of its energy) get int8
    kv: str | None = None  # "int8": keep keys and values in 8 bits, on a CPU
    linears: dict[str, LinearPlan] = dataclasses.field(default_factory=dict)  # pattern -> treatment; the last wins

    def __post_init__(self) -> None:
        known = {
            "recipe": (self.recipe, RECIPES),
            "block": (self.block, (None, *BLOCKS)),
            "lm_head": (self.lm_head, (None, *PRECISIONS)),
            "vision": (self.vision, (None, *PRECISIONS)),
            "lora": (self.lora, (None, *PRECISIONS)),
            "observer": (self.observer, OBSERVERS),
            "kv": (self.kv, (None, EIGHT_BITS)),
        }
        wrong = [
            f"{name} {value!r} is not one of {', '.join(str(c) for c in choices if c is not None)}"
            for name, (value, choices) in known.items()
            if value not in choices
        ]
        if self.sensitive is not None and not self.sensitive > 0:
            wrong.append(f"sensitive {self.sensitive!r} is not above 0")
        for pattern, linear in self.linears.items():
            wrong += [f"{pattern}: {problem}" for problem in linear.problems()]
        if wrong:
            raise UsageError(f"precision: {'; '.join(wrong)}")

    @property
    def once(self) -> bool:
        """Whether 4-bit weights are held once, for prompts and steps alike (see export/graphs/layers.py)."""
        return DYNAMIC.get(self.recipe) == "int4"


def read_options(recipe_or_file: str | os.PathLike[str], **chosen: Any) -> RecipeOptions:
    """Read options from a recipe's name or a JSON file with the fields of `Options`; `chosen` wins if not None.

    Raises UsageError for unknown keys and values, naming them all.
    """
    given = {name: value for name, value in chosen.items() if value is not None}
    if recipe_or_file in RECIPES:
        return RecipeOptions(recipe=str(recipe_or_file), **given)
    path = Path(recipe_or_file)
    if not path.is_file():
        raise UsageError(
            f"precision {str(recipe_or_file)!r} is neither one of {', '.join(RECIPES)} nor a file with a plan"
        )
    data = read_json_value(path, UsageError, "give the file of a plan")
    if isinstance(data, dict):
        data = data | given
    advice = "See docs/quantization.md for the keys of a plan"
    with guard(path, UsageError, advice):
        return from_dict(RecipeOptions, data, str(path), UsageError, advice)


def default_recipe(target: str, parameters: int) -> str:
    """The recipe of an export whose user chooses none. parameters: numbers of the checkpoint.

    On a CPU a published size is too large in FP32 for most laptops, and int4-dynamic needs no calibration.
    """
    return "int4-dynamic" if target == "cpu" and parameters > SMALL else "fp32"


def needs_statistics(options: RecipeOptions, plan: PrecisionPlan) -> bool:
    """Whether the plan that these options give needs calibration statistics."""
    return plan.kv is not None or calibrates_computation(options, plan)


def calibrates_computation(options: RecipeOptions, plan: PrecisionPlan) -> bool:
    """Whether it needs them for something else than keys and values: for Linears, or for what FP16 cannot hold."""
    if plan.compute == "fp16" or any(linear.activations for linear in plan.linears.values()):
        return True
    return plan.quantized and options.recipe not in DYNAMIC


def is_linear(name: str, shape: Sequence[object]) -> bool:
    """Whether a parameter is a Linear weight (or a low-rank part of one), and so stored as MatMul reads it."""
    return len(shape) == 2 and name.endswith((".weight", ".lora_a", ".lora_b"))


def point_of(parameter: str) -> str:
    """The point whose statistics describe a Linear's input: "a.qkv" of "a.qkv.weight" and of "a.qkv.lora_a"."""
    return parameter.removesuffix(".weight").removesuffix(".lora_a")


def make_plan(options: RecipeOptions, shapes: Mapping[str, tuple[int, ...]], target: str) -> PrecisionPlan:
    """Make a plan for a checkpoint whose parameters have these shapes ([out, in] of a Linear).

    Raises UsageError if the target cannot run what is asked for, or a pattern fits no Linear.
    """
    linears = {n: _recipe(n, s, options) for n, s in shapes.items() if is_linear(n, s) and n != GATE}
    for pattern, linear in options.linears.items():
        matching = [name for name in linears if fnmatch.fnmatchcase(name, pattern)]
        if not matching:
            raise UsageError(f"precision: no Linear's name fits {pattern!r}; `trol-edge inspect --json` lists them")
        linears.update((name, linear) for name in matching)
    for name, linear in linears.items():
        if linear.precision == "int4" and (shapes[name][1] % (linear.block or 1) or shapes[name][0] % 2):
            # A block may not end outside its row, which matters for the low-rank parts of a small model.
            linears[name] = LinearPlan("int8")
    if targets.is_gpu(target):
        linears = {name: _with_product(name, linear) for name, linear in linears.items()}
    used = {linear.precision for linear in linears.values()}
    if "fp8" in used and targets.is_gpu(target) and "fp8" not in targets.target(target).precisions:
        raise UsageError(f"precision fp8: target {target} has no FP8 units on its GPUs; choose int8 or int4")
    if target == "cpu" and "fp8" in used:
        raise UsageError(
            "precision fp8: ONNX Runtime has no FP8 kernels on a CPU; choose int8, or --target onnx for a GPU that "
            "has FP8 (NVIDIA Ada, Hopper, Blackwell, Thor; not Orin)"
        )
    if options.recipe in DYNAMIC and target != "cpu":
        raise UsageError(
            f"precision {options.recipe}: only the target cpu rounds inputs while it runs; choose "
            f"{DYNAMIC[options.recipe]}"
        )
    if options.kv is not None and target != "cpu":
        raise UsageError(
            f"8-bit keys and values (--kv {options.kv}): only the target cpu has kernels for them; leave the option "
            "out (docs/quantization.md says what TensorRT makes of them)"
        )
    compute = "fp16" if target != "cpu" and options.recipe != "fp32" else "fp32"
    quantized = [linear for linear in linears.values() if linear.precision in QUANTIZED]
    return PrecisionPlan(
        recipe="mixed" if options.linears else options.recipe,
        compute=compute,
        linears=linears,
        observer=options.observer if any(linear.activations for linear in quantized) else None,
        scaling=options.scaling and bool(quantized),
        # With a scale per channel and nothing known of the inputs, the largest weight is the best guess.
        clipping=options.clipping and bool(quantized) and options.recipe != "int8-dynamic",
        embedding="int8" if options.recipe in DYNAMIC else None,
        kv=options.kv,
    )


def _with_product(name: str, linear: LinearPlan) -> LinearPlan:
    """A treatment for which TensorRT has a product: with 8-bit weights it multiplies 8-bit inputs only.

    Weights alone would be widened into scratch memory at every run. A low-rank B is left as it is: calibration does not
    see its input, and no step reads it.
    """
    if linear.precision in ("int8", "fp8") and not name.endswith(".lora_b"):
        return dataclasses.replace(linear, activations=True)
    return linear


def _recipe(name: str, shape: tuple[int, ...], options: RecipeOptions) -> LinearPlan:
    recipe = precision = DYNAMIC.get(options.recipe, options.recipe)
    calibrated = options.recipe not in DYNAMIC
    if name.startswith("vision."):
        precision = options.vision or {"int4": "int8"}.get(recipe, recipe)
    elif name == "decoder.lm_head.weight":
        precision = options.lm_head or {"int4": "int8"}.get(recipe, recipe)
        calibrated = calibrated and recipe == precision
    elif name.endswith((".lora_a", ".lora_b")):
        precision = options.lora or {"int4": "int8"}.get(recipe, recipe)
        if name.endswith(".lora_b"):
            calibrated = False  # no calibration sees its input
            precision = "fp16" if precision == "fp8" else precision  # FP8 weights alone have no kernels
    block = (options.block or _block(shape[1], options)) if precision == "int4" else None
    return LinearPlan(precision, block, calibrated and precision in ("int8", "fp8"))


def _block(inputs: int, options: RecipeOptions) -> int:
    """The block size for a Linear's inputs, if the user chooses none.

    Large blocks take least memory: what ONNX Runtime packs has two numbers of 32 bits for each, and the scale stays.
    """
    fitting = [block for block in BLOCKS if inputs % block == 0]
    return max(fitting, default=BLOCKS[0]) if options.once else BLOCKS[0]
