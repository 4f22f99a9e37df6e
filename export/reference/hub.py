"""Knows the models by name: where their checkpoints are, and the published sizes that `synth` imitates."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path
from typing import Any

from trol_edge.errors import CheckpointError, DownloadError, UsageError
from trol_edge.export.reference import internlm2, phi3
from trol_edge.export.reference.family import Family
from trol_edge.reading import read_json

# What TroL-1.8B and 7B have in common.
_INTERNLM2: dict[str, Any] = {
    "architectures": ["TroLForCausalLM"],
    "model_type": "internlm",
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 2,
    "hidden_act": "silu",
    "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-5,
    "rope_scaling": {"type": "dynamic", "factor": 2.0},
    "rope_theta": 1000000,
    "tie_word_embeddings": False,
    "torch_dtype": "float16",
    "vocab_size": 92544,
}
# Factors of Phi-3-mini-128k, which divide the rotary embedding's 48 frequencies, up to 4096 tokens and above.
# fmt: off
_SHORT_FACTOR = [
    1.05, 1.05, 1.05, 1.1, 1.1, 1.15, 1.2, 1.25, 1.3, 1.35, 1.5, 2.0, 2.0, 2.0, 2.0, 2.0, 2.0, 2.0, 2.0, 2.0, 2.0,
    2.0, 2.0, 2.0, 2.0, 2.0, 2.0, 2.0, 2.0, 2.0, 2.0, 2.0, 2.05, 2.05, 2.05, 2.1, 2.1, 2.1, 2.15, 2.15, 2.35, 2.55,
    2.6, 2.6, 2.75, 2.85, 2.85, 2.95,
]
_LONG_FACTOR = [
    1.03, 1.05, 1.05, 1.0799999, 1.2299999, 1.2299999, 1.3, 1.4499999, 1.5999999, 1.6499999, 1.8999999, 2.86,
    3.6899998, 5.4199996, 5.49, 5.49, 9.09, 11.58, 15.66, 15.7699995, 15.79, 18.36, 21.99, 23.08, 30.009998,
    32.350002, 32.590004, 35.560005, 39.950005, 53.840004, 56.200005, 57.950005, 59.290005, 59.770004, 59.920006,
    61.190006, 61.960007, 62.500008, 63.370007, 63.480007, 63.480007, 63.660007, 63.850006, 64.08001, 64.76001,
    64.80001, 64.81001, 64.81001,
]
# fmt: on
_PHI3: dict[str, Any] = {
    "architectures": ["TroLForCausalLM"],
    "model_type": "trol",
    "downsample_ratio": 0.5,
    "force_image_size": 448,
    "template": "phi3-chat",
    "torch_dtype": "float16",
    "llm_config": {
        "model_type": "phi3",
        "bos_token_id": 1,
        "eos_token_id": 32000,
        "pad_token_id": 32000,
        "hidden_act": "silu",
        "hidden_size": 3072,
        "intermediate_size": 8192,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "max_position_embeddings": 131072,
        "original_max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "rope_scaling": {
            "type": "su",
            "short_factor": _SHORT_FACTOR,
            "long_factor": _LONG_FACTOR,
        },
        "sliding_window": 262144,
        "tie_word_embeddings": False,
        "vocab_size": 32020,
    },
    "vision_config": {
        "model_type": "intern_vit_6b",
        "hidden_act": "gelu",
        "hidden_size": 1024,
        "image_size": 448,
        "intermediate_size": 4096,
        "layer_norm_eps": 1e-6,
        "norm_type": "layer_norm",
        "num_attention_heads": 16,
        "num_channels": 3,
        "num_hidden_layers": 24,
        "patch_size": 14,
        "qk_normalization": False,
        "qkv_bias": True,
    },
}


@dataclasses.dataclass(frozen=True)
class Published:
    """A model that users ask for by name."""

    name: str
    repository: str | None  # on the model hub; None: ships with this project
    family: Family
    config: dict[str, Any]  # the part of the published config.json that matters


MODELS = {
    model.name: model
    for model in (
        Published("trol-nano", None, internlm2.FAMILY, {}),
        Published("trol-nano-phi3", None, phi3.FAMILY, {}),
        Published(
            "trol-1.8b",
            "BK-Lee/TroL-1.8B",
            internlm2.FAMILY,
            _INTERNLM2
            | {
                "hidden_size": 2048,
                "intermediate_size": 8192,
                "num_hidden_layers": 24,
                "num_attention_heads": 16,
                "num_key_value_heads": 8,
            },
        ),
        Published("trol-3.8b", "BK-Lee/TroL-3.8B", phi3.FAMILY, _PHI3),
        Published(
            "trol-7b",
            "BK-Lee/TroL-7B",
            internlm2.FAMILY,
            _INTERNLM2
            | {
                "hidden_size": 4096,
                "intermediate_size": 14336,
                "num_hidden_layers": 32,
                "num_attention_heads": 32,
                "num_key_value_heads": 8,
            },
        ),
    )
}
# The files of a published folder that are read; everything else there (code, images) is left on the hub.
FILES = (
    "config.json",
    "generation_config.json",
    "model*.safetensors",
    "model.safetensors.index.json",
    "trol_gating.pt",
    "tokenizer.json",
    "tokenizer.model",
    "added_tokens.json",
    "tokenizer_config.json",
)
SOURCE_FILE = "trol_edge_source.json"  # where a downloaded folder came from


def find(name: str) -> Published:
    """Find a model by name. Raises a UsageError that lists the known names."""
    if name not in MODELS:
        raise UsageError(f"no model {name!r}; choose one of {', '.join(MODELS)}")
    return MODELS[name]


def shipped_folder(name: str) -> Path:
    """The folder of a checkpoint that ships with this project. Raises CheckpointError if it was not installed."""
    folder = Path(__file__).resolve().parents[1] / "checkpoints" / name
    if not (folder / "config.json").is_file():
        raise CheckpointError(
            f"{name} ships with the source repository, not with the wheel, and {folder} does not exist; "
            "run from a clone, or give a checkpoint folder"
        )
    return folder


def shipped_like(name: str) -> str:
    """The shipped model whose picture suits a bundle of that model name: its own, or trol-nano's."""
    return name if name in MODELS and MODELS[name].repository is None else "trol-nano"


