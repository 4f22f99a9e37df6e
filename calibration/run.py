"""Gather activation statistics of a checkpoint with the PyTorch reference, one layer's weights in memory at a time.

Stages run in order: vision.embed, every layer of the tower, vision.features, decoder.embed, every decoder layer (both
passes of the traversal, LoRA at image tokens, the gate), decoder.lm_head. The hidden states of all samples lie on disk
between stages, so memory grows neither with the samples nor with the layers. A finished stage is a file; a run that was
killed goes on behind the last one.

Axes: N pictures or tiles of a sample, S tokens of its prompt (and answer, where known), D hidden, K inputs of a Linear.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import os
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from trol_edge.bundle.spec import ModelSpec
from trol_edge.calibration import samples as sampling
from trol_edge.calibration.samples import Progress, SampleSet
from trol_edge.errors import CalibrationError, TrolEdgeError, UsageError
from trol_edge.export.quantize.stats import (
    BINS,
    PARTS,
    ROWS,
    STATE,
    PointStatistics,
    State,
    Statistics,
    part_path,
    read_state,
    write_part,
    write_state,
)
from trol_edge.export.reference import tokenizer
from trol_edge.export.reference.checkpoint import Checkpoint
from trol_edge.export.reference.layerwise import Layerwise, rope_of
from trol_edge.export.reference.model import EagerAttention, LoraLinear
from trol_edge.prompt.images import count_tiles, preprocess
from trol_edge.prompt.tokenizer import Tokenizer, build_prompt

HIDDEN = "hidden"
COMPUTE = {"float32": torch.float32, "bfloat16": torch.bfloat16}
HISTOGRAM_ROWS = 256  # of one call
RESIDUAL_NORMS = ("attention_norm", "mlp_norm", "norm1", "norm2")  # what stands before them is the residual stream


def calibrate(
    checkpoint: str | os.PathLike[str],
    samples: SampleSet | str | os.PathLike[str] | Iterable[tuple[Any, str]] | None,
    cache: str | os.PathLike[str],
    *,
    count: int | None = sampling.DEFAULT_COUNT,
    compute: str = "float32",
    overwrite: bool = False,
    progress: Progress = lambda what, done, total: None,
) -> Statistics:
    """Gather statistics of a checkpoint folder into the folder `cache`, or take them from there.

    samples: a SampleSet, or what `samples.load` takes (then `count` of them). compute: what Linears and attention
    compute in; "bfloat16" is up to three times faster where the CPU has AVX512-BF16 (sums, norms and the residual
    stream stay float32). overwrite: replace statistics of another checkpoint or other samples.

    A finished cache of the same checkpoint and samples is returned at once, an unfinished one continued. Raises
    CalibrationError for a cache of something else, for samples of which none is usable, and where activations are NaN
    or infinite; CheckpointError for an unusable checkpoint.
    """
    if compute not in COMPUTE:
        raise UsageError(f"compute {compute!r} is not one of {', '.join(COMPUTE)}")
    source = Checkpoint(checkpoint)
    spec = source.spec
    side = spec.vision.image_size
    chosen = samples if isinstance(samples, SampleSet) else sampling.load(samples, count, progress, side)
    prompts, skipped = model_prompts(source, chosen)
    run = _Run(source, prompts, Path(cache), COMPUTE[compute], progress)
    state = State(
        checkpoint=source.identity(),
        samples_sha256=chosen.sha256,
        samples=len(prompts),
        stages=tuple(run.stages()),
        skipped=(*chosen.skipped, *skipped),
    )
    _open_cache(run.folder, state, overwrite)
    with torch.no_grad():
        run.all()
    found = Statistics.load(run.folder, state.checkpoint)
    assert len(found.points) >= 4 * spec.num_layers
    return found


@dataclasses.dataclass(frozen=True)
class Prompt:
    """One sample as the model reads it."""

    name: str
    sample: sampling.Sample
    ids: NDArray[np.int64]  # [S]
    squares: int  # pictures or tiles
    question: int  # tokens before the answer


def model_prompts(source: Checkpoint, chosen: SampleSet) -> tuple[list[Prompt], list[str]]:
    """Token ids of every sample; those that are longer than the model's positions are skipped, with the reason."""
    spec, family = source.spec, source.family
    template, image = family.prompt(spec), family.image(spec)
    text = tokenizer.convert(source.folder, (template.image,))
    if text is None:
        raise CalibrationError(
            f"{source.folder}: no tokenizer, so prompts cannot be read; copy the published tokenizer files there"
        )
    words = Tokenizer(text, str(source.folder))
    prompts, skipped = [], []
    for sample in chosen.samples:
        tiles = count_tiles(sample.load(), image)
        ids = build_prompt(words, template, sample.prompt, tiles)
        question = len(ids)
        ids = words.encode([*ids, sample.answer]) if sample.answer else ids
        if len(ids) > spec.max_position_embeddings:
            skipped.append(f"{sample.name}: {len(ids)} tokens, the model knows {spec.max_position_embeddings}")
        else:
            prompts.append(Prompt(sample.name, sample, np.asarray(ids, np.int64), sum(tiles), question))
    if not prompts:
        raise CalibrationError(f"none of {len(skipped)} samples is usable; the first: {skipped[0]}")
    if not any(p.squares for p in prompts):
        raise CalibrationError(
            f"none of the {len(prompts)} samples has a picture, so the vision tower would go without statistics; "
            "give at least one with a picture"
        )
    return prompts, skipped


