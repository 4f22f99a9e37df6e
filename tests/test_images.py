"""Pictures: every format arrives as RGB bytes, bad ones are refused by name, pixel values equal the authors'."""

import concurrent.futures
import dataclasses
import hashlib
import io
import json
import os
import pathlib
import random
import re
import warnings
import zlib

import numpy as np
import pytest
from PIL import Image, ImageOps

from tests.golden import GOLDEN
from trol_edge.bundle.strict import from_dict
from trol_edge.errors import BundleError, ImageError
from trol_edge.prompt import images
from trol_edge.prompt.images import MAX_PIXELS, ImageSpec, load_rgb, preprocess

SPEC = ImageSpec("stretch", 490, (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))


def picture(height=7, width=5, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def save(path, array, mode=None, **options):
    Image.fromarray(array).convert(mode).save(path, **options) if mode else Image.fromarray(array).save(path, **options)
    return path


# --- pixel values -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("index", range(3))
def test_resize_equals_golden(index):
    golden = np.load(GOLDEN / "uint8_bicubic.npz")
    image = golden[f"in{index}"].transpose(1, 2, 0)
    lines = golden["lines"] if "lines" in golden else np.arange(490)
    np.testing.assert_array_equal(images.resize(image, 490).transpose(2, 0, 1)[:, lines], golden[f"out{index}"])


def test_normalise_table_equals_golden():
    want = np.load(GOLDEN / "normalise_tables.npz")["internlm2_fp32"]
    np.testing.assert_array_equal(images.normalise_table(SPEC.mean, SPEC.std).view(np.uint32), want.view(np.uint32))


def golden_runs():
    for folder in sorted(GOLDEN.glob("internlm2-*")):
        for run in json.loads((folder / "case.json").read_text(encoding="utf-8"))["runs"]:
            if run.get("pixel_values_sha256"):
                yield pytest.param(folder, run, id=f"{folder.name}-{run['name']}")


@pytest.mark.parametrize(("folder", "run"), list(golden_runs()))
def test_pixel_values_equal_golden_bit_for_bit(folder, run):
    names = [name for row in run["images"] for name in ([row] if isinstance(row, str) else row)]
    pixels = preprocess([load_rgb(folder / name) for name in names], SPEC)
    assert pixels.dtype == np.float32 and list(pixels.shape) == run["pixel_values_shape"]
    assert hashlib.sha256(pixels.tobytes()).hexdigest() == run["pixel_values_sha256"]
    expected = np.load(folder / "expected.npz")
    if f"{run['name']}/pixel_u8" in expected:
        table, stored = expected[f"{run['name']}/pixel_lut"], expected[f"{run['name']}/pixel_u8"]
        np.testing.assert_array_equal(pixels, table[np.arange(3)[None, :, None, None], stored])


def slow_resize(image, size):
    """The same arithmetic one output value at a time, with dense weights."""

    def dense(n_in):
        weights = np.zeros((size, n_in))
        for i in range(size):
            source = n_in / size * (i + 0.5) - 0.5
            left = int(np.floor(source))
            for j in range(left - 1, left + 3):
                x = abs(source - j)
                near, far = (1.25 * x - 2.25) * x * x + 1, ((-0.75 * x + 3.75) * x - 6) * x + 3
                weights[i, min(max(j, 0), n_in - 1)] += near if x <= 1 else far
        bits = 0
        while int(0.5 + weights.max() * 2 ** (bits + 1)) < 2**15:
            bits += 1
        return np.trunc(weights * 2**bits + np.copysign(0.5, weights)).astype(np.int64), bits

    weights, bits = dense(image.shape[1])
    rows = np.clip((np.einsum("ow,hwc->hoc", weights, image.astype(np.int64)) + (1 << bits - 1)) >> bits, 0, 255)
    weights, bits = dense(image.shape[0])
    return np.clip((np.einsum("oh,hwc->owc", weights, rows) + (1 << bits - 1)) >> bits, 0, 255)


@pytest.mark.parametrize("size", [(1, 1), (1, 9), (2, 3), (3, 1), (4, 4), (5, 40), (40, 5), (13, 12), (97, 61)])
def test_resize_equals_the_slow_way(size):
    image = picture(*size)
    np.testing.assert_array_equal(images.resize(image, 12), slow_resize(image, 12))


@pytest.mark.parametrize("size", [1, 2, 12, 490])
def test_a_picture_of_the_target_size_is_left_alone(size):
    image = picture(size, size)
    np.testing.assert_array_equal(images.resize(image, size), image)


def test_order_and_number_of_pictures_are_kept():
    parts = [picture(20, 30, seed) for seed in range(3)]
    together = preprocess(parts, SPEC)
    assert together.shape == (3, 3, 490, 490) and together.flags.c_contiguous
    for i, part in enumerate(parts):
        np.testing.assert_array_equal(together[i], preprocess([part], SPEC)[0])
    assert preprocess([], SPEC).shape == (0, 3, 490, 490)


def test_inputs_are_not_changed():
    image = picture(30, 20)
    before = image.copy()
    image.flags.writeable = False
    preprocess([load_rgb(image)], SPEC)
    np.testing.assert_array_equal(image, before)


def test_threads_agree():
    parts = [picture(40 + i, 60 - i, i) for i in range(12)]
    want = [preprocess([part], SPEC) for part in parts]
    images.taps.cache_clear()
    with concurrent.futures.ThreadPoolExecutor(6) as pool:
        for found, expected in zip(pool.map(lambda part: preprocess([part], SPEC), parts), want, strict=True):
            np.testing.assert_array_equal(found, expected)


def test_image_spec_survives_json():
    data = json.loads(json.dumps(dataclasses.asdict(SPEC)))
    assert from_dict(ImageSpec, data, "manifest.image") == SPEC


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kind": "crop"}, r"kind 'crop' is unknown \(known: stretch, tiles\)"),
        ({"size": 0}, "size 0 is not a number of pixels"),
        ({"mean": (0.5, 0.5)}, "mean .* is not three numbers"),
        ({"mean": (0.5, 0.5, float("nan"))}, "mean .* is not three numbers"),
        ({"std": (0.5, 0.5, 0.0)}, "std .* is not three positive numbers"),
    ],
)
def test_an_unusable_image_spec_is_refused(change, message):
    with pytest.raises(BundleError, match=message):
        dataclasses.replace(SPEC, **change)


