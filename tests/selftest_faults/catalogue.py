"""The faults: what is changed in a bundle, and what the self-test has to name."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from trol_edge.bundle.derived import NBITS, NBITS_SCALE
from trol_edge.bundle.folder import digest_of, sha256_of
from trol_edge.bundle.manifest import Bundle
from trol_edge.bundle.names import MANIFEST, TOKENIZER, WEIGHTS
from trol_edge.bundle.weights import WeightsFile

STORED = {"F16": np.uint16, "BF16": np.uint16, "F32": np.uint32, "I8": np.int8, "U8": np.uint8, "F8_E4M3": np.uint8}
E4M3 = np.array(
    [
        (-1.0) ** (b >> 7)
        * ((b & 7) / 8 * 2.0**-6 if not b >> 3 & 15 else (1 + (b & 7) / 8) * 2.0 ** ((b >> 3 & 15) - 7))
        for b in range(256)
    ]
)


@dataclasses.dataclass(frozen=True)
class Fault:
    """One fault. place: a pattern that the name of the first wrong stage has to fit."""

    kind: str
    what: str
    place: str
    plant: Callable[[Path], None]


def rehash(folder: Path, *names: str, **changes: Any) -> None:
    """Write the manifest again, with the present hashes of these files, and with fields changed."""
    data = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    del data["manifest_sha256"]
    for name in names:
        path = folder / name
        data["files"][name] = {"bytes": path.stat().st_size, "sha256": sha256_of(path)}
    for field, value in changes.items():
        data[field] = json.loads(json.dumps(dataclasses.asdict(value)))
    data["manifest_sha256"] = digest_of(data)
    (folder / MANIFEST).write_text(json.dumps(data), encoding="utf-8")


def faults(folder: Path, seed: int) -> Iterator[Fault]:
    """Every fault of a bundle's files, whatever runs it."""
    bundle = Bundle(folder)
    tensors, spec = bundle.weights().tensors, bundle.manifest.spec
    rng = np.random.default_rng(seed)
    linears = sorted(name for name in bundle.manifest.plan.linears if _present(name, tensors))
    for name in linears:
        place, draw = _place(name, spec), int(rng.integers(1 << 30))
        yield Fault("a large weight's sign", name, place, partial(flip, name=name, draw=draw))
    scaled = [name for name in linears if _scale(name, tensors)] or [n for n in linears if "lora" not in n]
    for name in scaled:
        draw = int(rng.integers(1 << 30))
        yield Fault("scales off by 10 %", name, _place(name, spec), partial(scale, name=name, draw=draw))
    for i in range(spec.num_layers):
        name = f"decoder.layers.{i}.qkv.weight"
        yield Fault("K and V swapped", name, _place(name, spec), partial(swap, name=name))
        for part in ("qkv", "out", "mlp.down"):
            name, other = (
                f"decoder.layers.{i}.{part}.weight",
                f"decoder.layers.{(i + 1) % spec.num_layers}.{part}.weight",
            )
            if _same(name, other, tensors):
                yield Fault("another layer's weights", name, _place(name, spec), partial(take, name=name, other=other))
    yield Fault("rope off by one", "both tables", r"^rope$", rope)
    yield Fault("the gate's sign", "decoder.gate.weight", "gate", partial(negate, name="decoder.gate.weight"))
    image, prompt = bundle.manifest.image, bundle.manifest.prompt
    pictures: dict[str, dict[str, Any]] = {
        "channels in another order": {"mean": image.mean[::-1], "std": image.std[::-1]},
        "0.5 for mean and deviation": {"mean": (0.5,) * 3, "std": (0.5,) * 3},
        "a deviation off by 5 %": {"std": tuple(s * 1.05 for s in image.std)},
    }
    for what, change in pictures.items():
        changed = dataclasses.replace(image, **change)
        yield Fault("picture settings", what, r"^preprocess$", partial(rehash, image=changed))
    templates: dict[str, dict[str, Any]] = {
        "a letter more": {"before_question": prompt.before_question + "x"},
        "another system text": {"system": prompt.system[:-1]},
        "a word after the question": {"after_question": " Please." + prompt.after_question},
    }
    for what, change in templates.items():
        template = dataclasses.replace(prompt, **change)
        yield Fault("prompt template", what, r"^prompt$", partial(rehash, prompt=template))
    for i in range(4):
        yield Fault("tokenizer merges", f"merge {i}", r"^tokenizer$", partial(merges, number=i))


