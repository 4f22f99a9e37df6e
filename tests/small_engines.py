"""Small networks whose programs have known traffic, and engine files made from program texts without TensorRT.

    python -m tests.small_engines            # builds them by TensorRT for RTX, and writes tests/data/programs

The texts there are those of TensorRT for RTX 1.7.1, so that the reader is tested where it is not installed.
"""

from __future__ import annotations

import re
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from trol_edge.runtimes.trt.api import load

DATA = Path(__file__).parent / "data" / "programs"
ROWS, INNER, OUTER = 8, 512, 384  # of a product
_CACHE = "float16[1,4,256,64] past"
_W8 = """
    w = DequantizeLinear<axis = 1>(weight, scales)
    y = MatMul(x, w)"""
# Graphs in ONNX's text, and the sizes of dynamic dimensions for which they are built.
GRAPHS = {
    # Past and present are two tensors: the whole cache is copied, then four rows are written.
    "copy": f"""({_CACHE}, int64[1,4,1,3] rows, float16[1,4,1,64] new) => (float16[1,4,256,64] present) {{
    present = ScatterND(past, rows, new) }}""",
    # TensorRT's own update of a cache, in place.
    "scatter": f"""({_CACHE}, float16[1,4,1,64] new, int64[1] at) => (float16[1,4,256,64] present) {{
    present = TensorScatter<axis = -2>(past, new, at) }}""",
    # As many rows of a cache as another input is long.
    "slice": f"""({_CACHE}, int64[slots] slots) => (float16[1,4,slots,64] y)
    <int64[1] zero = {{0}}, int64[1] axis = {{2}}> {{
    count = Shape(slots)
    part = Slice(past, zero, count, axis)
    y = Relu(part) }}""",
    # Weights and inputs of 8 bits, multiplied as they are.
    "product": f"""(float16[{ROWS},{INNER}] x0) => (float16[{ROWS},{OUTER}] y)  {{
    q = QuantizeLinear<output_dtype = {TensorProto.INT8}>(x0, step)
    x = DequantizeLinear(q, step){_W8} }}""",
    # Weights of 8 bits and inputs of 16, for which there is no product: the weights are widened at every run.
    "widened": f"""(float16[1,{INNER}] x) => (float16[1,{OUTER}] y) {{{_W8} }}""",
    # Weights of 4 bits in blocks, which a product reads as they are.
    "blocks": f"""(float16[1,{INNER}] x) => (float16[1,{OUTER}] y) {{
    w = DequantizeLinear<axis = 0, block_size = 128>(packed, block_scales)
    y = MatMul(x, w) }}""",
    # A step's attention over a cache of which a mask hides a part.
    "attention": f"""(float16[1,4,1,64] q, {_CACHE}, float16[1,4,256,64] values, bool[1,1,1,256] mask)
    => (float16[1,4,1,64] y) {{ y = Attention(q, past, values, mask) }}""",
}
SIZES = {"slots": (1, 100, 256)}


def graph(name: str) -> Any:
    """The ONNX model of a network, with random weights."""
    opset = 24 if "TensorScatter" in GRAPHS[name] else 23
    model = onnx.parser.parse_model(f'<ir_version: 11, opset_import: ["" : {opset}]> {name} {GRAPHS[name]}')
    random = np.random.default_rng(0)
    weights = {
        "weight": numpy_helper.from_array(random.integers(-127, 128, (INNER, OUTER), dtype=np.int8), "weight"),
        "scales": numpy_helper.from_array((random.random(OUTER) * 0.01 + 0.001).astype(np.float16), "scales"),
        "step": numpy_helper.from_array(np.float16(0.02), "step"),
        "packed": helper.make_tensor(
            "packed", TensorProto.INT4, (INNER, OUTER), random.bytes(INNER * OUTER // 2), raw=True
        ),
        "block_scales": numpy_helper.from_array(
            (random.random((INNER // 128, OUTER)) * 0.01 + 0.001).astype(np.float16), "block_scales"
        ),
    }
    used = {i for node in model.graph.node for i in node.input}
    model.graph.initializer.extend(weight for key, weight in weights.items() if key in used)
    return model


def build(name: str, folder: Path) -> Path:
    """Build a network by TensorRT for RTX, really; returns the engine's file."""
    model = graph(name)
    source, engine = folder / f"{name}.onnx", folder / f"{name}.engine"
    source.write_bytes(model.SerializeToString())
    shapes = {}
    for port in model.graph.input:
        dims = [d.dim_param or d.dim_value for d in port.type.tensor_type.shape.dim]
        if any(isinstance(d, str) for d in dims):
            sizes = [tuple(SIZES[d][i] if isinstance(d, str) else d for d in dims) for i in range(3)]
            shapes[port.name] = (sizes[0], sizes[1], sizes[2])
    load("tensorrt_rtx").parse(source).build(engine, [shapes] if shapes else [], None, lambda *report: None)
    return engine


def texts_of(engine: bytes) -> list[str]:
    """The texts of the programs in an engine of TensorRT for RTX 1.7."""
    found = []
    for match in re.finditer(re.escape(b"NLYM\xa1\xda\x1e\0"), engine):
        size = int.from_bytes(engine[match.end() : match.end() + 8], "little")
        text = engine[match.end() + 8 : match.end() + 8 + size].decode()
        found += [text] if text.startswith("header {\n  version = 5") else []
    return found


def engine_of(*texts: str, version: tuple[int, int, int] = (1, 7, 1)) -> bytes:
    """A file like an engine of TensorRT for RTX that holds these programs, and nothing to run."""
    section = b"ptrtd\0\0\0"
    for text in texts:
        data = text.encode()
        section += b"NLYM\xa1\xda\x1e\0" + len(data).to_bytes(8, "little") + data + b"\0code\0"
    weights = b"\0" * 64
    ends = 112 + len(section)
    table = b"NGNE\0\0\0\0" + (112).to_bytes(8, "little") + len(section).to_bytes(8, "little")
    table += b"THGW\0\0\0\0" + ends.to_bytes(8, "little") + len(weights).to_bytes(8, "little")
    head = b"vtrt\0\0\0\0\x02" + b"\0" * 7 + (ends + len(weights)).to_bytes(8, "little") + bytes(version) + b"tvtrt"
    return head.ljust(64, b"\0") + table + section + weights


def stored(name: str) -> str:
    """The committed text of a network's program."""
    return (DATA / f"{name}.txt").read_text(encoding="utf-8")


def main() -> None:
    """Build all networks and write the texts of their programs."""
    DATA.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        for name in GRAPHS:
            (text,) = texts_of(build(name, Path(folder)).read_bytes())
            (DATA / f"{name}.txt").write_text(text, encoding="utf-8")
            print(name, len(text))


if __name__ == "__main__":
    main()
