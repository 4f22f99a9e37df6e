"""Numbers as callers pass them: Python's, NumPy's, fractions. What comes out is a plain int, float or bool, or None."""

from __future__ import annotations

import math
import numbers
import operator
import reprlib
from typing import Any

import numpy as np


def whole(value: Any, low: int | None = None, high: int | None = None) -> int | None:
    """The value as an int; None where it is no whole number, is a truth value, or is outside of low..high."""
    if isinstance(value, (bool, np.bool_)):
        return None
    try:
        found = operator.index(value)
    except TypeError:
        return None
    return found if (low is None or low <= found) and (high is None or found <= high) else None


def real(value: Any) -> float | None:
    """The value as a finite float; None where it is no number, is a truth value, or is more than a float holds."""
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
    """The value as a bool; None where it is neither True nor False."""
    return bool(value) if isinstance(value, (bool, np.bool_)) else None


def shown(value: Any) -> str:
    """The value for a message, on one line and short, whatever it is."""
    try:
        return reprlib.repr(value)
    except Exception:  # an int of more digits than Python prints, or a __repr__ that fails
        return f"of type {type(value).__name__}"
