"""Fetching a published checkpoint, from a stand-in of the model hub on this machine."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest

from tests.golden import GOLDEN
from trol_edge.errors import TrolEdgeError

pytestmark = pytest.mark.heavy

ROOT = Path(__file__).resolve().parents[1]
CASE = GOLDEN / "internlm2-text"
REPOSITORY = "BK-Lee/TroL-1.8B"
FIRST, SECOND = "a" * 40, "b" * 40  # commits
WANTED = ("config.json", "model.safetensors", "trol_gating.pt")


class Hub(ThreadingHTTPServer):
    """Serves one repository.

    `head` is its newest commit, `log` what was asked, `cut` a file that breaks off, `down` one not served just now.
    """

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.files = {name: (CASE / name).read_bytes() for name in WANTED}
        self.files |= {"README.md": b"# TroL", "modeling_trol.py": b"raise SystemExit", "figures/a.png": b"png"}
        self.head = FIRST
        self.cut = self.down = ""
        self.log: list[tuple[str, str, str | None]] = []  # method, path, range

    @property
    def address(self) -> str:
        """What HF_ENDPOINT is set to."""
        return f"http://127.0.0.1:{self.server_port}"

    def downloads(self, name: str) -> list[str | None]:
        """Ranges of all downloads of a file."""
        return [span for method, path, span in self.log if method == "GET" and path.endswith(f"/{name}")]


class Handler(BaseHTTPRequestHandler):
    """The few answers of the hub's interface that a download needs."""

    server: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing to the terminal."""

    def do_HEAD(self) -> None:
        """Answer like GET, without the body."""
        self.answer()

    def do_GET(self) -> None:
        """The repository's description, its list of files, or a file."""
        self.answer()

    def answer(self) -> None:
        """Find what was asked for."""
        path, span = self.path.split("?")[0], self.headers.get("Range")
        self.server.log.append((self.command, path, span))
        api = f"/api/models/{REPOSITORY}"
        if path == api or path.startswith(f"{api}/revision/"):
            commit = path.removeprefix(api).removeprefix("/revision/") or self.server.head
            if commit not in (FIRST, SECOND):
                self.send(404, b"{}", {"X-Error-Code": "RevisionNotFound", "X-Error-Message": "no such revision"})
                return
            names = [{"rfilename": name} for name in self.server.files]
            self.send_json({"_id": "0", "id": REPOSITORY, "sha": commit, "siblings": names, "tags": []})
        elif path.startswith(f"{api}/tree/"):
            files = self.server.files.items()
            self.send_json([{"type": "file", "path": n, "size": len(b), "oid": digest(b)} for n, b in files])
        elif path.startswith(f"/{REPOSITORY}/resolve/"):
            commit, name = path.removeprefix(f"/{REPOSITORY}/resolve/").split("/", 1)
            self.send_file(commit, name, span)
        else:
            self.send(404, b"{}", {})

    def send_file(self, commit: str, name: str, span: str | None) -> None:
        """A file or the rest of it; the file named by `cut` ends in the middle, and the connection with it."""
        data = self.server.files[name]
        headers = {"X-Repo-Commit": commit, "ETag": f'"{digest(data)}"', "Accept-Ranges": "bytes"}
        start = int(span.removeprefix("bytes=").split("-")[0]) if span else 0
        if span:
            headers["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
        if name == self.server.down:
            self.send(403, b"", {})
        elif name == self.server.cut and self.command == "GET":
            self.close_connection = True
            self.send(206 if span else 200, data[start:], headers, shown=(len(data) - start) // 2)
        else:
            self.send(206 if span else 200, data[start:], headers)

    def send_json(self, data: Any) -> None:
        """An answer of the interface."""
        self.send(200, json.dumps(data).encode(), {"Content-Type": "application/json"})

    def send(self, status: int, data: bytes, headers: dict[str, str], shown: int | None = None) -> None:
        """Status, headers and body, of which perhaps only the first `shown` bytes."""
        self.send_response(status)
        for name, value in (headers | {"Content-Length": str(len(data))}).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(data[:shown])


def digest(data: bytes) -> str:
    """What the hub calls a small file's ETag."""
    return hashlib.sha1(data).hexdigest()


@pytest.fixture
def hub() -> Iterator[Hub]:
    """A hub that runs as long as the test."""
    with Hub() as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def download(model: str, folder: str, *revision: str) -> None:
    """What runs in the other process."""
    from trol_edge.export.reference import hub

    try:
        print(hub.fetch(model, folder, *revision))
    except TrolEdgeError as error:
        sys.exit(f"{type(error).__name__}: {error}")


def export(*arguments: str) -> None:
    """The same for the command."""
    from trol_edge.cli.main import main

    sys.exit(main(["export", *arguments]))


def process(hub: Hub, home: Path, work: Callable[..., None], *arguments: str) -> subprocess.CompletedProcess[str]:
    """Call a function in a process of its own: the hub's library reads its address when it is imported.

    They are forks of one process that has imported PyTorch and the hub's code, and not that library.
    """
    environment = {"HF_ENDPOINT": hub.address, "HF_HOME": str(home), "HF_HUB_DISABLE_TELEMETRY": "1"}
    environment |= {"HF_HUB_DISABLE_XET": "1", "HF_TOKEN": "", "no_proxy": "127.0.0.1"}
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["trol_edge.export.reference.hub"])
    with tempfile.TemporaryDirectory() as place:
        said = [Path(place) / name for name in ("out", "err")]
        child = context.Process(target=run_child, args=(environment, said, work, arguments))
        child.start()
        child.join(timeout=120)
        assert child.exitcode is not None
        out, err = (path.read_text(encoding="utf-8") for path in said)
    return subprocess.CompletedProcess([], child.exitcode, out, err)


def run_child(
    environment: dict[str, str], said: list[Path], work: Callable[..., None], arguments: tuple[str, ...]
) -> None:
    """In the child: what it prints goes to two files."""
    os.chdir(ROOT)
    os.environ.update(environment)
    for path, number in zip(said, (1, 2), strict=True):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT), number)
    assert "huggingface_hub" not in sys.modules
    work(*arguments)


