"""What the tests share: bundles exported once per session, because tracing is the slow part."""

from __future__ import annotations

import gc
import importlib.util
import json
import os
import shutil
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from tests import kept
from trol_edge.runtime import Runtime

if TYPE_CHECKING:
    from tests.prompts import Prompts
    from trol_edge.export.reference.checkpoint import Checkpoint

CHECKPOINTS = Path(__file__).resolve().parents[1] / "export" / "checkpoints"
# A Runtime's first load of a bundle replays its self-test; here only where a test asks for it.
os.environ["TROL_EDGE_SELFTEST"] = "0"
# One thread each: in models as small as these a second one waits, spinning, and other tests run beside.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Servers here speak no TLS, and certificates would be read again for each request.
os.environ["SSL_CERT_DIR"] = os.devnull
os.environ.pop("SSL_CERT_FILE", None)
# Wide enough that no message breaks where the length of a temporary folder's name says.
os.environ["COLUMNS"] = "200"
NANOS = ("trol-nano", "trol-nano-phi3")  # the shipped models, one per family
NANO = CHECKPOINTS / NANOS[0]


def slow(*values: Any) -> list[Any]:
    """Values of a parameter that only `make test-slow` takes."""
    return [pytest.param(*(v if isinstance(v, tuple) else (v,)), marks=pytest.mark.slow) for v in values]


def context_of(case: str) -> int:
    """Tokens: room for the longest prompt of a golden case, in one family two pictures. It is a part of the trace."""
    return 1024 if case.startswith("phi3") else 2560


def pytest_collection_finish() -> None:
    """What was imported is never garbage: looking through it again and again is a tenth of the suite's time."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 20, 20)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark what takes a bundle: `make check` leaves it out. It comes first, because each of two processes begins with
    its half of the tests: one exports, and the other need not wait for it."""
    for item in items:
        if {"exported", "bundle_of"} & set(getattr(item, "fixturenames", ())):
            item.add_marker("bundle")
    items.sort(key=lambda item: item.get_closest_marker("bundle") is None)


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> Iterator[None]:
    """ONNX Runtime on one thread where a test does not say another number: four times less processor time."""
    from trol_edge.runtimes.ort import OrtBackend

    real: Any = OrtBackend.__init__

    def init(self: Any, *args: Any, threads: int | None = None, **more: Any) -> None:
        real(self, *args, threads=threads or 1, **more)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(OrtBackend, "__init__", init)
        yield


@pytest.fixture(scope="session", autouse=True)
def traces() -> Iterator[Callable[..., Any]]:
    """Trace a layer of each architecture once and keep it (tests/traces.py): the suite's largest cost. Yields the real
    `trace_one`."""
    if importlib.util.find_spec("torch") is None:  # the environment of a robot
        yield lambda *_: None
        return
    from tests.traces import remember
    from trol_edge.export.graphs import canonical as graphs

    real = graphs.trace_one
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(graphs, "trace_one", remember(real))
        yield real


@pytest.fixture(scope="session")
def exported() -> Iterator[Callable[..., Path]]:
    """Bundle of a checkpoint folder, made once and kept: exported(folder, target="cpu", context=None, ...).

    With lowered=False it has the graphs as they are traced. Precisions with rounded weights are calibrated on a few
    scenes. selftest: by default only the shipped models as they are lowered have one. To change files of it, copy it.
    """
    from trol_edge.calibration import run as calibration
    from trol_edge.export import pipeline
    from trol_edge.export.quantize.recipes import RecipeOptions
    from trol_edge.export.quantize.stats import Statistics

    def export(
        checkpoint: Path,
        target: str = "cpu",
        context: int | None = None,
        lowered: bool = True,
        recipe: str = "fp32",
        selftest: bool | None = None,
        traversal: str = "all",
        kv: str | None = None,
    ) -> Path:
        options = RecipeOptions(recipe, kv=kv)
        tested = lowered and checkpoint.parent == CHECKPOINTS if selftest is None else selftest

        def make(folder: Path) -> None:
            with pytest.MonkeyPatch.context() as patch:
                if not lowered:
                    patch.delitem(pipeline.LOWERINGS, target)
                pipeline.export(
                    checkpoint,
                    folder,
                    target=target,
                    context=context,
                    traversal=traversal,
                    options=options,
                    calibration=calibrated,
                    record_selftest=tested,
                )

        sources = {*kept.sources(pipeline.__name__), *kept.sources(calibration.__name__), Path(__file__)}
        files = sorted(path for path in checkpoint.iterdir() if path.is_file())
        choices = (checkpoint.name, target, context, lowered, options, tested, traversal)
        key = kept.digest([*sorted(sources), *files], installed(), *choices)
        return kept.folder("bundles", key, make)

    def calibrated(source: Checkpoint) -> Statistics:
        files = sorted(path for path in source.folder.iterdir() if path.is_file())
        key = kept.digest([*kept.sources(calibration.__name__), Path(__file__), *files], installed())
        made = kept.folder(
            "statistics", key, lambda folder: calibration.calibrate(source.folder, None, folder, count=8)
        )
        return Statistics.load(made, source.identity())

    yield export
    assert kept.altered() == [], "a test wrote into a bundle that others read, too"


