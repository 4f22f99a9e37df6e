"""Draws shapes, texts, axes and ticks in SVG, for figures of a page and for separate files."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from html import escape

WIDE, NARROW = 1040, 358  # widths of a drawing, in CSS pixels
CHARACTER = 7.6  # approximate width of a character in a drawing


def number(value: float) -> str:
    """Format a number with three significant digits and no exponent: 0.183, 12.4, 1310."""
    rounded = float(f"{value:.3g}")
    if not rounded or abs(value) >= 1000:
        return f"{value:.0f}"
    text = f"{rounded:.{max(0, 2 - math.floor(math.log10(abs(rounded))))}f}"
    return text.rstrip("0").rstrip(".") if abs(rounded) < 0.1 else text


def milliseconds(value: float) -> tuple[str, str]:
    """Format a time; returns it with its unit, which is ms, or s from ten seconds on."""
    return (number(value / 1e3), "s") if value >= 1e4 else (number(value), "ms")


Draw = Callable[[int], tuple[float, str]]  # width -> height, body


def svg(draw: Draw, said: str) -> str:
    """Draw at both widths. said: a description for people who do not see the drawing."""
    shown = ""
    for kind, width in (("wide", WIDE), ("narrow", NARROW)):
        height, body = draw(width)
        view = f"0 0 {width} {height:.0f}"
        shown += f'<svg class={kind} viewBox="{view}" role=img aria-label="{escape(said)}">{body}</svg>'
    return shown


def document(width: float, height: float, body: str) -> str:
    """Make a complete SVG file."""
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:.0f} {height:.0f}" font-family="sans-serif" '
        f'font-size="10"><rect width="100%" height="100%" fill="white"/>{body}</svg>\n'
    )


def figure(name: str, title: str, caption: str, inside: str) -> str:
    """Put a drawing on a page, under its title and caption."""
    return f'<figure id="{name}"><h2>{escape(title)}</h2><figcaption>{escape(caption)}</figcaption>{inside}</figure>'


def empty(why: str) -> str:
    """Say in the place of a drawing why there is none."""
    return f"<p class=empty>{escape(why)}</p>"


def legend(entries: Iterable[tuple[str, str]]) -> str:
    """Explain each colour; entries are (colour, words)."""
    spans = (f'<span><i class=dot style="background:{c}"></i>{escape(t)}</span>' for c, t in entries)
    return f"<div class=key>{''.join(spans)}</div>"


def text_at(x: float, y: float, text: str, anchor: str = "start", strong: bool = False, more: str = "") -> str:
    """Draw a line of text. more: further attributes."""
    kind = " class=strong" if strong else ""
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"{kind}{more}>{escape(text)}</text>'


def circle(x: float, y: float, radius: float, fill: str) -> str:
    """Draw a dot."""
    return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{radius:g}" style="fill:{fill}"/>'


def label_at(width: float, y: float, label: str, value: str, strong: bool) -> tuple[float, str]:
    """Draw a label above a bar, and its value at the right or, if both are too long for one line, in a second line."""
    if (len(label) + len(value)) * CHARACTER > width:
        return y + 34, text_at(0, y + 12, label, strong=strong) + text_at(0, y + 28, value, strong=strong)
    return y + 18, text_at(0, y + 12, label, strong=strong) + text_at(width, y + 12, value, "end", strong)


def rect(x: float, y: float, w: float, h: float, fill: str, tip: str = "", radius: float = 0, more: str = "") -> str:
    """Draw a bar, never too thin to be seen. tip: text to show under the pointer."""
    tip = f"<title>{escape(tip)}</title>" if tip else ""
    return (
        f'<rect x="{x:.2f}" y="{y:.2f}" width="{max(w, 0.4):.2f}" height="{max(h, 0):.2f}" rx="{radius:g}" '
        f'style="fill:{fill}"{more}>{tip}</rect>'
    )


def line(x1: float, y1: float, x2: float, y2: float, stroke: str, more: str = "") -> str:
    """Draw a straight line. more: further style."""
    return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" style="stroke:{stroke};{more}"/>'


def path(points: Iterable[tuple[float, float]], stroke: str, more: str = "") -> str:
    """Draw a line through points. more: further style."""
    d = "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in points)
    return f'<path d="{d}" style="fill:none;stroke:{stroke};stroke-linejoin:round;{more}"/>'


def ticks(most: float, count: int) -> list[float]:
    """About `count` round numbers from 0 up to `most`."""
    rough = most / max(count, 1) or 1.0
    power_of_ten = 10 ** math.floor(math.log10(rough))
    step = next(m * power_of_ten for m in (1, 2, 2.5, 5, 10) if m * power_of_ten >= rough)
    return [i * step for i in range(int(most / step + 1e-9) + 1)]


def log_ticks(low: float, high: float, most: int) -> list[float]:
    """Round numbers between two others for a logarithmic scale, if possible no more than `most`."""
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for marks in ((1, 1.5, 2, 3, 4, 5, 6, 8), (1, 2, 5), (1, 3), (1,)):
        found = [m * 10.0**d for d in decades for m in marks if low <= m * 10.0**d <= high]
        if len(found) <= most:
            break
    if len(found) < 3 and high < 4 * low:  # no power of ten is near
        step = ticks(high - low, 4)[1]
        found = [i * step for i in range(math.ceil(low / step), math.floor(high / step) + 1)]
    return found


def x_axis(width: float, top: float, bottom: float, at: Callable[[float], float], ticks: list[float], unit: str) -> str:
    """Draw grid lines of a horizontal axis, each with its number, and the last one with the unit."""
    body = ""
    for i, tick in enumerate(ticks):
        x = at(tick)
        anchor = "end" if x > width - 24 else "start" if x < 12 else "middle"
        label = f"{tick:g}" + (f" {unit}" if i == len(ticks) - 1 else "")
        body += line(x, top, x, bottom, "var(--grid)") + text_at(x, bottom + 17, label, anchor)
    return body
