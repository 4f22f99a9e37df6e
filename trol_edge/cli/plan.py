"""The verb plan, which predicts time and memory on a device."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from trol_edge.cli.show import Form, Json, extra, out, phases, print_json


def plan(
    bundle: Annotated[Path | None, typer.Argument(help="Bundle folder, if there is one; else give --model.")] = None,
    model: Annotated[
        str | None, typer.Option(help="Model: trol-nano, trol-nano-phi3, trol-1.8b, trol-3.8b or trol-7b.")
    ] = None,
    device: Annotated[
        list[str] | None,
        typer.Option(
            help="Device as name (pi5-8gb, orin-nano-8gb), name:mode or JSON file, or host to measure this machine; "
            "repeatable.  "
            "[default: every Jetson; host for a bundle made for the CPU]"
        ),
    ] = None,
    precision: Annotated[
        list[str] | None,
        typer.Option(help="Precision as for export; repeatable.  [default: all that the device supports]"),
    ] = None,
    kv: Annotated[str | None, typer.Option(help="Type of kept keys and values, as for export: int8.")] = None,
    engines: Annotated[
        Form | None, typer.Option(help="Engines as for build.  [default: the bundle's own, or whole]")
    ] = None,
    context: Annotated[int | None, typer.Option(help="Tokens of prompt and answer together.")] = None,
    tiles: Annotated[
        int | None, typer.Option(min=0, help="Pictures or tiles in the prompt.  [default: the most of one picture]")
    ] = None,
    text: Annotated[int, typer.Option(min=1, help="Tokens of text in the prompt.")] = 84,
    answer: Annotated[int, typer.Option(min=1, help="Tokens of the answer.")] = 64,
    goal_ms: Annotated[float | None, typer.Option(help="Wanted time to the first token, in milliseconds.")] = None,
    goal_tokens_per_second: Annotated[float | None, typer.Option(help="Wanted speed of the answer.")] = None,
    desktop: Annotated[bool, typer.Option("--desktop", help="Count the memory of a desktop on the device.")] = False,
    reserve: Annotated[
        float, typer.Option(min=0, help="Memory that must remain for the rest of the robot, in GB.")
    ] = 0.5,
    show_device: Annotated[
        str | None, typer.Option(help="Print this device as JSON, to be edited and given as --device.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Predict whether a model fits a device, how fast it would be, and which precision is best."""
    from trol_edge.bundle.manifest import Bundle
    from trol_edge.bundle.targets import is_gpu
    from trol_edge.machine import cpus, devices
    from trol_edge.machine.table import to_json
    from trol_edge.plan import compare as planning
    from trol_edge.plan.estimate import to_dict
    from trol_edge.plan.rates import platform_of, platform_of_processor
    from trol_edge.plan.subject import FIGURE, Subject, Workload, subject_of

    if show_device is not None:
        print(to_json(cpus.find(show_device) or devices.find(show_device)[0]))
        return
    if (bundle is None) == (model is None):
        raise typer.BadParameter("give either a bundle folder or --model")
    if bundle is not None and (precision or context or kv):
        raise typer.BadParameter("a bundle's precision, K/V and context are fixed; use --model to choose them")
    layered = engines is Form.LAYERS
    fixed = None if bundle is None else subject_of(Bundle(bundle))
    if fixed is not None and engines is not None and fixed.by_layer != layered:
        fixed = fixed.in_layers() if layered else dataclasses.replace(fixed, by_layer=False)
    machines = []
    for name in device or planning.device_names(fixed):
        if name == "host":
            from trol_edge.runtimes import rates

            machines.append(rates.host())
        elif processor := cpus.find(name):
            machines.append(platform_of_processor(processor))
        else:
            machines.append(platform_of(*devices.find(name)))
    subject: Callable[[str, str], Subject]
    fewer: Callable[[str, str], Subject] | None = None
    if fixed is not None:
        precision, subject = [fixed.precision], lambda target, recipe: fixed
    else:
        assert model is not None
        with extra("export"):
            from trol_edge.export import unbuilt
            from trol_edge.export.quantize.recipes import read_options
        shape = unbuilt.published(model, context)

        def made(target: str, recipe: str, twice: int | None = None) -> Subject:
            found = shape.subject(target, read_options(recipe, kv=kv), twice)
            return found.in_layers() if layered and is_gpu(target) else found

        subject = functools.cache(made)
        twice = max(1, round(FIGURE * shape.spec.num_layers))
        fewer = functools.cache(lambda target, recipe: made(target, recipe, twice))
    with phases(quiet=as_json) as progress:
        plans = planning.compare(
            machines,
            subject,
            Workload(tiles, text, answer),
            precision,
            desktop=desktop,
            reserve=int(reserve * 1e9),
            progress=lambda line: progress(line, 1, 1),
            fewer=fewer,
        )
    goal = None if goal_ms is None else goal_ms / 1000
    chosen = {}
    for machine in machines:
        own = [p for p in plans if p.machine is machine]
        chosen[machine.name] = planning.best(own, goal, goal_tokens_per_second)
    if as_json:
        print_json(
            {
                "plans": [to_dict(p) for p in plans],
                "best": {name: None if p is None else p.subject.precision for name, p in chosen.items()},
            }
        )
        return
    _print_plans(plans)
    for name, p in chosen.items():
        if len([q for q in plans if q.machine.name == name]) > 1 or goal_ms or goal_tokens_per_second:
            goals = " and reaches the goal" if goal_ms or goal_tokens_per_second else ""
            said = (
                f"no precision here fits{goals}"
                if p is None
                else f"{p.subject.precision} is the finest that fits{goals}"
            )
            out.print(f"{name}: {said}")


