"""`make bench`: the bundle beside the torch reference and llama.cpp, in one run on one machine.

What is special about it:
- Every contender runs in a process of its own, one at a time, and the contenders take turns for `rounds` rounds: so
  peak memory is a contender's own, and a machine that slows down slows all of them. Medians and extremes over rounds.
- A TroL prompt token passes every layer twice, a llama.cpp token once: the passes stand in the table.
- llama.cpp gets a plain llama decoder of the same shape with random weights. It has no gate, no LoRA and no picture,
  and image tokens are ordinary tokens to it.
- The runtime's own cost per token is the time of a whole `Runtime.stream` step less that of ONNX Runtime's call in it.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib
import importlib.util
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib import metadata
from pathlib import Path
from typing import Annotated, Any, Protocol

import numpy as np
import typer
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

import trol_edge
from trol_edge.bundle import TOKENIZER, Bundle
from trol_edge.errors import BackendError, TrolEdgeError, UsageError
from trol_edge.export import models
from trol_edge.images import load_rgb, preprocess
from trol_edge.spec import ModelSpec
from trol_edge.text import PromptSpec, Tokenizer, build_prompt

Float32 = NDArray[np.float32]
Report = Callable[[str], None]  # one line about what is being done

FOLDER = Path("build/bench")
BUSY = 0.1  # processors that others may use before numbers are called too low
NOT_INSTALLED = "not installed: pip install llama-cpp-python gguf"
QUESTION = "What is left of the red circle?"
CONTEXT = 2048  # tokens that every contender's cache holds, or may hold
TEXT_TOKENS = 84  # of a prompt at a published size: the template and a short question
NOTES = (
    "prefill: prompt tokens per second through the decoder, vision tower not included; decode: answer tokens per "
    "second behind that prompt. Median over rounds (least-greatest).",
    "passes: how often a prompt token / an answer token goes through each layer. llama.cpp runs the same decoder shape "
    "once per prompt token, without gate, LoRA or picture: for the same passes halve its prefill.",
    "GB/s: bytes of weights that one decoded token reads, times decode; compare with the memory read bandwidth above.",
    "memory: peak resident set of the contender's process, file pages it mapped included.",
)


@dataclasses.dataclass(frozen=True)
class Shape:
    """A model to measure, and how much of it."""

    model: str
    repeats: int  # of every prompt, in each round
    decode: int  # answer tokens per prompt
    own_steps: int  # answer tokens for the runtime's own cost
    full_warmup: bool  # every prompt once before the clock starts; else the text prompt only


SHAPES = {
    "nano": Shape("trol-nano", repeats=8, decode=32, own_steps=200, full_warmup=True),
    # Minutes per prompt: the short prompt warms libraries, threads and weights up; scratch memory is freed in any case.
    "1.8b": Shape("trol-1.8b", repeats=1, decode=16, own_steps=24, full_warmup=False),
}


@dataclasses.dataclass(frozen=True)
class Job:
    """What a worker process is told, as JSON on its standard input."""

    contender: str  # a key of CONTENDERS
    checkpoint: str
    bundle: str
    gguf: str
    prompts: dict[str, list[int]]  # name -> token ids
    picture: str | None  # file; None: random pixels
    shape: Shape
    threads: int  # for llama.cpp; the others choose for themselves (the physical cores)


class Contender(Protocol):
    """One implementation of the decoder. Logits are float32 [V] and may be overwritten by the next call."""

    step_bytes: int  # weights that a step reads

    def encode(self, pixels: Float32) -> Any:
        """pixels [1, 3, P, P] -> image features, or None where pictures are not served."""
        ...

    def prefill(self, ids: Sequence[int], features: Any) -> Float32:
        """Start over with a prompt; logits of its last token."""
        ...

    def step(self, token: int) -> Float32:
        """Append one token; logits of what follows it."""
        ...


class BundleContender:
    """The product: `trol_edge.Runtime`."""

    def __init__(self, job: Job) -> None:
        self.runtime = trol_edge.Runtime(job.bundle)
        self.session = self.runtime.session()
        bundle = self.runtime.bundle
        self.step_bytes = _float32_bytes(bundle, bundle.manifest.graphs["step"].weights)

    def encode(self, pixels: Float32) -> Any:
        return self.runtime._backend.encode_image(pixels)

    def prefill(self, ids: Sequence[int], features: Any) -> Float32:
        return self.session.prefill_features(ids, features)

    def step(self, token: int) -> Float32:
        return self.session.step_view(token)


class TorchContender:
    """The reference of export/model.py in FP32, both passes, as training and golden tests run it."""

    def __init__(self, job: Job) -> None:
        import torch

        from trol_edge.export.checkpoint import Checkpoint
        from trol_edge.export.model import EagerAttention, rope_tables

        checkpoint = Checkpoint(job.checkpoint)
        self.spec = spec = checkpoint.spec
        with torch.device("meta"):
            self.decoder: Any = checkpoint.family.decoder(spec)
            self.vision: Any = checkpoint.family.vision(spec)
        checkpoint.load_into(decoder=self.decoder, vision=self.vision)
        self.embedding = checkpoint.tensor("embedding")
        self.rope = rope_tables(spec.head_dim, spec.rope_theta, min(CONTEXT, spec.max_position_embeddings))
        self.torch, self.attend = torch, EagerAttention(spec, *self.rope)
        bundle = Bundle(job.bundle)
        self.step_bytes = _float32_bytes(bundle, bundle.manifest.graphs["step"].weights)

    def encode(self, pixels: Float32) -> Any:
        with self.torch.inference_mode():
            return self.vision(self.torch.from_numpy(pixels))

    def prefill(self, ids: Sequence[int], features: Any) -> Float32:
        with self.torch.inference_mode():
            tokens = self.torch.tensor(ids)
            x, mask = self.embedding[tokens].float()[None], None
            if features is not None:
                image = tokens == self.spec.image_token_id
                x[0, image] = features.flatten(0, 1)
                mask = image.float()[None, :, None]
            self.attend = type(self.attend)(self.spec, *self.rope)
            self.attend.positions = self.torch.arange(len(ids))
            x = self.decoder.traverse(x, mask, self.attend)
            return self._logits(x[:, -1])

    def step(self, token: int) -> Float32:
        with self.torch.inference_mode():
            self.attend.positions = self.torch.tensor([self.attend.length])
            return self._logits(self.decoder.step(self.embedding[token].float()[None, None], self.attend)[:, -1])

    def _logits(self, x: Any) -> Float32:
        logits: Float32 = self.decoder.logits(x)[0].numpy()
        return logits


class LlamaCppContender:
    """llama.cpp through the C functions of llama-cpp-python, in its defaults, on a GGUF file that `write_gguf` made."""

    def __init__(self, job: Job) -> None:
        self.lib = lib = importlib.import_module("llama_cpp")
        self.quiet = lib.llama_log_callback(lambda level, text, data: None)  # kept: C holds a pointer to it
        lib.llama_log_set(self.quiet, None)
        lib.llama_backend_init()
        self.model = lib.llama_model_load_from_file(job.gguf.encode(), lib.llama_model_default_params())
        params = lib.llama_context_default_params()
        params.n_ctx = params.n_batch = CONTEXT
        params.n_threads = params.n_threads_batch = job.threads
        self.context = lib.llama_init_from_model(self.model, params) if self.model else None
        if not self.context:
            raise BackendError(f"llama.cpp could not load {job.gguf}; delete it and run again")
        spec = Bundle(job.bundle).manifest.spec
        self.vocab_size = spec.vocab_size
        self.step_bytes = sum(
            _ggml_bytes(name, shape, job.contender) for name, shape in gguf_tensors(spec).items() if "token" not in name
        )

    def encode(self, pixels: Float32) -> Any:
        return None

    def prefill(self, ids: Sequence[int], features: Any) -> Float32:
        self.lib.llama_memory_clear(self.lib.llama_get_memory(self.context), True)
        return self._decode([i % self.vocab_size for i in ids])

    def step(self, token: int) -> Float32:
        return self._decode([token])

    def _decode(self, ids: Sequence[int]) -> Float32:
        tokens = (self.lib.llama_token * len(ids))(*ids)
        status = self.lib.llama_decode(self.context, self.lib.llama_batch_get_one(tokens, len(ids)))
        if status:
            raise BackendError(f"llama_decode returned {status}")
        logits = self.lib.llama_get_logits_ith(self.context, -1)  # waits for the result
        return np.ctypeslib.as_array(logits, (self.vocab_size,))


@dataclasses.dataclass(frozen=True)
class Kind:
    """How a contender is named, and what it computes."""

    label: str
    precision: str
    make: Callable[[Job], Contender]
    prefill_passes: int
    peer: bool = False


CONTENDERS = {
    "bundle": Kind("trol-edge bundle", "FP32", BundleContender, 2),
    "torch": Kind("torch reference", "FP32", TorchContender, 2),
    "F16": Kind("llama.cpp", "F16", LlamaCppContender, 1, peer=True),
    "Q8_0": Kind("llama.cpp", "Q8_0", LlamaCppContender, 1, peer=True),
}


# -- in a worker process ---------------------------------------------------------------------------------------


def worker() -> None:
    """Measure one contender: a Job as JSON on standard input, its numbers as the last line of standard output."""
    data = json.load(sys.stdin)
    job = Job(**data | {"shape": Shape(**data["shape"])})
    try:
        result = measure(job)
    except TrolEdgeError as error:
        result = {"error": str(error)}
    print("\n" + json.dumps(result))


def measure(job: Job) -> dict[str, Any]:
    """Times in seconds of one contender, each prompt `repeats` times, and its memory in bytes."""
    start = time.perf_counter()
    contender = CONTENDERS[job.contender].make(job)
    load_s = time.perf_counter() - start
    spec = Bundle(job.bundle).manifest.spec
    pixels = _pixels(job)
    times: dict[str, dict[str, list[float]]] = {
        name: {"vision_s": [], "prefill_s": [], "step_s": []} for name in job.prompts
    }
    for repeat in range(-1, job.shape.repeats):  # -1 is the warm-up
        for name, ids in job.prompts.items():
            pictured = spec.image_token_id in ids
            if repeat < 0 and pictured and not job.shape.full_warmup:
                continue
            clock = [time.perf_counter()]
            features = contender.encode(pixels) if pictured else None
            clock.append(time.perf_counter())
            logits = contender.prefill(ids, features)
            clock.append(time.perf_counter())
            steps = []
            for _ in range(job.shape.decode if repeat >= 0 else 4):
                token = int(logits.argmax())
                before = time.perf_counter()
                logits = contender.step(token)
                steps.append(time.perf_counter() - before)
            if not np.isfinite(logits).all():
                raise BackendError(f"{job.contender}: logits are not finite")
            if repeat >= 0:
                times[name]["vision_s"] += [clock[1] - clock[0]] if features is not None else []
                times[name]["prefill_s"].append(clock[2] - clock[1])
                times[name]["step_s"] += steps
    result = {"load_s": load_s, "peak_bytes": _peak_bytes(), "step_bytes": contender.step_bytes, "times": times}
    if isinstance(contender, BundleContender):
        result["own"] = own_cost(contender.runtime, job.picture, job.shape.own_steps)
    return result


class _Timed:
    """An inference session whose runs are timed."""

    def __init__(self, session: Any) -> None:
        self.session, self.seconds = session, 0.0

    def io_binding(self) -> Any:
        return self.session.io_binding()

    def run_with_iobinding(self, *arguments: Any) -> None:
        start = time.perf_counter()
        self.session.run_with_iobinding(*arguments)
        self.seconds = time.perf_counter() - start


def own_cost(runtime: trol_edge.Runtime, picture: str | None, steps: int) -> dict[str, list[float]]:
    """Seconds per answer token: {"total": whole stream steps, "inference": ONNX Runtime's call within each}."""
    open_runtime: Any = runtime
    if runtime._tokenizer is None:
        manifest = runtime.bundle.manifest
        open_runtime._tokenizer = stand_in_tokenizer(manifest.spec, manifest.prompt)
        picture = None
    open_runtime._ends = frozenset()  # the answer goes on past its end
    sessions = open_runtime._backend._sessions
    timed = sessions["step"] = _Timed(sessions["step"])
    stream = runtime.stream(QUESTION, picture, max_new_tokens=steps + 8)
    for _ in range(4):
        next(stream)
    out: dict[str, list[float]] = {"total": [], "inference": []}
    for _ in range(steps):
        start = time.perf_counter()
        next(stream)
        out["total"].append(time.perf_counter() - start)
        out["inference"].append(timed.seconds)
    sessions["step"] = timed.session
    return out


def stand_in_tokenizer(spec: ModelSpec, prompt: PromptSpec) -> Tokenizer:
    """A tokenizer of invented words with a model's vocabulary size: a checkpoint of random weights has none."""
    import tokenizers
    from tokenizers import models as kinds
    from tokenizers import normalizers

    special = [s for s in dict.fromkeys(("<unk>", *prompt.special_tokens, *prompt.end_markers)) if s != prompt.image]
    vocab = {token: i for i, token in enumerate(special)}
    vocab |= {f"▁w{i}": i for i in range(len(special), spec.image_token_id)} | {prompt.image: spec.image_token_id}
    made = tokenizers.Tokenizer(kinds.BPE(vocab=vocab, merges=[], unk_token="<unk>", fuse_unk=True))
    made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    made.add_tokens([tokenizers.AddedToken(t, special=True, normalized=False) for t in (*special, prompt.image)])
    return Tokenizer(made.to_str())


def _pixels(job: Job) -> Float32:
    manifest = Bundle(job.bundle).manifest
    if job.picture is not None:
        return preprocess([load_rgb(job.picture)], manifest.image)
    size = manifest.spec.vision.image_size
    return np.random.default_rng(0).standard_normal((1, 3, size, size), dtype=np.float32)


def _float32_bytes(bundle: Bundle, names: Sequence[str]) -> int:
    tensors = bundle.weights().tensors
    return sum(4 * int(np.prod(tensors[name].shape)) for name in names)


def _peak_bytes() -> int:
    """Peak resident set of this process, in bytes."""
    try:
        # ru_maxrss of a Linux process starts at the peak of the process that started it; this does not.
        lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))
    except (OSError, StopIteration):
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


