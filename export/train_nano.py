"""Train `trol-nano`: a TroL of the 1.8B architecture, small enough to train on two CPU cores.

    python -m trol_edge.export.train_nano --out export/checkpoints/trol-nano

Stages, each skipped where its result already lies in the scratch folder:
1. pool       scenes rendered once, with a label for every patch
2. tokenizer  sentencepiece BPE over the prompt, the questions, their answers and plain English
3. encoder    the vision encoder alone, on patch labels through a head that is thrown away. Without this stage nothing
              binds: end to end from random values, half an hour reached 40-55 %.
4. decoder    encoder, projector and decoder on questions; half of the answers in step form from the middle on
5. evaluate   held-out scenes, generated tokens fed back, cached and uncached semantics; writes the report

Schedules follow the clock, not a step count, so that a shared machine changes the result a little but never the
duration. Two data-parallel processes with one thread each (gloo) are faster here than one process with two threads.

Axes: B images, P prompt-prefix tokens, I = 64 image tokens, R question rows, S tokens of a row, D hidden.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import itertools
import json
import math
import os
import pickle
import random
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from numpy.typing import NDArray
from safetensors.torch import save_file
from torch import Tensor, nn

from trol_edge.calibration import scenes
from trol_edge.calibration.scenes import COLOURS, GRID, PATCH, PIXELS, SHAPES, SIZES, Scene
from trol_edge.export import internlm2
from trol_edge.export.internlm2 import Vision
from trol_edge.export.model import Decoder, EagerAttention, rope_tables, rotate
from trol_edge.spec import ModelSpec, VisionSpec

WORLD = 2
SEED = 20
POOL = 64_000
ENCODER_SHARE = 0.23  # of the training time
IMAGE_TOKENS = GRID * GRID
MEAN = np.array((0.48145466, 0.4578275, 0.40821073), np.float32)
STD = np.array((0.26862954, 0.26130258, 0.27577711), np.float32)


def nano_spec(vocab_size: int) -> ModelSpec:
    """The shape of trol-nano: every mechanism of the 1.8B model (GQA, interleaved wqkv, partial LoRA, one gate)."""
    vision = VisionSpec(128, 512, 4, 4, PATCH, PIXELS, 1e-5, IMAGE_TOKENS)
    return ModelSpec(
        family="internlm2",
        hidden_size=128,
        intermediate_size=384,
        num_layers=5,
        num_heads=4,
        num_kv_heads=2,
        head_dim=32,
        vocab_size=vocab_size,
        embedding_rows=vocab_size + 1,
        rms_norm_eps=1e-5,
        rope_theta=1e6,
        max_position_embeddings=2048,
        lora_rank=16,
        eos_token_id=2,
        image_token_id=vocab_size,
        vision=vision,
    )


# --- stage 1: pool -----------------------------------------------------------------------------------------------

# Columns of the label array, with their number of classes (class 0: table) and their weight in the loss.
# The counts and the rank are what "how many" and "describe" need; a bidirectional encoder finds them easily.
LABELS: dict[str, tuple[int, float]] = {
    "colour": (len(COLOURS) + 1, 1.0),
    "shape": (len(SHAPES) + 1, 1.0),
    "size": (len(SIZES) + 1, 0.5),
    "is_centre": (2, 0.5),
    "same_colour": (6, 0.25),
    "same_shape": (6, 0.25),
    "same_size": (6, 0.25),
    "rank": (6, 0.25),
    "total": (6, 0.1),
}
CLASSES = sum(n for n, _ in LABELS.values())
POINTS = 4  # owner's centre x, y and the patch's own x, y, all in -1..1


@dataclasses.dataclass
class Pool:
    """pixels uint8 [N, 112, 112, 3]; labels int8 [N, 64, len(LABELS)]; points float32 [N, 64, 2]; N scenes."""

    pixels: NDArray[np.uint8]
    labels: NDArray[np.int8]
    points: NDArray[np.float32]
    scenes: list[Scene]


def patch_labels(scene: Scene) -> tuple[NDArray[np.int8], NDArray[np.float32]]:
    """Labels int8 [64, len(LABELS)] and centre of the owner float32 [64, 2] of every patch."""
    objects = scene.objects
    rows = np.zeros((len(objects) + 1, len(LABELS)), np.int8)
    points = np.zeros((len(objects) + 1, 2), np.float32)
    for i, o in enumerate(objects):
        alike = [sum(getattr(p, key) == getattr(o, key) for p in objects) for key in ("colour", "shape", "size")]
        rows[i, :3] = list(COLOURS).index(o.colour) + 1, SHAPES.index(o.shape) + 1, SIZES.index(o.size) + 1
        rows[i, 4:8] = *alike, i + 1
        points[i] = 2 * o.x / PIXELS - 1, 2 * o.y / PIXELS - 1
    labels = rows[scene.owners.reshape(-1)]  # owner -1 takes the last row: table
    for o in objects:
        labels[int(o.y) // PATCH * GRID + int(o.x) // PATCH, 3] = 1
    labels[:, 8] = len(objects)
    return labels, points[scene.owners.reshape(-1)]


def _render_part(args: tuple[int, int]) -> tuple[NDArray[np.uint8], NDArray[np.int8], NDArray[np.float32], list[Scene]]:
    drawn = [scenes.render(seed) for seed in range(*args)]
    labels, points = zip(*(patch_labels(scene) for _, scene in drawn), strict=True)
    return np.stack([p for p, _ in drawn]), np.stack(labels), np.stack(points), [scene for _, scene in drawn]


def make_pool(scratch: Path) -> None:
    """Render the training scenes once, on all cores."""
    step = 500
    pixels = np.lib.format.open_memmap(scratch / "pixels.tmp", "w+", np.uint8, (POOL, PIXELS, PIXELS, 3))
    labels, points, drawn = [], [], []
    first = scenes.TRAINING_SEED
    with mp.get_context("fork").Pool(WORLD) as workers:
        parts = workers.imap(_render_part, [(first + i, first + i + step) for i in range(0, POOL, step)])
        for i, part in enumerate(parts):
            pixels[i * step : (i + 1) * step] = part[0]
            labels.append(part[1])
            points.append(part[2])
            drawn += part[3]
            print(f"\rpool {100 * (i + 1) * step / POOL:5.1f} %", end="", flush=True)
    print()
    pixels.flush()
    np.savez(scratch / "labels.npz", labels=np.concatenate(labels), points=np.concatenate(points))
    (scratch / "scenes.pickle").write_bytes(pickle.dumps(drawn))
    os.replace(scratch / "pixels.tmp", scratch / "pixels.npy")


def load_pool(scratch: Path) -> Pool:
    arrays = np.load(scratch / "labels.npz")
    drawn: list[Scene] = pickle.loads((scratch / "scenes.pickle").read_bytes())  # written by make_pool just before
    return Pool(np.load(scratch / "pixels.npy", mmap_mode="r"), arrays["labels"], arrays["points"], drawn)


def normalise(pixels: NDArray[np.uint8]) -> Tensor:
    """Bytes [N, 112, 112, 3] -> float32 [N, 3, 112, 112], as the published preprocessing does."""
    values = (pixels.astype(np.float32) - 255 * MEAN) / (255 * STD)
    return torch.from_numpy(values.transpose(0, 3, 1, 2).copy())


@dataclasses.dataclass
class Views:
    """A batch of pictures, some of them mirrored: inputs and targets. pixels [B, 3, 112, 112]; labels int64
    [B, 64, len(LABELS)]; points [B, 64, POINTS]; which scenes of the pool, and which of them are mirrored, [B]."""

    pixels: Tensor
    labels: Tensor
    points: Tensor
    index: NDArray[np.int64]
    flipped: NDArray[np.bool_]


_GRID_POINTS = np.stack(np.meshgrid(*[(2 * np.arange(GRID) + 1) / GRID - 1] * 2), -1).reshape(-1, 2).astype(np.float32)


def sample_views(pool: Pool, count: int, rng: np.random.Generator) -> Views:
    index = np.sort(rng.choice(len(pool.scenes), count, replace=False))
    flipped = rng.random(count) < 0.5
    pixels, labels, points = pool.pixels[index], pool.labels[index].astype(np.int64), pool.points[index]
    pixels[flipped] = pixels[flipped, :, ::-1]
    grid_labels = labels.reshape(count, GRID, GRID, -1)
    grid_labels[flipped] = grid_labels[flipped, :, ::-1]
    rank, total = labels[..., 7], labels[..., 8]
    labels[..., 7] = np.where(flipped[:, None] & (rank > 0), total + 1 - rank, rank)
    grid_points = points.reshape(count, GRID, GRID, 2)
    grid_points[flipped] = grid_points[flipped, :, ::-1] * np.array([-1, 1], np.float32)
    own = np.broadcast_to(_GRID_POINTS, points.shape)
    targets = torch.from_numpy(np.concatenate((points, own), -1))
    return Views(normalise(pixels), torch.from_numpy(labels), targets, index, flipped)


# --- optimisation shared by encoder and decoder ------------------------------------------------------------------


class Muon:
    """Momentum whose update is orthogonalised (Newton-Schulz) per matrix; matrices of one shape go together."""

    def __init__(self, params: list[nn.Parameter], lr: float, scales: list[float], decay: float = 0.1) -> None:
        self.groups: dict[tuple[int, ...], list[tuple[nn.Parameter, float]]] = {}
        for p, scale in zip(params, scales, strict=True):
            self.groups.setdefault((*p.shape, int(1000 * scale)), []).append((p, scale))
        self.momentum = {key: torch.zeros(len(v), *v[0][0].shape) for key, v in self.groups.items()}
        self.lr, self.decay = lr, decay

    @torch.no_grad()
    def step(self, factor: float) -> None:
        for key, members in self.groups.items():
            grads = torch.stack([p.grad for p, _ in members])  # type: ignore[misc]
            momentum = self.momentum[key].lerp_(grads, 0.05)
            update = orthogonal(torch.lerp(grads, momentum, 0.95))
            rate = self.lr * factor * members[0][1]
            shape = math.sqrt(max(1.0, key[0] / key[1]))
            for (p, _), u in zip(members, update, strict=True):
                p.mul_(1 - rate * self.decay).add_(u, alpha=-rate * shape)


def orthogonal(g: Tensor) -> Tensor:
    """Five quintic Newton-Schulz steps: singular values of [N, a, b] go to about 1."""
    x = g.bfloat16()
    tall = x.shape[1] > x.shape[2]
    x = x.mT if tall else x
    x = x / (x.flatten(1).norm(dim=1)[:, None, None] + 1e-7)
    for _ in range(5):
        a = x @ x.mT
        x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
    out: Tensor = (x.mT if tall else x).float()
    return out


class Trainer:
    """Two optimisers, averaged gradients, and a learning rate that follows the clock.

    Parameters with two axes whose name `by_muon` accepts go to Muon, the rest to AdamW; `scale` maps a name to a
    factor on its rate.
    """

    def __init__(
        self, module: nn.Module, seconds: float, by_muon: Callable[[str], bool], scale: Callable[[str], float]
    ) -> None:
        named = [(n, p) for n, p in module.named_parameters() if p.requires_grad]
        self.params = [p for _, p in named]
        matrices = [(n, p) for n, p in named if p.dim() == 2 and by_muon(n)]
        rest = [(n, p) for n, p in named if not (p.dim() == 2 and by_muon(n))]
        self.muon = Muon([p for _, p in matrices], 0.012, [scale(n) for n, _ in matrices])
        groups = [{"params": [p], "scale": scale(n), "weight_decay": 0.05 if p.dim() > 1 else 0.0} for n, p in rest]
        self.adam = torch.optim.AdamW(groups, lr=1.1e-3, betas=(0.9, 0.98), foreach=True)
        self.seconds, self.start, self.progress, self.steps = seconds, time.monotonic(), 0.0, 0

    def step(self, loss: Tensor) -> None:
        """Backward, average over the processes (the clock with it), clip, update."""
        for p in self.params:
            p.grad = None
        loss.backward()
        grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in self.params]
        clock = torch.tensor([(time.monotonic() - self.start) / self.seconds])
        flat = torch.cat([g.reshape(-1) for g in grads] + [clock])
        dist.all_reduce(flat)
        flat /= WORLD
        self.progress, flat = min(1.0, float(flat[-1])), flat[:-1]
        flat *= min(1.0, 1.0 / (float(flat.norm()) + 1e-6))
        for p, g in zip(self.params, torch.split(flat, [p.numel() for p in self.params]), strict=True):
            p.grad = g.view_as(p)
        warm = min(1.0, (self.steps + 1) / 100)
        factor = warm * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * self.progress)))
        for group in self.adam.param_groups:
            group["lr"] = 1.1e-3 * factor * group["scale"]
        self.adam.step()
        self.muon.step(factor)
        self.steps += 1

    def eta(self) -> str:
        spent = time.monotonic() - self.start
        return f"step {self.steps} {spent / 60:.1f} of {self.seconds / 60:.1f} min"


def run_parallel(stage: Callable[..., None], scratch: Path, *args: Any) -> None:
    """Run `stage(rank, scratch, *args)` in WORLD processes that can average tensors."""
    rendezvous = Path(tempfile.mkdtemp(dir=scratch)) / "rendezvous"
    mp.spawn(_process, (stage, rendezvous, scratch, args), nprocs=WORLD)  # type: ignore[attr-defined, no-untyped-call]


def _process(rank: int, stage: Callable[..., None], rendezvous: Path, scratch: Path, args: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    # RMSNorm and LayerNorm take a bf16 input and FP32 weights here; the fused kernel they ask for is not needed.
    warnings.filterwarnings("ignore", message="Mismatch dtype between input and weight")
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=WORLD)
    torch.manual_seed(SEED)  # the same initial values everywhere; data differ by rank
    stage(rank, scratch, *args)
    dist.destroy_process_group()


# --- stage 3: encoder --------------------------------------------------------------------------------------------


def initialise_vision(vision: Vision) -> None:
    """Small normal values; two-dimensional sines and cosines as position embeddings.

    With random position embeddings "where" stood at 40-50 % and counting at 66 %: the sines matter.
    """
    for name, p in vision.named_parameters():
        if p.dim() > 1:
            nn.init.normal_(p, std=0.02 if name.startswith("patch") else p.shape[-1] ** -0.5 * 0.7)
        elif name.endswith("bias"):
            nn.init.zeros_(p)
    nn.init.normal_(vision.class_token, std=0.02)
    width = vision.positions.shape[1] // 4
    angles = torch.arange(GRID)[:, None] * torch.logspace(math.log10(1.5), math.log10(0.1), width)
    line = torch.cat((angles.sin(), angles.cos()), dim=1)  # [8, d/2]
    grid = torch.cat((line[:, None].expand(-1, GRID, -1), line[None].expand(GRID, -1, -1)), dim=-1)
    with torch.no_grad():
        vision.positions[0].zero_()
        vision.positions[1:] = grid.reshape(IMAGE_TOKENS, -1)


def patch_loss(head: nn.Linear, features: Tensor, views: Views) -> tuple[Tensor, dict[str, float]]:
    """How badly features [B, 64, d] tell the labels; and the accuracy of each label on object patches."""
    out = head(features).float()
    seen = out.detach()
    owned = views.labels[..., 0] > 0
    loss, offset, right = torch.zeros(()), 0, {}
    for column, (name, (classes, weight)) in enumerate(LABELS.items()):
        logits, target = out[..., offset : offset + classes], views.labels[..., column]
        loss = loss + weight * F.cross_entropy(logits.flatten(0, 1), target.flatten())
        # Object patches again: three quarters of the patches are table.
        loss = loss + weight * F.cross_entropy(logits[owned], target[owned])
        told = seen[..., offset : offset + classes][owned].argmax(-1)
        right[name] = float((told == target[owned]).float().mean())
        offset += classes
    centre, own = out[..., offset : offset + 2], out[..., offset + 2 :]
    error = F.smooth_l1_loss(centre[owned], views.points[owned][:, :2], beta=0.1)
    loss = loss + 2 * error + F.smooth_l1_loss(own, views.points[..., 2:], beta=0.1)
    right["centre_px"] = float((centre.detach()[owned] - views.points[owned][:, :2]).abs().mean()) * PIXELS / 2
    return loss, right


def train_encoder(rank: int, scratch: Path, minutes: float) -> None:
    pool = load_pool(scratch)
    vision = Vision(nano_spec(1))
    initialise_vision(vision)
    head = nn.Linear(128, CLASSES + POINTS)
    both = nn.ModuleDict({"vision": vision, "head": head})
    for p in (*vision.proj1.parameters(), *vision.proj2.parameters()):
        p.requires_grad_(False)
    trainer = Trainer(both, minutes * 60, lambda n: "vision.layers" in n, lambda n: 1.0)
    rng = np.random.default_rng((SEED, 1, rank))
    while trainer.progress < 1:
        views = sample_views(pool, 48, rng)
        with torch.autocast("cpu", torch.bfloat16):
            features = vision.encode(views.pixels)[-1][:, 1:]
            loss, right = patch_loss(head, features, views)
        trainer.step(loss)
        if rank == 0 and trainer.steps % 50 == 0:
            detail = " ".join(f"{k} {v:.3f}" for k, v in right.items())
            print(f"encoder {trainer.eta()} loss {float(loss):.3f} {detail}", flush=True)
        if rank == 0 and (trainer.steps % 500 == 0 or trainer.progress >= 1):
            save_atomically(
                both.state_dict(), scratch / ("encoder.pt" if trainer.progress >= 1 else "encoder-partial.pt")
            )


# --- stage 2: tokenizer and prompt -------------------------------------------------------------------------------

END, START = "[UNUSED_TOKEN_145]", "[UNUSED_TOKEN_146]"
SYSTEM = (
    "You are AI model created by Byung-Kwan Lee, Ph.D. candidate, KAIST EE, of which AI model name is TroL "
    "(Traversal of Layers). You must give helpful, detailed, and polite answers to the user's questions"
)
VOCABULARY = 800
# Plain English, so that the tokenizer does not fall back to bytes on other questions a person may type.
ENGLISH = """
the and that have for not with you this but his from they say her she will one all would there their what so up out if
about who get which go me when make can like time no just him know take people into year your good some could them see
other than then now look only come its over think also back after use two how our work first well way even new want
because any these give day most us is was are were been has had did said each many must through before right too mean
old same tell boy follow came show form three small set put end does another large big even such turn here why ask went
men read need land different home move try kind hand picture again change off play spell air away animal house point
page letter mother answer found study still learn should world high every near add food between own below country plant
last school father keep tree never start city earth eye light thought head under story saw left right few while along
might close something seem next hard open example begin life always those both paper together got group often run
robot camera table object image scene colour shape size place pick up put down the cup on the box please thank you
"""


def train_tokenizer(scratch: Path) -> None:
    """Sentencepiece BPE with byte fallback ("\n" is the byte piece) and InternLM2's ids and special pieces."""
    import sentencepiece

    rng = random.Random(SEED)
    drawn: list[Scene] = pickle.loads((scratch / "scenes.pickle").read_bytes())
    lines = [text for scene in drawn[:4000] for _, q, a in scenes.questions(scene, rng) for text in (q, a)]
    lines += [line for line in ("system", SYSTEM, "user", "assistant") for _ in range(2000)]
    words = ENGLISH.split()
    lines += [" ".join(rng.choices(words, k=12)) for _ in range(1500)]
    lines += [chr(c) for c in range(33, 127)] * 20
    rng.shuffle(lines)
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines),
        model_prefix=str(scratch / "tokenizer"),
        model_type="bpe",
        vocab_size=VOCABULARY,
        byte_fallback=True,
        add_dummy_prefix=False,
        remove_extra_whitespaces=False,
        normalization_rule_name="identity",
        character_coverage=1.0,
        unk_id=0,
        bos_id=1,
        eos_id=2,
        pad_id=-1,
        user_defined_symbols=[END, START],
        num_threads=WORLD,
        minloglevel=1,
    )


