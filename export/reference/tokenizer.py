"""Makes the bundle's tokenizer.json from a checkpoint's tokenizer files, and proves that both agree.

A published tokenizer.json (TroL-3.8B) is the reference if there is one, and is taken over with its flags. The other
source is a sentencepiece model, which differs in these points:
- sentencepiece merges by score, the tokenizers library by rank, so every way to split a piece becomes one merge.
- sentencepiece also merges characters that are not pieces; they get ids from `trol_edge.prompt.tokenizer.UNLISTED` on.
- Flags of added tokens say how `trol_edge.prompt.tokenizer` treats them. `special`: user text cannot produce it.
  `normalized`: it is found inside a segment, as sentencepiece does with user-defined pieces. Otherwise text is cut into
  segments at it, as the authors' (Hugging Face, slow) tokenizer does with control pieces and the tokens of
  added_tokens.json. With a dummy prefix the tokenizers library alone reads `normalized` differently; only
  `trol_edge.prompt.tokenizer` is exact.
- The model file is read without protobuf, whose generated code ties sentencepiece to one protobuf release.
"""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib
import random
import re
import struct
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import sentencepiece
import tokenizers
from tokenizers import AddedToken, models, normalizers

from trol_edge.bundle.protobuf import protobuf_fields
from trol_edge.errors import CheckpointError, ExportError
from trol_edge.prompt.tokenizer import UNLISTED, Tokenizer
from trol_edge.reading import guard, read_json, read_plain

__all__ = ["added_ids", "convert", "verify"]

_LIBRARY = "tokenizer.json"
_MODEL = "tokenizer.model"
_ADDED = "added_tokens.json"
_CONFIG = "tokenizer_config.json"

_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED = 1, 2, 3, 4, 5  # piece types of sentencepiece_model.proto
_BPE = 2  # model type
MOST_CHARACTERS = 1024  # longest piece, because ways to merge one grow with its length


@dataclasses.dataclass(frozen=True)
class _Piece:
    text: str
    score: float
    kind: int


@dataclasses.dataclass(frozen=True)
class _Model:
    """The parts of a sentencepiece model that a conversion needs."""

    path: pathlib.Path
    pieces: list[_Piece]
    byte_fallback: bool
    charsmap: bytes  # empty for the identity
    add_dummy_prefix: bool
    remove_extra_whitespaces: bool


def convert(checkpoint_folder: str | os.PathLike[str], extra_tokens: Sequence[str] = ()) -> str | None:
    """Return the text of a tokenizer.json, or None when the folder has no tokenizer.

    Reads tokenizer.json, or else tokenizer.model and, if present, added_tokens.json and tokenizer_config.json.
    `extra_tokens` are those that the authors' loader adds at run time; a missing one gets the next free id.
    One difference to sentencepiece is left: a text that consists only of characters that the model's character map
    deletes gives no ids, while sentencepiece may give the dummy prefix.
    Raises a CheckpointError that names the file for an unreadable or unsupported model, and for ids that clash or have
    gaps.
    """
    folder = pathlib.Path(checkpoint_folder)
    if (folder / _LIBRARY).is_file():
        return _taken_over(folder / _LIBRARY, extra_tokens)
    if not (folder / _MODEL).is_file():
        if (folder / _ADDED).exists():
            raise CheckpointError(f"{folder} has {_ADDED} but no {_MODEL}; download the checkpoint again")
        return None
    model = read_model(folder / _MODEL)
    added = _added_tokens(folder, [p.text for p in model.pieces], extra_tokens)
    strips = _strips(folder / _CONFIG)
    vocab = {p.text: i for i, p in enumerate(model.pieces)} | added
    merges, characters = _merges(model)
    vocab |= {c: UNLISTED + i for i, c in enumerate(c for c in characters if c not in vocab)}
    unknown = next(p.text for p in model.pieces if p.kind == _UNKNOWN)
    bpe = models.BPE(vocab=vocab, merges=merges, unk_token=unknown, fuse_unk=True, byte_fallback=model.byte_fallback)
    result = tokenizers.Tokenizer(bpe)
    result.normalizer = _normalizer(model)
    kinds = {p.text: p.kind for p in model.pieces if p.kind in (_UNKNOWN, _CONTROL, _USER_DEFINED)}
    for text in sorted(kinds | added, key=vocab.__getitem__):  # by id, because the library numbers them in this order
        inside = text not in added and kinds[text] == _USER_DEFINED
        special = not (inside and _is_ordinary(text))
        left, right = strips.get(text, (False, False))
        result.add_tokens([AddedToken(text, special=special, normalized=inside, lstrip=left, rstrip=right)])
    return str(result.to_str())


