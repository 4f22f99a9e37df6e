"""Outlier channels: the same function in float32, much larger activations."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.conftest import NANO
from trol_edge.calibration.outliers import make_outliers
from trol_edge.errors import ExportError, UsageError
from trol_edge.export import scenes
from trol_edge.export.reference.checkpoint import Checkpoint
from trol_edge.export.reference.model import Decoder, EagerAttention, rope_tables


def logits(folder: Path, ids: torch.Tensor, pixels: torch.Tensor) -> torch.Tensor:
    """All logits [S, V] of a prompt that begins with one picture."""
    checkpoint = Checkpoint(folder)
    spec = checkpoint.spec
    decoder, vision = checkpoint.family.decoder(spec), checkpoint.family.vision(spec)
    assert isinstance(decoder, Decoder)
    checkpoint.load_into(decoder=decoder, vision=vision)
    features = vision(pixels)[0]
    x = torch.cat((features, checkpoint.tensor("embedding").float()[ids]))[None]
    mask = torch.zeros(1, x.shape[1], 1)
    mask[:, : len(features)] = 1
    attend = EagerAttention(spec, *rope_tables(spec.head_dim, spec.rope_theta, x.shape[1]))
    attend.positions = torch.arange(x.shape[1])
    return decoder.logits(decoder.traverse(x, mask, attend))[0]


@pytest.fixture(scope="module")
def outliers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("outliers") / "nano"
    result = make_outliers(NANO, folder, factor=50, channels=4, seed=0)
    assert result["factor"] == 64 and result["norms"] == 8 * 2 + 1 + 4 * 2
    return folder


@torch.no_grad()
def test_float32_does_not_notice(outliers: Path) -> None:
    """Bit for bit: powers of two only move exponents."""
    pixels = torch.from_numpy(scenes.render(7)[0]).permute(2, 0, 1)[None] / 128.0 - 1
    ids = torch.arange(5, 105)
    assert torch.equal(logits(NANO, ids, pixels), logits(outliers, ids, pixels))


def test_every_norm_has_them(outliers: Path) -> None:
    """Four channels of every norm, others in each; and what reads them shrinks, LoRA included."""
    before, after = Checkpoint(NANO), Checkpoint(outliers)
    chosen = set()
    for name in before.names():
        old, new = before.tensor(name).float(), after.tensor(name).float()
        if "norm" in name and not name.startswith("vision.pre_norm"):
            if name.endswith(".weight"):
                (channels,) = torch.where(new != old)
                assert len(channels) == 4 and torch.equal(new[channels], 64 * old[channels]), name
                chosen.add(tuple(channels.tolist()))
        elif name.endswith(("qkv.weight", "gate.weight", "up.lora_a", "lm_head.weight", "fc1.weight", "0.q.weight")):
            if name != "decoder.gate.weight":
                changed = (new != old).any(0)
                assert changed.sum() == 4 and torch.equal(new[:, changed] * 64, old[:, changed]), name
        elif name.endswith(("down.weight", "embedding", "out.weight", "lora_b")):
            assert torch.equal(new, old), name
    assert len(chosen) > 10


def test_layout_is_the_published_one(outliers: Path) -> None:
    """The tokenizer and the configs come along, and no tensor is lost."""
    assert Checkpoint(outliers).names() == Checkpoint(NANO).names()
    assert {"config.json", "tokenizer.model", "trol_gating.pt", "model.safetensors"} <= {
        p.name for p in outliers.iterdir()
    }


def test_bad_numbers_and_places(outliers: Path, tmp_path: Path) -> None:
    for wrong in ({"factor": 1.0}, {"factor": 5000.0}, {"channels": 0}, {"channels": 1000}):
        with pytest.raises(UsageError, match=r"choose"):
            make_outliers(NANO, tmp_path / "new", **wrong)  # type: ignore[arg-type]
    assert not (tmp_path / "new").exists()
    with pytest.raises(ExportError, match="exists"):
        make_outliers(NANO, outliers)


@torch.no_grad()
def test_keys_grow_and_nothing_else_changes(tmp_path: Path) -> None:
    """Two pairs in every head of every layer, 32 times as large; bit for bit the same logits."""
    result = make_outliers(NANO, tmp_path / "keys", factor=32, channels=2, keys=True)
    assert result["norms"] == 0
    pixels = torch.from_numpy(scenes.render(7)[0]).permute(2, 0, 1)[None] / 128.0 - 1
    ids = torch.arange(5, 25)
    assert torch.equal(logits(NANO, ids, pixels), logits(tmp_path / "keys", ids, pixels))
    before, after = Checkpoint(NANO), Checkpoint(tmp_path / "keys")
    spec = before.spec
    queries = spec.num_heads * spec.head_dim
    keys = slice(queries, queries + spec.num_kv_heads * spec.head_dim)
    for i in range(spec.num_layers):
        for part in ("weight", "lora_b"):
            old, new = (c.tensor(f"decoder.layers.{i}.qkv.{part}").float() for c in (before, after))
            grown = (new[keys] == 32 * old[keys]).all(1).view(spec.num_kv_heads, 2, spec.head_dim // 2)
            assert grown.sum((1, 2)).tolist() == [4] * spec.num_kv_heads and torch.equal(grown[:, 0], grown[:, 1])
            assert torch.equal(new[keys.stop :], old[keys.stop :])
    with pytest.raises(UsageError, match="a head has 16 pairs"):
        make_outliers(NANO, tmp_path / "more", channels=17, keys=True)
