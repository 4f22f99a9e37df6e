"""The verbs calibrate, gates, mix, compare and evaluate, about what a smaller model costs."""

from __future__ import annotations

import dataclasses
import tempfile
import time
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from trol_edge.cli.checkpoints import SENSITIVITY_SAMPLES, calibration_of, checkpoint_of, statistics_of
from trol_edge.cli.show import Json, Threads, err, extra, out, print_json, progress_bars
from trol_edge.errors import UsageError
from trol_edge.machine.identity import peak_memory


def calibrate(
    checkpoint: Annotated[str, typer.Argument(help="Checkpoint folder, or a model name as for export.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="Folder for the statistics; continued if unfinished.")],
    data: Annotated[
        Path | None,
        typer.Option(help='Folder of pictures, or JSONL of {"image", "prompt"}.  [default: rendered scenes]'),
    ] = None,
    samples: Annotated[int, typer.Option(min=1, help="Most samples to use.")] = 32,
    compute: Annotated[
        str, typer.Option(help="Type to compute in: float32, or bfloat16, up to 3 times faster with AVX512-BF16.")
    ] = "float32",
    leave_out: Annotated[
        int,
        typer.Option(
            min=0,
            help="Samples on which second passes are left out, to see what that costs (docs/traversal.md); "
            "a sample takes as long as a dozen others, 0 leaves this out.",
        ),
    ] = 4,
    force: Annotated[
        bool, typer.Option("--force", help="Replace statistics of another checkpoint or other samples.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Measure a checkpoint's activations on pictures and prompts, one layer in memory at a time."""
    with extra("export"):
        from trol_edge.calibration.run import calibrate as measure
    folder, _ = checkpoint_of(checkpoint)
    start = time.perf_counter()
    with progress_bars(quiet=as_json) as progress:
        found = measure(
            folder,
            data,
            output,
            count=samples,
            compute=compute,
            left_out=leave_out,
            overwrite=force,
            progress=progress,
        )
    seconds, peak = time.perf_counter() - start, peak_memory()
    if as_json:
        result = {"statistics": str(output), "samples": found.samples, "skipped": found.state.skipped}
        result["left_out"] = found.state.left_out
        result |= {"points": len(found.points), "checkpoint": found.checkpoint, "peaks": dict(found.peaks)}
        print_json(result | {"seconds": seconds, "peak_bytes": peak})
        return
    for skipped in found.state.skipped:
        err.print(f"skipped: {skipped}")
    out.print(
        f"{len(found.points)} points over {found.samples} samples ({len(found.state.skipped)} skipped) in "
        f"{output}, {seconds:.0f} s, peak memory {peak / 1e9:.2f} GB"
    )


def gates(
    source: Annotated[
        str,
        typer.Argument(
            help="Folder of a calibration, or a checkpoint folder or model name. Not a bundle, because its graphs do "
            "not put the gate out."
        ),
    ],
    data: Annotated[
        Path | None,
        typer.Option(
            help='For a checkpoint: folder of pictures, or JSONL of {"image", "prompt"}.  [default: rendered scenes]'
        ),
    ] = None,
    samples: Annotated[int, typer.Option(min=1, help="For a checkpoint: most samples to use.")] = 4,
    leave_out: Annotated[
        int, typer.Option(min=0, help="For a checkpoint: samples on which second passes are left out.")
    ] = 0,
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="SVG to draw: s of every token and layer of a few samples.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Show how much each layer's second pass counts, and what leaving it out costs."""
    with extra("export"):
        from trol_edge.calibration import gate_figure
        from trol_edge.calibration.run import calibrate as measure
        from trol_edge.export.gates import ACTIVE, KINDS, load
        from trol_edge.export.quantize.stats import STATE
    from trol_edge.bundle.names import MANIFEST

    if (Path(source) / MANIFEST).is_file():
        raise UsageError(f"{source}: is a bundle, whose graphs do not put the gate out; give the checkpoint")
    kept = (Path(source) / STATE).is_file()
    if kept and data is not None:
        raise UsageError(f"{source}: is a calibration, which has its samples already; give the checkpoint with --data")
    with tempfile.TemporaryDirectory() as place, progress_bars(quiet=as_json) as progress:
        folder = Path(source)
        if not kept:
            checkpoint, _ = checkpoint_of(source)
            folder = Path(place) / "calibration"
            measure(checkpoint, data, folder, count=samples, left_out=leave_out, progress=progress)
        found = load(folder, None)
        if output:
            gate_figure.save(output, found)
    alone, from_top = found.alone, found.from_top
    if as_json:
        layers = [
            {
                "gate": {kind: dataclasses.asdict(gate) for kind, gate in layer.items()},
                "alone": dataclasses.asdict(alone[i]) if alone else None,
                "from_top": dataclasses.asdict(from_top[i]) if from_top else None,
            }
            for i, layer in enumerate(found.layers)
        ]
        told = {"checkpoint": found.state.checkpoint, "samples": found.state.samples, "left_out": found.state.left_out}
        print_json(told | {"layers": layers})
        return
    kinds = [kind for kind in KINDS if any(kind in layer for layer in found.layers)]
    losses = ("without it, nats", "and those above", "same top token, %") if alone else ()
    table = Table("layer", *(f"{kind}: s, % > {ACTIVE:g}" for kind in kinds), *losses, box=None, padding=(0, 2))
    for i, layer in enumerate(found.layers):
        cells = [f"{layer[kind].mean:.3f}, {100 * layer[kind].active:.0f}" if kind in layer else "" for kind in kinds]
        if alone:
            cells += [f"{alone[i].nats:.1e}", f"{from_top[i].nats:.1e}", f"{100 * from_top[i].same_top:.0f}"]
        table.add_row(str(i), *cells)
    out.print(table)
    left_out = f"second passes were left out on {found.state.left_out}" if alone else "none were left out (--leave-out)"
    out.print(f"{found.state.samples} samples; {left_out}")


def mix(
    checkpoint: Annotated[str, typer.Argument(help="Checkpoint folder, or a model name as for export.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="JSON file to write, for export --precision.")],
    max_loss: Annotated[
        float, typer.Option(help="Highest KL divergence of the logits, in nats (see trol-edge compare).")
    ],
    precision: Annotated[str, typer.Option(help="Recipe, or JSON file, to start from.")] = "int4",
    calibration: Annotated[
        Path | None, typer.Option(help="Folder with statistics of `trol-edge calibrate`.  [default: beside the output]")
    ] = None,
    data: Annotated[
        Path | None,
        typer.Option(help='Folder of pictures, or JSONL of {"image", "prompt"}.  [default: rendered scenes]'),
    ] = None,
    samples: Annotated[int, typer.Option(min=1, help="Most samples to measure on.")] = SENSITIVITY_SAMPLES,
    as_json: Json = False,
) -> None:
    """Find which Linears need more bits, by measuring each; raise just enough to keep the loss within --max-loss."""
    with extra("export"):
        from trol_edge.calibration import samples as sampling
        from trol_edge.calibration.sensitivity import find_plan
        from trol_edge.export.quantize.recipes import read_options
    options = read_options(precision)
    folder, _ = checkpoint_of(checkpoint)
    with progress_bars(quiet=as_json) as progress:
        cache = calibration or calibration_of(folder, output)
        statistics = statistics_of(calibration, folder, data, cache, progress)
        found = find_plan(folder, statistics, sampling.load(data, samples), options, max_loss, progress)
    found.save(output)
    if as_json:
        result = dataclasses.asdict(found) | {"reached": found.reached, "plan": str(output)}
        print_json(result)
        return
    for name, nats in sorted(found.sensitivity.items(), key=lambda item: -item[1])[:10]:
        raised = f" -> {found.linears[name].precision}" if name in found.linears else ""
        out.print(f"{nats:.2e} nats  {name}{raised}")
    out.print(
        f"plain {options.recipe}: {found.recipe_nats:.2e} nats; with {len(found.linears)} of "
        f"{len(found.sensitivity)} Linears raised: {found.nats:.2e}, {'within' if found.reached else 'NOT within'} "
        f"{max_loss:g}\nNext: trol-edge export {checkpoint} --precision {output} --calibration {cache} -o ..."
    )


def evaluate(
    bundle: Annotated[Path, typer.Argument(help="Bundle folder of a model trained on the rendered scenes.")],
    number: Annotated[
        int, typer.Option("-n", "--number", min=1, help="Number of held-out scenes to ask about.")
    ] = 2000,
    scale: Annotated[
        int, typer.Option(min=1, max=8, help="Side of the pictures in units of 112 pixels; 2 gives several tiles.")
    ] = 1,
    image_tokens: Annotated[
        list[float] | None,
        typer.Option(
            help="Share of each picture's tokens that is used; repeatable, for a table side by side.  [default: 1]"
        ),
    ] = None,
    report: Annotated[
        Path | None, typer.Option(help="Markdown file in which to rewrite the section about the bundle.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Measure the accuracy of a trol-nano or trol-nano-phi3 bundle on held-out rendered scenes, by kind of question."""
    several = image_tokens not in (None, [1.0])
    if several and report:
        raise UsageError("--report is for all image tokens; leave --image-tokens out, or --report")
    from trol_edge.calibration import evaluate as evaluation
    from trol_edge.runtime import Runtime

    with Runtime(bundle) as runtime, progress_bars(quiet=as_json) as progress:
        scores = evaluation.evaluate_each(runtime, number, progress, scale, image_tokens or [1.0])
    text = evaluation.side_by_side(scores, str(bundle)) if several else evaluation.markdown(scores[0], str(bundle))
    if report:
        evaluation.update_report(report, text)
    found = [dataclasses.asdict(score) | {"short_percent": score.short, "hard_percent": score.hard} for score in scores]
    if as_json:
        print_json({"scores": found} if several else found[0])
    else:
        print(text)


def compare(
    reference: Annotated[Path, typer.Argument(help="Bundle folder of the reference.")],
    bundles: Annotated[list[Path], typer.Argument(help="Bundle folders of the same checkpoint to compare with it.")],
    data: Annotated[
        Path | None,
        typer.Option(help='Folder of pictures, or JSONL of {"image", "prompt"}.  [default: rendered scenes]'),
    ] = None,
    samples: Annotated[int, typer.Option(min=1, help="Most samples for layers and logits.")] = 16,
    scenes: Annotated[int, typer.Option(min=0, help="Number of held-out rendered scenes for the accuracy.")] = 0,
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="Folder for compare.json and the plot, compare.svg.")
    ] = None,
    threads: Threads = None,
    as_json: Json = False,
) -> None:
    """Show what bundles lost against a reference, per layer, in logits and in answers, and where the loss begins."""
    with extra("export"):
        from trol_edge.calibration import compare as comparing
        from trol_edge.calibration import samples as sampling
    with progress_bars(quiet=as_json) as progress:
        chosen = sampling.load(data, samples, progress)
        found = comparing.compare(reference, bundles, chosen, scenes=scenes, threads=threads, progress=progress)
    if output:
        comparing.save(output, found)
    if as_json:
        print_json({"comparisons": [dataclasses.asdict(c) for c in found]})
        return
    for skipped in chosen.skipped:
        err.print(f"skipped: {skipped}")
    names = comparing.names(found)
    layers = Table("signal to noise, dB", *names, box=None, padding=(0, 2))
    for i, place in enumerate(found[0].places):
        layers.add_row(place.name, *(f"{c.places[i].mean_db:.1f}" for c in found))
    out.print(layers)
    summary = Table(f"against {reference.name}", *names, box=None, padding=(0, 2))
    for title, cells in comparing.summary(found):
        summary.add_row(title, *cells)
    out.print(summary)
