"""Keeps one copy of the weights on the device for two engines, in bundles exported with --shared-weights.

Not yet run on a GPU.
"""

from __future__ import annotations

from trol_edge.bundle.manifest import Bundle
from trol_edge.bundle.names import WEIGHTS
from trol_edge.bundle.sizes import shared_weights
from trol_edge.runtimes.cuda import Cuda

ALIGNMENT = 256  # bytes; TensorRT requires it of addresses, and cudaMalloc keeps it


def upload(bundle: Bundle, cuda: Cuda, verify: bool = True) -> dict[str, int]:
    """Copy the weights that engines take as inputs into one block of device memory.

    Returns name -> address, which is empty if engines take none. verify: hash the weights file first. Raises
    BundleError if it was altered, BackendError if memory is short.
    """
    tensors = shared_weights(bundle)
    if not tensors:
        return {}
    offsets, end = {}, 0
    for name, tensor in tensors.items():
        offsets[name] = end
        end += -(-tensor.nbytes // ALIGNMENT) * ALIGNMENT
    base = cuda.allocate(end, "the weights that traverse and step share")
    sha256 = bundle.manifest.files[WEIGHTS].sha256 if verify else None
    for name, first, block in bundle.weights().blocks(tensors, sha256):
        cuda.upload(base + offsets[name] + first * block.itemsize, block)
        cuda.wait()  # before the next block overwrites this one
    return {name: base + offset for name, offset in offsets.items()}