class Prompts:
    """The authors' prompt in token ids."""

    def __init__(self, model_file: Path) -> None:
        import sentencepiece

        self.pieces = sentencepiece.SentencePieceProcessor(model_file=str(model_file))
        self.end, self.start = self.pieces.piece_to_id(END), self.pieces.piece_to_id(START)
        line = self.encode("\n")
        self.prefix = [1, self.start, *self.encode("system\n" + SYSTEM), self.end, *line, self.start]
        self.prefix += self.encode("user\n")
        self.tail = [self.end, *line, self.start, *self.encode("assistant\n")]

    @property
    def vocab_size(self) -> int:
        return int(self.pieces.get_piece_size())

    def encode(self, text: str) -> list[int]:
        ids: list[int] = self.pieces.encode(text)
        return ids

    def question(self, question: str) -> list[int]:
        """Everything behind the image."""
        return [*self.encode("\n" + question), *self.tail]

    def decode(self, ids: list[int]) -> str:
        text: str = self.pieces.decode(ids)
        return text

    def ends(self, text: str) -> list[int]:
        """For every token of `text` (ASCII), the number of characters up to its end."""
        lengths = [1 if piece.startswith("<0x") else len(piece) for piece in self.pieces.encode(text, out_type=str)]
        return list(itertools.accumulate(lengths))


