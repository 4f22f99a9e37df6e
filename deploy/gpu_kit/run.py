"""Runs everything that a GPU can prove about TroL Edge: `python3 run.py --budget 720`.

It is for a machine without a network, in the folder that `make gpu-kit` made. The kit is installed into a separate
folder. Then stages run, the most useful first, each in a separate process with a time limit. Results of a stage are in
result.json at once, so a run that is cut off still has them, and a stage that fails or crashes hides no other.

Only the standard library is imported here, because this file must work before anything is installed.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import hashlib
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

KIT, KIT_VERSION = "trol-edge-gpu-kit", 1
NANOS = ("trol-nano", "trol-nano-phi3")
PRECISIONS = ("fp16", "fp32", "int8", "int4", "fp8")
GRACE_S = 5.0  # time between asking a stage to end and killing it
RESERVE_S = 10.0  # part of the budget that is kept for writing the result
LEAST_S = 5.0  # a stage is not started with less time
TAIL_LINES = 30  # last lines of a stage's output that the result keeps
COPY_BYTES = 1 << 20


@dataclasses.dataclass(frozen=True)
class Stage:
    """One stage: a function of stages.py with its arguments and its time limit in seconds.

    background: whether it starts at once, beside the others, because it needs no GPU. after: a background stage that
    makes what this one reads.
    """

    name: str
    function: str
    arguments: dict[str, object]
    limit_s: float
    background: bool = False
    after: str | None = None


def stages(jetson: bool, soak_s: float, small: bool) -> list[Stage]:
    """All stages, the most useful first. small: the shipped models replace the published sizes (a dry run)."""
    found = [Stage("machine", "machine", {}, 60), Stage("cuda", "cuda", {}, 60)]
    full = ("trol-nano", "trol-nano-phi3") if small else ("trol-1.8b", "trol-3.8b")
    sizes = [(model, precision) for precision in ("fp16", "int8") for model in full]
    if not jetson:
        found += [
            Stage(f"prepare-{m}-{p}", "prepare", {"model": m, "precision": p}, 600, background=True) for m, p in sizes
        ]
        for precision in PRECISIONS:
            for nano in NANOS:
                found.append(Stage(f"ort-{nano}-{precision}", "ort", {"model": nano, "precision": precision}, 90))
    for precision in PRECISIONS:
        for nano in NANOS:
            soak = soak_s if (nano, precision) == (NANOS[0], "fp16") else 0.0
            given = {"model": nano, "precision": precision, "soak_s": soak}
            found.append(Stage(f"engine-{nano}-{precision}", "engine", given, 180 + soak))
    if not jetson:
        for model, precision in sizes:
            after = f"prepare-{model}-{precision}"
            given = {"model": model, "precision": precision}
            found.append(Stage(f"full-{model}-{precision}", "full", given, 150, after=after))
            if precision == "fp16":
                first = {"model": model, "compile_step": model == full[0]}
                found.append(Stage(f"torch-{model}", "torch", first, 150))
        if soak_s:
            found.append(Stage("soak-ort", "soak", {"model": NANOS[0], "seconds": soak_s}, soak_s + 60))
    found.append(Stage("profile", "profile", {}, 180))
    return found


# -- the kit ---------------------------------------------------------------------------------------------------------


class Kit:
    """The folder that was carried here, and its usable parts."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.lines: list[str] = []  # problems, one per line
        self.brought: dict[str, str] = {}  # file -> "installed", or why it was not
        self.manifest: dict[str, object] = {}
        try:
            self.manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            self.lines.append(f"manifest.json cannot be read ({error}); carry the whole kit folder here again")
        if self.manifest and (self.manifest.get("kit"), self.manifest.get("version")) != (KIT, KIT_VERSION):
            self.lines.append(f"manifest.json is not of kit version {KIT_VERSION}; make the kit again")
            self.manifest = {}
        here = platform.machine()
        if self.manifest and self.manifest["machine"] != here:
            self.lines.append(
                f"this kit is for {self.manifest['machine']}, but this machine is {here}; make another kit"
            )
            self.manifest = {}

    @property
    def jetson(self) -> bool:
        """Whether this kit is for a Jetson."""
        return bool(self.manifest.get("jetson"))

    def install(self, into: Path) -> None:
        """Join and check pieces, and install wheels and bundles below `into`, each only once.

        Missing or altered ones are reported and left out.
        """
        site, marks = into / "site", into / "marks"
        for path in (site, marks):
            path.mkdir(parents=True, exist_ok=True)
        for name, entry in self.manifest.get("files", {}).items():
            mark = marks / f"{name}.sha256"
            if mark.is_file() and mark.read_text(encoding="ascii") == entry["sha256"]:
                self.brought[name] = "installed"
                continue
            why = self._unneeded(entry) or self._installed(name, entry, site, into)
            self.brought[name] = why or "installed"
            if why is None:
                mark.write_text(entry["sha256"], encoding="ascii")
            elif not why.startswith("not needed"):
                self.lines.append(f"{name}: {why}")

    def _unneeded(self, entry: dict[str, object]) -> str | None:
        unless = entry.get("unless")
        if not unless:
            return None
        quiet = os.environ | {"ORT_DISABLE_TELEMETRY": "1"}
        done = subprocess.run([sys.executable, "-c", f"import {unless}"], capture_output=True, env=quiet)
        return None if done.returncode else f"not needed: this machine has {unless}"

    def _installed(self, name: str, entry: dict[str, object], site: Path, into: Path) -> str | None:
        """Install one file; returns why that was not possible, or None."""
        wanted = entry.get("python")
        here = ".".join(map(str, sys.version_info[:2]))
        if wanted and wanted != here:
            return f"made for Python {wanted}, but here is {here}; run this with python{wanted}"
        pieces = entry["pieces"]
        gone = [piece["name"] for piece in pieces if not (self.folder / "pieces" / piece["name"]).is_file()]
        if gone:
            return f"{len(gone)} of {len(pieces)} pieces are missing ({', '.join(gone[:3])}); carry them here"
        free = shutil.disk_usage(into).free
        needed = 4 * int(entry["bytes"])
        if needed > free:
            return f"needs {needed / 1e6:.0f} MB below {into}, but {free / 1e6:.0f} MB are free; make room"
        whole = into / name
        try:
            if (fault := self.joined(pieces, whole, str(entry["sha256"]))) is not None:
                return fault
            return self._unpacked(whole, str(entry["kind"]), site, into)
        except OSError as error:
            return f"cannot be unpacked below {into} ({error.strerror or error})"
        finally:
            whole.unlink(missing_ok=True)

    def joined(self, pieces: list[dict[str, object]], whole: Path, sha256: str) -> str | None:
        digest = hashlib.sha256()
        with whole.open("wb") as out:
            for piece in pieces:
                own = hashlib.sha256()
                with (self.folder / "pieces" / str(piece["name"])).open("rb") as file:
                    while block := file.read(COPY_BYTES):
                        own.update(block)
                        digest.update(block)
                        out.write(block)
                if own.hexdigest() != piece["sha256"]:
                    return f"piece {piece['name']} was altered on its way (sha256 differs); carry it here again"
        return None if digest.hexdigest() == sha256 else "the pieces do not make the file; make the kit again"

    def _unpacked(self, whole: Path, kind: str, site: Path, into: Path) -> str | None:
        if kind == "bundles":
            # Our own kit's hash was checked; the filter protects from a kit that somebody else made.
            safe = {"filter": "data"} if hasattr(tarfile, "data_filter") else {}
            with tarfile.open(whole) as tar:
                tar.extractall(into, **safe)
            return None
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--no-compile"]
        command += ["--disable-pip-version-check", "--upgrade", "--target", os.fspath(site), os.fspath(whole)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            said = (done.stderr or done.stdout).strip().splitlines()[-1:] or [f"exit status {done.returncode}"]
            return f"pip could not install it ({said[0]})"
        return None


# -- the run ---------------------------------------------------------------------------------------------------------


class Run:
    """One run of the stages within a budget; result.json is written after every change."""

    def __init__(self, kit: Kit, options: argparse.Namespace) -> None:
        self.kit, self.options = kit, options
        self.start = time.monotonic()
        self.out = Path(options.out).resolve()
        self.scratch = Path(options.scratch).resolve()
        for folder in (self.out / "stages", self.out / "logs", self.scratch):
            folder.mkdir(parents=True, exist_ok=True)
        self.file = self.out / "result.json"
        self.result = self._before() or {"kit": KIT, "version": KIT_VERSION, "runs": [], "stages": {}}
        manifest = kit.manifest
        self.run = {
            "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "budget_s": options.budget,
            "dry": options.dry,
            "trol_edge": manifest.get("trol_edge"),
            "commit": manifest.get("commit"),
            "problems": kit.lines,
            "brought": kit.brought,
            "finished": False,
        }
        self.result["runs"].append(self.run)
        self.noted: dict[str, str] = {}  # stages of this run, and how they ended
        self.children: dict[str, tuple[Stage, subprocess.Popen[bytes], float]] = {}
        self.write()

    def _before(self) -> dict[str, object] | None:
        """The result of an earlier run in this folder, whose stages stay until they run again."""
        try:
            found = json.loads(self.file.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None
        return found if found.get("kit") == KIT and found.get("version") == KIT_VERSION else None

    def left_s(self) -> float:
        """Seconds of the budget that stages may still use."""
        return self.options.budget - RESERVE_S - (time.monotonic() - self.start)

    def write(self) -> None:
        """Write result.json beside its place and rename it, so that it is complete at every moment."""
        self.run["seconds"] = round(time.monotonic() - self.start, 1)
        part = self.file.with_suffix(".part")
        part.write_text(json.dumps(self.result, indent=1) + "\n", encoding="utf-8")
        os.replace(part, self.file)

    def begin(self, stage: Stage) -> None:
        """Start a stage's process."""
        out = self.out / "stages" / f"{stage.name}.json"
        out.unlink(missing_ok=True)
        site = os.fspath(self.scratch / "site")
        path = os.pathsep.join(p for p in (site, os.environ.get("PYTHONPATH")) if p)
        told = {
            "function": stage.function,
            "arguments": stage.arguments,
            "kit": os.fspath(self.kit.folder),
            "scratch": os.fspath(self.scratch),
            "out": os.fspath(self.out),
            "file": os.fspath(out),
            "dry": self.options.dry,
        }
        environment = os.environ | {
            "PYTHONPATH": path,
            "LD_LIBRARY_PATH": os.pathsep.join(p for p in (*cuda_folders(), os.environ.get("LD_LIBRARY_PATH")) if p),
            "PYTHONUNBUFFERED": "1",
            "ORT_DISABLE_TELEMETRY": "1",
        }
        with (self.out / "logs" / f"{stage.name}.log").open("wb") as log:
            child = subprocess.Popen(
                [sys.executable, os.fspath(Path(__file__).resolve().with_name("stages.py"))],
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=environment,
                start_new_session=True,
            )
        assert child.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # it has ended already, and its exit status says how
            child.stdin.write(json.dumps(told).encode())
            child.stdin.close()
        self.children[stage.name] = stage, child, time.monotonic()

    def wait(self, name: str, limit_s: float, why: str) -> None:
        """Wait for a stage, end it at its limit, and put its output into the result."""
        stage, child, began = self.children.pop(name)
        cut = False
        try:
            child.wait(max(0.1, limit_s))
        except subprocess.TimeoutExpired:
            cut = True
            end(child)
        seconds = time.monotonic() - began
        entry = self._left(stage)
        if cut:
            entry["status"], entry["line"] = "timeout", f"ended after {seconds:.0f} s: {why}"
        elif child.returncode < 0:
            entry["status"] = "crashed"
            entry["line"] = f"crashed with {signal.Signals(-child.returncode).name}"
        elif entry["status"] == "running":
            entry["status"], entry["line"] = "crashed", f"ended without a message, exit status {child.returncode}"
        entry["seconds"] = round(seconds, 1)
        if entry["status"] not in ("passed", "not run"):
            log = (self.out / "logs" / f"{stage.name}.log").read_text(encoding="utf-8", errors="replace")
            entry["tail"] = log.splitlines()[-TAIL_LINES:]
        self.note(stage.name, entry)

    def _left(self, stage: Stage) -> dict[str, object]:
        try:
            found = json.loads((self.out / "stages" / f"{stage.name}.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            found = {}
        return {"status": "running", "line": "", **found}

    def note(self, name: str, entry: dict[str, object]) -> None:
        """Put a stage's part into the result, and a line on the screen."""
        self.result["stages"][name] = entry
        self.noted[name] = str(entry["status"])
        self.write()
        seconds = f"{entry['seconds']:6.1f} s" if "seconds" in entry else ""
        print(f"{self.run['seconds']:6.0f} s  {name:32} {entry['status']:8} {seconds}  {entry['line']}", flush=True)

    def stage(self, stage: Stage) -> None:
        """Run a stage within its own limit and the rest of the budget."""
        left = self.left_s()
        if left < LEAST_S:
            self.note(stage.name, {"status": "not run", "line": "the budget was used up before it"})
            return
        self.begin(stage)
        limit = min(stage.limit_s, left)
        why = "the budget is used up" if limit < stage.limit_s else f"its limit is {stage.limit_s:.0f} s"
        self.wait(stage.name, limit, why)

    def all(self, chosen: list[Stage]) -> None:
        """Run the chosen stages, with the background ones beside the rest."""
        waiting = [stage for stage in chosen if stage.background]
        left = [stage for stage in chosen if not stage.background]
        try:
            while left:
                self._feed(waiting)
                made = {stage.name for stage in waiting} | self.children.keys()  # still being made
                stage = next((stage for stage in left if stage.after not in made), None)
                if stage is None:
                    self._feed(waiting, wait=True)
                else:
                    left.remove(stage)
                    self.stage(stage)
            while waiting or self.children:
                self._feed(waiting, wait=True)
            self.run["finished"] = True
        finally:
            for name in list(self.children):
                self.wait(name, 0.0, "the run ended")
            self.write()

    def _feed(self, waiting: list[Stage], wait: bool = False) -> None:
        """Keep `--jobs` background stages running. wait: wait until the oldest of them has ended."""
        for name, (stage, child, began) in list(self.children.items()):
            if wait or child.poll() is not None:
                left = stage.limit_s - (time.monotonic() - began)
                self.wait(name, min(left, self.left_s()), "its limit, or the budget's end")
                wait = False
        while waiting and len(self.children) < self.options.jobs:
            stage = waiting.pop(0)
            if self.left_s() < LEAST_S:
                self.note(stage.name, {"status": "not run", "line": "the budget was used up before it"})
            else:
                self.begin(stage)


def cuda_folders() -> list[str]:
    """Folders of CUDA libraries from Python packages, because onnxruntime searches only beside itself."""
    return [os.fspath(path) for entry in sys.path if entry for path in sorted(Path(entry).glob("nvidia/*/lib"))]


def end(child: subprocess.Popen[bytes]) -> None:
    """End a process and all processes that it started."""
    for number, patience in ((signal.SIGTERM, GRACE_S), (signal.SIGKILL, GRACE_S)):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child.pid, number)
        try:
            child.wait(patience)
            break
        except subprocess.TimeoutExpired:  # not even SIGKILL ends a process that hangs in the driver
            continue
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child.pid, signal.SIGKILL)  # for processes that it started itself


def chosen(options: argparse.Namespace, jetson: bool) -> list[Stage]:
    """The stages that the command line asks for."""
    found = stages(jetson, options.soak_s, options.dry)
    only = [part for part in options.only.split(",") if part]
    skip = [part for part in options.skip.split(",") if part]
    return [
        stage
        for stage in found
        if (not only or any(stage.name.startswith(part) for part in only))
        and not any(stage.name.startswith(part) for part in skip)
    ]


def main() -> int:
    """Run the command line. Returns 0 if every stage that ran passed, 1 if one did not, 2 if none could run."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], epilog="Example: python3 run.py --budget 720 --out result"
    )
    parser.add_argument("--budget", type=float, default=720.0, help="Seconds for the whole run.  [default: 720]")
    parser.add_argument("--only", default="", help="Stages to run, as beginnings of names separated by commas.")
    parser.add_argument("--skip", default="", help="Stages to leave out, in the same form.")
    parser.add_argument("--out", default="result", help="Folder of result.json, logs and the profile's page.")
    parser.add_argument("--scratch", default="scratch", help="Folder to install and work in; it takes several GB.")
    parser.add_argument("--soak-s", type=float, default=60.0, help="Seconds of the soak test.  [default: 60]")
    jobs = max(1, min(4, (os.cpu_count() or 1) // 4))
    parser.add_argument(
        "--jobs", type=int, default=jobs, help=f"Exports that run at a time beside the rest.  [default: {jobs}]"
    )
    parser.add_argument(
        "--dry", action="store_true", help="Use no GPU: the CPU replaces it, and small models replace large ones."
    )
    parser.add_argument("--list", action="store_true", help="Print the stages and their limits, and run nothing.")
    options = parser.parse_args()
    if options.budget <= RESERVE_S + LEAST_S:
        parser.error(f"--budget {options.budget:g}: give at least {RESERVE_S + LEAST_S:g} seconds")
    kit = Kit(Path(__file__).resolve().parent)
    if options.list:
        for stage in chosen(options, kit.jetson):
            print(f"{stage.name:32} {stage.limit_s:5.0f} s{'  in the background' if stage.background else ''}")
        return 0
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # ends and records what runs
    run = Run(kit, options)
    if kit.manifest:
        kit.install(run.scratch)
        run.write()
    for line in kit.lines:
        print(line, flush=True)
    if kit.manifest:
        run.all(chosen(options, kit.jetson))
    found = list(run.noted.values())
    counts = ", ".join(f"{found.count(status)} {status}" for status in dict.fromkeys(found))
    print(f"{run.file}: {counts or 'no stage ran'}")
    if "passed" not in found:
        return 2
    return 0 if all(status in ("passed", "not run") for status in found) else 1


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
