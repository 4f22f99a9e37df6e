"""Bindings, engine builds and the back end for TensorRT and TensorRT for RTX."""