# --- stage 4: decoder --------------------------------------------------------------------------------------------

ROWS, ROW_TOKENS = 3, 64  # question rows per image and their length
KIND_WEIGHTS = {"colour": 1, "shape": 1, "size": 1, "exists": 1.8, "where": 1.8, "count": 2.4, "relation": 1.6}
# Attention is taught in these layers: a token that names objects looks at them, a token that answers too.
NAMED_LAYER, ANSWER_LAYER = 1, 3


class Nano(nn.Module):
    """The three parts of a checkpoint; the parameter names are those of the exporter's modules."""

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        self.spec = spec
        self.embedding = nn.Embedding(spec.embedding_rows, spec.hidden_size)
        self.vision = Vision(spec)
        self.decoder = Decoder(spec)
        cos, sin = rope_tables(spec.head_dim, spec.rope_theta, spec.max_position_embeddings)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)
        self.cos: Tensor
        self.sin: Tensor

    def initialise(self) -> None:
        initialise_vision(self.vision)
        nn.init.normal_(self.embedding.weight, std=0.5)
        for name, p in self.decoder.named_parameters():
            if name.endswith(("lora_b", "bias")):
                nn.init.zeros_(p)
            elif name.endswith("lora_a") or "qkv" in name or "mlp.gate" in name or "mlp.up" in name:
                nn.init.normal_(p, std=0.7 * p.shape[-1] ** -0.5)
            elif p.dim() == 2:
                nn.init.normal_(p, std=0.2 * p.shape[-1] ** -0.5)
        nn.init.normal_(self.vision.proj1.weight, std=0.3 * self.spec.vision.hidden_size**-0.5)
        nn.init.normal_(self.vision.proj2.weight, std=self.spec.hidden_size**-0.5)


