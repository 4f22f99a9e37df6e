"""`make bench`: measures our bundles beside the torch reference, llama.cpp and OpenVINO, in one run on one machine.

- Every contender runs in a separate process, one at a time, and the contenders take turns for `rounds` rounds. So peak
  memory is a contender's own, and a machine that slows down slows all of them. Shown are medians and extremes.
- The memory's read bandwidth is measured before each round, because on shared machines it varies by a factor of three.
- A TroL prompt token passes every layer twice, a peer's token once. The table shows the number of passes.
- The peers get a plain llama decoder of the same shape with random weights. It has no gate, no LoRA and no picture,
  and image tokens are ordinary tokens to it.
- Scales of quantized bundles are made up if weights are random, because their values do not change the cost.
- The runtime's own cost per token is the time of a whole `Runtime.stream` step minus that of ONNX Runtime's call in it.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from rich.console import Console
from rich.table import Table

import trol_edge
from tests.bench.contenders import CONTENDERS, OURS, QUESTION, Shape, Task
from tests.bench.peers import python_of
from trol_edge.bundle.manifest import Bundle
from trol_edge.bundle.names import TOKENIZER
from trol_edge.errors import BackendError, TrolEdgeError, UsageError
from trol_edge.export.reference import hub
from trol_edge.measure.peaks import read_rate
from trol_edge.prompt.template import build_prompt
from trol_edge.prompt.tokenizer import Tokenizer

Report = Callable[[str], None]  # takes one line about what is being done

FOLDER = Path("build/bench")
BUSY = 0.1  # processors that others may use before numbers are called too low
READ_BYTES = 512 << 20  # amount of memory that is read to measure its bandwidth
TEXT_TOKENS = 84  # text tokens of a prompt at a published size: the template and a short question
LONG_TOKENS = 1300  # tokens of the prompt of words by which prefill is compared
BLOCK = 128  # weights that share a scale in int4, ours and OpenVINO's
NOTES = (
    "prefill: prompt tokens per second through the decoder, vision tower not included; decode: answer tokens per "
    "second after that prompt. Median over rounds (least-greatest).",
    "passes: how often a prompt token / an answer token goes through each layer. The peers run the same decoder shape "
    "once per prompt token, without gate, LoRA or picture.",
    "GB/s: bytes of weights that one decoded token reads, times decode; compare with the memory read bandwidth above.",
    "memory: peak resident set of the contender's process, mapped file pages included; weights: the part of it that "
    "holds weights (those for pictures too, if there are any).",
)

SHAPES = {
    "nano": Shape("trol-nano", repeats=8, decode=32, own_steps=200, full_warmup=True),
    # A prompt takes minutes, so only the short one is run for warm-up; scratch memory is freed in any case.
    "1.8b": Shape("trol-1.8b", repeats=1, decode=16, own_steps=24, full_warmup=False),
}
# Aims for the shape of TroL-1.8B: (what is compared, our contender, the peers, kind of rate, our factor, lowest ratio).
AIMS = (
    (
        "prefill, one pass (each of our two passes counted) / llama.cpp's best",
        "int8",
        ("Q4_0", "Q8_0"),
        "prefill",
        2,
        1.6,
    ),
    ("prefill, one pass (each of our two passes counted) / OpenVINO", "int8", ("openvino",), "prefill", 2, 1.0),
    ("whole two-pass traverse / llama.cpp's best single pass", "int8", ("Q4_0", "Q8_0"), "prefill", 1, 0.8),
    ("prefill, one pass, INT4 / llama.cpp's best", "int4", ("Q4_0", "Q8_0"), "prefill", 2, 1.6),
    ("prefill, second pass in half of the layers / in all", "int8-half", ("int8",), "prefill", 1, 1.2),
    ("decode, 8 bits / llama.cpp Q8_0", "int8", ("Q8_0",), "decode", 1, 1.0),
    ("decode, 4 bits / llama.cpp Q4_0", "int4", ("Q4_0",), "decode", 1, 1.0),
)
MEMORY_TARGET = 1.3  # peak memory / weights


# -- in the process that was started ---------------------------------------------------------------------------


def bench(
    shapes: Sequence[str] = tuple(SHAPES),
    *,
    rounds: int = 3,
    peers: bool = True,
    only: Sequence[str] = (),
    pythons: Mapping[str, str] | None = None,
    folder: str | os.PathLike[str] = FOLDER,
    bundles: Mapping[tuple[str, str], Path] | None = None,
    report: Report = lambda line: None,
) -> dict[str, Any]:
    """Measure everything; returns what `--json` writes. Rates per second, memory in bytes, names end in the unit.

    Checkpoints of random weights, bundles and the peers' files are made in `folder` (25 GB for 1.8b) and used again
    while neither checkpoint nor exporter changes. `bundles` (by shape and contender) are used instead, if given.
    only: contenders to measure, all by default. pythons: an interpreter by a contender's label ("llama.cpp",
    "OpenVINO"), for a peer that is not installed here. Raises UsageError for an unknown shape or contender and
    BackendError if there is nothing to measure. The row of a contender that fails, or is not installed, says so. Ctrl-C
    ends it early, with what was measured until then.
    """
    unknown = [name for name in shapes if name not in SHAPES] + [name for name in only if name not in CONTENDERS]
    if unknown:
        raise UsageError(f"{unknown} are none of {', '.join((*SHAPES, *CONTENDERS))}")
    if rounds < 1:
        raise UsageError("rounds should be >= 1")
    report("memory bandwidth ...")
    start, before = time.perf_counter(), _cpu_seconds()
    result: dict[str, Any] = {"machine": machine(), "rounds": rounds, "notes": NOTES, "shapes": [], "stopped": False}
    chosen = [n for n, kind in CONTENDERS.items() if (n in only if only else peers or not kind.peer)]
    interpreters = {n: (pythons or {}).get(CONTENDERS[n].label, sys.executable) for n in chosen}
    absent = {n: absent(n, interpreters[n]) for n in chosen if CONTENDERS[n].peer}
    names = [n for n in chosen if not absent.get(n)]
    rates = []
    for shape in shapes:
        own = {n: path for (s, n), path in (bundles or {}).items() if s == shape}
        missing = dict(absent)
        jobs: dict[str, Task] = {}
        samples: dict[str, list[dict[str, Any]]] = {}
        try:
            jobs = prepare(SHAPES[shape], names, Path(folder), own, interpreters, missing, report)
            ready = list(jobs)
            samples = {name: [] for name in ready}
            for i in range(rounds):
                rates.append(read_rate(machine_cores(), READ_BYTES) / 1e9)
                for name in ready[i % len(ready) :] + ready[: i % len(ready)]:  # so that the first one changes
                    if not any("error" in sample for sample in samples[name]):
                        report(f"{jobs[name].shape.model}: round {i + 1} of {rounds}, {CONTENDERS[name].label} {name}")
                        samples[name].append(run_task(jobs[name], interpreters[name]))
        except KeyboardInterrupt:
            report("stopped: what was measured until now follows")
            result["stopped"] = True
        if jobs:
            result["shapes"].append(summary(shape, jobs, samples))
            result["shapes"][-1]["contenders"] += [row_of(n, why) for n, why in missing.items() if why]
        if result["stopped"]:
            break
    result["machine"]["read_gb_per_s"] = _spread(rates or [0.0])
    result["seconds"] = time.perf_counter() - start
    if before is not None and (after := _cpu_seconds()) is not None:
        others = (after[0] - before[0]) - (after[1] - before[1])
        result["machine"]["others_cpus"] = max(0.0, others / result["seconds"])
    return result


def absent(name: str, python: str) -> str | None:
    """What a peer needs that is not installed for an interpreter, and what to do; None if nothing is missing."""
    kind = CONTENDERS[name]
    find = (
        f"import importlib.util as u; print([m for m in {kind.modules!r} if not (u.find_spec(m.split('.')[0]) "
        "and u.find_spec(m))])"
    )
    try:
        found = run_python("-c", find, python=python).strip()
    except (BackendError, OSError) as error:
        return f"{python} does not run ({error})"
    if found == "[]":
        return None
    return f"not installed ({found.strip('[]')}): make bench-peers, or pip install {kind.install} here"


def prepare(
    shape: Shape,
    names: Sequence[str],
    folder: Path,
    bundles: Mapping[str, Path],
    interpreters: Mapping[str, str],
    failed: dict[str, str | None],
    report: Report,
) -> dict[str, Task]:
    """Make a job for each contender. A peer whose model cannot be made goes into `failed` instead, with the reason."""
    folder = folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    picture = None
    if hub.find(shape.model).repository is None:
        checkpoint = hub.shipped_folder(shape.model)
        picture = checkpoint / "scene.png"
    else:
        checkpoint = random_checkpoint(shape.model, folder, report)
    made = {
        name: str(bundles.get(name) or _exported(shape.model, name, checkpoint, folder, report))
        for name in dict.fromkeys((*(n for n in names if n in OURS), *(() if set(names) & set(OURS) else OURS[:1])))
    }
    described = next(iter(made.values()))
    manifest = Bundle(described).manifest
    if TOKENIZER in manifest.files:
        tokenizer = Tokenizer.from_file(Path(described) / TOKENIZER)
        prompts = {
            name: build_prompt(tokenizer, manifest.prompt, QUESTION, i) for name, i in (("text", 0), ("picture", 1))
        }
    else:
        text, long = (
            np.random.default_rng(0).integers(3, manifest.spec.vocab_size, n).tolist()
            for n in (TEXT_TOKENS, LONG_TOKENS)
        )
        image = [manifest.spec.image_token_id] * manifest.spec.vision.tokens_per_image
        prompts = {
            "text": text,
            "long": long,
            "picture": text[: TEXT_TOKENS // 2] + image + text[TEXT_TOKENS // 2 :],
        }
    jobs = {}
    for name in names:
        kind = CONTENDERS[name]
        model = ""
        if kind.peer:
            path = folder / f"{shape.model}-{name}{'.gguf' if kind.prepare == 'prepare_gguf' else ''}"
            if not path.exists():
                report(f"{shape.model}: {path.name} ...")
                told = json.dumps([described, str(path), name])
                try:
                    run_python("-c", _entry(kind.prepare), stdin=told, python=interpreters[name])
                except BackendError as error:  # the other peers are measured all the same
                    failed[name] = f"its model could not be made: {error}"
                    continue
            model = str(path)
        bundle = made.get(name, described)
        jobs[name] = Task(
            name, str(checkpoint), bundle, model, prompts, str(picture) if picture else None, shape, machine_cores()
        )
    return jobs


def random_checkpoint(model: str, folder: Path, report: Report) -> Path:
    """A checkpoint of random weights of a published model's shapes in `folder`, made if it does not exist."""
    checkpoint = folder / f"{model}-checkpoint"
    if not (checkpoint / "config.json").is_file():
        report(f"{model}: a checkpoint of random weights ...")
        run_python("-m", "trol_edge", "synth", "--model", model, "-o", str(checkpoint), "--json")
    return checkpoint


