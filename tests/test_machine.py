"""Which machine this is, by trees of the documented files of three Jetsons, a PC, and a machine that says nothing."""

from __future__ import annotations

import hashlib
import subprocess
import sys
from pathlib import Path

import pytest

from trol_edge.machine import identity as machine

ORIN_CPU = "".join(f"processor\t: {i}\nCPU implementer\t: 0x41\nCPU part\t: 0xd42\n\n" for i in range(6))
THOR_CPU = ORIN_CPU.replace("0xd42", "0xd83")
RELEASE = "# R{} (release), REVISION: {}, GCID: 1, BOARD: generic, EABI: aarch64, DATE: Fri Jan  1 00:00:00 UTC 2026\n"
TREES: dict[str, dict[str, str]] = {
    "orin-nano": {
        "proc/device-tree/model": "NVIDIA Jetson Orin Nano Engineering Reference Developer Kit Super\0",
        "proc/device-tree/compatible": "nvidia,p3768-0000+p3767-0005-super\0nvidia,p3767-0005\0nvidia,tegra234\0",
        "proc/device-tree/serial-number": "1420000000001\0",
        "etc/nv_tegra_release": RELEASE.format(36, "4.3"),
        "etc/os-release": 'NAME="Ubuntu"\nPRETTY_NAME="Ubuntu 22.04.5 LTS"\n',
        "proc/cpuinfo": ORIN_CPU,
        "proc/meminfo": "MemTotal:        7789568 kB\nMemAvailable:    6900000 kB\n",
        "proc/sys/kernel/osrelease": "5.15.148-tegra\n",
    },
    "agx-orin": {
        "proc/device-tree/model": "NVIDIA Jetson AGX Orin Developer Kit\0",
        "proc/device-tree/compatible": "nvidia,p3737-0000+p3701-0005\0nvidia,p3701-0005\0nvidia,tegra234\0",
        "etc/nv_tegra_release": RELEASE.format(39, "2.0"),
        "proc/cpuinfo": ORIN_CPU * 2,
    },
    "thor": {
        "proc/device-tree/model": "NVIDIA Jetson AGX Thor Developer Kit\0",
        "proc/device-tree/compatible": "nvidia,p4071-0000\0nvidia,tegra264\0",
        "etc/nv_boot_control.conf": "TNSPEC 3834-0008-400-L.0-1-2-jetson-agx-thor-devkit-\nTEGRA_CHIPID 0x26\n",
        "etc/nv_tegra_release": RELEASE.format(38, "4.0"),
        "proc/cpuinfo": THOR_CPU,
    },
    "pc": {
        "sys/class/dmi/id/product_name": "ThinkStation P3\n",
        "etc/machine-id": "0123456789abcdef0123456789abcdef\n",
        "proc/cpuinfo": "processor\t: 0\nmodel name\t: AMD EPYC\n\nprocessor\t: 1\nmodel name\t: AMD EPYC\n",
    },
    "silent": {},
}


def tree(folder: Path, name: str) -> Path:
    """The files of a machine below a folder."""
    for path, text in TREES[name].items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_text(text)
    return folder


@pytest.mark.parametrize(
    ("name", "jetson", "cpu"),
    [
        ("orin-nano", ("Orin Nano 8GB (developer kit)", "p3767-0005", "36.4.3", "6.2", (10, 3)), "6 x Cortex-A78AE"),
        ("agx-orin", ("AGX Orin 64GB", "p3701-0005", "39.2.0", "7.2", (10, 16)), "12 x Cortex-A78AE"),
        ("thor", ("AGX Thor (T5000)", "p3834-0008", "38.4.0", "7.1", (10, 13)), "6 x Neoverse-V3AE"),
        ("pc", None, "2 x AMD EPYC"),
        ("silent", None, ""),
    ],
)
def test_identity(name: str, jetson: tuple[object, ...] | None, cpu: str, tmp_path: Path) -> None:
    """Module, release, JetPack and its TensorRT; the CPU, which an ARM core tells in numbers."""
    found = machine.read(tree(tmp_path, name))
    assert (None if found.jetson is None else tuple(vars(found.jetson).values())) == jetson
    assert found.cpu == cpu
    if name == "orin-nano":
        assert found.model == "NVIDIA Jetson Orin Nano Engineering Reference Developer Kit Super"
        assert (found.system, found.kernel) == ("Ubuntu 22.04.5 LTS", "5.15.148-tegra")
        assert (found.memory_bytes, found.available_bytes) == (7789568 * 1024, 6900000 * 1024)


@pytest.mark.parametrize(
    ("release", "jetpack"), [("36 3.0", "6.0"), ("36 4.0", "6.1"), ("36 4.7", "6.2"), ("36 5.0", "6.2.2"), ("40 1", "")]
)
def test_releases(release: str, jetpack: str, tmp_path: Path) -> None:
    """The longest beginning of the release decides; an unknown newer one is reported as it is."""
    tree(tmp_path, "agx-orin")
    (tmp_path / "etc/nv_tegra_release").write_text(RELEASE.format(*release.split()))
    found = machine.read(tmp_path).jetson
    assert found is not None
    assert (found.jetpack, found.l4t) == (jetpack, release.replace(" ", "."))


def test_an_unknown_module_is_told_by_its_part(tmp_path: Path) -> None:
    """A part number that no table has, and a release file without a device tree (an old container)."""
    tree(tmp_path, "agx-orin")
    (tmp_path / "proc/device-tree/compatible").write_text("nvidia,p3737-0000+p9999-0001\0nvidia,tegra234\0")
    found = machine.read(tmp_path).jetson
    assert found is not None and (found.module, found.part) == ("p9999-0001", "p9999-0001")
    (tmp_path / "proc/device-tree/compatible").unlink()
    found = machine.read(tmp_path).jetson
    assert found is not None and (found.module, found.jetpack) == ("", "7.2")


def test_a_fingerprint_is_of_one_machine_and_survives_its_power_modes(tmp_path: Path) -> None:
    """Two boards of one kind differ, cores that are offline do not matter, and no serial number can be read off it."""
    first = machine.read(tree(tmp_path / "a", "orin-nano")).fingerprint
    other = tree(tmp_path / "b", "orin-nano")
    (other / "proc/cpuinfo").write_text(ORIN_CPU[: len(ORIN_CPU) // 6 * 4])
    assert machine.read(other).fingerprint == first
    (other / "proc/device-tree/serial-number").write_text("1420000000002\0")
    assert machine.read(other).fingerprint != first
    assert len(first) == len(hashlib.sha256().hexdigest()) and "1420000000001" not in first


def test_this_machine() -> None:
    """Whatever it is, it has memory and a kernel."""
    here = machine.read()
    assert here.memory_bytes > 0 and here.cores > 0 and here.kernel


def test_the_peak_of_a_process_is_its_own() -> None:
    """Not that of the one that started it."""
    child = "from trol_edge.machine.identity import peak_memory; print(peak_memory())"
    parent = (
        f"import subprocess, sys; b = bytes(400_000_000); subprocess.run([sys.executable, '-c', {child!r}], check=True)"
    )
    done = subprocess.run([sys.executable, "-c", parent], capture_output=True, text=True, check=True)
    assert 10_000_000 < int(done.stdout) < 200_000_000
    assert machine.peak_memory() > 10_000_000
