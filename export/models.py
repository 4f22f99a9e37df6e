"""The models by name: where their checkpoints are, and the published sizes that `synth` imitates."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path
from typing import Any

from trol_edge.errors import CheckpointError, DownloadError, UsageError

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


@dataclasses.dataclass(frozen=True)
class Model:
    """A model that users ask for by name."""

    name: str
    repository: str | None  # on the model hub; None: ships with this project
    config: dict[str, Any]  # the published config.json, as far as it matters
    lora_rank: int = 256


MODELS = {
    model.name: model
    for model in (
        Model("trol-nano", None, {}),
        Model(
            "trol-1.8b",
            "BK-Lee/TroL-1.8B",
            _INTERNLM2
            | {
                "hidden_size": 2048,
                "intermediate_size": 8192,
                "num_hidden_layers": 24,
                "num_attention_heads": 16,
                "num_key_value_heads": 8,
            },
        ),
        Model(
            "trol-7b",
            "BK-Lee/TroL-7B",
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
    "tokenizer.model",
    "added_tokens.json",
)
SOURCE_FILE = "trol_edge_source.json"  # where a downloaded folder came from


def find(name: str) -> Model:
    """A model by name; UsageError lists the names there are."""
    if name == "trol-3.8b":
        raise UsageError("trol-3.8b (InternViT, Phi-3) is not supported yet; trol-1.8b and trol-7b are")
    if name not in MODELS:
        raise UsageError(f"no model {name!r}; there are {', '.join(MODELS)}")
    return MODELS[name]


def shipped_folder(name: str) -> Path:
    """The folder of a checkpoint that ships with this project; CheckpointError where it was not installed."""
    folder = Path(__file__).resolve().parent / "checkpoints" / name
    if not (folder / "config.json").is_file():
        raise CheckpointError(
            f"{name} ships with the source repository, not with the wheel, and {folder} does not exist; "
            "run from a clone, or give a checkpoint folder"
        )
    return folder


def fetch(name: str, into: str | os.PathLike[str], revision: str | None = None) -> Path:
    """Folder of a model's checkpoint: shipped, already downloaded into `into`, or downloaded now.

    Downloads resume where they stopped and show their progress. The commit that the hub resolved is written into
    the folder and asked for again from then on: later commits do not slip into a half-finished download, and the
    same folder always means the same weights. Raises DownloadError with what to put where by hand.
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
    except Exception as error:  # the hub library passes on errors of several HTTP libraries without a common base
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise DownloadError(
            f"{model.repository} could not be fetched ({type(error).__name__}: {first}).\n"
            "Run the command again to resume. Without a network, copy these files of "
            f"https://huggingface.co/{model.repository} into one folder:\n  {', '.join(FILES)}\n"
            f"and either name it {folder} or pass it: make engine MODEL={name} CHECKPOINT=folder"
        ) from error
    return folder


def _pinned(folder: Path) -> dict[str, Any] | None:
    try:
        data = json.loads((folder / SOURCE_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return data if isinstance(data, dict) and "revision" in data else None
