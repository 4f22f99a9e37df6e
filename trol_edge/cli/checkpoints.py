"""Finds the checkpoints and statistics that the verbs get as arguments."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import typer

from trol_edge.cli.show import extra

CHECKPOINTS = Path("build/checkpoints")  # folder of downloads
SENSITIVITY_SAMPLES = 8  # samples on which each Linear's cost is measured; each takes a run of the model


def checkpoint_of(given: str, downloads: Path = CHECKPOINTS, revision: str | None = None) -> tuple[Path, str | None]:
    """The folder of a checkpoint given as a folder or as a model's name, and that name. A named model is fetched."""
    with extra("export"):
        from trol_edge.export.reference import hub
    if Path(given).is_dir():
        return Path(given), None
    if "/" in given or given not in hub.MODELS:
        raise typer.BadParameter(f"{given} is neither a checkpoint folder nor one of {', '.join(hub.MODELS)}")
    return hub.fetch(given, downloads / given, revision), given


def statistics_of(given: Path | None, checkpoint: Path, data: Path | None, cache: Path, progress: Any) -> Any:
    """Make a function that loads a Checkpoint's statistics from the given folder, or gathers them into `cache`."""

    def statistics(source: Any) -> Any:
        from trol_edge.calibration.run import calibrate
        from trol_edge.export.quantize.stats import Statistics

        if given is not None:
            return Statistics.load(given, source.identity())
        return calibrate(checkpoint, data, cache, progress=progress)

    return statistics


def calibration_of(checkpoint: Path, output: Path) -> Path:
    """The default folder for statistics of a checkpoint, which is beside the output that is made with them."""
    return output.parent / f"calibration-{checkpoint.resolve().name}"
