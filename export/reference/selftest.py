"""Records the self-test of a bundle with the FP32 reference on the published checkpoint, before folding and rounding.

It takes one pass over the checkpoint with one layer's weights in memory at a time. The tokens that are stepped after a
prompt are chosen beforehand, so they follow it through each layer, and no layer is read again for each of them.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from safetensors.numpy import save
from torch import Tensor

from trol_edge.bundle.names import TOKENIZER
from trol_edge.bundle.selftest import SelfTest, SelfTestCase, tensors
from trol_edge.bundle.spec import ModelSpec
from trol_edge.errors import CheckpointError
from trol_edge.export import scenes
from trol_edge.export.reference.checkpoint import Checkpoint
from trol_edge.export.reference.layerwise import Layerwise, rope_of
from trol_edge.export.reference.model import EagerAttention, graph_rope_tables
from trol_edge.export.storage import Progress
from trol_edge.prompt import probe
from trol_edge.prompt.images import count_tiles, preprocess
from trol_edge.prompt.template import build_prompt, end_ids
from trol_edge.prompt.tokenizer import Tokenizer

# A rendered scene of the kind that default calibration uses, but a different one, within the range of the scales.
SCENE = 3 * scenes.HELD_OUT_SEED
QUESTION, ANSWER = "Describe the scene.", "from left to right: a small blue circle, a large red star"
STEPS = 8
IMAGE_TOKENS = 32  # feature rows in the prompt
LEAST_ROOM = 8  # shortest prompt in tokens; a bundle with less context gets no self-test
CACHE_BYTES = 2_000_000  # bytes of recorded rows, both passes, all layers ...
MOST_ROWS, LEAST_ROWS = 8, 2  # ... within these numbers of rows


def record(source: Checkpoint, path: Path, context: int, tokenizer: Tokenizer | None, progress: Progress) -> bool:
    """Write the self-test of a checkpoint for a cache of `context` tokens; returns False if that is too short.

    Without a tokenizer the tokens are chosen at random. Raises CheckpointError if the reference itself is not finite.
    """
    rope = source.spec.long_rope
    room = (rope.short_rows(context) if rope else context) - STEPS
    if room < LEAST_ROOM:
        return False
    with torch.no_grad():
        test = _run(source, context, room, tokenizer, progress)
    if tokenizer is not None:
        test = dataclasses.replace(test, **_words(tokenizer, path.parent / TOKENIZER, source))
    path.write_bytes(save({name: np.ascontiguousarray(array) for name, array in tensors(test).items()}))
    return True


def picture(wide: bool) -> NDArray[np.uint8]:
    """A rendered scene, uint8 [112, 112, 3], or two of them side by side (wide), which models with tiles cut up."""
    return np.concatenate([scenes.render(SCENE + i)[0] for i in range(1 + wide)], axis=1)


def _prompt(source: Checkpoint, tokenizer: Tokenizer | None, tiles: list[int], room: int) -> tuple[Any, Any, Any]:
    """Ids of a prompt of at most `room` tokens, with at most IMAGE_TOKENS of the picture, and ids of an answer."""
    spec = source.spec
    images = min(IMAGE_TOKENS, room // 2)
    if tokenizer is None:
        ids = np.random.default_rng(0).integers(0, min(spec.vocab_size, spec.image_token_id), 48)
        before, after, forced = ids[:20], ids[20 : 48 - STEPS], ids[48 - STEPS :]
    else:
        template = source.family.prompt(spec)
        prompt = np.array(build_prompt(tokenizer, template, QUESTION, tiles))
        whole = np.array(build_prompt(tokenizer, template, QUESTION, tiles, ANSWER))
        (at,) = np.nonzero(prompt == spec.image_token_id)
        before, after = prompt[: at[0]], prompt[at[-1] + 1 :]
        forced = np.resize(whole[len(prompt) :], STEPS)
    after = after[-(room - images + 1) // 2 :]
    before = before[max(0, len(before) - (room - images - len(after))) :]
    return (
        np.concatenate((before, np.full(images, spec.image_token_id), after)),
        np.concatenate((before, after)),
        forced,
    )


class _Sequence:
    """One case on its way through the layers."""

    def __init__(self, ids: NDArray[Any], forced: NDArray[Any], long: bool, spec: ModelSpec) -> None:
        self.ids, self.forced = ids, forced
        self.mask = torch.from_numpy(ids == spec.image_token_id)
        self.attend = EagerAttention(spec, *rope_of(spec, len(ids) + STEPS, long))
        row = 2 * 4 * spec.kv_values_per_token  # both sets, float32
        count = min(max(CACHE_BYTES // row, LEAST_ROWS), MOST_ROWS, len(ids))
        self.positions = np.unique(np.linspace(len(ids) - 1, len(ids) // 2, count).astype(np.int32))
        self.cache: list[Tensor] = []
        self.step_cache: list[Tensor] = []
        self.x = self.steps = torch.empty(0)

    def through(self, model: Layerwise, layer: Any, name: str) -> None:
        """Run one decoder layer, the prompt in both passes and then the stepped tokens in one."""
        attend, end = self.attend, len(self.ids)
        lora = self.mask.float()[None, :, None] if bool(self.mask.any()) and model.spec.lora_rank else None
        attend.positions = torch.arange(end)
        self.x = model.traverse(layer, 0, self.x, lora, attend)[2]
        attend.positions = torch.arange(end, end + STEPS)
        self.steps = layer(self.steps, None, 0, 0, attend)
        for hidden in (self.x, self.steps):
            _require_finite(name, hidden)
        rows = []  # [pass][keys, values] of [T, G*E]
        for traversal in (0, 1):
            keys, values = attend.keys[traversal], attend.values[traversal]
            assert keys[0] is not None and values[0] is not None
            rows.append([t[0].transpose(0, 1).flatten(1) for t in (keys[0], values[0])])
            keys[0] = values[0] = None  # the next layer uses the same place again
        self.cache.append(torch.stack([torch.stack([t[self.positions] for t in kind]) for kind in rows]))
        self.step_cache.append(torch.stack([t[-1] for t in rows[0]]))

    def case(self, logits: Tensor) -> SelfTestCase:
        """Make the case; logits [n+1, V] are those after the prompt and after each stepped token."""
        top = logits.topk(2, dim=-1)
        return SelfTestCase(
            ids=self.ids.astype(np.int32),
            forced=self.forced.astype(np.int32),
            positions=self.positions,
            cache=torch.stack(self.cache, dim=1).numpy(),
            step_cache=torch.stack(self.step_cache).numpy(),
            logits=logits[[0, -1]].numpy(),
            best=top.indices[:, 0].numpy().astype(np.int32),
            margin=(top.values[:, 0] - top.values[:, 1]).numpy(),
        )


def _run(source: Checkpoint, context: int, room: int, tokenizer: Tokenizer | None, progress: Progress) -> SelfTest:
    spec, model = source.spec, Layerwise(source)
    image_spec = source.family.image(spec)
    shown = picture(wide=image_spec.most_tiles > 1)
    pixels = preprocess([shown], image_spec)
    ids, text, forced = _prompt(source, tokenizer, count_tiles([shown], image_spec), room)
    sequences = {"picture": _Sequence(ids, forced, False, spec)}
    if spec.long_rope:
        sequences["long"] = _Sequence(text, forced, True, spec)
    stages = spec.vision.num_layers + spec.num_layers + 1

    with model.part("vision.embed") as tower:
        x = tower.embed(torch.from_numpy(pixels))
    for i in range(spec.vision.num_layers):
        with model.part(f"vision.layers.{i}") as layer:
            x = layer(x)
        progress("selftest", i + 1, stages)
    with model.part("vision.features") as tower:
        x = tower.features(x).flatten(0, 1)
    _require_finite("vision.features", x)
    feature_rows = np.linspace(0, len(x) - 1, int((ids == spec.image_token_id).sum())).astype(np.int32)
    features = x[feature_rows]

    for sequence in sequences.values():
        rows = model.embeddings(np.concatenate((sequence.ids, forced)))
        sequence.x, sequence.steps = rows[None, : len(sequence.ids)], rows[None, len(sequence.ids) :]
        if bool(sequence.mask.any()):
            sequence.x[0, sequence.mask] = features
    embeddings = sequences["picture"].steps[0].clone()
    for i in range(spec.num_layers):
        name = f"decoder.layers.{i}"
        with model.part(name) as layer:
            for sequence in sequences.values():
                sequence.through(model, layer, name)
        progress("selftest", spec.vision.num_layers + i + 1, stages)
    with model.part("decoder.norm") as norm:
        hidden = torch.cat([norm(torch.cat((s.x[0, -1:], s.steps[0]))) for s in sequences.values()])
    logits = torch.cat([F.linear(hidden, b.float()) for _, b in source.blocks("decoder.lm_head.weight")], dim=1)
    progress("selftest", stages, stages)

    rope = torch.stack(graph_rope_tables(spec, context))
    rope_rows = np.unique(np.linspace(0, rope.shape[1] - 1, 32).astype(np.int32))
    side = image_spec.size
    pixel_rows = np.arange(side // 32 // 2, side, max(1, side // 32)).astype(np.int32)
    return SelfTest(
        picture=shown,
        pixel_rows=pixel_rows,
        pixels=pixels[:, :, pixel_rows][..., pixel_rows],
        feature_rows=feature_rows,
        features=features.numpy(),
        rope_rows=rope_rows,
        rope=rope[:, rope_rows].numpy(),
        embeddings=embeddings.numpy(),
        cases={n: s.case(part) for (n, s), part in zip(sequences.items(), logits.split(STEPS + 1), strict=True)},
    )


def _words(tokenizer: Tokenizer, file: Path, source: Checkpoint) -> dict[str, Any]:
    """The results of tokenizer (in its bundled file, too) and prompt template for fixed texts."""
    spec, template = source.spec, source.family.prompt(source.spec)
    prompts = probe.prompt_ids(tokenizer, template)
    return {
        "token_digests": probe.token_digests(tokenizer, file.read_text(encoding="utf-8"), spec.vocab_size),
        "prompt_ids": np.concatenate(prompts).astype(np.int32),
        "prompt_lengths": np.array([len(ids) for ids in prompts], np.int32),
        "end_ids": np.array(sorted({spec.eos_token_id} | end_ids(tokenizer, template)), np.int32),
    }


def _require_finite(name: str, x: Tensor) -> None:
    if not bool(x.isfinite().all()):
        raise CheckpointError(
            f"NaN or infinite activations after {name} in the float32 reference: the checkpoint's weights are damaged "
            "or too large; download it again, or export with --no-selftest"
        )
