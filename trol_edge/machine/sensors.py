"""Reads /proc and /sys without root: power rails, clocks, temperatures, memory, throttle counters.

- All paths are under a root ("/", or a tree that a test made). The measured process itself is always the real one.
- A sensor that cannot be read now (EAGAIN: gated), or reads below zero (gated too, on older releases), gives None
  and not 0, because zeros that were not read would make a wrong mean.
- Run as a file (`python -I -S sensors.py ROOT PID SECONDS`) it is the sampler: it prints one JSON line per sample until
  its standard input closes. It uses the standard library only, so that it takes 10 MB and no lock of the measured
  process.
"""

from __future__ import annotations

import json
import os
import re
import select
import sys
import time
from collections.abc import Iterator
from pathlib import Path

# Board family, by its number in /proc/device-tree/compatible -> (its rails, rails whose sum is its total power).
BOARDS = {
    "p3767": (("VDD_IN", "VDD_CPU_GPU_CV", "VDD_SOC"), ("VDD_IN",)),  # Orin NX, Orin Nano
    "p3701": (("VDD_GPU_SOC", "VDD_CPU_CV", "VIN_SYS_5V0"), ("VDD_GPU_SOC", "VDD_CPU_CV", "VIN_SYS_5V0")),  # AGX Orin
    "p3834": (("VDD_GPU", "VDD_CPU_SOC_MSS", "VIN_SYS_5V0", "VIN"), ("VIN",)),  # Thor
}
GPU_NAMES = ("gv11b", "gp10b", "ga10b", "gb10b", "gpu")  # values of device/of_node/name in a GPU's devfreq folder
OVER_CURRENT = {"oc1": "under-voltage", "oc2": "average over-current", "oc3": "instantaneous over-current"}
PAGE = os.sysconf("SC_PAGE_SIZE")
TICKS = os.sysconf("SC_CLK_TCK")


