"""Conversations: the same tokens as a fresh prefill of all of it, exact reuse, truncation, forks, streams, the verb."""

from __future__ import annotations

import asyncio
import io
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import trol_edge
from tests.conftest import NANO
from trol_edge.cli.main import main
from trol_edge.errors import BackendError, ContextError, ImageError, UsageError
from trol_edge.prompt.template import Spoken, build_prompt
from trol_edge.runtime import Runtime
from trol_edge.testing import ScriptedRuntime

SCENE = NANO / "scene.png"
FRAME = np.zeros((48, 64, 3), np.uint8)
SCRIPT = {"One?": "first", "Two?": "second", "Three?": "third", "Four?": "fourth"}


def fresh(runtime: Runtime, turns: list[tuple[Any, Any, str]], length: int) -> list[int]:
    """Greedy tokens after a prefill of a whole conversation in an empty session; the last answer is ignored."""
    spec = runtime.bundle.manifest.prompt
    spoken = [Spoken(prompt, runtime.count_tiles(images), answer) for prompt, images, answer in turns]
    *before, last = spoken
    ids = build_prompt(runtime.model.text, spec, last.prompt, last.tiles, "", before)
    squares = [p for _, images, _ in turns if (p := runtime.preprocess(images)) is not None]
    with runtime.session() as session:
        logits = session.prefill(ids, np.concatenate(squares) if squares else None)
        found: list[int] = []
        while (token := int(logits.argmax())) not in runtime.model.ends and len(found) < length:
            found.append(token)
            logits = session.step(token)
    return found


def test_a_turn_is_tokenized_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """What finds out that the conversation fits is what is asked."""
    runtime = ScriptedRuntime(SCRIPT)
    seen: list[Any] = []
    real = runtime.model.tokenize
    monkeypatch.setattr(runtime.model, "tokenize", lambda *given: seen.append(given) or real(*given))
    with runtime.chat() as chat:
        assert [chat.ask("One?").text, chat.ask("Two?").text] == ["first", "second"] and len(seen) == 2
        chat.yes_no("Three?")
        assert len(seen) == 3 + 4  # the question, then each word that is weighed


@pytest.fixture(scope="module")
def other() -> Any:
    """A second picture."""
    return np.random.default_rng(3).integers(0, 256, (120, 160, 3), np.uint8)


def test_turns_equal_a_fresh_prefill(each_nano: Runtime, other: Any) -> None:
    """Several pictures over several turns, in both families; each turn computes its own tokens and the last answer."""
    asked = [
        ("What is left of the red star?", SCENE),
        ("Describe the scene.", None),
        (["Compare ", trol_edge.IMAGE, " with the first."], [other]),
        ("How many objects are there?", None),
    ]
    turns: list[tuple[Any, Any, str]] = []
    with each_nano.chat() as chat:
        before = 0
        for prompt, images in asked:
            answer = chat.ask(prompt, images, max_new_tokens=12)
            turns.append((prompt, images, answer.text))
            assert list(answer.token_ids) == fresh(each_nano, turns, 12), prompt
            if before:  # all that was traversed by then is used again
                assert answer.cached_tokens >= before - 1
            before = answer.prompt_tokens
        assert chat.turns == [(prompt, text) for prompt, _, text in turns] and chat.dropped == 0


def test_the_template_of_two_turns(nano: Runtime) -> None:
    """An answer is followed by what ends the system's turn, too, and by nothing else."""
    spec = nano.bundle.manifest.prompt
    text = (
        spec.before_system + spec.system + spec.before_question + "Is it red?" + spec.after_question + "Yes"
        + spec.before_question + "And now?" + spec.after_question
    )  # fmt: skip
    tokenizer = nano.model.text
    want = tokenizer.encode(tokenizer.parse(text, spec.special_tokens))
    assert nano.model.tokenize("And now?", before=[Spoken("Is it red?", [], "Yes")]) == want
    assert nano.model.tokenize("And now?", before=[Spoken("Is it red?", [], spec.before_question)]) != want  # literal


