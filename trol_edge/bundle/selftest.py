"""The self-test in a bundle, `selftest.safetensors`: inputs, and samples of what the FP32 reference made of them.

Export writes it, `verify` replays it. A prompt is traversed, then fixed tokens are stepped behind it: the most probable
token is noted at each place, but never fed back, so one difference does not hide all that follow. Only some of a
picture's feature rows stand in the prompt, because a prompt of 1300 tokens would make a first start wait for minutes
and prove no more.

Axes: M image tokens of the prompt, S tokens of the prompt, n stepped tokens, R sampled rows, L layers, G key/value
heads, E head size, D hidden, V vocabulary, N squares of the picture.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trol_edge.bundle.manifest import Bundle
from trol_edge.bundle.names import SELFTEST
from trol_edge.bundle.weights import WeightsFile
from trol_edge.errors import BundleError

Float32 = NDArray[np.float32]
Int32 = NDArray[np.int32]


@dataclasses.dataclass(frozen=True)
class SelfTestCase:
    """One prompt and the tokens stepped behind it. "long" has no picture and takes the long rope factors."""

    ids: Int32  # [S]
    forced: Int32  # [n] what is stepped
    positions: Int32  # [R] rows of the cache that are noted, of the prompt
    cache: Float32  # [2, L, 2, R, G*E]: first and second pass; keys and values
    step_cache: Float32  # [L, 2, G*E]: keys and values of the last stepped token
    logits: Float32  # [2, V]: behind the prompt, and behind the last stepped token
    best: Int32  # [n+1] the most probable token behind the prompt and behind each stepped one
    margin: Float32  # [n+1] by how much its logit is above the second one's


@dataclasses.dataclass(frozen=True)
class SelfTest:
    """What `selftest.safetensors` holds."""

    picture: NDArray[np.uint8]  # [H, W, 3] RGB
    pixel_rows: Int32  # rows, and columns, of pixel_values that are noted
    pixels: Float32  # [N, 3, rows, columns]
    feature_rows: Int32  # [M] of the image features [N*T, D] that stand in the prompt
    features: Float32  # [M, D]
    rope_rows: Int32  # of the rope tables, all sets
    rope: Float32  # [2, rows, E/2] cos and sin
    embeddings: Float32  # [n, D] of the stepped tokens
    cases: dict[str, SelfTestCase]  # "picture", and "long" where the rotary embedding has two factor sets
    # What tokenizer and prompt template make of fixed texts, see trol_edge.prompt.probe. None: there is no tokenizer,
    # or the bundle is of a version that did not record it.
    token_digests: NDArray[np.uint8] | None = None  # [B, 32]
    prompt_ids: Int32 | None = None  # of all prompts, one after another
    prompt_lengths: Int32 | None = None  # ids of each
    end_ids: Int32 | None = None  # that end an answer, in rising order


def read(bundle: Bundle) -> SelfTest:
    """The self-test of a bundle. Raises BundleError where it has none, or one that cannot be read."""
    if SELFTEST not in bundle.manifest.files:
        raise BundleError(
            f"{bundle.folder}: holds no self-test (made by an older version, or with --no-selftest), so nothing says "
            "what its numbers should be; export it again"
        )
    file = WeightsFile(bundle.path(SELFTEST))
    arrays = file.load(file.tensors)
    try:
        cases = {}
        for name in sorted({name.split(".")[0] for name in arrays if "." in name}, reverse=True):  # the picture first
            cases[name] = SelfTestCase(
                **{f.name: arrays.pop(f"{name}.{f.name}") for f in dataclasses.fields(SelfTestCase)}
            )
        return SelfTest(**arrays, cases=cases)
    except (KeyError, TypeError) as error:
        raise BundleError(f"{file.path}: not a self-test of this version ({error}); export the bundle again") from error


def tensors(test: SelfTest) -> dict[str, NDArray[Any]]:
    """The arrays of a self-test by the names that the file has."""
    flat = {f.name: getattr(test, f.name) for f in dataclasses.fields(test) if f.name != "cases"}
    flat = {name: array for name, array in flat.items() if array is not None}
    for name, case in test.cases.items():
        flat |= {f"{name}.{f.name}": getattr(case, f.name) for f in dataclasses.fields(case)}
    return flat
