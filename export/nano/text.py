"""The text that the small models are trained on: sentencepiece model, prompt in token ids, and packed questions.

Axes: B pictures, R = ROWS question rows per picture, N = B * R rows, S = ROW_TOKENS tokens of a row, C tokens of the
context before them (prompt and picture), I = 64 image tokens of a picture's last (or only) tile.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import random
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from trol_edge.bundle.spec import ModelSpec
from trol_edge.export import scenes
from trol_edge.export.nano.optim import SEED, WORLD
from trol_edge.export.reference import tokenizer
from trol_edge.export.reference.family import SYSTEM, Family
from trol_edge.export.scenes import Scene
from trol_edge.prompt.template import build_prompt
from trol_edge.prompt.tokenizer import Tokenizer

PIECES = 800  # size of the sentencepiece model
# Plain English, so that the tokenizer does not fall back to bytes on other questions a person may type.
ENGLISH = """
the and that have for not with you this but his from they say her she will one all would there their what so up out if
about who get which go me when make can like time no just him know take people into year your good some could them see
other than then now look only come its over think also back after use two how our work first well way even new want
because any these give day most us is was are were been has had did said each many must through before right too mean
old same tell boy follow came show form three small set put end does another large big even such turn here why ask went
men read need land different home move try kind hand picture again change off play spell air away animal house point
page letter mother answer found study still learn should world high every near add food between own below country plant
last school father keep tree never start city earth eye light thought head under story saw left right few while along
might close something seem next hard open example begin life always those both paper together got group often run
robot camera table object image scene colour shape size place pick up put down the cup on the box please thank you
"""


def train_pieces(prefix: Path, drawn: Sequence[Scene], symbols: Sequence[str], space_before_answer: bool) -> None:
    """Train a sentencepiece BPE with byte fallback ("\\n" is the byte piece) and write it to `prefix`.model.

    Text that follows a space is learnt as pieces that begin with one. That includes answers if the family's tokenizer
    puts a space before each segment. Questions follow a line feed in both families.
    """
    import sentencepiece

    space = " " if space_before_answer else ""
    rng = random.Random(SEED)
    lines = [text for scene in drawn for _, q, a in scenes.questions(scene, rng) for text in (q, space + a)]
    roles = () if space_before_answer else ("system", "user", "assistant")  # text in one family, tokens in the other
    lines += [line for line in (space + SYSTEM, *roles) for _ in range(2000)]
    words = ENGLISH.split()
    lines += [space + " ".join(rng.choices(words, k=12)) for _ in range(1500)]
    lines += [chr(c) for c in range(33, 127)] * 20
    rng.shuffle(lines)
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines),
        model_prefix=str(prefix),
        model_type="bpe",
        vocab_size=PIECES,
        byte_fallback=True,
        add_dummy_prefix=False,
        remove_extra_whitespaces=False,
        normalization_rule_name="identity",
        character_coverage=1.0,
        unk_id=0,
        bos_id=1,
        eos_id=2,
        pad_id=-1,
        user_defined_symbols=list(symbols),
        num_threads=WORLD,
        minloglevel=1,
    )


class Prompts:
    """The authors' prompt in token ids, as the runtime builds it for one picture."""

    def __init__(self, folder: Path, family: Family, spec: ModelSpec) -> None:
        """Reads the tokenizer files of a checkpoint folder."""
        text = tokenizer.convert(folder, (family.prompt(spec).image,))
        assert text is not None, folder
        self.tokenizer, self.template = Tokenizer(text), family.prompt(spec)
        self.image = self.tokenizer.special_id(self.template.image)
        self.end = self.tokenizer.special_id(self.template.end_markers[0])
        ids = build_prompt(self.tokenizer, self.template, "x", 1)
        self.prefix = ids[: ids.index(self.image)]

    def question(self, question: str) -> list[int]:
        """The ids of everything after the picture."""
        ids = build_prompt(self.tokenizer, self.template, question, 1)
        return ids[ids.index(self.image) + self.template.tokens_per_image :]

    def answer(self, answer: str) -> list[int]:
        return self.tokenizer.encode(answer)

    def decode(self, ids: list[int]) -> str:
        return self.tokenizer.decode(ids)

    def ends(self, ids: list[int], text: str) -> list[int]:
        """For every token, the number of characters of `text` (ASCII) up to its end; 0 or less before the text."""
        said = [self.tokenizer.token_bytes(i)[0] for i in ids]
        start = b"".join(said).index(text.encode())
        return [end - start for end in itertools.accumulate(map(len, said))]


ROWS, ROW_TOKENS = 3, 64  # question rows per picture and their length
KIND_WEIGHTS = {
    "colour": 1, "shape": 1, "size": 1, "exists": 1.8, "where": 1.8, "count": 2.4, "relation": 1.6,
    "nearer": 3, "chain": 3, "beside": 3,
}  # fmt: skip


