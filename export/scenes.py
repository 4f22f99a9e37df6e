"""Renders tabletop scenes with questions that have exactly one right answer.

They train `trol-nano` and `trol-nano-phi3`, calibrate quantisation and measure accuracy, so all of these see the same
kind of picture. A scene is determined by an integer seed; training seeds and held-out seeds are disjoint ranges.

What makes an answer unambiguous, by construction (pixels of the 112 x 112 picture):
- no two objects share colour and shape; nothing overlaps; small and large radii are `SMALL_RADIUS`, `LARGE_RADIUS`
- every two centres differ by `ORDER_MARGIN` or more in x, so "from left to right" is one order
- "where" is asked when the centre is clear of both borders between thirds (`NEAR_EDGE`, `MIDDLE`)
- "what is left of X" is asked when exactly one object is more than `RELATION_MARGIN` away on that side (and not mostly
  above or below X), and every other object is at most `RELATION_SLACK` on that side; "what is above the object left of
  X" when that holds for both steps
- "which is nearer to X" is asked about two objects whose distances to X differ by `NEARER_MARGIN` or more; "what is
  farthest from" wants `FARTHEST_MARGIN` between the two greatest distances
- "how many red objects are above X" is asked when every other object is more than `RELATION_SLACK` above or below X

The three kinds in `HARD_KINDS` are not learnt completely, so a loss of accuracy shows in them first. They come last in
`KINDS`: whoever asks all kinds in turn draws the other questions as if these did not exist.
"""

from __future__ import annotations

import dataclasses
import math
import random
from collections.abc import Callable, Iterator, Sequence

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFilter

PIXELS = 112
PATCH = 14
GRID = PIXELS // PATCH

# Training seeds are 0 .. HELD_OUT_SEED - 1, held-out seeds start at HELD_OUT_SEED.
TRAINING_SEED = 0
HELD_OUT_SEED = 10_000_000

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (206, 36, 40),
    "orange": (240, 130, 20),
    "yellow": (245, 215, 45),
    "green": (45, 160, 60),
    "cyan": (50, 205, 215),
    "blue": (40, 75, 205),
    "purple": (130, 45, 170),
    "white": (245, 245, 245),
}
SHAPES = ("circle", "square", "triangle", "star", "cross", "ring")
SIZES = ("small", "large")
SHORT_KINDS = ("colour", "shape", "size", "exists", "where", "count", "relation")
HARD_KINDS = ("nearer", "chain", "beside")
EASY_KINDS = (*SHORT_KINDS, "describe")
KINDS = (*EASY_KINDS, *HARD_KINDS)
NUMBERS = ("zero", "one", "two", "three", "four", "five")

SMALL_RADIUS = (8.0, 9.5)
LARGE_RADIUS = (13.0, 15.5)
ORDER_MARGIN = 5.0
NEAR_EDGE = 37.0  # left/top third: centre below this; right/bottom: above PIXELS - NEAR_EDGE
MIDDLE = 9.0  # middle: centre within this of the picture's centre
RELATION_MARGIN = 12.0
RELATION_SLACK = 4.0
NEARER_MARGIN = 28.0
FARTHEST_MARGIN = 4.0

# Table colours: muted, so that every object colour is distinct on each of them.
_TABLES = (
    (150, 118, 84),
    (92, 66, 48),
    (118, 118, 122),
    (66, 68, 74),
    (86, 98, 112),
    (170, 158, 136),
    (98, 100, 72),
    (40, 40, 46),
)
_SCALE = 3  # objects are drawn this much larger and box-filtered down


@dataclasses.dataclass(frozen=True)
class SceneObject:
    """One thing on the table; x, y (centre) and radius in pixels."""

    colour: str
    shape: str
    size: str
    x: float
    y: float
    radius: float

    @property
    def name(self) -> str:
        return f"{self.colour} {self.shape}"


