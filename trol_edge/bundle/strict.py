"""Reads JSON strictly: every unknown, missing or mistyped field is a problem, and they are reported at once."""

from __future__ import annotations

import dataclasses
import functools
import types
import typing
from typing import Any, TypeVar

from trol_edge.errors import BundleError, TrolEdgeError
from trol_edge.reading import listing

T = TypeVar("T")
MOST_NUMBER = 1 << 63
MOST_TEXT = 1 << 20  # characters


def from_dict(
    cls: type[T],
    data: Any,
    where: str,
    error: type[TrolEdgeError] = BundleError,
    advice: str = "Export the bundle again with this version of trol-edge",
) -> T:
    """Build the dataclass `cls` (nested ones included) from parsed JSON.

    Unknown, missing and wrongly typed keys raise `error` in one message that lists them and ends in `advice`. A field
    that is silently dropped would be a silently wrong answer later.
    """
    problems: list[str] = []
    value = _convert(cls, data, where, problems)
    if problems:
        refusal = error(f"{listing(problems)}. {advice}")
        raise refusal
    return value


@functools.cache  # a manifest has hundreds of objects of a few classes
def _hints(cls: type) -> dict[str, Any]:
    return typing.get_type_hints(cls)


@functools.cache
def _parts(hint: Any) -> tuple[Any, tuple[Any, ...]]:
    return typing.get_origin(hint), typing.get_args(hint)


def _convert(hint: Any, value: Any, where: str, problems: list[str]) -> Any:
    if isinstance(value, str) and len(value) > MOST_TEXT:
        problems.append(f"{where}: a text of {len(value)} characters is too long")
        return None
    if type(value) is hint and (hint is str or hint is bool or (hint is int and abs(value) < MOST_NUMBER)):
        return value  # most values of a manifest
    origin, args = _parts(hint)
    if origin in (typing.Union, types.UnionType):
        for option in args:
            attempt: list[str] = []
            found = _convert(option, value, where, attempt)
            if not attempt:
                return found
    if dataclasses.is_dataclass(hint) and isinstance(hint, type) and isinstance(value, dict):
        hints = _hints(hint)
        fields = {f.name: f for f in dataclasses.fields(hint)}
        problems += [f"{where}: unknown key {key!r}" for key in value if key not in fields]
        problems += [
            f"{where}: missing key {name!r}"
            for name, f in fields.items()
            if name not in value and f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
        ]
        found = {n: _convert(hints[n], value[n], f"{where}.{n}", problems) for n in fields if n in value}
        return None if problems else hint(**found)
    if origin is dict and isinstance(value, dict):
        return {key: _convert(args[1], item, f"{where}.{key}", problems) for key, item in value.items()}
    if origin is tuple and isinstance(value, list | tuple):
        kinds = args[:1] * len(value) if args[-1] is ... else args
        if len(kinds) == len(value):
            items = zip(kinds, value, strict=True)
            return tuple(_convert(k, v, f"{where}[{i}]", problems) for i, (k, v) in enumerate(items))
    if isinstance(value, int | float) and not abs(value) < MOST_NUMBER:
        problems.append(f"{where}: {value!r:.80} is too large")
        return None
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if hint is types.NoneType and value is None:
        return None
    if isinstance(hint, type) and isinstance(value, hint) and (hint is not int or not isinstance(value, bool)):
        return value
    problems.append(f"{where}: expected {getattr(hint, '__name__', hint)}, found {value!r:.80}")
    return None
