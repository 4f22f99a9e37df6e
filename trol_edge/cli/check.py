"""The verbs verify and soak, which look for wrong numbers and leaks."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated, Any, cast

import typer
from rich.table import Table
from rich.text import Text

from trol_edge.cli.show import Json, OfOrt, Threads, TrustedKeys, err, out, print_json


def verify(
    bundle: Annotated[Path, typer.Argument(help="Bundle folder.")],
    every: Annotated[bool, typer.Option("--all", help="One line per stage instead of one per layer.")] = False,
    threads: Threads = None,
    provider: OfOrt = None,
    trusted_key: TrustedKeys = None,
    as_json: Json = False,
) -> None:
    """Replay the self-test that export recorded. The exit code is 1 if a stage drifts more than its precision may."""
    from trol_edge.verify.replay import verify as replay

    report = replay(bundle, threads, cast(Any, provider), trusted_key or None)
    if as_json:
        print_json(report.json())
    else:
        table = Table("", "stage", "drift", "budget", "", box=None, padding=(0, 1))
        for title, stage in report.lines(every):
            mark = Text("ok") if stage.good else Text("--", "red")
            table.add_row(mark, title, f"{stage.drift:.1e}", f"{stage.budget:.0e}", stage.text)
        out.print(table)
        what = f"{report.target}, {report.precision}, {report.runs_on}; {report.passes}"
        where = f"{what}; {report.machine}; {report.seconds:.1f} s"
        out.print(f"{where}\n{report.verdict}", soft_wrap=True)
    if report.first_wrong is not None:
        raise typer.Exit(1)


def soak(
    bundle: Annotated[Path, typer.Argument(help="Bundle folder, with a tokenizer.")],
    minutes: Annotated[float, typer.Option(help="Duration in minutes.", min=0.01)] = 10.0,
    provider: OfOrt = None,
    trusted_key: TrustedKeys = None,
    as_json: Json = False,
) -> None:
    """Ask, stop, fork, miss deadlines and feed bad frames from four threads. Wrong answers or leaks exit with 1."""
    from trol_edge.measure.soak import soak as run_soak

    shown = [-10.0]  # time of the last printed line, in seconds

    def progress(seconds: float, resident: int) -> None:
        if seconds - shown[0] >= 10:
            shown[0] = seconds
            err.print(f"{seconds:6.0f} s  {resident / 1e6:8.1f} MB resident")

    report = run_soak(bundle, 60 * minutes, progress, cast(Any, provider), trusted_key or None)
    if as_json:
        print_json({**dataclasses.asdict(report), "passed": report.passed})
    else:
        calls = ", ".join(f"{name} {count}" for name, count in sorted(report.calls.items()))
        out.print(f"{sum(report.calls.values())} calls in {report.seconds:.0f} s: {calls}")
        out.print(f"vision cache: {report.vision_hits} hits, {report.vision_misses} misses")
        if report.slope is None:
            out.print("memory: not judged, because the run was shorter than a minute")
        else:
            slope = report.slope
            out.print(
                f"memory less free pages: {slope.mb_per_minute:+.3f} MB/min (least squares, first third left out), "
                f"{slope.growth_bytes / 1e6:+.2f} MB in all (2 standard errors: {slope.error_bytes / 1e6:.2f}), "
                f"allowed {slope.allowed_bytes / 1e6:.2f} MB "
                f"(1 % of {slope.resident_bytes / 1e6:.0f} MB, at least 4 MiB): {'flat' if slope.flat else 'NOT FLAT'}"
            )
        for line in report.wrong:
            out.print(f"wrong: {line}")
        out.print("passed" if report.passed else "FAILED")
    if not report.passed:
        raise typer.Exit(1)
