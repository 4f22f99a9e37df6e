"""Draws the authors' figure of the gate for the user's own pictures: layers by tokens, the value of s as colour."""

from __future__ import annotations

import base64
import io
import itertools
import os
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from trol_edge import svg
from trol_edge.bundle.folder import new_file, writing
from trol_edge.errors import UsageError
from trol_edge.export.gates import KINDS, Gates

LEFT, WIDTH, ROW = 46, 900, 12  # of a panel, in CSS pixels
SHUT, OPEN = (247, 248, 250), (16, 48, 120)  # colours of s = 0 and s = 1
KIND_COLOURS = {"image": "#c8501e", "system": "#9a9aa2", "text": "#2f8f4e"}


def save(path: str | os.PathLike[str], gates: Gates) -> None:
    """Write the figure as SVG. Raises UsageError if the file cannot be written."""
    with writing(path, UsageError), new_file(Path(path)) as part:
        part.write_text(figure(gates), encoding="utf-8")


def figure(gates: Gates) -> str:
    """Draw a panel for each prompt whose tokens are known, as a self-contained SVG."""
    body, top = _legend(), 48.0
    for i, prompt in enumerate(gates.prompts):
        drawn, height = _panel(gates.values(i), prompt.kinds, f"{prompt.name}: {len(prompt.kinds)} tokens")
        body += f'<g transform="translate(0 {top:.0f})">{drawn}</g>'
        top += height
    return svg.document(LEFT + WIDTH + 16, top, body)


def _panel(s: NDArray[np.float32], kinds: NDArray[np.uint8], title: str) -> tuple[str, float]:
    """One prompt: s [L, S], kinds [S]; returns the drawing and its height. Layer 0 is at the bottom."""
    layers, tokens = s.shape
    height = layers * ROW
    body = svg.text_at(LEFT, 10, title) + picture(s, LEFT, 18, WIDTH, height)
    for layer in range(0, layers, max(1, layers // 8)):
        body += svg.text_at(LEFT - 6, 18 + height - layer * ROW - 2, f"layer {layer}", "end")
    starts = [0, *(np.flatnonzero(np.diff(kinds)) + 1).tolist(), tokens]
    for first, last in itertools.pairwise(starts):
        kind = KINDS[kinds[first]]
        x, width = LEFT + WIDTH * first / tokens, WIDTH * (last - first) / tokens
        body += svg.rect(x, 20 + height, width, 6, KIND_COLOURS[kind], f"{kind}: tokens {first} to {last - 1}")
    for tick in svg.ticks(tokens, 8):
        body += svg.text_at(LEFT + WIDTH * tick / tokens, 40 + height, f"{tick:g}", "middle")
    return body, height + 62


def picture(s: NDArray[np.float32], x: float, y: float, width: float, height: float) -> str:
    """Values 0..1 of [L, S] as a picture with a pixel each, layer 0 at the bottom, stretched to a size."""
    share = np.clip(s[::-1, :, None], 0, 1)
    pixels = np.rint(np.array(SHUT) * (1 - share) + np.array(OPEN) * share).astype(np.uint8)
    data = io.BytesIO()
    Image.fromarray(pixels).save(data, "PNG")
    return (
        f'<image x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" preserveAspectRatio="none" '
        f'style="image-rendering:pixelated" href="data:image/png;base64,{base64.b64encode(data.getvalue()).decode()}"/>'
    )


def _legend() -> str:
    """The scale of colours, and the kinds of tokens."""
    body = svg.text_at(LEFT, 22, "s = 0") + picture(
        np.linspace(0, 1, 64, dtype=np.float32)[None], LEFT + 34, 14, 120, 9
    )
    body += svg.text_at(LEFT + 160, 22, "1, the share of the second pass")
    for i, kind in enumerate(KINDS):
        x = LEFT + 360 + 90 * i
        body += svg.rect(x, 14, 9, 9, KIND_COLOURS[kind]) + svg.text_at(x + 14, 22, kind)
    return body
