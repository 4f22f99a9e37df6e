"""The figures of a profile's page, as SVG.

Each is drawn twice, for a wide and for a narrow screen, because text would shrink with a scaled picture; CSS shows the
drawing that fits. Colours are CSS variables (page.py), so a bundle and a stage have the same colour in every figure.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Sequence
from html import escape

import numpy as np

from trol_edge.measure.record import BundleProfile, Profile, Run, TimedAnswer, Values, case_name, percentiles, pooled
from trol_edge.measure.samples import Energy, Verdict, column, power
from trol_edge.svg import (
    WIDE,
    Draw,
    empty,
    figure,
    label_at,
    legend,
    line,
    log_ticks,
    milliseconds,
    number,
    path,
    rect,
    svg,
    text_at,
    ticks,
    x_axis,
)

POINTS = 400  # most points of a line over time
BINS = 56
HUES = 6  # number of bundle colours, from --h0


@dataclasses.dataclass(frozen=True)
class Row:
    """A run with everything that the page says about it."""

    profile: Profile
    measured: BundleProfile
    run: Run
    hue: str  # its bundle's colour
    name: str
    old: bool
    verdict: Verdict
    energy: Energy | None


def per_bundle(rows: Sequence[Row]) -> list[Row]:
    """The first row of each bundle."""
    return list({id(row.measured): row for row in reversed(rows)}.values())[::-1]


def title_of(row: Row) -> str:
    return f"{row.name} · {case_name(row.run.case)}"


# -- numbers and words -------------------------------------------------------------------------------------------------


def median(values: Values | None) -> float | None:
    return None if values is None or not len(values) else float(np.median(values))


# -- timeline ----------------------------------------------------------------------------------------------------------


def _typical(answers: Sequence[TimedAnswer]) -> TimedAnswer:
    """The answer with the median total time: one that happened, not a mixture of medians."""
    return sorted(answers, key=lambda a: a.total_ms)[len(answers) // 2]


def _segments(answer: TimedAnswer) -> list[tuple[str, float, str]]:
    """(what, milliseconds, colour) of each part of an answer, in order, with every step on its own."""
    found = [
        ("preprocess", answer.preprocess_ms, "var(--pre)"),
        ("vision + projector", answer.vision_ms, "var(--vis)"),
        ("prefill", answer.prefill_ms, "var(--fill)"),
    ]
    rest = answer.first_token_ms - answer.preprocess_ms - answer.vision_ms - answer.prefill_ms
    found.append(("first token chosen, its text", max(rest, 0.0), "var(--dec)"))
    texts = answer.detokenise_ms or (0.0,) * len(answer.sample_ms)
    for i, step in enumerate(answer.step_ms):
        found.append((f"token {i + 2}", step + answer.sample_ms[i + 1] + texts[i + 1], "var(--dec)"))
    return found


def timeline(rows: Sequence[Row]) -> str:
    lanes = []
    for row in rows:
        lanes.append((f"{title_of(row)}", _typical(row.run.answers)))
        lanes.append(("second question about the frame", _typical(row.run.second)))
    most = max(answer.total_ms for _, answer in lanes) or 1.0

    def draw(width: int) -> tuple[float, str]:
        def at(value: float) -> float:
            return (width - 1) * value / most

        y, bars = 0.0, ""
        for i, (label, answer) in enumerate(lanes):
            first = i % 2 == 0
            y += (16 if i else 0) if first else 4
            total = " ".join(milliseconds(answer.total_ms))
            y, text = label_at(width, y, label, total, first)
            bars += text
            tall, start = (22 if first else 12), 0.0
            for what, ms, colour in _segments(answer):
                w = at(ms)
                gap = 0.8 if what.startswith("token") and w > 3 else 0.0
                bars += rect(at(start), y, w - gap, tall, colour, f"{what}: {number(ms)} ms", 1)
                start += ms
            y += tall
        return y + 26, x_axis(width, 0, y + 6, at, ticks(most, 10 if width == WIDE else 4), "ms") + bars

    key = legend([("var(--pre)", "preprocess"), ("var(--vis)", "vision + projector"), ("var(--fill)", "prefill"),
                ("var(--dec)", "decode, token by token")])  # fmt: skip
    said = "; ".join(f"{label}: {' '.join(milliseconds(a.total_ms))}" for label, a in lanes)
    caption = (
        "The answer with the median time of each run, from the question to the last token. Below it is a second "
        "question about the same frame: neither its picture nor the common beginning of the prompt is computed again. "
        "The projector is a part of the vision graph and has no time of its own."
    )
    return figure("timeline", "Where the time goes", caption, key + svg(draw, said))


# -- distribution ------------------------------------------------------------------------------------------------------


def distribution(rows: Sequence[Row]) -> str:
    values = [(row, pooled(row.run).get("step_ms", np.zeros(0))) for row in rows]
    values = [(row, v) for row, v in values if len(v)]
    low = min(float(v.min()) for _, v in values) * 0.9
    high = max(float(v.max()) for _, v in values) * 1.1
    edges = np.geomspace(low, high, BINS + 1)

    def draw(width: int) -> tuple[float, str]:
        def at(value: float) -> float:
            return width * math.log(value / low) / math.log(high / low)

        y, bars, tall = 0.0, "", 58
        for i, (row, steps) in enumerate(values):
            y += 14 if i else 0
            p50, p90, p99 = percentiles(steps)
            said = f"p50 {number(p50)} · p90 {number(p90)} · p99 {number(p99)} ms"
            y, text = label_at(width, y, title_of(row), said, True)
            bars, y = bars + text, y + 2
            counts = np.histogram(steps, edges)[0]
            for j, count in enumerate(counts):
                if count:
                    x, h = at(edges[j]), max(tall * math.sqrt(count / counts.max()), 2)
                    tip = f"{number(edges[j])} to {number(edges[j + 1])} ms: {count} of {len(steps)} steps"
                    bars += rect(x, y + tall - h, at(edges[j + 1]) - x - 1, h, row.hue, tip, 1.5)
            for p, dash in ((p50, ""), (p90, "5 3"), (p99, "1.5 3")):
                x = at(p)
                bars += line(x, y - 2, x, y + tall, "var(--ink)", f"stroke-width:1.5;stroke-dasharray:{dash or 'none'}")
            bars += line(0, y + tall, width, y + tall, "var(--line)")
            y += tall
        return y + 26, x_axis(width, 0, y + 6, at, log_ticks(low, high, 12 if width == WIDE else 6), "ms") + bars

    medians = ((title_of(row), number(float(np.median(v))), len(v)) for row, v in values)
    said = "; ".join(f"{title}: median {ms} ms of {count} steps" for title, ms, count in medians)
    caption = (
        "How long each step of the decoder took, all answers together, on a logarithmic scale. A bar's height is the "
        "root of its count, so that rare slow steps stay visible. Lines: p50 solid, p90 dashed, p99 dotted."
    )
    return figure("distribution", "Decode latency", caption, svg(draw, said))


# -- over time ---------------------------------------------------------------------------------------------------------

Series = tuple[str, Values, Values, str]  # name, seconds, values, colour


def _series(row: Row, names: Sequence[tuple[str, str]], scale: float) -> list[Series]:
    times, found = column(row.measured, "t_s"), list[Series]()
    for name, title in names:
        values = column(row.measured, name) * scale
        good = np.isfinite(values)
        if good.any():
            found.append((title, times[good], values[good], f"var(--h{len(found) % HUES})"))
    return found


def _thin(times: Values, values: Values) -> Iterable[tuple[float, float]]:
    """Reduce a series to at most POINTS, keeping the largest of each stretch so that peaks stay."""
    if len(times) <= POINTS:
        return zip(times.tolist(), values.tolist(), strict=True)
    parts = np.array_split(np.arange(len(times)), POINTS)
    picked = [int(part[np.argmax(values[part])]) for part in parts]
    return [(float(times[i]), float(values[i])) for i in picked]


def _panel(row: Row, series: Sequence[Series], zero: bool) -> Draw:
    """Draw lines over the time of a bundle's process. zero: the axis begins at zero, else at the least value."""
    end = float(np.nanmax(column(row.measured, "t_s"))) or 1.0
    values = np.concatenate([v for _, _, v, _ in series])
    least = 0.0 if zero else math.floor(float(values.min()) / 5) * 5.0
    most = least + ((float(values.max()) - least) * 1.08 or 1.0)
    height = 100.0

    def draw(width: int) -> tuple[float, str]:
        left, top = 48.0, 6.0

        def x(t: float) -> float:
            return left + (width - left) * min(max(t, 0.0), end) / end

        def y(v: float) -> float:
            return top + height * (1 - (v - least) / (most - least))

        body = ""
        for run in row.measured.runs:
            body += rect(x(run.start_s), top, x(run.end_s) - x(run.start_s), height, "var(--grid)", case_name(run.case))
        load = row.measured.load_s
        body += rect(x(load[0]), top, x(load[1]) - x(load[0]), height, "var(--line)", "load")
        for tick in ticks(most - least, 3):
            at = y(least + tick)
            body += line(left, at, width, at, "var(--line)", "stroke-width:.7")
            body += text_at(left - 8, at + 4, f"{least + tick:g}", "end")
        for i, (_, times, values, colour) in enumerate(series):
            dashes = "stroke-width:1.8" + (";stroke-dasharray:6 4" if i >= HUES else "")
            body += path(((x(t), y(v)) for t, v in _thin(times, values)), colour, dashes)
        for tick in ticks(end, 8 if width == WIDE else 4):
            body += text_at(x(tick), top + height + 17, f"{tick:g} s", "end" if x(tick) > width - 20 else "middle")
        return top + height + 22, body

    return draw


