"""Reads the programs in an engine file of TensorRT for RTX 1.7, where they are stored as text.

The file begins with "vtrt", its size, the library's version and a table of two sections. The first one holds the
programs, before the code of their kernels; the second one holds the weights, and is never read. Each optimization
profile has a program of version 5. Programs of version 4 are parts of them, which the library compiles on the device.

Sizes are bounded, and time grows with the file's size only. What is not as in the engines of 1.7 raises BundleError,
with what was found: another TensorRT, a file cut short, programs that are absent or compressed, an unknown statement.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from trol_edge.errors import BundleError
from trol_edge.program.model import Assignment, Kernel, Program, Tensor
from trol_edge.reading import guard, open_plain, printable

KNOWN = (1, 7)  # versions of the library whose text was seen
MOST_SECTION = 1 << 30  # bytes of a file that are searched for programs
MOST_TEXT = 32 << 20  # bytes of all programs; those of a traverse with 32 layers have a third of that
MOST_PROGRAMS = 16  # optimization profiles
MOST_MARKS = 100_000  # programs and their parts, of which a layer has ten
MOST_OPERANDS = 256  # of one kernel
DEPTH = 8  # of braces in each other
MARK, KIND = b"NLYM", bytes((0xA1, 0xDA, 0x1E, 0))
BLOCK = 1 << 20
ADVICE = "build the engine again with `trol-edge build --force`"
# Statements that move no data. Others have inputs and outputs, or are unknown.
SILENT = {"signal", "wait", "shape_call", "assert"}
FORMS = {"1": "pointwise", "8": "pointwise", "2": "reduction", "6": "attention", "7": "attention", "21": "scatter"}
_PROFILE = re.compile(r" \[profile \d{1,3}\]$")
_TOKEN = re.compile(r'"([^"]*)"|([{}=])|([^\s{}="]+)')


def read(path: Path) -> tuple[Program, ...]:
    """The program of each optimization profile of an engine file. Raises BundleError if it cannot be read as such."""
    with open_plain(path, BundleError, ADVICE) as file, guard(path, BundleError, ADVICE, "its program is not readable"):
        library, texts = _texts(file, path)
        try:
            return tuple(parse(text, library) for text in texts)
        except BundleError as error:
            raise BundleError(f"{path}: {error}; nothing is claimed about its program") from error


def _texts(file: BinaryIO, path: Path) -> tuple[str, list[str]]:
    """The library and the text of each program of version 5."""
    head = file.read(112)
    size = file.seek(0, 2)
    if head[:4] != b"vtrt":
        known = {b"ftrt": "an engine of classic TensorRT", b"ptrt": "an engine of an older TensorRT"}
        found = known.get(head[:4], f"begins with {printable(head[:4])[2:-1]!r}")
        raise BundleError(f"{path}: {found}; only programs of TensorRT for RTX 1.7 can be read from the file")
    version = tuple(head[24:27])
    if version[:2] != KNOWN:
        raise BundleError(
            f"{path}: an engine of TensorRT for RTX {'.'.join(map(str, version))}, whose format is unknown; "
            "programs of 1.7 can be read"
        )
    stated = int.from_bytes(head[16:24], "little")
    if len(head) < 112 or size != stated:
        raise BundleError(f"{path}: {size} bytes, but it says {stated}, so it is truncated or altered; {ADVICE}")
    start, length = (int.from_bytes(head[i : i + 8], "little") for i in (72, 80))
    if head[64:68] != b"NGNE" or start < 112 or start + length > size or length > MOST_SECTION:
        raise BundleError(f"{path}: its table of sections is not as in the engines of 1.7; {ADVICE}")
    texts: list[str] = []
    total = 0
    for number, place in enumerate(_marks(file, start, start + length)):
        if number == MOST_MARKS:
            raise BundleError(f"{path}: has more than {MOST_MARKS} parts of programs; {ADVICE}")
        file.seek(place + len(MARK) + len(KIND))
        count = int.from_bytes(file.read(8), "little")
        beginning = file.read(40)
        if not re.match(rb"header \{\s+version = 5\s", beginning):
            continue
        total += count
        if total > MOST_TEXT or place + 16 + count > start + length:
            raise BundleError(f"{path}: a program of {count} bytes does not fit its section, or is too large; {ADVICE}")
        if len(texts) == MOST_PROGRAMS:
            raise BundleError(f"{path}: has more than {MOST_PROGRAMS} programs; {ADVICE}")
        file.seek(place + 16)
        texts.append(file.read(count).decode("utf-8", "replace"))
    if not texts:
        raise BundleError(f"{path}: holds no program as text; it is absent or compressed")
    return f"TensorRT for RTX {'.'.join(map(str, version))}", texts


def _marks(file: BinaryIO, start: int, end: int) -> Iterator[int]:
    """The places at which programs begin, searched block by block."""
    wanted, before = MARK + KIND, b""
    place = start
    while place < end:
        file.seek(place)
        block = before + file.read(min(BLOCK, end - place))
        origin, at = place - len(before), block.find(wanted)
        while at >= 0:
            yield origin + at
            at = block.find(wanted, at + 1)
        place, before = origin + len(block), block[-(len(wanted) - 1) :]
        if len(block) < BLOCK and place < end:
            return  # the file became shorter


# -- the text ----------------------------------------------------------------------------------------------------------


class _Statement:
    """What is in one pair of braces: items with and without keys."""

    def __init__(self) -> None:
        self.items: list[tuple[str | None, str | _Statement]] = []

    def word(self, key: str, default: str = "") -> str:
        """The value of a key, if it is one word."""
        return next((value for k, value in self.items if k == key and isinstance(value, str)), default)

    def words(self, *keys: str) -> tuple[str, ...]:
        """The words in the braces of the first of these keys that is there."""
        for k, value in self.items:
            if k in keys and isinstance(value, _Statement):
                return tuple(word for key, word in value.items if key is None and isinstance(word, str))
        return ()

    def has(self, *keys: str) -> bool:
        return any(k in keys for k, _ in self.items)

    def parts(self) -> Iterator[tuple[str, _Statement]]:
        """The items that are statements, with their keys."""
        return ((key, value) for key, value in self.items if key is not None and isinstance(value, _Statement))


def _parse(text: str) -> _Statement:
    """The tree of braces of a text, in one pass."""
    stack = [_Statement()]
    key: str | None = None
    for match in _TOKEN.finditer(text):
        quoted, sign, word = match.groups()
        top = stack[-1].items
        if sign == "=":
            # The word before it was a key.
            if not top or top[-1][0] is not None or not isinstance(top[-1][1], str):
                raise BundleError(f"an = without a key at character {match.start()}")
            key = str(top.pop()[1])
        elif sign == "{":
            if key is None and len(stack) == 1 and top and top[-1][0] is None and isinstance(top[-1][1], str):
                key = str(top.pop()[1])  # a section, such as main { }
            inner = _Statement()
            top.append((key, inner))
            stack.append(inner)
            key = None
            if len(stack) > DEPTH:
                raise BundleError(f"more than {DEPTH} braces in each other at character {match.start()}")
        elif sign == "}":
            if len(stack) > 1:
                stack.pop()
            key = None
        else:
            top.append((key, quoted if quoted is not None else word))
            key = None
    if len(stack) > 1:
        raise BundleError(f"a program that ends inside {len(stack) - 1} braces")
    return stack[0]


def parse(text: str, library: str) -> Program:
    """A program from its text. Raises BundleError for a text with unknown statements."""
    sections = dict(_parse(text).parts())
    if lacking := {"header", "descriptors", "main"} - sections.keys():
        raise BundleError(f"a program without {', '.join(sorted(lacking))}")
    header, main = sections["header"], sections["main"]
    regions = {region.word("name"): region for key, region in header.parts() if key == "region"}
    inputs, outputs = ({_port(name): name for name in header.words(key)} for key in ("inputs", "outputs"))
    places = dict.fromkeys(outputs.values(), "output") | {
        name: "in place" if name in outputs.values() else "input" for name in inputs.values()
    }
    tensors: dict[str, Tensor] = {}
    for key, entry in sections["descriptors"].parts():
        if key not in ("tensor", "sub_tensor"):
            raise BundleError(f"an unknown descriptor {printable(key)[:40]!r}")
        tensor = _tensor(entry, regions, places, tensors)
        tensors[tensor.name] = tensor
    # A word of the section's own is a label, and a second label is a place to jump to.
    labels = [word for key, word in main.items if key is None and word == "label"]
    if len(labels) > 1:
        raise BundleError("a program with branches, whose order of kernels is not fixed")
    kernels = [_kernel(key, entry) for key, entry in main.parts() if key not in SILENT]
    for kernel in kernels:
        if unknown := [name for name in (*kernel.reads, *kernel.writes) if name not in tensors]:
            raise BundleError(f"kernel {kernel.name} uses {printable(unknown[0])[:80]}, which is not described")
    lines = sections.get("shape_main", _Statement())
    return Program(
        library=library,
        tensors=tensors,
        kernels=tuple(kernels),
        inputs=inputs,
        outputs=outputs,
        scratch_bytes=sum(_whole(r.word("size", "0")) for r in regions.values() if _is_scratch(r)),
        arithmetic=tuple(_assignment(key, entry) for key, entry in lines.parts() if key != "assert"),
        bounds=tuple(
            (entry.words("input")[0], " ".join(entry.word("msg").split())[:200])
            for key, entry in lines.parts()
            if key == "assert" and entry.words("input")
        ),
    )


def _port(name: str) -> str:
    """The name of a graph's input or output; the program adds a number, and the profile if it is not the first."""
    return _PROFILE.sub("", name.removesuffix(".1"))


