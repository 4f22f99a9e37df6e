"""Make tests/data/golden out of the full golden data: python -m tests.pack_golden FULL. With --check it only says
whether what is there is what it would make. The README there says what is left out, and why. Every array that is kept,
and every part of one, has the bits of the original."""

from __future__ import annotations

import json
import lzma
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors.numpy import load_file, save, save_file

Array = npt.NDArray[Any]
HERE = Path(__file__).resolve().parent / "data" / "golden"
WEIGHTS, DECODER = "model.safetensors", "decoder.safetensors"
# Runs that are not packed. `*-flash` differs from its twin only where padding is looked at, which we never do; `long`
# is `main` again with more tokens; the picture of dynamic-rope stands beyond the positions we serve.
LEFT_OUT = {
    "internlm2-dynamic-rope": ("image",),
    "internlm2-leftpad-batch": ("text-flash", "images-flash", "mixed-flash"),
    "internlm2-text": ("long",),
    "phi3-text": ("long",),
}
# Cases without pictures: nothing in them reads the tower, its projector or the LoRA of image tokens. `unpack` takes
# those from a case of the same sizes.
TEXT_ONLY = {
    "internlm2-dynamic-rope": "internlm2-gqa-image",
    "internlm2-text": "internlm2-gqa-image",
    "phi3-text": "phi3-tile1",
}
# Pixels follow from the picture: case.json has the sha256 of all of them.
PIXELS = ("pixel_u8", "pixel_values_s7")
POSITIONS = 12  # of a prompt, besides those at its ends and at the ends of its pictures
VISION_ROWS = 16  # image tokens of a picture or tile
LAST = 4  # positions of prefill_logits, counted from the end
AXES = {
    "embeds": (1, "positions"),
    "hidden": (2, "positions"),
    "hidden_o1": (2, "positions_o"),
    "hidden_o2": (2, "positions_o"),
    "final_norm": (1, "positions_o"),
    **{f"{kind}{layer}": (2, "positions") for kind in "kv" for layer in (0, 2)},
    "vision_features": (1, "vision_rows"),
    "projector": (1, "vision_rows"),
}


def reads_text(name: str) -> bool:
    """Whether a tensor of a checkpoint is read where there is no picture."""
    return not name.startswith(("vit.", "vision_")) and ".lora_" not in name


