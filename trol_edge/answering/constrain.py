"""Constrains answers to a form: finds which tokens may come next under a JSON schema or a regular expression.

The grammars are llguidance's work (an optional installation). This file gives it the vocabulary and applies its masks.
"""

from __future__ import annotations

import json
import re
import reprlib
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from trol_edge.errors import BackendError, UsageError
from trol_edge.prompt.tokenizer import Tokenizer

if TYPE_CHECKING:
    import llguidance

Float32 = NDArray[np.float32]
ResponseFormat = dict[str, Any] | re.Pattern[str]

# Most work of the grammar library, which nothing can interrupt: some 0.1 s to begin, and as much for one token. Its own
# limits are ten and four times as large. 100 dates in an object, or 3000 texts to choose from, need a fraction of it.
FUEL, STEP_FUEL = 100_000, 50_000
MOST_CHARACTERS = 64 << 10  # longest schema or pattern
# The style of json.dumps. With free white space a small model can fill its whole answer with blanks.
_JSON_STYLE: Any = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}


class Grammars:
    """The vocabulary of one model, in the form that the grammar library needs."""

    def __init__(self, tokenizer: Tokenizer, end_ids: Iterable[int], vocab_size: int) -> None:
        """Prepare the vocabulary. end_ids: tokens that end an answer. Raises BackendError without llguidance."""
        try:
            import llguidance
        except ImportError as error:
            raise BackendError(
                f"response_format needs llguidance ({error}); pip install 'trol-edge[formats]'"
            ) from error
        self._library = llguidance
        ends = sorted(end_ids)
        wrapper = llguidance.TokenizerWrapper(_Vocabulary(tokenizer, ends, vocab_size))
        self._tokens = llguidance.LLTokenizer(wrapper, n_vocab=vocab_size, eos_token=ends)

    def start(self, response_format: ResponseFormat) -> Constraint:
        """Make a constraint for the beginning of an answer.

        response_format: a dict is a JSON schema; a compiled pattern is one that the whole answer matches (syntax of
        Rust's `regex`, so without lookaround and back references). Raises UsageError if it is neither, is not
        understood, or cannot be satisfied.
        """
        matchers = self._library.LLMatcher
        if isinstance(response_format, dict):
            try:
                schema = _bounded(json.dumps(response_format))
                grammar = matchers.grammar_from_json_schema(schema, defaults=_JSON_STYLE)
            except UsageError:
                raise
            except (TypeError, ValueError, RecursionError) as error:
                raise UsageError(f"response_format is not a JSON schema: {error}") from error
        elif isinstance(response_format, re.Pattern) and isinstance(response_format.pattern, str):
            if response_format.flags & ~re.UNICODE:
                raise UsageError(
                    f"response_format: flags of a pattern are not read; write (?i) and the like into it: "
                    f"{reprlib.repr(response_format.pattern)}"
                )
            grammar = matchers.grammar_from_regex(_bounded(response_format.pattern))
        else:
            raise UsageError(
                f"response_format is a {type(response_format).__name__}; pass a JSON schema (dict) or re.compile(...)"
            )
        limits = self._library.LLParserLimits(initial_lexer_fuel=FUEL, step_lexer_fuel=STEP_FUEL)
        return Constraint(matchers(self._tokens, grammar, log_level=0, limits=limits))


def _bounded(text: str) -> str:
    """Return the text of a schema or pattern. Raises UsageError for one that would take seconds to compile."""
    if len(text) > MOST_CHARACTERS:
        raise UsageError(
            f"response_format has {len(text)} characters, but {MOST_CHARACTERS} are allowed; use a shorter one"
        )
    return text


class _Vocabulary:
    """The attributes that llguidance.TokenizerWrapper reads."""

    def __init__(self, tokenizer: Tokenizer, ends: list[int], vocab_size: int) -> None:
        self._tokenizer = tokenizer
        self.eos_token_id, self.bos_token_id = ends[0], None
        self.tokens = [tokenizer.token_bytes(i)[0] for i in range(vocab_size)]
        # They have no text, so the grammar cannot ask for them, and only the end markers among them may come.
        self.special_token_ids = [i for i, token in enumerate(self.tokens) if not token]

    def __call__(self, text: bytes) -> list[int]:
        return self._tokenizer.encode(text.decode(errors="replace"))


class Constraint:
    """The state of one answer in its grammar."""

    def __init__(self, matcher: llguidance.LLMatcher) -> None:
        self._matcher = matcher
        bits = matcher.compute_bitmask()
        if matcher.get_error().startswith("NoExtension"):
            raise UsageError("response_format: no text satisfies it")
        self._check()
        if not any(bits):
            raise UsageError("response_format: no token of this model can begin an answer that satisfies it")

    def mask(self, logits: Float32) -> Float32:
        """Copy logits [V] with -inf for every token that may not come next."""
        bits = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
        allowed = np.unpackbits(bits, bitorder="little", count=len(logits)).view(np.bool_)
        self._check()
        if not allowed.any():
            raise UsageError("response_format: no token of this model can continue the answer so far")
        return np.where(allowed, logits, np.float32(-np.inf))

    def accept(self, token: int) -> bool:
        """Take the chosen token; returns True if the answer is complete and nothing may follow."""
        self._matcher.consume_token(token)
        self._check()
        return self._matcher.is_stopped()

    def _check(self) -> None:
        if self._matcher.is_error():
            # the library appends pages of its state
            message = self._matcher.get_error().split("\n<state>")[0].strip()
            raise UsageError(f"response_format: {message}")