def added_ids(checkpoint_folder: str | os.PathLike[str]) -> dict[str, int]:
    """Content -> id of the tokens that a folder's tokenizer files add to the vocabulary; empty without such files."""
    folder = pathlib.Path(checkpoint_folder)
    added = {content: i for _, content, i in [*_tokens_of_added(folder / _ADDED), *_tokens_of_config(folder / _CONFIG)]}
    for entry in _added_entries(folder / _LIBRARY, _read_json(folder / _LIBRARY)):
        added[_checked_content(entry.get("content"), folder / _LIBRARY)] = _checked_id(
            entry.get("id"), folder / _LIBRARY
        )
    return added


def _added_entries(path: pathlib.Path, data: Mapping[str, Any]) -> list[dict[str, Any]]:
    entries = data.get("added_tokens", [])
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise CheckpointError(f"{path}: added_tokens is not a list of objects; download the checkpoint again")
    return entries


_TO_SPACE = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
_FROM_SPACE = {"type": "Replace", "pattern": {"String": "▁"}, "content": " "}
_DECODER = [_FROM_SPACE, {"type": "ByteFallback"}, {"type": "Fuse"}]
_DROP_PREFIX = {"type": "Strip", "content": " ", "start": 1, "stop": 0}


def _taken_over(path: pathlib.Path, extra_tokens: Sequence[str]) -> str:
    """Take over a published tokenizer.json; refuse or rewrite what `trol_edge.prompt.tokenizer` does not support."""
    with guard(path, CheckpointError, "download the checkpoint again", "cannot be read"):
        return _made_plain(path, _read_json(path), extra_tokens)


def _made_plain(path: pathlib.Path, data: dict[str, Any], extra_tokens: Sequence[str]) -> str:
    """Do the work of `_taken_over` for a parsed file."""
    model, normalizer, spaces = (data.get(key) or {} for key in ("model", "normalizer", "pre_tokenizer"))
    for piece, token_id in model.get("vocab", {}).items():
        _checked_id(token_id, path)
        if len(piece) > MOST_CHARACTERS:
            raise CheckpointError(f"{path}: has a piece of {len(piece)} characters; download the checkpoint again")
    steps = normalizer.get("normalizers", [normalizer] if normalizer else [])
    decoder = data.get("decoder") or {}
    prefixed = steps[:1] == [{"type": "Prepend", "prepend": "▁"}] or spaces.get("prepend_scheme") in ("first", "always")
    entries = _added_entries(path, data)
    # The Llama family's tokenizers are written in two ways: with steps of the normaliser, or (since 2024) with a
    # pre-tokenizer that prefixes the first segment only.
    legacy = not spaces and steps[-1:] == [_TO_SPACE] and (len(steps) == 1 or (prefixed and len(steps) == 2))
    recent = not steps and spaces.get("type") == "Metaspace" and not spaces.get("split", True)
    refusals = [
        (model.get("type") != "BPE", f"its model is {model.get('type')!r} instead of BPE"),
        (not model.get("byte_fallback"), "it has no byte fallback"),
        (any(model.get(key) for key in ("dropout", "continuing_subword_prefix", "end_of_word_suffix")), "BPE options"),
        (not legacy and not (recent and spaces.get("replacement") == "▁"), "its normalizer or pre_tokenizer"),
        (decoder.get("decoders") != [*_DECODER, *([_DROP_PREFIX] if prefixed else [])], "its decoder"),
    ]
    for entry in entries:
        content = _checked_content(entry.get("content"), path)
        # A token that normalisation does not change is found with or without it.
        entry["normalized"] = bool(entry.get("normalized")) and not recent
        refusals += [
            (entry.get("single_word"), f"token {content!r} is found as a word only (single_word)"),
            (entry["normalized"] and entry.get("special"), f"special token {content!r} is found after normalisation"),
        ]
    if found := [why for refused, why in refusals if refused]:
        raise CheckpointError(
            f"{path} is not supported: {'; '.join(found)}; TroL-3.8B's tokenizer is Phi-3's (a Llama-style BPE), "
            "download the checkpoint again"
        )
    data |= {"normalizer": {"type": "Sequence", "normalizers": steps}}
    data |= {"post_processor": None, "truncation": None, "padding": None}
    result = tokenizers.Tokenizer.from_str(json.dumps(data))
    known = {entry["content"] for entry in entries}
    result.add_tokens([AddedToken(t, special=True, normalized=False) for t in extra_tokens if t not in known])
    return str(result.to_str())


