"""Tokenizer and prompt template in the self-test: what changes a token or a prompt is found, and by its name."""

from __future__ import annotations

import dataclasses
import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.conftest import CHECKPOINTS, NANOS, slow
from tests.test_verify import rehash
from trol_edge.bundle import selftest
from trol_edge.bundle.manifest import Bundle
from trol_edge.bundle.names import SELFTEST, TOKENIZER
from trol_edge.errors import BundleError, VerifyError
from trol_edge.export.reference import tokenizer as published
from trol_edge.export.reference.checkpoint import Checkpoint
from trol_edge.prompt import probe
from trol_edge.prompt.template import PromptSpec
from trol_edge.prompt.tokenizer import Tokenizer
from trol_edge.runtime import Runtime
from trol_edge.verify import replay as verify

EDITS = 250  # of each model's tokenizer


def _swapped_pieces(data: Any, dice: random.Random) -> None:
    vocabulary = data["model"]["vocab"]
    a, b = dice.sample(sorted(vocabulary), 2)
    vocabulary[a], vocabulary[b] = vocabulary[b], vocabulary[a]


def _renamed_piece(data: Any, dice: random.Random) -> None:
    vocabulary = data["model"]["vocab"]
    piece = dice.choice(sorted(piece for piece in vocabulary if len(piece) > 1 and not piece.startswith("<")))
    vocabulary[piece + "q"] = vocabulary.pop(piece)
    data["model"]["merges"] = [m for m in data["model"]["merges"] if "".join(m) != piece and piece not in m]


def _lost_merge(data: Any, dice: random.Random) -> None:
    merges = data["model"]["merges"]
    del merges[dice.randrange(len(merges))]


def _swapped_merges(data: Any, dice: random.Random) -> None:
    merges = data["model"]["merges"]
    a, b = dice.sample(range(len(merges)), 2)
    merges[a], merges[b] = merges[b], merges[a]


def _late_merge(data: Any, dice: random.Random) -> None:
    merges = data["model"]["merges"]
    merges.append(merges.pop(dice.randrange(len(merges))))


def _other_flag(data: Any, dice: random.Random) -> None:
    token = dice.choice(data["added_tokens"])
    flag = dice.choice(["special", "lstrip", "rstrip", "normalized"])
    token[flag] = not token[flag]


def _other_content(data: Any, dice: random.Random) -> None:
    dice.choice(data["added_tokens"])["content"] += "x"


def _other_normalizer(data: Any, dice: random.Random) -> None:
    found = data["normalizer"]["normalizers"]
    if dice.random() < 0.5 or len(found) < 2:
        found.append({"type": dice.choice(["Lowercase", "NFC", "NFKC", "StripAccents"])})
    else:
        del found[dice.randrange(len(found))]


def _no_bytes(data: Any, dice: random.Random) -> None:
    data["model"]["byte_fallback"] = not data["model"]["byte_fallback"]


KINDS = (
    *(_swapped_pieces, _renamed_piece, _lost_merge, _swapped_merges, _late_merge, _other_flag, _other_content),
    *(_other_normalizer, _no_bytes),
)


@pytest.fixture(scope="module", params=[NANOS[0], *slow(NANOS[1])])
def written(request: pytest.FixtureRequest) -> tuple[str, PromptSpec, int]:
    """tokenizer.json as export writes it, the template, and the vocabulary."""
    source = Checkpoint(CHECKPOINTS / request.param)
    template = source.family.prompt(source.spec)
    text = published.convert(source.folder, (template.image,))
    assert text is not None
    return text, template, source.spec.vocab_size


def said_by(text: str, template: PromptSpec, vocabulary: int) -> tuple[bytes, list[list[int]]]:
    """What the self-test compares."""
    made = Tokenizer(text)
    return probe.token_digests(made, text, vocabulary).tobytes(), probe.prompt_ids(made, template)


@pytest.mark.slow
def test_edited_tokenizers_are_found(written: tuple[str, PromptSpec, int]) -> None:
    """All of hundreds, by kind; one that is written in another way is the same."""
    text, template, vocabulary = written
    right, missed, refused = said_by(text, template, vocabulary), [], 0
    for seed in range(EDITS):
        dice, data = random.Random(seed), json.loads(text)
        kind = KINDS[seed % len(KINDS)]
        kind(data, dice)
        try:
            if said_by(json.dumps(data), template, vocabulary) == right:
                missed.append((kind.__name__, seed))
        except BundleError:  # it is refused before it answers
            refused += 1
    assert missed == []
    assert refused < EDITS / 3
    assert said_by(json.dumps(json.loads(text), indent=3), template, vocabulary) == right


