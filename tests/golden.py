"""Where the golden data is: `python -m tests.golden` prints the folder. It is what tests/data/golden holds, unpacked
under build/, or the full data, where TROL_EDGE_GOLDEN names its folder."""

from __future__ import annotations

import os
from pathlib import Path

from tests import kept

PACKED = Path(__file__).resolve().parent / "data" / "golden"
FULL = os.environ.get("TROL_EDGE_GOLDEN")


def unpacked() -> Path:
    """The packed data in the layout of the full one."""

    def make(folder: Path) -> None:
        from tests.pack_golden import unpack  # needs safetensors, which a robot's environment lacks

        unpack(PACKED, folder)

    return kept.folder("golden", kept.digest([PACKED, Path(__file__).with_name("pack_golden.py")]), make)


GOLDEN = Path(FULL) if FULL else unpacked()

if __name__ == "__main__":
    print(GOLDEN)
