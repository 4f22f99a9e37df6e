"""Statistics of a calibration that never ran, for random weights: a bundle made of them costs what a real one costs."""

from __future__ import annotations

import numpy as np

from trol_edge.export.quantize.recipes import is_linear, point_of
from trol_edge.export.quantize.stats import CalibrationState, PointStatistics, Statistics
from trol_edge.export.reference.checkpoint import Checkpoint


def made_up_statistics(source: Checkpoint) -> Statistics:
    """Statistics as if every Linear of a checkpoint had seen eight rows of a normal distribution; always the same."""
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
