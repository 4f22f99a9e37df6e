"""The golden cases as rows: one prompt without padding and its pictures, as we serve it."""

from __future__ import annotations

import dataclasses
import fnmatch
import functools
import json
from collections.abc import Collection
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from tests.golden import GOLDEN
from trol_edge.prompt.images import load_rgb, preprocess

Array = npt.NDArray[Any]
FAMILY = "internlm2"
TOLERANCE = 1e-4  # of the largest magnitude of an array, FP32
STEPS = 8  # greedy tokens that golden stores

# Where the axes of an array are once the batch axis is gone: (batch axis, position axis, which positions).
ALONG_POSITIONS = {
    "prefill_position_ids": (0, 0, "every"),
    "gate": (1, 1, "every"),
    "embeds": (0, 0, "positions"),
    "hidden": (1, 1, "positions"),
    "hidden_o1": (1, 1, "positions_o"),
    "hidden_o2": (1, 1, "positions_o"),
    "final_norm": (0, 0, "positions_o"),
    "k0": (0, 1, "positions"),
    "v0": (0, 1, "positions"),
    "k2": (0, 1, "positions"),
    "v2": (0, 1, "positions"),
    "prefill_logits": (0, 0, "last"),
}
# (batch axis, step axis)
ALONG_STEPS = {
    "cached_ids": (0, 0),
    "cached_logits": (0, 0),
    "nocache_ids": (0, 0),
    "nocache_logits": (0, 0),
    "eos_ids": (0, 0),
    "eos_logits": (0, 0),
    "stale_ids": (0, 0),
    "stale_logits": (0, 0),
    "decode_position_ids": (0, 0),
    "decode_attended": (0, 0),
    "decode_hidden": (2, 0),
    "k0_decode": (0, 1),
    "v0_decode": (0, 1),
    "k2_decode": (0, 1),
    "v2_decode": (0, 1),
}
VISION = ("pixel_u8", "pixel_lut", "pixel_values_s7", "vision_features", "projector", "vision_hidden")


@dataclasses.dataclass(frozen=True)
class Apart:
    """Arrays of golden that we disagree with, on purpose; `agree` entries along the steps are still compared."""

    run: str  # "case/run", a pattern
    arrays: tuple[str, ...]
    why: str
    agree: int = 0
    only_padded_rows: bool = False


PADDING = "in its decode the authors' code attends to the padding of a row with pictures in its batch, and counts it"
NTK = "dynamic-NTK rope beyond max_position_embeddings (92), where we refuse"
STATES = ("decode_hidden", "k0_decode", "k2_decode", "v2_decode")
TRAVERSED = ("gate", "hidden_o1", "hidden_o2", "hidden", "final_norm", "k0", "k2", "v2", "prefill_logits")
ANSWERS = ("cached_ids", "cached_logits", "nocache_ids", "nocache_logits")
PADDED_RUN, NTK_RUN = "internlm2-leftpad-batch/", "internlm2-dynamic-rope/"
APART = (
    Apart(f"{PADDED_RUN}images*", (*STATES, "decode_position_ids", "decode_attended"), PADDING, only_padded_rows=True),
    Apart(f"{PADDED_RUN}images*", ("cached_logits",), PADDING, agree=1, only_padded_rows=True),
    Apart(f"{PADDED_RUN}mixed*", (*STATES, "decode_position_ids", "decode_attended"), PADDING, only_padded_rows=True),
    Apart(f"{PADDED_RUN}mixed*", ("cached_ids", "cached_logits", "v0_decode"), PADDING, agree=1, only_padded_rows=True),
    # A prompt of 89 tokens: prefill and three steps are below the limit.
    Apart(f"{NTK_RUN}crossing", STATES, NTK, agree=3),
    Apart(f"{NTK_RUN}crossing", ("cached_ids", "cached_logits", "nocache_logits", "v0_decode"), NTK, agree=4),
    Apart(f"{NTK_RUN}[io]*", (*TRAVERSED, *STATES, *ANSWERS, "v0_decode"), NTK),  # over, image
    Apart(f"{NTK_RUN}below", ("stale_ids", "stale_logits"), "rope tables that an earlier, longer prompt left"),
)
NOT_COMPUTED = {
    "beam5_ids": "in test_beam.py, through sessions",
    "beam5_score": "in test_beam.py, through sessions",
}


@dataclasses.dataclass(frozen=True)
class Row:
    """One prompt of a run. `padding` tokens stood left of it in golden's batch."""

    ids: Array  # int64 [S]
    padding: int
    pictures: tuple[int, ...]  # into the pictures of the run


@dataclasses.dataclass(frozen=True)
class Run:
    """One run of a case: its prompts and every stored array."""

    case: str
    name: str
    info: dict[str, Any]  # what case.json says
    inputs: dict[str, Array]
    expected: dict[str, Array]
    rows: tuple[Row, ...]

    @property
    def image_files(self) -> list[str]:
        """File names of the pictures, in order."""
        return [name for row in self.info["images"] for name in row]

    @property
    def length(self) -> int:
        """Tokens of the padded batch."""
        return int(self.inputs["input_ids"].shape[1])

    def pixels(self, row: Row) -> Array | None:
        """Pixel values of a row's pictures, float32 [N, 3, P, P]; test_reference.py holds their bits to golden's."""
        if not row.pictures:
            return None
        names = self.image_files
        return np.concatenate([pixels_of(GOLDEN / self.case / names[i]) for i in row.pictures])

    def stored(self, vision: Array) -> Array:
        """Of an array [N, tokens, ...] of the tower, the tokens that golden stores."""
        return vision[:, self.inputs["vision_rows"]] if "vision_rows" in self.inputs else vision


