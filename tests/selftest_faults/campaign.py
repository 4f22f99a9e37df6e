"""The campaign: bundles, unharmed runs, faults, and the page of what was found."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import onnxruntime

from trol_edge.bundle.names import MANIFEST
from trol_edge.bundle.precision import DYNAMIC

ROOT = Path(__file__).resolve().parents[2]
BUNDLES = ROOT / "build" / "fault-catalogue"
ABOUT = """# Faults in bundles

Faults are put into bundles of both small models, one at a time, and all hashes are made right again. Then the
[self-test](verify.md) has to find each, and to name its place: the layer, the projector, the gate, the output layer,
the tokenizer. `make fault-catalogue` does that, on a CPU and on the stand-in for a GPU, which runs an engine's graph on
a CPU; it wrote this page. A cell says how many faults were put in: how many were found, how many were named right.
"""
MODELS = ("trol-nano", "trol-nano-phi3")
PRECISIONS = ("fp32", "fp16", "int8", "int4", "fp8", "int8-dynamic", "int4-dynamic")


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


def only_clean(folder: Path, times: int) -> int:
    """Run the bundles of a folder unharmed, and keep what was found in `oldest.json`; returns the exit code."""
    alarms, most, runs = clean(sorted(path.parent for path in folder.glob("*/bundle.json")), times)
    result = {"onnxruntime": onnxruntime.__version__, "runs": runs, "alarms": alarms, "most": most}
    (folder / "oldest.json").write_text(json.dumps(result), encoding="utf-8")
    print(*alarms, f"onnxruntime {onnxruntime.__version__}: {len(alarms)} false alarms in {runs} runs", sep="\n")
    return int(bool(alarms))


def export_all(precisions: Iterable[str], keep: bool) -> dict[tuple[str, str, str], Path]:
    """Bundles by (precision, model, "cpu" or the stand-in's target)."""
    from tests.selftest_faults.stand_in import TARGET
    from tests.traces import remember
    from trol_edge.calibration import run as calibration
    from trol_edge.export import pipeline
    from trol_edge.export.graphs import canonical
    from trol_edge.export.quantize.recipes import RecipeOptions
    from trol_edge.export.quantize.stats import Statistics
    from trol_edge.export.reference.checkpoint import Checkpoint

    canonical.trace_one = remember(canonical.trace_one)

    def calibrated(source: Checkpoint) -> Statistics:
        folder = BUNDLES / f"statistics-{source.folder.name}"
        if not folder.exists():
            calibration.calibrate(source.folder, None, folder, count=8)
        return Statistics.load(folder, source.identity())

    found = {}
    for model in MODELS:
        for precision in precisions:
            targets = {"fp8": (TARGET,)} | dict.fromkeys(DYNAMIC, ("cpu",))
            for target in targets.get(precision, ("cpu", TARGET)):
                folder = BUNDLES / target / f"{model}-{precision}"
                found[precision, model, target] = folder
                if keep and (folder / MANIFEST).exists():
                    continue
                folder.parent.mkdir(parents=True, exist_ok=True)
                pipeline.export(
                    ROOT / "export" / "checkpoints" / model,
                    folder,
                    target=target,
                    options=RecipeOptions(precision),
                    calibration=calibrated,
                    overwrite=True,
                )
    return found


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


def campaign(
    precisions: Iterable[str], every: int, times: int, keep: bool, oldest: Path | None, to: Path | None
) -> int:
    """Everything, in two processes; returns the exit code.

    every: plant every n-th fault of each kind only. times: unharmed runs of each variant. keep: use the bundles of the
    last run. oldest: folder with another onnxruntime, for more unharmed runs. to: where the page goes.
    """
    start = time.monotonic()
    bundles = export_all(precisions, keep)
    on_cpu = [folder for (_, _, target), folder in bundles.items() if target == "cpu"]
    counts: dict[tuple[str, str, str, str], list[int]] = {}
    wrong: list[str] = []
    with ProcessPoolExecutor(2, get_context("spawn")) as pool:
        unharmed = pool.submit(clean, on_cpu, times)
        jobs = {
            key: pool.submit(one_bundle, number, *key, folder, every, times)
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
    older = None
    if oldest:
        command = [sys.executable, "-m", "tests.selftest_faults", "--times", str(times)]
        environment = os.environ | {"PYTHONPATH": str(oldest.resolve())}
        subprocess.run([*command, "--clean", str(BUNDLES / "cpu")], check=False, env=environment, cwd=ROOT)
        older = json.loads((BUNDLES / "cpu" / "oldest.json").read_text())
        alarms += older["alarms"]
    text = page(counts, alarms, runs, most, older, time.monotonic() - start)
    print(text, *wrong, *alarms, sep="\n")
    if to:
        to.write_text(text, encoding="utf-8")
    return int(bool(wrong or alarms))


def table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> list[str]:
    """Lines of a table in Markdown."""
    head = list(head)
    return [f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows)] + [""]


def page(
    counts: dict[tuple[str, str, str, str], list[int]],
    alarms: list[str],
    runs: int,
    most: dict[str, list[float]],
    older: dict[str, Any] | None,
    seconds: float,
) -> str:
    """The page. counts: (kind, precision, model, device) -> counts of a Result."""

    def total(**only: str) -> list[int]:
        names = ("kind", "precision", "model", "device")
        rows = [c for key, c in counts.items() if all(key[names.index(n)] == v for n, v in only.items())]
        return [sum(column) for column in zip(*rows, strict=True)]

    def cell(**only: str) -> str:
        found = total(**only)
        return f"{found[0]}: {found[1]}, {found[2]}" if found else "-"

    kinds = list(dict.fromkeys(kind for kind, *_ in counts))
    by_kind = [[kind, *(cell(kind=kind, precision=p) for p in PRECISIONS)] for kind in kinds]
    by_kind.append(["**all**", *(cell(precision=p) for p in PRECISIONS)])
    by_device = []
    for device in ("CPU", "GPU"):
        for model in MODELS:
            cells = []
            for p in PRECISIONS:
                found = total(precision=p, model=model, device=device)
                cells.append(f"{cell(precision=p, model=model, device=device)}; {found[3]}" if found else "-")
            by_device.append([device, model, *cells])
    versions = [(onnxruntime.__version__, most)] + ([(older["onnxruntime"], older["most"])] if older else [])
    spread = [[v, p, *(f"{x:.1e}" for x in row)] for v, found in versions for p, row in found.items()]
    told = [f"{len(alarms)} false alarms in {runs} unharmed runs with onnxruntime {onnxruntime.__version__}"]
    told += [f"{len(older['alarms'])} in {older['runs']} with {older['onnxruntime']}"] if older else []
    return "\n".join(
        [
            ABOUT,
            *table(["fault", *PRECISIONS], by_kind),
            "After the semicolon: how many were named by the arithmetic of a cut graph.",
            "",
            *table(["on", "model", *PRECISIONS], by_device),
            f"{', '.join(told)}; {seconds:.0f} s. The largest drift in those on a CPU:",
            "",
            *table(["onnxruntime", "precision", "arithmetic", "vision", "layers, logits"], spread),
        ]
    )
