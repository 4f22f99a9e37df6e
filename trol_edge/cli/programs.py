"""Prints what the engines of a bundle move, for `trol-edge inspect --program`."""

from __future__ import annotations

import dataclasses
from collections import Counter
from typing import Any

from rich.table import Table

from trol_edge.bundle.engines import GIVEN, PART, EngineSet, folder_of, read
from trol_edge.bundle.layer_graphs import ATTENTION, ATTENTION_STEP, HEAD, graphs_of, layer_of
from trol_edge.bundle.manifest import Bundle, GraphInfo
from trol_edge.bundle.programs import traffic_of
from trol_edge.bundle.sizes import shared_weights
from trol_edge.bundle.targets import TARGETS
from trol_edge.cli.show import out, print_json
from trol_edge.errors import BackendError, BundleError, UsageError
from trol_edge.plan.subject import TEXT_TOKENS
from trol_edge.program.traffic import Moved, Traffic

Products = dict[str, tuple[int, int]]  # type -> operations planned, and found
STEP = ", step"  # what an engine of a layer is called when it runs one token
SMALL = 100_000  # kernels that move less share a row


def show_programs(bundle: Bundle, tokens: int | None, filled: int | None, as_json: bool) -> None:
    """Print every engine's kernels and bytes. tokens: of a prompt; filled: rows of the cache that are in use.

    What cannot be read from an engine is said in its place. Raises UsageError for sizes that the bundle cannot have.
    """
    manifest = bundle.manifest
    tiles = manifest.image.most_tiles
    if tokens is None:
        tokens = min(manifest.context, tiles * manifest.spec.vision.tokens_per_image + TEXT_TOKENS)
    filled = tokens if filled is None else filled
    if not 1 <= tokens <= manifest.context or not 0 <= filled <= manifest.context:
        raise UsageError(f"{tokens} tokens and {filled} filled rows: the bundle's context is {manifest.context}")
    dims = {"images": tiles, "tokens": tokens, "slots": max(tokens, filled)}
    sets = [read(bundle, name) for name in TARGETS if folder_of(bundle, name).exists()]
    if not sets:
        raise BundleError(f"{bundle.folder}: has no engines; make them with `trol-edge build`")
    found: dict[str, dict[str, Traffic | str]] = {}
    products: dict[str, dict[str, Products]] = {}
    for engines in sets:
        target = engines.key.target
        for name, graph in graphs_of(bundle, engines.engines).items():
            for label, sizes, rows in _runs(name, dims, filled, manifest.graphs["traverse"].gives_rows):
                traffic = _traffic(bundle, engines, name, graph, sizes, rows)
                found.setdefault(target, {})[label] = traffic
                products.setdefault(target, {})[label] = _products(graph, sizes, traffic)
    if as_json:
        given = {"tokens": tokens, "filled": filled, "images": tiles}
        shown = {t: {n: _to_dict(x, products[t][n]) for n, x in of.items()} for t, of in found.items()}
        print_json(given | {"engines": shown})
        return
    for engines in sets:
        out.print(
            f"{manifest.model}, {engines.precision}, {engines.key.library}: bytes of one run, counted in the engines' "
            f"programs, for {tokens} tokens of a prompt, {filled} filled rows, {tiles} picture(s) or tile(s)"
        )
        for name, traffic in found[engines.key.target].items():
            most = _most(name, manifest.graphs["traverse"].gives_rows)
            label = f"{name}, {most} tokens at a time" if most is not None and tokens > most else name
            # Layers are alike, so the kernels of the first one stand for all.
            kernels = not layer_of(name.removesuffix(STEP))
            _print(label, traffic, products[engines.key.target][name], kernels)


def _most(name: str, gives_rows: bool) -> int | None:
    """The most tokens of a run of an engine, if there is a limit below the context."""
    if name == ATTENTION or layer_of(name) is not None:
        return GIVEN if gives_rows else PART
    return GIVEN if name == "traverse" and gives_rows else None


def _runs(name: str, dims: dict[str, int], filled: int, gives_rows: bool) -> list[tuple[str, dict[str, int], int]]:
    """An engine's runs: what to call each, its sizes, and the filled rows of the cache. Those of a layer have two."""
    # A step adds one row to those that are filled, and some engines take a prompt in parts.
    step = (name, dims | {"tokens": 1, "slots": max(1, filled)}, filled)
    if name in ("vision", "step", ATTENTION_STEP, HEAD):
        return [step]
    most = _most(name, gives_rows)
    prompt = (name, dims if most is None else dims | {"tokens": min(dims["tokens"], most)}, dims["slots"])
    return [prompt] if layer_of(name) is None else [prompt, (name + STEP, *step[1:])]


