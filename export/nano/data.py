"""Training pictures of the small models: scenes that are rendered once, with a label for every patch, and batches.

Axes: N scenes of a pool, B pictures of a batch, T tiles of a picture (thumbnail included), I = 64 cells of the label
grid, P = 112 pixels of a tile's side.
"""

from __future__ import annotations

import dataclasses
import pickle
import sys
from pathlib import Path

import numpy as np
import torch
import torch.multiprocessing as mp
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from trol_edge.bundle.folder import new_file
from trol_edge.export import scenes
from trol_edge.export.scenes import COLOURS, GRID, PATCH, PIXELS, SHAPES, SIZES, Scene
from trol_edge.prompt import tiles
from trol_edge.prompt.images import ImageSpec

WORKERS = 2
CELLS = GRID * GRID  # cells of the label grid, and image tokens of a picture or tile

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
POINTS = 4  # owner's centre x, y and the cell's own x, y, all in -1..1


@dataclasses.dataclass(frozen=True)
class PoolSpec:
    """Describes the scenes of a pool: `count` seeds from `first` on, drawn `scale` times as large."""

    name: str
    first: int
    count: int
    scale: int


# Pictures of one tile, and larger ones for a model that cuts pictures into tiles.
SMALL = PoolSpec("small", scenes.TRAINING_SEED, 64_000, 1)
LARGE = PoolSpec("large", scenes.TRAINING_SEED + 64_000, 8_000, 2)


@dataclasses.dataclass
class Pool:
    """N scenes: pixels uint8 [N, P*scale, P*scale, 3]; labels int8 [N, I, len(LABELS)]; points float32 [N, I, 2]."""

    pixels: NDArray[np.uint8]
    labels: NDArray[np.int8]
    points: NDArray[np.float32]
    scenes: list[Scene]


def patch_labels(scene: Scene) -> tuple[NDArray[np.int8], NDArray[np.float32]]:
    """Labels int8 [I, len(LABELS)] of every cell, and the centre of its owner float32 [I, 2]."""
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


def _render_part(
    args: tuple[int, int, int],
) -> tuple[NDArray[np.uint8], NDArray[np.int8], NDArray[np.float32], list[Scene]]:
    first, count, scale = args
    drawn = [scenes.render(seed, scale) for seed in range(first, first + count)]
    labels, points = zip(*(patch_labels(scene) for _, scene in drawn), strict=True)
    return np.stack([p for p, _ in drawn]), np.stack(labels), np.stack(points), [scene for _, scene in drawn]


def make_pool(scratch: Path, spec: PoolSpec) -> None:
    """Render the scenes of a pool on all cores, unless they exist. The pixels are renamed into place last."""
    step = 250
    side = PIXELS * spec.scale
    labels, points, drawn = [], [], []
    with new_file(scratch / f"{spec.name}.npy") as unfinished:
        pixels = np.lib.format.open_memmap(unfinished, mode="w+", dtype=np.uint8, shape=(spec.count, side, side, 3))
        with mp.get_context("fork").Pool(WORKERS) as workers:
            starts = range(0, spec.count, step)
            jobs = [(spec.first + i, min(step, spec.count - i), spec.scale) for i in starts]
            for start, part in zip(starts, workers.imap(_render_part, jobs), strict=True):
                pixels[start : start + len(part[0])] = part[0]
                labels.append(part[1])
                points.append(part[2])
                drawn += part[3]
                if sys.stdout.isatty():
                    print(f"\rpool {spec.name} {100 * len(drawn) / spec.count:5.1f} %", end="", flush=True)
        print(f"\rpool {spec.name}: {spec.count} scenes")
        pixels.flush()
        np.savez(scratch / f"{spec.name}-labels.npz", labels=np.concatenate(labels), points=np.concatenate(points))
        (scratch / f"{spec.name}-scenes.pickle").write_bytes(pickle.dumps(drawn))


def load_scenes(scratch: Path, spec: PoolSpec) -> list[Scene]:
    drawn: list[Scene] = pickle.loads((scratch / f"{spec.name}-scenes.pickle").read_bytes())  # make_pool wrote it
    return drawn


def load_pool(scratch: Path, spec: PoolSpec) -> Pool:
    arrays = np.load(scratch / f"{spec.name}-labels.npz")
    pixels = np.load(scratch / f"{spec.name}.npy", mmap_mode="r")
    return Pool(pixels, arrays["labels"], arrays["points"], load_scenes(scratch, spec))


def normalise(squares: NDArray[np.uint8], image: ImageSpec) -> Tensor:
    """Turn bytes [N, P, P, 3] into float32 [N, 3, P, P], like the published preprocessing but for the last rounding."""
    mean, std = np.array(image.mean, np.float32), np.array(image.std, np.float32)
    values = (squares.astype(np.float32) - 255 * mean) / (255 * std)
    return torch.from_numpy(values.transpose(0, 3, 1, 2).copy())


def cut(pictures: NDArray[np.uint8], grid: tuple[int, int], image: ImageSpec) -> NDArray[np.uint8]:
    """Cut pictures [B, H, W, 3], stretched to a grid of tiles, as the runtime does: uint8 [B, T, P, P, 3]."""
    if grid == (1, 1):
        return pictures[:, None]
    size = (image.size * grid[0], image.size * grid[1])
    stretched = (np.asarray(Image.fromarray(p).resize(size, Image.Resampling.BICUBIC)) for p in pictures)
    return np.stack([np.stack(list(tiles.cut(p, image.size, image.max_tiles))) for p in stretched])


@dataclasses.dataclass
class Views:
    """A batch of pictures, some of them mirrored: inputs and targets. pixels uint8 [B, H, W, 3]; labels int64
    [B, I, len(LABELS)]; points [B, I, POINTS]; what each picture shows."""

    pixels: NDArray[np.uint8]
    labels: Tensor
    points: Tensor
    scenes: list[Scene]


_GRID_POINTS = np.stack(np.meshgrid(*[(2 * np.arange(GRID) + 1) / GRID - 1] * 2), -1).reshape(-1, 2).astype(np.float32)


def sample_views(pool: Pool, count: int, rng: np.random.Generator) -> Views:
    """Draw `count` pictures of a pool, each mirrored or not."""
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
    drawn = [pool.scenes[i].mirrored() if f else pool.scenes[i] for i, f in zip(index, flipped, strict=True)]
    return Views(pixels, torch.from_numpy(labels), targets, drawn)
