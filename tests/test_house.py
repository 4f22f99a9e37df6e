"""The house: what each room may import, what an installation holds, and what no file may say."""

from __future__ import annotations

import ast
import dataclasses
import functools
import inspect
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import trol_edge
from trol_edge import errors

ROOT = Path(__file__).resolve().parents[1]
parsed = functools.cache(ast.parse)  # most rules look at every file
ROOMS = ("calibration", "export", "runtimes")
OTHER_ROOMS = {f"trol_edge.{room}" for room in ROOMS}
# trol_edge <- export <- calibration, runtimes -> trol_edge: what each room may import of the others.
ARROWS: dict[str, set[str]] = {
    "trol_edge": set(),
    "export": {"trol_edge"},
    "calibration": {"trol_edge", "export"},
    "runtimes": {"trol_edge"},
}
# Modules of the room they may import that are not for them: a Runtime opens back ends and answers.
NOT_FOR = {"export": {"trol_edge.runtime"}, "runtimes": {"trol_edge.runtime"}}
# Where the verbs are: each imports the room that it needs inside a function.
LATE = "trol_edge/cli/"
# The only files or folders that know each of these libraries.
HOME: dict[str, tuple[str, ...]] = {
    "torch": (
        "export/",
        *(f"calibration/{name}.py" for name in ("run", "collect", "left_out", "sensitivity", "outliers")),
    ),
    "onnx": (),  # onnx_ir is what we use
    "onnx_ir": ("export/", "calibration/probes.py"),
    "onnxscript": ("export/graphs/canonical.py",),
    "safetensors": ("export/nano/publish.py", "export/reference/checkpoint.py", "export/selftest/record.py"),
    "sentencepiece": ("export/nano/text.py", "export/reference/tokenizer.py"),
    "huggingface_hub": ("export/reference/hub.py",),
    "transformers": (),
    "onnxruntime": ("runtimes/ort.py", "runtimes/rates.py"),
    "tensorrt": ("runtimes/trt/api.py",),  # for type checkers; imported by name when a Library is made
    "tensorrt_rtx": (),
    "cuda": (),  # by name, when a GPU is opened
    "pycuda": ("runtimes/cuda.py",),
    "tokenizers": ("trol_edge/prompt/", "export/reference/tokenizer.py"),
    "typer": ("trol_edge/cli/",),
    "rich": ("trol_edge/cli/",),
    "PIL": (
        "trol_edge/prompt/images.py",
        "trol_edge/prompt/tiles.py",
        "export/scenes.py",
        "export/nano/",
        "calibration/gate_figure.py",
    ),
    "uvicorn": ("trol_edge/serve/door.py",),
    "httptools": ("trol_edge/serve/door.py",),
    "llguidance": ("trol_edge/answering/constrain.py",),
    "cryptography": ("trol_edge/bundle/signature.py",),
    "cv2": ("trol_edge/examples/camera.py",),
    "rclpy": ("trol_edge/examples/ros2_node.py",),
}


@dataclasses.dataclass(frozen=True)
class Import:
    """One import statement, or one call of import_module with a literal."""

    module: str
    names: tuple[str, ...]
    line: int
    late: bool  # inside a function

    def touches(self, prefix: str) -> bool:
        """Whether it imports a module or anything below it, in either spelling."""
        full = [self.module, *(f"{self.module}.{name}" for name in self.names)]
        return any(name == prefix or name.startswith(f"{prefix}.") for name in full)


def imports(source: str, package: str) -> Iterator[Import]:
    """Every import of a source text whose package is `package`; relative ones are made absolute."""

    def visit(node: ast.AST, late: bool) -> Iterator[Import]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.Import):
                yield from (Import(alias.name, (), child.lineno, late) for alias in child.names)
            elif isinstance(child, ast.ImportFrom):
                parents = package.split(".")[: len(package.split(".")) - child.level + 1] if child.level else []
                module = ".".join([*parents, *([child.module] if child.module else [])])
                yield Import(module, tuple(alias.name for alias in child.names), child.lineno, late)
            elif isinstance(child, ast.Call) and child.args and isinstance(child.args[0], ast.Constant):
                called = ast.unparse(child.func).split(".")[-1]
                if called in ("import_module", "__import__", "find_spec"):
                    yield Import(str(child.args[0].value), (), child.lineno, late)
            inside = isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
            yield from visit(child, late or inside)

    yield from visit(parsed(source), False)


