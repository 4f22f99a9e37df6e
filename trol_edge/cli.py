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
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TaskID, TaskProgressColumn, TextColumn, TimeRemainingColumn
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
        str, typer.Option(help="cpu: for trol_edge.Runtime. onnx: self-contained ONNX files for other tools.")
    ] = "cpu",
    context: Annotated[
        int | None,
        typer.Option(
            help="Tokens of prompt and answer together: KV cache capacity.  [default: 2048, 2560 for trol-3.8b]"
        ),
    ] = None,
    checkpoints: Annotated[Path, typer.Option(help="Where downloads are kept.")] = Path("build/checkpoints"),
    revision: Annotated[str | None, typer.Option(help="Commit of the hub repository.")] = None,
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Trace a checkpoint into ONNX graphs and write a bundle."""
    with _extra("export"):
        from trol_edge.export import models, pipeline
    folder = Path(checkpoint)
    if not folder.is_dir():
        if "/" in checkpoint or checkpoint not in models.MODELS:
            names = ", ".join(models.MODELS)
            raise typer.BadParameter(f"{checkpoint} is neither a checkpoint folder nor one of {names}")
        folder, model = models.fetch(checkpoint, checkpoints / checkpoint, revision), model or checkpoint
    start = time.perf_counter()
    with _progress(quiet=as_json) as progress:
        manifest = pipeline.export(
            folder, output, model=model, target=target, context=context, overwrite=force, progress=progress
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
    as_json: Json = False,
) -> None:
    """Ask a bundle a question, with or without pictures; the answer streams to standard output."""
    from trol_edge.runtime import Runtime

    runtime = Runtime(bundle, threads=threads)
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

    opened = Bundle(bundle)
    manifest, tensors = opened.manifest, opened.weights().tensors
    stored = {name: sum(tensors[w].nbytes for w in graph.weights) for name, graph in manifest.graphs.items()}
    as_float = {
        name: sum(4 * math.prod(tensors[w].shape) for w in graph.weights) for name, graph in manifest.graphs.items()
    }
    kv = manifest.spec.kv_bytes_per_token
    lora = {name: sum(".lora_" in w for w in graph.weights) for name, graph in manifest.graphs.items()}
    used = {w for graph in manifest.graphs.values() for w in graph.weights}
    if as_json:
        data = dataclasses.asdict(manifest)
        data["weights"] = {n: {"dtype": t.dtype, "shape": t.shape, "bytes": t.nbytes} for n, t in tensors.items()}
        data["weight_bytes"], data["weight_bytes_float32"] = stored, as_float
        data["kv_bytes_per_token"] = kv
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
    row = tensors["embedding"].nbytes // tensors["embedding"].shape[0]
    out.print(
        f"A step reads {as_float['step'] / 1e6:.2f} MB of weights (float32, each once, {lora['step']} LoRA tensors), "
        f"one embedding row of {row} bytes, and the KV cache: {kv} bytes per token, "
        f"{kv * manifest.context / 1e6:.1f} MB in all.\n"
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


@app.command("version", epilog="Example: trol-edge version")
def version() -> None:
    """Print the version."""
    print(__version__)


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
