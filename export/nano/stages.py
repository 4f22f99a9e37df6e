"""The two training stages of the small models: the encoder alone, then everything on questions."""

from __future__ import annotations

import random
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trol_edge.export import scenes
from trol_edge.export.nano import data
from trol_edge.export.nano.data import CELLS, CLASSES, LABELS, POINTS, Views
from trol_edge.export.nano.model import (
    TAUGHT_LAYERS,
    GateLoss,
    GateSettler,
    Nano,
    PackedAttention,
    answer_hidden,
    read_context,
)
from trol_edge.export.nano.optim import SEED, Trainer, save_atomically
from trol_edge.export.nano.publish import go_on_from, write_checkpoint
from trol_edge.export.nano.recipes import RECIPES, Recipe, start_from
from trol_edge.export.nano.text import ROW_TOKENS, ROWS, Packer, Prompts
from trol_edge.export.reference.checkpoint import Checkpoint
from trol_edge.export.reference.hub import shipped_folder
from trol_edge.export.scenes import PIXELS

STARTED_RATE = 0.5  # factor on the learning rates of a model that goes on from an earlier checkpoint, at most
LOWER_RATE = 0.3  # further factor for its lower layers
DISTIL = 2.0  # weight of the teacher's features beside the patch labels


def patch_loss(head: nn.Linear, features: Tensor, views: Views) -> tuple[Tensor, dict[str, float]]:
    """The loss of predicting labels from features [B, I, width], and each label's accuracy on object patches."""
    out = head(features).float()
    seen = out.detach()
    owned = views.labels[..., 0] > 0
    loss, offset, right = torch.zeros(()), 0, {}
    for column, (name, (classes, weight)) in enumerate(LABELS.items()):
        logits, target = out[..., offset : offset + classes], views.labels[..., column]
        loss = loss + weight * F.cross_entropy(logits.flatten(0, 1), target.flatten())
        # Object patches count twice, because three quarters of the patches are table.
        loss = loss + weight * F.cross_entropy(logits[owned], target[owned])
        told = seen[..., offset : offset + classes][owned].argmax(-1)
        right[name] = float((told == target[owned]).float().mean())
        offset += classes
    centre, own = out[..., offset : offset + 2], out[..., offset + 2 :]
    error = F.smooth_l1_loss(centre[owned], views.points[owned][:, :2], beta=0.1)
    loss = loss + 2 * error + F.smooth_l1_loss(own, views.points[..., 2:], beta=0.1)
    right["centre_px"] = float((centre.detach()[owned] - views.points[owned][:, :2]).abs().mean()) * PIXELS / 2
    return loss, right


def train_encoder(rank: int, scratch: Path, name: str, minutes: float) -> None:
    """Train the vision encoder alone on patch labels and, with a teacher, the projector on the teacher's features."""
    recipe = RECIPES[name]
    image = recipe.family.image(recipe.spec)
    pool = data.load_pool(scratch, data.SMALL)
    vision = recipe.family.vision(recipe.spec)
    recipe.initialise(vision)
    head = nn.Linear(recipe.feature_width, CLASSES + POINTS)
    both = nn.ModuleDict({"vision": vision, "head": head})
    teacher = None
    if recipe.teacher:
        checkpoint = Checkpoint(shipped_folder(recipe.teacher))
        teacher, teacher_image = checkpoint.family.vision(checkpoint.spec), checkpoint.family.image(checkpoint.spec)
        checkpoint.load_into(vision=teacher)
        teacher.requires_grad_(False)
    else:  # without a teacher the projector cannot learn before there are questions
        for parameter_name, p in vision.named_parameters():
            p.requires_grad_("proj" not in parameter_name)
    trainer = Trainer(both, minutes * 60, lambda n: "vision.layers" in n or "vision.proj" in n, lambda n: 1.0)
    rng = np.random.default_rng((SEED, 1, rank))
    while trainer.progress < 1:
        views = data.sample_views(pool, recipe.encoder_batch, rng)
        with torch.autocast("cpu", torch.bfloat16):
            features = recipe.features(vision, data.normalise(views.pixels, image))
            loss, right = patch_loss(head, features, views)
            if teacher is not None:
                with torch.no_grad():
                    target = teacher(data.normalise(views.pixels, teacher_image)).float()
                off = (recipe.project(vision, features).float() - target) ** 2
                distil = (off / (target.var(dim=(0, 1)) + 1e-3)).mean()
                loss, right["distil"] = loss + DISTIL * distil, float(distil.detach())
        trainer.step(loss)
        if rank == 0 and trainer.steps % 50 == 0:
            detail = " ".join(f"{k} {v:.3f}" for k, v in right.items())
            print(f"encoder {trainer.eta()} loss {float(loss.detach()):.3f} {detail}", flush=True)
        if rank == 0 and (trainer.steps % 500 == 0 or trainer.progress >= 1):
            done = "encoder.pt" if trainer.progress >= 1 else "encoder-partial.pt"
            save_atomically(both.state_dict(), scratch / done)


