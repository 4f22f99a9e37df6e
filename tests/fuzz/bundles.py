"""Bundles that were damaged, or changed by somebody who gave them hashes that fit."""

from __future__ import annotations

import contextlib
import io
import json
import os
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import onnx_ir as ir

from tests.conftest import NANOS
from tests.fuzz.damage import (
    altered,
    json_text,
    with_another_header,
    with_another_node,
    with_other_numbers,
)
from tests.fuzz.growth import GROWTHS, grow
from tests.fuzz.material import QUESTION, TEXT_QUESTION, bundle, copy, remove, replace, scene, seal
from tests.fuzz.workers import say
from trol_edge import Runtime
from trol_edge.bundle import engines
from trol_edge.bundle.manifest import Bundle
from trol_edge.bundle.names import MANIFEST, SELFTEST, TOKENIZER, WEIGHTS
from trol_edge.cli.main import main
from trol_edge.reading import read_json
from trol_edge.verify.replay import verify

GRAPHS = ("vision.onnx", "traverse.onnx", "traverse_text.onnx", "step.onnx")


class Trials:
    """Opens, asks and inspects bundles."""

    def __init__(self, place: Path) -> None:
        self.place = place
        self.sound = {model: copy(bundle(model), place / model) for model in NANOS}
        self.answers: dict[str, list[str]] = {}
        for model, folder in self.sound.items():
            self.answers[model] = self.ask(folder, model, False)

    def trial(self, rng: Random) -> str:
        """One damage, one way to use the bundle."""
        model = rng.choice(NANOS)
        folder = copy(self.sound[model], self.place / "changed", link=True)
        kinds: list[Callable[[Path, Random], bool]] = [
            self.damaged, self.manifest, self.manifest, self.manifest, self.weights, self.graph_bytes, self.graph,
            self.graph, self.graph, self.growth, self.growth, self.tokenizer, self.tokenizer, self.selftest,
            self.other_file, self.engine_list,
        ]  # fmt: skip
        kind = rng.choice(kinds)
        sealed = kind(folder, rng)
        how = rng.randrange(10)
        say(f"{model}: {kind.__name__}, {'new hashes' if sealed else 'old hashes'}, used in way {how}")
        if how == 0:
            return self.inspected(folder)
        if how == 1 or kind == self.selftest:
            verify(folder, threads=1)
            return "answered"
        answers = self.ask(folder, model, rng.random() < 0.2)
        if not sealed and kind != self.engine_list:
            assert answers == self.answers[model], f"{answers} instead of {self.answers[model]}"
        return "answered"

    def ask(self, folder: Path, model: str, selftest: bool) -> list[str]:
        """Answers of a bundle, with a picture and without."""
        with Runtime(folder, threads=1, selftest=selftest) as rt:
            found = [
                rt.generate(QUESTION, scene(model), max_new_tokens=6),
                rt.generate(TEXT_QUESTION, max_new_tokens=6),
            ]
            size = rt.bundle.manifest.spec.vocab_size
        for answer in found:
            assert answer.finish_reason in ("stop", "length", "context"), answer.finish_reason
            assert all(0 <= token < size for token in answer.token_ids), answer.token_ids
        return [answer.text for answer in found]

    def inspected(self, folder: Path) -> str:
        """What the command line says about it: exit code 0 or 1, and JSON."""
        for words in (["inspect", str(folder), "--json"], ["doctor", str(folder), "--json"]):
            said = io.StringIO()
            with contextlib.redirect_stdout(said), contextlib.redirect_stderr(io.StringIO()):
                code = main(words)
            assert code in (0, 1), f"{words[0]} ends with {code}"
            json.loads(said.getvalue())
        return "answered"

    # Each changes a bundle's files and returns whether their hashes fit again.

    def damaged(self, folder: Path, rng: Random) -> bool:
        """Bytes of any file; hashes stay."""
        path = rng.choice(sorted(folder.iterdir()))
        replace(path, altered(path.read_bytes(), rng))
        return False

    def manifest(self, folder: Path, rng: Random) -> bool:
        """Nodes of the manifest, and the text of it."""
        data = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        for _ in range(rng.choice([1, 1, 1, 2, 4])):
            changed = with_another_node(data, rng)
            data = changed if isinstance(changed, dict) else data
        text = json_text(data, rng)
        replace(folder / MANIFEST, text)
        with contextlib.suppress(Exception):  # what is no JSON any more has no hash
            seal(folder)
        return True

    def weights(self, folder: Path, rng: Random) -> bool:
        """The header or the numbers of the weights."""
        path = folder / WEIGHTS
        change = rng.choice([with_another_header, with_other_numbers, altered])
        replace(path, change(path.read_bytes(), rng))
        seal(folder)
        return True

    def graph_bytes(self, folder: Path, rng: Random) -> bool:
        """Bytes of a graph."""
        path = folder / rng.choice([name for name in GRAPHS if (folder / name).exists()])
        replace(path, altered(path.read_bytes(), rng))
        seal(folder)
        return True

    def graph(self, folder: Path, rng: Random) -> bool:
        """A graph with other shapes, operators, numbers or connections; the manifest says so, too."""
        name = rng.choice([name for name in GRAPHS if (folder / name).exists()])
        model = ir.load(folder / name)
        for _ in range(rng.choice([1, 1, 2])):
            change_graph(model.graph, rng)
        self.write_graph(folder, name, model)
        return True

    def growth(self, folder: Path, rng: Random) -> bool:
        """A graph whose tensors grow, by a little or without an end; at times it is changed otherwise, too."""
        name = rng.choice([name for name in GRAPHS[1:] if (folder / name).exists()])
        model = ir.load(folder / name)
        for _ in range(rng.choice([1, 1, 2])):
            grow(model, rng.choice(list(GROWTHS)), rng.choice([1, 2, 7, 2**8, 2**12, 2**16, 2**20, 2**31, 2**40]))
        if rng.random() < 0.3:
            change_graph(model.graph, rng)
        self.write_graph(folder, name, model)
        return True

    def write_graph(self, folder: Path, name: str, model: ir.Model) -> None:
        """Write a graph, and let the manifest agree."""
        replace(folder / name, ir.to_proto(model).SerializeToString())
        data = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        operators: dict[str, int] = {}
        for node in model.graph:
            operators[node.op_type] = operators.get(node.op_type, 0) + 1
        for info in data["graphs"].values():
            if info["file"] == name:
                info["operators"] = operators
        replace(folder / MANIFEST, json.dumps(data).encode())
        seal(folder)

    def tokenizer(self, folder: Path, rng: Random) -> bool:
        """The tokenizer: nodes, patterns, text."""
        path = folder / TOKENIZER
        data = json.loads(path.read_text(encoding="utf-8"))
        if rng.random() < 0.3:
            pattern = rng.choice(
                ["(a+)+$", "(.*)*", "(x+x+)+y", "(?:a|a)*b", "(?=(a+))\\1b", "[", ".{65535}", "\\p{L}+"]
            )
            one = {"type": "Replace", "pattern": {"Regex": pattern}, "content": rng.choice(["", "a" * 1000, "\\1"])}
            split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
            if rng.random() < 0.5:
                data["normalizer"] = {"type": "Sequence", "normalizers": [one] * rng.choice([1, 1, 20])}
            else:
                data["pre_tokenizer"] = split
        for _ in range(rng.choice([0, 1, 1, 2])):
            part = rng.choice([key for key in data if isinstance(data[key], (dict, list))] or [None])
            if part is None or rng.random() < 0.3:
                changed = with_another_node(data, rng)
                data = changed if isinstance(changed, dict) else data
            else:
                data[part] = with_another_node(data[part], rng)
        replace(path, json_text(data, rng))
        seal(folder)
        return True

    def selftest(self, folder: Path, rng: Random) -> bool:
        """The self-test."""
        path = folder / SELFTEST
        change = rng.choice([with_another_header, with_other_numbers, altered])
        replace(path, change(path.read_bytes(), rng))
        seal(folder)
        return True

    def other_file(self, folder: Path, rng: Random) -> bool:
        """A link, a pipe, a folder, nothing or another file of the bundle in place of a file."""
        path = rng.choice(sorted(folder.iterdir()))
        remove(path)
        how = rng.randrange(6)
        if how == 0:
            path.symlink_to(
                rng.choice(["/etc/hostname", "/dev/zero", "/dev/stdin", "/proc/self/mem", path.name, "nowhere"])
            )
        elif how == 1:
            path.symlink_to(self.sound[NANOS[0]] / path.name)
        elif how == 2:
            os.mkfifo(path)
        elif how == 3:
            path.mkdir()
        elif how == 4:
            other = rng.choice([p for p in sorted(folder.iterdir()) if p != path])
            replace(path, other.read_bytes())
            if rng.random() < 0.5 and path.name != MANIFEST:
                seal(folder)
                return True
        return False

    def engine_list(self, folder: Path, rng: Random) -> bool:
        """A list of engines that somebody wrote."""
        target = folder / "engines" / "cpu"
        remove(folder / "engines")
        target.mkdir(parents=True)
        one = engines.EngineInfo("step.engine", 1, "", "", 0, {}, (), 0.0)
        listed = engines.EngineSet(
            2, "", engines.Key("cpu", "", "", "", ""), "", "", dict.fromkeys(engines.ENGINES, one)
        )
        engines.write(target, listed)
        path = target / engines.MANIFEST
        data = with_another_node(read_json(path), rng)
        replace(path, json_text(data, rng))
        opened = Bundle(folder)
        found = engines.read(opened, "cpu")
        engines.differences(opened, found, found.key)
        engines.verified(opened, found, "step")
        return False


