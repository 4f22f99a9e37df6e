"""TroL's decoder in PyTorch. Golden data checks this reference, and export traces it.

What is special about TroL (paper section 3, arXiv 2406.12246):
- *Traverse*: over a prompt every layer runs twice with the same weights, positions and mask; a gate,
  ONE Linear(hidden, 1) shared by all layers (`trol_gating.pt`), mixes the two results per token.
- *Step*: an answer token passes each layer once, without the gate, and sees first-pass keys and values.
- *Partial LoRA* (1.8B, 7B): low-rank terms of every Linear, for image tokens only. A step never needs them.
- Q, K and V are one Linear with rows in the order [Q | K | V]; `checkpoint.py` brings the published rows
  into that order.

Axes: B batch, S tokens of this call, T tokens attended to, D hidden, H query heads, G key/value heads,
E head size, R LoRA rank, V vocabulary.

How a layer attends (rotary embedding, cache, mask) is a function that the caller passes in, see `Attend`. Training,
reference and traced graphs share everything else.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trol_edge.bundle.spec import ModelSpec


class Attend(Protocol):
    """Scaled dot-product attention of one layer in one pass."""

    def __call__(self, qkv: Tensor, layer: int, traversal: int) -> Tensor:
        """qkv [B, S, (H+2G)*E] before rotary embedding; traversal 0 (first pass) or 1; returns [B, S, H*E]."""
        ...


class LoraLinear(nn.Module):
    """Linear without bias, plus a low-rank term for image tokens (`lora_A`, `lora_B`; scaling is 1)."""

    def __init__(self, in_features: int, out_features: int, rank: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out_features, in_features))
        self.lora_a = nn.Parameter(torch.empty(rank, in_features)) if rank else None
        self.lora_b = nn.Parameter(torch.empty(out_features, rank)) if rank else None

    def forward(self, x: Tensor, image_mask: Tensor | None) -> Tensor:
        y = F.linear(x, self.weight)
        if image_mask is None or self.lora_a is None or self.lora_b is None:
            return y
        # The mask multiplies the R-wide middle and not the wide output, because that is cheaper and zero stays zero.
        return y + F.linear(F.linear(x, self.lora_a) * image_mask, self.lora_b)


class GatedMlp(nn.Module):
    """SwiGLU with separate gate and up projections (InternLM2's w1 and w3) and a down projection (w2)."""

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        self.gate = LoraLinear(spec.hidden_size, spec.intermediate_size, spec.lora_rank)
        self.up = LoraLinear(spec.hidden_size, spec.intermediate_size, spec.lora_rank)
        self.down = LoraLinear(spec.intermediate_size, spec.hidden_size, spec.lora_rank)

    def forward(self, x: Tensor, image_mask: Tensor | None) -> Tensor:
        return self.down(F.silu(self.gate(x, image_mask)) * self.up(x, image_mask), image_mask)


class Layer(nn.Module):
    """Pre-norm decoder layer."""

    def __init__(self, spec: ModelSpec, mlp: Callable[[ModelSpec], nn.Module]) -> None:
        super().__init__()
        heads = spec.num_heads + 2 * spec.num_kv_heads
        self.attention_norm = nn.RMSNorm(spec.hidden_size, eps=spec.rms_norm_eps)
        self.qkv = LoraLinear(spec.hidden_size, heads * spec.head_dim, spec.lora_rank)
        self.out = LoraLinear(spec.num_heads * spec.head_dim, spec.hidden_size, spec.lora_rank)
        self.mlp_norm = nn.RMSNorm(spec.hidden_size, eps=spec.rms_norm_eps)
        self.mlp = mlp(spec)

    def forward(self, x: Tensor, image_mask: Tensor | None, index: int, traversal: int, attend: Attend) -> Tensor:
        context = attend(self.qkv(self.attention_norm(x), image_mask), index, traversal)
        x = x + self.out(context, image_mask)
        return x + self.mlp(self.mlp_norm(x), image_mask)


# Called by `traverse` for each layer with its index, first pass, second pass, gate and mixture. In a layer without a
# second pass the gate is 0, and the others are the first pass.
Probe = Callable[[int, Tensor, Tensor, Tensor, Tensor], None]


class Decoder(nn.Module):
    """All layers, the shared gate, the final norm and the output layer. Embeddings are looked up outside."""

    def __init__(self, spec: ModelSpec, mlp: Callable[[ModelSpec], nn.Module] = GatedMlp) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer(spec, mlp) for _ in range(spec.num_layers))
        self.second_layers = frozenset(spec.second_layers)
        self.gate = nn.Linear(spec.hidden_size, 1)
        self.norm = nn.RMSNorm(spec.hidden_size, eps=spec.rms_norm_eps)
        self.lm_head = nn.Linear(spec.hidden_size, spec.vocab_size, bias=False)

    def traverse(self, x: Tensor, image_mask: Tensor | None, attend: Attend, probe: Probe | None = None) -> Tensor:
        """Run both passes and the gate, or in layers without a second pass the first one alone.

        x [B, S, D] embeddings, image_mask [B, S, 1] of 0 and 1 or None; [B, S, D].
        """
        for i, layer in enumerate(self.layers):
            o1 = layer(x, image_mask, i, 0, attend)
            if i in self.second_layers:
                o2 = layer(o1, image_mask, i, 1, attend)
                x, s = self.mix(o1, o2)
            else:
                x = o2 = o1
                s = torch.zeros_like(o1[..., :1])
            if probe:
                probe(i, o1, o2, s, x)
        return x

    def mix(self, o1: Tensor, o2: Tensor) -> tuple[Tensor, Tensor]:
        """The mixture [B, S, D] of what both passes gave, and the share [B, S, 1] of the second."""
        s = 0.5 * torch.tanh(self.gate(o1)) + 0.5
        return o1 * (1 - s) + o2 * s, s

    def step(self, x: Tensor, attend: Attend) -> Tensor:
        """Run answer tokens in one pass without gate and LoRA. x [B, S, D]; returns [B, S, D]."""
        for i, layer in enumerate(self.layers):
            x = layer(x, None, i, 0, attend)
        return x

    def logits(self, x: Tensor) -> Tensor:
        """Compute logits [B, S, V] from the output x [B, S, D] of traverse or step."""
        return self.lm_head(self.norm(x))


