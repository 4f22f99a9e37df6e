"""The Phi-3 family (TroL-3.8B) equals the authors' code: torch reference and exported bundle, every golden array."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from tests.conftest import context_of, slow
from tests.golden import GOLDEN
from tests.phi3_tokenizer import IMAGE_ID, make
from trol_edge.errors import CheckpointError, ContextError, UsageError
from trol_edge.export import pipeline
from trol_edge.export.reference import phi3
from trol_edge.export.reference.checkpoint import Checkpoint
from trol_edge.export.reference.hub import find
from trol_edge.export.reference.model import Decoder, EagerAttention, graph_rope_tables, rope_tables
from trol_edge.prompt.images import count_tiles, load_rgb, preprocess
from trol_edge.runtime import Runtime

Array = NDArray[Any]

TOLERANCE = 1e-4  # of the largest magnitude in golden's array
STEPS = 8  # greedy tokens that golden stores
CONTEXT = context_of("phi3")
LONGEST = 2048  # positions of the reference's tables
CASES = {path.name: json.loads((path / "case.json").read_text()) for path in sorted(GOLDEN.glob("phi3-*"))}
RUNS = [(case, run["name"]) for case, info in CASES.items() for run in info["runs"]]
# Where the axes of an array are once the batch axis is gone: (batch axis, position axis, which positions).
ALONG_POSITIONS = {
    "prefill_position_ids": (0, 0, "every"),
    "gate": (1, 1, "every"),
    "embeds": (0, 0, "positions"),
    "hidden": (1, 1, "positions"),
    "hidden_o1": (1, 1, "positions_o"),
    "hidden_o2": (1, 1, "positions_o"),
    "final_norm": (0, 0, "positions_o"),
    **{f"{kind}{layer}": (0, 1, "positions") for kind in "kv" for layer in (0, 2)},
    "prefill_logits": (0, 0, "last"),
}
BATCH_AXIS = {"decode_hidden": 2}  # of arrays along the steps; 0 for all others
VISION = (
    "pixel_u8",
    "pixel_lut",
    "pixel_values_s7",
    "tiles_per_image",
    "vision_features",
    "projector",
    "vision_hidden",
)
BEAM = ("beam5_ids", "beam5_score")  # in test_beam.py, through sessions


@dataclasses.dataclass(frozen=True)
class Row:
    """One prompt of a run, without its padding, and its pixel values."""

    index: int
    ids: Array
    padding: int
    pixels: Array | None


class Run:
    """One golden run."""

    def __init__(self, case: str, name: str) -> None:
        self.case, self.name, folder = case, name, GOLDEN / case
        self.info = next(run for run in CASES[case]["runs"] if run["name"] == name)
        self.inputs, self.expected = (
            {key.split("/")[1]: array for key, array in np.load(folder / file).items() if key.startswith(f"{name}/")}
            for file in ("inputs.npz", "expected.npz")
        )
        self.pictures = [[load_rgb(folder / file) for file in files] for files in self.info["images"]]

    def rows(self) -> Iterator[Row]:
        """The prompts; pixel values are made from the pictures, not taken from golden."""
        settings = phi3.FAMILY.image(spec_of(self.case))
        for i, (ids, mask) in enumerate(zip(self.inputs["input_ids"], self.inputs["attention_mask"], strict=True)):
            pixels = preprocess(self.pictures[i], settings) if self.pictures[i] else None
            yield Row(i, ids[mask == 1], int((mask == 0).sum()), pixels)

    def stored(self, vision: Array) -> Array:
        """Of an array [N, tokens, ...] of the tower, the tokens that golden stores."""
        return vision[:, self.inputs["vision_rows"]] if "vision_rows" in self.inputs else vision

    def compare(self, row: Row, ours: dict[str, Array], which: set[str], agree: int | None = None) -> None:
        """Compare a row's arrays with golden's; agree: how many steps must, of what golden stores."""
        for name in which:
            golden = self.expected[name]
            found = ours[name]
            if name in ALONG_POSITIONS:
                batch, axis, kind = ALONG_POSITIONS[name]
                golden = golden.take(row.index, batch)
                total = len(row.ids) + row.padding
                stored = {"every": np.arange(total), "last": np.arange(total - golden.shape[axis], total)}
                positions = stored[kind] if kind in stored else self.inputs[kind]
                golden = golden.compress(positions >= row.padding, axis)
                found = found.take(positions[positions >= row.padding] - row.padding, axis)
            else:
                golden = golden.take(row.index, BATCH_AXIS.get(name, 0))
                if agree is not None:
                    steps = agree - (name not in ("cached_ids", "cached_logits"))  # the rest begins with the first step
                    axis = 1 if name in ("k0_decode", "v0_decode", "k2_decode", "v2_decode") else 0
                    golden, found = (a.take(np.arange(steps), axis) for a in (golden, found))
            assert_close(f"{self.case}/{self.name}/{name} of row {row.index}", found, golden)


def assert_close(name: str, found: Array, golden: Array) -> None:
    """Integers equal, floats within TOLERANCE of golden's largest magnitude."""
    assert found.shape == golden.shape, f"{name}: {found.shape} instead of {golden.shape}"
    if np.issubdtype(golden.dtype, np.integer):
        assert np.array_equal(found, golden), name
        return
    difference = np.abs(found - golden).max() / np.abs(golden).max()
    assert difference <= TOLERANCE, f"{name}: {difference}"