def test_a_scripted_conversation_and_its_fork() -> None:
    """A fork goes on by itself and computes nothing of the past again."""
    rt = ScriptedRuntime(SCRIPT)
    chat = rt.chat()
    assert chat.ask("One?", FRAME) == "first"
    twin = chat.fork()
    second = twin.ask("Two?")
    assert second == "second" and second.cached_tokens >= second.prompt_tokens - len("first<question>Two?<answer>")
    assert chat.ask("Three?").cached_tokens > 0
    assert [a for _, a in chat.turns] == ["first", "third"] and [a for _, a in twin.turns] == ["first", "second"]
    assert rt.vision_cache.misses == 1


def test_streams() -> None:
    """A turn is remembered when its answer has ended, or was left early; one without any text is not."""
    rt = ScriptedRuntime(SCRIPT, step_s=0.001)
    chat = rt.chat()
    with chat.stream("One?") as stream:
        pieces = list(stream)
    assert "".join(pieces) == "first" and pieces[-1].prompt_tokens and pieces[-1].finish_reason == "stop"
    with chat.stream("Two?") as stream:
        said = str(next(stream))
    assert chat.turns == [("One?", "first"), ("Two?", said)]
    with chat.stream("Three?") as stream:
        stream.stop()
        assert [piece.finish_reason for piece in stream] == ["stopped"]
    assert chat.ask("Three?", deadline_ms=0).finish_reason == "deadline"
    assert len(chat.turns) == 2

    async def read() -> str:
        return "".join([piece async for piece in chat.astream("Four?")])

    assert asyncio.run(read()) == "fourth" and chat.turns[-1] == ("Four?", "fourth")
    with chat.stream("One?") as first, pytest.raises(UsageError, match="another answer uses this session"):
        next(first)
        chat.ask("Two?")


def test_choices_are_turns() -> None:
    """What was chosen is what was said."""
    chat = ScriptedRuntime({"One?": "first", "Two?": "Yes."}).chat()
    assert chat.choose("One?", ["second", "first"], FRAME).probability > 0.5
    assert chat.yes_no("Two?")
    assert chat.turns == [("One?", "first"), ("Two?", "Yes")]
    with pytest.raises(UsageError, match="two or more"):
        chat.choose("One?", ["first"])


def test_the_oldest_turns_are_dropped() -> None:
    """Pinned ones stay, the rest goes oldest first, and answers go on; without truncation the error says so."""
    rt = ScriptedRuntime(lambda question: question[:1] * 8, context=160)
    chat, plain = rt.chat(pinned=1), rt.chat(truncate=False)
    letters = "ABCDEFGHIJKL"
    for letter in letters:
        assert chat.ask(f"{letter}, a question?") == letter * 8
        assert chat.session.length <= 160
    kept = [str(prompt)[0] for prompt, _ in chat.turns]
    assert kept[0] == "A" and "".join(kept[1:]) == letters[-len(kept[1:]) :]
    assert chat.dropped == len(letters) - len(kept) > 3
    with pytest.raises(ContextError, match="conversation take"):
        for letter in letters:
            plain.ask(f"{letter}, a question?")
    assert plain.dropped == 0 and len(plain.turns) > 2
    with pytest.raises(ContextError):  # alone it does not fit, so nothing is gained by dropping
        chat.ask("x" * 200)


def test_dropped_turns_leave_the_right_answer(nano: Runtime) -> None:
    """After turns were dropped, the answer is that of what is left."""
    chat = nano.chat()
    context = nano.bundle.manifest.context
    turns: list[tuple[Any, Any, str]] = []
    while not chat.dropped:
        turns.append(("Describe the scene.", SCENE, ""))
        answer = chat.ask("Describe the scene.", SCENE, max_new_tokens=4)
        turns[-1] = (*turns[-1][:2], answer.text)
        assert len(turns) < context
    left = turns[chat.dropped :]
    assert [a for _, a in chat.turns] == [a for *_, a in left]
    assert list(answer.token_ids) == fresh(nano, left, 4)


def test_added_turns(nano: Runtime) -> None:
    """A conversation that took place elsewhere goes on here with the same tokens."""
    first, again = nano.chat(), nano.chat()
    said = first.ask("What is left of the red star?", SCENE, max_new_tokens=8)
    again.add("What is left of the red star?", said, SCENE)
    assert first.ask("Describe the scene.", max_new_tokens=8).token_ids == (
        again.ask("Describe the scene.", max_new_tokens=8).token_ids
    )
    with pytest.raises(UsageError, match="should be a text"):
        again.add("One?", 3)  # type: ignore[arg-type]
    with pytest.raises(ImageError):
        again.add("One?", "yes", b"no picture")


