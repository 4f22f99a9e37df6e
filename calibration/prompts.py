"""Turns samples into the token ids that the model reads."""

from __future__ import annotations

import dataclasses

import numpy as np
from numpy.typing import NDArray

from trol_edge.bundle.spec import ModelSpec
from trol_edge.calibration import samples as sampling
from trol_edge.calibration.samples import SampleSet
from trol_edge.errors import CalibrationError
from trol_edge.export.gates import KINDS
from trol_edge.export.reference import tokenizer
from trol_edge.export.reference.checkpoint import Checkpoint
from trol_edge.prompt.images import count_tiles
from trol_edge.prompt.template import build_prompt
from trol_edge.prompt.tokenizer import Tokenizer


@dataclasses.dataclass(frozen=True)
class SamplePrompt:
    """One sample as the model reads it."""

    name: str
    sample: sampling.Sample
    ids: NDArray[np.int64]  # [S]
    squares: int  # number of pictures or tiles
    question: int  # number of tokens before the answer
    system: int  # number of tokens before the question's turn


def model_prompts(source: Checkpoint, chosen: SampleSet) -> tuple[list[SamplePrompt], list[str]]:
    """Token ids of every sample that fits the model's positions, and the skipped others with the reason."""
    spec, family = source.spec, source.family
    template, image = family.prompt(spec), family.image(spec)
    text = tokenizer.convert(source.folder, (template.image,))
    if text is None:
        raise CalibrationError(
            f"{source.folder}: no tokenizer to read prompts with; copy the published tokenizer files there"
        )
    words = Tokenizer(text, str(source.folder))
    system = words.encode([*words.parse(template.before_system, template.special_tokens), template.system])
    prompts, skipped = [], []
    for sample in chosen.samples:
        tiles = count_tiles(sample.load(), image)
        ids = build_prompt(words, template, sample.prompt, tiles)
        question = len(ids)
        ids = words.encode([*ids, sample.answer]) if sample.answer else ids
        if len(ids) > spec.max_position_embeddings:
            skipped.append(f"{sample.name}: {len(ids)} tokens, but the model takes {spec.max_position_embeddings}")
        else:
            same = next((i for i, (a, b) in enumerate(zip(ids, system, strict=False)) if a != b), len(system))
            prompts.append(SamplePrompt(sample.name, sample, np.asarray(ids, np.int64), sum(tiles), question, same))
    if not prompts:
        raise CalibrationError(f"none of {len(skipped)} samples is usable; the first: {skipped[0]}")
    if not any(p.squares for p in prompts):
        raise CalibrationError(
            f"none of the {len(prompts)} samples has a picture, so the vision tower would get no statistics; "
            "give at least one with a picture"
        )
    return prompts, skipped


def kinds_of(prompt: SamplePrompt, spec: ModelSpec) -> NDArray[np.uint8]:
    """The kind of every token, as places in KINDS; uint8 [S]."""
    kinds = np.full(len(prompt.ids), KINDS.index("text"), np.uint8)
    kinds[: prompt.system] = KINDS.index("system")
    kinds[prompt.ids == spec.image_token_id] = KINDS.index("image")
    return kinds
