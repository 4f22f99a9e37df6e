"""Turns text into token ids and back, and streams the text of an answer.

- User text is literal. A special token typed by a user is encoded as plain characters, so it cannot end the turn or
  fake a picture. Only the template's own special tokens become ids.
- A segment is a text that sentencepiece would get in one call. Its normalisation (dummy prefix, whitespace) sees the
  whole segment, with a placeholder character for each id inside it. The BPE model sees the text between those ids.
- Decoding works on bytes. A character that is spread over several byte tokens appears with its last byte.
"""

from __future__ import annotations

import codecs
import functools
import json
import os
import pathlib
import re
import reprlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Final, Literal

import tokenizers

from trol_edge.errors import BundleError, TrolEdgeError, UsageError
from trol_edge.prompt.charsmap import split_normalizer
from trol_edge.reading import guard, printable, read_text

# sentencepiece merges characters that are not pieces themselves. The tokenizers library cannot, so export lists
# such characters from this id on. Any that is left after merging becomes its bytes, or <unk>.
UNLISTED: Final = 1 << 24
MOST_STOPS, LONGEST_STOP = 256, 1024  # most stop strings of an answer, and most characters of one
MOST_STEPS = 16  # of a normalizer
MOST_UNLISTED: Final = 1 << 21  # more characters than Unicode has

