"""The server's page in headless Chromium: a camera, files, conversations, live mode, keys; what it looks like."""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.chromium import launched
from tests.conftest import NANO
from tests.serving import PATIENCE_S, Served, serving
from tests.test_profile_page import LOOK, Reader
from trol_edge.runtime import Runtime
from trol_edge.serve.page import SOURCE, read_page
from trol_edge.serve.security import Keys

pytest.importorskip("uvicorn", reason="the server is not installed here")

SCENE = NANO / "scene.png"
KEY = "a-key-of-the-tests-0123456789"


def test_the_page_is_self_contained() -> None:
    """Nothing is fetched but from the server itself; no id stands twice, and every label has its field."""
    text = SOURCE.read_text(encoding="utf-8")
    found = Reader(text)
    assert len(found.ids) == len(set(found.ids))
    assert found.links == ["data:,"] and "@import" not in text and "url(" not in text
    assert set(re.findall(r"<label[^>]* for=\"?(\w+)", text)) <= set(found.ids)
    assert set(re.findall(r"fetch\('([^']+)'", text)) == {
        "/health/ready", "/v1/models", "/metrics", "/v1/chat/completions"
    }  # fmt: skip
    assert not re.findall(r"https?://", text)
    policy = read_page().headers["content-security-policy"]
    assert "default-src 'none'" in policy and "unsafe" not in policy and "connect-src 'self'" in policy


def video(path: Path) -> None:
    """A camera that sees the scene for a second, then its mirror image."""
    rgb = np.asarray(Image.open(SCENE).convert("YCbCr").resize((320, 240)))
    frames = []
    for picture in (rgb, rgb[:, ::-1]):
        y, cb, cr = (picture[:, :, i] for i in range(3))
        frames += [b"FRAME\n" + y.tobytes() + cb[::2, ::2].tobytes() + cr[::2, ::2].tobytes()] * 10
    path.write_bytes(b"YUV4MPEG2 W320 H240 F10:1 Ip A1:1 C420jpeg\n" + b"".join(frames))


