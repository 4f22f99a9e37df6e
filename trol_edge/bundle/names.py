"""Names of a bundle's files, and of what every part of the package looks for in them."""

from __future__ import annotations

MANIFEST = "bundle.json"
WEIGHTS = "weights.safetensors"
TOKENIZER = "tokenizer.json"
SELFTEST = "selftest.safetensors"
VERIFIED = "verified-*.json"
# Patterns of all that a bundle's folder may hold.
BUNDLE_FILES = (MANIFEST, WEIGHTS, TOKENIZER, SELFTEST, VERIFIED, "*.onnx", "engines")
EMBEDDING = "embedding"  # looked up by the runtime, in no graph
