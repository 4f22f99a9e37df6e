"""What calibration sees of the gate, and what it measures of second passes that are left out."""

from __future__ import annotations

import base64
import dataclasses
import io
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from tests import shut_gate
from trol_edge.calibration import gate_figure, run
from trol_edge.calibration import samples as sampling
from trol_edge.calibration.prompts import SamplePrompt, kinds_of, model_prompts
from trol_edge.calibration.run import calibrate
from trol_edge.cli.main import main
from trol_edge.errors import CalibrationError
from trol_edge.export.gates import ACTIVE, GATE_BINS, KINDS, Gates, load
from trol_edge.export.quantize.stats import STATE, Statistics, part_path
from trol_edge.export.reference.checkpoint import Checkpoint
from trol_edge.export.reference.layerwise import rope_of
from trol_edge.export.reference.model import Decoder, EagerAttention
from trol_edge.prompt.images import preprocess

pytestmark = pytest.mark.heavy

COUNT, LEFT_OUT = 3, 2  # samples, and those on which second passes are left out


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return shut_gate.make(tmp_path_factory.mktemp("checkpoint") / "shut")


@pytest.fixture(scope="module")
def folder(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A calibration with second passes left out."""
    made = tmp_path_factory.mktemp("statistics") / "shut"
    calibrate(checkpoint, None, made, count=COUNT, left_out=LEFT_OUT)
    return made


@pytest.fixture(scope="module")
def gates(folder: Path) -> Gates:
    return load(folder, None)


class Plain:
    """The same samples through the whole model at once."""

    def __init__(self, checkpoint: Path) -> None:
        self.source = source = Checkpoint(checkpoint)
        self.spec = source.spec
        self.decoder: Any = source.family.decoder(self.spec)
        vision: Any = source.family.vision(self.spec)
        source.load_into(decoder=self.decoder, vision=vision)
        assert isinstance(self.decoder, Decoder)
        self.prompts, _ = model_prompts(source, sampling.load(None, COUNT))
        embedding, image = source.tensor("embedding").float(), source.family.image(self.spec)
        self.inputs = []
        for prompt in self.prompts:
            x = embedding[torch.from_numpy(prompt.ids)]
            x[torch.from_numpy(prompt.ids == self.spec.image_token_id)] = vision(
                torch.from_numpy(preprocess(prompt.sample.load(), image))
            )[0]
            self.inputs.append(x)

    def run(self, index: int, twice: tuple[int, ...]) -> tuple[torch.Tensor, list[np.ndarray[Any, Any]]]:
        """Logits of a sample's answer with a second pass in these layers only, and s [S] in each."""
        prompt, x = self.prompts[index], self.inputs[index]
        attend = EagerAttention(self.spec, *rope_of(self.spec, len(x)))
        attend.positions = torch.arange(len(x))
        mask = torch.from_numpy(prompt.ids == self.spec.image_token_id).float()[None, :, None]
        shares = []
        self.decoder.second_layers = frozenset(twice)
        x = self.decoder.traverse(x[None], mask, attend, lambda i, o1, o2, s, x: shares.append(s[0, :, 0].numpy()))
        return self.decoder.logits(x[:, prompt.question - 1 :])[0], shares


@pytest.fixture(scope="module")
def plain(checkpoint: Path) -> Plain:
    with torch.no_grad():
        return Plain(checkpoint)


def test_gates_equal_the_whole_model(gates: Gates, plain: Plain, no_gradients: None) -> None:
    """By layer and kind of token, over all samples; and every token's value of the samples that are shown."""
    layers = tuple(range(shut_gate.LAYERS))
    values = [plain.run(i, layers)[1] for i in range(COUNT)]
    kinds = np.concatenate([kinds_of(p, plain.spec) for p in plain.prompts])
    for i in layers:
        s = np.concatenate([sample[i] for sample in values])
        for kind, name in enumerate(KINDS):
            found, wanted = gates.layers[i][name], s[kinds == kind]
            assert found.tokens == len(wanted) and found.mean == pytest.approx(wanted.mean(), abs=1e-5)
            assert found.active == pytest.approx((wanted > ACTIVE).mean())
            assert np.abs(np.subtract(found.histogram, np.histogram(wanted, GATE_BINS, (0, 1))[0])).sum() <= 2
    assert [p.name for p in gates.prompts] == [p.name for p in plain.prompts]
    for i, sample in enumerate(values):
        np.testing.assert_allclose(gates.values(i), np.stack(sample), atol=1e-5)


def test_kinds_of_tokens(plain: Plain) -> None:
    """The system's turn, then the picture, then the question and the answer; the template around them is text."""
    from trol_edge.export.reference import tokenizer
    from trol_edge.prompt.tokenizer import Tokenizer

    template = plain.source.family.prompt(plain.spec)
    words = Tokenizer(tokenizer.convert(plain.source.folder, (template.image,)) or "", "")
    prompt = plain.prompts[0]
    kinds = [KINDS[kind] for kind in kinds_of(prompt, plain.spec)]
    assert kinds.count("image") == plain.spec.vision.tokens_per_image
    said = {name: words.decode([int(i) for i, k in zip(prompt.ids, kinds, strict=True) if k == name]) for name in KINDS}
    assert template.system.strip() in said["system"] and prompt.sample.prompt not in said["system"]
    assert prompt.sample.prompt in said["text"] and prompt.sample.answer in said["text"]
    assert kinds[: kinds.count("system")] == ["system"] * kinds.count("system")


def test_losses_equal_the_whole_model(gates: Gates, plain: Plain, no_gradients: None) -> None:
    """Each layer alone, and from the top down: nats and top tokens of the answers, as plain PyTorch has them."""
    layers = range(shut_gate.LAYERS)
    assert gates.alone.keys() == gates.from_top.keys() == set(layers)
    for loss in (*gates.alone.values(), *gates.from_top.values()):
        nats, same = [], []
        for i in range(LEFT_OUT):
            p = plain.run(i, tuple(layers))[0].double().log_softmax(-1)
            q = plain.run(i, tuple(set(layers) - set(loss.layers)))[0].double().log_softmax(-1)
            nats.append(float((p.exp() * (p - q)).sum(-1).mean()))
            same += (p.argmax(-1) == q.argmax(-1)).tolist()
        assert loss.nats == pytest.approx(np.mean(nats), rel=1e-3, abs=1e-9), loss.layers
        assert loss.same_top == pytest.approx(np.mean(same))
    assert gates.from_top[2].layers == (2, 3) and gates.from_top[2].nats < 1e-9 < 1e-3 < gates.alone[1].nats


# -- the folder --------------------------------------------------------------------------------------------------------


def test_earlier_folders_are_read(folder: Path, tmp_path: Path) -> None:
    """What an earlier version wrote serves precision as before; of the gate it says nothing, and that is said."""
    old = Path(shutil.copytree(folder, tmp_path / "old"))
    state = json.loads((old / STATE).read_text(encoding="utf-8"))
    del state["left_out"]
    state["stages"] = [stage for stage in state["stages"] if not stage.startswith("left_out")]
    (old / STATE).write_text(json.dumps(state), encoding="utf-8")
    for path in (old / run.PARTS).iterdir():
        with np.load(path) as file:
            arrays = {name: file[name] for name in file.files if not name.startswith(("gate", "kinds", "embedded"))}
        meta = json.loads(str(arrays["meta"]))
        arrays["meta"] = np.array(json.dumps({key: meta[key] for key in ("points", "peaks")}))
        np.savez(path, **arrays)
    assert Statistics.load(old, None).points.keys() == Statistics.load(folder, None).points.keys()
    with pytest.raises(CalibrationError, match=r"says nothing about the gate.*calibrate again"):
        load(old, None)


@pytest.mark.slow
def test_more_serves_less_and_less_is_made_again(folder: Path, checkpoint: Path, tmp_path: Path) -> None:
    """A folder with second passes left out is as good for who needs none of it."""
    copy = Path(shutil.copytree(folder, tmp_path / "copy"))
    before = {p: p.stat().st_mtime_ns for p in copy.rglob("*") if p.is_file()}
    calibrate(checkpoint, None, copy, count=COUNT)
    calibrate(checkpoint, None, copy, count=COUNT, left_out=LEFT_OUT - 1)
    assert before == {p: p.stat().st_mtime_ns for p in copy.rglob("*") if p.is_file()}
    less = tmp_path / "less"
    calibrate(checkpoint, None, less, count=COUNT)
    assert load(less, None).losses == () and len(load(less, None).prompts) == COUNT
    calibrate(checkpoint, None, less, count=COUNT, left_out=99)  # more than there are
    assert load(less, None).state.left_out == COUNT


def test_a_stopped_run_goes_on(folder: Path, checkpoint: Path, tmp_path: Path, gates: Gates) -> None:
    """Stopped where second passes are left out: it goes on with that layer, and the result is the same to the bit."""
    other, seen = tmp_path / "stopped", list[tuple[str, int]]()

    def progress(what: str, done: int, total: int) -> None:
        seen.append((what, done))
        if (what, done) == ("left_out", 2 * LEFT_OUT + 1) and len(seen) > 1:
            seen.clear()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        calibrate(checkpoint, None, other, count=COUNT, left_out=LEFT_OUT, progress=progress)
    with pytest.raises(CalibrationError, match="unfinished"):
        load(other, None)
    calibrate(checkpoint, None, other, count=COUNT, left_out=LEFT_OUT, progress=lambda *told: seen.append(told[:2]))
    assert next(told for told in seen if told[0] != "samples") == ("left_out", 2 * LEFT_OUT + 1)
    assert load(other, None).losses == gates.losses
    assert not list((other / run.HIDDEN).glob("*"))


Damage = Callable[[dict[str, Any]], object]
DAMAGES: list[tuple[str, Damage]] = [
    ("left_out.lm_head", lambda arrays: arrays["losses"].pop()),
    ("left_out.lm_head", lambda arrays: arrays["losses"][0].update(nats=float("nan"))),
    ("left_out.lm_head", lambda arrays: arrays["losses"][0].update(layers=[7])),
    ("left_out.lm_head", lambda arrays: arrays["losses"][0].update(same_top="all")),
    ("decoder.layers.1", lambda arrays: arrays["gate"].update(voice=arrays["gate"]["text"])),
    ("decoder.layers.1", lambda arrays: arrays["gate"]["text"].update(mean=1.5)),
    ("decoder.layers.1", lambda arrays: arrays["gate"]["text"]["histogram"].pop()),
    ("decoder.layers.1", lambda arrays: arrays.pop("gate")),
    ("decoder.embed", lambda arrays: arrays["prompts"][0].update(question=0)),
    ("decoder.embed", lambda arrays: arrays["prompts"].append({"name": "x", "question": 1})),
]


@pytest.mark.parametrize(("stage", "damage"), DAMAGES)
def test_damaged_folders_are_errors(folder: Path, tmp_path: Path, stage: str, damage: Damage) -> None:
    copy = Path(shutil.copytree(folder, tmp_path / "copy"))
    path = part_path(copy, stage)
    with np.load(path) as file:
        arrays = {name: file[name] for name in file.files}
    meta = json.loads(str(arrays["meta"]))
    damage(meta)
    np.savez(path, **(arrays | {"meta": np.array(json.dumps(meta))}))
    with pytest.raises(CalibrationError, match=r"damaged|not finite|expected") as caught:
        load(copy, None)
    assert str(tmp_path) in str(caught.value)


def test_arrays_of_other_sizes_are_errors(folder: Path, tmp_path: Path, gates: Gates) -> None:
    copy = Path(shutil.copytree(folder, tmp_path / "copy"))
    for stage, name, read in (
        ("decoder.layers.1", "gate/0", lambda found: found.values(0)),
        ("decoder.embed", "embedded/1", lambda found: found.embedded(1, 128)),
    ):
        path = part_path(copy, stage)
        with np.load(path) as file:
            arrays = {name: file[name] for name in file.files}
        np.savez(path, **(arrays | {name: arrays[name][:-1]}))
        with pytest.raises(CalibrationError, match="damaged"):
            read(load(copy, None))
    assert gates.embedded(1, 128).shape == (len(gates.prompts[1].kinds), 128)


def test_a_system_turn_that_merges_is_cut_before(plain: Plain) -> None:
    """Tokens of the system's turn are those that every prompt begins with."""
    first = plain.prompts[0]
    assert isinstance(first, SamplePrompt)
    assert {p.system for p in plain.prompts} == {first.system} and 0 < first.system < first.question
    shorter = dataclasses.replace(first, system=0)
    assert KINDS.index("system") not in kinds_of(shorter, plain.spec)


# -- the verb ----------------------------------------------------------------------------------------------------------


def shown(capsys: pytest.CaptureFixture[str], *words: object) -> str:
    """What a command line prints."""
    capsys.readouterr()
    assert main([str(word) for word in words]) == 0
    return capsys.readouterr().out


def test_gates_of_a_calibration(folder: Path, gates: Gates, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A row for each layer, the same as JSON, and the figure."""
    lines = shown(capsys, "gates", folder, "-o", tmp_path / "gates.svg").splitlines()
    assert re.split(r"\s{2,}", lines[0].strip())[:2] == ["layer", "image: s, % > 0.1"]
    rows = {words[0]: words for words in (re.split(r"\s{2,}", line.strip()) for line in lines[1:-1])}
    assert list(rows) == ["0", "1", "2", "3"]
    assert rows["2"][1:4] == ["0.000, 0"] * 3 and float(rows["2"][4]) < 1e-9 < 1e-3 < float(rows["1"][4])
    assert f"left out on {LEFT_OUT}" in lines[-1]
    data = json.loads(shown(capsys, "gates", folder, "--json"))
    assert data["layers"][1]["alone"] == json.loads(json.dumps(dataclasses.asdict(gates.alone[1])))
    assert data["layers"][0]["gate"]["image"]["tokens"] == gates.layers[0]["image"].tokens
    drawn = (tmp_path / "gates.svg").read_text(encoding="utf-8")
    assert drawn.startswith("<svg") and all(p.name in drawn for p in gates.prompts)
    picture = re.findall(r"base64,([^\"]+)", drawn)[1]  # after the scale of colours
    pixels = np.asarray(Image.open(io.BytesIO(base64.b64decode(picture))))
    s = gates.values(0)
    assert pixels.shape == (*s.shape, 3)
    assert tuple(pixels[0, 0]) == gate_figure.SHUT  # the top layer is the first row
    assert abs(int(pixels[-1, 5, 0]) - (247 - 231 * float(s[0, 5]))) <= 1


def test_gates_of_a_checkpoint(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """With the user's own picture; without a measurement of what is left out, and with it."""
    data = tmp_path / "data"
    data.mkdir()
    shutil.copyfile(checkpoint / "scene.png", data / "mine.png")
    out = tmp_path / "gates.svg"
    text = shown(capsys, "gates", checkpoint, "--data", data, "-o", out)
    assert "nats" not in text and "1 samples" in text and "mine.png" in out.read_text(encoding="utf-8")
    found = json.loads(shown(capsys, "gates", checkpoint, "--samples", 1, "--leave-out", 1, "--json"))
    assert found["left_out"] == 1 and found["layers"][1]["alone"]["nats"] > 1e-3 > found["layers"][2]["alone"]["nats"]


def test_gates_of_other_things(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A bundle, data beside a calibration, and a place that cannot be written."""
    (tmp_path / "bundle.json").write_text("{}", encoding="utf-8")
    for words, message in (
        ((tmp_path,), "is a bundle, whose graphs do not put the gate out; give the checkpoint"),
        ((folder, "--data", tmp_path), "is a calibration, which has its samples already"),
        ((folder, "-o", tmp_path / "no" / "gates.svg"), "no/gates.svg"),
    ):
        capsys.readouterr()
        assert main(["gates", *map(str, words)]) == 1
        assert message in capsys.readouterr().err
