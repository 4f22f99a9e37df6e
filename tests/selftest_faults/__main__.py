"""python -m tests.selftest_faults [--every N] [--precision P ...] [--page FILE]: export both small models in every
precision for a CPU and for the stand-in for a GPU, run them unharmed in 24 and more ways, plant every fault of the
catalogue, print the table, and write it as a page. The exit code is 1 if a fault was missed or misnamed, or an
unharmed run failed.

python -m tests.selftest_faults --clean FOLDER: only the unharmed runs, of the CPU's bundles in a folder, with what is
installed here (another onnxruntime, without export)."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import onnxruntime

ROOT = Path(__file__).resolve().parents[2]
BUNDLES = ROOT / "build" / "fault-catalogue"
MODELS = ("trol-nano", "trol-nano-phi3")
PRECISIONS = ("fp32", "fp16", "int8", "int4", "fp8")


def clean(folders: Iterable[Path], times: int) -> tuple[list[str], dict[str, list[float]], int]:
    """Run CPU bundles unharmed in every variant: alarms, the largest drift of each kind by precision, and runs."""
    from tests.selftest_faults.runs import variants
    from trol_edge.verify.replay import verify

    alarms: list[str] = []
    most: dict[str, list[float]] = {}
    runs = 0
    for folder in folders:
        for title, patched, threads in variants():
            for _ in range(times):
                with patched:
                    report = verify(folder, threads=threads)
                runs += 1
                if report.first_wrong:
                    alarms.append(f"{folder.name}, {title}: {report.verdict}")
                row = most.setdefault(report.precision, [0.0, 0.0, 0.0])
                for stage in report.stages:
                    kind = 0 if stage.name.startswith("arithmetic.") else 1 if stage.name == "vision" else 2
                    if kind < 2 or stage.name.split(".")[0] in ("traverse", "step", "long"):
                        row[kind] = max(row[kind], stage.drift)
    return alarms, most, runs


def export_all(precisions: Iterable[str]) -> dict[tuple[str, str, str], Path]:
    """Bundles by (precision, model, "cpu" or the stand-in's target)."""
    from tests.selftest_faults.stand_in import TARGET
    from tests.traces import remember
    from trol_edge.calibration import run as calibration
    from trol_edge.export import pipeline
    from trol_edge.export.graphs import canonical
    from trol_edge.export.quantize.recipes import RecipeOptions
    from trol_edge.export.quantize.stats import Statistics
    from trol_edge.export.reference.checkpoint import Checkpoint

    canonical.trace = remember(canonical.trace)

    def calibrated(source: Checkpoint) -> Statistics:
        folder = BUNDLES / f"statistics-{source.folder.name}"
        if not folder.exists():
            calibration.calibrate(source.folder, None, folder, count=8)
        return Statistics.load(folder, source.identity())

    found = {}
    for model in MODELS:
        for precision in precisions:
            for target in ("cpu", TARGET) if precision != "fp8" else (TARGET,):
                folder = BUNDLES / target / f"{model}-{precision}"
                folder.parent.mkdir(parents=True, exist_ok=True)
                pipeline.export(
                    ROOT / "export" / "checkpoints" / model,
                    folder,
                    target=target,
                    options=RecipeOptions(precision),
                    calibration=calibrated,
                    overwrite=True,
                )
                found[precision, model, target] = folder
    return found


def main() -> int:
    """See the module."""
    parser = argparse.ArgumentParser(prog="python -m tests.selftest_faults")
    parser.add_argument("--every", type=int, default=1, help="plant every n-th fault of each kind only")
    parser.add_argument("--precision", action="append", choices=PRECISIONS)
    parser.add_argument("--times", type=int, default=5, help="unharmed runs of each variant")
    parser.add_argument("--clean", type=Path, help="folder of bundles: only unharmed runs")
    parser.add_argument("--oldest", type=Path, help="result of --clean with another onnxruntime, for the page")
    parser.add_argument("--page", type=Path)
    given = parser.parse_args()
    if given.clean:
        alarms, most, runs = clean(sorted(p.parent for p in given.clean.glob("*/bundle.json")), given.times)
        result = {"onnxruntime": onnxruntime.__version__, "runs": runs, "alarms": alarms, "most": most}
        (given.clean / "oldest.json").write_text(json.dumps(result))
        print(*alarms, f"onnxruntime {onnxruntime.__version__}: {len(alarms)} false alarms in {runs} runs", sep="\n")
        return int(bool(alarms))
    return catalogue(given)


@dataclasses.dataclass
class Result:
    """What became of one bundle's faults. counts: kind -> (planted, found, named, by arithmetic)."""

    counts: dict[str, list[int]]
    wrong: list[str]
    alarms: list[str]
    runs: int


def one_bundle(number: int, precision: str, model: str, target: str, folder: Path, every: int, times: int) -> Result:
    """Run a bundle unharmed, on the stand-in if it is for a GPU, and plant every `every`-th fault of each kind."""
    from tests.selftest_faults import stand_in
    from tests.selftest_faults.catalogue import faults
    from tests.selftest_faults.runs import first_wrong, plant

    result = Result({}, [], [], 0)
    with stand_in.machine() as build, tempfile.TemporaryDirectory(prefix="selftest-faults-") as scratch:
        planted = list(faults(folder, number))
        on_gpu = target != "cpu"
        if on_gpu:
            build(folder)
            for _ in range(times):
                result.runs += 1
                if stage := first_wrong(folder):
                    result.alarms.append(f"{folder.name} on the stand-in: {stage}")
            planted += stand_in.stale(folder, Path(scratch, "others"), build)
        seen: Counter[str] = Counter()
        chosen = []
        for fault in planted:
            if seen[fault.kind] % every == number % every:
                chosen.append(fault)
            seen[fault.kind] += 1
        ready = build if on_gpu else lambda copy: None
        for outcome in plant(folder, Path(scratch, "copy"), chosen, ready):
            row = (1, outcome.found, outcome.named, outcome.stage.startswith("arithmetic"))
            old = result.counts.get(outcome.fault.kind, [0] * 4)
            result.counts[outcome.fault.kind] = [a + b for a, b in zip(old, row, strict=True)]
            if not outcome.named:
                where = f"{'GPU' if on_gpu else 'CPU'} {precision} {model}: {outcome.fault.kind}, {outcome.fault.what}"
                result.wrong.append(f"{where}: {outcome.stage or 'not found'}")
    return result


def catalogue(given: argparse.Namespace) -> int:
    """Everything, in two processes; returns the exit code."""
    start = time.monotonic()
    bundles = export_all(given.precision or PRECISIONS)
    on_cpu = [folder for (_, _, target), folder in bundles.items() if target == "cpu"]
    counts: dict[tuple[str, str, str, str], list[int]] = {}
    wrong: list[str] = []
    with ProcessPoolExecutor(2, get_context("spawn")) as pool:
        unharmed = pool.submit(clean, on_cpu, given.times)
        jobs = {
            key: pool.submit(one_bundle, number, *key, folder, given.every, given.times)
            for number, (key, folder) in enumerate(bundles.items())
        }
        alarms, most, runs = unharmed.result()
        for number, ((precision, model, target), job) in enumerate(jobs.items(), 1):
            found = job.result()
            alarms, wrong, runs = alarms + found.alarms, wrong + found.wrong, runs + found.runs
            for kind, row in found.counts.items():
                counts[kind, precision, model, "CPU" if target == "cpu" else "GPU"] = row
            planted = sum(row[0] for row in found.counts.values())
            print(f"{number} of {len(jobs)}: {model} {precision} {target}, {planted} faults", *found.wrong, flush=True)
    older = json.loads(given.oldest.read_text()) if given.oldest else None
    text = page(counts, alarms, runs, most, older, time.monotonic() - start)
    print(text, *wrong, *alarms, sep="\n")
    if given.page:
        given.page.write_text(text, encoding="utf-8")
    return int(bool(wrong or alarms))


def page(counts, alarms, runs, most, older, seconds: float) -> str:  # type: ignore[no-untyped-def]
    """The table as Markdown."""
    lines = ["| fault | " + " | ".join(PRECISIONS) + " |", "|---|" + "---|" * len(PRECISIONS)]

    def cell(kind: str | None, precision: str) -> str:
        total = sum((c for (k, p, _, _), c in counts.items() if p == precision and kind in (None, k)), np.zeros(4, int))
        return f"{total[0]}: {total[1]}, {total[2]}" if total[0] else "-"

    kinds = list(dict.fromkeys(kind for kind, *_ in counts))
    lines += [f"| {kind} | " + " | ".join(cell(kind, p) for p in PRECISIONS) + " |" for kind in kinds]
    lines.append("| **all** | " + " | ".join(cell(None, p) for p in PRECISIONS) + " |")
    models = ["| on | model | " + " | ".join(PRECISIONS) + " |", "|---|---|" + "---|" * len(PRECISIONS)]
    for device in ("CPU", "GPU"):
        for model in MODELS:
            row = []
            for precision in PRECISIONS:
                some = [c for (_, p, m, d), c in counts.items() if (p, m, d) == (precision, model, device)]
                total = sum(some, np.zeros(4, int))
                row.append(f"{total[0]}: {total[1]}, {total[2]}; {total[3]}" if some else "-")
            models.append(f"| {device} | {model} | " + " | ".join(row) + " |")
    spread = ["| onnxruntime | precision | arithmetic | vision | layers, logits |", "|---|---|---|---|---|"]
    for version, found in (
        (onnxruntime.__version__, most),
        *([(older["onnxruntime"], older["most"])] if older else []),
    ):
        spread += [f"| {version} | {p} | " + " | ".join(f"{x:.1e}" for x in row) + " |" for p, row in found.items()]
    told = [f"{len(alarms)} false alarms in {runs} unharmed runs with onnxruntime {onnxruntime.__version__}"]
    if older:
        told.append(f"{len(older['alarms'])} in {older['runs']} with {older['onnxruntime']}")
    return "\n".join([*lines, "", *models, "", *spread, "", f"{', '.join(told)}; {seconds:.0f} s.", ""])


if __name__ == "__main__":
    sys.exit(main())
