"""Reads OpenAI's chat completion requests: what is known is checked, and what is not known is refused by name."""

from __future__ import annotations

import dataclasses
import json
import re
from typing import Any, NoReturn

from trol_edge.answering.choose import checked_options
from trol_edge.answering.options import options_from_keywords
from trol_edge.errors import RequestError, UsageError
from trol_edge.numeric import shown, whole
from trol_edge.prompt.template import IMAGE, Prompt

MOST_MESSAGES = 1024
MOST_PARTS = 1024  # of one message
MOST_NAME = 128  # characters of a conversation's name
# Fields of OpenAI's that only label a request.
LABELS = frozenset({"user", "safety_identifier", "metadata", "prompt_cache_key"})
# Fields that are accepted at the value that changes nothing.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "n": (1,),
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "logit_bias": ({},),
    "tools": ([],),
    "functions": ([],),
    "tool_choice": ("none", "auto"),
    "parallel_tool_calls": (True, False),
    "store": (False,),
    "service_tier": ("auto", "default"),
    "modalities": (["text"],),
}
# Fields that are options of Runtime.stream: OpenAI's own, then extensions.
OPTIONS = ("temperature", "top_p", "seed", "stop")
EXTENSIONS = ("top_k", "min_p", "repetition_penalty", "answer_mode", "long_context", "deadline_ms")
PICTURES = ("bits", "image_tokens", "max_tiles")  # options about pictures, which choose and yes_no take, too
KNOWN = frozenset(
    {"model", "messages", "stream", "stream_options", "max_completion_tokens", "max_tokens", "response_format"}
    | {"logprobs", "top_logprobs", "choose", "yes_no", "conversation", "truncation", *OPTIONS, *EXTENSIONS, *PICTURES}
)


@dataclasses.dataclass(frozen=True)
class Turn:
    """A question with the addresses of its pictures, and its answer; the last turn's is empty."""

    prompt: Prompt
    urls: tuple[str, ...]
    answer: str


@dataclasses.dataclass(frozen=True)
class ChatRequest:
    """A checked request."""

    turns: tuple[Turn, ...]
    options: dict[str, Any]  # of Chat.stream, without deadline_ms
    deadline_ms: float | None
    stream: bool
    stream_usage: bool
    choose: tuple[str, ...] | None
    yes_no: bool
    truncate: bool
    conversation: str


def parse(body: bytes, model: str) -> ChatRequest:
    """Read a request for `model`. Raises RequestError."""
    try:
        data = json.loads(body, parse_constant=_no_number)
    except (ValueError, RecursionError) as error:  # too many digits are a ValueError, too
        raise RequestError(
            f"the body is not JSON ({str(error) or 'nested too deeply'})", code="invalid_json"
        ) from error
    if not isinstance(data, dict):
        raise RequestError("the body should be a JSON object", code="invalid_json")
    try:
        return _request({name: value for name, value in data.items() if value is not None}, model)
    except RequestError:
        raise
    except UsageError as error:
        raise RequestError(str(error), code="invalid_value") from error


def _request(data: dict[str, Any], model: str) -> ChatRequest:
    for name, value in data.items():
        if name in NEUTRAL:
            if not any(value == allowed and type(value) is type(allowed) for allowed in (*NEUTRAL[name], 0.0)):
                wanted = " or ".join(json.dumps(allowed) for allowed in NEUTRAL[name])
                _refuse(name, f"is supported as {wanted} only, found {shown(value)}", "unsupported_value")
        elif name not in KNOWN and name not in LABELS:
            _refuse(name, "is not supported by this server; leave it out", "unsupported_parameter")
    if (asked := data.get("model", model)) != model:
        raise RequestError(
            f"the model {shown(asked)} is not here; this server has {model!r}",
            status=404,
            code="model_not_found",
            param="model",
        )
    stream_options = _fields(data, "stream_options", {"include_usage": bool, "include_obfuscation": bool})
    if stream_options and not data.get("stream"):
        _refuse("stream_options", "needs stream: true")
    options = {name: data[name] for name in (*OPTIONS, *EXTENSIONS, *PICTURES) if name in data}
    options |= _lengths(data) | _logprobs(data) | _format(data)
    checked = options_from_keywords(options)
    _ = checked.sampling  # raises UsageError for what cannot be sampled with
    options.pop("deadline_ms", None)
    choose, yes_no = _choices(data, options)
    return ChatRequest(
        turns=_turns(data.get("messages")),
        options=options,
        deadline_ms=checked.deadline_ms,
        stream=_of(data, "stream", bool, False),
        stream_usage=bool(stream_options.get("include_usage")),
        choose=choose,
        yes_no=yes_no,
        truncate=_one_of(data, "truncation", ("disabled", "auto")) == "auto",
        conversation=_conversation(data),
    )