def rope_tables(
    head_dim: int, theta: float, length: int, factors: Sequence[float] = (1.0,), amplitude: float = 1.0
) -> tuple[Tensor, Tensor]:
    """cos and sin, each float32 [length, E/2], of the rotary embedding that rotates halves."""
    powers = theta ** (torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)
    inverse_frequency = 1.0 / (torch.tensor(factors, dtype=torch.float32) * powers)
    angle = torch.arange(length, dtype=torch.float32)[:, None] * inverse_frequency
    return angle.cos() * amplitude, angle.sin() * amplitude


@functools.lru_cache(maxsize=1)  # on some processors a power's last bit differs from call to call
def graph_rope_tables(spec: ModelSpec, capacity: int) -> tuple[Tensor, Tensor]:
    """The tables that the graphs of a cache of `capacity` tokens read, float32 [rows, E/2] each.

    With one set, row p serves position p. With two sets the short one comes first, and the long one begins at row
    `spec.long_rope.short_rows`.
    """
    rope = spec.long_rope
    if rope is None:
        return rope_tables(spec.head_dim, spec.rope_theta, capacity)
    short, long = (
        rope_tables(spec.head_dim, spec.rope_theta, rows, factors, rope.amplitude)
        for rows, factors in ((rope.short_rows(capacity), rope.short_factor), (capacity, rope.long_factor))
    )
    return torch.cat((short[0], long[0])), torch.cat((short[1], long[1]))


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate halves. x [B, heads, S, E]; cos, sin [S, E/2] or [B, 1, S, E/2]."""
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)


class EagerAttention:
    """The plain `Attend`. It keeps both passes' keys and values, so a prefix can be extended exactly.

    `keys[traversal][layer]` and `values[...]` are [B, G, T, E]. Set `positions` [S] (or [B, S]) and `mask`
    before each call of traverse or step. mask is boolean [S, T] or [B, 1, S, T] with True where a token may attend,
    or None for plain causal order after everything cached. rounding: what a cache makes of new keys and values
    [B, G, S, E] of a pass (0 or 1); None keeps them as they are.
    """

    def __init__(self, spec: ModelSpec, cos: Tensor, sin: Tensor) -> None:
        self.spec, self.cos, self.sin = spec, cos, sin
        self.keys: list[list[Tensor | None]] = [[None] * spec.num_layers for _ in range(2)]
        self.values: list[list[Tensor | None]] = [[None] * spec.num_layers for _ in range(2)]
        self.positions: Tensor = torch.empty(0, dtype=torch.int64)
        self.mask: Tensor | None = None
        self.rounding: Callable[[Tensor, Tensor, int], tuple[Tensor, Tensor]] | None = None

    @property
    def length(self) -> int:
        """The number of tokens in the first-pass cache."""
        first = self.keys[0][0]
        return 0 if first is None else first.shape[2]

    def __call__(self, qkv: Tensor, layer: int, traversal: int) -> Tensor:
        h, g, e = self.spec.num_heads, self.spec.num_kv_heads, self.spec.head_dim
        batch, length, _ = qkv.shape
        q, k, v = (
            t.view(batch, length, -1, e).transpose(1, 2) for t in qkv.split((h * e, g * e, g * e), dim=-1)
        )  # [B, heads, S, E]
        cos, sin = self.cos[self.positions], self.sin[self.positions]
        if cos.dim() == 3:
            cos, sin = cos[:, None], sin[:, None]
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        if self.rounding is not None:
            k, v = self.rounding(k, v, traversal)
        past_k, past_v = self.keys[traversal][layer], self.values[traversal][layer]
        if past_k is not None and past_v is not None:
            k, v = torch.cat((past_k, k), dim=2), torch.cat((past_v, v), dim=2)
        self.keys[traversal][layer], self.values[traversal][layer] = k, v
        mask = self.mask
        if mask is None:
            mask = torch.ones(length, k.shape[2], dtype=torch.bool).tril(k.shape[2] - length)
        context = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)
        return context.transpose(1, 2).reshape(batch, length, h * e)