def fetch(name: str, into: str | os.PathLike[str], revision: str | None = None) -> Path:
    """Return the folder of a model's checkpoint, which is shipped, was downloaded into `into`, or is downloaded now.

    Downloads resume where they stopped and show their progress. The commit that the hub resolved is written into
    the folder and asked for again from then on. So later commits do not get into a half-finished download, and the
    same folder always means the same weights. Raises a DownloadError that says which files to put where by hand.
    """
    model = find(name)
    if model.repository is None:
        return shipped_folder(name)
    folder = Path(into)
    pinned = _pinned(folder)
    if pinned and pinned.get("complete") and revision in (None, pinned["revision"]):
        return folder
    if not pinned and (folder / "config.json").is_file():
        return folder  # put there by hand
    from huggingface_hub import HfApi, snapshot_download

    revision = revision or (pinned or {}).get("revision")
    try:
        info = HfApi().model_info(model.repository, revision=revision)
        source = {"repository": model.repository, "revision": info.sha, "complete": False}
        folder.mkdir(parents=True, exist_ok=True)
        (folder / SOURCE_FILE).write_text(json.dumps(source), encoding="utf-8")
        snapshot_download(model.repository, revision=info.sha, local_dir=folder, allow_patterns=list(FILES))
        (folder / SOURCE_FILE).write_text(json.dumps(source | {"complete": True}), encoding="utf-8")
    except Exception as error:  # the hub library lets through errors of several HTTP libraries without a common base
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        place = "" if _pinned(folder) else f"either name it {folder} or "  # a pinned folder asks the hub again
        raise DownloadError(
            f"{model.repository} could not be fetched ({type(error).__name__}: {first}).\n"
            "Run the command again to resume. Without a network, copy these files of "
            f"https://huggingface.co/{model.repository} into one folder:\n  {', '.join(FILES)}\n"
            f"and {place}pass it: make engine MODEL={name} CHECKPOINT=folder"
        ) from error
    return folder


def _pinned(folder: Path) -> dict[str, Any] | None:
    try:
        data = read_json(folder / SOURCE_FILE, CheckpointError)
    except CheckpointError:
        return None
    return data if isinstance(data.get("revision"), str) else None
