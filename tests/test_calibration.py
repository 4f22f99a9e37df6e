"""Calibration: samples good and bad, statistics against plain PyTorch, resuming, refusing, observers."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from tests.conftest import NANO, slow
from trol_edge.calibration import prompts as prompts_module
from trol_edge.calibration import run
from trol_edge.calibration import samples as sampling
from trol_edge.calibration.run import calibrate
from trol_edge.cli.main import main
from trol_edge.errors import CalibrationError, UsageError
from trol_edge.export import scenes
from trol_edge.export.quantize import observers
from trol_edge.export.quantize.stats import PARTS, SMALLEST, PointStatistics, Statistics, part_path, read_point
from trol_edge.export.reference.checkpoint import Checkpoint
from trol_edge.export.reference.model import Decoder, EagerAttention, LoraLinear, rope_tables
from trol_edge.prompt.images import preprocess

pytestmark = pytest.mark.heavy

COUNT = 3


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Statistics of trol-nano over a few scenes."""
    folder = tmp_path_factory.mktemp("statistics") / "nano"
    calibrate(NANO, None, folder, count=COUNT)
    return folder


@pytest.fixture(scope="module")
def statistics(cache: Path) -> Statistics:
    return Statistics.load(cache, Checkpoint(NANO).identity())


# -- statistics against the reference ----------------------------------------------------------------------------------


class Plain:
    """The same samples through the whole model at once, every Linear's input kept."""

    def __init__(self) -> None:
        self.inputs: dict[str, list[torch.Tensor]] = {}
        self.outputs: dict[str, float] = {}
        checkpoint = Checkpoint(NANO)
        self.spec, family = checkpoint.spec, checkpoint.family
        decoder, vision = family.decoder(self.spec), family.vision(self.spec)
        assert isinstance(decoder, Decoder)
        checkpoint.load_into(decoder=decoder, vision=vision)
        embedding = checkpoint.tensor("embedding").float()
        for prefix, module in (("decoder", decoder), ("vision", vision)):
            for name, child in module.named_modules():
                if isinstance(child, (nn.Linear, LoraLinear)):
                    child.register_forward_hook(self.hook(f"{prefix}.{name}"))
        prompts, _ = prompts_module.model_prompts(checkpoint, sampling.load(None, COUNT))
        for prompt in prompts:
            features = vision(torch.from_numpy(preprocess(prompt.sample.load(), family.image(self.spec))))
            ids = torch.from_numpy(prompt.ids)
            x, mask = embedding[ids], ids == self.spec.image_token_id
            x[mask] = features[0]
            attend = EagerAttention(self.spec, *rope_tables(self.spec.head_dim, self.spec.rope_theta, len(ids)))
            attend.positions = torch.arange(len(ids))
            x = decoder.traverse(x[None], mask.float()[None, :, None], attend)
            decoder.logits(x[:, int(mask.nonzero().max()) + 1 :])

    def hook(self, name: str) -> Any:
        def note(module: nn.Module, args: Any, output: Any) -> None:
            self.inputs.setdefault(name, []).append(args[0].reshape(-1, args[0].shape[-1]))
            self.outputs[name] = max(self.outputs.get(name, 0.0), float(output.abs().max()))

        return note


