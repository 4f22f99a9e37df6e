"""The training of the shipped models: what it teaches is what the runtime asks, and what it writes is what is read."""

from __future__ import annotations

import dataclasses
import json
import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.conftest import CHECKPOINTS, NANOS
from trol_edge.errors import ExportError
from trol_edge.export import scenes
from trol_edge.export.nano import data
from trol_edge.export.nano.model import (
    ALIVE,
    OPEN,
    SHUT,
    GateLoss,
    GateSettler,
    Nano,
    PackedAttention,
    answer_hidden,
    read_context,
)
from trol_edge.export.nano.publish import go_on_from, published_tensors, read_checkpoint, write_checkpoint
from trol_edge.export.nano.recipes import RECIPES, Recipe, start_from
from trol_edge.export.nano.report import answer
from trol_edge.export.nano.text import ROW_TOKENS, ROWS, Packer, Prompts
from trol_edge.export.reference.checkpoint import Checkpoint
from trol_edge.export.reference.model import EagerAttention, rope_tables
from trol_edge.prompt.images import preprocess
from trol_edge.runtime import Runtime


@pytest.fixture(scope="module", params=NANOS)
def recipe(request: pytest.FixtureRequest) -> Recipe:
    """Each of the two."""
    return RECIPES[request.param]


@pytest.fixture(scope="module")
def trained(recipe: Recipe) -> tuple[Nano, Prompts]:
    """The shipped model as the training has it; reading it checks that its sizes are the recipe's."""
    return read_checkpoint(recipe, CHECKPOINTS / recipe.name)


@pytest.fixture(scope="module")
def runtime(recipe: Recipe, bundle_of: Callable[[str], Path]) -> Runtime:
    """The same model as a user has it."""
    return Runtime(bundle_of(recipe.name))


def test_every_shipped_model_has_a_recipe() -> None:
    """Nothing ships that nobody can train again; what ships is small."""
    assert set(RECIPES) == {path.name for path in CHECKPOINTS.iterdir() if path.is_dir()} == set(NANOS)
    for name in NANOS:
        assert sum(path.stat().st_size for path in (CHECKPOINTS / name).iterdir()) < 10_000_000, name


# -- the report --------------------------------------------------------------------------------------------------------


def test_report_is_about_this_checkpoint(recipe: Recipe) -> None:
    """Kinds, counts, and the promised accuracy; for several tiles too where the model knows them."""
    report = json.loads((CHECKPOINTS / recipe.name / "report.json").read_text(encoding="utf-8"))
    assert report["model"] == recipe.name
    sorts = ["", "_several_tiles"] if len(recipe.grids) > 1 else [""]
    for sort in sorts:
        for semantics in ("cached", "uncached"):
            percent, tally = report[f"accuracy_percent{sort}"][semantics], report[f"right_and_asked{sort}"][semantics]
            groups = (("short", scenes.SHORT_KINDS, 95), ("hard", scenes.HARD_KINDS, 75))
            assert set(tally) == set(scenes.KINDS)
            for group, kinds, least in groups:
                right, asked = (sum(tally[kind][i] for kind in kinds) for i in (0, 1))
                assert percent[group] == round(100 * right / asked, 2) >= least
    text = (CHECKPOINTS / recipe.name / "REPORT.md").read_text(encoding="utf-8")
    assert f"{report['parameters']:,} parameters" in text
    assert f"{report['accuracy_percent']['cached']['short']:.1f}" in text


# -- pictures ----------------------------------------------------------------------------------------------------------


def test_training_pictures_are_the_runtimes(recipe: Recipe) -> None:
    """The same squares, and the same values but for the last roundings."""
    image = recipe.family.image(recipe.spec)
    for grid, _ in recipe.grids:
        drawn = scenes.render(5, 1 if grid == (1, 1) else 2)[0]
        (squares,) = data.cut(drawn[None], grid, image)
        shape = (grid[1] * image.size, grid[0] * image.size, 3)
        stretched = np.asarray(data.Image.fromarray(drawn).resize(shape[1::-1], data.Image.Resampling.BICUBIC))
        expected = preprocess([stretched], image)
        assert len(squares) == len(expected) == grid[0] * grid[1] + (grid != (1, 1))
        assert np.abs(data.normalise(squares, image).numpy() - expected).max() < 1e-5


