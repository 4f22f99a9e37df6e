"""What the doctor says about machines, by their documented files, and about what installations and bundles may lack."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest

from tests.test_machine import RELEASE, tree
from trol_edge.bundle.manifest import Bundle, write_manifest
from trol_edge.bundle.names import SELFTEST
from trol_edge.cli import main as cli
from trol_edge.errors import BackendError
from trol_edge.runtimes import doctor
from trol_edge.runtimes.cuda import Gpu
from trol_edge.verify import replay as verify

ORIN = Gpu("Orin (nvgpu)", "8.7", 8 << 30, (12, 6))


@dataclasses.dataclass
class Library:
    """A TensorRT of some version."""

    version: tuple[int, ...]
    rtx: bool = False

    @property
    def title(self) -> str:
        """The title in the real one's form."""
        return f"TensorRT {'.'.join(map(str, self.version))}"


def examine(monkeypatch: pytest.MonkeyPatch, root: Path, libraries: dict[str, Library], found: Any) -> dict[str, Any]:
    """Findings by what they are about, on a machine with these libraries and GPUs."""

    def load(name: str) -> Any:
        if name not in libraries:
            raise BackendError(f"{name} is not usable here")
        return libraries[name]

    monkeypatch.setattr(doctor, "load", load)
    monkeypatch.setattr(doctor, "devices", lambda: found)
    monkeypatch.setattr(doctor, "is_there", lambda name: name in ("cuda", "onnxruntime"))
    return {check.what: check for check in doctor.examine(root=root)}


