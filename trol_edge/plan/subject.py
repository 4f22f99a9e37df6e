"""Describes what is planned: a bundle, or a model as it would be exported, and the question to it."""

from __future__ import annotations

import dataclasses

from trol_edge.bundle.costs import Costs
from trol_edge.bundle.engines import folder_of, read
from trol_edge.bundle.manifest import Bundle
from trol_edge.bundle.names import SINGLE
from trol_edge.bundle.program_counts import ProgramCounts
from trol_edge.bundle.sizes import cache_bytes, device_bytes, embedding_bytes, loaded_bytes, shares_matrices
from trol_edge.bundle.targets import is_gpu
from trol_edge.errors import BundleError

TEXT_TOKENS = 84  # of the template and a short question
ANSWER_TOKENS = 64
# Share of the layers whose second pass counts: in the authors' figure of TroL-7B the gate is shut in 16 of 32 layers.
FIGURE = 0.5


@dataclasses.dataclass(frozen=True)
class Subject:
    """A bundle, or a model as it would be exported. Bytes are those in the device's memory.

    programs: what the kernels of each graph's engine move, by optimization profile; a graph without it is planned from
    its own counts. programs_of: which engines these are, in words. passes: the layers with a second pass, in words.
    by_layer: whether its engines are by layer, and scratch_bytes the most that one of these holds.
    """

    name: str
    target: str
    precision: str
    context: int  # tokens
    layers: int
    twice: int  # layers with a second pass
    tokens_per_tile: int
    most_tiles: int
    graphs: dict[str, Costs]
    weights: dict[str, int]  # bytes by graph
    decoder_bytes: int  # weights of all graphs but vision, each counted once
    shareable_bytes: int  # the part of them that traverse and step could share (`export --shared-weights`)
    shared: bool  # whether they share it
    embedding_bytes: int  # size of the table, which is held as it is stored, in the CPU's memory
    cache_bytes: int  # size of the first K/V set at full context
    second_bytes: int | None = None  # size of the second pass's K/V set; None: as much as the first
    programs: dict[str, tuple[ProgramCounts, ...]] = dataclasses.field(default_factory=dict)
    programs_of: str = ""
    passes: str = ""
    hidden_size: int = 0
    by_layer: bool = False
    scratch_bytes: int = 0

    def in_layers(self) -> Subject:
        """The same with engines by layer. What whole engines move is not what these do."""
        programs = {name: counts for name, counts in self.programs.items() if name == "vision"}
        said = f"{self.programs_of}, of vision only" if programs else ""
        return dataclasses.replace(self, by_layer=True, programs=programs, programs_of=said)


@dataclasses.dataclass(frozen=True)
class Workload:
    """One question and its answer. tiles: number of tiles of the picture; None: the most that the model makes."""

    tiles: int | None = None
    text: int = TEXT_TOKENS  # tokens
    answer: int = ANSWER_TOKENS  # tokens


def subject_of(bundle: Bundle) -> Subject:
    """Describe a bundle by its manifest and the header of its weights file. Raises BundleError if it has no counts."""
    manifest, tensors = bundle.manifest, bundle.weights().tensors
    graphs = {name: info.costs for name, info in manifest.graphs.items() if info.costs is not None}
    if manifest.graphs.keys() - graphs.keys() - SINGLE:
        raise BundleError(
            f"{bundle.folder}: its graphs were never counted ({manifest.created_by} wrote it); export it again"
        )
    on_gpu = is_gpu(manifest.target)

    def size(weight: str) -> int:
        return tensors[weight].nbytes if on_gpu else loaded_bytes(weight, tensors)

    sizes = {name: {w: size(w) for w in info.weights} for name, info in manifest.graphs.items()}
    decoder = {w: n for name, found in sizes.items() if name != "vision" for w, n in found.items()}
    first = cache_bytes(manifest.graphs["step"].inputs, manifest.context)
    apart, together = device_bytes(bundle) if on_gpu else (0, 0)
    built = read(bundle, manifest.target) if folder_of(bundle, manifest.target).exists() else None
    counted = {name: engine.programs for name, engine in built.engines.items() if engine.programs} if built else {}
    programs = {name: found for name, found in counted.items() if name in graphs}
    return Subject(
        name=manifest.model,
        target=manifest.target,
        precision=manifest.plan.recipe,
        context=manifest.context,
        layers=manifest.spec.num_layers,
        twice=len(manifest.spec.second_layers),
        tokens_per_tile=manifest.spec.vision.tokens_per_image,
        most_tiles=manifest.image.most_tiles,
        graphs=graphs,
        weights={name: sum(found.values()) for name, found in sizes.items()},
        decoder_bytes=sum(decoder.values()),
        shareable_bytes=apart - together if manifest.plan.can_share_weights else 0,
        shared=on_gpu and shares_matrices(bundle),
        embedding_bytes=embedding_bytes(bundle),
        cache_bytes=first,
        second_bytes=cache_bytes(manifest.graphs["traverse"].inputs, manifest.context) - first,
        programs=programs,
        passes=manifest.passes,
        programs_of=f"its own engines, {built.key.library}" if built and programs else "",
        hidden_size=manifest.spec.hidden_size,
        by_layer=built is not None and built.by_layer,
        scratch_bytes=max((profile.scratch for found in counted.values() for profile in found), default=0),
    )
