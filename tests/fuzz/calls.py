"""Calls: arguments of the wrong kind, numbers that are none, hostile prompts, patterns and schemas."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from random import Random
from typing import Any

import numpy as np

from tests.conftest import NANOS
from tests.fuzz.damage import arguments
from tests.fuzz.material import QUESTION, bundle, scene
from tests.fuzz.workers import say
from trol_edge import IMAGE, LatestOnly, Runtime
from trol_edge.answering.options import AnswerOptions
from trol_edge.answering.results import Answer, Choice, YesNo
from trol_edge.numeric import shown
from trol_edge.prompt.images import load_rgb
from trol_edge.testing import ScriptedRuntime

PATTERNS = (
    "(a+)+$",
    "(a{1000}){1000}",
    "((((a*)*)*)*)*",
    "a{0,100000}",
    "(?:x{1,50}){1,50}{1,50}",
    ".*.*.*.*.*.*=",
    "[^a]*b?",
    "(" * 500 + ")" * 500,
    "|".join(f"a{i}" for i in range(3000)),
    "[\\w\\W]{500}",
    "(?i)" + "k" * 200,
    "\\p{Greek}+",
    "a|b" * 2000,
    "()",
    "",
    "^$",
    "\\d{1,}\\.\\d",
    "(?:(?:a?){20}){20}a{20}",
    "[\ud7ff-\ue000]",
    "yes|no",
    "x{1,1000}y",
)
SCHEMAS: tuple[Any, ...] = (
    {},
    {"type": "string"},
    {"type": "nonsense"},
    {"enum": []},
    {"enum": ["yes"] * 1000},
    {"const": "\u0000"},
    {"$ref": "#"},
    {"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/a"}}},
    {"$ref": "http://127.0.0.1:1/x"},
    {"$ref": "file:///etc/passwd"},
    {"allOf": [{"type": "string"}] * 500},
    {"anyOf": [{"$ref": "#"}] * 50},
    {"type": "array", "items": {"$ref": "#"}},
    {"type": "array", "minItems": 10**9},
    {"type": "array", "maxItems": 10**6},
    {"type": "string", "pattern": "(a+)+$"},
    {"type": "string", "minLength": 10**12},
    {"type": "string", "maxLength": 5},
    {"type": "number", "minimum": 1, "maximum": 0},
    {"type": "integer", "multipleOf": 10**30},
    {"not": {}},
    {"type": "object", "properties": {f"p{i}": {"type": "object"} for i in range(800)}, "required": ["zzz"]},
    {"type": "object", "patternProperties": {"(": {}}},
    {"type": ["string", None]},
    {"properties": 5},
    {"a": float("nan")},
    {"type": "string", "format": "date-time"},
    {"if": {}, "then": {}, "else": {}},
    {1: 2},
    {"enum": ["\ud800"]},
)
PROMPTS: tuple[Any, ...] = (
    QUESTION,
    "",
    " ",
    "\n",
    "<image>" * 50,
    "<s></s><|im_end|>",
    "a" * 3000,
    "\u0301" * 2000,
    "\U0001f468\u200d" * 300,
    "\x00",
    "\ud800",
    "\u202e abc",
    "\ufdfa" * 500,
    "1" * 2000,
    "word " * 600,
    ["What is ", IMAGE, "?"],
    [IMAGE, IMAGE],
    [IMAGE, "a"],
    ["a", "b"],
    [],
    [""],
    ("a", IMAGE),
    [IMAGE] * 3000,
    "\u2581" * 400,
    "\t\r\v\f" * 100,
    "a\u0300\u0301" * 400,
)


class Trials:
    """Calls of a scripted Runtime, and of a real one."""

    def __init__(self, place: Path) -> None:
        self.frame = load_rgb(scene(NANOS[0]))
        self.scripted = ScriptedRuntime("yes")
        self.folder = bundle()
        self.real = Runtime(self.folder, threads=1)
        self.clean = {rt: rt.generate(QUESTION, self.frame).text for rt in (self.scripted, self.real)}

    def trial(self, rng: Random) -> str:
        """One call; afterwards the Runtime answers as before, and nothing is held."""
        rt = rng.choice([self.scripted, self.real])
        calls = [
            self.generate,
            self.generate,
            self.generate,
            self.stream,
            self.choose,
            self.many,
            self.session,
            self.others,
        ]
        call = rng.choice(calls)
        try:
            call(rt, rng)
        finally:
            kind = sys.exc_info()[0]
            assert rt.desk.busy == [] and len(rt.desk.turns) == 0, "something is held"
            if rng.random() < 0.1 or kind is None:
                found = rt.generate(QUESTION, self.frame).text
                assert found == self.clean[rt], f"afterwards it answers {found!r}"
        return "answered"

    def options(self, rng: Random) -> dict[str, Any]:
        """Options of an answer, most of them odd."""
        values, found = arguments(), dict[str, Any]()
        known = sorted(AnswerOptions.__annotations__)
        for _ in range(rng.choice([0, 1, 1, 1, 2, 3])):
            found[rng.choice(known)] = rng.choice(values)
        if rng.random() < 0.1:
            found[rng.choice(["max_tokens", "", "session_", "\ud800"])] = 1
        if rng.random() < 0.3:
            found["response_format"] = rng.choice([self.pattern, self.schema])(rng)
        if rng.random() < 0.2:
            found["stop"] = rng.choice([["y"], "\n", ["a" * n for n in range(1, 300)], ["\ud800"], "e", ["yes", "yes"]])
        if rng.random() < 0.2:
            found["deadline_ms"] = rng.choice([0, -1, 0.5, 5, 50])
        found.setdefault("max_new_tokens", rng.choice([1, 3, 40]))
        say(f"{ {name: shown(value) for name, value in found.items()} }")
        return found

    def pattern(self, rng: Random) -> Any:
        """A pattern, or several together."""
        text = rng.choice(PATTERNS)
        if rng.random() < 0.3:
            text += rng.choice(PATTERNS)
        try:
            return re.compile(text, rng.choice([0, 0, 0, re.IGNORECASE, re.DOTALL]))
        except (re.error, RecursionError, OverflowError):
            return re.compile("yes")

    def schema(self, rng: Random) -> Any:
        """A schema, or one within another."""
        found = rng.choice(SCHEMAS)
        if rng.random() < 0.3:
            found = {"type": "object", "properties": {"a": found, "b": rng.choice(SCHEMAS)}, "required": ["a", "c"]}
        if rng.random() < 0.05:
            for _ in range(5000):
                found = {"items": found}
        return found

    def prompt(self, rng: Random) -> Any:
        """A question."""
        found = rng.choice([*PROMPTS, QUESTION, QUESTION]) if rng.random() < 0.8 else rng.choice(arguments())
        say(f"prompt {shown(found)}")
        return found

    def images(self, rng: Random) -> Any:
        """Pictures."""
        given = [
            None,
            self.frame,
            [self.frame],
            [self.frame] * 2,
            [],
            [None],
            (self.frame, "nowhere"),
            [self.frame] * 500,
        ]
        found = rng.choice(given) if rng.random() < 0.8 else rng.choice(arguments())
        say(f"images {shown(found) if not isinstance(found, list) else len(found)}")
        return found

    def generate(self, rt: Runtime, rng: Random) -> None:
        """A whole answer."""
        answer = rt.generate(self.prompt(rng), self.images(rng), **self.options(rng))
        assert isinstance(answer, Answer) and answer.finish_reason in ("stop", "length", "context", "deadline"), answer
        answer.text.encode()

    def stream(self, rt: Runtime, rng: Random) -> None:
        """Pieces, at times left early."""
        with rt.stream(self.prompt(rng), self.images(rng), **self.options(rng)) as stream:
            for piece in stream:
                piece.text.encode()
                if rng.random() < 0.1:
                    break

    def choose(self, rt: Runtime, rng: Random) -> None:
        """A choice."""
        options = rng.choice(
            [
                ["yes", "no"],
                ["yes", "yes"],
                ["a", ""],
                "yes",
                [f"o{i}" for i in range(300)],
                ["a", "a" * 9000],
                ["a", "\ud800"],
            ]
        )
        options = options if rng.random() < 0.7 else rng.choice(arguments())
        more = {"deadline_ms": rng.choice([None, 0, 10.0, *arguments()])} if rng.random() < 0.3 else {}
        say(f"options {shown(options)}, {shown(more)}")
        if rng.random() < 0.2:
            assert isinstance(rt.yes_no(self.prompt(rng), self.images(rng), **more), YesNo)
            return
        choice = rt.choose(self.prompt(rng), options, self.images(rng), **more)
        assert isinstance(choice, Choice) and 0 < choice.probability <= 1 and choice.text in options, choice

    def many(self, rt: Runtime, rng: Random) -> None:
        """Several questions."""
        prompts = (
            [self.prompt(rng) for _ in range(rng.choice([1, 2, 3]))] if rng.random() < 0.8 else rng.choice(arguments())
        )
        answers = rt.ask_many(prompts, self.images(rng), **self.options(rng))
        assert len(answers) == len(prompts)

    def session(self, rt: Runtime, rng: Random) -> None:
        """The token level."""
        ids = rng.choice([rt.tokenize(QUESTION), [1, 2, 3], np.array([5, 6]), [2**40], [-1], [], *arguments()])
        arrays = [
            np.zeros((1, 3, 28, 28), np.float32),
            np.zeros((0, 3, 28, 28)),
            np.full((1, 3, 28, 28), np.nan, np.float32),
        ]
        pixels = rng.choice([None, None, *arrays, *arguments()])
        given = rng.choice([None, None, 1, 7, *arguments()])
        say(f"ids {shown(ids)}, pixels {shown(pixels)}, chunk {shown(given)}")
        session = rt.session(rng.choice([False, True, *arguments()]) if rng.random() < 0.2 else False, given)
        with_one = rng.choice([session.prefill, session.extend])
        logits = with_one(ids, pixels)
        assert logits.shape == (rt.bundle.manifest.spec.vocab_size,)
        say("prefilled")
        for _ in range(rng.randrange(3)):
            value = rng.choice([5, 5, 6, *arguments()])
            say(f"step or truncate {shown(value)}")
            rng.choice([session.step, session.truncate, session.extend])(value)
        session.fork().close()

    def others(self, rt: Runtime, rng: Random) -> None:
        """What else takes arguments."""
        value, other = rng.choice(arguments()), rng.choice(arguments())
        how = rng.randrange(6)
        say(f"{how}: {shown(value)}, {shown(other)}")
        if how == 5:
            names = [
                "threads",
                "vision_cache_bytes",
                "selftest",
                "provider",
                "fallback",
                "trusted_keys",
                "prefix_reuse",
            ]
            given = {name: rng.choice(arguments()) for name in rng.sample(names, rng.choice([0, 1, 1, 2]))}
            say(f"{given.keys()}, {shown(list(given.values()))}")
            Runtime(rng.choice([self.folder, self.folder, value]), **{"threads": 1, "selftest": False, **given}).close()
        if how == 0:
            rt.tokenize(self.prompt(rng), value, rng.choice(["", "yes", other]))
        elif how == 1:
            rt.count_tiles(value, rng.choice([None, other]))
        elif how == 2:
            rt.preprocess(value, rng.choice(["rgb", other]), rng.choice([None, other]))
        elif how == 3:
            rt.model.text.encode(rng.choice(["a", self.prompt(rng)]))
        else:
            queue: LatestOnly[Any] = LatestOnly()
            queue.put(value)
            queue.get(timeout_s=rng.choice([0, 0.001, -1, True, 0.5]))
