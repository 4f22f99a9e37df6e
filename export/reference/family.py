"""What a TroL family must tell the exporter: one `Family` object per family file."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from trol_edge.bundle.spec import ModelSpec
from trol_edge.prompt.images import ImageSpec
from trol_edge.prompt.template import PromptSpec

# What every TroL model was told that it is.
SYSTEM = (
    "You are AI model created by Byung-Kwan Lee, Ph.D. candidate, KAIST EE, of which AI model name is TroL "
    "(Traversal of Layers). You must give helpful, detailed, and polite answers to the user's questions"
)


@dataclasses.dataclass(frozen=True)
class Source:
    """Where a parameter comes from: a published tensor, and the order in which its rows are taken."""

    name: str
    shape: tuple[int, ...]
    rows: Tensor | None = None  # int64 [shape[0]]; None: as they are


@dataclasses.dataclass(frozen=True)
class Family:
    """One TroL family.

    `model_spec(config, vision_config, shapes)` reads the numbers, `sources(spec)` maps every parameter
    ("embedding", "decoder.*", "vision.*") to a published tensor, `decoder` and `vision` build the modules,
    `adapt(parameter, tensor, spec)` brings an older published form of a tensor into its present shape
    (None where there is none), `unused(name)` tells tensors that are published but play no part.
    `eos_from_tokenizer`: the authors' code asks the tokenizer for the end-of-text id, not the configs.
    `published(config)` is the name and shape of every tensor that a published file of that config holds.
    """

    name: str
    matches: Callable[[Mapping[str, Any]], bool]
    model_spec: Callable[[dict[str, Any], dict[str, Any] | None, Mapping[str, Sequence[int]]], ModelSpec]
    sources: Callable[[ModelSpec], dict[str, Source]]
    decoder: Callable[[ModelSpec], nn.Module]
    vision: Callable[[ModelSpec], nn.Module]
    adapt: Callable[[str, tuple[int, ...], ModelSpec], Callable[[Tensor], Tensor] | None]
    unused: Callable[[str], bool]
    prompt: Callable[[ModelSpec], PromptSpec]
    image: Callable[[ModelSpec], ImageSpec]
    eos_from_tokenizer: bool
    published: Callable[[dict[str, Any]], dict[str, tuple[int, ...]]]
