"""A Runtime that answers from a script, to test a program without a bundle or an inference library.

>>> from trol_edge.testing import ScriptedRuntime
>>> rt = ScriptedRuntime({"Is the door open?": "Yes, it is.", "How many boxes?": "3"})
>>> rt.generate("How many boxes?", images=frame).text
'3'

Everything but the numbers is real: turns, sessions, streams, deadlines, `stop`, the vision cache, choices, formats of
answers. A token is one ASCII character, or one byte of any other.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trol_edge._version import __version__
from trol_edge.answering.desk import Desk
from trol_edge.answering.sampling import best_token
from trol_edge.backend import FIRST, Placed
from trol_edge.bundle.embedding import Embeddings
from trol_edge.bundle.manifest import FORMAT, FORMAT_VERSION, Bundle, Manifest
from trol_edge.bundle.precision import PrecisionPlan
from trol_edge.bundle.spec import ModelSpec, VisionSpec
from trol_edge.errors import BackendError, UsageError
from trol_edge.lifetime import Lifetime
from trol_edge.model import Model
from trol_edge.prompt.images import ImageSpec
from trol_edge.prompt.template import PromptSpec
from trol_edge.prompt.tokenizer import Tokenizer
from trol_edge.runtime import Runtime
from trol_edge.vision_cache import VisionCache

__all__ = ["Script", "ScriptedRuntime"]

Script = str | Mapping[str, str] | Callable[[str], str]

Float32 = NDArray[np.float32]

_BOS, _QUESTION, _ANSWER, _END, _IMAGE = _SPECIAL = ("<s>", "<question>", "<answer>", "</s>", "<image>")
_PIECES = (*_SPECIAL, "<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", *map(chr, range(33, 127)))
_ID = {piece: i for i, piece in enumerate(_PIECES)}
_SURE = 12.0  # logit of the scripted token; other characters have 0
_TOKENS_PER_IMAGE = 4


class ScriptedRuntime(Runtime):
    """A `trol_edge.Runtime` with scripted answers.

    It takes the calls that a Runtime takes, and returns what a Runtime returns.
    """

    def __init__(
        self,
        script: Script,
        *,
        context: int = 2048,
        prefix_reuse: bool = True,
        vision_cache_bytes: int = 1 << 20,
        picture_s: float = 0.0,
        token_s: float = 0.0,
        step_s: float = 0.0,
        failure: Callable[[str], None] = lambda question: None,
    ) -> None:
        """Make a Runtime from a script: one answer to everything, answers by question, or a function.

        A function maps a question to its answer and may be called several times for it. context, prefix_reuse,
        vision_cache_bytes: see Runtime and export. picture_s, token_s, step_s: seconds that a picture, a token of the
        prompt and a token of the answer take, to try deadlines and cancelled calls. failure: called with each question
        before its answer begins; raise trol_edge.errors.BackendError in it to test how your program handles a failed
        inference. Raises UsageError, at the call, for a question that is not in the script.
        """
        vision_cache = VisionCache(vision_cache_bytes)
        self.model = _ScriptedModel(
            _ScriptedBackend(script, context, prefix_reuse, picture_s, token_s, step_s, failure), context
        )
        self.bundle = self.model.bundle
        self.desk = Desk(self.model, vision_cache)


class _ScriptedModel(Model):
    """A Model that needs no bundle's files."""

    def __init__(self, backend: _ScriptedBackend, context: int) -> None:
        self.bundle = _ScriptedBundle(context)
        self.tokenizer = backend.tokenizer
        self.ends = frozenset({_ID[_END]})
        self.backend = backend
        self.embeddings = _IdEmbeddings()
        self.lifetime = Lifetime()


class _ScriptedBundle(Bundle):
    """A Bundle with a manifest but no files."""

    def __init__(self, context: int) -> None:
        self.folder, self.identity = Path("scripted"), "scripted"
        self.manifest = _manifest(context)


class _IdEmbeddings(Embeddings):
    """Embeddings whose rows hold the token's id, so that a state can read it."""

    def __init__(self) -> None: ...

    def __len__(self) -> int:
        return len(_PIECES)

    def __getitem__(self, ids: Any) -> Float32:
        return np.asarray(ids, np.float32)[..., None]


