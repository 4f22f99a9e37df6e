"""Makes a program from what TensorRT's own engine inspector says about an engine, as JSON, on the device that runs it.

This is for classic TensorRT, whose engine files hold no text. The engine must have been built with detailed profiling
information, as `trol-edge build` does. Not yet run on a device; the fields are those of NVIDIA's documentation for 10.3
to 11. The inspector shows no arithmetic of dynamic dimensions, so it must be asked with an execution context that has
its shapes. What it does not say raises BundleError: a layer by its name only, a dynamic dimension, a product without
weights.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from trol_edge.errors import BundleError
from trol_edge.program.model import Kernel, Program, Tensor
from trol_edge.reading import guard, parse_json, printable

# Names of types in formats such as "Row major linear FP16 format (kLINEAR)", or alone; the first that matches counts.
_TYPES = (
    (r"int64", "int64"),
    (r"int32", "int32"),
    (r"bf16|bfloat16", "bf16"),
    (r"half|fp16|float16", "half"),
    (r"fp8", "fp8"),
    (r"int8", "int8"),
    (r"int4", "int4"),
    (r"bool", "bool"),
    (r"uint8", "uint8"),
    (r"float|fp32", "float"),
)
_SILENT = {"signal", "wait", "shape_call", "shapehostto devicecopy", "noop", "constant"}
_PRODUCTS = {"gemm": "gemm", "matrixmultiply": "gemm", "conv": "conv", "convolution": "conv", "caskconvolution": "conv"}
MOST_TEXT = 64 << 20


def parse(text: str, library: str, where: str, scratch_bytes: int = 0, most: int = 1 << 18) -> Program:
    """A program from the inspector's JSON. where: the engine, for messages. scratch_bytes: what the engine asks for."""
    advice = "build the engine again with `trol-edge build --force`"
    if len(text) > MOST_TEXT:
        raise BundleError(f"{where}: the inspector's text has {len(text)} characters, more than {MOST_TEXT}; {advice}")
    with guard(where, BundleError, advice, "what the inspector says is not readable"):
        data = parse_json(text)
        layers = data.get("Layers") if isinstance(data, dict) else None
        if not isinstance(layers, list) or not layers or len(layers) > most:
            raise BundleError(f"{where}: the inspector lists no layers; {advice}")
        if not all(isinstance(layer, dict) for layer in layers):
            raise BundleError(f"{where}: the inspector gives layers by their names only; {advice}")
        return _program(layers, data, library, where, scratch_bytes)


def _program(layers: list[Any], data: Mapping[str, Any], library: str, where: str, scratch_bytes: int) -> Program:
    ports = _ports(data)
    made = {_name(port) for layer in layers for port in layer.get("Outputs", ())}
    read = {_name(port) for layer in layers for port in layer.get("Inputs", ())}
    tensors: dict[str, Tensor] = {}
    kernels = []
    for layer in layers:
        kind = str(layer.get("LayerType", "")).lower()
        if kind in _SILENT:
            continue
        for port in (*layer.get("Inputs", ()), *layer.get("Outputs", ())):
            name = _name(port)
            if name in ports:
                place = "in place" if name in made and name in read else "output" if name in made else "input"
            else:
                place = "scratch" if name in made else "constant"
            tensors.setdefault(name, _tensor(port, name, place, where))
        reads = [_name(port) for port in layer.get("Inputs", ())]
        stored = layer.get("Weights")
        if isinstance(stored, dict) and isinstance(stored.get("Count"), int):
            name = f"{layer.get('Name')}.weights"
            tensors[name] = Tensor(name, (stored["Count"],), _type(str(stored.get("Type", "")), where), "constant")
            reads.append(name)
        what = _PRODUCTS.get(kind, kind)
        if what in ("gemm", "conv") and len(reads) < 2:
            raise BundleError(f"{where}: the inspector does not say which weights layer {layer.get('Name')} reads")
        kernels.append(
            Kernel(
                what=what,
                name=re.sub(r"_myl\d+_\d+$", "", str(layer.get("Name", ""))),
                reads=tuple(reads),
                writes=tuple(_name(port) for port in layer.get("Outputs", ())),
                form="attention" if "_mha" in str(layer.get("Name", "")) else "",
                layers=tuple(re.findall(r"\[ONNX Layer: ([^\]]*)\]", str(layer.get("Metadata", "")))),
            )
        )
    return Program(
        library=library,
        tensors=tensors,
        kernels=tuple(kernels),
        inputs={name: name for name in ports if name in tensors and name not in made},
        outputs={name: name for name in ports if name in made},
        scratch_bytes=scratch_bytes,
    )


def _ports(data: Mapping[str, Any]) -> set[str]:
    """Names of inputs and outputs: "Bindings" up to TensorRT 10, "I/O Tensors" in 11."""
    listed = data.get("I/O Tensors", data.get("Bindings", ()))
    return {_name(port) if isinstance(port, dict) else str(port) for port in listed}


def _name(port: Mapping[str, Any]) -> str:
    return str(port["Name"])


def _tensor(port: Mapping[str, Any], name: str, place: str, where: str) -> Tensor:
    dims = port.get("Dimensions")
    if not isinstance(dims, list) or not all(isinstance(dim, int) and dim >= 0 for dim in dims):
        raise BundleError(f"{where}: the inspector gives tensor {printable(name)[:80]} no fixed shape")
    kind = str(port.get("Format/Datatype", port.get("Datatype", port.get("DataType", ""))))
    host = str(port.get("Location", "")).lower() == "host"
    return Tensor(name, tuple(dims), _type(kind, where), "host" if host else place)


def _type(text: str, where: str) -> str:
    found = next((name for pattern, name in _TYPES if re.search(pattern, text.lower())), None)
    if found is None:
        raise BundleError(f"{where}: the inspector names a type {printable(text)[:60]!r}, which is not known")
    return found
