"""The command line: one command, a verb per task. Only this file prints and decides exit codes."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import resource
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, cast

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    Progress,
    TaskID,
    TaskProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table

from trol_edge._version import __version__
from trol_edge.errors import BackendError, TrolEdgeError, UsageError

app = typer.Typer(
    help="TroL vision-language models on robots: checkpoint -> ONNX graphs -> bundle -> answers.",
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    add_completion=False,
)
out, err = Console(highlight=False), Console(stderr=True, highlight=False)

CHECKPOINTS = Path("build/checkpoints")  # where downloads are kept
SENSITIVITY_SAMPLES = 8  # on which it is measured what each Linear costs: a run of the model each
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of text.")]
Force = Annotated[bool, typer.Option("--force", help="Replace the output folder if it exists.")]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command line; returns the exit code: 0, 1 for an error of ours, 2 for bad usage, 130 after Ctrl-C."""
    try:
        result = app(args=list(sys.argv[1:] if arguments is None else arguments) or ["--help"], standalone_mode=False)
    except TrolEdgeError as error:
        err.print(f"error: {error}", style="red", markup=False, soft_wrap=True)
        return 1
    except typer.Exit as stop:
        result = stop.exit_code
    except (KeyboardInterrupt, typer.Abort):
        result = 130
    except BrokenPipeError:
        return 0
    except Exception as error:
        if hasattr(error, "format_message") and hasattr(error, "exit_code"):  # the terminal library's usage errors
            err.print(f"error: {error.format_message()}\nSee trol-edge --help.", markup=False)
            return int(error.exit_code)
        raise
    if result == 130:
        err.print("interrupted; nothing half-written was left behind")
    return result if isinstance(result, int) else 0