def positions(stored: Array, inputs: dict[str, Array], image_token: int) -> Array:
    """Of the stored positions of a run: both ends of each prompt and of its pictures, and some in between."""
    chosen: set[int] = set()
    for ids, mask in zip(inputs["input_ids"], inputs["attention_mask"], strict=True):
        first, end = int(mask.argmax()), len(ids)
        image = np.flatnonzero(np.diff((ids == image_token).astype(np.int8)))
        chosen |= {first, first + 1, end - 2, end - 1, *image.tolist(), *(image + 1).tolist()}
        chosen |= set(np.linspace(first, end - 1, POSITIONS // len(inputs["input_ids"]), dtype=int).tolist())
    nearest = [int(np.abs(stored - position).argmin()) for position in sorted(chosen)]
    return stored[sorted(set(nearest))]


def pack_run(inputs: dict[str, Array], expected: dict[str, Array], image_token: int) -> None:
    """Shorten one run in place."""
    for name in PIXELS:
        expected.pop(name, None)
    kept = positions(np.intersect1d(inputs["positions"], inputs["positions_o"]), inputs, image_token)
    index = {name: np.flatnonzero(np.isin(inputs[name], kept)) for name in ("positions", "positions_o")}
    if "projector" in expected:
        rows = expected["projector"].shape[1]
        inputs["vision_rows"] = np.linspace(0, rows - 1, VISION_ROWS, dtype=np.int64)
        index["vision_rows"] = inputs["vision_rows"]
    for name, (axis, along) in AXES.items():
        if name in expected:
            expected[name] = expected[name].take(index[along], axis)
    inputs |= {name: inputs[name][index[name]] for name in ("positions", "positions_o")}
    expected["prefill_logits"] = expected["prefill_logits"][:, -LAST:]


def pack_case(full: Path, out: Path) -> None:
    """One case folder."""
    out.mkdir()
    case = json.loads((full / "case.json").read_text(encoding="utf-8"))
    runs = [run for run in case["runs"] if run["name"] not in LEFT_OUT.get(full.name, ())]
    arrays = {which: dict(np.load(full / f"{which}.npz")) for which in ("inputs", "expected")}
    packed: dict[str, dict[str, Array]] = {which: {} for which in arrays}
    for run in runs:
        parts = {
            which: {key.split("/")[1]: a for key, a in found.items() if key.startswith(f"{run['name']}/")}
            for which, found in arrays.items()
        }
        pack_run(parts["inputs"], parts["expected"], run["image_token_index"])
        for which, part in parts.items():
            packed[which] |= {f"{run['name']}/{key}": array for key, array in part.items()}
    if "clip_pos_35" in arrays["expected"]:
        rows = np.arange(0, len(arrays["expected"]["clip_pos_35"]), 19)
        packed["inputs"] |= {"clip_pos_24": arrays["inputs"]["clip_pos_24"], "clip_pos_35_rows": rows}
        packed["expected"]["clip_pos_35"] = arrays["expected"]["clip_pos_35"][rows]
    for which, found in packed.items():
        np.savez_compressed(out / f"{which}.npz", **found)
    # What the file says about each array (`inputs.npz`, `expected.npz`) is true of the full data only.
    kept = {key: value for key, value in case.items() if not key.endswith(".npz")} | {"runs": runs}
    (out / "case.json").write_text(json.dumps(kept, indent=1) + "\n", encoding="utf-8")
    pictures = sorted({name for run in runs for row in run["images"] for name in row})
    for name in ("config.json", "clip_vision_config.json", "trol_gating.pt", *pictures):
        if (full / name).exists():
            shutil.copyfile(full / name, out / name)
    if full.name in TEXT_ONLY:
        weights = load_file(full / WEIGHTS)
        compress(save({name: array for name, array in weights.items() if reads_text(name)}), out / DECODER)
    else:
        compress((full / WEIGHTS).read_bytes(), out / WEIGHTS)


def compress(content: bytes, path: Path) -> None:
    """A file `path`.xz, which `unpack` makes `path` again."""
    path.with_name(path.name + ".xz").write_bytes(lzma.compress(content, preset=9))


def pack(full: Path, out: Path) -> None:
    """Write everything but README.md into an existing folder."""
    for case in sorted(path.parent for path in full.glob("*/case.json")):
        pack_case(case, out / case.name)
    (out / "real_configs").mkdir()
    for path in (full / "prompts.json", full / "tiling_table.json", full / "normalise_tables.npz"):
        shutil.copyfile(path, out / path.name)
    for path in sorted((full / "real_configs").glob("trol-*.json")):
        shutil.copyfile(path, out / "real_configs" / path.name)
    compress((full / "real_configs" / "names.tsv").read_bytes(), out / "real_configs" / "names.tsv")
    bicubic = dict(np.load(full / "uint8_bicubic.npz"))
    lines = np.arange(0, 490, 9)
    thinned = {key: array[:, lines] if key.startswith("out") else array for key, array in bicubic.items()}
    np.savez_compressed(out / "uint8_bicubic.npz", lines=lines, **thinned)


def unpack(packed: Path, out: Path) -> None:
    """Give a new folder the layout of the full data: files decompressed, checkpoints put together."""
    shutil.copytree(packed, out)
    for path in sorted(out.rglob("*.xz")):
        path.with_suffix("").write_bytes(lzma.decompress(path.read_bytes()))
        path.unlink()
    for case, other in TEXT_ONLY.items():
        own = load_file(out / case / DECODER)
        rest = {name: array for name, array in load_file(out / other / WEIGHTS).items() if not reads_text(name)}
        save_file(own | rest, out / case / WEIGHTS)
        (out / case / DECODER).unlink()


def differences(packed: Path, again: Path) -> list[str]:
    """Files of two packed folders whose content differs, and arrays of them; compression may differ."""
    names = {str(path.relative_to(top)) for top in (packed, again) for path in top.rglob("*") if path.is_file()}
    found = []
    for name in sorted(names - {"README.md"}):
        one, other = packed / name, again / name
        if not (one.exists() and other.exists()):
            found.append(name)
        elif name.endswith(".npz"):
            ours, theirs = (dict(np.load(path)) for path in (one, other))
            keys = sorted(ours.keys() | theirs.keys())
            found += [f"{name}: {key}" for key in keys if not same_bits(ours.get(key), theirs.get(key))]
        elif name.endswith(".xz"):
            found += [name] * (lzma.decompress(one.read_bytes()) != lzma.decompress(other.read_bytes()))
        else:
            found += [name] * (one.read_bytes() != other.read_bytes())
    return found


def same_bits(one: Array | None, other: Array | None) -> bool:
    """Whether two arrays are there and equal, type and NaNs included."""
    if one is None or other is None:
        return False
    return one.dtype == other.dtype and one.shape == other.shape and one.tobytes() == other.tobytes()


def main(full: str, *options: str) -> None:
    """Replace what is in tests/data/golden, README.md excepted; or compare."""
    with tempfile.TemporaryDirectory() as folder:
        again = Path(folder)
        pack(Path(full), again)
        size = sum(path.stat().st_size for path in again.rglob("*") if path.is_file())
        if "--check" in options:
            if found := differences(HERE, again):
                sys.exit(f"{HERE} is not what {full} packs to: {', '.join(found)}")
        else:
            for path in sorted(HERE.iterdir()):
                if path.is_dir():
                    shutil.rmtree(path)
                elif path.name != "README.md":
                    path.unlink()
            shutil.copytree(again, HERE, dirs_exist_ok=True)
        print(f"{HERE}: {size / 1e6:.1f} MB, each array as in {full}")


if __name__ == "__main__":
    main(*sys.argv[1:])