@torch.no_grad()
def test_statistics_equal_the_whole_model(statistics: Statistics) -> None:
    """Layer by layer through files, or all at once: the same numbers at every Linear."""
    plain = Plain()
    linears = {name for name in plain.inputs if name != "decoder.gate"}
    assert {name for name in statistics.points if not name.endswith(".lora_b")} == linears
    lora = {name for name in statistics.points if name.endswith(".lora_b")}
    assert len(lora) == 5 * plain.spec.num_layers
    for name in lora:  # of image tokens, not of text
        assert statistics.points[name].count < statistics.points[name.removesuffix(".lora_b")].count
    for name in linears:
        rows = torch.cat(plain.inputs[name])
        point = statistics.points[name]
        assert point.count == len(rows), name
        for found, wanted in (
            (point.absmax, rows.abs().amax(0)),
            (point.mean_abs, rows.abs().mean(0)),
            (point.mean_square, rows.square().mean(0)),
        ):
            assert found.dtype == np.float32 and found.shape == (rows.shape[1],)
            np.testing.assert_allclose(found, wanted.numpy(), rtol=2e-3, atol=1e-4 * float(wanted.max()))
        assert point.output_absmax == pytest.approx(plain.outputs[name], rel=1e-3)
        assert point.rows.shape == (min(64, len(rows)), rows.shape[1])
        # Rows that really occurred. By differences, because products lose half of the digits of a small distance.
        distances = torch.cdist(torch.from_numpy(point.rows), rows, compute_mode="donot_use_mm_for_euclid_dist")
        assert float(distances.min(1).values.max()) < 1e-3 * float(rows.norm(dim=1).max()), name
        assert point.histogram.shape == (2048,) and point.histogram.sum() % rows.shape[1] == 0
        assert point.histogram_max >= point.absmax.max() * (1 - 1e-6)
        assert abs(point.amax("percentile") - float(rows.abs().flatten().quantile(0.9999))) < 0.35 * point.amax(
            "minmax"
        )
    both_passes = 2 * statistics.points["decoder.lm_head"].count < statistics.points["decoder.layers.0.qkv"].count
    assert both_passes


@pytest.mark.slow
def test_every_observer_gives_a_usable_threshold(statistics: Statistics) -> None:
    for name, point in statistics.points.items():
        for observer in ("minmax", "percentile", "entropy", "mse"):
            assert 0 < point.amax(observer) <= point.absmax.max(), (name, observer)
    with pytest.raises(UsageError, match="observer 'max' is not one of minmax, "):
        point.amax("max")


def test_peaks_cover_what_no_linear_sees(statistics: Statistics) -> None:
    for i in range(8):
        assert statistics.peaks[f"decoder.layers.{i}.residual"] > 1
        assert statistics.peaks[f"decoder.layers.{i}.scores"] > 1
    assert {"vision.layers.0.scores", "vision.layers.3.residual", "vision.features"} <= set(statistics.peaks)
    assert statistics.samples == COUNT


@pytest.mark.slow
def test_bfloat16_is_close(statistics: Statistics, tmp_path: Path) -> None:
    narrow = calibrate(NANO, None, tmp_path / "narrow", count=COUNT, compute="bfloat16")
    ratios = [narrow.points[n].amax("minmax") / p.amax("minmax") for n, p in statistics.points.items()]
    assert min(ratios) > 0.8 and max(ratios) < 1.25 and np.std(np.log(ratios)) < 0.05
    assert ratios != [1.0] * len(ratios)
    with pytest.raises(UsageError, match="'float16' is not one of"):
        calibrate(NANO, None, tmp_path / "no", compute="float16")


# -- the cache ---------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_killed_runs_go_on(cache: Path, tmp_path: Path) -> None:
    """Killed outright in two places, then finished: no stage runs twice, and the result is the same to the bit."""
    folder = tmp_path / "killed"
    code = f"""
import os, signal, sys
from trol_edge.calibration.run import calibrate
def progress(what, done, total):
    print(what, done, flush=True)
    if [what, done] == [sys.argv[1], int(sys.argv[2])]:
        os.kill(os.getpid(), signal.SIGKILL)
calibrate({str(NANO)!r}, None, {str(folder)!r}, count={COUNT}, progress=progress)
"""
    reports = []
    for part, done in (("vision", 2 * COUNT + 2), ("decoder", 3 * COUNT + 1), ("nothing", 0)):
        command = [sys.executable, "-c", code, part, str(done)]
        ran = subprocess.run(command, cwd=Path(__file__).parents[1], capture_output=True, text=True)
        assert ran.returncode == (0 if part == "nothing" else -signal.SIGKILL), ran.stderr
        reports.append([line for line in ran.stdout.splitlines() if not line.startswith("samples")])
        if part != "nothing":
            with pytest.raises(CalibrationError, match="unfinished"):
                Statistics.load(folder, None)
    assert reports[1][0] == f"vision {2 * COUNT + 1}"  # embedding and layer 0 were done, layer 1 begins again
    assert reports[2][0] == f"decoder {3 * COUNT + 1}"
    again, whole = Statistics.load(folder, None), Statistics.load(cache, None)
    assert list(again.points) == list(whole.points) and again.peaks == whole.peaks
    for name, point in whole.points.items():
        for field in ("absmax", "mean_abs", "mean_square", "rows", "histogram"):
            np.testing.assert_array_equal(getattr(again.points[name], field), getattr(point, field))
    assert not list((folder / run.HIDDEN).glob("*"))  # hundreds of megabytes at full size


