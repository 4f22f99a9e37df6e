"""Pictures to pixel values: load any picture as RGB bytes, resize and normalise it as the authors' code does.

Axes: N squares (one per picture, or its tiles), H height, W width, P side of the square model input, all in pixels.
"""

from __future__ import annotations

import dataclasses
import functools
import io
import math
import os
import pathlib
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image, UnidentifiedImageError

from trol_edge.errors import BundleError, ImageError
from trol_edge.prompt import tiles

__all__ = ["MAX_PIXELS", "ImageSpec", "Picture", "count_tiles", "load_rgb", "preprocess"]

U8 = npt.NDArray[np.uint8]
I32 = npt.NDArray[np.int32]
F32 = npt.NDArray[np.float32]

Picture = str | os.PathLike[str] | bytes | bytearray | memoryview | Image.Image | npt.NDArray[Any]

# The formats that are read, all of them by code in this process: Pillow's names, and how names of their files end.
# Pillow knows more, but starts a program for one (EPS: Ghostscript), and others are parsers that nobody needs here.
FORMATS = {
    "AVIF": (".avif",),
    "BMP": (".bmp",),
    "DIB": (".dib",),
    "GIF": (".gif",),
    "JPEG": (".jpg", ".jpeg", ".jpe", ".jfif"),
    "JPEG2000": (".jp2", ".j2k", ".jpf", ".jpx", ".j2c", ".jpc"),
    "MPO": (".mpo",),
    "PNG": (".png", ".apng"),
    "PPM": (".ppm", ".pgm", ".pbm", ".pnm"),
    "TGA": (".tga",),
    "TIFF": (".tif", ".tiff"),
    "WEBP": (".webp",),
}
SUFFIXES = frozenset(suffix for suffixes in FORMATS.values() for suffix in suffixes)
# How files of other formats begin, so that they can be refused by name.
_OTHERS = (
    (b"%!PS", "EPS or PostScript"),
    (b"\xc5\xd0\xd3\xc6", "EPS"),
    (b"%PDF", "PDF"),
    (b"<svg", "SVG"),
    (b"<?xml", "XML (SVG?)"),
    (b"\xff\x0a", "JPEG XL"),
    (b"\x00\x00\x00\x0cJXL ", "JPEG XL"),
    (b"\x76\x2f\x31\x01", "OpenEXR"),
    (b"8BPS", "PSD"),
    (b"\xd7\xcd\xc6\x9a", "WMF"),
    (b"\x01\x00\x00\x00", "EMF"),
    (b"icns", "ICNS"),
    (b"\x00\x00\x01\x00", "ICO"),
    (b"\x00\x00\x02\x00", "CUR"),
    (b"DDS ", "DDS"),
    (b"qoif", "QOI"),
    (b"SIMPLE", "FITS"),
    (b"GRIB", "GRIB"),
    (b"BUFR", "BUFR"),
    (b"\x89HDF", "HDF5"),
    (b"\x01\xda", "SGI"),
    (b"\x59\xa6\x6a\x95", "Sun raster"),
    (b"/* XPM", "XPM"),
    (b"\x00\x00\x01\xba", "MPEG"),
    (b"\x1a\x45\xdf\xa3", "Matroska (a video)"),
    (b"RIFF", "RIFF (a video?)"),
)

MAX_PIXELS = 89_000_000  # just below the size at which Pillow itself warns of a decompression bomb