def read_model(path: pathlib.Path) -> _Model:
    """Read the sentencepiece model and refuse what `convert` does not carry over."""
    again = "download the checkpoint again"
    data = read_plain(path, CheckpointError, again)
    with guard(path, CheckpointError, again, "cannot be read"):
        top = list(protobuf_fields(data))  # before sentencepiece, which may allocate any length that it reads
        pieces = [_read_piece(dict(protobuf_fields(value))) for number, value in top if number == 1]
        parts = dict(top)
        trainer, normalizer, denormalizer = (dict(protobuf_fields(parts.get(n, b""))) for n in (2, 3, 5))
        sentencepiece.SentencePieceProcessor(model_proto=data)
    texts = [p.text for p in pieces]
    refusals = [
        (trainer.get(3) != _BPE, "its model type is not BPE"),
        (trainer.get(24), "it treats whitespace as a suffix"),
        (not normalizer.get(5, 1), "it does not escape whitespace"),
        (denormalizer.get(2), "it changes characters when decoding"),
        (len(set(texts)) != len(texts), "a piece occurs twice"),
        (sum(p.kind == _UNKNOWN for p in pieces) != 1, "it does not have exactly one unknown piece"),
        (max(map(len, texts), default=0) > MOST_CHARACTERS, f"a piece has more than {MOST_CHARACTERS} characters"),
    ]
    if found := [why for refused, why in refusals if refused]:
        raise CheckpointError(f"{path} is not supported: {'; '.join(found)}; TroL's tokenizers are plain BPE, {again}")
    return _Model(
        path,
        pieces,
        byte_fallback=bool(trainer.get(35)),
        charsmap=bytes(normalizer.get(2, b"")),
        add_dummy_prefix=bool(normalizer.get(3, 1)),
        remove_extra_whitespaces=bool(normalizer.get(4, 1)),
    )


def _read_piece(fields: Mapping[int, Any]) -> _Piece:
    score = struct.unpack("<f", fields.get(2, bytes(4)))[0]
    return _Piece(fields[1].decode(), score, fields.get(3, _NORMAL))


