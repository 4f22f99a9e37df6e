"""The contenders of `bench`, each in a separate process: our bundles, the torch reference, llama.cpp, OpenVINO.

This file also runs in the interpreter of a peer (see `bench --llama-python`), so at the top it imports only what the
thin runtime has. Every contender turns token ids into logits, and `measure` is the same for all of them.
"""

from __future__ import annotations

import dataclasses
import importlib
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

import trol_edge
from trol_edge.bundle.manifest import Bundle
from trol_edge.bundle.sizes import cpu_bytes
from trol_edge.bundle.spec import ModelSpec
from trol_edge.errors import BackendError, TrolEdgeError
from trol_edge.machine import identity
from trol_edge.prompt.images import load_rgb, preprocess
from trol_edge.prompt.template import PromptSpec
from trol_edge.prompt.tokenizer import Tokenizer

Float32 = NDArray[np.float32]

QUESTION = "What is left of the red circle?"
CONTEXT = 2048  # size of every contender's cache, in tokens
# Bytes of 32 weights with their scale, by type.
GGML_BLOCK = {"Q8_0": 34, "Q4_0": 18}


@dataclasses.dataclass(frozen=True)
class Shape:
    """A model to measure, and how much of it."""

    model: str
    repeats: int  # runs of every prompt in each round
    decode: int  # answer tokens per prompt
    own_steps: int  # answer tokens for the runtime's own cost
    full_warmup: bool  # run every prompt once before the clock starts; else the text prompt only


@dataclasses.dataclass(frozen=True)
class Task:
    """The arguments of a worker process, as JSON on its standard input."""

    contender: str  # a key of CONTENDERS
    checkpoint: str
    bundle: str  # bundle of trol-edge's own contenders; all use its spec and its picture settings
    model: str  # model of a peer: a GGUF file, a folder of OpenVINO
    prompts: dict[str, list[int]]  # name -> token ids
    picture: str | None  # file; None: random pixels
    shape: Shape
    threads: int  # for the peers; the others choose it themselves (the physical cores)


class Contender(Protocol):
    """One implementation of the decoder. Logits are float32 [V] and may be overwritten by the next call."""

    step_bytes: int  # weights that a step reads
    weight_bytes: int  # all weights in memory, which peak memory is compared with

    def encode(self, pixels: Float32) -> Any:
        """Encode pixels [1, 3, P, P] into image features, or None if pictures are not supported."""
        ...

    def prefill(self, ids: Sequence[int], features: Any) -> Float32:
        """Start again with a prompt; returns logits of its last token."""
        ...

    def step(self, token: int) -> Float32:
        """Append one token; returns the logits after it."""
        ...


class BundleContender:
    """The product: `trol_edge.Runtime`, without the second cache, which is not used here."""

    def __init__(self, job: Task) -> None:
        self.runtime = trol_edge.Runtime(job.bundle, prefix_reuse=False, selftest=False)
        self.session = self.runtime.session()
        bundle = self.runtime.bundle
        self.step_bytes = cpu_bytes(bundle, bundle.manifest.graphs["step"].weights)
        self.weight_bytes = self.runtime.model.backend.weight_bytes

    def encode(self, pixels: Float32) -> Any:
        return self.runtime.model.backend.encode_image(pixels)

    def prefill(self, ids: Sequence[int], features: Any) -> Float32:
        return self.session.prefill_features(ids, features)

    def step(self, token: int) -> Float32:
        return self.session.step_view(token)