@pytest.fixture(scope="module")
def pool(tmp_path_factory: pytest.TempPathFactory) -> data.Pool:
    """A pool of few scenes, written and read."""
    folder = tmp_path_factory.mktemp("pool")
    spec = dataclasses.replace(data.SMALL, count=40)
    data.make_pool(folder, spec)
    return data.load_pool(folder, spec)


def test_pools_do_not_overlap() -> None:
    """Nor does any of them reach the held-out scenes."""
    assert data.SMALL.first + data.SMALL.count <= data.LARGE.first
    assert data.LARGE.first + data.LARGE.count <= scenes.HELD_OUT_SEED


def test_labels_follow_the_mirrored_picture(pool: data.Pool) -> None:
    """Whatever is drawn of the pool, labels and centres are those of the scene it shows."""
    flipped = 0
    for seed in range(4):
        views = data.sample_views(pool, 20, np.random.default_rng(seed))
        for pixels, labels, points, scene in zip(views.pixels, views.labels, views.points, views.scenes, strict=True):
            expected, centres = data.patch_labels(scene)
            assert np.array_equal(labels.numpy(), expected)
            assert np.allclose(points.numpy()[:, :2], centres, atol=1e-6)
            both_ways = [(kept, kept[:, ::-1]) for kept in pool.pixels]
            original, mirrored = next(
                (i, way) for i, ways in enumerate(both_ways) for way in (0, 1) if np.array_equal(pixels, ways[way])
            )
            flipped += mirrored
            names = [o.name for o in pool.scenes[original].objects]
            assert [o.name for o in scene.objects] == (names[::-1] if mirrored else names)
    assert 20 < flipped < 60


# -- questions ---------------------------------------------------------------------------------------------------------


def test_prompts_are_the_runtimes(trained: tuple[Nano, Prompts], runtime: Runtime, recipe: Recipe) -> None:
    """Prefix, picture and question put together are what the runtime asks."""
    prompts = trained[1]
    picture = [prompts.image] * recipe.spec.vision.tokens_per_image
    for question in ("What is left of the red circle?", "Describe the scene."):
        assert [*prompts.prefix, *picture, *prompts.question(question)] == runtime.tokenize(question, 1)
    for text in ("red", "top left", "from left to right: a small red star and a large white ring"):
        assert prompts.decode(prompts.answer(text)) == text


def test_marks_are_under_their_words(trained: tuple[Nano, Prompts]) -> None:
    """`ends` finds the token in which a word of a question or an answer ends."""
    prompts = trained[1]
    for text, ids in (
        ("Is there a red star?", prompts.question("Is there a red star?")),
        ("a small red star", prompts.answer("a small red star")),
    ):
        ends = prompts.ends(ids, text)
        stop = text.index("star") + 4
        column = next(i for i, end in enumerate(ends) if end >= stop)
        assert prompts.decode([i for i in ids[: column + 1] if i not in (prompts.image,)]).endswith("star")
        assert not prompts.decode(ids[:column]).endswith("star")


def ignore(index: int, o1: torch.Tensor, real: torch.Tensor) -> None:
    """Nobody looks at the gate."""