def over_time(row: Row) -> str:
    """Memory, processors, power and, if they were read, clocks and temperatures while one bundle was measured."""
    memory = [("available_bytes", "available"), ("cma_free_bytes", "CMA")]
    clocks = [("gpu_hz", "GPU"), ("gpu_max_hz", "GPU, most allowed"), ("emc_hz", "memory")]
    clocks += [("emc_cap_hz", "memory, most allowed"), ("cpu_hz", "CPU")]
    zones = [(n, n.partition("/")[2]) for n in row.measured.samples if n.startswith("temperature_c/")]
    panels: list[tuple[str, str, list[Series], bool]] = [
        ("Memory of the process", "MB", _series(row, [("rss_bytes", "resident")], 1e-6), True),
        ("Power", "W", _watts(row), True),
        ("Processors busy", "", _series(row, [("cpu_own", "this process"), ("cpu", "all processes")], 1), True),
        ("Free memory of the machine", "GB", _series(row, memory, 1e-9), True),
        ("Clocks", "MHz", _series(row, clocks, 1e-6), True),
        ("Temperature", "°C", _series(row, zones, 1), False),
    ]
    if row.profile.machine.get("board"):  # a Jetson allocates its graphics memory from these blocks
        block = _series(row, [("largest_free_block_bytes", "largest free block")], 1e-6)
        panels.insert(4, ("Largest free block", "MB", block, True))
    inside = ""
    for title, unit, series, zero in panels:
        key = legend((colour, name) for name, _, _, colour in series) if len(series) > 1 else ""
        most = ", ".join(f"{name} up to {number(float(values.max()))} {unit}".strip() for name, _, values, _ in series)
        if series:
            inside += f"<h3>{title}{f', {unit}' if unit else ''}</h3>{key}" + svg(_panel(row, series, zero), most)
        elif title == "Power":
            why = "; ".join(row.profile.missing) or "no power sensor could be read"
            inside += f"<h3>{title}</h3>" + empty(f"Not drawn: {why}.")
    caption = (
        "Time runs from the start of the process: rest, then load (darker), then warm-up and run (shaded) of each "
        "case. Energy is the area under the power curve while answers were made."
    )
    place = row.profile.bundles.index(row.measured)
    return figure(f"time-{place}", f"{row.name}: memory and power over time", caption, inside)


