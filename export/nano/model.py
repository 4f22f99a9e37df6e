"""The small models as they are trained, from the exporter's own modules and attention over packed questions.

Axes: B pictures, P prompt-prefix tokens, V tokens of a picture (64 per tile), N question rows, S tokens of a row,
D hidden.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trol_edge.export.nano.recipes import Recipe
from trol_edge.export.nano.text import Batch, Prompts
from trol_edge.export.reference.model import Decoder, rope_tables, rotate

# In these layers attention is taught: a token that names objects, and one that answers, attends to these objects.
TAUGHT_LAYERS = (1, 3)
# Bounds of the gate's score x, whose tanh makes the share of the second pass: 0.12 to 0.88 within +-OPEN, below 5e-5
# under SHUT.
OPEN, SHUT = 1.0, -5.0
ALIVE = 0.7  # root mean square of the score in open layers of a model that goes on from an earlier one


class Nano(nn.Module):
    """The three parts of a checkpoint; the parameter names are those of the exporter's modules."""

    def __init__(self, recipe: Recipe) -> None:
        super().__init__()
        spec = self.spec = recipe.spec
        self.embedding = nn.Embedding(spec.embedding_rows, spec.hidden_size)
        self.vision = recipe.family.vision(spec)
        decoder = recipe.family.decoder(spec)
        assert isinstance(decoder, Decoder)  # both families use it, with different MLPs
        self.decoder = decoder
        rope = spec.long_rope
        sets = [(1.0,)] if rope is None else [rope.short_factor, rope.long_factor]
        amplitude = 1.0 if rope is None else rope.amplitude
        size = spec.head_dim, spec.rope_theta, spec.max_position_embeddings
        self._tables = [rope_tables(*size, factors, amplitude) for factors in sets]
        self.use_rope(long=False)

    def use_rope(self, long: bool) -> None:
        """Choose the set of rope factors, if there are two."""
        self.cos, self.sin = self._tables[int(long)]

    def initialise(self) -> None:
        """Fill the decoder and the embeddings with random values; the recipe fills the tower."""
        nn.init.normal_(self.embedding.weight, std=0.5)
        for name, p in self.decoder.named_parameters():
            if name.endswith(("lora_b", "bias")):
                nn.init.zeros_(p)
            elif name.endswith("lora_a") or "qkv" in name or "mlp.gate" in name or "mlp.up" in name:
                nn.init.normal_(p, std=0.7 * p.shape[-1] ** -0.5)
            elif p.dim() == 2:
                nn.init.normal_(p, std=0.2 * p.shape[-1] ** -0.5)


class PackedAttention:
    """An `Attend` whose rows see a shared context and, of themselves, what `mask` allows.

    positions int64 [N, S] (N = 1: the same in all rows); mask float32 [N, 1, S, C+S], added to the scores;
    context: an earlier PackedAttention, whose row i is seen by the rows i*n .. i*n+n-1 (a single row is seen by all).
    Keys and values are kept per pass, so that gradients flow into the context. taught: layers whose `alignment` is
    asked for.
    """

    def __init__(
        self, model: Nano, positions: Tensor, mask: Tensor, context: list[PackedAttention], taught: tuple[int, ...] = ()
    ) -> None:
        self.spec, self.mask, self.context, self.taught = model.spec, mask, context, taught
        self.cos, self.sin = model.cos[positions][:, None], model.sin[positions][:, None]
        self.keys: dict[tuple[int, int], Tensor] = {}
        self.values: dict[tuple[int, int], Tensor] = {}
        self.queries: dict[tuple[int, int], Tensor] = {}
        self.all_keys: dict[tuple[int, int], Tensor] = {}

    def __call__(self, qkv: Tensor, layer: int, traversal: int) -> Tensor:
        h, g, e = self.spec.num_heads, self.spec.num_kv_heads, self.spec.head_dim
        n, s, _ = qkv.shape
        key = (layer, traversal)
        # FP32, because rotary angles need it and this CPU's attention kernel is no faster in bf16.
        parts = torch.split(qkv.float(), [h * e, g * e, g * e], dim=-1)
        q, k, v = (t.view(n, s, -1, e).transpose(1, 2) for t in parts)  # [N, heads, S, E]
        q, k = rotate(q, self.cos, self.sin), rotate(k, self.cos, self.sin)
        self.keys[key], self.values[key] = k, v
        k = torch.cat([*(_spread(c.keys[key], n) for c in self.context), k], dim=2)
        v = torch.cat([*(_spread(c.values[key], n) for c in self.context), v], dim=2)
        if traversal == 0 and layer in self.taught:
            self.queries[key], self.all_keys[key] = q, k
        with torch.autocast("cpu", enabled=False):
            out = F.scaled_dot_product_attention(q, k, v, attn_mask=self.mask, enable_gqa=True)
        return out.transpose(1, 2).reshape(n, s, h * e)

    def alignment(self, layer: int, rows: Tensor, columns: Tensor, targets: Tensor) -> Tensor:
        """Mean of -log of the attention that the tokens (rows, columns) [M] pay to `targets` boolean [M, T], in the
        queries of the first K/V head."""
        q, k = self.queries[layer, 0], self.all_keys[layer, 0]
        group = self.spec.num_heads // self.spec.num_kv_heads
        scores = torch.einsum("mhe,mte->mht", q[rows, :group, columns], k[rows, 0]) * self.spec.head_dim**-0.5
        logs = (scores + self.mask[rows, :, columns]).log_softmax(-1)
        mass: Tensor = logs.masked_fill(~targets[:, None], -30.0).logsumexp(-1)
        return -mass.mean()