def test_an_orin_nano(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Module, JetPack, what it ships, and the target that follows; everything present is reported as good."""
    found = examine(monkeypatch, tree(tmp_path, "orin-nano"), {"tensorrt": Library((10, 3, 0))}, [ORIN])
    assert "Orin Nano Engineering Reference Developer Kit Super, 6 x Cortex-A78AE" in found["machine"].text
    assert "8.0 GB of memory, 7.1 available" in found["machine"].text
    assert found["Jetson"].good and found["Jetson"].text == (
        "Orin Nano 8GB (developer kit) (p3767-0005), JetPack 6.2 (Jetson Linux 36.4.3) with TensorRT 10.3: "
        "target jetson-jp6"
    )
    assert found["GPU"].text == "Orin (nvgpu), capability 8.7, 8.6 GB"
    assert found["driver"].text == "supports CUDA 12.6" and found["tensorrt"].text == "TensorRT 10.3.0"
    assert found["targets"].good and "jetson-jp6" in found["targets"].text.split("runs ")[1]
    assert "TensorRT of JetPack" not in found and not found["tensorrt_rtx"].good


@pytest.mark.parametrize(("name", "target"), [("agx-orin", "jetson-jp72"), ("thor", "jetson-jp7")])
def test_other_jetsons(name: str, target: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both on JetPack 7; without TensorRT in this Python nothing but a CPU runs."""
    found = examine(monkeypatch, tree(tmp_path, name), {}, "there is no NVIDIA driver")
    assert found["Jetson"].good and found["Jetson"].text.endswith(f"target {target}")
    assert found["targets"].text == "builds for cpu; runs cpu"
    assert not found["driver"].good and not found["driver"].needed


def test_a_jetson_that_does_not_fit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another TensorRT than JetPack's, a JetPack that is too old, one that is too new, a container that hides it."""
    root = tree(tmp_path, "orin-nano")
    found = examine(monkeypatch, root, {"tensorrt": Library((10, 7, 0))}, [ORIN])
    assert not found["TensorRT of JetPack"].good
    assert "Python finds TensorRT 10.7.0, but JetPack 6.2 ships 10.3" in found["TensorRT of JetPack"].text
    (root / "etc/nv_tegra_release").write_text(RELEASE.format(36, "3.0"))
    found = examine(monkeypatch, root, {}, [ORIN])
    assert not found["Jetson"].good and "too old for every target; install JetPack 6.1" in found["Jetson"].text
    (root / "etc/nv_tegra_release").write_text(RELEASE.format(41, "1.0"))
    found = examine(monkeypatch, root, {}, [ORIN])
    assert "Jetson Linux 41.1.0; this version of trol-edge does not know" in found["Jetson"].text
    (root / "etc/nv_tegra_release").unlink()
    found = examine(monkeypatch, root, {}, [ORIN])
    assert "(in a container, mount that file)" in found["Jetson"].text


def test_a_bare_installation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing optional: each part is named with the command that brings it; that nothing runs, counts."""

    def missing(name: str) -> str:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(doctor.metadata, "version", missing)

    def unloadable(name: str) -> None:
        raise BackendError(f"{name} is not here")

    monkeypatch.setattr(doctor, "is_there", lambda name: False)
    monkeypatch.setattr(doctor, "load", unloadable)
    monkeypatch.setattr(doctor, "devices", lambda: "there is no NVIDIA driver")
    checks = {check.what: check for check in doctor.examine(root=tmp_path)}
    for name in ("cpu", "formats", "camera", "export"):
        assert f"pip install 'trol-edge[{name}]'" in checks[f"extra {name}"].text and not checks[f"extra {name}"].good
    assert checks["targets"].text == "builds for none; runs none"
    assert checks["targets"].needed and not checks["targets"].good
    assert "neither pycuda nor cuda-python" in checks["CUDA from Python"].text


def test_a_library_that_cannot_be_imported(tmp_path: Path) -> None:
    """Installed for another processor, say: the reason, and exit code 1."""
    (tmp_path / "onnxruntime.py").write_text("raise ImportError('wrong ELF class')\n")
    done = subprocess.run(
        [sys.executable, "-m", "trol_edge", "doctor"],
        env=os.environ | {"PYTHONPATH": f"{tmp_path}{os.pathsep}{Path(__file__).resolve().parents[1]}"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1, done.stderr
    assert "!! onnxruntime: installed, but it cannot be imported (ImportError: wrong ELF class)" in done.stdout
    assert "does not work: onnxruntime" in done.stdout


def said(folder: Path, capsys: pytest.CaptureFixture[str]) -> tuple[int, dict[str, Any]]:
    """Exit code, and findings by what they are about."""
    code = cli.main(["doctor", str(folder), "--json"])
    return code, {check["what"]: check for check in json.loads(capsys.readouterr().out)["checks"]}


def test_bundles(nano_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A good one, before and after it was verified; a missing file, altered weights, no bundle, another tool's."""
    folder = tmp_path / "bundle"
    shutil.copytree(nano_bundle, folder, ignore=shutil.ignore_patterns("verified-*"))
    code, checks = said(folder, capsys)
    assert code == 0 and "trol-nano, fp32 for target cpu" in checks["bundle"]["text"]
    assert checks["weights"]["good"] and checks["runs here"]["good"] and checks["memory"]["good"]
    assert "the first load replays it" in checks["self-test"]["text"]
    verify.verify(folder)
    code, checks = said(folder, capsys)
    assert code == 0 and checks["self-test"]["text"].startswith("passed on this machine: onnxruntime ")

    weights = folder / "weights.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    code, checks = said(folder, capsys)
    assert code == 1 and not checks["weights"]["good"] and "copy the bundle again" in checks["weights"]["text"]
    (folder / "step.onnx").unlink()
    code, checks = said(folder, capsys)
    assert code == 1 and "step.onnx is missing" in checks["bundle"]["text"] and "machine" in checks
    code, checks = said(tmp_path, capsys)
    assert code == 1 and "no bundle.json here" in checks["bundle"]["text"]
    assert cli.main(["doctor", str(tmp_path)]) == 1
    assert "does not work: bundle" in capsys.readouterr().out


def test_bundles_that_do_not_run(
    nano_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """For other tools, for a library that is not here, without a self-test, and larger than the memory."""
    folder = tmp_path / "bundle"
    shutil.copytree(nano_bundle, folder)
    manifest = Bundle(folder).manifest
    write_manifest(folder, dataclasses.replace(manifest, target="onnx"))
    code, checks = said(folder, capsys)
    assert code == 1 and "for other tools; for a Runtime export with --target cpu" in checks["runs here"]["text"]
    write_manifest(folder, dataclasses.replace(manifest, target="jetson-jp6"))
    code, checks = said(folder, capsys)
    assert (
        code == 1
        and not checks["runs here"]["good"]
        and "make them with `trol-edge build`" in checks["engines"]["text"]
    )
    files = {name: info for name, info in manifest.files.items() if name != SELFTEST}
    write_manifest(folder, dataclasses.replace(manifest, files=files))
    code, checks = said(folder, capsys)
    assert code == 0 and "the bundle has none" in checks["self-test"]["text"]
    here = doctor.identity.read()
    monkeypatch.setattr(doctor.identity, "read", lambda root="/": dataclasses.replace(here, available_bytes=1000))
    code, checks = said(folder, capsys)
    assert code == 1 and "export with a smaller --context or precision" in checks["memory"]["text"]