def _traffic(
    bundle: Bundle, engines: EngineSet, name: str, graph: GraphInfo, dims: dict[str, int], filled: int
) -> Traffic | str:
    """The traffic of an engine, or why it cannot be seen."""
    from trol_edge.runtimes.trt.programs import programs

    try:
        profiles = programs(bundle, engines, name, graph, dims)
        return traffic_of(graph, bundle.manifest.context, profiles, dims, filled, shared_weights(bundle))
    except (BundleError, BackendError) as error:
        return str(error)


def _products(graph: GraphInfo, dims: dict[str, int], traffic: Traffic | str) -> Products:
    """Operations of an engine's products by type: asked for by the plan, and found in the program."""
    from trol_edge.runtimes.trt import products

    if isinstance(traffic, str) or graph.costs is None:
        return {}
    return products.table(products.operations(graph, dims), products.products(traffic))


def _print(name: str, traffic: Traffic | str, products: Products, kernels: bool) -> None:
    if isinstance(traffic, str):
        out.print(f"{name}: nothing is known of its program: {traffic}", soft_wrap=True)
        return
    steps = name in ("step", ATTENTION_STEP) or name.endswith(STEP)
    times = f", {traffic.ratio:.2f} times what it must" if steps else ""
    out.print(
        f"{name}: moves {_mb(traffic.moved)} MB{times}; constants {_mb(traffic.constants)}, filled rows "
        f"{_mb(traffic.cache)}, results {_mb(traffic.results)}; holds {_mb(traffic.scratch)} MB of scratch",
        soft_wrap=True,
    )
    if not kernels:
        return
    table = Table(box=None, padding=(0, 1))
    for column in ("runs", "kernel", "product", "read MB", "written MB"):
        table.add_column(column, justify="left" if column in ("kernel", "product") else "right")
    alike: dict[tuple[str, str], list[Moved]] = {}
    for moved in traffic.kernels:
        small = moved.read + moved.written < SMALL
        key = (f"others, below {SMALL / 1e6} MB", "") if small else (moved.kernel.name, moved.product)
        alike.setdefault(key, []).append(moved)
    for (kernel, product), group in sorted(alike.items(), key=lambda item: -sum(m.read + m.written for m in item[1])):
        read, written = sum(m.read for m in group), sum(m.written for m in group)
        table.add_row(str(len(group)), kernel, product, _mb(read), _mb(written))
    out.print(table)
    for kind, (asked, done) in products.items():
        out.print(f"  products, {kind}: {asked / 1e9:.3f} billion operations planned, {done / 1e9:.3f} in the program")
    wasted: Counter[str] = Counter()
    for avoidable in traffic.avoidable:
        wasted[avoidable.kind] += avoidable.bytes
    for kind, size in wasted.most_common():
        whats = [a.what for a in traffic.avoidable if a.kind == kind]
        more = f", and {len(whats) - 3} more" if len(whats) > 3 else ""
        out.print(f"  avoidable, {kind}: {_mb(size)} MB: {'; '.join(whats[:3])}{more}", soft_wrap=True)


def _mb(size: int) -> str:
    return f"{size / 1e6:.1f}"


def _to_dict(traffic: Traffic | str, products: Products) -> dict[str, Any]:
    if isinstance(traffic, str):
        return {"unknown": traffic}
    kernels = [
        {
            "name": moved.kernel.name,
            "layers": list(moved.kernel.layers),
            "product": moved.product,
            "operations": moved.operations,
            "reads": moved.reads,
            "writes": moved.writes,
        }
        for moved in traffic.kernels
    ]
    totals = {key: getattr(traffic, key) for key in ("moved", "ideal", "ratio", "constants", "cache", "results")}
    avoidable = [dataclasses.asdict(a) for a in traffic.avoidable]
    table = {kind: {"planned": asked, "found": done} for kind, (asked, done) in products.items()}
    return totals | {"scratch": traffic.scratch, "avoidable": avoidable, "products": table, "kernels": kernels}
