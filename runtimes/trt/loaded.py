"""The engines of a bundle that are loaded on a GPU, and their execution contexts. Not yet run on a GPU."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Mapping
from pathlib import Path

from trol_edge.bundle.engines import KERNELS, EngineSet, folder_of, plan_of, ports_of, verified
from trol_edge.bundle.folder import new_file
from trol_edge.bundle.manifest import Bundle
from trol_edge.errors import BundleError, ContextError
from trol_edge.reading import read_plain
from trol_edge.runtimes.cuda import Cuda
from trol_edge.runtimes.trt.api import Context, Engine, EngineTensor, Kernels, Library

MOST_KERNELS = 1 << 30  # most bytes of kernels from an earlier run


class Loaded:
    """Every engine of a set, checked to be those of the bundle, with the contexts that all states share.

    infos: the tensors of each engine, by name. scratch_bytes: what the engine that needs most of it needs.
    """

    def __init__(self, bundle: Bundle, engines: EngineSet, library: Library, cuda: Cuda) -> None:
        """Load the engines. Raises BundleError if one was altered, or is that of another graph, and BackendError."""
        self.bundle, self.cuda = bundle, cuda
        for name in engines.engines:  # an engine is a program, so none runs before all are known to be right
            verified(bundle, engines, name)
        # One after the other: a load takes the memory of the largest beside those that are on the device.
        self._engines = {
            name: library.open(plan_of(bundle, engines, name), info.file) for name, info in engines.engines.items()
        }
        self.infos = {name: self._checked(name, engine) for name, engine in self._engines.items()}
        self.contexts: dict[str, Context] = {}
        self.scratch_bytes = max(engine.scratch_bytes for engine in self._engines.values())
        self._profiles: dict[str, int] = {}
        self._scratch: int | None = None
        self._kernels: Kernels | None = None
        self._kept = False

    def share_scratch(self, pointer: int) -> None:
        """Let all contexts that are made from now on use this block of `scratch_bytes`, one after the other."""
        self._scratch = pointer

    def _checked(self, name: str, engine: Engine) -> dict[str, EngineTensor]:
        """An engine's tensors by name, checked to be those of the graph."""
        found = {info.name: info for info in engine.tensors()}
        inputs, outputs, weights = ports_of(self.bundle, name)
        wanted = {port.name: port for port in (*inputs, *outputs)}
        wrong = sorted(found.keys() ^ (wanted.keys() | weights)) + [
            n for n, info in found.items() if n in wanted and info.dtype != wanted[n].dtype
        ]
        wrong += [n for n, info in found.items() if info.alias not in (None, n.replace("present_", "past_", 1))]
        if wrong:
            raise BundleError(
                f"{self.bundle.folder}: the {name} engine has other inputs or outputs than the graph "
                f"({', '.join(wrong[:5])}); build the engines again with `trol-edge build --force`"
            )
        return found

    def open_contexts(self, names: list[str]) -> None:
        """Make the contexts that `run` uses."""
        self.contexts |= {name: self.new_context(name) for name in names}
        self._profiles |= dict.fromkeys(names, 0)

    def new_context(self, name: str) -> Context:
        """Make an execution context of an engine, with the kernels that an earlier run compiled, if there are any.

        All engines share them, because those of equal layers need the same.
        Such kernels are programs that nobody signed, so with trusted keys they are compiled again instead.
        """
        if self._kernels is None:
            self._kernels = Kernels(None if self.bundle.trusted_keys else _unwrapped(self._path))
        if self._scratch is None:
            return self._engines[name].context(self._kernels)
        context = self._engines[name].context(self._kernels, own_scratch=False)
        context.scratch(self._scratch, self.scratch_bytes)
        return context

    @property
    def _path(self) -> Path:
        """The file of compiled kernels."""
        return folder_of(self.bundle, self.bundle.manifest.target) / KERNELS

    def keep_kernels(self) -> None:
        """Write the kernels that TensorRT for RTX compiled beside the engines, once, to speed up the next start."""
        blob = self._kernels.compiled() if self._kernels is not None and not self._kept else None
        self._kept = True
        if not blob or _unwrapped(self._path) == blob:
            return
        with contextlib.suppress(OSError), new_file(self._path) as part:  # a read-only bundle only starts slower
            part.write_bytes(hashlib.sha256(blob).digest() + blob)

    def run(self, name: str, shapes: Mapping[str, tuple[int, ...]], addresses: Mapping[str, int]) -> None:
        """Enqueue an engine with these shapes of its dynamic inputs, among others. The lock must be held."""
        shapes = {tensor: shape for tensor, shape in shapes.items() if self._is_dynamic(name, tensor)}
        context, index = self.contexts[name], self._profile(name, shapes)
        if index != self._profiles[name]:
            context.profile(index, self.cuda.stream)
            self._profiles[name] = index
        for tensor, shape in shapes.items():
            context.shape(tensor, shape)
        for tensor in self.infos[name]:
            context.address(tensor, addresses[tensor])
        context.run(self.cuda.stream)

    def _is_dynamic(self, name: str, tensor: str) -> bool:
        info = self.infos[name].get(tensor)
        return info is not None and info.is_input and -1 in info.shape

    def _profile(self, name: str, shapes: Mapping[str, tuple[int, ...]]) -> int:
        """The first optimization profile that allows these shapes; an engine whose shapes are fixed has one."""
        if not shapes:
            return 0
        profiles = [self.infos[name][tensor].profiles for tensor in shapes]
        for index in range(min((len(p) for p in profiles), default=0)):
            if all(_within(shape, p[index]) for p, shape in zip(profiles, shapes.values(), strict=True)):
                return index
        raise ContextError(
            f"the {name} engine was built for other sizes than { ({n: list(s) for n, s in shapes.items()}) }; "
            "build the engines again with `trol-edge build --force`, or give a shorter prompt"
        )

    def most(self, name: str, tensor: str) -> int:
        """The most tokens [1, S, ..] that an input of an engine takes."""
        return max(largest[1] for *_, largest in self.infos[name][tensor].profiles)

    def forget(self) -> None:
        """Let go of all engines, whose library frees them."""
        self.contexts.clear()
        self._engines.clear()


def _within(shape: tuple[int, ...], profile: tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]) -> bool:
    smallest, _, largest = profile
    return all(low <= n <= high for low, n, high in zip(smallest, shape, largest, strict=True))


def _unwrapped(path: Path) -> bytes | None:
    """The kernels that an earlier run stored, or None if they were altered."""
    try:
        data = read_plain(path, most=MOST_KERNELS)
    except BundleError:
        return None
    digest, blob = data[:32], data[32:]
    return blob if hashlib.sha256(blob).digest() == digest else None
