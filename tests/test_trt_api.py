"""Held to the real API: what we call in TensorRT exists in every version served, with the arguments that we pass."""

from __future__ import annotations

import ast
import dataclasses
import functools
import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests import bindings
from trol_edge.bundle.trt_operators import Version

pytest.importorskip("mypy.build", reason="mypy is not installed")

ROOT = Path(__file__).resolve().parents[1]
SOURCE = ROOT / "runtimes" / "trt" / "api.py"
RTX = "tensorrt_rtx"
ALL = (*bindings.VERSIONS, RTX)


def describe(version: str) -> dict[str, Any]:
    """Real classes of a version; skips the test where its bindings are not there."""
    if version == RTX:
        if importlib.util.find_spec(RTX) is None:
            pytest.skip("tensorrt_rtx is not installed (make test-rtx installs it)")
        code = bindings.DESCRIBE
        done = subprocess.run([sys.executable, "-c", code, RTX], capture_output=True, text=True, check=True, cwd=ROOT)
        found: dict[str, Any] = json.loads(done.stdout)
        return found
    if not (bindings.CACHE / version).is_dir():
        pytest.skip(f"the bindings of TensorRT {version} are not in {bindings.CACHE} (make bindings fetches them)")
    return bindings.description(version)


described = functools.cache(describe)


def specialise(source: str, version: Version, rtx: bool) -> str:
    """The source as a type checker can see it for one version: `trt` is the module, and what is for others is gone."""
    tree = ast.parse(source)

    class Specialise(ast.NodeTransformer):
        def visit_Assign(self, node: ast.Assign) -> ast.AST | None:
            return None if ast.unparse(node) == "trt = self.module" else node

        def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.AST:
            for decorator in node.decorator_list:
                if isinstance(decorator, ast.Call) and ast.unparse(decorator.func) == "only":
                    since = {k.arg: ast.literal_eval(k.value) for k in decorator.keywords}
                    least = since.get("rtx" if rtx else "classic")
                    if least is None or version < least:
                        node.body = [ast.parse("raise NotImplementedError").body[0]]
                        node.returns = ast.Name("Any")
                        for argument in node.args.args[1:]:
                            argument.annotation = ast.Name("Any")
            node.decorator_list = [d for d in node.decorator_list if not ast.unparse(d).startswith("only")]
            self.generic_visit(node)
            return node

    return ast.unparse(Specialise().visit(tree))


@dataclasses.dataclass
class Checked:
    """What the type checker says of a source: errors, uses (class, attribute) of the API, attributes of unknowns."""

    errors: list[str]
    uses: set[tuple[str, str]]
    unknown: list[str]


def check(source: str, pyi: str, folder: Path) -> Checked:
    """Type-check a source against the stub of one `tensorrt`; what the folder keeps makes the next check faster."""
    from mypy import build, modulefinder, nodes, types
    from mypy.options import Options

    (folder / "tensorrt.pyi").write_text(pyi)
    (folder / "door.py").write_text(source)
    options = Options()
    options.export_types = options.preserve_asts = True
    options.python_version = sys.version_info[:2]
    options.cache_dir = str(folder / "cache")
    options.follow_imports = "skip"
    options.check_untyped_defs = options.disallow_untyped_defs = options.strict_optional = True
    options.warn_unreachable = True
    options.mypy_path = [str(folder)]
    result = build.build([modulefinder.BuildSource(str(folder / "door.py"), "door")], options)
    # The checker's map holds the expressions of all modules; ours are recognised by their place.
    tree = ast.parse(source)
    hints = {id(n) for a in ast.walk(tree) if isinstance(a, ast.arg) and a.annotation for n in ast.walk(a.annotation)}
    attributes = [n for n in ast.walk(tree) if isinstance(n, ast.Attribute)]
    here = {(n.lineno, n.col_offset, n.attr): id(n) in hints for n in attributes}
    uses, unknown = set(), []
    for node in result.types:
        if not isinstance(node, nodes.MemberExpr):
            continue
        hint = here.pop((node.line, node.column, node.name), None)
        if hint is None or hint:
            continue
        if isinstance(node.expr, nodes.NameExpr) and isinstance(node.expr.node, nodes.MypyFile):
            if node.expr.fullname == "tensorrt":
                uses.add(("", node.name))
            continue
        if isinstance(node.expr, nodes.MemberExpr) and isinstance(node.expr.node, nodes.TypeInfo):
            uses.add((node.expr.name, node.name))  # a member of a class, or a class inside it
            continue
        owner = types.get_proper_type(result.types.get(node.expr))
        if isinstance(owner, types.CallableType):  # a class: its constructor, or its members
            owner = types.get_proper_type(owner.ret_type)
        if isinstance(owner, types.Instance):
            if owner.type.fullname.startswith("tensorrt."):
                uses.add((owner.type.fullname.removeprefix("tensorrt."), node.name))
        elif owner is None or isinstance(owner, types.AnyType):
            unknown.append(f"{ast.unparse(tree).splitlines()[node.line - 1].strip()}: .{node.name} of unknown type")
    return Checked(result.errors, uses, unknown)