def change_graph(graph: Any, rng: Random) -> None:
    """One change of a graph that keeps to operators which export writes."""
    nodes = list(graph)
    node = rng.choice(nodes)
    how = rng.randrange(8)
    if how == 0 and len(node.inputs):  # read another value
        values = [*graph.inputs, *graph.initializers.values(), *(out for n in nodes for out in n.outputs)]
        node.replace_input_with(rng.randrange(len(node.inputs)), rng.choice(values))
    elif how == 1:  # other numbers in a constant
        constants = [v for v in graph.initializers.values() if v.const_value is not None and v.const_value.size < 64]
        constants = [v for v in constants if not isinstance(v.const_value, ir.ExternalTensor)]
        if constants:
            value = rng.choice(constants)
            array = np.array(value.const_value.numpy())
            if array.size:
                large = [0, -1, 1, 2**20, 2**31 - 1] if array.dtype.itemsize == 4 else [0, -1, 2**24, 2**33, 2**62]
                array.reshape(-1)[rng.randrange(array.size)] = rng.choice(large if array.dtype.kind == "i" else [0, 1])
            value.const_value = ir.tensor(array, name=value.name)
    elif how == 2 and node.attributes:  # another attribute
        name = rng.choice(list(node.attributes))
        old = node.attributes[name]
        if old.type in (ir.AttributeType.INT, ir.AttributeType.INTS):
            number = rng.choice([0, -1, 1, 2, 7, 2**31, -(2**31), 2**62])
            whole = old.type == ir.AttributeType.INT
            node.attributes[name] = (
                ir.AttrInt64(name, number) if whole else ir.AttrInt64s(name, [number] * len(old.value))
            )
        elif old.type == ir.AttributeType.FLOAT:
            node.attributes[name] = ir.AttrFloat32(name, rng.choice([0.0, -1.0, float("inf"), float("nan"), 1e38]))
    elif how == 4:
        nodes_in = [n for n in nodes if len(n.inputs) > 1]
        other = rng.choice(nodes_in or nodes)
        if len(other.inputs) > 1:
            first, second = other.inputs[0], other.inputs[1]
            other.replace_input_with(0, second)
            other.replace_input_with(1, first)
    elif how == 5 and node.op_type in ("Add", "Mul", "Sub", "Div", "Max", "Min", "Pow"):
        node.op_type = rng.choice(["Add", "Mul", "Sub", "Div", "Max", "Min", "Pow"])
    else:  # another operator, with no or an old opset
        node.op_type = rng.choice(
            ["MatMul", "Concat", "Reshape", "Expand", "Range", "Gather", "Identity", "Softmax", "Cast"]
        )
