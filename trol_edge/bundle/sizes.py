"""Computes how many bytes weights and K/V caches take, loaded on a CPU and on a device."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping, Sequence

import numpy as np

from trol_edge.bundle.derived import INT8, INT8_SCALE, NBITS
from trol_edge.bundle.embedding import embedding_names
from trol_edge.bundle.engines import ENGINES
from trol_edge.bundle.manifest import Bundle, GraphInfo, Manifest, Port
from trol_edge.bundle.names import KINDS, cache_name
from trol_edge.bundle.weights import FLOATS, TensorInfo


def engine_weight_bytes(bundle: Bundle, names: Iterable[str]) -> int:
    """Bytes of weights inside an engine, each once, in the type that it computes with."""
    tensors = bundle.weights().tensors
    widen = 2 if bundle.manifest.plan.compute == "fp32" else 1
    return sum(tensors[n].nbytes * (widen if tensors[n].dtype in ("F16", "BF16") else 1) for n in names)


def shared_weights(bundle: Bundle) -> dict[str, TensorInfo]:
    """Weights that traverse and step take as inputs from one buffer on the device: the rope tables, and matrices."""
    step, tensors = bundle.manifest.graphs["step"], bundle.weights().tensors
    return {name: tensors[name] for name in step.weights if name not in step.constants}


def shares_matrices(bundle: Bundle) -> bool:
    """Whether engines take their matrices as inputs, as `export --shared-weights` makes them."""
    return any(is_shareable(name, tensor.shape) for name, tensor in shared_weights(bundle).items())


def device_bytes(bundle: Bundle) -> tuple[int, int]:
    """Bytes of the weights on a device, first if each engine has its own, then with `export --shared-weights`."""
    graphs, tensors = bundle.manifest.graphs, bundle.weights().tensors
    apart = sum(engine_weight_bytes(bundle, graphs[name].weights) for name in ENGINES)
    both = set(graphs["traverse"].weights) & set(graphs["step"].weights)
    matrices = [name for name in both if name in tensors and is_shareable(name, tensors[name].shape)]
    return apart, apart - 2 * engine_weight_bytes(bundle, matrices) + sum(tensors[name].nbytes for name in matrices)


def layered_bytes(bundle: Bundle) -> int:
    """Bytes of the weights on a device with engines by layer, which hold each once."""
    graphs = bundle.manifest.graphs
    return engine_weight_bytes(bundle, {weight for name in ENGINES for weight in graphs[name].weights})


def is_shareable(name: str, shape: Sequence[object]) -> bool:
    """Whether a weight is a matrix, and so worth sharing; scales in blocks stay with the engine."""
    return len(shape) == 2 and name.endswith((".weight", ".lora_a", ".lora_b"))


def build_bytes(weights: int) -> int:
    """Peak memory of building an engine that contains this many bytes of weights.

    A line through five builds by TensorRT for RTX 1.7 (`make engines-full`; docs/results.md), 1.3 to 3.9 GB of weights,
    and at most 8 % off; trol-nano, which takes 0.57 GB, is on it, too. Other versions were not measured.
    """
    return round(0.6e9 + 2.75 * weights)


def loaded_bytes(name: str, tensors: Mapping[str, TensorInfo]) -> int:
    """Bytes of a weight in the CPU's memory: floating point as float32, quantized and derived ones as they are."""
    if name in tensors:
        tensor = tensors[name]
        return 4 * math.prod(tensor.shape) if tensor.dtype in FLOATS else tensor.nbytes
    packed = tensors[name.removesuffix(INT8).removesuffix(INT8_SCALE) + NBITS]
    return 2 * packed.nbytes if name.endswith(INT8) else 4 * packed.shape[0]


def embedding_bytes(bundle: Bundle) -> int:
    """Bytes of the embedding table, which every back end keeps in the CPU's memory as it is stored."""
    tensors = bundle.weights().tensors
    return sum(tensors[name].nbytes for name in embedding_names(tensors))


def cpu_bytes(bundle: Bundle, names: Iterable[str]) -> int:
    """Bytes of these weights in the memory of a CPU, each once."""
    tensors = bundle.weights().tensors
    return sum(loaded_bytes(name, tensors) for name in set(names))


def cache_bytes(ports: Iterable[Port], context: int) -> int:
    """Bytes of the K/V cache at full context among the inputs of a graph; a step has one set, a traverse both."""
    return sum(largest_bytes(port, {"slots": context}) for port in ports if port.name.startswith("past_"))


def caches_of(traverse: GraphInfo, second_layers: Collection[int]) -> list[Port]:
    """The K/V caches that a traverse takes: those of the first pass, then those of the second in these layers."""
    second = {cache_name("past", kind, layer, 1) for kind in KINDS for layer in second_layers}
    ports = [port for port in traverse.inputs if port.name.startswith("past_")]
    return [port for port in ports if port.name in second or not port.name.startswith("past_second_")]


def state_bytes(manifest: Manifest, second_layers: Collection[int], prefix_reuse: bool) -> int:
    """Bytes of one state's K/V cache at full context: both sets, or the first and one layer's scratch of the second."""
    graphs = manifest.graphs
    first = cache_bytes(graphs["step"].inputs, manifest.context)
    if not prefix_reuse:
        return first + first // manifest.spec.num_layers
    return cache_bytes(caches_of(graphs["traverse"], second_layers), manifest.context)


def largest_bytes(port: Port, most: Mapping[str, int]) -> int:
    """Bytes of a tensor at its largest. most: the largest size of each dynamic dimension."""
    return math.prod(d if isinstance(d, int) else most[d] for d in port.shape) * np.dtype(port.dtype).itemsize
