"""The load of the server: a short run finds nothing wrong, and wrong answers fail it. Nothing here looks at time."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

pytest.importorskip("uvicorn", reason="the server is not installed here")

from tests.bench import load


@pytest.mark.slow
@pytest.mark.heavy
def test_a_short_run(nano_bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Every kind of client came, and every answer was that of a Runtime alone."""
    assert load.main([str(nano_bundle), "--seconds", "12", "--clients", "8", "--rounds", "5", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["wrong"] == [] and result["wait_ms"]["count"] > 20
    assert set(result["calls"]) == {"whole", "stream", "turns", "choose", "leave", "oversize", "slow", "bad"}
    text = load.lines(result)
    assert "wrong: 0" in text and "per streamed token" in text


@pytest.mark.slow
@pytest.mark.heavy
def test_wrong_answers_fail_it(
    nano_bundle: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """An answer that differs from the one that was made alone is reported."""
    real = load.Cases.__init__

    def changed(self: load.Cases, runtime: load.Runtime) -> None:
        real(self, runtime)
        self.texts = dict.fromkeys(self.texts, "something else")

    monkeypatch.setattr(load.Cases, "__init__", changed)
    assert load.main([str(nano_bundle), "--seconds", "20", "--clients", "4", "--rounds", "2"]) == 1
    assert "alone 'something else'" in capsys.readouterr().out
