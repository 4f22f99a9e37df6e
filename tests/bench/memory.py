"""`python -m tests.bench.memory BUNDLE`: the memory that a bundle takes, stage by stage, and the weights that it holds.

A picture is encoded, a prompt with its tokens is computed in chunks, as a Runtime does, and a few tokens are answered.
What counts is the proportional set size of this process (Pss in /proc/self/smaps_rollup), read every 20 ms: all of its
memory, Python and libraries included, and pages that others map too by their share.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

import trol_edge
from tests.bench.reuse import prompts
from trol_edge.bundle.graph_sizes import PREFILL_CHUNK
from trol_edge.errors import TrolEdgeError

ROLLUP = Path("/proc/self/smaps_rollup")
INTERVAL_S = 0.02
STEPS = 16
LONG_TOKENS = 1300  # least prompt of a model whose picture is shorter
MOST_RATIO, MOST_BYTES = 1.25, 2_600_000_000  # aims: peak / weights held, and the peak of TroL-1.8B in int4-dynamic


def pss_bytes() -> int:
    """Bytes of this process's memory now, by its share of each page."""
    line = next(line for line in ROLLUP.read_text(encoding="ascii").splitlines() if line.startswith("Pss:"))
    return 1024 * int(line.split()[1])


@contextlib.contextmanager
def peak(stage: str, found: dict[str, int]) -> Iterator[None]:
    """Note the largest Pss of what runs inside as found[stage], in bytes."""
    done, most = threading.Event(), [pss_bytes()]

    def watch() -> None:
        while not done.wait(INTERVAL_S):
            most.append(pss_bytes())

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
        found[stage] = max(*most, pss_bytes())


def measure(bundle: Path, reuse: bool) -> dict[str, int]:
    """Bytes by stage: the process before it loads, "held" for weights by their count, and the peak of each stage."""
    found = {"before": pss_bytes()}
    with peak("load", found):
        runtime = trol_edge.Runtime(bundle, prefix_reuse=reuse, selftest=False)
    with runtime:
        found |= {"loaded": pss_bytes(), "held": runtime.model.backend.weight_bytes}
        spec = runtime.bundle.manifest.spec
        ids = prompts(runtime)[0]
        ids += [5] * (min(LONG_TOKENS, runtime.bundle.manifest.context - STEPS) - len(ids))
        pixels = np.random.default_rng(1).normal(size=(1, 3, *[spec.vision.image_size] * 2)).astype(np.float32)
        with peak("picture", found):
            features = runtime.model.backend.encode_image(pixels)
        with runtime.session(prefill_chunk=PREFILL_CHUNK if reuse else None) as session:
            with peak("prompt", found):
                session.prefill_features(ids, features)
            with peak("steps", found):
                for _ in range(STEPS):
                    session.step_view(5)
    return found | {"tokens": len(ids), "peak": max(found[name] for name in ("load", "picture", "prompt", "steps"))}


def lines(found: dict[str, int]) -> str:
    """Format the figures as text."""
    stages = ", ".join(f"{name} {found[name] / 1e9:.2f}" for name in ("load", "picture", "prompt", "steps"))
    ratio = found["peak"] / found["held"]
    return (
        f"a picture and a prompt of {found['tokens']} tokens; peak Pss in GB: {stages}\n"
        f"weights held {found['held'] / 1e9:.2f} GB (after loading {found['loaded'] / 1e9:.2f}, before "
        f"{found['before'] / 1e9:.2f})\n"
        f"peak {found['peak'] / 1e9:.2f} GB, {ratio:.2f} times the weights (aims: {MOST_RATIO} times: "
        f"{'met' if ratio <= MOST_RATIO else 'missed'}; {MOST_BYTES / 1e9:.1f} GB: "
        f"{'met' if found['peak'] <= MOST_BYTES else 'missed'})"
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure a bundle and print the figures; returns 1 if it cannot be used."""
    parser = argparse.ArgumentParser(description="Memory of a bundle for a CPU, stage by stage (Linux).")
    parser.add_argument("bundle", type=Path, help="Bundle folder.")
    parser.add_argument("--no-reuse", action="store_true", help="Keep one K/V set (prefix_reuse=False).")
    parser.add_argument("--json", action="store_true", help="Print JSON.")
    options = parser.parse_args(arguments)
    try:
        found = measure(options.bundle, not options.no_reuse)
    except TrolEdgeError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(json.dumps(found) if options.json else lines(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