# -- the llama.cpp model ---------------------------------------------------------------------------------------


def gguf_tensors(spec: ModelSpec) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a llama-architecture GGUF file with the decoder shape of `spec`."""
    d, f, e = spec.hidden_size, spec.intermediate_size, spec.head_dim
    out: dict[str, tuple[int, ...]] = {"token_embd.weight": (spec.vocab_size, d), "output_norm.weight": (d,)}
    out["output.weight"] = (spec.vocab_size, d)
    for i in range(spec.num_layers):
        out |= {
            f"blk.{i}.attn_norm.weight": (d,),
            f"blk.{i}.attn_q.weight": (spec.num_heads * e, d),
            f"blk.{i}.attn_k.weight": (spec.num_kv_heads * e, d),
            f"blk.{i}.attn_v.weight": (spec.num_kv_heads * e, d),
            f"blk.{i}.attn_output.weight": (d, spec.num_heads * e),
            f"blk.{i}.ffn_norm.weight": (d,),
            f"blk.{i}.ffn_gate.weight": (f, d),
            f"blk.{i}.ffn_up.weight": (f, d),
            f"blk.{i}.ffn_down.weight": (d, f),
        }
    return out


def _ggml_bytes(name: str, shape: tuple[int, ...], kind: str) -> int:
    count = int(np.prod(shape))
    return 4 * count if "norm" in name else 2 * count if kind == "F16" else count // 32 * 34


def write_gguf(path: Path, spec: ModelSpec, kind: str) -> None:
    """Write random weights of type "F16" or "Q8_0" (norms F32); one tensor in memory at a time."""
    gguf = importlib.import_module("gguf")
    stored, plain = gguf.GGMLQuantizationType[kind], gguf.GGMLQuantizationType.F32
    pool = 0.02 * np.random.default_rng(0).standard_normal(1 << 23, dtype=np.float32)
    matrix = pool.astype(np.float16) if kind == "F16" else gguf.quants.quantize(pool, stored)
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        unfinished = Path(folder) / path.name
        writer = gguf.GGUFWriter(unfinished, "llama")
        writer.add_context_length(spec.max_position_embeddings)
        writer.add_embedding_length(spec.hidden_size)
        writer.add_block_count(spec.num_layers)
        writer.add_feed_forward_length(spec.intermediate_size)
        writer.add_head_count(spec.num_heads)
        writer.add_head_count_kv(spec.num_kv_heads)
        writer.add_layer_norm_rms_eps(spec.rms_norm_eps)
        writer.add_rope_freq_base(spec.rope_theta)
        writer.add_rope_dimension_count(spec.head_dim)
        writer.add_vocab_size(spec.vocab_size)
        writer.add_tokenizer_model("no_vocab")
        tensors = gguf_tensors(spec)
        for name, shape in tensors.items():
            raw = plain if "norm" in name else stored
            writer.add_tensor_info(name, shape, np.dtype(np.float32), _ggml_bytes(name, shape, kind), raw_dtype=raw)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for name, shape in tensors.items():
            size = _ggml_bytes(name, shape, kind)
            writer.write_tensor_data(
                np.ones(shape, np.float32) if "norm" in name else np.resize(matrix, size // matrix.itemsize)
            )
        writer.close()
        os.replace(unfinished, path)


def prepare_gguf() -> None:
    """As a process: [bundle folder, path, kind] as JSON on standard input."""
    bundle, path, kind = json.load(sys.stdin)
    write_gguf(Path(path), Bundle(bundle).manifest.spec, kind)


# -- in the process that was started ---------------------------------------------------------------------------


def bench(
    shapes: Sequence[str] = tuple(SHAPES),
    *,
    rounds: int = 3,
    peers: bool = True,
    folder: str | os.PathLike[str] = FOLDER,
    bundles: Mapping[str, Path] | None = None,
    report: Report = lambda line: None,
) -> dict[str, Any]:
    """Measure everything; returns what `--json` writes. Rates per second, memory in bytes, names end in the unit.

    Checkpoints of random weights, bundles and GGUF files are made in `folder` (15 GB for 1.8b) and used again while
    neither checkpoint nor exporter changed; `bundles` (by shape) are taken as they are instead. Raises UsageError for
    an unknown shape and BackendError where nothing could be made to measure; a contender that fails has its error in
    its row.
    """
    unknown = [name for name in shapes if name not in SHAPES]
    if unknown or rounds < 1:
        raise UsageError(f"shapes {unknown} are none of {', '.join(SHAPES)}" if unknown else "rounds should be >= 1")
    report("memory bandwidth ...")
    start, before = time.perf_counter(), _cpu_seconds()
    result: dict[str, Any] = {"machine": machine(), "rounds": rounds, "notes": NOTES, "shapes": []}
    installed = all(importlib.util.find_spec(name) for name in ("llama_cpp", "gguf"))
    names = [name for name, kind in CONTENDERS.items() if not kind.peer or (peers and installed)]
    for shape in shapes:
        jobs = _prepare(SHAPES[shape], names, Path(folder), (bundles or {}).get(shape), report)
        samples: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
        for i in range(rounds):
            for name in names[i % len(names) :] + names[: i % len(names)]:  # nobody always goes first
                if not any("error" in sample for sample in samples[name]):
                    report(f"{jobs[name].shape.model}: round {i + 1} of {rounds}, {CONTENDERS[name].label} {name}")
                    samples[name].append(_run_job(jobs[name]))
        result["shapes"].append(_summary(shape, jobs["bundle"], samples))
        if peers and not installed:
            result["shapes"][-1]["contenders"].append(_row("F16", NOT_INSTALLED))
    result["seconds"] = time.perf_counter() - start
    if before is not None and (after := _cpu_seconds()) is not None:
        others = (after[0] - before[0]) - (after[1] - before[1])
        result["machine"]["others_cpus"] = max(0.0, others / result["seconds"])
    return result


def _prepare(shape: Shape, names: Sequence[str], folder: Path, bundle: Path | None, report: Report) -> dict[str, Job]:
    folder.mkdir(parents=True, exist_ok=True)
    picture = None
    if models.find(shape.model).repository is None:
        checkpoint = models.shipped_folder(shape.model)
        picture = checkpoint / "scene.png"
    else:
        checkpoint = folder / f"{shape.model}-checkpoint"
        if not (checkpoint / "config.json").is_file():
            report(f"{shape.model}: a checkpoint of random weights ...")
            _python("-m", "trol_edge", "synth", "--model", shape.model, "-o", str(checkpoint), "--json")
    bundle = bundle or _exported(shape.model, checkpoint, folder, report)
    manifest = Bundle(bundle).manifest
    if TOKENIZER in manifest.files:
        tokenizer = Tokenizer.from_file(bundle / TOKENIZER)
        prompts = {
            name: build_prompt(tokenizer, manifest.prompt, QUESTION, i) for name, i in (("text", 0), ("picture", 1))
        }
    else:
        text = np.random.default_rng(0).integers(3, manifest.spec.vocab_size, TEXT_TOKENS).tolist()
        image = [manifest.spec.image_token_id] * manifest.spec.vision.tokens_per_image
        prompts = {"text": text, "picture": text[: TEXT_TOKENS // 2] + image + text[TEXT_TOKENS // 2 :]}
    jobs = {}
    for name in names:
        gguf = folder / f"{shape.model}-{name}.gguf"
        if CONTENDERS[name].peer and not gguf.is_file():
            report(f"{shape.model}: {gguf.name} ...")
            _python("-c", _entry("prepare_gguf"), stdin=json.dumps([str(bundle), str(gguf), name]))
        picture_path = str(picture) if picture else None
        threads = machine_cores()
        jobs[name] = Job(name, str(checkpoint), str(bundle), str(gguf), prompts, picture_path, shape, threads)
    return jobs


def _exported(model: str, checkpoint: Path, folder: Path, report: Report) -> Path:
    bundle, stamp = folder / model, folder / f"{model}.stamp"
    made_of = _fingerprint(checkpoint)
    if not (bundle.is_dir() and stamp.is_file() and stamp.read_text(encoding="utf-8") == made_of):
        report(f"{model}: export ...")
        command = ("export", str(checkpoint), "-o", str(bundle), "--model", model, "--force", "--json")
        _python("-m", "trol_edge", *command)
        stamp.write_text(made_of, encoding="utf-8")
    return bundle


def _fingerprint(checkpoint: Path) -> str:
    """Changes with the checkpoint's files and with the sources that make a bundle of it."""
    digest = hashlib.sha256()
    for path in sorted(checkpoint.iterdir()):
        digest.update(f"{path.name} {path.stat().st_size} {path.stat().st_mtime_ns};".encode())
    own = Path(__file__)
    for folder in (own.parent, Path(trol_edge.__file__).parent):
        for path in sorted(folder.glob("*.py")):
            if path.name != own.name:
                digest.update(path.read_bytes())
    return digest.hexdigest()


