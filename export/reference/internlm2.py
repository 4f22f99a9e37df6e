"""The vision tower and the published tensor names of the InternLM2 family (TroL-1.8B and 7B).

- Vision: CLIP ViT-L/14-336 with position embeddings resized to 35 x 35 (input 490 x 490), quick-GELU,
  pre-layernorm, last hidden state without post-layernorm, class token dropped; tokens row-major.
- Projector: Linear, GELU, Linear.
- Decoder: `wqkv` is interleaved per key/value head ([its query heads, k, v]); partial LoRA everywhere.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trol_edge.bundle.spec import ModelSpec, VisionSpec
from trol_edge.errors import CheckpointError
from trol_edge.export.reference.config import (
    DECODER,
    OF_EVERY_CONFIG,
    TOWER,
    differing,
    end_tokens,
    obey,
    require_head_dim,
    require_plain_rope,
    rope_settings,
)
from trol_edge.export.reference.family import SYSTEM, Family, Source
from trol_edge.export.reference.model import Decoder
from trol_edge.prompt.images import ImageSpec
from trol_edge.prompt.template import PromptSpec

# openai/clip-vit-large-patch14-336, which the authors' code names; the published folders do not describe the tower.
CLIP_L_14_336: dict[str, Any] = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "image_size": 336,
    "patch_size": 14,
    "layer_norm_eps": 1e-5,
}


# Keys of config.json that `model_spec` and `notes` read.
READ = (
    "eos_token_id",
    "head_dim",
    "hidden_size",
    "img_size",
    "intermediate_size",
    "lora_rank",
    "max_position_embeddings",
    "num_attention_heads",
    "num_hidden_layers",
    "num_key_value_heads",
    "rms_norm_eps",
    "rope_parameters",
    "rope_scaling",
    "rope_theta",
    "sliding_window",
    "vocab_size",
)


class ClipLayer(nn.Module):
    """Pre-norm encoder layer with bidirectional attention and quick-GELU."""

    def __init__(self, spec: VisionSpec) -> None:
        super().__init__()
        d = spec.hidden_size
        self.heads = spec.num_heads
        self.norm1 = nn.LayerNorm(d, eps=spec.layer_norm_eps)
        self.q, self.k, self.v, self.out = (nn.Linear(d, d) for _ in range(4))
        self.norm2 = nn.LayerNorm(d, eps=spec.layer_norm_eps)
        self.fc1 = nn.Linear(d, spec.intermediate_size)
        self.fc2 = nn.Linear(spec.intermediate_size, d)

    def forward(self, x: Tensor) -> Tensor:
        n, length, d = x.shape
        y = self.norm1(x)
        q, k, v = (f(y).view(n, length, self.heads, -1).transpose(1, 2) for f in (self.q, self.k, self.v))
        context = F.scaled_dot_product_attention(q, k, v)  # [N, heads, T, E]
        x = x + self.out(context.transpose(1, 2).reshape(n, length, d))
        y = self.fc1(self.norm2(x))
        return x + self.fc2(y * torch.sigmoid(1.702 * y))


class Vision(nn.Module):
    """CLIP tower and projector: pixel_values [N, 3, P, P] -> image features [N, tokens_per_image, D]."""

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        v = spec.vision
        self.patch = nn.Conv2d(3, v.hidden_size, v.patch_size, stride=v.patch_size, bias=False)
        self.class_token = nn.Parameter(torch.empty(v.hidden_size))
        self.positions = nn.Parameter(torch.empty(v.tokens_per_image + 1, v.hidden_size))
        self.pre_norm = nn.LayerNorm(v.hidden_size, eps=v.layer_norm_eps)
        self.layers = nn.ModuleList(ClipLayer(v) for _ in range(v.num_layers))
        self.proj1 = nn.Linear(v.hidden_size, spec.hidden_size)
        self.proj2 = nn.Linear(spec.hidden_size, spec.hidden_size)

    def embed(self, pixels: Tensor) -> Tensor:
        """The input of the first layer, [N, 1+tokens, d], class token first."""
        x = self.patch(pixels).flatten(2).transpose(1, 2)  # [N, tokens, d]
        x = torch.cat((self.class_token.expand(x.shape[0], 1, -1), x), dim=1) + self.positions
        return self.pre_norm(x)

    def encode(self, pixels: Tensor) -> list[Tensor]:
        """Hidden states [N, 1+tokens, d] after the embeddings and after each layer, class token first."""
        states = [self.embed(pixels)]
        for layer in self.layers:
            states.append(layer(states[-1]))
        return states

    def project(self, features: Tensor) -> Tensor:
        """[N, tokens, d] -> [N, tokens, D]."""
        return self.proj2(F.gelu(self.proj1(features)))

    def features(self, hidden: Tensor) -> Tensor:
        """Image features of the last hidden state: [N, 1+tokens, d] -> [N, tokens, D]."""
        return self.project(hidden[:, 1:])

    def forward(self, pixels: Tensor) -> Tensor:
        return self.features(self.encode(pixels)[-1])


def model_spec(config: dict[str, Any], clip: dict[str, Any] | None, shapes: Mapping[str, Sequence[int]]) -> ModelSpec:
    """Read the numbers of one checkpoint.

    config is `config.json`; clip is `clip_vision_config.json` or None, which means CLIP ViT-L/14-336 (the published
    folders have no such file). The LoRA rank and the embedding rows are in no config, so they are read from `shapes`,
    the checkpoint's tensor shapes by name. `img_size` (pixels) is our own key, for models trained at another size.
    """
    clip = clip or CLIP_L_14_336
    hidden, heads, limit = (config[k] for k in ("hidden_size", "num_attention_heads", "max_position_embeddings"))
    base, kind, rope = rope_settings(config)
    require_plain_rope(kind, rope, limit)
    image_size, patch = config.get("img_size", 490), clip["patch_size"]
    lora = shapes.get("model.layers.0.attention.wqkv.lora_A.weight", (0,))
    embedding = shapes.get("model.tok_embeddings.weight", (config["vocab_size"] + 1,))
    return ModelSpec(
        family="internlm2",
        hidden_size=hidden,
        intermediate_size=config["intermediate_size"],
        num_layers=config["num_hidden_layers"],
        num_heads=heads,
        num_kv_heads=config.get("num_key_value_heads", heads) or heads,
        head_dim=require_head_dim(config, hidden, heads),
        vocab_size=config["vocab_size"],
        embedding_rows=embedding[0],
        rms_norm_eps=float(config["rms_norm_eps"]),
        rope_theta=base,
        max_position_embeddings=limit,
        lora_rank=lora[0],
        eos_token_id=end_tokens(config["eos_token_id"])[0],
        more_end_ids=tuple(end_tokens(config["eos_token_id"])[1:]),
        image_token_id=config["vocab_size"],
        vision=VisionSpec(
            hidden_size=clip["hidden_size"],
            intermediate_size=clip["intermediate_size"],
            num_layers=clip["num_hidden_layers"],
            num_heads=clip["num_attention_heads"],
            patch_size=patch,
            image_size=image_size,
            layer_norm_eps=float(clip["layer_norm_eps"]),
            tokens_per_image=(image_size // patch) ** 2,
        ),
    )


def notes(config: dict[str, Any], clip: dict[str, Any] | None, spec: ModelSpec) -> list[str]:
    """Refuse settings of these files that our modules do not support; returns remarks about unknown keys."""
    window = config.get("sliding_window")
    wrong = {
        "lora_rank": (config.get("lora_rank"), spec.lora_rank),
        "sliding_window": (window if window and window < spec.max_position_embeddings else None, None),
    }
    if found := list(differing(wrong)):
        raise CheckpointError(f"config.json: {'; '.join(found)}, which is not supported; copy it again")
    read, fixed = (*CLIP_L_14_336, *OF_EVERY_CONFIG), TOWER | {"hidden_act": ("quick_gelu",)}
    return [*obey(config, "", READ, DECODER), *obey(clip or {}, "(clip_vision_config.json) ", read, fixed)]


def sources(spec: ModelSpec) -> dict[str, Source]:
    """Every parameter of the model and the published tensor that it comes from."""
    d, f, e = spec.hidden_size, spec.intermediate_size, spec.head_dim
    out: dict[str, Source] = {"embedding": Source("model.tok_embeddings.weight", (spec.embedding_rows, d))}

    def norm(ours: str, theirs: str, size: int, bias: bool = True) -> None:
        out[f"{ours}.weight"] = Source(f"{theirs}.weight", (size,))
        if bias:
            out[f"{ours}.bias"] = Source(f"{theirs}.bias", (size,))

    def linear(ours: str, theirs: str, rows: int, columns: int) -> None:
        out[f"{ours}.weight"] = Source(f"{theirs}.weight", (rows, columns))
        out[f"{ours}.bias"] = Source(f"{theirs}.bias", (rows,))

    def lora_linear(ours: str, theirs: str, rows: int, columns: int, order: Tensor | None = None) -> None:
        out[f"{ours}.weight"] = Source(f"{theirs}.ffn.weight", (rows, columns), order)
        if spec.lora_rank:
            out[f"{ours}.lora_a"] = Source(f"{theirs}.lora_A.weight", (spec.lora_rank, columns))
            out[f"{ours}.lora_b"] = Source(f"{theirs}.lora_B.weight", (rows, spec.lora_rank), order)

    order = _qkv_rows(spec)
    for i in range(spec.num_layers):
        ours, theirs = f"decoder.layers.{i}", f"model.layers.{i}"
        norm(f"{ours}.attention_norm", f"{theirs}.attention_norm", d, bias=False)
        lora_linear(f"{ours}.qkv", f"{theirs}.attention.wqkv", len(order), d, order)
        lora_linear(f"{ours}.out", f"{theirs}.attention.wo", d, spec.num_heads * e)
        norm(f"{ours}.mlp_norm", f"{theirs}.ffn_norm", d, bias=False)
        lora_linear(f"{ours}.mlp.gate", f"{theirs}.feed_forward.w1", f, d)
        lora_linear(f"{ours}.mlp.up", f"{theirs}.feed_forward.w3", f, d)
        lora_linear(f"{ours}.mlp.down", f"{theirs}.feed_forward.w2", d, f)
    norm("decoder.norm", "model.norm", d, bias=False)
    out["decoder.lm_head.weight"] = Source("output.weight", (spec.vocab_size, d))

    v, tower = spec.vision, "vit.vision_tower.vision_model"
    w = v.hidden_size
    out["vision.patch.weight"] = Source(
        f"{tower}.embeddings.patch_embedding.weight", (w, 3, v.patch_size, v.patch_size)
    )
    out["vision.class_token"] = Source(f"{tower}.embeddings.class_embedding", (w,))
    out["vision.positions"] = Source(f"{tower}.embeddings.position_embedding.weight", (v.tokens_per_image + 1, w))
    norm("vision.pre_norm", f"{tower}.pre_layrnorm", w)  # the published name has this spelling
    for i in range(v.num_layers):
        ours, theirs = f"vision.layers.{i}", f"{tower}.encoder.layers.{i}"
        norm(f"{ours}.norm1", f"{theirs}.layer_norm1", w)
        for a, b in (("q", "q_proj"), ("k", "k_proj"), ("v", "v_proj"), ("out", "out_proj")):
            linear(f"{ours}.{a}", f"{theirs}.self_attn.{b}", w, w)
        norm(f"{ours}.norm2", f"{theirs}.layer_norm2", w)
        linear(f"{ours}.fc1", f"{theirs}.mlp.fc1", v.intermediate_size, w)
        linear(f"{ours}.fc2", f"{theirs}.mlp.fc2", w, v.intermediate_size)
    linear("vision.proj1", "vision_proj.0", d, w)
    linear("vision.proj2", "vision_proj.2", d, d)
    return out


def _qkv_rows(spec: ModelSpec) -> Tensor:
    """Row numbers that bring the published `wqkv` (per K/V head its query heads, k, v) into the order [Q | K | V]."""
    g, e, group = spec.num_kv_heads, spec.head_dim, spec.num_heads // spec.num_kv_heads
    rows = torch.arange(g * (group + 2) * e).view(g, group + 2, e)
    return torch.cat((rows[:, :group].flatten(), rows[:, group].flatten(), rows[:, group + 1].flatten()))


def resize_positions(table: Tensor, side: int) -> Tensor:
    """Resize CLIP's position table [1+n*n, d] to [1+side*side, d], bicubic; the class row stays as it is."""
    n = math.isqrt(table.shape[0] - 1)
    grid = table[1:].float().view(1, n, n, -1).permute(0, 3, 1, 2)
    grid = F.interpolate(grid, size=(side, side), mode="bicubic", align_corners=False)
    return torch.cat((table[:1].float(), grid.permute(0, 2, 3, 1).reshape(side * side, -1))).to(table.dtype)


