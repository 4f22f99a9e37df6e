"""Where the golden data is: all cases beside the repository, or the two that are copied into it."""

import pathlib

import pytest

ALL = pathlib.Path(__file__).resolve().parents[2] / "shared" / "golden"
GOLDEN = ALL if ALL.is_dir() else pathlib.Path(__file__).resolve().parent / "data" / "golden"
requires_golden = pytest.mark.skipif(not GOLDEN.is_dir(), reason=f"the golden data is not at {GOLDEN}")
requires_all_golden = pytest.mark.skipif(not ALL.is_dir(), reason=f"needs a golden case that is only at {ALL}")