def fetch(hub: Hub, folder: Path, *revision: str, model: str = "trol-1.8b") -> subprocess.CompletedProcess[str]:
    return process(hub, folder.parent / "home", download, model, str(folder), *revision)


def source(folder: Path) -> dict[str, Any]:
    """What a downloaded folder says about where it came from."""
    data: dict[str, Any] = json.loads((folder / "trol_edge_source.json").read_text(encoding="utf-8"))
    return data


def test_fetch(hub: Hub, tmp_path: Path) -> None:
    """The needed files and no others; the commit is kept; a second call does not ask the network at all."""
    folder = tmp_path / "checkpoints" / "trol-1.8b"
    done = fetch(hub, folder)
    assert (done.returncode, done.stdout) == (0, f"{folder}\n"), done.stderr
    for name in WANTED:
        assert (folder / name).read_bytes() == hub.files[name]
    present = {path.name for path in folder.iterdir() if path.is_file()}
    assert present == {*WANTED, "trol_edge_source.json"}
    assert not hub.downloads("modeling_trol.py")
    assert source(folder) == {"repository": REPOSITORY, "revision": FIRST, "complete": True}

    hub.log.clear()
    hub.head = SECOND
    again = fetch(hub, folder)
    assert (again.returncode, again.stdout) == (0, f"{folder}\n")
    assert hub.log == []
    assert source(folder)["revision"] == FIRST