def test_a_finished_cache_is_used_as_it_is(cache: Path) -> None:
    before = {p: p.stat().st_mtime_ns for p in cache.rglob("*") if p.is_file()}
    seen: list[str] = []
    calibrate(NANO, None, cache, count=COUNT, progress=lambda what, done, total: seen.append(what))
    assert set(seen) == {"samples"}
    assert before == {p: p.stat().st_mtime_ns for p in cache.rglob("*") if p.is_file()}


def test_other_samples_and_other_checkpoints_are_refused(cache: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(cache, tmp_path / "copy"))
    with pytest.raises(CalibrationError, match=r"statistics of other samples.*--force"):
        calibrate(NANO, None, folder, count=COUNT - 1)
    other = Path(shutil.copytree(NANO, tmp_path / "other"))
    weights = bytearray((other / "model.safetensors").read_bytes())
    weights[-2] ^= 1  # the last number, by its last bit
    (other / "model.safetensors").write_bytes(weights)
    with pytest.raises(CalibrationError, match="statistics of another checkpoint"):
        calibrate(other, None, folder, count=COUNT)
    with pytest.raises(CalibrationError, match="of another checkpoint"):
        Statistics.load(folder, Checkpoint(other).identity())
    replaced = calibrate(other, None, folder, count=1, overwrite=True)
    assert replaced.samples == 1 and replaced.checkpoint == Checkpoint(other).identity()


def test_damaged_caches_are_errors(cache: Path, tmp_path: Path) -> None:
    with pytest.raises(CalibrationError, match="trol-edge calibrate"):
        Statistics.load(tmp_path / "nothing", None)
    folder = Path(shutil.copytree(cache, tmp_path / "copy"))
    part = part_path(folder, "decoder.layers.1")
    part.write_bytes(part.read_bytes()[:2000])
    with pytest.raises(CalibrationError, match="damaged"):
        Statistics.load(folder, None)
    (folder / "state.json").write_text("{}", encoding="utf-8")
    with pytest.raises(CalibrationError, match="not readable"):
        Statistics.load(folder, None)
    full = tmp_path / "full"
    full.mkdir()
    (full / "holiday.txt").write_text("keep me", encoding="utf-8")
    with pytest.raises(CalibrationError, match=r"holds other files \(holiday.txt\)"):
        calibrate(NANO, None, full, count=1, overwrite=True)
    assert (full / "holiday.txt").exists()


# -- activations that are no good --------------------------------------------------------------------------------------


def changed(folder: Path, names: tuple[str, ...], value: float) -> Path:
    """trol-nano with every number of some published tensors set."""
    from safetensors.torch import load_file, save_file

    shutil.copytree(NANO, folder)
    tensors = load_file(folder / "model.safetensors")
    for name in names:
        tensors[name] = torch.full_like(tensors[name], value)
    save_file(tensors, folder / "model.safetensors")
    return folder


