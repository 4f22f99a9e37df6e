"""The table of targets: consistent in itself, and what it says of operators is what the parsers' own tables say."""

from __future__ import annotations

import importlib.util

import pytest

from trol_edge.bundle.targets import TARGETS, refusals, target
from trol_edge.bundle.trt_operators import CLASSIC, RTX, refusal, supported
from trol_edge.errors import UsageError

NEW = ("Attention", "RMSNormalization", "RotaryEmbedding", "TensorScatter", "Swish")


def test_names_and_versions_are_sound() -> None:
    """Each entry under its own name, its range not empty, its operators those of the oldest version served."""
    assert list(TARGETS) == ["cpu", "rtx", "tensorrt", "jetson-jp6", "jetson-jp7", "jetson-jp72", "jetson-trt11"]
    for name, entry in TARGETS.items():
        assert entry.name == name
        oldest, end = entry.versions
        assert oldest < end
        assert entry.serves(oldest) and not entry.serves(end)
        assert entry.gpu == (name != "cpu")
        assert entry.opset <= entry.int4_opset
        assert entry.missing and entry.precisions
        if entry.gpu:
            assert entry.operators is not None and entry.operators[: len(oldest)] == oldest
        if entry.capabilities and "8.7" in entry.capabilities and "11.0" not in entry.capabilities:
            assert "fp8" not in entry.precisions  # Orin alone
    assert TARGETS["rtx"].rtx and not TARGETS["tensorrt"].rtx
    with pytest.raises(UsageError, match=r"target 'orin' is not one of cpu, rtx, tensorrt, jetson-jp6"):
        target("orin")


def test_a_jetson_finds_itself_in_one_target_per_version() -> None:
    """JetPack's versions: 6.2, 7.0, 7.1, 7.2, and TensorRT 11 on top."""
    jetsons = [entry for entry in TARGETS.values() if entry.name.startswith("jetson")]
    for version, name in (((10, 3, 0), "jp6"), ((10, 7, 0), "jp6"), ((10, 13, 3), "jp7"), ((10, 16, 1), "jp72")):
        assert [entry.name for entry in jetsons if entry.serves(version)] == [f"jetson-{name}"]
        assert TARGETS["tensorrt"].serves(version)
    assert [entry.name for entry in jetsons if entry.serves((11, 4, 0))] == ["jetson-trt11"]
    assert not TARGETS["tensorrt"].serves((8, 6, 2)) and not TARGETS["tensorrt"].serves((12, 0))


def test_operators_by_version() -> None:
    """What came when; and the sentence that a user hears."""
    for op, since in zip(NEW, ((10, 14), (10, 15), (10, 15), (10, 15), (11, 0)), strict=True):
        for version in ((10, 3), (10, 13), (10, 14), (10, 16), (11, 4)):
            assert (op in supported(version, rtx=False)) == (version >= since)
        assert op in supported((1, 7, 1), rtx=True)
    assert refusal("Attention", (10, 3), False) == "Attention needs TensorRT 10.14, this is 10.3"
    assert refusal("MatMulNBits", (11, 4), False) == "MatMulNBits is not an operator of any TensorRT up to 11.4"
    assert refusal("DeformConv", (1, 7, 1), True) == "DeformConv is not an operator of TensorRT for RTX 1.7.1"
    assert refusal("MatMul", (10, 3), False) is None
    assert refusals({"MatMul": 3, "Swish": 1, "Attention": 2}, (10, 13), False) == [
        "Attention needs TensorRT 10.14, this is 10.13",
        "Swish needs TensorRT 11.0, this is 10.13",
    ]
    assert CLASSIC["DequantizeLinear"].types == ("INT8", "FP8", "INT4")
    assert len(CLASSIC) > 130


@pytest.mark.rtx
def test_rtx_operators_are_the_parsers_own() -> None:
    """Each operator of the table, asked of TensorRT for RTX's parser."""
    if importlib.util.find_spec("tensorrt_rtx") is None:
        pytest.skip("tensorrt_rtx is not installed (make test-rtx installs it)")
    import tensorrt_rtx as trt

    logger = trt.Logger(trt.Logger.ERROR)
    builder = trt.Builder(logger)
    parser = trt.OnnxParser(builder.create_network(0), logger)
    wrong = [op for op in CLASSIC.keys() | RTX.keys() if parser.supports_operator(op) != (op in RTX)]
    assert wrong == []
