"""Names of a bundle's files, and of common entries in them."""

from __future__ import annotations

MANIFEST = "bundle.json"
WEIGHTS = "weights.safetensors"
TOKENIZER = "tokenizer.json"
SELFTEST = "selftest.safetensors"
VERIFIED = "verified-*.json"
SIGNATURES = "signatures.json"
# Patterns of files that a manifest may list, and of everything that a bundle's folder may hold.
LISTED_FILES = (WEIGHTS, TOKENIZER, SELFTEST, "*.onnx")
BUNDLE_FILES = (MANIFEST, *LISTED_FILES, VERIFIED, SIGNATURES, "engines")
# Graphs of single passes, which serve in place of traverse and step where 4-bit weights are held once.
LAYERS, MIX, HEAD = "layers", "mix", "head"
SINGLE = frozenset((LAYERS, MIX, HEAD))
IMAGE_ROWS = "image_rows"  # an input of LAYERS: places of image tokens among those of the run, int64 [I]
EMBEDDING = "embedding"  # looked up by the runtime, in no graph
EMBEDDING_SCALE = "embedding.scale"  # of its rows, if they are rounded to 8 bits
KINDS = ("key", "value")  # of K/V caches


def cache_name(prefix: str, kind: str, layer: int, second: int) -> str:
    """The port of a layer's cache: past_key_3, present_second_value_3. prefix: past or present; second: the pass, 0 or
    1."""
    return f"{prefix}{'_second' * second}_{kind}_{layer}"
