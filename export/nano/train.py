"""Trains one of the small models that ship with this project, on two CPU cores in about an hour.

    python -m trol_edge.export.nano.train trol-nano --out export/checkpoints/trol-nano

Stages, each skipped if its result is already in the scratch folder:
1. pool       scenes rendered once, with a label for every patch
2. tokenizer  sentencepiece BPE over the prompt, the questions, their answers and plain English
3. encoder    the vision encoder alone, on patch labels through a head that is thrown away. Without this stage, half an
              hour of training end to end from random values reached only 40-55 %.
4. decoder    encoder, projector and decoder on questions; half of the answers in step form from some point on, and the
              gate driven to 0 in the upper layers
5. report     held-out scenes, generated tokens fed back, cached and uncached semantics

With --start an earlier checkpoint takes the place of random values and of stages 2 and 3: its encoder stays, and at
first its lower layers. The shipped models of eight layers were made so from ones of five. From random values, the
recipes of eight have not been run.

`recipes.py` has what differs between the models. Schedules follow the clock, not a step count, so that a shared
machine changes the result a little but never the duration.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from trol_edge.bundle.folder import new_folder, writing
from trol_edge.errors import ExportError, TrolEdgeError
from trol_edge.export.nano import data
from trol_edge.export.nano.optim import run_parallel
from trol_edge.export.nano.recipes import RECIPES, Recipe
from trol_edge.export.nano.report import write_demo, write_report
from trol_edge.export.nano.stages import train_decoder, train_encoder
from trol_edge.export.nano.text import train_pieces


def make_pools(recipe: Recipe, scratch: Path) -> None:
    if len(recipe.grids) > 1:
        data.make_pool(scratch, data.LARGE)
    data.make_pool(scratch, data.SMALL)  # last: its file says that the stage is done


def make_tokenizer(recipe: Recipe, scratch: Path) -> None:
    """Make the published tokenizer files in `scratch`/tokenizer."""
    drawn = data.load_scenes(scratch, data.SMALL)[:4000]
    train_pieces(scratch / "pieces", drawn, recipe.symbols, recipe.space_before_answer)
    with new_folder(scratch / "tokenizer", overwrite=True, ours=("*",)) as part:
        recipe.tokenizer_files(scratch / "pieces.model", part)


def copy_tokenizer(start: Path, scratch: Path) -> None:
    """Take the tokenizer files of a checkpoint, whose embeddings belong to them."""
    with new_folder(scratch / "tokenizer", overwrite=True, ours=("*",)) as part:
        for source in start.glob("*token*"):
            (part / source.name).write_bytes(source.read_bytes())


def main() -> int:
    """Run the command line; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", choices=list(RECIPES))
    parser.add_argument("--out", type=Path, required=True, help="Folder to write the checkpoint to.")
    parser.add_argument("--minutes", type=float, help="Total training time (default: the recipe's).")
    parser.add_argument("--scratch", type=Path, help="Folder for the results of the stages (default: a temporary one).")
    parser.add_argument("--batch", type=int, default=12, help="Pictures of one tile per process and step.")
    parser.add_argument(
        "--start",
        type=Path,
        help="Earlier checkpoint of this model, with as many layers or fewer, to go on from (default: random values).",
    )
    parser.add_argument("--evaluate", type=int, default=2000, help="Number of held-out scenes to evaluate.")
    args = parser.parse_args()
    recipe = RECIPES[args.model]
    scratch = args.scratch or Path(tempfile.gettempdir()) / recipe.name
    try:
        with writing(scratch, ExportError, "choose another --scratch or --out; stages that are done are not repeated"):
            train(recipe, args.out, scratch, args.minutes or recipe.minutes, args.batch, args.evaluate, args.start)
    except TrolEdgeError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def train(
    recipe: Recipe, out: Path, scratch: Path, total: float, batch: int, evaluate: int, start: Path | None
) -> None:
    """Run the stages that have no result in `scratch` yet. total: minutes of training. OSError passes through.

    start: a checkpoint that takes the place of the encoder stage; it keeps its tokenizer.
    """
    scratch.mkdir(parents=True, exist_ok=True)
    clock = scratch / "minutes.json"
    minutes: dict[str, float] = json.loads(clock.read_text()) if clock.exists() else {}
    first = 0.0 if start else total * recipe.encoder_share
    stages: dict[str, tuple[str, Callable[[], None]]] = {
        "pool": (f"{data.SMALL.name}.npy", lambda: make_pools(recipe, scratch)),
        "tokenizer": (
            "tokenizer",
            lambda: copy_tokenizer(start, scratch) if start else make_tokenizer(recipe, scratch),
        ),
        "encoder": ("encoder.pt", lambda: run_parallel(train_encoder, scratch, recipe.name, first)),
        "decoder": (
            "decoder.pt",
            lambda: run_parallel(train_decoder, scratch, recipe.name, out, total - first, batch, start),
        ),
    }
    if start:
        del stages["encoder"]
    write_demo(recipe, out)
    for stage, (product, make) in stages.items():
        if not (scratch / product).exists():
            begin = time.monotonic()
            make()
            minutes[stage] = (time.monotonic() - begin) / 60
            clock.write_text(json.dumps(minutes))
    write_report(recipe, out, minutes, evaluate, start)


if __name__ == "__main__":
    sys.exit(main())
