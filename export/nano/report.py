"""Measures the small models in the PyTorch reference on held-out scenes, and writes the report about their training.

Axes: B pictures, T tiles of a picture (thumbnail included), P pixels of a tile's side.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import torch
import torch.multiprocessing as mp
from numpy.typing import NDArray
from PIL import Image

from trol_edge.export import scenes
from trol_edge.export.nano import data
from trol_edge.export.nano.model import Nano
from trol_edge.export.nano.optim import WORLD
from trol_edge.export.nano.publish import read_checkpoint
from trol_edge.export.nano.recipes import RECIPES, Recipe
from trol_edge.export.nano.text import Prompts
from trol_edge.export.reference.checkpoint import Checkpoint
from trol_edge.export.reference.model import EagerAttention

DEMO_SEED = scenes.HELD_OUT_SEED + 1_000_000  # past the scenes that are evaluated
LONGEST = 64  # longest answer, in tokens

Tally = dict[str, dict[str, list[int]]]  # semantics -> kind -> [right, asked]


@torch.no_grad()
def answer(
    recipe: Recipe, model: Nano, prompts: Prompts, squares: NDArray[np.uint8], asked: list[list[str]], cached: bool
) -> list[list[str]]:
    """Answer the questions `asked` about each picture greedily; squares uint8 [B, T, P, P, 3].

    cached: step the answer tokens. Otherwise they are traversed against both passes' keys and values, which equals
    running the whole sequence again for every token.
    """
    images = len(asked)
    prefix = model.embedding(torch.tensor([prompts.prefix])).expand(images, -1, -1)
    pixels = data.normalise(squares.reshape(-1, *squares.shape[2:]), recipe.family.image(model.spec))
    features = model.vision(pixels).view(images, -1, model.spec.hidden_size)
    x = torch.cat((prefix, features), dim=1)
    context = x.shape[1]
    image_mask = torch.zeros(1, context, 1)
    image_mask[:, prefix.shape[1] :] = 1
    attend = EagerAttention(model.spec, model.cos, model.sin)
    attend.positions = torch.arange(context)
    model.decoder.traverse(x, image_mask, attend)

    picture = torch.tensor([i for i, questions in enumerate(asked) for _ in questions])
    for cache in (*attend.keys, *attend.values):
        cache[:] = [None if t is None else t[picture] for t in cache]
    ids = [prompts.question(question) for questions in asked for question in questions]
    lengths = torch.tensor([len(row) for row in ids])
    width = int(lengths.max())
    padded = torch.tensor([row + [0] * (width - len(row)) for row in ids])
    attend.positions = context + torch.arange(width)
    hidden = model.decoder.traverse(model.embedding(padded), None, attend)  # causal: padding at the end is never seen
    last = hidden[torch.arange(len(ids)), lengths - 1]

    told: list[list[int]] = [[] for _ in ids]
    running = torch.ones(len(ids), dtype=torch.bool)
    for count in range(LONGEST):
        token = model.decoder.logits(last[:, None])[:, 0].argmax(-1)
        running &= (token != prompts.end) & (token != model.spec.eos_token_id)
        if not running.any():
            break
        for row in running.nonzero()[:, 0].tolist():
            told[row].append(int(token[row]))
        column = torch.arange(context + width + count + 1)
        attend.mask = ((column < context + lengths[:, None]) | (column >= context + width))[:, None, None]
        attend.positions = (context + lengths + count)[:, None]
        x = model.embedding(token[:, None])
        last = (model.decoder.step(x, attend) if cached else model.decoder.traverse(x, None, attend))[:, 0]
    texts = iter([prompts.decode(row) for row in told])
    return [[next(texts) for _ in questions] for questions in asked]


def _evaluate_part(args: tuple[str, Path, int, int, tuple[int, int]]) -> Tally:
    name, folder, first, count, grid = args
    torch.set_num_threads(1)
    recipe = RECIPES[name]
    model, prompts = read_checkpoint(recipe, folder)
    drawn = [scenes.render(seed, 1 if grid == (1, 1) else data.LARGE.scale) for seed in range(first, first + count)]
    asked = [scenes.questions(scene, random.Random(first + i)) for i, (_, scene) in enumerate(drawn)]
    squares = data.cut(np.stack([p for p, _ in drawn]), grid, recipe.family.image(recipe.spec))
    tally: Tally = {}
    for cached in (True, False):
        results = tally.setdefault("cached" if cached else "uncached", {kind: [0, 0] for kind in scenes.KINDS})
        for short in (True, False):  # separately, so that short answers do not wait for long ones
            chosen = [[q for q in questions if (q[0] != "describe") == short] for questions in asked]
            texts = answer(recipe, model, prompts, squares, [[q[1] for q in questions] for questions in chosen], cached)
            for questions, given in zip(chosen, texts, strict=True):
                for (kind, _, wanted), text in zip(questions, given, strict=True):
                    results[kind][0] += text == wanted
                    results[kind][1] += 1
    return tally


def evaluate(recipe: Recipe, folder: Path, count: int, grids: Sequence[tuple[int, int]]) -> Tally:
    """Count exact matches on one question of every kind about `count` held-out scenes, with the grids in turn."""
    step = 20
    total: Tally = {}
    starts = range(0, count, step)
    first = scenes.HELD_OUT_SEED
    parts = [
        (recipe.name, folder, first + i, min(step, count - i), grids[n % len(grids)]) for n, i in enumerate(starts)
    ]
    with mp.get_context("spawn").Pool(WORLD) as workers:
        for part in workers.imap_unordered(_evaluate_part, parts):
            for semantics, kinds in part.items():
                for kind, (right, asked) in kinds.items():
                    entry = total.setdefault(semantics, {}).setdefault(kind, [0, 0])
                    entry[0] += right
                    entry[1] += asked
    return total


def percentages(tally: Tally) -> dict[str, dict[str, float]]:
    """Accuracy in percent by kind, with those of all short and of all hard questions as "short" and "hard"."""
    return {
        semantics: {kind: round(100 * right / max(1, asked), 2) for kind, (right, asked) in _with_groups(kinds).items()}
        for semantics, kinds in tally.items()
    }


def _with_groups(kinds: dict[str, list[int]]) -> dict[str, list[int]]:
    groups = {"short": scenes.SHORT_KINDS, "hard": scenes.HARD_KINDS}
    return kinds | {name: [sum(kinds[kind][i] for kind in group) for i in (0, 1)] for name, group in groups.items()}


def demo_scene(scale: int) -> tuple[NDArray[np.uint8], str, str]:
    """The first scene from DEMO_SEED on with four objects and a "left of" question, as picture, question, answer."""
    for seed in range(DEMO_SEED, DEMO_SEED + 1000):
        pixels, scene = scenes.render(seed, scale)
        for kind, question, reply in scenes.questions(scene, random.Random(seed)):
            if kind == "relation" and "What is left of" in question and len(scene.objects) == 4:
                return pixels, question, reply
    raise AssertionError("no such scene")


def write_demo(recipe: Recipe, out: Path) -> None:
    """Write the picture that `trol-edge demo` asks about; it is larger if the model cuts pictures into tiles."""
    out.mkdir(parents=True, exist_ok=True)
    Image.fromarray(demo_scene(data.LARGE.scale if len(recipe.grids) > 1 else 1)[0]).save(out / "scene.png")


def write_report(recipe: Recipe, out: Path, minutes: dict[str, float], count: int, start: Path | None) -> None:
    """Evaluate the written checkpoint and describe its training in report.json and REPORT.md.

    start: the checkpoint that the training went on from.
    """
    model, prompts = read_checkpoint(recipe, out)
    several = [grid for grid, _ in recipe.grids if grid != (1, 1)]
    tallies = {"one tile": evaluate(recipe, out, count, [(1, 1)])}
    if several:
        tallies["several tiles"] = evaluate(recipe, out, count, several)
    tally = tallies["one tile"]
    scale = data.LARGE.scale if several else 1
    _, question, wanted = demo_scene(scale)
    picture = np.asarray(Image.open(out / "scene.png"))[None]
    squares = data.cut(picture, (scale, scale), recipe.family.image(recipe.spec))
    texts = answer(recipe, model, prompts, squares, [[question, "Describe the scene."]], True)[0]
    pools = {"small": data.SMALL.count} | ({"large": data.LARGE.count} if several else {})
    report = {
        "model": recipe.name,
        "machine": "2 cores x86-64",
        "parameters": sum(p.numel() for p in model.parameters()),
        "stored_as": "FP16",
        "evaluated_as": "FP16 values widened to FP32, greedy, generated tokens fed back, exact match",
        "training_scenes": sum(pools.values()),
        "held_out_scenes": count,
        "held_out_seeds": [scenes.HELD_OUT_SEED, scenes.HELD_OUT_SEED + count - 1],
        "minutes": {stage: round(value, 1) for stage, value in minutes.items()},
        "accuracy_percent": percentages(tally),
        "right_and_asked": tally,
        "demo": {"picture": "scene.png", "question": question, "right": wanted, "answer": texts[0], "scene": texts[1]},
    }
    earlier = Checkpoint(start) if start else None
    if earlier:
        report["went_on_from"] = {"layers": earlier.spec.num_layers, "identity": earlier.identity()}
    if several:
        report |= {
            "tile_grids": several,
            "accuracy_percent_several_tiles": percentages(tallies["several tiles"]),
            "right_and_asked_several_tiles": tallies["several tiles"],
        }
    (out / "report.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    trained = f"{pools['small']:,} training scenes (mirrored at random)"
    if several:
        trained += f", and {pools['large']:,} drawn twice as large and cut into 3 to 7 tiles"
    lines = [
        f"# {recipe.name}",
        "",
        f"{recipe.about}, trained to answer questions",
        "about rendered tabletop scenes. It exists to test, measure and show the whole path with weights that mean",
        "something; it knows nothing but these scenes.",
        "",
        f"- {report['parameters']:,} parameters, stored as FP16 in the published layout",
        f"- trained on {report['machine']}, {sum(minutes.values()):.0f} minutes in all: "
        + ", ".join(f"{stage} {value:.1f}" for stage, value in minutes.items()),
        f"- {trained};",
        f"  accuracy on {count} other scenes",
        *_again(recipe, earlier),
        "- the schedules follow the clock, so a second run gives similar, not equal, weights",
        "",
        "Exact match in percent, greedy, generated tokens fed back. Cached: traverse the prompt, step the answer.",
        "Uncached: traverse every token.",
        *([f"Several tiles: {_named(several)} (columns x rows) and the thumbnail, in turn."] if several else []),
        "",
        *_table(tallies),
        "",
        f'`scene.png` is a held-out scene. "{question}": **{texts[0]}** (right: {wanted}). "Describe the scene.":',
        f"{texts[1]}",
        "",
        "What was learnt, and how: `export/nano/recipes.py`, `export/nano/stages.py`. What is asked, and what makes an",
        "answer unambiguous: `export/scenes.py`.",
    ]
    (out / "REPORT.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    print("\n".join(lines))


def _again(recipe: Recipe, earlier: Checkpoint | None) -> list[str]:
    """How the model is trained again."""
    command = f"make nano MODEL={recipe.name}"
    if earlier is None:
        return [f"- train again: `{command}`"]
    layers, total = earlier.spec.num_layers, recipe.spec.num_layers
    return [
        f"- went on from an earlier checkpoint of this model, with {layers} of its {total} layers",
        "  (`docs/decisions.md` says how that was made)",
        f'- train again: `{command} ARGS="--start FOLDER"` with that checkpoint; without it, from random values',
    ]


def _named(grids: Iterable[tuple[int, int]]) -> str:
    return ", ".join(f"{columns} x {rows}" for columns, rows in sorted(grids))


def _table(tallies: dict[str, Tally]) -> list[str]:
    """Lines of a table with a row per kind: how many were asked, and both semantics per sort of picture."""
    first = next(iter(tallies.values()))
    sorts = {f"{name}: " if len(tallies) > 1 else "": percentages(tally) for name, tally in tallies.items()}
    titles = ["kind", "asked", *(f"{sort}{semantics}" for sort in sorts for semantics in ("cached", "uncached"))]
    lines = [f"| {' | '.join(titles)} |", f"| --- |{' ---: |' * (len(titles) - 1)}"]
    for kind in (*scenes.SHORT_KINDS, "short", "describe", *scenes.HARD_KINDS, "hard"):
        cells = [f"**all {kind} questions**" if kind in ("short", "hard") else kind]
        cells.append(str(_with_groups(first["cached"])[kind][1]))  # the same questions, however large the picture
        cells += [f"{percent[semantics][kind]:.1f}" for percent in sorts.values() for semantics in percent]
        lines.append(f"| {' | '.join(cells)} |")
    return lines