def _added_tokens(folder: pathlib.Path, pieces: Sequence[str], extra_tokens: Sequence[str]) -> dict[str, int]:
    """Content -> id of the tokens at which text is cut before sentencepiece sees it, checked against the pieces."""
    ids = {piece: i for i, piece in enumerate(pieces)}
    added: dict[str, int] = {}
    for path, content, token_id in [*_tokens_of_added(folder / _ADDED), *_tokens_of_config(folder / _CONFIG)]:
        owner = pieces[token_id] if token_id < len(pieces) else content
        if ids.setdefault(content, token_id) != token_id or owner != content:
            clash = f"is id {ids[content]}" if owner == content else f"id {token_id} is {owner!r}"
            raise CheckpointError(
                f"{path}: token {content!r} has id {token_id}, but elsewhere ({_MODEL}, {_ADDED}) {clash}; "
                "download the checkpoint again"
            )
        added[content] = token_id
    beyond = sorted(i for i in added.values() if i >= len(pieces))
    if beyond != list(range(len(pieces), len(pieces) + len(beyond))):
        raise CheckpointError(
            f"{folder}: the added ids {beyond} ({_ADDED}, {_CONFIG}) have a gap or repeat; they should count on from "
            f"the {len(pieces)} pieces of {_MODEL}; download the checkpoint again"
        )
    for content in extra_tokens:
        added[content] = ids.setdefault(content, len(ids))
    return added


def _tokens_of_added(path: pathlib.Path) -> Iterator[tuple[pathlib.Path, str, int]]:
    for content, token_id in _read_json(path).items():
        yield path, _checked_content(content, path), _checked_id(token_id, path)


def _tokens_of_config(path: pathlib.Path) -> Iterator[tuple[pathlib.Path, str, int]]:
    decoder = _read_json(path).get("added_tokens_decoder", {})
    if not isinstance(decoder, dict) or not all(isinstance(entry, dict) for entry in decoder.values()):
        raise CheckpointError(
            f"{path}: added_tokens_decoder is not an object of objects; download the checkpoint again"
        )
    for token_id, entry in decoder.items():
        content = _checked_content(entry.get("content"), path)
        if entry.get("single_word"):
            raise CheckpointError(
                f"{path}: token {content!r} is found as a word only (single_word), which is not supported; "
                "use a published TroL checkpoint"
            )
        yield path, content, _checked_id(int(token_id) if token_id.isdecimal() else token_id, path)


def _strips(path: pathlib.Path) -> dict[str, tuple[bool, bool]]:
    """Content -> whether a token takes the white space before it (lstrip) and after it (rstrip)."""
    entries = _read_json(path).get("added_tokens_decoder", {}).values()
    return {entry["content"]: (bool(entry.get("lstrip")), bool(entry.get("rstrip"))) for entry in entries}


def _checked_content(content: Any, path: pathlib.Path) -> str:
    if not isinstance(content, str) or not content:
        raise CheckpointError(f"{path}: found a token {content!r}, expected its text; download the checkpoint again")
    return content


def _checked_id(token_id: Any, path: pathlib.Path) -> int:
    if not isinstance(token_id, int) or isinstance(token_id, bool) or not 0 <= token_id < UNLISTED:
        raise CheckpointError(f"{path}: found {token_id!r} as an id, expected a count; download the checkpoint again")
    return token_id


def _read_json(path: pathlib.Path) -> dict[str, Any]:
    return read_json(path, CheckpointError, "download the checkpoint again") if path.exists() else {}


def _merges(model: _Model) -> tuple[list[tuple[str, str]], list[str]]:
    """All merges, best first, and the single characters in them.

    sentencepiece breaks ties of equal scores by position, leftmost first, which ranks cannot express. With the
    longer left part first both agree unless two ways to make one piece overlap, which `verify` would find.
    Only normal and unused pieces result from a merge or take part in one.
    """
    scores = {p.text: p.score for p in model.pieces if p.kind in (_NORMAL, _UNUSED)}
    unused = {p.text for p in model.pieces if p.kind == _UNUSED}
    frozen = {p.text for p in model.pieces if p.kind == _USER_DEFINED}
    characters: dict[str, None] = {}
    merges = []
    for text in sorted(scores, key=lambda t: -scores[t]):
        for cut in range(len(text) - 1, 0, -1):
            halves = text[:cut], text[cut:]
            if not all((half in scores or len(half) == 1) and half not in frozen for half in halves):
                continue
            if text in unused:
                raise CheckpointError(
                    f"{model.path}: piece {text!r} is marked unused but can be merged from {halves}; sentencepiece "
                    "splits it again, which is not supported; use a published checkpoint"
                )
            merges.append(halves)
            characters |= dict.fromkeys(half for half in halves if len(half) == 1)
    return merges, list(characters)


