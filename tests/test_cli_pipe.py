"""The command line for other programs: pipes, files, --json, standard input, encodings. Typography is for terminals."""

from __future__ import annotations

import io
import json
import os
import pty
import re
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import trol_edge
from tests.conftest import NANO, slow
from trol_edge.cli.main import VERBS, main
from trol_edge.cli.show import err, out
from trol_edge.runtime import Runtime

ROOT = Path(__file__).resolve().parents[1]
SCENE = NANO / "scene.png"
QUESTION = "What is left of the red star?"
LONG = "a" * 60 + "/:100:/[red]b[/red]/ü/" + "c " * 60


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[int, str, str]]:
    """Run a command line in this process: code, standard output, standard error."""
    monkeypatch.setenv("COLUMNS", "40")  # of the terminal that is not there

    def run(*words: object) -> tuple[int, str, str]:
        capsys.readouterr()
        code = main([str(word) for word in words])
        return code, *capsys.readouterr()

    return run


def shell(command: str, **environment: str) -> tuple[int, bytes, bytes]:
    """Run a line of bash with `trol` in it; the exit code is that of the first command of a pipe."""
    prelude = f'trol() {{ "{sys.executable}" -m trol_edge "$@"; }}; '
    done = subprocess.run(
        ["bash", "-c", f"{prelude}{command}; exit ${{PIPESTATUS[0]}}"],
        cwd=ROOT,
        capture_output=True,
        env=os.environ | environment,
        timeout=300,
    )
    return done.returncode, done.stdout, done.stderr


# -- nothing is wrapped, cut, or read as markup ------------------------------------------------------------------------


def test_an_error_is_one_line_as_it_is(cli: Callable[..., tuple[int, str, str]]) -> None:
    """However long, and with whatever a path may have."""
    code, said, error = cli("inspect", LONG)
    assert (code, said) == (1, "")
    assert error.startswith(f"error: {LONG}: no bundle.json here")
    assert error.count("\n") == 1 and error.endswith("\n")


@pytest.mark.parametrize("words", [["fly"], ["run"], ["run", "x", "--promtp", "y"], ["plan", "a", "--model", "b"]])
def test_bad_usage_is_one_line(cli: Callable[..., tuple[int, str, str]], words: list[str]) -> None:
    """With where to look."""
    code, said, error = cli(*words)
    assert (code, said) == (2, "")
    assert re.fullmatch(r"error: .* See trol-edge --help\.\n", error)


def test_an_error_of_several_lines_is_one(cli: Callable[..., tuple[int, str, str]], monkeypatch: Any) -> None:
    """In a pipe; and what is of the machine is no traceback."""
    from trol_edge.bundle import manifest

    def fails(error: Exception) -> Callable[..., None]:
        def opened(*_: Any) -> None:
            raise error

        return opened

    monkeypatch.setattr(manifest, "Bundle", fails(trol_edge.TrolEdgeError("one\n  two\n\nthree")))
    assert cli("inspect", "x")[2] == "error: one two three\n"
    monkeypatch.setattr(manifest, "Bundle", fails(PermissionError(13, "Permission denied", "x y")))
    assert cli("inspect", "x") == (1, "", "error: [Errno 13] Permission denied: 'x y'\n")


def test_tables_keep_every_column(cli: Callable[..., tuple[int, str, str]], nano_bundle: Path) -> None:
    """Also wide ones; nothing is cut."""
    code, said, _ = cli("targets")
    assert code == 0 and "…" not in said
    head, *rows = [line for line in said.partition("\nno ")[0].splitlines() if line.startswith(" ")]
    columns = ("target", "machine", "library", "precisions", "builds", "runs")
    assert re.split(r"\s{2,}", head.strip()) == list(columns) and len(rows) > 5
    assert all(len(re.split(r"\s{2,}", row.strip())) == len(columns) for row in rows)
    code, said, _ = cli("inspect", nano_bundle)
    assert code == 0 and "…" not in said
    assert "step (" in said and re.search(r"^ *outputs +.*\bx \d+", said, re.MULTILINE)


def test_markup_and_emoji_are_text(capsys: pytest.CaptureFixture[str]) -> None:
    """For whatever is printed."""
    for console in (out, err):
        console.print(LONG)
    assert tuple(capsys.readouterr()) == (f"{LONG}\n",) * 2


def test_a_terminal_has_its_width(monkeypatch: pytest.MonkeyPatch) -> None:
    """There lines are wrapped, as before."""

    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setenv("COLUMNS", "40")
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr("sys.stdout", Terminal())
    assert type(out)().width == 40


