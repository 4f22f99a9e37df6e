"""Compares `trol-edge plan` with others' measurements of other models, and with this machine's own bundles.

    python -m tests.bench.plan_check published            # figures that others measured of other models
    python -m tests.bench.plan_check host BUNDLE ...      # measure rates, then prefill and decode of each bundle

For published figures, a peer's shape is traced like ours, by the same decoder with one pass over the prompt, and
planned by the same arithmetic. What the peers do not say is assumed: how the output layer is stored (in the table), and
a full K/V cache of 1024 tokens, of which our step graph reads all. Gemma-2 is planned without its soft caps, local
attention and heads of 256 (288 here), so its rows say less than the others.
"""

from __future__ import annotations

import dataclasses
import json
import math
import statistics
import time
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from trol_edge.bundle.manifest import Bundle
from trol_edge.bundle.spec import ModelSpec
from trol_edge.export.quantize.recipes import RecipeOptions
from trol_edge.export.reference import hub, internlm2
from trol_edge.export.reference.model import Attend, Decoder, GatedMlp, Layer
from trol_edge.export.unbuilt import Unbuilt
from trol_edge.machine import devices
from trol_edge.plan.duration import graph_time
from trol_edge.plan.rates import Points, Rates, platform_of
from trol_edge.plan.subject import Subject, subject_of

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
out = Console(highlight=False, width=150)
CONTEXT = 1024


class FourNorms(Layer):
    """Gemma-2's layer, with norms also after attention and MLP. The same norms serve, because plans ignore values."""

    def forward(self, x: Tensor, image_mask: Tensor | None, index: int, traversal: int, attend: Attend) -> Tensor:
        context = attend(self.qkv(self.attention_norm(x), None), index, traversal)
        x = x + self.attention_norm(self.out(context, None))
        return x + self.mlp_norm(self.mlp(self.mlp_norm(x), None))


def four_norms(spec: ModelSpec) -> Decoder:
    """A decoder of such layers."""
    decoder = Decoder(spec)
    decoder.layers = nn.ModuleList(FourNorms(spec, GatedMlp) for _ in range(spec.num_layers))
    return decoder


@dataclasses.dataclass(frozen=True)
class Peer:
    """A plain llama-like decoder whose speed others published."""

    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    vocabulary: int
    options: RecipeOptions
    stored: str  # the assumption, for the table
    decoder: Callable[[ModelSpec], Decoder] = Decoder


def _mlc(lm_head: str = "int4") -> RecipeOptions:
    return RecipeOptions(recipe="int4", block=32, lm_head=lm_head)


# Sizes: the models' published config.json. MLC's q4f16_1 quantizes the output layer, too, in groups of 32; the W4A16
# checkpoint keeps it in FP16, in groups of 128.
PEERS = {
    "Phi-3.5 3.8B": Peer(32, 3072, 8192, 32, 32, 32064, _mlc(), "INT4/32, output layer too"),
    "Llama-3.2 3B": Peer(28, 3072, 8192, 24, 8, 128256, _mlc(), "INT4/32, output layer too"),
    "SmolLM2 1.7B": Peer(24, 2048, 8192, 32, 32, 49152, _mlc(), "INT4/32, output layer too"),
    "Gemma-2 2B": Peer(26, 2304, 9216, 8, 4, 256000, _mlc(), "INT4/32, output layer too", four_norms),
    "Cosmos-Reason2-2B": Peer(
        28, 2048, 6144, 16, 8, 151936, RecipeOptions("int4", 128, lm_head="fp16"), "INT4/128, output layer FP16"
    ),
}


@dataclasses.dataclass(frozen=True)
class Figure:
    """One published measurement. slots: tokens in the cache (assumed if not published)."""

    peer: str
    device: str
    graph: str
    tokens: int
    slots: int
    milliseconds: float
    source: str


