"""The table of kinds in docs/trust.md names tests that exist, and what no other file holds of these kinds."""

from __future__ import annotations

import errno
import json
import os
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.fuzz.damage import Spiteful
from tests.fuzz.workers import CAMPAIGNS
from trol_edge.bundle.manifest import Bundle
from trol_edge.cli.main import main
from trol_edge.errors import TrolEdgeError, UsageError
from trol_edge.prompt.images import load_rgb
from trol_edge.testing import ScriptedRuntime

ROOT = Path(__file__).resolve().parents[1]


def test_the_table_names_tests_that_exist() -> None:
    """Each kind of failure has a row, with a rule, and tests and campaigns that are there."""
    text = (ROOT / "docs" / "trust.md").read_text(encoding="utf-8")
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("| ")
    ]
    kinds = {row[0].split()[0]: row for row in rows[1:]}
    assert list(kinds) == [
        *(f"A{i}" for i in range(1, 8)),
        *(f"B{i}" for i in range(8, 18)),
        *(f"C{i}" for i in range(18, 23)),
    ]
    for kind, (_, rule, tests, campaigns) in kinds.items():
        assert len(rule) > 20, kind
        named = re.findall(r"`(\w+)::(test_\w+)`", tests)
        assert named and len(named) == tests.count("`") // 2, kind
        for file, test in named:
            source = (ROOT / "tests" / f"test_{file}.py").read_text(encoding="utf-8")
            assert re.search(rf"^def {test}\(", source, re.MULTILINE), f"{kind}: tests/test_{file}.py has no {test}"
        assert {name for name in campaigns.split(", ") if name} <= set(CAMPAIGNS), kind


@pytest.mark.parametrize("value", [np.array(["rgb", "bgr"]), np.zeros(0), Spiteful(), [Spiteful()], {"a": Spiteful()}])
@pytest.mark.parametrize("name", ["color", "answer_mode", "stop", "temperature", "response_format", "deadline_ms"])
def test_arrays_and_spiteful_objects_as_options(name: str, value: Any) -> None:
    """What compares element by element, or fails when it is shown, is a bad value like any other."""
    rt = ScriptedRuntime("yes")
    if name == "deadline_ms" or not isinstance(value, np.ndarray):
        with pytest.raises(TrolEdgeError):
            rt.generate("?", **{name: value})
    else:
        with pytest.raises(UsageError, match=f"{name}|stop"):
            rt.generate("?", **{name: value})
    with pytest.raises(TrolEdgeError):
        rt.ask_many(value)


@pytest.mark.parametrize("path", ["a" * 100_000, "\0" * 5000, "x/" * 50_000])
def test_messages_about_paths_are_short(path: str) -> None:
    """A text in the place of a path may be long."""
    for call in (lambda: load_rgb(path), lambda: Bundle(path)):
        with pytest.raises(TrolEdgeError) as caught:
            call()
        assert len(str(caught.value)) < 5000
    with pytest.raises(UsageError, match="not a path"):
        Bundle(5)  # type: ignore[arg-type]


@pytest.mark.parametrize("words", [["doctor"], ["doctor", "nowhere"], ["compare", "nowhere", "elsewhere"], ["targets"]])
def test_one_json_object(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """With --json, whatever is found."""
    main([*words, "--json"])
    assert isinstance(json.loads(capsys.readouterr().out), dict)


def test_a_training_that_cannot_write(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It ends with a sentence and exit code 1, as the other commands do."""
    train = pytest.importorskip("trol_edge.export.nano.train")

    def full(*given: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(train, "write_demo", full)
    monkeypatch.setattr(sys, "argv", ["train", "trol-nano", "--out", str(tmp_path / "out"), "--scratch", str(tmp_path)])
    assert train.main() == 1
    assert "the disk is full; make room or choose another --scratch" in capsys.readouterr().err