def package_of(file: str) -> str:
    """The package of a file, by its path from the root: export/nano/data.py -> trol_edge.export.nano."""
    folder = file.rsplit("/", 1)[0].replace("/", ".")
    return folder if folder.split(".")[0] == "trol_edge" else f"trol_edge.{folder}"


def breaches(source: str, file: str) -> list[str]:
    """What a file (path from the root) imports against the rules."""
    room = file.split("/")[0]
    found = []
    for entry in imports(source, package_of(file)):
        where = f"{file}:{entry.line} imports {entry.module}"
        for other in ROOMS:
            if other != room and other not in ARROWS[room] and entry.touches(f"trol_edge.{other}"):
                late = file.startswith(LATE) and entry.late
                found += [] if late else [f"{where}: {room} does not know {other}"]
            if entry.touches(other):
                found.append(f"{where}: a second copy of a room; import it as trol_edge.{entry.module}")
        found += [f"{where}: not for {room}" for module in NOT_FOR.get(room, ()) if entry.touches(module)]
        found += [
            f"{where}: only {files} may"
            for library, files in HOME.items()
            if entry.touches(library) and not file.startswith(files)
        ]
        if entry.touches("tests"):
            found.append(f"{where}: tests import the package, not the other way round")
    return found


def sources() -> list[Path]:
    """Every Python file of the runtime and the rooms, once: rglob follows no links."""
    return sorted(path for folder in ("trol_edge", *ROOMS) for path in (ROOT / folder).rglob("*.py"))


def test_rooms_keep_their_doors() -> None:
    """Every import of every file, by its syntax tree."""
    files = sources()
    assert len(files) > 100
    found = [b for path in files for b in breaches(path.read_text(encoding="utf-8"), str(path.relative_to(ROOT)))]
    assert found == []


def test_every_home_is_lived_in() -> None:
    """A file that no longer imports a library loses the right to."""
    known = {str(path.relative_to(ROOT)): path.read_text(encoding="utf-8") for path in sources()}
    for library, homes in HOME.items():
        for home in homes:
            inside = {file: source for file, source in known.items() if file.startswith(home)}
            assert any(
                e.touches(library) for file, source in inside.items() for e in imports(source, package_of(file))
            ), f"{home} does not import {library}"


PLANTED = [
    ("trol_edge/bundle/spec.py", "import torch"),
    ("trol_edge/bundle/spec.py", "def f():\n    import onnx.helper"),
    ("trol_edge/bundle/spec.py", "try:\n    from onnxruntime import InferenceSession\nexcept ImportError:\n    pass"),
    ("trol_edge/bundle/spec.py", "if True:\n    import transformers as t"),
    ("trol_edge/prompt/tokenizer.py", "import sentencepiece"),
    ("trol_edge/bundle/spec.py", "import tokenizers"),
    ("trol_edge/runtime.py", "def f():\n    import llguidance"),
    ("trol_edge/prompt/images.py", "import cv2"),
    ("trol_edge/examples/camera.py", "from trol_edge.runtimes import ort"),
    ("trol_edge/bundle/manifest.py", "def f():\n    from trol_edge.export.graphs import trace"),
    ("trol_edge/bundle/manifest.py", "from ..export import graphs"),
    ("trol_edge/bundle/manifest.py", "from .. import runtimes"),
    ("trol_edge/session.py", "from .export import graphs"),
    ("trol_edge/cli/export.py", "from trol_edge.export import pipeline"),
    ("trol_edge/cli/export.py", "class A:\n    from trol_edge import export"),
    ("trol_edge/cli/export.py", "def f():\n    import torch"),
    ("trol_edge/runtime.py", "import importlib\nimportlib.import_module('trol_edge.runtimes.ort')"),
    ("trol_edge/runtime.py", "import typer"),
    ("export/graphs/canonical.py", "from trol_edge.runtimes import ort"),
    ("export/graphs/canonical.py", "def f():\n    from ...runtimes.ort import OrtBackend"),
    ("export/graphs/canonical.py", "from trol_edge.runtime import Runtime"),
    ("export/graphs/canonical.py", "import trol_edge.calibration.samples"),
    ("export/graphs/canonical.py", "from trol_edge.calibration.run import calibrate"),
    ("export/graphs/canonical.py", "import runtimes"),
    ("export/nano/report.py", "from trol_edge.runtime import Runtime"),
    ("export/nano/model.py", "from trol_edge.calibration import samples"),
    ("runtimes/ort.py", "import torch"),
    ("runtimes/ort.py", "import onnx"),
    ("runtimes/ort.py", "import tensorrt as trt"),
    ("runtimes/trt/backend.py", "import tensorrt"),
    ("runtimes/trt/api.py", "from cuda.bindings import runtime"),
    ("runtimes/ort.py", "from trol_edge.export.reference.model import Decoder"),
    ("runtimes/ort.py", "from trol_edge.runtime import Runtime"),
    ("runtimes/ort.py", "from trol_edge.calibration import samples"),
    ("calibration/samples.py", "import torch.nn"),
    ("calibration/samples.py", "from trol_edge.runtimes import ort"),
    ("calibration/samples.py", "from tests.cases import Run"),
    ("calibration/run.py", "from trol_edge.runtimes import ort"),
]


