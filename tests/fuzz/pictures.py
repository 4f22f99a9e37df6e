"""Pictures: damaged files of every format that is read, arrays of any kind, Pillow's pictures of every mode."""

from __future__ import annotations

import io
import os
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
from PIL import Image, features

from tests.fuzz.damage import altered, arguments
from tests.fuzz.workers import say
from trol_edge.numeric import shown
from trol_edge.prompt.images import MAX_PIXELS, ImageSpec, count_tiles, load_rgb, preprocess
from trol_edge.testing import ScriptedRuntime

# Suffix of a file -> how Pillow writes it.
FORMATS: dict[str, dict[str, Any]] = {
    ".png": {"format": "PNG"},
    ".jpg": {"format": "JPEG"},
    ".gif": {"format": "GIF"},
    ".bmp": {"format": "BMP"},
    ".tif": {"format": "TIFF", "compression": "tiff_lzw"},
    ".tiff": {"format": "TIFF"},
    ".webp": {"format": "WEBP"},
    ".ppm": {"format": "PPM"},
    ".tga": {"format": "TGA"},
    ".jp2": {"format": "JPEG2000"},
    ".avif": {"format": "AVIF"},
    ".eps": {"format": "EPS"},
    ".ico": {"format": "ICO"},
}
MODES = (
    "1",
    "L",
    "P",
    "RGB",
    "RGBA",
    "CMYK",
    "YCbCr",
    "LAB",
    "HSV",
    "I",
    "F",
    "LA",
    "PA",
    "RGBX",
    "RGBa",
    "La",
    "I;16",
)
KINDS = (
    ImageSpec("stretch", 28, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
    ImageSpec("tiles", 28, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5), 6),
)


class Trials:
    """Loads pictures, and asks about them."""

    def __init__(self, place: Path) -> None:
        self.place = place
        rng = np.random.default_rng(0)
        picture = Image.fromarray(rng.integers(0, 256, (40, 60, 3), np.uint8))
        self.files: dict[str, bytes] = {}
        for suffix, how in FORMATS.items():
            if how["format"] == "AVIF" and not features.check("avif"):
                continue
            out = io.BytesIO()
            picture.save(out, **how)
            self.files[suffix] = out.getvalue()
        for name, frames in (("many.gif", 4), ("many.png", 3)):
            out = io.BytesIO()
            others = [picture.rotate(90 * i) for i in range(1, frames)]
            picture.save(out, format=name[-3:].upper(), save_all=True, append_images=others)
            self.files[name] = out.getvalue()
        self.runtime = ScriptedRuntime("yes")

    def trial(self, rng: Random) -> str:
        """One picture."""
        given = rng.choice([self.file, self.file, self.file, self.array, self.pillow, self.anything])(rng)
        color = rng.choice(["rgb", "bgr"])
        bits = rng.choice([None, None, None, 8, 12, 16, 7, "12", 12.0])
        say(f"{type(given).__name__} {shown(given)} {color} {bits}")
        if rng.random() < 0.3:
            answer = self.runtime.generate("?", given, color=color, bits=bits)
            assert answer.text == "yes", answer
            return "answered"
        rgb = load_rgb(given, color, bits)
        assert rgb.dtype == np.uint8 and rgb.ndim == 3 and rgb.shape[2] == 3, (rgb.dtype, rgb.shape)
        assert 1 <= rgb.shape[0] * rgb.shape[1] <= MAX_PIXELS, rgb.shape
        spec = rng.choice(KINDS)
        pixels = preprocess([rgb], spec)
        assert pixels.shape == (*count_tiles([rgb], spec), 3, spec.size, spec.size), pixels.shape
        assert pixels.dtype == np.float32 and np.isfinite(pixels).all()
        return "answered"

    def file(self, rng: Random) -> Any:
        """A damaged file, as bytes or on the disk, at times under another suffix."""
        name = rng.choice(sorted(self.files))
        data = altered(self.files[name], rng) if rng.random() < 0.95 else self.files[name]
        if rng.random() < 0.1:
            data += self.files[rng.choice(sorted(self.files))]
        if rng.random() < 0.5:
            return rng.choice([bytes, bytearray, memoryview])(data)
        path = self.place / f"picture{rng.choice([name[-4:], '.png', '.txt', ''])}"
        path.write_bytes(data)
        return rng.choice([path, str(path)])

    def array(self, rng: Random) -> Any:
        """An array of any type and shape, with any strides."""
        shapes = [(8, 9, 3), (1, 1, 3), (8, 9), (8, 9, 4), (3, 8, 9), (0, 5, 3), (2, 3, 3, 3), (1, 5000, 3), (), (0,)]
        kinds = ["u1", "i1", "u2", ">u2", "i4", "f4", "f8", "f2", "?", "c8", "O", "S3", "U2", "M8[s]", "V4"]
        array = np.zeros(rng.choice(shapes), rng.choice(kinds))
        if rng.random() < 0.4:
            array = np.zeros(rng.choice(shapes[:2]), rng.choice(["u1", "u2"]))
        if array.dtype.kind in "uif" and array.size:
            array[...] = rng.choice([0, 1, 127, 0.5])
        how = rng.randrange(6)
        if how == 0:
            return np.lib.stride_tricks.as_strided(np.zeros(3, np.uint8), (100_000, 100_000, 3), (0, 0, 1))
        if how == 1 and array.ndim:
            return array[::-1]
        if how == 2:
            return array.T
        if how == 3:
            return array.view(np.ma.MaskedArray) if array.dtype.kind in "uif" else array
        return array

    def pillow(self, rng: Random) -> Any:
        """A picture of Pillow's, in any mode and size, at times with an orientation, at times closed."""
        size = rng.choice([(5, 4), (1, 1), (0, 4), (3000, 1), (60_000, 3)])
        picture = Image.new(rng.choice(MODES), size)
        how = rng.randrange(4)
        if how == 0:
            picture.getexif()[0x0112] = rng.choice([0, 1, 3, 6, 8, 9, 2**16 - 1])
        elif how == 1:
            picture = Image.open(io.BytesIO(self.files[rng.choice(sorted(self.files))]))
            if rng.random() < 0.3:
                picture.close()
        elif how == 2:
            picture = Image.open(io.BytesIO(self.files[".jpg"][: -rng.randrange(1, 500)]))
        return picture

    def anything(self, rng: Random) -> Any:
        """Whatever a program may pass by mistake, and paths to what is no picture."""
        pipe = self.place / "pipe"
        if not pipe.exists():
            os.mkfifo(pipe)
        paths = [
            "/dev/zero",
            "/dev/null",
            "/proc/self/mem",
            "/etc",
            "nowhere.png",
            "\0",
            "x" * 5000,
            "",
            pipe,
            self.place,
        ]
        return rng.choice([*paths, *arguments()])