class PackedAttention:
    """An `Attend` whose rows see a shared context and, of themselves, what `mask` allows.

    positions int64 [N, S] (N = 1: the same in all rows); mask float32 [N, 1, S, C+S], added to the scores;
    context: an earlier PackedAttention, whose row i is seen by the rows i*n .. i*n+n-1 (one row: by all).
    Keys and values are kept per pass, so that gradients flow into the context.
    """

    def __init__(self, model: Nano, positions: Tensor, mask: Tensor, context: list[PackedAttention]) -> None:
        self.spec, self.mask, self.context = model.spec, mask, context
        self.cos, self.sin = model.cos[positions][:, None], model.sin[positions][:, None]
        self.keys: dict[tuple[int, int], Tensor] = {}
        self.values: dict[tuple[int, int], Tensor] = {}
        self.queries: dict[tuple[int, int], Tensor] = {}
        self.all_keys: dict[tuple[int, int], Tensor] = {}

    def __call__(self, qkv: Tensor, layer: int, traversal: int) -> Tensor:
        h, g, e = self.spec.num_heads, self.spec.num_kv_heads, self.spec.head_dim
        n, s, _ = qkv.shape
        key = (layer, traversal)
        # FP32 here: rotary angles want it, and this CPU's attention kernel is no faster in bf16.
        parts = torch.split(qkv.float(), [h * e, g * e, g * e], dim=-1)
        q, k, v = (t.view(n, s, -1, e).transpose(1, 2) for t in parts)  # [N, heads, S, E]
        q, k = rotate(q, self.cos, self.sin), rotate(k, self.cos, self.sin)
        self.keys[key], self.values[key] = k, v
        k = torch.cat([*(_spread(c.keys[key], n) for c in self.context), k], dim=2)
        v = torch.cat([*(_spread(c.values[key], n) for c in self.context), v], dim=2)
        if key in ((NAMED_LAYER, 0), (ANSWER_LAYER, 0)):
            self.queries[key], self.all_keys[key] = q, k
        with torch.autocast("cpu", enabled=False):
            out = F.scaled_dot_product_attention(q, k, v, attn_mask=self.mask, enable_gqa=True)
        return out.transpose(1, 2).reshape(n, s, h * e)

    def alignment(self, layer: int, rows: Tensor, columns: Tensor, targets: Tensor) -> Tensor:
        """Mean -log of the attention that tokens (rows, columns) [M] of the first K/V head's queries pay to
        `targets` boolean [M, T]."""
        q, k = self.queries[layer, 0], self.all_keys[layer, 0]
        group = self.spec.num_heads // self.spec.num_kv_heads
        scores = torch.einsum("mhe,mte->mht", q[rows, :group, columns], k[rows, 0]) * self.spec.head_dim**-0.5
        logs = (scores + self.mask[rows, :, columns]).log_softmax(-1)
        mass: Tensor = logs.masked_fill(~targets[:, None], -30.0).logsumexp(-1)
        return -mass.mean()


