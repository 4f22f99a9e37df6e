"""Names of a bundle's files, and of common entries in them."""

from __future__ import annotations

MANIFEST = "bundle.json"
WEIGHTS = "weights.safetensors"
TOKENIZER = "tokenizer.json"
SELFTEST = "selftest.safetensors"
VERIFIED = "verified-*.json"
# Patterns of everything that a bundle's folder may hold.
BUNDLE_FILES = (MANIFEST, WEIGHTS, TOKENIZER, SELFTEST, VERIFIED, "*.onnx", "engines")
EMBEDDING = "embedding"  # used by the runtime itself, and by no graph