FIGURES = (
    *(
        Figure(peer, f"orin-nano-8gb:{mode}", "step", 1, 256, 1000 / rate, "NVIDIA, MLC INT4")
        for peer, slow, fast in (
            ("Phi-3.5 3.8B", 24.7, 38.1),
            ("Llama-3.2 3B", 27.7, 43.1),
            ("SmolLM2 1.7B", 41.0, 64.5),
            ("Gemma-2 2B", 21.5, 35.0),
        )
        for mode, rate in (("15W", slow), ("MAXN_SUPER", fast))
    ),
    Figure("Cosmos-Reason2-2B", "orin-nano-8gb:MAXN_SUPER", "step", 1, 640, 16.7, "Edge-LLM W4A16, hokwangchoi"),
    Figure("Cosmos-Reason2-2B", "orin-nano-8gb:MAXN_SUPER", "traverse", 512, 512, 211, "the same, prefill of 512"),
)


def peer_subject(peer: Peer, context: int = CONTEXT) -> Subject:
    """Describe a peer for `trol-edge plan`, on a Jetson Orin."""
    config = hub.find("trol-1.8b").config | {
        "hidden_size": peer.hidden,
        "intermediate_size": peer.intermediate,
        "num_hidden_layers": peer.layers,
        "num_attention_heads": peer.heads,
        "num_key_value_heads": peer.kv_heads,
        "vocab_size": peer.vocabulary,
    }
    spec = dataclasses.replace(internlm2.model_spec(config, None, {}), lora_rank=0)
    family = dataclasses.replace(internlm2.FAMILY, decoder=peer.decoder)
    return Unbuilt("peer", family, spec, context).subject("jetson-jp6", peer.options, twice=0)


@app.command()
def published(as_json: Annotated[bool, typer.Option("--json")] = False) -> None:
    """Show planned and published times of comparable models."""
    rows = published_rows()
    if as_json:
        print(json.dumps(rows))
        return
    table = Table(box=None, padding=(0, 1))
    for column in ("model", "device", "stage", "stored", "weights GB", "floor ms", "planned ms", "published ms", "off"):
        table.add_column(column)
    for row in rows:
        table.add_row(
            row["peer"],
            row["device"],
            row["graph"],
            row["stored"],
            f"{row['weight_bytes'] / 1e9:.2f}",
            f"{row['floor']:.1f}",
            f"{row['planned']:.1f}",
            f"{row['milliseconds']:.1f}",
            f"{row['off_percent']:+.0f} %",
        )
    out.print(table)


def published_rows(peers: Collection[str] = tuple(PEERS)) -> list[dict[str, Any]]:
    """Every figure of these peers with its planned milliseconds, and their difference in percent."""
    rows: list[dict[str, Any]] = []
    for name in peers:
        peer = PEERS[name]
        subject = peer_subject(peer)
        for figure in (f for f in FIGURES if f.peer == name):
            machine = platform_of(*devices.find(figure.device))
            dims = {} if figure.graph == "step" else {"tokens": figure.tokens, "slots": figure.slots}
            costs, weights = subject.graphs[figure.graph], subject.weights[figure.graph]
            planned = graph_time(figure.graph, costs, weights, machine, **dims)
            found = 1000 * planned.expected
            rows.append(
                dataclasses.asdict(figure)
                | {"stored": peer.stored, "weight_bytes": weights, "floor": 1000 * planned.floor, "planned": found}
                | {"off_percent": 100 * (found / figure.milliseconds - 1)}
            )
    return rows


