"""Digests of a tokenizer's and a prompt template's results for fixed texts.

Export records them, and the self-test compares them. The hash of a file says only that the file is the manifest's.
These digests say that its texts and ids are those of the checkpoint.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from trol_edge.prompt.template import IMAGE, Prompt, PromptSpec, build_prompt
from trol_edge.prompt.tokenizer import Tokenizer

BLOCK = 256  # number of tokens that share a digest
BEFORE = 2  # number of digests before those of blocks
# Questions in which tokenizers differ: case, digits, spaces, marks, other scripts, code, the names of tokens.
TEXTS = (
    "What is left of the red star?",
    "how many objects ARE there, and which of them is the 2nd largest?",
    "The year 2024, 3.14159, 1,000,000 and -0.5e-7; 50 % of 12:30.",
    "  two spaces, then\ttabs\t\tand\nlines\r\n\n   indented   ",
    "don't can't we'll it's \u201cquoted\u201d \u2018single\u2019 \u2014 dash\u2026 caf\u00e9 cafe\u0301 na\u00efve",
    "\ufb01ne Stra\u00dfe \u0130stanbul \u03b1\u03b2\u03b3 \u0416\u0443\u043a \u05e9\u05dc\u05d5\u05dd "
    "\u0645\u0631\u062d\u0628\u0627 \u0928\u092e\u0938\u094d\u0924\u0947 \u0e2a\u0e27\u0e31\u0e2a\u0e14\u0e35",
    "\u4f60\u597d\uff0c\u4e16\u754c\u3002 \u3053\u3093\u306b\u3061\u306f \uc548\ub155 \uff21\uff22\uff23 \u2460 \u00bd "
    "\U0001f916\U0001f44d\U0001f3fd \u200b\u00a0\ufeff",
    "def f(x): return {'a': [x ** 2 for _ in range(10)]}  # <tag attr=\"v\"/> && || != \\n",
    "https://example.org/a_b?c=d&e=%20 user@example.org /dev/video0 C:\\temp",
    "<s> </s> <unk> <pad> <image> <|im_start|> <|im_end|> <|user|> <|end|> <|assistant|> [INST] <0x0A> \u2581",
    "antidisestablishmentarianism Donaudampfschifffahrt aaaaaaaaaaaaaaaa zzzzqqqq xkcd",
)
PROMPTS: tuple[tuple[Prompt, tuple[int, ...]], ...] = (  # and the tiles of their pictures
    *((text, ()) for text in TEXTS),
    ("What is this?", (1,)),
    ("Which of them?", (1, 2)),
    (["Compare ", IMAGE, " with ", IMAGE, "."], (2, 1)),
)


def prompt_ids(tokenizer: Tokenizer, spec: PromptSpec) -> list[list[int]]:
    """The token ids of each of PROMPTS, with the template."""
    return [build_prompt(tokenizer, spec, prompt, tiles, answer="yes") for prompt, tiles in PROMPTS]


def token_digests(tokenizer: Tokenizer, json_text: str, vocabulary: int) -> NDArray[np.uint8]:
    """A sha256 of the content of tokenizer.json, one of TEXTS, and one for each BLOCK of token ids, uint8 [B, 32].

    The first finds every edit, even of a merge that few texts use. The others find a library that computes something
    else from the same file. A block's digest covers the bytes of its tokens, and the ids into which these texts are
    cut, one to a line and joined with those of tokens from all over the vocabulary.
    """
    shown = [tokenizer.token_bytes(token) for token in range(vocabulary)]
    texts = [data.decode("utf-8", "ignore") for data, _ in shown]
    head = [sorted(tokenizer.special_tokens.items()), tokenizer.dropped_spaces(), [*map(tokenizer.encode, TEXTS)]]
    rules = json.dumps(json.loads(json_text), sort_keys=True)
    digests = [_digest([rules]), _digest(head)]
    for begin in range(0, vocabulary, BLOCK):
        block = range(begin, min(begin + BLOCK, vocabulary))
        far = [(7919 * token + 104729) % vocabulary for token in block]
        lines, mixed = (
            "\n".join(texts[token] for token in block),
            "".join(texts[a] + texts[b] for a, b in zip(block, far, strict=True)),
        )
        digests.append(_digest([[shown[token] for token in block], tokenizer.encode(lines), tokenizer.encode(mixed)]))
    return np.frombuffer(b"".join(digests), np.uint8).reshape(-1, hashlib.sha256().digest_size)


def _digest(parts: Sequence[object]) -> bytes:
    """Hash plain lists, texts, bytes and numbers, whose repr is the same in every version of Python."""
    return hashlib.sha256(repr(parts).encode("utf-8", "backslashreplace")).digest()
