"""The vision tower and the published tensor names of the Phi-3 family (TroL-3.8B).

- Pictures: 1 to 6 tiles of 448 x 448 and a thumbnail, see `trol_edge/prompt/tiles.py`; each tile goes through the tower
  on its own.
- Vision: InternViT-300M-448 with exact GELU and LayerScale, last hidden state, no final norm, class token dropped;
  tokens row-major.
- Projector: pixel shuffle 0.5 (four neighbours become one token of four times the width), LayerNorm, Linear, GELU,
  Linear.
- Decoder: Phi-3-mini, published in our order already ([Q | K | V], and [gate | up] in one Linear); no LoRA; "su" rotary
  embedding.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trol_edge.bundle.spec import LongRope, ModelSpec, VisionSpec
from trol_edge.errors import CheckpointError
from trol_edge.export.reference.config import (
    DECODER,
    OF_EVERY_CONFIG,
    TOWER,
    end_tokens,
    obey,
    require_head_dim,
    require_plain_rope,
    rope_settings,
    su_amplitude,
)
from trol_edge.export.reference.family import SYSTEM, Family, Source
from trol_edge.export.reference.model import Decoder
from trol_edge.prompt.images import ImageSpec
from trol_edge.prompt.template import PromptSpec

MAX_TILES = 6  # fixed in the authors' code, which ignores max_dynamic_patch
PROJECTOR_EPS = 1e-5
# For a checkpoint without a tokenizer, which the authors' code would ask: after Phi-3's 32000 pieces and 13 tokens.
ASSUMED_IMAGE_TOKEN = 32013


# Keys of config.json, and of its parts, that `model_spec` and `notes` read.
READ = ("downsample_ratio", "force_image_size", "llm_config", "select_layer", "vision_config")
READ_DECODER = (
    "eos_token_id",
    "head_dim",
    "hidden_size",
    "intermediate_size",
    "max_position_embeddings",
    "num_attention_heads",
    "num_hidden_layers",
    "num_key_value_heads",
    "original_max_position_embeddings",
    "rms_norm_eps",
    "rope_parameters",
    "rope_scaling",
    "rope_theta",
    "sliding_window",
    "vocab_size",
)
READ_TOWER = (
    "hidden_act",
    "hidden_size",
    "image_size",
    "intermediate_size",
    "layer_norm_eps",
    "norm_type",
    "num_attention_heads",
    "num_hidden_layers",
    "patch_size",
    "qk_normalization",
    "qkv_bias",
)
# Other keys beside the parts -> the values that match our modules. The two numbers of tiles may have any value, because
# the authors' code ignores them.
TOP: dict[str, Collection[Any]] = {
    "dynamic_image_size": (True,),
    "max_dynamic_patch": range(1, 1000),
    "min_dynamic_patch": range(1, 1000),
    "pad2square": (False,),
    "ps_version": ("v2",),
    "quantization_config": (),
    "template": ("phi3-chat",),
    "tie_word_embeddings": (False,),
    "use_backbone_lora": (0, False),
    "use_llm_lora": (0, False),
    "use_thumbnail": (True,),
}


class InternVitLayer(nn.Module):
    """Pre-norm encoder layer with bidirectional attention, exact GELU and a learned scale on both branches."""

    def __init__(self, spec: VisionSpec) -> None:
        super().__init__()
        d = spec.hidden_size
        norm = nn.RMSNorm if spec.rms_norm else nn.LayerNorm
        self.heads = spec.num_heads
        self.norm1, self.norm2 = norm(d, eps=spec.layer_norm_eps), norm(d, eps=spec.layer_norm_eps)
        self.qkv = nn.Linear(d, 3 * d, bias=spec.qkv_bias)
        self.q_norm = nn.RMSNorm(d, eps=spec.layer_norm_eps) if spec.qk_norm else None
        self.k_norm = nn.RMSNorm(d, eps=spec.layer_norm_eps) if spec.qk_norm else None
        self.out = nn.Linear(d, d)
        self.fc1 = nn.Linear(d, spec.intermediate_size)
        self.fc2 = nn.Linear(spec.intermediate_size, d)
        self.scale1, self.scale2 = nn.Parameter(torch.empty(d)), nn.Parameter(torch.empty(d))

    def forward(self, x: Tensor) -> Tensor:
        n, length, d = x.shape
        q, k, v = self.qkv(self.norm1(x)).chunk(3, dim=-1)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)  # over the full width, before the split into heads
        q, k, v = (t.view(n, length, self.heads, -1).transpose(1, 2) for t in (q, k, v))
        context = F.scaled_dot_product_attention(q, k, v)  # [N, heads, T, E]
        x = x + self.scale1 * self.out(context.transpose(1, 2).reshape(n, length, d))
        return x + self.scale2 * self.fc2(F.gelu(self.fc1(self.norm2(x))))


def pixel_shuffle(x: Tensor) -> Tensor:
    """2 x 2 tokens become one: out[i, j, (a*2+b)*C + c] = in[2i+a, 2j+b, c]. [N, T, C] -> [N, T/4, 4C]"""
    n, tokens, width = x.shape
    side = math.isqrt(tokens) // 2
    blocks = x.view(n, side, 2, side, 2, width).permute(0, 1, 3, 2, 4, 5)  # [N, i, j, a, b, C]
    return blocks.reshape(n, side * side, 4 * width)


class Vision(nn.Module):
    """InternViT and projector: pixel_values [N, 3, P, P] -> image features [N, tokens_per_image, D] of N tiles."""

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        v = spec.vision
        self.patch = nn.Conv2d(3, v.hidden_size, v.patch_size, stride=v.patch_size)
        self.class_token = nn.Parameter(torch.empty(1, 1, v.hidden_size))
        self.positions = nn.Parameter(torch.empty(1, 4 * v.tokens_per_image + 1, v.hidden_size))
        self.layers = nn.ModuleList(InternVitLayer(v) for _ in range(v.num_layers))
        self.proj_norm = nn.LayerNorm(4 * v.hidden_size, eps=PROJECTOR_EPS)
        self.proj1 = nn.Linear(4 * v.hidden_size, spec.hidden_size)
        self.proj2 = nn.Linear(spec.hidden_size, spec.hidden_size)

    def embed(self, pixels: Tensor) -> Tensor:
        """The input of the first layer, [N, 1+T, d], class token first; T patches."""
        x = self.patch(pixels).flatten(2).transpose(1, 2)  # [N, T, d]
        return torch.cat((self.class_token.expand(x.shape[0], -1, -1), x), dim=1) + self.positions

    def encode(self, pixels: Tensor) -> list[Tensor]:
        """Hidden states [N, 1+T, d] after the embeddings and after each layer, class token first; T patches."""
        states = [self.embed(pixels)]
        for layer in self.layers:
            states.append(layer(states[-1]))
        return states

    def project(self, features: Tensor) -> Tensor:
        """Shuffled features [N, tokens, 4d] -> [N, tokens, D]."""
        return self.proj2(F.gelu(self.proj1(self.proj_norm(features))))

    def features(self, hidden: Tensor) -> Tensor:
        """Image features of the last hidden state: [N, 1+T, d] -> [N, tokens, D]."""
        return self.project(pixel_shuffle(hidden[:, 1:]))

    def forward(self, pixels: Tensor) -> Tensor:
        return self.features(self.encode(pixels)[-1])


class FusedGatedMlp(nn.Module):
    """SwiGLU with gate and up projections in one Linear, rows [gate | up]."""

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        self.gate_up = nn.Linear(spec.hidden_size, 2 * spec.intermediate_size, bias=False)
        self.down = nn.Linear(spec.intermediate_size, spec.hidden_size, bias=False)

    def forward(self, x: Tensor, image_mask: Tensor | None) -> Tensor:
        gate, up = self.gate_up(x).chunk(2, dim=-1)
        return self.down(F.silu(gate) * up)


def model_spec(config: dict[str, Any], clip: dict[str, Any] | None, shapes: Mapping[str, Sequence[int]]) -> ModelSpec:
    """Read the numbers of one checkpoint from `config.json`, which has parts for decoder and tower.

    `clip` is used by the other family only. `shapes`, the checkpoint's tensor shapes by name, gives the number of rows
    of the embedding table.
    """
    llm, tower = config["llm_config"], config["vision_config"]
    hidden, heads, limit = (llm[key] for key in ("hidden_size", "num_attention_heads", "max_position_embeddings"))
    ends = end_tokens(llm["eos_token_id"])
    base, kind, rope = rope_settings(llm)
    embedding = shapes.get("language_model.model.embed_tokens.weight", (llm["vocab_size"],))
    image_size, patch = tower["image_size"], tower["patch_size"]
    if image_size % (2 * patch):
        raise CheckpointError(
            f"config.json: image_size {image_size} is not an even number of patches of {patch} pixels; copy it again"
        )
    return ModelSpec(
        family="phi3",
        hidden_size=hidden,
        intermediate_size=llm["intermediate_size"],
        num_layers=llm["num_hidden_layers"],
        num_heads=heads,
        num_kv_heads=llm.get("num_key_value_heads") or heads,
        head_dim=require_head_dim(llm, hidden, heads),
        vocab_size=llm["vocab_size"],
        embedding_rows=embedding[0],
        rms_norm_eps=float(llm["rms_norm_eps"]),
        rope_theta=base,
        max_position_embeddings=limit,
        lora_rank=0,
        eos_token_id=ends[0],
        more_end_ids=tuple(ends[1:]),
        image_token_id=min(ASSUMED_IMAGE_TOKEN, embedding[0] - 1),
        vision=VisionSpec(
            hidden_size=tower["hidden_size"],
            intermediate_size=tower["intermediate_size"],
            num_layers=tower["num_hidden_layers"],
            num_heads=tower["num_attention_heads"],
            patch_size=patch,
            image_size=image_size,
            layer_norm_eps=float(tower["layer_norm_eps"]),
            tokens_per_image=(image_size // patch // 2) ** 2,
            rms_norm=tower.get("norm_type") == "rms_norm",
            qk_norm=tower["qk_normalization"],
            qkv_bias=tower["qkv_bias"],
        ),
        long_rope=_long_rope(llm, kind, rope, hidden // heads),
    )


def _long_rope(llm: Mapping[str, Any], kind: str, settings: Mapping[str, Any], head_dim: int) -> LongRope | None:
    if kind != "su":
        require_plain_rope(kind, settings, llm["max_position_embeddings"])
        return None
    short, long = (tuple(map(float, settings[key])) for key in ("short_factor", "long_factor"))
    if not len(short) == len(long) == head_dim // 2:
        raise CheckpointError(
            f"config.json: rope_scaling has {len(short)} short and {len(long)} long factors; "
            f"a head of {head_dim} needs {head_dim // 2} of each"
        )
    return LongRope(short, long, *su_amplitude(llm, settings))


def notes(config: dict[str, Any], clip: dict[str, Any] | None, spec: ModelSpec) -> list[str]:
    """Refuse settings of `config.json` that our modules do not support; returns remarks about unknown keys."""
    llm, tower, v = config["llm_config"], config["vision_config"], spec.vision
    limit, window = spec.max_position_embeddings, llm.get("sliding_window")
    unsupported = {
        f"tower activation {tower.get('hidden_act')!r}": tower.get("hidden_act", "gelu") != "gelu",
        f"tower norm {tower.get('norm_type')!r}": tower.get("norm_type", "layer_norm")
        not in ("layer_norm", "rms_norm"),
        f"downsample_ratio {config.get('downsample_ratio')!r}": config.get("downsample_ratio", 0.5) != 0.5,
        f"sliding_window {window!r}, shorter than max_position_embeddings": bool(window) and window < limit,
        f"select_layer {config.get('select_layer')!r}": config.get("select_layer", -1) != -1,
        f"force_image_size {config.get('force_image_size')!r} beside image_size {v.image_size}": config.get(
            "force_image_size", v.image_size
        )
        not in (None, v.image_size),
    }
    if any(unsupported.values()):
        found = "; ".join(what for what, wrong in unsupported.items() if wrong)
        raise CheckpointError(f"config.json has settings that no published TroL-3.8B has: {found}; copy it again")
    return [
        *obey(config, "", READ, TOP),
        *obey(llm, "llm_config.", READ_DECODER, DECODER),
        *obey(tower, "vision_config.", (*READ_TOWER, *OF_EVERY_CONFIG), TOWER),
    ]


def sources(spec: ModelSpec) -> dict[str, Source]:
    """Every parameter of the model and the published tensor that it comes from."""
    d, f, e = spec.hidden_size, spec.intermediate_size, spec.head_dim
    language = "language_model.model"
    out: dict[str, Source] = {"embedding": Source(f"{language}.embed_tokens.weight", (spec.embedding_rows, d))}

    def add(ours: str, theirs: str, *shape: int, bias: bool = False) -> None:
        out[f"{ours}.weight"] = Source(f"{theirs}.weight", shape)
        if bias:
            out[f"{ours}.bias"] = Source(f"{theirs}.bias", shape[:1])

    for i in range(spec.num_layers):
        ours, theirs = f"decoder.layers.{i}", f"{language}.layers.{i}"
        add(f"{ours}.attention_norm", f"{theirs}.input_layernorm", d)
        add(f"{ours}.qkv", f"{theirs}.self_attn.qkv_proj", (spec.num_heads + 2 * spec.num_kv_heads) * e, d)
        add(f"{ours}.out", f"{theirs}.self_attn.o_proj", d, spec.num_heads * e)
        add(f"{ours}.mlp_norm", f"{theirs}.post_attention_layernorm", d)
        add(f"{ours}.mlp.gate_up", f"{theirs}.mlp.gate_up_proj", 2 * f, d)
        add(f"{ours}.mlp.down", f"{theirs}.mlp.down_proj", d, f)
    add("decoder.norm", f"{language}.norm", d)
    add("decoder.lm_head", "language_model.lm_head", spec.vocab_size, d)

    v, tower = spec.vision, "vision_model"
    w = v.hidden_size
    add("vision.patch", f"{tower}.embeddings.patch_embedding", w, 3, v.patch_size, v.patch_size, bias=True)
    out["vision.class_token"] = Source(f"{tower}.embeddings.class_embedding", (1, 1, w))
    out["vision.positions"] = Source(f"{tower}.embeddings.position_embedding", (1, 4 * v.tokens_per_image + 1, w))
    for i in range(v.num_layers):
        ours, theirs = f"vision.layers.{i}", f"{tower}.encoder.layers.{i}"
        for j in (1, 2):
            add(f"{ours}.norm{j}", f"{theirs}.norm{j}", w, bias=not v.rms_norm)
            out[f"{ours}.scale{j}"] = Source(f"{theirs}.ls{j}", (w,))
        add(f"{ours}.qkv", f"{theirs}.attn.qkv", 3 * w, w, bias=v.qkv_bias)
        if v.qk_norm:
            add(f"{ours}.q_norm", f"{theirs}.attn.q_norm", w)
            add(f"{ours}.k_norm", f"{theirs}.attn.k_norm", w)
        add(f"{ours}.out", f"{theirs}.attn.proj", w, w, bias=True)
        add(f"{ours}.fc1", f"{theirs}.mlp.fc1", v.intermediate_size, w, bias=True)
        add(f"{ours}.fc2", f"{theirs}.mlp.fc2", w, v.intermediate_size, bias=True)
    add("vision.proj_norm", "vision_proj.0", 4 * w, bias=True)
    add("vision.proj1", "vision_proj.1", d, 4 * w, bias=True)
    add("vision.proj2", "vision_proj.3", d, d, bias=True)
    return out


def _adapt(parameter: str, shape: tuple[int, ...], spec: ModelSpec) -> Callable[[Tensor], Tensor] | None:
    return None  # published in one form only


def _unused(name: str) -> bool:
    return name.endswith(".rotary_emb.inv_freq")  # a buffer that old transformers versions stored


def _prompt(spec: ModelSpec) -> PromptSpec:
    return PromptSpec(
        before_system="<s><|system|>\n",
        system=SYSTEM,
        before_question="<|end|>\n<|user|>\n",
        after_question="<|end|>\n<|assistant|>\n",
        image="<IMG_CONTEXT>",
        image_prefix="<img>",
        image_suffix="</img>",
        after_image="\n",
        tokens_per_image=spec.vision.tokens_per_image,
        special_tokens=(
            "<s>",
            "<|system|>",
            "<|end|>",
            "<|user|>",
            "<|assistant|>",
            "<img>",
            "</img>",
            "<IMG_CONTEXT>",
        ),
        end_markers=("<|end|>",),
    )


def _image(spec: ModelSpec) -> ImageSpec:
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's
    return ImageSpec("tiles", spec.vision.image_size, mean, std, MAX_TILES)


FAMILY = Family(
    name="phi3",
    matches=lambda config: (
        isinstance(config.get("llm_config"), dict) and config["llm_config"].get("model_type") == "phi3"
    ),
    model_spec=model_spec,
    notes=notes,
    sources=sources,
    decoder=lambda spec: Decoder(spec, FusedGatedMlp),
    vision=Vision,
    adapt=_adapt,
    unused=_unused,
    prompt=_prompt,
    image=_image,
    eos_from_tokenizer=True,
    published=lambda config: {s.name: s.shape for s in sources(model_spec(config, None, {})).values()},
)