def spec_of(case: str) -> Any:
    return dataclasses.replace(Checkpoint(GOLDEN / case).spec, image_token_id=IMAGE_ID)


class Reference:
    """A golden checkpoint in PyTorch."""

    def __init__(self, case: str) -> None:
        checkpoint = Checkpoint(GOLDEN / case)
        self.spec = spec_of(case)
        decoder = phi3.FAMILY.decoder(self.spec)
        assert isinstance(decoder, Decoder)
        self.decoder, self.vision = decoder, phi3.Vision(self.spec)
        checkpoint.load_into(decoder=self.decoder, vision=self.vision)
        self.embedding = checkpoint.tensor("embedding").float()

    def rope(self, length: int, long: bool = False) -> tuple[Tensor, Tensor]:
        """Tables for a sequence of `length` tokens, as the authors choose them."""
        e, theta, rope = self.spec.head_dim, self.spec.rope_theta, self.spec.long_rope
        if rope is None:
            return rope_tables(e, theta, LONGEST)
        long |= length > rope.original_max_position_embeddings
        return rope_tables(e, theta, LONGEST, rope.long_factor if long else rope.short_factor, rope.amplitude)

    def embed(self, ids: Array, features: Tensor | None) -> Tensor:
        x = self.embedding[torch.from_numpy(ids)]
        if features is not None:
            x[torch.from_numpy(ids == self.spec.image_token_id)] = features.reshape(-1, x.shape[1])
        return x[None]

    def traverse(
        self, ids: Array, features: Tensor | None, probe: Any = None, long: bool = False
    ) -> tuple[Tensor, EagerAttention]:
        attend = EagerAttention(self.spec, *self.rope(len(ids), long))
        attend.positions = torch.arange(len(ids))
        return self.decoder.traverse(self.embed(ids, features), None, attend, probe), attend

    def features(self, row: Row) -> Tensor | None:
        return None if row.pixels is None else self.vision(torch.from_numpy(row.pixels))

    def cached(self, row: Row, eos: int | None = None, long: bool = False) -> dict[str, Array]:
        """Prefill, then single steps; a step beyond the short factors' limit takes the long ones, as the authors do."""
        layers: list[tuple[Tensor, ...]] = []
        features = self.features(row)
        x, attend = self.traverse(row.ids, features, lambda i, *tensors: layers.append(tensors), long)
        o1, o2, gate, mixed = (np.stack([t[0].numpy() for t in column]) for column in zip(*layers, strict=True))
        logits = self.decoder.logits(x)[0]
        out = {
            "prefill_position_ids": attend.positions.numpy(),
            "embeds": self.embed(row.ids, features)[0].numpy(),
            "gate": gate[..., 0],
            "hidden_o1": o1,
            "hidden_o2": o2,
            "hidden": mixed,
            "final_norm": self.decoder.norm(x)[0].numpy(),
            "prefill_logits": logits.numpy(),
        }
        tokens, rows, hidden, positions = [int(logits[-1].argmax())], [logits[-1]], [], []
        while len(tokens) < STEPS:
            states: list[Tensor] = []
            hooks = [
                layer.register_forward_hook(lambda m, a, o, states=states: states.append(o))
                for layer in self.decoder.layers
            ]
            attend.cos, attend.sin = self.rope(attend.length + 1, long)
            attend.positions = torch.tensor([attend.length])
            x = self.decoder.step(self.embedding[tokens[-1]][None, None], attend)
            for hook in hooks:
                hook.remove()
            hidden.append(np.stack([t[0, 0].numpy() for t in states]))
            positions.append(int(attend.positions[0]))
            rows.append(self.decoder.logits(x)[0, 0])
            ended = eos is not None and eos in tokens
            tokens.append(self.spec.eos_token_id if ended else int(rows[-1].argmax()))
        for i in (0, self.spec.num_layers - 1):
            for name, cache in (("k", attend.keys[0][i]), ("v", attend.values[0][i])):
                assert cache is not None
                out[f"{name}{i}"] = cache[0, :, : len(row.ids)].numpy()
                out[f"{name}{i}_decode"] = cache[0, :, len(row.ids) :].numpy()
        return out | {
            "cached_ids": np.array(tokens),
            "cached_logits": torch.stack(rows).numpy(),
            "decode_position_ids": np.array(positions),
            "decode_attended": np.array(positions) + 1,
            "decode_hidden": np.stack(hidden),
        }

    def uncached(self, row: Row) -> dict[str, Array]:
        """The whole sequence again for every token, each token traversed."""
        ids, features, rows = row.ids, self.features(row), []
        for _ in range(STEPS):
            x, _ = self.traverse(ids, features)
            rows.append(self.decoder.logits(x[:, -1:])[0, 0])
            ids = np.append(ids, int(rows[-1].argmax()))
        return {"nocache_ids": ids[-STEPS:], "nocache_logits": torch.stack(rows).numpy()}


