"""One `Recipe` for each of the two small models, with all that differs in their training.

- trol-nano has the 1.8B architecture. Its gate is shut in the upper half.
- trol-nano-phi3 has the 3.8B architecture and learns on pictures of one and of several tiles. Its decoder and word
  embeddings start from the shipped trol-nano (same sizes, no LoRA). While its encoder learns alone, its projector
  learns the output of trol-nano's projector for the same picture. That is a target for every value, while the patch
  labels are only a few classes.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trol_edge.bundle.spec import LongRope, ModelSpec, VisionSpec
from trol_edge.export.nano.data import CELLS
from trol_edge.export.nano.text import PIECES
from trol_edge.export.reference import internlm2, phi3, tokenizer
from trol_edge.export.reference.checkpoint import Checkpoint
from trol_edge.export.reference.family import Family
from trol_edge.export.reference.hub import shipped_folder
from trol_edge.export.scenes import GRID, PATCH, PIXELS


@dataclasses.dataclass(frozen=True)
class Recipe:
    """One small model.

    `tokenizer_files(pieces, folder)` writes the published tokenizer files for a sentencepiece model. `initialise`
    fills the vision tower. `features(vision, pixels)` [N, I, width] is what the patch labels are read from, and
    `project(vision, features)` [N, I, D] is what the decoder gets. `configs` and `unused_tensors` complete the
    published layout. `teacher` is a shipped model whose projected features the encoder learns, and whose decoder is
    the start. `grids` maps columns and rows of tiles to their share of the batches.
    """

    name: str
    about: str  # begins the report
    family: Family
    spec: ModelSpec
    symbols: tuple[str, ...]  # special tokens that are sentencepiece pieces
    space_before_answer: bool
    tokenizer_files: Callable[[Path, Path], None]
    initialise: Callable[[nn.Module], None]
    features: Callable[[Any, Tensor], Tensor]
    project: Callable[[Any, Tensor], Tensor]
    feature_width: int
    configs: Callable[[ModelSpec], dict[str, dict[str, Any]]]
    unused_tensors: Callable[[ModelSpec], dict[str, Tensor]]
    teacher: str | None = None
    open_layers: int = 4  # the lowest ones, whose second pass is trained; above them the gate learns to be 0
    encoder_batch: int = 48  # pictures per process and step, while the encoder learns alone
    minutes: float = 52  # training time of all stages
    encoder_share: float = 0.23  # share of `minutes` for the encoder alone
    rate: float = 1.0  # factor on the decoder stage's learning rates
    encoder_rate: float = 0.3  # further factor on the encoder's rates there
    stepped_from: float = 0.35  # share of the decoder stage after which half of the answers are in step form
    grids: tuple[tuple[tuple[int, int], float], ...] = (((1, 1), 1.0),)
    long_share: float = 0.0  # share of the batches with the long set of rope factors


def sines(side: int, width: int, slowest: float) -> Tensor:
    """Two-dimensional sines and cosines for a grid of side x side patches, [side * side, width].

    They matter: with random position embeddings "where" reached only 40-50 % and counting 66 %.
    """
    angles = torch.arange(side)[:, None] * torch.logspace(math.log10(1.5), math.log10(slowest), width // 4)
    line = torch.cat((angles.sin(), angles.cos()), dim=1)
    grid = torch.cat((line[:, None].expand(-1, side, -1), line[None].expand(side, -1, -1)), dim=-1)
    return grid.reshape(side * side, width)


def _small_values(vision: nn.Module, patch_std: float) -> None:
    for name, p in vision.named_parameters():
        if p.dim() > 1:
            nn.init.normal_(p, std=patch_std if name.startswith("patch") else 0.7 * p.shape[-1] ** -0.5)
        elif name.endswith("bias"):
            nn.init.zeros_(p)


# --- trol-nano ---------------------------------------------------------------------------------------------------

_IMAGE = "<image>"


def _nano_spec() -> ModelSpec:
    """A spec with every mechanism of the 1.8B model: GQA, interleaved wqkv, partial LoRA, one gate."""
    return ModelSpec(
        family="internlm2",
        hidden_size=128,
        intermediate_size=384,
        num_layers=8,
        num_heads=4,
        num_kv_heads=2,
        head_dim=32,
        vocab_size=PIECES,
        embedding_rows=PIECES + 1,
        rms_norm_eps=1e-5,
        rope_theta=1e6,
        max_position_embeddings=2048,
        lora_rank=16,
        eos_token_id=2,
        image_token_id=PIECES,
        vision=VisionSpec(
            hidden_size=128,
            intermediate_size=512,
            num_layers=4,
            num_heads=4,
            patch_size=PATCH,
            image_size=PIXELS,
            layer_norm_eps=1e-5,
            tokens_per_image=CELLS,
        ),
    )


def _nano_initialise(vision: nn.Module) -> None:
    assert isinstance(vision, internlm2.Vision)
    _small_values(vision, 0.02)
    nn.init.normal_(vision.class_token, std=0.02)
    nn.init.normal_(vision.proj1.weight, std=0.3 * vision.proj1.weight.shape[1] ** -0.5)
    nn.init.normal_(vision.proj2.weight, std=vision.proj2.weight.shape[1] ** -0.5)
    with torch.no_grad():
        vision.positions[0].zero_()
        vision.positions[1:] = sines(GRID, vision.positions.shape[1], 0.1)


def _nano_tokenizer(pieces: Path, folder: Path) -> None:
    (folder / "tokenizer.model").write_bytes(pieces.read_bytes())
    _write_json(folder / "added_tokens.json", {_IMAGE: PIECES})


def _nano_configs(spec: ModelSpec) -> dict[str, dict[str, Any]]:
    """The config files. `img_size` and `lora_rank` are our keys; the authors' code hard-codes 490 and 256."""
    config = {
        "architectures": ["TroLForCausalLM"],
        "attn_implementation": "eager",
        "auto_map": {"AutoConfig": "configuration_internlm2.InternLM2Config"},
        "bias": False,
        "bos_token_id": 1,
        "eos_token_id": spec.eos_token_id,
        "hidden_act": "silu",
        "hidden_size": spec.hidden_size,
        "img_size": spec.vision.image_size,
        "initializer_range": 0.02,
        "intermediate_size": spec.intermediate_size,
        "lora_rank": spec.lora_rank,
        "max_position_embeddings": spec.max_position_embeddings,
        "model_type": "internlm",
        "num_attention_heads": spec.num_heads,
        "num_hidden_layers": spec.num_layers,
        "num_key_value_heads": spec.num_kv_heads,
        "pad_token_id": 2,
        "rms_norm_eps": spec.rms_norm_eps,
        "rope_scaling": None,
        "rope_theta": spec.rope_theta,
        "tie_word_embeddings": False,
        "torch_dtype": "float16",
        "use_cache": True,
        "vocab_size": spec.vocab_size,
    }
    clip = {
        "model_type": "clip_vision_model",
        "hidden_act": "quick_gelu",
        "hidden_size": spec.vision.hidden_size,
        "image_size": spec.vision.image_size,
        "intermediate_size": spec.vision.intermediate_size,
        "layer_norm_eps": spec.vision.layer_norm_eps,
        "num_attention_heads": spec.vision.num_heads,
        "num_channels": 3,
        "num_hidden_layers": spec.vision.num_layers,
        "patch_size": spec.vision.patch_size,
    }
    return {"config.json": config, "clip_vision_config.json": clip}