@app.command(epilog="Example: trol-edge export trol-1.8b -o build/trol-1.8b   (fetches it first; or give a folder)")
def export(
    checkpoint: Annotated[
        str, typer.Argument(help="Checkpoint folder, or a model name: trol-nano, trol-nano-phi3, trol-1.8b, ...")
    ],
    output: Annotated[Path, typer.Option("-o", "--output", help="Bundle folder to write.")],
    model: Annotated[str | None, typer.Option(help="Name of the model in the bundle.")] = None,
    target: Annotated[
        str,
        typer.Option(
            help="cpu: for ONNX Runtime. rtx, tensorrt, jetson-jp6 ..: for TensorRT (trol-edge targets, then trol-edge "
            "build). onnx: self-contained files for other tools."
        ),
    ] = "cpu",
    context: Annotated[
        int | None,
        typer.Option(
            help="Tokens of prompt and answer together: KV cache capacity.  [default: 2048, 2560 for trol-3.8b]"
        ),
    ] = None,
    precision: Annotated[
        str, typer.Option(help="fp32, fp16, int8, int4, fp8, or a JSON file that says it per layer (CONTRIBUTING.md).")
    ] = "fp32",
    calibration: Annotated[
        Path | None,
        typer.Option(help="Folder of `trol-edge calibrate`.  [default: calibration-<checkpoint> beside the bundle]"),
    ] = None,
    block: Annotated[int | None, typer.Option(help="int4: inputs that share a scale, 32, 64 or 128.")] = None,
    observer: Annotated[
        str | None, typer.Option(help="How activation scales are found: minmax, percentile, entropy or mse.")
    ] = None,
    lm_head: Annotated[str | None, typer.Option(help="Precision of the output layer.")] = None,
    vision: Annotated[str | None, typer.Option(help="Precision of vision tower and projector.")] = None,
    scaling: Annotated[
        bool | None, typer.Option("--scaling/--no-scaling", help="Rescale channels (SmoothQuant, AWQ).")
    ] = None,
    max_loss: Annotated[
        float | None,
        typer.Option(help="Raise as few Linears as keep the logits' KL divergence within this, nats (trol-edge mix)."),
    ] = None,
    selftest: Annotated[
        bool, typer.Option("--selftest/--no-selftest", help="Record what the FP32 reference computes, for verify.")
    ] = True,
    shared_weights: Annotated[
        bool,
        typer.Option(
            "--shared-weights",
            help="TensorRT, 8 GB boards: traverse and step read one copy of their matrices (fp16, int8).",
        ),
    ] = False,
    checkpoints: Annotated[Path, typer.Option(help="Where downloads are kept.")] = CHECKPOINTS,
    revision: Annotated[str | None, typer.Option(help="Commit of the hub repository.")] = None,
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Trace a checkpoint into ONNX graphs and write a bundle."""
    with _extra("export"):
        from trol_edge.export import pipeline
        from trol_edge.export.quantize.recipes import read_options
    options = read_options(precision, block=block, observer=observer, lm_head=lm_head, vision=vision, scaling=scaling)
    folder, known = _checkpoint(checkpoint, checkpoints, revision)
    model = model or known
    start = time.perf_counter()
    with _progress(quiet=as_json) as progress:
        statistics = _statistics(calibration, folder, None, _calibration_of(folder, output), progress)
        if max_loss is not None:
            from trol_edge.calibration import samples as sampling
            from trol_edge.calibration.sensitivity import find_plan

            found = find_plan(folder, statistics, sampling.load(None, SENSITIVITY_SAMPLES), options, max_loss, progress)
            if not found.reached:
                raise UsageError(
                    f"--max-loss {max_loss:g} nats: {found.nats:.2e} are lost even with {len(found.linears)} of "
                    f"{len(found.sensitivity)} Linears raised; choose a higher limit, or a recipe of more bits"
                )
            options = found.mixed()
        manifest = pipeline.export(
            folder,
            output,
            model=model,
            target=target,
            context=context,
            options=options,
            shared_weights=shared_weights,
            calibration=statistics,
            record_selftest=selftest,
            overwrite=force,
            progress=progress,
        )
    size = sum(info.bytes for info in manifest.files.values())
    seconds, peak = time.perf_counter() - start, _peak_bytes()
    if as_json:
        _print_json({"bundle": str(output), "bytes": size, "seconds": seconds, "peak_bytes": peak})
        return
    for note in manifest.notes:
        err.print(f"note: {note}", markup=False)
    out.print(
        f"{manifest.model}: {size / 1e6:.1f} MB in {escape(str(output))}, {seconds:.0f} s, "
        f"peak memory {peak / 1e9:.2f} GB"
    )


@app.command(
    epilog='Example: trol-edge run build/trol-nano --image scene.png --prompt "What is left of the red circle?"'
)
def run(
    bundle: Annotated[Path, typer.Argument(help="Bundle folder.")],
    prompt: Annotated[str, typer.Option("-p", "--prompt", help="The question.")],
    image: Annotated[list[Path] | None, typer.Option("-i", "--image", help="Picture file; repeat for several.")] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Longest answer, in tokens.")] = 256,
    temperature: Annotated[float, typer.Option(help="0: greedy.")] = 0.0,
    top_k: Annotated[int, typer.Option(help="0: all.")] = 0,
    top_p: Annotated[float, typer.Option(help="1: all.")] = 1.0,
    min_p: Annotated[float, typer.Option(help="0: all.")] = 0.0,
    repetition_penalty: Annotated[float, typer.Option(help="1: none.")] = 1.0,
    seed: Annotated[int | None, typer.Option(help="Of the sampling.")] = None,
    stop: Annotated[list[str] | None, typer.Option(help="End the answer before this text; repeatable.")] = None,
    long_context: Annotated[
        bool, typer.Option("--long-context", help="Take the long rope factors from the first token on (trol-3.8b).")
    ] = False,
    threads: Annotated[int | None, typer.Option(help="Of the inference library.  [default: physical cores]")] = None,
    provider: Annotated[
        str | None,
        typer.Option(help="Run a GPU bundle's graphs by ONNX Runtime instead of engines: cuda, tensorrt, cpu."),
    ] = None,
    fallback: Annotated[
        str | None, typer.Option(help="A provider to go over to, with a warning, where engines cannot be loaded.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Ask a bundle a question, with or without pictures; the answer streams to standard output."""
    from trol_edge.runtime import Runtime

    runtime = Runtime(bundle, threads=threads, provider=cast(Any, provider), fallback=cast(Any, fallback))
    ids: list[int] = []
    text = ""
    for piece in runtime.stream(
        prompt,
        list(image or []),
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        seed=seed,
        stop=stop or (),
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
        _print_json({"text": text, "token_ids": ids, **reason, "timings": timings})
        return
    t = piece.timings
    ended = str(piece.finish_reason) + ("" if piece.rope == "plain" else f", {piece.rope} rope factors")
    print()
    err.print(
        f"{len(ids)} tokens, {ended}; ms: preprocess {t.preprocess_ms:.1f}, vision {t.vision_ms:.1f}, "
        f"prefill {t.prefill_ms:.1f}, decode {t.decode_ms:.1f}",
        style="dim",
    )


@app.command(epilog="Example: trol-edge inspect build/trol-nano --json")
def inspect(
    bundle: Annotated[Path, typer.Argument(help="Bundle folder.")],
    as_json: Json = False,
) -> None:
    """Show what is in a bundle: graphs, operators, inputs and outputs, weights and the bytes a step reads."""
    from trol_edge.bundle.derived import loaded_bytes
    from trol_edge.bundle.engines import device_bytes, shared_weights
    from trol_edge.bundle.manifest import Bundle
    from trol_edge.bundle.targets import TARGETS

    opened = Bundle(bundle)
    manifest, tensors = opened.manifest, opened.weights().tensors
    graphs = manifest.graphs.items()
    stored = {name: sum(tensors[w].nbytes for w in graph.weights if w in tensors) for name, graph in graphs}
    as_float = {name: sum(loaded_bytes(w, tensors) for w in graph.weights) for name, graph in graphs}
    kv = manifest.kv_bytes_per_token
    lora = {name: sum(".lora_" in w for w in graph.weights) for name, graph in manifest.graphs.items()}
    used = {w for graph in manifest.graphs.values() for w in graph.weights}
    if as_json:
        data = dataclasses.asdict(manifest)
        data["weights"] = {n: {"dtype": t.dtype, "shape": t.shape, "bytes": t.nbytes} for n, t in tensors.items()}
        data["weight_bytes"], data["weight_bytes_float32"] = stored, as_float
        if manifest.target not in ("cpu", "onnx"):
            apart, shared = device_bytes(opened)
            data["device_bytes"] = {"apart": apart, "shared": shared, "is_shared": bool(shared_weights(opened))}
        data["kv_bytes_per_token"] = kv  # of one set; prefix reuse keeps two
        _print_json(data)
        return
    spec = manifest.spec
    square = "picture" if manifest.image.most_tiles == 1 else f"tile (1 to {manifest.image.most_tiles} a picture)"
    out.print(
        f"[b]{escape(manifest.model)}[/b] ({spec.family}), {manifest.created_by}, target {manifest.target}, context "
        f"{manifest.context} tokens\n{spec.num_layers} layers x 2 passes, hidden {spec.hidden_size}, "
        f"{spec.num_heads} heads, {spec.num_kv_heads} K/V heads, vocabulary {spec.vocab_size}, "
        f"{spec.vision.tokens_per_image} tokens per {square} of {spec.vision.image_size} x {spec.vision.image_size}\n"
        f"{sum(math.prod(t.shape) for t in tensors.values()):,} numbers in {len(tensors)} tensors, each stored once, "
        f"{sum(t.nbytes for t in tensors.values()) / 1e6:.1f} MB; tokenizer: {'tokenizer.json' in manifest.files}"
    )
    for note in manifest.notes:
        out.print(f"note: {note}", markup=False)
    parts = Table("part", "Linears", "numbers", "MB", title=_precision(manifest), title_justify="left", box=None)
    for name, part in manifest.parts.items():
        linears = ", ".join(f"{count} {precision}" for precision, count in sorted(part.linears.items())) or "none"
        parts.add_row(name, linears, f"{part.numbers:,}", f"{part.bytes / 1e6:.2f}")
    out.print(parts)
    least, size = sum(part.bytes for part in manifest.parts.values()), sum(f.bytes for f in manifest.files.values())
    out.print(
        f"Bundle {size / 1e6:.2f} MB; these parts take {least / 1e6:.2f} MB at least: "
        f"{100 * (size / least - 1):+.1f} % (graphs, rotary tables, tokenizer)"
    )
    for name, graph in manifest.graphs.items():
        table = Table(title=f"{name} ({graph.file})", title_justify="left", show_header=False, box=None, padding=(0, 1))
        for title, ports in (("inputs", graph.inputs), ("outputs", graph.outputs)):
            table.add_row(title, escape(_ports(ports)))
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
    if manifest.target in TARGETS and TARGETS[manifest.target].gpu:
        sets = "always: engines keep both"
    row = tensors["embedding"].nbytes // tensors["embedding"].shape[0]
    if manifest.target not in ("cpu", "onnx"):
        apart, shared = device_bytes(opened)
        own = "shared" if shared_weights(opened) else "apart"
        out.print(
            f"Weights on a device: {apart / 1e6:.2f} MB with traverse and step apart, {shared / 1e6:.2f} MB with "
            f"--shared-weights (not for int4); this bundle: {own}."
        )
    out.print(
        f"A step reads {as_float['step'] / 1e6:.2f} MB of weights ({form}, each once, {lora['step']} LoRA tensors), "
        f"one embedding row of {row} bytes, and the first pass's K/V cache.\n"
        f"K/V cache, per session: {kv} bytes per token and set, {kv * manifest.context / 1e6:.1f} MB a set; two sets, "
        f"{2 * kv * manifest.context / 1e6:.1f} MB, {sets}.\n"
        f"In no graph: {', '.join(sorted(tensors.keys() - used))} (looked up by the runtime)."
    )


@app.command(epilog="Example: trol-edge synth --model trol-7b -o build/checkpoints/trol-7b")
def synth(
    model: Annotated[str, typer.Option(help="Whose published shapes: trol-1.8b, trol-3.8b or trol-7b.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="Checkpoint folder to write.")],
    seed: Annotated[int, typer.Option(help="Of the random weights.")] = 0,
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Write a checkpoint of random weights in the published layout, for full-size runs without the real weights."""
    with _extra("export"):
        from trol_edge.export.reference.synth import synth as write
    start = time.perf_counter()
    with _progress(quiet=as_json) as progress:
        result = write(model, output, seed=seed, overwrite=force, progress=progress)
    result |= {"checkpoint": str(output), "seconds": time.perf_counter() - start, "peak_bytes": _peak_bytes()}
    if as_json:
        _print_json(result)
        return
    out.print(
        f"{model}, random weights: {result['parameters']:,} parameters, {result['bytes'] / 1e9:.2f} GB in "
        f"{escape(str(output))}, {result['seconds']:.0f} s, peak memory {result['peak_bytes'] / 1e9:.2f} GB"
    )


@app.command(epilog="Example: trol-edge calibrate trol-1.8b --data pictures -o build/calibration/trol-1.8b")
def calibrate(
    checkpoint: Annotated[str, typer.Argument(help="Checkpoint folder, or a model name as for export.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="Folder for the statistics; continued if unfinished.")],
    data: Annotated[
        Path | None,
        typer.Option(help='Folder of pictures, or JSONL of {"image", "prompt"}.  [default: rendered scenes]'),
    ] = None,
    samples: Annotated[int, typer.Option(min=1, help="Use at most so many.")] = 32,
    compute: Annotated[
        str, typer.Option(help="float32, or bfloat16: up to 3 times faster on a CPU with AVX512-BF16.")
    ] = "float32",
    force: Annotated[bool, typer.Option("--force", help="Replace statistics of something else.")] = False,
    as_json: Json = False,
) -> None:
    """Measure a checkpoint's activations on pictures and prompts, one layer in memory at a time."""
    with _extra("export"):
        from trol_edge.calibration.run import calibrate as measure
    folder, _ = _checkpoint(checkpoint)
    start = time.perf_counter()
    with _progress(quiet=as_json) as progress:
        found = measure(folder, data, output, count=samples, compute=compute, overwrite=force, progress=progress)
    seconds, peak = time.perf_counter() - start, _peak_bytes()
    if as_json:
        result = {"statistics": str(output), "samples": found.samples, "skipped": found.state.skipped}
        result |= {"points": len(found.points), "checkpoint": found.checkpoint, "peaks": dict(found.peaks)}
        _print_json(result | {"seconds": seconds, "peak_bytes": peak})
        return
    for skipped in found.state.skipped:
        err.print(f"skipped: {skipped}", markup=False)
    out.print(
        f"{len(found.points)} points over {found.samples} samples ({len(found.state.skipped)} skipped) in "
        f"{escape(str(output))}, {seconds:.0f} s, peak memory {peak / 1e9:.2f} GB"
    )


@app.command(epilog="Example: trol-edge mix trol-nano --precision int4 --max-loss 0.01 -o build/mixed.json")
def mix(
    checkpoint: Annotated[str, typer.Argument(help="Checkpoint folder, or a model name as for export.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="JSON file to write, for export --precision.")],
    max_loss: Annotated[
        float, typer.Option(help="KL divergence of the logits that may be lost, nats (see `trol-edge compare`).")
    ],
    precision: Annotated[str, typer.Option(help="Recipe, or JSON file, to start from.")] = "int4",
    calibration: Annotated[
        Path | None, typer.Option(help="Folder of `trol-edge calibrate`.  [default: beside the output]")
    ] = None,
    data: Annotated[
        Path | None,
        typer.Option(help='Folder of pictures, or JSONL of {"image", "prompt"}.  [default: rendered scenes]'),
    ] = None,
    samples: Annotated[int, typer.Option(min=1, help="To measure on: at most so many.")] = SENSITIVITY_SAMPLES,
    as_json: Json = False,
) -> None:
    """Find which Linears need more bits: measure what each costs, raise as few as keep the loss within --max-loss."""
    with _extra("export"):
        from trol_edge.calibration import samples as sampling
        from trol_edge.calibration.sensitivity import find_plan
        from trol_edge.export.quantize.recipes import read_options
    options = read_options(precision)
    folder, _ = _checkpoint(checkpoint)
    with _progress(quiet=as_json) as progress:
        cache = calibration or _calibration_of(folder, output)
        statistics = _statistics(calibration, folder, data, cache, progress)
        found = find_plan(folder, statistics, sampling.load(data, samples), options, max_loss, progress)
    found.save(output)
    if as_json:
        result = dataclasses.asdict(found) | {"reached": found.reached, "plan": str(output)}
        _print_json(result)
        return
    for name, nats in sorted(found.sensitivity.items(), key=lambda item: -item[1])[:10]:
        raised = f" -> {found.linears[name].precision}" if name in found.linears else ""
        out.print(f"{nats:.2e} nats  {name}{raised}", markup=False)
    out.print(
        f"{options.recipe} as it is: {found.recipe_nats:.2e} nats; with {len(found.linears)} of "
        f"{len(found.sensitivity)} Linears raised: {found.nats:.2e}, {'within' if found.reached else 'NOT within'} "
        f"{max_loss:g}\nNext: trol-edge export {checkpoint} --precision {output} --calibration {cache} -o ..."
    )


@app.command(epilog="Example: trol-edge outliers export/checkpoints/trol-nano -o build/checkpoints/trol-nano-outliers")
def outliers(
    checkpoint: Annotated[Path, typer.Argument(help="Checkpoint folder.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="Checkpoint folder to write.")],
    factor: Annotated[float, typer.Option(help="Scale by this; the nearest power of two is taken.")] = 50.0,
    channels: Annotated[int, typer.Option(help="How many of each norm.")] = 4,
    seed: Annotated[int, typer.Option(help="Of the choice of channels.")] = 0,
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Make outlier channels that change no answer in float32, to see what quantization makes of them."""
    with _extra("export"):
        from trol_edge.calibration.outliers import make_outliers
    with _progress(quiet=as_json) as progress:
        result = make_outliers(
            checkpoint,
            output,
            factor=factor,
            channels=channels,
            seed=seed,
            overwrite=force,
            progress=progress,
        )
    if as_json:
        _print_json(result | {"checkpoint": str(output), "peak_bytes": _peak_bytes()})
        return
    out.print(
        f"{channels} channels of {result['norms']} norms x {result['factor']:g} in {escape(str(output))}, "
        f"{result['bytes'] / 1e6:.1f} MB ({len(result['widened'])} tensors stored as float32 to stay exact)"
    )


@app.command(epilog="Example: trol-edge evaluate build/trol-nano -n 500")
def evaluate(
    bundle: Annotated[Path, typer.Argument(help="Bundle folder of a model trained on the rendered scenes.")],
    number: Annotated[int, typer.Option("-n", "--number", min=1, help="Held-out questions to ask.")] = 2000,
    scale: Annotated[
        int, typer.Option(min=1, max=8, help="Size of the pictures, in 112 pixels a side; 2: several tiles.")
    ] = 1,
    report: Annotated[
        Path | None, typer.Option(help="Markdown file whose section about the bundle to rewrite.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Measure the accuracy of a trol-nano or trol-nano-phi3 bundle on held-out rendered scenes, by kind of question."""
    from trol_edge.calibration import evaluate as evaluation
    from trol_edge.runtime import Runtime

    runtime = Runtime(bundle)
    with _progress(quiet=as_json) as progress:
        score = evaluation.evaluate(runtime, number, progress, scale)
    text = evaluation.markdown(score, str(bundle))
    if report:
        evaluation.update_report(report, text)
    if as_json:
        _print_json(dataclasses.asdict(score) | {"short_percent": score.short})
    else:
        print(text)


@app.command(epilog="Example: trol-edge compare build/trol-nano build/trol-nano-int8 --scenes 2000 -o build/compare")
def compare(
    reference: Annotated[Path, typer.Argument(help="Bundle folder to compare with.")],
    bundles: Annotated[list[Path], typer.Argument(help="Bundle folders of the same checkpoint.")],
    data: Annotated[
        Path | None,
        typer.Option(help='Folder of pictures, or JSONL of {"image", "prompt"}.  [default: rendered scenes]'),
    ] = None,
    samples: Annotated[int, typer.Option(min=1, help="For layers and logits: at most so many.")] = 16,
    scenes: Annotated[int, typer.Option(min=0, help="Held-out rendered scenes to ask for the accuracy.")] = 0,
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="Folder for compare.json and the plot, compare.svg.")
    ] = None,
    threads: Annotated[int | None, typer.Option(help="Of the inference library.  [default: physical cores]")] = None,
    as_json: Json = False,
) -> None:
    """Show what bundles lost against a reference: per layer, in logits, in answers; and where it begins."""
    with _extra("export"):
        from trol_edge.calibration import compare as comparing
        from trol_edge.calibration import samples as sampling
    with _progress(quiet=as_json) as progress:
        chosen = sampling.load(data, samples, progress)
        found = comparing.compare(reference, bundles, chosen, scenes=scenes, threads=threads, progress=progress)
    if output:
        comparing.save(output, found)
    if as_json:
        _print_json([dataclasses.asdict(c) for c in found])
        return
    for skipped in chosen.skipped:
        err.print(f"skipped: {skipped}", markup=False)
    names = [escape(name) for name in comparing.names(found)]
    layers = Table("signal to noise, dB", *names, box=None, padding=(0, 2))
    for i, place in enumerate(found[0].places):
        layers.add_row(place.name, *(f"{c.places[i].mean_db:.1f}" for c in found))
    out.print(layers)
    summary = Table(f"against {escape(reference.name)}", *names, box=None, padding=(0, 2))
    for title, cells in comparing.summary(found):
        summary.add_row(title, *cells)
    out.print(summary)


@app.command(epilog="Example: trol-edge demo build/trol-nano")
def demo(bundle: Annotated[Path, typer.Argument(help="Bundle folder.")]) -> None:
    """Ask a bundle about the picture that ships with this project, and say what to type next."""
    from trol_edge.bundle.manifest import TOKENIZER
    from trol_edge.runtime import Runtime

    with _extra("export"):
        from trol_edge.export.reference.hub import shipped_folder, shipped_like

    runtime = Runtime(bundle)
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


@app.command(epilog="Example: trol-edge verify build/trol-nano --json")
def verify(
    bundle: Annotated[Path, typer.Argument(help="Bundle folder.")],
    every: Annotated[bool, typer.Option("--all", help="One line per stage instead of one per layer.")] = False,
    threads: Annotated[int | None, typer.Option(help="Of the inference library.  [default: physical cores]")] = None,
    as_json: Json = False,
) -> None:
    """Replay the self-test that export recorded; exit code 1 where a stage drifts more than its precision may."""
    from trol_edge.verify.replay import verify as replay

    report = replay(bundle, threads)
    if as_json:
        _print_json(report.json())
    else:
        table = Table("", "stage", "drift", "budget", "", box=None, padding=(0, 1))
        for title, stage in report.lines(every):
            mark = "ok" if stage.good else "[red]--[/red]"
            table.add_row(mark, title, f"{stage.drift:.1e}", f"{stage.budget:.0e}", escape(stage.text))
        out.print(table)
        where = f"{report.target}, {report.precision}, {report.runs_on}; {report.machine}; {report.seconds:.1f} s"
        out.print(f"{where}\n{report.verdict}", markup=False, soft_wrap=True)
    if report.first_wrong is not None:
        raise typer.Exit(1)


@app.command(epilog="Example: trol-edge soak build/trol-nano --minutes 10")
def soak(
    bundle: Annotated[Path, typer.Argument(help="Bundle folder, with a tokenizer.")],
    minutes: Annotated[float, typer.Option(help="How long.", min=0.01)] = 10.0,
    as_json: Json = False,
) -> None:
    """Ask, stop, fork, miss deadlines and feed bad frames from four threads; exit 1 for wrong answers or leaks."""
    from trol_edge.measure.soak import soak as run_soak

    shown = [-10.0]  # seconds at which a line was last printed

    def progress(seconds: float, resident: int) -> None:
        if seconds - shown[0] >= 10:
            shown[0] = seconds
            err.print(f"{seconds:6.0f} s  {resident / 1e6:8.1f} MB resident", markup=False)

    report = run_soak(bundle, 60 * minutes, progress)
    if as_json:
        _print_json({**dataclasses.asdict(report), "passed": report.passed})
    else:
        calls = ", ".join(f"{name} {count}" for name, count in sorted(report.calls.items()))
        out.print(f"{sum(report.calls.values())} calls in {report.seconds:.0f} s: {calls}")
        out.print(f"vision cache: {report.vision_hits} hits, {report.vision_misses} misses")
        if report.slope is None:
            out.print("memory: not judged, the run was shorter than a minute")
        else:
            slope = report.slope
            out.print(
                f"memory less free pages: {slope.mb_per_minute:+.3f} MB/min (least squares, first third left out), "
                f"{slope.growth_bytes / 1e6:+.2f} MB in all (2 standard errors: {slope.error_bytes / 1e6:.2f}), "
                f"allowed {slope.allowed_bytes / 1e6:.2f} MB "
                f"(1 % of {slope.resident_bytes / 1e6:.0f} MB, at least 4 MiB): {'flat' if slope.flat else 'NOT FLAT'}"
            )
        for line in report.wrong:
            out.print(f"wrong: {line}", markup=False)
        out.print("passed" if report.passed else "FAILED")
    if not report.passed:
        raise typer.Exit(1)


@app.command(epilog="Example: trol-edge profile build/trol-nano --size 640x480 --size none -o build/profile")
def profile(
    bundles: Annotated[list[Path], typer.Argument(help="Bundle folders: precisions, models, as many as you like.")],
    size: Annotated[
        list[str] | None, typer.Option(help="Picture size, or none; repeat for a sweep.  [default: 640x480]")
    ] = None,
    prompt_tokens: Annotated[
        list[int] | None,
        typer.Option(min=1, help="Length of the whole prompt; repeat for a sweep.  [default: a short question]"),
    ] = None,
    image: Annotated[Path | None, typer.Option("-i", "--image", help="Picture file, instead of --size.")] = None,
    tokens: Annotated[int, typer.Option(min=2, help="Tokens of each answer.")] = 32,
    warmup: Annotated[int, typer.Option(min=0, help="Answers before those that count.")] = 2,
    runs: Annotated[int, typer.Option(min=1, help="Answers that count, of each case.")] = 10,
    starts: Annotated[int, typer.Option(min=0, help="Fresh processes, page cache cold and warm each.")] = 3,
    threads: Annotated[int | None, typer.Option(help="Of the inference library.  [default: physical cores]")] = None,
    interval_ms: Annotated[float, typer.Option(min=5, help="Between two samples of the machine.")] = 100.0,
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="Folder for profile.json and the page, profile.html.")
    ] = None,
    baseline: Annotated[
        Path | None, typer.Option(help="An older profile.json: exit code 1 where something became slower.")
    ] = None,
    root: Annotated[Path, typer.Option(help="Where proc and sys lie, to read a recorded tree.")] = Path("/"),
    as_json: Json = False,
) -> None:
    """Measure latency, memory and energy of bundles on this machine, stage by stage; writes a page to look at."""
    from trol_edge.measure import record as profiles
    from trol_edge.measure import run as profile_run
    from trol_edge.measure.compare import compare as compared
    from trol_edge.measure.page import page
    from trol_edge.measure.samples import summary

    old = None if baseline is None else profiles.load(baseline)
    with _phases(quiet=as_json) as progress:
        found = profile_run.profile(
            bundles,
            sizes=[_size(text) for text in size or ["640x480"]],
            prompt_tokens=prompt_tokens or [None],
            image=image,
            tokens=tokens,
            warmup=warmup,
            runs=runs,
            starts=starts,
            threads=threads,
            interval_s=interval_ms / 1e3,
            root=root,
            progress=lambda line: progress(line, 0, 0),
        )
    if output is not None:  # before the comparison, which may refuse: minutes of measuring are not thrown away
        found.save(output / profiles.FILE)
        profiles.write(output / "profile.html", page(found))
    comparison = None if old is None else compared(old, found)
    if output is not None and old is not None:
        profiles.write(output / "profile.html", page(found, old, comparison))
    rows = summary(found)
    if as_json:
        against = None if comparison is None else dataclasses.asdict(comparison)
        _print_json({"machine": found.machine_name, "runs": rows, "baseline": against})
    else:
        _show_profile(found, rows)
        if comparison is not None:
            _show_comparison(comparison)
        if output is not None:
            out.print(f"{escape(str(output))}/profile.json, profile.html", soft_wrap=True)
    if comparison is not None and (comparison.slower or comparison.unjudged):
        raise typer.Exit(1)


@app.command(epilog="Example: trol-edge targets --json")
def targets(
    best: Annotated[bool, typer.Option("--best", help="Print the target to take on this machine, and why.")] = False,
    as_json: Json = False,
) -> None:
    """List the targets, and which of them this machine can build and run now, and why not."""
    from trol_edge.bundle.targets import NOT_YET, TARGETS
    from trol_edge.runtimes import doctor as room

    if best:
        name, why = room.best()
        if as_json:
            _print_json({"target": name, "why": why})
            return
        print(name)
        err.print(f"target {name}: {why}", markup=False, soft_wrap=True)
        return
    found = {status.target: status for status in room.statuses()}
    if as_json:
        _print_json({n: dataclasses.asdict(t) | dataclasses.asdict(found[n]) for n, t in TARGETS.items()})
        return
    table = Table(box=None, padding=(0, 1))
    for column in ("target", "machine", "library", "precisions", "builds", "runs"):
        table.add_column(column, no_wrap=column in ("target", "builds", "runs"))
    reasons: dict[str, list[str]] = {}
    for name, target in TARGETS.items():
        status = found[name]
        builds = "-" if not target.gpu else "yes" if status.builds else "no"
        runs = ("yes" if not target.gpu else "yes*") if status.runs else "no"
        row = (name, target.machine, status.found or target.library, " ".join(target.precisions), builds, runs)
        table.add_row(*(escape(text) for text in row))
        for why, what in ((status.why_no_build, "build"), (status.why_no_run, "run")):
            if why and not (what == "run" and why == status.why_no_build):
                reasons.setdefault(why, []).append(f"{name} ({what})" if status.builds else name)
    out.print(table)
    for why, names in reasons.items():
        out.print(f"no {', '.join(names)}: {why}", markup=False, soft_wrap=True)
    if any(status.runs and TARGETS[name].gpu for name, status in found.items()):
        out.print(f"* {NOT_YET}")
    out.print("What is missing, and why:")
    for name, target in TARGETS.items():
        out.print(f"  {name}: {'; '.join(target.missing)}", markup=False, style="dim", soft_wrap=True)


@app.command(epilog="Example: trol-edge build build/trol-nano-rtx")
def build(
    bundle: Annotated[Path, typer.Argument(help="Bundle folder, exported with a GPU target.")],
    target: Annotated[str | None, typer.Option(help="See trol-edge targets.  [default: the bundle's own]")] = None,
    memory: Annotated[
        float | None, typer.Option(help="GB of the device's memory, which engines and K/V cache must fit.")
    ] = None,
    workspace: Annotated[float | None, typer.Option(help="GB of scratch memory that one layer may ask for.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Build although the engines that are there serve.")] = False,
    as_json: Json = False,
) -> None:
    """Build a bundle's TensorRT engines: on the GPU that runs them, or anywhere with TensorRT for RTX."""
    from trol_edge.bundle.manifest import Bundle
    from trol_edge.runtimes.trt import build as trt_build

    start = time.perf_counter()
    with _phases(quiet=as_json) as progress:
        done = trt_build.build(
            Bundle(bundle),
            target,
            memory_bytes=None if memory is None else int(memory * 1e9),
            workspace_bytes=None if workspace is None else int(workspace * 1e9),
            force=force,
            progress=progress,
        )
    seconds, peak = time.perf_counter() - start, _peak_bytes()
    if as_json:
        data = dataclasses.asdict(done.engines) | {"built": done.built, "reason": done.reason}
        _print_json(data | {"folder": str(done.folder), "seconds": seconds, "peak_bytes": peak})
        return
    if not done.built:
        out.print(f"{escape(str(done.folder))}: up to date; --force builds again")
        return
    out.print(f"built, because: {done.reason}", markup=False, soft_wrap=True)
    for name, engine in done.engines.engines.items():
        ratio = engine.bytes / engine.weight_bytes  # of what stands in it; shared weights do not
        out.print(
            f"{name:8} {engine.bytes / 1e6:9.1f} MB ({ratio:.3f} x its weights), {engine.seconds:5.1f} s, "
            f"{len(engine.profiles)} profile(s); {', '.join(f'{n} {kind}' for kind, n in engine.layers.items())}",
            markup=False,
            soft_wrap=True,
        )
    out.print(
        f"{done.engines.key.library}, {done.engines.precision}: {escape(str(done.folder))}, {seconds:.0f} s, "
        f"peak memory {peak / 1e9:.2f} GB"
    )


@app.command(epilog="Example: trol-edge doctor build/trol-nano")
def doctor(
    bundle: Annotated[Path | None, typer.Argument(help="Bundle folder to look at, too.")] = None,
    as_json: Json = False,
) -> None:
    """Say what this machine is, what runs here and what is wrong; exit code 1 where something needed does not work."""
    from trol_edge.runtimes import doctor as room

    checks = room.examine(bundle)
    if as_json:
        _print_json([dataclasses.asdict(check) for check in checks])
    else:
        for check in checks:
            mark = "ok" if check.good else "!!" if check.needed else "--"
            out.print(f"{mark} {check.what}: {check.text}", markup=False, soft_wrap=True)
        wrong = [check.what for check in checks if check.needed and not check.good]
        out.print(f"does not work: {', '.join(wrong)}" if wrong else "nothing that is needed is wrong", markup=False)
    if any(check.needed and not check.good for check in checks):
        raise typer.Exit(1)


@app.command(epilog="Example: trol-edge plan --model trol-3.8b --device orin-nano-8gb --precision int4 --context 2048")
def plan(
    bundle: Annotated[Path | None, typer.Argument(help="Bundle folder; or --model, before there is one.")] = None,
    model: Annotated[
        str | None, typer.Option(help="trol-nano, trol-nano-phi3, trol-1.8b, trol-3.8b or trol-7b.")
    ] = None,
    device: Annotated[
        list[str] | None,
        typer.Option(
            help="Name, name:mode or a JSON file; several are compared. host: this machine, measured. "
            "[default: every Jetson; host for a bundle made for the CPU]"
        ),
    ] = None,
    precision: Annotated[
        list[str] | None, typer.Option(help="As for export; several are compared.  [default: all the device has]")
    ] = None,
    context: Annotated[int | None, typer.Option(help="Tokens of prompt and answer together.")] = None,
    tiles: Annotated[
        int | None, typer.Option(min=0, help="Pictures or tiles in the prompt.  [default: as many as one picture has]")
    ] = None,
    text: Annotated[int, typer.Option(min=1, help="Tokens of text in the prompt.")] = 84,
    answer: Annotated[int, typer.Option(min=1, help="Tokens of the answer.")] = 64,
    goal_ms: Annotated[float | None, typer.Option(help="Time to the first token that is wanted, milliseconds.")] = None,
    goal_tokens_per_second: Annotated[float | None, typer.Option(help="Speed of the answer that is wanted.")] = None,
    desktop: Annotated[bool, typer.Option("--desktop", help="The device shows a desktop, too.")] = False,
    reserve: Annotated[float, typer.Option(min=0, help="GB that must remain for the rest of the robot.")] = 0.5,
    show_device: Annotated[
        str | None, typer.Option(help="Print a device as JSON, to change and pass as --device.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Tell before owning the board: does it fit, how long would it take, and which precision is best."""
    from trol_edge.bundle.manifest import Bundle
    from trol_edge.bundle.targets import TARGETS
    from trol_edge.machine import devices
    from trol_edge.plan import estimate as planning

    if show_device is not None:
        print(devices.to_json(devices.find(show_device)[0]))
        return
    if (bundle is None) == (model is None):
        raise typer.BadParameter("give either a bundle folder or --model")
    if bundle is not None and (precision or context):
        raise typer.BadParameter("a bundle has its precision and context already; use --model to choose")
    fixed = None if bundle is None else planning.subject_of(Bundle(bundle))
    if not device:
        on_cpu = fixed is not None and fixed.target == "cpu"
        device = ["host"] if on_cpu else [n for n, d in devices.DEVICES.items() if d.target.startswith("jetson")]
    machines = []
    for name in device:
        if name == "host":
            from trol_edge.runtimes import rates

            machines.append(rates.host())
        else:
            machines.append(planning.machine_of(*devices.find(name)))
    work = planning.Workload(tiles, text, answer)
    subjects: dict[tuple[str, str], Any] = {}
    if fixed is None:
        assert model is not None
        with _extra("export"):
            from trol_edge.export import unbuilt
            from trol_edge.export.quantize.recipes import read_options
        shape = unbuilt.published(model, context)

    def subject(target: str, recipe: str) -> Any:
        if fixed is not None:
            return fixed
        if (target, recipe) not in subjects:
            subjects[target, recipe] = shape.subject(target, read_options(recipe))
        return subjects[target, recipe]

    plans, chosen = [], {}
    with _phases(quiet=as_json) as progress:
        for machine in machines:
            wanted = precision or ([fixed.precision] if fixed else [*machine.precisions])
            found = []
            for recipe in wanted:
                progress(f"{machine.name} {recipe}", 1, 1)
                finer = [p for p in planning.QUALITY if p in machine.precisions]
                lone = len(wanted) == 1 and recipe in finer and fixed is None
                below = finer[finer.index(recipe) + 1 :] if lone else []
                found.append(
                    planning.plan(
                        subject(machine.target, recipe),
                        machine,
                        work,
                        desktop=desktop,
                        reserve=int(reserve * 1e9),
                        smaller=functools.partial(map, functools.partial(subject, machine.target), below),
                    )
                )
            plans += found
            goal = None if goal_ms is None else goal_ms / 1000
            chosen[machine.name] = planning.best(found, goal, goal_tokens_per_second)
    if as_json:
        _print_json(
            {
                "plans": [planning.to_dict(p) for p in plans],
                "best": {name: None if p is None else p.subject.precision for name, p in chosen.items()},
            }
        )
        return
    _print_plans(plans, TARGETS)
    for name, p in chosen.items():
        if len([q for q in plans if q.machine.name == name]) > 1 or goal_ms or goal_tokens_per_second:
            goals = " and reaches the goal" if goal_ms or goal_tokens_per_second else ""
            said = (
                f"no precision here fits{goals}"
                if p is None
                else f"{p.subject.precision} is the finest that fits{goals}"
            )
            out.print(f"{name}: {said}", markup=False)


@app.command("version", epilog="Example: trol-edge version")
def version() -> None:
    """Print the version."""
    print(__version__)


def _size(text: str) -> tuple[int, int] | None:
    """ "640x480" as numbers; "none": no picture."""
    width, x, height = text.lower().partition("x")
    if text.lower() == "none":
        return None
    if not (x and width.isdecimal() and height.isdecimal()):
        raise typer.BadParameter(f"--size {text}: write it as 640x480 (width, height), or none")
    return int(width), int(height)


def _show_profile(profile: Any, rows: list[dict[str, Any]]) -> None:
    """Tables of a profile: the stages of every run, and what to know about them."""
    from trol_edge.measure.figures import number
    from trol_edge.measure.record import STAGES, STARTS, case_name

    peaks = profile.peaks
    rates = f"; {peaks.flops_per_s / 1e9:.0f} GFLOP/s, {peaks.bytes_per_s / 1e9:.0f} GB/s measured" if peaks else ""
    out.print(f"{profile.machine_name}{rates}", markup=False)
    titles = STAGES | STARTS
    runs = [(measured, run) for measured in profile.bundles for run in measured.runs]
    for (measured, run), row in zip(runs, rows, strict=True):
        title = f"{measured.bundle.folder} ({measured.bundle.precision}), {case_name(run.case)}"
        table = Table(title=escape(title), title_justify="left", box=None, padding=(0, 2))
        table.add_column("ms")
        for column in ("p50", "p90", "p99", "values"):
            table.add_column(column, justify="right")
        for key in (key for key in titles if key in row):
            table.add_row(titles[key], *(number(row[key][p]) for p in ("p50", "p90", "p99")), str(row[key]["n"]))
        out.print(table)
        rate, peak, used = row["tokens_per_s"], row["peak_rss_bytes"], row["energy"]
        said = [f"{number(rate)} tokens/s"] if rate else []
        said += [f"peak memory {peak / 1e6:.0f} MB"] if peak else []
        if used:
            said.append(f"{number(1e3 * used['token_j'])} mJ per token, {number(used['answer_j'])} J per answer")
        out.print(f"{', '.join(said)}; the projector is a part of the vision graph", markup=False, soft_wrap=True)
        for text in row["invalid"]:
            out.print(f"INVALID: {text}", markup=False, soft_wrap=True, style="bold red")
        out.print()
    for kind, style in (("partial", "yellow"), ("remarks", "dim")):
        for text in dict.fromkeys(text for row in rows for text in row[kind]):
            count = sum(text in row[kind] for row in rows)
            where = "" if count == len(rows) else f" ({count} of {len(rows)} runs)"
            out.print(f"{kind.removesuffix('s')}: {text}{where}", markup=False, soft_wrap=True, style=style)


def _show_comparison(comparison: Any) -> None:
    """What became slower against a baseline, and what could not be judged."""
    for text in comparison.remarks:
        out.print(f"remark: {text}", markup=False, soft_wrap=True, style="dim")
    for text in comparison.unjudged:
        out.print(f"not judged, invalid: {text}", markup=False, soft_wrap=True, style="bold red")
    for change in comparison.slower:
        out.print(
            f"slower: {change.where}: {change.what} {change.old:.4g} -> {change.new:.4g} {change.unit} "
            f"({100 * (change.new / change.old - 1):+.0f} %, noise {100 * change.threshold:.0f} %)",
            markup=False,
            soft_wrap=True,
            style="red",
        )
    if not comparison.slower:
        out.print(f"nothing of {len(comparison.changes)} figures became slower beyond noise")


def _checkpoint(given: str, downloads: Path = CHECKPOINTS, revision: str | None = None) -> tuple[Path, str | None]:
    """The folder of a checkpoint that was given as a folder or as a model's name (then fetched), and that name."""
    with _extra("export"):
        from trol_edge.export.reference import hub as models
    if Path(given).is_dir():
        return Path(given), None
    if "/" in given or given not in models.MODELS:
        raise typer.BadParameter(f"{given} is neither a checkpoint folder nor one of {', '.join(models.MODELS)}")
    return models.fetch(given, downloads / given, revision), given


def _statistics(given: Path | None, checkpoint: Path, data: Path | None, cache: Path, progress: Any) -> Any:
    """A function that loads the statistics of a Checkpoint from the folder given, or gathers them into `cache`."""

    def statistics(source: Any) -> Any:
        from trol_edge.calibration.run import calibrate
        from trol_edge.export.quantize.stats import Statistics

        if given is not None:
            return Statistics.load(given, source.identity())
        return calibrate(checkpoint, data, cache, progress=progress)

    return statistics


def _calibration_of(checkpoint: Path, output: Path) -> Path:
    """Where statistics of a checkpoint are kept that no folder was named for: beside what is made with them."""
    return output.parent / f"calibration-{checkpoint.resolve().name}"


def _print_plans(plans: Any, targets: Any) -> None:
    """A table with a row for each plan; where there is one plan only, all of it."""
    first = plans[0].subject
    out.print(f"{first.name}, context {first.context}; times expected (floor); GB = 1e9 bytes", markup=False)
    table = Table(box=None, padding=(0, 1))
    for column in ("device", "precision", "weights", "K/V", "remains", "first token, s", "tokens/s", "verdict"):
        words = column in ("device", "precision", "verdict")
        table.add_column(column, justify="left" if words else "right", no_wrap=column != "verdict")
    for p in plans:
        m = p.memory
        table.add_row(
            escape(p.machine.name),
            p.subject.precision,
            f"{m.weights / 1e9:.2f}",
            f"{m.cache / 1e9:.2f}",
            f"{m.remains / 1e9:.2f}",
            f"{p.first_token[1]:.2f} ({p.first_token[0]:.2f})",
            f"{p.tokens_per_second[1]:.1f} ({p.tokens_per_second[0]:.1f})",
            p.verdict,
        )
    out.print(table)
    for p in plans if len(plans) == 1 else []:
        m, gpu = p.memory, targets[p.machine.target].gpu
        for what, size in (
            ("weights", m.weights),
            (f"K/V cache, {m.cache_sets} sets", m.cache),
            ("activations", m.activations),
            ("runtime and libraries", m.runtime),
            ("operating system", m.system),
            ("remains for the rest of the robot", m.remains),
            ("peak of building the engines, alone", m.build),
        ):
            out.print(f"  {what:36}{size / 1e9:8.2f} GB", markup=False)
        for s in p.stages:
            dims = ", ".join(f"{n} {name}" for name, n in s.dims.items())
            out.print(
                f"  {s.graph} ({dims}): {s.expected * 1e3:.1f} ms expected, {s.floor * 1e3:.1f} at least; "
                f"{s.flops / 1e9:.1f} G operations, {s.bytes / 1e9:.2f} GB; most of it is {s.bound}",
                markup=False,
                soft_wrap=True,
            )
        if p.next_question is not None:
            out.print(f"  a second question about the picture: {p.next_question * 1e3:.0f} ms", markup=False)
        for note in p.machine.notes:
            out.print(f"  {note}", markup=False, style="dim", soft_wrap=True)
        if gpu:
            from trol_edge.bundle.targets import NOT_YET
            from trol_edge.plan import estimate as planning

            out.print(
                f"  expected: {planning.BANDWIDTH:.0%} of the bandwidth, "
                + ", ".join(f"{rate:.0%} of {kind}" for kind, rate in planning.ARITHMETIC.items())
                + f", from others' figures for other models (CONTRIBUTING.md); {NOT_YET}",
                markup=False,
                style="dim",
                soft_wrap=True,
            )
    for p in plans:
        if p.changes:
            out.print(
                f"{p.machine.name} {p.subject.precision} fits with: {'; '.join(p.changes)}",
                markup=False,
                soft_wrap=True,
            )


def _precision(manifest: Any) -> str:
    """The recipe of a bundle in a line."""
    plan = manifest.plan
    text = f"precision {plan.recipe}, the rest computes in {plan.compute}"
    if plan.observer:
        text += f", activation scales by {plan.observer}"
    if manifest.calibration:
        text += f", calibrated on {manifest.calibration.samples} samples"
    return text + (f"; kept in fp32: {', '.join(plan.kept_fp32)}" if plan.kept_fp32 else "")


def _ports(ports: Any) -> str:
    """Ports in a line; the cache, two tensors a layer, as one entry."""
    shown = [p for p in ports if not p.name.startswith(("past_", "present_"))]
    cache = [p for p in ports if p not in shown]
    text = [f"{p.name} {p.dtype} [{', '.join(map(str, p.shape))}]" for p in shown]
    if cache:
        shape = ", ".join(map(str, cache[0].shape))
        text.append(f"{cache[0].name} .. {cache[-1].name} {cache[0].dtype} [{shape}] x {len(cache)}")
    return "; ".join(text)


def _print_json(data: Any) -> None:
    print(json.dumps(data, ensure_ascii=False))


def _peak_bytes() -> int:
    scale = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale


@contextmanager
def _extra(name: str) -> Iterator[None]:
    """Turn a missing library of an optional installation into an error that says how to install it."""
    try:
        yield
    except ModuleNotFoundError as error:
        raise BackendError(f"{error.name} is not installed; pip install 'trol-edge[{name}]'") from error


@contextmanager
def _phases(quiet: bool) -> Iterator[Any]:
    """A callback (phase, done, steps) that shows the phase at work and the time since the start, on one line."""
    if quiet:
        yield lambda what, done, total: None
        return
    with Progress(TextColumn("{task.description}"), TimeElapsedColumn(), console=err, transient=True) as bars:
        task = bars.add_task("", total=None)

        def report(what: str, done: int, total: int) -> None:
            bars.update(task, description=f"{what} {done}/{total}" if total > 1 else what)

        yield report


@contextmanager
def _progress(quiet: bool) -> Iterator[Any]:
    """A callback (what, done, total) that draws one bar per stage, with the time left."""
    if quiet:
        yield lambda what, done, total: None
        return
    columns = (
        TextColumn("{task.description:8}"),
        BarColumn(),
        TaskProgressColumn(),
        TimeRemainingColumn(elapsed_when_finished=True),
    )
    with Progress(*columns, console=err) as bars:
        tasks: dict[str, TaskID] = {}

        def report(what: str, done: int, total: int) -> None:
            if what not in tasks:
                tasks[what] = bars.add_task(what, total=total)
            bars.update(tasks[what], completed=done)

        yield report