def _lengths(data: dict[str, Any]) -> dict[str, Any]:
    """max_new_tokens, by OpenAI's two names."""
    names = [name for name in ("max_completion_tokens", "max_tokens") if name in data]
    for name in names:
        if whole(data[name], 1) is None:
            _refuse(name, f"should be a whole number above 0, found {shown(data[name])}")
    given = {data[name] for name in names}
    if len(given) > 1:
        _refuse("max_tokens", "and max_completion_tokens differ; give one of them")
    return {"max_new_tokens": given.pop()} if given else {}


def _logprobs(data: dict[str, Any]) -> dict[str, Any]:
    wanted, top = _of(data, "logprobs", bool, False), _of(data, "top_logprobs", int, 0)
    if top and not wanted:
        _refuse("top_logprobs", "needs logprobs: true")
    return {"logprobs": top} if wanted else {}


def _format(data: dict[str, Any]) -> dict[str, Any]:
    """response_format: OpenAI's kinds, and {"type": "regex", "regex": "..."}."""
    given = data.get("response_format")
    if given is None:
        return {}
    if not isinstance(given, dict) or not isinstance(given.get("type"), str):
        _refuse("response_format", f"should be an object with a type, found {shown(given)}")
    kind = given["type"]
    if kind == "text":
        return {}
    if kind == "json_object":
        return {"response_format": {"type": "object"}}
    if kind == "json_schema":
        inner = given.get("json_schema")
        if not isinstance(inner, dict) or not isinstance(inner.get("schema"), dict):
            _refuse("response_format.json_schema", "should be an object with a schema")
        return {"response_format": inner["schema"]}
    if kind == "regex":
        if not isinstance(given.get("regex"), str):
            _refuse("response_format.regex", "should be a text")
        try:
            return {"response_format": re.compile(given["regex"])}
        except (re.error, RecursionError, OverflowError) as error:
            _refuse("response_format.regex", f"is not a regular expression ({error})")
    _refuse("response_format.type", f"{shown(kind)} is none of text, json_object, json_schema and regex")


def _choices(data: dict[str, Any], options: dict[str, Any]) -> tuple[tuple[str, ...] | None, bool]:
    """The extensions choose and yes_no, which weigh given answers instead of making one."""
    choose, yes_no = data.get("choose"), _of(data, "yes_no", bool, False)
    if choose is not None and yes_no:
        _refuse("yes_no", "and choose exclude each other")
    if choose is None and not yes_no:
        return None, False
    name = "yes_no" if yes_no else "choose"
    unused = sorted(set(options) - {"max_new_tokens", "temperature", "seed", *PICTURES})
    if unused:
        _refuse(unused[0], f"has no meaning with {name}; leave it out", "unsupported_parameter")
    if yes_no:
        return None, True
    try:
        return tuple(checked_options(choose or ())), False
    except UsageError as error:
        raise RequestError(str(error), code="invalid_value", param="choose") from error


def _conversation(data: dict[str, Any]) -> str:
    name = _of(data, "conversation", str, "")
    if len(name) > MOST_NAME:
        _refuse("conversation", f"has {len(name)} characters; {MOST_NAME} are allowed")
    return name


# -- messages ----------------------------------------------------------------------------------------------------------


def _turns(messages: Any) -> tuple[Turn, ...]:
    """Questions and answers in turn. A system text goes before the first question, as the model's own is fixed."""
    if not isinstance(messages, list) or not messages:
        _refuse("messages", "should be a list of one or more messages")
    if len(messages) > MOST_MESSAGES:
        _refuse("messages", f"has {len(messages)} entries; {MOST_MESSAGES} are allowed")
    turns: list[Turn] = []
    asked: list[str | _Url] = []
    system = ""
    for i, message in enumerate(messages):
        where = f"messages[{i}]"
        if not isinstance(message, dict):
            _refuse(where, f"should be an object, found {shown(message)}")
        role = message.get("role")
        for name, value in message.items():
            sent_back = role == "assistant" and name in ("annotations", "trol_edge")
            if name not in ("role", "content") and value not in (None, [], "") and not sent_back:
                _refuse(f"{where}.{name}", "is not supported; leave it out", "unsupported_parameter")
        if role in ("system", "developer"):
            if turns or asked:
                _refuse(where, f"has the role {role}, which is for the first messages only")
            system += "".join(part + "\n" for part in _texts_only(message.get("content"), where))
        elif role == "user":
            if asked and isinstance(asked[-1], str) and not asked[-1].endswith("\n"):
                asked.append("\n")
            asked += _parts(message.get("content"), where)
        elif role == "assistant":
            if i == 0 or messages[i - 1].get("role") != "user":
                _refuse(where, "an assistant message should follow a user's")
            turns.append(_turn(system, asked, "".join(_texts_only(message.get("content"), where))))
            asked, system = [], ""
        else:
            _refuse(f"{where}.role", f"{shown(role)} is none of system, developer, user and assistant")
    if messages[-1].get("role") != "user":
        _refuse("messages", "should end with a user's message")
    return (*turns, _turn(system, asked, ""))


