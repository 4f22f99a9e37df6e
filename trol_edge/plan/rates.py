"""Rates of machines: derived from the device table, or measured here."""

from __future__ import annotations

import dataclasses

from trol_edge.bundle.targets import TARGETS
from trol_edge.machine.cpus import Processor
from trol_edge.machine.devices import Device, Mode

# Shares of their peaks that GPUs reach; `python -m tests.bench.plan_check` compares with others' measurements.
# All come from Orin Nano. Bandwidth and start-up are fitted to the decode rates of Phi-3.5 3.8B and Llama-3.2 3B in two
# power modes (NVIDIA, MLC INT4), FP16 to vision and prefill of Cosmos-Reason2-2B, and INT8 to YOLOv8n, which is 1.27
# times as fast in INT8 as in FP16. FP8 is assumed to be like INT8.
BANDWIDTH = 0.85
ARITHMETIC = {"float32": 0.45, "float16": 0.45, "int8": 0.29, "fp8": 0.29}
OPERATOR_CYCLES = 12_000  # GPU clock cycles to start a kernel and let it drain: 12 us at 1 GHz
PACKED = "packed"  # products of packed 4-bit weights on a CPU, which round their inputs to 8 bits
# The same for a processor of the table. The shares of 8 and 4 bits were read by hand on one core of a busy 2.1 GHz Xeon
# (1.08 and 0.13 TFLOP/s in products of 256 x 2048 x 256); the others are assumed. None is checked on a board.
CPU_BANDWIDTH = 0.8
CPU_ARITHMETIC = {"float32": 0.5, "int8": 0.25, PACKED: 0.25}
CPU_CYCLES = 5_000  # clock cycles to start an operator of ONNX Runtime; 2 us at 2.4 GHz
Points = tuple[tuple[int, float], ...]


@dataclasses.dataclass(frozen=True)
class Rates:
    """Throughput curves: each is a series of (size, rate) points, interpolated log-linearly.

    arithmetic: operations per second, by data type and by the operations of one matmul; "attention", and products of
    4-bit weights (PACKED), have their own curves where their rates differ. reads: bandwidth for weights and cache, by
    the bytes of a graph's weights (what fits the processor's caches is read faster). touches: bandwidth for
    activations, by the bytes of one operator. On a CPU this time adds to a matmul's; it is not hidden by it. stored:
    bytes per second of weights of a type whose unpacking is slower than memory. operator, product, attention, run:
    seconds to start an element-wise operator, a matmul, an attention, a graph. fused: element-wise operators and copies
    are fused into their neighbours and take no time.
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
    """A device in one of its power modes, or this machine."""

    name: str
    title: str
    target: str
    memory_bytes: int
    os_bytes: int
    desktop_bytes: int
    precisions: tuple[str, ...]  # compared if the user chooses none
    peak: Rates
    reached: Rates
    notes: tuple[str, ...]


def _rates(flops: dict[str, float], read: float, start: float, fused: bool) -> Rates:
    """The same rates at every size. flops: per second, by type; read: bytes per second; start: s of any operator."""
    return Rates(
        arithmetic={kind: ((1, rate),) for kind, rate in flops.items()},
        reads=((1, read),),
        touches=((1, read),),
        stored={},
        operator=start,
        product=start,
        attention=start,
        run=0.0,
        fused=fused,
    )


def platform_of(device: Device, mode: Mode) -> Platform:
    """Make a platform from a device of the table and the efficiencies above."""
    kinds = [kind for kind in ARITHMETIC if kind != "fp8" or device.fp8]
    flops = {kind: device.flops(mode, kind) for kind in kinds}
    read = mode.gb_per_s * 1e9
    peak = dataclasses.replace(_rates(flops, read, 0.0, fused=True), touches=())  # the floor has none
    shares = {kind: flops[kind] * ARITHMETIC[kind] for kind in kinds}
    reached = _rates(shares, read * BANDWIDTH, OPERATOR_CYCLES / (mode.gpu_mhz * 1e6), fused=True)
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


def platform_of_processor(processor: Processor) -> Platform:
    """Make a platform from a processor of the table, with the shares of its peaks that are assumed above.

    ONNX Runtime multiplies 4-bit weights as 8-bit ones, by dot products.
    """
    flops = {kind: processor.flops("float32" if kind == "float32" else "int8") for kind in CPU_ARITHMETIC}
    read = processor.gb_per_s * 1e9
    peak = _rates(flops, read, 0.0, fused=False)
    shares = {kind: flops[kind] * share for kind, share in CPU_ARITHMETIC.items()}
    reached = _rates(shares, read * CPU_BANDWIDTH, CPU_CYCLES / (processor.mhz * 1e6), fused=False)
    return Platform(
        name=processor.name,
        title=processor.title,
        target="cpu",
        memory_bytes=processor.memory_bytes,
        os_bytes=processor.os_bytes,
        desktop_bytes=processor.desktop_bytes,
        precisions=TARGETS["cpu"].precisions,
        peak=peak,
        reached=reached,
        notes=(
            *(f"unverified: {what}" for what in processor.unverified),
            f"expected: {CPU_BANDWIDTH:.0%} of the bandwidth, "
            + ", ".join(f"{share:.0%} of {kind}" for kind, share in CPU_ARITHMETIC.items())
            + " products: assumed, and not checked on this processor; --device host measures the machine it runs on",
        ),
    )


def platform_of_host(rates: Rates, memory_bytes: int, available_bytes: int) -> Platform:
    """Make a platform from this machine's measured rates (`runtimes/rates.py`).

    Peak and reached rates are the same then, so floor and expected time differ by overheads only.
    """
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
