"""Switches off what libraries send home on their own, before they are loaded.

ONNX Runtime's Linux wheels (seen in 1.32) ask for the address of a collector a few seconds after the first session,
and keep a device id and a database in ~/.cache. Only this variable, set before the first import, prevents that;
`disable_telemetry_events()` or setting it later does not. huggingface_hub sends the hub the names of other libraries.
"""

from __future__ import annotations

import os
import sys

ONNXRUNTIME = "ORT_DISABLE_TELEMETRY"

# An earlier import by other code in this process cannot be undone; `trol-edge doctor` reports it.
too_late = "onnxruntime" in sys.modules and os.environ.get(ONNXRUNTIME) != "1"
# Set in the environment, so that child processes have it, too.
os.environ[ONNXRUNTIME] = os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
