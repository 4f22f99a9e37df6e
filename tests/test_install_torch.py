"""Which build of PyTorch `make engine` installs, without a network: pip is a function that answers as pip does."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from trol_edge.export import install_torch
from trol_edge.export.install_torch import CPU_INDEX, NOT_FOUND, has_gpu, install

CPU = [
    "--no-deps", "--index-url", CPU_INDEX, "--timeout", "15", "--retries", "1", "torch==2.13.0+cpu",
]  # fmt: skip
PLAIN = ["torch==2.13.0"]


class Pip:
    """Answers in order, and keeps what it was asked."""

    def __init__(self, *answers: tuple[int, str]) -> None:
        self.answers = list(answers)
        self.calls: list[list[str]] = []

    def __call__(self, arguments: Sequence[str]) -> tuple[int, str]:
        self.calls.append(list(arguments))
        return self.answers.pop(0)


def run(pip: Pip, system: str = "Linux", gpu: bool = False, present: str = "") -> tuple[int, str]:
    """Exit code, and all that was said."""
    said: list[str] = []
    code = install("2.13.0", system=system, gpu=gpu, present=present, pip=pip, say=said.append)
    assert not pip.answers
    return code, "\n".join(said)


def test_the_cpu_build_on_linux_without_a_gpu() -> None:
    """One call, which names the CPU index, and a word about the size before it."""
    pip = Pip((0, ""))
    code, said = run(pip)
    assert (code, pip.calls) == (0, [CPU])
    assert "CPU build, about 190 MB" in said and "TORCH=" in said


@pytest.mark.parametrize("reason", NOT_FOUND)
def test_the_plain_build_where_the_cpu_build_cannot_be_had(reason: str) -> None:
    """And the size of that one is said, too."""
    pip = Pip((1, f"WARNING: Retrying ...\nERROR: {reason} for torch==2.13.0+cpu"), (0, ""))
    code, said = run(pip)
    assert (code, pip.calls) == (0, [CPU, PLAIN])
    assert "cannot be reached" in said and "about 2.7 GB" in said


def test_another_failure_starts_no_larger_download() -> None:
    """A full disk would not become emptier."""
    pip = Pip((1, "ERROR: Could not install packages due to an OSError: [Errno 28] No space left on device"))
    code, said = run(pip)
    assert (code, pip.calls) == (1, [CPU])
    assert "No space left" in said


def test_a_failure_of_the_plain_build_is_said() -> None:
    """With pip's own words."""
    pip = Pip((1, NOT_FOUND[0]), (1, "ERROR: no network"))
    code, said = run(pip)
    assert code == 1 and "no network" in said


@pytest.mark.parametrize(("system", "gpu"), [("Linux", True), ("Darwin", False), ("Darwin", True)])
def test_the_plain_build_with_a_gpu_or_elsewhere(system: str, gpu: bool) -> None:
    """Only on Linux does that one bring CUDA libraries."""
    pip = Pip((0, ""))
    code, said = run(pip, system, gpu)
    assert (code, pip.calls) == (0, [PLAIN])
    assert ("2.7 GB" in said) == (system == "Linux")


@pytest.mark.parametrize("present", ["2.13.0", "2.13.0+cpu", "2.13.0+cu130"])
def test_what_is_installed_is_kept(present: str) -> None:
    """In whichever build."""
    assert run(Pip(), present=present) == (0, "")


def test_another_version_is_replaced() -> None:
    """A stamp is made again when pyproject.toml changes."""
    pip = Pip((0, ""))
    assert run(pip, present="2.9.0+cpu")[0] == 0 and pip.calls == [CPU]


def test_a_gpu_is_seen_by_its_device(tmp_path: Path) -> None:
    """nvidia0 counts; nvidia-caps, which a driver leaves without a GPU, does not."""
    signs = [str(tmp_path / "nvidia[0-9]*")]
    (tmp_path / "nvidia-caps").mkdir()
    assert not has_gpu(signs)
    (tmp_path / "nvidia0").touch()
    assert has_gpu(signs)


def test_runs_as_a_file_before_anything_is_installed() -> None:
    """With the standard library alone (-S: no site-packages), where its version counts as absent or as given."""
    file = install_torch.__file__
    code = f"import runpy; print(sorted(runpy.run_path({file!r})['NOT_FOUND'])[0])"
    done = subprocess.run([sys.executable, "-I", "-S", "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == NOT_FOUND[0]
