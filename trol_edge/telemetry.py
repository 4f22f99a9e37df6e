"""Nothing that uses this package reports home: what its libraries send by themselves is switched off, before they load.

ONNX Runtime's Linux wheels (seen in 1.32) ask for the address of a collector a few seconds after the first session,
and keep a device id and a database in ~/.cache. Only this variable, set before the first import, prevents that: neither
`disable_telemetry_events()` nor setting it afterwards does. huggingface_hub tells the hub which libraries it runs with.
"""

from __future__ import annotations

import os
import sys

ONNXRUNTIME = "ORT_DISABLE_TELEMETRY"

# What somebody else in this process imported before this package cannot be undone; `trol-edge doctor` says it.
too_late = "onnxruntime" in sys.modules and os.environ.get(ONNXRUNTIME) != "1"
# In the environment, so that child processes have it, too.
os.environ[ONNXRUNTIME] = os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