@torch.no_grad()
def test_packed_questions_are_computed_as_if_alone(recipe: Recipe, trained: tuple[Nano, Prompts]) -> None:
    """Several questions in a row, some of them answered in step form: the same hidden states as one by one."""
    model, prompts = trained
    drawn = [scenes.render(seed) for seed in (1, 2)]
    squares = data.cut(np.stack([p for p, _ in drawn]), recipe.grids[-1][0], recipe.family.image(recipe.spec))
    count = squares.shape[1]
    context = len(prompts.prefix) + data.CELLS * count
    batch = Packer(prompts, 3).pack([scene for _, scene in drawn], context, 0.5)
    assert batch.ids.shape == (2 * ROWS, ROW_TOKENS)
    assert set(batch.single.flatten().tolist()) == {0, 1}
    pixels = data.normalise(squares.reshape(-1, *squares.shape[2:]), recipe.family.image(recipe.spec))
    features = model.vision(pixels).view(2, -1, model.spec.hidden_size)
    packed = PackedAttention(model, batch.positions, batch.mask, read_context(model, prompts, features, ignore))
    hidden = answer_hidden(model, batch, packed, ignore)
    questions = batch.question.unique().tolist()
    assert len(questions) > 8
    for number in random.Random(0).sample(questions, 6):
        at = batch.question == number
        row, columns = int(batch.rows[at][0]), batch.columns[at]
        own = (batch.mask[row, 0, columns[-1], context:] == 0).nonzero()[:, 0]
        ids, single = batch.ids[row, own], batch.single[row, own, 0]
        asked = int((single == 0).sum())
        x = torch.cat((model.embedding(torch.tensor([prompts.prefix])), features[row // ROWS][None]), dim=1)
        mask = torch.zeros(1, x.shape[1] + asked, 1)
        mask[:, len(prompts.prefix) : context] = 1
        attend = EagerAttention(model.spec, model.cos, model.sin)
        attend.positions = torch.arange(context + asked)
        x = torch.cat((x, model.embedding(ids[None, :asked])), dim=1)
        alone = [model.decoder.traverse(x, mask, attend)[0, context:]]
        for i in range(asked, len(ids)):
            attend.positions = torch.tensor([context + i])
            alone.append(model.decoder.step(model.embedding(ids[None, i : i + 1]), attend)[0])
        assert torch.allclose(hidden[row, own], torch.cat(alone), atol=2e-3), number


# -- the gate ----------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_the_gate_is_shut_in_the_upper_half(recipe: Recipe, trained: tuple[Nano, Prompts]) -> None:
    """For prompt, picture, questions and answers alike; in the lower half it mixes both passes."""
    model, prompts = trained
    drawn = [scenes.render(scenes.HELD_OUT_SEED + i) for i in range(4)]
    squares = data.cut(np.stack([p for p, _ in drawn]), (1, 1), recipe.family.image(recipe.spec))
    features = model.vision(data.normalise(squares[:, 0], recipe.family.image(recipe.spec)))
    context = len(prompts.prefix) + data.CELLS
    batch = Packer(prompts, 3).pack([scene for _, scene in drawn], context, 0.0)
    shares: list[list[torch.Tensor]] = [[] for _ in model.decoder.layers]

    def look(index: int, o1: torch.Tensor, real: torch.Tensor) -> None:
        shares[index].append(torch.sigmoid(2 * model.decoder.gate(o1)[..., 0])[real > 0])

    packed = PackedAttention(model, batch.positions, batch.mask, read_context(model, prompts, features, look))
    answer_hidden(model, batch, packed, look)
    for i, kinds in enumerate(shares):
        assert len(kinds) == 3  # the prompt's beginning, pictures, questions with their answers
        if i < recipe.open_layers:
            assert all(0.01 < float(s.mean()) < 0.99 for s in kinds), i
        else:
            assert max(float(s.max()) for s in kinds) < 1e-3, i


def test_what_the_gate_is_taught(recipe: Recipe) -> None:
    """Nothing within its range, and towards it from outside, by the half of the decoder; padding counts for nothing."""
    model = Nano(recipe)
    model.decoder.second_layers = frozenset({0})
    torch.nn.init.zeros_(model.decoder.gate.weight)
    o1 = torch.zeros(2, 3, recipe.spec.hidden_size)
    real = torch.tensor([[1.0, 1.0, 0.0]] * 2)
    for layer, score, sign in (
        (0, 0.9 * OPEN, 0),
        (0, 2 * OPEN, 1),
        (0, -2 * OPEN, -1),
        (4, SHUT - 0.1, 0),
        (4, 0.0, 1),
    ):
        torch.nn.init.constant_(model.decoder.gate.bias, score)
        model.zero_grad()
        gates = GateLoss(model)
        gates.look(layer, o1, real)
        gates.mean().backward()
        slope = model.decoder.gate.bias.grad
        assert slope is not None and np.sign(float(slope)) == sign, (layer, score)
    torch.nn.init.ones_(model.decoder.gate.weight)
    padded, plain = GateLoss(model), GateLoss(model)
    padded.look(0, torch.where(real[..., None] > 0, o1, 50.0), real)
    plain.look(0, o1, real)
    assert torch.equal(padded.mean(), plain.mean())


@torch.no_grad()
def test_an_earlier_gate_is_settled(recipe: Recipe) -> None:
    """Its score neither follows what is large in open layers nor vanishes; shut layers and padding play no part."""
    model = Nano(recipe)
    model.decoder.second_layers = frozenset({0, 1})
    torch.nn.init.ones_(model.decoder.gate.weight)
    o1 = torch.randn(2, 500, recipe.spec.hidden_size, generator=torch.Generator().manual_seed(0))
    o1[..., 7] += 1000
    before = model.decoder.gate(o1)
    assert float(before.abs().min()) > 900
    gates = GateSettler(model)
    real = torch.ones(2, 500)
    real[1, 250:] = 0
    gates.look(0, torch.where(real[..., None] > 0, o1, 1e6), real)
    gates.look(1, o1, torch.ones(2, 500))
    gates.look(2, 1e6 * o1, torch.ones(2, 500))
    gates.settle()
    after = model.decoder.gate(o1)
    assert float(after.square().mean().sqrt()) == pytest.approx(ALIVE, rel=0.1)
    assert float(after.std()) > 0.3 and float(after.abs().max()) < 5


# -- checkpoints -------------------------------------------------------------------------------------------------------


def test_checkpoint_is_written_as_it_is_read(recipe: Recipe, trained: tuple[Nano, Prompts], tmp_path: Path) -> None:
    """Every file of the shipped folder that the training writes, tensor by tensor."""
    folder = CHECKPOINTS / recipe.name
    tokenizer = tmp_path / "tokenizer"
    tokenizer.mkdir()
    for name in ("tokenizer.model", "added_tokens.json", "tokenizer.json", "tokenizer_config.json"):
        if (folder / name).is_file():
            (tokenizer / name).write_bytes((folder / name).read_bytes())
    write_checkpoint(recipe, trained[0], tokenizer, tmp_path / "out")
    shipped = {path.name for path in folder.iterdir()} - {"REPORT.md", "report.json", "scene.png"}
    assert {path.name for path in (tmp_path / "out").iterdir()} == shipped
    for name in shipped - {"model.safetensors", "trol_gating.pt"}:
        assert (tmp_path / "out" / name).read_bytes() == (folder / name).read_bytes(), name
    again, before = Checkpoint(tmp_path / "out"), Checkpoint(folder)
    assert again.spec == before.spec == recipe.spec
    assert again.names() == before.names()
    for name in again.names():
        assert torch.equal(again.tensor(name), before.tensor(name)), name


@torch.no_grad()
def test_going_on_from_fewer_layers(recipe: Recipe, trained: tuple[Nano, Prompts], tmp_path: Path) -> None:
    """The earlier layers are the lowest ones, with the tower and the embeddings; new ones add little to them."""
    earlier = dataclasses.replace(recipe, spec=dataclasses.replace(recipe.spec, num_layers=3))
    small = Nano(earlier)
    state = small.state_dict() | {k: v for k, v in trained[0].state_dict().items() if k in small.state_dict()}
    small.load_state_dict(state)
    tokenizer = tmp_path / "tokenizer"
    tokenizer.mkdir()
    for path in (CHECKPOINTS / recipe.name).glob("*token*"):
        (tokenizer / path.name).write_bytes(path.read_bytes())
    write_checkpoint(earlier, small, tokenizer, tmp_path / "earlier")
    model = Nano(recipe)
    recipe.initialise(model.vision)
    model.initialise()
    go_on_from(recipe, tmp_path / "earlier", model)
    for name, value in small.state_dict().items():
        assert torch.equal(model.state_dict()[name], value), name
    x = torch.randn(1, 4, recipe.spec.hidden_size)
    for i in range(3, recipe.spec.num_layers):
        after = model.decoder.layers[i](x, None, i, 0, _alone)
        assert 0 < float((after - x).norm()) < 0.1 * float(x.norm())
    for spec in (
        dataclasses.replace(recipe.spec, num_layers=2),
        dataclasses.replace(recipe.spec, rope_theta=1e5),
    ):
        with pytest.raises(ExportError, match=rf"earlier: its sizes are not those of {recipe.name}"):
            go_on_from(dataclasses.replace(recipe, spec=spec), tmp_path / "earlier", model)


def _alone(qkv: torch.Tensor, layer: int, traversal: int) -> torch.Tensor:
    """Attention of tokens that see their first query alone."""
    return qkv[..., :128]


def test_published_names_are_all_there(recipe: Recipe, trained: tuple[Nano, Prompts]) -> None:
    """FP16, with what is published and plays no part."""
    tensors = published_tensors(recipe, trained[0])
    assert {t.dtype for t in tensors.values()} == {torch.float16}
    names = {source.name for source in recipe.family.sources(recipe.spec).values()}
    assert all(recipe.family.unused(name) for name in set(tensors) - names)
    assert names <= set(tensors)


@torch.no_grad()
def test_a_started_decoder_computes_what_its_teacher_does() -> None:
    """Text, same frequencies: the fused layout and the amplitude change nothing. LoRA is for image tokens only."""
    recipe = RECIPES["trol-nano-phi3"]
    assert recipe.teacher and recipe.spec.long_rope
    teacher, prompts = read_checkpoint(RECIPES[recipe.teacher], CHECKPOINTS / recipe.teacher)
    model = Nano(recipe)
    model.initialise()
    fresh = model.embedding.weight.clone()
    tokens = CHECKPOINTS / recipe.name / "tokenizer.json"
    start_from(recipe.teacher, recipe.spec, model.embedding, model.decoder, tokens)
    x = teacher.embedding(torch.tensor([prompts.question("What is left of the red circle?")]))
    amplitude = recipe.spec.long_rope.amplitude
    tables = [rope_tables(32, recipe.spec.rope_theta, 64, amplitude=a) for a in (1.0, amplitude)]
    hidden = []
    for net, (cos, sin) in zip((teacher, model), tables, strict=True):
        attend = EagerAttention(net.spec, cos, sin)
        attend.positions = torch.arange(x.shape[1])
        hidden.append(net.decoder.traverse(x, None, attend))
    assert torch.allclose(*hidden, atol=1e-3 * float(hidden[0].abs().max()))

    vocabulary = json.loads(tokens.read_text(encoding="utf-8"))["model"]["vocab"]
    (spaced,), (bare,) = prompts.answer(" red"), prompts.answer("yes")  # the same piece, and one without the space
    assert torch.equal(model.embedding.weight[vocabulary["▁red"]], teacher.embedding.weight[spaced])
    assert torch.equal(model.embedding.weight[vocabulary["▁yes"]], teacher.embedding.weight[bare])
    kept = [i for i in range(len(fresh)) if torch.equal(fresh[i], model.embedding.weight[i])]
    assert 0 < len(kept) < len(fresh) / 4


# -- accuracy ----------------------------------------------------------------------------------------------------------


def test_reference_answers_are_the_bundles(recipe: Recipe, trained: tuple[Nano, Prompts], runtime: Runtime) -> None:
    """The report's way of asking and the runtime's give the same text, for one and for several tiles."""
    model, prompts = trained
    for scale in (1, 2) if len(recipe.grids) > 1 else (1,):
        drawn, _, asked, _ = zip(*scenes.held_out(6, scale), strict=True)
        squares = data.cut(np.stack(drawn), (scale, scale), recipe.family.image(recipe.spec))
        given = answer(recipe, model, prompts, squares, [[question] for question in asked], cached=True)
        pairs = zip(asked, drawn, strict=True)
        assert [texts[0] for texts in given] == [runtime.generate(q, picture).text for q, picture in pairs]
