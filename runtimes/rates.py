"""Measures the rates of this machine's CPU with the operators that our graphs use.

Every rate is that of ONNX Runtime's own kernels on random numbers. Weights are graph inputs, as in a bundle, except
those of MatMulNBits, which are constants. The graphs are a few dozen bytes of protobuf, written here by hand, because a
robot does not have the onnx package.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trol_edge.errors import BackendError
from trol_edge.machine.identity import available_memory, has_amx
from trol_edge.plan.rates import PACKED, Platform, Rates, platform_of_host

try:
    import onnxruntime as ort
except ImportError as error:
    raise BackendError(f"onnxruntime is not usable here ({error}); pip install 'trol-edge[cpu]'") from error

SECONDS = 0.3  # least time of each measurement
WIDTH = 2048  # width of matrices whose size does not matter
PRODUCTS = ((128, 128, 16), (128, 128, 128), (128, 512, 512), (512, 2048, 2048))  # [S, K] x [K, N]
WORKING_SETS = (1 << 20, 4 << 20, 16 << 20, 64 << 20, 256 << 20, 1 << 30, 8 << 30)  # bytes
MATRICES = 64  # matrices of a working set; larger ones read faster, so one above MOST has only as many as fit MOST
MOST = 1 << 30
ATTENTIONS = ((128, 4, 32), (256, 16, 128))  # tokens, heads, head size
BLOCK = 128  # inputs that share a scale of 4-bit weights
CAPACITY = 2048  # size of the cache in these runs, in tokens
TENSORS = (1 << 16, 1 << 20, 4 << 20, 16 << 20, 64 << 20)  # bytes
COLD = 16 << 20  # bytes that flush the caches of single cores
MICROSOFT = "com.microsoft"
ONNX_TYPES = {"float32": 1, "uint8": 2, "int8": 3, "int32": 6}

Array = NDArray[Any]
Node = tuple[str, str, Sequence[str], str, dict[str, int]]  # domain, operator, inputs, outputs (words), attributes


def host(threads: int | None = None) -> Platform:
    """Measure this machine now, with the memory that is free now."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return platform_of_host(measure(threads), total, available_memory() or total)


