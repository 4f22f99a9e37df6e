"""The reference model in PyTorch, with checkpoints, both families, the tokenizer and the hub."""
