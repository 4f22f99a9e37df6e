"""The GPU kit's own script: its clock, its pieces, its stages apart from each other, and the page made from a record.

What its stages find on a GPU only a GPU can tell; `make gpu-kit-check` runs them here with the CPU in its place.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import os
import subprocess
import sys
import tarfile
import time
import zipfile
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

pytestmark = pytest.mark.heavy

KIT = Path(__file__).resolve().parents[1] / "deploy" / "gpu_kit"
RECORDS = Path(__file__).resolve().parents[1] / "docs" / "results"
# What the fake stages do, by the first word of a name.
STAGES = """
import json, os, signal, sys, time
told = json.load(sys.stdin)
def write(**found):
    with open(told["file"], "w") as file:
        json.dump({"line": "", "checks": [], "data": {}, **found}, file)
kind = told["function"]
if kind == "good":
    write(status="passed", line="fine", data={"site": os.environ["PYTHONPATH"]})
elif kind == "crash":
    write(status="running", data={"learnt": 1})
    os.kill(os.getpid(), signal.SIGSEGV)
elif kind == "hang":
    write(status="running", data={"learnt": 2})
    if os.fork() == 0:
        time.sleep(60)
    time.sleep(60)
elif kind == "slow":
    time.sleep(1.0)
    write(status="passed", line="made")
elif kind == "needs":
    there = os.path.exists(os.path.join(told["out"], "stages", "slow.json"))
    write(status="passed" if there else "failed", line="after")
elif kind == "mute":
    sys.exit(3)
"""


@pytest.fixture
def room(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Modules of the kit's folder, which is no package: run.py has to work before anything is installed."""
    monkeypatch.syspath_prepend(str(KIT))
    names = ("run", "make", "report")
    for name in names:
        sys.modules.pop(name, None)
    yield importlib.import_module
    for name in names:
        sys.modules.pop(name, None)


def cut(folder: Path, file: Path, size: int, **own: str) -> dict[str, Any]:
    """What a manifest says of a file that is cut into pieces."""
    data, pieces = file.read_bytes(), []
    for number in range(0, len(data), size):
        piece = folder / "pieces" / f"{file.name}.{number // size:03}"
        piece.write_bytes(data[number : number + size])
        digest = hashlib.sha256(piece.read_bytes()).hexdigest()
        pieces.append({"name": piece.name, "bytes": piece.stat().st_size, "sha256": digest})
    return {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest(), "pieces": pieces, **own}


