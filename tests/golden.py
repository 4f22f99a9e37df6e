"""Where the golden data is, and the marker that skips tests that need it."""

import pathlib

import pytest

GOLDEN = pathlib.Path(__file__).resolve().parents[2] / "shared" / "golden"
requires_golden = pytest.mark.skipif(not GOLDEN.is_dir(), reason=f"the golden data is not at {GOLDEN}")
