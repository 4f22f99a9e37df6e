"""Reads the programs of a bundle's engines: from the file for TensorRT for RTX, else from the library's inspector."""

from __future__ import annotations

from collections.abc import Mapping

from trol_edge.bundle.engines import EngineSet, mapped
from trol_edge.bundle.manifest import Bundle, GraphInfo
from trol_edge.bundle.programs import engine_path, shapes_of
from trol_edge.bundle.targets import target as target_of
from trol_edge.errors import BackendError
from trol_edge.program import inspector, text
from trol_edge.program.model import Program
from trol_edge.runtimes.trt.api import Library, load

DEFAULT_STREAM = 0  # of the process; nothing else is enqueued here


def programs(
    bundle: Bundle,
    engines: EngineSet,
    name: str,
    graph: GraphInfo,
    dims: Mapping[str, int],
    library: Library | None = None,
) -> tuple[Program, ...]:
    """The programs of an engine, one for each profile, or the one for these sizes where the inspector must be asked.

    graph: the graph that the engine runs.

    The inspector works where the engine runs: the engine is loaded, and takes its memory on the GPU.
    Raises BundleError if the engine does not say what it does, and BackendError if it cannot be loaded here.
    """
    target = target_of(engines.key.target)
    if target.rtx:
        return text.read(engine_path(bundle, engines, name))
    library = library or load(target.module)
    path, info = engine_path(bundle, engines, name), engines.engines[name]
    with mapped(bundle, engines, name) as plan:
        engine = library.open(plan, info.file)
    context = engine.context()
    fitting = [i for i, r in enumerate(info.profiles) if all(low <= dims[d] <= high for d, (low, _, high) in r.items())]
    if info.profiles and not fitting:
        raise BackendError(f"{path}: none of its profiles takes {dict(dims)}; choose other sizes")
    if fitting:
        context.profile(fitting[0], DEFAULT_STREAM)
        for port, shape in shapes_of(graph, dims).items():
            if any(isinstance(size, str) for p in graph.inputs if p.name == port for size in p.shape):
                context.shape(port, shape)
    return (inspector.parse(engine.described(context), library.title, str(path), engine.scratch_bytes),)