@pytest.fixture
def kit(tmp_path: Path) -> Path:
    """A kit of fake stages, a wheel and a tar file of one bundle."""
    folder = tmp_path / "kit"
    (folder / "pieces").mkdir(parents=True)
    (folder / "run.py").write_text((KIT / "run.py").read_text())
    (folder / "stages.py").write_text(STAGES)
    wheel = tmp_path / "made_up-1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("made_up.py", "here = True\n")
        archive.writestr("made_up-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: made-up\nVersion: 1.0\n")
        archive.writestr(
            "made_up-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        archive.writestr("made_up-1.0.dist-info/RECORD", "")
    (tmp_path / "bundle.json").write_text("{}")
    with tarfile.open(tmp_path / "bundles.tar.xz", "w:xz") as tar:
        tar.add(tmp_path / "bundle.json", "bundles/one/bundle.json")
    files = {
        wheel.name: cut(folder, wheel, 200, kind="wheel"),
        "bundles.tar.xz": cut(folder, tmp_path / "bundles.tar.xz", 64, kind="bundles"),
    }
    manifest = {"kit": "trol-edge-gpu-kit", "version": 1, "machine": os.uname().machine, "jetson": False}
    (folder / "manifest.json").write_text(json.dumps(manifest | {"trol_edge": "1", "commit": "c", "files": files}))
    return folder


def edit(kit: Path, **changes: Any) -> None:
    """Change the manifest."""
    path = kit / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def run(kit: Path, stages: str, *options: str, budget: float = 60.0) -> tuple[int, dict[str, Any], str]:
    """Run the kit's script with stages of our own, "name function limit [background|after:name]" each; exit code,
    result and what was printed."""
    lines = []
    for line in stages.split(";"):
        name, function, limit, *more = line.split()
        background = "background" in more
        after = next((word.partition(":")[2] for word in more if word.startswith("after:")), None)
        lines.append(f"Stage({name!r}, {function!r}, {{}}, {limit}, {background}, {after!r})")
    code = f"import run, sys; from run import Stage; run.stages = lambda *a: [{', '.join(lines)}]; sys.exit(run.main())"
    out = kit.parent / "out"
    given = ["--budget", str(budget), "--out", str(out), "--scratch", str(kit.parent / "scratch"), *options]
    environment = os.environ | {"PYTHONPATH": str(kit)}
    command = [sys.executable, "-c", code, *given]
    done = subprocess.run(command, cwd=kit, capture_output=True, text=True, timeout=120, env=environment)
    file = out / "result.json"
    return done.returncode, json.loads(file.read_text()) if file.is_file() else {}, done.stdout + done.stderr


def test_a_stage_that_fails_hides_no_other(kit: Path) -> None:
    """A crash, a silent end and a stage over its limit are named; what they learnt stays, and the next ones run."""
    start = time.monotonic()
    code, result, _ = run(kit, "a crash 20;b mute 20;c hang 1;d good 20")
    stages = result["stages"]
    assert code == 1
    assert {name: entry["status"] for name, entry in stages.items()} == {
        "a": "crashed", "b": "crashed", "c": "timeout", "d": "passed"
    }  # fmt: skip
    assert stages["a"]["line"] == "crashed with SIGSEGV" and stages["a"]["data"] == {"learnt": 1}
    assert "exit status 3" in stages["b"]["line"]
    assert "its limit is 1 s" in stages["c"]["line"] and stages["c"]["data"] == {"learnt": 2}
    assert time.monotonic() - start < 40  # the hanging stage's child is gone, too: nothing waits for it
    assert result["runs"][0]["finished"] and result["runs"][0]["problems"] == []
    site = Path(stages["d"]["data"]["site"].split(os.pathsep)[0])
    assert (site / "made_up.py").is_file() and (site.parent / "bundles" / "one" / "bundle.json").is_file()


@pytest.mark.slow  # it waits
def test_the_budget_ends_a_stage_and_those_after_it(kit: Path) -> None:
    """Cut off in the middle: said so, what was learnt stays, and what did not begin says why."""
    code, result, _ = run(kit, "a hang 100;b good 10", budget=24)
    assert code == 2
    assert result["stages"]["a"]["status"] == "timeout" and "budget is used up" in result["stages"]["a"]["line"]
    assert result["stages"]["a"]["data"] == {"learnt": 2}
    assert result["stages"]["b"] == {"status": "not run", "line": "the budget was used up before it"}


def test_what_is_made_beside_comes_before_what_reads_it(kit: Path) -> None:
    """Background stages run beside the others; a stage that needs one waits, and what is ready goes first."""
    code, result, printed = run(kit, "slow slow 20 background;n needs 20 after:slow;g good 20")
    assert code == 0, printed
    assert list(result["stages"]) == ["g", "slow", "n"]
    assert {entry["status"] for entry in result["stages"].values()} == {"passed"}


def test_a_second_run_replaces_what_it_runs(kit: Path) -> None:
    """Records of several runs into one folder are one."""
    run(kit, "a crash 20;d good 20")
    code, result, _ = run(kit, "a good 20;d good 20", "--only", "a")
    assert code == 0
    assert {name: entry["status"] for name, entry in result["stages"].items()} == {"a": "passed", "d": "passed"}
    assert len(result["runs"]) == 2


def test_pieces_that_are_missing_or_altered(kit: Path) -> None:
    """One line each, and the stages run all the same."""
    pieces = sorted((kit / "pieces").iterdir())
    wheel = next(p for p in pieces if p.name.startswith("made_up"))
    wheel.write_bytes(wheel.read_bytes()[:-1] + b"?")
    next(p for p in pieces if p.name == "bundles.tar.xz.001").unlink()
    code, result, printed = run(kit, "d good 20")
    assert code == 0
    altered, missing = result["runs"][0]["problems"]
    assert f"piece {wheel.name} was altered on its way" in altered and "carry it here again" in altered
    assert "1 of " in missing and "bundles.tar.xz.001" in missing and "carry them here" in missing
    assert altered in printed and missing in printed
    assert not list((kit.parent / "scratch").glob("*.whl"))  # nothing half put together is left


def test_another_python_another_machine_no_manifest(kit: Path) -> None:
    """What this machine cannot use is said in one line."""
    files = json.loads((kit / "manifest.json").read_text())["files"]
    name = next(n for n in files if n.startswith("made_up"))
    edit(kit, files={name: files[name] | {"python": "2.7"}})
    _, result, _ = run(kit, "d good 20")
    assert result["runs"][0]["problems"] == [
        f"{name}: made for Python 2.7, but here is {sys.version_info[0]}.{sys.version_info[1]}; run this with python2.7"
    ]
    edit(kit, machine="pdp11")
    code, _, printed = run(kit, "d good 20")
    assert code == 2 and "this kit is for pdp11" in printed and "make another kit" in printed
    (kit / "manifest.json").write_text("{")
    code, _, printed = run(kit, "d good 20")
    assert code == 2 and "manifest.json cannot be read" in printed


def test_too_little_disk(kit: Path, room: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Said before anything is unpacked, with both figures."""
    script: ModuleType = room("run")
    monkeypatch.setattr(script.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 10})())
    opened = script.Kit(kit)
    opened.install(tmp_path / "scratch")
    assert len(opened.lines) == 2
    assert all("MB are free; make room" in line for line in opened.lines)


def test_what_is_there_is_not_brought(kit: Path, room: Any, tmp_path: Path) -> None:
    """A wheel that says `unless` stays out where the machine has that module."""
    files = json.loads((kit / "manifest.json").read_text())["files"]
    name = next(n for n in files if n.startswith("made_up"))
    edit(kit, files={name: files[name] | {"unless": "json"}})
    opened = room("run").Kit(kit)
    opened.install(tmp_path / "scratch")
    assert opened.brought == {name: "not needed: this machine has json"} and opened.lines == []


def test_pieces_are_the_file_again(room: Any, tmp_path: Path) -> None:
    """What make.py cuts, run.py puts together; the last piece is shorter, an empty file has none."""
    maker, script = room("make"), room("run")
    file, pieces = tmp_path / "file", tmp_path / "kit" / "pieces"
    pieces.mkdir(parents=True)
    file.write_bytes(bytes(range(256)) * 41)
    entry = maker.entry(file, pieces, 1000, kind="bundles")
    assert [piece["bytes"] for piece in entry["pieces"]] == [1000] * 10 + [496]
    (pieces.parent / "manifest.json").write_text("{}")
    joined = script.Kit(pieces.parent).joined(entry["pieces"], tmp_path / "again", entry["sha256"])
    assert joined is None and (tmp_path / "again").read_bytes() == file.read_bytes()


def test_every_stage_has_a_function(room: Any) -> None:
    """run.py's table names what stages.py has, with the arguments that it takes."""
    import inspect

    spec = importlib.util.spec_from_file_location("gpu_kit_stages", KIT / "stages.py")
    assert spec is not None and spec.loader is not None
    functions = importlib.util.module_from_spec(spec)
    sys.modules["gpu_kit_stages"] = functions
    try:
        spec.loader.exec_module(functions)
    finally:
        del sys.modules["gpu_kit_stages"]
    for jetson in (False, True):
        for stage in room("run").stages(jetson, 60.0, False):
            wanted = list(inspect.signature(functions.STAGES[stage.function]).parameters)[1:]
            assert sorted(stage.arguments) == sorted(wanted), stage.name


def test_the_committed_page_is_what_the_command_writes(room: Any) -> None:
    """No figure of the page was written by hand."""
    report = room("report")
    page = RECORDS / "h200-2026-11-27.md"
    records = [RECORDS / f"h200-2026-11-27-{part}.json" for part in "ab"]
    assert page.read_text(encoding="utf-8") == report.page(report.Records(records))


def test_a_record_that_is_none(room: Any, tmp_path: Path) -> None:
    """Another JSON file is refused by name."""
    other = tmp_path / "other.json"
    other.write_text("{}")
    with pytest.raises(ValueError, match=r"other\.json: no record of the GPU kit"):
        room("report").Records([other])
