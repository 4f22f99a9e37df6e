"""Install PyTorch for `make engine`: the CPU build on Linux without an NVIDIA GPU, the index's own build elsewhere.

The package index's build for Linux depends on CUDA libraries that an export never uses. This file runs before anything
else is installed, in the interpreter of the environment to install into, so it needs the standard library only.
"""

from __future__ import annotations

import glob
import platform
import subprocess
import sys
from collections.abc import Callable, Sequence
from importlib import metadata

CPU_INDEX = "https://download.pytorch.org/whl/cpu"
# Device files that the driver makes on a desktop, on a Jetson (two generations), and on Linux inside Windows.
GPU_SIGNS = ("/dev/nvidia[0-9]*", "/dev/nvhost-gpu", "/dev/nvgpu/igpu0", "/usr/lib/wsl/lib/nvidia-smi")
# pip prints one of these if an index cannot be reached or has no build for this Python and processor; the second one if
# a constraints file names torch. Anything else (a full disk, a broken download) must not start a larger download.
NOT_FOUND = ("No matching distribution found", "ResolutionImpossible")
CPU_BUILD = "about 190 MB"
CUDA_BUILD = "about 2.7 GB, most of it CUDA libraries"

Pip = Callable[[Sequence[str]], tuple[int, str]]


def has_gpu(signs: Sequence[str] = GPU_SIGNS) -> bool:
    """Whether an NVIDIA driver shows a GPU."""
    return any(glob.glob(sign) for sign in signs)


def run_pip(arguments: Sequence[str]) -> tuple[int, str]:
    """Run this interpreter's pip; returns its exit code and what it wrote to standard error."""
    command = [sys.executable, "-m", "pip", "install", "--disable-pip-version-check", *arguments]
    done = subprocess.run(command, stderr=subprocess.PIPE, text=True)
    return done.returncode, done.stderr


def installed() -> str:
    """The version of the installed PyTorch, or an empty string."""
    try:
        return metadata.version("torch")
    except metadata.PackageNotFoundError:
        return ""


def install(version: str, *, system: str, gpu: bool, present: str, pip: Pip, say: Callable[[str], None]) -> int:
    """Install this version of PyTorch, in the smallest build that serves the machine; returns pip's exit code.

    `present` is the installed version: any build of the wanted one is kept.
    """
    if present.split("+")[0] == version:
        return 0
    linux = system == "Linux"
    if linux and not gpu:
        say(f"fetching PyTorch {version}, CPU build, {CPU_BUILD} (no NVIDIA GPU here; TORCH=... overrides this)")
        # Without dependencies, because the project's own installation fetches them from the usual index. That leaves
        # one page of one index to ask for, so an index that does not answer costs half a minute.
        limits = ["--timeout", "15", "--retries", "1"]
        code, output = pip(["--no-deps", "--index-url", CPU_INDEX, *limits, f"torch=={version}+cpu"])
        if code == 0 or not any(reason in output for reason in NOT_FOUND):
            if code != 0:
                say(output.strip())
            return code
        say(f"{CPU_INDEX} cannot be reached, or has no such build for this Python")
    say(f"fetching PyTorch {version}, the package index's own build" + (f", {CUDA_BUILD}" if linux else ""))
    code, output = pip([f"torch=={version}"])
    if code != 0:
        say(output.strip())
    return code


def main() -> int:
    """Install the version named on the command line; returns the exit code."""
    return install(
        sys.argv[1],
        system=platform.system(),
        gpu=has_gpu(),
        present=installed(),
        pip=run_pip,
        say=lambda text: print(text, flush=True),
    )


if __name__ == "__main__":
    sys.exit(main())
