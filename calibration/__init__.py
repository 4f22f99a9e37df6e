"""Measures ranges and accuracy offline, on pictures and questions with known answers."""

if __name__ != "trol_edge.calibration":
    raise ImportError(
        "import this folder as trol_edge.calibration; a second copy under another name would not share its classes"
    )