@torch.no_grad()
def settle_gate(recipe: Recipe, model: Nano, prompts: Prompts, pool: data.Pool) -> None:
    """Make the gate of an earlier checkpoint one that upper layers can shut, on the same pictures in all processes."""
    packer, context = Packer(prompts, SEED), len(prompts.prefix) + CELLS
    image = recipe.family.image(recipe.spec)
    for i in range(3):  # what the layers give depends on the gate a little
        views = data.sample_views(pool, 16, np.random.default_rng((SEED, 3, i)))
        batch, gates = packer.pack(views.scenes, context, 0.0), GateSettler(model)
        squares = data.cut(views.pixels, (1, 1), image)
        features = model.vision(data.normalise(squares[:, 0], image))
        attend = PackedAttention(model, batch.positions, batch.mask, read_context(model, prompts, features, gates.look))
        answer_hidden(model, batch, attend, gates.look)
        gates.settle()


def train_decoder(
    rank: int, scratch: Path, name: str, out: Path, minutes: float, batch_size: int, start: Path | None
) -> None:
    """Train encoder, projector and decoder on questions; from some point on, half of the answers are in step form.

    Upper layers are trained without their second pass, and the gate learns to be 0 there.

    start: an earlier checkpoint of this model to go on from. Its encoder stays as it is. If it has fewer layers, its
    embeddings, the gate and the layers below the shut ones stay as well: the new layers learn what the gate needs, in
    half of the time of a step, and no answer is forgotten. If it has them all, the lower ones learn at low rates.

    If pictures are cut into tiles, a share of the batches has larger pictures; all pictures of a batch have the same
    number of tiles. The thumbnail, which comes last, has the labels, and attention is taught to look at it. The other
    tiles' features are computed without gradients, so they cost little.
    """
    recipe = RECIPES[name]
    image = recipe.family.image(recipe.spec)
    grids, shares = zip(*recipe.grids, strict=True)
    pools = {spec: data.load_pool(scratch, spec) for spec in (data.SMALL, data.LARGE)[: 1 + (len(grids) > 1)]}
    prompts = Prompts(scratch / "tokenizer", recipe.family, recipe.spec)
    model = Nano(recipe)
    recipe.initialise(model.vision)
    model.initialise()
    model.decoder.second_layers = frozenset(range(recipe.open_layers))
    head = nn.Linear(recipe.feature_width, CLASSES + POINTS)
    both = nn.ModuleDict({"model": model, "head": head})
    rate, stepped_from, labelled_until, taught = recipe.rate, recipe.stepped_from, 0.5, TAUGHT_LAYERS
    below = list(model.decoder.layers)[: recipe.open_layers]

    def slow(name: str) -> float:
        lower = any(f"decoder.layers.{i}." in name for i in range(recipe.open_layers))
        return LOWER_RATE if start and lower else 1.0

    if start:
        grown = go_on_from(recipe, start, model)
        rate, stepped_from, labelled_until = min(rate, STARTED_RATE), 0.0, 0.0
        kept: list[nn.Module] = [model.vision, head]
        if grown:
            taught = (recipe.open_layers, recipe.spec.num_layers - 2)
            kept += [model.embedding, model.decoder.gate, *below]
        for module in kept:
            module.requires_grad_(False)
        if grown:
            settle_gate(recipe, model, prompts, pools[data.SMALL])
    else:
        if recipe.teacher:
            tokens = scratch / "tokenizer" / "tokenizer.json"
            start_from(recipe.teacher, model.spec, model.embedding, model.decoder, tokens)
        encoder = torch.load(scratch / "encoder.pt", weights_only=True)
        if not recipe.teacher:
            encoder = {k: v for k, v in encoder.items() if not k.startswith("vision.proj")}
        both.load_state_dict({k.replace("vision.", "model.vision.", 1): v for k, v in encoder.items()}, strict=False)
    trainer = Trainer(
        both,
        minutes * 60,
        by_muon=lambda n: "decoder.layers" in n or "proj" in n,
        scale=lambda n: rate * (recipe.encoder_rate if "vision." in n and "proj" not in n else slow(n)),
    )
    rng, packer = np.random.default_rng((SEED, 2, rank)), Packer(prompts, SEED + 1000 * rank)
    shared = random.Random(SEED)  # the same in all processes, so that their steps cost the same
    tally: dict[tuple[str, bool], list[bool]] = {}
    saved = time.monotonic()
    while True:
        done = trainer.progress
        grid = shared.choices(grids, shares)[0]
        model.use_rope(shared.random() < recipe.long_share)
        several = grid != (1, 1)
        count = grid[0] * grid[1] + several  # tiles, thumbnail included
        cost = (CELLS * count + ROWS * ROW_TOKENS) / (CELLS + ROWS * ROW_TOKENS)  # in tokens, relative to one tile
        views = data.sample_views(pools[data.LARGE if several else data.SMALL], max(1, round(batch_size / cost)), rng)
        context = len(prompts.prefix) + CELLS * count
        batch = packer.pack(views.scenes, context, 0.0 if done < stepped_from else 0.5)
        squares = data.cut(views.pixels, grid, image)  # [B, T, P, P, 3]
        with torch.autocast("cpu", torch.bfloat16):
            shown = recipe.features(model.vision, data.normalise(squares[:, -1], image))
            features = recipe.project(model.vision, shown).float()
            if several:
                with torch.no_grad():
                    others = model.vision(data.normalise(squares[:, :-1].reshape(-1, *squares.shape[2:]), image))
                features = torch.cat((others.float().view(len(squares), -1, features.shape[-1]), features), dim=1)
            gates = GateLoss(model)
            context_read = read_context(model, prompts, features, gates.look)
            attend = PackedAttention(model, batch.positions, batch.mask, context_read, taught)
            hidden = answer_hidden(model, batch, attend, gates.look)[batch.rows, batch.columns]
            logits = model.decoder.logits(hidden).float()
            loss = F.cross_entropy(logits, batch.target, reduction="none")
            loss = (loss * batch.weight).sum() / batch.weight.sum()
            if done < labelled_until:
                loss = loss + 0.2 * (1 - done / labelled_until) * patch_loss(head, shown, views)[0]
            gate_loss = gates.mean()
            loss = loss + 0.5 * min(1.0, done / 0.1) * gate_loss
        if done < 0.8:
            fade = 0.25 * (1 - done / 0.8)
            for layer, (rows, columns, cells) in zip(taught, (batch.named, batch.answers), strict=True):
                targets = torch.zeros(len(rows), batch.mask.shape[-1], dtype=torch.bool)
                targets[:, context - CELLS : context] = cells
                loss = loss + fade * attend.alignment(layer, rows, columns, targets)
        trainer.step(loss)
        wrong = torch.zeros(len(batch.kinds)).index_add_(0, batch.question, (logits.argmax(-1) != batch.target).float())
        for kind, errors in zip(batch.kinds, wrong.tolist(), strict=True):
            tally.setdefault((kind, several), []).append(errors == 0)
        if rank == 0 and trainer.steps % 50 == 0:
            for kinds, what in ((False, "decoder"), (True, "several tiles")):
                rates = {k: tally[k, kinds] for k in scenes.KINDS if (k, kinds) in tally}
                if rates:
                    detail = " ".join(f"{k} {100 * sum(right) / len(right):.1f}" for k, right in rates.items())
                    losses = f"loss {float(loss.detach()):.3f} gate {float(gate_loss.detach()):.4f}"
                    print(f"{what} {trainer.eta()} {losses} {detail}", flush=True)
            tally.clear()
        if rank == 0 and (time.monotonic() - saved > 180 or trainer.progress >= 1):
            save_atomically(both.state_dict(), scratch / "decoder-partial.pt")
            write_checkpoint(recipe, model, scratch / "tokenizer", out)
            saved = time.monotonic()
        if trainer.progress >= 1:
            break
    if rank == 0:
        save_atomically(both.state_dict(), scratch / "decoder.pt")