def numbers(version: str) -> Version:
    """A version as a tuple; TensorRT for RTX counts apart."""
    return (1, 7, 1) if version == RTX else tuple(int(part) for part in version.split(".")[:3])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the type checker keeps what it knows of the standard library."""
    return tmp_path_factory.mktemp("types")


@pytest.mark.slow
@pytest.mark.parametrize("version", ALL)
def test_every_use_exists(version: str, folder: Path) -> None:
    """The whole file type-checks against the real classes of a version, and nothing in it has an unknown type."""
    pyi = bindings.stub(described(version))
    found = check(specialise(SOURCE.read_text(encoding="utf-8"), numbers(version), version == RTX), pyi, folder)
    assert found.errors == []
    # The module object itself is the one thing without a type.
    assert [line for line in found.unknown if "module.__" not in line] == []
    required = {("IExecutionContext", "execute_async_v3"), ("OnnxParser", "parse_from_file"), ("", "Builder")}
    assert required <= found.uses and len(found.uses) > 45
    writes = ("Builder", "build_serialized_network_to_stream") in found.uses
    assert writes == (version != "10.3.0")
    assert (("IRuntimeConfig", "create_runtime_cache") in found.uses) == (version == RTX)


PLANTED = [
    ("execute_async_v3(stream)", "execute_async(stream)"),  # gone
    ("set_input_shape(name, shape)", "set_input_shape(name, shapes=shape)"),  # no such keyword
    ("set_tensor_address(name, pointer)", "set_tensor_address(pointer, name)"),  # wrong order
    ("get_tensor_profile_shape(name, number)", "get_tensor_profile_shape(number)"),  # one missing
    ("trt.MemoryPoolType.WORKSPACE", "trt.MemoryPoolType.DEVICE"),  # no such member
    ("engine.device_memory_size_v2", "engine.device_memory_size_v9"),  # no such property
    ("trt.TensorIOMode.INPUT", "trt.TensorMode.INPUT"),  # no such class
    ("@only(classic=(10, 13), rtx=(1, 7))", "@only(classic=(10, 3), rtx=(1, 7))"),  # not there in 10.3
    ("profile.set_shape(name, smallest, best, largest)", "profile.extra_memory_target.x = 1"),  # type not known
]


@pytest.mark.slow
@pytest.mark.parametrize(("ours", "wrong"), PLANTED)
def test_planted_mistakes_are_seen(ours: str, wrong: str, folder: Path) -> None:
    """The check can fail, in each of the ways that a version drifts."""
    source = SOURCE.read_text(encoding="utf-8")
    assert ours in source
    pyi = bindings.stub(described("10.3.0"))
    assert check(specialise(source.replace(ours, wrong), (10, 3, 0), False), pyi, folder).errors != []


def test_only_this_file_knows_tensorrt() -> None:
    """Nobody else imports it, so that nothing escapes this check; the stand-in and this test's fixtures apart."""
    for path in (p for room in ("trol_edge", "export", "runtimes", "calibration") for p in (ROOT / room).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert path == SOURCE or not [n for n in names if n.split(".")[0].startswith("tensorrt")], path


WITHOUT_LIBRARY = """
import sys
from pathlib import Path
import tensorrt_bindings
from trol_edge.errors import BackendError
from trol_edge.runtimes.trt.api import Library, Network
tensorrt_bindings.__name__ = "tensorrt"
library = Library(tensorrt_bindings)
print(library.title, library.has(Network._stream), library.has(Network.let_attention_decompose))
for call in (lambda: library.parse(Path("absent")), lambda: library.open(b"", "absent")):
    try:
        call()
    except BackendError as error:
        print(error)
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("version", "streams", "attention"),
    [("10.3.0", False, False), ("10.13.3", True, False), ("10.16.1", True, True), ("11.4.0", True, True)],
)
def test_bindings_without_their_library(version: str, streams: bool, attention: bool) -> None:
    """The real module where libnvinfer gives it nothing, as without a driver: an error of ours, not a TypeError."""
    full = next(v for v in bindings.VERSIONS if v.startswith(version))
    described(full)
    lines = bindings.python(bindings.CACHE / full, WITHOUT_LIBRARY).splitlines()
    assert lines[0] == f"TensorRT {version} {streams} {attention}"
    assert lines[1].startswith(f"TensorRT {version} could not start its builder: ")
    assert lines[2].startswith(f"TensorRT {version} could not start: ")
    assert all("is there an NVIDIA GPU and driver? Run `trol-edge doctor` to find out" in line for line in lines[1:])
