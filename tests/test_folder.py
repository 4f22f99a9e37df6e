"""Files and folders that are there whole or not at all. (Bundles: test_bundle.py.)"""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from trol_edge.bundle.folder import digest_of, new_file, write_text
from trol_edge.errors import UsageError


def test_a_file_takes_its_name_when_it_is_whole(tmp_path: Path) -> None:
    """Until then the old one is there; afterwards nothing else is."""
    path = tmp_path / "a.json"
    path.write_text("old")
    with new_file(path) as part:
        part.write_text("new")
        assert path.read_text() == "old" and part.parent == tmp_path
    assert path.read_text() == "new" and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError, ValueError])
def test_what_fails_leaves_the_old_file(tmp_path: Path, error: type[BaseException]) -> None:
    """Whatever it is."""
    path = tmp_path / "a.json"
    path.write_text("old")
    with pytest.raises(error), new_file(path) as part:
        part.write_text("ne")
        raise error
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


def test_a_file_that_nobody_wrote_is_an_error(tmp_path: Path) -> None:
    """And no empty file takes the name."""
    with pytest.raises(FileNotFoundError), new_file(tmp_path / "a.json"):
        pass
    assert list(tmp_path.iterdir()) == []


def test_left_overs_of_killed_writers_go(tmp_path: Path) -> None:
    """Those of processes that are gone; a file's neighbours and living writers are let alone."""
    code = """
import os, sys
from pathlib import Path
from trol_edge.bundle.folder import new_file
with new_file(Path(sys.argv[1])) as part:
    part.write_text("ha")
    os._exit(9)
"""
    path = tmp_path / "a.json"
    assert subprocess.run([sys.executable, "-c", code, str(path)], check=False).returncode == 9
    (left,) = tmp_path.iterdir()
    others = [left.name.replace("a.json", "b.json"), f".a.json.{os.getpid()}.1.part"]
    for name in others:
        (tmp_path / name).write_text("another file's, and another thread's of this process")
    with new_file(path) as part:
        part.write_text("new")
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(["a.json", *others])


def test_two_writers_do_not_meet(tmp_path: Path) -> None:
    """Threads of one process write beside each other; the last one's file stays, whole."""
    path, both = tmp_path / "a.json", threading.Barrier(2, timeout=30)

    def write(text: str) -> None:
        with new_file(path) as part:
            part.write_text(text)
            both.wait()

    threads = [threading.Thread(target=write, args=(text * 1000,)) for text in "ab"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert path.read_text() in ("a" * 1000, "b" * 1000) and list(tmp_path.iterdir()) == [path]


def test_texts_for_users(tmp_path: Path) -> None:
    """Folders are made; what cannot be written is one sentence."""
    write_text(tmp_path / "new" / "page.html", "é")
    assert (tmp_path / "new" / "page.html").read_text(encoding="utf-8") == "é"
    with pytest.raises(UsageError, match=r"page\.html/x: cannot be written"):
        write_text(tmp_path / "new" / "page.html" / "x", "")


def test_digests_are_of_what_is_said() -> None:
    """The order of keys does not matter; values and letters do."""
    assert digest_of({"a": 1, "b": [2]}) == digest_of({"b": [2], "a": 1})
    assert len({digest_of(x) for x in ({"a": 1}, {"a": "1"}, {"ä": 1}, {"a": 2}, [])}) == 5