@dataclasses.dataclass(frozen=True)
class _Url:
    """The address of a picture."""

    url: str


def _parts(content: Any, where: str) -> list[str | _Url]:
    if isinstance(content, str):
        return [content]
    if not isinstance(content, list) or not content or len(content) > MOST_PARTS:
        _refuse(f"{where}.content", f"should be a text or a list of 1 to {MOST_PARTS} parts")
    found: list[str | _Url] = []
    for i, part in enumerate(content):
        here = f"{where}.content[{i}]"
        kind = part.get("type") if isinstance(part, dict) else None
        if kind == "text" and isinstance(part.get("text"), str):
            found.append(part["text"])
        elif kind == "image_url":
            image = part.get("image_url")
            url = image.get("url") if isinstance(image, dict) else image
            if not isinstance(url, str):
                _refuse(f"{here}.image_url.url", "should be a text")
            if isinstance(image, dict) and image.get("detail") not in (None, "auto", "low", "high"):
                _refuse(f"{here}.image_url.detail", f"{shown(image['detail'])} is unknown")
            found.append(_Url(url))
        else:
            _refuse(here, f"of type {shown(kind)} is neither a text nor an image_url", "unsupported_parameter")
    return found


def _texts_only(content: Any, where: str) -> list[str]:
    parts = _parts(content, where)
    texts = [part for part in parts if isinstance(part, str)]
    if len(texts) < len(parts):
        _refuse(f"{where}.content", "pictures belong into a user's message")
    return texts


def _turn(system: str, parts: list[str | _Url], answer: str) -> Turn:
    """Pictures that are not placed between texts come first, as in the model's training."""
    urls = tuple(part.url for part in parts if isinstance(part, _Url))
    at = [i for i, part in enumerate(parts) if isinstance(part, _Url)]
    together = not at or at[-1] - at[0] == len(at) - 1
    if together and (not at or at[0] == 0 or at[-1] == len(parts) - 1):
        return Turn(system + "".join(part for part in parts if isinstance(part, str)), urls, answer)
    placed = [part if isinstance(part, str) else IMAGE for part in parts]
    return Turn([system, *placed] if system else placed, urls, answer)


# -- small checks ------------------------------------------------------------------------------------------------------


def _of(data: dict[str, Any], name: str, kind: type, default: Any) -> Any:
    value = data.get(name, default)
    if type(value) is not kind:
        _refuse(name, f"should be of type {kind.__name__}, found {shown(value)}")
    return value


def _one_of(data: dict[str, Any], name: str, allowed: tuple[str, ...]) -> str:
    value = data.get(name, allowed[0])
    if value not in allowed:
        _refuse(name, f"should be one of {', '.join(allowed)}, found {shown(value)}")
    return str(value)


def _fields(data: dict[str, Any], name: str, kinds: dict[str, type]) -> dict[str, Any]:
    value = data.get(name, {})
    if not isinstance(value, dict):
        _refuse(name, f"should be an object, found {shown(value)}")
    for key, inner in value.items():
        if key not in kinds:
            _refuse(f"{name}.{key}", "is not supported by this server; leave it out", "unsupported_parameter")
        if inner is not None and type(inner) is not kinds[key]:
            _refuse(f"{name}.{key}", f"should be of type {kinds[key].__name__}, found {shown(inner)}")
    return value


def _no_number(name: str) -> Any:
    raise UsageError(f"{name} is not a number of JSON")


def _refuse(param: str, what: str, code: str = "invalid_value") -> NoReturn:
    raise RequestError(f"{param} {what}", code=code, param=param)
