"""TroL vision-language models on robots.

>>> import trol_edge
>>> rt = trol_edge.Runtime("build/trol-nano")
>>> print(rt.generate("What is left of the red star?", images="scene.png").text)

Importing this package loads numpy, pillow and tokenizers. Making a Runtime loads an inference library. torch,
transformers and onnx are never loaded. The telemetry of these libraries is switched off (see trol_edge.telemetry).
"""

import trol_edge.telemetry  # noqa: F401  (before any library that reports home)
from trol_edge._version import __version__
from trol_edge.answering.chat import Chat
from trol_edge.answering.results import Answer, Choice, Option, Piece, Timings, TokenLogprob, YesNo
from trol_edge.answering.streams import AnswerStream
from trol_edge.errors import TrolEdgeError
from trol_edge.latest import LatestCounts, LatestOnly
from trol_edge.prompt.template import IMAGE
from trol_edge.runtime import Runtime
from trol_edge.session import Session

__all__ = [
    "IMAGE",
    "Answer",
    "AnswerStream",
    "Chat",
    "Choice",
    "LatestCounts",
    "LatestOnly",
    "Option",
    "Piece",
    "Runtime",
    "Session",
    "Timings",
    "TokenLogprob",
    "TrolEdgeError",
    "YesNo",
    "__version__",
]
