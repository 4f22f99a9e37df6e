"""Writes the small models' checkpoints in the published layout, and reads them back as everybody else reads them."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from trol_edge.bundle.folder import new_file
from trol_edge.errors import ExportError
from trol_edge.export.nano.model import Nano
from trol_edge.export.nano.recipes import Recipe
from trol_edge.export.nano.text import Prompts
from trol_edge.export.reference.checkpoint import Checkpoint


def published_tensors(recipe: Recipe, model: Nano) -> dict[str, Tensor]:
    """Our parameters under the published names, FP16: the inverse of the family's `sources`."""
    ours = model.state_dict()
    ours["embedding"] = ours.pop("embedding.weight")
    tensors = {}
    for name, source in recipe.family.sources(model.spec).items():
        value = ours.pop(name)
        if source.rows is not None:  # ours = published[rows], so published[rows] = ours
            value = torch.empty_like(value).index_copy_(0, source.rows, value)
        tensors[source.name] = value.half().contiguous()
    assert set(ours) == {"decoder.gate.weight", "decoder.gate.bias"}, ours.keys()
    return tensors | recipe.unused_tensors(model.spec)


def write_checkpoint(recipe: Recipe, model: Nano, tokenizer: Path, out: Path) -> None:
    """A folder in the published layout; `tokenizer` holds its tokenizer files. Each file is renamed into place,
    weights last."""
    out.mkdir(parents=True, exist_ok=True)

    def write(name: str, how: Callable[[Path], object]) -> None:
        with new_file(out / name) as part:
            how(part)
            part.chmod(0o644)  # safetensors makes files that only the owner can read

    def as_json(data: Any) -> Callable[[Path], object]:
        return lambda path: path.write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")

    def copy_of(source: Path) -> Callable[[Path], object]:
        return lambda path: path.write_bytes(source.read_bytes())

    for name, config in recipe.configs(model.spec).items():
        write(name, as_json(config))
    for source in sorted(tokenizer.iterdir()):
        write(source.name, copy_of(source))
    gate = {k: v.detach().half() for k, v in model.decoder.gate.state_dict().items()}
    repeated = {f"{i}.{k}": v.clone() for i in range(model.spec.num_layers) for k, v in gate.items()}
    write("trol_gating.pt", lambda path: torch.save(repeated, path))
    write("model.safetensors", lambda path: save_file(published_tensors(recipe, model), path, {"format": "pt"}))


def go_on_from(recipe: Recipe, folder: Path, model: Nano) -> bool:
    """Fill an initialised model from an earlier checkpoint of its recipe, which may have fewer layers.

    Its layers become the lowest ones. Those above them keep their initial values and add little at first. Returns
    whether there are any. Raises ExportError for a checkpoint of other sizes.
    """
    checkpoint = Checkpoint(folder, family=recipe.family.name)
    have, want = checkpoint.spec, recipe.spec
    if have.num_layers > want.num_layers or dataclasses.replace(have, num_layers=want.num_layers) != want:
        raise ExportError(
            f"{folder}: its sizes are not those of {recipe.name}, which may only have more layers; start from an "
            "earlier checkpoint of the same model"
        )
    earlier = Nano(dataclasses.replace(recipe, spec=have))
    checkpoint.load_into(decoder=earlier.decoder, vision=earlier.vision)
    model.vision.load_state_dict(earlier.vision.state_dict())
    model.decoder.load_state_dict(earlier.decoder.state_dict(), strict=False)
    with torch.no_grad():
        model.embedding.weight.copy_(checkpoint.tensor("embedding").float())
        for layer in list(model.decoder.layers)[have.num_layers :]:
            for name, p in layer.named_parameters():
                if name in ("out.weight", "mlp.down.weight"):
                    p.mul_(0.1)
    return have.num_layers < want.num_layers


def read_checkpoint(recipe: Recipe, folder: Path) -> tuple[Nano, Prompts]:
    """Read model and prompts from the published layout, with FP16 values widened to FP32."""
    checkpoint = Checkpoint(folder, family=recipe.family.name)
    assert checkpoint.spec == recipe.spec, "the checkpoint was trained with another version of its recipe"
    model = Nano(recipe)
    checkpoint.load_into(decoder=model.decoder, vision=model.vision)
    model.embedding.weight = nn.Parameter(checkpoint.tensor("embedding").float())
    return model.eval(), Prompts(folder, recipe.family, recipe.spec)