def test_a_library_that_computes_something_else_is_found(
    written: tuple[str, PromptSpec, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same file, other ids or bytes."""
    text, template, vocabulary = written
    right = said_by(text, template, vocabulary)
    encode, token_bytes = Tokenizer.encode, Tokenizer.token_bytes
    with monkeypatch.context() as patch:
        patch.setattr(Tokenizer, "encode", lambda self, parts: encode(self, parts)[::-1])
        digests, prompts = said_by(text, template, vocabulary)
        assert digests != right[0] and prompts != right[1]
    with monkeypatch.context() as patch:
        patch.setattr(Tokenizer, "token_bytes", lambda self, i: (b"x", False) if i == 300 else token_bytes(self, i))
        assert said_by(text, template, vocabulary)[0] != right[0]


# -- in a bundle -------------------------------------------------------------------------------------------------------


@pytest.fixture
def copy(nano_bundle: Path, tmp_path: Path) -> Path:
    """trol-nano's bundle, to be changed."""
    shutil.copytree(nano_bundle, tmp_path / "bundle", ignore=shutil.ignore_patterns("verified-*"))
    return tmp_path / "bundle"


def edit_tokenizer(folder: Path, change: Callable[[Any, random.Random], None]) -> None:
    """Change tokenizer.json, and all hashes with it."""
    path = folder / TOKENIZER
    data = json.loads(path.read_text(encoding="utf-8"))
    change(data, random.Random(0))
    path.write_text(json.dumps(data), encoding="utf-8")
    rehash(folder)


@pytest.mark.parametrize("change", [_lost_merge, *slow(_swapped_pieces, _swapped_merges)])
def test_verify_names_the_tokenizer(copy: Path, change: Callable[[Any, random.Random], None]) -> None:
    """At its stage; and a first load refuses the bundle."""
    edit_tokenizer(copy, change)
    report = verify.verify(copy)
    assert report.first_wrong is not None and report.first_wrong.name == "tokenizer"
    assert "tokenizer.json is not the one that export wrote" in report.verdict
    assert not report.could_be_rounding
    with pytest.raises(VerifyError, match="goes wrong at tokenizer: the file says something else"):
        Runtime(copy, selftest=True)


@pytest.mark.slow
def test_verify_names_the_template(copy: Path) -> None:
    """Another system text, marks in another order, another end."""
    template = Bundle(copy).manifest.prompt
    ends = next(name for name in template.special_tokens if name not in template.end_markers)
    for changed, said in (
        (dataclasses.replace(template, system=template.system + " "), "questions have"),
        (dataclasses.replace(template, after_question=template.after_question + "\n"), "questions have"),
        (dataclasses.replace(template, after_image=template.after_image + "\n"), "questions have"),
        (dataclasses.replace(template, end_markers=(ends,)), "answers end at"),
    ):
        rehash(copy, prompt=changed)
        wrong = verify.verify(copy).first_wrong
        assert wrong is not None and wrong.name == "prompt" and said in wrong.text


def test_a_bundle_from_before(copy: Path) -> None:
    """Its self-test says nothing about the tokenizer: it opens and passes, without these stages."""
    from safetensors.numpy import load_file, save_file

    arrays = load_file(copy / SELFTEST)
    for name in ("token_digests", "prompt_ids", "prompt_lengths", "end_ids"):
        del arrays[name]
    save_file(arrays, copy / SELFTEST)
    rehash(copy)
    assert selftest.read(Bundle(copy)).token_digests is None
    report = verify.verify(copy)
    assert report.first_wrong is None and report.stages[0].name == "preprocess"
    Runtime(copy, selftest=True).close()


def test_what_is_recorded(copy: Path) -> None:
    """The ids themselves, so that another program can compare them."""
    bundle = Bundle(copy)
    test, made = selftest.read(bundle), Tokenizer.from_file(bundle.path(TOKENIZER))
    assert test.prompt_ids is not None and test.prompt_lengths is not None
    recorded = np.split(test.prompt_ids, np.cumsum(test.prompt_lengths)[:-1])
    assert [ids.tolist() for ids in recorded] == probe.prompt_ids(made, bundle.manifest.prompt)
    assert (copy / SELFTEST).stat().st_size < 400_000