def _adapt(parameter: str, shape: tuple[int, ...], spec: ModelSpec) -> Callable[[Tensor], Tensor] | None:
    """Resize a position table of another (square) grid, as OpenAI published it, as the authors do at load time."""
    rows = shape[0] - 1 if shape else 0
    side = math.isqrt(spec.vision.tokens_per_image)
    if parameter != "vision.positions" or len(shape) != 2 or rows < 1 or math.isqrt(rows) ** 2 != rows:
        return None
    return (lambda table: resize_positions(table, side)) if shape[1] == spec.vision.hidden_size else None


def _unused(name: str) -> bool:
    """Whether a published tensor has no effect: the norm after the tower, and buffers of old transformers versions."""
    return ".post_layernorm." in name or name.endswith((".position_ids", ".rotary_emb.inv_freq"))


def _prompt(spec: ModelSpec) -> PromptSpec:
    return PromptSpec(
        before_system="<s>[UNUSED_TOKEN_146]system\n",
        system=SYSTEM,
        before_question="[UNUSED_TOKEN_145]\n[UNUSED_TOKEN_146]user\n",
        after_question="[UNUSED_TOKEN_145]\n[UNUSED_TOKEN_146]assistant\n",
        image="<image>",
        image_prefix="",
        image_suffix="",
        after_image="\n",
        tokens_per_image=spec.vision.tokens_per_image,
        special_tokens=("<s>", "[UNUSED_TOKEN_145]", "[UNUSED_TOKEN_146]", "<image>"),
        end_markers=("[UNUSED_TOKEN_145]", "</s>"),
    )


def _published(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    rank, width = 256, config["hidden_size"]
    spec = model_spec(config, None, {"model.layers.0.attention.wqkv.lora_A.weight": (rank, width)})
    norm = "vit.vision_tower.vision_model.post_layernorm"
    unused = {f"{norm}.{s}": (spec.vision.hidden_size,) for s in ("weight", "bias")}
    return {source.name: source.shape for source in sources(spec).values()} | unused


def _image(spec: ModelSpec) -> ImageSpec:
    # CLIP's means and deviations; the resize does not keep the aspect ratio.
    mean, std = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
    return ImageSpec("stretch", spec.vision.image_size, mean, std)


FAMILY = Family(
    name="internlm2",
    matches=lambda config: "llm_config" not in config and str(config.get("model_type", "")).startswith("internlm"),
    model_spec=model_spec,
    notes=notes,
    sources=sources,
    decoder=Decoder,
    vision=Vision,
    adapt=_adapt,
    unused=_unused,
    prompt=_prompt,
    image=_image,
    eos_from_tokenizer=False,
    published=_published,
)
