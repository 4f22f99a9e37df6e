"""`python -m tests.bench.reuse BUNDLE`: measures what a kept prefix saves, and what it costs.

- A first question about a frame (vision, then the whole prompt) against a second one about the same frame, whose image
  features and prompt up to the question are cached. Both end with the first logits.
- An answer token with one pass ("step") against one with both ("traverse", the authors' use_cache=False).
- The first step of a fork, which copies the prompt's rows, against a plain step.
- With --questions N: how many of N held-out questions about rendered scenes each kind of decoding answers right.

A bundle without a tokenizer (random weights) gets random tokens in the places of the prompt.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

import trol_edge
from trol_edge.bundle.names import TOKENIZER
from trol_edge.bundle.sizes import cache_bytes
from trol_edge.errors import TrolEdgeError
from trol_edge.export import scenes
from trol_edge.session import Session

Float32 = NDArray[np.float32]
BEFORE, AFTER = 54, 30  # tokens before and after the picture, for a bundle without a tokenizer
QUESTIONS = ("What is left of the red circle?", "How many objects are on the table?", "Where is the blue square?")


def clock(work: Callable[..., Any], *args: Any, **more: Any) -> float:
    """The milliseconds of wall time that a call takes."""
    start = time.perf_counter()
    work(*args, **more)
    return 1e3 * (time.perf_counter() - start)


def prompts(runtime: trol_edge.Runtime) -> list[list[int]]:
    """Make prompts about one picture (of one tile) that differ in their questions."""
    manifest = runtime.bundle.manifest
    if TOKENIZER in manifest.files:
        return [runtime.tokenize(question, 1) for question in QUESTIONS]
    random = np.random.default_rng(0)
    image = [manifest.spec.image_token_id] * manifest.spec.vision.tokens_per_image
    before = random.integers(3, manifest.spec.vocab_size, BEFORE).tolist()
    return [before + image + random.integers(3, manifest.spec.vocab_size, AFTER).tolist() for _ in QUESTIONS]


def measure(runtime: trol_edge.Runtime, rounds: int, tokens: int) -> dict[str, Any]:
    """Measure milliseconds (medians over rounds) and bytes, by name."""
    backend, spec = runtime.model.backend, runtime.bundle.manifest.spec
    asked = prompts(runtime)
    size = spec.vision.image_size
    pixels = np.random.default_rng(1).normal(size=(1, 3, size, size)).astype(np.float32)
    session = runtime.session()
    found: dict[str, list[float]] = {
        k: [] for k in ("vision", "first", "second", "step", "traverse", "fork_step", "step_behind")
    }
    reused = 0
    for _ in range(rounds):
        start = time.perf_counter()
        features = backend.encode_image(pixels)
        found["vision"].append(1e3 * (time.perf_counter() - start))
        # As in normal use, this includes hashing the features and finding the common prefix.
        found["first"].append(clock(session.prefill_features, asked[0], features))
        for other in asked[1:]:
            found["second"].append(clock(session.prefill_features, other, features, reuse=True))
            reused = session.reused
        length = session.length
        found["step"] += [clock(session.step_view, 5) for _ in range(tokens)]
        session.truncate(length)
        found["traverse"] += [clock(session.extend, [5]) for _ in range(tokens)]
        session.truncate(length)
        with session.fork() as fork:
            found["fork_step"].append(clock(fork.step_view, 5))
            found["step_behind"] += [clock(fork.step_view, 5) for _ in range(2)]
    median = {name: statistics.median(values) for name, values in found.items()}
    manifest = runtime.bundle.manifest
    one_set, both = (cache_bytes(manifest.graphs[name].inputs, manifest.context) for name in ("step", "traverse"))
    return {
        "model": runtime.bundle.manifest.model,
        "rounds": rounds,
        "prompt_tokens": len(asked[0]),
        "reused_tokens": reused,
        "milliseconds": median,
        "second_to_first_percent": 100 * median["second"] / (median["vision"] + median["first"]),
        "kv_bytes": {"one_set": one_set, "both_sets": both, "per_token_and_set": one_set // manifest.context},
    }


def accuracy(runtime: trol_edge.Runtime, count: int) -> dict[str, float]:
    """The percentage of `count` held-out questions answered exactly, by kind of decoding."""
    session = runtime.session()
    modes: dict[str, Callable[[Session, int], Float32]] = {
        "step": lambda s, token: s.step(token),
        "traverse": lambda s, token: s.extend([token]),
    }
    right = dict.fromkeys(modes, 0)
    for image, _, question, wanted in scenes.held_out(count):
        ids, pixels = runtime.tokenize(question, runtime.count_tiles(image)), runtime.preprocess(image)
        first = session.prefill(ids, pixels)
        for mode, go_on in modes.items():
            session.truncate(len(ids))
            right[mode] += decoded(runtime, session, first, go_on) == wanted
    return {mode: 100 * n / count for mode, n in right.items()}


def decoded(
    runtime: trol_edge.Runtime, session: Session, logits: Float32, go_on: Callable[[Session, int], Float32]
) -> str:
    """Make a greedy answer token by token."""
    tokenizer = runtime.model.text
    ids: Sequence[int] = ()
    while (
        len(ids) < 96 and session.length < session.limit and (token := int(logits.argmax())) not in runtime.model.ends
    ):
        ids = (*ids, token)
        logits = go_on(session, token)
    return tokenizer.decode(ids)


def lines(result: dict[str, Any]) -> str:
    """Format the figures as text."""
    ms, kv, percent = result["milliseconds"], result["kv_bytes"], result["second_to_first_percent"]
    text = (
        f"{result['model']}, {result['prompt_tokens']} prompt tokens, medians of {result['rounds']} round(s)\n"
        f"first question about a frame  vision {ms['vision']:.1f} ms + prompt {ms['first']:.1f} ms\n"
        f"second question               {ms['second']:.1f} ms: {percent:.1f} % of the first's; "
        f"{result['reused_tokens']} tokens reused\n"
        f"answer token                  step {ms['step']:.2f} ms, traverse {ms['traverse']:.2f} ms\n"
        f"first step of a fork          {ms['fork_step']:.2f} ms, the next {ms['step_behind']:.2f} ms\n"
        f"K/V cache                     {kv['one_set'] / 1e6:.1f} MB a set, {kv['both_sets'] / 1e6:.1f} MB both"
    )
    if right := result.get("right_percent"):
        text += f"\nright of {right['asked']} questions        "
        text += f"step {right['step']:.1f} %, traverse {right['traverse']:.1f} %"
    return text


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure a bundle and print the figures; returns 1 if it cannot be used."""
    parser = argparse.ArgumentParser(description="Time and memory that a kept prefix saves and costs.")
    parser.add_argument("bundle", type=Path, help="Bundle folder.")
    parser.add_argument("--rounds", type=int, default=5, help="Number of frames, whose medians are shown (default: 5).")
    parser.add_argument("--tokens", type=int, default=16, help="Answer tokens to time per frame (default: 16).")
    parser.add_argument("--questions", type=int, default=0, help="Held-out scenes to ask both ways (default: none).")
    parser.add_argument("--json", action="store_true", help="Print JSON.")
    options = parser.parse_args(arguments)
    try:
        runtime = trol_edge.Runtime(options.bundle)
        result = measure(runtime, options.rounds, options.tokens)
        if options.questions:
            result["right_percent"] = accuracy(runtime, options.questions) | {"asked": options.questions}
    except TrolEdgeError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(json.dumps(result) if options.json else lines(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
