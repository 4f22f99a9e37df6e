"""Gathers activation statistics of a checkpoint with the PyTorch reference, one layer's weights in memory at a time.

Stages run in order: vision.embed, every layer of the tower, vision.features, decoder.embed, every decoder layer (both
passes of the traversal, LoRA at image tokens, the gate), decoder.lm_head. The hidden states of all samples are on disk
between stages, so memory grows neither with the samples nor with the layers. A finished stage is a file; a run that was
killed continues after the last one.

Axes: N pictures or tiles of a sample, S tokens of its prompt (and answer, if known), D hidden, K inputs of a Linear.
"""

from __future__ import annotations

import contextlib
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
from trol_edge.calibration.collect import Collector
from trol_edge.calibration.prompts import SamplePrompt, model_prompts
from trol_edge.calibration.samples import Progress, SampleSet
from trol_edge.errors import CalibrationError, TrolEdgeError, UsageError
from trol_edge.export.quantize.stats import (
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
from trol_edge.export.reference.layerwise import Layerwise, rope_of
from trol_edge.export.reference.model import EagerAttention
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
    overwrite: bool = False,
    progress: Progress = lambda what, done, total: None,
) -> Statistics:
    """Gather statistics of a checkpoint folder into the folder `cache`, or take them from there.

    samples: a SampleSet, or what `samples.load` takes (of which `count` are used). compute: type of Linears and
    attention; "bfloat16" is up to three times faster if the CPU has AVX512-BF16 (sums, norms and the residual stream
    stay float32). overwrite: replace statistics of another checkpoint or other samples.

    A finished cache of the same checkpoint and samples is returned at once, an unfinished one is continued. Raises
    CalibrationError for a cache of something else, if no sample is usable, and if activations are NaN or infinite;
    CheckpointError for an unusable checkpoint.
    """
    if compute not in COMPUTE:
        raise UsageError(f"compute {compute!r} is not one of {', '.join(COMPUTE)}")
    source = Checkpoint(checkpoint)
    spec = source.spec
    side = spec.vision.image_size
    chosen = samples if isinstance(samples, SampleSet) else sampling.load(samples, count, progress, side)
    prompts, skipped = model_prompts(source, chosen)
    run = _Run(source, prompts, Path(cache), COMPUTE[compute], progress)
    state = CalibrationState(
        checkpoint=source.identity(),
        samples_sha256=chosen.sha256,
        samples=len(prompts),
        stages=tuple(run.stages()),
        skipped=(*chosen.skipped, *skipped),
    )
    with writing(run.folder, CalibrationError):
        _open_cache(run.folder, state, overwrite)
    with torch.no_grad(), writing(run.folder, CalibrationError, ROOM):
        run.all()
    found = Statistics.load(run.folder, state.checkpoint)
    assert len(found.points) >= 4 * spec.num_layers
    return found


def _open_cache(folder: Path, state: CalibrationState, overwrite: bool) -> None:
    """Make the cache folder ready for this run. Anything else in it is refused, or removed with `overwrite`."""
    found = read_state(folder) if not overwrite or (folder / STATE).is_file() else None
    if found == state:
        return
    if found is not None and not overwrite:
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
        self, source: Checkpoint, prompts: list[SamplePrompt], folder: Path, compute: torch.dtype, progress: Progress
    ) -> None:
        self.source, self.prompts, self.folder, self.progress = source, prompts, folder, progress
        self.spec: ModelSpec = source.spec
        self.model = Layerwise(source, compute)
        self.pictures = [p for p in prompts if p.squares]

    def stages(self) -> dict[str, Callable[[Collector], None]]:
        """The stages by name, in the order in which they run."""
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
            done = 0  # the parts exist, but the hidden states that the next stage reads do not
        for number, (name, stage) in enumerate(stages.items()):
            if number < done:
                continue
            self.stage, self.number = name, number
            collector = Collector(seed=zlib.crc32(name.encode()))
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
        """Report progress in samples times stages of this part of the model."""
        part = self.stage.split(".")[0]
        names = [n for n in self.order if n.startswith(part)]
        self.progress(part, names.index(self.stage) * total + done, len(names) * total)

    # -- hidden states on disk ---------------------------------------------------------------------------------

    def _each(self, shapes: Sequence[tuple[int, ...]]) -> Iterator[tuple[int, Tensor]]:
        """Yield the hidden states that the stage before wrote, float32, sample by sample."""
        with self._hidden(self.order[self.number - 1]).open("rb") as f:
            for i, shape in enumerate(shapes):
                array = np.fromfile(f, np.float32, math.prod(shape))
                if array.size != math.prod(shape):
                    raise CalibrationError(f"{f.name}: ends early; remove {self.folder} and calibrate again")
                yield i, torch.from_numpy(array.reshape(shape))
                self._tick(i + 1, len(shapes))

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
            for prompt in self.prompts:
                x = table[torch.from_numpy(np.searchsorted(used, prompt.ids))]
                if prompt.squares:
                    x[torch.from_numpy(prompt.ids == self.spec.image_token_id)] = next(features)
                collector.peak("decoder.embed.residual", x, prompt.name)
                write(x)

    def _decoder_layer(self, index: int) -> Callable[[Collector], None]:
        def stage(collector: Collector) -> None:
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