def _nano_unused(spec: ModelSpec) -> dict[str, Tensor]:
    norm, width = "vit.vision_tower.vision_model.post_layernorm", spec.vision.hidden_size
    half = torch.float16
    return {f"{norm}.weight": torch.ones(width, dtype=half), f"{norm}.bias": torch.zeros(width, dtype=half)}


# --- trol-nano-phi3 ----------------------------------------------------------------------------------------------

# In the order in which Phi-3 numbers them after its pieces, then the three that InternVL adds.
PHI3_TOKENS = (
    *("<|endoftext|>", "<|assistant|>", *(f"<|placeholder{i}|>" for i in range(1, 5)), "<|system|>", "<|end|>"),
    *("<|placeholder5|>", "<|placeholder6|>", "<|user|>", "<img>", "</img>", "<IMG_CONTEXT>"),
)


def _phi3_spec() -> ModelSpec:
    """A spec with every mechanism of the 3.8B model: tiles, pixel shuffle, LayerScale, fused Linears, "su" rope, gate.

    The decoder has trol-nano's sizes and rope base, so that it can start from it. A tile has 16 x 16 patches, which
    pixel shuffle turns into the 64 tokens of the label grid.
    """
    original, limit = 1024, 2048
    steps = range(16)
    return dataclasses.replace(
        _nano_spec(),
        family="phi3",
        vocab_size=PIECES + len(PHI3_TOKENS),
        embedding_rows=PIECES + len(PHI3_TOKENS),
        lora_rank=0,
        max_position_embeddings=limit,
        eos_token_id=PIECES,
        image_token_id=PIECES + PHI3_TOKENS.index("<IMG_CONTEXT>"),
        vision=VisionSpec(
            hidden_size=96,
            intermediate_size=384,
            num_layers=3,
            num_heads=3,
            patch_size=PATCH // 2,
            image_size=PIXELS,
            layer_norm_eps=1e-6,
            tokens_per_image=CELLS,
        ),
        long_rope=LongRope(
            short_factor=tuple(round(1 + 0.02 * i, 2) for i in steps),
            long_factor=tuple(round(1 + 0.2 * i, 2) for i in steps),
            original_max_position_embeddings=original,
            amplitude=math.sqrt(1 + math.log(limit / original) / math.log(original)),
        ),
    )