@pytest.fixture(scope="module")
def chromium(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """Headless Chromium whose camera is a generated video."""
    camera = tmp_path_factory.mktemp("camera") / "camera.y4m"
    video(camera)
    with launched(
        "--use-fake-ui-for-media-stream",
        "--use-fake-device-for-media-stream",
        f"--use-file-for-fake-video-capture={camera}",
    ) as opened:
        yield opened


@pytest.fixture(scope="module")
def served(nano_bundle: Path) -> Iterator[Served]:
    with serving(lambda reached: Runtime(nano_bundle), name="trol-nano") as found:
        yield found


class Tab:
    """The page in a window, with what went wrong in it."""

    def __init__(self, chromium: Any, served: Served, width: int = 1280, scheme: str = "light") -> None:
        self.problems: list[str] = []
        self.requests: list[str] = []
        self.page = chromium.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
        self.page.set_default_timeout(60_000)
        self.page.on("console", lambda m: self.problems.append(m.text) if m.type in ("error", "warning") else None)
        self.page.on("pageerror", lambda error: self.problems.append(str(error)))
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.goto(served.url)

    def ready(self) -> None:
        self.until("document.getElementById('state').textContent.startsWith('ready')")

    def until(self, condition: str, argument: Any = None) -> None:
        """Wait for a condition. Not Playwright's own wait, because it evaluates a text inside the page."""
        until = time.monotonic() + PATIENCE_S
        while not self.page.evaluate(condition, argument):
            assert time.monotonic() < until, f"{condition}; {self.problems}"
            self.page.wait_for_timeout(30)

    def answered(self, count: int) -> str:
        """The newest of that many answers, once it is there."""
        self.until(
            "n => { const p = document.querySelectorAll('#talk .it:not([aria-busy])'); return p.length >= n && "
            "p[n - 1].textContent != '…' }",
            count,
        )
        return str(self.page.locator("#talk .it").nth(count - 1).text_content())

    def look(self, width: int) -> None:
        """Nothing wider than the window, too small, too faint, or covered."""
        seen = self.page.evaluate(LOOK)
        assert seen["wide"] <= width and seen["out"] == []
        assert seen["small"] == [] and seen["faint"] == [] and seen["cut"] == [] and seen["over"] == []
        assert self.page.evaluate(COVERED) == []


# Buttons and fields that overlap, or that a finger would miss.
COVERED = r"""() => {
  const all = [...document.querySelectorAll('button,label.button,textarea,select,input:not([type=file])')]
    .filter(e => e.getClientRects().length).map(e => [e, e.getBoundingClientRect()]);
  const found = all.filter(([e, r]) => r.height < 36).map(([e]) => 'small ' + e.id);
  all.forEach(([e, a], i) => all.slice(i + 1).forEach(([f, b]) => {
    if (Math.min(a.right, b.right) - Math.max(a.left, b.left) > 1
      && Math.min(a.bottom, b.bottom) - Math.max(a.top, b.top) > 1) found.push(e.id + ' / ' + f.id); }));
  return found;
}"""


@pytest.mark.slow
@pytest.mark.parametrize(("width", "scheme"), [(1280, "light"), (390, "dark"), (390, "light"), (1280, "dark")])
def test_a_conversation(chromium: Any, served: Served, nano: Runtime, tmp_path: Path, width: int, scheme: str) -> None:
    """A picture by file, two questions by keyboard, the model's own answers, and a page that can be read."""
    tab = Tab(chromium, served, width, scheme)
    try:
        tab.ready()
        tab.page.set_input_files("#file", str(SCENE))
        tab.page.wait_for_selector("#picture:not([hidden])")
        with nano.chat() as chat:
            tab.page.fill("#question", "What is left of the red star?")
            tab.page.press("#question", "Enter")
            assert tab.answered(1) == str(chat.ask("What is left of the red star?", SCENE)) == "cyan ring"
        tab.page.fill("#question", "Is there a purple star?")
        tab.page.select_option("#mode", "yes_no")
        tab.page.click("#ask")
        assert tab.answered(2) in ("Yes", "No")
        assert tab.page.locator("#bars dt").all_text_contents() == ["Yes", "No"]
        tab.page.select_option("#mode", "choose")
        tab.page.click("#ask")
        tab.answered(3)
        assert len(tab.page.locator("#bars dt").all_text_contents()) == 3
        tab.until("document.querySelector('#memory polyline')")
        assert "ms" in str(tab.page.get_attribute("#times", "aria-label"))
        tab.look(width)
        tab.page.screenshot(path=str(tmp_path / "page.png"), full_page=True)
        assert tab.problems == []
        assert {
            re.sub(r"(https?://[^/]+).*", r"\1", url) for url in tab.requests if not url.startswith(("data", "blob"))
        } == {served.url}
        last = [line for line in served.requests() if line["path"].endswith("completions")][-1]
        assert last["status"] == 200
        tab.page.click("#forget")
        assert tab.page.locator("#talk p").count() == 0
    finally:
        tab.page.close()


@pytest.mark.slow
def test_live_mode_with_a_camera(chromium: Any, served: Served, tmp_path: Path) -> None:
    """The newest frame is asked about over and over, each change is listed, and it stops when told."""
    tab = Tab(chromium, served)
    try:
        tab.ready()
        tab.page.click("#camera")
        tab.page.wait_for_selector("#video:not([hidden])")
        tab.until("document.getElementById('video').videoWidth == 320")
        tab.page.fill("#question", "What is left of the red star?")
        tab.page.click("#live")
        tab.until("document.querySelectorAll('#events li').length >= 3")
        assert tab.page.get_attribute("#live", "aria-pressed") == "true"
        answers = tab.page.locator("#events li span").all_text_contents()
        assert len(set(answers)) >= 2, answers  # the scene and its mirror image
        tab.look(1280)
        tab.page.screenshot(path=str(tmp_path / "live.png"), full_page=True)
        tab.page.click("#stop")
        tab.until("document.getElementById('live').getAttribute('aria-pressed') == 'false'")
        tab.page.click("#camera")
        assert tab.page.is_hidden("#video") and tab.problems == []
    finally:
        tab.page.close()


@pytest.mark.slow
def test_keyboard_errors_and_other_ways_to_give_a_picture(chromium: Any, served: Served) -> None:
    """Everything is reached by Tab, a dropped or pasted file is taken, and an error is announced."""
    tab = Tab(chromium, served)
    try:
        tab.ready()
        reached = []
        for _ in range(20):
            tab.page.keyboard.press("Tab")
            reached.append(tab.page.evaluate("document.activeElement.id"))
        assert {"file", "camera", "question", "mode", "ask", "live", "forget", "talk"} <= set(reached)
        for kind, data in (("drop", "dataTransfer"), ("paste", "clipboardData")):
            tab.page.click("#remove") if tab.page.is_enabled("#remove") else None
            tab.page.evaluate(
                """async ([kind, data, bytes]) => {
                  const files = new DataTransfer();
                  files.items.add(new File([new Uint8Array(bytes)], 'a.png', {type: 'image/png'}));
                  const event = new Event(kind, {bubbles: true, cancelable: true});
                  Object.defineProperty(event, data, {value: files});
                  document.body.dispatchEvent(event);
                }""",
                [kind, data, list(SCENE.read_bytes())],
            )
            tab.page.wait_for_selector("#picture:not([hidden])")
        tab.page.select_option("#mode", "choose")
        tab.page.fill("#choices", "only one")
        tab.page.click("#ask")
        tab.page.wait_for_selector("#error:not([hidden])")
        assert "two or more" in str(tab.page.text_content("#error"))
        assert tab.page.get_attribute("#error", "role") == "alert"
        assert tab.page.locator("#talk p").count() == 0
        tab.look(1280)
    finally:
        tab.page.close()


@pytest.mark.slow
def test_a_key_is_asked_for(chromium: Any, nano_bundle: Path) -> None:
    """Where the server needs one."""
    with serving(lambda reached: Runtime(nano_bundle), keys=Keys([KEY]), name="trol-nano") as found:
        tab = Tab(chromium, found)
        try:
            tab.page.wait_for_selector("#keyform:not([hidden])")
            tab.page.fill("#key", KEY)
            tab.page.press("#key", "Enter")
            tab.ready()
            assert tab.page.is_hidden("#keyform")
            tab.page.click("#ask")
            assert tab.answered(1)
            assert KEY not in tab.page.content()
        finally:
            tab.page.close()
    assert threading.active_count() < 50
