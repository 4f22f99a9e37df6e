"""Counts the bytes that a program reads and writes in one run, and names those that it could do without.

Rules. They count each kernel by itself, because between two kernels nothing is sure to stay in a cache.

- A kernel reads each of its inputs once and writes each output once, in the types and shapes of the program. What it
  reads again after its caches lost it, and the workspace of a product, is unknown and not counted. So the sum is a
  lower bound for what the kernels of the program do.
- A constant counts in the bytes in which it is stored. Numbers that the host passes count nothing.
- A scatter into a tensor in place writes its new rows and reads nothing of the tensor. The rows follow from the indices
  (ScatterND), from an input of the same shape but for one dimension (TensorScatter), or from the dynamic dimension of
  the largest other input. Otherwise they are at most what the kernel's other inputs hold.
- A slice or a gather reads no more numbers of a tensor than its kernel writes, once per use and per slice in the
  kernel's name. This holds for kernels without a reduction; others read the whole tensor.
- A sum over a slice of a cache reads as many rows as its other tensors have in their largest dynamic dimension. The
  code of the kernels in engines of 1.7 shows that their loops end there.
- Attention reads the keys and values that it is given as a whole. The code of the kernels in engines of 1.7 shows that
  they read every row, and that a mask saves none.
- A pass over the weights counts each time: a traverse reads them twice.

What is avoidable, by kind: "cache copy" (a kernel that only moves a cache: what it reads and writes), "weight widened"
and "weight rearranged" (a tensor that depends on constants only, made at every run: what is moved more than if each
kernel that needs it read the constants; widened, if it is larger than these), "unfilled rows" (of a cache, read by
attention).
"""

from __future__ import annotations

import dataclasses
from collections import Counter, defaultdict
from collections.abc import Collection, Mapping, Sequence

from trol_edge.errors import UsageError
from trol_edge.program.model import BITS, MOVES, Kernel, Program, Tensor

COPY, WIDENED, REARRANGED, UNFILLED = "cache copy", "weight widened", "weight rearranged", "unfilled rows"
_SLICES = {"Slic", "Spli", "Gath"}
# Types of products, widest first, by the names that this library uses elsewhere.
_ARITHMETIC = {"float": "float32", "half": "float16", "bf16": "bfloat16", "fp8": "fp8", "int8": "int8"}


@dataclasses.dataclass(frozen=True)
class Moved:
    """What one kernel moves: bytes by tensor. product: type of the factors of a matrix product, "attention" or ""."""

    kernel: Kernel
    reads: dict[str, int]
    writes: dict[str, int]
    product: str = ""
    operations: int = 0  # of the product with weights; a multiply-add is two
    whole_caches: int = 0  # bytes of caches that are read or written as a whole, so as many as their capacity

    @property
    def read(self) -> int:
        """Bytes read."""
        return sum(self.reads.values())

    @property
    def written(self) -> int:
        """Bytes written."""
        return sum(self.writes.values())


@dataclasses.dataclass(frozen=True)
class Avoidable:
    """Bytes that a program moves and could do without. what: which tensor, in words."""

    kind: str
    what: str
    bytes: int


@dataclasses.dataclass(frozen=True)
class Traffic:
    """One run of a program. constants: bytes of those that kernels read, each once. cache: of the filled rows.

    results: bytes of the outputs that are no caches. scratch: bytes that the engine holds for its largest shapes.
    """

    kernels: tuple[Moved, ...]
    constants: int
    cache: int
    results: int
    scratch: int
    avoidable: tuple[Avoidable, ...]

    @property
    def moved(self) -> int:
        """All bytes read and written."""
        return sum(kernel.read + kernel.written for kernel in self.kernels)

    @property
    def ideal(self) -> int:
        """What any program must move: constants once, filled rows of the caches, and results."""
        return self.constants + self.cache + self.results

    @property
    def ratio(self) -> float:
        """How many times what it must move this program moves."""
        return self.moved / max(1, self.ideal)


