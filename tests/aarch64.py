"""The robot side on real aarch64 wheels, under user-mode emulation: `make test-aarch64` (Debian or Ubuntu, as root).

A Debian arm64 root is made by debootstrap and kept (build/aarch64/root); wheels for it are fetched here by pip, wheels
only, and installed there by its own pip without a network. Bundles made on this machine then answer in both, with the
same tokens. Also: which packages `[jetson]` brings for the Pythons of JetPack 6 and 7: wheels alone, no torch, and no
`tensorrt` that would hide JetPack's. Nothing about a Jetson's speed follows from any of this.
"""

from __future__ import annotations

import json
import os
import platform
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
SUITE, PYTHON = "bookworm", "3.11"  # Debian 12 and its Python
PLATFORMS = ("manylinux_2_28_aarch64", "manylinux_2_27_aarch64", "manylinux_2_17_aarch64", "manylinux2014_aarch64")
TOOLS = {"debootstrap": "debootstrap", "qemu-aarch64-static": "qemu-user-static", "update-binfmts": "binfmt-support"}
JETPACKS = {"6": ("3.10", "manylinux_2_35"), "7": ("3.12", "manylinux_2_39")}  # Python and glibc of Ubuntu 22.04, 24.04
UNWANTED = re.compile(r"torch|nvidia-|tensorrt|triton|onnx$|transformers")
QUESTIONS = ("Describe the scene.", "What is left of the red circle?")


def main(arguments: list[str]) -> int:
    """`aarch64.py FOLDER WHEEL BUNDLE...`: do all of it; `aarch64.py --answer BUNDLE...`: answer here, print JSON."""
    if arguments[0] == "--answer":
        print(json.dumps(answer(arguments[1:])))
        return 0
    folder, wheel = Path(arguments[0]).resolve(), Path(arguments[1]).resolve()
    for jetpack, (python, glibc) in JETPACKS.items():
        resolve(wheel, jetpack, python, glibc)
    root = make_root(folder / "root")
    install(root, folder / "wheels", wheel)
    bundles = [Path(name).resolve() for name in arguments[2:]]
    here = [str(path) for path in bundles]
    own = run([sys.executable, __file__, "--answer", *here])
    work = root / "robot"
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir()
    shutil.copy(__file__, work)
    shutil.copy(ROOT / "export" / "checkpoints" / "trol-nano" / "scene.png", work)
    for path in bundles:
        shutil.copytree(path, work / path.name)
    there = [f"/robot/{path.name}" for path in bundles]
    emulated = run(["chroot", str(root), "/venv/bin/python", "/robot/aarch64.py", "--answer", *there])
    shutil.rmtree(work)
    return report([path.name for path in bundles], json.loads(own), json.loads(emulated))


