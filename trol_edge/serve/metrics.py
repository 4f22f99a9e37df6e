"""Counts what the server does, and writes it as Prometheus' text. For one event loop, without a library.

Times have OpenTelemetry's names for generative AI where it has one.
"""

from __future__ import annotations

import os
from bisect import bisect_left
from collections import Counter
from collections.abc import Iterator
from typing import get_args

from trol_edge.machine.sensors import Sensors
from trol_edge.serve.host import Host, Outcome, State
from trol_edge.serve.line import Line

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)
STATES = get_args(State)


class Histogram:
    """Observed seconds in buckets."""

    def __init__(self) -> None:
        self.counts, self.total = [0] * (len(SECONDS) + 1), 0.0

    def add(self, seconds: float) -> None:
        """Record one."""
        self.counts[bisect_left(SECONDS, seconds)] += 1
        self.total += seconds

    def lines(self, name: str) -> Iterator[str]:
        """The lines of Prometheus' text."""
        running = 0
        for bound, count in zip((*map(str, SECONDS), "+Inf"), self.counts, strict=True):
            running += count
            yield f'{name}_bucket{{le="{bound}"}} {running}'
        yield f"{name}_sum {self.total:.6f}"
        yield f"{name}_count {running}"


class Metrics:
    """Everything that is counted, and the gauges that are read when somebody asks."""

    def __init__(self, host: Host, line: Line) -> None:
        self._host, self._line = host, line
        self._sensors = Sensors()
        self.requests: Counter[tuple[str, int]] = Counter()  # (path, status)
        self.left = 0  # calls whose client went away
        self.prompt_tokens = self.cached_tokens = self.made_tokens = 0
        self.first = Histogram()
        self.per_token = Histogram()
        self.duration = Histogram()
        self.wait = Histogram()

    def finished(self, outcome: Outcome, arrived_s: float, ended_s: float) -> None:
        """Count an answer. arrived_s, ended_s: by time.perf_counter."""
        self.duration.add(ended_s - arrived_s)
        made = len(outcome.token_ids)
        self.made_tokens += made
        self.prompt_tokens += outcome.prompt_tokens
        self.cached_tokens += outcome.cached_tokens
        if outcome.first_s is not None:
            self.first.add(outcome.first_s - arrived_s)
            if made > 1:
                self.per_token.add((ended_s - outcome.first_s) / (made - 1))

    def sample(self) -> dict[str, float | None]:
        """Read the machine's sensors, which may take some milliseconds."""
        return self._sensors.sample(os.getpid())

    def text(self, sample: dict[str, float | None]) -> str:
        """All of it, in Prometheus' text format."""
        return "\n".join([*self._counters(), *self._gauges(sample), *self._times(), ""])

    def _counters(self) -> Iterator[str]:
        yield from _head("trol_edge_requests_total", "counter", "Answered requests by path and status.")
        for (path, status), count in sorted(self.requests.items()):
            yield f'trol_edge_requests_total{{path="{path}",status="{status}"}} {count}'
        info = self._host.runtime.vision_cache if self._host.runtime else None
        for name, value, text in (
            ("clients_left", self.left, "Calls that ended because their client went away."),
            ("prompt_tokens", self.prompt_tokens, "Tokens of prompts."),
            ("prompt_tokens_cached", self.cached_tokens, "Tokens of prompts that were not computed again."),
            ("answer_tokens", self.made_tokens, "Tokens of answers."),
            ("vision_cache_hits", info.hits if info else 0, "Pictures whose features were known."),
            ("vision_cache_misses", info.misses if info else 0, "Pictures that were encoded."),
        ):
            yield from _head(f"trol_edge_{name}_total", "counter", text)
            yield f"trol_edge_{name}_total {value}"

    def _gauges(self, sample: dict[str, float | None]) -> Iterator[str]:
        yield from _head("trol_edge_state", "gauge", "1 for the present state.")
        for state in STATES:
            yield f'trol_edge_state{{state="{state}"}} {int(self._host.state == state)}'
        info = self._host.runtime.vision_cache if self._host.runtime else None
        found: list[tuple[str, float | None, str]] = [
            ("queue_length", self._line.waiting, "Calls that wait for their turn."),
            ("calls_inside", self._line.inside, "Calls that read their bodies, wait or run."),
            ("queue_capacity", self._line.most, "Most calls inside."),
            ("resident_bytes", sample.get("rss_bytes"), "Resident memory of the server."),
            ("available_bytes", sample.get("available_bytes"), "Memory that the machine has left."),
            ("vision_cache_bytes", info.bytes if info else 0, "Features of pictures that are kept."),
        ]
        power = self._sensors.total_power()
        watts = [sample.get(name) for name in power if name.startswith("power_w/")]
        if power and watts and None not in watts:
            found.append(("power_watts", sum(w for w in watts if w), "Power of the machine at this moment."))
        for name, value, text in found:
            if value is not None:
                yield from _head(f"trol_edge_{name}", "gauge", text)
                yield f"trol_edge_{name} {value:.12g}"
        joules = [sample.get(name) for name in power if name.startswith("energy_uj/")]
        if joules and None not in joules:
            yield from _head("trol_edge_cpu_energy_joules_total", "counter", "Energy counter of the processor.")
            yield f"trol_edge_cpu_energy_joules_total {sum(j for j in joules if j) / 1e6:.3f}"

    def _times(self) -> Iterator[str]:
        for name, histogram, text in (
            ("gen_ai_server_time_to_first_token_seconds", self.first, "From arrival to the first token."),
            ("gen_ai_server_time_per_output_token_seconds", self.per_token, "Mean time of the later tokens of a call."),
            ("gen_ai_server_request_duration_seconds", self.duration, "From arrival to the end of the answer."),
            ("trol_edge_queue_wait_seconds", self.wait, "Waiting for the turn."),
        ):
            yield from _head(name, "histogram", text)
            yield from histogram.lines(name)


def _head(name: str, kind: str, text: str) -> Iterator[str]:
    yield f"# HELP {name} {text}"
    yield f"# TYPE {name} {kind}"