def _open_cache(folder: Path, state: State, overwrite: bool) -> None:
    """Make the cache folder ready for this run; whatever else it holds is refused, or removed with `overwrite`."""
    found = read_state(folder) if not overwrite or (folder / STATE).is_file() else None
    if found == state:
        return
    if found is not None and not overwrite:
        what = "another checkpoint" if found.checkpoint != state.checkpoint else "other samples"
        raise CalibrationError(f"{folder}: statistics of {what}; choose another folder, or replace them (--force)")
    if folder.exists():
        others = [p.name for p in folder.iterdir() if p.name not in (STATE, f"{STATE}.part", PARTS, HIDDEN)]
        if others or not folder.is_dir():
            raise CalibrationError(f"{folder}: holds other files ({', '.join(others[:3])}); choose another folder")
        for path in [*folder.glob(f"{PARTS}/*"), *folder.glob(f"{HIDDEN}/*"), *folder.glob(f"{STATE}*")]:
            path.unlink()
    try:
        write_state(folder, state)
    except OSError as error:
        raise CalibrationError(f"{folder}: cannot be written ({error.strerror}); choose another place") from error


class _Run:
    """All stages over all samples."""

    def __init__(
        self, source: Checkpoint, prompts: list[Prompt], folder: Path, compute: torch.dtype, progress: Progress
    ) -> None:
        self.source, self.prompts, self.folder, self.progress = source, prompts, folder, progress
        self.spec: ModelSpec = source.spec
        self.model = Layerwise(source, compute)
        self.pictures = [p for p in prompts if p.squares]

    def stages(self) -> dict[str, Callable[[_Collector], None]]:
        """What runs, by name, in order."""
        tower = {f"vision.layers.{i}": self._vision_layer(i) for i in range(self.spec.vision.num_layers)}
        layers = {f"decoder.layers.{i}": self._decoder_layer(i) for i in range(self.spec.num_layers)}
        return {
            "vision.embed": self._vision_embed,
            **tower,
            "vision.features": self._vision_features,
            "decoder.embed": self._decoder_embed,
            **layers,
            "decoder.lm_head": self._lm_head,
        }

    def all(self) -> None:
        """Run every stage that has no part yet."""
        stages = self.stages()
        self.order = list(stages)
        done = 0
        while done < len(self.order) and part_path(self.folder, self.order[done]).is_file():
            done += 1
        needed = [] if done == len(self.order) else self._needed(done)
        if not all(self._hidden(name).is_file() for name in needed):
            done = 0  # the parts are there, but what the next stage reads is not
        for number, (name, stage) in enumerate(stages.items()):
            if number < done:
                continue
            self.stage, self.number = name, number
            collector = _Collector(seed=zlib.crc32(name.encode()))
            stage(collector)
            write_part(self.folder, name, collector.finished(), collector.peaks)
            keep = {self._hidden(n) for n in ([] if number + 1 == len(stages) else self._needed(number + 1))}
            for path in (self.folder / HIDDEN).glob("*"):
                if path not in keep:
                    path.unlink()

    def _needed(self, number: int) -> list[str]:
        """The stages whose hidden states stage `number` reads."""
        return [self.order[number - 1]] if number else []

    def _hidden(self, name: str) -> Path:
        return self.folder / HIDDEN / f"{name}.f32"

    def _tick(self, done: int, total: int) -> None:
        """Progress in samples times stages, of this part of the model."""
        part = self.stage.split(".")[0]
        names = [n for n in self.order if n.startswith(part)]
        self.progress(part, names.index(self.stage) * total + done, len(names) * total)

    # -- hidden states on disk ---------------------------------------------------------------------------------

    def _each(self, shapes: Sequence[tuple[int, ...]]) -> Iterator[tuple[int, Tensor]]:
        """The hidden states that the stage before left, float32, one sample after the other."""
        with self._hidden(self.order[self.number - 1]).open("rb") as f:
            for i, shape in enumerate(shapes):
                array = np.fromfile(f, np.float32, math.prod(shape))
                if array.size != math.prod(shape):
                    raise CalibrationError(f"{f.name}: ends early; remove {self.folder} and calibrate again")
                yield i, torch.from_numpy(array.reshape(shape))
                self._tick(i + 1, len(shapes))

    @contextlib.contextmanager
    def _writer(self) -> Iterator[Callable[[Tensor], None]]:
        """Write this stage's hidden states; they take their name when all are there."""
        path = self._hidden(self.stage)
        path.parent.mkdir(exist_ok=True)
        unfinished = path.with_suffix(".part")
        try:
            with unfinished.open("wb") as f:

                def write(x: Tensor) -> None:
                    f.write(x.float().contiguous().numpy().data)

                yield write
                f.flush()
                os.fsync(f.fileno())
        except OSError as error:
            raise CalibrationError(f"{path}: cannot be written ({error.strerror}); make room") from error
        unfinished.replace(path)

    # -- vision ------------------------------------------------------------------------------------------------

    def _vision_embed(self, collector: _Collector) -> None:
        image = self.source.family.image(self.spec)
        with self.model.part("vision.embed") as tower, self._writer() as write:
            for i, prompt in enumerate(self.pictures):
                try:
                    pixels = preprocess(prompt.sample.load(), image)
                except TrolEdgeError as error:
                    raise CalibrationError(f"{prompt.name}: changed while calibrating ({error})") from error
                x = tower.embed(torch.from_numpy(pixels))
                collector.peak("vision.embed.residual", x, prompt.name)
                write(x)
                self._tick(i + 1, len(self.pictures))

    def _vision_shapes(self) -> list[tuple[int, ...]]:
        """Shape of each sample's hidden states in the tower; the number of tokens shows in the file."""
        width, squares = self.spec.vision.hidden_size, sum(p.squares for p in self.pictures)
        tokens = os.path.getsize(self._hidden(self.order[self.number - 1])) // (4 * width * squares)
        return [(p.squares, tokens, width) for p in self.pictures]

    def _vision_layer(self, index: int) -> Callable[[_Collector], None]:
        def stage(collector: _Collector) -> None:
            name = f"vision.layers.{index}"
            with self.model.part(name) as layer, collector.watch(layer, name), self._writer() as write:
                for i, x in self._each(self._vision_shapes()):
                    with collector.sample(self.pictures[i].name):
                        x = layer(x)
                        collector.peak(f"{name}.residual", x)
                        write(x)

        return stage

    def _vision_features(self, collector: _Collector) -> None:
        shapes, name = self._vision_shapes(), "vision.features"
        with (
            self.model.part(name) as tower,
            collector.watch(tower, "vision", only=("proj1", "proj2")),
            self._writer() as write,
        ):
            for i, x in self._each(shapes):
                with collector.sample(self.pictures[i].name):
                    x = tower.features(x)
                    collector.peak(name, x)
                    write(x)

    # -- decoder -----------------------------------------------------------------------------------------------

    def _decoder_embed(self, collector: _Collector) -> None:
        used = np.unique(np.concatenate([p.ids for p in self.prompts]))
        table = self.model.embeddings(used)
        tokens, width = self.spec.vision.tokens_per_image, self.spec.hidden_size
        features = (x for _, x in self._each([(p.squares * tokens, width) for p in self.pictures]))
        with self._writer() as write:
            for prompt in self.prompts:
                x = table[torch.from_numpy(np.searchsorted(used, prompt.ids))]
                if prompt.squares:
                    x[torch.from_numpy(prompt.ids == self.spec.image_token_id)] = next(features)
                collector.peak("decoder.embed.residual", x, prompt.name)
                write(x)

    def _decoder_layer(self, index: int) -> Callable[[_Collector], None]:
        def stage(collector: _Collector) -> None:
            name = f"decoder.layers.{index}"
            shapes = [(len(p.ids), self.spec.hidden_size) for p in self.prompts]
            with self.model.part(name) as layer, collector.watch(layer, name), self._writer() as write:
                for i, x in self._each(shapes):
                    prompt = self.prompts[i]
                    mask = torch.from_numpy(prompt.ids == self.spec.image_token_id).float()[None, :, None]
                    lora = mask if prompt.squares and self.spec.lora_rank else None
                    with collector.sample(prompt.name):
                        attend = EagerAttention(self.spec, *rope_of(self.spec, len(prompt.ids)))
                        attend.positions = torch.arange(len(prompt.ids))
                        passes = self.model.traverse(layer, 0, x[None], lora, attend)
                        for hidden in passes:
                            collector.peak(f"{name}.residual", hidden)
                        write(passes[2])

        return stage

    def _lm_head(self, collector: _Collector) -> None:
        """Of the tokens behind the last picture: the only ones whose logits are ever asked for."""
        name = "decoder.lm_head"
        hidden = []
        with self.model.part("decoder.norm") as norm:
            for i, x in self._each([(len(p.ids), self.spec.hidden_size) for p in self.prompts]):
                pictures = np.flatnonzero(self.prompts[i].ids == self.spec.image_token_id)
                with collector.sample(self.prompts[i].name):
                    rows = norm(x[pictures[-1] + 1 if len(pictures) else 0 :].clone())
                    collector.input(name, rows)
                hidden.append(rows)
        rows = torch.cat(hidden)
        for _, block in self.source.blocks("decoder.lm_head.weight"):
            collector.output(name, F.linear(rows, block.float()))


