"""A table of the operators that TensorRT's ONNX parsers support, with their types, by version.

The source for 10.1 and for the additions of 10.14, 10.15 and 11.0 is the support table of each parser release
(onnx-tensorrt's operators.md). For TensorRT for RTX 1.7.1 the parser itself was asked (`OnnxParser.supports_operator`),
which gives names only. Between 10.1 and 10.13 nothing that this project uses changed.
"""

from __future__ import annotations

import dataclasses

Version = tuple[int, ...]

# Types that the first operand may have -> operators, as of TensorRT 10.1.
_FIRST: dict[str, str] = {
    "FP32 FP16 BF16": (
        "Acos Acosh Asin Asinh Atan Atanh AveragePool BatchNormalization Ceil Celu Clip Conv ConvTranspose Cos "
        "Cosh CumSum Dropout Einsum Elu Erf Exp Floor GRU Gemm GlobalAveragePool GlobalLpPool GlobalMaxPool "
        "GroupNormalization HardSigmoid HardSwish Hardmax ImageScaler InstanceNormalization IsInf LRN LSTM "
        "LayerNormalization LeakyRelu Log LogSoftmax LpNormalization LpPool MatMul MaxPool "
        "MeanVarianceNormalization PRelu ParametricSoftplus Pow QuantizeLinear RNN RandomNormal RandomNormalLike "
        "RandomUniform RandomUniformLike Reciprocal Resize Round ScaledTanh Scan Selu Sigmoid Sin Sinh Softmax "
        "Softplus Softsign Sqrt Tan Tanh ThresholdedRelu Upsample"
    ),
    "FP32 FP16 BF16 INT32 INT64": (
        "Abs Add ArgMax ArgMin DepthToSpace Div Equal Greater GreaterOrEqual IsNaN Less LessOrEqual Max Min Mod "
        "Mul Neg Pad Range ReduceL1 ReduceL2 ReduceLogSum ReduceLogSumExp ReduceMax ReduceMean ReduceMin "
        "ReduceProd ReduceSum ReduceSumSquare Relu Scatter ScatterElements ScatterND Shrink Sign SpaceToDepth Sub "
        "Sum TopK"
    ),
    "FP32 FP16 BF16 INT32 INT64 BOOL": (
        "Concat Constant ConstantOfShape Expand EyeLike Flatten Gather GatherElements GatherND Identity If Loop "
        "OneHot Reshape ReverseSequence Shape Size Slice Split Squeeze Tile Transpose Trilu Unsqueeze Where"
    ),
    "FP32 FP16": "DeformConv GridSample Mish NonMaxSuppression NonZero RoiAlign",
    "BOOL": "And Not Or Xor",
    "FP32 FP16 BF16 INT32 INT64 UINT8 BOOL": "Cast CastLike",
    "INT8 FP8 INT4": "DequantizeLinear",
    "FP32 FP16 BF16 INT8 INT32 INT64": "Gelu",
    "FP32 FP16 BF16 FP8 INT32 INT64": "Mean",
}

# Version -> operators that it added, with the types of their first operand.
_ADDED: dict[Version, dict[str, str]] = {
    (10, 14): {"Attention": "FP32 FP16 BF16 INT8 FP8"},
    (10, 15): {
        "RMSNormalization": "FP32 FP16 BF16",
        "RotaryEmbedding": "FP32 FP16 BF16",
        "TensorScatter": "FP32 FP16 BF16 INT32",
        "STFT": "FP32",
        "BlackmanWindow HammingWindow HannWindow": "FP32 FP16",
    },
    (11, 0): {"Swish": "FP32 FP16 BF16"},
}
# TensorRT for RTX 1.7.1 supports all of the above without the first, and with the second.
_NOT_IN_RTX = "DeformConv"
_ONLY_IN_RTX = "CausalConvWithState LinearAttention"


@dataclasses.dataclass(frozen=True)
class Operator:
    """An operator of a parser: the first version that supports it, and types of its first operand (empty: unknown)."""

    since: Version
    types: tuple[str, ...]


def _table() -> dict[str, Operator]:
    table = {op: Operator((10, 1), tuple(types.split())) for types, ops in _FIRST.items() for op in ops.split()}
    for version, added in _ADDED.items():
        table |= {op: Operator(version, tuple(types.split())) for ops, types in added.items() for op in ops.split()}
    return table


CLASSIC = _table()
RTX = {op: entry for op, entry in CLASSIC.items() if op not in _NOT_IN_RTX.split()} | {
    op: Operator((1, 7), ()) for op in _ONLY_IN_RTX.split()
}


def supported(version: Version, rtx: bool) -> dict[str, Operator]:
    """The operators that a TensorRT version's parser supports. rtx: TensorRT for RTX, which has its own versions."""
    if rtx:
        return dict(RTX)
    return {op: entry for op, entry in CLASSIC.items() if entry.since <= version}


def refusal(op: str, version: Version, rtx: bool) -> str | None:
    """Why a parser would refuse an operator, such as "Attention needs TensorRT 10.14, this is 10.3", or None."""
    if op in supported(version, rtx):
        return None
    have = ".".join(map(str, version))
    if rtx:
        return f"{op} is not an operator of TensorRT for RTX {have}"
    if op in CLASSIC:
        return f"{op} needs TensorRT {'.'.join(map(str, CLASSIC[op].since))}, this is {have}"
    return f"{op} is not an operator of any TensorRT up to 11.4"