@app.command()
def host(
    bundles: list[Path],
    tokens: Annotated[int, typer.Option(help="Length of the prompt of random image and text tokens.")] = 256,
    steps: Annotated[int, typer.Option(help="Length of the answer in tokens.")] = 8,
    rounds: Annotated[int, typer.Option(help="Number of prefills, of which the median counts.")] = 1,
    as_json: Annotated[bool, typer.Option("--json")] = False,
) -> None:
    """Show planned and measured prefill and decode of bundles here, with rates measured before and after each."""
    rows = [row for folder in bundles for row in _compare(Bundle(folder), tokens, steps, rounds)]
    if as_json:
        print(json.dumps(rows))
        return
    table = Table(box=None, padding=(0, 1))
    for column in ("bundle", "precision", "stage", "tokens", "planned ms", "measured ms", "off", "most of it"):
        table.add_column(column)
    for row in rows:
        table.add_row(
            row["bundle"],
            row["precision"],
            row["graph"],
            str(row["tokens"]),
            f"{row['planned_ms']:.2f}",
            f"{row['measured_ms']:.2f}",
            f"{row['off_percent']:+.0f} %",
            row["bound"],
        )
    out.print(table)
    for row in rows[::2]:
        r = row["rates"]
        reads = ", ".join(f"{n >> 20} MB {rate / 1e9:.0f}" for n, rate in r["reads"])
        products = "; ".join(
            f"{kind} " + ", ".join(f"{n / 1e6:.1f} M {rate / 1e9:.0f}" for n, rate in points)
            for kind, points in r["arithmetic"].items()
        )
        out.print(
            f"around {row['bundle']}: G operations/s by size of a product: {products}; reads, GB/s by size: {reads}; "
            f"{r['operator'] * 1e6:.1f} us an operator, {r['run'] * 1e6:.0f} a run",
            markup=False,
        )


def _compare(bundle: Bundle, tokens: int, steps: int, rounds: int) -> list[dict[str, Any]]:
    """Measure rates before and after a prompt of random embeddings (half of them image tokens) and its steps."""
    from trol_edge.runtimes import ort, rates

    subject, before = subject_of(bundle), rates.host()
    state = ort.OrtBackend(bundle, verify=False, prefix_reuse=False).new_state()
    spec, rng = bundle.manifest.spec, np.random.default_rng(0)
    embeddings = rng.standard_normal((max(tokens, steps + 1), spec.hidden_size), dtype=np.float32) * np.float32(0.05)
    mask = np.arange(tokens) < tokens // 2 if spec.lora_rank else None
    state.traverse(embeddings[:8], None if mask is None else mask[:8])  # warms up threads and pages
    prefill = [_seconds(lambda: state.traverse(embeddings[:tokens], mask)) for _ in range(rounds)]
    state.step(embeddings[0], tokens)
    decode = [_seconds(lambda i=i: state.step(embeddings[i], tokens + i)) for i in range(1, 1 + steps)]
    machine = dataclasses.replace(before, reached=_between(before.reached, rates.measure()))
    rows = []
    for graph, dims, measured in (
        ("traverse", {"tokens": tokens, "slots": tokens}, statistics.median(prefill)),
        ("step", {"slots": tokens + steps // 2}, statistics.median(decode)),
    ):
        planned = graph_time(graph, subject.graphs[graph], subject.weights[graph], machine, **dims)
        rows.append(
            {
                "bundle": subject.name,
                "precision": subject.precision,
                "graph": graph,
                "tokens": tokens,
                "planned_ms": 1000 * planned.expected,
                "floor_ms": 1000 * planned.floor,
                "measured_ms": 1000 * measured,
                "off_percent": 100 * (planned.expected / measured - 1),
                "bound": planned.bound,
                "rates": dataclasses.asdict(machine.reached),
            }
        )
    return rows


def _between(a: Rates, b: Rates) -> Rates:
    """The geometric mean of two measurements, because a shared machine's speed changes from minute to minute."""

    def points(first: Points, second: Points) -> Points:
        return tuple((size, math.sqrt(rate * other)) for (size, rate), (_, other) in zip(first, second, strict=True))

    return dataclasses.replace(
        a,
        arithmetic={kind: points(a.arithmetic[kind], b.arithmetic[kind]) for kind in a.arithmetic},
        reads=points(a.reads, b.reads),
        touches=points(a.touches, b.touches),
        stored={kind: math.sqrt(rate * b.stored[kind]) for kind, rate in a.stored.items()},
        operator=(a.operator + b.operator) / 2,
        attention=(a.attention + b.attention) / 2,
        run=(a.run + b.run) / 2,
    )


def _seconds(call: Any) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


if __name__ == "__main__":
    app()