@pytest.fixture(scope="module")
def reference() -> Iterator[Callable[[str], Reference]]:
    loaded: dict[str, Reference] = {}
    with torch.no_grad():
        yield lambda case: loaded.setdefault(case, Reference(case)) if case not in loaded else loaded[case]


@pytest.fixture(scope="module")
def runtime(phi3_checkpoint: Callable[..., Path], exported: Callable[..., Path]) -> Callable[..., Runtime]:
    """Runtime of a golden case through its bundle."""

    @functools.cache
    def get(case: str, **changes: Any) -> Runtime:
        return Runtime(exported(phi3_checkpoint(case, **changes), "cpu", CONTEXT))

    return get


def test_every_golden_array_is_compared() -> None:
    known = {*ALONG_POSITIONS, *VISION, *BEAM, "cached_ids", "cached_logits", "nocache_ids", "nocache_logits"}
    known |= {"eos_ids", "eos_logits", "decode_position_ids", "decode_attended", "decode_hidden"}
    known |= {"k0_decode", "v0_decode", "k2_decode", "v2_decode"}
    found = {name for case, run in RUNS for name in Run(case, run).expected}
    assert found | {"pixel_u8", "pixel_values_s7"} == known  # those two are in the full data only


@pytest.mark.parametrize(("case", "name"), RUNS)
def test_pixels_and_tower(reference: Callable[[str], Reference], case: str, name: str) -> None:
    run, model = Run(case, name), reference(case)
    if "projector" not in run.expected:
        return
    pictures = [picture for row in run.pictures for picture in row]
    settings = phi3.FAMILY.image(model.spec)
    pixels = preprocess(pictures, settings)
    assert count_tiles(pictures, settings) == run.expected["tiles_per_image"].tolist()
    assert hashlib.sha256(pixels.tobytes()).hexdigest() == run.info["pixel_values_sha256"]
    if "pixel_u8" in run.expected:  # in the full data; above all pixels were compared by their hash
        table, squares = run.expected["pixel_lut"], run.expected["pixel_u8"]
        assert np.array_equal(pixels, np.stack([table[c][squares[:, c]] for c in range(3)], axis=1))
        assert np.array_equal(pixels[:, :, ::7, ::7], run.expected["pixel_values_s7"])
    states = model.vision.encode(torch.from_numpy(pixels))
    features = phi3.pixel_shuffle(states[-1][:, 1:])
    hidden = torch.stack([state[[0, -1]][:, run.inputs["vision_tokens"]] for state in states])
    assert_close("vision_hidden", hidden.numpy(), run.expected["vision_hidden"])
    assert_close("vision_features", run.stored(features.numpy()), run.expected["vision_features"])
    assert_close("projector", run.stored(model.vision.project(features).numpy()), run.expected["projector"])


