"""A tokenizer.json that is taken over gives the ids and texts of the tokenizers library on the published file."""

from __future__ import annotations

import io
import json
import random
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
import tokenizers

from tests.phi3_tokenizer import ADDED, IMAGE_ID, make
from trol_edge.errors import CheckpointError, ExportError
from trol_edge.export.reference.tokenizer import added_ids, convert, verify
from trol_edge.prompt.tokenizer import TextStream, Tokenizer

STRINGS = 3000
BOX = {"content": "<box>", "special": False, "normalized": True}
VARIANTS: dict[str, dict[str, Any]] = {
    "legacy": {},
    "recent": {"recent": True},
    "lstrip": {"more": [{"content": "<left>", "lstrip": True}, {"content": "<both>", "lstrip": True, "rstrip": True}]},
    "normalized": {"more": [BOX, {"content": "<ref>", "special": False}]},
    "recent-normalized": {"recent": True, "more": [BOX, {"content": "<special>", "normalized": True}]},
}


def write(folder: Path, data: dict[str, Any]) -> Path:
    (folder / "tokenizer.json").write_text(json.dumps(data, ensure_ascii=False), encoding="utf-8")
    return folder


@pytest.fixture(scope="module", params=VARIANTS, ids=list(VARIANTS))
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp(request.param), make(**VARIANTS[request.param]))


def strings(tokens: list[str], count: int) -> list[str]:
    """Random texts of words, white space of every kind, other scripts, lone bytes' characters and added tokens."""
    rng = random.Random(1)
    bits = [
        "ka",
        "tomi",
        " the",
        "what is",
        " ",
        "  ",
        "\n",
        "\t",
        "\r\n",
        "\u00a0",
        "\u2003",
        "\u3000",
        "\x1c",
        "\x85",
    ]
    bits += [
        "世界",
        "мир",
        "é",
        "e\u0301",
        "👩‍👧",
        "\U0001f1f0",
        "▁",
        "▁ ",
        "<0x41>",
        "<|",
        "|>",
        "<",
        "12.5",
        "\x00",
        "~3",
    ]
    return ["".join(rng.choice(bits + tokens) for _ in range(rng.randrange(9))) for _ in range(count)]


def test_ids_and_texts_equal_the_library(folder: Path) -> None:
    published = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    ours = Tokenizer(convert(folder) or "")
    tokens = [token.content for token in published.get_added_tokens_decoder().values()]
    for text in strings(tokens, STRINGS):
        ids = published.encode(text, add_special_tokens=False).ids
        assert ours.encode(ours.parse(text)) == ids, text
        decoded = published.decode(ids, skip_special_tokens=True)
        assert ours.decode(ids) == decoded, text
        stream = TextStream(ours)
        assert "".join(map(stream.push, ids)) + stream.flush() == decoded


def test_any_ids_decode_as_in_the_library(folder: Path) -> None:
    published = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    ours = Tokenizer(convert(folder) or "")
    rng = random.Random(2)
    for _ in range(STRINGS):
        # Byte tokens of ASCII only: the library loses valid characters beside bytes that are no UTF-8, we do not.
        ids = [rng.choice([*range(3 + 128), *range(259, IMAGE_ID + 1)]) for _ in range(rng.randrange(1, 8))]
        assert ours.decode(ids) == published.decode(ids, skip_special_tokens=True), ids


def test_bytes_that_are_no_text_become_replacement_characters(folder: Path) -> None:
    ours = Tokenizer(convert(folder) or "")
    assert ours.decode([3 + 0x41, 3 + 0xFF, 3 + 0x42]) == "A\ufffdB"


def test_verify_passes(folder: Path) -> None:
    assert verify(convert(folder) or "", folder) > 700


def test_user_text_is_literal(folder: Path) -> None:
    ours = Tokenizer(convert(folder) or "")
    added = set(ours.special_tokens.values())
    for token in ours.special_tokens:
        ids = ours.encode(f"a{token} b")
        assert not added & set(ids) and ours.decode(ids) == f"a{token} b"


def test_white_space_behind_a_template_token_is_taken_from_user_text_too(tmp_path: Path) -> None:
    """Prompts equal those of the authors' code, where template and question are one string."""
    ours = Tokenizer(convert(write(tmp_path, make())) or "")
    user, end = ours.special_tokens["<|user|>"], ours.special_tokens["<|end|>"]
    assert ours.encode([user, "\n", " \n ka", end]) == ours.encode([user, "ka", end])
    assert ours.encode([user, "\n", end]) == [user, end]


def test_verify_names_the_first_difference(tmp_path: Path) -> None:
    folder = write(tmp_path, make())
    damaged = json.loads(convert(folder) or "")
    damaged["model"]["merges"].reverse()
    with pytest.raises(ExportError, match=r"disagrees with the tokenizers library on '.+': ids"):
        verify(json.dumps(damaged), folder)


def test_added_ids_come_from_every_file(tmp_path: Path) -> None:
    write(tmp_path, make())
    (tmp_path / "added_tokens.json").write_text('{"<old>": 600}')
    found = added_ids(tmp_path)
    assert found["<IMG_CONTEXT>"] == IMAGE_ID and found["<old>"] == 600 and set(ADDED) < set(found)


def test_extra_tokens_get_the_next_ids(tmp_path: Path) -> None:
    ours = Tokenizer(convert(write(tmp_path, make()), ["<IMG_CONTEXT>", "<new>"]) or "")
    assert ours.special_tokens["<IMG_CONTEXT>"] == IMAGE_ID and ours.special_tokens["<new>"] == IMAGE_ID + 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": {"type": "Unigram"}}, "its model is 'Unigram' instead of BPE"),
        ({"normalizer": {"type": "NFC"}}, "its normalizer or pre_tokenizer"),
        ({"pre_tokenizer": {"type": "ByteLevel"}}, "its normalizer or pre_tokenizer"),
        ({"decoder": None}, "its decoder"),
        ({"added_tokens": [{"id": 1, "content": "<s>", "single_word": True}]}, "'<s>' is found as a word only"),
        (
            {"added_tokens": [{"id": 1, "content": "<s>", "special": True, "normalized": True}]},
            "special token '<s>' is found after normalisation",
        ),
        ({"added_tokens": {}}, "not a list of objects"),
        ({"model": {**make()["model"], "merges": ["nonsense"]}}, "cannot be read"),
    ],
)
def test_what_is_not_supported_is_refused_by_name(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        convert(write(tmp_path, make() | change))


def test_a_sentencepiece_model_whose_added_tokens_take_white_space(tmp_path: Path) -> None:
    """The other way to the same tokenizer: tokenizer.model, and the flags in tokenizer_config.json."""
    out = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["ka tomi ru", "tomi the ka", "what is ru ka"] * 30),
        model_writer=out,
        minloglevel=2,
        num_threads=1,
        vocab_size=300,
        model_type="bpe",
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
    )
    (tmp_path / "tokenizer.model").write_bytes(out.getvalue())
    added = {"300": {"content": "<|user|>", "rstrip": True}, "301": {"content": "<left>", "lstrip": True}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": added}))
    text = convert(tmp_path) or ""
    assert verify(text, tmp_path) > 500
    ours = Tokenizer(text)
    assert ours.encode([300, "\n ka \n", 301]) == ours.encode([300, "ka", 301]) == [300, *ours.encode("ka"), 301]
