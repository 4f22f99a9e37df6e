"""Turns the records of the GPU kit into a page: `python deploy/gpu_kit/report.py result.json ... -o page.md`.

Several records of one machine become one page. The last run of each stage counts, and earlier failures are listed with
their reasons. Every sentence and every figure of the page comes from the records.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

RAN = ("passed", "failed", "error", "crashed", "timeout")


class Records:
    """The results of several runs on one machine."""

    def __init__(self, paths: Sequence[Path]) -> None:
        self.names = [path.name for path in paths]
        self.records = [json.loads(path.read_text(encoding="utf-8")) for path in paths]
        for path, record in zip(paths, self.records, strict=True):
            if record.get("kit") != "trol-edge-gpu-kit":
                raise ValueError(f"{path}: no record of the GPU kit; give the result.json that run.py wrote")
        self.stages: dict[str, dict[str, Any]] = {}
        self.before: list[tuple[str, str, dict[str, Any]]] = []  # stages that did not pass: record, stage, entry
        for name, record in zip(self.names, self.records, strict=True):
            for stage, entry in record["stages"].items():
                if entry["status"] in RAN and entry["status"] != "passed":
                    self.before.append((name, stage, entry))
                if entry["status"] in RAN or stage not in self.stages:
                    self.stages[stage] = entry

    def data(self, stage: str) -> dict[str, Any]:
        """The data that a stage recorded; empty if it did not run."""
        found: dict[str, Any] = self.stages.get(stage, {}).get("data", {})
        return found

    def of(self, beginning: str) -> Iterator[tuple[str, dict[str, Any]]]:
        """Stages that ran and whose names have this beginning, as (rest of the name, entry)."""
        for stage, entry in self.stages.items():
            if stage.startswith(beginning) and entry["status"] in RAN:
                yield stage.removeprefix(beginning), entry


def page(records: Records) -> str:
    """Make the whole page as Markdown."""
    machine = records.data("machine")
    gpu = machine.get("gpu")
    name = gpu["name"] if gpu else "No GPU"
    day = records.records[-1]["runs"][0]["started"][:10]
    parts = [
        f"# {name}, {day}",
        f"Written by `python deploy/gpu_kit/report.py {' '.join(records.names)}`.",
        *ran(records),
        *about(machine, records.records[-1]["runs"][-1]["brought"]),
        *copies(records.data("cuda")),
        *small(records),
        *large(records),
        *exports(records),
        *refusals(records),
        *faults(records),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def table(columns: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Make a Markdown table."""
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)


def ran(records: Records) -> Iterator[str]:
    """Say what ran, when, and from which commit."""
    rows = []
    for name, record in zip(records.names, records.records, strict=True):
        statuses = [entry["status"] for entry in record["stages"].values()]
        counts = ", ".join(f"{statuses.count(status)} {status}" for status in dict.fromkeys(statuses))
        commits = sorted({run["commit"] or "unknown" for run in record["runs"]})
        rows.append((name, record["runs"][0]["started"], ", ".join(commits), counts))
    yield table(("record", "began", "commit", "stages"), rows)


def about(machine: dict[str, Any], brought: dict[str, str]) -> Iterator[str]:
    """Describe the machine and what the kit brought there, in sentences."""
    if not machine:
        return
    gpu, rates = machine.get("gpu"), machine.get("rates", {})
    yield "## The machine"
    if gpu:
        driver = ".".join(map(str, gpu["driver"]))
        yield (
            f"{gpu['name']}, compute capability {gpu['capability']}, {gpu['memory_bytes'] / 1e9:.0f} GB, a driver for "
            f"CUDA {driver}; {machine['cpu']}, {machine['memory_gb']:.0f} GB; Python {machine['python']}."
        )
    if rates:
        yield "Measured there: " + "; ".join(f"{key}: {value}" for key, value in rates.items()) + "."
    own = [f"{key} {value.split()[0]}" for key, value in machine["distributions"].items() if "machine" in value]
    installed = [name.partition("-cp")[0].partition("-py3")[0] for name, how in brought.items() if how == "installed"]
    yield f"Brought by the kit: {', '.join(installed) or 'nothing'}. Of the machine: {', '.join(own)}."


def copies(data: dict[str, Any]) -> Iterator[str]:
    """Show the results of cuda.py alone."""
    if not data:
        return
    yield "## CUDA calls by themselves"
    lines = []
    for key, value in data.items():
        if isinstance(value, dict):
            value = ", ".join(f"{name} {number}" for name, number in value.items())
        lines.append(f"- {key}: {value}")
    yield "\n".join(lines)


def small(records: Records) -> Iterator[str]:
    """Show the small models on ONNX Runtime's CUDA provider."""
    rows = []
    for name, entry in records.of("ort-"):
        data = entry["data"]
        if "drift" not in data:
            continue
        model, _, precision = name.rpartition("-")
        drift = data["drift"]
        worst = max(value for key, value in drift.items() if "logits" in key)
        counts = [graph["nodes"] for graph in data["placement"].values()]
        cpu = sum(count.get("CPUExecutionProvider", 0) for count in counts)
        total = sum(sum(count.values()) for count in counts)
        same = next((value for key, value in data.items() if key.startswith("equal tokens")), "")
        ties = next((value for key, value in data.items() if key.startswith("ties")), [])
        told = f"{same}{'; ' + '; '.join(ties) if ties else ''}"
        memory = data.get("peak device memory, MB", "")
        rows.append((model, precision, entry["status"], told, f"{worst:.1e}", f"{cpu} of {total}", memory))
    if rows:
        yield "## The small models on ONNX Runtime's CUDA provider"
        yield (
            "The same graphs answered the same questions on the machine's CPU and on its GPU. Drift is that of the "
            "self-test's logits against the FP32 reference. Memory is device-wide, CUDA's own context included."
        )
        columns = ("model", "precision", "stage", "tokens equal to the CPU's", "drift", "operators on the CPU", "MB")
        yield table(columns, rows)


