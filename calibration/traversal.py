"""Chooses the layers whose second pass is left out, for `export --traversal auto`.

A calibration has measured what each layer's second pass is worth alone. In that order, the least first, as many are
left out as keep the divergence of the logits within a budget. What counts is the divergence of the whole set, which is
measured again on the calibration's samples; the costs of single layers do not add up.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence

from trol_edge.bundle.spec import TraversalChoice
from trol_edge.calibration.left_out import Layers, Measure
from trol_edge.calibration.samples import Progress
from trol_edge.errors import CalibrationError, UsageError
from trol_edge.export.gates import Loss, load
from trol_edge.export.quantize.recipes import RecipeOptions, make_plan
from trol_edge.export.reference.checkpoint import Checkpoint

# Twice what INT8 costs trol-nano-phi3, where 99.85 % of the answers stay the same, and a third of what a plain INT8
# costs that loses 0.4 points of accuracy (docs/results.md, "What precision costs").
DEFAULT_NATS = 1e-4
SHARE = 0.5  # of a budget for traversal and precision together, the most that traversal takes


def budget(checkpoint: str | os.PathLike[str], options: RecipeOptions, max_loss: float | None) -> tuple[float, bool]:
    """What second passes may cost in nats, and whether a search for precision has the rest of `max_loss`.

    That search follows, and measures both together against `max_loss`. A recipe that rounds nothing leaves all of it
    to the traversal. Raises UsageError for a limit that is not a number above 0.
    """
    if max_loss is None:
        return DEFAULT_NATS, False
    _require_limit(max_loss)
    source = Checkpoint(checkpoint)
    rounds = make_plan(options, {name: source.shape(name) for name in source.names()}, "cpu").quantized
    return (SHARE * max_loss if rounds else max_loss), rounds


def choose(
    checkpoint: str | os.PathLike[str],
    calibration: str | os.PathLike[str],
    max_nats: float,
    progress: Progress = lambda what, done, total: None,
) -> tuple[tuple[int, ...], TraversalChoice]:
    """Find the layers that keep their second pass, and what leaving out the others costs.

    calibration: folder of a finished calibration of this checkpoint, with second passes left out. At least one layer
    keeps its second pass. Memory is that of one layer and of the samples' hidden states. Raises UsageError for a limit
    that is not a number above 0, CalibrationError for a calibration of another checkpoint, or one that measured nothing
    of this.
    """
    _require_limit(max_nats)
    source = Checkpoint(checkpoint)
    layers = source.spec.num_layers
    gates = load(calibration, source.identity(), layers)
    if not gates.losses:
        raise CalibrationError(
            f"{gates.folder}: it was calibrated without leaving out second passes, so nothing is known of what they "
            "are worth; run `trol-edge calibrate` again with --leave-out 4"
        )
    order = sorted(gates.alone, key=lambda layer: (gates.alone[layer].nats, -layer))
    found = most(order[: layers - 1], Measure(source, gates, progress), max_nats)
    choice = TraversalChoice(found.nats, max_nats, found.same_top, gates.state.left_out)
    return tuple(i for i in range(layers) if i not in found.layers), choice


def _require_limit(nats: float) -> None:
    if not 0 < nats < math.inf:
        raise UsageError(f"max_loss {nats!r} nats: choose a limit above 0, such as {DEFAULT_NATS:g}")


def most(order: Sequence[int], measure: Callable[[Layers], Loss], limit: float) -> Loss:
    """Leave out as many layers from the beginning of `order` as keep the loss within the limit, found by bisection."""
    within, few, many = Loss((), 0.0, 1.0), 0, len(order) + 1
    while many - few > 1:
        middle = (few + many) // 2
        found = measure(tuple(sorted(order[:middle])))
        if found.nats <= limit:
            within, few = found, middle
        else:
            many = middle
    return within