@pytest.mark.parametrize(("case", "name"), RUNS)
def test_reference(reference: Callable[[str], Reference], case: str, name: str) -> None:
    """Both semantics, and for su rope both sides of the limit and across it."""
    run, model = Run(case, name), reference(case)
    for row in run.rows():
        ours = model.cached(row) | model.uncached(row)
        run.compare(row, ours, set(run.expected) & set(ours))
        if "eos_ids" in run.expected:
            ended = model.cached(row, run.info["eos_run"]["eos_token_id"])
            ours = {"eos_ids": ended["cached_ids"], "eos_logits": ended["cached_logits"]}
            run.compare(row, ours, set(ours))


@pytest.mark.parametrize(
    ("case", "name"), [*(r for r in RUNS if "leftpad" not in r[0]), *slow(*(r for r in RUNS if "leftpad" in r[0]))]
)
def test_bundle(runtime: Any, case: str, name: str) -> None:
    """The same through exported graphs on ONNX Runtime: prefill, cache, steps, and uncached semantics."""
    run, rt = Run(case, name), runtime(case)
    if "projector" in run.expected:
        settings = rt.bundle.manifest.image
        pixels = preprocess([picture for row in run.pictures for picture in row], settings)
        assert_close("projector", run.stored(rt.model.backend.encode_image(pixels)), run.expected["projector"])
    limit = rt.bundle.manifest.spec.long_rope
    for row in run.rows():
        session = rt.session()
        logits = [session.prefill(row.ids, row.pixels)]
        # Where an answer would cross the limit of the short factors, it ends: as many steps agree as are served.
        served = min(STEPS, session.limit - len(row.ids) + 1)
        assert served == STEPS or (limit is not None and name == "crossing" and session.rope == "short")
        while len(logits) < served:
            logits.append(session.step(int(logits[-1].argmax())))
        cache = session.cache.state.cache
        ours: dict[str, Array] = {
            "cached_ids": np.array([row.argmax() for row in logits]),
            "cached_logits": np.stack(logits),
        }
        for i in (0, 2):
            for kind, array in (("k", cache[2 * i]), ("v", cache[2 * i + 1])):
                ours[f"{kind}{i}"] = array[0, :, : len(row.ids)]
                ours[f"{kind}{i}_decode"] = array[0, :, len(row.ids) : len(row.ids) + served - 1]
        run.compare(row, ours, set(ours), served)
        ids, rows = row.ids, []
        for _ in range(STEPS):
            rows.append(session.prefill(ids, row.pixels))
            ids = np.append(ids, int(rows[-1].argmax()))
        run.compare(
            row,
            {"nocache_ids": ids[-STEPS:], "nocache_logits": np.stack(rows)},
            {"nocache_ids", "nocache_logits"},
        )


def test_both_factor_sets_are_in_one_graph(runtime: Any) -> None:
    """What the authors do at the limit, step by step: cached keys keep the short factors, new ones take the long."""
    run, rt = Run("phi3-su-rope", "crossing"), runtime("phi3-su-rope")
    (row,) = run.rows()
    session = rt.session()
    logits = [session.prefill(row.ids)]
    state = session.cache.state
    for position in range(len(row.ids), len(row.ids) + STEPS - 1):
        if position == session.limit:
            state.rope_offset[0] = state.long_rope_offset
        logits.append(state.step(rt.model.embeddings[int(logits[-1].argmax())], position).copy())
    assert_close("cached_logits", np.stack(logits), run.expected["cached_logits"][0])


@pytest.mark.parametrize("name", ["below", "crossing"])
def test_long_context_takes_the_long_factors_from_the_first_token_on(
    runtime: Any, reference: Callable[[str], Reference], name: str
) -> None:
    (row,) = Run("phi3-su-rope", name).rows()
    session = runtime("phi3-su-rope").session(long_context=True)
    logits = [session.prefill(row.ids)]
    assert session.rope == "long" and session.limit == CONTEXT
    while len(logits) < STEPS:
        logits.append(session.step(int(logits[-1].argmax())))
    assert_close(name, np.stack(logits), reference("phi3-su-rope").cached(row, long=True)["cached_logits"])
    session.long_context = False
    session.prefill(row.ids)
    assert session.rope == "short"


def asked(rt: Runtime, tokens: int, tiles: list[int] | None = None) -> str:
    """A question whose whole prompt has exactly `tokens` tokens."""
    question = "ka"
    while (short := tokens - len(rt.tokenize(question, tiles or ()))) > 0:
        question += "~" * short  # a character that merges with nothing
    assert short == 0
    return question


