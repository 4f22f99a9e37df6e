"""A program: the tensors and kernels of one optimization profile of an engine, from whatever source they were read."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable, Mapping, Sequence

from trol_edge.errors import BundleError, UsageError

# Bits of one number, by the names that engines use. fp8 and the like are spelled in several ways.
BITS = {"double": 64, "int64": 64, "float": 32, "int32": 32, "half": 16, "bf16": 16, "bfloat16": 16, "int16": 16}
BITS |= {"int8": 8, "uint8": 8, "bool": 8, "fp8": 8, "fp8_e4m3": 8, "f8e4m3": 8, "int4": 4, "fp4": 4}
# Places of a tensor. "in place" is an input whose address is that of an output, too.
PLACES = ("constant", "input", "output", "in place", "scratch", "host")
MOVES = {"Move", "Tran", "Resh", "Slic", "Conc", "Repl", "Spli", "Scat", "Gath", "Cast", "Mul"}
Dim = int | str


@dataclasses.dataclass(frozen=True)
class Tensor:
    """A tensor of a program. A dimension that depends on the inputs is a name. payload: bytes of a stored constant."""

    name: str
    dims: tuple[Dim, ...]
    dtype: str
    place: str  # one of PLACES
    payload: int | None = None
    stored: str = ""  # where the constant is stored; tensors with the same value are one
    base: str = ""  # the whole tensor that this one is a part of

    def numbers(self, sizes: Mapping[str, int]) -> int:
        """The count of its numbers. Raises BundleError for a dimension that the program's arithmetic does not give."""
        unknown = [dim for dim in self.dims if isinstance(dim, str) and dim not in sizes]
        if unknown:
            raise BundleError(f"the size {unknown[0]} of tensor {self.name} cannot be computed from the input shapes")
        return math.prod(sizes[dim] if isinstance(dim, str) else dim for dim in self.dims)

    def bytes(self, sizes: Mapping[str, int]) -> int:
        """Its bytes on the device; 0 for a number that the host passes to a kernel."""
        if self.place == "host":
            return 0
        if self.payload is not None:
            return self.payload
        if self.dtype not in BITS:
            raise BundleError(f"tensor {self.name} has the type {self.dtype}, whose size is not known")
        return -(-self.numbers(sizes) * BITS[self.dtype] // 8)


@dataclasses.dataclass(frozen=True)
class Kernel:
    """One kernel, in the order of the program. form: how it works, where the engine says it ("" if not)."""

    what: str  # "function", "fully_connected", "runtime_fusion", ...
    name: str
    reads: tuple[str, ...]  # names of tensors, once per use
    writes: tuple[str, ...]
    form: str = ""  # "pointwise", "reduction", "scatter", "attention" or ""
    layers: tuple[str, ...] = ()  # nodes of the graph

    @property
    def words(self) -> tuple[str, ...]:
        """The operators fused into it, as its name lists them; "Etc" is last where the name was cut off."""
        return tuple(re.findall(r"[A-Z][a-z0-9]*", self.name)) if self.name.startswith("__myl_") else ()


@dataclasses.dataclass(frozen=True)
class Assignment:
    """One line of the arithmetic that computes dynamic dimensions on the host."""

    operator: str
    output: str
    inputs: tuple[str, ...]
    value: int | None = None  # of a constant


@dataclasses.dataclass(frozen=True)
class Program:
    """One optimization profile of an engine.

    inputs, outputs: names of the graph's ports -> names of tensors. scratch_bytes: held for the largest shapes.
    arithmetic, bounds: how dynamic dimensions follow from the inputs, and conditions on them (name, what it says).
    """

    library: str
    tensors: dict[str, Tensor]
    kernels: tuple[Kernel, ...]
    inputs: dict[str, str]
    outputs: dict[str, str]
    scratch_bytes: int
    arithmetic: tuple[Assignment, ...] = ()
    bounds: tuple[tuple[str, str], ...] = ()

    def sizes(self, shapes: Mapping[str, Sequence[int]]) -> dict[str, int]:
        """The values of dynamic dimensions for shapes of inputs, by port; static ones may be left out.

        An input of which only the shape matters is not in the program; the shape of an output may be given instead.

        Raises UsageError for a shape that is missing or does not fit, or that is outside this profile.
        """
        found: dict[str, int] = {}
        origin = {line.output: line.inputs[0] for line in self.arithmetic if line.operator == "copy" and line.inputs}
        for port, name in (*self.inputs.items(), *self.outputs.items()):
            dims = self.tensors[name].dims if name in self.tensors else ()
            if not any(isinstance(dim, str) for dim in dims) or self.tensors[name].place == "host":
                given = tuple(shapes.get(port, dims))
                if dims and len(given) == len(dims) and given != dims:  # of a profile for this size alone
                    raise UsageError(f"{port} is {list(dims)}, not {list(given)}")
                continue
            if port not in shapes and port in self.outputs:
                continue
            if port not in shapes or len(shapes[port]) != len(dims):
                raise UsageError(f"{port} has {len(dims)} dimensions, some dynamic; give its shape")
            for dim, size in zip(dims, shapes[port], strict=True):
                if isinstance(dim, int):
                    if dim != size:
                        raise UsageError(f"{port} has a dimension of {dim}, not {size}")
                    continue
                # A dimension is a copy of a number that the host gets, from which all others are computed.
                known: str | None = dim
                while known is not None and known not in found:
                    found[known] = size
                    known = origin.get(known)
                if known is not None and found[known] != size:
                    raise UsageError(f"{port}: {size} disagrees with the {found[known]} of another tensor")
        for line in self.arithmetic:
            if line.output not in found and (value := _value(line, found)) is not None:
                found[line.output] = value
        for condition, text in self.bounds:
            if found.get(condition) == 0:
                raise UsageError(f"outside this profile: {text}")
        return found


def _quotient(a: int, b: int) -> int:
    return abs(a) // abs(b) * (1 if (a < 0) == (b < 0) else -1)  # towards zero, as in C


_OPERATORS: dict[str, Callable[..., int]] = {
    "copy": lambda a: a,
    "add": lambda a, b: a + b,
    "sub": lambda a, b: a - b,
    "mul": lambda a, b: a * b,
    "div": _quotient,
    "min": min,
    "max": max,
    "select": lambda condition, a, b: a if condition else b,
    "eq": lambda a, b: int(a == b),
    "neq": lambda a, b: int(a != b),
    "lt": lambda a, b: int(a < b),
    "leq": lambda a, b: int(a <= b),
    "gt": lambda a, b: int(a > b),
    "geq": lambda a, b: int(a >= b),
    "and": lambda a, b: int(bool(a and b)),
    "or": lambda a, b: int(bool(a or b)),
}
LARGEST = 1 << 62  # no true dimension is larger; a crafted product would grow without bound


def _value(line: Assignment, known: Mapping[str, int]) -> int | None:
    """The value of a line; None if an operand or the operator is unknown."""
    if line.value is not None:
        return line.value
    operands = [known.get(name) for name in line.inputs]
    if line.operator not in _OPERATORS or None in operands or (line.operator == "div" and operands[-1] == 0):
        return None
    try:
        value = _OPERATORS[line.operator](*operands)
    except TypeError:  # another number of operands
        return None
    return value if abs(value) < LARGEST else None
