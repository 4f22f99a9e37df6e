"""The page that documents the API: every snippet runs as written, and it names everything public."""

from __future__ import annotations

import dataclasses
import re
import shutil
from pathlib import Path
from typing import Any

import pytest

import trol_edge
from tests.conftest import NANO
from trol_edge.answering.options import AnswerOptions, Options

PAGE = Path(trol_edge.__file__).with_name("API.md").read_text(encoding="utf-8")
SNIPPETS = re.findall(r"^```python\n(.*?)^```$", PAGE, re.M | re.S)


def test_every_snippet_runs(nano_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In order, in one interpreter, in a folder that holds what the page says."""
    pytest.importorskip("llguidance", reason="the page shows response_format: pip install 'trol-edge[formats]'")
    (tmp_path / "build").mkdir()
    (tmp_path / "build" / "trol-nano").symlink_to(nano_bundle.resolve())
    shutil.copy(NANO / "scene.png", tmp_path)
    monkeypatch.chdir(tmp_path)
    assert len(SNIPPETS) == PAGE.count("```python") == 6
    names: dict[str, Any] = {"__name__": "page"}
    for number, snippet in enumerate(SNIPPETS, 1):
        exec(compile(snippet, f"API.md, snippet {number}", "exec"), names)
    assert str(names["choice"]) == "cyan ring"
    assert len(names["answers"]) == 2
    with pytest.raises(trol_edge.TrolEdgeError, match="closed"):
        names["rt"].generate("Is it closed?")


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
    for name, default in re.findall(r"^\| `(\w+)` \| `?([^|`]*)`? \|", PAGE, re.M):
        field = {f.name: f for f in dataclasses.fields(Options)}[name]
        assert default.strip().strip('"') == str(field.default), name
    assert len(PAGE.splitlines()) < 150, "one page"


def test_the_typed_keywords_are_the_options() -> None:
    """The dataclass that checks and the TypedDict that type checkers read say the same."""
    fields = {field.name: field.type for field in dataclasses.fields(Options)}
    assert list(AnswerOptions.__annotations__) == list(fields)
    for name, hint in AnswerOptions.__annotations__.items():
        assert hint.__forward_arg__ == fields[name], name