class TorchContender:
    """The reference of export/reference/model.py in FP32, both passes, as training and golden tests run it."""

    def __init__(self, job: Task) -> None:
        import torch

        from trol_edge.export.reference.checkpoint import Checkpoint
        from trol_edge.export.reference.model import EagerAttention, rope_tables

        checkpoint = Checkpoint(job.checkpoint)
        self.spec = spec = checkpoint.spec
        with torch.device("meta"):
            self.decoder: Any = checkpoint.family.decoder(spec)
            self.vision: Any = checkpoint.family.vision(spec)
        checkpoint.load_into(decoder=self.decoder, vision=self.vision)
        self.embedding = checkpoint.tensor("embedding")
        self.rope = rope_tables(spec.head_dim, spec.rope_theta, min(CONTEXT, spec.max_position_embeddings))
        self.torch, self.attend = torch, EagerAttention(spec, *self.rope)
        self.step_bytes = 4 * sum(int(np.prod(checkpoint.shape(n))) for n in checkpoint.names() if _in_a_step(n))
        self.weight_bytes = 4 * sum(int(np.prod(checkpoint.shape(n))) for n in checkpoint.names())

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

    def __init__(self, job: Task) -> None:
        self.lib = lib = importlib.import_module("llama_cpp")
        self.quiet = lib.llama_log_callback(lambda level, text, data: None)  # kept, because C has a pointer to it
        lib.llama_log_set(self.quiet, None)
        lib.llama_backend_init()
        self.model = lib.llama_model_load_from_file(job.model.encode(), lib.llama_model_default_params())
        params = lib.llama_context_default_params()
        params.n_ctx = params.n_batch = CONTEXT
        params.n_threads = params.n_threads_batch = job.threads
        self.context = lib.llama_init_from_model(self.model, params) if self.model else None
        if not self.context:
            raise BackendError(f"llama.cpp could not load {job.model}; delete it and run again")
        spec = Bundle(job.bundle).manifest.spec
        self.vocab_size = spec.vocab_size
        self.step_bytes = self.weight_bytes = sum(
            ggml_bytes(name, shape, job.contender) for name, shape in gguf_tensors(spec).items() if "token" not in name
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


class OpenVinoContender:
    """OpenVINO's runtime in its defaults on a model from `prepare_openvino`, with INT4 weights and INT8 activations."""

    def __init__(self, job: Task) -> None:
        openvino = importlib.import_module("openvino")
        path = Path(job.model) / "openvino_model.xml"
        core = openvino.Core()
        model = core.read_model(path)
        _last_token_only(model)
        settings = {"INFERENCE_NUM_THREADS": job.threads, "PERFORMANCE_HINT": "LATENCY"}
        self.request = core.compile_model(model, "CPU", settings).create_infer_request()
        self.names = {port.get_any_name() for port in model.inputs}
        self.step_bytes = self.weight_bytes = path.with_suffix(".bin").stat().st_size
        self.vocab_size = Bundle(job.bundle).manifest.spec.vocab_size
        self.length = 0

    def encode(self, pixels: Float32) -> Any:
        return None

    def prefill(self, ids: Sequence[int], features: Any) -> Float32:
        self.request.reset_state()
        self.length = 0
        return self._infer(ids)

    def step(self, token: int) -> Float32:
        return self._infer([token])

    def _infer(self, ids: Sequence[int]) -> Float32:
        start, self.length = self.length, self.length + len(ids)
        feeds = {
            "input_ids": np.array([[i % self.vocab_size for i in ids]], np.int64),
            "attention_mask": np.ones((1, self.length), np.int64),
            "position_ids": np.arange(start, self.length, dtype=np.int64)[None],
            "beam_idx": np.zeros(1, np.int32),
        }
        self.request.infer({name: feeds[name] for name in self.names})
        logits: Float32 = self.request.get_tensor("logits").data[0, -1]
        return logits


def _last_token_only(model: Any) -> None:
    """Compute logits of the last token only, like OpenVINO's own text pipeline, which is a tenth faster."""
    operators = importlib.import_module("openvino.opset13")
    node = model.output("logits").get_node().input_value(0).get_node()
    while node.get_type_name() in ("Convert", "Result"):
        node = node.input_value(0).get_node()
    if node.get_type_name() == "MatMul":
        last = operators.slice(node.input_value(0), [-1], [np.iinfo(np.int32).max], [1], axes=[1])
        node.input(0).replace_source_output(last.output(0))
        model.validate_nodes_and_infer_types()


def prepare_openvino() -> None:
    """Entry point of a process that makes a random Llama of the decoder's shape.

    It reads [bundle folder, output, kind] as JSON from standard input.
    """
    bundle, folder, _ = json.load(sys.stdin)
    spec = Bundle(bundle).manifest.spec
    torch, transformers = importlib.import_module("torch"), importlib.import_module("transformers")
    intel = importlib.import_module("optimum.intel")
    config = transformers.LlamaConfig(
        vocab_size=spec.vocab_size,
        hidden_size=spec.hidden_size,
        intermediate_size=spec.intermediate_size,
        num_hidden_layers=spec.num_layers,
        num_attention_heads=spec.num_heads,
        num_key_value_heads=spec.num_kv_heads,
        head_dim=spec.head_dim,
        max_position_embeddings=spec.max_position_embeddings,
        rms_norm_eps=spec.rms_norm_eps,
        tie_word_embeddings=False,
    )
    with tempfile.TemporaryDirectory(dir=Path(folder).parent) as plain:
        torch.set_default_dtype(torch.float16)
        transformers.LlamaForCausalLM(config).save_pretrained(plain)
        torch.set_default_dtype(torch.float32)
        wanted = intel.OVWeightQuantizationConfig(bits=4, group_size=128, sym=True, ratio=1.0)
        made = intel.OVModelForCausalLM.from_pretrained(plain, export=True, compile=False, quantization_config=wanted)
        made.save_pretrained(folder)


@dataclasses.dataclass(frozen=True)
class Kind:
    """The name of a contender, and what it computes."""

    label: str
    precision: str
    make: Callable[[Task], Contender]
    prefill_passes: float  # of a prompt token through a layer, the mean over layers
    # For a peer: modules that must be installed, here or in its own interpreter; how to; what makes its model.
    modules: tuple[str, ...] = ()
    install: str = ""
    prepare: str = ""

    @property
    def peer(self) -> bool:
        """Whether it is somebody else's."""
        return bool(self.modules)


_LLAMA = ("llama_cpp", "gguf"), "llama-cpp-python gguf", "prepare_gguf"
_OPENVINO = ("openvino", "optimum.intel", "nncf"), "optimum-intel openvino nncf", "prepare_openvino"
CONTENDERS = {
    "fp32": Kind("trol-edge bundle", "FP32", BundleContender, 2),
    "int8": Kind("trol-edge bundle", "INT8", BundleContender, 2),
    "int8-half": Kind("trol-edge bundle", "INT8, second pass in half", BundleContender, 1.5),
    "int4": Kind("trol-edge bundle", "INT4", BundleContender, 2),
    "int4-dynamic": Kind("trol-edge bundle", "INT4, once", BundleContender, 2),
    "torch": Kind("torch reference", "FP32", TorchContender, 2),
    "Q8_0": Kind("llama.cpp", "Q8_0", LlamaCppContender, 1, *_LLAMA),
    "Q4_0": Kind("llama.cpp", "Q4_0", LlamaCppContender, 1, *_LLAMA),
    "openvino": Kind("OpenVINO", "INT4", OpenVinoContender, 1, *_OPENVINO),
}
PEERS = tuple(name for name, kind in CONTENDERS.items() if kind.peer)
OURS = tuple(name for name, kind in CONTENDERS.items() if kind.make is BundleContender)


# -- in a worker process ---------------------------------------------------------------------------------------


def worker() -> None:
    """Measure one contender: read a Task as JSON from standard input, print its numbers as the last line."""
    data = json.load(sys.stdin)
    job = Task(**data | {"shape": Shape(**data["shape"])})
    try:
        result = measure(job)
    except TrolEdgeError as error:
        result = {"error": str(error)}
    print("\n" + json.dumps(result))


def measure(job: Task) -> dict[str, Any]:
    """Measure times of one contender in seconds, each prompt `repeats` times, and its memory in bytes."""
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
            if pictured and job.contender in PEERS:
                continue  # peers see a picture as the same number of words
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
    result = {
        "load_s": load_s,
        "peak_bytes": identity.peak_memory(),
        "step_bytes": contender.step_bytes,
        "weight_bytes": contender.weight_bytes,
        "times": times,
    }
    if isinstance(contender, BundleContender):
        result["own"] = own_cost(contender.runtime, job.picture, job.shape.own_steps)
    return result


class _Timed:
    """A function whose calls are timed."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function, self.seconds = function, 0.0

    def __call__(self, *arguments: Any) -> Any:
        start = time.perf_counter()
        found = self.function(*arguments)
        self.seconds += time.perf_counter() - start
        return found


def own_cost(runtime: trol_edge.Runtime, picture: str | None, steps: int) -> dict[str, list[float]]:
    """Measure seconds per answer token: {"total": whole stream steps, "inference": ONNX Runtime's calls in each}."""
    model = runtime.model
    if model.tokenizer is None:
        manifest = runtime.bundle.manifest
        model.tokenizer = stand_in_tokenizer(manifest.spec, manifest.prompt)
        picture = None
    model.ends = frozenset()  # so that the answer continues after its end
    backend: Any = model.backend
    timed = backend.run_session = _Timed(backend.run_session)
    stream = runtime.stream(QUESTION, picture, max_new_tokens=steps + 8)
    for _ in range(4):
        next(stream)
    out: dict[str, list[float]] = {"total": [], "inference": []}
    for _ in range(steps):
        start, timed.seconds = time.perf_counter(), 0.0
        next(stream)
        out["total"].append(time.perf_counter() - start)
        out["inference"].append(timed.seconds)
    backend.run_session = timed.function
    return out


def stand_in_tokenizer(spec: ModelSpec, prompt: PromptSpec) -> Tokenizer:
    """Make a tokenizer of invented words with a model's vocabulary size, because random checkpoints have none."""
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


def _pixels(job: Task) -> Float32:
    manifest = Bundle(job.bundle).manifest
    if job.picture is not None:
        return preprocess([load_rgb(job.picture)], manifest.image)
    size = manifest.spec.vision.image_size
    return np.random.default_rng(0).standard_normal((1, 3, size, size), dtype=np.float32)


def _in_a_step(parameter: str) -> bool:
    return parameter.startswith("decoder.") and "lora" not in parameter and "gate." not in parameter[:13]


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


def ggml_bytes(name: str, shape: tuple[int, ...], kind: str) -> int:
    count = int(np.prod(shape))
    return 4 * count if "norm" in name else count // 32 * GGML_BLOCK[kind]


def write_gguf(path: Path, spec: ModelSpec, kind: str) -> None:
    """Write random weights of type "Q8_0" or "Q4_0" (norms F32); one tensor in memory at a time."""
    gguf = importlib.import_module("gguf")
    stored, plain = gguf.GGMLQuantizationType[kind], gguf.GGMLQuantizationType.F32
    pool = 0.02 * np.random.default_rng(0).standard_normal(1 << 23, dtype=np.float32)
    matrix = gguf.quants.quantize(pool, stored)
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
            writer.add_tensor_info(name, shape, np.dtype(np.float32), ggml_bytes(name, shape, kind), raw_dtype=raw)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for name, shape in tensors.items():
            size = ggml_bytes(name, shape, kind)
            writer.write_tensor_data(
                np.ones(shape, np.float32) if "norm" in name else np.resize(matrix, size // matrix.itemsize)
            )
        writer.close()
        os.replace(unfinished, path)


def prepare_gguf() -> None:
    """Entry point of a process that writes a GGUF file; it reads [bundle folder, path, kind] as JSON from stdin."""
    bundle, path, kind = json.load(sys.stdin)
    write_gguf(Path(path), Bundle(bundle).manifest.spec, kind)
