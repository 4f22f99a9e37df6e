"""Tile grids and prompts of the Phi-3 family equal the authors'; test_text.py has the other family's prompts."""

from __future__ import annotations

import json
import re
from typing import Any

import numpy as np
import pytest
import tokenizers

from tests.golden import GOLDEN
from tests.phi3_tokenizer import make
from tests.test_text import INTERNLM2_PROMPT
from trol_edge.errors import BundleError
from trol_edge.export.reference import internlm2, phi3
from trol_edge.export.reference.hub import find
from trol_edge.export.reference.tokenizer import convert
from trol_edge.prompt import tiles
from trol_edge.prompt.images import ImageSpec, count_tiles, preprocess
from trol_edge.prompt.template import IMAGE, build_prompt, end_ids
from trol_edge.prompt.tokenizer import Tokenizer

SPEC = phi3.model_spec(find("trol-3.8b").config, None, {})
PICTURES, PROMPT = phi3.FAMILY.image(SPEC), phi3.FAMILY.prompt(SPEC)


def prompts() -> list[dict[str, Any]]:
    rows = json.loads((GOLDEN / "prompts.json").read_text(encoding="utf-8"))["rows"]
    rows = [row for row in rows if row["family"] == "phi3" and row["error_in_official_code"] is None]
    # Without a picture their "<image>" stays in the text; ours has no such mark to leave there.
    return [row for row in rows if "<image>" not in row["prompt"]]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder = tmp_path_factory.mktemp("tokenizer")
    (folder / "tokenizer.json").write_text(json.dumps(make()))
    return Tokenizer(convert(folder) or "")


def test_grids_equal_the_authors() -> None:
    rows = json.loads((GOLDEN / "tiling_table.json").read_text())["rows"]
    assert len(rows) == 564
    for width, height, columns, lines, count in rows:
        assert tiles.grid(width, height, 448, 6) == (columns, lines), (width, height)
        assert tiles.count(width, height, 448, 6) == count


def test_tiles_are_the_picture_row_by_row_and_a_thumbnail() -> None:
    picture = np.zeros((200, 300, 3), np.uint8)
    picture[:100, 200:] = 255  # the upper right of a grid of 3 x 2
    squares = list(tiles.cut(picture, 28, 6))
    assert tiles.grid(300, 200, 28, 6) == (3, 2) and len(squares) == 7
    assert [round(float(square.mean()) / 255, 1) for square in squares] == [0, 0, 1, 0, 0, 0, 0.2]


def test_tiles_of_several_pictures_follow_each_other() -> None:
    spec = ImageSpec("tiles", 28, PICTURES.mean, PICTURES.std, 6)
    rng = np.random.default_rng(0)
    pictures = [rng.integers(0, 256, (h, w, 3), np.uint8) for h, w in ((30, 90), (28, 28), (56, 56))]
    assert count_tiles(pictures, spec) == [4, 1, 5]
    together = preprocess(pictures, spec)
    assert np.array_equal(together, np.concatenate([preprocess([picture], spec) for picture in pictures]))
    assert preprocess([], spec).shape == (0, 3, 28, 28)


def test_the_number_of_tiles_is_checked() -> None:
    assert (PICTURES.most_tiles, ImageSpec("stretch", 490, PICTURES.mean, PICTURES.std).most_tiles) == (7, 1)
    for kind, count in (("tiles", 0), ("stretch", 2)):
        with pytest.raises(BundleError, match=f"max_tiles {count} is not a count of tiles"):
            ImageSpec(kind, 28, PICTURES.mean, PICTURES.std, count)


@pytest.mark.parametrize(
    "row", prompts(), ids=lambda row: f"{row['dataset']}-{row['question'][:7]}-{row['image_given']}"
)
def test_prompts_equal_the_authors(tokenizer: Tokenizer, row: dict[str, Any]) -> None:
    reference = tokenizers.Tokenizer.from_str(json.dumps(make()))
    text = re.sub(r"\{(\S+) x (\d+)\}", lambda m: m[1] * int(m[2]), row["prompt"])
    want = reference.encode(text, add_special_tokens=False).ids
    head = PROMPT.before_system + PROMPT.system + PROMPT.before_question
    assert row["prompt"].startswith(head) and row["prompt"].endswith(PROMPT.after_question)
    user = row["prompt"][len(head) : -len(PROMPT.after_question)]
    picture, counts = "<img>{<IMG_CONTEXT> x 256}</img>", [1] * row["image_given"]
    said = user.replace(picture, "")
    parts = [part for text in user.split(picture) for part in (text, IMAGE) if part][:-1] if counts else [user]
    assert build_prompt(tokenizer, PROMPT, parts, counts) == want
    if user.startswith(picture + PROMPT.after_image):  # the form in which pictures come before the question
        assert build_prompt(tokenizer, PROMPT, said.removeprefix(PROMPT.after_image), counts) == want


def test_a_picture_has_tokens_for_each_of_its_tiles(tokenizer: Tokenizer) -> None:
    image, before, after = (tokenizer.special_tokens[t] for t in ("<IMG_CONTEXT>", "<img>", "</img>"))
    ids = build_prompt(tokenizer, PROMPT, "ka", [7, 1])
    marks = [i for i in ids if i in (before, after)]
    assert marks == [before, after] * 2 and ids.count(image) == 8 * 256
    assert ids[ids.index(before) : ids.index(after) + 1] == [before, *[image] * 7 * 256, after]
    assert end_ids(tokenizer, PROMPT) == {tokenizer.special_tokens["<|end|>"]}


def test_the_other_familys_template_is_the_one_that_test_text_checks() -> None:
    assert internlm2.FAMILY.prompt(internlm2.model_spec(find("trol-1.8b").config, None, {})) == INTERNLM2_PROMPT
