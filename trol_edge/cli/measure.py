"""The verb profile, which measures bundles."""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, cast

import typer
from rich.table import Table

from trol_edge.bundle.folder import writing
from trol_edge.cli.show import (
    PICTURE_BYTES,
    STDIN,
    Json,
    OfOrt,
    Threads,
    TrustedKeys,
    out,
    phases,
    print_json,
    standard_input,
)
from trol_edge.errors import UsageError


def profile(
    bundles: Annotated[list[Path], typer.Argument(help="One or more bundle folders.")],
    size: Annotated[
        list[str] | None, typer.Option(help="Picture size, or none for no picture; repeatable.  [default: 640x480]")
    ] = None,
    prompt_tokens: Annotated[
        list[int] | None,
        typer.Option(min=1, help="Tokens of the whole prompt; repeatable.  [default: a short question]"),
    ] = None,
    image: Annotated[
        Path | None,
        typer.Option("-i", "--image", help="Picture file to use instead of --size; - reads it from standard input."),
    ] = None,
    tokens: Annotated[int, typer.Option(min=2, help="Tokens of each answer.")] = 32,
    warmup: Annotated[int, typer.Option(min=0, help="Answers that are not counted, before the others.")] = 2,
    runs: Annotated[int, typer.Option(min=1, help="Answers that are counted, per case.")] = 10,
    starts: Annotated[
        int, typer.Option(min=0, help="Fresh processes to time with a cold page cache, and again with a warm one.")
    ] = 3,
    threads: Threads = None,
    interval_ms: Annotated[float, typer.Option(min=5, help="Sampling interval.")] = 100.0,
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="Folder for profile.json and the page, profile.html.")
    ] = None,
    baseline: Annotated[
        Path | None, typer.Option(help="Older profile.json; the exit code is 1 if something became slower.")
    ] = None,
    root: Annotated[Path, typer.Option(help="Folder of proc and sys, to read a recorded tree.")] = Path("/"),
    provider: OfOrt = None,
    trusted_key: TrustedKeys = None,
    as_json: Json = False,
) -> None:
    """Measure latency, memory and energy of bundles on this machine, stage by stage, and write a page about them."""
    from trol_edge.bundle.folder import write_text
    from trol_edge.measure import compare, record, run
    from trol_edge.measure.page import page
    from trol_edge.measure.samples import summary

    old = None if baseline is None else record.load(baseline)
    with _as_file(image) as image, phases(quiet=as_json) as progress:
        found = run.profile(
            bundles,
            sizes=[_size(text) for text in size or ["640x480"]],
            prompt_tokens=prompt_tokens or [None],
            image=image,
            tokens=tokens,
            warmup=warmup,
            runs=runs,
            starts=starts,
            threads=threads,
            interval_s=interval_ms / 1e3,
            root=root,
            provider=cast(Any, provider),
            trusted_keys=trusted_key or (),
            progress=lambda line: progress(line, 0, 0),
        )
    if output is not None:  # write before the comparison, which may raise, so that minutes of measuring are not lost
        found.save(output / record.FILE)
        write_text(output / "profile.html", page(found))
    comparison = None if old is None else compare.compare(old, found)
    if output is not None and old is not None:
        write_text(output / "profile.html", page(found, old, comparison))
    rows = summary(found)
    if as_json:
        against = None if comparison is None else dataclasses.asdict(comparison)
        print_json({"machine": found.machine_name, "runs": rows, "baseline": against})
    else:
        _show_profile(found, rows)
        if comparison is not None:
            _show_comparison(comparison)
        if output is not None:
            out.print(f"{output}/profile.json, profile.html", soft_wrap=True)
    if comparison is not None and (comparison.slower or comparison.unjudged):
        raise typer.Exit(1)


@contextmanager
def _as_file(image: Path | None) -> Iterator[Path | None]:
    """Yield the picture's path. A picture on standard input is kept in a file meanwhile, for several processes."""
    if str(image) not in STDIN:
        yield image
        return
    with tempfile.TemporaryDirectory() as folder, writing(folder, UsageError):
        kept = Path(folder) / "picture"
        kept.write_bytes(standard_input(PICTURE_BYTES))
        yield kept


def _size(text: str) -> tuple[int, int] | None:
    """Parse "640x480" into numbers, or "none" (no picture) into None."""
    width, x, height = text.lower().partition("x")
    if text.lower() == "none":
        return None
    if not (x and width.isdecimal() and height.isdecimal()):
        raise typer.BadParameter(f"--size {text}: write it as 640x480 (width, height), or none")
    return int(width), int(height)


def _show_profile(profile: Any, rows: list[dict[str, Any]]) -> None:
    """Print the stages of every run as a table, and notes about them."""
    from trol_edge.measure.record import STAGES, STARTS, case_name
    from trol_edge.svg import number

    peaks = profile.peaks
    rates = f"; {peaks.flops_per_s / 1e9:.0f} GFLOP/s, {peaks.bytes_per_s / 1e9:.0f} GB/s measured" if peaks else ""
    out.print(f"{profile.machine_name}{rates}")
    titles = STAGES | STARTS
    runs = [(measured, run) for measured in profile.bundles for run in measured.runs]
    for (measured, run), row in zip(runs, rows, strict=True):
        title = f"{measured.bundle.folder} ({measured.bundle.kind}), {case_name(run.case)}"
        out.print(title, style="italic")
        table = Table(box=None, padding=(0, 2))
        table.add_column("ms")
        for column in ("p50", "p90", "p99", "values"):
            table.add_column(column, justify="right")
        for key in (key for key in titles if key in row):
            table.add_row(titles[key], *(number(row[key][p]) for p in ("p50", "p90", "p99")), str(row[key]["n"]))
        out.print(table)
        rate, peak, used = row["tokens_per_s"], row["peak_rss_bytes"], row["energy"]
        said = [f"{number(rate)} tokens/s"] if rate else []
        said += [f"peak memory {peak / 1e6:.0f} MB"] if peak else []
        if used:
            said.append(f"{number(1e3 * used['token_j'])} mJ per token, {number(used['answer_j'])} J per answer")
        out.print(f"{', '.join(said)}; the projector is a part of the vision graph", soft_wrap=True)
        for text in row["invalid"]:
            out.print(f"INVALID: {text}", soft_wrap=True, style="bold red")
        out.print()
    for kind, style in (("partial", "yellow"), ("remarks", "dim")):
        for text in dict.fromkeys(text for row in rows for text in row[kind]):
            count = sum(text in row[kind] for row in rows)
            where = "" if count == len(rows) else f" ({count} of {len(rows)} runs)"
            out.print(f"{kind.removesuffix('s')}: {text}{where}", soft_wrap=True, style=style)


def _show_comparison(comparison: Any) -> None:
    """Print what became slower against a baseline, and what could not be judged."""
    for text in comparison.remarks:
        out.print(f"remark: {text}", soft_wrap=True, style="dim")
    for text in comparison.unjudged:
        out.print(f"not judged, invalid: {text}", soft_wrap=True, style="bold red")
    for change in comparison.slower:
        out.print(
            f"slower: {change.where}: {change.what} {change.old:.4g} -> {change.new:.4g} {change.unit} "
            f"({100 * (change.new / change.old - 1):+.0f} %, noise {100 * change.threshold:.0f} %)",
            soft_wrap=True,
            style="red",
        )
    if not comparison.slower:
        out.print(f"nothing of {len(comparison.changes)} figures became slower beyond noise")