# --- loading ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("extension", ["png", "bmp", "tiff", "webp", "ppm"])
def test_lossless_files_load_exactly(tmp_path, extension):
    array = picture()
    path = save(tmp_path / f"a.{extension}", array, **({"lossless": True} if extension == "webp" else {}))
    for given in (path, str(path)):
        loaded = load_rgb(given)
        np.testing.assert_array_equal(loaded, array)
        assert loaded.dtype == np.uint8 and loaded.flags.c_contiguous


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr", "HSV"])
def test_pillow_modes_convert_as_pillow_does(mode):
    image = Image.fromarray(picture(20, 30)).convert(mode)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        np.testing.assert_array_equal(load_rgb(image), np.asarray(image.convert("RGB")))


def test_alpha_is_dropped_not_composited(tmp_path):
    rgba = np.concatenate([picture(), np.zeros((7, 5, 1), np.uint8)], axis=2)
    np.testing.assert_array_equal(load_rgb(save(tmp_path / "a.png", rgba)), rgba[:, :, :3])


def test_a_transparent_palette_loads_without_a_warning(tmp_path):
    image = Image.fromarray(picture(20, 30)).convert("P")
    image.save(tmp_path / "a.png", transparency=bytes(range(256)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        np.testing.assert_array_equal(load_rgb(tmp_path / "a.png"), np.asarray(image.convert("RGB")))


@pytest.mark.parametrize("file", ["a.png", "a.tiff"])
def test_16_bit_grey_keeps_its_high_byte(tmp_path, file):
    grey = np.random.default_rng(0).integers(0, 65536, (6, 9), dtype=np.uint16)
    want = np.repeat((grey >> 8).astype(np.uint8)[:, :, None], 3, axis=2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        np.testing.assert_array_equal(load_rgb(save(tmp_path / file, grey)), want)
    with pytest.warns(RuntimeWarning, match="taken as 16 bits"):
        np.testing.assert_array_equal(load_rgb(Image.fromarray(grey.astype(np.int32))), want)


# --- ranges that are said, and guesses --------------------------------------------------------------------------


def grey_of(bits, seed=0):
    """Numbers of so many bits, the brightest among them, and the bytes that they are."""
    values = np.random.default_rng(seed).integers(0, 1 << bits, (6, 9), dtype=np.uint16)
    values[0, 0] = (1 << bits) - 1
    return values, np.repeat((values >> (bits - 8)).astype(np.uint8)[:, :, None], 3, axis=2)


def forms(values, folder):
    """A grey picture as people have it: modes I and I;16, files of both, and as an array."""
    made = [Image.fromarray(values), Image.fromarray(values.astype(np.int32)), np.repeat(values[:, :, None], 3, axis=2)]
    made += [save(folder / name, values) for name in ("a.png", "a.tiff", "a.pgm")]
    made += [save(folder / "b.tiff", values.astype(np.int32)), (folder / "a.png").read_bytes()]
    return [*made, Image.open(folder / "a.png"), Image.open(folder / "a.png").copy()]


@pytest.mark.parametrize("bits", range(8, 17))
def test_bits_says_the_range(tmp_path, bits):
    values, want = grey_of(bits)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for form in forms(values, tmp_path):
            np.testing.assert_array_equal(load_rgb(form, bits=bits), want)
            np.testing.assert_array_equal(load_rgb(form, bits=np.int64(16)), want >> (16 - bits) if bits < 16 else want)


@pytest.mark.parametrize("bits", range(8, 16))
def test_a_range_that_is_a_guess_is_refused_or_warned_of(tmp_path, bits):
    """Never black, or nearly, without a word."""
    values, _ = grey_of(bits)
    for form in forms(values, tmp_path):
        with warnings.catch_warnings(record=True) as silent:
            warnings.simplefilter("always")
            try:
                load_rgb(form)
            except ImageError as error:
                assert "bits=" in str(error)
                continue
        assert silent or bits == 15, form
        assert all("bits=" in str(warning.message) for warning in silent)


def test_black_is_no_guess(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not load_rgb(save(tmp_path / "a.png", np.zeros((4, 4), np.uint16))).any()


@pytest.mark.parametrize("top", [255, 16383, 65536, 1 << 30])
def test_32_bit_grey_of_another_range_is_refused(top):
    grey = Image.fromarray(np.array([[0, top]], np.int32))
    with pytest.raises(ImageError, match=rf"mode I\) up to {top}; its range is not known; pass bits="):
        load_rgb(grey)


def test_numbers_beyond_bits_are_refused(tmp_path):
    values, _ = grey_of(12)
    for form in forms(values, tmp_path):
        with pytest.raises(ImageError, match=r"holds 4095, which is not in 0\.\.1023 \(bits=10\)"):
            load_rgb(form, bits=10)
    with pytest.raises(ImageError, match="holds -1, which is not in"):
        load_rgb(Image.fromarray(np.array([[-1, 70]], np.int32)), bits=12)


@pytest.mark.parametrize("bits", [7, 17, 0, -1, 12.0, "12", True, 10**400])
def test_bits_that_are_none(bits):
    with pytest.raises(ImageError, match=r"bits .* should be None or a whole number from 8 to 16"):
        load_rgb(picture(), bits=bits)


@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA", "P", "1", "CMYK"])
def test_8_bits_do_not_heed_bits(mode):
    form = Image.fromarray(picture()).convert(mode)
    np.testing.assert_array_equal(load_rgb(form, bits=12), load_rgb(form))
    np.testing.assert_array_equal(load_rgb(picture(), bits=12), picture())


def test_a_pgm_that_states_its_maximum():
    """Its own range, whatever bits says; no guess where it is dark."""
    data = b"P5 2 1 4095\n" + np.array([4095, 16], ">u2").tobytes()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for bits in (None, 10, 12):
            assert load_rgb(data, bits=bits)[0, :, 0].tolist() == [255, 1]
        load_rgb(b"P5 2 1 4095\n" + np.array([100, 16], ">u2").tobytes())


def test_dark_colour_with_16_bits():
    """Pillow keeps the high byte alone, so bits cannot help."""

    def png(array):
        height, width = array.shape[:2]
        rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in array)
        head = width.to_bytes(4, "big") + height.to_bytes(4, "big") + bytes([16, 2, 0, 0, 0])
        chunks = [(b"IHDR", head), (b"IDAT", zlib.compress(rows)), (b"IEND", b"")]
        packed = [len(d).to_bytes(4, "big") + n + d + zlib.crc32(n + d).to_bytes(4, "big") for n, d in chunks]
        return b"\x89PNG\r\n\x1a\n" + b"".join(packed)

    bright = picture().astype(np.uint16) << 8
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        np.testing.assert_array_equal(load_rgb(png(bright)), picture())
    for form in (png(bright >> 4), Image.open(io.BytesIO(png(bright >> 4)))):
        with pytest.warns(RuntimeWarning, match="uint16 array with bits="):
            assert load_rgb(form).max() < 16
    np.testing.assert_array_equal(load_rgb(bright >> 4, bits=12), picture())
    np.testing.assert_array_equal(load_rgb((bright >> 4).astype(">u2"), "bgr", bits=12), picture()[:, :, ::-1])
    with pytest.raises(ImageError, match="uint16; its range is not known; pass bits="):
        load_rgb(bright)


def test_an_animation_gives_its_first_frame(tmp_path):
    frames = [Image.fromarray(np.full((8, 8, 3), value, np.uint8)) for value in (10, 200)]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    assert (load_rgb(tmp_path / "a.gif") == 10).all()


@pytest.mark.parametrize("orientation", range(10))
def test_exif_orientation_is_applied(tmp_path, orientation):
    upright = picture(6, 9)
    stored = {
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.transpose(1, 0, 2),
        6: np.rot90(upright, 1),
        7: upright[::-1, ::-1].transpose(1, 0, 2),
        8: np.rot90(upright, -1),
    }.get(orientation, upright)
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(np.ascontiguousarray(stored)).save(tmp_path / "a.png", exif=exif)
    np.testing.assert_array_equal(load_rgb(tmp_path / "a.png"), upright)
    np.testing.assert_array_equal(np.asarray(ImageOps.exif_transpose(Image.open(tmp_path / "a.png"))), upright)


@pytest.mark.parametrize("turned", ["transpose", "rotate", "exif_transpose", "in place"])
def test_a_picture_that_its_user_turned_is_not_turned_again(tmp_path, turned):
    upright = picture(6, 9)
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(np.ascontiguousarray(np.rot90(upright, 1))).save(tmp_path / "a.png", exif=exif)
    opened = Image.open(tmp_path / "a.png")
    if turned == "transpose":
        mine = opened.transpose(Image.Transpose.ROTATE_270)
    elif turned == "rotate":
        mine = opened.rotate(-90, expand=True)
    elif turned == "exif_transpose":
        mine = ImageOps.exif_transpose(opened)
    else:
        ImageOps.exif_transpose(opened, in_place=True)
        mine = opened
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        np.testing.assert_array_equal(load_rgb(mine), upright)
    assert [("has the EXIF orientation" in str(w.message)) for w in said] == (
        [True] if turned in ("transpose", "rotate") else []  # it may as well have been cut, and lie on its side
    )


def test_what_is_made_from_a_picture_is_taken_as_it_stands(tmp_path):
    """Only a file, opened or not, is turned; a copy with its tag has a warning, because it may lie on its side."""
    upright = picture(6, 9)
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(np.ascontiguousarray(np.rot90(upright, 1))).save(tmp_path / "a.png", exif=exif)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        np.testing.assert_array_equal(load_rgb(Image.open(tmp_path / "a.png")), upright)
        np.testing.assert_array_equal(load_rgb((tmp_path / "a.png").read_bytes()), upright)
    copy = Image.open(tmp_path / "a.png").convert("RGB")
    with pytest.warns(RuntimeWarning, match="ImageOps.exif_transpose"):
        np.testing.assert_array_equal(load_rgb(copy), np.asarray(copy))


def test_damaged_exif_does_not_spoil_a_good_picture(tmp_path):
    array = picture()
    Image.fromarray(array).save(tmp_path / "a.png", exif=b"Exif\0\0garbage!")
    np.testing.assert_array_equal(load_rgb(tmp_path / "a.png"), array)


def test_a_jpeg_is_what_pillow_decodes(tmp_path):
    path = save(tmp_path / "a.jpg", picture(40, 50))
    np.testing.assert_array_equal(load_rgb(path), np.asarray(Image.open(path)))


def test_a_pillow_picture_is_not_changed_or_closed(tmp_path):
    with Image.open(save(tmp_path / "a.png", picture(), "RGBA")) as image:
        load_rgb(image)
        assert image.mode == "RGBA" and image.size == (5, 7)
        np.testing.assert_array_equal(load_rgb(image), picture())


@pytest.mark.parametrize(
    "view",
    [lambda a: a[::2, ::-1], lambda a: a[:, :, ::-1], np.asfortranarray, lambda a: a[:, :, :3].transpose(1, 0, 2)],
)
def test_array_views_load_without_a_copy(view):
    whole = picture(8, 6)
    array = view(whole)
    loaded = load_rgb(array)
    np.testing.assert_array_equal(loaded, array)
    assert np.shares_memory(loaded, array)
    np.testing.assert_array_equal(preprocess([loaded], SPEC), preprocess([np.ascontiguousarray(array)], SPEC))


def test_bgr_arrays_are_turned_without_a_copy():
    rgb = picture(8, 6)
    bgr = np.ascontiguousarray(rgb[:, :, ::-1])
    np.testing.assert_array_equal(load_rgb(bgr, "bgr"), rgb)
    assert np.shares_memory(load_rgb(bgr, "bgr"), bgr)
    np.testing.assert_array_equal(load_rgb(Image.fromarray(rgb), "bgr"), rgb)  # knows its own order


@pytest.mark.parametrize("color", ["RGB", "grb", "", None, 3, ["rgb"]])
def test_other_orders_of_channels_are_refused(color):
    with pytest.raises(ImageError, match=r"color .* should be 'rgb' or 'bgr'"):
        load_rgb(picture(), color)


@pytest.mark.parametrize("wrap", [bytes, bytearray, memoryview])
def test_bytes_of_a_file_load_as_the_file_does(tmp_path, wrap):
    path = save(tmp_path / "a.png", picture())
    np.testing.assert_array_equal(load_rgb(wrap(path.read_bytes())), picture())


@pytest.mark.parametrize(
    ("data", "message"), [(b"", "0 bytes is empty"), (b"bytes", "5 bytes is not a picture"), (b"\x89PNG", "not a pict")]
)
def test_bytes_of_no_picture_are_refused(data, message):
    with pytest.raises(ImageError, match=message):
        load_rgb(data)


EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\n(/tmp/started) (w) file\n%%EOF\n"
OTHERS = {
    "EPS or PostScript": EPS,
    "EPS": b"\xc5\xd0\xd3\xc6" + (30).to_bytes(4, "little") + len(EPS).to_bytes(4, "little") + bytes(18) + EPS,
    "PDF": b"%PDF-1.7\n",
    "SVG": b"<svg xmlns='http://www.w3.org/2000/svg'/>",
    "PSD": b"8BPS\x00\x01" + bytes(40),
    "ICO": b"\x00\x00\x01\x00\x01\x00" + bytes(40),
    "HEIF or MP4": b"\x00\x00\x00\x18ftypheic" + bytes(40),
    "JPEG XL": b"\xff\x0a" + bytes(40),
    "FITS": b"SIMPLE  =                    T" + bytes(80),
    "DDS": b"DDS " + bytes(140),
}


@pytest.fixture
def no_programs(monkeypatch, tmp_path):
    """A Ghostscript that would be found, and leaves a mark."""
    mark = tmp_path / "started"
    for name in ("gs", "gswin64c"):
        (tmp_path / name).write_text(f"#!/bin/sh\ntouch {mark}\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    yield
    assert not mark.exists()


@pytest.mark.parametrize(("kind", "data"), OTHERS.items(), ids=OTHERS)
def test_other_formats_are_refused_by_name(tmp_path, no_programs, kind, data):
    (tmp_path / "a.jpg").write_bytes(data)
    for given in (data, tmp_path / "a.jpg"):
        with pytest.raises(ImageError, match=f"format {re.escape(kind)}.*save it as PNG or JPEG"):
            load_rgb(given)


def test_a_pillow_picture_starts_no_program_either(no_programs):
    lazy = Image.open(io.BytesIO(EPS))
    assert lazy.format == "EPS"
    with pytest.raises(ImageError, match="Pillow picture is EPS, which is not decoded here"):
        load_rgb(lazy)


FILES = {"AVIF": "avif", "BMP": "bmp", "DIB": "dib", "GIF": "gif", "JPEG": "jfif", "JPEG2000": "jp2", "PNG": "png"}
FILES |= {"PPM": "pgm", "TGA": "tga", "TIFF": "tiff", "WEBP": "webp"}


@pytest.mark.parametrize(("kind", "suffix"), FILES.items())
def test_every_format_of_the_list_is_read(tmp_path, kind, suffix):
    assert f".{suffix}" in images.SUFFIXES and kind in images.FORMATS
    try:
        Image.fromarray(picture(20, 30)).save(tmp_path / f"a.{suffix}", kind)
    except (KeyError, OSError):
        pytest.skip(f"this Pillow writes no {kind}")
    assert load_rgb(tmp_path / f"a.{suffix}").shape == (20, 30, 3)


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.zeros((4, 5), np.uint8), r"shape \(4, 5\), expected .*grey"),
        (np.zeros((4, 5, 1), np.uint8), r"shape \(4, 5, 1\), expected .*grey"),
        (np.zeros((4, 5, 4), np.uint8), r"shape \(4, 5, 4\), expected .*drop alpha"),
        (np.zeros((3, 40, 50), np.uint8), r"shape \(3, 40, 50\), expected .*transpose"),
        (np.zeros((1, 4, 5, 3), np.uint8), r"shape \(1, 4, 5, 3\), expected"),
        (np.zeros((), np.uint8), r"shape \(\), expected"),
        (np.zeros(0, np.uint8), r"shape \(0,\), expected"),
        (np.zeros((0, 5, 3), np.uint8), "5x0 pixels"),
        (np.zeros((5, 0, 3), np.uint8), "0x5 pixels"),
        (np.zeros((4, 5, 3), np.float32), r"dtype float32, expected .*0\.\.255"),
        (np.zeros((4, 5, 3), np.int64), "dtype int64"),
        (np.zeros((4, 5, 3), bool), "dtype bool"),
        (np.zeros((4, 5, 3), object), "dtype object"),
        (np.broadcast_to(np.uint8(0), (10_000, 10_000, 3)), f"more than the allowed {MAX_PIXELS}"),
    ],
)
def test_unusable_arrays_are_refused(array, message):
    with pytest.raises(ImageError, match=message):
        load_rgb(array)


@pytest.mark.parametrize(
    "thing", [None, 3, [[1, 2, 3]], io.BytesIO(b""), [picture()]], ids=lambda thing: type(thing).__name__
)
def test_other_types_are_refused(thing):
    with pytest.raises(ImageError, match=f"of type {type(thing).__name__}; pass a file path"):
        load_rgb(thing)
    with pytest.raises(ImageError):
        preprocess([thing], SPEC)


def png(width, height):
    """A PNG whose header promises width x height grey pixels and whose body is empty."""
    out = io.BytesIO()
    Image.fromarray(np.zeros((1, 1), np.uint8)).save(out, "png")
    data = bytearray(out.getvalue())
    data[16:24] = width.to_bytes(4, "big") + height.to_bytes(4, "big")
    data[29:33] = zlib.crc32(data[12:29]).to_bytes(4, "big")
    return bytes(data)


def encoded(kind, **options):
    out = io.BytesIO()
    Image.fromarray(picture(60, 80)).save(out, kind, **options)
    return out.getvalue()


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "is empty"),
        (b"not a picture", "is not a picture"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "is not a picture"),
        (encoded("png")[:40], "is not a picture|cannot be"),
        (encoded("png")[:4000], "cannot be"),
        (encoded("jpeg")[:300], "is not a picture|cannot be"),
        (encoded("jpeg")[:-900], "cannot be decoded"),
        (encoded("webp")[:-900], "is not a picture|cannot be"),
        (encoded("tiff")[:-9000], "is not a picture|cannot be"),
        (encoded("gif")[:400], "is not a picture|cannot be"),
        (png(9_000, 9_900), "9000x9900 pixels, more than the allowed"),
        (png(10_000, 10_000), "pixels"),
        (png(60_000, 60_000), "pixels"),
    ],
)
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_bad_files_are_refused_by_name(tmp_path, data, message):
    path = tmp_path / "some picture.png"
    path.write_bytes(data)
    with pytest.raises(ImageError, match=message) as error:
        load_rgb(path)
    assert "some picture.png" in str(error.value)


