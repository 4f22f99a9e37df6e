"""Keeps one copy of the weights on the device for two engines, in bundles exported with --shared-weights.

Not yet run on a GPU.
"""

from __future__ import annotations

import numpy as np

from trol_edge.bundle.folder import sha256_of
from trol_edge.bundle.manifest import Bundle
from trol_edge.bundle.names import WEIGHTS
from trol_edge.bundle.sizes import shared_weights
from trol_edge.errors import BundleError
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
    path = bundle.path(WEIGHTS)
    if verify and sha256_of(path) != bundle.manifest.files[WEIGHTS].sha256:
        raise BundleError(f"{path}: altered since export (sha256 differs); copy the bundle again")
    offsets, end = {}, 0
    for name, tensor in tensors.items():
        offsets[name] = end
        end += -(-tensor.nbytes // ALIGNMENT) * ALIGNMENT
    base = cuda.allocate(end, "the weights that traverse and step share")
    for name, tensor in tensors.items():
        stored = np.memmap(path, np.uint8, "r", tensor.offset, (tensor.nbytes,))  # mapped, to avoid a second copy
        cuda.upload(base + offsets[name], stored)
        cuda.wait()
    return {name: base + offset for name, offset in offsets.items()}
