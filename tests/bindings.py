"""The real Python bindings of TensorRT, on a machine without TensorRT: fetched, imported, and turned into type stubs.

`python -m tests.bindings` (`make bindings`) fetches them: one wheel of about 1 MB per version, without libraries. They
need nine C functions to load, so a stub library with those names is compiled; each returns NULL, so nothing can be
built or run, but classes, methods, signatures, properties and enum members are the real ones.
"""

from __future__ import annotations

import ast
import json
import os
import re
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
CACHE = Path(os.environ.get("TROL_EDGE_TRT_BINDINGS", ROOT / "build" / "trt-bindings"))
# JetPack 6.1 and 6.2, 7.0 and 7.1, 7.2, and what is newest.
VERSIONS = ("10.3.0", "10.13.3.9", "10.16.1.11", "11.4.0.106")
FUNCTIONS = (
    "createInferBuilder_INTERNAL createInferRefitter_INTERNAL createInferRuntime_INTERNAL getBuilderPluginRegistry "
    "createNvOnnxParserRefitter_INTERNAL createNvOnnxParser_INTERNAL getPluginRegistry initLibNvInferPlugins "
    "getNvOnnxParserVersion"
)


def fetch(version: str) -> Path:
    """Folder with the bindings of a version, downloaded and given its stub libraries where it is not there yet."""
    folder = CACHE / version
    if folder.is_dir():
        return folder
    CACHE.mkdir(parents=True, exist_ok=True)
    part = CACHE / f".{version}.{os.getpid()}"
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps"]
    try:
        subprocess.run([*pip, "--target", part, f"tensorrt-cu12-bindings=={version}"], check=True)
        source = part / "stub.c"
        source.write_text("".join(f"void *{name}(void) {{ return 0; }}\n" for name in FUNCTIONS.split()))
        for library in ("nvinfer", "nvinfer_plugin", "nvonnxparser"):
            name = f"lib{library}.so.{version.split('.')[0]}"
            compiler = [shutil.which("cc") or "gcc", "-shared", "-fPIC", f"-Wl,-soname,{name}"]
            subprocess.run([*compiler, "-o", part / name, source], check=True)
        part.rename(folder)
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return folder


def python(folder: Path, code: str, *arguments: str) -> str:
    """Standard output of an interpreter in which `tensorrt_bindings` of that folder can be imported."""
    paths = {"PYTHONPATH": os.pathsep.join((str(folder), str(ROOT))), "LD_LIBRARY_PATH": str(folder)}
    command = [sys.executable, "-c", code, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | paths)
    assert done.returncode == 0, done.stderr
    return done.stdout


def describe(module: Any) -> dict[str, Any]:
    """Classes of a TensorRT module: bases, methods (signature lines), properties, enum members, nested classes."""

    def signatures(function: Any) -> list[str]:
        doc = getattr(function, "__doc__", None) or getattr(getattr(function, "__func__", None), "__doc__", None) or ""
        lines = [re.sub(r"^\d+\. ", "", line.strip()) for line in doc.splitlines()]
        lines = [line for line in lines if re.match(r"^\w+\(.*\)( -> .*)?$", line)]
        return [line for line in lines if "*args, **kwargs" not in line]

    def one(cls: Any) -> dict[str, Any]:
        members = getattr(cls, "__members__", None)
        if members is not None:
            return {"members": sorted(members)}
        found: dict[str, Any] = {"bases": [b.__name__ for b in cls.__bases__ if b.__name__ != "pybind11_object"]}
        found |= {"methods": {}, "properties": {}, "classes": {}}
        for name, value in vars(cls).items():
            if isinstance(value, property):
                found["properties"][name] = value.fset is not None
            elif isinstance(value, type):
                found["classes"][name] = one(value)
            elif (callable(value) or isinstance(value, staticmethod)) and (name[0] != "_" or name == "__init__"):
                found["methods"][name] = signatures(value)
        return found

    classes = {n: v for n, v in vars(module).items() if isinstance(v, type) and v.__module__.startswith("tensorrt")}
    return {"version": module.__version__, "classes": {name: one(cls) for name, cls in classes.items()}}


