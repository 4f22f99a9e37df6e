"""Answers, pieces, options and choices are the texts that they hold, with fields."""

from __future__ import annotations

import asyncio
import copy
import csv
import dataclasses
import io
import json
import pickle
import re
from typing import Any

import pytest

from trol_edge.answering.results import Answer, Choice, Option, Piece, YesNo
from trol_edge.testing import ScriptedRuntime

ANSWER = "yes, a red star"
rt = ScriptedRuntime(ANSWER)


def texts() -> list[tuple[str, Any]]:
    """One of each, as the Runtime makes them."""
    choice = rt.choose("?", ["no", ANSWER])
    first = next(rt.stream("?"))
    return [(ANSWER, rt.generate("?")), ("y", first), (ANSWER, choice), (ANSWER, choice.options[1])]


@pytest.mark.parametrize(("text", "held"), texts(), ids=["Answer", "Piece", "Choice", "Option"])
class TestAsText:
    """What people write with an answer."""

    def test_compared(self, text: str, held: Any) -> None:
        """From both sides; with another answer; in containers and in match."""
        assert held == text and text == held and (held != text) is False
        assert held != text + "!" and held != 7 and held is not None
        assert held == dataclasses.replace(held)
        assert held in [text] and text in {held} and {text: 1}[held] == 1 and hash(held) == hash(text)
        assert sorted(["zz", held, ""]) == ["", text, "zz"]
        match held:
            case "never":
                pytest.fail("not this")
            case str(found):
                assert found == text

    def test_taken_apart(self, text: str, held: Any) -> None:
        """Searched, measured, cut, changed, joined."""
        assert text[:2] in held and "never" not in held
        assert len(held) == len(text) and list(held) == list(text)
        assert held[0] == text[0] and held[:3] == text[:3] and held[::-1] == text[::-1]
        assert held + "." == text + "." and "so " + held == "so " + text and held * 2 == text * 2
        assert held.upper() == text.upper() and held.strip() == text and held.split(",") == text.split(",")
        assert held.startswith(text[0]) and held.encode() == text.encode()
        assert "".join([held, held]) == text * 2
        assert re.match("y", held)

    def test_written(self, text: str, held: Any) -> None:
        """As plain text, wherever a text is written."""
        assert str(held) == f"{held}" == "%s" % held == text and type(str(held)) is str  # noqa: UP031
        assert f"{held:>20}" == f"{text:>20}"
        assert json.dumps(held) == json.dumps(text)
        assert json.loads(json.dumps({"answer": held, "all": [held]})) == {"answer": text, "all": [text]}
        out = io.StringIO()
        print(held, end="", file=out)
        csv.writer(out).writerow([held])
        assert out.getvalue().startswith(text)

    def test_still_a_record(self, text: str, held: Any) -> None:
        """Fields, a repr that shows them, no assignment; whole after pickle and copy."""
        assert held.text == text and type(held.text) is str
        names = [field.name for field in dataclasses.fields(held)]
        assert repr(held).startswith(f"{type(held).__name__}(text={text!r}, {names[1]}=")
        with pytest.raises(dataclasses.FrozenInstanceError):
            held.text = "other"
        pickled = [pickle.loads(pickle.dumps(held, protocol)) for protocol in range(pickle.HIGHEST_PROTOCOL + 1)]
        for twin in (copy.copy(held), copy.deepcopy(held), *pickled):
            assert type(twin) is type(held) and twin == text
            assert dataclasses.asdict(twin) == dataclasses.asdict(held)
        other = dataclasses.replace(held, text="other")
        assert other == other.text == "other" and getattr(other, names[1]) == getattr(held, names[1])
        assert json.loads(json.dumps(dataclasses.asdict(held)))["text"] == text


def test_fields_come_before_methods_of_str() -> None:
    """Choice.index is the number of the option."""
    choice = rt.choose("?", ["no", ANSWER])
    assert choice.index == 1
    assert ANSWER in choice.options and choice == choice.options[choice.index]


def test_pieces_are_joined_without_more_ado() -> None:
    """Also in asyncio; a piece may be empty, and is then false like any empty text."""

    async def together() -> str:
        return "".join([piece async for piece in rt.astream("?")])

    assert "".join(rt.stream("?")) == asyncio.run(together()) == ANSWER
    last = list(rt.stream("?"))[-1]
    assert last == "" and not last and last.finish_reason == "stop"


def test_answers_of_the_same_text_are_equal() -> None:
    """Whatever they took."""
    one, other = rt.generate("?"), rt.generate("?", logprobs=1)
    assert one == other and one.logprobs != other.logprobs


def test_a_yes_is_true() -> None:
    """Not silently unequal to True; texts are not what it holds."""
    yes, no = rt.yes_no("?"), ScriptedRuntime("no").yes_no("?")
    assert yes == True and no == False and yes != no and True in [yes]  # noqa: E712
    assert yes != "yes" and yes != 1.5 and {True: "go"}[yes] == "go"  # type: ignore[index]
    assert copy.deepcopy(yes) == yes == pickle.loads(pickle.dumps(yes))


def test_types() -> None:
    """They are strings, so that whatever takes one takes them: json, a ROS message, another prompt."""
    assert all(issubclass(kind, str) for kind in (Answer, Piece, Choice, Option)) and not issubclass(YesNo, str)
    assert ScriptedRuntime({ANSWER: "fine"}).generate(rt.generate("?")) == "fine"