def _spread(x: Tensor, rows: int) -> Tensor:
    """[m, G, C, E] -> [rows, G, C, E], every row repeated rows/m times."""
    m = x.shape[0]
    return x[:, None].expand(m, rows // m, *x.shape[1:]).reshape(rows, *x.shape[1:])


def causal(length: int, context: int) -> Tensor:
    """Additive mask float32 [1, 1, length, context + length]."""
    allowed = torch.ones(length, context + length, dtype=torch.bool).tril(context)
    return torch.zeros(1, 1, length, context + length).masked_fill_(~allowed, -1e9)


@dataclasses.dataclass
class Batch:
    """Packed questions of B pictures: N = B * ROWS rows of S = ROW_TOKENS tokens.

    ids, positions [N, S]; mask [N, 1, S, P+I+S]; single [N, S, 1]: 1 where a token is stepped, not traversed;
    at (rows, columns) [M] the token `target` [M] is due, with `weight` [M]; `question` [M] numbers the questions,
    `kinds` names them; named, answers: (rows, columns, patches [K, 64]) of the attention targets.
    """

    ids: Tensor
    positions: Tensor
    mask: Tensor
    single: Tensor
    rows: Tensor
    columns: Tensor
    target: Tensor
    weight: Tensor
    question: Tensor
    kinds: list[str]
    named: tuple[Tensor, Tensor, Tensor]
    answers: tuple[Tensor, Tensor, Tensor]


class Packer:
    """Draws questions about pictures and packs them into rows."""

    def __init__(self, prompts: Prompts, seed: int) -> None:
        self.prompts, self.rng = prompts, random.Random(seed)
        self.tokens = functools.lru_cache(100_000)(self._tokens)

    def _tokens(self, text: str, question: bool) -> tuple[list[int], list[int]]:
        if question:
            return self.prompts.question(text), self.prompts.ends("\n" + text)
        return self.prompts.encode(text), self.prompts.ends(text)

    def pack(self, drawn: list[Scene], single_rate: float) -> Batch:
        """single_rate: share of the questions whose answer is stepped."""
        n, context = len(drawn) * ROWS, len(self.prompts.prefix) + IMAGE_TOKENS
        ids = np.zeros((n, ROW_TOKENS), np.int64)
        positions = np.zeros((n, ROW_TOKENS), np.int64)
        segment = np.full((n, ROW_TOKENS), -1)
        single = np.zeros((n, ROW_TOKENS, 1), np.float32)
        due: list[tuple[int, int, int, float, int]] = []
        kinds: list[str] = []
        marks: tuple[list[tuple[int, int, NDArray[np.bool_]]], ...] = ([], [])
        for b, scene in enumerate(drawn):
            patches = scene.owners.reshape(-1)
            used = [0] * ROWS
            for item in self._items(scene):
                question, question_ends = self.tokens(item.question, True)
                answer, answer_ends = self.tokens(item.answer, False)
                length = len(question) + len(answer)
                fits = [r for r in range(ROWS) if used[r] + length <= ROW_TOKENS]
                if not fits:
                    break
                r, start = b * ROWS + fits[0], used[fits[0]]
                used[fits[0]] += length
                here = slice(start, start + length)
                ids[r, here] = question + answer
                positions[r, here] = context + np.arange(length)
                segment[r, here] = len(kinds)
                first = start + len(question) - 1  # the last token of the prompt: it tells the answer's first token
                if self.rng.random() < single_rate:
                    single[r, first + 1 : start + length] = 1
                share = 0.5 if item.kind == "describe" else 1.0
                due += [(r, first + j, t, share, len(kinds)) for j, t in enumerate((*answer, self.prompts.end))]
                for phrase, about in item.named:
                    stop = 1 + item.question.index(phrase) + len(phrase)
                    column = start + next(j for j, e in enumerate(question_ends) if e >= stop)
                    marks[0].append((r, column, np.isin(patches, about)))
                if item.kind == "describe":
                    offset = 0
                    for i in item.answer_objects:
                        o = scene.objects[i]
                        phrase = f"{o.size} {o.name}"
                        low = item.answer.index(phrase, offset)
                        offset = low + len(phrase)
                        told = [j for j, e in enumerate(answer_ends) if low < e <= offset]
                        marks[1].extend((r, first + j, patches == i) for j in told)
                elif item.answer_objects:
                    told = [0] if item.kind == "count" else list(range(len(answer)))
                    marks[1].extend((r, first + j, np.isin(patches, item.answer_objects)) for j in told)
                kinds.append(item.kind)
        own = (segment[:, :, None] == segment[:, None, :]) & np.tri(ROW_TOKENS, dtype=bool)
        mask = np.zeros((n, 1, ROW_TOKENS, context + ROW_TOKENS), np.float32)
        mask[:, 0, :, context:] = np.where(own, 0, -1e9)
        rows, columns, target, weight, number = (torch.tensor(c) for c in zip(*due, strict=True))
        named, answers = (
            (
                torch.tensor([m[0] for m in ms]),
                torch.tensor([m[1] for m in ms]),
                torch.from_numpy(np.stack([m[2] for m in ms])),
            )
            for ms in marks
        )
        return Batch(
            ids=torch.from_numpy(ids),
            positions=torch.from_numpy(positions),
            mask=torch.from_numpy(mask),
            single=torch.from_numpy(single),
            rows=rows,
            columns=columns,
            target=target,
            weight=weight,
            question=number,
            kinds=kinds,
            named=named,
            answers=answers,
        )

    def _items(self, scene: Scene) -> Iterator[scenes.Item]:
        if self.rng.random() < 0.5:
            item = scenes.ask(scene, "describe", self.rng)
            if item:
                yield item
        kinds, weights = list(KIND_WEIGHTS), list(KIND_WEIGHTS.values())
        while True:
            item = scenes.ask(scene, self.rng.choices(kinds, weights)[0], self.rng)
            if item:
                yield item


def read_prompts(model: Nano, prompts: Prompts, features: Tensor) -> list[PackedAttention]:
    """Traverse the shared prefix once and the B pictures; features [B, 64, D]. Returns both caches."""
    prefix = torch.tensor([prompts.prefix])
    p = prefix.shape[1]
    shared = PackedAttention(model, torch.arange(p)[None], causal(p, 0), [])
    model.decoder.traverse(model.embedding(prefix), None, shared)
    seen = PackedAttention(model, torch.arange(p, p + IMAGE_TOKENS)[None], causal(IMAGE_TOKENS, p), [shared])
    model.decoder.traverse(features, torch.ones(1, 1, 1), seen)
    return [shared, seen]


def answer_hidden(model: Nano, batch: Batch, attend: PackedAttention) -> Tensor:
    """`Decoder.traverse` where stepped tokens keep their first pass; [N, S, D]. Nobody sees a stepped token's second
    pass: behind it there are only stepped tokens of the same answer."""
    x: Tensor = model.embedding(batch.ids)
    for i, layer in enumerate(model.decoder.layers):
        o1 = layer(x, None, i, 0, attend)
        o2 = layer(o1, None, i, 1, attend)
        s = (0.5 * torch.tanh(model.decoder.gate(o1)) + 0.5) * (1 - batch.single)
        x = o1 * (1 - s) + o2 * s
    return x


def train_decoder(rank: int, scratch: Path, out: Path, minutes: float, batch_size: int) -> None:
    pool, prompts = load_pool(scratch), Prompts(scratch / "tokenizer.model")
    model = Nano(nano_spec(prompts.vocab_size))
    model.initialise()
    head = nn.Linear(128, CLASSES + POINTS)
    both = nn.ModuleDict({"model": model, "head": head})
    encoder = torch.load(scratch / "encoder.pt", weights_only=True)
    encoder = {k: v for k, v in encoder.items() if not k.startswith("vision.proj")}
    both.load_state_dict({k.replace("vision.", "model.vision.", 1): v for k, v in encoder.items()}, strict=False)
    trainer = Trainer(
        both,
        minutes * 60,
        by_muon=lambda n: "decoder.layers" in n or "proj" in n,
        scale=lambda n: 0.3 if "vision.layers" in n or ("vision.p" in n and "proj" not in n) else 1.0,
    )
    rng, packer = np.random.default_rng((SEED, 2, rank)), Packer(prompts, SEED + 1000 * rank)
    tally: dict[str, list[bool]] = {}
    saved = time.monotonic()
    while True:
        done = trainer.progress
        views = sample_views(pool, batch_size, rng)
        drawn = [
            pool.scenes[i].mirrored() if f else pool.scenes[i] for i, f in zip(views.index, views.flipped, strict=True)
        ]
        batch = packer.pack(drawn, 0.0 if done < 0.35 else 0.5)
        with torch.autocast("cpu", torch.bfloat16):
            features = model.vision.encode(views.pixels)[-1][:, 1:]
            context = read_prompts(model, prompts, model.vision.project(features).float())
            attend = PackedAttention(model, batch.positions, batch.mask, context)
            hidden = answer_hidden(model, batch, attend)[batch.rows, batch.columns]
            logits = model.decoder.logits(hidden).float()
            loss = F.cross_entropy(logits, batch.target, reduction="none")
            loss = (loss * batch.weight).sum() / batch.weight.sum()
            if done < 0.5:
                loss = loss + 0.2 * (1 - done / 0.5) * patch_loss(head, features, views)[0]
        if done < 0.8:
            fade = 0.25 * (1 - done / 0.8)
            for layer, (rows, columns, patches) in ((NAMED_LAYER, batch.named), (ANSWER_LAYER, batch.answers)):
                targets = torch.zeros(len(rows), batch.mask.shape[-1], dtype=torch.bool)
                targets[:, len(prompts.prefix) : len(prompts.prefix) + IMAGE_TOKENS] = patches
                loss = loss + fade * attend.alignment(layer, rows, columns, targets)
        trainer.step(loss)
        wrong = torch.zeros(len(batch.kinds)).index_add_(0, batch.question, (logits.argmax(-1) != batch.target).float())
        for kind, errors in zip(batch.kinds, wrong.tolist(), strict=True):
            tally.setdefault(kind, []).append(errors == 0)
        if rank == 0 and trainer.steps % 50 == 0:
            detail = " ".join(f"{k} {100 * sum(tally[k]) / len(tally[k]):.1f}" for k in scenes.KINDS if k in tally)
            asked = sum(map(len, tally.values())) * WORLD
            print(f"decoder {trainer.eta()} loss {float(loss.detach()):.3f} of {asked} answers: {detail}", flush=True)
            tally.clear()
        if rank == 0 and (time.monotonic() - saved > 180 or trainer.progress >= 1):
            save_atomically(both.state_dict(), scratch / "decoder-partial.pt")
            write_checkpoint(model, scratch / "tokenizer.model", out)
            saved = time.monotonic()
        if trainer.progress >= 1:
            break
    if rank == 0:
        save_atomically(both.state_dict(), scratch / "decoder.pt")


# --- the published layout ----------------------------------------------------------------------------------------


def published_tensors(model: Nano) -> dict[str, Tensor]:
    """Our parameters under the published names, FP16: the inverse of `internlm2.sources`."""
    ours = model.state_dict()
    ours["embedding"] = ours.pop("embedding.weight")
    tensors = {}
    for name, source in internlm2.sources(model.spec).items():
        value = ours.pop(name)
        if source.rows is not None:  # ours = published[rows], so published[rows] = ours
            value = torch.empty_like(value).index_copy_(0, source.rows, value)
        tensors[source.name] = value.half().contiguous()
    assert set(ours) == {"decoder.gate.weight", "decoder.gate.bias"}, ours.keys()
    unused = "vit.vision_tower.vision_model.post_layernorm."
    tensors[unused + "weight"] = torch.ones(model.spec.vision.hidden_size, dtype=torch.float16)
    tensors[unused + "bias"] = torch.zeros(model.spec.vision.hidden_size, dtype=torch.float16)
    return tensors


def published_configs(spec: ModelSpec) -> tuple[dict[str, Any], dict[str, Any]]:
    """config.json and clip_vision_config.json. `img_size` and `lora_rank` are ours: 490 and 256 are hard-coded
    in the authors' code."""
    config = {
        "architectures": ["TroLForCausalLM"],
        "attn_implementation": "eager",
        "auto_map": {"AutoConfig": "configuration_internlm2.InternLM2Config"},
        "bias": False,
        "bos_token_id": 1,
        "eos_token_id": spec.eos_token_id,
        "hidden_act": "silu",
        "hidden_size": spec.hidden_size,
        "img_size": spec.vision.image_size,
        "initializer_range": 0.02,
        "intermediate_size": spec.intermediate_size,
        "lora_rank": spec.lora_rank,
        "max_position_embeddings": spec.max_position_embeddings,
        "model_type": "internlm",
        "num_attention_heads": spec.num_heads,
        "num_hidden_layers": spec.num_layers,
        "num_key_value_heads": spec.num_kv_heads,
        "pad_token_id": 2,
        "rms_norm_eps": spec.rms_norm_eps,
        "rope_scaling": None,
        "rope_theta": spec.rope_theta,
        "tie_word_embeddings": False,
        "torch_dtype": "float16",
        "use_cache": True,
        "vocab_size": spec.vocab_size,
    }
    clip = {
        "model_type": "clip_vision_model",
        "hidden_act": "quick_gelu",
        "hidden_size": spec.vision.hidden_size,
        "image_size": spec.vision.image_size,
        "intermediate_size": spec.vision.intermediate_size,
        "layer_norm_eps": spec.vision.layer_norm_eps,
        "num_attention_heads": spec.vision.num_heads,
        "num_channels": 3,
        "num_hidden_layers": spec.vision.num_layers,
        "patch_size": spec.vision.patch_size,
    }
    return config, clip


def write_checkpoint(model: Nano, tokenizer: Path, out: Path) -> None:
    """A folder in the published layout. Each file is renamed into place, weights last."""
    out.mkdir(parents=True, exist_ok=True)

    def write(name: str, how: Callable[[Path], object]) -> None:
        how(out / (name + ".tmp"))
        (out / (name + ".tmp")).chmod(0o644)  # safetensors writes for the owner alone
        os.replace(out / (name + ".tmp"), out / name)

    def as_json(data: Any) -> Callable[[Path], object]:
        return lambda path: path.write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")

    config, clip = published_configs(model.spec)
    gate = {k: v.detach().half() for k, v in model.decoder.gate.state_dict().items()}
    write("config.json", as_json(config))
    write("clip_vision_config.json", as_json(clip))
    write("added_tokens.json", as_json({"<image>": model.spec.image_token_id}))
    write("tokenizer.model", lambda path: path.write_bytes(tokenizer.read_bytes()))
    repeated = {f"{i}.{k}": v.clone() for i in range(model.spec.num_layers) for k, v in gate.items()}
    write("trol_gating.pt", lambda path: torch.save(repeated, path))
    write("model.safetensors", lambda path: save_file(published_tensors(model), path, {"format": "pt"}))


# --- stage 5: evaluation -----------------------------------------------------------------------------------------

DEMO_SEED = scenes.HELD_OUT_SEED + 1_000_000  # beyond the scenes that are evaluated


def read_checkpoint(folder: Path) -> tuple[Nano, Prompts]:
    """The model as everybody else will read it: from the published layout, FP16 values widened to FP32."""
    from trol_edge.export.checkpoint import Checkpoint

    checkpoint = Checkpoint(folder)
    model = Nano(checkpoint.spec)
    checkpoint.load_into(decoder=model.decoder, vision=model.vision)
    model.embedding.weight = nn.Parameter(checkpoint.tensor("embedding").float())
    return model.eval(), Prompts(folder / "tokenizer.model")


@torch.no_grad()
def answer(model: Nano, prompts: Prompts, pixels: Tensor, asked: list[list[str]], cached: bool) -> list[list[str]]:
    """Greedy answers to the questions `asked` about each picture; pixels [B, 3, 112, 112].

    cached: answer tokens are stepped; otherwise they are traversed against both passes' keys and values, which
    equals running the whole sequence again for every token.
    """
    images = len(asked)
    prefix = model.embedding(torch.tensor([prompts.prefix])).expand(images, -1, -1)
    x = torch.cat((prefix, model.vision(pixels)), dim=1)
    context = x.shape[1]
    image_mask = torch.zeros(1, context, 1)
    image_mask[:, prefix.shape[1] :] = 1
    attend = EagerAttention(model.spec, model.cos, model.sin)
    attend.positions = torch.arange(context)
    model.decoder.traverse(x, image_mask, attend)

    picture = torch.tensor([i for i, questions in enumerate(asked) for _ in questions])
    for cache in (*attend.keys, *attend.values):
        cache[:] = [None if t is None else t[picture] for t in cache]
    ids = [prompts.question(question) for questions in asked for question in questions]
    lengths = torch.tensor([len(row) for row in ids])
    width = int(lengths.max())
    padded = torch.tensor([row + [0] * (width - len(row)) for row in ids])
    attend.positions = context + torch.arange(width)
    hidden = model.decoder.traverse(model.embedding(padded), None, attend)  # causal: padding at the end is never seen
    last = hidden[torch.arange(len(ids)), lengths - 1]

    told: list[list[int]] = [[] for _ in ids]
    running = torch.ones(len(ids), dtype=torch.bool)
    for count in range(64):
        token = model.decoder.logits(last[:, None])[:, 0].argmax(-1)
        running &= (token != prompts.end) & (token != model.spec.eos_token_id)
        if not running.any():
            break
        for row in running.nonzero()[:, 0].tolist():
            told[row].append(int(token[row]))
        column = torch.arange(context + width + count + 1)
        attend.mask = ((column < context + lengths[:, None]) | (column >= context + width))[:, None, None]
        attend.positions = (context + lengths + count)[:, None]
        x = model.embedding(token[:, None])
        last = (model.decoder.step(x, attend) if cached else model.decoder.traverse(x, None, attend))[:, 0]
    texts = iter([prompts.decode(row) for row in told])
    return [[next(texts) for _ in questions] for questions in asked]


Tally = dict[str, dict[str, list[int]]]  # semantics -> kind -> [right, asked]


def _evaluate_part(args: tuple[Path, int, int]) -> Tally:
    folder, first, count = args
    torch.set_num_threads(1)
    model, prompts = read_checkpoint(folder)
    drawn = [scenes.render(seed) for seed in range(first, first + count)]
    asked = [scenes.questions(scene, random.Random(first + i)) for i, (_, scene) in enumerate(drawn)]
    pixels = normalise(np.stack([p for p, _ in drawn]))
    tally: Tally = {}
    for cached in (True, False):
        results = tally.setdefault("cached" if cached else "uncached", {kind: [0, 0] for kind in scenes.KINDS})
        for short in (True, False):  # apart, so that short answers do not wait for long ones
            chosen = [[q for q in questions if (q[0] != "describe") == short] for questions in asked]
            answers = answer(model, prompts, pixels, [[q[1] for q in questions] for questions in chosen], cached)
            for questions, texts in zip(chosen, answers, strict=True):
                for (kind, _, wanted), text in zip(questions, texts, strict=True):
                    results[kind][0] += text == wanted
                    results[kind][1] += 1
    return tally


def evaluate(folder: Path, count: int) -> Tally:
    """Exact match on one question of every kind about each of `count` held-out scenes."""
    step = 40
    total: Tally = {}
    parts = [(folder, scenes.HELD_OUT_SEED + i, min(step, count - i)) for i in range(0, count, step)]
    with mp.get_context("spawn").Pool(WORLD) as workers:
        for part in workers.imap_unordered(_evaluate_part, parts):
            for semantics, kinds in part.items():
                for kind, (right, asked) in kinds.items():
                    entry = total.setdefault(semantics, {}).setdefault(kind, [0, 0])
                    entry[0] += right
                    entry[1] += asked
    return total


def percentages(tally: Tally) -> dict[str, dict[str, float]]:
    """Accuracy in percent per kind, and over all short questions as "short"."""
    out = {}
    for semantics, kinds in tally.items():
        short = [kinds[kind] for kind in scenes.SHORT_KINDS]
        rows = {**kinds, "short": [sum(n for n, _ in short), sum(n for _, n in short)]}
        out[semantics] = {kind: round(100 * right / max(1, asked), 2) for kind, (right, asked) in rows.items()}
    return out


def demo_scene() -> tuple[NDArray[np.uint8], str, str]:
    """The first scene of four objects from DEMO_SEED on with a "left of" question: picture, question, answer."""
    for seed in range(DEMO_SEED, DEMO_SEED + 1000):
        pixels, scene = scenes.render(seed)
        for kind, question, reply in scenes.questions(scene, random.Random(seed)):
            if kind == "relation" and "What is left of" in question and len(scene.objects) == 4:
                return pixels, question, reply
    raise AssertionError("no such scene")


def write_demo(out: Path) -> None:
    from PIL import Image

    out.mkdir(parents=True, exist_ok=True)
    Image.fromarray(demo_scene()[0]).save(out / "scene.png")


def write_report(out: Path, minutes: dict[str, float], count: int) -> None:
    """Evaluate the written checkpoint and say how it came to be: report.json, REPORT.md."""
    model, prompts = read_checkpoint(out)
    tally = evaluate(out, count)
    accuracy = percentages(tally)
    _, question, wanted = demo_scene()
    from PIL import Image

    pixels = normalise(np.asarray(Image.open(out / "scene.png"))[None])
    texts = answer(model, prompts, pixels, [[question, "Describe the scene."]], True)[0]
    report = {
        "model": "trol-nano",
        "machine": "2 cores x86-64",
        "parameters": sum(p.numel() for p in model.parameters()),
        "stored_as": "FP16",
        "evaluated_as": "FP16 values widened to FP32, greedy, generated tokens fed back, exact match",
        "training_scenes": POOL,
        "held_out_scenes": count,
        "held_out_seeds": [scenes.HELD_OUT_SEED, scenes.HELD_OUT_SEED + count - 1],
        "minutes": {stage: round(value, 1) for stage, value in minutes.items()},
        "accuracy_percent": accuracy,
        "right_and_asked": tally,
        "demo": {"picture": "scene.png", "question": question, "right": wanted, "answer": texts[0], "scene": texts[1]},
    }
    (out / "report.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    asked = tally["cached"]
    lines = [
        "# trol-nano",
        "",
        "A TroL of the 1.8B architecture (InternLM2 family), trained from random values to answer questions about",
        "rendered 112x112 tabletop scenes. It exists to test, measure and show the whole path with weights that mean",
        "something; it knows nothing but these scenes.",
        "",
        f"- {report['parameters']:,} parameters, stored as FP16 in the published layout",
        f"- trained on {report['machine']}, {sum(minutes.values()):.0f} minutes in all: "
        + ", ".join(f"{stage} {value:.1f}" for stage, value in minutes.items()),
        f"- {POOL:,} training scenes (mirrored at random); accuracy on {count} other scenes",
        "- train again: `python -m trol_edge.export.train_nano --out <folder>`; the schedules follow the clock, so a",
        "  second run gives similar, not equal, weights",
        "",
        "Exact match in percent, greedy, generated tokens fed back. Cached: traverse the prompt, step the answer.",
        "Uncached: traverse every token.",
        "",
        "| kind | asked | cached | uncached |",
        "| --- | ---: | ---: | ---: |",
    ]
    for kind in (*scenes.SHORT_KINDS, "short", "describe"):
        number = asked[kind][1] if kind in asked else sum(asked[k][1] for k in scenes.SHORT_KINDS)
        name = "**all short questions**" if kind == "short" else kind
        lines.append(f"| {name} | {number} | {accuracy['cached'][kind]:.1f} | {accuracy['uncached'][kind]:.1f} |")
    lines += [
        "",
        f'`scene.png` is a held-out scene. "{question}": **{texts[0]}** (right: {wanted}). "Describe the scene.":',
        f"{texts[1]}",
        "",
        "What was learnt, and how: `train_nano.py`. What is asked, and what makes an answer unambiguous:",
        "`calibration/scenes.py`.",
    ]
    (out / "REPORT.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    print("\n".join(lines))


def save_atomically(state: Any, path: Path) -> None:
    torch.save(state, path.with_suffix(".tmp"))
    os.replace(path.with_suffix(".tmp"), path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of the checkpoint")
    parser.add_argument("--minutes", type=float, default=52, help="training time in all")
    parser.add_argument("--scratch", type=Path, default=Path(tempfile.gettempdir()) / "trol-nano")
    parser.add_argument("--batch", type=int, default=12, help="pictures per process and step")
    parser.add_argument("--evaluate", type=int, default=2000, help="held-out scenes to evaluate")
    args = parser.parse_args()
    scratch, clock = args.scratch, args.scratch / "minutes.json"
    scratch.mkdir(parents=True, exist_ok=True)
    minutes: dict[str, float] = json.loads(clock.read_text()) if clock.exists() else {}
    stages: dict[str, tuple[str, Callable[[], None]]] = {
        "pool": ("pixels.npy", lambda: make_pool(scratch)),
        "tokenizer": ("tokenizer.model", lambda: train_tokenizer(scratch)),
        "encoder": ("encoder.pt", lambda: run_parallel(train_encoder, scratch, ENCODER_SHARE * args.minutes)),
        "decoder": (
            "decoder.pt",
            lambda: run_parallel(train_decoder, scratch, args.out, (1 - ENCODER_SHARE) * args.minutes, args.batch),
        ),
    }
    write_demo(args.out)
    for stage, (product, make) in stages.items():
        if not (scratch / product).exists():
            start = time.monotonic()
            make()
            minutes[stage] = (time.monotonic() - start) / 60
            clock.write_text(json.dumps(minutes))
    write_report(args.out, minutes, args.evaluate)


if __name__ == "__main__":
    main()
