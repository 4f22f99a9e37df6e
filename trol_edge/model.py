"""One opened bundle: its back end, its embeddings, its tokenizer, and what else every question to it needs."""

from __future__ import annotations

import importlib
import os
import warnings
from collections.abc import Sequence
from typing import Any, Literal

from trol_edge.backend import Backend
from trol_edge.bundle.embedding import Embeddings
from trol_edge.bundle.manifest import Bundle
from trol_edge.bundle.names import TOKENIZER
from trol_edge.bundle.targets import TARGETS, is_gpu
from trol_edge.errors import BackendError, BundleError, UsageError
from trol_edge.lifetime import Lifetime
from trol_edge.prompt.template import Prompt, build_prompt, end_ids
from trol_edge.prompt.tokenizer import Tokenizer
from trol_edge.session import Session

Provider = Literal["cpu", "cuda", "tensorrt"]

# Target of a bundle -> (module, class) that runs it; imported when a Model is made.
BACKENDS = {"cpu": ("trol_edge.runtimes.ort", "OrtBackend")}
BACKENDS |= {name: ("trol_edge.runtimes.trt.backend", "TrtBackend") for name in TARGETS if is_gpu(name)}


class Model:
    """A bundle's graphs on their back end, and the text around them. Plain data once it is made; threads may share it.

    tokenizer: None where the bundle has none (its checkpoint had none). ends: ids that end an answer.
    """

    def __init__(
        self,
        bundle: str | os.PathLike[str],
        *,
        threads: int | None = None,
        verify: bool = True,
        prefix_reuse: bool = True,
        provider: Provider | None = None,
        fallback: Provider | None = None,
    ) -> None:
        """Arguments and errors: see trol_edge.Runtime."""
        self.bundle = Bundle(bundle)
        manifest = self.bundle.manifest
        if manifest.target not in BACKENDS and provider is None:
            raise BundleError(
                f"{self.bundle.folder}: made for target {manifest.target!r}, which this version cannot run; "
                f"it runs {', '.join(BACKENDS)}: export with --target cpu"
            )
        self.tokenizer: Tokenizer | None = None
        self.ends = frozenset({manifest.spec.eos_token_id})
        if TOKENIZER in manifest.files:
            self.tokenizer = Tokenizer.from_file(self.bundle.path(TOKENIZER))
            self.ends |= end_ids(self.tokenizer, manifest.prompt)
            image_id = self.tokenizer.special_id(manifest.prompt.image)
            if image_id != manifest.spec.image_token_id:
                raise BundleError(
                    f"{self.bundle.folder}: {manifest.prompt.image} is token {image_id} in {TOKENIZER} and "
                    f"{manifest.spec.image_token_id} in the manifest; export the bundle again"
                )
        settings = {"threads": threads, "verify": verify, "prefix_reuse": prefix_reuse}
        self.backend: Backend
        if provider is not None:
            self.backend = _backend_class("cpu")(self.bundle, provider=provider, **settings)
        elif fallback is None:
            self.backend = _backend_class(manifest.target)(self.bundle, **settings)
        else:
            try:
                self.backend = _backend_class(manifest.target)(self.bundle, **settings)
            except (BackendError, BundleError) as error:
                if manifest.target == "cpu":
                    raise  # there is nothing else
                self.backend = _backend_class("cpu")(self.bundle, provider=fallback, **settings)
                warnings.warn(
                    f"{error}. Answers come from ONNX Runtime's {fallback} provider instead, because of fallback=",
                    RuntimeWarning,
                    stacklevel=3,  # who made the Runtime
                )
        self.embeddings = Embeddings(self.bundle)
        self.lifetime = Lifetime()

    def session(self, long_context: bool = False, prefill_chunk: int | None = None) -> Session:
        """A new session with a KV cache of its own; arguments: see trol_edge.Runtime.session."""
        self.lifetime.check()
        return Session(self.backend, self.embeddings, self.bundle, long_context, prefill_chunk, self.lifetime)

    @property
    def text(self) -> Tokenizer:
        """The tokenizer; UsageError where the bundle has none."""
        if self.tokenizer is None:
            raise UsageError(
                f"{self.bundle.folder} has no tokenizer (its checkpoint had none), so it serves token ids only: "
                "use session(), or export again with the tokenizer files in the checkpoint"
            )
        return self.tokenizer

    def tokenize(self, prompt: Prompt, tiles: int | Sequence[int] = (), answer: str = "") -> list[int]:
        """Token ids of a whole prompt; arguments and errors: see trol_edge.Runtime.tokenize."""
        return build_prompt(self.text, self.bundle.manifest.prompt, prompt, tiles, answer)

    def close(self) -> None:
        """Let the graphs go: their memory is free once the sessions are gone, too. Closing twice is fine."""
        if not self.lifetime.closed:
            self.lifetime.closed = True
            del self.backend, self.embeddings

    def __enter__(self) -> Model:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def _backend_class(target: str) -> Any:
    """The class that runs a target's bundles, imported late: its library may be missing."""
    module, name = BACKENDS[target]
    return getattr(importlib.import_module(module), name)