def test_commit_is_pinned_while_a_download_is_incomplete(hub: Hub, tmp_path: Path) -> None:
    """A commit that appears between two attempts does not slip in; files that are whole are not asked for again."""
    folder = tmp_path / "trol-1.8b"
    hub.down = "model.safetensors"
    failed = fetch(hub, folder)
    assert failed.returncode == 1
    assert failed.stderr.splitlines()[-1].endswith("CHECKPOINT=folder")
    assert "DownloadError: BK-Lee/TroL-1.8B could not be fetched" in failed.stderr
    assert "Run the command again to resume" in failed.stderr
    assert "Traceback" not in failed.stderr
    assert source(folder) == {"repository": REPOSITORY, "revision": FIRST, "complete": False}
    assert not (folder / "model.safetensors").exists()

    hub.down, hub.head = "", SECOND
    hub.log.clear()
    done = fetch(hub, folder)
    assert done.returncode == 0, done.stderr
    assert (folder / "model.safetensors").read_bytes() == hub.files["model.safetensors"]
    assert source(folder) == {"repository": REPOSITORY, "revision": FIRST, "complete": True}
    assert not any(SECOND in path for _, path, _ in hub.log)
    assert hub.downloads("config.json") == hub.downloads("trol_gating.pt") == []
    assert len(hub.downloads("model.safetensors")) == 1


@pytest.mark.skipif(
    tuple(int(n) for n in metadata.version("huggingface_hub").split(".")[:2]) >= (1, 18),
    reason="from 1.18 on huggingface_hub deletes the file in progress when a process ends; pyproject.toml excludes it",
)
def test_a_file_resumes_where_it_broke_off(hub: Hub, tmp_path: Path) -> None:
    """After the process has ended: the bytes that had arrived are not asked for again."""
    folder = tmp_path / "trol-1.8b"
    hub.files["model.safetensors"] *= 12  # the library writes blocks of 10 MB; half of this is more than one
    hub.cut = "model.safetensors"
    assert fetch(hub, folder).returncode == 1
    hub.cut = ""
    hub.log.clear()
    assert fetch(hub, folder).returncode == 0
    (span,) = hub.downloads("model.safetensors")
    assert span is not None
    assert int(span.removeprefix("bytes=").split("-")[0]) > 0
    assert (folder / "model.safetensors").read_bytes() == hub.files["model.safetensors"]


@pytest.mark.slow
def test_another_revision_on_demand(hub: Hub, tmp_path: Path) -> None:
    """--revision asks for it by name, also where another one is complete; an unknown one is an error."""
    folder = tmp_path / "trol-1.8b"
    assert fetch(hub, folder, SECOND).returncode == 0
    assert source(folder)["revision"] == SECOND
    assert fetch(hub, folder).returncode == 0
    assert source(folder)["revision"] == SECOND
    assert fetch(hub, folder, FIRST).returncode == 0
    assert source(folder)["revision"] == FIRST
    failed = fetch(hub, tmp_path / "other", "no-such-revision")
    assert failed.returncode == 1
    assert "DownloadError" in failed.stderr
    assert "Traceback" not in failed.stderr


def test_files_put_there_by_hand(hub: Hub, tmp_path: Path) -> None:
    """A folder of that name is taken as it is, without asking anyone."""
    folder = tmp_path / "trol-1.8b"
    folder.mkdir()
    (folder / "config.json").write_bytes(hub.files["config.json"])
    done = fetch(hub, folder)
    assert (done.returncode, done.stdout) == (0, f"{folder}\n")
    assert hub.log == []


def test_shipped_model_needs_no_hub(hub: Hub, tmp_path: Path) -> None:
    """trol-nano comes with the repository."""
    done = fetch(hub, tmp_path / "unused", model="trol-nano")
    assert done.stdout.strip().endswith("trol-nano")
    assert hub.log == []
    assert not (tmp_path / "unused").exists()


def test_export_fetches_first(hub: Hub, tmp_path: Path) -> None:
    """`trol-edge export trol-1.8b`: a checkpoint that does not hold what its name says is found before any tracing."""
    arguments = ("trol-1.8b", "-o", str(tmp_path / "out"), "--checkpoints", str(tmp_path / "checkpoints"))
    done = process(hub, tmp_path / "home", export, *arguments)
    assert done.returncode == 1
    shape = "wrong shape: vit.vision_tower.vision_model.embeddings.patch_embedding.weight is"  # these are small weights
    assert "problem(s) with the tensors of this internlm2 checkpoint" in done.stderr and shape in done.stderr
    assert source(tmp_path / "checkpoints" / "trol-1.8b")["complete"] is True
    assert not (tmp_path / "out").exists()
