"""The numbers that describe one model, written by export and only read afterwards."""

from __future__ import annotations

import dataclasses
import types
import typing
from typing import Any, TypeVar

from trol_edge.errors import BundleError, TrolEdgeError

T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class VisionSpec:
    """Shape of a vision tower and of what it hands to the decoder."""

    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    patch_size: int  # pixels
    image_size: int  # pixels per side of the square input
    layer_norm_eps: float
    tokens_per_image: int  # image tokens in the prompt per picture (or per tile)
    rms_norm: bool = False  # RMSNorm before attention and MLP, LayerNorm otherwise (phi3)
    qk_norm: bool = False  # RMSNorm of queries and keys over the full width (phi3)
    qkv_bias: bool = True


@dataclasses.dataclass(frozen=True)
class LongRope:
    """ "su" rotary embedding: each frequency is divided by a factor of one of two sets, chosen by length.

    Keys that are cached keep the set with which they were made, so one answer uses one set throughout.
    """

    short_factor: tuple[float, ...]  # [E/2]
    long_factor: tuple[float, ...]  # [E/2]
    original_max_position_embeddings: int  # tokens: the short set serves at most so many
    amplitude: float  # of cos and sin, in both sets

    def short_rows(self, capacity: int) -> int:
        """Rows of the short set in the rope tables of a cache of `capacity` tokens; the long set's begin behind."""
        return min(capacity, self.original_max_position_embeddings)


@dataclasses.dataclass(frozen=True)
class ModelSpec:
    """Shape of one TroL model. Names follow the published `config.json` where it has them."""

    family: str  # "internlm2" (TroL-1.8B, 7B) or "phi3" (TroL-3.8B)
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int  # rows of the output layer
    embedding_rows: int  # rows of the embedding table; internlm2 has one more than vocab_size, for <image>
    rms_norm_eps: float
    rope_theta: float
    max_position_embeddings: int
    lora_rank: int  # 0: no partial LoRA
    eos_token_id: int
    image_token_id: int
    vision: VisionSpec
    long_rope: LongRope | None = None  # None: plain rotary embedding, one set of frequencies

    @property
    def kv_bytes_per_token(self) -> int:
        """Bytes of one cached token (K and V of all layers) in FP32."""
        return 2 * self.num_layers * self.num_kv_heads * self.head_dim * 4


def from_dict(
    cls: type[T],
    data: Any,
    where: str,
    error: type[TrolEdgeError] = BundleError,
    advice: str = "Export the bundle again with this version of trol-edge",
) -> T:
    """Build the dataclass `cls` (nested ones included) from parsed JSON.

    Unknown, missing and wrongly typed keys raise `error` in one message that lists them all and ends in `advice`: a
    field that is silently dropped is a silently wrong answer later.
    """
    problems: list[str] = []
    value = _convert(cls, data, where, problems)
    if problems:
        refusal = error(f"{'; '.join(problems)}. {advice}")
        raise refusal
    return value


def _convert(hint: Any, value: Any, where: str, problems: list[str]) -> Any:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        for option in args:
            attempt: list[str] = []
            found = _convert(option, value, where, attempt)
            if not attempt:
                return found
    if dataclasses.is_dataclass(hint) and isinstance(hint, type) and isinstance(value, dict):
        hints = typing.get_type_hints(hint)
        fields = {f.name: f for f in dataclasses.fields(hint)}
        problems += [f"{where}: unknown key {key!r}" for key in value if key not in fields]
        problems += [
            f"{where}: missing key {name!r}"
            for name, f in fields.items()
            if name not in value and f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
        ]
        found = {n: _convert(hints[n], value[n], f"{where}.{n}", problems) for n in fields if n in value}
        return None if problems else hint(**found)
    if origin is dict and isinstance(value, dict):
        return {key: _convert(args[1], item, f"{where}.{key}", problems) for key, item in value.items()}
    if origin is tuple and isinstance(value, list | tuple):
        kinds = args[:1] * len(value) if args[-1] is ... else args
        if len(kinds) == len(value):
            items = zip(kinds, value, strict=True)
            return tuple(_convert(k, v, f"{where}[{i}]", problems) for i, (k, v) in enumerate(items))
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if hint is types.NoneType and value is None:
        return None
    if isinstance(hint, type) and isinstance(value, hint) and (hint is not int or not isinstance(value, bool)):
        return value
    problems.append(f"{where}: expected {getattr(hint, '__name__', hint)}, found {value!r:.80}")
    return None
