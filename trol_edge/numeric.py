"""Checks values from callers, and converts numbers (Python's, NumPy's, fractions) to a plain int, float or bool."""

from __future__ import annotations

import math
import numbers
import operator
import reprlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from trol_edge.errors import UsageError


def whole(value: Any, low: int | None = None, high: int | None = None) -> int | None:
    """The value as an int; None if it is not a whole number, is a truth value, or is outside low..high."""
    if isinstance(value, (bool, np.bool_)):
        return None
    try:
        found = operator.index(value)
    except TypeError:
        return None
    return found if (low is None or low <= found) and (high is None or found <= high) else None


def real(value: Any) -> float | None:
    """The value as a finite float; None if it is not a number, is a truth value, or is too large for a float."""
    if isinstance(value, np.ndarray) and value.ndim == 0:
        value = value.item()
    if isinstance(value, (bool, np.bool_)) or not isinstance(value, numbers.Real):
        return None
    try:
        found = float(value)
    except OverflowError:
        return None
    return found if math.isfinite(found) else None


def truth(value: Any) -> bool | None:
    """The value as a bool; None if it is neither True nor False."""
    return bool(value) if isinstance(value, (bool, np.bool_)) else None


def switch(name: str, value: Any) -> bool:
    """The value of an argument that is True or False. Raises UsageError for anything else, "no" among it."""
    found = truth(value)
    if found is None:
        raise UsageError(f"{name} should be True or False, found {shown(value)}")
    return found


def is_one_of(value: Any, choices: Sequence[Any]) -> bool:
    """Whether a value equals one of some choices. An array, which compares element by element, equals none."""
    try:
        return value in choices
    except Exception:
        return False


def shown(value: Any) -> str:
    """Any value as a short text on one line, for a message."""
    try:
        return reprlib.repr(value)
    except Exception:  # an int with more digits than Python prints, or a failing __repr__
        return f"of type {type(value).__name__}"
