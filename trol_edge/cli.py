"""The command line: one command, a verb per task. Only this file prints and decides exit codes."""

from __future__ import annotations

import dataclasses
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
from trol_edge.errors import BackendError, TrolEdgeError

app = typer.Typer(
    help="TroL vision-language models on robots: checkpoint -> ONNX graphs -> bundle -> answers.",
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    add_completion=False,
)
out, err = Console(highlight=False), Console(stderr=True, highlight=False)

CHECKPOINTS = Path("build/checkpoints")  # where downloads are kept
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
    checkpoints: Annotated[Path, typer.Option(help="Where downloads are kept.")] = CHECKPOINTS,
    revision: Annotated[str | None, typer.Option(help="Commit of the hub repository.")] = None,
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Trace a checkpoint into ONNX graphs and write a bundle."""
    with _extra("export"):
        from trol_edge.calibration.statistics import Statistics
        from trol_edge.export import pipeline
        from trol_edge.export.precision import read_options
    options = read_options(precision, block=block, observer=observer, lm_head=lm_head, vision=vision, scaling=scaling)
    folder, known = _checkpoint(checkpoint, checkpoints, revision)
    model = model or known
    start = time.perf_counter()
    with _progress(quiet=as_json) as progress:

        def statistics(source: Any) -> Any:
            if calibration is not None:
                return Statistics.load(calibration, source.identity())
            from trol_edge.calibration.run import calibrate as gather

            return gather(folder, None, _calibration_of(folder, output), progress=progress)

        manifest = pipeline.export(
            folder,
            output,
            model=model,
            target=target,
            context=context,
            options=options,
            calibration=statistics,
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
    from trol_edge.bundle import Bundle
    from trol_edge.targets import TARGETS

    opened = Bundle(bundle)
    manifest, tensors = opened.manifest, opened.weights().tensors
    graphs = manifest.graphs.items()
    stored = {name: sum(tensors[w].nbytes for w in graph.weights if w in tensors) for name, graph in graphs}
    as_float = {name: sum(_loaded_bytes(w, tensors) for w in graph.weights) for name, graph in graphs}
    kv = manifest.kv_bytes_per_token
    lora = {name: sum(".lora_" in w for w in graph.weights) for name, graph in manifest.graphs.items()}
    used = {w for graph in manifest.graphs.values() for w in graph.weights}
    if as_json:
        data = dataclasses.asdict(manifest)
        data["weights"] = {n: {"dtype": t.dtype, "shape": t.shape, "bytes": t.nbytes} for n, t in tensors.items()}
        data["weight_bytes"], data["weight_bytes_float32"] = stored, as_float
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
        from trol_edge.export.synth import synth as write
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
    samples: Annotated[int, typer.Option(min=1, help="To measure on: at most so many.")] = 8,
    as_json: Json = False,
) -> None:
    """Find which Linears need more bits: measure what each costs, raise as few as keep the loss within --max-loss."""
    with _extra("export"):
        from trol_edge.calibration import run as running
        from trol_edge.calibration import samples as sampling
        from trol_edge.calibration.sensitivity import find_plan
        from trol_edge.export.precision import read_options
    options = read_options(precision)
    folder, _ = _checkpoint(checkpoint)
    with _progress(quiet=as_json) as progress:
        cache = calibration or _calibration_of(folder, output)
        statistics = running.calibrate(folder, data, cache, progress=progress)
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
    from trol_edge.bundle import TOKENIZER
    from trol_edge.runtime import Runtime

    with _extra("export"):
        from trol_edge.export.models import shipped_folder, shipped_like

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


@app.command(epilog="Example: trol-edge soak build/trol-nano --minutes 10")
def soak(
    bundle: Annotated[Path, typer.Argument(help="Bundle folder, with a tokenizer.")],
    minutes: Annotated[float, typer.Option(help="How long.", min=0.01)] = 10.0,
    as_json: Json = False,
) -> None:
    """Ask, stop, fork, miss deadlines and feed bad frames from four threads; exit 1 for wrong answers or leaks."""
    from trol_edge.soak import soak as run_soak

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


@app.command(epilog="Example: trol-edge targets --json")
def targets(
    best: Annotated[bool, typer.Option("--best", help="Print the target to take on this machine, and why.")] = False,
    as_json: Json = False,
) -> None:
    """List the targets, and which of them this machine can build and run now, and why not."""
    from trol_edge.runtimes import doctor as room
    from trol_edge.targets import NOT_YET, TARGETS

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
    from trol_edge.bundle import Bundle
    from trol_edge.runtimes import trt_build

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
        ratio = engine.bytes / engine.weight_bytes
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


@app.command(epilog="Example: trol-edge doctor build/trol-nano-rtx")
def doctor(
    bundle: Annotated[Path | None, typer.Argument(help="Bundle folder whose engines to look at, too.")] = None,
    as_json: Json = False,
) -> None:
    """Check that driver, GPU, TensorRT, engines and bundle fit together; exit code 1 where the bundle does not run."""
    from trol_edge.bundle import Bundle
    from trol_edge.runtimes import doctor as room

    checks = room.examine(None if bundle is None else Bundle(bundle))
    if as_json:
        _print_json([dataclasses.asdict(check) for check in checks])
    else:
        for check in checks:
            out.print(f"{'ok' if check.good else '--':2} {check.what}: {check.text}", markup=False, soft_wrap=True)
    if not all(check.good for check in checks if check.what in ("engines", "fit")):
        raise typer.Exit(1)


@app.command("version", epilog="Example: trol-edge version")
def version() -> None:
    """Print the version."""
    print(__version__)


def _checkpoint(given: str, downloads: Path = CHECKPOINTS, revision: str | None = None) -> tuple[Path, str | None]:
    """The folder of a checkpoint that was given as a folder or as a model's name (then fetched), and that name."""
    with _extra("export"):
        from trol_edge.export import models
    if Path(given).is_dir():
        return Path(given), None
    if "/" in given or given not in models.MODELS:
        raise typer.BadParameter(f"{given} is neither a checkpoint folder nor one of {', '.join(models.MODELS)}")
    return models.fetch(given, downloads / given, revision), given


def _calibration_of(checkpoint: Path, output: Path) -> Path:
    """Where statistics of a checkpoint are kept that no folder was named for: beside what is made with them."""
    return output.parent / f"calibration-{checkpoint.resolve().name}"


def _loaded_bytes(name: str, tensors: Any) -> int:
    """Bytes of a weight in memory: floating point as float32, quantized as stored, derived (see derived.py) as made."""
    from trol_edge.derived import INT8, INT8_SCALE, NBITS
    from trol_edge.weights import FLOATS

    if name in tensors:
        tensor = tensors[name]
        return 4 * math.prod(tensor.shape) if tensor.dtype in FLOATS else int(tensor.nbytes)
    packed = tensors[name.removesuffix(INT8).removesuffix(INT8_SCALE) + NBITS]
    return int(2 * packed.nbytes if name.endswith(INT8) else 4 * packed.shape[0])


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
