"""Every error that trol_edge raises on purpose, in one tree.

    TrolEdgeError
    ├── UsageError            an argument is wrong: its value, shape, dtype or combination
    │   ├── ImageError        a picture that cannot be read or has an unusable shape or dtype
    │   ├── ContextError      prompt plus answer do not fit the context of the bundle
    │   └── RequestError      a request to the server that is refused, with its HTTP status
    ├── CheckpointError       a checkpoint folder that is incomplete, altered or of another family
    ├── DownloadError         the model hub cannot be reached, or a download is incomplete
    ├── BundleError           a bundle that is missing, half-copied, altered or of another version
    ├── CalibrationError      statistics that cannot be gathered, or that belong to another checkpoint or other samples
    ├── ExportError           a graph could not be made, or it disagrees with the reference
    ├── BackendError          the inference library is missing, refuses the graph or lacks memory
    ├── VerifyError           the self-test's numbers are not the reference's on this machine
    └── UnfinishedError       a call met its deadline or was stopped before it had a result

A message says what was found, in which file or value, what was expected, and what to do.
"""

from __future__ import annotations

__all__ = [
    "BackendError",
    "BundleError",
    "CalibrationError",
    "CheckpointError",
    "ContextError",
    "DownloadError",
    "ExportError",
    "ImageError",
    "RequestError",
    "TrolEdgeError",
    "UnfinishedError",
    "UsageError",
    "VerifyError",
]


class TrolEdgeError(Exception):
    """Root of every error that this package raises on purpose."""


class UsageError(TrolEdgeError, ValueError):
    """An argument is wrong: its value, shape, dtype or combination."""


class ImageError(UsageError):
    """A picture that cannot be read, or an array that is not a picture."""


class ContextError(UsageError):
    """Prompt plus answer do not fit the context length of the bundle."""


class RequestError(UsageError):
    """A request to the server that is refused, with the HTTP status and the fields of OpenAI's error object."""

    def __init__(
        self,
        message: str,
        *,
        status: int = 400,
        code: str | None = None,
        param: str | None = None,
        retry_after_s: int | None = None,
    ) -> None:
        """Make the error. param: the field of the request. retry_after_s: when another try may succeed."""
        super().__init__(message)
        self.status, self.code, self.param, self.retry_after_s = status, code, param, retry_after_s


class CheckpointError(TrolEdgeError):
    """A checkpoint folder that is incomplete, altered or of another family."""


class DownloadError(TrolEdgeError):
    """The model hub cannot be reached, or a download is incomplete."""


class BundleError(TrolEdgeError):
    """A bundle that is missing, half-copied, altered or of another version."""


class CalibrationError(TrolEdgeError):
    """Statistics that cannot be gathered, or that belong to another checkpoint or other samples."""


class ExportError(TrolEdgeError):
    """A graph could not be made, or it disagrees with the reference."""


class BackendError(TrolEdgeError):
    """The inference library is missing, refuses the graph or lacks memory."""


class VerifyError(TrolEdgeError):
    """The self-test's numbers are not the reference's on this machine."""


class UnfinishedError(TrolEdgeError):
    """A call met its deadline or was stopped before it had a result. (`generate` and `stream` return a part.)"""

    def __init__(self, message: str, reason: str) -> None:
        """Make the error. reason: "deadline" or "stopped"."""
        super().__init__(message)
        self.reason = reason
