"""Counts what the engines of the published models move, from engines with one layer and with two.

    python -m tests.bench.programs count                  # builds them, and writes trol_edge/plan/programs.json
    python -m tests.bench.programs count --only trol-3.8b/int4 -o before.json
    python -m tests.bench.programs table before.json      # bytes a token and planned speeds: before, now, ideal

TensorRT for RTX builds them, without a GPU, at the models' true width and with random weights. A build takes half a
minute, all of them take half an hour on two quiet cores, and 6 GB of memory.
"""

from __future__ import annotations

import dataclasses
import datetime
import json
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from tests import one_layer
from tests.bench.speed import run_python
from trol_edge._version import __version__
from trol_edge.bundle.engines import ENGINES
from trol_edge.bundle.programs import counts_of
from trol_edge.bundle.strict import from_dict
from trol_edge.errors import UsageError
from trol_edge.export import unbuilt
from trol_edge.export.quantize.recipes import RecipeOptions
from trol_edge.machine import devices
from trol_edge.plan import shipped
from trol_edge.plan.duration import graph_time
from trol_edge.plan.rates import platform_of
from trol_edge.plan.shipped import Shipped
from trol_edge.program import text
from trol_edge.runtimes.trt.api import load

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
err = Console(stderr=True, highlight=False)
MODELS = ("trol-3.8b", "trol-1.8b", "trol-7b")
RECIPES = ("fp16", "int8", "int4", "fp8")
# A target for which graphs are exported -> the targets that get the same ones.
TARGETS = {"rtx": ("rtx", "jetson-jp72", "jetson-trt11"), "tensorrt": ("tensorrt", "jetson-jp6", "jetson-jp7")}
BOARDS = ("orin-nano-8gb:MAXN_SUPER", "orin-nx-16gb", "agx-orin-64gb", "agx-thor")
FILLED = 1000  # rows, of the table
GRAPHS = ",".join(ENGINES)
EARLIER = {"jetson-jp72": "jetson-jp7"}  # what Thor's target was called when its caches were copied


def measured(model: str, recipe: str, target: str, layers: int, graphs: Sequence[str]) -> dict[str, Any]:
    """The counts of the engines of a model with this number of layers, by graph, and the library that built them."""
    given = json.dumps([model, recipe, target, layers, graphs])
    said = run_python("-c", "from tests.bench.programs import measure; measure()", stdin=given)
    found: dict[str, Any] = json.loads(said.splitlines()[-1])
    return found


def measure() -> None:
    """Entry point of a process of its own, whose memory is given back; it reads [model, ...] as JSON from stdin."""
    model, recipe, target, layers, graphs = json.load(sys.stdin)
    library, found = load("tensorrt_rtx"), {}
    for name in graphs:
        with tempfile.TemporaryDirectory() as folder:
            made = one_layer.graph(model, RecipeOptions(recipe=recipe), name, Path(folder), layers, target)
            programs = text.read(one_layer.engine(made, library))
        found[name] = [
            dataclasses.asdict(counts)
            for counts in counts_of(made.info, made.context, programs, one_layer.profiles_of(made))
        ]
    print(json.dumps({"library": library.title, "graphs": found}))


@app.command()
def count(
    only: Annotated[str, typer.Option(help="Engines (MODEL/RECIPE or MODEL/RECIPE/TARGET), by commas.")] = "",
    graphs: Annotated[str, typer.Option(help="Graphs, by commas; a plan takes others from themselves.")] = GRAPHS,
    output: Annotated[
        Path, typer.Option("-o", "--output", help="File to write; counts in it are kept.")
    ] = shipped.FILE,
) -> None:
    """Build engines with one layer and with two, and write the counts of their programs."""
    wanted = [
        (model, recipe, target)
        for model in MODELS
        for recipe in RECIPES
        for target in TARGETS
        if not only or {f"{model}/{recipe}", f"{model}/{recipe}/{target}"} & set(only.split(","))
    ]
    if not wanted:
        raise UsageError(f"{only}: no engines of that name; there are {', '.join(MODELS)} in {', '.join(RECIPES)}")
    known = json.loads(output.read_text(encoding="utf-8"))["engines"] if output.exists() else []
    for model, recipe, target in wanted:
        start = time.perf_counter()
        one, two = (measured(model, recipe, target, layers, graphs.split(",")) for layers in (1, 2))
        if not all(one["graphs"].values()):
            raise UsageError(f"{model} {recipe} {target}: the programs of {one['library']} could not be counted")
        entry = {"model": model, "recipe": recipe, "targets": list(TARGETS[target])}
        # Counts of graphs that are not counted now are kept.
        kept: dict[str, Any] = next((e for e in known if {k: e[k] for k in entry} == entry), {})
        known = [e for e in known if e is not kept]
        made = {"one": one["graphs"], "two": two["graphs"]}
        known.append(entry | {layers: kept.get(layers, {}) | of for layers, of in made.items()})
        data = {
            "library": one["library"],
            "made": f"trol-edge {__version__}, {datetime.date.today().isoformat()}",
            "engines": sorted(known, key=lambda e: str(list(e.values())[:3])),
        }
        from_dict(Shipped, data, "these counts")
        rows = ",\n".join(json.dumps(e, separators=(",", ":")) for e in data["engines"])
        head = json.dumps({k: v for k, v in data.items() if k != "engines"})[:-1]
        output.write_text(f'{head}, "engines": [\n{rows}\n]}}\n', encoding="utf-8")
        err.print(f"{model} {recipe} {target}: {time.perf_counter() - start:.0f} s", style="dim")


