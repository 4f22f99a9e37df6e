"""A table of machines that a robot may carry: what is published about them, and where. Nothing here was measured.

Peaks follow one rule, checked against NVIDIA's sparse TOPS: FP16 = 2 x multiply-adds per clock and SM x SMs x clock.
INT8, and FP8 where there are units for it, reach twice that. "unverified" names fields that no source states outright.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

from trol_edge.bundle.strict import from_dict
from trol_edge.bundle.targets import TARGETS, is_gpu
from trol_edge.errors import UsageError
from trol_edge.machine.cpus import PROCESSORS
from trol_edge.machine.table import require
from trol_edge.reading import guard, read_json_value

MIB = 1 << 20
FP32_FMA = 128  # multiply-adds per clock and SM, on all of these


@dataclasses.dataclass(frozen=True)
class Mode:
    """A power mode: the GPU's clock, and the memory's read bandwidth at its clock."""

    name: str
    gpu_mhz: float
    gb_per_s: float  # a GB is 1e9 bytes


@dataclasses.dataclass(frozen=True)
class Device:
    """One machine. A JSON file with these fields can describe another (`trol-edge plan --show-device NAME`)."""

    name: str
    title: str
    target: str  # a name from `trol-edge targets`
    memory_bytes: int  # memory that Linux sees; for a desktop GPU, its own memory
    os_bytes: int  # taken after boot without a desktop; for a desktop GPU, taken by the driver
    desktop_bytes: int  # taken in addition by a desktop
    sms: int
    fp16_fma: int  # multiply-adds per clock and SM, in FP16 with FP32 sums
    fp8: bool  # whether it has FP8 units
    modes: tuple[Mode, ...]  # the first one is the default
    sources: tuple[str, ...]
    unverified: tuple[str, ...] = ()

    def flops(self, mode: Mode, arithmetic: str) -> float:
        """Peak operations per second in "float32", "float16", "int8" or "fp8"; a multiply-add is two."""
        doubled = 2 * self.fp16_fma
        fma = {"float32": FP32_FMA, "float16": self.fp16_fma, "int8": doubled, "fp8": doubled}[arithmetic]
        return 2.0 * fma * self.sms * mode.gpu_mhz * 1e6


_ORIN = ("Orin data sheets and NVIDIA's product pages (TOPS, bandwidth, clocks)",)
_NANO = (
    *_ORIN,
    "hokwangchoi/jetson-orin-nano-benchmarks (tegrastats: 7607 MB in all, 519 MB used headless, EMC 3199 MHz)",
    "ericxliu.me: about 6.8 GB free after boot headless, 5.2 GB with a desktop",
)
_GEFORCE = ("NVIDIA's and reviewers' specifications; FP16 with FP32 sums runs at half rate on GeForce",)
_LIKE_NANO = "os_bytes and desktop_bytes are Orin Nano's"


def _orin(name: str, title: str, mib: int, sms: int, modes: tuple[Mode, ...], *unverified: str) -> Device:
    sources, unsure = (_NANO, unverified) if name == "orin-nano-8gb" else (_ORIN, (_LIKE_NANO, *unverified))
    return Device(
        name=name,
        title=title,
        target="jetson-jp6",
        memory_bytes=mib * MIB,
        os_bytes=800_000_000,
        desktop_bytes=1_600_000_000,
        sms=sms,
        fp16_fma=1024,
        fp8=False,
        modes=modes,
        sources=sources,
        unverified=unsure,
    )


def _desktop(
    name: str, gib: int, sms: int, mhz: float, gb_per_s: float, fp8: bool, title: str = "", fma: int = 256
) -> Device:
    unsure = ("os_bytes: drivers differ in what they take",)
    modes = (Mode("default", mhz, gb_per_s),)
    memory, full = gib * 1024 * MIB, title or f"GeForce {name.upper().replace('-', ' ')}"
    return Device(
        name=name,
        title=full,
        target="rtx",
        memory_bytes=memory,
        os_bytes=500_000_000,
        desktop_bytes=700_000_000,
        sms=sms,
        fp16_fma=fma,
        fp8=fp8,
        modes=modes,
        sources=_GEFORCE,
        unverified=unsure,
    )


DEVICES = {
    device.name: device
    for device in (
        _orin(
            "orin-nano-4gb",
            "Jetson Orin Nano 4GB",
            3500,
            4,
            (Mode("10W", 625, 34), Mode("MAXN_SUPER", 1020, 51)),
            "memory_bytes",
        ),
        _orin(
            "orin-nano-8gb",
            "Jetson Orin Nano 8GB",
            7607,
            8,
            (Mode("15W", 612, 68.3), Mode("MAXN_SUPER", 1020, 102.4)),
        ),
        _orin(
            "orin-nx-8gb",
            "Jetson Orin NX 8GB",
            7607,
            8,
            (Mode("20W", 765, 102.4), Mode("MAXN_SUPER", 1173, 102.4)),
            "memory_bytes",
        ),
        _orin(
            "orin-nx-16gb",
            "Jetson Orin NX 16GB",
            15643,
            8,
            (Mode("MAXN", 918, 102.4), Mode("MAXN_SUPER", 1173, 102.4)),
        ),
        _orin("agx-orin-32gb", "Jetson AGX Orin 32GB", 30536, 14, (Mode("MAXN", 930, 204.8),)),
        _orin(
            "agx-orin-64gb",
            "Jetson AGX Orin 64GB",
            62817,
            16,
            (Mode("MAXN", 1300, 204.8), Mode("50W", 1020, 204.8), Mode("30W", 612, 204.8), Mode("15W", 510, 136.5)),
            "memory clock of the modes 50W and 30W",
        ),
        Device(
            name="agx-thor",
            title="Jetson AGX Thor (T5000)",
            target="jetson-jp72",
            memory_bytes=125772 * MIB,
            os_bytes=1_500_000_000,
            desktop_bytes=1_600_000_000,
            sms=20,
            fp16_fma=4096,
            fp8=True,
            modes=(Mode("MAXN", 1575, 273),),
            sources=("NVIDIA's product page; others measured 206 TFLOPS FP16, 516 TOPS INT8, 254 GB/s read",),
            unverified=("os_bytes", "desktop_bytes"),
        ),
        Device(
            name="thor-t4000",
            title="Jetson T4000",
            target="jetson-jp72",
            memory_bytes=62817 * MIB,
            os_bytes=1_500_000_000,
            desktop_bytes=1_600_000_000,
            sms=12,
            fp16_fma=4096,
            fp8=True,
            modes=(Mode("MAXN", 1530, 273),),
            sources=("NVIDIA's JetPack 7.1 page: 1200 sparse FP4 TFLOPS, 64 GB",),
            unverified=("everything but 64 GB and 273 GB/s: derived from the sparse FP4 figure",),
        ),
        _desktop("rtx-3060", 12, 28, 1777, 360, False),
        _desktop("rtx-4060", 8, 24, 2460, 272, True),
        _desktop("rtx-4070", 12, 46, 2475, 504, True),
        _desktop("rtx-4090", 24, 128, 2520, 1008, True),
        _desktop("rtx-5070", 12, 48, 2512, 672, True),
        _desktop("rtx-5090", 32, 170, 2407, 1792, True),
        _desktop("rtx-a2000", 12, 26, 1200, 288, False, "RTX A2000 12GB", 512),
        _desktop("rtx-2000-ada", 16, 22, 2130, 224, True, "RTX 2000 Ada", 512),
    )
}


def find(text: str) -> tuple[Device, Mode]:
    """Find a device by "name", "name:mode" or the path of a JSON file ("file.json:mode"). Modes ignore case.

    Raises UsageError if there is none, and says how to describe one.
    """
    name, _, mode = text.partition(":")
    if name in DEVICES:
        device = DEVICES[name]
    elif name.endswith(".json"):
        device = _read(Path(name))
    else:
        raise UsageError(
            f"device {name!r} is not in the table ({', '.join((*DEVICES, *PROCESSORS))}, host). Describe yours: "
            "trol-edge plan --show-device orin-nano-8gb > mine.json, change what differs, and give --device mine.json"
        )
    for found in device.modes:
        if not mode or found.name.lower() == mode.lower():
            return device, found
    names = ", ".join(m.name for m in device.modes)
    raise UsageError(f"device {device.name} has no mode {mode!r} in the table; there are {names}")


def _read(path: Path) -> Device:
    advice = "Compare with the output of trol-edge plan --show-device orin-nano-8gb"
    data = read_json_value(path, UsageError, advice)
    with guard(path, UsageError, advice):
        device = from_dict(Device, data, str(path), UsageError, advice)
    numbers = {
        f"mode {m.name}: {k}": v for m in device.modes for k, v in (("gpu_mhz", m.gpu_mhz), ("gb_per_s", m.gb_per_s))
    }
    numbers |= {"memory_bytes": device.memory_bytes, "sms": device.sms, "fp16_fma": device.fp16_fma}
    wrong = [] if device.modes else ["no modes"]
    if not is_gpu(device.target):
        wrong.append(f"target {device.target!r} is not one of {', '.join(filter(is_gpu, TARGETS))}")
    require(path, device, numbers, wrong, advice)
    return device