def _entry(function: str) -> str:
    return f"from trol_edge.export.bench import {function}; {function}()"


def _python(*arguments: str, stdin: str = "") -> str:
    """Run Python in a new process; its standard output. BackendError with the end of its standard error."""
    root = str(Path(trol_edge.__file__).resolve().parents[1])
    path = os.pathsep.join(p for p in (root, os.environ.get("PYTHONPATH")) if p)
    done = subprocess.run(
        [sys.executable, *arguments], input=stdin, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": path}
    )
    if done.returncode:
        last = done.stderr.strip().splitlines()[-1:] or [f"exit status {done.returncode}"]
        raise BackendError(last[0])
    return done.stdout


def _run_job(job: Job) -> dict[str, Any]:
    try:
        output = _python("-c", _entry("worker"), stdin=json.dumps(dataclasses.asdict(job)))
        result: dict[str, Any] = json.loads(output.strip().splitlines()[-1])
        return result
    except (BackendError, ValueError, IndexError) as error:
        return {"error": str(error)}


def _summary(shape: str, job: Job, samples: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    manifest = Bundle(job.bundle).manifest
    image = manifest.spec.image_token_id
    prompts = {name: {"tokens": len(ids), "image_tokens": ids.count(image)} for name, ids in job.prompts.items()}
    rows = []
    for name, rounds in samples.items():
        failed = next((sample["error"] for sample in rounds if "error" in sample), None)
        row = _row(name, failed)
        rows.append(row)
        if failed is not None:
            continue
        row["peak_bytes"] = max(sample["peak_bytes"] for sample in rounds)
        row["load_s"] = statistics.median(sample["load_s"] for sample in rounds)
        row["step_weight_bytes"] = rounds[0]["step_bytes"]
        for prompt, counts in prompts.items():
            times = [sample["times"][prompt] for sample in rounds]
            vision = [1e3 * statistics.median(t["vision_s"]) for t in times if t["vision_s"]]
            row["prompts"][prompt] = {
                "prefill_tokens_per_s": _spread([counts["tokens"] / statistics.median(t["prefill_s"]) for t in times]),
                "decode_tokens_per_s": _spread([1 / statistics.median(t["step_s"]) for t in times]),
                "vision_ms": _spread(vision) if vision else None,
            }
    own = [sample["own"] for sample in samples["bundle"] if "own" in sample]
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
    }


