"""The measure of reuse says what it measured. Nothing here looks at how fast anything is."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.bench import reuse


def test_figures_of_the_shipped_model(nano_bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert reuse.main([str(nano_bundle), "--rounds", "1", "--tokens", "2", "--questions", "6", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    prompt, reused, kv = result["prompt_tokens"], result["reused_tokens"], result["kv_bytes"]
    assert 64 < reused < prompt  # the picture comes before the question
    assert set(result["milliseconds"]) == {
        *("vision", "first", "second", "step", "traverse", "fork_step", "step_behind")
    }
    assert all(value > 0 for value in result["milliseconds"].values())
    assert kv == {"one_set": 4096 * 2048, "both_sets": 2 * 4096 * 2048, "per_token_and_set": 4096}
    right = result["right_percent"]
    assert right["asked"] == 6 and right["step"] >= 50  # a describe question or two may be wrong
    text = reuse.lines(result)
    assert f"{reused} tokens reused" in text and "right of 6 questions" in text


def test_no_bundle_is_an_error_of_ours(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert reuse.main([str(tmp_path)]) == 1
    assert "no bundle.json here" in capsys.readouterr().err
