"""The verbs targets, build and doctor, about this machine and its engines."""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from trol_edge.cli.show import Form, Json, err, out, phases, print_json
from trol_edge.machine.identity import peak_memory


def targets(
    best: Annotated[bool, typer.Option("--best", help="Print the best target on this machine, and why.")] = False,
    as_json: Json = False,
) -> None:
    """List the targets, which of them this machine can build and run now, and why not the others."""
    from trol_edge.bundle.targets import NOT_YET, TARGETS, is_gpu
    from trol_edge.runtimes import doctor as room

    if best:
        name, why = room.best()
        if as_json:
            print_json({"target": name, "why": why})
            return
        print(name)
        err.print(f"target {name}: {why}", soft_wrap=True)
        return
    found = {status.target: status for status in room.statuses()}
    if as_json:
        print_json({n: dataclasses.asdict(t) | dataclasses.asdict(found[n]) for n, t in TARGETS.items()})
        return
    table = Table(box=None, padding=(0, 1))
    for column in ("target", "machine", "library", "precisions", "builds", "runs"):
        table.add_column(column, no_wrap=column in ("target", "builds", "runs"))
    reasons: dict[str, list[str]] = {}
    for name, target in TARGETS.items():
        status = found[name]
        builds = "-" if not target.gpu else "yes" if status.builds else "no"
        runs = ("yes" if not target.gpu else "yes*") if status.runs else "no"
        row = (name, target.machine, status.found or target.library, " ".join(target.precisions), builds, runs)
        table.add_row(*row)
        for why, what in ((status.why_no_build, "build"), (status.why_no_run, "run")):
            if why and not (what == "run" and why == status.why_no_build):
                reasons.setdefault(why, []).append(f"{name} ({what})" if status.builds else name)
    out.print(table)
    for why, names in reasons.items():
        out.print(f"no {', '.join(names)}: {why}", soft_wrap=True)
    if any(status.runs and is_gpu(name) for name, status in found.items()):
        out.print(f"* {NOT_YET}")
    out.print("What is missing, and why:")
    for name, target in TARGETS.items():
        out.print(f"  {name}: {'; '.join(target.missing)}", style="dim", soft_wrap=True)


def build(
    bundle: Annotated[Path, typer.Argument(help="Bundle folder, exported with a GPU target.")],
    target: Annotated[
        str | None, typer.Option(help="Target to build for (see trol-edge targets).  [default: the bundle's own]")
    ] = None,
    memory: Annotated[
        float | None, typer.Option(help="Memory of the device in GB, which engines and K/V cache must fit.")
    ] = None,
    workspace: Annotated[float | None, typer.Option(help="Most scratch memory of one layer, in GB.")] = None,
    engines: Annotated[
        Form | None,
        typer.Option(
            help="Two engines for the whole decoder, or one for each of its layers.  [default: whole; on a board "
            "layers, if whole would leave less than half of the memory free]"
        ),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Build even if the present engines are valid.")] = False,
    as_json: Json = False,
) -> None:
    """Build a bundle's TensorRT engines, on the GPU that runs them, or on any machine with TensorRT for RTX."""
    from trol_edge.bundle.manifest import Bundle
    from trol_edge.runtimes.trt import build as trt_build

    start = time.perf_counter()
    with phases(quiet=as_json) as progress:
        done = trt_build.build(
            Bundle(bundle),
            target,
            memory_bytes=None if memory is None else int(memory * 1e9),
            workspace_bytes=None if workspace is None else int(workspace * 1e9),
            force=force,
            by_layer=None if engines is None else engines is Form.LAYERS,
            progress=progress,
        )
    seconds, peak = time.perf_counter() - start, peak_memory()
    if as_json:
        data = dataclasses.asdict(done.engines) | {"built": done.built, "reason": done.reason, "form": done.form}
        print_json(data | {"folder": str(done.folder), "seconds": seconds, "peak_bytes": peak})
        return
    if done.form:
        out.print(done.form, soft_wrap=True)
    if not done.built:
        out.print(f"{done.folder}: up to date; --force builds again")
        return
    out.print(f"built, because: {done.reason}", soft_wrap=True)
    for name, engine in done.engines.engines.items():
        own = engine.weight_bytes  # without shared ones
        times = f"{engine.bytes / own:.3f} x its weights" if own else "no weights"
        out.print(
            f"{name:14} {engine.bytes / 1e6:9.1f} MB ({times}), {engine.seconds:5.1f} s, "
            f"{len(engine.profiles)} profile(s); {', '.join(f'{n} {kind}' for kind, n in engine.layers.items())}",
            soft_wrap=True,
        )
    out.print(
        f"{done.engines.key.library}, {done.engines.precision}: {done.folder}, {seconds:.0f} s, "
        f"peak memory {peak / 1e9:.2f} GB"
    )


def doctor(
    bundle: Annotated[Path | None, typer.Argument(help="Bundle folder to check, too.")] = None,
    as_json: Json = False,
) -> None:
    """Say what this machine is, what runs here and what is wrong. If something needed does not work, exit with 1."""
    from trol_edge.runtimes import doctor as room

    checks = room.examine(bundle)
    if as_json:
        print_json({"checks": [dataclasses.asdict(check) for check in checks]})
    else:
        for check in checks:
            mark = "ok" if check.good else "!!" if check.needed else "--"
            out.print(f"{mark} {check.what}: {check.text}", soft_wrap=True)
        wrong = [check.what for check in checks if check.needed and not check.good]
        out.print(f"does not work: {', '.join(wrong)}" if wrong else "nothing that is needed is wrong")
    if any(check.needed and not check.good for check in checks):
        raise typer.Exit(1)
