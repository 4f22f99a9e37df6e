"""Defines `Family`, the object by which each family file describes a TroL family to the exporter."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from trol_edge.bundle.spec import ModelSpec
from trol_edge.prompt.images import ImageSpec
from trol_edge.prompt.template import PromptSpec

# The system prompt with which every TroL model was trained.
SYSTEM = (
    "You are AI model created by Byung-Kwan Lee, Ph.D. candidate, KAIST EE, of which AI model name is TroL "
    "(Traversal of Layers). You must give helpful, detailed, and polite answers to the user's questions"
)


@dataclasses.dataclass(frozen=True)
class Source:
    """The published tensor that a parameter comes from, and the order in which its rows are taken."""

    name: str
    shape: tuple[int, ...]
    rows: Tensor | None = None  # int64 [shape[0]]; None: in the published order


@dataclasses.dataclass(frozen=True)
class Family:
    """One TroL family.

    `model_spec(config, vision_config, shapes)` reads the numbers, `notes(config, vision_config, spec)` refuses what
    else these ask for and returns remarks on unknown keys, `sources(spec)` maps every parameter
    ("embedding", "decoder.*", "vision.*") to a published tensor, `decoder` and `vision` build the modules,
    `adapt(parameter, tensor, spec)` converts an older published form of a tensor to its present shape
    (None if there is none), `unused(name)` recognises tensors that are published but not used.
    `eos_from_tokenizer`: the authors' code asks the tokenizer for the end-of-text id, not the configs.
    `published(config)` is the name and shape of every tensor that a published file of that config holds.
    """

    name: str
    matches: Callable[[Mapping[str, Any]], bool]
    model_spec: Callable[[dict[str, Any], dict[str, Any] | None, Mapping[str, Sequence[int]]], ModelSpec]
    notes: Callable[[dict[str, Any], dict[str, Any] | None, ModelSpec], list[str]]
    sources: Callable[[ModelSpec], dict[str, Source]]
    decoder: Callable[[ModelSpec], nn.Module]
    vision: Callable[[ModelSpec], nn.Module]
    adapt: Callable[[str, tuple[int, ...], ModelSpec], Callable[[Tensor], Tensor] | None]
    unused: Callable[[str], bool]
    prompt: Callable[[ModelSpec], PromptSpec]
    image: Callable[[ModelSpec], ImageSpec]
    eos_from_tokenizer: bool
    published: Callable[[dict[str, Any]], dict[str, tuple[int, ...]]]
