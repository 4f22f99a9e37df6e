"""A profile as one HTML page: no network, no script, light and dark, laptop and phone.

Each figure's description says in words what it shows, and every number is also in a table.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from html import escape

from trol_edge.measure.compare import BaselineComparison, Change
from trol_edge.measure.figures import (
    HUES,
    Row,
    distribution,
    median,
    over_time,
    per_bundle,
    roofline,
    start_figure,
    timeline,
    title_of,
)
from trol_edge.measure.record import STAGES, STARTS, Profile, case_name, percentiles, pooled, starts, tokens_per_s
from trol_edge.measure.samples import energy, lowest, verdict
from trol_edge.svg import milliseconds, number

CSS = """
:root{color-scheme:light dark;--bg:#f6f7f9;--card:#fff;--ink:#18202b;--soft:#556172;--line:#dfe4ea;--grid:#e9edf1;
--pre:#7d8ea3;--vis:#8a5cd6;--fill:#2a6fdb;--dec:#df7212;--good:#16794f;--bad:#bb2a34;--warn:#8d5f00;--badbg:#fdecec;
--warnbg:#fff4dc;--goodbg:#e4f5ec;--h0:#2a6fdb;--h1:#d3660c;--h2:#158060;--h3:#b1408c;--h4:#7a6a00;--h5:#5f5ac7}
@media (prefers-color-scheme:dark){:root{--bg:#10141a;--card:#181e26;--ink:#e9edf3;--soft:#9ba8b8;--line:#2b3440;
--grid:#242c36;--pre:#92a2b5;--vis:#b08cf5;--fill:#6aa5ff;--dec:#ff9d4d;--good:#5bd39b;--bad:#ff8189;--warn:#f0bd55;
--badbg:#3a1d22;--warnbg:#35290f;--goodbg:#13301f;--h0:#6aa5ff;--h1:#ff9d4d;--h2:#45c79c;--h3:#ee8bc9;--h4:#d4c04a;
--h5:#a6a2ff}}
*{box-sizing:border-box}
body{margin:0;background:var(--bg);color:var(--ink);font:16px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,
"Noto Sans","DejaVu Sans",sans-serif;font-variant-numeric:tabular-nums}
main{max-width:1120px;margin:0 auto;padding:36px 24px 64px}
h1{font-size:30px;line-height:1.15;letter-spacing:-.02em;margin:0 0 6px}h2{font-size:19px;letter-spacing:-.01em;
margin:0 0 2px}h3{font-size:15px;margin:18px 0 4px}p{margin:0 0 8px}.soft,figcaption{color:var(--soft);font-size:14px}
.card,figure{background:var(--card);border:1px solid var(--line);border-radius:14px;padding:20px 22px;margin:0 0 18px}
figcaption{margin:0 0 12px;max-width:78ch}svg{display:block;width:100%;height:auto;overflow:visible}
svg text{font-size:12.5px;fill:var(--soft);font-family:inherit}svg .strong{fill:var(--ink);font-weight:600}
.wide{display:block}.narrow{display:none}
.badges{display:flex;flex-wrap:wrap;gap:8px;margin:12px 0 22px}.badge{border-radius:99px;padding:2px 11px;
font-size:13.5px;font-weight:600;background:var(--goodbg);color:var(--good)}.badge.bad{background:var(--badbg);
color:var(--bad)}.badge.warn{background:var(--warnbg);color:var(--warn)}
.tiles{display:grid;grid-template-columns:repeat(6,1fr);gap:12px;margin:0 0 18px}
.tile{background:var(--card);border:1px solid var(--line);border-radius:14px;padding:13px 15px}
.tile b{display:block;font-size:27px;line-height:1.25;letter-spacing:-.02em}.tile b small{font-size:15px;
font-weight:500;color:var(--soft);margin-left:3px;letter-spacing:0}.tile .of{font-size:12.5px;color:var(--soft);
display:block;overflow-wrap:anywhere}
table{border-collapse:collapse;width:100%;font-size:14px}th{text-align:left;font-weight:600;color:var(--soft);
font-size:13px}th,td{padding:7px 10px 7px 0;border-bottom:1px solid var(--line);vertical-align:top;
overflow-wrap:anywhere}td.n,th.n{text-align:right;white-space:nowrap;padding-right:14px}tbody tr:last-child td,
tbody tr:last-child th{border-bottom:0}tbody th{color:var(--ink);font-size:14px}.bar{display:block;height:5px;
border-radius:3px;margin-top:4px;min-width:2px}.track{display:block;background:var(--grid);border-radius:3px}
.dot{display:inline-block;width:10px;height:10px;border-radius:3px;margin-right:7px}
.key{display:flex;flex-wrap:wrap;gap:4px 16px;font-size:13.5px;color:var(--soft);margin:0 0 10px}.key span{
white-space:nowrap}details{margin-top:12px;font-size:14px}summary{cursor:pointer;color:var(--soft)}
summary:focus-visible{outline:2px solid var(--fill);outline-offset:3px;border-radius:4px}
.notes{margin:0;padding:0 0 0 18px}.notes li{margin:3px 0}
.bad{color:var(--bad)}.good{color:var(--good)}.warn{color:var(--warn)}.empty{border:1px dashed
var(--line);border-radius:10px;padding:22px;color:var(--soft);text-align:center;margin:0}
@media (max-width:980px){.tiles{grid-template-columns:repeat(3,1fr)}}
@media (max-width:720px){main{padding:22px 10px 40px}h1{font-size:25px}.card,figure{padding:16px 15px}
.wide{display:none}.narrow{display:block}.tiles{grid-template-columns:1fr 1fr;gap:10px}.tile{padding:11px 13px}
.tile b{font-size:22px}.stack thead{display:none}.stack tr{display:block;padding:10px 0;border-bottom:1px solid
var(--line)}.stack tr:last-child{border-bottom:0}.stack th,.stack td,.stack td.n{display:block;border:0;padding:2px 0;
text-align:left;white-space:normal}.stack td[data-is]::before{content:attr(data-is) ": ";color:var(--soft)}
.stack td:empty{display:none}th,td{padding-right:6px}td.n,th.n{padding-right:6px}}
"""


def page(profile: Profile, baseline: Profile | None = None, comparison: BaselineComparison | None = None) -> str:
    """Render a profile as a page. A baseline adds its runs beside the new ones and a table of what changed."""
    rows = _rows(profile, 0, False)
    if baseline is not None:
        rows += _rows(baseline, len(profile.bundles), True)
    models = ", ".join(dict.fromkeys(b.bundle.model for b in profile.bundles))
    machine = profile.machine
    memory = machine.get("memory_bytes")
    about = [profile.machine_name, f"{float(memory) / 1e9:.0f} GB" if memory else "", profile.system]
    about += dict.fromkeys(b.library for b in profile.bundles)
    invalid = sum(bool(row.verdict.invalid) for row in rows if not row.old)
    partial = any(row.verdict.partial for row in rows if not row.old)
    busy = any(row.verdict.remarks for row in rows if not row.old)
    badges = [("bad", f"{invalid} of {len(profile.bundles) and sum(not r.old for r in rows)} runs invalid")] * (
        invalid > 0
    )
    badges += [("", "all runs valid")] * (not invalid) + [("warn", "partial data")] * partial
    badges += [("warn", "the machine was busy")] * busy
    if comparison is not None:
        slower = len(comparison.slower)
        badges.append(
            ("bad", f"{slower} figures slower than the baseline") if slower else ("", "not slower than the baseline")
        )
    parts = [
        f"<h1>{escape(models)}</h1><p class=soft>{escape(' · '.join(p for p in about if p))}<br>"
        f"measured {escape(profile.created.replace('T', ' ').replace('+00:00', ' UTC'))} by trol-edge "
        f"{escape(profile.trol_edge)}</p>",
        "<div class=badges>" + "".join(f'<span class="badge {c}">{escape(t)}</span>' for c, t in badges) + "</div>",
        _tiles([row for row in rows if not row.old]),
        _glance(rows),
        _changes(comparison) if comparison is not None else "",
        timeline(rows),
        distribution(rows),
        *(over_time(row) for row in per_bundle(rows) if not row.old),
        roofline(profile, rows),
        start_figure(per_bundle(rows)),
        _tables(rows),
        _notes(profile, rows),
    ]
    return (
        f'<!doctype html><html lang=en><head><meta charset=utf-8><meta name=viewport content="width=device-width,'
        f'initial-scale=1"><title>Profile of {escape(models)}</title><link rel=icon href="data:,"><style>{CSS}</style>'
        f"</head><body><main>{''.join(parts)}</main></body></html>\n"
    )


def _rows(profile: Profile, first: int, old: bool) -> list[Row]:
    many = len({m.bundle.model for m in profile.bundles}) > 1
    found = []
    for i, measured in enumerate(profile.bundles):
        b = measured.bundle
        name = f"{b.model} {b.kind}" if many else b.kind
        twins = [m.bundle for m in profile.bundles if (m.bundle.model, m.bundle.kind) == (b.model, b.kind)]
        name += f" ({b.folder})" if len(twins) > 1 else ""
        name += ", baseline" if old else ""
        hue = f"var(--h{(first + i) % HUES})"
        for run in measured.runs:
            found.append(
                Row(
                    profile=profile,
                    measured=measured,
                    run=run,
                    hue=hue,
                    name=name,
                    old=old,
                    verdict=verdict(profile, measured, run),
                    energy=energy(measured, run),
                )
            )
    return found


# -- at a glance -------------------------------------------------------------------------------------------------------


def _figures(row: Row) -> dict[str, tuple[float, str, str] | None]:
    """The main figures: title -> (value to compare by, its text, unit), or None if it was not measured."""
    every = pooled(row.run)

    def of(
        value: float | None, text: Callable[[float], tuple[str, str]] = milliseconds
    ) -> tuple[float, str, str] | None:
        return None if value is None else (value, *text(value))

    def plain(unit: str, scale: float = 1.0) -> Callable[[float], tuple[str, str]]:
        return lambda value: (number(value / scale), unit)

    begun = starts(row.measured)
    return {
        "First token": of(median(every.get("first_token_ms"))),
        "Tokens per second": of(tokens_per_s(row.run), plain("tok/s")),
        "Second question": of(median(every.get("second_first_token_ms"))),
        "Start, cold": of(median(begun.get("cold_ms"))),
        "Peak memory": of(row.run.peak_rss_bytes, plain("MB", 1e6)),
        "Energy per token": of(row.energy.token_j if row.energy else None, plain("mJ", 1e-3)),
    }


MORE_IS_BETTER = "Tokens per second"


def _tiles(rows: Sequence[Row]) -> str:
    """One tile per figure, with the best of all runs."""
    every = [(row, _figures(row)) for row in rows]
    tiles = ""
    for title in every[0][1]:
        found = [(f[0], f, row) for row, figures in every if (f := figures[title]) is not None]
        if found:
            pick = max if title == MORE_IS_BETTER else min
            _, (_, text, unit), row = pick(found, key=lambda item: item[0])
            of = title_of(row) if len(rows) > 1 else case_name(row.run.case)
            value = f"{text}<small>{unit}</small>"
        else:
            value, of = "<small>none</small>", "not measured here"
        tiles += (
            f"<div class=tile><span class=soft>{title}</span><b>{value}</b><span class=of>{escape(of)}</span></div>"
        )
    return f"<div class=tiles>{tiles}</div>"


def _glance(rows: Sequence[Row]) -> str:
    every = [_figures(row) for row in rows]
    titles = [title for title in every[0] if any(figures[title] for figures in every)]
    most = {title: max((f[title] or (0.0,))[0] for f in every) or 1.0 for title in titles}
    body = ""
    for row, figures in zip(rows, every, strict=True):
        cells = ""
        for title in titles:
            value = figures[title]
            cells += f'<td data-is="{title}">' + (
                f'{value[1]} {value[2]}<span class=track><span class=bar style="background:{row.hue};'
                f'width:{100 * value[0] / most[title]:.1f}%"></span></span>'
                if value
                else "not measured"
            )
            cells += "</td>"
        word, kind = (
            ("invalid", "bad")
            if row.verdict.invalid
            else ("partial", "warn")
            if row.verdict.partial
            else ("valid", "good")
        )
        body += (
            f'<tr><th scope=row><i class=dot style="background:{row.hue}"></i>{escape(title_of(row))}</th>{cells}'
            f'<td data-is="Run" class={kind}>{word}</td></tr>'
        )
    head = "".join(f"<th scope=col>{title}</th>" for title in titles)
    caption = (
        "Medians of the answers; bars compare the runs with each other. Longer is better for tokens per second only."
    )
    head = f"<thead><tr><th scope=col>Run</th>{head}<th scope=col></th></tr></thead>"
    table = f"<table class=stack>{head}<tbody>{body}</tbody></table>"
    return f"<figure id=comparison><h2>Runs side by side</h2><figcaption>{caption}</figcaption>{table}</figure>"


def _changes(found: BaselineComparison) -> str:
    """What became slower, and folded away what did not."""
    worst_first = sorted(found.changes, key=lambda c: -(c.new / c.old if c.old else 1))
    said = "".join(f"<li>{escape(text)}</li>" for text in (*found.unjudged, *found.remarks))
    caption = (
        "Slower means that the medians differ by more than the noise, with 99 % confidence (bootstrap over answers). "
        "Noise is the drift between the thirds of either run, and at least 5 %."
    )
    others = [change for change in worst_first if not change.slower]
    slower = _change_table(found.slower) if found.slower else "<p class=good>Nothing became slower beyond noise.</p>"
    return (
        f"<figure id=changes><h2>Against the baseline</h2><figcaption>{caption}</figcaption>"
        f"{f'<ul class=notes>{said}</ul>' if said else ''}{slower}"
        f"<details><summary>{len(others)} figures that did not become slower</summary>{_change_table(others)}</details>"
        "</figure>"
    )


def _change_table(changes: Sequence[Change]) -> str:
    body = ""
    for change in changes:
        share = change.new / change.old - 1 if change.old else 0.0
        body += (
            f"<tr><th scope=row>{escape(change.what)}</th><td>{escape(change.where)}</td>"
            f'<td class=n data-is="then">{number(change.old)} {change.unit}</td>'
            f'<td class=n data-is="now">{number(change.new)} {change.unit}</td>'
            f'<td class=n data-is="change"><b class={"bad" if change.slower else "soft"}>{100 * share:+.0f} %</b></td>'
            f'<td class=n data-is="noise">{100 * change.threshold:.0f} %</td></tr>'
        )
    columns = (("What", ""), ("Where", ""), ("then", "n"), ("now", "n"), ("change", "n"), ("noise", "n"))
    head = "".join(f'<th scope=col class="{kind}">{title}</th>' for title, kind in columns)
    return f"<table class=stack><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def _tables(rows: Sequence[Row]) -> str:
    inside, titles = "", STAGES | STARTS
    head = "".join(f"<th class=n scope=col>{title}</th>" for title in ("p50", "p90", "p99", "values"))
    for i, row in enumerate(rows):
        body = ""
        for key, values in (pooled(row.run) | starts(row.measured)).items():
            cells = "".join(f"<td class=n>{number(p)}</td>" for p in percentiles(values))
            body += f"<tr><th scope=row>{escape(titles[key])}</th>{cells}<td class=n>{len(values)}</td></tr>"
        inside += (
            f"<details{' open' if i == 0 else ''}><summary>{escape(title_of(row))}</summary><table><thead><tr>"
            f"<th scope=col>Milliseconds</th>{head}</tr></thead><tbody>{body}</tbody></table>"
            f"<p class=soft>{escape(' '.join(_sentences(row)))}</p></details>"
        )
    return (
        "<section class=card id=tables><h2>Every figure</h2>"
        f"<p class=soft>With few values, p99 is close to the largest.</p>{inside}</section>"
    )


def _sentences(row: Row) -> list[str]:
    """Sentences about the energy and memory of a run."""
    found, used = [], row.energy
    if used is not None:
        found.append(f"Energy: {number(1e3 * used.token_j)} mJ per token, {number(used.answer_j)} J per answer.")
        if used.token_net_j is not None and used.answer_net_j is not None and used.idle_w is not None:
            found.append(
                f"Above the {number(used.idle_w)} W drawn idle: {number(1e3 * used.token_net_j)} mJ per token, "
                f"{number(used.answer_net_j)} J per answer."
            )
    names = {"available_bytes": "available", "cma_free_bytes": "CMA", "largest_free_block_bytes": "largest free block"}
    for name, what in names.items():
        if (least := lowest(row.measured, row.run, name)) is not None:
            found.append(f"Least free memory, {what}: {number(least / 1e6)} MB.")
    return found


def _notes(profile: Profile, rows: Sequence[Row]) -> str:
    grouped: dict[str, list[str]] = {}  # note -> titles of the runs that it is about
    for row in rows:
        found = row.verdict
        for kind, word, texts in (
            ("bad", "Invalid", found.invalid),
            ("warn", "Partial", found.partial),
            ("soft", "Note", found.remarks),
        ):
            for text in texts:
                grouped.setdefault(f"<b class={kind}>{word}:</b> {escape(text)}", []).append(title_of(row))
    said = ""
    for line, titles in grouped.items():
        where = "" if len(titles) == len(rows) else f" <span class=soft>({escape('; '.join(titles))})</span>"
        said += f"<li>{line}{where}</li>"
    how = "".join(f"<li>{escape(line)}</li>" for line in _how(profile))
    bundles = "".join(
        f"<li>{escape(b.model)} {escape(b.kind)} for {escape(b.target)}, {b.bytes / 1e6:.1f} MB, "
        f"{escape(b.created_by)}: {escape(b.folder)}, bundle.json sha256 {b.manifest_sha256[:16]}</li>"
        for b in (row.measured.bundle for row in per_bundle(rows))
    )
    return (
        "<section class=card id=notes><h2>What to know about these numbers</h2>"
        f"<ul class=notes>{said or '<li>Nothing to report.</li>'}</ul><h3>How it was measured</h3>"
        f"<ul class=notes>{how}</ul><h3>Bundles</h3><ul class=notes>{bundles}</ul></section>"
    )


def _how(profile: Profile) -> list[str]:
    settings, machine, peaks = profile.settings, profile.machine, profile.peaks
    tokens = profile.bundles[0].runs[0].case.tokens
    found = [
        f"{settings.runs} answers per run after {settings.warmup} for warm-up, each of {tokens} tokens, greedy; "
        "the model's own end of an answer is ignored.",
        f"Threads: {settings.threads or 'as the library chooses'}. A separate process sampled the machine every "
        f"{1e3 * settings.interval_s:g} ms.",
        f"Python {profile.python}." + (f" L4T {machine['l4t']}." if machine.get("l4t") else ""),
    ]
    clocks = {"gpu_max_hz": "GPU", "emc_cap_hz": "memory"}
    caps = [f"{title} {float(hz) / 1e6:.0f} MHz" for key, title in clocks.items() if (hz := machine.get(key))]
    if caps:
        found.append(f"Clocks at most: {', '.join(caps)}.")
    if peaks is not None:
        rates = f"{number(peaks.flops_per_s / 1e9)} GFLOP/s, {number(peaks.bytes_per_s / 1e9)} GB/s"
        found.append(f"Peaks: {rates} ({peaks.source}).")
    return found