def test_nan_activations_name_the_place(tmp_path: Path) -> None:
    """Weights that export accepts (finite), and activations that overflow: named at the first layer, not at the end."""
    names = tuple(f"model.layers.1.feed_forward.{w}.ffn.weight" for w in ("w1", "w2", "w3"))
    broken = changed(tmp_path / "broken", names, float("nan"))
    with pytest.raises(CalibrationError, match=r"NaN or infinite activations at decoder.layers.1.mlp.\w+.*scene 0"):
        calibrate(broken, None, tmp_path / "cache", count=1)
    assert not part_path(tmp_path / "cache", "decoder.layers.1").exists()


def test_constant_activations_get_a_guarded_threshold(tmp_path: Path) -> None:
    """A norm of zeros makes everything after it zero, but no threshold."""
    dead = changed(tmp_path / "dead", ("model.layers.2.ffn_norm.weight",), 0.0)
    found = calibrate(dead, None, tmp_path / "cache", count=1)
    point = found.points["decoder.layers.2.mlp.gate"]
    assert not point.absmax.any() and point.histogram[0] == point.histogram.sum() > 0
    assert [point.amax(observer) for observer in observers.OBSERVERS] == [SMALLEST] * 4
    assert np.float32(SMALLEST / 127) > 0 and np.isfinite(np.float32(127 / SMALLEST))


def test_parts_with_nan_cannot_be_stored_or_read(cache: Path, tmp_path: Path) -> None:
    from trol_edge.export.quantize.stats import write_part

    good = read_point(part_path(cache, "decoder.layers.0"), "decoder.layers.0.qkv")
    bad = PointStatistics(**{**vars(good), "absmax": np.full_like(good.absmax, np.nan)})
    (tmp_path / PARTS).mkdir()
    with pytest.raises(CalibrationError, match="NaN or infinite activations at x"):
        write_part(tmp_path, "stage", {"x": bad}, {})
    with pytest.raises(CalibrationError, match="at peak"):
        write_part(tmp_path, "stage", {"x": good}, {"peak": float("inf")})
    assert list((tmp_path / PARTS).iterdir()) == []


# -- samples -----------------------------------------------------------------------------------------------------------


def picture(path: Path, seed: int = 0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(scenes.render(seed)[0]).save(path)
    return path


def test_one_corrupt_picture_is_skipped_counted_and_named(tmp_path: Path) -> None:
    for i in range(30):
        picture(tmp_path / f"{i:03}.png", i)
    (tmp_path / "017.png").write_bytes((tmp_path / "017.png").read_bytes()[:300])
    (tmp_path / "notes.txt").write_text("no picture", encoding="utf-8")
    found = sampling.load(tmp_path, None)
    assert len(found.samples) == 29
    assert len(found.skipped) == 1 and found.skipped[0].startswith("017.png: ")
    assert {s.prompt for s in found.samples} == set(sampling.PROMPTS)
    some, again = sampling.load(tmp_path, 8), sampling.load(tmp_path, 8)
    assert len(some.samples) == 8 and some == again and some.sha256 != found.sha256


def test_a_folder_is_read_in_every_format_and_the_rest_is_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """What load_rgb reads is a sample, whatever its suffix; what is left out is counted by suffix, with names."""
    for name in ("a.png", "b.JFIF", "c.pgm", "sub/d.jp2", "e.webp"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        with path.open("wb") as file:
            kinds = {".jfif": "JPEG", ".pgm": "PPM", ".jp2": "JPEG2000", ".png": "PNG", ".webp": "WEBP"}
            Image.fromarray(scenes.render(0)[0]).save(file, kinds[path.suffix.lower()])
    for i in range(5):
        (tmp_path / f"{i}.eps").write_bytes(b"%!PS")
    (tmp_path / "notes").write_text("")
    os.mkfifo(tmp_path / "pipe.png")
    found = sampling.load(tmp_path, None)
    assert {sample.name for sample in found.samples} == {"a.png", "b.JFIF", "c.pgm", "sub/d.jp2", "e.webp"}
    assert found.left_out == (
        "left out 1 file(s) without a suffix, which is not a picture format that is read: notes",
        "left out 5 file(s) .eps, which is not a picture format that is read: 0.eps, 1.eps, 2.eps, ...",
        "left out 1 file(s) .png, which is not a picture format that is read: pipe.png",
    )
    assert all(line in caplog.text for line in found.left_out)


def test_lines_end_at_newlines_only(tmp_path: Path) -> None:
    """U+2028 inside of a string is none; a byte-order mark and Windows' ends of lines are no part of a line."""
    picture(tmp_path / "a.png")
    rows = [{"image": "a.png", "prompt": f"What\u2028is\x85this\u2029{i}?"} for i in range(2)]
    text = "\r\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    (tmp_path / "data.jsonl").write_bytes(b"\xef\xbb\xbf" + text.encode())
    found = sampling.load(tmp_path / "data.jsonl", None)
    assert sorted(sample.prompt for sample in found.samples) == [row["prompt"] for row in rows]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"image": "a.png", "prompt": "What?", "anwser": "red"}', "has an unknown key anwser"),
        ("[" * 99999, "line 1: not JSON"),
        ('{"image": "a.png", "prompt": "\\ud800"}', "line 1: not JSON"),
        ("null", "line 1: expected"),
        ('{"prompt": ' + "9" * 9999 + "}", "line 1: not JSON"),
    ],
)
def test_rows_that_are_none(tmp_path: Path, line: str, message: str) -> None:
    """Named with their line."""
    (tmp_path / "data.jsonl").write_text(line, encoding="utf-8")
    with pytest.raises(CalibrationError, match=message):
        sampling.load(tmp_path / "data.jsonl", None)


