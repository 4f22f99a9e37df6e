"""Nothing reports home: no name is looked up and nothing is written outside the bundle, whoever starts what."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import slow
from trol_edge import telemetry
from trol_edge.runtimes import doctor

ROOT = Path(__file__).resolve().parents[1]
SCENE = ROOT / "export" / "checkpoints" / "trol-nano" / "scene.png"
NO_NETWORK = ["unshare", "--user", "--map-root-user", "--net"]  # so that not even the control gets out
TRACE = ["strace", "-f", "-qq", "-e", "trace=%network,openat,open,creat,mkdir,mkdirat,rename,renameat,renameat2"]

ANSWER = """
import sys, time
import trol_edge
with trol_edge.Runtime(sys.argv[1]) as rt:
    assert rt.generate("What is left of the red star?", sys.argv[2]).text == "cyan ring"
    time.sleep(4)  # what reports home does it a few seconds after the first session
"""


def sandboxed() -> bool:
    """Whether strace and a network namespace are to be had here."""
    if not all(shutil.which(command) for command in ("strace", "unshare")):
        return False
    return subprocess.run([*NO_NETWORK, *TRACE, "-o", os.devnull, "true"], capture_output=True).returncode == 0


needs_sandbox = pytest.mark.skipif(not sandboxed(), reason="needs strace and unshare, allowed to make a namespace")


@pytest.fixture(scope="module")
def nano_bundle(nano_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy, because these processes replay the self-test as a user's do, and note it in the bundle."""
    folder = tmp_path_factory.mktemp("own") / "bundle"
    shutil.copytree(nano_bundle, folder)
    return folder


def traced(program: str, bundle: Path, work: Path, **environment: str) -> tuple[list[str], list[str]]:
    """Run a program without a network; the lines of internet sockets, and the paths written outside of bundle."""
    (work / "home").mkdir()
    # Nothing else of our environment: onnxruntime keeps quiet where it says CI, and nothing would be proven there.
    kept = {key: os.environ[key] for key in ("PATH", "LANG", "LD_LIBRARY_PATH", "TMPDIR") if key in os.environ}
    kept |= {"HOME": str(work / "home"), "PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1"} | environment
    log = work / "strace"
    command = [*NO_NETWORK, *TRACE, "-o", log, sys.executable, "-c", program, bundle, SCENE]
    done = subprocess.run(command, env=kept, cwd=work, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    lines = [line for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if "= -1 " not in line]
    sockets = [line for line in lines if "AF_INET" in line]
    touching = re.compile(r"O_WRONLY|O_RDWR|O_CREAT|\bcreat\(|mkdir|rename")
    written = [match[1] for line in lines if touching.search(line) and (match := re.search(r'"([^"]*)"', line))]
    allowed = (str(bundle), "/dev/", "/proc/")
    return sockets, [path for path in written if not path.startswith(allowed)]


@needs_sandbox
def test_a_runtime_looks_no_name_up_and_writes_nothing_elsewhere(nano_bundle: Path, tmp_path: Path) -> None:
    """A whole program with an answer, watched for some seconds more."""
    assert traced(ANSWER, nano_bundle, tmp_path) == ([], [])


@needs_sandbox
@pytest.mark.slow
def test_what_the_trace_would_show(nano_bundle: Path, tmp_path: Path) -> None:
    """The control: onnxruntime imported first and without the variable writes into the home folder, and doctor says so.

    Where onnxruntime is of a version that does not report home there is nothing to see, and nothing to test.
    """
    said = "from trol_edge.runtimes import doctor\n" + (
        "assert [c for c in doctor.examine() if c.what == 'telemetry' and not c.good and 'first' in c.text]\n"
    )
    import onnxruntime

    sockets, written = traced("import onnxruntime\n" + said + ANSWER, nano_bundle, tmp_path)
    if tuple(map(int, onnxruntime.__version__.split(".")[:2])) >= (1, 32):
        assert [path for path in written if "onnxruntime" in path] or sockets


WATCHED = """
import os, sys
class Watch:
    def find_spec(self, name, path=None, target=None):
        if name == "onnxruntime":
            with open(os.environ["WATCHED"], "a") as f:
                print(os.environ.get("ORT_DISABLE_TELEMETRY"), file=f)
sys.meta_path.insert(0, Watch())
"""


@pytest.mark.parametrize(
    "arguments",
    [
        ["-m", "trol_edge", "run", "BUNDLE", "--image", "SCENE", "--prompt", "What is this?"],
        ["-m", "trol_edge.examples.asyncio_loop", "BUNDLE", "SCENE"],
        *slow(
            ["-m", "trol_edge", "doctor", "BUNDLE"],
            ["-m", "trol_edge", "verify", "BUNDLE"],
            ["-m", "trol_edge", "profile", "BUNDLE", "--size", "none", "--runs", "1", "--warmup", "0", "-o", "OUT"],
        ),
        ["-c", "import trol_edge.runtimes.rates"],
        ["-c", "import trol_edge.examples.camera, trol_edge.examples.ros2_node, onnxruntime"],
        ["tests/replay_lowered.py", "OUT"],
    ],
    ids=lambda arguments: " ".join(arguments[1:3]),
)
def test_every_entry_switches_it_off_first(arguments: list[str], nano_bundle: Path, tmp_path: Path) -> None:
    """At the first import of onnxruntime, in the process or a child of it, the variable is there."""
    (tmp_path / "sitecustomize.py").write_text(WATCHED, encoding="utf-8")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "made_by.json").write_text('{"onnxruntime": "none"}', encoding="utf-8")
    names: dict[str, Any] = {"BUNDLE": nano_bundle, "SCENE": SCENE, "OUT": tmp_path / "out"}
    environment = {key: value for key, value in os.environ.items() if key != telemetry.ONNXRUNTIME}
    environment |= {"PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}", "WATCHED": str(tmp_path / "seen")}
    command = [sys.executable, *(str(names.get(part, part)) for part in arguments)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    seen = (tmp_path / "seen").read_text(encoding="utf-8").split()
    assert seen and set(seen) == {"1"}, done.stderr


def test_doctor_says_when_it_is_too_late(monkeypatch: pytest.MonkeyPatch) -> None:
    """And that it is off otherwise, which it is in the tests."""

    def found() -> doctor.Check:
        return next(check for check in doctor.examine() if check.what == "telemetry")

    assert found().good and not telemetry.too_late
    monkeypatch.setattr(telemetry, "too_late", True)
    assert not found().good and "import trol_edge first" in found().text