ORIGINAL = 400  # so that the template, long in this small vocabulary, fits below the limit


@pytest.fixture
def near_the_limit(runtime: Any) -> Runtime:
    found = runtime("phi3-su-rope", original_max_position_embeddings=ORIGINAL)
    assert isinstance(found, Runtime)
    return found


def test_an_answer_ends_where_the_factors_would_change(near_the_limit: Runtime) -> None:
    rt = near_the_limit
    question = asked(rt, ORIGINAL - 3)
    answer = rt.generate(question, max_new_tokens=20)
    assert (answer.finish_reason, answer.rope, len(answer.token_ids)) == ("context", "short", 4)
    longer = rt.generate(question, max_new_tokens=20, long_context=True)
    assert (longer.finish_reason, longer.rope, len(longer.token_ids)) == ("length", "long", 20)
    over = rt.generate(asked(rt, ORIGINAL + 1), max_new_tokens=5)
    assert (over.finish_reason, over.rope) == ("length", "long")
    again = rt.generate(question, max_new_tokens=20)  # on the session that had the long factors
    assert (again.token_ids, again.rope) == (answer.token_ids, "short")
    *_, last = rt.stream(question, max_new_tokens=20)
    assert (last.finish_reason, last.rope) == ("context", "short")


def test_a_session_refuses_the_step_that_would_change_the_factors(near_the_limit: Runtime) -> None:
    session = near_the_limit.session()
    session.prefill([5] * ORIGINAL)
    assert (session.rope, session.limit, session.context) == ("short", ORIGINAL, CONTEXT)
    with pytest.raises(ContextError, match=r"short rope factors, which allow 400 tokens.*long_context=True"):
        session.step(5)
    session.prefill([5] * (ORIGINAL + 1))
    assert (session.rope, session.limit) == ("long", CONTEXT)
    session.step(5)


def test_a_family_with_one_factor_set_takes_the_same_calls(runtime: Any) -> None:
    rt = runtime("phi3-text")
    answer = rt.generate("ka", max_new_tokens=3, long_context=True)
    assert answer.rope == "plain" and answer.token_ids == rt.generate("ka", max_new_tokens=3).token_ids


def test_pictures_of_several_tiles_in_one_prompt(runtime: Any) -> None:
    """Through the runtime as by hand: tile counts, prompt, features in order."""
    rt = runtime("phi3-tiles")
    rng = np.random.default_rng(0)
    square, wide = (rng.integers(0, 256, (h, w, 3), np.uint8) for h, w in ((50, 50), (60, 120)))
    assert rt.count_tiles([square, wide]) == [1, 3] and rt.count_tiles(None) == []
    with pytest.raises(ContextError, match=r"take \d+ tokens, but this bundle holds 1024"):
        rt.generate("ka", [square, wide])  # 4 tiles fill the context by themselves
    ids = rt.tokenize("ka", [1, 1])
    assert sum(i == IMAGE_ID for i in ids) == 512
    session = rt.session()
    logits = session.prefill(ids, rt.preprocess([square, square[::-1]]))
    answer = rt.generate("ka", [square, square[::-1]], max_new_tokens=1)
    assert answer.token_ids == (int(logits.argmax()),) and answer.prompt_tokens == len(ids)
    swapped = session.prefill(ids, rt.preprocess([square[::-1], square]))
    assert np.abs(logits - swapped).max() > 1e-3
    with pytest.raises(UsageError, match=r"512 image tokens .* but 1 picture"):
        session.prefill(ids, rt.preprocess(square))


