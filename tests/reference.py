"""A checkpoint in PyTorch, with everything that golden stores about one prompt: the truth for the graphs' tests."""

from __future__ import annotations

import contextlib
import copy
import functools
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from tests.cases import STEPS, Array, Row, Run
from tests.golden import GOLDEN
from trol_edge.export.reference import internlm2
from trol_edge.export.reference.checkpoint import Checkpoint
from trol_edge.export.reference.model import Decoder, EagerAttention, rope_tables

LONGEST = 2560  # tokens: more than any golden sequence


class Reference:
    """A small checkpoint, loaded in FP32. Use it under torch.no_grad()."""

    def __init__(self, folder: Path) -> None:
        checkpoint = Checkpoint(folder)
        self.spec = checkpoint.spec
        self.decoder, self.vision = Decoder(self.spec), internlm2.Vision(self.spec)
        checkpoint.load_into(decoder=self.decoder, vision=self.vision)
        self.embedding = checkpoint.tensor("embedding").float()
        self.rope = rope_tables(self.spec.head_dim, self.spec.rope_theta, LONGEST)
        self._rows: dict[Any, dict[str, Array]] = {}

    def attention(self) -> EagerAttention:
        """An empty cache."""
        return EagerAttention(self.spec, *self.rope)

    def after(self, ids: Array, token: int) -> Array:
        """Logits [V] of a step after a text prompt."""
        attend = self.attention()
        self.traverse(ids, None, attend)
        logits: Array = self.decoder.logits(self.step(token, attend))[0].numpy()
        return logits

    def embed(self, ids: Array, features: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Embeddings [1, S, D] with the image features in place, and the image mask [1, S, 1]."""
        x = self.embedding[torch.from_numpy(ids)]
        if features is None:
            return x[None], None
        mask = torch.from_numpy(ids == self.spec.image_token_id)
        x[mask] = features.reshape(-1, x.shape[1])
        return x[None], mask.float()[None, :, None]

    def traverse(self, ids: Array, features: Tensor | None, attend: EagerAttention, probe: Any = None) -> Tensor:
        """Traverse tokens after those that `attend` has cached; returns hidden states [S, D]."""
        x, mask = self.embed(ids, features)
        attend.positions = torch.arange(attend.length, attend.length + len(ids))
        return self.decoder.traverse(x, mask, attend, probe)[0]

    def step(self, token: int, attend: EagerAttention) -> Tensor:
        """Step one token; hidden state [1, D]."""
        attend.positions = torch.tensor([attend.length])
        return self.decoder.step(self.embedding[token][None, None], attend)[0]

    def row(self, run: Run, row: Row) -> dict[str, Array]:
        """Every array of one row, without padding and without the batch axis."""
        pixels, eos = run.pixels(row), run.info.get("eos_run", {}).get("eos_token_id")
        key = (row.ids.tobytes(), None if pixels is None else pixels.tobytes(), eos)
        if key not in self._rows:
            features = None if pixels is None else self.vision(torch.from_numpy(pixels))
            self._rows[key] = self.compute(row.ids, features, eos)
        return self._rows[key]

    def compute(self, ids: Array, features: Tensor | None, eos: int | None) -> dict[str, Array]:
        """One prefill, and from it every way to go on."""
        attend = self.attention()
        layers: list[tuple[Tensor, ...]] = []
        x = self.traverse(ids, features, attend, lambda i, *tensors: layers.append(tensors))
        o1, o2, gate, mixed = (np.stack([t[0].numpy() for t in column]) for column in zip(*layers, strict=True))
        logits = self.decoder.logits(x)
        first = logits[-1]
        out = {
            "prefill_position_ids": attend.positions.numpy(),
            "embeds": self.embed(ids, features)[0][0].numpy(),
            "gate": gate[..., 0],
            "hidden_o1": o1,
            "hidden_o2": o2,
            "hidden": mixed,
            "final_norm": self.decoder.norm(x).numpy(),
            "prefill_logits": logits.numpy(),
        }
        prefilled = snapshot(attend)
        out |= self.cached(first, attend)
        for i in (0, self.spec.num_layers - 1):
            for name, caches in (("k", attend.keys), ("v", attend.values)):
                cache = caches[0][i]
                assert cache is not None
                out[f"{name}{i}"] = cache[0, :, : len(ids)].numpy()
                out[f"{name}{i}_decode"] = cache[0, :, len(ids) :].numpy()
        out |= {"stale_ids": out["cached_ids"], "stale_logits": out["cached_logits"]}
        if eos is not None:
            ended = self.cached(first, snapshot(prefilled), eos)
            out |= {"eos_ids": ended["cached_ids"], "eos_logits": ended["cached_logits"]}
        return out | self.uncached(ids, features, first, prefilled)

    def cached(self, first: Tensor, attend: EagerAttention, eos: int | None = None) -> dict[str, Array]:
        """Single steps on the first pass's cache. After `eos` the padding token is fed, as golden did."""
        tokens, logits, hidden, positions, attended = [], [first], [], [], []
        for i in range(STEPS):
            ended = eos in tokens
            tokens.append(self.spec.eos_token_id if ended else int(logits[-1].argmax()))
            if i == STEPS - 1:
                break
            with outputs_of(self.decoder.layers) as states:
                x = self.step(tokens[-1], attend)
            hidden.append(np.stack([t[0, 0].numpy() for t in states]))
            positions.append(int(attend.positions[0]))
            attended.append(attend.length)
            logits.append(self.decoder.logits(x)[0])
        return {
            "cached_ids": np.array(tokens),
            "cached_logits": torch.stack(logits).numpy(),
            "decode_position_ids": np.array(positions),
            "decode_attended": np.array(attended),
            "decode_hidden": np.stack(hidden),
        }

    def uncached(self, ids: Array, features: Tensor | None, first: Tensor, attend: EagerAttention) -> dict[str, Array]:
        """Every token traversed, in two ways.

        extended: each new token alone, against both passes' keys and values. nocache: the whole sequence in one
        traverse; attention is causal, so its last logits are those of re-running the sequence for every token.
        """
        logits = [first]
        for _ in range(STEPS - 1):
            x = self.traverse(np.array([int(logits[-1].argmax())]), None, attend)
            logits.append(self.decoder.logits(x)[0])
        extended = torch.stack(logits)
        whole = np.concatenate((ids, extended.argmax(dim=-1).numpy()[:-1]))
        x = self.traverse(whole, features, self.attention())
        again = self.decoder.logits(x[-STEPS:])
        return {
            "nocache_ids": again.argmax(dim=-1).numpy(),
            "nocache_logits": again.numpy(),
            "extended_ids": extended.argmax(dim=-1).numpy(),
            "extended_logits": extended.numpy(),
        }


def snapshot(attend: EagerAttention) -> EagerAttention:
    """A copy that goes on by itself; the tensors in it are never changed in place."""
    twin = copy.copy(attend)
    twin.keys = [list(layers) for layers in attend.keys]
    twin.values = [list(layers) for layers in attend.values]
    return twin


@contextlib.contextmanager
def outputs_of(modules: Iterable[nn.Module]) -> Iterator[list[Tensor]]:
    """What modules return while this is open, in the order of their calls."""
    states: list[Tensor] = []
    hooks = [m.register_forward_hook(lambda module, args, out: states.append(out)) for m in modules]
    try:
        yield states
    finally:
        for hook in hooks:
            hook.remove()


@functools.cache
def reference(case: str) -> Reference:
    """The checkpoint of a golden case, loaded once."""
    return Reference(GOLDEN / case)