def _phi3_initialise(vision: nn.Module) -> None:
    assert isinstance(vision, phi3.Vision)
    _small_values(vision, 0.04)  # a quarter of trol-nano's inputs per patch
    for name, p in vision.named_parameters():
        if name.endswith(("scale1", "scale2")):
            nn.init.ones_(p)
    nn.init.normal_(vision.class_token, std=0.02)
    nn.init.normal_(vision.proj2.weight, std=vision.proj2.weight.shape[1] ** -0.5)
    with torch.no_grad():
        vision.positions[0, 0].zero_()
        vision.positions[0, 1:] = sines(2 * GRID, vision.positions.shape[2], 0.05)


def _phi3_features(vision: phi3.Vision, pixels: Tensor) -> Tensor:
    return vision.proj_norm(phi3.pixel_shuffle(vision.encode(pixels)[-1][:, 1:]))


def _phi3_project(vision: phi3.Vision, features: Tensor) -> Tensor:
    return vision.proj2(F.gelu(vision.proj1(features)))


def _phi3_tokenizer(pieces: Path, folder: Path) -> None:
    """Write the same pieces and merges as Phi-3 does, with a space before each segment and flags on added tokens."""
    source = folder / "pieces"
    source.mkdir()
    (source / "tokenizer.model").write_bytes(pieces.read_bytes())
    text = tokenizer.convert(source)
    (source / "tokenizer.model").unlink()
    source.rmdir()
    assert text is not None
    model = json.loads(text)["model"]
    assert len(model["vocab"]) == PIECES, "a merge needs a character that is not a piece"
    # (id, token, rstrip: takes the white space after it, special)
    tokens = [(0, "<unk>", False, True), (1, "<s>", False, True), (2, "</s>", True, False)]
    tokens += [(PIECES + i, t, t.startswith("<|") and i > 0, True) for i, t in enumerate(PHI3_TOKENS)]
    flags = {"single_word": False, "lstrip": False, "normalized": False}
    bos = {"SpecialToken": {"id": "<s>", "type_id": 0}}
    first, second = ({"Sequence": {"id": name, "type_id": i}} for i, name in enumerate("AB"))
    data = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": i, "content": t, "rstrip": r, "special": s, **flags} for i, t, r, s in tokens],
        "normalizer": {
            "type": "Sequence",
            "normalizers": [
                {"type": "Prepend", "prepend": "▁"},
                {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
            ],
        },
        "pre_tokenizer": None,
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [bos, first],
            "pair": [bos, first, second],
            "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}},
        },
        "decoder": {
            "type": "Sequence",
            "decoders": [
                {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
                {"type": "ByteFallback"},
                {"type": "Fuse"},
                {"type": "Strip", "content": " ", "start": 1, "stop": 0},
            ],
        },
        "model": model,
    }
    _write_json(folder / "tokenizer.json", data)
    named = {"bos_token": "<s>", "eos_token": PHI3_TOKENS[0], "unk_token": "<unk>"}
    _write_json(folder / "tokenizer_config.json", named | {"tokenizer_class": "LlamaTokenizer"})