@functools.cache
def pixels_of(picture: Path) -> Array:
    """Pixel values of one picture, float32 [1, 3, P, P]."""
    from trol_edge.export.reference import internlm2
    from trol_edge.export.reference.checkpoint import Checkpoint

    return preprocess([load_rgb(picture)], internlm2.FAMILY.image(Checkpoint(picture.parent).spec))


def names() -> list[tuple[str, str]]:
    """(case, run) of every golden run of this family."""
    return [
        (path.parent.name, run["name"])
        for path in sorted(GOLDEN.glob(f"{FAMILY}-*/case.json"))
        for run in json.loads(path.read_text(encoding="utf-8"))["runs"]
    ]


@functools.cache
def arrays(case: str, which: str) -> dict[str, Array]:
    """All arrays of inputs.npz or expected.npz."""
    with np.load(GOLDEN / case / f"{which}.npz") as file:
        return {key: file[key] for key in file}


@functools.cache
def load(case: str, name: str) -> Run:
    """One run of a case."""
    runs = json.loads((GOLDEN / case / "case.json").read_text(encoding="utf-8"))["runs"]
    info = next(run for run in runs if run["name"] == name)
    inputs, expected = (
        {key.removeprefix(f"{name}/"): value for key, value in arrays(case, w).items() if key.startswith(f"{name}/")}
        for w in ("inputs", "expected")
    )
    rows = []
    seen = 0
    for ids, mask, files in zip(inputs["input_ids"], inputs["attention_mask"], info["images"], strict=True):
        pictures = tuple(range(seen, seen := seen + len(files)))
        rows.append(Row(ids[mask == 1], int((mask == 0).sum()), pictures))
    return Run(case, name, info, inputs, expected, tuple(rows))


def has_pictures(case: str, name: str) -> bool:
    """Whether a run stores arrays of the vision tower."""
    return "projector" in load(case, name).expected


def difference(ours: Array, golden: Array) -> float:
    """Largest absolute difference, relative to golden's largest magnitude; integers: 0 if all are equal, else 1."""
    assert ours.shape == golden.shape, f"shapes {ours.shape} and {golden.shape}"
    if np.issubdtype(golden.dtype, np.integer):
        return float(not np.array_equal(ours, golden))
    if not np.isfinite(ours).all():
        return float("inf")
    return float(np.abs(ours.astype(np.float64) - golden).max() / np.abs(golden).max())


def select(key: str, run: Run, row: Row, golden: Array) -> tuple[Array, Array | None, int]:
    """Golden's part of a row without padding, its positions (in the row alone), and their axis."""
    if key in ALONG_STEPS:
        batch, axis = ALONG_STEPS[key]
        return golden.take(row_index(run, row), batch), None, axis
    batch, axis, which = ALONG_POSITIONS[key]
    golden = golden.take(row_index(run, row), batch)
    stored = {
        "every": np.arange(run.length),
        "last": np.arange(run.length - golden.shape[axis], run.length),
    }
    positions = stored[which] if which in stored else run.inputs[which]
    kept = np.flatnonzero(positions >= row.padding)
    return golden.take(kept, axis), positions[kept] - row.padding, axis


def row_index(run: Run, row: Row) -> int:
    """Which row of the batch this is."""
    return next(i for i, other in enumerate(run.rows) if other is row)


def apart(run: Run, row: Row, key: str) -> Apart | None:
    """The exception that covers an array of a row, if one does."""
    for entry in APART:
        if fnmatch.fnmatch(f"{run.case}/{run.name}", entry.run) and key in entry.arrays:
            return entry if row.padding or not entry.only_padded_rows else None
    return None


def compare(run: Run, computed: list[dict[str, Array]], only: Collection[str] | None = None) -> list[str]:
    """What is wrong: an array too far from golden, an exception that is none, an array that nobody looked at.

    A run that ends early, at the limit of its positions, is compared as far as it goes, if an exception allows it.
    """
    problems = []
    for key, golden in run.expected.items():
        if key in VISION or key in NOT_COMPUTED or (only is not None and key not in only):
            continue
        if key not in ALONG_STEPS and key not in ALONG_POSITIONS:
            problems.append(f"{key}: neither compared nor an exception")
            continue
        for i, (row, ours) in enumerate(zip(run.rows, computed, strict=True)):
            want, positions, axis = select(key, run, row, golden)
            found = ours[key] if positions is None else ours[key].take(positions, axis)
            entry = apart(run, row, key)
            agree = want.shape[axis] if entry is None else entry.agree
            if entry is None and found.shape != want.shape:
                problems.append(f"{key}, row {i}: shape {found.shape}, golden {want.shape}")
                continue
            if agree:
                head = np.arange(min(agree, found.shape[axis]))
                off = difference(found.take(head, axis), want.take(head, axis))
                if off > TOLERANCE:
                    problems.append(f"{key}, row {i}: off by {off:.1e} of the largest magnitude")
            if entry is not None:
                rest = np.arange(agree, min(want.shape[axis], found.shape[axis]))
                if rest.size and difference(found.take(rest, axis), want.take(rest, axis)) <= TOLERANCE:
                    problems.append(f"{key}, row {i}: agrees, so it is no exception ({entry.why})")
    return problems
