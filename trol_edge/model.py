"""One opened bundle, with its back end, its embeddings, its tokenizer, and what else every question needs."""

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
from trol_edge.bundle.signature import PublicKey
from trol_edge.bundle.targets import TARGETS, is_gpu
from trol_edge.errors import BackendError, BundleError, UsageError
from trol_edge.lifetime import Lifetime
from trol_edge.numeric import shown, switch, whole
from trol_edge.prompt.template import Prompt, Spoken, build_prompt, end_ids
from trol_edge.prompt.tokenizer import Tokenizer
from trol_edge.session import Session
from trol_edge.traversal import Traversal, passes_of

Provider = Literal["cpu", "cuda", "tensorrt"]

# Target of a bundle -> (module, class) that runs it. It is imported when a Model is made.
BACKENDS = {"cpu": ("trol_edge.runtimes.ort", "OrtBackend")}
BACKENDS |= {name: ("trol_edge.runtimes.trt.backend", "TrtBackend") for name in TARGETS if is_gpu(name)}
MOST_THREADS = 1024


class Model:
    """A bundle's graphs on their back end, and the text around them. It is plain data, so threads may share it.

    tokenizer: None if the bundle has none (its checkpoint had none). ends: ids that end an answer.
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
        trusted_keys: Sequence[PublicKey] | None = None,
        traversal: Traversal | None = None,
    ) -> None:
        """Open a bundle; for arguments and errors see trol_edge.Runtime. `pass_twice` puts the traversal to use."""
        threads, verify = _checked_threads(threads), switch("verify", verify)
        prefix_reuse = switch("prefix_reuse", prefix_reuse)
        self.bundle = Bundle(bundle, trusted_keys)
        manifest = self.bundle.manifest
        if manifest.target not in BACKENDS and provider is None:
            raise BundleError(
                f"{self.bundle.folder}: made for target {manifest.target!r}, which this version cannot run; "
                f"it runs {', '.join(BACKENDS)}; export with --target cpu"
            )
        self._second_layers = manifest.spec.second_layers if traversal is None else passes_of(self.bundle, traversal)
        self.tokenizer: Tokenizer | None = None
        self.ends = frozenset({manifest.spec.eos_token_id, *manifest.spec.more_end_ids})
        if TOKENIZER in manifest.files:
            self.tokenizer = Tokenizer(self.bundle.text(TOKENIZER), str(self.bundle.path(TOKENIZER)))
            self.tokenizer.require_ids_below(manifest.spec.embedding_rows)
            self.ends |= end_ids(self.tokenizer, manifest.prompt)
            image_id = self.tokenizer.special_id(manifest.prompt.image)
            if image_id != manifest.spec.image_token_id:
                raise BundleError(
                    f"{self.bundle.folder}: {manifest.prompt.image} is token {image_id} in {TOKENIZER} and "
                    f"{manifest.spec.image_token_id} in the manifest; export the bundle again"
                )
        verify = verify or bool(self.bundle.trusted_keys)  # a signature covers hashes, and these cover the files
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
                    raise  # there is no other way to run it
                self.backend = _backend_class("cpu")(self.bundle, provider=fallback, **settings)
                warnings.warn(
                    f"{error}. Answers come from ONNX Runtime's {fallback} provider instead, because of fallback=",
                    RuntimeWarning,
                    stacklevel=3,  # the caller who made the Runtime
                )
        if self._second_layers != manifest.spec.second_layers and not self.backend.takes_traversal:
            raise UsageError(
                f"{self.bundle.folder}: its graphs have their second passes built in, so traversal= cannot leave any "
                "out; export with --traversal, or run it by layer (engines of `trol-edge build --engines layers`, or "
                "on a CPU --precision int4-dynamic)"
            )
        self.embeddings = Embeddings(self.bundle, self.backend.embedding, verify)
        self.lifetime = Lifetime()

    def pass_twice(self) -> None:
        """Let sessions from now on have a second pass in the layers of `traversal` only.

        The self-test, which is of the bundle as it was exported, comes before it.
        """
        self.backend.second_layers = self._second_layers

    def session(self, long_context: bool = False, prefill_chunk: int | None = None) -> Session:
        """Make a session with its own KV cache; for arguments see trol_edge.Runtime.session."""
        self.lifetime.check()
        return Session(self.backend, self.embeddings, self.bundle, long_context, prefill_chunk, self.lifetime)

    @property
    def text(self) -> Tokenizer:
        """The tokenizer. Raises UsageError if the bundle has none."""
        if self.tokenizer is None:
            raise UsageError(
                f"{self.bundle.folder} has no tokenizer (its checkpoint had none), so it serves token ids only; "
                "use session(), or export again with the tokenizer files in the checkpoint"
            )
        return self.tokenizer

    def tokenize(
        self, prompt: Prompt, tiles: int | Sequence[int] = (), answer: str = "", before: Sequence[Spoken] = ()
    ) -> list[int]:
        """The token ids of a whole prompt; for arguments and errors see trol_edge.Runtime.tokenize.

        before: earlier turns of the conversation.
        """
        return build_prompt(self.text, self.bundle.manifest.prompt, prompt, tiles, answer, before)

    def close(self) -> None:
        """Release the graphs. Their memory is free once the sessions are gone, too. Closing twice is fine."""
        self.lifetime.closed = True
        for name in ("backend", "embeddings"):
            vars(self).pop(name, None)

    def __enter__(self) -> Model:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def _checked_threads(threads: int | None) -> int | None:
    """Return the number as an int, or None. Warns if it is far more than the number of cores."""
    if threads is None:
        return None
    found = whole(threads, 1, MOST_THREADS)
    if found is None:
        raise UsageError(f"threads should be None or a whole number from 1 to {MOST_THREADS}, found {shown(threads)}")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if found > 2 * cores:
        warnings.warn(
            f"threads={found}, but this process has {cores} cores: threads that wait for a core make every answer many "
            "times slower; leave threads out to use the physical cores",
            RuntimeWarning,
            stacklevel=4,  # the caller who made the Runtime
        )
    return found


def _backend_class(target: str) -> Any:
    """The class that runs a target's bundles, imported late because its library may be missing."""
    module, name = BACKENDS[target]
    return getattr(importlib.import_module(module), name)