@pytest.mark.parametrize(("file", "source"), PLANTED)
def test_planted_breaches_are_seen(file: str, source: str) -> None:
    """Each rule can fail."""
    assert len(breaches(source, file)) >= 1


@pytest.mark.parametrize(
    ("file", "source"),
    [
        ("trol_edge/cli/export.py", "def f():\n    from trol_edge.export import pipeline"),
        ("trol_edge/prompt/tokenizer.py", "import tokenizers"),
        (
            "export/graphs/canonical.py",
            "import torch\nimport onnx_ir\nfrom trol_edge.export.reference.model import Decoder",
        ),
        ("export/nano/data.py", "from trol_edge.export import scenes"),
        ("runtimes/ort.py", "import onnxruntime as ort\nfrom trol_edge.bundle.manifest import Bundle"),
        ("calibration/evaluate.py", "from trol_edge.runtime import Runtime\nfrom trol_edge.export import scenes"),
        ("calibration/run.py", "import torch\nfrom trol_edge.export.reference.checkpoint import Checkpoint"),
        ("trol_edge/bundle/spec.py", "import torchlike\nimport onnx_something_else"),
    ],
)
def test_open_doors_are_no_breaches(file: str, source: str) -> None:
    """Nor does a rule forbid what it should not."""
    assert breaches(source, file) == []


# -- circles and private members ---------------------------------------------------------------------------------------


def module_of(file: str) -> str:
    """The module of a file, by its path from the root."""
    name = file.rsplit("/", 1)[1].removesuffix(".py")
    return package_of(file) if name == "__init__" else f"{package_of(file)}.{name}"


def folder_of(module: str) -> str:
    """A module's folder within its room; a module directly in the room counts as its own folder."""
    parts = module.split(".")
    depth = 3 if len(parts) > 1 and parts[1] in ROOMS else 2
    return ".".join(parts[:depth])


def arrows(files: dict[str, str]) -> dict[str, set[str]]:
    """Which modules each module imports, late imports included, of files by path from the root."""
    known = {module_of(file) for file in files}
    found: dict[str, set[str]] = {}
    for file, source in files.items():
        mine = found.setdefault(module_of(file), set())
        for entry in imports(source, package_of(file)):
            full = {f"{entry.module}.{name}" for name in entry.names}
            mine |= (full & known) or ({entry.module} & known)
    return found


def circle(graph: dict[str, set[str]]) -> list[str]:
    """One circle of a graph, or an empty list."""
    done: set[str] = set()

    def visit(node: str, path: list[str]) -> list[str]:
        if node in path:
            return [*path[path.index(node) :], node]
        if node in done:
            return []
        for other in sorted(graph.get(node, ())):
            if found := visit(other, [*path, node]):
                return found
        done.add(node)
        return []

    return next((found for node in sorted(graph) if (found := visit(node, []))), [])


def folded(graph: dict[str, set[str]]) -> dict[str, set[str]]:
    """The graph of folders."""
    found: dict[str, set[str]] = {}
    for module, others in graph.items():
        mine = found.setdefault(folder_of(module), set())
        mine |= {folder_of(other) for other in others} - {folder_of(module)}
    return found


def privates(source: str) -> list[str]:
    """Private members of other modules that a source text uses: `other._name`, or `from other import _name`."""
    tree, own, found = parsed(source), set[str](), []
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef):
            for child in ast.walk(node):
                if isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef)):
                    own.add(child.name)
                elif isinstance(child, ast.Name) and isinstance(child.ctx, ast.Store):
                    own.add(child.id)
                elif (
                    isinstance(child, ast.Attribute)
                    and isinstance(child.ctx, ast.Store)
                    and ast.unparse(child.value) in ("self", "cls")
                ):
                    own.add(child.attr)
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            found += [f"{node.lineno}: import {a.name}" for a in node.names if re.match(r"_(?!_|version$)", a.name)]
        elif (
            isinstance(node, ast.Attribute)
            and re.match(r"_(?!_)", node.attr)
            and ast.unparse(node.value) not in ("self", "cls")
            and node.attr not in own
            and ast.unparse(node) != "os._exit"  # documented under this name
        ):
            found.append(f"{node.lineno}: {ast.unparse(node)}")
    return found