def _spread(x: Tensor, rows: int) -> Tensor:
    """Turn [m, G, C, E] into [rows, G, C, E] by repeating every row rows/m times."""
    m = x.shape[0]
    return x[:, None].expand(m, rows // m, *x.shape[1:]).reshape(rows, *x.shape[1:])


def causal(length: int, context: int) -> Tensor:
    """Additive mask float32 [1, 1, length, context + length]."""
    allowed = torch.ones(length, context + length, dtype=torch.bool).tril(context)
    return torch.zeros(1, 1, length, context + length).masked_fill_(~allowed, -1e9)


# Called by `read_context` and `answer_hidden` for each layer with its index, its first pass [N, S, D], and 1 at the
# tokens that are no padding [N, S].
Look = Callable[[int, Tensor, Tensor], None]


class GateLoss:
    """What is taught to the gate: in each half of the decoder its own range.

    The score before tanh is kept within +-`OPEN` in layers with a second pass, and below `SHUT` in the others, where
    training leaves the pass out. Tokens of the prompt, of pictures and of questions count alike.
    """

    def __init__(self, model: Nano) -> None:
        self._decoder = model.decoder
        self._losses: list[Tensor] = []

    def look(self, index: int, o1: Tensor, real: Tensor) -> None:
        """See `Look`."""
        score = self._decoder.gate(o1)[..., 0].float()
        beyond = F.relu(score.abs() - OPEN if index in self._decoder.second_layers else score - SHUT)
        loss = F.smooth_l1_loss(beyond, torch.zeros_like(beyond), reduction="none")
        self._losses.append((loss * real).sum() / real.sum())

    def mean(self) -> Tensor:
        """The mean over layers and kinds of tokens."""
        return torch.stack(self._losses).mean()


class GateSettler:
    """Turns the gate of an earlier checkpoint into one that the upper layers can shut.

    They cannot where its score is 100, as it is where the residual stream is large in a few directions.
    """

    def __init__(self, model: Nano) -> None:
        self._decoder = model.decoder
        self._moments: list[Tensor] = []

    def look(self, index: int, o1: Tensor, real: Tensor) -> None:
        """See `Look`."""
        if index in self._decoder.second_layers:
            seen = o1[real > 0]
            self._moments.append(seen.T @ seen / len(seen))

    @torch.no_grad()
    def settle(self) -> None:
        """Turn the gate away from directions in which open layers are large, and scale its score to `ALIVE`."""
        gate, moments = self._decoder.gate, torch.stack(self._moments).mean(0)
        weight = torch.linalg.solve(moments + 10 * torch.eye(len(moments)), gate.weight[0])
        gate.weight[0] = weight * ALIVE / (weight @ moments @ weight).sqrt()
        gate.bias.zero_()


def read_context(model: Nano, prompts: Prompts, features: Tensor, look: Look) -> list[PackedAttention]:
    """Traverse the shared prefix once and the B pictures; features [B, V, D]. Returns both caches."""

    def probe(index: int, o1: Tensor, *_: Tensor) -> None:
        look(index, o1, torch.ones(o1.shape[:2]))

    prefix = torch.tensor([prompts.prefix])
    p, v = prefix.shape[1], features.shape[1]
    shared = PackedAttention(model, torch.arange(p)[None], causal(p, 0), [])
    model.decoder.traverse(model.embedding(prefix), None, shared, probe)
    seen = PackedAttention(model, torch.arange(p, p + v)[None], causal(v, p), [shared])
    model.decoder.traverse(features, torch.ones(1, 1, 1), seen, probe)
    return [shared, seen]


def answer_hidden(model: Nano, batch: Batch, attend: PackedAttention, look: Look) -> Tensor:
    """`Decoder.traverse` in which stepped tokens keep their first pass; [N, S, D]. No token sees a stepped token's
    second pass, because only stepped tokens of the same answer follow it."""
    x: Tensor = model.embedding(batch.ids)
    real = (batch.positions > 0).float()
    for i, layer in enumerate(model.decoder.layers):
        o1 = layer(x, None, i, 0, attend)
        look(i, o1, real)
        if i not in model.decoder.second_layers:
            x = o1
            continue
        o2 = layer(o1, None, i, 1, attend)
        s = (0.5 * torch.tanh(model.decoder.gate(o1)) + 0.5) * (1 - batch.single)
        x = o1 * (1 - s) + o2 * s
    return x
