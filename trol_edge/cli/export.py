"""The verbs export, synth and outliers, which write bundles and checkpoints."""

from __future__ import annotations

import dataclasses
import math
import time
from pathlib import Path
from typing import Annotated

import typer

from trol_edge.cli.checkpoints import CHECKPOINTS, SENSITIVITY_SAMPLES, calibration_of, checkpoint_of, statistics_of
from trol_edge.cli.show import Force, Json, err, extra, out, print_json, progress_bars
from trol_edge.errors import UsageError
from trol_edge.machine.identity import peak_memory


def export(
    checkpoint: Annotated[
        str, typer.Argument(help="Checkpoint folder, or a model name: trol-nano, trol-nano-phi3, trol-1.8b, ...")
    ],
    output: Annotated[Path, typer.Option("-o", "--output", help="Bundle folder to write.")],
    model: Annotated[str | None, typer.Option(help="Name of the model in the bundle.")] = None,
    target: Annotated[
        str,
        typer.Option(
            help="What runs the bundle. cpu is ONNX Runtime; rtx, tensorrt, jetson-jp6 and others are TensorRT (see "
            "trol-edge targets, then trol-edge build); onnx gives self-contained files for other tools."
        ),
    ] = "cpu",
    context: Annotated[
        int | None,
        typer.Option(
            help="Capacity of the K/V cache: tokens of prompt and answer.  [default: 2048, 2560 for trol-3.8b]"
        ),
    ] = None,
    max_tiles: Annotated[
        int | None,
        typer.Option(help="Most tiles of a picture, the thumbnail not counted.  [default: 6 for trol-3.8b]"),
    ] = None,
    traversal: Annotated[
        str,
        typer.Option(
            help="Layers with a second pass over the prompt: all, a number (12: the first 12), a list such as 0-7,10, "
            "or auto, those that a --calibration found worth it. Fewer are quicker and give another model."
        ),
    ] = "all",
    precision: Annotated[
        str | None,
        typer.Option(
            help="Recipe (fp32, fp16, int8, int8-dynamic, int4, int4-dynamic or fp8), or a JSON file with a plan per "
            "layer (docs/quantization.md).  [default: fp32; int4-dynamic for the published sizes on a CPU]"
        ),
    ] = None,
    calibration: Annotated[
        Path | None,
        typer.Option(
            help="Folder with statistics of `trol-edge calibrate`.  [default: calibration-<name> beside the bundle]"
        ),
    ] = None,
    block: Annotated[int | None, typer.Option(help="Inputs that share a scale in int4: 32, 64 or 128.")] = None,
    observer: Annotated[
        str | None, typer.Option(help="Method for activation scales: minmax, percentile, entropy or mse.")
    ] = None,
    lm_head: Annotated[str | None, typer.Option(help="Precision of the output layer.")] = None,
    vision: Annotated[str | None, typer.Option(help="Precision of vision tower and projector.")] = None,
    scaling: Annotated[
        bool | None, typer.Option("--scaling/--no-scaling", help="Rescale channels (SmoothQuant, AWQ).")
    ] = None,
    max_loss: Annotated[
        float | None,
        typer.Option(
            help="Raise just enough Linears to keep the KL divergence below this, in nats (see trol-edge mix); "
            "--traversal auto may take half of it, and without this option 1e-4."
        ),
    ] = None,
    kv: Annotated[
        str | None,
        typer.Option(
            help="Type of kept keys and values: int8, with scales from the calibration, takes a quarter of the cache's "
            "bytes. For the target cpu; the robot needs onnxruntime 1.27.  [default: as they are computed]"
        ),
    ] = None,
    selftest: Annotated[
        bool,
        typer.Option(
            "--selftest/--no-selftest", help="Record what the bundle's arithmetic gives, for trol-edge verify."
        ),
    ] = True,
    shared_weights: Annotated[
        bool,
        typer.Option(
            "--shared-weights",
            help="Let traverse and step share one copy of their weights, for TensorRT on 8 GB boards (fp16, int8).",
        ),
    ] = False,
    checkpoints: Annotated[Path, typer.Option(help="Folder for downloads.")] = CHECKPOINTS,
    revision: Annotated[str | None, typer.Option(help="Commit of the hub repository to fetch.")] = None,
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Trace a checkpoint into ONNX graphs and write a bundle."""
    with extra("export"):
        from trol_edge.export import pipeline
        from trol_edge.export.quantize import recipes
    if traversal == "auto" and calibration is None:
        raise UsageError(
            "--traversal auto takes out the second passes that a calibration found to be worth little; give its folder "
            "(--calibration, see trol-edge calibrate)"
        )
    folder, known = checkpoint_of(checkpoint, checkpoints, revision)
    if precision is None:
        precision = _default_precision(folder, target, quiet=as_json)
    options = recipes.read_options(
        precision, block=block, observer=observer, lm_head=lm_head, vision=vision, scaling=scaling, kv=kv
    )
    model = model or known
    start = time.perf_counter()
    with progress_bars(quiet=as_json) as progress:
        statistics = statistics_of(calibration, folder, None, calibration_of(folder, output), progress)
        twice: str | tuple[int, ...] = traversal
        choice, rounds = None, max_loss is not None
        if traversal == "auto":
            from trol_edge.calibration import traversal as choosing

            assert calibration is not None
            budget, rounds = choosing.budget(folder, options, max_loss)
            twice, choice = choosing.choose(folder, calibration, budget, progress)
        if rounds:
            from trol_edge.calibration import samples as sampling
            from trol_edge.calibration.sensitivity import within

            assert max_loss is not None
            chosen = sampling.load(None, SENSITIVITY_SAMPLES)
            options = within(folder, statistics, chosen, options, max_loss, progress, twice)
        manifest = pipeline.export(
            folder,
            output,
            model=model,
            target=target,
            context=context,
            max_tiles=max_tiles,
            traversal=twice,
            choice=choice,
            options=options,
            shared_weights=shared_weights,
            calibration=statistics,
            record_selftest=selftest,
            overwrite=force,
            progress=progress,
        )
    size = sum(info.bytes for info in manifest.files.values())
    seconds, peak = time.perf_counter() - start, peak_memory()
    if as_json:
        made = {"traversal": None if choice is None else dataclasses.asdict(choice), "passes": manifest.passes}
        print_json({"bundle": str(output), "bytes": size, "seconds": seconds, "peak_bytes": peak} | made)
        return
    for note in manifest.notes:
        err.print(f"note: {note}")
    if manifest.spec.traversed is not None or choice is not None:
        out.print(manifest.passes)
    out.print(f"{manifest.model}: {size / 1e6:.1f} MB in {output}, {seconds:.0f} s, peak memory {peak / 1e9:.2f} GB")


def _default_precision(checkpoint: Path, target: str, quiet: bool) -> str:
    """Choose the recipe, and say why if it is not FP32."""
    from trol_edge.bundle.precision import tensor_bytes
    from trol_edge.export.quantize.recipes import RecipeOptions, default_recipe, make_plan
    from trol_edge.export.reference.checkpoint import Checkpoint

    source = Checkpoint(checkpoint)
    shapes = {name: source.shape(name) for name in source.names()}
    parameters = sum(map(math.prod, shapes.values()))
    chosen = default_recipe(target, parameters)
    if chosen != "fp32" and not quiet:
        linears = make_plan(RecipeOptions(chosen), shapes, target).linears
        held = sum(tensor_bytes(shape, linears.get(name), 2, 4) for name, shape in shapes.items())
        err.print(
            f"precision {chosen}: {held / 1e9:.1f} GB of weights instead of the {4 * parameters / 1e9:.1f} GB of fp32; "
            f"no calibration needed (--precision fp32 for proof; int8-dynamic loses less, {parameters / 1e9:.1f} GB)"
        )
    return chosen


def synth(
    model: Annotated[str, typer.Option(help="Model whose shapes to use: trol-1.8b, trol-3.8b or trol-7b.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="Checkpoint folder to write.")],
    seed: Annotated[int, typer.Option(help="Seed of the random weights.")] = 0,
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Write a checkpoint of random weights in the published layout, for full-size runs without the real weights."""
    with extra("export"):
        from trol_edge.export.reference.synth import synth as write
    start = time.perf_counter()
    with progress_bars(quiet=as_json) as progress:
        result = write(model, output, seed=seed, overwrite=force, progress=progress)
    result |= {"checkpoint": str(output), "seconds": time.perf_counter() - start, "peak_bytes": peak_memory()}
    if as_json:
        print_json(result)
        return
    out.print(
        f"{model}, random weights: {result['parameters']:,} parameters, {result['bytes'] / 1e9:.2f} GB in "
        f"{output}, {result['seconds']:.0f} s, peak memory {result['peak_bytes'] / 1e9:.2f} GB"
    )


def outliers(
    checkpoint: Annotated[Path, typer.Argument(help="Checkpoint folder.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="Checkpoint folder to write.")],
    factor: Annotated[float, typer.Option(help="Factor of the channels; rounded to the nearest power of two.")] = 50.0,
    channels: Annotated[int, typer.Option(help="Channels per norm; with --keys, pairs per head.")] = 4,
    keys: Annotated[
        bool, typer.Option("--keys", help="Make them in the keys of attention instead of after the norms.")
    ] = False,
    seed: Annotated[int, typer.Option(help="Seed of the choice of channels.")] = 0,
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Make outlier channels that change no answer in float32, to test quantization with them."""
    with extra("export"):
        from trol_edge.calibration.outliers import make_outliers
    with progress_bars(quiet=as_json) as progress:
        result = make_outliers(
            checkpoint,
            output,
            factor=factor,
            channels=channels,
            keys=keys,
            seed=seed,
            overwrite=force,
            progress=progress,
        )
    if as_json:
        print_json(result | {"checkpoint": str(output), "peak_bytes": peak_memory()})
        return
    where = "pairs of channels in every head of keys" if keys else f"channels of {result['norms']} norms"
    out.print(
        f"{channels} {where} x {result['factor']:g} in {output}, "
        f"{result['bytes'] / 1e6:.1f} MB ({len(result['widened'])} tensors stored as float32 to stay exact)"
    )
