"""Files and folders that are there whole or not at all. (Bundles: test_bundle.py.)"""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from tests.conftest import slow
from trol_edge.bundle.folder import digest_of, new_file, new_folder, taken_back, write_text, writing
from trol_edge.errors import ExportError, UsageError


def test_a_file_takes_its_name_when_it_is_whole(tmp_path: Path) -> None:
    """Until then the old one is there; afterwards nothing else is."""
    path = tmp_path / "a.json"
    path.write_text("old")
    with new_file(path) as part:
        part.write_text("new")
        assert path.read_text() == "old" and tmp_path in part.parents
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


KILLED = """
import os, sys
from pathlib import Path
from trol_edge.bundle.folder import new_file
with new_file(Path(sys.argv[1])) as part:
    part.write_text("ha")
    os._exit(9)
"""


def test_left_overs_of_killed_writers_go(tmp_path: Path) -> None:
    """Those whose lock nobody holds; a file's neighbours and living writers are let alone."""
    path = tmp_path / "a.json"
    assert subprocess.run([sys.executable, "-c", KILLED, str(path)], check=False).returncode == 9
    (left,) = tmp_path.iterdir()
    others = [left.name.replace("a.json", "b.json"), ".a.json.notes.part", left.name + ".txt"]
    for name in others:
        (tmp_path / name).write_text("another file's")
    with new_file(path) as first:
        first.write_text("first")
        with new_file(path) as part:
            part.write_text("new")
        assert first.read_text() == "first"  # under way in this very process
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(["a.json", *others])


def test_a_link_laid_in_the_way_is_not_followed(tmp_path: Path) -> None:
    """Neither under the name of the file nor under any name that a writer of old could have used."""
    victim, path = tmp_path / "victim", tmp_path / "a.json"
    victim.write_text("mine")
    for name in ("a.json", f".a.json.{os.getpid()}.{threading.get_ident()}.part"):
        (tmp_path / name).symlink_to(victim)
    with new_file(path) as part:
        part.write_text("new")
    assert victim.read_text() == "mine" and path.read_text() == "new" and not path.is_symlink()


SWAP = """
import os, sys
from pathlib import Path
from trol_edge.bundle import folder
if sys.argv[2] == "two renames":
    folder._exchanged_at_once = lambda new, final: False
calls, real = [0], {name: getattr(os, name) for name in ("rename", "replace", "unlink", "rmdir", "mkdir", "chmod")}
def counted(name):
    def call(*args, **more):
        calls[0] += 1
        if calls[0] == int(sys.argv[3]):
            os._exit(9)
        return real[name](*args, **more)
    return call
for name in real:
    setattr(os, name, counted(name))
with folder.new_folder(sys.argv[1], overwrite=True, ours=("*",)) as part:
    (part / "one").write_text("new")
    (part / "two").write_text("new")
"""


@pytest.mark.parametrize("how", ["at once", *slow("two renames")])
def test_a_kill_at_any_place_loses_no_folder(tmp_path: Path, how: str) -> None:
    """After a kill before each call that changes a folder: the old one or the new one, whole, and nothing else."""
    place = tmp_path / "place" / "bundle"
    for killed_at in range(1, 40):
        shutil.rmtree(tmp_path / "place", ignore_errors=True)
        place.mkdir(parents=True)
        for name in ("one", "two"):
            (place / name).write_text("old")
        command = [sys.executable, "-c", SWAP, str(place), how, str(killed_at)]
        status = subprocess.run(command, check=False).returncode
        if how == "at once":
            assert place.is_dir()
        taken_back(place)
        found = {path.name: path.read_text() for path in place.iterdir()}
        assert found in ({"one": "old", "two": "old"}, {"one": "new", "two": "new"}), killed_at
        with pytest.raises(ExportError, match="exists"), new_folder(place):
            pass
        with new_folder(place, overwrite=True, ours=("*",)) as part:
            (part / "one").write_text("last")
        assert sorted(p.name for p in (tmp_path / "place").iterdir()) == ["bundle"], killed_at
        if status == 0:
            assert killed_at > 4
            return
    raise AssertionError("it never ended")


def test_a_writer_in_another_process_is_let_alone(tmp_path: Path) -> None:
    """A second export of the same name does not remove the folder of one that runs."""
    code = """
import sys
from trol_edge.bundle.folder import new_folder
with new_folder(sys.argv[1]) as part:
    print(part, flush=True)
    sys.stdin.read()
    (part / "done").write_text("")
"""
    command = [sys.executable, "-c", code, str(tmp_path / "bundle")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdin is not None and other.stdout is not None
        part = Path(other.stdout.readline().strip())
        with pytest.raises(ValueError, match="stop"), new_folder(tmp_path / "bundle"):
            raise ValueError("stop")
        assert part.is_dir()
        other.stdin.close()
        assert other.wait(30) == 0
    assert [p.name for p in (tmp_path / "bundle").iterdir()] == ["done"]
    assert [p.name for p in tmp_path.iterdir()] == ["bundle"]


def test_a_link_to_a_folder_stays_one(tmp_path: Path) -> None:
    """What it leads to is replaced."""
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    with new_folder(tmp_path / "link", overwrite=True, ours=("*",)) as part:
        (part / "one").write_text("new")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "real" / "one").read_text() == "new"


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS])
def test_a_write_that_fails_is_one_sentence(number: int) -> None:
    """With what to do."""
    said = r"^page\.html: .*(disk is full; make room|cannot be written).*choose"
    with pytest.raises(UsageError, match=said), writing("page.html", UsageError):
        raise OSError(number, os.strerror(number))


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