def _is_ordinary(text: str) -> bool:
    """Whether a user-defined piece is ordinary text (a character, a word, white space) rather than markup.

    Ordinary pieces stay whole in user text, as in the authors' tokenizer. Markup in user text would be an injection.
    """
    visible = text.replace("▁", "").strip()
    return len(text) == 1 or not visible or visible.isalnum()


def _normalizer(model: _Model) -> normalizers.Sequence:
    """Build sentencepiece's own steps, in its order. It removes trailing spaces last, when they are already "▁"."""
    steps: list[normalizers.Normalizer] = []
    if model.charsmap:
        steps.append(normalizers.Precompiled(model.charsmap))
    if model.remove_extra_whitespaces:
        steps.append(normalizers.Replace(tokenizers.Regex(r"\A +"), ""))
        steps.append(normalizers.Replace(tokenizers.Regex(" {2,}"), " "))
    if model.add_dummy_prefix:
        steps.append(normalizers.Prepend("▁"))
    steps.append(normalizers.Replace(" ", "▁"))
    if model.remove_extra_whitespaces:
        # It begins at the first of many ▁ in a row only; from each of them it would take seconds in a long text.
        steps.append(normalizers.Replace(tokenizers.Regex(r"(?<!▁)▁+\z"), ""))
    return normalizers.Sequence(steps)


def verify(tokenizer_json: str, checkpoint_folder: str | os.PathLike[str], extra_tokens: Sequence[str] = ()) -> int:
    """Compare a converted tokenizer with its source; returns the number of strings compared.

    The source is sentencepiece itself, or the tokenizers library on the published tokenizer.json.

    Every piece of the vocabulary and a few hundred strings of many scripts, spaces, control characters and special
    tokens must give the same ids and decode to the same text, and literal text must not give a special token.
    Raises ExportError with the first difference, and CheckpointError as `convert` does.
    """
    folder = pathlib.Path(checkpoint_folder)
    if (folder / _LIBRARY).is_file():
        return _verify_taken_over(tokenizer_json, folder / _LIBRARY, extra_tokens)
    model = read_model(folder / _MODEL)
    added = _added_tokens(folder, [p.text for p in model.pieces], extra_tokens)
    strips = _strips(folder / _CONFIG)
    cuts = {p.text: i for i, p in enumerate(model.pieces) if p.kind in (_UNKNOWN, _CONTROL)} | added
    reference = sentencepiece.SentencePieceProcessor(model_proto=(folder / _MODEL).read_bytes())
    tokenizer = Tokenizer(tokenizer_json)
    marks = list(tokenizer.special_tokens)
    corpus = [*_corpus(marks), *(p.text.replace("▁", " ") for p in model.pieces)]
    if any("\x00" in p.text for p in model.pieces):  # releases of sentencepiece disagree on such a piece
        corpus = [text for text in corpus if "\x00" not in text]
    for text in corpus:
        want = _reference_ids(reference, cuts, strips, text)
        _compare("sentencepiece", "ids", text, tokenizer.encode(tokenizer.parse(text)), want)
        sayable = [i for i in want if i not in cuts.values()]
        _compare("sentencepiece", "decoded text", text, tokenizer.decode(sayable), reference.decode(sayable))
    _require_literal(tokenizer, reference.unk_id())
    return len(corpus)


