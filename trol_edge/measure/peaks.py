"""The roofs of the roofline: the highest rates of this machine's memory and processors."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from trol_edge.bundle.manifest import Bundle
from trol_edge.bundle.targets import is_gpu
from trol_edge.machine import sensors
from trol_edge.machine.devices import DEVICES
from trol_edge.machine.identity import read as identify
from trol_edge.measure.record import (
    Peaks,
)


def machine_peaks(machine: sensors.Sensors, bundles: Sequence[Bundle]) -> Peaks | None:
    """The machine's highest rates: measured for a CPU, from the table of devices for a Jetson's GPU, else None."""
    if any(is_gpu(bundle.manifest.target) for bundle in bundles):
        return table_peaks(machine)
    threads = len(os.sched_getaffinity(0))
    return Peaks(
        matmul_rate(), read_rate(threads), f"measured: numpy's float32 MatMul, memory read by {threads} threads"
    )


def table_peaks(machine: sensors.Sensors) -> Peaks | None:
    """FP16 and memory rates of this Jetson in its power mode; None if `trol_edge.machine.devices` lacks either."""
    here = identify(machine.root).jetson
    if here is None:
        return None
    title = "Jetson " + here.module.removesuffix(" (developer kit)")
    name = str(machine.identity()["power_mode_name"]).removeprefix("MODE_")
    for device in DEVICES.values():
        for mode in device.modes:
            if (device.title, mode.name) == (title, name):
                source = f"table of devices: {device.title}, {mode.name}, FP16"
                return Peaks(device.flops(mode, "float16"), 1e9 * mode.gb_per_s, source)
    return None


def read_rate(threads: int, size: int = 256 << 20, repeats: int = 5) -> float:
    """The best of `repeats` reads of `size` bytes of memory by all threads, in bytes per second."""
    parts = np.array_split(np.ones(size // 8), threads)
    rates = []
    with ThreadPoolExecutor(threads) as pool:
        for _ in range(repeats):
            start = time.monotonic()
            list(pool.map(np.max, parts))
            rates.append(size / (time.monotonic() - start))
    return max(rates)


def matmul_rate(size: int = 1024, repeats: int = 5) -> float:
    """The best of `repeats` float32 products of square matrices, in floating point operations per second."""
    a = np.ones((size, size), np.float32)
    rates = []
    for _ in range(repeats + 1):
        start = time.monotonic()
        a @ a
        rates.append(2 * size**3 / (time.monotonic() - start))
    return max(rates[1:])