class Sensors:
    """The sensors of one machine, found once. `identity` says what the machine is, `sample` what it does now."""

    def __init__(self, root: str | os.PathLike[str] = "/") -> None:
        self.root = Path(root)
        self.unreadable: list[str] = []  # sensors that exist but can never be read, and why
        self._rails = dict(self._find_rails())
        self._zones = dict(self._find_zones())
        self._counters = dict(self._find_counters())
        self._energy = dict(self._find_energy())
        self._gpu = self._find_gpu()
        loads = [self.root / "sys/devices/platform/gpu.0/load", *([self._gpu / "device/load"] if self._gpu else [])]
        self._load = next((path for path in loads if path.is_file()), None)
        self._emc = self.root / "sys/class/devfreq/bwmgr/cur_freq"
        self._emc_cap = self.root / "sys/kernel/nvpmodel_clk_cap/emc"
        self._policies = sorted((self.root / "sys/devices/system/cpu/cpufreq").glob("policy*/scaling_cur_freq"))
        self._before: tuple[float, float, float] | None = None

    @property
    def board(self) -> str | None:
        """The module's number, "p3767", or None if this is not a Jetson of BOARDS."""
        found = re.search("|".join(BOARDS), _text(self.root / "proc/device-tree/compatible") or "")
        return found[0] if found else None

    def identity(self) -> dict[str, str | int | float | None]:
        """What the machine is, with None for what it does not say. Clocks are in Hz, memory is in bytes."""
        cpu = _text(self.root / "proc/cpuinfo") or ""
        name = re.search(r"^(?:model name|Model)\s*:\s*(.+)$", cpu, re.M)
        mode, mode_name = self._power_mode()
        release = re.search(r"R(\d+).*?REVISION:\s*([\d.]+)", _text(self.root / "etc/nv_tegra_release") or "")
        return {
            "model": _text(self.root / "proc/device-tree/model"),
            "board": self.board,
            "l4t": f"{release[1]}.{release[2]}" if release else None,
            "cpu": name[1].strip() if name else None,
            "cores": len(re.findall(r"^processor\s*:", cpu, re.M)) or None,
            "memory_bytes": self._meminfo().get("MemTotal"),
            "power_mode": mode,
            "power_mode_name": mode_name,
            "gpu_max_hz": _number(self._gpu / "max_freq") if self._gpu else None,
            "gpu_min_hz": _number(self._gpu / "min_freq") if self._gpu else None,
            "emc_cap_hz": _number(self._emc_cap),
        }

    def missing(self) -> list[str]:
        """Sensors that a machine of this kind has and that could not be found; they make a profile partial."""
        rails, total = BOARDS[self.board] if self.board else ((), ())
        found = [f"rail {name} is missing" for name in rails if name not in self._rails]
        if self.board:
            if any(name not in self._rails for name in total):
                found.append(f"energy needs {' and '.join(total)}, so there is none")
            found += [f"over-current counter {n} is missing" for n in OVER_CURRENT if n not in self._counters]
            found += ["GPU clock is missing"] if self._gpu is None else []
            found += ["memory clock cap is missing"] if _number(self._emc_cap) is None else []
            found += ["power mode is missing"] if self._power_mode()[0] is None else []
        elif not self._energy and not self.unreadable:
            found.append("no power sensor here (no rails, no RAPL): no energy")
        return found + self.unreadable

    def total_power(self) -> tuple[str, ...]:
        """Names in a sample (`power_w/...`, `energy_uj/...`) whose sum is the total of the machine, or of its CPU."""
        if self.board:
            total = BOARDS[self.board][1]
            return tuple(f"power_w/{n}" for n in total) if all(n in self._rails for n in total) else ()
        return tuple(f"energy_uj/{name}" for name in self._energy if name.startswith("package"))

    def sample(self, pid: int) -> dict[str, float | None]:
        """Read all sensors once. Names end in their unit; None stands for what cannot be read now.

        t_s is time.monotonic(). cpu and cpu_own are the processors kept busy since the last sample, by everything and
        by process `pid`.
        """
        memory = self._meminfo()
        row: dict[str, float | None] = {
            "t_s": time.monotonic(),
            "available_bytes": memory.get("MemAvailable"),
            "largest_free_block_bytes": self._largest_free_block(),
        }
        if "CmaFree" in memory and memory.get("CmaTotal"):
            row["cma_free_bytes"] = memory["CmaFree"]
        row |= self.process(pid)
        for name, (volts, amperes, watts) in self._rails.items():
            if watts is not None:
                value = _number(watts)
                row[f"power_w/{name}"] = None if value is None else value / 1e6
            else:
                u, i = _number(volts), _number(amperes)
                row[f"power_w/{name}"] = None if u is None or i is None else u * i / 1e6
        for name, path in self._energy.items():
            row[f"energy_uj/{name}"] = _number(path)
        for name, path in self._zones.items():
            value = _number(path)
            row[f"temperature_c/{name}"] = None if value is None or value < 0 else value / 1e3
        for name, path in self._counters.items():
            row[f"counter/{name}"] = _number(path)
        if self._gpu is not None:
            row["gpu_hz"], row["gpu_max_hz"] = _number(self._gpu / "cur_freq"), _number(self._gpu / "max_freq")
        if self._load is not None:
            load = _number(self._load)
            row["gpu_load"] = None if load is None else load / 1e3
        if self._emc.is_file():
            row["emc_hz"] = _number(self._emc)
        if self._emc_cap.is_file():
            row["emc_cap_hz"] = _number(self._emc_cap)
        if self._policies:
            clocks = [clock for path in self._policies if (clock := _number(path)) is not None]
            row["cpu_hz"] = 1e3 * max(clocks) if clocks else None
        return row

    # -- finding sensors ----------------------------------------------------------------------------------------------

    def _find_rails(self) -> Iterator[tuple[str, tuple[Path, Path, Path | None]]]:
        """Name -> paths of millivolts and milliamperes, or of microwatts where the chip reports power directly."""
        drivers = self.root / "sys/bus/i2c/drivers"
        for label in sorted(drivers.glob("ina3221/*/hwmon/hwmon*/in*_label")):
            number, name = label.name[2:-6], _text(label)
            # 7 is the sum of the shunts; NC means not connected
            if name and number != "7" and "NC" not in name:
                folder = label.parent
                yield name, (folder / f"in{number}_input", folder / f"curr{number}_input", None)
        for watts in sorted(drivers.glob("ina238/*/hwmon/hwmon*/power1_input")):
            yield _text(watts.parent / "label") or "VIN", (watts, watts, watts)

    def _find_zones(self) -> Iterator[tuple[str, Path]]:
        for path in sorted((self.root / "sys/devices/virtual/thermal").glob("thermal_zone*/type")):
            yield (_text(path) or path.parent.name).removesuffix("-thermal"), path.parent / "temp"

    def _find_counters(self) -> Iterator[tuple[str, Path]]:
        """Counters of events since boot that slowed the machine down."""
        for name in sorted((self.root / "sys/class/hwmon").glob("hwmon*/name")):
            if _text(name) == "soctherm_oc":
                for oc in OVER_CURRENT:
                    if (name.parent / f"{oc}_event_cnt").is_file():
                        yield oc, name.parent / f"{oc}_event_cnt"
        package = self.root / "sys/devices/system/cpu/cpu0/thermal_throttle/package_throttle_count"
        if package.is_file():
            yield "cpu thermal throttle", package

    def _find_energy(self) -> Iterator[tuple[str, Path]]:
        for folder in sorted((self.root / "sys/class/powercap").glob("intel-rapl:*")):
            path, name = folder / "energy_uj", _text(folder / "name") or folder.name
            if not path.is_file():
                continue
            if _number(path) is None:
                self.unreadable.append(f"RAPL {name} is there, but only root may read it")
            else:
                # a subzone's name ("dram") alone is not unique on two sockets
                yield name if folder.name.count(":") == 1 else f"{name} of {folder.name}", path

    def _find_gpu(self) -> Path | None:
        found = sorted((self.root / "sys/class/devfreq").glob("*"))
        for folder in found:
            if folder.name.startswith("gpu-gpc") or _text(folder / "device/of_node/name") in GPU_NAMES:
                return folder
        return None

    def _power_mode(self) -> tuple[int | None, str | None]:
        status = re.search(r"pmode:(\d+)", _text(self.root / "var/lib/nvpmodel/status") or "")
        if not status:
            return None, None
        number = int(status[1])
        for line in (_text(self.root / "etc/nvpmodel.conf") or "").splitlines():
            # the number of a mode differs from board to board, so its name is looked up
            if (found := re.match(r"\s*<\s*POWER_MODEL\s+ID=(\d+)\s+NAME=(\S+)", line)) and int(found[1]) == number:
                return number, found[2].rstrip(">")
        return number, None

    # -- reading them ------------------------------------------------------------------------------------------------

    def _meminfo(self) -> dict[str, int]:
        found = re.findall(r"^(\w+):\s+(\d+) kB", _text(self.root / "proc/meminfo") or "", re.M)
        return {name: 1024 * int(value) for name, value in found}

    def _largest_free_block(self) -> float | None:
        """Bytes of the largest run of free pages (tegrastats' lfb), which is the largest contiguous allocation."""
        orders = [
            order
            for line in (_text(self.root / "proc/buddyinfo") or "").splitlines()
            for order, count in enumerate(line.split()[4:])
            if count.isdigit() and int(count)
        ]
        return float(PAGE << max(orders)) if orders else None

    def process(self, pid: int) -> dict[str, float | None]:
        """Memory and processor time of a process on the real machine, whatever the root."""
        status = _text(Path(f"/proc/{pid}/status")) or ""
        found = {name: 1024.0 * int(kb) for name, kb in re.findall(r"^(VmRSS|VmHWM):\s+(\d+) kB", status, re.M)}
        row: dict[str, float | None] = {"rss_bytes": found.get("VmRSS"), "peak_rss_bytes": found.get("VmHWM")}
        try:
            every = [int(n) for n in (_text(self.root / "proc/stat") or "").splitlines()[0].split()[1:9]]
            own = [int(n) for n in (_text(Path(f"/proc/{pid}/stat")) or "").rsplit(")", 1)[1].split()[11:13]]
        except (IndexError, ValueError):
            return row
        # the machine's counters: user, nice, system, (idle, iowait), irq, softirq, steal
        now = time.monotonic(), (sum(every) - every[3] - every[4]) / TICKS, sum(own) / TICKS
        if self._before is not None and now[0] > self._before[0]:
            seconds = now[0] - self._before[0]
            row["cpu"], row["cpu_own"] = ((now[i] - self._before[i]) / seconds for i in (1, 2))
        self._before = now
        return row


def _text(path: Path) -> str | None:
    """A file's text without NUL and white space at its end, or None. Never blocks, whatever kind of file it is."""
    try:
        file = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    except OSError:
        return None
    try:
        data = b""
        while block := os.read(file, 1 << 16):
            data += block
        return data.decode("utf-8", "replace").replace("\0", " ").strip()
    except OSError:  # most often EAGAIN from a gated sensor
        return None
    finally:
        os.close(file)


def _number(path: Path) -> float | None:
    try:
        return float(_text(path) or "")
    except ValueError:
        return None


def main() -> None:
    """Sample until standard input closes, so that the sampler never outlives the process that started it."""
    root, pid, interval = sys.argv[1], int(sys.argv[2]), float(sys.argv[3])
    machine, due = Sensors(root), time.monotonic()
    while True:
        print(json.dumps(machine.sample(pid)), flush=True)
        due = max(due + interval, time.monotonic())
        if select.select([0], [], [], max(0.0, due - time.monotonic()))[0]:
            return


if __name__ == "__main__":
    main()