def _verify_taken_over(tokenizer_json: str, path: pathlib.Path, extra_tokens: Sequence[str]) -> int:
    reference = tokenizers.Tokenizer.from_file(str(path))
    reference.add_tokens([AddedToken(t, special=True, normalized=False) for t in extra_tokens])
    tokenizer = Tokenizer(tokenizer_json)
    corpus = [*_corpus(list(tokenizer.special_tokens)), *(t.replace("▁", " ") for t in reference.get_vocab())]
    for text in corpus:
        want = reference.encode(text, add_special_tokens=False).ids
        _compare("the tokenizers library", "ids", text, tokenizer.encode(tokenizer.parse(text)), want)
        _compare(
            "the tokenizers library",
            "decoded text",
            text,
            tokenizer.decode(want),
            reference.decode(want, skip_special_tokens=True),
        )
    _require_literal(tokenizer, reference.token_to_id(reference.model.unk_token or ""))
    return len(corpus)


def _require_literal(tokenizer: Tokenizer, unknown: int | None) -> None:
    special = set(tokenizer.special_tokens.values())
    for text in tokenizer.special_tokens:
        if found := special.intersection(tokenizer.encode(f"a{text}b")) - {unknown}:
            raise ExportError(f"the special token {text!r} in user text gives the special ids {sorted(found)}")


def _reference_ids(
    reference: Any, cuts: Mapping[str, int], strips: Mapping[str, tuple[bool, bool]], text: str
) -> list[int]:
    """The authors' ids: text is cut at control pieces and added tokens, and sentencepiece gets each segment."""
    longest_first = sorted(cuts, key=len, reverse=True)
    ids: list[int] = []
    parts = re.split(f"({'|'.join(map(re.escape, longest_first))})", text)
    for i, part in enumerate(parts):
        if i % 2:
            ids.append(cuts[part])
            continue
        if i and strips.get(parts[i - 1], (False, False))[1]:
            part = part.lstrip()
        if i + 1 < len(parts) and strips.get(parts[i + 1], (False, False))[0]:
            part = part.rstrip()
        ids += reference.encode(part)
    return ids


def _compare(source: str, what: str, text: str, found: Any, want: Any) -> None:
    if found != want:
        raise ExportError(
            f"the converted tokenizer disagrees with {source} on {text!r}: {what} {found!r}, expected {want!r}; "
            "report this with the checkpoint's name"
        )


def _corpus(marks: list[str]) -> list[str]:
    """Make a few hundred strings, the same on every call."""
    rng = random.Random(0)
    marks = rng.sample(marks, min(10, len(marks)))
    words = [
        "What is in this picture?",
        "the quick brown fox",
        "naïve café",
        "Ich weiß, daß Öl",
        "Привет, мир",
        "你好,世界。",
        "日本語のテキスト",
        "안녕하세요",
        "สวัสดีครับ",
        "नमस्ते दुनिया",
        "مرحبا بالعالم",
        "שלום עולם",
        "γειά",
        "việt nam",
        "a\u0301\u0302 e\u0301 \ufb01 \uff21",
        "\U0001f469\u200d\U0001f467 \U0001f44d\U0001f3fd \U0001f1f0\U0001f1f7",
        "x = [1, 2]; // {}",
        "3.14159 1000000 2024-01-31",
        "https://a.b/c?d=e&f",
        "▁▁ ▁",
        "<0x0A> <0xFF>",
        "\x00 \x01 \x7f \x85",
        "\u200b \u200d \ufeff \u2028",
        "\U0001d4b3\U00010348\U00020bb7",
        "aaaaaaaaaaaaaaaa",
        "abababababab",
        "\ufffd",
        "\U0010ffff \ue000",
        "no\u00a0break",
    ]
    spaces = ["", " ", "  ", "   ", "\n", "\n\n", "\t", "\r\n", " \n ", "        "]
    corpus = ["", *spaces, *words, *marks]
    corpus += [a + word + b for word in words for a, b in ((" ", ""), ("", " "), ("\n", "\n"), ("  ", "  "))]
    corpus += ["".join(rng.choice(words + spaces * 2 + marks) for _ in range(rng.randrange(2, 9))) for _ in range(300)]
    return corpus
