"""Gathers activation statistics of a checkpoint with the PyTorch reference, one layer's weights in memory at a time.

Stages run in order: vision.embed, every layer of the tower, vision.features, decoder.embed, every decoder layer (both
passes of the traversal, LoRA at image tokens, the gate), decoder.lm_head. If asked, the decoder's layers run once more
with second passes left out (left_out.layers.*, left_out.lm_head), to see what that does to the logits. The hidden
states of all samples are on disk between stages, so memory grows neither with the samples nor with the layers. A
finished stage is a file; a run that was killed continues after the last one.

Axes: N pictures or tiles of a sample, S tokens of its prompt (and answer, if known), D hidden, K inputs of a Linear.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fnmatch
import math
import os
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from trol_edge.bundle.folder import new_file, writing
from trol_edge.bundle.spec import ModelSpec
from trol_edge.calibration import samples as sampling
from trol_edge.calibration.collect import CachePeaks, Collector, GateCounts
from trol_edge.calibration.left_out import Runs, alone_and_from_top, causal, lora_mask, losses
from trol_edge.calibration.prompts import SamplePrompt, kinds_of, model_prompts
from trol_edge.calibration.samples import Progress, SampleSet
from trol_edge.errors import CalibrationError, TrolEdgeError, UsageError
from trol_edge.export.gates import EMBED, LEFT_OUT, SHOWN, read_array
from trol_edge.export.quantize.stats import (
    CACHE_PEAKS,
    PARTS,
    ROOM,
    STATE,
    CalibrationState,
    Statistics,
    part_path,
    read_state,
    write_part,
    write_state,
)
from trol_edge.export.reference.checkpoint import Checkpoint
from trol_edge.export.reference.layerwise import Layerwise
from trol_edge.prompt.images import preprocess

HIDDEN = "hidden"
COMPUTE = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def calibrate(
    checkpoint: str | os.PathLike[str],
    samples: SampleSet | str | os.PathLike[str] | Iterable[tuple[Any, str]] | None,
    cache: str | os.PathLike[str],
    *,
    count: int | None = sampling.DEFAULT_COUNT,
    compute: str = "float32",
    left_out: int = 0,
    overwrite: bool = False,
    progress: Progress = lambda what, done, total: None,
) -> Statistics:
    """Gather statistics of a checkpoint folder into the folder `cache`, or take them from there.

    samples: a SampleSet, or what `samples.load` takes (of which `count` are used). compute: type of Linears and
    attention; "bfloat16" is up to three times faster if the CPU has AVX512-BF16 (sums, norms and the residual stream
    stay float32). left_out: number of samples on which second passes are left out, of every layer alone and of all
    layers from one up, to see what that does to the logits. With L layers such a sample takes L^2 first and L^2/2
    second passes of a layer, beside the L and L of the statistics, and on disk 4 L times its hidden states. overwrite:
    replace statistics of another checkpoint or other samples.

    A finished cache of the same checkpoint and samples is returned at once, an unfinished one is continued; one that
    leaves out less is made again. Raises CalibrationError for a cache of something else, if no sample is usable, and
    if activations are NaN or infinite; CheckpointError for an unusable checkpoint.
    """
    if compute not in COMPUTE:
        raise UsageError(f"compute {compute!r} is not one of {', '.join(COMPUTE)}")
    source = Checkpoint(checkpoint)
    spec = source.spec
    side = spec.vision.image_size
    chosen = samples if isinstance(samples, SampleSet) else sampling.load(samples, count, progress, side)
    prompts, skipped = model_prompts(source, chosen)
    identity = source.identity()

    def started(left_out: int) -> tuple[_Run, CalibrationState]:
        run = _Run(source, prompts, Path(cache), COMPUTE[compute], left_out, progress)
        reasons = (*chosen.skipped, *skipped)
        return run, CalibrationState(identity, chosen.sha256, len(prompts), tuple(run.stages()), reasons, left_out)

    with writing(cache, CalibrationError):
        run, state = started(min(left_out, len(prompts)))
        found = read_state(run.folder) if not overwrite or (run.folder / STATE).is_file() else None
        if found is not None and found.left_out > state.left_out and started(found.left_out)[1] == found:
            run, state = started(found.left_out)  # it has all that is asked for, and more
        _open_cache(run.folder, found, state, overwrite)
    with torch.no_grad(), writing(run.folder, CalibrationError, ROOM):
        run.all()
    statistics = Statistics.load(run.folder, state.checkpoint)
    assert len(statistics.points) >= 4 * spec.num_layers
    return statistics


def _open_cache(folder: Path, found: CalibrationState | None, state: CalibrationState, overwrite: bool) -> None:
    """Make the cache folder, of the state `found`, ready for this run. What is of another one is refused, or removed
    with `overwrite`."""
    if found == state:
        return
    same = found is not None and dataclasses.replace(found, left_out=state.left_out, stages=state.stages) == state
    if found is not None and not same and not overwrite:
        what = "another checkpoint" if found.checkpoint != state.checkpoint else "other samples"
        raise CalibrationError(f"{folder}: statistics of {what}; choose another folder, or replace them (--force)")
    if folder.exists():
        ours = (STATE, f".{STATE}.*.part", PARTS, HIDDEN)
        others = [p.name for p in folder.iterdir() if not any(fnmatch.fnmatch(p.name, name) for name in ours)]
        if others or not folder.is_dir():
            raise CalibrationError(f"{folder}: holds other files ({', '.join(others[:3])}); choose another folder")
        for path in [*folder.glob(f"{PARTS}/*"), *folder.glob(f"{HIDDEN}/*"), *folder.glob(f"*{STATE}*")]:
            path.unlink()
    write_state(folder, state)


class _Run:
    """One run of all stages over all samples."""

    def __init__(
        self,
        source: Checkpoint,
        prompts: list[SamplePrompt],
        folder: Path,
        compute: torch.dtype,
        left_out: int,
        progress: Progress,
    ) -> None:
        self.source, self.prompts, self.folder, self.progress = source, prompts, folder, progress
        self.shown = prompts[: max(SHOWN, left_out)]  # of which single tokens are kept
        self.left_out = prompts[:left_out]
        self.spec: ModelSpec = source.spec
        self.model = Layerwise(source, compute)
        self.pictures = [p for p in prompts if p.squares]
        self.runs = Runs(alone_and_from_top(self.spec.num_layers), self.spec.num_layers)

    def stages(self) -> dict[str, Callable[[Collector], None]]:
        """The stages by name, in the order in which they run."""
        tower = {f"vision.layers.{i}": self._vision_layer(i) for i in range(self.spec.vision.num_layers)}
        layers = {f"decoder.layers.{i}": self._decoder_layer(i) for i in range(self.spec.num_layers)}
        again: dict[str, Callable[[Collector], None]] = {}
        if self.left_out:
            again = {f"left_out.layers.{i}": self._left_out_layer(i) for i in range(self.spec.num_layers)}
            again[LEFT_OUT] = self._left_out_lm_head
        return {
            "vision.embed": self._vision_embed,
            **tower,
            "vision.features": self._vision_features,
            EMBED: self._decoder_embed,
            **layers,
            "decoder.lm_head": self._lm_head,
            **again,
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
            done = 0  # the parts exist, but the hidden states that the next stage reads do not
        for number, (name, stage) in enumerate(stages.items()):
            if number < done:
                continue
            self.stage, self.number = name, number
            collector = Collector(seed=zlib.crc32(name.encode()))
            stage(collector)
            write_part(self.folder, name, collector.finished(), collector.peaks, collector.more, collector.arrays)
            keep = {self._hidden(n) for n in ([] if number + 1 == len(stages) else self._needed(number + 1))}
            for path in (self.folder / HIDDEN).glob("*"):
                if path not in keep:
                    path.unlink()

    def _needed(self, number: int) -> list[str]:
        """The stages whose hidden states stage `number` reads."""
        first = number == 0 or self.order[number] == "left_out.layers.0"  # what this one reads is in a part
        return [] if first else [self.order[number - 1]]

    def _hidden(self, name: str) -> Path:
        return self.folder / HIDDEN / f"{name}.f32"

    def _tick(self, done: int, total: int) -> None:
        """Report progress in samples times stages of this part of the model."""
        part = self.stage.split(".")[0]
        names = [n for n in self.order if n.startswith(part)]
        self.progress(part, names.index(self.stage) * total + done, len(names) * total)

    # -- hidden states on disk ---------------------------------------------------------------------------------

    def _each(self, shapes: Sequence[tuple[int, ...]], runs: int = 1) -> Iterator[tuple[int, Tensor]]:
        """Yield the hidden states that the stage before wrote, float32, sample by sample, `runs` of each."""
        with self._hidden(self.order[self.number - 1]).open("rb") as f:
            for i, shape in enumerate(shapes):
                array = np.fromfile(f, np.float32, math.prod(shape))
                if array.size != math.prod(shape):
                    raise CalibrationError(f"{f.name}: ends early; remove {self.folder} and calibrate again")
                yield i, torch.from_numpy(array.reshape(shape))
                if (i + 1) % runs == 0:
                    self._tick((i + 1) // runs, len(shapes) // runs)

    @contextlib.contextmanager
    def _writer(self) -> Iterator[Callable[[Tensor], None]]:
        """Write this stage's hidden states; the file gets its name when it is complete."""
        path = self._hidden(self.stage)
        with writing(path, CalibrationError, ROOM):
            path.parent.mkdir(exist_ok=True)
            with new_file(path) as part, part.open("wb") as f:

                def write(x: Tensor) -> None:
                    f.write(x.float().contiguous().numpy().data)

                yield write

    # -- vision ------------------------------------------------------------------------------------------------

    def _vision_embed(self, collector: Collector) -> None:
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
        """The shape of each sample's hidden states in the tower; the file's size gives the number of tokens."""
        width, squares = self.spec.vision.hidden_size, sum(p.squares for p in self.pictures)
        tokens = os.path.getsize(self._hidden(self.order[self.number - 1])) // (4 * width * squares)
        return [(p.squares, tokens, width) for p in self.pictures]

    def _vision_layer(self, index: int) -> Callable[[Collector], None]:
        def stage(collector: Collector) -> None:
            name = f"vision.layers.{index}"
            with self.model.part(name) as layer, collector.watch(layer, name), self._writer() as write:
                for i, x in self._each(self._vision_shapes()):
                    with collector.sample(self.pictures[i].name):
                        x = layer(x)
                        collector.peak(f"{name}.residual", x)
                        write(x)

        return stage

    def _vision_features(self, collector: Collector) -> None:
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

    def _decoder_embed(self, collector: Collector) -> None:
        used = np.unique(np.concatenate([p.ids for p in self.prompts]))
        table = self.model.embeddings(used)
        tokens, width = self.spec.vision.tokens_per_image, self.spec.hidden_size
        features = (x for _, x in self._each([(p.squares * tokens, width) for p in self.pictures]))
        with self._writer() as write:
            for i, prompt in enumerate(self.prompts):
                x = table[torch.from_numpy(np.searchsorted(used, prompt.ids))]
                if prompt.squares:
                    x[torch.from_numpy(prompt.ids == self.spec.image_token_id)] = next(features)
                collector.peak("decoder.embed.residual", x, prompt.name)
                write(x)
                if i < len(self.left_out):
                    collector.arrays[f"embedded/{i}"] = x.numpy()
        collector.more["prompts"] = [{"name": p.name, "question": p.question} for p in self.shown]
        collector.arrays |= {f"kinds/{i}": kinds_of(p, self.spec) for i, p in enumerate(self.shown)}

    def _decoder_layer(self, index: int) -> Callable[[Collector], None]:
        def stage(collector: Collector) -> None:
            name = f"decoder.layers.{index}"
            shapes = [(len(p.ids), self.spec.hidden_size) for p in self.prompts]
            gates, caches = GateCounts(), CachePeaks(self.spec.num_kv_heads, self.spec.head_dim)
            with self.model.part(name) as layer, collector.watch(layer, name), self._writer() as write:
                for i, x in self._each(shapes):
                    prompt = self.prompts[i]
                    lora = lora_mask(self.spec, prompt.ids == self.spec.image_token_id)
                    with collector.sample(prompt.name):
                        attend = causal(self.spec, len(prompt.ids))
                        passes = self.model.traverse(layer, 0, x[None], lora, attend)
                        for hidden in passes:
                            collector.peak(f"{name}.residual", hidden)
                        write(passes[2])
                    caches.add(attend)
                    s = self.model.share(passes[0])[0, :, 0].numpy()
                    gates.add(s, kinds_of(prompt, self.spec))
                    if i < len(self.shown):
                        collector.arrays[f"gate/{i}"] = s
            collector.more["gate"] = gates.finished()
            collector.arrays[CACHE_PEAKS] = caches.found

        return stage

    def _lm_head(self, collector: Collector) -> None:
        """Run the output layer on the tokens after the last picture, the only ones whose logits are ever needed."""
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

    # -- second passes left out --------------------------------------------------------------------------------

    def _branched(self, runs: int) -> Iterator[tuple[int, int, Tensor]]:
        """Yield (sample, run, hidden states) of the stage before."""
        shapes = [(len(p.ids), self.spec.hidden_size) for p in self.left_out for _ in range(runs)]
        for i, x in self._each(shapes, runs):
            yield *divmod(i, runs), x

    def _embedded(self) -> Iterator[tuple[int, int, Tensor]]:
        """Yield the decoder's input of each sample."""
        part = part_path(self.folder, EMBED)
        for k, prompt in enumerate(self.left_out):
            shape = (len(prompt.ids), self.spec.hidden_size)
            yield k, 0, torch.from_numpy(read_array(part, f"embedded/{k}", shape))

    def _left_out_layer(self, index: int) -> Callable[[Collector], None]:
        def stage(collector: Collector) -> None:
            before = self.runs.before[index]
            each = self._branched(len(before)) if index else self._embedded()
            with self.model.part(f"decoder.layers.{index}") as layer, self._writer() as write:
                for k, run, x in each:
                    images = self.left_out[k].ids == self.spec.image_token_id
                    for after in self.runs.through(self.model, layer, index, before[run], x, images):
                        write(after)

        return stage

    def _left_out_lm_head(self, collector: Collector) -> None:
        """Run the output layer where a token of an answer is chosen."""
        runs = self.runs.before[-1]
        rows: list[list[Tensor]] = [[] for _ in runs]
        with self.model.part("decoder.norm") as norm:
            for k, run, x in self._branched(len(runs)):
                rows[run].append(norm(x[self.left_out[k].question - 1 :].clone()))
        found = losses(self.source, self.runs, rows)
        collector.more["losses"] = [dataclasses.asdict(loss) for loss in found]