@pytest.mark.parametrize("number", [errno.ENOSPC, *slow(errno.EIO)])
@pytest.mark.parametrize("where", ["savez", "fsync", "hidden"])
def test_a_disk_that_fails_in_the_middle(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, where: str
) -> None:
    """In a part, in hidden states, at the end of a file: one sentence, and the same command goes on afterwards."""
    calls = []

    def failing(real: Any) -> Any:
        def call(*args: Any, **more: Any) -> Any:
            calls.append(1)
            if len(calls) == 4:
                raise OSError(number, os.strerror(number))
            return real(*args, **more)

        return call

    with monkeypatch.context() as patch:
        if where == "savez":
            patch.setattr(np, "savez", failing(np.savez))
        elif where == "fsync":
            patch.setattr(os, "fsync", failing(os.fsync))
        else:
            patch.setattr(np, "fromfile", failing(np.fromfile))
        with pytest.raises(CalibrationError, match=r"(disk is full; make room|cannot be written).*continues where it"):
            calibrate(NANO, None, tmp_path / "cache", count=1)
    assert not list((tmp_path / "cache").rglob("*.part"))
    calibrate(NANO, None, tmp_path / "cache", count=1)


def test_corrupt_pictures_reach_the_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """From the command line to JSON: what was skipped, and statistics of the rest."""
    data = tmp_path / "data"
    picture(data / "good.png")
    (data / "bad.jpg").write_bytes(b"\xff\xd8\xff nothing")
    assert main(["calibrate", str(NANO), "--data", str(data), "-o", str(tmp_path / "cache"), "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["samples"] == 1 and [s.split(":")[0] for s in result["skipped"]] == ["bad.jpg"]
    assert result["peak_bytes"] > 0 and result["points"] == len(Statistics.load(tmp_path / "cache", None).points)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "no samples here"),
        ({"a.png": b"", "b.jpg": b"x"}, "none of 2 samples is usable; the first: "),
        ({"data.jsonl": b""}, "no samples here"),
        ({"data.jsonl": b'{"image": "a.png"}'}, "line 1: expected"),
        ({"data.jsonl": b'{"image": 5, "prompt": "What?"}'}, "line 1: expected"),
        ({"data.jsonl": b'{"image": null, "prompt": " "}'}, "line 1: expected"),
        ({"data.jsonl": b'\n{"image": "a.png", "prompt": "What?"}\n{'}, "line 3: not JSON"),
        ({"data.jsonl": b"[1]"}, "line 1: expected"),
        ({"data.jsonl": b'{"image": "a.png", "prompt": "What?"}'}, "none of 1 samples is usable"),
        ({"data.jsonl": b'{"image": null, "prompt": "Hello?"}'}, "none of the 1 samples has a picture"),
    ],
)
def test_nothing_usable_is_an_error_before_any_work(files: dict[str, bytes], message: str, tmp_path: Path) -> None:
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    source = tmp_path / "data.jsonl" if "data.jsonl" in files else tmp_path
    with pytest.raises(CalibrationError, match=message):
        calibrate(NANO, source, tmp_path / "cache")
    assert not (tmp_path / "cache").exists()