class _ScriptedBackend:
    """A back end (see trol_edge.backend.Backend) that looks up its answers."""

    identity = "script"
    takes_rotary = True
    takes_traversal = False
    second_layers: tuple[int, ...] = ()
    weight_bytes = 0
    saturates = False
    embedding: Mapping[str, NDArray[Any]] | None = None

    def __init__(
        self,
        script: Script,
        context: int,
        prefix_reuse: bool,
        picture_s: float,
        token_s: float,
        step_s: float,
        failure: Callable[[str], None],
    ) -> None:
        self.prefix_reuse, self.context = prefix_reuse, context
        self.picture_s, self.token_s, self.step_s, self.failure = picture_s, token_s, step_s, failure
        self.tokenizer = Tokenizer(_tokenizer_json(), "the scripted tokenizer")
        self._script = script

    @property
    def cache_bytes(self) -> int:
        """The bytes of the ids that a state keeps."""
        return 8 * self.context * (2 if self.prefix_reuse else 1)

    def encode_image(self, pixel_values: Float32) -> Float32:
        """Return features without content."""
        time.sleep(self.picture_s * len(pixel_values))
        return np.zeros((len(pixel_values), _TOKENS_PER_IMAGE, 1), np.float32)

    def new_state(self) -> _ScriptedState:
        """See trol_edge.backend.Backend."""
        return _ScriptedState(self)

    def run_cut(
        self, name: str, cuts: Collection[str], feeds: Mapping[str, NDArray[Any]], state: Any
    ) -> dict[str, NDArray[Any]] | None:
        """See trol_edge.backend.Backend; there are no graphs."""
        return None

    def logits(self, ids: Sequence[int]) -> Float32:
        """Logits [V] after these tokens, whose largest is the answer's next token or its end."""
        found = np.zeros(len(_PIECES), np.float32)
        found[[_ID[token] for token in _SPECIAL if token != _END]] = -_SURE  # never in an answer, nor in a beam
        if _ID[_ANSWER] not in ids:
            return found  # the prompt is not complete yet
        begin = len(ids) - list(reversed(ids)).index(_ID[_ANSWER])
        question = self._question(ids[:begin])
        if begin == len(ids):
            self.failure(question)
        wanted, said = self.tokenizer.encode(self._answer(question)), ids[begin:]
        follows = len(said) < len(wanted) and list(said) == wanted[: len(said)]
        found[wanted[len(said)] if follows else _ID[_END]] = _SURE
        return found

    def _question(self, ids: Sequence[int]) -> str:
        last = len(ids) - list(reversed(ids)).index(_ID[_QUESTION])
        return self.tokenizer.decode(ids[last:])

    def _answer(self, question: str) -> str:
        if isinstance(self._script, str):
            return self._script
        if not isinstance(self._script, Mapping):
            return self._script(question)
        if question not in self._script:
            raise UsageError(
                f"the script has no answer to {question!r}, only to {', '.join(map(repr, self._script))}; add one"
            )
        return self._script[question]


class _ScriptedState:
    """The tokens of one sequence (see trol_edge.backend.State)."""

    def __init__(self, backend: _ScriptedBackend) -> None:
        self._backend = backend
        self.sets = [np.zeros(backend.context, np.int64) for _ in range(2 if backend.prefix_reuse else 1)]

    def traverse(
        self,
        embeddings: Float32,
        image_mask: NDArray[np.bool_] | None,
        long_rope: bool = False,
        start: int = 0,
        pictures: Sequence[Placed] = (),
        rotary: NDArray[np.int64] | None = None,
    ) -> Float32:
        """See trol_edge.backend.State."""
        time.sleep(self._backend.token_s * len(embeddings))
        for rows in self.sets:
            rows[start : start + len(embeddings)] = embeddings[:, 0]
        return self._backend.logits(self.sets[FIRST][: start + len(embeddings)].tolist())

    def step(self, embedding: Float32, position: int, rotary: int | None = None) -> Float32:
        """See trol_edge.backend.State."""
        time.sleep(self._backend.step_s)
        self.sets[FIRST][position] = embedding[0]
        return self._backend.logits(self.sets[FIRST][: position + 1].tolist())

    def step_token(self, embedding: Float32, position: int, rotary: int | None = None) -> int:
        """See trol_edge.backend.State."""
        return best_token(self.step(embedding, position))

    def copy_rows(self, source: Any, start: int, stop: int, which: int) -> None:
        """See trol_edge.backend.State."""
        self.sets[which][start:stop] = source.sets[which][start:stop]

    def rows(self, positions: NDArray[np.int32], which: int) -> list[Float32]:
        """See trol_edge.backend.State."""
        raise BackendError("a script has no keys and values")


def _tokenizer_json() -> str:
    added = [
        {"id": _ID[token], "content": token, "single_word": False, "lstrip": False, "rstrip": False}
        | {"normalized": False, "special": True}
        for token in _SPECIAL
    ]
    normalizer = {"type": "Sequence", "normalizers": [{"type": "Replace", "pattern": {"String": " "}, "content": "▁"}]}
    model = {"type": "BPE", "unk_token": "<unk>", "byte_fallback": True, "vocab": _ID, "merges": []}
    return json.dumps({"version": "1.0", "added_tokens": added, "normalizer": normalizer, "model": model})


def _manifest(context: int) -> Manifest:
    vision = VisionSpec(
        hidden_size=1,
        intermediate_size=1,
        num_layers=1,
        num_heads=1,
        patch_size=14,
        image_size=28,
        layer_norm_eps=1e-5,
        tokens_per_image=_TOKENS_PER_IMAGE,
    )
    spec = ModelSpec(
        family="scripted",
        hidden_size=1,
        intermediate_size=1,
        num_layers=1,
        num_heads=1,
        num_kv_heads=1,
        head_dim=1,
        vocab_size=len(_PIECES),
        embedding_rows=len(_PIECES),
        rms_norm_eps=1e-5,
        rope_theta=1e4,
        max_position_embeddings=context,
        lora_rank=0,
        eos_token_id=_ID[_END],
        image_token_id=_ID[_IMAGE],
        vision=vision,
    )
    prompt = PromptSpec(
        before_system=_BOS,
        system="",
        before_question=_QUESTION,
        after_question=_ANSWER,
        image=_IMAGE,
        image_prefix="",
        image_suffix="",
        after_image="",
        tokens_per_image=_TOKENS_PER_IMAGE,
        special_tokens=(_BOS, _QUESTION, _ANSWER),
        end_markers=(_END,),
    )
    return Manifest(
        format=FORMAT,
        format_version=FORMAT_VERSION,
        model="scripted",
        created_by=f"trol-edge {__version__}",
        target="cpu",
        context=context,
        spec=spec,
        prompt=prompt,
        image=ImageSpec("stretch", 28, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
        graphs={},
        files={},
        checkpoint={},
        tools={},
        notes=(),
        parts={},
        plan=PrecisionPlan("fp32", "fp32", {}),
        calibration=None,
    )