# -- where a tensor is -----------------------------------------------------------------------------------------------


def _place(name: str, spec: Any) -> str:
    """What the stage that finds a fault of this parameter has to name."""
    layer = re.match(r"(vision|decoder)\.layers\.(\d+)\.(\S+?)\.", name + ".")
    if name.startswith("vision.proj"):
        return r"projector"
    if name == "decoder.lm_head.weight":
        return "output_layer"
    assert layer is not None, name
    if layer[1] == "vision":
        last = layer[3] == "fc2" and int(layer[2]) == spec.vision.num_layers - 1
        return rf"vision\.layers\.{layer[2]}(\.|$)" + (r"|vision\.features" if last else "")
    return rf"^(?!.*vision).*layers\.{layer[2]}(\.|$)"


def _present(name: str, tensors: Any) -> bool:
    return name in tensors or name + NBITS in tensors


def _scale(name: str, tensors: Any) -> str:
    """Name of the tensor with a Linear's scales, or ""."""
    return next((n for n in (f"{name}.scale", name + NBITS_SCALE) if n in tensors), "")


def _same(one: str, other: str, tensors: Any) -> bool:
    """Whether two Linears are stored alike."""
    forms = [
        [
            (s, tensors[n + s].dtype, tensors[n + s].shape)
            for s in ("", ".scale", NBITS, NBITS_SCALE)
            if n + s in tensors
        ]
        for n in (one, other)
    ]
    return forms[0] == forms[1] and one != other


def stored(folder: Path, name: str) -> Any:
    """A stored tensor, to be changed in place."""
    info = WeightsFile(folder / WEIGHTS).tensors[name]
    return np.memmap(folder / WEIGHTS, STORED[info.dtype], "r+", info.offset, info.shape)


# -- the changes -----------------------------------------------------------------------------------------------------