def test_jsonl_and_python_samples(tmp_path: Path) -> None:
    picture(tmp_path / "pictures" / "a.png")
    lines = [
        {"image": "pictures/a.png", "prompt": "What colour is it?", "answer": "red"},
        {"image": ["pictures/a.png", "pictures/a.png"], "prompt": "Which is larger?"},
        {"image": None, "prompt": "Hello?"},
    ]
    (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    found = sampling.load(tmp_path / "data.jsonl", None)
    assert {(len(s.pictures), s.prompt, s.answer) for s in found.samples} == {
        (1, "What colour is it?", "red"),
        (2, "Which is larger?", ""),
        (0, "Hello?", ""),
    }
    pixels = scenes.render(3)[0]
    pairs = [(pixels, "What is it?"), (Image.fromarray(pixels), "Where?"), (None, "Hello?"), ("no.png", "What?")]
    given = sampling.load(iter(pairs), None)
    assert len(given.samples) == 3 and given.skipped[0].startswith("sample 3: ")
    statistics = calibrate(NANO, found, tmp_path / "cache")
    assert statistics.samples == 3
    for wrong in ([5], [("a", "b", "c")], [(None, "")], []):
        with pytest.raises(CalibrationError):
            sampling.load(wrong)  # type: ignore[arg-type]
    with pytest.raises(CalibrationError, match="at least 1"):
        sampling.load(None, 0)
    with pytest.raises(CalibrationError, match="no such folder or file"):
        sampling.load(tmp_path / "nowhere")


def test_default_samples_are_nobodys_exam() -> None:
    found = sampling.load(None)
    assert len(found.samples) == 32 and not found.skipped
    assert all(s.answer for s in found.samples)
    exam = {image.tobytes() for image, *_ in scenes.held_out(32)}
    assert not exam & {s.load()[0].tobytes() for s in found.samples}
    assert sampling.CALIBRATION_SEED > scenes.HELD_OUT_SEED + 1_000_000


def test_a_checkpoint_without_tokenizer_is_refused(tmp_path: Path) -> None:
    folder = Path(shutil.copytree(NANO, tmp_path / "mute"))
    for name in ("tokenizer.model", "added_tokens.json"):
        os.unlink(folder / name)
    with pytest.raises(CalibrationError, match="no tokenizer"):
        calibrate(folder, None, tmp_path / "cache", count=1)


# -- observers ---------------------------------------------------------------------------------------------------------

DISTRIBUTIONS = {
    "normal": lambda rng: rng.standard_normal(200_000),
    "laplace": lambda rng: rng.laplace(size=200_000),
    "student": lambda rng: rng.standard_t(3, size=200_000),
    "uniform": lambda rng: rng.uniform(-1, 1, 200_000),
    "outliers": lambda rng: np.concatenate((rng.standard_normal(200_000), 30 * rng.standard_normal(200))),
}


def clipped_divergence(histogram: Any, stop: int) -> float:
    """Divergence of 128 levels from the histogram clipped at `stop` bins, level by level as it is defined."""
    p = histogram[:stop].astype(float)
    p[-1] += histogram[stop:].sum()
    q = np.zeros(stop)
    for level in range(128):
        first, last = -(-level * stop // 128), -(-(level + 1) * stop // 128)
        used = p[first:last] > 0
        q[first:last][used] = histogram[first:last].sum() / max(1, used.sum())
    p, q = p[p > 0] / p.sum(), np.maximum(q[p > 0], 1e-4) / q.sum()
    return float((p * np.log(p / q)).sum())


@pytest.mark.parametrize("name", ["outliers", *slow(*(name for name in DISTRIBUTIONS if name != "outliers"))])
def test_observers_against_onnxruntime_and_brute_force(name: str) -> None:
    """Percentile and entropy beside onnxruntime's own, the squared error beside a search over the values."""
    from onnxruntime.quantization.calibrate import HistogramCollector

    values = DISTRIBUTIONS[name](np.random.default_rng(0)).astype(np.float32)
    magnitude, top = np.abs(values), float(np.abs(values).max())
    histogram = np.histogram(magnitude, 2048, (0, top))[0]
    assert observers.minmax(histogram, top) == pytest.approx(top)
    collector = HistogramCollector("percentile", True, 2048, 128, 99.99, "same")
    collector.collect_absolute_value({"x": values})
    theirs = float(collector.compute_percentile()["x"][1])
    assert observers.percentile(histogram, top) == pytest.approx(theirs, abs=2.5 * top / 2048)
    # Theirs moves by half between two draws of one heavy-tailed distribution, so it cannot be met more closely; that
    # ours is the least of its own definition is checked below.
    both, edges = np.histogram(np.concatenate((values, -values)), 1024, (-top, top))
    bounds = (both, edges.astype(np.float32), np.float32(-top), np.float32(top))
    theirs = float(collector.get_entropy_threshold(bounds, 128)[1])
    assert 1 / 1.75 < observers.entropy(histogram, top) / theirs < 1.75
    chosen = round(observers.entropy(histogram, top) * 2048 / top)
    least = min(clipped_divergence(histogram, stop) for stop in range(128, 2049, 7))
    assert clipped_divergence(histogram, chosen) < 1.05 * least + 1e-6

    def error(threshold: float) -> float:
        step = threshold / 127
        return float(np.mean(np.square(np.clip(np.rint(values / step), -127, 127) * step - values)))

    best = min(error(t) for t in np.linspace(top / 16, top, 300))
    assert error(observers.mse(histogram, top)) < 1.02 * best


@pytest.mark.parametrize("observer", observers.OBSERVERS)
def test_observers_on_histograms_without_shape(observer: str) -> None:
    """Nothing, one value, one bin: finite, not negative, never above the top."""
    empty = np.zeros(2048, np.int64)
    assert observers.OBSERVERS[observer](empty, 0.0) == 0.0
    for position in (0, 5, 126, 127, 1000, 2047):
        one = empty.copy()
        one[position] = 7
        found = observers.OBSERVERS[observer](one, 3.0)
        assert 3.0 * position / 2048 < found <= 3.0, position


def test_scenes_are_as_large_as_the_tower_reads(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """An enlarged picture has no fine detail; what is asked about it stays the same."""
    small, large = (sampling.load(None, 2, side=side).samples for side in (112, 490))
    assert [s.load()[0].shape for s in (*small, *large)] == 2 * [(112, 112, 3)] + 2 * [(560, 560, 3)]
    assert [(s.prompt, s.answer) for s in small] == [(s.prompt, s.answer) for s in large]
    sides = []

    def load(source: Any, count: Any, progress: Any, side: int) -> Any:
        sides.append(side)
        raise CalibrationError("enough")

    monkeypatch.setattr(sampling, "load", load)
    tower = SimpleNamespace(spec=SimpleNamespace(vision=SimpleNamespace(image_size=448)))
    monkeypatch.setattr(run, "Checkpoint", lambda folder: tower)
    with pytest.raises(CalibrationError, match="enough"):
        run.calibrate(NANO, None, tmp_path / "cache")
    assert sides == [448]