def _whole(word: str) -> int:
    if not re.fullmatch(r"\d{1,15}", word):
        raise BundleError(f"{printable(word)[:40]!r} where a count is expected")
    return int(word)


def _is_scratch(region: _Statement) -> bool:
    return region.word("place") == "accelerator" and region.word("constant") != "true"


def _tensor(
    entry: _Statement, regions: dict[str, _Statement], places: dict[str, str], known: dict[str, Tensor]
) -> Tensor:
    name, base, payload = entry.word("name"), entry.word("base"), entry.word("const_payload_size")
    region = entry.word("region")
    if base:
        if base not in known:
            raise BundleError(f"tensor {printable(name)[:80]} is a part of {printable(base)[:80]}, which is unknown")
        place, base = known[base].place, known[base].base or base
    elif region in regions:
        where = regions[region]
        on_device = where.word("place") == "accelerator"
        place = "host" if not on_device else "constant" if where.word("constant") == "true" else "scratch"
    elif not region:
        place = "host" if entry.word("mem_prop") == "100" else places.get(name, "")
    else:
        place = ""
    if not name or not place:
        raise BundleError(f"tensor {printable(name)[:80]!r} is in an unknown place {printable(region)[:80]!r}")
    return Tensor(
        name=name,
        dims=tuple(_whole(word) if re.fullmatch(r"-?\d+", word) else word for word in entry.words("dims")),
        dtype=entry.word("type"),
        place=place,
        payload=_whole(payload) if payload else None,
        stored=f"{region}+{entry.word('offset')}" if payload else "",
        base=base,
    )


def _kernel(key: str, entry: _Statement) -> Kernel:
    reads, writes = ("input_args", "input"), ("output_args", "output")
    if not entry.has(*reads) or not entry.has(*writes):
        raise BundleError(f"an unknown statement {printable(key)[:40]!r}, which says neither input nor output")
    if max(len(entry.words(*reads)), len(entry.words(*writes))) > MOST_OPERANDS:
        raise BundleError(f"kernel {printable(entry.word('name'))[:80]} has more than {MOST_OPERANDS} operands")
    parts = entry.word("layers").split("[ONNX Layer: ")[1:]
    layers = [_PROFILE.sub("", part.rstrip("\x1f").removesuffix("]")) for part in parts]
    return Kernel(
        what=key,
        name=entry.word("name"),
        reads=entry.words(*reads),
        writes=entry.words(*writes),
        form=FORMS.get(entry.word("kernel_kind"), ""),
        layers=tuple(layers),
    )


def _assignment(key: str, entry: _Statement) -> Assignment:
    source = re.match(r"-?\d{1,19}", entry.word("src"))
    constant = int(source[0]) if key == "memset" and source else None
    output = entry.words("output")
    return Assignment(key, output[0] if output else "", entry.words("input"), constant)
