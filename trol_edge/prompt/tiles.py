"""Cuts a picture into 1 to 6 square tiles and, if there is more than one, adds a thumbnail of the whole.

The grid is the one whose aspect ratio is closest to the picture's. Pictures are stretched to it, so pixels at the
border of a panorama are squeezed but never lost. Axes: P side of a tile in pixels.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
from PIL import Image

U8 = npt.NDArray[np.uint8]


def grid(width: int, height: int, size: int, max_tiles: int) -> tuple[int, int]:
    """The columns and rows of tiles for a picture of width x height pixels.

    Among grids of the same distance in aspect ratio, the largest one wins of whose area the picture fills more than
    half, so that a small picture is not enlarged much.
    """
    ratio = width / height
    best, closest = (1, 1), float("inf")
    shapes = ((i, j) for i in range(1, max_tiles + 1) for j in range(1, max_tiles // i + 1))
    for columns, rows in sorted(shapes, key=lambda shape: shape[0] * shape[1]):
        distance = abs(ratio - columns / rows)
        fills = width * height > 0.5 * size * size * columns * rows
        if distance < closest or (distance == closest and fills):
            best, closest = (columns, rows), distance
    return best


def count(width: int, height: int, size: int, max_tiles: int) -> int:
    """The number of tiles of a picture, its thumbnail included."""
    columns, rows = grid(width, height, size, max_tiles)
    return columns * rows + (columns * rows > 1)


def cut(image: U8, size: int, max_tiles: int) -> Iterator[U8]:
    """Yield the tiles of a picture [H, W, 3] row by row, then the thumbnail; uint8 [P, P, 3] each."""
    columns, rows = grid(image.shape[1], image.shape[0], size, max_tiles)
    picture = Image.fromarray(image)
    # The authors use Pillow's default filter for RGB, which is bicubic and antialiased.
    whole = np.asarray(picture.resize((size * columns, size * rows), Image.Resampling.BICUBIC))
    for row in range(rows):
        for column in range(columns):
            yield whole[row * size : (row + 1) * size, column * size : (column + 1) * size]
    if columns * rows > 1:
        yield np.asarray(picture.resize((size, size), Image.Resampling.BICUBIC))