def test_no_circles() -> None:
    """Neither between files nor between folders."""
    graph = arrows({str(path.relative_to(ROOT)): path.read_text(encoding="utf-8") for path in sources()})
    assert sum(map(len, graph.values())) > 300
    assert circle(graph) == []
    assert circle(folded(graph)) == []


def test_planted_circles_are_seen() -> None:
    """Late imports count, and so does a circle of folders that no file closes by itself."""
    files = {
        "trol_edge/bundle/spec.py": "",
        "trol_edge/bundle/sizes.py": "from trol_edge.bundle import spec",
        "export/nano/data.py": "from trol_edge.bundle.sizes import cache_bytes",
    }
    assert circle(arrows(files)) == circle(folded(arrows(files))) == []
    assert circle(arrows(files | {"trol_edge/bundle/spec.py": "def f():\n    from .sizes import cache_bytes"})) == [
        "trol_edge.bundle.sizes",
        "trol_edge.bundle.spec",
        "trol_edge.bundle.sizes",
    ]
    files |= {"trol_edge/plan/rates.py": "import trol_edge.bundle.spec", "trol_edge/plan/time.py": ""}
    assert circle(folded(arrows(files))) == []
    files |= {"trol_edge/bundle/sizes.py": "import trol_edge.plan.time"}
    assert circle(arrows(files)) == []
    assert circle(folded(arrows(files))) == ["trol_edge.bundle", "trol_edge.plan", "trol_edge.bundle"]


def test_no_module_uses_anothers_private_members() -> None:
    """Without exceptions."""
    files = [*sources(), *(ROOT / "tests").rglob("*.py")]
    found = [f"{path.relative_to(ROOT)}:{use}" for path in files for use in privates(path.read_text(encoding="utf-8"))]
    assert found == []


def test_planted_private_uses_are_seen() -> None:
    """Uses through an object, a module and a name are seen; a class may use members of its own kind."""
    assert len(privates("def f(runtime):\n    return runtime._backend")) == 1
    assert len(privates("import a\n\n\ndef _b(): ...\n\n\na._b()")) == 1
    assert len(privates("from a import _b")) == 1
    own = "class A:\n    def __init__(self, other):\n        self._x = other._x\n\n\ndef f(a):\n    return a._x"
    assert privates(own) == []


# -- what is loaded ----------------------------------------------------------------------------------------------------


def python(code: str, **more: Any) -> str:
    """Standard output of a fresh interpreter in the root folder."""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True, **more)
    return done.stdout


HEAVY = {"torch", "transformers", "onnx", "onnxruntime", "onnxscript", "onnx_ir", "safetensors", "sentencepiece"}
HEAVY |= {"huggingface_hub", "typer", "rich", "llguidance", "cv2", "cryptography", "uvicorn"}


def test_import_loads_little() -> None:
    """In a fresh interpreter: numpy, pillow and tokenizers, and none of the rooms."""
    loaded = json.loads(python("import trol_edge, sys, json; print(json.dumps(sorted(sys.modules)))"))
    assert set(loaded) & HEAVY == set()
    assert not [name for name in loaded if name.startswith(tuple(OTHER_ROOMS))]
    assert {"numpy", "PIL", "tokenizers", "trol_edge.runtime"} <= set(loaded)


def test_running_a_bundle_loads_no_torch(nano_bundle: Path) -> None:
    """From bundle to answer: onnxruntime is the only heavy library, and no room but runtimes."""
    code = f"""
import json, sys, trol_edge
trol_edge.Runtime({str(nano_bundle)!r}).generate("What is this?", max_new_tokens=2)
print(json.dumps(sorted(sys.modules)))
"""
    loaded = json.loads(python(code))
    assert set(loaded) & HEAVY == {"onnxruntime"}
    rooms = {name for name in loaded if name.startswith(tuple(OTHER_ROOMS))}
    assert rooms == {"trol_edge.runtimes", "trol_edge.runtimes.layered", "trol_edge.runtimes.ort"}