def count(
    program: Program,
    shapes: Mapping[str, Sequence[int]] | None = None,
    *,
    caches: Mapping[str, int] | None = None,
    filled: int | None = None,
    weights: Collection[str] = (),
) -> Traffic:
    """Count one run. shapes: of inputs (and outputs) with dynamic dimensions, by port.

    caches: ports that are caches -> the axis of their rows (both past and present ones). filled: rows of a cache in
    use (default: all). weights: inputs that hold weights, which count as constants.
    Raises UsageError for shapes that do not fit, and BundleError if something's size cannot be known.
    """
    sizes = program.sizes(shapes or {})
    held = {program.inputs[name] for name in weights if name in program.inputs}
    tensors = program.tensors | {
        name: dataclasses.replace(program.tensors[name], place="constant") for name in held & program.tensors.keys()
    }
    return _Counter(program, tensors, sizes, caches or {}, filled).traffic()


class _Counter:
    """One count. roots: the tensor that a part belongs to."""

    def __init__(
        self,
        program: Program,
        tensors: dict[str, Tensor],
        sizes: dict[str, int],
        caches: Mapping[str, int],
        filled: int | None,
    ) -> None:
        self.program, self.tensors, self.sizes, self.filled = program, tensors, sizes, filled
        named = {**program.inputs, **program.outputs}
        self.caches = {named[port]: axis for port, axis in caches.items() if named.get(port) in tensors}
        for name, axis in self.caches.items():
            if not 0 <= axis < len(tensors[name].dims):
                raise UsageError(f"cache {name} has no dimension {axis}")
        self.fixed: dict[str, int] = {}  # scratch that depends on constants only -> bytes of these

    def root(self, name: str) -> str:
        return self.tensors[name].base or name

    def bytes(self, name: str) -> int:
        return self.tensors[name].bytes(self.sizes)

    def numbers(self, name: str) -> int:
        return self.tensors[name].numbers(self.sizes)

    def rows(self, name: str) -> int:
        """The rows of a cache, of which `filled` are in use."""
        dim = self.tensors[name].dims[self.caches[name]]
        return self.sizes[dim] if isinstance(dim, str) else dim

    def traffic(self) -> Traffic:
        kernels: list[Moved] = []
        avoidable: list[Avoidable] = []
        for kernel in self.program.kernels:
            moved = self.moved(kernel)
            kernels.append(moved)
            avoidable += self.waste(moved)
        wrote: Counter[str] = Counter()
        read: defaultdict[str, list[int]] = defaultdict(list)
        makers: dict[str, Kernel] = {}
        for moved in kernels:
            for name, size in moved.writes.items():
                wrote[self.root(name)] += size
                makers.setdefault(self.root(name), moved.kernel)
            for name, size in moved.reads.items():
                read[self.root(name)].append(size)
        for name, size in self.fixed.items():
            kind = WIDENED if self.bytes(name) > size else REARRANGED
            maker = ", ".join(makers[name].layers) or ", ".join(makers[name].reads)
            extra = wrote[name] + sum(read[name]) - (len(read[name]) - 1) * size
            avoidable.append(Avoidable(kind, f"{maker}, in {name}", max(0, extra)))
        used = {self.root(name) for kernel in self.program.kernels for name in kernel.reads}
        stored = {
            self.tensors[name].stored or name: self.bytes(name)
            for name in used
            if self.tensors[name].place == "constant"
        }
        results = [n for n in self.program.outputs.values() if n in self.tensors and n not in self.caches]
        return Traffic(
            kernels=tuple(kernels),
            constants=sum(stored.values()),
            cache=self.filled_bytes(),
            results=sum(self.bytes(name) for name in results),
            scratch=self.program.scratch_bytes,
            avoidable=tuple(a for a in avoidable if a.bytes),
        )

    def filled_bytes(self) -> int:
        """Bytes of the filled rows of all caches; a cache that is both past and present counts once."""
        outputs = set(self.program.outputs.values())
        held = [n for n in self.caches if n in outputs] or list(self.caches)
        return sum(self.bytes(n) * self.share(n)[0] // max(1, self.share(n)[1]) for n in held)

    def share(self, name: str) -> tuple[int, int]:
        """Rows in use and all rows of a cache."""
        rows = self.rows(name)
        return (rows if self.filled is None else min(self.filled, rows)), rows

    # -- one kernel

    def moved(self, kernel: Kernel) -> Moved:
        scattered = set(kernel.reads) & set(kernel.writes) if self.scatters(kernel) else set()
        writes = {n: self.new_rows(n, kernel) if n in scattered else self.bytes(n) for n in kernel.writes}
        reads = {n: 0 if n in scattered else self.bytes(n) for n in kernel.reads}
        slices = self.slices(kernel)
        if slices:
            numbers = sum(8 * size // BITS.get(self.tensors[n].dtype, 8) for n, size in writes.items())
            times = Counter(kernel.reads)
            for name in reads:
                uses = max(times[name], slices)
                most = -(-uses * numbers * BITS.get(self.tensors[name].dtype, 64) // 8)
                reads[name] = min(reads[name], most)
        summed = kernel.form == "reduction" and bool(_SLICES & set(kernel.words))
        # A kernel that writes no whole cache slices those that it reads.
        if summed or (slices and not any(self.is_whole(*item) for item in writes.items())):
            for name in (n for n in reads if n in self.caches):
                sliced = self.bytes(name) * self.sliced(kernel, name) // max(1, self.rows(name))
                reads[name] = min(reads[name], sliced)
        product, operations = self.product(kernel)
        self.mark_fixed(kernel)
        written = {n: size for n, size in writes.items() if n not in scattered}
        parts = (written, {} if slices or summed else reads)
        whole = [size for part in parts for name, size in part.items() if self.is_whole(name, size)]
        return Moved(kernel, reads, writes, product, operations, sum(whole))

    @staticmethod
    def slices(kernel: Kernel) -> int:
        """The most slices and gathers of one tensor in a kernel, if these bound what it reads; 0 if they do not."""
        words = kernel.words
        if kernel.form not in ("pointwise", "scatter"):
            return 0
        return sum(word in _SLICES for word in words) + (len(words) if words[-1:] == ("Etc",) else 0)

    def is_whole(self, name: str, size: int) -> bool:
        """Whether these are the bytes of all rows of a cache of fixed capacity."""
        dims = self.tensors[name].dims
        return name in self.caches and isinstance(dims[self.caches[name]], int) and size == self.bytes(name)

    def sliced(self, kernel: Kernel, cache: str) -> int:
        """Rows of a cache that a sum over a slice of it reads."""
        others = [n for n in (*kernel.reads, *kernel.writes) if n != cache]
        sizes = [self.sizes[d] for n in others for d in self.tensors[n].dims if isinstance(d, str) and d in self.sizes]
        rows = self.rows(cache)
        return max((size for size in sizes if size <= rows), default=rows)

    @staticmethod
    def scatters(kernel: Kernel) -> bool:
        return kernel.form == "scatter" or (not kernel.form and "Scat" in kernel.words)

    def new_rows(self, name: str, kernel: Kernel) -> int:
        """Bytes of the rows that a scatter writes."""
        target = self.tensors[name]
        written = set(kernel.writes)
        others = [n for n in dict.fromkeys(kernel.reads) if n not in written]
        # ScatterND's indices have more than one number per row, and the most dimensions; those of a gather have one.
        indices = [n for n in others if self.tensors[n].dtype == "int64" and 1 < self.depth(n) <= len(target.dims)]
        if indices:
            chosen = max(indices, key=lambda n: len(self.tensors[n].dims))
            row = Tensor(chosen, target.dims[self.depth(chosen) :], target.dtype, "scratch")
            return min(self.bytes(name), self.numbers(chosen) // self.depth(chosen) * row.bytes(self.sizes))
        for other in others:
            tensor = self.tensors[other]
            alike = tensor.dtype == target.dtype and len(tensor.dims) == len(target.dims)
            if alike and sum(a != b for a, b in zip(tensor.dims, target.dims, strict=True)) == 1:
                return self.bytes(other)
        return min(self.bytes(name), self.tokens_of(name, others), sum(map(self.bytes, others)))

    def tokens_of(self, name: str, others: Sequence[str]) -> int:
        """Bytes of a cache's new rows, if a dynamic dimension of what a kernel computes them from says how many."""
        dynamic = [n for n in others if any(isinstance(d, str) for d in self.tensors[n].dims)]
        if name not in self.caches or not dynamic:
            return self.bytes(name)
        largest = self.tensors[max(dynamic, key=self.numbers)]
        rows = next(self.sizes[d] for d in largest.dims if isinstance(d, str))
        return self.bytes(name) * rows // max(1, self.rows(name))

    def depth(self, name: str) -> int:
        """The last dimension of a tensor, if it is static."""
        dims = self.tensors[name].dims
        return dims[-1] if len(dims) > 1 and isinstance(dims[-1], int) else 0

    def product(self, kernel: Kernel) -> tuple[str, int]:
        """The type of a matrix product, and its operations, if it is one."""
        if kernel.form == "attention" or "_mha" in kernel.name:
            return "attention", 0
        fused = kernel.what == "runtime_fusion" and any(w.startswith(("Fc", "Conv")) for w in kernel.words)
        if kernel.what not in ("fully_connected", "corrltn", "gemm", "conv") and not fused:
            return "", 0
        on_device = [n for n in kernel.reads if self.tensors[n].place != "host" and self.numbers(n) > 1]
        heavy = [n for n in on_device if self.root(n) in self.fixed or self.tensors[self.root(n)].place == "constant"]
        weight = max(heavy, key=self.numbers, default="") if fused else (on_device[1:] or [""])[0]
        if not weight:
            return "", 0
        factors = [n for n in on_device if n not in heavy] if fused else on_device[:1]
        types = [self.tensors[n].dtype for n in (*factors, weight)]
        arithmetic = next((name for kind, name in _ARITHMETIC.items() if any(t.startswith(kind) for t in types)), "")
        dims, numbers = self.tensors[weight].dims, self.numbers(weight)
        if kernel.what in ("corrltn", "conv"):
            depth = numbers // dims[0] if isinstance(dims[0], int) else 0
        else:
            depth = dims[-2] if len(dims) > 1 and isinstance(dims[-2], int) else 0
        return arithmetic, 2 * self.numbers(kernel.writes[0]) * depth if kernel.writes else 0

    def mark_fixed(self, kernel: Kernel) -> None:
        """Note the outputs of a kernel that reads nothing but constants."""
        given = {self.root(n) for n in kernel.reads if self.tensors[n].place != "host"}
        if given and all(n in self.fixed or self.tensors[n].place == "constant" for n in given):
            size = sum(self.fixed.get(n, 0) or self.bytes(n) for n in given)
            self.fixed |= {self.root(n): size for n in kernel.writes if self.tensors[self.root(n)].place == "scratch"}

    def waste(self, moved: Moved) -> list[Avoidable]:
        """What of a kernel is avoidable, but for tensors that depend on constants only."""
        kernel, found = moved.kernel, []
        moves = bool(kernel.words) and set(kernel.words) <= MOVES
        ports = {*self.program.inputs.values(), *self.program.outputs.values()}
        for name in moved.reads if moves else ():
            tensor = self.tensors[name]
            targets = [n for n in kernel.writes if n not in moved.reads]
            alike = [n for n in targets if self.tensors[n].dims == tensor.dims and self.tensors[n].place == "output"]
            copied = targets if name in self.caches else alike if tensor.place == "input" else []
            if copied and moved.reads[name]:
                size = moved.reads[name] + sum(moved.writes[n] for n in copied)
                to = ", ".join(n if n in ports else f"scratch {n}" for n in copied)
                found.append(Avoidable(COPY, f"{name} to {to}", size))
        for name in moved.reads if moved.product == "attention" else ():
            if name in self.caches:
                used, rows = self.share(name)
                found.append(Avoidable(UNFILLED, name, moved.reads[name] * (rows - used) // max(1, rows)))
        return found
