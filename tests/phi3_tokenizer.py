"""A small tokenizer.json as Phi-3's is written down, for tests: byte fallback, the added tokens with their flags."""

from __future__ import annotations

import json
import random
from typing import Any

import tokenizers
from tokenizers import models, pre_tokenizers, trainers

# In the order of Phi-3's ids from 32000 on, then the three that InternVL adds; id 13 is <IMG_CONTEXT>.
ADDED = (
    *("<|endoftext|>", "<|assistant|>", *(f"<|placeholder{i}|>" for i in range(1, 5)), "<|system|>", "<|end|>"),
    *("<|placeholder5|>", "<|placeholder6|>", "<|user|>", "<img>", "</img>", "<IMG_CONTEXT>"),
)
FIRST_ADDED = 480  # as in the golden cases, whose vocabulary has 500 rows
IMAGE_ID = FIRST_ADDED + ADDED.index("<IMG_CONTEXT>")


def make(recent: bool = False, more: list[dict[str, Any]] | None = None) -> dict[str, Any]:
    """Parsed tokenizer.json. recent: spaces by a pre-tokenizer that prefixes the first segment only, as transformers
    has written it since 2024, instead of a normaliser that prefixes each. more: further added tokens."""
    rng = random.Random(7)
    syllables = ["ka", "to", "mi", "ru", "the", "in", "what", "is", "12", "é", "世界", "мир", "\n", ". "]
    lines = ["".join(rng.choice([*syllables, " "]) for _ in range(40)) for _ in range(300)]
    trained = tokenizers.Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.Metaspace()
    base = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trained.train_from_iterator(
        lines, trainers.BpeTrainer(vocab_size=FIRST_ADDED - len(base) - 5, show_progress=False, limit_alphabet=60)
    )
    model = json.loads(trained.to_str())["model"]
    pieces = [*base, *sorted(model["vocab"], key=model["vocab"].__getitem__)]
    pieces += [f"~{i}" for i in range(FIRST_ADDED - len(pieces))]
    tokens = [(0, "<unk>", False, True), (1, "<s>", False, True), (2, "</s>", True, False)]
    tokens += [(FIRST_ADDED + i, t, t.startswith("<|") and i > 0, True) for i, t in enumerate(ADDED)]
    flags = {"single_word": False, "lstrip": False, "normalized": False}
    added = [{"id": i, "content": t, "rstrip": rstrip, "special": s, **flags} for i, t, rstrip, s in tokens]
    for i, token in enumerate(more or []):
        added.append({"id": FIRST_ADDED + len(ADDED) + i, "rstrip": False, "special": True, **flags, **token})
    to_space = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    prefix = {"type": "Prepend", "prepend": "▁"}
    metaspace = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "first", "split": False}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": None if recent else {"type": "Sequence", "normalizers": [prefix, to_space]},
        "pre_tokenizer": metaspace if recent else None,
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
            "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}},
        },
        "decoder": {
            "type": "Sequence",
            "decoders": [
                {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
                {"type": "ByteFallback"},
                {"type": "Fuse"},
                {"type": "Strip", "content": " ", "start": 1, "stop": 0},
            ],
        },
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": "<unk>",
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": True,
            "byte_fallback": True,
            "vocab": {piece: i for i, piece in enumerate(pieces)},
            "merges": model["merges"],
        },
    }