def _watts(row: Row) -> list[Series]:
    """The power of every rail, and the total if that is the sum of several."""
    measured, found = row.measured, []
    names = [name for name in measured.samples if name.startswith(("power_w/", "energy_uj/"))]
    if len(measured.total_power) > 1 and (total := power(measured)) is not None:
        found.append(("together", *total, "var(--ink)"))
    for i, name in enumerate(names):
        if (one := power(measured, (name,))) is not None:
            short = name.partition("/")[2] + (" (total)" if (name,) == measured.total_power else "")
            found.append((short, *one, f"var(--h{i % HUES})"))
    return found


# -- roofline ----------------------------------------------------------------------------------------------------------


def roofline(profile: Profile, rows: Sequence[Row]) -> str:
    points = []
    for row in rows:
        every = pooled(row.run)
        for stage, key in (("vision", "vision_ms"), ("prefill", "prefill_ms"), ("step", "step_ms")):
            did, ms = (row.run.work or {}).get(stage), median(every.get(key))
            if did is not None and ms and did.bytes:
                points.append((row, stage, did.flops / did.bytes, did.flops / ms * 1e3))
    title, peaks = "Roofline", profile.peaks
    caption = (
        "Operations per byte that the graphs move, against operations per second that were reached. Under the slope "
        "memory is the limit, under the flat roof arithmetic. The distance to the roof is what could still be won. "
        "Work that fits the processor's caches may be above the slope."
    )
    if peaks is None or not points:
        why = (
            "no counts of operations and bytes in these bundles" if peaks else "the peaks of this machine are not known"
        )
        return figure("roofline", title, caption, empty(f"No roofline: {why}."))
    ridge = peaks.flops_per_s / peaks.bytes_per_s
    low_x = min(min(p[2] for p in points), ridge) / 4
    high_x = max(max(p[2] for p in points), ridge) * 4
    low_y = min(min(p[3] for p in points) / 3, peaks.bytes_per_s * low_x)
    high_y = max(peaks.flops_per_s, max(p[3] for p in points)) * 2.5

    def draw(width: int) -> tuple[float, str]:
        left, height = 52.0, 380.0 if width == WIDE else 300.0

        def x(v: float) -> float:
            return left + (width - left) * math.log(v / low_x) / math.log(high_x / low_x)

        def y(v: float) -> float:
            return height * (1 - math.log(v / low_y) / math.log(high_y / low_y))

        body = ""
        for tick in log_ticks(low_x, high_x, 5):
            body += line(x(tick), 0, x(tick), height, "var(--grid)") + text_at(
                x(tick), height + 17, f"{tick:g}", "middle"
            )
        for tick in log_ticks(low_y, high_y, 6):
            body += line(left, y(tick), width, y(tick), "var(--grid)")
            body += text_at(left - 7, y(tick) + 4, f"{tick / 1e9:g}", "end")
        roof = [(low_x, peaks.bytes_per_s * low_x), (ridge, peaks.flops_per_s), (high_x, peaks.flops_per_s)]
        body += path(((x(a), y(b)) for a, b in roof), "var(--ink)", "stroke-width:2.2")
        body += text_at(width - 4, y(peaks.flops_per_s) - 8, f"{number(peaks.flops_per_s / 1e9)} GFLOP/s", "end", True)
        at = low_x * (ridge / low_x) ** 0.45
        turn = math.degrees(
            math.atan2(y(peaks.bytes_per_s * ridge) - y(peaks.bytes_per_s * low_x), x(ridge) - x(low_x))
        )
        body += (
            f'<text class=strong text-anchor="middle" transform="translate({x(at):.1f} '
            f'{y(peaks.bytes_per_s * at) - 9:.1f}) rotate({turn:.1f})">{number(peaks.bytes_per_s / 1e9)} GB/s</text>'
        )
        for row, stage, intensity, rate in points:
            a, b = x(intensity), y(rate)
            tip = f"{title_of(row)}, {stage}: {number(rate / 1e9)} GFLOP/s at {number(intensity)} FLOP/byte"
            shape = {
                "vision": f"M{a} {b - 7}L{a + 7} {b}L{a} {b + 7}L{a - 7} {b}Z",
                "prefill": f"M{a - 5.5} {b - 5.5}h11v11h-11Z",
                "step": f"M{a - 6} {b}a6 6 0 1 0 12 0a6 6 0 1 0 -12 0Z",
            }[stage]
            body += (
                f'<path d="{shape}" style="fill:{row.hue};stroke:var(--card);stroke-width:1.2" fill-opacity=".9">'
                f"<title>{escape(tip)}</title></path>"
            )
        body += text_at((left + width) / 2, height + 36, "FLOP per byte", "middle") + text_at(
            left, -8, "GFLOP/s", "end"
        )
        return height + 42, f'<g transform="translate(0 22)">{body}</g>'

    def tall(width: int) -> tuple[float, str]:
        height, body = draw(width)
        return height + 22, body

    shapes = "<div class=key><span>◆ vision + projector</span><span>■ prefill</span><span>● decode step</span></div>"
    colours = legend((row.hue, row.name) for row in per_bundle(rows))
    said = "; ".join(f"{title_of(r)}, {s}: {number(rate / 1e9)} GFLOP/s" for r, s, _, rate in points)
    return figure("roofline", title, f"{caption} Roofs: {peaks.source}.", shapes + colours + svg(tall, said))


