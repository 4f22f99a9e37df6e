"""The planted faults can still be planted: `make faults` shows that each is seen."""

from __future__ import annotations

import pytest

from tests.faults.catalogue import FAULTS, ROOT, Fault


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.what)
def test_every_fault_has_its_place(fault: Fault) -> None:
    """Its text stands in its file once, and the tests that are to see it are there."""
    assert (ROOT / fault.file).read_text(encoding="utf-8").count(fault.old) == 1
    assert fault.new != fault.old and fault.suite in ("test", "test-all") and fault.tests
    for name in fault.tests:
        path, _, function = name.partition("::")
        assert not function or f"def {function}(" in (ROOT / path).read_text(encoding="utf-8"), name


def test_faults_are_in_every_room() -> None:
    """No room is left to hope."""
    assert len({(fault.file, fault.old, fault.new) for fault in FAULTS}) == len(FAULTS) >= 40
    for room, least in (("trol_edge", 25), ("export", 10), ("calibration", 5), ("runtimes", 5)):
        assert sum(fault.file.startswith(f"{room}/") for fault in FAULTS) >= least, room