def _phi3_configs(spec: ModelSpec) -> dict[str, dict[str, Any]]:
    v, rope = spec.vision, spec.long_rope
    assert rope is not None
    language = {
        "architectures": ["Phi3ForCausalLM"],
        "model_type": "phi3",
        "bos_token_id": 1,
        "eos_token_id": spec.eos_token_id,
        "hidden_act": "silu",
        "hidden_size": spec.hidden_size,
        "intermediate_size": spec.intermediate_size,
        "max_position_embeddings": spec.max_position_embeddings,
        "num_attention_heads": spec.num_heads,
        "num_hidden_layers": spec.num_layers,
        "num_key_value_heads": spec.num_kv_heads,
        "original_max_position_embeddings": rope.original_max_position_embeddings,
        "pad_token_id": spec.eos_token_id,
        "rms_norm_eps": spec.rms_norm_eps,
        "rope_scaling": {
            "type": "su",
            "short_factor": list(rope.short_factor),
            "long_factor": list(rope.long_factor),
        },
        "rope_theta": spec.rope_theta,
        "sliding_window": None,
        "tie_word_embeddings": False,
        "vocab_size": spec.vocab_size,
    }
    tower = {
        "architectures": ["InternVisionModel"],
        "model_type": "intern_vit_6b",
        "hidden_act": "gelu",
        "hidden_size": v.hidden_size,
        "image_size": v.image_size,
        "intermediate_size": v.intermediate_size,
        "layer_norm_eps": v.layer_norm_eps,
        "norm_type": "layer_norm",
        "num_attention_heads": v.num_heads,
        "num_channels": 3,
        "num_hidden_layers": v.num_layers,
        "patch_size": v.patch_size,
        "qk_normalization": v.qk_norm,
        "qkv_bias": v.qkv_bias,
    }
    config = {
        "architectures": ["TroLForCausalLM"],
        "model_type": "trol",
        "downsample_ratio": 0.5,
        "dynamic_image_size": True,
        "force_image_size": v.image_size,
        "select_layer": -1,
        "template": "phi3-chat",
        "torch_dtype": "float16",
        "use_thumbnail": True,
        "llm_config": language,
        "vision_config": tower,
    }
    return {"config.json": config}