class _Collector:
    """Statistics of the Linears of one stage, through forward hooks, and peaks of what lies between them."""

    def __init__(self, seed: int) -> None:
        self.rng = np.random.default_rng(seed)
        self.points: dict[str, _Point] = {}
        self.peaks: dict[str, float] = {}
        self.sample_name = ""
        self._seen: tuple[Tensor, _Rows] | None = None  # q, k and v (gate and up) read the same tensor

    @contextlib.contextmanager
    def sample(self, name: str) -> Iterator[None]:
        """Name the sample under way, for messages."""
        self.sample_name, self._seen = name, None
        yield
        self._seen = None

    @contextlib.contextmanager
    def watch(self, module: nn.Module, prefix: str, only: Iterable[str] | None = None) -> Iterator[None]:
        """Observe every Linear below a module (or those named `only`), its norms and its attention."""
        handles = []
        for name, child in module.named_modules():
            path = f"{prefix}.{name}"
            if only is not None and name not in only:
                continue
            if isinstance(child, (nn.Linear, LoraLinear)):
                handles.append(child.register_forward_hook(self._hook(path)))
            elif name in RESIDUAL_NORMS:
                handles.append(child.register_forward_pre_hook(self._residual(f"{prefix}.residual")))
        try:
            with _Scores(lambda scores: self.peak(f"{prefix}.scores", scores)):
                yield
        finally:
            for handle in handles:
                handle.remove()

    def _hook(self, path: str) -> Callable[[nn.Module, Any, Any], None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            self.input(path, args[0])
            self.output(path, output)
            mask = args[1] if len(args) > 1 else None
            if isinstance(module, LoraLinear) and mask is not None and module.lora_a is not None:
                assert module.lora_b is not None
                middle = F.linear(args[0][mask[..., 0] > 0], module.lora_a)
                rows = self.input(f"{path}.lora_b", middle)
                self.output(f"{path}.lora_b", F.linear(rows.some.to(module.lora_b.dtype), module.lora_b))

        return hook

    def _residual(self, name: str) -> Callable[[nn.Module, Any], None]:
        return lambda module, args: self.peak(name, args[0])

    def peak(self, name: str, tensor: Tensor, sample: str | None = None) -> None:
        """Note the largest |value| of a tensor."""
        low, high = (float(v) for v in torch.aminmax(tensor))
        self.peaks[name] = max(self.peaks.get(name, 0.0), self._finite(name, max(-low, high), sample))

    def input(self, name: str, tensor: Tensor) -> _Rows:
        """Note what a Linear reads: [..., K]."""
        if self._seen is None or self._seen[0] is not tensor:
            rows = _Rows(tensor.detach().reshape(-1, tensor.shape[-1]).float(), self.rng)
            self._finite(name, float(rows.absmax.max()), None)
            self._seen = (tensor, rows)
        rows = self._seen[1]
        self.points.setdefault(name, _Point()).add(rows)
        return rows

    def output(self, name: str, tensor: Tensor) -> None:
        """Note what a Linear gives."""
        low, high = (float(v) for v in torch.aminmax(tensor))
        point = self.points[name]
        point.output_absmax = max(point.output_absmax, self._finite(f"{name} (output)", max(-low, high), None))

    def _finite(self, name: str, value: float, sample: str | None) -> float:
        if not math.isfinite(value):
            raise CalibrationError(
                f"NaN or infinite activations at {name}, sample {sample or self.sample_name!r}; the checkpoint's "
                "weights are damaged or too large for float32: `trol-edge export` names tensors that are not finite"
            )
        return value

    def finished(self) -> dict[str, PointStatistics]:
        """All points of the stage."""
        return {name: point.statistics() for name, point in self.points.items()}


class _Rows:
    """One call's input of a Linear, [n, K] float32: sums over all rows, and a few rows themselves."""

    def __init__(self, x: Tensor, rng: np.random.Generator) -> None:
        self.count = len(x)
        magnitude = x.abs()
        self.absmax = magnitude.amax(0)
        self.sum_abs = magnitude.sum(0, dtype=torch.float64)
        self.sum_square = magnitude.square_().sum(0, dtype=torch.float64)
        self.keys = rng.random(self.count)
        chosen = np.argsort(self.keys)[:HISTOGRAM_ROWS]
        self.keys = self.keys[chosen]
        self.some = x[torch.from_numpy(chosen)]


class _Point:
    """Running statistics of one point."""

    def __init__(self) -> None:
        self.count = 0
        self.output_absmax = 0.0
        self.top = 0.0
        self.histogram = torch.zeros(BINS, dtype=torch.int64)
        self.keys = np.empty(0)

    def add(self, rows: _Rows) -> None:
        if not self.count:
            self.absmax, self.sum_abs, self.sum_square = rows.absmax, rows.sum_abs, rows.sum_square
            self.rows = rows.some[:ROWS]
            self.keys = rows.keys[:ROWS]
        else:
            self.absmax = torch.maximum(self.absmax, rows.absmax)
            self.sum_abs, self.sum_square = self.sum_abs + rows.sum_abs, self.sum_square + rows.sum_square
            # The rows with the smallest random keys of all that were ever seen: a uniform choice.
            keys = np.concatenate((self.keys, rows.keys[:ROWS]))
            chosen = np.argsort(keys)[:ROWS]
            self.rows = torch.cat((self.rows, rows.some[:ROWS]))[torch.from_numpy(chosen)]
            self.keys = keys[chosen]
        self.count += rows.count
        self._grow(float(rows.absmax.max()))
        if self.top > 0:
            counts = torch.histc(rows.some.abs(), BINS, 0.0, self.top)
            self.histogram += counts.long()
        else:
            self.histogram[0] += rows.some.numel()

    def _grow(self, largest: float) -> None:
        """Let the histogram reach `largest`: its range is doubled, and neighbouring bins become one."""
        if self.top == 0:
            self.top = largest  # what was counted until now is zero, and in the first bin
        while self.top < largest:
            self.top *= 2
            merged = self.histogram.view(-1, 2).sum(1)
            self.histogram = torch.cat((merged, torch.zeros_like(merged)))

    def statistics(self) -> PointStatistics:
        return PointStatistics(
            count=self.count,
            absmax=self.absmax.numpy(),
            mean_abs=(self.sum_abs / self.count).float().numpy(),
            mean_square=(self.sum_square / self.count).float().numpy(),
            rows=self.rows.numpy(),
            histogram=self.histogram.numpy(),
            histogram_max=self.top,
            output_absmax=self.output_absmax,
        )


class _Scores(TorchFunctionMode):
    """Hand the attention scores, before mask and softmax, to a function; what attention computes stays as it is."""

    def __init__(self, note: Callable[[Tensor], None]) -> None:
        super().__init__()
        self.note = note

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.scaled_dot_product_attention:
            q, k = args[:2]  # [N, H, S, E], [N, G, T, E]
            group = q.shape[1] // k.shape[1]
            for head in range(q.shape[1]):  # one at a time: all heads together would be the largest tensor of the run
                self.note(q[:, head] @ k[:, head // group].transpose(-1, -2) / math.sqrt(q.shape[-1]))
        return func(*args, **(kwargs or {}))
