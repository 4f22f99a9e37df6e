"""`make engines-full`: builds TensorRT for RTX engines of the published sizes, and checks them against limits.

Weights are random and scales made up, because time and memory of an engine do not depend on them. It needs no GPU.
Export and build run in separate processes, so that peak memory is that of `trol-edge build` alone. Each row is written
as soon as it is there, and a run that was stopped goes on where it was: at the next row, with the bundle that was
exported, and by layer after the last engine that was built.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shutil
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from tests.bench import speed as bench
from trol_edge.bundle.folder import new_file
from trol_edge.bundle.layer_graphs import ATTENTION_STEP, HEAD, layer_of
from trol_edge.cli.programs import STEP
from trol_edge.errors import TrolEdgeError, UsageError
from trol_edge.export.quantize.recipes import RecipeOptions
from trol_edge.program import text

FOLDER = Path("build/engines-full")
RATIO = 1.03  # an engine's bytes / those of its weights, each once
LAYERS_RATIO = 1.05  # bytes of all engines by layer / those of their weights, each once
LAYERS_PEAK = 1.6e9  # bytes that a build by layer takes
FILLED = 1000  # rows of the K/V cache for which a step is counted
GENERATED = re.compile(rb"__myl_\w{1,200}?_0x[0-9a-f]{32}")
MOVED = 1.10  # bytes that a step moves / those of its constants, the filled rows and the logits


@dataclasses.dataclass(frozen=True)
class FullSize:
    """One build and its limits: seconds on two cores (None: any), resident bytes (None: this machine's memory)."""

    model: str
    precision: str
    seconds: float | None = None
    peak_bytes: float | None = None
    by_layer: bool = False
    half: bool = False  # a second pass in the lower half of the layers only

    @property
    def bundle(self) -> str:
        """The name of the bundle, which a build as a whole and one by layer share."""
        return f"{self.model}-{self.precision}{'-half' * self.half}"

    @property
    def name(self) -> str:
        """What the build is called on the command line."""
        return f"{self.bundle}{'-layers' * self.by_layer}"


CASES = (
    FullSize("trol-1.8b", "fp16", seconds=240, peak_bytes=14e9),
    FullSize("trol-1.8b", "int8", peak_bytes=8e9),
    FullSize("trol-1.8b", "int8", peak_bytes=8e9, half=True),
    FullSize("trol-1.8b", "int4", peak_bytes=5e9),
    FullSize("trol-3.8b", "int8"),
    FullSize("trol-3.8b", "int4"),
    *(
        FullSize(model, precision, peak_bytes=LAYERS_PEAK, by_layer=True)
        for model, precisions in (("trol-1.8b", ("fp16", "int8", "int4")), ("trol-3.8b", ("int8", "int4")))
        for precision in precisions
    ),
)


@dataclasses.dataclass(frozen=True)
class Built:
    """The time and memory of a build, and the limits that it missed, in words.

    seconds: those of all engines, also of those that were built before a run was stopped. kernels: how many
    a first start compiles, if equal ones are compiled once, and how many all engines hold.
    """

    model: str
    precision: str
    library: str
    export_seconds: float  # 0 if a run that was stopped had exported it
    seconds: float
    peak_bytes: int
    engines: dict[str, dict[str, Any]]  # graph -> bytes, weight_bytes, seconds, ...
    programs: dict[str, dict[str, Any]]  # graph -> moved, ideal, ratio, scratch, ..., or unknown: why
    missed: tuple[str, ...]
    by_layer: bool = False
    kernels: tuple[int, int] = (0, 0)
    half: bool = False

    @property
    def step(self) -> dict[str, Any]:
        """What a step moves: the run of one engine, or of those of all layers with the attention between them."""
        if not self.by_layer:
            return self.programs["step"]
        layers = [name for name in self.programs if name.endswith(STEP)]
        attentions = [ATTENTION_STEP] * (len(layers) // 2)
        runs = [self.programs[name] for name in (*layers, *attentions, HEAD)]
        if unknown := next((run for run in runs if "unknown" in run), None):
            return unknown
        # Between engines nothing must be moved, and of the rope tables one row.
        weights = sum(self.engines[name.removesuffix(STEP)]["weight_bytes"] for name in (*layers, HEAD))
        ideal = weights + sum(run["cache"] for run in runs) + self.programs[HEAD]["results"]
        moved = sum(run["moved"] for run in runs)
        return {"moved": moved, "ideal": ideal, "ratio": moved / ideal}


def measure(
    case: FullSize, folder: Path, checkpoint: Path | None = None, report: Callable[[str], None] = lambda line: None
) -> Built:
    """Export and build one case in `folder`; the bundle is removed again. checkpoint: used instead of a random one.

    Raises BackendError with the last output of a process that fails.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if checkpoint is None:
        checkpoint = bench.random_checkpoint(case.model, folder, report)
    bundle = (folder / case.bundle).resolve()
    exported = 0.0
    if not (bundle / "bundle.json").is_file():
        report(f"{case.name}: export ...")
        start = time.perf_counter()
        told = json.dumps([str(checkpoint), str(bundle), case.model, case.precision, case.half])
        bench.run_python("-c", "from tests.bench.engines_full import prepare; prepare()", stdin=told)
        exported = time.perf_counter() - start
    report(f"{case.name}: build ...")
    how = ("--engines", "layers") if case.by_layer else ("--engines", "whole", "--force")
    said = json.loads(bench.run_python("-m", "trol_edge", "build", str(bundle), *how, "--json"))
    inspect = ("-m", "trol_edge", "inspect", str(bundle), "--program", "--filled", str(FILLED), "--json")
    programs = json.loads(bench.run_python(*inspect))["engines"]["rtx"]
    built = Built(
        model=case.model,
        precision=case.precision,
        library=said["key"]["library"],
        export_seconds=exported,
        seconds=sum(engine["seconds"] for engine in said["engines"].values()),
        peak_bytes=said["peak_bytes"],
        engines=said["engines"],
        programs={name: {k: v for k, v in p.items() if k != "kernels"} for name, p in programs.items()},
        missed=(),
        by_layer=case.by_layer,
        kernels=kernels_of(Path(said["folder"])),
        half=case.half,
    )
    shutil.rmtree(said["folder"])
    return dataclasses.replace(built, missed=tuple(misses(case, built)))


def rows_of(path: Path) -> list[Built]:
    """The rows that an earlier run wrote. Raises UsageError for a file that holds none."""
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))
        return [Built(**row | {name: tuple(row[name]) for name in ("missed", "kernels")}) for row in rows]
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise UsageError(f"{path}: not the rows of an earlier run ({error}); name another file") from error


def kernels_of(folder: Path) -> tuple[int, int]:
    """The distinct kernels of the engines in a folder, which a first start compiles, and all of them.

    Those that TensorRT for RTX generates have a hash in their names. Others differ in what they read and write.
    """
    found: Counter[object] = Counter()
    for path in folder.glob("*.engine"):
        found.update(set(GENERATED.findall(path.read_bytes())))
        for program in text.read(path):
            for kernel in program.kernels:
                if kernel.what != "function":
                    operands = (program.tensors[name] for name in (*kernel.reads, *kernel.writes))
                    fixed = tuple((t.dtype, *(d if isinstance(d, int) else None for d in t.dims)) for t in operands)
                    found[kernel.what, kernel.name, fixed] += 1
    return len(found), sum(found.values())


def prepare() -> None:
    """Entry point of a process that exports; it reads [checkpoint, bundle, model, recipe, half] as JSON from stdin.

    half: whether only the lower half of the layers gets a second pass.
    """
    from trol_edge.export.pipeline import export
    from trol_edge.export.quantize.made_up import made_up_statistics
    from trol_edge.export.reference.checkpoint import Checkpoint

    checkpoint, bundle, model, recipe, half = json.load(sys.stdin)
    # No searches, because they mean nothing for random weights.
    options = RecipeOptions(recipe=recipe, scaling=False, clipping=False, sensitive=None, observer="minmax")
    export(
        checkpoint,
        bundle,
        model=model,
        target="rtx",
        traversal=str(Checkpoint(checkpoint).spec.num_layers // 2) if half else "all",
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
    if built.by_layer:
        total, weights = (sum(engine[key] for engine in built.engines.values()) for key in ("bytes", "weight_bytes"))
        if total > LAYERS_RATIO * weights:
            found.append(f"all engines: {total / weights:.3f} times their weights, at most {LAYERS_RATIO}")
    else:
        found += [
            f"{name}: {engine['bytes'] / engine['weight_bytes']:.3f} times its weights, at most {RATIO}"
            for name, engine in built.engines.items()
            if engine["bytes"] > RATIO * engine["weight_bytes"]
        ]
    step = built.step
    if "unknown" in step:
        found.append(f"step: its program cannot be counted: {step['unknown']}")
    elif step["ratio"] > MOVED:
        found.append(f"step: moves {step['ratio']:.2f} times what it must, at most {MOVED}")
    return found


def sizes_of(built: Built) -> str:
    """The sizes of the engines, of those of all layers together."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for name, engine in built.engines.items():
        groups.setdefault(name if layer_of(name) is None else "layers", []).append(engine)
    if built.by_layer:
        groups["all"] = list(built.engines.values())
    found = []
    for name, engines in groups.items():
        size, weights = (sum(engine[key] for engine in engines) for key in ("bytes", "weight_bytes"))
        times = f" ({size / weights:.3f})" if weights else ""
        found.append(f"{name} {size / 1e9:.3f}{times}")
    return ", ".join(found)


def show(results: Sequence[Built], console: Console) -> None:
    """Print a table with a row per build, and the missed limits."""
    title = f"{results[0].library}, random weights, {os.cpu_count()} cores"
    table = Table(title=title, title_justify="left", box=None)
    columns = ("model", "precision", "export s", "build s", "peak GB", "engines GB (times their weights)")
    more = (f"a step moves GB (times what it must, {FILLED} filled rows)", "kernels to compile, of all")
    for column in (*columns, *more):
        table.add_column(column, justify="left" if column in ("model", "precision") else "right")
    for built in results:
        model = f"{built.model}{', second pass in half' * built.half}"
        row = (f"{built.export_seconds:.0f}", f"{built.seconds:.0f}", f"{built.peak_bytes / 1e9:.2f}", sizes_of(built))
        step = built.step
        moves = f"{step['moved'] / 1e9:.3f} ({step['ratio']:.2f})" if "ratio" in step else "unknown"
        table.add_row(model, built.precision, *row, moves, " of ".join(map(str, built.kernels)))
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
    json_file: Annotated[
        Path | None, typer.Option("--json", help="File to write each row to; rows that it has are not measured again.")
    ] = None,
) -> None:
    """Build full-size engines by TensorRT for RTX and print time and memory. A missed limit exits with 1."""
    err = Console(stderr=True, highlight=False)
    cases = {case.name: case for case in CASES}
    try:
        results = rows_of(json_file) if json_file and json_file.exists() else []
        done = {FullSize(row.model, row.precision, by_layer=row.by_layer, half=row.half).name for row in results}
        names = [name for name in only.split(",") if name] or list(cases)
        if unknown := [name for name in names if name not in cases]:
            raise UsageError(f"{', '.join(unknown)}: not among {', '.join(cases)}")
        left = [cases[name] for name in names if name not in done]
        for at, case in enumerate(left):
            checkpoint = checkpoints / case.model if checkpoints else None
            results.append(measure(case, folder, checkpoint, lambda line: err.print(line, style="dim")))
            if json_file:
                json_file.parent.mkdir(parents=True, exist_ok=True)
                rows = json.dumps([dataclasses.asdict(built) for built in results], indent=1)
                with new_file(json_file) as part:
                    part.write_text(rows, encoding="utf-8")
            if not any(case.bundle == other.bundle for other in left[at + 1 :]):
                shutil.rmtree(folder / case.bundle)
    except TrolEdgeError as error:
        err.print(f"error: {error}", style="red", markup=False, soft_wrap=True)
        raise typer.Exit(1) from error
    out = Console(highlight=False)
    out.width = max(out.width, 210)  # so that a row is one line, in a log file too
    show(results, out)
    if any(built.missed for built in results):
        raise typer.Exit(1)


if __name__ == "__main__":
    app()
