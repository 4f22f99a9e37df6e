"""Makes up calibration statistics for random weights, so that their bundle costs as much as a real one."""

from __future__ import annotations

import numpy as np

from trol_edge.export.quantize.recipes import is_linear, point_of
from trol_edge.export.quantize.stats import CalibrationState, PointStatistics, Statistics
from trol_edge.export.reference.checkpoint import Checkpoint


def made_up_statistics(source: Checkpoint) -> Statistics:
    """Make statistics as if every Linear had seen eight rows of a normal distribution; the same on every call."""
    rng, points = np.random.default_rng(0), {}
    for name in source.names():
        shape = source.shape(name)
        if is_linear(name, shape):
            rows = rng.standard_normal((8, shape[1]), dtype=np.float32)
            size, top = np.abs(rows), float(np.abs(rows).max())
            bins = np.histogram(size, 2048, (0, top))[0]
            points[point_of(name)] = PointStatistics(
                len(rows), size.max(axis=0), size.mean(axis=0), (size**2).mean(axis=0), rows, bins, top, top
            )
    return Statistics(points, {}, CalibrationState(source.identity(), "made up", 1, ()))
