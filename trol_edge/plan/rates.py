"""What machines do per second: by the device table, or measured here."""

from __future__ import annotations

import dataclasses

from trol_edge.bundle.targets import TARGETS
from trol_edge.machine.devices import Device, Mode

# What GPUs reach of their peaks; `python -m tests.bench.plan_check` compares with others' measurements.
# Bandwidth and start-up were set by the decode rates of Phi-3.5 3.8B and Llama-3.2 3B on Orin Nano in two power modes
# (NVIDIA, MLC INT4), FP16 by vision and prefill of Cosmos-Reason2-2B there, INT8 by YOLOv8n being 1.27 times as fast in
# INT8 as in FP16 there. FP8 is taken to be like INT8.
BANDWIDTH = 0.85
ARITHMETIC = {"float32": 0.45, "float16": 0.45, "int8": 0.29, "fp8": 0.29}
OPERATOR_CYCLES = 12_000  # of the GPU's clock, to start a kernel and let it drain: 12 us at 1 GHz
Points = tuple[tuple[int, float], ...]


@dataclasses.dataclass(frozen=True)
class Rates:
    """What a machine does per second, by how much it does: points (amount, per second), between which is interpolated.

    arithmetic: operations, by type and by the size of one product; "attention" has an entry of its own where its rate
    is another. reads: bytes of weights or cache, by the weights of the graph (what fits the processor's caches is read
    faster). touches: bytes of tensors between operators, by those of one operator; what products read and write waits
    for no arithmetic on a CPU. stored: bytes of weights of a type whose unpacking is slower than memory. operator,
    product, attention, run: seconds to start an element-wise operator, a product, an attention, a graph. fused:
    element-wise operators and copies are part of what stands beside them, and take no time.
    """

    arithmetic: dict[str, Points]
    reads: Points
    touches: Points
    stored: dict[str, float]
    operator: float
    product: float
    attention: float
    run: float
    fused: bool


@dataclasses.dataclass(frozen=True)
class Platform:
    """A device in one of its modes, or the machine at hand."""

    name: str
    title: str
    target: str
    memory_bytes: int
    os_bytes: int
    desktop_bytes: int
    precisions: tuple[str, ...]  # that are compared where none is chosen
    peak: Rates
    reached: Rates
    notes: tuple[str, ...]


def platform_of(device: Device, mode: Mode) -> Platform:
    """A device of the table with the efficiencies above."""
    kinds = [kind for kind in ARITHMETIC if kind != "fp8" or device.fp8]
    peak = Rates(
        arithmetic={kind: ((1, device.flops(mode, kind)),) for kind in kinds},
        reads=((1, mode.gb_per_s * 1e9),),
        touches=(),
        stored={},
        operator=0.0,
        product=0.0,
        attention=0.0,
        run=0.0,
        fused=True,
    )
    reached = dataclasses.replace(
        peak,
        arithmetic={kind: ((1, device.flops(mode, kind) * ARITHMETIC[kind]),) for kind in kinds},
        reads=((1, mode.gb_per_s * 1e9 * BANDWIDTH),),
        touches=((1, mode.gb_per_s * 1e9 * BANDWIDTH),),
        operator=OPERATOR_CYCLES / (mode.gpu_mhz * 1e6),
        product=OPERATOR_CYCLES / (mode.gpu_mhz * 1e6),
        attention=OPERATOR_CYCLES / (mode.gpu_mhz * 1e6),
    )
    target = TARGETS[device.target]
    precisions = tuple(p for p in target.precisions if p != "fp32" and (p != "fp8" or device.fp8))
    notes = tuple(f"unverified: {what}" for what in device.unverified)
    return Platform(
        name=f"{device.name}:{mode.name}",
        title=f"{device.title}, {mode.name}",
        target=device.target,
        memory_bytes=device.memory_bytes,
        os_bytes=device.os_bytes,
        desktop_bytes=device.desktop_bytes,
        precisions=precisions,
        peak=peak,
        reached=reached,
        notes=notes,
    )


def platform_of_host(rates: Rates, memory_bytes: int, available_bytes: int) -> Platform:
    """This machine, its rates measured (`runtimes/rates.py`): floor and expectation then differ by overheads only."""
    precisions = TARGETS["cpu"].precisions
    system = memory_bytes - available_bytes
    return Platform(
        name="host",
        title="this machine",
        target="cpu",
        memory_bytes=memory_bytes,
        os_bytes=system,
        desktop_bytes=0,
        precisions=precisions,
        peak=rates,
        reached=rates,
        notes=(),
    )
