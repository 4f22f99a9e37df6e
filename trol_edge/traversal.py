"""Reads which layers have a second pass, as `export --traversal` and `Runtime(traversal=...)` name them."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable

from trol_edge.bundle.manifest import Bundle
from trol_edge.errors import UsageError
from trol_edge.numeric import shown, whole

Traversal = str | int | Collection[int]


def traversed_layers(traversal: Traversal, layers: int) -> tuple[int, ...] | None:
    """The layers with a second pass, in order; None for all of them.

    traversal: "all"; "12" or 12, the first 12; "0-7,10", or layers that count from 0. layers: number of layers of the
    model. Raises UsageError for layers that do not exist, for none, and for anything else.
    """
    if isinstance(traversal, int) and not isinstance(traversal, bool):
        traversal = str(traversal)
    if isinstance(traversal, str):
        text = traversal.strip()
        if text == "all":
            return None
        if re.fullmatch(r"\d{1,6}", text):
            count = int(text)
            if not 1 <= count <= layers:
                raise UsageError(f"traversal {text}: this model has {layers} layers; give 1..{layers}, the first ones")
            return _unless_all(range(count), layers)
        if not re.fullmatch(r"\d{1,6}(-\d{1,6})?(,\s*\d{1,6}(-\d{1,6})?)*", text):
            raise UsageError(
                f"traversal {shown(traversal)} should be all, a number of layers (12: the first 12), or a list such as "
                "0-7,10 (a single one: 5-5)"
            )
        ends = [tuple(map(int, part.split("-"))) for part in text.split(",")]
        if wrong := [pair for pair in ends if max(pair) >= layers or pair[0] > pair[-1]]:
            raise UsageError(
                f"traversal {text}: {'-'.join(map(str, wrong[0]))} is not within layers 0..{layers - 1} of this model"
            )
        return _unless_all((i for first, *last in ends for i in range(first, (last or [first])[0] + 1)), layers)
    found = [whole(layer, 0, layers - 1) for layer in traversal] if isinstance(traversal, Collection) else []
    if not found or None in found:
        raise UsageError(f"traversal {shown(traversal)} should be a list of one or more of layers 0..{layers - 1}")
    return _unless_all((layer for layer in found if layer is not None), layers)


def _unless_all(found: Iterable[int], layers: int) -> tuple[int, ...] | None:
    chosen = tuple(sorted(set(found)))
    return None if len(chosen) == layers else chosen


def passes_of(bundle: Bundle, traversal: Traversal) -> tuple[int, ...]:
    """The layers with a second pass that a bundle is asked for, in order; see `traversed_layers`.

    Raises UsageError for layers in which the bundle has none.
    """
    spec = bundle.manifest.spec
    chosen = traversed_layers(traversal, spec.num_layers)
    wanted = tuple(range(spec.num_layers)) if chosen is None else chosen
    if missing := [layer for layer in wanted if layer not in spec.second_layers]:
        raise UsageError(
            f"traversal {shown(traversal)}: {bundle.folder} was exported with a second pass in layers "
            f"{', '.join(map(str, spec.second_layers))}, so it has neither calibration nor caches for one in "
            f"{', '.join(map(str, missing))}; leave {'these' if len(missing) > 1 else 'it'} out, or export with "
            "--traversal all"
        )
    return wanted
