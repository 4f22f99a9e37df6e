"""Reads what this machine is from procfs and a few files, for doctor, profile and the record of a passed self-test.

All paths are under a root, so that a recorded tree of another machine can be read. What a file does not say stays empty
or 0; nothing here raises. Module and release numbers are those that NVIDIA's jetson tools and jetson-stats know.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import functools
import hashlib
import os
import re
import resource
import sys
from collections.abc import Callable
from pathlib import Path

_M_ARENA_MAX = -8  # option of mallopt, from glibc's malloc.h

# Part number of a Jetson module, as in its device tree -> its name.
MODULES = {
    "p3767-0000": "Orin NX 16GB",
    "p3767-0001": "Orin NX 8GB",
    "p3767-0003": "Orin Nano 8GB",
    "p3767-0004": "Orin Nano 4GB",
    "p3767-0005": "Orin Nano 8GB (developer kit)",
    "p3701-0000": "AGX Orin 32GB (developer kit)",
    "p3701-0004": "AGX Orin 32GB",
    "p3701-0005": "AGX Orin 64GB",
    "p3834-0008": "AGX Thor (T5000)",
}
# Jetson Linux (L4T) release -> JetPack and the TensorRT that comes with it. The longest listed prefix counts.
JETPACKS: dict[str, tuple[str, tuple[int, int]]] = {
    "36.3": ("6.0", (8, 6)),
    "36.4.0": ("6.1", (10, 3)),
    "36.4": ("6.2", (10, 3)),
    "36.5": ("6.2.2", (10, 3)),
    "38.2": ("7.0", (10, 13)),
    "38.4": ("7.1", (10, 13)),
    "39.2": ("7.2", (10, 16)),
}
# (implementer, part) of an ARM core -> its name, which /proc/cpuinfo does not give.
CORES = {("0x41", "0xd42"): "Cortex-A78AE", ("0x41", "0xd83"): "Neoverse-V3AE", ("0x41", "0xd0b"): "Cortex-A76"}


@dataclasses.dataclass(frozen=True)
class Jetson:
    """The Jetson module of this machine."""

    module: str  # "Orin Nano 8GB", or the part number if it is not in MODULES
    part: str  # "p3767-0003"
    l4t: str  # "36.4.3"
    jetpack: str  # "6.2"; "" for a release that is not in JETPACKS
    tensorrt: tuple[int, int] | None  # the version that this JetPack ships


@dataclasses.dataclass(frozen=True)
class Machine:
    """The identity of a machine."""

    model: str  # the board or the computer: "NVIDIA Jetson Orin Nano Developer Kit"
    system: str  # "Ubuntu 22.04.5 LTS"
    kernel: str  # release: "5.15.148-tegra"
    cpu: str  # "6 x Cortex-A78AE"
    cores: int  # number of cores that are online
    memory_bytes: int
    available_bytes: int
    jetson: Jetson | None
    fingerprint: str  # sha256 (hex) of serial number or machine id and CPU: stable, but does not reveal the number


def read(root: str | os.PathLike[str] = "/") -> Machine:
    """Identify this machine, or the one whose files are under `root`."""
    at = Path(root)

    def text(path: str) -> str:
        try:
            return (at / path).read_bytes().replace(b"\0", b"\n").decode("utf-8", "replace").strip()
        except OSError:
            return ""

    memory = _meminfo(text("proc/meminfo"))
    size, available = (memory.get(name, 0) for name in ("MemTotal", "MemAvailable"))
    name = re.search(r'^PRETTY_NAME="?([^"\n]*)', text("etc/os-release"), re.MULTILINE)
    core, cores = _cpu(text("proc/cpuinfo"))
    identity = text("proc/device-tree/serial-number") or text("etc/machine-id") or text("proc/sys/kernel/hostname")
    return Machine(
        model=text("proc/device-tree/model") or text("sys/class/dmi/id/product_name"),
        system=name[1] if name else "",
        kernel=text("proc/sys/kernel/osrelease"),
        cpu=f"{cores} x {core}" if core else "",
        cores=cores,
        memory_bytes=size,
        available_bytes=available,
        jetson=_jetson(text),
        fingerprint=hashlib.sha256(f"{identity}\n{core}".encode()).hexdigest(),
    )


@functools.cache
def has_amx() -> bool:
    """Whether the processor multiplies matrices of 8 bits (AMX)."""
    try:
        flags = re.search(r"^flags\s*:(.*)$", Path("/proc/cpuinfo").read_text(encoding="utf-8"), re.MULTILINE)
    except OSError:
        return False
    return flags is not None and "amx_int8" in flags[1].split()


def available_memory(swap: bool = False) -> int | None:
    """Bytes of memory (and swap) that programs could get now; None if the system does not say (not Linux)."""
    try:
        text = Path("/proc/meminfo").read_text(encoding="ascii")
    except OSError:
        return None
    memory = _meminfo(text)
    if "MemAvailable" not in memory:
        return None
    return memory["MemAvailable"] + (memory.get("SwapFree", 0) if swap else 0)


def _meminfo(text: str) -> dict[str, int]:
    """The entries of /proc/meminfo, in bytes."""
    return {name: 1024 * int(size) for name, size in re.findall(r"^(\w+):\s+(\d+) kB", text, re.MULTILINE)}


def peak_memory() -> int:
    """The largest resident size that this process has had, in bytes.

    Not ru_maxrss, where the system says it otherwise: on Linux that begins at the peak of the process's parent.
    """
    try:
        status = Path("/proc/self/status").read_text(encoding="ascii")
        return 1024 * int(status.split("VmHWM:")[1].split()[0])
    except (OSError, IndexError):
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def reset_peak_memory() -> None:
    """Let the kernel count the peak of this process from here on, where it can."""
    with contextlib.suppress(OSError):  # without it the peak is that of all so far
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def free_pages() -> None:
    """Give memory that is freed but kept by the C library back to the machine."""
    if (trim := from_libc("malloc_trim")) is not None:
        trim(0)


def share_arenas() -> None:
    """Let all threads allocate from two arenas of the C library (glibc) instead of one arena each.

    The scratch of a prompt comes from the arena of the thread that asks. With four threads, the free memory that arenas
    keep between blocks in use varies by tens of MB. The change is for the whole process; a setting of the user's
    environment (MALLOC_ARENA_MAX, GLIBC_TUNABLES) is not touched.
    """
    if "MALLOC_ARENA_MAX" in os.environ or "glibc.malloc.arena_max" in os.environ.get("GLIBC_TUNABLES", ""):
        return
    if (mallopt := from_libc("mallopt")) is not None:
        mallopt(_M_ARENA_MAX, 2)


def from_libc(name: str) -> Callable[..., int] | None:
    """A function of glibc, or None if this C library lacks it."""
    try:
        found: Callable[..., int] = getattr(ctypes.CDLL(None), name)
        return found
    except (OSError, AttributeError, TypeError):  # TypeError: there is no CDLL(None) on Windows
        return None


def _cpu(cpuinfo: str) -> tuple[str, int]:
    """The name of the cores and how many are online; a Jetson's power mode may turn some off."""
    cores = len(re.findall(r"^processor\s*:", cpuinfo, re.MULTILINE))
    named = re.search(r"^model name\s*:\s*(.+)$", cpuinfo, re.MULTILINE)
    arm = re.findall(r"^CPU (?:implementer|part)\s*:\s*(\w+)$", cpuinfo, re.MULTILINE)
    name = named[1].strip() if named else ""
    if arm and not name:
        name = CORES.get((arm[0], arm[1]), f"ARM core {arm[0]}/{arm[1]}") if len(arm) > 1 else ""
    return name, cores


def _jetson(text: Callable[[str], str]) -> Jetson | None:
    """Recognise a Jetson by its device tree (which a container sees, too) or its release file."""
    compatible, release = text("proc/device-tree/compatible"), text("etc/nv_tegra_release")
    if "nvidia,tegra" not in compatible and not release:
        return None
    parts = re.findall(r"p\d{4}-\d{4}", compatible)  # carrier board and module, the module listed again by itself
    # Some releases name carrier boards only; the flashing tool's note has the module then.
    parts += [f"p{part}" for part in re.findall(r"^TNSPEC\s+(\d{4}-\d{4})", text("etc/nv_boot_control.conf"), re.M)]
    part = next((p for p in parts if p in MODULES), parts[-1] if parts else "")
    found = re.search(r"R(\d+) \(release\), REVISION: ([\d.]+)", release)
    l4t = f"{found[1]}.{found[2]}" if found else ""
    known = [prefix for prefix in JETPACKS if f"{l4t}.".startswith(f"{prefix}.")]
    jetpack, tensorrt = JETPACKS[max(known, key=len)] if known else ("", None)
    return Jetson(MODULES.get(part, part), part, l4t, jetpack, tensorrt)
