"""What the tests share: bundles exported once per session, because tracing is the slow part."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from trol_edge.runtime import Runtime

if TYPE_CHECKING:
    from tests.prompts import Prompts

CHECKPOINTS = Path(__file__).resolve().parents[1] / "export" / "checkpoints"
# A Runtime's first load of a bundle replays its self-test; here only where a test asks for it.
os.environ["TROL_EDGE_SELFTEST"] = "0"
NANOS = ("trol-nano", "trol-nano-phi3")  # the shipped models, one per family
NANO = CHECKPOINTS / NANOS[0]
CONTEXT = 2560  # tokens: room for the longest golden prompt, two pictures
# A trace holds no weights, so it does not depend on these numbers of a checkpoint.
NOT_IN_THE_GRAPH = {
    "rope_theta": 0.0,
    "max_position_embeddings": 0,
    "eos_token_id": 0,
    "image_token_id": 0,
    "embedding_rows": 0,
}


@pytest.fixture(scope="session")
def traces() -> Iterator[dict[Any, Any]]:
    """Trace each architecture once: checkpoints that differ only in their weights share the (cloned) graphs."""
    from trol_edge.export.graphs import trace as graphs

    trace = graphs.trace
    memo: dict[Any, Any] = {"untouched": trace}

    def once(name: str, family: Any, spec: Any, capacity: int) -> Any:
        same = dataclasses.replace(spec, **NOT_IN_THE_GRAPH)
        key = (name, family.name, same, None if name == "vision" else capacity)
        if key not in memo:
            memo[key] = trace(name, family, spec, capacity)
        return memo[key].clone()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(graphs, "trace", once)
        yield memo


@pytest.fixture(scope="session")
def exported(traces: dict[Any, Any], tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Bundle of a checkpoint folder, exported once per session: exported(folder, target="cpu", context=None)."""
    from trol_edge.export import pipeline

    done: dict[Any, Path] = {}

    def export(checkpoint: Path, target: str = "cpu", context: int | None = None) -> Path:
        key = (checkpoint, target, context)
        if key not in done:
            folder = tmp_path_factory.mktemp("bundle") / checkpoint.name
            pipeline.export(checkpoint, folder, target=target, context=context)
            done[key] = folder
        return done[key]

    return export


@pytest.fixture(scope="session")
def golden_bundle(exported: Callable[..., Path]) -> Callable[..., Path]:
    """Bundle of a golden case: golden_bundle("internlm2-text", target="cpu")."""
    from tests.golden import GOLDEN
    from trol_edge.export.reference.checkpoint import Checkpoint

    def bundle(case: str, target: str = "cpu") -> Path:
        limit = Checkpoint(GOLDEN / case).spec.max_position_embeddings
        return exported(GOLDEN / case, target, min(CONTEXT, limit))

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
            (made / name).symlink_to(GOLDEN / case / name)
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
