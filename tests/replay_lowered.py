"""Run again, on another ONNX Runtime, what tests/test_lower_ort.py left in a folder; see `make test-oldest`.

TROL_EDGE_LOWERED_OUT=folder python -m pytest tests/test_lower_ort.py     # here
python tests/replay_lowered.py folder                                     # there: onnxruntime and numpy are enough
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

os.environ["ORT_DISABLE_TELEMETRY"] = "1"  # before the import: see trol_edge/telemetry.py, which is not installed there

import numpy as np
import onnxruntime

TOLERANCE = 1e-4  # of the largest magnitude: the same integers, sums of floats in another order
ROUNDED = 2e-2  # where inputs are rounded to 8 bits: a last bit may round to the neighbouring integer


def main(folder: Path) -> int:
    """Run every graph of the folder and compare; returns the exit status."""
    made_by = json.loads((folder / "made_by.json").read_text(encoding="utf-8"))["onnxruntime"]
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    graphs, worst, failed = sorted(folder.glob("*.onnx"), key=lambda path: int(path.stem)), 0.0, 0
    for path in graphs:
        arrays = np.load(path.with_suffix(".npz"))
        session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        names = [port.name for port in session.get_outputs()]
        found = session.run(None, {port.name: arrays[f"in.{port.name}"] for port in session.get_inputs()})
        operators = path.read_bytes()
        limit = ROUNDED if b"MatMulInteger" in operators or b"MatMulNBits" in operators else TOLERANCE
        difference = max(
            float(np.abs(a - arrays[f"out.{n}"]).max() / max(1e-30, np.abs(arrays[f"out.{n}"]).max()))
            for n, a in zip(names, found, strict=True)
        )
        worst, failed = max(worst, difference), failed + (not difference <= limit)
        if not difference <= limit:
            print(f"{path.name}: differs by {difference:.2g}, more than {limit}")
    print(f"{len(graphs)} graphs of onnxruntime {made_by} on {onnxruntime.__version__}: largest difference {worst:.2g}")
    return 1 if failed or not graphs else 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
