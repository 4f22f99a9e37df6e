"""Records what a bundle should compute: the FP32 reference, and the arithmetic of its own precision."""