def start_figure(rows: Sequence[Row]) -> str:
    lanes = []
    for row in rows:
        for cold in (True, False):
            chosen = sorted((s for s in row.measured.starts if s.cold == cold), key=lambda s: s.total_ms)
            if chosen:
                lanes.append((row, cold, chosen[len(chosen) // 2], len(chosen)))
    caption = (
        "A fresh process, from its start to the first token's text; the median one is shown. Cold means that the "
        "bundle's files were dropped from the page cache before; Python and its libraries were not."
    )
    if not lanes:
        return figure("starts", "Start to first token", caption, empty("Not measured (--starts 0)."))
    most = max(s.total_ms for _, _, s, _ in lanes)
    parts = (
        ("Python and imports", "import_ms", "var(--pre)"),
        ("load and check the bundle", "load_ms", "var(--vis)"),
        ("question to first token", "answer_ms", "var(--fill)"),
    )

    def draw(width: int) -> tuple[float, str]:
        def at(ms: float) -> float:
            return (width - 1) * ms / most

        y, body = 0.0, ""
        for row, cold, found, count in lanes:
            label, total = f"{row.name}, {'cold' if cold else 'warm'}", " ".join(milliseconds(found.total_ms))
            if width == WIDE:
                share = "" if found.cached_share is None else f" ({100 * found.cached_share:.0f} % in the page cache)"
                label, total = label + share, f"{total}, one of {count}"
            y, text = label_at(width, y, label, total, cold)
            body += text
            start = 0.0
            for what, key, colour in parts:
                ms = getattr(found, key)
                body += rect(at(start), y, at(ms), 16, colour, f"{what}: {number(ms)} ms", 1)
                start += ms
            y += 28
        return y + 22, x_axis(width, 0, y, at, ticks(most, 10 if width == WIDE else 4), "ms") + body

    totals = ((r.name, "cold" if c else "warm", milliseconds(s.total_ms)) for r, c, s, _ in lanes)
    said = "; ".join(f"{name}, {kind}: {' '.join(total)}" for name, kind, total in totals)
    key = legend((colour, what) for what, _, colour in parts)
    return figure("starts", "Start to first token", caption, key + svg(draw, said))