def large(records: Records) -> Iterator[str]:
    """Show the published sizes beside the PyTorch reference."""
    rows, remarks = [], []
    for name, entry in records.of("full-"):
        model, _, precision = name.rpartition("-")
        for row in entry["data"].get("rows", []):
            case = row["case"]
            times = [row[key]["p50"] for key in ("vision_ms", "prefill_ms", "step_ms", "second_first_token_ms")]
            memory = entry["data"].get("peak device memory, MB", 0) / 1e3
            shown = [f"{time:.1f}" for time in times]
            rows.append(
                (model, f"trol-edge {precision}, CUDA provider", case["prompt_tokens"], *shown, f"{memory:.1f}")
            )
            remarks += [f"{model} {precision}: {remark}." for remark in (*row["invalid"], *row["remarks"])]
        if drift := entry["data"].get("drift"):
            worst = max(value for key, value in drift.items() if "logits" in key)
            verdict = next(c["good"] for c in entry["checks"] if c["name"] == "the self-test")
            passed = "passes" if verdict else "FAILS"
            remarks.append(f"{model} {precision}: the self-test {passed}; the logits drift by {worst:.1e}.")
    for model, entry in records.of("torch-"):
        data = entry["data"]
        if "eager" not in data:
            continue
        memory = data.get("peak device memory, MB")
        rest = ["", f"{memory / 1e3:.1f}" if memory else ""]
        tokens, eager = data["prompt tokens"], data["eager"]
        shown = [f"{eager[key]:.1f}" for key in ("vision_ms", "prefill_ms", "step_ms")]
        rows.append((model, "PyTorch FP16, eager", tokens, *shown, *rest))
        for key, title in (("step as one CUDA graph", "a CUDA graph"), ("step compiled", "compiled")):
            if isinstance(found := data.get(key), dict):
                rows.append(
                    (model, f"PyTorch FP16, its step {title}", tokens, "", "", f"{found['step_ms']:.1f}", *rest)
                )
    if rows:
        yield "## The published sizes, random weights"
        yield (
            "A picture of 640 x 480, medians in milliseconds; a step is one token of the answer. PyTorch runs the same "
            "two passes with its own attention kernels. Exports ran on the processor beside these stages."
        )
        columns = (
            "model",
            "what ran",
            "prompt tokens",
            "vision",
            "prefill",
            "step",
            "second question",
            "GB on the GPU",
        )
        yield table(columns, rows)
        yield "\n".join(f"- {remark}" for remark in remarks)


def exports(records: Records) -> Iterator[str]:
    """Show how long exports took there."""
    rows = []
    for name, entry in records.of("prepare-"):
        data = entry["data"]
        if "export, s" in data:
            rows.append((name, f"{data['export, s']:.0f}", data["export, peak memory, GB"], data["bundle, GB"]))
    if rows:
        yield "## Exports on that machine"
        yield table(("bundle", "seconds", "peak memory, GB", "bundle, GB"), rows)


def refusals(records: Records) -> Iterator[str]:
    """List what could not run there and why, each reason once."""
    found: dict[str, list[str]] = {}
    for name, entry in records.stages.items():
        if entry["status"] == "not run":
            found.setdefault(entry["line"], []).append(name)
        for key, value in entry.get("data", {}).items():
            if key.endswith("asked directly"):
                found.setdefault(f"{key.partition(',')[0]}: {value}", []).append(name)
    if found:
        yield "## What did not run"
        lines = []
        for line, names in found.items():
            more = f" and {len(names) - 1} others like it" if len(names) > 1 else ""
            lines.append(f"- {names[0]}{more}: {line}")
        yield "\n".join(lines)


def faults(records: Records) -> Iterator[str]:
    """List what failed in every record."""
    lines = [
        f"- {record}, {stage}, {entry['status']}: {entry['line']}"
        for record, stage, entry in records.before
        if not any(key.endswith("asked directly") for key in entry.get("data", {}))
    ]
    if lines:
        yield "## What failed on the way"
        yield "A stage of the same name in a later record, or a passed one in the tables, is what came of it."
        yield "\n".join(lines)


def main() -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0],
        epilog="Example: python deploy/gpu_kit/report.py result/result.json -o docs/results/my-card.md",
    )
    parser.add_argument("records", nargs="+", type=Path, help="Files result.json of the kit, the oldest first.")
    parser.add_argument("-o", "--output", type=Path, help="Page to write.  [default: standard output]")
    options = parser.parse_args()
    try:
        text = page(Records(options.records))
    except (OSError, ValueError, KeyError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    if options.output is None:
        print(text, end="")
    else:
        options.output.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
