"""Reads the program of a TensorRT engine without a GPU: kernels, what each reads and writes, and what is avoidable."""