# -- JSON --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "code", "kind"),
    [
        (["inspect", LONG], 1, "BundleError"),
        (["run", "x", "-p", "y"], 1, "BundleError"),
        (["verify", "x"], 1, "BundleError"),
        (["soak", "x"], 1, "BundleError"),
        (["profile", "x"], 1, "BundleError"),
        (["build", "x"], 1, "BundleError"),
        (["plan", "x"], 1, "BundleError"),
        (["plan"], 2, "UsageError"),
        (["run", "x"], 2, "UsageError"),
        (["fly"], 2, "UsageError"),
    ],
)
def test_an_error_is_json_too(cli: Callable[..., tuple[int, str, str]], words: list[str], code: int, kind: str) -> None:
    """One object on standard output, and the line on standard error."""
    found, said, error = cli(*words, "--json")
    assert found == code
    assert said.count("\n") == 1
    data = json.loads(said)
    assert list(data) == ["error"] and data["error"]["type"] == kind
    assert error == f"error: {data['error']['message']}\n"


def test_json_of_an_interrupt(cli: Callable[..., tuple[int, str, str]], monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C."""
    from trol_edge.bundle import manifest

    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(manifest, "Bundle", interrupted)
    code, said, _ = cli("inspect", "x", "--json")
    assert code == 130 and json.loads(said)["error"]["type"] == "KeyboardInterrupt"


# -- numbers -----------------------------------------------------------------------------------------------------------

FLOATS = [
    ("run", "--temperature"), ("run", "--top-p"), ("run", "--min-p"), ("run", "--repetition-penalty"),
    ("soak", "--minutes"), ("export", "--max-loss"), ("mix", "--max-loss"), ("outliers", "--factor"),
    ("profile", "--interval-ms"), ("build", "--memory"), ("build", "--workspace"),
    ("plan", "--goal-ms"), ("plan", "--goal-tokens-per-second"), ("plan", "--reserve"),
    ("chat", "--temperature"), ("serve", "--grace-s"),
]  # fmt: skip


@pytest.mark.parametrize("value", ["nan", "inf"])
@pytest.mark.parametrize(("verb", "option"), FLOATS)
def test_numbers_are_finite(cli: Callable[..., tuple[int, str, str]], verb: str, option: str, value: str) -> None:
    """NaN and infinity are refused before anything is done."""
    needed = {"run": ["-p", "x"], "export": ["-o", "x"], "mix": ["-o", "x"], "outliers": ["-o", "x"]}
    place = [] if verb == "plan" else ["x"]
    code, said, error = cli(verb, *place, *needed.get(verb, []), option, value)
    assert (code, said) == (2, "")
    assert f"{option} {value} is not a number" in error


def test_every_number_is_in_that_list() -> None:
    """A new option of a verb is tried, too."""
    found = []
    for verb, _ in VERBS:
        for name, kind in verb.__annotations__.items():
            if kind.startswith("Annotated[float"):
                found.append((verb.__name__, f"--{name.replace('_', '-')}"))
    assert sorted(found) == sorted(FLOATS)


# -- what people expect ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("every", [7, *slow(1)])
def test_version_and_short_help(cli: Callable[..., tuple[int, str, str]], every: int) -> None:
    """As options, too; of every verb, or every seventh."""
    assert cli("--version") == cli("version") == (0, f"{trol_edge.__version__}\n", "")
    assert cli("-h") == cli("--help") == cli()
    assert cli("-h")[0] == 0 and "Usage" in cli("-h")[1]
    for verb, _ in VERBS[::every]:
        assert cli(verb.__name__, "-h") == cli(verb.__name__, "--help")


@pytest.mark.parametrize("words", [["exprot"], ["inspekt"], ["run", "x", "--promtp", "y"], ["run", "x", "--pro", "y"]])
def test_did_you_mean_comes_once(cli: Callable[..., tuple[int, str, str]], words: list[str]) -> None:
    """Whichever of two libraries has an idea."""
    error = cli(*words)[2].lower()
    assert error.count("did you mean") == 1


@pytest.fixture
def given(monkeypatch: pytest.MonkeyPatch) -> Callable[[bytes], None]:
    """Lay bytes on standard input."""
    return lambda data: monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(data)))


@pytest.mark.parametrize("name", ["-", "/dev/stdin"])
def test_standard_input(
    cli: Callable[..., tuple[int, str, str]],
    given: Callable[[bytes], None],
    nano: Runtime,
    nano_bundle: Path,
    name: str,
) -> None:
    """A question, with the line end that echo adds and the mark that an editor adds; or a picture."""
    right = f"{nano.generate(QUESTION, SCENE)}\n"
    for ends in ("", "\n", "\r\n"):
        given(b"\xef\xbb\xbf" + f"{QUESTION}{ends}".encode())
        assert cli("run", nano_bundle, "-p", name, "-i", SCENE)[:2] == (0, right)
    given(SCENE.read_bytes())
    assert cli("run", nano_bundle, "-p", QUESTION, "-i", name)[:2] == (0, right)
    given(b"")
    assert "has no text" in cli("run", nano_bundle, "-p", name)[2]
    given(b"\xff\xfe")
    assert "is not UTF-8" in cli("run", nano_bundle, "-p", name)[2]
    given(b"no picture")
    assert "picture of 10 bytes is not a picture" in cli("run", nano_bundle, "-p", "x", "-i", name)[2]
    for twice in (["-p", name, "-i", name], ["-p", "x", "-i", name, "-i", name]):
        assert "give - once" in cli("run", nano_bundle, *twice)[2]


@pytest.mark.slow
def test_standard_input_of_a_shell(nano: Runtime, nano_bundle: Path) -> None:
    """Redirected, piped, and a pipe that the shell makes."""
    right = f"{nano.generate(QUESTION, SCENE)}\n".encode()
    ask = f"trol run {nano_bundle} --threads 1 -p '{QUESTION}' -i"  # a second thread doubles the processor time
    for command in (f"{ask} - < {SCENE}", f"{ask} /dev/stdin < {SCENE}", f"{ask} <(cat {SCENE})"):
        assert shell(command)[:2] == (0, right)
    assert shell(f"cat {SCENE} | {ask} /dev/stdin")[1] == right


# -- readers that go, and encodings ------------------------------------------------------------------------------------


@pytest.mark.parametrize("words", ["inspect {}", "inspect {} --json", "run {} -p x --threads 1", "--help"])
def test_a_reader_that_has_gone(nano_bundle: Path, words: str) -> None:
    """Exit code 0, and not a word, by whichever way it was printed."""
    read, write = os.pipe()
    os.close(read)
    command = [sys.executable, "-m", "trol_edge", *words.format(nano_bundle).split()]
    done = subprocess.run(command, cwd=ROOT, stdout=write, stderr=subprocess.PIPE, check=False, timeout=300)
    os.close(write)
    assert done.returncode == 0
    assert b"Broken" not in done.stderr and b"Traceback" not in done.stderr and b"Exception" not in done.stderr


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="/dev/full is Linux's")
def test_a_full_disk() -> None:
    """One line and exit code 1."""
    code, _, error = shell("trol targets > /dev/full")
    assert code == 1
    assert re.fullmatch(rb"error: .*No space left.*\n", error)


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp1252", "utf-8"])
def test_output_of_another_encoding(monkeypatch: pytest.MonkeyPatch, encoding: str) -> None:
    """What it lacks is escaped, in a way that JSON reads."""
    streams = [io.TextIOWrapper(io.BytesIO(), encoding) for _ in range(2)]
    monkeypatch.setattr("sys.stdout", streams[0])
    monkeypatch.setattr("sys.stderr", streams[1])
    folder = "ü-☃-é"
    assert main(["inspect", folder, "--json"]) == 1
    streams[1].flush()
    said, error = (stream.buffer.getvalue().decode(encoding) for stream in streams)  # type: ignore[attr-defined]
    assert json.loads(said)["error"]["message"].startswith(f"{folder}: no bundle.json")
    assert error.startswith("error: " + folder.encode(encoding, "backslashreplace").decode(encoding))


def test_a_process_of_another_encoding(tmp_path: Path) -> None:
    """And a file's name that is no text, which Linux allows."""
    code, said, error = shell(f"trol inspect {tmp_path}/ü$'\\xff' --json", PYTHONIOENCODING="ascii")
    assert code == 1 and b"Traceback" not in error
    assert json.loads(said)["error"]["message"].startswith(f"{tmp_path}/ü\udcff: no bundle.json")


def test_a_warning_is_one_line(nano_bundle: Path) -> None:
    """Without a line of our source."""
    code, _, error = shell(f"trol run {nano_bundle} -p x --max-new-tokens 1 --threads {3 * (os.cpu_count() or 1)}")
    assert code == 0
    first = error.decode().splitlines()[0]
    assert re.fullmatch(r"warning: threads=\d+, but .*cores", first)


def test_on_a_terminal(nano_bundle: Path) -> None:
    """A real one, of 60 columns: lines are wrapped at words."""
    master, slave = pty.openpty()
    command = [sys.executable, "-m", "trol_edge", "inspect", str(nano_bundle)]
    environment = os.environ | {"COLUMNS": "60", "TERM": "xterm"}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        running = subprocess.Popen(command, cwd=ROOT, stdout=slave, stderr=slave, env=environment)
    os.close(slave)
    said = b""
    while True:
        try:
            part = os.read(master, 1 << 16)
        except OSError:  # Linux's end of a terminal
            break
        if not part:
            break
        said += part
    os.close(master)
    assert running.wait(120) == 0
    plain = re.sub(r"\x1b\[[0-9;]*m", "", said.decode())
    assert max(map(len, plain.splitlines())) <= 60
