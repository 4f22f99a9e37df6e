"""`make engines-full`: builds TensorRT for RTX engines of the published sizes, and checks them against limits.

Weights are random and scales made up, because time and memory of an engine do not depend on them. It needs no GPU.
Export and build run in separate processes, so that peak memory is that of `trol-edge build` alone.
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
FILLED = 1000  # rows of the K/V cache for which a step is counted
MOVED = 1.10  # bytes that a step moves / those of its constants, the filled rows and the logits


@dataclasses.dataclass(frozen=True)
class FullSize:
    """One build and its limits: seconds on two cores (None: any), resident bytes (None: this machine's memory)."""

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
    """The time and memory of a build, and the limits that it missed, in words."""

    model: str
    precision: str
    library: str
    export_seconds: float
    seconds: float
    peak_bytes: int
    engines: dict[str, dict[str, Any]]  # graph -> bytes, weight_bytes, seconds, ...
    programs: dict[str, dict[str, Any]]  # graph -> moved, ideal, ratio, scratch, ..., or unknown: why
    missed: tuple[str, ...]


def measure(
    case: FullSize, folder: Path, checkpoint: Path | None = None, report: Callable[[str], None] = lambda line: None
) -> Built:
    """Export and build one case in `folder`; the bundle is removed again. checkpoint: used instead of a random one.

    Raises BackendError with the last output of a process that fails.
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
        inspect = ("-m", "trol_edge", "inspect", str(bundle), "--program", "--filled", str(FILLED), "--json")
        programs = json.loads(bench.run_python(*inspect))["engines"]["rtx"]
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
        programs={name: {k: v for k, v in p.items() if k != "kernels"} for name, p in programs.items()},
        missed=(),
    )
    return dataclasses.replace(built, missed=tuple(misses(case, built)))


def prepare() -> None:
    """Entry point of a process that exports; it reads [checkpoint, bundle, model, recipe] as JSON from stdin."""
    from trol_edge.export.pipeline import export
    from trol_edge.export.quantize.made_up import made_up_statistics

    checkpoint, bundle, model, recipe = json.load(sys.stdin)
    # No searches, because they mean nothing for random weights.
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
    """The limits that a build missed, in words."""
    found = []
    if case.seconds is not None and built.seconds > case.seconds:
        found.append(f"{built.seconds:.0f} s, at most {case.seconds:.0f}")
    most = case.peak_bytes or os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if built.peak_bytes > most:
        found.append(f"peak memory {built.peak_bytes / 1e9:.2f} GB, at most {most / 1e9:.2f}")
    for name, engine in built.engines.items():
        if (ratio := engine["bytes"] / engine["weight_bytes"]) > RATIO:
            found.append(f"{name}: {ratio:.3f} times its weights, at most {RATIO}")
    step = built.programs["step"]
    if "unknown" in step:
        found.append(f"step: its program cannot be counted: {step['unknown']}")
    elif step["ratio"] > MOVED:
        found.append(f"step: moves {step['ratio']:.2f} times what it must, at most {MOVED}")
    return found


def show(results: Sequence[Built], console: Console) -> None:
    """Print a table with a row per build, and the missed limits."""
    title = f"{results[0].library}, random weights, {os.cpu_count()} cores"
    table = Table(title=title, title_justify="left", box=None)
    columns = ("model", "precision", "export s", "build s", "peak GB", "engines GB (times their weights)")
    for column in (*columns, f"a step moves GB (times what it must, {FILLED} filled rows)"):
        table.add_column(column, justify="left" if column in ("model", "precision") else "right")
    for built in results:
        sizes = ", ".join(
            f"{name} {e['bytes'] / 1e9:.3f} ({e['bytes'] / e['weight_bytes']:.3f})" for name, e in built.engines.items()
        )
        row = (f"{built.export_seconds:.0f}", f"{built.seconds:.0f}", f"{built.peak_bytes / 1e9:.2f}", sizes)
        step = built.programs["step"]
        moves = f"{step['moved'] / 1e9:.3f} ({step['ratio']:.2f})" if "ratio" in step else "unknown"
        table.add_row(built.model, built.precision, *row, moves)
    console.print(table)
    for built in results:
        for miss in built.missed:
            console.print(f"MISSED: {built.model} {built.precision}: {miss}", markup=False)


app = typer.Typer(rich_markup_mode=None, pretty_exceptions_enable=False, add_completion=False)


@app.command(epilog="Example: python -m tests.bench.engines_full --only trol-1.8b-fp16")
def main(
    only: Annotated[str, typer.Option(help="Builds (trol-1.8b-fp16, ...), separated by commas.  [default: all]")] = "",
    folder: Annotated[Path, typer.Option(help="Folder for checkpoints and bundles; it needs 25 GB.")] = FOLDER,
    checkpoints: Annotated[
        Path | None,
        typer.Option(help="Folder with checkpoints trol-1.8b and trol-3.8b to use instead of random ones."),
    ] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="File to write the numbers to.")] = None,
) -> None:
    """Build full-size engines by TensorRT for RTX and print time and memory. A missed limit exits with 1."""
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
    out.width = max(out.width, 210)  # so that a row is one line, in a log file too
    show(results, out)
    if json_file:
        json_file.parent.mkdir(parents=True, exist_ok=True)
        json_file.write_text(json.dumps([dataclasses.asdict(built) for built in results], indent=1), encoding="utf-8")
    if any(built.missed for built in results):
        raise typer.Exit(1)


if __name__ == "__main__":
    app()