def _exported(model: str, name: str, checkpoint: Path, folder: Path, report: Report) -> Path:
    bundle, stamp = folder / f"{model}-{name}", folder / f"{model}-{name}.stamp"
    made_of = _fingerprint(checkpoint)
    if not (bundle.is_dir() and stamp.is_file() and stamp.read_text(encoding="utf-8") == made_of):
        report(f"{model}: export {name} ...")
        run_python(
            "-c", _entry("prepare_bundle", "speed"), stdin=json.dumps([str(checkpoint), str(bundle), model, name])
        )
        stamp.write_text(made_of, encoding="utf-8")
    return bundle


def prepare_bundle() -> None:
    """Entry point of a process that exports; it reads [checkpoint, bundle, model, contender] as JSON from stdin."""
    from trol_edge.bundle.precision import DYNAMIC
    from trol_edge.export.pipeline import export
    from trol_edge.export.quantize.made_up import made_up_statistics
    from trol_edge.export.quantize.recipes import RecipeOptions
    from trol_edge.export.reference.checkpoint import Checkpoint

    checkpoint, bundle, model, name = json.load(sys.stdin)
    recipe, half = name.removesuffix("-half"), name.endswith("-half")
    twice = str(Checkpoint(checkpoint).spec.num_layers // 2) if half else "all"
    # Like the peers, all matrices have the same bits; searches would mean nothing for random weights.
    bits = DYNAMIC.get(recipe, recipe)
    alike: dict[str, Any] = {"lm_head": bits, "scaling": False, "clipping": False, "sensitive": None}
    options = RecipeOptions(recipe=recipe, block=BLOCK, **alike)
    export(
        checkpoint,
        bundle,
        model=model,
        traversal=twice,
        options=options,
        calibration=made_up_statistics,
        overwrite=True,
    )


def _fingerprint(checkpoint: Path) -> str:
    """A hash that changes with the checkpoint's files and with the sources that make a bundle of it."""
    digest = hashlib.sha256()
    for path in sorted(checkpoint.iterdir()):
        digest.update(f"{path.name} {path.stat().st_size} {path.stat().st_mtime_ns};".encode())
    package = Path(trol_edge.__file__).parent
    for folder in (package, package / "export"):  # a link in a clone, which rglob does not follow
        for path in sorted(folder.rglob("*.py")):
            digest.update(path.read_bytes())
    return digest.hexdigest()


def _entry(function: str, module: str = "contenders") -> str:
    return f"from tests.bench.{module} import {function}; {function}()"


def run_python(*arguments: str, stdin: str = "", python: str = sys.executable) -> str:
    """Run Python in a new process and return its output. Raises BackendError with the end of its standard error."""
    root = str(Path(trol_edge.__file__).resolve().parents[1])
    path = os.pathsep.join(p for p in (root, os.environ.get("PYTHONPATH")) if p)
    done = subprocess.run(
        [python, *arguments], input=stdin, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": path}
    )
    if done.returncode:
        last = done.stderr.strip().splitlines()[-1:] or [f"exit status {done.returncode}"]
        raise BackendError(last[0])
    return done.stdout


def run_task(job: Task, python: str = sys.executable) -> dict[str, Any]:
    try:
        output = run_python("-c", _entry("worker"), stdin=json.dumps(dataclasses.asdict(job)), python=python)
        result: dict[str, Any] = json.loads(output.strip().splitlines()[-1])
        return result
    except (BackendError, ValueError, IndexError) as error:
        return {"error": str(error)}


def summary(shape: str, jobs: Mapping[str, Task], samples: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    job = next(iter(jobs.values()))
    manifest = Bundle(job.bundle).manifest
    image = manifest.spec.image_token_id
    prompts = {name: {"tokens": len(ids), "image_tokens": ids.count(image)} for name, ids in job.prompts.items()}
    rows = []
    for name, rounds in samples.items():
        failed = next((sample["error"] for sample in rounds if "error" in sample), None)
        failed = failed if rounds else "the run was stopped before"
        row = row_of(name, failed)
        rows.append(row)
        if failed is not None:
            continue
        if name in OURS:
            described = Bundle(jobs[name].bundle).manifest.spec
            row["prefill_passes"] = 1 + len(described.second_layers) / described.num_layers
        row["peak_bytes"] = max(sample["peak_bytes"] for sample in rounds)
        row["load_s"] = statistics.median(sample["load_s"] for sample in rounds)
        row["step_weight_bytes"], row["weight_bytes"] = rounds[0]["step_bytes"], rounds[0]["weight_bytes"]
        for prompt, counts in prompts.items():
            times = [sample["times"][prompt] for sample in rounds]
            if not times[0]["prefill_s"]:
                continue
            vision = [1e3 * statistics.median(t["vision_s"]) for t in times if t["vision_s"]]
            row["prompts"][prompt] = {
                "prefill_tokens_per_s": _spread([counts["tokens"] / statistics.median(t["prefill_s"]) for t in times]),
                "decode_tokens_per_s": _spread([1 / statistics.median(t["step_s"]) for t in times]),
                "vision_ms": _spread(vision) if vision else None,
            }
    ours = next((name for name in OURS if samples.get(name)), None)
    own = [sample["own"] for sample in samples.get(ours or "", []) if "own" in sample]
    costs: dict[str, list[float]] = {"step_ms": [], "inference_ms": [], "own_ms": []}
    for sample in own:
        costs["step_ms"].append(1e3 * statistics.median(sample["total"]))
        costs["inference_ms"].append(1e3 * statistics.median(sample["inference"]))
        difference = [total - part for total, part in zip(sample["total"], sample["inference"], strict=True)]
        costs["own_ms"].append(1e3 * statistics.median(difference))
    spec = manifest.spec
    sizes = ("hidden_size", "intermediate_size", "num_layers", "num_heads", "num_kv_heads", "vocab_size", "lora_rank")
    return {
        "shape": shape,
        "model": manifest.model,
        "sizes": {size: getattr(spec, size) for size in sizes},
        "weights": "trained" if job.picture else "random",
        "prompts": prompts,
        "decode_tokens": job.shape.decode,
        "contenders": rows,
        "own_cost": {name: _spread(values) for name, values in costs.items()} if own else None,
        "targets": targets(rows, "long" if "long" in prompts else "text"),
    }


def targets(rows: Sequence[Mapping[str, Any]], prompt: str) -> list[dict[str, Any]]:
    """Each aim that can be judged by the measurements, as {"what", "ratio", "aim", "met"}."""
    by_name = {row["name"]: row for row in rows if prompt in row["prompts"]}
    out = []
    for what, ours, peers, kind, factor, aim in AIMS:
        there = [peer for peer in peers if peer in by_name]
        if ours not in by_name or not there:
            continue
        mine, *theirs = (by_name[n]["prompts"][prompt][f"{kind}_tokens_per_s"]["median"] for n in (ours, *there))
        ratio = factor * mine / max(theirs)
        out.append({"what": what, "ratio": ratio, "aim": aim, "met": ratio >= aim})
    for name, row in by_name.items():
        if name in OURS:
            ratio = row["peak_bytes"] / row["weight_bytes"]
            what = f"peak memory / weights held, {row['precision']}"
            out.append({"what": what, "ratio": ratio, "aim": -MEMORY_TARGET, "met": ratio <= MEMORY_TARGET})
    return out


def row_of(name: str, error: str | None) -> dict[str, Any]:
    kind = CONTENDERS[name]
    return {
        "name": name,
        "contender": kind.label,
        "precision": kind.precision,
        "prefill_passes": kind.prefill_passes,
        "decode_passes": 1,
        "error": error,
        "peak_bytes": None,
        "load_s": None,
        "step_weight_bytes": None,
        "weight_bytes": None,
        "prompts": {},
    }


def _spread(values: Sequence[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


# -- the machine -----------------------------------------------------------------------------------------------


def machine() -> dict[str, Any]:
    """Describe what the numbers depend on: processor, memory, versions.

    "read_gb_per_s", by round, and "others_cpus", processors that other processes kept busy meanwhile on average, are
    filled in at the end.
    """
    versions = {"python": platform.python_version(), "trol-edge": trol_edge.__version__}
    for name in ("onnxruntime", "torch", "numpy"):
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return {
        "cpu": _proc("cpuinfo", "model name") or platform.processor() or platform.machine(),
        "system": f"{platform.system()} {platform.machine()}",
        "cores": machine_cores(),
        "ram_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "read_gb_per_s": None,
        "others_cpus": None,
        "versions": versions,
    }


def _cpu_seconds() -> tuple[float, float] | None:
    """Processor time since boot of all processes (time taken by other virtual machines too), and of our own."""
    try:
        fields = Path("/proc/stat").read_text(encoding="ascii").split("\n", 1)[0].split()[1:9]
    except OSError:
        return None
    user, nice, system, _idle, _wait, irq, softirq, steal = (int(f) / os.sysconf("SC_CLK_TCK") for f in fields)
    own = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return user + nice + system + irq + softirq + steal, sum(usage.ru_utime + usage.ru_stime for usage in own)


def machine_cores() -> int:
    """Physical cores that this process may use."""
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return usable
    packages = [line for line in lines if line.startswith("physical id")]
    ids = [line for line in lines if line.startswith("core id")]
    return min(usable, len(set(zip(packages, ids, strict=False))) or usable)


def _proc(file: str, key: str) -> str | None:
    try:
        lines = (Path("/proc") / file).read_text(encoding="utf-8").splitlines()
    except OSError:
        return None
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith(key)), None)


# -- the table -------------------------------------------------------------------------------------------------


def show(result: dict[str, Any], console: Console) -> None:
    """Print what `bench` returned."""
    m = result["machine"]
    versions = ", ".join(f"{name} {version}" for name, version in m["versions"].items())
    console.print(
        f"{m['cpu']}, {m['cores']} cores, {m['ram_bytes'] / 1e9:.0f} GB memory read at {_text(m['read_gb_per_s'])} "
        f"GB/s, {m['system']}; {versions}; {result['rounds']} round(s) in {result['seconds'] / 60:.1f} minutes"
    )
    if m["others_cpus"] is not None:
        advice = "" if m["others_cpus"] < BUSY else ": these numbers are too low, run it again on a quiet machine"
        console.print(f"Other processes kept {m['others_cpus']:.2f} processors busy meanwhile{advice}.")
    for shape in result["shapes"]:
        _show_shape(shape, console)
    console.print()
    for note in NOTES:
        console.print(f"- {note}")


def _show_shape(shape: dict[str, Any], console: Console) -> None:
    table = Table(title=f"{shape['model']}, {shape['weights']} weights", title_justify="left")
    table.add_column("contender")
    table.add_column("prompt tokens")
    for column in ("passes", "prefill tok/s", "decode tok/s", "GB/s", "vision ms", "memory GB", "weights GB"):
        table.add_column(column, justify="right", no_wrap=True)
    for row in shape["contenders"]:
        contender, passes = (
            f"{row['contender']} {row['precision']}",
            f"{row['prefill_passes']:g}/{row['decode_passes']}",
        )
        if row["error"] is not None:
            table.add_row(contender, "not measured: see below", passes)
        for prompt, numbers in row["prompts"].items():
            counts = shape["prompts"][prompt]
            tokens = str(counts["tokens"]) + (f", {counts['image_tokens']} image" if counts["image_tokens"] else "")
            decode = numbers["decode_tokens_per_s"]
            table.add_row(
                contender,
                tokens,
                passes,
                _text(numbers["prefill_tokens_per_s"]),
                _text(decode),
                f"{decode['median'] * row['step_weight_bytes'] / 1e9:.1f}",
                _text(numbers["vision_ms"]) if numbers["vision_ms"] else "",
                f"{row['peak_bytes'] / 1e9:.2f}",
                f"{row['weight_bytes'] / 1e9:.2f}",
            )
        table.add_section()
    console.print()
    console.print(table)
    for row in shape["contenders"]:
        if row["error"] is not None:
            console.print(f"{row['contender']} {row['precision']}: {row['error']}", markup=False)
    for target in shape["targets"]:
        aim = f"at least {target['aim']}" if target["aim"] > 0 else f"at most {-target['aim']}"
        console.print(f"{target['what']}: {target['ratio']:.2f} ({aim}: {'met' if target['met'] else 'missed'})")
    if own := shape["own_cost"]:
        console.print(
            f"Runtime.stream, per answer token: {own['step_ms']['median']:.3f} ms, of which ONNX Runtime's call "
            f"{own['inference_ms']['median']:.3f} and our own {_text(own['own_ms'])} (aim: below 0.3)"
        )


def _text(spread: dict[str, float]) -> str:
    digits = max(0, 2 - len(str(int(spread["median"]))) + 1) if spread["median"] >= 1 else 3
    median, low, high = (f"{spread[key]:.{digits}f}" for key in ("median", "min", "max"))
    return median if low == high else f"{median} ({low}-{high})"


app = typer.Typer(rich_markup_mode=None, pretty_exceptions_enable=False, add_completion=False)


@app.command(epilog="Example: python -m tests.bench.speed --shape nano --rounds 5")
def main(
    shape: Annotated[str, typer.Option(help="Shape to measure: nano, 1.8b or all.")] = "all",
    rounds: Annotated[int, typer.Option(min=1, help="Number of turns of each contender.")] = 3,
    peers: Annotated[bool, typer.Option(help="Measure llama.cpp and OpenVINO too, if they are installed.")] = True,
    only: Annotated[str, typer.Option(help=f"Contenders, separated by commas, from {', '.join(CONTENDERS)}.")] = "",
    llama_python: Annotated[
        str | None, typer.Option(help="Interpreter that has llama-cpp-python and gguf.  [default: of make bench-peers]")
    ] = None,
    openvino_python: Annotated[
        str | None, typer.Option(help="Interpreter that has OpenVINO.  [default: of make bench-peers]")
    ] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="File to write the numbers to.")] = None,
    folder: Annotated[Path, typer.Option(help="Folder for models; 1.8b needs 25 GB.")] = FOLDER,
) -> None:
    """Measure prefill, decode, peak memory and own cost per token of our bundles, torch, llama.cpp and OpenVINO."""
    err = Console(stderr=True, highlight=False)
    shapes = tuple(SHAPES) if shape == "all" else (shape,)
    try:
        result = bench(
            shapes,
            rounds=rounds,
            peers=peers,
            only=tuple(n for n in only.split(",") if n),
            pythons={
                "llama.cpp": llama_python or python_of("llama.cpp"),
                "OpenVINO": openvino_python or python_of("OpenVINO"),
            },
            folder=folder,
            report=lambda line: err.print(line, style="dim"),
        )
    except TrolEdgeError as error:
        err.print(f"error: {error}", style="red", markup=False, soft_wrap=True)
        raise typer.Exit(1) from error
    out = Console(highlight=False)
    out.width = max(out.width, 156)  # a row is a line, in a log file too
    show(result, out)
    if json_file:
        json_file.parent.mkdir(parents=True, exist_ok=True)
        json_file.write_text(json.dumps(result, indent=1), encoding="utf-8")


if __name__ == "__main__":
    app()
