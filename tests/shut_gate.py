"""A checkpoint whose gate is shut in the upper half of its layers, as the authors' figure has it: random weights."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from tests.conftest import NANO

LAYERS, SHUT = 4, (2, 3)  # number of layers; those with s = 0
HIGH, MARK = 0, 1  # channels of the residual stream that no layer writes, but for the one that shuts the gate


def make(folder: Path) -> Path:
    """Write it: trol-nano's tower and tokenizer, and a decoder of four layers.

    One channel is constant in the embeddings. An MLP unit of the first shut layer reads it, and writes a large negative
    number to another one, which the gate reads: s is near 0.8 below that layer, and 0 from there on.
    """
    shutil.copytree(NANO, folder)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": LAYERS}), encoding="utf-8")
    tensors = load_file(folder / "model.safetensors")
    generator = torch.Generator().manual_seed(1)
    for name in list(tensors):
        shape = tensors[name].shape
        if name.startswith("model.layers.") and int(name.split(".")[2]) >= LAYERS:
            del tensors[name]
        elif name.startswith("model.layers.") and len(shape) == 2:
            tensors[name] = torch.randn(shape, generator=generator) / math.sqrt(shape[1])
        elif name.startswith("model.layers."):
            tensors[name] = torch.ones(shape)
        else:
            tensors[name] = tensors[name].float()
    for i in range(LAYERS):
        for name in ("attention.wo", "feed_forward.w2"):
            for part in ("ffn", "lora_B"):
                tensors[f"model.layers.{i}.{name}.{part}.weight"][[HIGH, MARK]] = 0
    tensors["model.tok_embeddings.weight"][:, [HIGH, MARK]] = torch.tensor([4.0, 0.0])
    tensors["vision_proj.2.weight"][[HIGH, MARK]] = 0
    tensors["vision_proj.2.bias"][[HIGH, MARK]] = torch.tensor([4.0, 0.0])
    mlp = f"model.layers.{SHUT[0]}.feed_forward"
    for name in ("w1", "w3"):
        tensors[f"{mlp}.{name}.lora_B.weight"][0] = 0
        tensors[f"{mlp}.{name}.ffn.weight"][0] = 0
        tensors[f"{mlp}.{name}.ffn.weight"][0, HIGH] = 4.0
    tensors[f"{mlp}.w2.ffn.weight"][:, 0] = 0
    tensors[f"{mlp}.w2.ffn.weight"][MARK, 0] = -1.0
    save_file({name: tensor.half().contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")
    gate = torch.randn(1, config["hidden_size"], generator=generator) / 64
    gate[0, [HIGH, MARK]] = torch.tensor([0.0, 1.0])
    torch.save(
        {f"{i}.{n}": t for i in range(LAYERS) for n, t in (("weight", gate), ("bias", torch.full((1,), 0.6)))},
        folder / "trol_gating.pt",
    )
    return folder