@dataclasses.dataclass(frozen=True)
class Row:
    """One model in one recipe on one board. Bytes are those of a token, speeds are tokens per second."""

    model: str
    recipe: str
    board: str
    ideal: int
    bytes: tuple[int | None, int | None]  # counted in the engines before, and now
    speeds: tuple[float | None, float | None]

    @property
    def gigabytes(self) -> tuple[float | None, float | None]:
        """The bytes, in GB."""
        before, now = (None if size is None else size / 1e9 for size in self.bytes)
        return before, now


def rows_of(shape: unbuilt.Unbuilt, recipe: str, before: Shipped | None, now: Shipped) -> list[Row]:
    """A row for each board that supports the recipe."""
    model, found = shape.name, []
    for name in BOARDS:
        board = platform_of(*devices.find(name))
        if recipe not in board.precisions:
            continue
        subject = shape.subject(board.target, RecipeOptions(recipe=recipe))
        costs, weights, context = subject.graphs["step"], subject.weights["step"], subject.context
        layers, tower = shape.spec.num_layers, shape.spec.vision.num_layers
        counted = [
            shipped.programs(model, target, recipe, layers, tower, counts) if counts else {}
            for counts, target in ((before, EARLIER.get(board.target, board.target)), (now, board.target))
        ]
        times = [
            graph_time("step", costs, weights, board, of["step"], context, slots=FILLED) if of else None
            for of in counted
        ]
        constants = next((of["step"][0].constants for of in reversed(counted) if of), weights)
        ideal = constants + FILLED * (subject.cache_bytes // context) + 4 * shape.spec.vocab_size
        moved, speeds = [t.moved if t else None for t in times], [1 / t.expected if t else None for t in times]
        row = Row(model, recipe, name, ideal, (moved[0], moved[1]), (speeds[0], speeds[1]))
        found.append(row)
    return found


@app.command()
def table(
    before: Annotated[Path | None, typer.Argument(help="File of an earlier count.")] = None,
    models: Annotated[str, typer.Option(help="Models, by commas.")] = "trol-1.8b,trol-3.8b",
) -> None:
    """Print bytes a token and planned speeds as a table in Markdown: before, now and ideal."""
    now = shipped.shipped()
    earlier = shipped.read(before) if before else None
    boards = " | ".join(name.split(":")[0] for name in BOARDS)
    print(f"| model, recipe | must, GB | Orin moves, GB | Thor moves, GB | {boards} |")
    print("|---" * (4 + len(BOARDS)) + "|")

    def change(values: tuple[float | None, float | None], form: str) -> str:
        return " → ".join("-" if value is None else format(value, form) for value in values)

    counted = {(c.model, c.recipe) for counts in (earlier, now) if counts for c in counts.engines}
    for model in models.split(","):
        shape = unbuilt.published(model)
        for recipe in (recipe for recipe in RECIPES if (model, recipe) in counted):
            rows = {row.board: row for row in rows_of(shape, recipe, earlier, now)}
            sizes = [change(rows[name].gigabytes, ".2f") if name in rows else "-" for name in (BOARDS[0], BOARDS[-1])]
            speeds = [change(rows[name].speeds, ".1f") if name in rows else "-" for name in BOARDS]
            must = next(iter(rows.values())).ideal / 1e9
            print(f"| {model} {recipe} | {must:.2f} | {' | '.join([*sizes, *speeds])} |", flush=True)


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    app()