@dataclasses.dataclass
class Batch:
    """Packed questions of B pictures.

    ids, positions [N, S]; mask [N, 1, S, C+S]; single [N, S, 1] is 1 for a token that is stepped, not traversed;
    at (rows, columns) [M] the token `target` [M] is expected, with `weight` [M]; `question` [M] numbers the questions,
    `kinds` names them; named and answers are (rows, columns, cells [K, I]) of the attention targets.
    """

    ids: Tensor
    positions: Tensor
    mask: Tensor
    single: Tensor
    rows: Tensor
    columns: Tensor
    target: Tensor
    weight: Tensor
    question: Tensor
    kinds: list[str]
    named: tuple[Tensor, Tensor, Tensor]
    answers: tuple[Tensor, Tensor, Tensor]


class Packer:
    """Draws questions about pictures and packs them into rows."""

    def __init__(self, prompts: Prompts, seed: int) -> None:
        self.prompts, self.rng = prompts, random.Random(seed)
        self.tokens = functools.lru_cache(100_000)(self._tokens)

    def _tokens(self, text: str, question: bool) -> tuple[list[int], list[int]]:
        ids = self.prompts.question(text) if question else self.prompts.answer(text)
        return ids, self.prompts.ends(ids, text)

    def pack(self, drawn: list[Scene], context: int, single_rate: float) -> Batch:
        """Pack questions about pictures.

        context: tokens before the questions. single_rate: share of the questions whose answer is stepped.
        """
        n = len(drawn) * ROWS
        ids = np.zeros((n, ROW_TOKENS), np.int64)
        positions = np.zeros((n, ROW_TOKENS), np.int64)
        segment = np.full((n, ROW_TOKENS), -1)
        single = np.zeros((n, ROW_TOKENS, 1), np.float32)
        due: list[tuple[int, int, int, float, int]] = []
        kinds: list[str] = []
        marks: tuple[list[tuple[int, int, NDArray[np.bool_]]], ...] = ([], [])
        for b, scene in enumerate(drawn):
            cells = scene.owners.reshape(-1)
            used = [0] * ROWS
            for item in self._items(scene):
                question, question_ends = self.tokens(item.question, True)
                answer, answer_ends = self.tokens(item.answer, False)
                length = len(question) + len(answer)
                fits = [r for r in range(ROWS) if used[r] + length <= ROW_TOKENS]
                if not fits:
                    break
                r, start = b * ROWS + fits[0], used[fits[0]]
                used[fits[0]] += length
                here = slice(start, start + length)
                ids[r, here] = question + answer
                positions[r, here] = context + np.arange(length)
                segment[r, here] = len(kinds)
                first = start + len(question) - 1  # the last token of the prompt predicts the answer's first
                if self.rng.random() < single_rate:
                    single[r, first + 1 : start + length] = 1
                share = 0.5 if item.kind == "describe" else 1.0
                due += [(r, first + j, t, share, len(kinds)) for j, t in enumerate((*answer, self.prompts.end))]
                for phrase, about in item.named:
                    stop = item.question.index(phrase) + len(phrase)
                    column = start + next(j for j, e in enumerate(question_ends) if e >= stop)
                    marks[0].append((r, column, np.isin(cells, about)))
                if item.kind == "describe":
                    offset = 0
                    for i in item.answer_objects:
                        o = scene.objects[i]
                        phrase = f"{o.size} {o.name}"
                        low = item.answer.index(phrase, offset)
                        offset = low + len(phrase)
                        told = [j for j, e in enumerate(answer_ends) if low < e <= offset]
                        marks[1].extend((r, first + j, cells == i) for j in told)
                elif item.answer_objects:
                    told = [0] if item.kind in ("count", "beside") else list(range(len(answer)))
                    marks[1].extend((r, first + j, np.isin(cells, item.answer_objects)) for j in told)
                kinds.append(item.kind)
        own = (segment[:, :, None] == segment[:, None, :]) & np.tri(ROW_TOKENS, dtype=bool)
        mask = np.zeros((n, 1, ROW_TOKENS, context + ROW_TOKENS), np.float32)
        mask[:, 0, :, context:] = np.where(own, 0, -1e9)
        rows, columns, target, weight, number = (torch.tensor(c) for c in zip(*due, strict=True))
        named, answers = (
            (
                torch.tensor([m[0] for m in ms]),
                torch.tensor([m[1] for m in ms]),
                torch.from_numpy(np.stack([m[2] for m in ms])),
            )
            for ms in marks
        )
        return Batch(
            ids=torch.from_numpy(ids),
            positions=torch.from_numpy(positions),
            mask=torch.from_numpy(mask),
            single=torch.from_numpy(single),
            rows=rows,
            columns=columns,
            target=target,
            weight=weight,
            question=number,
            kinds=kinds,
            named=named,
            answers=answers,
        )

    def _items(self, scene: Scene) -> Iterator[scenes.Item]:
        if self.rng.random() < 0.5:
            item = scenes.ask(scene, "describe", self.rng)
            if item:
                yield item
        kinds, weights = list(KIND_WEIGHTS), list(KIND_WEIGHTS.values())
        while True:
            item = scenes.ask(scene, self.rng.choices(kinds, weights)[0], self.rng)
            if item:
                yield item
