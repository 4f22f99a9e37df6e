"""A small table of the targets that a bundle can be made for.

A target says which library runs a bundle's graphs, which operators that library knows (others are lowered to plain ones
on export), which precisions make sense on its hardware, and what is missing there.
"""

from __future__ import annotations

import dataclasses

from trol_edge.bundle.trt_operators import Operator, Version, refusal, supported
from trol_edge.errors import UsageError

NOT_YET = "engines not yet run on a GPU"  # said wherever that is spoken of, until somebody has run one


@dataclasses.dataclass(frozen=True)
class Target:
    """One target.

    versions: of `module`, the first supported and the first unsupported. operators: the TensorRT version whose parser
    the graphs are made for (the oldest supported); None if the target is not TensorRT. opset: for graphs without INT4
    (`int4_opset` for those with it). capabilities: CUDA compute capabilities of its GPUs; None: any from 7.5.
    """

    name: str
    machine: str
    library: str
    module: str
    versions: tuple[Version, Version]
    opset: int
    int4_opset: int
    operators: Version | None
    precisions: tuple[str, ...]
    capabilities: tuple[str, ...] | None
    builds: str
    missing: tuple[str, ...]

    @property
    def gpu(self) -> bool:
        """Whether TensorRT builds engines for it."""
        return self.operators is not None

    @property
    def rtx(self) -> bool:
        """Whether its library is TensorRT for RTX."""
        return self.module == "tensorrt_rtx"

    @property
    def shares_memory(self) -> bool:
        """Whether what computes has no memory of its own: a CPU, and the GPU of a Jetson."""
        return not self.gpu or self.name.startswith("jetson")

    def takes(self) -> dict[str, Operator]:
        """The operators that its parser supports; none if the target is not TensorRT."""
        return supported(self.operators, self.rtx) if self.operators else {}

    @property
    def in_place(self) -> bool:
        """Whether what runs its graphs writes K/V caches in place: ONNX Runtime, and TensorRT from KVCacheUpdate on."""
        return not self.gpu or "TensorScatter" in self.takes()

    def serves(self, version: Version) -> bool:
        """Whether graphs are made for this version of its library."""
        return self.versions[0] <= version < self.versions[1]


_NO_ATTENTION = "no Attention, RMSNormalization, RotaryEmbedding, TensorScatter, Swish: lowered to plain operators"
_NO_CALIBRATOR = "implicit INT8 calibration and FP16/INT8 builder flags are gone: precision is in the graph (Q/DQ)"
_ORIN_FP8 = "fp8: Orin (8.7) has no FP8 units"

TARGETS = {
    target.name: target
    for target in (
        Target(
            name="cpu",
            machine="any x86-64 or aarch64 Linux",
            library="ONNX Runtime",
            module="onnxruntime",
            versions=((1, 23), (2,)),
            opset=23,
            int4_opset=23,
            operators=None,
            precisions=("fp32", "int8", "int8-dynamic", "int4", "int4-dynamic"),
            capabilities=(),
            builds="nothing to build, because graphs are loaded as they are",
            missing=("fp16, fp8: a CPU has no units for them",),
        ),
        Target(
            name="rtx",
            machine="x86-64 with a GeForce or RTX GPU, Ampere or later",
            library="TensorRT for RTX",
            module="tensorrt_rtx",
            versions=((1, 7), (2,)),
            opset=24,
            int4_opset=24,
            operators=(1, 7, 1),
            precisions=("fp32", "fp16", "int8", "int4", "fp8"),
            capabilities=("8.0", "8.6", "8.9", "12.0"),
            builds="anywhere, without a GPU; the engine is finished on the GPU at its first start",
            missing=(
                "Jetson: 8.7 and 11.0 are not among its compute capabilities",
                "fp8 needs 8.9 or later",
                _NO_CALIBRATOR,
            ),
        ),
        Target(
            name="tensorrt",
            machine="any machine with an NVIDIA GPU and TensorRT",
            library="TensorRT",
            module="tensorrt",
            versions=((10, 3), (12,)),
            opset=20,
            int4_opset=21,
            operators=(10, 3),
            precisions=("fp32", "fp16", "int8", "int4", "fp8"),
            capabilities=None,
            builds="on the GPU that will run the engine",
            missing=(f"made for the oldest supported version, 10.3: {_NO_ATTENTION}", "fp8 needs 8.9 or later"),
        ),
        Target(
            name="jetson-jp6",
            machine="Jetson Orin, JetPack 6.1 and 6.2",
            library="TensorRT 10.3 (JetPack's, Python 3.10)",
            module="tensorrt",
            versions=((10, 3), (10, 13)),
            opset=20,
            int4_opset=21,
            operators=(10, 3),
            precisions=("fp32", "fp16", "int8", "int4"),
            capabilities=("8.7",),
            builds="on the device",
            missing=(_NO_ATTENTION, _ORIN_FP8, "no IStreamWriter: an engine is held in memory until it is written"),
        ),
        Target(
            name="jetson-jp7",
            machine="Jetson Thor, JetPack 7.0 and 7.1",
            library="TensorRT 10.13 (JetPack's, Python 3.12)",
            module="tensorrt",
            versions=((10, 13), (10, 15)),
            opset=20,
            int4_opset=21,
            operators=(10, 13),
            precisions=("fp32", "fp16", "int8", "int4", "fp8"),
            capabilities=("11.0",),
            builds="on the device",
            missing=(f"10.13: {_NO_ATTENTION}",),
        ),
        Target(
            name="jetson-jp72",
            machine="Jetson Thor and Orin, JetPack 7.2",
            library="TensorRT 10.15 to 10.16 (JetPack's, Python 3.12)",
            module="tensorrt",
            versions=((10, 15), (11,)),
            opset=24,
            int4_opset=24,
            operators=(10, 15),
            precisions=("fp32", "fp16", "int8", "int4", "fp8"),
            capabilities=("8.7", "11.0"),
            builds="on the device",
            missing=("no Swish: lowered to plain operators", _ORIN_FP8),
        ),
        Target(
            name="jetson-trt11",
            machine="Jetson AGX Orin and Thor with TensorRT 11 installed",
            library="TensorRT 11 (Python 3.12)",
            module="tensorrt",
            versions=((11, 0), (12,)),
            opset=24,
            int4_opset=24,
            operators=(11, 0),
            precisions=("fp32", "fp16", "int8", "int4", "fp8"),
            capabilities=("8.7", "11.0"),
            builds="on the device",
            missing=(_NO_CALIBRATOR, _ORIN_FP8, "Orin Nano and NX are not named by NVIDIA for TensorRT 11.4"),
        ),
    )
}


def is_gpu(name: str) -> bool:
    """Whether engines are built for a target. False for "cpu", "onnx" (files for other tools) and unknown names."""
    return name in TARGETS and TARGETS[name].gpu


def target(name: str) -> Target:
    """Find a target by name. Raises UsageError if there is none."""
    if name not in TARGETS:
        raise UsageError(f"target {name!r} is not one of {', '.join(TARGETS)}")
    return TARGETS[name]


def refusals(operators: dict[str, int], version: Version, rtx: bool) -> list[str]:
    """Reasons why a TensorRT version's parser would refuse some of these operators (type -> count), as clauses."""
    return [why for op in sorted(operators) if (why := refusal(op, version, rtx))]
