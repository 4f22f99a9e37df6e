"""Checkpoints: config files, headers, indices, tokenizers and gates that are damaged, or something else."""

from __future__ import annotations

import json
import os
from pathlib import Path
from random import Random
from typing import Any

import torch

from tests.conftest import CHECKPOINTS, NANOS
from tests.fuzz.damage import NODES, altered, json_text, with_another_header, with_another_node, with_other_numbers
from tests.fuzz.material import copy, remember_traces, remove, replace
from tests.fuzz.workers import say
from trol_edge.export import pipeline
from trol_edge.export.reference import tokenizer
from trol_edge.export.reference.checkpoint import Checkpoint
from trol_edge.reading import guard

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 1234\n"
CONFIG_KEYS = (
    "rope_scaling",
    "rope_parameters",
    "rope_theta",
    "hidden_act",
    "head_dim",
    "num_hidden_layers",
    "vocab_size",
    "bias",
    "sliding_window",
    "attention_bias",
    "tie_word_embeddings",
    "partial_rotary_factor",
    "eos_token_id",
    "architectures",
    "quantization_config",
    "hidden_size",
    "num_key_value_heads",
    "max_position_embeddings",
    "auto_map",
    "model_type",
)


class Trials:
    """Opens checkpoints, reads what export reads, and at times exports."""

    def __init__(self, place: Path) -> None:
        torch.set_num_threads(1)
        remember_traces()
        self.place = place
        self.sound = [copy(CHECKPOINTS / model, place / model) for model in NANOS]

    def trial(self, rng: Random) -> str:
        """One damage."""
        folder = copy(rng.choice(self.sound), self.place / "changed", link=True)
        often = (self.config, self.config, self.config, self.weights, self.tokenizer, self.tokenizer)
        kind = rng.choice([*often, self.shards, self.gate, self.other_file])
        say(f"{folder.name}: {kind.__name__}")
        kind(folder, rng)
        source = Checkpoint(folder)
        if rng.random() < 0.03:
            with torch.no_grad():
                pipeline.export(folder, self.place / "bundle", overwrite=True, record_selftest=rng.random() < 0.5)
            return "answered"
        with guard("reading its tensors as export does"):
            source.identity()
        for name in source.names():
            rows = sum(block.shape[0] if block.ndim else 1 for _, block in source.blocks(name))
            assert rows == (source.shape(name)[0] if source.shape(name) else 1), name
        image = (source.family.prompt(source.spec).image,)
        text = tokenizer.convert(folder, image)
        if text is not None:
            tokenizer.verify(text, folder, image)
        return "answered"

    def config(self, folder: Path, rng: Random) -> None:
        """Nodes of a config file, and keys that other versions have."""
        names = ["config.json"] * 4 + ["clip_vision_config.json", "generation_config.json", "tokenizer_config.json"]
        path = folder / rng.choice([name for name in names if (folder / name).exists()])
        data = json.loads(path.read_text(encoding="utf-8"))
        for _ in range(rng.choice([1, 1, 2, 3])):
            if rng.random() < 0.4:
                part = rng.choice([data, *(v for v in data.values() if isinstance(v, dict))])
                part[rng.choice(CONFIG_KEYS)] = rng.choice(NODES)
            else:
                changed = with_another_node(data, rng)
                data = changed if isinstance(changed, dict) else data
        replace(path, json_text(data, rng))

    def weights(self, folder: Path, rng: Random) -> None:
        """Header, numbers or bytes of the weights."""
        path = folder / "model.safetensors"
        replace(path, rng.choice([with_another_header, with_other_numbers, altered])(path.read_bytes(), rng))

    def shards(self, folder: Path, rng: Random) -> None:
        """An index, right or wrong, in place of one file."""
        path = folder / "model.safetensors"
        data = path.read_bytes()
        path.unlink()
        names = [n for n in json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")]) if n != "__metadata__"]
        shard = "model-00001-of-00001.safetensors"
        (folder / shard).write_bytes(data)
        index: Any = {"metadata": {}, "weight_map": dict.fromkeys(names, shard)}
        how = rng.randrange(6)
        if how == 0:
            name = rng.choice(
                ["../model.safetensors", "/etc/hostname", "/proc/kmsg", "a/b", "", "\0", "x" * 5000, "config.json"]
            )
            index["weight_map"][rng.choice(names)] = name
        elif how == 1:
            remove(folder / shard)
            (folder / shard).symlink_to(
                rng.choice(["/etc/hostname", "/dev/zero", shard, self.sound[0] / "model.safetensors"])
            )
        elif how == 2:
            index = with_another_node(index, rng)
        elif how == 3:
            os.link(folder / shard, folder / "model-00002-of-00002.safetensors")
            index["weight_map"][names[0]] = "model-00002-of-00002.safetensors"
        if how != 4:
            (folder / "model.safetensors.index.json").write_bytes(
                json_text(index, rng) if how == 5 else json.dumps(index).encode()
            )

    def tokenizer(self, folder: Path, rng: Random) -> None:
        """Files of the tokenizer."""
        names = ["tokenizer.model", "tokenizer.json", "added_tokens.json", "tokenizer_config.json"]
        path = folder / rng.choice([name for name in names if (folder / name).exists()])
        if path.suffix == ".model":
            replace(path, altered(path.read_bytes(), rng))
            return
        data = json.loads(path.read_text(encoding="utf-8"))
        for _ in range(rng.choice([1, 1, 2])):
            data = with_another_node(data, rng)
        replace(path, json_text(data, rng))

    def gate(self, folder: Path, rng: Random) -> None:
        """The gate: bytes, other tensors, more than tensors."""
        path = folder / "trol_gating.pt"
        how = rng.randrange(4)
        if how < 2:
            replace(path, altered(path.read_bytes(), rng))
            return
        tensors = torch.load(path, weights_only=True)
        name = rng.choice(sorted(tensors))
        odd: list[Any] = [
            torch.zeros(0),
            torch.zeros(2, 2).to_sparse(),
            torch.zeros(3, device="meta"),
            torch.full((1,), float("nan")),
            torch.nn.Parameter(tensors[name].clone()),
            torch.zeros(1, dtype=torch.complex64),
            torch.zeros((), dtype=torch.int8),
            torch.zeros(1).expand(2**40),
            torch.quantize_per_tensor(torch.zeros(1), 1.0, 0, torch.qint8),
            None,
            "text",
            3,
        ]
        tensors[name] = rng.choice(odd)
        path.unlink()
        torch.save(tensors if how == 2 else [tensors], path)

    def other_file(self, folder: Path, rng: Random) -> None:
        """A pointer, a page, a pipe, a folder, a link or nothing in place of a file."""
        path = rng.choice(sorted(folder.iterdir()))
        remove(path)
        how = rng.randrange(7)
        if how == 0:
            path.write_bytes(POINTER)
        elif how == 1:
            path.write_bytes(b"<!DOCTYPE html><html><body>Sign in</body></html>")
        elif how == 2:
            os.mkfifo(path)
        elif how == 3:
            path.mkdir()
        elif how == 4:
            path.symlink_to(
                rng.choice(["/etc/hostname", "/dev/zero", "/dev/stdin", "/proc/self/mem", path.name, "nowhere"])
            )
        elif how == 5:
            path.write_bytes(b"")