# White space that a token with the flag lstrip or rstrip takes with it. It is Unicode's, which differs from Python's.
_SPACES: Final = "\t\n\v\f\r \x85\xa0\u1680\u2028\u2029\u202f\u205f\u3000" + "".join(map(chr, range(0x2000, 0x200B)))
# Steps of a normalizer that export writes. Others may take hours (regular expressions) or make texts endless.
_STEPS: Final = (
    {"type": "Prepend", "prepend": "▁"},
    {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
    {"type": "Replace", "pattern": {"Regex": r"\A +"}, "content": ""},
    {"type": "Replace", "pattern": {"Regex": " {2,}"}, "content": " "},
    {"type": "Replace", "pattern": {"Regex": r"(?<!▁)▁+\z"}, "content": ""},
)
_ESCAPED_BYTE = re.compile("[\udc80-\udcff]")
_STAND_INS = range(0xF0000, 0xFFFFE)  # characters for private use, which no normalisation changes


class Tokenizer:
    """Encodes and decodes with a `tokenizer.json` made by `trol_edge.export.reference.tokenizer`.

    If that was made from a sentencepiece model, it equals sentencepiece on the same segments. If it was made from a
    published tokenizer.json (it has a decoder then), it equals the tokenizers library on that file, except for bytes
    that are not UTF-8. It keeps no state between calls, so threads may share it.
    """

    def __init__(self, json_text: str, where: str = "tokenizer.json") -> None:
        """Read the text of a tokenizer.json; `where` names it in errors. Raises BundleError if it is unusable."""
        self._where = where
        with guard(where, BundleError, "copy or export the bundle again"):
            self._read(tokenizers.Tokenizer.from_str(json_text))
            self.decode(self.encode("a 1.\n"))  # a tokenizer that panics does so here

    def _read(self, loaded: tokenizers.Tokenizer) -> None:
        where = self._where
        made_here = (
            isinstance(loaded.model, tokenizers.models.BPE)
            and isinstance(loaded.normalizer, tokenizers.normalizers.Sequence)
            and (loaded.pre_tokenizer is None or isinstance(loaded.pre_tokenizer, tokenizers.pre_tokenizers.Metaspace))
        )
        if not made_here:
            raise BundleError(f"{where} was not made by trol_edge.export.reference.tokenizer; export the bundle again")
        steps = json.loads(loaded.normalizer.__getstate__())["normalizers"]
        first = 1 if steps and steps[0].get("type") == "Precompiled" else 0
        if unknown := [step for step in steps[first:] if step not in _STEPS] + steps[MOST_STEPS:]:
            raise BundleError(
                f"{where} changes texts by a step that export does not write, {printable(unknown[0])[:200]}; "
                "export the bundle again"
            )
        self._loaded = loaded
        self._model = loaded.model
        self._unknown_id = self.piece_id(loaded.model.unk_token or "")
        byte_pieces = [f"<0x{byte:02X}>" for byte in range(256)] if loaded.model.byte_fallback else []
        self.byte_ids = [self.piece_id(piece) for piece in byte_pieces]
        self._bytes = {i: bytes([byte]) for byte, i in enumerate(self.byte_ids)}
        added = loaded.get_added_tokens_decoder()
        self._added = {i: token.content for i, token in added.items()}
        self._charsmap, self._normalizer = split_normalizer(loaded.normalizer)
        self._prefix = loaded.pre_tokenizer.prepend_scheme if loaded.pre_tokenizer is not None else "never"
        self._like_library = loaded.decoder is not None
        # Export sets the `normalized` flag for pieces that sentencepiece itself finds inside a segment, and clears it
        # for tokens at which a text is cut into segments.
        self._cuts = frozenset(i for i, token in added.items() if not token.normalized)
        self._silent = frozenset(i for i in self._cuts if added[i].special)  # decode to no text
        self._special = {token.content: i for i, token in added.items() if token.special or i in self._cuts}
        self._lstrip = frozenset(i for i, token in added.items() if token.lstrip)
        self._rstrip = frozenset(i for i, token in added.items() if token.rstrip)
        plain = {token.content: i for i, token in added.items() if token.content not in self._special}
        if self._like_library:
            # sentencepiece finds such a piece before normalisation; the library finds, and shows, its normalised form
            plain = {self._normalizer.normalize_str(t): i for t, i in plain.items()}
            self._added |= {i: t for t, i in plain.items()}
        self._plain = plain
        self._plain_pattern = _any_of(self._plain)
        # sentencepiece drops leading spaces of decoded text by the same two settings that add and remove them here
        self._drops_every_space = self._normalise("a ").endswith("a")
        self._drops_a_space = self._drops_every_space or self._normalise("a") != "a"

    @classmethod
    def from_file(cls, path: str | os.PathLike[str]) -> Tokenizer:
        """Read a tokenizer.json file. Raises BundleError if it is missing or damaged."""
        return cls(read_text(pathlib.Path(path), BundleError, "copy or export the bundle again"), os.fspath(path))

    def require_ids_below(self, rows: int, error: type[TrolEdgeError] = BundleError) -> None:
        """Raise `error` if a token has an id that is neither a row of the embedding table nor a character's."""
        ids = self._loaded.get_vocab(with_added_tokens=True).values()
        tokens = [i for i in ids if not UNLISTED <= i < UNLISTED + MOST_UNLISTED]
        if (largest := max(tokens, default=0)) >= rows:
            refusal = error(
                f"{self._where} has a token {largest}, but the embedding table of this model has {rows} rows; "
                "take the tokenizer files of the same checkpoint, and export again"
            )
            raise refusal

    @property
    def special_tokens(self) -> Mapping[str, int]:
        """Content -> id of every token that user text cannot produce."""
        return self._special

    @functools.cached_property
    def longest(self) -> int:
        """The number of characters of the longest token."""
        return max(map(len, self._loaded.get_vocab(with_added_tokens=True)))

    def piece_id(self, piece: str) -> int:
        found = self._loaded.token_to_id(piece)
        if found is None:
            raise BundleError(f"{self._where} lacks the piece {piece!r}; export the bundle again")
        return int(found)

    def special_id(self, content: str) -> int:
        """The id of a special token. Raises BundleError if the tokenizer has no such token."""
        if content not in self._special:
            raise BundleError(
                f"{self._where} has no special token {content!r}, which the prompt template needs; "
                "export the bundle again from a complete checkpoint"
            )
        return self._special[content]

    def parse(self, text: str, special_tokens: Iterable[str] | None = None) -> list[str | int]:
        """Cut trusted text at `special_tokens` (by default all), which become ids. Never use it for user text."""
        pattern = _any_of(self._special if special_tokens is None else special_tokens)
        pieces = pattern.split(text) if pattern else [text]
        return [self.special_id(p) if i % 2 else p for i, p in enumerate(pieces) if p]

    def encode(self, parts: str | Sequence[str | int]) -> list[int]:
        """Return the ids of a text, or of text and ids in order. Text is literal, ids are kept as they are.

        Raises UsageError for a text with lone surrogates, which has no UTF-8 form, and BundleError if the tokenizer
        fails at it.
        """
        with guard(self._where, BundleError, "export the bundle again", "fails at this text"):
            return self._encode(parts)

    def _encode(self, parts: str | Sequence[str | int]) -> list[int]:
        ids: list[int] = []
        segment: list[str | int] = []
        before: int | None = None  # the cut after which the segment begins
        for part in [parts] if isinstance(parts, str) else parts:
            if isinstance(part, int) and part in self._cuts:
                ids += self._encode_segment(segment, before, part)
                ids.append(part)
                segment, before = [], part
            elif isinstance(part, int):
                segment.append(part)
            else:
                segment.append(_checked(part))
        return ids + self._encode_segment(segment, before, None)

    def decode(self, ids: Iterable[int]) -> str:
        """Return the text of ids, as sentencepiece does.

        Tokens that have no text (<s>, <unk>, <image>) and ids without a token (padded rows of an output layer) give
        nothing. Each byte that is not UTF-8 gives U+FFFD, and valid characters beside it stay (the tokenizers library
        loses those).
        """
        stream = TextStream(self)
        return "".join([stream.push(i) for i in ids]) + stream.flush()

    def token_bytes(self, token_id: int) -> tuple[bytes, bool]:
        """The UTF-8 bytes of one token, perhaps part of a character, and whether they begin with its own space."""
        # for an added token the library itself gives the normalised form, with the dummy prefix
        token = self._added.get(token_id) or (self._loaded.id_to_token(token_id) if 0 <= token_id < UNLISTED else None)
        if token is None or token_id in self._silent:
            return b"", False
        if token_id in self._bytes:
            byte = self._bytes[token_id]
            return byte, self._like_library and byte == b" "
        return token.replace("▁", " ").encode(), token.startswith("▁")

    def dropped_spaces(self) -> Literal["none", "one", "all"]:
        """The leading spaces of an answer that belong to the tokenizer and not to the text."""
        return "all" if self._drops_every_space else "one" if self._drops_a_space else "none"

    def _encode_segment(self, segment: list[str | int], before: int | None, after: int | None) -> list[int]:
        """Encode a segment between two cuts (None: the begin or end of the text)."""
        if before in self._rstrip:
            _strip(segment, 0)
        if after in self._lstrip:
            _strip(segment, -1)
        inner = [part for part in segment if isinstance(part, int)]
        text = "".join(part for part in segment if isinstance(part, str))
        stand_in = _stand_in(text)
        whole = "".join(part if isinstance(part, str) else stand_in for part in segment)
        ids: list[int] = []
        for i, between in enumerate(self._normalise(whole, first=before is None).split(stand_in)):
            ids += inner[i - 1 : i]  # there is none before the first
            for part in self._split_plain(between):
                ids += [part] if isinstance(part, int) else self._encode_piece(part)
        return ids

    def _split_plain(self, text: str) -> list[str | int]:
        """Cut at pieces that sentencepiece matches whole but that are ordinary text, such as runs of spaces."""
        if self._plain_pattern is None:
            return [text]
        return [self._plain[p] if i % 2 else p for i, p in enumerate(self._plain_pattern.split(text))]

    def _encode_piece(self, text: str) -> list[int]:
        ids: list[int] = []
        for token in self._model.tokenize(text):
            if token.id < UNLISTED and token.id != self._unknown_id:
                ids.append(token.id)
            elif token.id >= UNLISTED and self.byte_ids:
                ids += [self.byte_ids[byte] for byte in token.value.encode()]
            elif not ids or ids[-1] != self._unknown_id:  # sentencepiece fuses neighbouring unknowns
                ids.append(self._unknown_id)
        return ids

    def _normalise(self, text: str, first: bool = True) -> str:
        """Normalise a segment for the BPE model. first: whether it begins the whole text."""
        if self._like_library:
            text = self._normalizer.normalize_str(text)
            text = text.replace(" ", "▁")  # for files in which a pre-tokenizer does it, not the normalizer
            prefixed = self._prefix == "always" or (self._prefix == "first" and first)
            return "▁" + text if prefixed and text and not text.startswith("▁") else text
        exempt: list[str] = []
        stand_in = _stand_in(text)
        if self._plain_pattern is not None:
            exempt = self._plain_pattern.findall(text)
            text = self._plain_pattern.sub(stand_in, text)
        if self._charsmap is not None:
            text = self._charsmap.normalise(text)
        text = self._normalizer.normalize_str(text)
        return re.sub(stand_in, lambda _: exempt.pop(0), text)


def _any_of(contents: Iterable[str]) -> re.Pattern[str] | None:
    """A pattern whose `split` puts the longest match of any of `contents` at the odd indices."""
    longest_first = sorted(contents, key=len, reverse=True)
    return re.compile(f"({'|'.join(map(re.escape, longest_first))})") if longest_first else None


def _strip(segment: list[str | int], end: Literal[0, -1]) -> None:
    """Remove white space from the begin (0) or end (-1) of a segment, up to an id."""
    while segment and isinstance(text := segment[end], str):
        text = text.rstrip(_SPACES) if end else text.lstrip(_SPACES)
        if text:
            segment[end] = text
            return
        del segment[end]


def _stand_in(text: str) -> str:
    return next(chr(code) for code in _STAND_INS if chr(code) not in text)


def _checked(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UsageError(
            f"the text has a lone surrogate, {text[error.start]!r} at character {error.start}, which is not valid "
            "Unicode; decode the input with errors='replace'"
        ) from error
    return text


class TextStream:
    """Text of an answer as its tokens arrive. All returned texts joined equal `Tokenizer.decode` of the ids.

    With stop strings, the text ends before the first of them that is completed, and only text that may begin one is
    held back. Work per token does not grow with the answer.
    """

    def __init__(self, tokenizer: Tokenizer, stop: str | Sequence[str] = ()) -> None:
        """Raises UsageError if `stop` is not a str or a sequence of non-empty str."""
        stops = [stop] if isinstance(stop, str) else stop
        if not isinstance(stops, (list, tuple)) or not all(isinstance(s, str) and s for s in stops):
            raise UsageError(f"stop {reprlib.repr(stop)} should be a non-empty str or a list of them")
        if len(stops) > MOST_STOPS or max(map(len, stops), default=0) > LONGEST_STOP:
            raise UsageError(
                f"stop has {len(stops)} texts of up to {max(map(len, stops))} characters; give at "
                f"most {MOST_STOPS} of {LONGEST_STOP}, because all are compared at every token"
            )
        self.stopped: str | None = None  # the stop string that ended the text
        self._tokenizer = tokenizer
        self._stops = tuple(stops)
        self.held = ""
        self._dropping = tokenizer.dropped_spaces()
        # each byte that is not UTF-8 becomes one lone surrogate here, and U+FFFD below
        self._decoder = codecs.getincrementaldecoder("utf-8")("surrogateescape")

    def push(self, token_id: int) -> str:
        """Return the text that this token completes, which may be empty; after a stop string it always is."""
        data, spaced = self._tokenizer.token_bytes(token_id)
        if data and self._dropping != "none":
            data = data[spaced:]
            if data or self._dropping == "one":
                self._dropping = "none"
        return self._emit(data, final=False)

    def flush(self) -> str:
        """Return what was held back; call it once, after the last token."""
        return self._emit(b"", final=True)

    def _emit(self, data: bytes, *, final: bool) -> str:
        if self.stopped is not None:
            return ""
        self.held += _ESCAPED_BYTE.sub("\ufffd", self._decoder.decode(data, final))
        found = [(at + len(s), at, s) for s in self._stops if (at := self.held.find(s)) >= 0]
        if found:
            _, end, self.stopped = min(found)
        else:
            end = len(self.held) - (0 if final else self._possible_stop())
        text, self.held = self.held[:end], self.held[end:]
        return text

    def _possible_stop(self) -> int:
        """The length of the longest end of the held text that begins a stop string."""
        longest = max(map(len, self._stops), default=0)
        for length in range(min(len(self.held), longest - 1), 0, -1):
            if any(s.startswith(self.held[-length:]) for s in self._stops):
                return length
        return 0