def flip(folder: Path, name: str, draw: int) -> None:
    """Change the sign of one weight of the largest hundredth."""
    tensors = WeightsFile(folder / WEIGHTS).tensors
    packed = name + NBITS in tensors
    array = stored(folder, name + NBITS if packed else name)
    info = tensors[name + NBITS if packed else name]
    if info.dtype == "U8":  # 4 bits: with 8 added if packed for a CPU, else as two's complement
        nibbles = np.stack((array & 15, array >> 4), -1).astype(np.int16)
        values = nibbles - 8 if packed else (nibbles ^ 8) - 8
        factors = stored_floats(folder, _scale(name, tensors))
        if packed:
            sized = np.abs(values.reshape(array.shape[0], array.shape[1], -1)) * factors.reshape(*array.shape[:2], 1)
        else:
            wide = values.reshape(array.shape[0], -1)
            sized = np.abs(wide) * np.repeat(factors, array.shape[0] // factors.shape[0], 0)
        at = _large(sized.reshape(-1), draw)
        value = min(7, -int(values.reshape(-1)[at]))
        new = value + 8 if packed else value & 15
        byte, half = divmod(at, 2)
        flat = array.reshape(-1)
        flat[byte] = (flat[byte] & 0x0F) | new << 4 if half else (flat[byte] & 0xF0) | new
    else:
        values = stored_floats(folder, name)
        factor = stored_floats(folder, f"{name}.scale") if f"{name}.scale" in tensors else 1.0
        at = _large((np.abs(values) * factor).reshape(-1), draw)
        flat = array.reshape(-1)
        if info.dtype == "I8":
            flat[at] = -flat[at]
        else:
            flat[at] ^= flat.dtype.type(1 << 8 * flat.dtype.itemsize - 1)
    array.flush()
    rehash(folder, WEIGHTS)


def stored_floats(folder: Path, name: str) -> Any:
    """The numbers of a stored tensor."""
    file = WeightsFile(folder / WEIGHTS)
    values = file.load([name])[name]
    return E4M3[values] if file.tensors[name].dtype == "F8_E4M3" else values.astype(np.float32)


def _large(sizes: Any, draw: int) -> int:
    """One of the largest hundredth."""
    order = np.argsort(sizes, kind="stable")[-max(1, len(sizes) // 100) :]
    return int(order[draw % len(order)])


def scale(folder: Path, name: str, draw: int) -> None:
    """Multiply scales by 1.1: all of a Linear's, or those of one output; without scales, the weights of one output."""
    tensors = WeightsFile(folder / WEIGHTS).tensors
    found = _scale(name, tensors)
    info = tensors[found or name]
    array = stored(folder, found or name)
    floats = array.view({"F16": "<f2", "F32": "<f4"}[info.dtype])
    outputs = tensors[name + NBITS].shape[0] if found.endswith(NBITS_SCALE) else info.shape[-1]
    by_output = floats.reshape(outputs, -1).T if found.endswith(NBITS_SCALE) else floats.reshape(-1, outputs)
    columns = slice(None) if draw % 2 and found else draw // 2 % outputs
    by_output[:, columns] = (by_output[:, columns].astype(np.float32) * np.float32(1.1)).astype(floats.dtype)
    array.flush()
    rehash(folder, WEIGHTS)


def swap(folder: Path, name: str) -> None:
    """Exchange the outputs of keys and of values."""
    spec, tensors = Bundle(folder).manifest.spec, WeightsFile(folder / WEIGHTS).tensors
    q, kv = spec.num_heads * spec.head_dim, spec.num_kv_heads * spec.head_dim
    outputs = q + 2 * kv
    for suffix in ("", ".scale", NBITS, NBITS_SCALE):
        if name + suffix not in tensors:
            continue
        array = stored(folder, name + suffix)
        if suffix in (NBITS, NBITS_SCALE):
            rows = array.reshape(outputs, -1)
            rows[q:] = np.concatenate((rows[q + kv :], rows[q : q + kv]))
        else:
            per = outputs // array.shape[-1]  # two 4-bit outputs share a byte
            a, b = q // per, (q + kv) // per
            array[..., a:] = np.concatenate((array[..., b:], array[..., a:b]), axis=-1)
        array.flush()
    rehash(folder, WEIGHTS)


def take(folder: Path, name: str, other: str) -> None:
    """Give a Linear the weights and scales of another."""
    tensors = WeightsFile(folder / WEIGHTS).tensors
    for suffix in ("", ".scale", NBITS, NBITS_SCALE):
        if name + suffix in tensors:
            array = stored(folder, name + suffix)
            array[:] = stored(folder, other + suffix)
            array.flush()
    rehash(folder, WEIGHTS)


def negate(folder: Path, name: str) -> None:
    """Change the sign of every number."""
    array = stored(folder, name)
    array ^= array.dtype.type(1 << 8 * array.dtype.itemsize - 1)
    array.flush()
    rehash(folder, WEIGHTS)


def rope(folder: Path) -> None:
    """Move the rotary tables by one position."""
    for name in ("rope.cos", "rope.sin"):
        array = stored(folder, name)
        array[:-1] = array[1:].copy()
        array.flush()
    rehash(folder, WEIGHTS)


def merges(folder: Path, number: int) -> None:
    """Exchange two merges of the tokenizer."""
    path = folder / TOKENIZER
    data = json.loads(path.read_text(encoding="utf-8"))
    rules = data["model"]["merges"]
    at = (number + 1) * len(rules) // 6
    rules[at], rules[at + 1] = rules[at + 1], rules[at]
    path.write_text(json.dumps(data, ensure_ascii=False), encoding="utf-8")
    rehash(folder, TOKENIZER)
