"""The command trol-edge with a verb per task. Only this folder prints and decides exit codes."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence

import typer

from trol_edge._version import __version__
from trol_edge.cli import check, device, export, measure, plan, quantize, run, sign
from trol_edge.cli.show import err
from trol_edge.errors import TrolEdgeError

app = typer.Typer(
    help="TroL vision-language models on robots: checkpoint -> ONNX graphs -> bundle -> answers.",
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    add_completion=False,
)


def version() -> None:
    """Print the version."""
    print(__version__)


# Every verb with an example, in the order of --help.
VERBS: tuple[tuple[Callable[..., None], str], ...] = (
    (export.export, "trol-edge export trol-1.8b -o build/trol-1.8b   (fetches it first; or give a folder)"),
    (run.run, 'trol-edge run build/trol-nano --image scene.png --prompt "What is left of the red star?"'),
    (run.inspect, "trol-edge inspect build/trol-nano --json"),
    (export.synth, "trol-edge synth --model trol-7b -o build/checkpoints/trol-7b"),
    (quantize.calibrate, "trol-edge calibrate trol-1.8b --data pictures -o build/calibration/trol-1.8b"),
    (quantize.mix, "trol-edge mix trol-nano --precision int4 --max-loss 0.01 -o build/mixed.json"),
    (export.outliers, "trol-edge outliers export/checkpoints/trol-nano -o build/checkpoints/trol-nano-outliers"),
    (quantize.evaluate, "trol-edge evaluate build/trol-nano -n 500"),
    (quantize.compare, "trol-edge compare build/trol-nano build/trol-nano-int8 --scenes 2000 -o build/compare"),
    (run.demo, "trol-edge demo build/trol-nano"),
    (sign.sign, "trol-edge sign build/trol-nano --key key.pem"),
    (check.verify, "trol-edge verify build/trol-nano --json"),
    (check.soak, "trol-edge soak build/trol-nano --minutes 10"),
    (measure.profile, "trol-edge profile build/trol-nano --size 640x480 --size none -o build/profile"),
    (device.targets, "trol-edge targets --json"),
    (device.build, "trol-edge build build/trol-nano-rtx"),
    (device.doctor, "trol-edge doctor build/trol-nano"),
    (plan.plan, "trol-edge plan --model trol-3.8b --device orin-nano-8gb --precision int4 --context 2048"),
    (version, "trol-edge version"),
)
for verb, example in VERBS:
    app.command(epilog=f"Example: {example}")(verb)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command line. Returns 0, 1 for an error of this package, 2 for bad usage, 130 after Ctrl-C."""
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
        err.print("interrupted; no unfinished files are left")
    return result if isinstance(result, int) else 0