def _print_plans(plans: Any) -> None:
    """Print a table with a row for each plan, or everything about a single plan."""
    first = plans[0].subject
    passes = first.passes or f"{first.layers} layers x 2 passes"
    out.print(f"{first.name}, context {first.context}, {passes}; times expected (floor); GB = 1e9 bytes")
    table = Table(box=None, padding=(0, 1))
    columns = ["device", "precision", "weights", "K/V", "remains", "first token, s", "tokens/s", "verdict"]
    assumed = plans[0].fewer
    if assumed is not None:
        columns[7:7] = ["first token (*)", "K/V (*)"]
    for column in columns:
        words = column in ("device", "precision", "verdict")
        table.add_column(column, justify="left" if words else "right", no_wrap=column != "verdict")
    for p in plans:
        m = p.memory
        table.add_row(
            p.machine.name,
            p.subject.precision,
            f"{m.weights / 1e9:.2f}",
            f"{m.cache / 1e9:.2f}",
            f"{m.remains / 1e9:.2f}",
            f"{p.first_token[1]:.2f} ({p.first_token[0]:.2f})",
            f"{p.tokens_per_second[1]:.1f} ({p.tokens_per_second[0]:.1f})",
            *((f"{p.fewer.first_token[1]:.2f}", f"{p.fewer.memory.cache / 1e9:.2f}") if p.fewer else ()),
            p.verdict,
        )
    out.print(table)
    if assumed is not None:
        out.print(
            f"(*) an assumption: a second pass in {assumed.twice} of {first.layers} layers, the share of the authors' "
            "figure of TroL-7B; `trol-edge gates` and `export --traversal auto` measure what a checkpoint needs",
            style="dim",
            soft_wrap=True,
        )
    from trol_edge.bundle.targets import is_gpu

    for p in plans if len(plans) == 1 else []:
        m, gpu = p.memory, is_gpu(p.machine.target)
        for what, size in (
            ("weights", m.weights),
            ("embedding table", m.embedding),
            (f"K/V cache, {m.cache_sets} sets", m.cache),
            ("activations", m.activations),
            ("runtime and libraries", m.runtime),
            ("operating system", m.system),
            ("remains for the rest of the robot", m.remains),
            ("peak of building the engines, alone", m.build),
        ):
            out.print(f"  {what:36}{size / 1e9:8.2f} GB")
        for s in p.stages:
            dims = ", ".join(f"{n} {name}" for name, n in s.dims.items())
            out.print(
                f"  {s.graph} ({dims}): {s.expected * 1e3:.1f} ms expected, {s.floor * 1e3:.1f} at least; "
                f"{s.flops / 1e9:.1f} G operations, {s.bytes / 1e9:.2f} GB"
                + (f", its engine moves {s.moved / 1e9:.2f}" if s.moved is not None else "")
                + f"; most of it is {s.bound}",
                soft_wrap=True,
            )
        if p.next_question is not None:
            out.print(f"  a second question about the picture: {p.next_question * 1e3:.0f} ms")
        if gpu:
            counted = p.subject.programs_of or "no engines, so what these move beyond weights and cache is not planned"
            out.print(f"  bytes counted in the programs of: {counted}", style="dim", soft_wrap=True)
        for note in p.machine.notes:
            out.print(f"  {note}", style="dim", soft_wrap=True)
        if gpu:
            from trol_edge.bundle.targets import NOT_YET
            from trol_edge.plan.rates import ARITHMETIC, BANDWIDTH

            out.print(
                f"  expected: {BANDWIDTH:.0%} of the bandwidth, "
                + ", ".join(f"{rate:.0%} of {kind}" for kind, rate in ARITHMETIC.items())
                + f", from others' figures for other models (docs/results.md); {NOT_YET}",
                style="dim",
                soft_wrap=True,
            )
    for p in plans:
        if p.changes:
            out.print(
                f"{p.machine.name} {p.subject.precision} fits with: {'; '.join(p.changes)}",
                soft_wrap=True,
            )
