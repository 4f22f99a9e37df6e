"""The numbers that describe one model. Export writes them, everything else only reads them."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class VisionSpec:
    """The shape of a vision tower and of its output to the decoder."""

    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    patch_size: int  # side of a patch, in pixels
    image_size: int  # side of the square input, in pixels
    layer_norm_eps: float
    tokens_per_image: int  # image tokens in the prompt per picture (or per tile)
    rms_norm: bool = False  # RMSNorm before attention and MLP, LayerNorm otherwise (phi3)
    qk_norm: bool = False  # RMSNorm of queries and keys over the full width (phi3)
    qkv_bias: bool = True


@dataclasses.dataclass(frozen=True)
class LongRope:
    """The "su" rotary embedding, which divides each frequency by a factor of one of two sets, chosen by length.

    Cached keys keep the set with which they were made, so one answer uses one set throughout.
    """

    short_factor: tuple[float, ...]  # [E/2]
    long_factor: tuple[float, ...]  # [E/2]
    original_max_position_embeddings: int  # most tokens with the short set
    amplitude: float  # factor on cos and sin, in both sets

    def short_rows(self, capacity: int) -> int:
        """Rows of the short set in the rope tables of a cache of `capacity` tokens; the long set follows them."""
        return min(capacity, self.original_max_position_embeddings)


@dataclasses.dataclass(frozen=True)
class TraversalChoice:
    """How the layers with a second pass were chosen by measurement (`export --traversal auto`).

    nats: the divergence of the logits of the checkpoint without the other second passes from those with all, in FP32.
    """

    nats: float  # Kullback-Leibler divergence, the mean over samples
    max_nats: float  # how much was allowed
    same_top: float  # share of the rows whose most probable token stayed
    samples: int  # of the calibration, on which this was measured


@dataclasses.dataclass(frozen=True)
class ModelSpec:
    """The shape of one TroL model. Names follow the published `config.json` if it has them."""

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
    lora_rank: int  # 0 without partial LoRA
    eos_token_id: int
    image_token_id: int
    vision: VisionSpec
    long_rope: LongRope | None = None  # None: plain rotary embedding, one set of frequencies
    more_end_ids: tuple[int, ...] = ()  # further ids that end an answer, beside eos_token_id
    # The layers that a traverse passes twice, in order; None: all of them, as the model was trained.
    traversed: tuple[int, ...] | None = None

    @property
    def second_layers(self) -> tuple[int, ...]:
        """The layers with a second pass, and so with keys and values of it."""
        return tuple(range(self.num_layers)) if self.traversed is None else self.traversed

    @property
    def cached_layers(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """The layers with keys and values in the first set of a K/V cache (of the first pass), and in the second."""
        return tuple(range(self.num_layers)), self.second_layers

    @property
    def kv_values_per_token(self) -> int:
        """Numbers that one token takes in a K/V set: K and V of all layers. (For bytes see sizes.py.)"""
        return 2 * self.num_layers * self.num_kv_heads * self.head_dim
