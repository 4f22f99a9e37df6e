"""The page of a profile: whole, self-contained, and in a browser without errors at every width and in both colours."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.chromium import launched
from tests.machines import TIME, Tree, made, tree
from trol_edge.measure.compare import compare
from trol_edge.measure.page import page
from trol_edge.measure.record import Profile
from trol_edge.svg import log_ticks, number, ticks

__all__ = ["tree"]  # a fixture

FIGURES = ("comparison", "timeline", "distribution", "time-0", "roofline", "starts")
WIDTHS = (1280, 390)


def on_a_jetson(tree: Tree) -> Profile:
    """Three precisions on an Orin Nano whose clock sagged once."""
    rng = np.random.default_rng(1)
    columns: dict[str, Any] = {
        "power_w/VDD_IN": 6 + 12 * ((TIME > 1.8) & (TIME < 12)) + rng.standard_normal(len(TIME)) * 0.4,
        "temperature_c/tj": np.linspace(49, 63, len(TIME)),
        "gpu_hz": np.where((TIME > 6) & (TIME < 6.6), 6.12e8, 1.02e9),
        "largest_free_block_bytes": 4 << 20,
    }
    names = ("trol-nano-fp32", "trol-nano-int8", "trol-nano-int4")
    return made(root=tree("orin-nano"), columns=columns, target="jetson-jp6", names=names)


def pages(tree: Tree) -> dict[str, str]:
    """Pages of every kind: a Jetson, a CPU without any sensor, one against a baseline, one with hostile names."""
    jetson = on_a_jetson(tree)
    cpu = made()
    run = dataclasses.replace(cpu.bundles[0].runs[0], work=None)
    bare = dataclasses.replace(cpu, peaks=None, bundles=(dataclasses.replace(cpu.bundles[0], runs=(run,), starts=()),))
    slower = made(step_ms=13.0, names=("trol-nano-fp32", "trol-nano-int8"))
    hostile = dataclasses.replace(cpu.bundles[0].bundle, model='<script>alert("x")</script>', folder='a"><img src=x>')
    named = dataclasses.replace(cpu, bundles=(dataclasses.replace(cpu.bundles[0], bundle=hostile),))
    return {
        "jetson": page(jetson),
        "bare": page(bare),
        "baseline": page(slower, cpu, compare(cpu, slower)),
        "hostile": page(named),
    }


class Reader(HTMLParser):
    """Tags, and what their attributes point to."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.ids: list[str] = []
        self.links: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Remember it."""
        self.tags.append(tag)
        for name, value in attrs:
            if name == "id":
                self.ids.append(value or "")
            if name in ("src", "href", "srcset", "data", "action", "poster") or (value and "url(" in value):
                self.links.append(value or "")


@pytest.mark.parametrize("kind", ["jetson", "bare", "baseline", "hostile"])
def test_pages_are_self_contained(tree: Tree, kind: str) -> None:
    """Every figure once, nothing fetched, no script, no number that is none, user text escaped."""
    text = pages(tree)[kind]
    found = Reader(text)
    assert [name for name in FIGURES if name not in found.ids] == []
    assert len(found.ids) == len(set(found.ids))
    assert found.links == ["data:,"] and "@import" not in text and "url(" not in text
    assert "script" not in found.tags and "img" not in found.tags
    assert not re.search(
        r"\b(nan|inf|None|Infinity)\b", re.sub(r"aria-label|fill:none|stroke-dasharray:none", "", text)
    )
    assert found.tags.count("figure") == len(FIGURES) + 2 * (kind == "jetson") + 2 * (kind == "baseline")
    assert text.count("<svg class=wide") == text.count("<svg class=narrow") > 3


def test_what_the_pages_say(tree: Tree) -> None:
    """Verdicts with their reasons, energy, what is missing in the place of a figure, the change against a baseline."""
    found = pages(tree)
    assert "3 of 3 runs invalid" in found["jetson"] and "GPU clock sagged to 612 of 1020 MHz" in found["jetson"]
    assert "mJ per token" in found["jetson"] and "MAXN_SUPER" in found["jetson"] and "VDD_CPU_GPU_CV" in found["jetson"]
    assert "all runs valid" in found["bare"] and "partial data" in found["bare"]
    for why in ("No roofline: ", "Not measured (--starts 0)", "no power sensor here"):
        assert why in found["bare"], why
    assert "Against the baseline" in found["baseline"] and "+30 %" in found["baseline"]
    assert re.search(r"\d+ figures slower than the baseline", found["baseline"])


def test_numbers_and_ticks() -> None:
    """Three digits that one can read; round ticks from nought to the end."""
    assert [number(v) for v in (0, 0.00471, 0.183, 1.234, 12.34, 131.4, 20345)] == [
        "0", "0.00471", "0.183", "1.23", "12.3", "131", "20345"
    ]  # fmt: skip
    assert ticks(193, 10) == [0, 20, 40, 60, 80, 100, 120, 140, 160, 180]
    assert ticks(0.9, 3) == pytest.approx([0, 0.5]) and ticks(0, 3) == [0]
    assert log_ticks(0.15, 30, 12) == pytest.approx([0.2, 0.5, 1, 2, 5, 10, 20])
    assert log_ticks(0.15, 30, 3) == [1, 10]
    assert log_ticks(9.1, 10.9, 6) == pytest.approx([9.5, 10, 10.5])  # no power of ten would do


# -- in a browser ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with launched() as opened:
        yield opened


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["jetson", "bare", "baseline"])
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_in_chromium(browser: Any, tree: Tree, tmp_path: Path, kind: str, width: int, scheme: str) -> None:
    """No error, no request, nothing wider than the window, every figure drawn, text that can be read."""
    path = tmp_path / "profile.html"
    path.write_text(pages(tree)[kind], encoding="utf-8")
    tab = browser.new_page(viewport={"width": width, "height": 800}, color_scheme=scheme)
    problems: list[str] = []
    requests: list[str] = []
    tab.on("console", lambda message: problems.append(message.text))
    tab.on("pageerror", lambda error: problems.append(str(error)))
    tab.on("request", lambda request: requests.append(request.url))
    try:
        tab.goto(path.as_uri())
        assert problems == [] and requests in ([path.as_uri()], [path.as_uri(), "data:,"])
        seen = tab.evaluate(LOOK)
        assert seen["wide"] <= width, f"{seen['wide']} pixels wide: {seen['out']}"
        assert seen["out"] == []
        assert set(FIGURES) <= {name for name, filled in seen["figures"].items() if filled}
        assert seen["small"] == [], "text below 10 pixels"
        assert seen["faint"] == [], "contrast below 4.5 to 1"
        assert (sum(map(int, re.findall(r"\d+", seen["paper"])[:3])) > 600) == (scheme == "light")
        assert seen["cut"] == []
        assert seen["over"] == [], "one text covers another"
    finally:
        tab.close()


# What is to be seen on the page: widths, figures with something drawn in them, text that is too small, too faint
# against what is under it, or that leaves its drawing.
LOOK = r"""() => {
  const shown = e => e.getClientRects().length && getComputedStyle(e).visibility !== 'hidden';
  const wide = document.documentElement.scrollWidth, at = e => e.tagName + ' ' + e.textContent.trim().slice(0, 40);
  const out = [...document.querySelectorAll('main *')].filter(e => shown(e) && !e.closest('svg')
    && e.getBoundingClientRect().right > innerWidth + 0.5).map(at);
  const figures = {};
  for (const f of document.querySelectorAll('figure')) figures[f.id] = [...f.querySelectorAll('svg,table,.empty')]
    .some(e => shown(e) && e.getBoundingClientRect().height > 20
      && (e.tagName != 'svg' || e.querySelector('rect,path')));
  const rgb = c => c.match(/[\d.]+/g).slice(0, 3).map(v => v / 255)
    .map(v => v <= .04045 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4);
  const light = c => { const [r, g, b] = rgb(c); return .2126 * r + .7152 * g + .0722 * b; };
  const under = e => { for (; e; e = e.parentElement) { const c = getComputedStyle(e).backgroundColor;
    if (!/, 0\)$|transparent/.test(c)) return c; } return 'rgb(255,255,255)'; };
  const small = [], faint = [], cut = [];
  for (const e of document.querySelectorAll('main *')) {
    const own = [...e.childNodes].some(n => n.nodeType == 3 && n.textContent.trim());
    if (!own || !shown(e) || e.tagName == 'title') continue;
    const style = getComputedStyle(e), svg = e.closest('svg');
    const scale = svg ? svg.getBoundingClientRect().width / svg.viewBox.baseVal.width : 1;
    if (parseFloat(style.fontSize) * scale < 10) small.push(at(e));
    const a = light(svg ? style.fill : style.color), b = light(under(svg ? svg.parentElement : e));
    if ((Math.max(a, b) + .05) / (Math.min(a, b) + .05) < 4.5) faint.push(at(e) + ' ' + style.color + ' ' + style.fill);
    if (svg) { const t = e.getBoundingClientRect(), s = svg.parentElement.getBoundingClientRect();
      if (t.left < s.left - 1 || t.right > s.right + 1) cut.push(at(e)); }
  }
  const over = [];
  for (const svg of [...document.querySelectorAll('svg')].filter(shown)) {
    const texts = [...svg.querySelectorAll('text')].map(e => [e, e.getBoundingClientRect()]);
    texts.forEach(([e, a], i) => texts.slice(i + 1).forEach(([f, b]) => {
      if (Math.min(a.right, b.right) - Math.max(a.left, b.left) > 1 && Math.min(a.bottom, b.bottom)
        - Math.max(a.top, b.top) > 4) over.push(at(e) + ' / ' + at(f)); }));
  }
  return {wide, out, figures, small, faint, cut, over, paper: getComputedStyle(document.body).backgroundColor};
}"""