def measure(
    threads: int | None = None, progress: Callable[[str, int, int], None] = lambda what, done, total: None
) -> Rates:
    """Measure the rates of this machine, in about ten seconds and 1.1 GB of memory. threads is what a Runtime takes.

    A busy machine gives lower rates, which cannot be noticed here.
    """
    rng = np.random.default_rng(0)
    steps = len(WORKING_SETS) + len(TENSORS) + 3 * len(PRODUCTS) + len(ATTENTIONS) + 3
    done = 0

    def next_step() -> None:
        nonlocal done
        done += 1
        progress("rates", done, steps)

    tiny = {f"x{i}": np.ones((1, 8), np.float32) for i in range(65)}
    run = _seconds([_link(0)], {"x0": tiny["x0"]}, {}, threads)
    chain = [_link(i) for i in range(65)]
    operator = max(0.0, (_seconds(chain, tiny, {}, threads) - run) / 64)  # includes binding a weight
    next_step()
    reads = []
    for size in WORKING_SETS:
        width = int((size // 4 // MATRICES) ** 0.5)
        held = min(size, MOST)
        count = held // (4 * width * width)
        weights = {f"w{i}": np.full((width, width), 1 / width, np.float32) for i in range(count)}
        feeds = {"x": rng.random((1, width), np.float32), **weights}
        nodes: list[Node] = [("", "MatMul", [f"y{i - 1}" if i else "x", w], f"y{i}", {}) for i, w in enumerate(weights)]
        reads.append((size, held / (_seconds(nodes, feeds, {}, threads) - run)))
        next_step()
    touches = []
    for size in TENSORS:
        count = max(5, COLD // size)  # in a real graph products also flush the fastest caches after x was written
        feeds = {f"x{i}": rng.random((1, size // 4), np.float32) for i in range(count)}
        nodes = [_link(i) for i in range(count)]
        spent = _seconds(nodes, feeds, {}, threads) - run - count * operator
        touches.append((3 * size, count * 3 * size / max(spent, 1e-9)))
        next_step()
    scale: dict[str, Array] = {"s": np.array(0.01, np.float32), "z": np.array(128, np.uint8)}
    arithmetic: dict[str, list[tuple[int, float]]] = {"float32": [], "int8": [], PACKED: []}
    for tokens, depth, width in PRODUCTS:
        x, w = rng.random((tokens, depth), np.float32), np.full((depth, width), 1 / depth, np.float32)
        back = np.full((width, depth), 1 / width, np.float32)
        count = (
            8 if width == WIDTH else 32
        )  # different matrices, so that they come from memory, or from caches if all fit there, as a model's do
        weights = {f"w{i}": (back if i % 2 else w).copy() for i in range(count)}
        nodes = [("", "MatMul", [f"y{i - 1}" if i else "x", name], f"y{i}", {}) for i, name in enumerate(weights)]
        flops = 2 * tokens * depth * width
        spent = _seconds(nodes, {"x": x, **weights}, {}, threads) - run
        arithmetic["float32"].append((flops, count * flops / spent))
        next_step()
        weights = {f"w{i}": rng.integers(-127, 127, (depth, width), np.int8) for i in range(count)}
        integers = {"x": (x * 255).astype(np.uint8), "c": w[0], **scale}
        nodes = [
            (MICROSOFT, "MatMulIntegerToFloat", ["x", name, "s", "c", "z"], f"y{i}", {})
            for i, name in enumerate(weights)
        ]
        spent = _seconds(nodes, {**integers, **weights}, {}, threads) - run
        arithmetic["int8"].append((flops, count * flops / spent))
        next_step()
        nodes, given = _packed(rng, depth, width, count)
        spent = _seconds(nodes, {"x": x}, given, threads) - run
        arithmetic[PACKED].append((flops, count * flops / spent))
        next_step()
    tokens, heads, size = ATTENTIONS[0]
    start = _attention(rng, 1, heads, size, threads)[1]  # of one token with an empty cache
    attention = []
    for tokens, heads, size in ATTENTIONS:
        flops, spent = _attention(rng, tokens, heads, size, threads)
        attention.append((flops, flops / max(spent - start, 1e-9)))
        next_step()
    eight = weights["w0"]
    many = {f"w{i}": eight.copy() for i in range(32)}  # 134 MB
    nodes = [("", "MatMulInteger", ["x", name], f"y{i}", {}) for i, name in enumerate(many)]
    token = {"x": integers["x"][:1]}
    given, constants = (token, many) if has_amx() else (token | many, {})  # as OrtBackend holds the weights of steps
    stored = {"int8": 32 * eight.nbytes / _seconds(nodes, given, constants, threads)}
    next_step()
    nodes, given = _packed(rng, WIDTH, WIDTH, 32)
    taken = _seconds(nodes, {"x": x[:1]}, given, threads)
    stored["int4"] = 32 * (given["w0"].nbytes + given["s"].nbytes) / taken
    next_step()
    products = {kind: tuple(points) for kind, points in arithmetic.items()} | {"attention": tuple(attention)}
    return Rates(
        arithmetic=products,
        reads=tuple(reads),
        touches=tuple(touches),
        stored=stored,
        operator=operator,
        product=0.0,
        attention=start,
        run=run,
        fused=False,
    )


def _packed(rng: np.random.Generator, depth: int, width: int, count: int) -> tuple[list[Node], dict[str, Array]]:
    """Products of x [S, depth] with 4-bit weights [depth, width], and these constants."""
    given: dict[str, Array] = {
        f"w{i}": rng.integers(0, 255, (width, depth // BLOCK, BLOCK // 2), np.uint8) for i in range(count)
    }
    about = {"K": depth, "N": width, "bits": 4, "block_size": BLOCK, "accuracy_level": 4}
    nodes: list[Node] = [(MICROSOFT, "MatMulNBits", ["x", name, "s"], f"y{i}", about) for i, name in enumerate(given)]
    return nodes, given | {"s": rng.random(width * depth // BLOCK, np.float32)}


def _link(i: int) -> Node:
    """Link i of a chain, which multiplies the previous link by an input of its own."""
    return "", "Mul", [f"y{i - 1}" if i else "x0", f"x{i}"], f"y{i}", {}


def _attention(rng: Any, tokens: int, heads: int, size: int, threads: int | None) -> tuple[int, float]:
    """Operations of one GroupQueryAttention over a prompt, by `trol_edge.bundle.costs`, and the seconds it takes."""
    half = heads // 2
    cache, table = np.zeros((1, half, CAPACITY, size), np.float32), np.ones((CAPACITY, size // 2), np.float32)
    feeds = {
        "qkv": rng.random((1, tokens, (heads + 2 * half) * size), np.float32),
        "past_k": cache,
        "past_v": cache.copy(),
        "last": np.array([tokens - 1], np.int32),
        "all": np.array([tokens], np.int32),
        "cos": table,
        "sin": table,
    }
    inputs = ["qkv", "", "", "past_k", "past_v", "last", "all", "cos", "sin"]
    about = {"num_heads": heads, "kv_num_heads": half, "do_rotary": 1}
    spent = _seconds([(MICROSOFT, "GroupQueryAttention", inputs, "y present_k present_v", about)], feeds, {}, threads)
    flops = heads * tokens * tokens * (4 * size + 4) + 3 * tokens * (heads + half) * size
    return flops, spent


def _seconds(nodes: Sequence[Node], feeds: dict[str, Array], constants: dict[str, Array], threads: int | None) -> float:
    """The shortest time of one run, among as many as fit into SECONDS (at least three)."""
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = threads or 0
    model = _model(nodes, feeds, constants)
    session = ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    binding = session.io_binding()
    values = {name: ort.OrtValue.ortvalue_from_numpy(array) for name, array in feeds.items()}
    for name, value in values.items():
        binding.bind_ortvalue_input(name, value)
    for output in session.get_outputs():
        past = output.name.replace("present", "past")
        if past in values and past != output.name:  # written in place, like a cache
            binding.bind_ortvalue_output(output.name, values[past])
        else:
            binding.bind_output(output.name)
    session.run_with_iobinding(binding)
    taken: list[float] = []
    while sum(taken) < SECONDS or len(taken) < 3:
        start = time.perf_counter()
        session.run_with_iobinding(binding)
        taken.append(time.perf_counter() - start)
    return min(taken)


# -- protobuf: field numbers of onnx.proto ---------------------------------------------------------------------


def _model(nodes: Sequence[Node], feeds: dict[str, Array], constants: dict[str, Array]) -> bytes:
    """Make an ONNX file whose outputs are those node outputs that no other node reads."""
    read = {name for _, _, inputs, _, _ in nodes for name in inputs}
    graph = b"".join(_field(1, _node(node)) for node in nodes) + _field(2, b"rates")
    graph += b"".join(_field(5, _tensor(name, array)) for name, array in constants.items())
    graph += b"".join(_field(11, _value(name, array)) for name, array in feeds.items())
    made = [name for _, _, _, outputs, _ in nodes for name in outputs.split()]
    graph += b"".join(_field(12, _field(1, name.encode())) for name in made if name not in read)
    opsets = b"".join(
        _field(8, _field(1, domain.encode()) + _number(2, version)) for domain, version in (("", 21), (MICROSOFT, 1))
    )
    return _number(1, 10) + _field(7, graph) + opsets


def _node(node: Node) -> bytes:
    domain, operator, inputs, outputs, attributes = node
    text = b"".join(_field(1, name.encode()) for name in inputs)
    text += b"".join(_field(2, name.encode()) for name in outputs.split())
    text += _field(4, operator.encode()) + _field(7, domain.encode())
    return text + b"".join(
        _field(5, _field(1, name.encode()) + _number(3, value) + _number(20, 2)) for name, value in attributes.items()
    )


def _value(name: str, array: Array) -> bytes:
    shape = b"".join(_field(1, _number(1, size)) for size in array.shape)
    tensor = _number(1, ONNX_TYPES[array.dtype.name]) + _field(2, shape)
    return _field(1, name.encode()) + _field(2, _field(1, tensor))


def _tensor(name: str, array: Array) -> bytes:
    dims = b"".join(_number(1, size) for size in array.shape)
    return dims + _number(2, ONNX_TYPES[array.dtype.name]) + _field(8, name.encode()) + _field(9, array.tobytes())


def _number(field: int, value: int) -> bytes:
    return _varint(field << 3) + _varint(value)


def _field(field: int, content: bytes) -> bytes:
    return _varint(field << 3 | 2) + _varint(len(content)) + content


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    return bytes([*out, value])