def test_bad_arguments_and_failures() -> None:
    """Each is an error of ours, and the conversation goes on as if the call had not been made."""

    def fail(question: str) -> None:
        if question == "Two?":
            raise BackendError("planted")

    rt = ScriptedRuntime(SCRIPT, failure=fail)
    for pinned, truncate in ((-1, True), (True, True), ("1", True), (0, 1)):
        with pytest.raises(UsageError):
            rt.chat(pinned=pinned, truncate=truncate)  # type: ignore[arg-type]
    chat = rt.chat()
    with pytest.raises(UsageError, match="its own session"):
        chat.ask("One?", session=rt.session())
    with pytest.raises(UsageError, match="no text"):
        chat.ask(" ")
    for wrong in (5, None):
        with pytest.raises(UsageError, match="prompt"):
            chat.ask(wrong)
    with pytest.raises(UsageError, match="did you mean"):
        chat.ask("One?", max_new_token=3)  # type: ignore[call-arg]
    with pytest.raises(UsageError, match="cannot be streamed"):
        chat.stream("One?", num_beams=2)
    for ask in (chat.ask, lambda prompt: list(chat.stream(prompt))):
        with pytest.raises(BackendError, match="planted"):
            ask("Two?")
    assert chat.turns == []
    assert chat.ask("One?") == "first"
    with pytest.raises(UsageError, match="another Runtime"):
        ScriptedRuntime("x").chat(session=rt.session()).ask("One?")
    chat.close()
    with pytest.raises(UsageError, match="closed"):
        chat.ask("One?")


def test_without_prefix_reuse() -> None:
    """Everything is computed again, and the answers are the same."""
    chat = ScriptedRuntime(SCRIPT, prefix_reuse=False).chat()
    assert chat.ask("One?") == "first" and chat.ask("Two?") == "second"


# -- the verb ----------------------------------------------------------------------------------------------------------


def talk(bundle: Path, lines: str, monkeypatch: pytest.MonkeyPatch, *options: str) -> int:
    """Run `trol-edge chat` with these lines on standard input."""
    monkeypatch.setattr(sys, "stdin", io.StringIO(lines))
    return main(["chat", str(bundle), "--max-new-tokens", "12", *options])


def test_lines_that_are_no_text(
    nano_bundle: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A pipe in another encoding is an error that says so."""
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"caf\xe9\n"), encoding="utf-8"))
    assert main(["chat", str(nano_bundle)]) == 1
    assert "standard input is not UTF-8" in capsys.readouterr().err


def test_the_verb(
    nano: Runtime, nano_bundle: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The same answers as from Python, a picture at the start and one later; a wrong line ends a pipe with an error."""
    with nano.chat() as chat:
        want = [chat.ask("What is left of the red star?", SCENE, max_new_tokens=12), chat.ask("Describe the scene.")]
    lines = "What is left of the red star?\n\nDescribe the scene."
    assert talk(nano_bundle, lines, monkeypatch, "-i", str(SCENE), "--max-new-tokens", "256") == 0
    assert capsys.readouterr().out.splitlines() == [str(a) for a in want]
    lines = (
        f"/image {SCENE}\nWhat is left of the red star?\n/wrong\n/forget\n/image {SCENE}\nDescribe the scene.\n/quit\nx"
    )
    assert talk(nano_bundle, lines, monkeypatch) == 0
    out, err = capsys.readouterr()
    assert out.splitlines() == [str(want[0]), str(nano.generate("Describe the scene.", SCENE, max_new_tokens=12))]
    assert "unknown command /wrong" in err
    assert talk(nano_bundle, "/image nothing.png\nWhat is it?", monkeypatch) == 1
    assert "nothing.png" in capsys.readouterr().err
    assert talk(nano_bundle, "x" * (1 << 20), monkeypatch) == 1
    assert "a line of standard input" in capsys.readouterr().err