# The bindings do not tell the types of properties; these are ours, of the ones that we use. Any other is `object`,
# with which a type checker lets nobody do anything.
PROPERTIES = {
    "num_inputs": "int",
    "num_outputs": "int",
    "num_layers": "int",
    "num_errors": "int",
    "num_io_tensors": "int",
    "num_optimization_profiles": "int",
    "device_memory_size_v2": "int",
    "name": "str",
    "shape": "Dims",
    "dtype": "DataType",
    "type": "LayerType",
    "attention": "IAttention",
    "decomposable": "bool",
    "progress_monitor": "IProgressMonitor",
}
# What Python subclasses override is called with other arguments than the C++ docstring says (NVIDIA's own examples:
# write(self, data)), and None is a parent of the first phase.
OVERRIDDEN = {
    "write": "def write(self, data: bytes) -> int: ...",
    "step_complete": "def step_complete(self, phase_name: str, step: int) -> bool: ...",
    "phase_start": "def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None: ...",
}
HEAD = """
from collections.abc import Sequence
from typing import Any, ClassVar, Iterator, SupportsInt, overload
class _Enum:
    @property
    def name(self) -> str: ...
    def __int__(self) -> int: ...
"""
# Implicit conversions and protocols that docstrings do not show. Dims: from tuple and list, and iterable.
BODIES = {
    "Dims": "def __iter__(self) -> Iterator[int]: ...\ndef __len__(self) -> int: ...",
    "IHostMemory": "def __buffer__(self, flags: int, /) -> memoryview: ...",
}
WORDS = {
    "int": "int",
    "bool": "bool",
    "str": "str",
    "float": "float",
    "None": "None",
    "object": "object",
    "tuple": "tuple[int, ...]",
    "list": "list[int]",
    "buffer": "bytes | memoryview | IHostMemory | Any",
    "typing_extensions.Buffer": "bytes | memoryview | IHostMemory | Any",
    "typing.SupportsInt": "SupportsInt",
    "Dims": "Dims | tuple[int, ...] | list[int]",
}


def is_python(text: str) -> bool:
    """Some docstrings are none (`arg in: int`); their signatures are left out, and so not to be used."""
    try:
        ast.parse(text)
    except SyntaxError:
        return False
    return True


def stub(description: dict[str, Any]) -> str:
    """The .pyi of a described module."""
    known = set(description["classes"])

    def kind(text: str, result: bool = False) -> str:
        text = re.sub(r"tensorrt\w*\.(tensorrt\.)?", "", text.strip())
        if text == "Dims" and result:
            return "Dims"
        if text in WORDS:
            return WORDS[text]
        if match := re.fullmatch(r"(?:List|list|collections\.abc\.Sequence)\[(.*)\]", text):
            return f"{'list' if result else 'Sequence'}[{kind(match[1], result)}]"
        name = text.split("::")[-1].split(".")
        if name[0] == "IParserError":
            name = ["ParserError"]
        return ".".join(name) if name[0] in known else "Never_known"

    def method(name: str, lines: list[str]) -> list[str]:
        if name in OVERRIDDEN:
            return [OVERRIDDEN[name]]
        found = []
        for line in lines:
            match = re.fullmatch(r"\w+\((.*)\)(?: -> (.*))?", line)
            assert match, line
            # Defaults such as <X.STATIC: 0> hold no comma or bracket that could mislead this.
            parts = re.split(r", (?=\w+: )", re.sub(r" = <[^>]*>", " = ...", match[1]))
            arguments = ["self"] if parts[0].startswith("self") else []
            for part in parts[len(arguments) :]:
                if not part:
                    continue
                argument, _, rest = part.partition(": ")
                hint, _, default = rest.partition(" = ")
                optional = " | None" if default == "None" else ""
                arguments.append(f"{argument}: {kind(hint)}{optional}{' = ...' if default else ''}")
            text = f"def {name}({', '.join(arguments)}) -> {kind(match[2] or 'None', True)}: ..."
            text = text if arguments[:1] == ["self"] else "@staticmethod\n" + text
            if text not in found and is_python(text):
                found.append(text)
        return [f"@overload\n{text}" for text in found] if len(found) > 1 else found

    def one(name: str, entry: dict[str, Any]) -> str:
        if "members" in entry:
            body = "\n".join(f"{m}: ClassVar[{name}]" for m in entry["members"]) or "..."
            return f"class {name}(_Enum):\n{textwrap.indent(body, '    ')}\n"
        bases = ", ".join(b for b in entry["bases"] if b in known)
        lines = [BODIES[name]] if name in BODIES else []
        for nested, inner in entry["classes"].items():
            text = one(nested, inner)
            lines.append(text.replace(f"ClassVar[{nested}]", f"ClassVar[{name}.{nested}]"))
        for each, writable in entry["properties"].items():
            hint = PROPERTIES.get(each, "object")
            lines.append(f"@property\ndef {each}(self) -> {hint}: ...")
            if writable:
                lines.append(f"@{each}.setter\ndef {each}(self, value: {hint}) -> None: ...")
        for each, signatures in entry["methods"].items():
            lines += method(each, signatures)
        body = "\n".join(lines) or "..."
        return f"class {name}{f'({bases})' if bases else ''}:\n{textwrap.indent(body, '    ')}\n"

    classes = "\n".join(one(name, entry) for name, entry in description["classes"].items())
    # A class that TensorRT's own docstrings name but do not have: whoever touches it fails the check.
    return HEAD + "class Never_known: ...\n" + classes


DESCRIBE = "import json, sys, importlib\nfrom tests.bindings import describe\n"
DESCRIBE += "print(json.dumps(describe(importlib.import_module(sys.argv[1]))))"


def description(version: str) -> dict[str, Any]:
    """What the bindings of a fetched version hold."""
    found: dict[str, Any] = json.loads(python(CACHE / version, DESCRIBE, "tensorrt_bindings"))
    return found


if __name__ == "__main__":
    for each in VERSIONS:
        print(fetch(each).name, "ready")