def _row(name: str, error: str | None) -> dict[str, Any]:
    kind = CONTENDERS[name]
    return {
        "contender": kind.label,
        "precision": kind.precision,
        "prefill_passes": kind.prefill_passes,
        "decode_passes": 1,
        "error": error,
        "peak_bytes": None,
        "load_s": None,
        "step_weight_bytes": None,
        "prompts": {},
    }


def _spread(values: Sequence[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


# -- the machine -----------------------------------------------------------------------------------------------


def machine() -> dict[str, Any]:
    """What the numbers depend on: processor, memory, read bandwidth (GB/s), versions.

    "others_cpus", processors that other processes kept busy meanwhile on average, is filled in at the end.
    """
    versions = {"python": platform.python_version(), "trol-edge": trol_edge.__version__}
    for name in ("onnxruntime", "torch", "numpy", "llama-cpp-python"):
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return {
        "cpu": _proc("cpuinfo", "model name") or platform.processor() or platform.machine(),
        "system": f"{platform.system()} {platform.machine()}",
        "cores": machine_cores(),
        "ram_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "read_gb_per_s": read_bandwidth(machine_cores()),
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


def read_bandwidth(threads: int, size: int = 512 << 20, repeats: int = 5) -> float:
    """Best of several reads of `size` bytes of memory by all threads, in GB/s."""
    parts = np.array_split(np.ones(size // 8), threads)
    rates = []
    with ThreadPoolExecutor(threads) as pool:
        for _ in range(repeats):
            start = time.perf_counter()
            list(pool.map(np.max, parts))
            rates.append(size / (time.perf_counter() - start) / 1e9)
    return max(rates)


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
        f"{m['cpu']}, {m['cores']} cores, {m['ram_bytes'] / 1e9:.0f} GB memory read at {m['read_gb_per_s']:.0f} GB/s, "
        f"{m['system']}; {versions}; {result['rounds']} round(s) in {result['seconds'] / 60:.1f} minutes"
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
    for column in ("passes", "prefill tok/s", "decode tok/s", "GB/s", "vision ms", "memory GB"):
        table.add_column(column, justify="right", no_wrap=True)
    for row in shape["contenders"]:
        contender, passes = f"{row['contender']} {row['precision']}", f"{row['prefill_passes']}/{row['decode_passes']}"
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
            )
        table.add_section()
    console.print()
    console.print(table)
    for row in shape["contenders"]:
        if row["error"] is not None:
            console.print(f"{row['contender']} {row['precision']}: {row['error']}", markup=False)
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


@app.command(epilog="Example: python -m trol_edge.export.bench --shape nano --rounds 5")
def main(
    shape: Annotated[str, typer.Option(help="nano, 1.8b or all.")] = "all",
    rounds: Annotated[int, typer.Option(min=1, help="Turns that each contender takes.")] = 3,
    peers: Annotated[bool, typer.Option(help="Measure llama.cpp too, where it is installed.")] = True,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the numbers to this file too.")] = None,
    folder: Annotated[Path, typer.Option(help="Where models are made and kept; 1.8b needs 15 GB.")] = FOLDER,
) -> None:
    """Prefill and decode speed, peak memory and own cost per token: bundle, torch reference, llama.cpp."""
    err = Console(stderr=True, highlight=False)
    shapes = tuple(SHAPES) if shape == "all" else (shape,)
    try:
        result = bench(
            shapes, rounds=rounds, peers=peers, folder=folder, report=lambda line: err.print(line, style="dim")
        )
    except TrolEdgeError as error:
        err.print(f"error: {error}", style="red", markup=False, soft_wrap=True)
        raise typer.Exit(1) from error
    out = Console(highlight=False)
    out.width = max(out.width, 144)  # a row is a line, in a log file too
    show(result, out)
    if json_file:
        json_file.parent.mkdir(parents=True, exist_ok=True)
        json_file.write_text(json.dumps(result, indent=1), encoding="utf-8")


if __name__ == "__main__":
    app()