@dataclasses.dataclass(frozen=True)
class Scene:
    """The objects on the table, from left to right, and which of them each 14 x 14 patch shows.

    owners: int8 [8, 8], an index into `objects` or -1 for table. The patch under an object's centre is always its own.
    """

    objects: tuple[SceneObject, ...]
    owners: NDArray[np.int8]

    def mirrored(self) -> Scene:
        """The scene that the left-right flipped picture shows."""
        objects = tuple(dataclasses.replace(o, x=PIXELS - o.x) for o in reversed(self.objects))
        flipped = self.owners[:, ::-1]
        return Scene(objects, np.where(flipped < 0, flipped, len(objects) - 1 - flipped).astype(np.int8))


@dataclasses.dataclass(frozen=True)
class Item:
    """A question about a scene. `named` has phrases of the question and the objects (indices) that each is about;
    `answer_objects` are the objects that the answer is about (for "describe", in the order of the answer)."""

    kind: str
    question: str
    answer: str
    named: tuple[tuple[str, tuple[int, ...]], ...]
    answer_objects: tuple[int, ...]


# --- rendering ---------------------------------------------------------------------------------------------------


def render(seed: int, scale: int = 1) -> tuple[NDArray[np.uint8], Scene]:
    """Draw the scene of this seed: RGB uint8 [112 * scale, 112 * scale, 3] and what it shows.

    A larger picture shows the same scene with more pixels; numbers in a Scene stay in pixels of the small one.
    """
    rng = random.Random(seed)
    objects = _place(rng)
    rows, columns = _coordinates(scale)
    canvas = _table(rng, seed, rows, columns)
    coverage = np.zeros((len(objects), GRID, GRID), np.float32)
    light = math.radians(rng.uniform(20, 160))
    shift = (round(2.5 * math.cos(light)), round(2.5 * math.sin(light)))
    for i, item in enumerate(objects):
        alpha = _silhouette(item, rng.uniform(-20, 20), scale)
        _blend_shadow(canvas, alpha, (shift[0] * scale, shift[1] * scale), rng.uniform(0.3, 0.5), 2 * scale)
        colour = np.array(COLOURS[item.colour], np.float32) + np.array([rng.uniform(-10, 10) for _ in range(3)])
        shade = rng.uniform(0.9, 1.02) - 0.006 * rng.uniform(0, 1) * (rows - item.y)[..., None]
        np.copyto(canvas, canvas + alpha[..., None] * (colour * shade - canvas))
        coverage[i] = alpha.reshape(GRID, PATCH * scale, GRID, PATCH * scale).mean((1, 3))
    owners = np.where(coverage.max(0) > 0.2, coverage.argmax(0), -1).astype(np.int8)
    for i, item in enumerate(objects):
        owners[int(item.y) // PATCH, int(item.x) // PATCH] = i
    pixels: NDArray[np.uint8] = np.clip(canvas + 0.5, 0, 255).astype(np.uint8)
    return pixels, Scene(tuple(objects), owners)


def _place(rng: random.Random) -> list[SceneObject]:
    """Place 1 to 5 objects, sorted from left to right. Half of the scenes use few colours or few shapes."""
    while True:
        colours, shapes = list(COLOURS), list(SHAPES)
        restrict = rng.random()
        if restrict < 0.25:
            colours = rng.sample(colours, rng.randint(2, 3))
        elif restrict < 0.5:
            shapes = rng.sample(shapes, rng.randint(2, 3))
        kinds = [(c, s) for c in colours for s in shapes]
        count = rng.choices((1, 2, 3, 4, 5), (1, 2, 3, 3, 3))[0]
        placed: list[SceneObject] = []
        for colour, shape in rng.sample(kinds, count):
            size = rng.choice(SIZES)
            radius = rng.uniform(*(SMALL_RADIUS if size == "small" else LARGE_RADIUS))
            for _ in range(30):
                low, high = radius + 3, PIXELS - radius - 3
                new = SceneObject(colour, shape, size, rng.uniform(low, high), rng.uniform(low, high), radius)
                if all(_apart(new, other) for other in placed):
                    placed.append(new)
                    break
        if len(placed) == count:
            return sorted(placed, key=lambda o: o.x)


def _apart(a: SceneObject, b: SceneObject) -> bool:
    gap = math.hypot(a.x - b.x, a.y - b.y) - a.radius - b.radius
    return gap >= 3 and abs(a.x - b.x) >= ORDER_MARGIN


def _coordinates(scale: int) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """y and x of every pixel of a larger picture, in pixels of the small one; float32 [112 * scale, 112 * scale]."""
    y, x = (np.mgrid[0 : PIXELS * scale, 0 : PIXELS * scale].astype(np.float32) + 0.5) / scale - 0.5
    return y, x


def _table(
    rng: random.Random, seed: int, rows: NDArray[np.float32], columns: NDArray[np.float32]
) -> NDArray[np.float32]:
    """Draw a table with a gradient, stripes and noise, float32 [H, W, 3], for coordinates [H, W] of its pixels."""
    base = np.array(rng.choice(_TABLES), np.float32) + np.array([rng.uniform(-10, 10) for _ in range(3)], np.float32)
    angle, stripes = rng.uniform(0, math.tau), rng.uniform(0, math.pi)
    slope = rng.uniform(0, 0.25) / PIXELS
    period, depth = rng.uniform(5, 25), rng.choice((0.0, rng.uniform(0, 0.08)))
    along = (columns - PIXELS / 2) * math.cos(angle) + (rows - PIXELS / 2) * math.sin(angle)
    across = columns * math.cos(stripes) + rows * math.sin(stripes)
    factor = 1 + slope * along + depth * np.sin(across * (math.tau / period))
    noise = np.random.default_rng(seed).standard_normal(rows.shape, np.float32) * rng.uniform(1, 5)
    table: NDArray[np.float32] = (base * factor[..., None] + noise[..., None]).astype(np.float32)
    return table


def _silhouette(item: SceneObject, degrees: float, scale: int) -> NDArray[np.float32]:
    """How much of each pixel the object covers, float32 [112 * scale, 112 * scale] of 0..1."""
    factor = _SCALE * scale
    r = item.radius * factor
    side = PIXELS * factor
    x, y = item.x * factor, item.y * factor
    picture = Image.new("L", (side, side))
    draw = ImageDraw.Draw(picture)
    if item.shape in ("circle", "ring"):
        draw.ellipse((x - r, y - r, x + r, y + r), fill=255)
        if item.shape == "ring":
            hole = 0.55 * r
            draw.ellipse((x - hole, y - hole, x + hole, y + hole), fill=0)
    else:
        turn = math.radians(degrees)
        c, s = math.cos(turn), math.sin(turn)
        draw.polygon([(x + r * (c * u - s * v), y + r * (s * u + c * v)) for u, v in _OUTLINES[item.shape]], fill=255)
    alpha: NDArray[np.float32] = np.asarray(picture.reduce(_SCALE), np.float32) / np.float32(255)
    return alpha


def _star() -> tuple[tuple[float, float], ...]:
    radii = (1.15, 0.47)
    angles = [math.pi * (k / 5 - 0.5) for k in range(10)]
    return tuple((radii[k % 2] * math.cos(a), radii[k % 2] * math.sin(a)) for k, a in enumerate(angles))


# Corners of each polygon in units of the radius, y downwards.
_OUTLINES: dict[str, tuple[tuple[float, float], ...]] = {
    "square": ((-0.85, -0.85), (0.85, -0.85), (0.85, 0.85), (-0.85, 0.85)),
    "triangle": ((0.0, -1.1), (1.0, 0.75), (-1.0, 0.75)),
    "star": _star(),
    "cross": tuple(
        (u * 1.0, v * 1.0)
        for u, v in (
            (-0.34, -1), (0.34, -1), (0.34, -0.34), (1, -0.34), (1, 0.34), (0.34, 0.34),
            (0.34, 1), (-0.34, 1), (-0.34, 0.34), (-1, 0.34), (-1, -0.34), (-0.34, -0.34),
        )
    ),
}  # fmt: skip


def _blend_shadow(
    canvas: NDArray[np.float32], alpha: NDArray[np.float32], shift: tuple[int, int], dark: float, blur: int
) -> None:
    """Darken the table below and beside an object, softly. shift, blur: in pixels of the canvas."""
    blurred = Image.fromarray((alpha * 255).astype(np.uint8)).filter(ImageFilter.BoxBlur(blur))
    soft = np.roll(np.asarray(blurred, np.float32), (shift[1], shift[0]), (0, 1)) / 255
    canvas *= 1 - dark * soft[..., None]


# --- questions ---------------------------------------------------------------------------------------------------


def ask(scene: Scene, kind: str, rng: random.Random) -> Item | None:
    """A random question of this kind, or None if the scene allows no unambiguous one."""
    return _ASK[kind](scene, rng)


def questions(scene: Scene, rng: random.Random) -> list[tuple[str, str, str]]:
    """One (kind, question, answer) for every kind that the scene allows."""
    items = (ask(scene, kind, rng) for kind in KINDS)
    return [(item.kind, item.question, item.answer) for item in items if item]


def held_out(
    count: int, scale: int = 1, hard: bool = False, progress: Callable[[int, int], None] = lambda done, total: None
) -> Iterator[tuple[NDArray[np.uint8], str, str, str]]:
    """Yield held-out (image, kind, question, answer), one about each of `count` scenes, with kinds in turn if possible.

    hard: about a scene that allows one there is a second question, of HARD_KINDS; the others never are of these.
    scale: see `render`; the questions are the same at every scale. progress: called when the next scene is asked for.
    """
    for i in range(count):
        pixels, scene = render(HELD_OUT_SEED + i, scale)
        asked = questions(scene, random.Random(HELD_OUT_SEED + i))
        for kinds in (EASY_KINDS, HARD_KINDS) if hard else (EASY_KINDS,):
            options = [q for q in asked if q[0] in kinds]
            if options:
                wanted = kinds[i % len(kinds)]
                kind, question, answer = next((q for q in options if q[0] == wanted), options[i % len(options)])
                yield pixels, kind, question, answer
        progress(i + 1, count)


def an(phrase: str) -> str:
    return ("an " if phrase[0] in "aeiou" else "a ") + phrase


def _colour(scene: Scene, rng: random.Random) -> Item | None:
    shapes = [o.shape for o in scene.objects]
    unique = [i for i, shape in enumerate(shapes) if shapes.count(shape) == 1]
    if not unique:
        return None
    i = rng.choice(unique)
    template = rng.choice(("What colour is the {}?", "What is the colour of the {}?", "Which colour is the {}?"))
    return Item("colour", template.format(shapes[i]), scene.objects[i].colour, ((shapes[i], (i,)),), (i,))


def _shape(scene: Scene, rng: random.Random) -> Item | None:
    colours = [o.colour for o in scene.objects]
    unique = [i for i, colour in enumerate(colours) if colours.count(colour) == 1]
    if not unique:
        return None
    i = rng.choice(unique)
    phrase = f"{colours[i]} object"
    template = rng.choice(("What shape is the {}?", "What is the shape of the {}?", "Which shape is the {}?"))
    return Item("shape", template.format(phrase), scene.objects[i].shape, ((phrase, (i,)),), (i,))


def _size(scene: Scene, rng: random.Random) -> Item | None:
    i = rng.randrange(len(scene.objects))
    name = scene.objects[i].name
    template = rng.choice(("What size is the {}?", "How big is the {}?", "Is the {} small or large?"))
    return Item("size", template.format(name), scene.objects[i].size, ((name, (i,)),), (i,))


def _exists(scene: Scene, rng: random.Random) -> Item | None:
    names = [o.name for o in scene.objects]
    template = rng.choice(("Is there {}?", "Do you see {}?", "Can you see {}?"))
    if rng.random() < 0.5:
        i = rng.randrange(len(names))
        return Item("exists", template.format(an(names[i])), "yes", ((names[i], (i,)),), (i,))
    if rng.random() < 0.6:  # the hard case: each word applies to something here, their combination to nothing
        pairs = [(a.colour, b.shape) for a in scene.objects for b in scene.objects]
    elif rng.random() < 0.5:
        pairs = [(o.colour, shape) for o in scene.objects for shape in SHAPES]
    else:
        pairs = [(colour, o.shape) for o in scene.objects for colour in COLOURS]
    absent = [f"{c} {s}" for c, s in pairs if f"{c} {s}" not in names]
    if not absent:
        return None
    return Item("exists", template.format(an(rng.choice(absent))), "no", (), ())


def third(value: float, words: tuple[str, str, str]) -> str | None:
    """Which third of the picture a coordinate is in; None close to a border between thirds."""
    if value < NEAR_EDGE:
        return words[0]
    if value > PIXELS - NEAR_EDGE:
        return words[2]
    return words[1] if abs(value - PIXELS / 2) < MIDDLE else None


def _where(scene: Scene, rng: random.Random) -> Item | None:
    answers = {}
    for i, o in enumerate(scene.objects):
        row, column = third(o.y, ("top", "", "bottom")), third(o.x, ("left", "", "right"))
        if row is not None and column is not None:
            answers[i] = " ".join(word for word in (row, column) if word) or "middle"
    if not answers:
        return None
    i = rng.choice(list(answers))
    name = scene.objects[i].name
    template = rng.choice(("Where is the {}?", "Where do you see the {}?", "Where in the picture is the {}?"))
    return Item("where", template.format(name), answers[i], ((name, (i,)),), (i,))


def _count(scene: Scene, rng: random.Random) -> Item | None:
    what = rng.random()
    if what < 0.15:
        phrase, hits = "objects", tuple(range(len(scene.objects)))
    else:
        if what < 0.5:
            word = _pick_word(rng, [o.colour for o in scene.objects], list(COLOURS))
        elif what < 0.85:
            word = _pick_word(rng, [o.shape for o in scene.objects], list(SHAPES))
        else:
            word = rng.choice(SIZES)
        phrase = _plural(word)
        hits = tuple(i for i, o in enumerate(scene.objects) if word in (o.colour, o.shape, o.size))
    template = rng.choice(("How many {} are there?", "How many {} do you see?", "How many {} are on the table?"))
    return Item("count", template.format(phrase), NUMBERS[len(hits)], ((phrase, hits),) if hits else (), hits)


def _plural(word: str) -> str:
    """The things that a colour, shape or size applies to."""
    return {"cross": "crosses"}.get(word, f"{word}s") if word in SHAPES else f"{word} objects"


def _pick_word(rng: random.Random, present: list[str], every: list[str]) -> str:
    """Pick a word that mostly applies to something here; words for several things are picked more often."""
    return rng.choice(present) if rng.random() < 0.88 else rng.choice(every)


# Side -> phrases, and a function from (dx, dy) to the offset towards that side and the offset sideways.
_SIDES: dict[str, tuple[tuple[str, ...], Callable[[float, float], tuple[float, float]]]] = {
    "left": (("left of", "to the left of"), lambda dx, dy: (-dx, dy)),
    "right": (("right of", "to the right of"), lambda dx, dy: (dx, dy)),
    "above": (("above",), lambda dx, dy: (-dy, dx)),
    "below": (("below",), lambda dx, dy: (dy, dx)),
}


def _neighbours(scene: Scene) -> list[tuple[int, str, int]]:
    """All (object, side, the only object on that side) that are far enough apart to ask about."""
    options = []
    for i, o in enumerate(scene.objects):
        for side, (_, offset) in _SIDES.items():
            towards = {j: offset(p.x - o.x, p.y - o.y) for j, p in enumerate(scene.objects) if j != i}
            there = [j for j, (ahead, _) in towards.items() if ahead > RELATION_SLACK]
            if len(there) == 1:
                ahead, sideways = towards[there[0]]
                if ahead >= RELATION_MARGIN and ahead >= 0.6 * abs(sideways):
                    options.append((i, side, there[0]))
    return options


def _relation(scene: Scene, rng: random.Random) -> Item | None:
    options = _neighbours(scene)
    if not options:
        return None
    i, side, j = rng.choice(options)
    name = scene.objects[i].name
    words = rng.choice(_SIDES[side][0])
    template = rng.choice(("What is {} the {}?", "Which object is {} the {}?"))
    return Item("relation", template.format(words, name), scene.objects[j].name, ((name, (i,)),), (j,))


def _distance(scene: Scene, i: int, j: int) -> float:
    a, b = scene.objects[i], scene.objects[j]
    return math.hypot(a.x - b.x, a.y - b.y)


def _nearer(scene: Scene, rng: random.Random) -> Item | None:
    options = []
    for i in range(len(scene.objects)):
        distance = {j: _distance(scene, i, j) for j in range(len(scene.objects)) if j != i}
        options += [(i, a, b) for a in distance for b in distance if distance[a] + NEARER_MARGIN <= distance[b]]
    if not options:
        return None
    i, near, far = rng.choice(options)
    first, second = (near, far) if rng.random() < 0.5 else (far, near)
    x, a, b = (scene.objects[j].name for j in (i, first, second))
    template = rng.choice(
        ("Which is nearer to the {x}, the {a} or the {b}?", "Is the {a} or the {b} nearer to the {x}?")
    )
    named = ((x, (i,)), (a, (first,)), (b, (second,)))
    return Item("nearer", template.format(x=x, a=a, b=b), scene.objects[near].name, named, (near,))


def _chain(scene: Scene, rng: random.Random) -> Item | None:
    steps = _neighbours(scene)
    options = []
    for i, side, j in steps:
        options += [(i, side, rng.choice(_SIDES[then][0]), k) for o, then, k in steps if o == j and k != i]
        *_, (second, _), (most, k) = sorted((_distance(scene, j, k), k) for k in range(len(scene.objects)))
        if k != i and most >= second + FARTHEST_MARGIN:
            options.append((i, side, "farthest from", k))
    if not options:
        return None
    i, side, then, k = rng.choice(options)
    name = scene.objects[i].name
    template = rng.choice(("What is {} the object {} the {}?", "Which object is {} the object {} the {}?"))
    question = template.format(then, rng.choice(_SIDES[side][0]), name)
    return Item("chain", question, scene.objects[k].name, ((name, (i,)),), (k,))


def _beside(scene: Scene, rng: random.Random) -> Item | None:
    options = []
    for i, o in enumerate(scene.objects):
        for side, (_, offset) in _SIDES.items():
            ahead = {j: offset(p.x - o.x, p.y - o.y)[0] for j, p in enumerate(scene.objects) if j != i}
            if ahead and all(abs(a) > RELATION_SLACK for a in ahead.values()):
                options.append((i, side, [j for j, a in ahead.items() if a > 0]))
    if not options:
        return None
    i, side, there = rng.choice(options)
    others = [o for j, o in enumerate(scene.objects) if j != i]
    word = rng.choice([o.colour for o in others] + [o.shape for o in others]) if rng.random() < 0.7 else ""
    phrase = _plural(word) if word else "objects"
    hits = tuple(j for j in there if not word or word in (scene.objects[j].colour, scene.objects[j].shape))
    name = scene.objects[i].name
    template = rng.choice(("How many {} are {} the {}?", "How many {} do you see {} the {}?"))
    question = template.format(phrase, rng.choice(_SIDES[side][0]), name)
    named = ((name, (i,)), *(((phrase, hits),) if hits else ()))
    return Item("beside", question, NUMBERS[len(hits)], named, hits)


def _describe(scene: Scene, rng: random.Random) -> Item | None:
    question = rng.choice(("Describe the scene.", "Describe the picture.", "What do you see?"))
    phrases = [an(f"{o.size} {o.name}") for o in scene.objects]
    return Item("describe", question, "from left to right: " + _listed(phrases), (), tuple(range(len(phrases))))


def _listed(phrases: Sequence[str]) -> str:
    if len(phrases) == 1:
        return phrases[0]
    return ", ".join(phrases[:-1]) + " and " + phrases[-1]


_ASK: dict[str, Callable[[Scene, random.Random], Item | None]] = {
    "colour": _colour,
    "shape": _shape,
    "size": _size,
    "exists": _exists,
    "where": _where,
    "count": _count,
    "relation": _relation,
    "describe": _describe,
    "nearer": _nearer,
    "chain": _chain,
    "beside": _beside,
}