def start_from(teacher: str, spec: ModelSpec, embedding: nn.Embedding, decoder: nn.Module, tokens: Path) -> None:
    """Fill a decoder of the Phi-3 family and its embeddings from a shipped InternLM2 model of its sizes.

    LoRA is left out, so image tokens have to be learnt without it. Words are matched by their text, with or without
    the space before them; `tokens` is the tokenizer.json. Parameters without a counterpart keep their value.
    """
    folder = shipped_folder(teacher)
    old = Checkpoint(folder)
    theirs: dict[str, int] = json.loads(tokenizer.convert(folder) or "")["model"]["vocab"]
    data = json.loads(tokens.read_text(encoding="utf-8"))
    ours: dict[str, int] = data["model"]["vocab"] | {entry["content"]: entry["id"] for entry in data["added_tokens"]}
    begin, end = "[UNUSED_TOKEN_146]", "[UNUSED_TOKEN_145]"
    role = {f"<|{who}|>": begin for who in ("system", "user", "assistant")}
    alike = {**role, "<|end|>": end, "<|endoftext|>": "</s>"}
    words, head = old.tensor("embedding").float(), old.tensor("decoder.lm_head.weight").float()
    state = decoder.state_dict()
    with torch.no_grad():
        for text, i in ours.items():
            names = (alike.get(text, text), text.lstrip("▁"), f"▁{text}")
            found = next((theirs[name] for name in names if name in theirs), None)
            if found is not None:
                embedding.weight[i] = words[found]
                if found < len(head):
                    state["lm_head.weight"][i] = head[found]
        for name, target in state.items():
            if name == "lm_head.weight":
                continue
            parts = ("gate", "up") if "gate_up" in name else ("gate_up",)
            value = torch.cat([old.tensor("decoder." + name.replace("gate_up", part)).float() for part in parts])
            if name.endswith("qkv.weight") and spec.long_rope is not None:
                # The amplitude of cos and sin makes queries and keys larger; divide, so that attention starts equal.
                value[: (spec.num_heads + spec.num_kv_heads) * spec.head_dim] /= spec.long_rope.amplitude
            target.copy_(value)


def _write_json(path: Path, data: Any) -> None:
    path.write_text(json.dumps(data, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


# Every aspect ratio that a picture may have. Half of the larger ones are square, as in `trol-edge evaluate --scale 2`.
_SEVERAL: dict[tuple[int, int], float] = {
    (1, 2): 4, (2, 1): 4, (2, 2): 8, (3, 1): 1.2, (1, 3): 1.2, (3, 2): 1.5, (2, 3): 1.5, (4, 1): 0.7, (1, 4): 0.7,
}  # fmt: skip
_SEVERAL_SHARE = 0.28  # share of the batches that have several tiles

RECIPES = {
    recipe.name: recipe
    for recipe in (
        Recipe(
            name="trol-nano",
            about="A TroL of the 1.8B architecture (InternLM2 family)",
            family=internlm2.FAMILY,
            spec=_nano_spec(),
            symbols=("[UNUSED_TOKEN_145]", "[UNUSED_TOKEN_146]"),
            space_before_answer=False,
            tokenizer_files=_nano_tokenizer,
            initialise=_nano_initialise,
            features=lambda vision, pixels: vision.encode(pixels)[-1][:, 1:],
            project=lambda vision, features: vision.project(features),
            feature_width=128,
            configs=_nano_configs,
            unused_tensors=_nano_unused,
        ),
        Recipe(
            name="trol-nano-phi3",
            about="A TroL of the 3.8B architecture (InternViT tiles, Phi-3)",
            family=phi3.FAMILY,
            spec=_phi3_spec(),
            symbols=(),
            space_before_answer=True,
            tokenizer_files=_phi3_tokenizer,
            initialise=_phi3_initialise,
            features=_phi3_features,
            project=_phi3_project,
            feature_width=4 * 96,
            configs=_phi3_configs,
            unused_tensors=lambda spec: {},
            teacher="trol-nano",
            encoder_batch=24,
            minutes=58,
            encoder_share=0.26,
            rate=0.5,
            encoder_rate=0.5,
            stepped_from=0.15,
            grids=(
                ((1, 1), 1 - _SEVERAL_SHARE),
                *((g, _SEVERAL_SHARE * w / sum(_SEVERAL.values())) for g, w in _SEVERAL.items()),
            ),
            long_share=0.12,
        ),
    )
}