def answer(bundles: list[str]) -> dict[str, Any]:
    """What this machine answers about the scene, with the seconds and the memory that it took."""
    import resource

    start = time.perf_counter()
    from trol_edge import Runtime  # isort: skip  (first, because it switches telemetry off)
    import onnxruntime

    found: dict[str, Any] = {"import_s": time.perf_counter() - start, "answers": {}}
    found["machine"] = (
        f"{platform.machine()}, Python {platform.python_version()}, onnxruntime {onnxruntime.__version__}"
    )
    beside = Path(__file__).parent
    nearby = [beside / "scene.png", ROOT / "export" / "checkpoints" / "trol-nano" / "scene.png"]
    scene = next(path for path in nearby if path.is_file())
    for bundle in bundles:
        start = time.perf_counter()
        runtime = Runtime(bundle, threads=2)
        answers = [runtime.generate(question, scene) for question in QUESTIONS]
        found["answers"][Path(bundle).name] = {
            "tokens": [list(a.token_ids) for a in answers],
            "texts": [a.text for a in answers],
            "seconds": time.perf_counter() - start,
        }
        runtime.close()
    found["peak_bytes"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return found


def report(names: list[str], own: dict[str, Any], emulated: dict[str, Any]) -> int:
    """Print both machines' answers; the exit status says whether their tokens are the same."""
    for title, found in (("here", own), ("emulated", emulated)):
        seconds = ", ".join(f"{name} {found['answers'][name]['seconds']:.1f} s" for name in names)
        print(
            f"{title}: {found['machine']}; import {found['import_s']:.1f} s, peak memory "
            f"{found['peak_bytes'] / 1e6:.0f} MB{' (the emulator included)' if title == 'emulated' else ''}; "
            f"opened and {len(QUESTIONS)} answers: {seconds}"
        )
    status = 0
    for name in names:
        ours, theirs = own["answers"][name], emulated["answers"][name]
        same = ours["tokens"] == theirs["tokens"]
        print(f"{name}: {'the same tokens' if same else 'OTHER TOKENS'}, {sum(map(len, ours['tokens']))} of them")
        if not same:
            print(f"  here {ours['texts']}\n  emulated {theirs['texts']}")
            status = 1
    return status


def resolve(wheel: Path, jetpack: str, python: str, glibc: str) -> None:
    """Print what `[jetson]` brings on a JetPack; stop where it is not all wheels, or brings what it must not."""
    newest = int(glibc.rpartition("_")[2])
    platforms = [f"manylinux_2_{minor}_aarch64" for minor in range(newest, 16, -1)] + ["manylinux2014_aarch64"]
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--dry-run", "--ignore-installed"]
    command += ["--report", "-", "--target", "unused", "--only-binary", ":all:", "--python-version", python]
    command += [part for name in platforms for part in ("--platform", name)]
    found = json.loads(run([*command, f"{wheel}[jetson]"]))
    packages = sorted(f"{p['metadata']['name']} {p['metadata']['version']}" for p in found["install"])
    print(f"[jetson], JetPack {jetpack}, Python {python}, aarch64: {len(packages)} wheels: {', '.join(packages)}")
    if wrong := [p for p in packages if UNWANTED.match(p)]:
        raise SystemExit(f"[jetson] brings {', '.join(wrong)}")
    if sdists := [p["download_info"]["url"] for p in found["install"] if not p["download_info"]["url"].endswith("whl")]:
        raise SystemExit(f"[jetson] would compile {', '.join(sdists)}")


def make_root(root: Path) -> Path:
    """A Debian arm64 root with Python, made once; programs in it are run by qemu."""
    missing = sorted(package for tool, package in TOOLS.items() if shutil.which(tool) is None)
    if os.getuid() != 0 or missing:
        raise SystemExit(
            "test-aarch64 needs root (for chroot)" + (f" and: apt-get install {' '.join(missing)}" if missing else "")
        )
    binfmt = Path("/proc/sys/fs/binfmt_misc")
    if not (binfmt / "register").exists():
        run(["mount", "-t", "binfmt_misc", "binfmt_misc", str(binfmt)])
    if not (binfmt / "qemu-aarch64").exists():
        run(["update-binfmts", "--enable", "qemu-aarch64"])
    if not (root / "made").exists():
        shutil.rmtree(root, ignore_errors=True)
        root.parent.mkdir(parents=True, exist_ok=True)
        packages = "--include=python3,python3-venv,ca-certificates,libgomp1"
        run(["debootstrap", "--arch=arm64", "--variant=minbase", packages, SUITE, str(root)])
        run(["chroot", str(root), "/usr/bin/python3", "-m", "venv", "/venv"])
        (root / "made").touch()
    return root


def install(root: Path, wheels: Path, wheel: Path) -> None:
    """`pip install 'trol-edge[cpu]'` in the root, of wheels alone."""
    shutil.rmtree(wheels, ignore_errors=True)
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--only-binary", ":all:", "--dest", str(wheels)]
    command += ["--python-version", PYTHON, *(part for name in PLATFORMS for part in ("--platform", name))]
    run([*command, f"{wheel}[cpu]"])
    shutil.rmtree(root / "wheels", ignore_errors=True)
    shutil.copytree(wheels, root / "wheels")
    pip = ["chroot", str(root), "/venv/bin/python", "-m", "pip", "install", "--quiet", "--force-reinstall"]
    run([*pip, "--only-binary", ":all:", "--no-index", "--find-links", "/wheels", "trol-edge[cpu]"])


def run(command: list[str]) -> str:
    """Standard output of a command; where it fails, what it printed, and the end."""
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(command[:6])} ...: exit status {done.returncode}\n{done.stdout}{done.stderr}")
    return done.stdout


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
