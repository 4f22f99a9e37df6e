"""The command trol-edge with a verb per task. Only this folder prints and decides exit codes."""

from __future__ import annotations

import io
import math
import os
import sys
import warnings
from collections.abc import Callable, Sequence
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

from trol_edge._version import __version__
from trol_edge.cli import chat, check, device, export, measure, plan, quantize, run, serve, sign
from trol_edge.cli.show import err, print_error, print_json
from trol_edge.errors import TrolEdgeError

app = typer.Typer(
    help="TroL vision-language models on robots: checkpoint -> ONNX graphs -> bundle -> answers.",
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    add_completion=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


class _Verb(TyperCommand):
    """A verb whose numbers must be finite."""

    def invoke(self, ctx: Any) -> Any:
        """Run the verb. Raises BadParameter for NaN and infinity, which the terminal library accepts as numbers."""
        for name, given in ctx.params.items():
            for value in given if isinstance(given, (list, tuple)) else (given,):
                if isinstance(value, float) and not math.isfinite(value):
                    raise typer.BadParameter(f"--{name.replace('_', '-')} {value} is not a number")
        return super().invoke(ctx)


def _print_version(wanted: bool) -> None:
    if wanted:
        version()
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Handle the options before the verb."""


def version() -> None:
    """Print the version."""
    print(__version__)


# Every verb with an example, in the order of --help.
VERBS: tuple[tuple[Callable[..., None], str], ...] = (
    (export.export, "trol-edge export trol-1.8b -o build/trol-1.8b   (fetches it first; or give a folder)"),
    (run.run, 'trol-edge run build/trol-nano --image scene.png --prompt "What is left of the red star?"'),
    (chat.chat, "trol-edge chat build/trol-nano --image scene.png"),
    (serve.serve, "trol-edge serve build/trol-nano --port 8000"),
    (run.inspect, "trol-edge inspect build/trol-nano --json"),
    (export.synth, "trol-edge synth --model trol-7b -o build/checkpoints/trol-7b"),
    (quantize.calibrate, "trol-edge calibrate trol-1.8b --data pictures -o build/calibration/trol-1.8b"),
    (quantize.gates, "trol-edge gates build/calibration/trol-1.8b -o build/gates.svg"),
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
    app.command(cls=_Verb, epilog=f"Example: {example}")(verb)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command line; returns the exit code.

    It is 0 (also if the reader of the output has gone), 1 for an error of this package, 2 for bad usage, 130 after
    Ctrl-C.
    """
    words = list(sys.argv[1:] if arguments is None else arguments) or ["--help"]
    if arguments is None:  # the command line owns this process
        warnings.showwarning = _show_warning
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # characters that its encoding lacks are escaped
            stream.reconfigure(errors="backslashreplace")
    code = 0
    try:
        code = _run(words)
        if sys.stdout is not None:
            sys.stdout.flush()
    except BrokenPipeError:
        _drop_output()
    except OSError as error:
        _drop_output()
        print_error(type(error).__name__, f"standard output cannot be written ({error})", as_json=False)
        code = code or 1
    return code


def _run(words: Sequence[str]) -> int:
    """Run one command line and return its exit code; errors are printed."""
    as_json = "--json" in words
    try:
        command = typer.main.get_command(app)
        with command.make_context("trol-edge", list(words)) as context:  # main() would exit with 1 for a broken pipe
            command.invoke(context)
    except TrolEdgeError as error:
        print_error(type(error).__name__, str(error), as_json)
        return 1
    except typer.Exit as stop:
        return int(stop.exit_code)
    except (KeyboardInterrupt, typer.Abort):
        if as_json:
            print_json({"error": {"type": "KeyboardInterrupt", "message": "interrupted"}})
        err.print("interrupted; no unfinished files are left")
        return 130
    except BrokenPipeError:
        raise
    except OSError as error:  # a full disk or no permission, which are no faults of the program
        print_error(type(error).__name__, str(error), as_json)
        return 1
    except Exception as error:
        if not (hasattr(error, "format_message") and hasattr(error, "exit_code")):
            raise
        print_error("UsageError", _usage(error.format_message()), as_json)  # the terminal library's own error
        return int(error.exit_code)
    return 0


def _usage(message: str) -> str:
    """A message about bad usage, with one guess of what was meant (two libraries may add theirs), and where to look."""
    said, mean, guess = message.partition("Did you mean")
    if mean:
        message = said + mean + guess.partition("?")[0] + ("?)" if said.endswith("(") else "?")
    return f"{message.rstrip()}{'' if message.rstrip().endswith(('.', '?', ')')) else '.'} See trol-edge --help."


def _show_warning(message: Warning | str, *where: Any, **more: Any) -> None:
    """Print a warning on one line, without its source."""
    err.print("warning: " + " ".join(str(message).split()), soft_wrap=True)


def _drop_output() -> None:
    """Discard output that is still to be written, also at the end of the process."""
    try:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
        os.close(nowhere)
    except (OSError, ValueError):  # without a file nothing is written at the end, either
        pass
