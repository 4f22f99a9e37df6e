"""The reference model in PyTorch: checkpoints, both families, the tokenizer, the hub."""
