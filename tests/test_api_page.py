"""The documents: snippets run as written, commands exist, links lead somewhere, figures agree; API.md names all."""

from __future__ import annotations

import dataclasses
import importlib
import importlib.util
import re
import shlex
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer.main
from PIL import Image

import trol_edge
from tests.conftest import NANO
from trol_edge.answering.options import AnswerOptions, Options
from trol_edge.cli.main import app

ROOT = Path(__file__).resolve().parents[1]
API = ROOT / "trol_edge" / "API.md"
FILES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    ROOT / "SECURITY.md",
    ROOT / "CHANGELOG.md",
    API,
    *sorted((ROOT / "docs").glob("*.md")),
]
PAGES = {str(path.relative_to(ROOT)): path.read_text(encoding="utf-8") for path in FILES}
PAGE = PAGES["trol_edge/API.md"]
MAKEFILE = (ROOT / "Makefile").read_text(encoding="utf-8")


def blocks(page: str, language: str) -> list[str]:
    """The fenced blocks of a page in a language, wherever they are indented."""
    found = re.findall(rf"^( *)```{language}\n(.*?)^\1```$", page, re.M | re.S)
    return ["".join(line.removeprefix(indent) for line in block.splitlines(True)) for indent, block in found]


# -- Python ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name, page in PAGES.items() if "```python" in page])
def test_every_snippet_runs(name: str, nano_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In order, in one interpreter per page, in a folder that holds what the pages say."""
    snippets = blocks(PAGES[name], "python")
    assert len(snippets) == PAGES[name].count("```python") > 0
    if any("response_format" in snippet for snippet in snippets):
        pytest.importorskip("llguidance", reason="the page shows response_format: pip install 'trol-edge[formats]'")
    (tmp_path / "build").mkdir()
    (tmp_path / "build" / "trol-nano").symlink_to(nano_bundle.resolve())
    shutil.copy(NANO / "scene.png", tmp_path)
    (tmp_path / "export").symlink_to(ROOT / "export")
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {"__name__": "page"}
    for number, snippet in enumerate(snippets, 1):
        exec(compile(snippet, f"{name}, snippet {number}", "exec"), names)
    if name == "trol_edge/API.md":
        assert str(names["choice"]) == "cyan ring"
        assert len(names["answers"]) == 2
        with pytest.raises(trol_edge.TrolEdgeError, match="closed"):
            names["rt"].generate("Is it closed?")


def test_the_picture_shows_what_the_bundle_answers(nano_bundle: Path, tmp_path: Path) -> None:
    """Drawn again, the first picture is the committed one, with the right answer in it."""
    spec = importlib.util.spec_from_file_location("pictures", ROOT / "docs" / "pictures.py")
    assert spec and spec.loader
    pictures = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(pictures)
    assert pictures.question(nano_bundle, tmp_path / "question.png") == "cyan ring"
    with Image.open(ROOT / "docs" / "images" / "question.png") as committed:
        committed.load()
        with Image.open(tmp_path / "question.png") as drawn:
            drawn.load()
            assert committed.text == drawn.text == {"question": pictures.QUESTION, "answer": "cyan ring"}  # type: ignore[attr-defined]
            assert committed.size == drawn.size
    assert all(
        pictures.QUESTION in PAGES[page] and '"cyan ring"' in PAGES[page] for page in ("README.md", "docs/index.md")
    )


# -- the shell ---------------------------------------------------------------------------------------------------------

COMMAND: Any = typer.main.get_command(app)
EXTRAS = set(re.findall(r"^(\w+) = \[", (ROOT / "pyproject.toml").read_text(encoding="utf-8"), re.M))
TARGETS = set(re.findall(r"^([a-z][a-z0-9-]*):", MAKEFILE, re.M))
# What comes from elsewhere, and is not looked into.
OTHERS = {"openssl", "git", "twine", "unzip", "pre-commit"}


def wrong_command(line: str) -> str | None:
    """What is wrong with a command line of a page, or None."""
    words = shlex.split(line, comments=True)
    if ">" in words:
        words = words[: words.index(">")]
    if not words or words[0] in OTHERS:
        return None
    if words[0] == "trol-edge":
        return wrong_verb(words[1:])
    if words[0] == "make":
        return wrong_make(words[1:])
    if words[:2] == ["python", "-m"]:
        return None if exists(words[2]) else f"no module {words[2]}"
    if words[0] == "python":
        return None if (ROOT / words[1]).is_file() else f"no file {words[1]}"
    if words[:2] == ["pip", "install"]:
        extra = re.fullmatch(r"trol-edge\[(\w+)\]", words[2])
        return None if extra and extra[1] in EXTRAS else f"no extra {words[2]}"
    return f"unknown command {words[0]}"


def wrong_verb(words: list[str]) -> str | None:
    """Let the command line's own parser read them; nothing is run."""
    verb = COMMAND.commands.get(words[0]) if words else None
    if words == ["--help"]:
        return None
    if verb is None:
        return f"no verb {words}"
    try:
        verb.make_context(words[0], list(words[1:]))
    except Exception as error:  # the parser's own class: typer may carry a copy of click
        if hasattr(error, "format_message"):
            return f"{words[0]}: {error.format_message()}"
        if type(error).__name__ == "Exit":  # --help
            return None
        raise
    return None


def wrong_make(words: list[str]) -> str | None:
    """Targets exist, and variables are read by the Makefile."""
    for word in words:
        name, sign, _ = word.partition("=")
        if sign and f"$({name})" not in MAKEFILE and f"$(if $({name})" not in MAKEFILE:
            return f"the Makefile reads no {name}"
        if not sign and word not in TARGETS:
            return f"no target {word}"
    return None


def exists(module: str) -> bool:
    """Without importing more than its parents."""
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:
        return False


def commands() -> Iterator[tuple[str, str]]:
    """Every line of every shell block, with its page."""
    for name, page in PAGES.items():
        for block in blocks(page, "sh"):
            for line in block.replace("\\\n", " ").splitlines():
                yield name, line


def test_every_command_exists() -> None:
    """Verbs with their options and values, targets with their variables, modules, extras."""
    found = list(commands())
    assert len(found) > 50
    assert [(name, wrong) for name, line in found if (wrong := wrong_command(line))] == []


def spans(page: str) -> list[str]:
    """The code in a page's sentences and tables; fenced blocks are not among them."""
    return re.findall(r"`([^`]+)`", re.sub(r"^( *)```.*?^\1```$", "", page, flags=re.M | re.S))


def test_the_readme_names_every_verb() -> None:
    """In its table, each once."""
    readme = PAGES["README.md"]
    table = readme[readme.index("| verb | does |") : readme.index("## Read on")]
    named = [verb for row in table.splitlines()[2:] for verb in spans(row.split(" | ")[0])]
    assert sorted(named) == sorted(COMMAND.commands)


def test_verbs_and_targets_in_sentences_exist() -> None:
    """Also those that are named with `...` in place of arguments."""
    wrong = []
    seen = 0
    for name, page in PAGES.items():
        for span in spans(page):
            words = span.split()
            if words[0] == "make" and len(words) > 1 and "..." not in span:
                seen += 1
                if problem := wrong_make(shlex.split(span)[1:]):
                    wrong.append((name, span, problem))
            if words[0] == "trol-edge" and len(words) > 1 and words[1] != "--help":
                seen += 1
                verb = COMMAND.commands.get(words[1])
                options = {opt for p in verb.params for opt in (*p.opts, *p.secondary_opts)} if verb else set()
                if verb is None or {w for w in words[2:] if w.startswith("-")} - options - {"--help"}:
                    wrong.append((name, span, "no such verb or option"))
    assert seen > 30
    assert wrong == []


@pytest.mark.parametrize(
    "line",
    [
        "trol-edge exprot trol-nano -o build/x",
        "trol-edge export trol-nano -o build/x --precison int8",
        "trol-edge export trol-nano",
        "trol-edge soak build/trol-nano --minutes many",
        "make engin",
        "make engine MODLE=trol-1.8b",
        "python -m trol_edge.examples.kamera",
        "python docs/nothing.py",
        "pip install 'trol-edge[cpus]'",
        "rm -rf build",
    ],
)
def test_wrong_commands_are_seen(line: str) -> None:
    """Each check can fail."""
    assert wrong_command(line)


# -- links and figures -------------------------------------------------------------------------------------------------


def test_every_link_leads_to_a_file() -> None:
    """Pictures among them, and every page of docs/ is in the site's menu."""
    missing = []
    for name, page in PAGES.items():
        for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", page):
            # Pages of docs/ that include a file elsewhere show its links as they are.
            if "://" not in target and not (ROOT / name).parent.joinpath(target).exists():
                missing.append((name, target))
        for included in re.findall(r'^--8<-- "(.+)"$', page, re.M):
            assert not re.search(r"\]\((?!https://)", PAGES.get(included, "")), f"{included} is shown at another place"
    assert missing == []
    menu = set(re.findall(r'= "(\S+\.md)"', (ROOT / "zensical.toml").read_text(encoding="utf-8")))
    assert menu == {str(path.relative_to(ROOT / "docs")) for path in (ROOT / "docs").rglob("*.md")}


PATH = re.compile(r"(?:\.ci|\.github|calibration|deploy|docs|export|runtimes|tests|trol_edge)/[\w./*-]*")


def test_every_path_in_sentences_exists() -> None:
    """Files and folders of this repository that a page names, in whichever folder they are now."""
    missing = [
        (name, path)
        for name, page in PAGES.items()
        for span in spans(page)
        for path in PATH.findall(span)
        if span.startswith(path) and not list(ROOT.glob(path.rstrip("/.")))
    ]
    named = [
        (name, word, path)
        for name, page in PAGES.items()
        for word, path in re.findall(r"`(\w+)`\s+(?:in|of)\s+`([\w./-]+\.py)`", page)
    ]
    assert len(named) > 10
    missing += [entry for entry in named if entry[1] not in (ROOT / entry[2]).read_text(encoding="utf-8")]
    assert missing == []


def test_the_readme_is_short_and_its_figures_are_those_of_the_results() -> None:
    """Every number of its table is in a row of docs/results.md that names the same model and precision."""
    readme, results = PAGES["README.md"], PAGES["docs/results.md"]
    assert len(readme.splitlines()) <= 120
    profile = re.findall(r"^\| (trol-nano\S*) (fp32|int8|int4) \|(.*)\|$", results, re.M)
    cells = {(model, precision): [c.strip() for c in rest.split("|")] for model, precision, rest in profile}
    accuracy: dict[tuple[str, str], list[str]] = {}
    section = results[results.index("## What precision costs") : results.index("## Speed in FP32")]
    model = ""
    for first, precision, *right in re.findall(r"^\| ([^|]*)\| ([^|]+) \| ([\d.]+) \| ([\d.]+) \|", section, re.M):
        model = first.strip() or model
        accuracy.setdefault((model, precision.split(",")[0]), right)
    rows = re.findall(r"^\| (\S*) ?\| (fp32|int8|int4) \|(.*)\|$", readme, re.M)
    assert len(rows) == 6
    model = ""
    for first, precision, rest in rows:
        model = first or model
        token, step, peak, *right = (c.strip() for c in rest.split("|"))
        row = cells[model, precision]
        assert (token, step, peak) == (row[4], row[5].split(" / ")[0], row[8]), (model, precision)
        assert right == accuracy[model, precision], (model, precision)
    for sentence in ("1.57 times as fast", "0.95 times"):
        assert sentence in readme and sentence in results


def test_no_table_stands_twice() -> None:
    """One copy: no row of figures is on two pages (the README's own selection has other columns)."""
    seen: dict[str, str] = {}
    for name, page in PAGES.items():
        for row in re.findall(r"^\|.*\d.*\d.*\|$", page, re.M):
            assert row not in seen, (row, name, seen[row])
            seen[row] = name


def test_the_citation_is_of_this_version() -> None:
    """CITATION.cff is written by hand; `make release-check` compares the changelog."""
    assert f"version: {trol_edge.__version__}\n" in (ROOT / "CITATION.cff").read_text(encoding="utf-8")


# -- the API -----------------------------------------------------------------------------------------------------------


def test_the_page_names_everything_public() -> None:
    """Classes and their fields, methods of Runtime, options with their defaults, errors."""
    for name in set(trol_edge.__all__) - {"__version__", "LatestCounts", "Timings", "TokenLogprob", "Option"}:
        assert re.search(rf"\b{name}\b", PAGE), name
    for field in dataclasses.fields(trol_edge.Answer):
        assert f"`{field.name}`" in PAGE, field.name
    for name in vars(trol_edge.Runtime):
        if not name.startswith("_"):
            assert re.search(rf"\b{name}\b", PAGE), name
    rows = [line for line in PAGE.splitlines() if line.startswith("| `")]
    for option in dataclasses.fields(Options):
        assert any(f"`{option.name}`" in row for row in rows), option.name
    options = PAGE[PAGE.index("## Options") : PAGE.index("## Questions")]
    for name, default in re.findall(r"^\| `(\w+)` \| `?([^|`]*)`? \|", options, re.M):
        field = {f.name: f for f in dataclasses.fields(Options)}[name]
        assert default.strip().strip('"') == str(field.default), name
    assert len(PAGE.splitlines()) < 180, "one page"


def test_the_reference_names_everything_public() -> None:
    """The page made from docstrings shows all that `import trol_edge` gives."""
    shown = re.findall(r"^::: (\S+)", PAGES["docs/reference.md"], re.M)
    assert [name for name in shown if not documented(name)] == []
    public = {f"trol_edge.{name}" for name in set(trol_edge.__all__) - {"__version__", "IMAGE", "TrolEdgeError"}}
    assert public <= set(shown)


def documented(name: str) -> bool:
    """Whether a dotted name is a module, or something with a docstring in one."""
    if exists(name):
        return True
    module, _, last = name.rpartition(".")
    return exists(module) and bool(getattr(importlib.import_module(module), last, None).__doc__)


def test_the_typed_keywords_are_the_options() -> None:
    """The dataclass that checks and the TypedDict that type checkers read say the same."""
    fields = {field.name: field.type for field in dataclasses.fields(Options)}
    assert list(AnswerOptions.__annotations__) == list(fields)
    for name, hint in AnswerOptions.__annotations__.items():
        assert hint.__forward_arg__ == fields[name], name
