"""Writes OpenAI's objects: completions, chunks, logprobs, usage, errors."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from typing import Any

from trol_edge.answering.results import Piece, TokenLogprob
from trol_edge.errors import RequestError, TrolEdgeError, UnfinishedError, UsageError
from trol_edge.prompt.tokenizer import Tokenizer
from trol_edge.serve.host import Outcome

# Why an answer ended -> OpenAI's word; the field trol_edge has ours.
REASONS = {"stop": "stop", "length": "length", "context": "length", "deadline": "length", "stopped": "length"}
# Our errors -> codes that programs look at.
_CODES = {
    "ContextError": "context_length_exceeded",
    "ImageError": "invalid_image",
    "BackendError": "backend_error",
}
DONE = b"data: [DONE]\n\n"


@dataclasses.dataclass(frozen=True)
class Heading:
    """What every object of one answer begins with."""

    id: str
    created: int
    model: str

    def object(self, kind: str, choices: Sequence[dict[str, Any]], **more: Any) -> dict[str, Any]:
        """One object of a kind."""
        head = {"id": self.id, "object": kind, "created": self.created, "model": self.model}
        return {**head, "choices": list(choices), **more}


def completion(heading: Heading, outcome: Outcome, text: Tokenizer, with_logprobs: bool) -> dict[str, Any]:
    """The whole answer as one object."""
    choice = {
        "index": 0,
        "message": {"role": "assistant", "content": outcome.text, "refusal": None},
        "logprobs": logprobs(outcome.logprobs, text) if with_logprobs else None,
        "finish_reason": REASONS[outcome.finish_reason],
    }
    return heading.object("chat.completion", [choice], usage=usage(outcome), trol_edge=details(outcome))


def first_chunk(heading: Heading) -> bytes:
    """The chunk that says who speaks."""
    return event(heading.object("chat.completion.chunk", [_choice({"role": "assistant", "content": ""})]))


class Chunks:
    """Makes the chunks of one answer; what they have in common is written once."""

    def __init__(self, heading: Heading, text: Tokenizer, with_logprobs: bool) -> None:
        frame = heading.object("chat.completion.chunk", [_choice({"content": "@"}, "@")])
        before, middle, after = json.dumps(frame).split('"@"')
        self._before, self._middle, self._after = f"data: {before}", middle, f"{after}\n\n"
        self._text, self._with_logprobs = text, with_logprobs

    def of(self, piece: Piece) -> bytes:
        """The chunk of a piece; empty for one without text and tokens."""
        if not piece.text and not piece.token_ids:
            return b""
        found = json.dumps(logprobs(piece.logprobs, self._text)) if self._with_logprobs else "null"
        return (self._before + json.dumps(piece.text) + self._middle + found + self._after).encode()


def last_chunks(heading: Heading, outcome: Outcome, with_usage: bool) -> bytes:
    """The chunk with the reason of the end, the one with the counts if they were asked for, and the end."""
    end = _choice({}, None, REASONS[outcome.finish_reason])
    found = event(heading.object("chat.completion.chunk", [end], trol_edge=details(outcome)))
    if with_usage:
        found += event(heading.object("chat.completion.chunk", [], usage=usage(outcome)))
    return found + DONE


def event(data: dict[str, Any]) -> bytes:
    """One event of a stream."""
    return f"data: {json.dumps(data)}\n\n".encode()


def usage(outcome: Outcome) -> dict[str, Any]:
    """The counts of tokens. Weighed answers have none."""
    prompt, made = outcome.prompt_tokens, len(outcome.token_ids)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": made,
        "total_tokens": prompt + made,
        "prompt_tokens_details": {"cached_tokens": outcome.cached_tokens},
    }


def details(outcome: Outcome) -> dict[str, Any]:
    """What OpenAI's fields have no place for."""
    found: dict[str, Any] = {"finish_reason": outcome.finish_reason, "dropped_turns": outcome.dropped}
    found["queue_ms"] = outcome.queue_ms
    timings = None
    if outcome.last is not None:
        timings, found["rope"] = outcome.last.timings, outcome.last.rope
    if outcome.choice is not None:
        timings = outcome.choice.timings
        fields = ("text", "probability", "score", "logprob", "tokens")
        options = [{name: getattr(option, name) for name in fields} for option in outcome.choice.options]
        found["choice"] = {"index": outcome.choice.index, "probability": outcome.choice.probability, "options": options}
    if outcome.yes_no is not None:
        timings = outcome.yes_no.timings
        found["yes_no"] = {"yes": outcome.yes_no.yes, "probability": outcome.yes_no.probability}
    return found | {"timings": dict(vars(timings)) if timings else None}


def logprobs(tokens: Sequence[TokenLogprob], text: Tokenizer) -> dict[str, Any]:
    """OpenAI's logprobs of some tokens."""

    def entry(token_id: int, logprob: float) -> dict[str, Any]:
        raw = text.token_bytes(token_id)[0]
        return {"token": raw.decode(errors="replace"), "logprob": logprob, "bytes": list(raw)}

    content = [
        entry(t.token_id, t.logprob) | {"top_logprobs": [entry(other, value) for other, value in t.top]} for t in tokens
    ]
    return {"content": content, "refusal": None}


def error_status(error: Exception) -> int:
    """The HTTP status of an error."""
    if isinstance(error, RequestError):
        return error.status
    if isinstance(error, UsageError):
        return 400
    if isinstance(error, UnfinishedError):
        return 504 if error.reason == "deadline" else 503
    return 500


def error_object(error: Exception) -> dict[str, Any]:
    """OpenAI's error object. What is not an error of this package is not shown, but logged."""
    status, code, param = error_status(error), None, None
    if isinstance(error, RequestError):
        code, param = error.code, error.param
    elif isinstance(error, UnfinishedError):
        code = error.reason
    elif isinstance(error, TrolEdgeError):
        code = _CODES.get(type(error).__name__)
    kind = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 429: "rate_limit_error"}
    known = isinstance(error, TrolEdgeError)
    message = str(error) if known else "the server failed at this request; its log has the reason"
    name = kind.get(status, "invalid_request_error" if status < 500 else "server_error")
    return {"error": {"message": message, "type": name, "param": param, "code": code}}


def _choice(delta: dict[str, Any], logprobs: Any = None, finish_reason: str | None = None) -> dict[str, Any]:
    return {"index": 0, "delta": delta, "logprobs": logprobs, "finish_reason": finish_reason}
