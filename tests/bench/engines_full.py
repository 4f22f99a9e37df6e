"""`make engines-full`: TensorRT for RTX engines of the published sizes, really built, and held to limits.

Random weights, and made-up scales (an engine takes the same time and memory, whatever they are); no GPU. Export and
build run in processes of their own, so that peak memory is a build's own: `trol-edge build` itself is what is measured.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from tests.bench import speed as bench
from trol_edge.errors import TrolEdgeError, UsageError
from trol_edge.export.quantize.recipes import RecipeOptions

FOLDER = Path("build/engines-full")
RATIO = 1.03  # an engine's bytes / those of its weights, each once


@dataclasses.dataclass(frozen=True)
class FullSize:
    """One build, and what it may take: seconds on two cores (None: any), bytes resident (None: this machine's)."""

    model: str
    precision: str
    seconds: float | None = None
    peak_bytes: float | None = None


CASES = (
    FullSize("trol-1.8b", "fp16", seconds=240, peak_bytes=14e9),
    FullSize("trol-1.8b", "int8", peak_bytes=8e9),
    FullSize("trol-1.8b", "int4", peak_bytes=5e9),
    FullSize("trol-3.8b", "int8"),
    FullSize("trol-3.8b", "int4"),
)


@dataclasses.dataclass(frozen=True)
class Built:
    """What a build took, and which limits it missed, in words."""

    model: str
    precision: str
    library: str
    export_seconds: float
    seconds: float
    peak_bytes: int
    engines: dict[str, dict[str, Any]]  # by graph: bytes, weight_bytes, seconds, ...
    missed: tuple[str, ...]


def measure(
    case: FullSize, folder: Path, checkpoint: Path | None = None, report: Callable[[str], None] = lambda line: None
) -> Built:
    """Export and build one case in `folder`; the bundle is removed again. checkpoint: instead of one made by synth.

    Raises BackendError where a process fails, with what it said last.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if checkpoint is None:
        checkpoint = bench.random_checkpoint(case.model, folder, report)
    bundle = (folder / f"{case.model}-{case.precision}").resolve()
    report(f"{case.model} {case.precision}: export ...")
    start = time.perf_counter()
    told = json.dumps([str(checkpoint), str(bundle), case.model, case.precision])
    bench.run_python("-c", "from tests.bench.engines_full import prepare; prepare()", stdin=told)
    exported = time.perf_counter() - start
    try:
        report(f"{case.model} {case.precision}: build ...")
        said = json.loads(bench.run_python("-m", "trol_edge", "build", str(bundle), "--force", "--json"))
    finally:
        shutil.rmtree(bundle)
    built = Built(
        model=case.model,
        precision=case.precision,
        library=said["key"]["library"],
        export_seconds=exported,
        seconds=said["seconds"],
        peak_bytes=said["peak_bytes"],
        engines=said["engines"],
        missed=(),
    )
    return dataclasses.replace(built, missed=tuple(misses(case, built)))


def prepare() -> None:
    """As a process: [checkpoint, bundle, model, recipe] as JSON on standard input."""
    from trol_edge.export.pipeline import export
    from trol_edge.export.quantize.made_up import made_up_statistics

    checkpoint, bundle, model, recipe = json.load(sys.stdin)
    # No search for what random weights cannot show.
    options = RecipeOptions(recipe=recipe, scaling=False, clipping=False, sensitive=None, observer="minmax")
    export(
        checkpoint,
        bundle,
        model=model,
        target="rtx",
        options=options,
        calibration=made_up_statistics,
        record_selftest=False,
        overwrite=True,
    )


def misses(case: FullSize, built: Built) -> list[str]:
    """Which limits a build missed, in words."""
    found = []
    if case.seconds is not None and built.seconds > case.seconds:
        found.append(f"{built.seconds:.0f} s, at most {case.seconds:.0f}")
    most = case.peak_bytes or os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if built.peak_bytes > most:
        found.append(f"peak memory {built.peak_bytes / 1e9:.2f} GB, at most {most / 1e9:.2f}")
    for name, engine in built.engines.items():
        if (ratio := engine["bytes"] / engine["weight_bytes"]) > RATIO:
            found.append(f"{name}: {ratio:.3f} times its weights, at most {RATIO}")
    return found


def show(results: Sequence[Built], console: Console) -> None:
    """A table, a row per build, and what was missed."""
    title = f"{results[0].library}, random weights, {os.cpu_count()} cores"
    table = Table(title=title, title_justify="left", box=None)
    for column in ("model", "precision", "export s", "build s", "peak GB", "engines GB (times their weights)"):
        table.add_column(column, justify="left" if column in ("model", "precision") else "right")
    for built in results:
        sizes = ", ".join(
            f"{name} {e['bytes'] / 1e9:.3f} ({e['bytes'] / e['weight_bytes']:.3f})" for name, e in built.engines.items()
        )
        row = (f"{built.export_seconds:.0f}", f"{built.seconds:.0f}", f"{built.peak_bytes / 1e9:.2f}", sizes)
        table.add_row(built.model, built.precision, *row)
    console.print(table)
    for built in results:
        for miss in built.missed:
            console.print(f"MISSED: {built.model} {built.precision}: {miss}", markup=False)


app = typer.Typer(rich_markup_mode=None, pretty_exceptions_enable=False, add_completion=False)


@app.command(epilog="Example: python -m tests.bench.engines_full --only trol-1.8b-fp16")
def main(
    only: Annotated[str, typer.Option(help="Builds, by commas: trol-1.8b-fp16, ... .  [default: all]")] = "",
    folder: Annotated[Path, typer.Option(help="Where checkpoints and bundles are made; needs 25 GB.")] = FOLDER,
    checkpoints: Annotated[
        Path | None,
        typer.Option(help="Folder with checkpoints trol-1.8b and trol-3.8b to take instead of random ones."),
    ] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the numbers to this file too.")] = None,
) -> None:
    """Build full-size engines by TensorRT for RTX, print what they took; exit code 1 where a limit was missed."""
    err = Console(stderr=True, highlight=False)
    cases = {f"{case.model}-{case.precision}": case for case in CASES}
    try:
        names = [name for name in only.split(",") if name] or list(cases)
        if unknown := [name for name in names if name not in cases]:
            raise UsageError(f"{', '.join(unknown)}: not among {', '.join(cases)}")
        results = [
            measure(
                cases[name],
                folder,
                checkpoints / cases[name].model if checkpoints else None,
                lambda line: err.print(line, style="dim"),
            )
            for name in names
        ]
    except TrolEdgeError as error:
        err.print(f"error: {error}", style="red", markup=False, soft_wrap=True)
        raise typer.Exit(1) from error
    out = Console(highlight=False)
    out.width = max(out.width, 156)  # a row is a line, in a log file too
    show(results, out)
    if json_file:
        json_file.parent.mkdir(parents=True, exist_ok=True)
        json_file.write_text(json.dumps([dataclasses.asdict(built) for built in results], indent=1), encoding="utf-8")
    if any(built.missed for built in results):
        raise typer.Exit(1)


if __name__ == "__main__":
    app()
