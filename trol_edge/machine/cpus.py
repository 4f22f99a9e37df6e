"""A table of processors that run bundles of target cpu: what is published about them, and where. Nothing was measured.

Peaks are multiply-adds per clock and core times cores times clock. A core with two vector units of 128 bits makes 2 x 4
of FP32. Its dot product instructions (SDOT, UDOT; VNNI on x86) make four times as many of 8 bits. "unverified" names
fields that no source here states outright.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

from trol_edge.bundle.strict import from_dict
from trol_edge.errors import UsageError
from trol_edge.machine.table import require
from trol_edge.reading import guard, read_json_value

MIB = 1 << 20


@dataclasses.dataclass(frozen=True)
class Processor:
    """The processor and the memory of one machine."""

    name: str
    title: str
    memory_bytes: int  # memory that Linux sees
    os_bytes: int  # taken after boot without a desktop
    desktop_bytes: int  # taken in addition by a desktop
    cores: int
    mhz: float
    float32_fma: int  # multiply-adds per clock and core
    int8_fma: int  # the same of 8 bits with sums of 32
    gb_per_s: float  # peak of the memory; a GB is 1e9 bytes
    sources: tuple[str, ...]
    unverified: tuple[str, ...] = ()

    def flops(self, arithmetic: str) -> float:
        """Peak operations per second in "float32" or "int8"; a multiply-add is two."""
        fma = {"float32": self.float32_fma, "int8": self.int8_fma}[arithmetic]
        return 2.0 * fma * self.cores * self.mhz * 1e6


_UNITS = "multiply-adds per clock: two units of 128 bits with dot products, as Arm's optimization guides have them"
_SHARED = "gb_per_s: the memory's, of which the processor's clusters alone may reach less"
_TAKEN = "os_bytes and desktop_bytes"


def _pi(gib: int) -> Processor:
    return Processor(
        name=f"pi5-{gib}gb",
        title=f"Raspberry Pi 5 {gib}GB (4 Cortex-A76)",
        memory_bytes=gib * 1024 * MIB - 150 * MIB,
        os_bytes=300_000_000,
        desktop_bytes=500_000_000,
        cores=4,
        mhz=2400,
        float32_fma=8,
        int8_fma=32,
        gb_per_s=17,
        sources=(
            "threedots.ovh, circuitdigest.com: four Cortex-A76 at 2.4 GHz, LPDDR4X-4267 of 32 bits, a peak of 17 GB/s",
        ),
        unverified=("memory_bytes", _TAKEN, _UNITS),
    )


def _orin(name: str, title: str, mib: int, cores: int, mhz: float, gb_per_s: float, *unverified: str) -> Processor:
    return Processor(
        name=f"{name}-cpu",
        title=f"Jetson {title}, its {cores} Cortex-A78AE alone",
        memory_bytes=mib * MIB,
        os_bytes=800_000_000,
        desktop_bytes=1_600_000_000,
        cores=cores,
        mhz=mhz,
        float32_fma=8,
        int8_fma=32,
        gb_per_s=gb_per_s,
        sources=(
            "brojogopalsapui.com, after NVIDIA's Orin Nano Super data sheet: six Cortex-A78AE at 1.7 GHz, 102 GB/s",
            "memory as in trol_edge/machine/devices.py",
        ),
        unverified=(*unverified, _SHARED, _UNITS),
    )


def _x86(
    name: str, title: str, gib: int, cores: int, mhz: float, fma: int, eight: int, gb_per_s: float, *sources: str
) -> Processor:
    return Processor(
        name=name,
        title=title,
        memory_bytes=gib * 1024 * MIB - 400 * MIB,
        os_bytes=700_000_000,
        desktop_bytes=1_000_000_000,
        cores=cores,
        mhz=mhz,
        float32_fma=fma,
        int8_fma=eight,
        gb_per_s=gb_per_s,
        sources=sources,
        unverified=(
            "memory_bytes",
            _TAKEN,
            "mhz: the highest clock, which all cores together may not keep",
            "int8_fma",
        ),
    )


PROCESSORS = {
    processor.name: processor
    for processor in (
        _pi(4),
        _pi(8),
        _pi(16),
        _orin("orin-nano-8gb", "Orin Nano 8GB Super", 7607, 6, 1700, 102.4),
        _orin("orin-nx-16gb", "Orin NX 16GB", 15643, 8, 2000, 102.4, "cores", "mhz"),
        _orin("agx-orin-64gb", "AGX Orin 64GB", 62817, 12, 2200, 204.8, "cores", "mhz"),
        _x86(
            "n100-8gb",
            "Intel N100 (4 Gracemont cores, AVX-VNNI), 8GB of DDR5-4800",
            8,
            4,
            3400,
            8,
            32,
            38.4,
            "notebookcheck.com: four cores at up to 3.4 GHz, one channel of DDR5-4800 (64 bits: 38.4 GB/s)",
            "Wikipedia, Gracemont: AVX2, FMA3 and AVX-VNNI",
        ),
    )
}


def find(text: str) -> Processor | None:
    """The processor of that name, or of a JSON file with these fields; None for another device.

    Raises UsageError for a file with "cores" that is wrong otherwise.
    """
    if text in PROCESSORS or not text.endswith(".json"):
        return PROCESSORS.get(text)
    path, advice = Path(text), "Compare with the output of trol-edge plan --show-device pi5-8gb"
    data = read_json_value(path, UsageError, advice)
    if not isinstance(data, dict) or "cores" not in data:
        return None
    with guard(path, UsageError, advice):
        found = from_dict(Processor, data, str(path), UsageError, advice)
    sizes = ("memory_bytes", "cores", "mhz", "float32_fma", "int8_fma", "gb_per_s")
    require(path, found, {name: getattr(found, name) for name in sizes}, (), advice)
    return found