_EXIF_ORIENTATION = 0x0112
_UPRIGHT = {  # EXIF orientation -> what turns the stored picture upright; 1 is upright already
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


@dataclasses.dataclass(frozen=True)
class ImageSpec:
    """How a model wants its pictures; stored in the bundle manifest.

    Raises BundleError for an unknown kind, a size below 1, or a mean or std that is not three usable numbers.
    """

    kind: str  # "stretch": resized straight to a square, the aspect ratio is not kept; "tiles": see tiles.py
    size: int  # pixels, P
    mean: tuple[float, ...]  # R, G, B of pictures scaled to 0..1
    std: tuple[float, ...]  # R, G, B, same scale
    max_tiles: int = 1  # into which a picture is cut at most; the thumbnail comes on top

    def __post_init__(self) -> None:
        problems = []
        if self.kind not in _KINDS:
            problems.append(f"kind {self.kind!r} is unknown (known: {', '.join(sorted(_KINDS))})")
        if self.size < 1:
            problems.append(f"size {self.size} is not a number of pixels")
        if self.max_tiles < 1 or (self.kind == "stretch" and self.max_tiles != 1):
            problems.append(f"max_tiles {self.max_tiles} is no count of tiles for kind {self.kind!r}")
        if len(self.mean) != 3 or not all(map(math.isfinite, self.mean)):
            problems.append(f"mean {self.mean} is not three numbers")
        if len(self.std) != 3 or not all(math.isfinite(value) and value > 0 for value in self.std):
            problems.append(f"std {self.std} is not three positive numbers")
        if problems:
            raise BundleError(f"picture settings: {'; '.join(problems)}; export the bundle again with this version")

    @property
    def most_tiles(self) -> int:
        """Squares that one picture becomes at most, the thumbnail included."""
        return 1 if self.max_tiles == 1 else self.max_tiles + 1


def load_rgb(image: Picture, color: str = "rgb") -> U8:
    """Return the picture as RGB bytes, uint8 [H, W, 3].

    `image` is a file of one of FORMATS (a path, or the bytes of one), a Pillow picture, or a uint8 array [H, W, 3]
    whose channels are in the order that `color` says, "rgb" or "bgr" (OpenCV's); the other kinds know their own order.
    An array is not copied, whatever its strides: what returns is a view of it, reversed for "bgr".
    Files and Pillow pictures, with the choices that matter:
    - alpha is dropped, not composited, as in the authors' code;
    - the EXIF orientation is applied; the authors' code does not, but a sideways phone picture is a wrong answer;
    - 16-bit grey keeps its high byte (`>> 8`), where Pillow's own conversion would clip at 255;
    - an animation gives its first frame, or the current frame of a Pillow picture.

    Raises ImageError for a file that is missing, damaged, not a picture or larger than `MAX_PIXELS`, for a pixel
    format without a defined range (32-bit float), for an array of another shape or dtype, and for another `color`.
    """
    if color not in ("rgb", "bgr"):
        raise ImageError(f"color {color!r} should be 'rgb' or 'bgr', the order of the channels in an array")
    if isinstance(image, np.ndarray):
        array = _checked_array(image)
        return array if color == "rgb" else array[:, :, ::-1]
    if isinstance(image, Image.Image):
        return _rgb_from_pillow(image, "Pillow picture")
    if isinstance(image, (bytes, bytearray, memoryview)):
        return _rgb_from_bytes(image)
    if isinstance(image, (str, os.PathLike)):
        return _rgb_from_file(image)
    raise ImageError(
        f"found a picture of type {type(image).__name__}; pass a file path, the bytes of a picture file, "
        "a PIL.Image or a uint8 array [H, W, 3]"
    )


def _checked_array(array: npt.NDArray[Any]) -> U8:
    expected = "expected a uint8 array [height, width, 3]"
    if array.ndim != 3 or array.shape[2] != 3:
        hint = ""
        if array.ndim == 3 and array.shape[2] == 4:
            hint = "; drop alpha with array[:, :, :3]"
        elif array.ndim == 3 and array.shape[0] == 3:
            hint = "; channels come first here, turn it with array.transpose(1, 2, 0)"
        elif array.ndim == 2 or (array.ndim == 3 and array.shape[2] == 1):
            hint = "; a grey picture becomes RGB by repeating its one channel three times"
        raise ImageError(f"found a picture array of shape {array.shape}, {expected}{hint}")
    if array.dtype != np.uint8:
        raise ImageError(f"found a picture array of dtype {array.dtype}, {expected} with values 0..255")
    _check_size(array.shape[1], array.shape[0], "picture array")
    return array


def _rgb_from_bytes(data: bytes | bytearray | memoryview) -> U8:
    name = f"picture of {len(data)} bytes"
    if not len(data):
        raise ImageError(f"{name} is empty; take it again")
    return _rgb_from_stream(io.BytesIO(data), name)


def _rgb_from_file(path: str | os.PathLike[str]) -> U8:
    name = f"picture {os.fspath(path)!r}"
    try:
        is_file = pathlib.Path(path).is_file()
        empty = is_file and pathlib.Path(path).stat().st_size == 0
        exists = is_file or pathlib.Path(path).exists()
    except (OSError, ValueError, TypeError) as error:
        raise ImageError(f"{name} is not a usable path: {error}") from error
    if not is_file:
        found = "is not a file; pass the picture itself" if exists else "does not exist; check the path"
        raise ImageError(f"{name} {found}")
    if empty:
        raise ImageError(f"{name} is empty (0 bytes); copy or take it again")
    return _rgb_from_stream(path, name)


def _rgb_from_stream(stream: str | os.PathLike[str] | io.BytesIO, name: str) -> U8:
    try:
        with Image.open(stream, formats=_formats()) as picture:
            return _rgb_from_pillow(picture, name)
    except ImageError:
        raise
    except UnidentifiedImageError as error:
        found = _format_of(stream)
        kind = f"of the format {found}, which is not read" if found else "of a format that Pillow cannot read"
        raise ImageError(f"{name} is not a picture, or {kind} here; save it as PNG or JPEG") from error
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ImageError(f"{name} has more than the {MAX_PIXELS} pixels allowed; make it smaller first") from error
    except Exception as error:  # a damaged header raises whatever Pillow's parser trips on
        raise ImageError(f"{name} cannot be read ({_reason(error)}); copy or save it again") from error


@functools.lru_cache(maxsize=1)
def _formats() -> tuple[str, ...]:
    """Those of FORMATS that this Pillow opens (MPO by way of JPEG, AVIF in newer ones)."""
    Image.init()
    return tuple(name for name in FORMATS if name in Image.OPEN)


def _format_of(stream: str | os.PathLike[str] | io.BytesIO) -> str:
    """The format that a file seems to have, by its first bytes, where it is none of FORMATS; "" if that is unknown."""
    try:
        start = stream.getvalue()[:32] if isinstance(stream, io.BytesIO) else _first_bytes(stream)
    except OSError:
        return ""
    if start[4:8] == b"ftyp":
        return f"HEIF or MP4 ({start[8:12].decode('ascii', 'replace')})"
    return next((name for prefix, name in _OTHERS if start.lstrip(b"\xef\xbb\xbf \r\n\t").startswith(prefix)), "")


def _first_bytes(path: str | os.PathLike[str]) -> bytes:
    with open(path, "rb") as file:
        return file.read(32)


def _rgb_from_pillow(picture: Image.Image, name: str) -> U8:
    """Decode, turn upright and convert; the caller's picture is loaded but not changed."""
    if picture.format and picture.format not in FORMATS and getattr(picture, "tile", None):
        # Not decoded yet, and a Pillow picture may be of any format.
        raise ImageError(f"{name} is {picture.format}, which is not decoded here; save it as PNG or JPEG")
    _check_size(*picture.size, name)
    if picture.mode == "F":
        raise ImageError(f"{name} holds 32-bit floats, whose range is not defined; convert it to 8-bit RGB first")
    try:
        picture.load()
        upright = _turn_upright(picture)
        if upright.mode.startswith("I"):  # "I" and the "I;16" modes: 16-bit grey
            grey = np.clip(np.asarray(upright).astype(np.int64) >> 8, 0, 255).astype(np.uint8)
            return np.repeat(grey[:, :, None], 3, axis=2)
        if upright.mode == "P" and "transparency" in upright.info:
            upright = upright.convert("RGBA")  # the same colours; Pillow warns about the direct way
        return np.array(upright.convert("RGB"), dtype=np.uint8)
    except Exception as error:  # a damaged body raises whatever Pillow's decoder trips on
        raise ImageError(f"{name} cannot be decoded ({_reason(error)}); copy or save it again") from error


def _turn_upright(picture: Image.Image) -> Image.Image:
    try:
        orientation = picture.getexif().get(_EXIF_ORIENTATION, 1)
    except Exception:  # damaged EXIF around a good picture: Pillow raises SyntaxError, struct.error and others
        return picture
    return picture.transpose(_UPRIGHT[orientation]) if orientation in _UPRIGHT else picture


def _check_size(width: int, height: int, name: str) -> None:
    if width < 1 or height < 1:
        raise ImageError(f"{name} is {width}x{height} pixels; it needs at least one pixel")
    if width * height > MAX_PIXELS:
        raise ImageError(f"{name} is {width}x{height} pixels, more than the allowed {MAX_PIXELS}; make it smaller")


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__


def preprocess(images: Sequence[U8], spec: ImageSpec) -> F32:
    """Return the pixel values of `images` (uint8 [H, W, 3] each, as from `load_rgb`), float32 [N, 3, P, P].

    N is the sum of `count_tiles`; the tiles of a picture follow each other. Equal to the authors' FP32 pixels bit for
    bit. Raises ImageError as `load_rgb` does.
    """
    kind = _KINDS[spec.kind]
    table = kind.table(spec.mean, spec.std)
    images = [load_rgb(image) for image in images]
    pixels = np.empty((sum(count_tiles(images, spec)), 3, spec.size, spec.size), np.float32)
    squares = (square for image in images for square in kind.squares(image, spec))
    for square, out in zip(squares, pixels, strict=True):
        for channel in range(3):
            np.take(table[channel], square[:, :, channel], out=out[channel])
    return pixels


def count_tiles(images: Sequence[U8], spec: ImageSpec) -> list[int]:
    """How many squares of pixel values each picture becomes; the prompt holds `tokens_per_image` tokens for each."""
    return [_KINDS[spec.kind].count(image.shape[1], image.shape[0], spec) for image in images]


def resize(image: U8, size: int) -> U8:
    """Bicubic, a = -0.75, no antialias, in fixed point: rounded to bytes after each of the two passes. [P, P, 3]

    PyTorch's arithmetic for bytes, restated: float bicubic then rounding differs in 18 % of the values.
    """
    columns, column_weights, column_bits = taps(image.shape[1], size)
    rows, row_weights, row_bits = taps(image.shape[0], size)
    used, rows = np.unique(rows, return_inverse=True)  # without antialias most rows of a large picture are not read
    rows = rows.reshape(row_weights.shape)
    sums: I32 = np.zeros((len(used), size, 3), np.int32)
    lines = image[used]
    for tap in range(4):
        sums += lines[:, columns[:, tap]] * column_weights[None, :, tap, None]
    lines = _bytes_from_sums(sums, column_bits)  # [used rows, P, 3]
    sums = np.zeros((size, size, 3), np.int32)
    for tap in range(4):
        sums += lines[rows[:, tap]] * row_weights[:, tap, None, None]
    return _bytes_from_sums(sums, row_bits)


def _bytes_from_sums(sums: I32, bits: int) -> U8:
    rounded: U8 = np.clip((sums + (1 << (bits - 1))) >> bits, 0, 255).astype(np.uint8)
    return rounded


@functools.lru_cache(maxsize=64)
def taps(n_in: int, n_out: int) -> tuple[npt.NDArray[np.intp], I32, int]:
    """Source indices [n_out, 4], their integer weights [n_out, 4] and the fraction bits of the weights.

    A tap beyond the border adds its weight to the border pixel before rounding to an integer, so both have to
    be summed in the authors' order and in double precision.
    """
    source = (n_in / n_out) * (np.arange(n_out) + 0.5) - 0.5
    left = np.floor(source)
    offset = source - left
    raw = np.stack([_cubic(offset + 1), _cubic(offset), _cubic(1 - offset), _cubic(2 - offset)], axis=1)
    index = np.clip(left.astype(np.intp)[:, None] + np.arange(-1, 3), 0, n_in - 1)
    weights = np.zeros_like(raw)
    np.add.at(weights, (np.arange(n_out)[:, None], index - index[:, :1]), raw)
    index = np.minimum(index[:, :1] + np.arange(4), n_in - 1)

    bits = 0
    while int(0.5 + weights.max() * (1 << (bits + 1))) < 1 << 15:
        bits += 1
    fixed = np.trunc(weights * (1 << bits) + np.copysign(0.5, weights)).astype(np.int32)
    index.flags.writeable = fixed.flags.writeable = False  # shared by every caller of the cache
    return index, fixed, bits


def _cubic(x: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Keys' cubic kernel with a = -0.75 at distances 0 <= x <= 2, in PyTorch's order of operations."""
    a = -0.75
    near = ((a + 2) * x - (a + 3)) * x * x + 1
    far = ((a * x - 5 * a) * x + 8 * a) * x - 4 * a
    return np.where(x <= 1, near, far)


@functools.lru_cache(maxsize=8)
def normalise_table(mean: tuple[float, ...], std: tuple[float, ...]) -> F32:
    """Normalised value of each byte per channel, float32 [3, 256]; every step in FP32, as in the authors' code."""
    scale = np.float32(255)
    shift = scale * np.array(mean, np.float32)
    spread = scale * np.array(std, np.float32)
    table: F32 = (np.arange(256, dtype=np.float32)[None, :] - shift[:, None]) / spread[:, None]
    table.flags.writeable = False
    return table


@functools.lru_cache(maxsize=8)
def _normalise_table_of_fractions(mean: tuple[float, ...], std: tuple[float, ...]) -> F32:
    """As _normalise_table, in the order of torchvision, which scales to 0..1 first: other roundings."""
    fractions = np.arange(256, dtype=np.float32)[None, :] / np.float32(255)
    table: F32 = (fractions - np.array(mean, np.float32)[:, None]) / np.array(std, np.float32)[:, None]
    table.flags.writeable = False
    return table


@dataclasses.dataclass(frozen=True)
class _Kind:
    """One way to prepare pictures. count: squares of a picture, from its width and height in pixels; squares: their
    bytes, [P, P, 3] each; table: normalised value of each byte from mean and std, float32 [3, 256]."""

    count: Callable[[int, int, ImageSpec], int]
    squares: Callable[[U8, ImageSpec], Iterable[U8]]
    table: Callable[[tuple[float, ...], tuple[float, ...]], F32]


# The one place of the robot side that knows how families differ in their pictures.
_KINDS = {
    "stretch": _Kind(
        count=lambda width, height, spec: 1,
        squares=lambda image, spec: [resize(image, spec.size)],
        table=normalise_table,
    ),
    "tiles": _Kind(
        count=lambda width, height, spec: tiles.count(width, height, spec.size, spec.max_tiles),
        squares=lambda image, spec: tiles.cut(image, spec.size, spec.max_tiles),
        table=_normalise_table_of_fractions,
    ),
}