def test_help_loads_no_room() -> None:
    """The command line answers --help without the export extra."""
    code = """
import json, sys
from trol_edge.cli.main import main
assert main(["--help"]) == 0 and main(["export", "--help"]) == 0
print("\\n" + json.dumps(sorted(sys.modules)))
"""
    loaded = json.loads(python(code).splitlines()[-1])
    assert set(loaded) & HEAVY <= {"typer", "rich"}
    assert not [name for name in loaded if name.startswith(tuple(OTHER_ROOMS))]


@pytest.mark.parametrize("room", ROOMS)
def test_rooms_are_no_packages_of_their_own(room: str) -> None:
    """From the root, `import export` would make a second copy of every class; it is refused."""
    done = subprocess.run([sys.executable, "-c", f"import {room}"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1
    assert f"ImportError: import this folder as trol_edge.{room}" in done.stderr
    python(f"import trol_edge.{room}")


# -- what is shipped ---------------------------------------------------------------------------------------------------


def test_packages_are_the_folders() -> None:
    """What ships is found through the links, which show every tool the tree that an installation has."""
    setuptools = pytest.importorskip("setuptools")
    tomllib = pytest.importorskip("tomllib")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    settings = project["tool"]["setuptools"]
    assert {path.parent.name for path in ROOT.glob("*/__init__.py")} == {"trol_edge", *ROOMS}
    found = setuptools.find_packages(str(ROOT), include=settings["packages"]["find"]["include"])
    assert sorted(found) == sorted({package_of(str(path.relative_to(ROOT))) for path in sources()})
    for room in ROOMS:
        assert (ROOT / "trol_edge" / room).resolve() == ROOT / room
        assert os.readlink(ROOT / "trol_edge" / room) == f"../{room}"
    assert settings["package-data"]["trol_edge"] == ["py.typed", "API.md", "plan/programs.json"]
    assert (ROOT / "trol_edge" / "py.typed").is_file()
    names = {re.split(r"[><=~ ;\[]", line)[0] for line in project["project"]["dependencies"]}
    assert names == {"numpy", "pillow", "tokenizers", "typer", "rich"}


def test_runtime_is_python_3_10() -> None:
    """JetPack 6 has Python 3.10: no newer syntax, nothing of the library that came later."""
    newer = {"tomllib", "asyncio.TaskGroup", "contextlib.chdir", "datetime.UTC", "enum.StrEnum", "enum.verify",
             "typing.Self", "typing.override", "typing.assert_never", "typing.LiteralString", "typing.Never",
             "typing.Required", "typing.NotRequired", "typing.Unpack", "typing.TypeVarTuple", "itertools.batched",
             "wsgiref.types", "pathlib.UnsupportedOperation", "operator.call", "math.cbrt", "math.exp2"}  # fmt: skip
    for path in sources():
        source = path.read_text(encoding="utf-8")
        ast.parse(source, feature_version=(3, 10))
        for entry in imports(source, "trol_edge"):
            assert not {name for name in newer if entry.touches(name)}, path
    with pytest.raises(SyntaxError):
        ast.parse("try:\n    pass\nexcept* ValueError:\n    pass", feature_version=(3, 10))


def repository_files() -> list[Path]:
    """Every file that is or would be committed; without git, every file that is not built."""
    try:
        done = subprocess.run(
            ["git", "ls-files", "-co", "--exclude-standard", "-z"], cwd=ROOT, capture_output=True, check=True
        )
        names = [os.fsdecode(name) for name in done.stdout.split(b"\0") if name]
        paths = [ROOT / name for name in names]
    except (OSError, subprocess.CalledProcessError):
        skipped = {"build", "dist", ".git", ".venv", "__pycache__"}
        paths = [p for p in ROOT.rglob("*") if not skipped & set(p.relative_to(ROOT).parts)]
    return [path for path in paths if path.is_file() and not path.is_symlink()]


def test_no_file_knows_this_machine() -> None:
    """Absolute paths of the machine it was written on: not in sources, documents, data or weights."""
    marks = [f"/{name}/".encode() for name in ("work", "root", "tmp/pytest-of-root")]
    files = repository_files()
    assert len(files) > 50
    found = [
        f"{path.relative_to(ROOT)}: {mark.decode()}"
        for path, content in ((path, path.read_bytes()) for path in files)
        for mark in marks
        if mark in content and re.search(rb"(?<![\w.])" + re.escape(mark), content)
    ]
    assert found == []


def test_files_say_what_they_are_for() -> None:
    """One responsibility per file, said in its first line."""
    for path in sources():
        source = path.read_text(encoding="utf-8")
        first = ast.get_docstring(parsed(source))
        assert first, f"{path.name} does not say what it is for"
        assert first.splitlines()[0].endswith((".", ":", "?")), path.name


# -- errors and the public door ----------------------------------------------------------------------------------------


def drawn_tree() -> dict[str, str | None]:
    """Class -> parent, as the docstring of trol_edge.errors draws it."""
    assert errors.__doc__
    parents: dict[str, str | None] = {}
    stack: list[tuple[int, str]] = []
    for line in errors.__doc__.splitlines():
        if match := re.match(r"^([ │├└─]*)([A-Z]\w+Error)\b", line):
            depth = len(match[1])
            while stack and stack[-1][0] >= depth:
                stack.pop()
            parents[match[2]] = stack[-1][1] if stack else None
            stack.append((depth, match[2]))
    return parents


def test_every_error_is_in_the_drawn_tree() -> None:
    """Each class, under its parent, with the sentence that its docstring says too."""
    classes = {name: c for name, c in vars(errors).items() if inspect.isclass(c) and issubclass(c, Exception)}
    assert sorted(classes) == sorted(errors.__all__)
    tree = drawn_tree()
    assert set(tree) == set(classes)
    for name, parent in tree.items():
        assert classes[name].__bases__[0] is (classes[parent] if parent else Exception)
        assert classes[name].__doc__


def test_errors_that_are_raised_are_ours() -> None:
    """What leaves the package on purpose is of the family; the exceptions to that are few and internal."""
    internal = {
        "ImportError": {"export/__init__.py", "runtimes/__init__.py", "calibration/__init__.py"},
        "ValueError": {  # caught by a guard around the reader
            "trol_edge/bundle/graph_file.py",
            "trol_edge/bundle/graph_shapes.py",
            "trol_edge/bundle/graph_sizes.py",
            "trol_edge/bundle/protobuf.py",
            "trol_edge/bundle/selftest.py",
            "trol_edge/bundle/signature.py",
            "trol_edge/bundle/weights.py",
            "trol_edge/prompt/charsmap.py",
            "export/gates.py",
            "export/quantize/stats.py",
        },
        "OSError": {"trol_edge/bundle/folder.py"},  # caught by `writing`
        "AssertionError": {"export/nano/report.py"},
        "error": {"trol_edge/bundle/spec.py"},  # a parameter: BundleError, or another of the family
        "BadParameter": {f"trol_edge/cli/{name}.py" for name in ("checkpoints", "main", "measure", "plan")},
        "Exit": {"trol_edge/cli/check.py", "trol_edge/cli/device.py", "trol_edge/cli/measure.py"},
    }
    found = []
    for path in sources():
        file = str(path.relative_to(ROOT))
        for node in ast.walk(parsed(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call):
                name = ast.unparse(node.exc.func).split(".")[-1]
                if name not in errors.__all__ and file not in internal.get(name, ()):
                    found.append(f"{file}:{node.lineno} raises {name}")
            if isinstance(node, ast.ExceptHandler) and node.type is None:
                found.append(f"{file}:{node.lineno} has a bare except")
    assert found == []


def test_public_names_are_documented() -> None:
    """`__all__` is what there is, each with a docstring; the README uses nothing else (API.md: test_api_page.py)."""
    public = {name for name in vars(trol_edge) if not name.startswith("_")}
    modules = {name for name in public if inspect.ismodule(getattr(trol_edge, name))}
    assert public - modules == set(trol_edge.__all__) - {"__version__"}
    for name in set(trol_edge.__all__) - {"__version__", "IMAGE"}:
        documented = getattr(trol_edge, name)
        assert documented.__doc__, name
        for member, value in vars(documented).items():
            if inspect.isfunction(value) and not member.startswith("_"):
                assert value.__doc__, f"{name}.{member}"
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    used = set(re.findall(r"\btrol_edge\.([A-Z_a-z]\w*)", readme)) - {"examples", "calibration"}
    assert {"Runtime", "IMAGE", "TrolEdgeError"} <= used <= set(trol_edge.__all__)
    assert "trol_edge/API.md" in readme


def test_versions_agree() -> None:
    """One version, in one file, and the changelog knows it."""
    from trol_edge._version import __version__

    assert trol_edge.__version__ == __version__
    assert re.fullmatch(r"\d+\.\d+\.\d+", __version__)
    assert __version__ in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