def test_a_cpu_encodes_one_tile_after_the_other(runtime: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Scratch memory of one, whatever the picture; the same features as all at once, to the bit."""
    rt = runtime("phi3-tiles")
    pixels = rt.preprocess(np.random.default_rng(0).integers(0, 256, (60, 120, 3), np.uint8))
    sizes: list[int] = []
    bind = rt.model.backend.bind

    def watched(name: str, values: dict[str, Any]) -> Any:
        sizes.append(values["pixel_values"].shape()[0])
        return bind(name, values)

    monkeypatch.setattr(rt.model.backend, "bind", watched)
    features = rt.model.backend.encode_image(pixels)
    assert sizes == [1, 1, 1]
    monkeypatch.setattr(rt.model.backend, "memory", "cuda")  # which takes them together
    assert np.array_equal(rt.model.backend.encode_image(pixels), features)
    assert sizes == [1, 1, 1, 3]


@pytest.mark.parametrize(("width", "height", "tiles"), [(20000, 40, 7), (40, 20000, 7), (1, 1, 1), (1, 3, 4)])
def test_extreme_pictures_are_stretched_never_cropped(runtime: Any, width: int, height: int, tiles: int) -> None:
    rt = runtime("phi3-tiles")
    picture = np.zeros((height, width, 3), np.uint8)
    picture[-1, -1] = 255  # seen in the last tile and in the thumbnail
    assert rt.count_tiles(picture) == [tiles]
    pixels = rt.preprocess(picture)
    assert pixels is not None and pixels.shape == (tiles, 3, 448, 448)
    assert pixels[-1].max() > pixels[-1].min() or width * height == 1
    if tiles > 1:
        with pytest.raises(ContextError, match="give fewer pictures"):
            rt.generate("ka", picture)
    else:
        assert rt.generate("ka", picture, max_new_tokens=1).finish_reason in ("length", "stop")


def test_token_ids_come_from_the_tokenizer_files(phi3_checkpoint: Callable[..., Path]) -> None:
    folder = phi3_checkpoint("phi3-text", eos_token_id=7)
    assert (Checkpoint(folder).spec.image_token_id, Checkpoint(folder).spec.eos_token_id) == (IMAGE_ID, 7)
    (folder / "tokenizer_config.json").write_text('{"eos_token": "<|end|>"}')
    assert Checkpoint(folder).spec.eos_token_id == make()["added_tokens"][3 + 7]["id"]
    (folder / "tokenizer_config.json").write_text('{"eos_token": {"content": "<|endoftext|>"}}')
    assert Checkpoint(folder).spec.eos_token_id == 480
    (folder / "tokenizer.json").unlink()
    (folder / "added_tokens.json").write_text('{"<IMG_CONTEXT>": 500}')
    with pytest.raises(CheckpointError, match=r"<IMG_CONTEXT> is token 500 .* has rows 0..499"):
        Checkpoint(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rope_scaling": {"type": "yarn"}}, "'yarn' with factor None is not supported"),
        ({"rope_scaling": {"type": "su", "short_factor": [1.0], "long_factor": [1.0]}}, "needs 8 of each"),
        ({"sliding_window": 64}, "sliding_window 64"),
        ({"hidden_size": None}, "a size in config.json is missing or unusable"),
    ],
)
def test_a_config_that_no_published_model_has_is_refused(
    phi3_checkpoint: Callable[..., Path], change: dict[str, Any], message: str
) -> None:
    with pytest.raises(CheckpointError, match=message):
        Checkpoint(phi3_checkpoint("phi3-text", **change))


@pytest.mark.parametrize(("case", "name"), [("phi3-text", "trol-1.8b"), ("internlm2-text", "trol-3.8b")])
def test_a_checkpoint_named_as_the_other_family_is_refused(tmp_path: Path, case: str, name: str) -> None:
    family = case.split("-")[0]
    with pytest.raises(CheckpointError, match=rf"this is a {family} checkpoint, not .*MODEL="):
        pipeline.export(GOLDEN / case, tmp_path / "bundle", model=name)
    assert not (tmp_path / "bundle").exists()


@pytest.mark.parametrize("name", ["trol-1.8b", "trol-3.8b", "trol-7b"])
def test_synthetic_checkpoints_have_the_published_names_and_shapes(name: str) -> None:
    lines = (GOLDEN / "real_configs" / "names.tsv").read_text().splitlines()[1:]
    rows = [line.split("\t") for line in lines]
    published = {
        tensor: tuple(json.loads(shape)) for model, file, tensor, shape, _ in rows if (model, file) == (name, "model")
    }
    model = find(name)
    assert model.family.published(model.config) == published
    config = json.loads((GOLDEN / "real_configs" / f"{name}.json").read_text())
    ours, theirs = (model.family.model_spec(c, None, published) for c in (model.config, config))
    assert dataclasses.replace(ours, long_rope=None) == dataclasses.replace(theirs, long_rope=None)
    # The factors are float32 values, which our table writes shorter than the published file.
    assert all(map(torch.equal, graph_rope_tables(ours, 5000), graph_rope_tables(theirs, 5000)))
