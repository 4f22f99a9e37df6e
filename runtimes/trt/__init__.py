"""TensorRT and TensorRT for RTX: bindings, engine builds, and the back end that runs engines."""
