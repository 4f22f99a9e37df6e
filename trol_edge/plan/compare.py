"""Compares plans for several machines and precisions and finds the best."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence

from trol_edge.machine.devices import DEVICES
from trol_edge.plan.estimate import Planned, plan
from trol_edge.plan.rates import Platform
from trol_edge.plan.subject import Subject, Workload

QUALITY = ("fp32", "fp16", "fp8", "int8", "int8-dynamic", "int4", "int4-dynamic")  # best first


def device_names(bundle: Subject | None) -> list[str]:
    """Devices to plan for if the user names none: this machine ("host") for a CPU's bundle, else every Jetson."""
    if bundle is not None and bundle.target == "cpu":
        return ["host"]
    return [name for name, device in DEVICES.items() if device.target.startswith("jetson")]


def compare(
    machines: Iterable[Platform],
    subject: Callable[[str, str], Subject],
    work: Workload,
    precisions: Sequence[str] | None = None,
    *,
    desktop: bool,
    reserve: int,
    progress: Callable[[str], None] = lambda line: None,
    fewer: Callable[[str, str], Subject] | None = None,
) -> list[Planned]:
    """Plan each precision on each machine. precisions: None plans all that the machine supports.

    subject(target, precision) makes what is planned, and fewer, if given, the same with fewer second passes. If a
    single precision is asked for and does not fit, the smaller ones are tried, too.
    """
    found = []
    for machine in machines:
        wanted = precisions or machine.precisions
        for precision in wanted:
            progress(f"{machine.name} {precision}")
            finer = [p for p in QUALITY if p in machine.precisions]
            below = finer[finer.index(precision) + 1 :] if len(wanted) == 1 and precision in finer else []
            found.append(
                plan(
                    subject(machine.target, precision),
                    machine,
                    work,
                    desktop=desktop,
                    reserve=reserve,
                    fewer=None if fewer is None else fewer(machine.target, precision),
                    smaller=functools.partial(map, functools.partial(subject, machine.target), below),
                )
            )
    return found


def best(plans: Sequence[Planned], first_token: float | None, tokens_per_second: float | None) -> Planned | None:
    """The finest precision on a machine that fits and is expected to reach the goals (seconds, tokens per second)."""
    for found in sorted(plans, key=lambda p: (*QUALITY, p.subject.precision).index(p.subject.precision)):
        early = first_token is None or found.first_token[1] <= first_token
        fast = tokens_per_second is None or found.tokens_per_second[1] >= tokens_per_second
        if found.verdict != "does not fit" and early and fast:
            return found
    return None