def test_a_bomb_is_refused_where_warnings_are_errors_too(tmp_path):
    (tmp_path / "a.png").write_bytes(png(10_000, 10_000))
    with warnings.catch_warnings(), pytest.raises(ImageError, match="pixels"):
        warnings.simplefilter("error")
        load_rgb(tmp_path / "a.png")


def test_pillows_limits_are_left_as_they_are(tmp_path):
    before = Image.MAX_IMAGE_PIXELS
    load_rgb(save(tmp_path / "a.png", picture()))
    assert before == Image.MAX_IMAGE_PIXELS and before > MAX_PIXELS


@pytest.mark.parametrize("path", ["", "gone.png", "a\0b", "http://example.org/a.png", "x" * 5000])
def test_paths_that_lead_nowhere_are_refused_by_name(path):
    with pytest.raises(ImageError) as error:
        load_rgb(path)
    assert repr(path)[1:20] in str(error.value)


def test_a_folder_is_refused_by_name(tmp_path):
    with pytest.raises(ImageError, match="is not a file"):
        load_rgb(tmp_path)


def test_a_float_picture_is_refused():
    with pytest.raises(ImageError, match="32-bit floats"):
        load_rgb(Image.fromarray(np.zeros((4, 5), np.float32)))


@pytest.mark.parametrize("kind", ["png", "jpeg", "gif", "bmp", "tiff", "webp", "ppm"])
@pytest.mark.filterwarnings("ignore")
def test_damaged_bytes_load_or_are_refused_but_never_crash(tmp_path, kind):
    good, rng, path = encoded(kind), random.Random(kind), pathlib.Path(tmp_path / "a")
    for _ in range(60):
        data = bytearray(good[: rng.choice([len(good), rng.randrange(len(good))])])
        for _ in range(rng.randrange(1, 6)):
            data[rng.randrange(min(len(data), rng.choice([40, 10**6])))] = rng.randrange(256)
        path.write_bytes(data)
        try:
            loaded = load_rgb(path)
        except ImageError as error:
            assert str(path) in str(error)
        else:
            assert loaded.dtype == np.uint8 and loaded.ndim == 3 and loaded.shape[2] == 3
