"""The verbs run, demo and inspect, which ask a bundle or show its contents."""

from __future__ import annotations

import dataclasses
import json
import math
import sys
from pathlib import Path
from typing import Annotated, Any, cast

import typer
from rich.table import Table

from trol_edge.bundle.sizes import cache_bytes
from trol_edge.cli.show import (
    PICTURE_BYTES,
    STDIN,
    Fallback,
    ImageTokens,
    Json,
    MaxTiles,
    OfOrt,
    Threads,
    TrustedKeys,
    err,
    extra,
    out,
    print_json,
    standard_input,
)
from trol_edge.errors import UsageError
from trol_edge.prompt.images import Picture

PROMPT_BYTES = 16 << 20  # most bytes of a prompt that are read from standard input


def run(
    bundle: Annotated[Path, typer.Argument(help="Bundle folder.")],
    prompt: Annotated[str, typer.Option("-p", "--prompt", help="Question to ask; - reads it from standard input.")],
    image: Annotated[
        list[Path] | None,
        typer.Option("-i", "--image", help="Picture file, repeatable; - reads one from standard input."),
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Longest answer, in tokens.")] = 256,
    temperature: Annotated[float, typer.Option(help="Temperature of the sampling; 0 is greedy.")] = 0.0,
    top_k: Annotated[int, typer.Option(help="Sample from the k most probable tokens; 0 allows all.")] = 0,
    top_p: Annotated[
        float, typer.Option(help="Sample from the fewest tokens with this total probability; 1 allows all.")
    ] = 1.0,
    min_p: Annotated[
        float, typer.Option(help="Drop tokens below this share of the highest probability; 0 allows all.")
    ] = 0.0,
    repetition_penalty: Annotated[float, typer.Option(help="Penalty for repeated tokens; 1 is none.")] = 1.0,
    seed: Annotated[int | None, typer.Option(help="Sampling seed.")] = None,
    stop: Annotated[list[str] | None, typer.Option(help="End the answer before this text; repeatable.")] = None,
    bits: Annotated[
        int | None,
        typer.Option(help="Bits of the numbers in pictures with more than 8 bits per channel: 8 to 16."),
    ] = None,
    image_tokens: ImageTokens = 1.0,
    max_tiles: MaxTiles = None,
    long_context: Annotated[
        bool, typer.Option("--long-context", help="Use the long rope factors from the first token on (trol-3.8b).")
    ] = False,
    threads: Threads = None,
    provider: OfOrt = None,
    fallback: Fallback = None,
    trusted_key: TrustedKeys = None,
    as_json: Json = False,
) -> None:
    """Ask a bundle a question, with or without pictures; the answer streams to standard output."""
    from trol_edge.runtime import Runtime

    prompt, pictures = _given(prompt, image or [])
    ids: list[int] = []
    text = ""
    with Runtime(
        bundle,
        threads=threads,
        provider=cast(Any, provider),
        fallback=cast(Any, fallback),
        trusted_keys=trusted_key or None,
    ) as runtime:
        for piece in runtime.stream(
            prompt,
            pictures,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            min_p=min_p,
            repetition_penalty=repetition_penalty,
            seed=seed,
            stop=stop or (),
            bits=bits,
            image_tokens=image_tokens,
            max_tiles=max_tiles,
            long_context=long_context,
        ):
            ids += piece.token_ids
            text += piece.text
            if not as_json:
                print(piece.text, end="", flush=True)
    assert piece.timings is not None
    if as_json:
        timings = dataclasses.asdict(piece.timings)
        reason = {"finish_reason": piece.finish_reason, "rope": piece.rope}
        print_json({"text": text, "token_ids": ids, **reason, "timings": timings})
        return
    t = piece.timings
    ended = str(piece.finish_reason) + ("" if piece.rope == "plain" else f", {piece.rope} rope factors")
    print()
    err.print(
        f"{len(ids)} tokens, {ended}; ms: preprocess {t.preprocess_ms:.1f}, vision {t.vision_ms:.1f}, "
        f"prefill {t.prefill_ms:.1f}, decode {t.decode_ms:.1f}",
        style="dim",
    )


def _given(prompt: str, images: list[Path]) -> tuple[str, list[Picture]]:
    """The question and the pictures; those on standard input or in a pipe of the shell are read."""
    if sum(str(given) in STDIN for given in [prompt, *images]) > 1:
        raise UsageError("standard input holds one thing: give - once, for the prompt or for one picture")
    if prompt in STDIN:
        try:
            prompt = standard_input(PROMPT_BYTES).decode("utf-8-sig").rstrip("\r\n")
        except UnicodeDecodeError as error:
            raise UsageError(f"the prompt on standard input is not UTF-8 ({error}); convert it first") from error
    pictures: list[Picture] = []
    for path in images:
        if str(path) in STDIN:
            pictures.append(standard_input(PICTURE_BYTES))
        elif path.is_fifo():  # such as <(...), which can be read only once
            with path.open("rb") as pipe:
                pictures.append(pipe.read(PICTURE_BYTES))
        else:
            pictures.append(path)
    return prompt, pictures


def inspect(
    bundle: Annotated[Path, typer.Argument(help="Bundle folder.")],
    trusted_key: TrustedKeys = None,
    program: Annotated[
        bool, typer.Option("--program", help="Show instead what the engines' kernels read and write.")
    ] = False,
    tokens: Annotated[
        int | None, typer.Option(help="Tokens of the prompt for --program.  [default: one picture and a question]")
    ] = None,
    filled: Annotated[
        int | None, typer.Option(help="Filled rows of the K/V cache for --program.  [default: those of the prompt]")
    ] = None,
    as_json: Json = False,
) -> None:
    """Show what is in a bundle: graphs, operators, inputs and outputs, weights and the bytes a step reads.

    With --program, show for each engine what its kernels read and write, and what of it could be avoided.
    """
    from trol_edge.bundle.manifest import Bundle

    if program:
        from trol_edge.cli.programs import show_programs

        show_programs(Bundle(bundle, trusted_key or None), tokens, filled, as_json)
        return
    if tokens is not None or filled is not None:
        raise UsageError("--tokens and --filled are for --program; add it")
    from trol_edge.bundle.sizes import device_bytes, embedding_bytes, layered_bytes, loaded_bytes, shares_matrices
    from trol_edge.bundle.targets import is_gpu

    opened = Bundle(bundle, trusted_key or None)
    manifest, tensors = opened.manifest, opened.weights().tensors
    graphs = manifest.graphs.items()
    stored = {name: sum(tensors[w].nbytes for w in graph.weights if w in tensors) for name, graph in graphs}
    as_float = {name: sum(loaded_bytes(w, tensors) for w in graph.weights) for name, graph in graphs}
    first, both = (cache_bytes(manifest.graphs[name].inputs, manifest.context) for name in ("step", "traverse"))
    kv, second_kv = first // manifest.context, (both - first) // manifest.context
    lora = {name: sum(".lora_" in w for w in graph.weights) for name, graph in manifest.graphs.items()}
    used = {w for graph in manifest.graphs.values() for w in graph.weights}
    if as_json:
        data = dataclasses.asdict(manifest)
        data["weights"] = {n: {"dtype": t.dtype, "shape": t.shape, "bytes": t.nbytes} for n, t in tensors.items()}
        data["weight_bytes"], data["weight_bytes_float32"] = stored, as_float
        if is_gpu(manifest.target):
            apart, shared = device_bytes(opened)
            sizes = {"apart": apart, "shared": shared, "by_layer": layered_bytes(opened)}
            data["device_bytes"] = sizes | {"is_shared": shares_matrices(opened)}
        data["kv_bytes_per_token"] = kv  # of the first pass's set; prefix reuse keeps the second pass's, too
        data["second_kv_bytes_per_token"] = second_kv
        print_json(data)
        return
    spec = manifest.spec
    square = "picture" if manifest.image.most_tiles == 1 else f"tile (1 to {manifest.image.most_tiles} a picture)"
    out.print(
        f"{manifest.model} ({spec.family}), {manifest.created_by}, target {manifest.target}, context "
        f"{manifest.context} tokens\n{manifest.passes}, hidden {spec.hidden_size}, "
        f"{spec.num_heads} heads, {spec.num_kv_heads} K/V heads, vocabulary {spec.vocab_size}, "
        f"{spec.vision.tokens_per_image} tokens per {square} of {spec.vision.image_size} x {spec.vision.image_size}\n"
        f"{sum(math.prod(t.shape) for t in tensors.values()):,} numbers in {len(tensors)} tensors, each stored once, "
        f"{sum(t.nbytes for t in tensors.values()) / 1e6:.1f} MB; tokenizer: {'tokenizer.json' in manifest.files}"
    )
    for library, version in manifest.requires.items():
        out.print(f"needs {library} {version} or newer")
    for note in manifest.notes:
        out.print(f"note: {note}")
    out.print(_precision(manifest), style="italic")
    if manifest.distance:
        far = ", ".join(f"{kind} {value:.2g}" for kind, value in manifest.distance.items() if kind != "tokens")
        same = manifest.distance.get("tokens", 1.0)
        out.print(f"distance to FP32 on the self-test: {far}; {100 * same:.0f} % of the best tokens are the same")
    parts = Table("part", "Linears", "numbers", "MB", box=None)
    for name, part in manifest.parts.items():
        linears = ", ".join(f"{count} {precision}" for precision, count in sorted(part.linears.items())) or "none"
        parts.add_row(name, linears, f"{part.numbers:,}", f"{part.bytes / 1e6:.2f}")
    out.print(parts)
    least, size = sum(part.bytes for part in manifest.parts.values()), sum(f.bytes for f in manifest.files.values())
    out.print(
        f"Bundle {size / 1e6:.2f} MB; these parts take at least {least / 1e6:.2f} MB: "
        f"{100 * (size / least - 1):+.1f} % (graphs, rotary tables, tokenizer)"
    )
    for name, graph in manifest.graphs.items():
        out.print(f"{name} ({graph.file})", style="italic")
        table = Table(show_header=False, box=None, padding=(0, 1))
        for title, ports in (("inputs", graph.inputs), ("outputs", graph.outputs)):
            table.add_row(title, _ports(ports))
        table.add_row(
            "operators", ", ".join(f"{op} {n}" for op, n in sorted(graph.operators.items(), key=lambda x: -x[1]))
        )
        table.add_row(
            "weights",
            f"{len(graph.weights)} tensors ({lora[name]} LoRA), {stored[name] / 1e6:.2f} MB stored, "
            f"{as_float[name] / 1e6:.2f} MB in memory",
        )
        out.print(table)
    form = "as computed" if manifest.plan.quantized else "float32"
    sets = "with prefix reuse (the default), one without"
    if is_gpu(manifest.target):
        sets = "always, because engines keep both (by layer: one without prefix reuse)"
    row = embedding_bytes(opened) // manifest.spec.embedding_rows
    if is_gpu(manifest.target):
        apart, shared = device_bytes(opened)
        own = "shared" if shares_matrices(opened) else "apart"
        out.print(
            f"Weights on a device: {apart / 1e6:.2f} MB with traverse and step apart, {shared / 1e6:.2f} MB with "
            f"--shared-weights (not for int4); this bundle: {own}. With engines by layer: "
            f"{layered_bytes(opened) / 1e6:.2f} MB."
        )
    out.print(
        f"A step reads {as_float['step'] / 1e6:.2f} MB of weights ({form}, each once, {lora['step']} LoRA tensors), "
        f"one embedding row of {row} bytes, and the first pass's K/V cache.\n"
        f"K/V cache, per session: {kv} bytes per token in the first pass's set, {second_kv} in the second's; "
        f"{first / 1e6:.1f} and {(both - first) / 1e6:.1f} MB; two sets, {both / 1e6:.1f} MB, {sets}.\n"
        f"In no graph: {', '.join(sorted(tensors.keys() - used))} (looked up by the runtime)."
    )


def demo(
    bundle: Annotated[Path, typer.Argument(help="Bundle folder.")],
    trusted_key: TrustedKeys = None,
) -> None:
    """Ask a bundle about the picture that ships with this project, and say what to type next."""
    from trol_edge.bundle.names import TOKENIZER
    from trol_edge.runtime import Runtime

    with extra("export"):
        from trol_edge.export.reference.hub import shipped_folder, shipped_like

    with Runtime(bundle, trusted_keys=trusted_key or None) as runtime:
        folder = shipped_folder(shipped_like(runtime.bundle.manifest.model))
        question = json.loads((folder / "report.json").read_text(encoding="utf-8"))["demo"]["question"]
        picture = folder / "scene.png"
        shown = picture.relative_to(Path.cwd()) if picture.is_relative_to(Path.cwd()) else picture
        if TOKENIZER in runtime.bundle.manifest.files:
            answer = runtime.generate(question, picture)
            print(f"picture:  {shown}\nquestion: {question}\nanswer:   {answer}\nbundle:   {bundle}\n")
        else:
            print(f"bundle:   {bundle} (no tokenizer in its checkpoint, so it serves token ids only)\n")
    here = Path(sys.executable).parent
    tools = here.relative_to(Path.cwd()) if here.is_relative_to(Path.cwd()) else here
    print(f"Next:\n  {tools}/trol-edge run {bundle} --image {shown} --prompt 'Describe the scene.'")
    print(f"  {tools}/trol-edge inspect {bundle}")
    code = f"import trol_edge; print(trol_edge.Runtime('{bundle}').generate('{question}', '{shown}'))"
    print(f'  {tools}/python -c "{code}"')


def _precision(manifest: Any) -> str:
    """Describe the recipe of a bundle in one line."""
    plan = manifest.plan
    text = f"precision {plan.recipe}, the rest computes in {plan.compute}"
    text += f", keys and values kept in {plan.kv}" if plan.kv else ""
    if plan.observer:
        text += f", activation scales by {plan.observer}"
    if manifest.calibration:
        text += f", calibrated on {manifest.calibration.samples} samples"
    return text + (f"; kept in fp32: {', '.join(plan.kept_fp32)}" if plan.kept_fp32 else "")


def _ports(ports: Any) -> str:
    """Describe ports in one line, with the cache (two tensors per layer) as one entry."""
    shown = [p for p in ports if not p.name.startswith(("past_", "present_"))]
    cache = [p for p in ports if p not in shown]
    text = [f"{p.name} {p.dtype} [{', '.join(map(str, p.shape))}]" for p in shown]
    if cache:
        shape = ", ".join(map(str, cache[0].shape))
        text.append(f"{cache[0].name} .. {cache[-1].name} {cache[0].dtype} [{shape}] x {len(cache)}")
    return "; ".join(text)
