"""The prose of the code reads once, as far as a machine can tell: help texts, docstrings, comments and messages."""

from __future__ import annotations

import ast
import io
import re
import tokenize
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
# Folders of the code whose prose is checked.
PRODUCT = ("trol_edge", "export", "calibration", "runtimes", "deploy", "tests/bench")
# The project's old dialect -> plain English. Words of the pattern count in prose only, not in names of the code.
DIALECT = {
    r"behind": "after",
    r"so many|so long(?! as)": "a number, or the name of the argument",
    r"lies|lie(?= in| on| at| under| beside)": "is, are",
    r"stands?(?! for\b|-in)": "is, are",
    r"told": "given, reported",
    r"made of": "made from",
    r"the other one's": "its name",
    r"in one go": "as a whole",
    r"to the letter": "exactly",
    r"(?:go|goes|going|went) over to": "change to",
    r"under way": "running, current",
    r"anew": "again",
}
WORDS = {re.compile(rf"\b(?:{pattern})\b", re.IGNORECASE): plain for pattern, plain in DIALECT.items()}
# A docstring or a help text that begins like this has neither a subject nor a verb.
HEADLESS = re.compile(r"(?:Of|As|Behind|Beyond)\s")
# A default that the command line cannot show by itself follows the sentence.
DEFAULT = re.compile(r"\s*(?:\[default: .*\]|\(default: .*\)\.)$", re.DOTALL)


def files() -> list[str]:
    """The Python files whose prose is checked, by their paths from the root; without links to other rooms."""
    found = (path for folder in PRODUCT for path in sorted((ROOT / folder).rglob("*.py")))
    return [path.relative_to(ROOT).as_posix() for path in found]


def text_of(node: ast.expr) -> str | None:
    """The text of a string or f-string, with {} for what it fills in; None for another expression."""
    if isinstance(node, ast.Constant):
        return node.value if isinstance(node.value, str) else None
    if isinstance(node, ast.JoinedStr):
        return "".join(str(part.value) if isinstance(part, ast.Constant) else "{}" for part in node.values)
    return None


def prose(source: str) -> Iterator[tuple[int, str, str]]:
    """Line, kind and text of all prose in a source: "help", "docstring", "comment" and other texts of several words."""
    tree = ast.parse(source)
    taken: set[int] = set()
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            first = node.body[0] if node.body else None
            if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant) and ast.get_docstring(node):
                taken.add(id(first.value))
                yield first.lineno, "docstring", str(ast.get_docstring(node))
        elif isinstance(node, ast.keyword) and node.arg == "help" and (text := text_of(node.value)) is not None:
            taken.update(id(part) for part in ast.walk(node.value))
            yield node.value.lineno, "help", text
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            taken.update(id(part) for part in node.values)
        if isinstance(node, (ast.Constant, ast.JoinedStr)) and id(node) not in taken:
            text = text_of(node)
            if text and len(re.findall(r"[A-Za-z]{2,}", text)) > 2 and " " in text.strip():
                yield node.lineno, "text", text
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            yield token.start[0], "comment", token.string.lstrip("#! ")


def breaches(source: str, file: str) -> list[str]:
    """What in a source is not said in plain English, and what to say instead."""
    found = []
    for line, kind, text in prose(source):
        where, shown = f"{file}:{line}: {kind}", re.sub(r"`[^`]*`|\{[^{}]*\}|\"[^\"]*\"", "''", text)
        for pattern, plain in WORDS.items():
            found += [f"{where} says {match[0]!r}; say {plain}" for match in pattern.finditer(shown)]
        if kind in ("docstring", "help") and HEADLESS.match(text):
            found.append(f"{where} {text[:30]!r} has no subject and no verb")
        if kind == "help":
            sentence = DEFAULT.sub("", text)
            if not sentence or not (sentence[0].isupper() or sentence.startswith("{}")):
                found.append(f"{where} {text[:30]!r} does not begin with a capital letter")
            if not (sentence.endswith(".") or text.endswith(").")):
                found.append(f"{where} {text[:30]!r} does not end with a full stop")
    return found


def test_prose_reads_once() -> None:
    """No file of the product breaks the rule."""
    assert len(files()) > 100  # otherwise the folders have moved
    found = [line for file in files() for line in breaches((ROOT / file).read_text(encoding="utf-8"), file)]
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ('def f() -> None:\n    """Of the sampling."""', "file.py:2: docstring 'Of the sampling.' has no subject"),
        ('def f() -> None:\n    """As generate, in pieces."""', "has no subject and no verb"),
        ('class C:\n    """Logits\n\n    behind the prompt.\n    """', "file.py:2: docstring says 'behind'; say after"),
        ("x = 1  # so many tokens", "file.py:1: comment says 'so many'"),
        ("x = 1  # it stands there", "comment says 'stands'"),
        ('raise ValueError(f"{1}: the file lies beside it")', "text says 'lies'"),
        ('raise ValueError(\n    f"the size {1} "\n    "is told by nobody"\n)', "text says 'told'"),
        ('o(help="Of the sampling.")', "help 'Of the sampling.' has no subject and no verb"),
        ('o(help="sampling seed.")', "does not begin with a capital letter"),
        ('o(help="Sampling seed")', "does not end with a full stop"),
        ('o(help="Sampling seed  [default: 1]")', "does not end with a full stop"),
        ('o(help="Numbers made of others.")', "help says 'made of'; say made from"),
    ],
)
def test_a_breach_is_found(source: str, said: str) -> None:
    """Each planted breach is reported, with its place."""
    assert any(said in line for line in breaches(source, "file.py")), breaches(source, "file.py")


def test_plain_prose_is_no_breach() -> None:
    """Names of the code, quotations and ordinary uses of the words pass."""
    source = '''
"""Logits after the prompt; `_behind` and "behind" are names here, and -1 stands for none."""
def behind(told: int) -> str:  # as long as it is needed
    return o(help="Sampling seed.  [default: a new one]") + o(help=f"Exports at a time.  [default: {told}]")
'''
    assert not breaches(source, "file.py")