def installed() -> tuple[str, ...]:
    """Versions of what makes a bundle."""
    names = ("torch", "onnx", "onnx_ir", "onnxscript", "onnxruntime", "numpy", "safetensors", "sentencepiece")
    return tuple(f"{name} {metadata.version(name)}" for name in names)


@pytest.fixture(scope="session")
def golden_bundle(exported: Callable[..., Path]) -> Callable[..., Path]:
    """Bundle of a golden case: golden_bundle("internlm2-text", target="cpu", selftest=False)."""
    from tests.golden import GOLDEN
    from trol_edge.export.reference.checkpoint import Checkpoint

    def bundle(case: str, target: str = "cpu", selftest: bool = False) -> Path:
        limit = Checkpoint(GOLDEN / case).spec.max_position_embeddings
        return exported(GOLDEN / case, target, min(context_of(case), limit), selftest=selftest)

    return bundle


@pytest.fixture(scope="session")
def phi3_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """A golden checkpoint with a tokenizer of its vocabulary: phi3_checkpoint(case, **changes of its llm_config)."""
    from tests.golden import GOLDEN
    from tests.phi3_tokenizer import make

    def folder(case: str, **changes: Any) -> Path:
        made = tmp_path_factory.mktemp("checkpoint") / case
        made.mkdir()
        for name in ("model.safetensors", "trol_gating.pt"):
            shutil.copyfile(GOLDEN / case / name, made / name)
        config = json.loads((GOLDEN / case / "config.json").read_text())
        config["llm_config"] |= changes
        (made / "config.json").write_text(json.dumps(config))
        (made / "tokenizer.json").write_text(json.dumps(make()))
        return made

    return folder


@pytest.fixture(scope="module")
def load(
    exported: Callable[..., Path], golden_bundle: Callable[..., Path], phi3_checkpoint: Callable[..., Path]
) -> Prompts:
    """Prompts by name, golden's and the shipped models', each on its Runtime."""
    from tests.prompts import Prompts

    return Prompts(exported, golden_bundle, phi3_checkpoint)


@pytest.fixture
def no_gradients() -> Iterator[None]:
    """Nothing is trained."""
    import torch

    with torch.no_grad():
        yield


@pytest.fixture(scope="session")
def bundle_of(request: pytest.FixtureRequest) -> Callable[[str], Path]:
    """Bundle of a shipped model by name, as `make engine` makes it: exported once, or, where export is not installed,
    a folder of that name in TROL_EDGE_NANO_BUNDLES."""
    given = os.environ.get("TROL_EDGE_NANO_BUNDLES")
    if given:
        return lambda name: Path(given) / name
    exported = request.getfixturevalue("exported")
    return lambda name: exported(CHECKPOINTS / name)


# What does not depend on the family is tested on the first model alone, the rest on each of them.


@pytest.fixture(scope="session")
def nano_bundle(bundle_of: Callable[[str], Path]) -> Path:
    """Bundle of trol-nano."""
    return bundle_of(NANOS[0])


@pytest.fixture(scope="session")
def nano(nano_bundle: Path) -> Runtime:
    """trol-nano, loaded."""
    return Runtime(nano_bundle)


@pytest.fixture(scope="session", params=NANOS)
def each_bundle(request: pytest.FixtureRequest, bundle_of: Callable[[str], Path]) -> Path:
    """Bundle of each shipped model."""
    return bundle_of(request.param)


@pytest.fixture(scope="session")
def each_nano(each_bundle: Path) -> Runtime:
    """Each shipped model, loaded."""
    return Runtime(each_bundle)
