"""Errors with a message for the user. The command line prints each as one paragraph and sets the exit code.

QatEdgeError                 exit 1
├── UsageError               exit 2: an unknown or impossible flag, configuration key or combination
├── ModelError               a model or tokenizer that cannot be used
├── DataError                a data file or row
├── RunError                 a run folder: missing, of another version, or in the way
├── ExportError              a model that a target cannot express, or a compiler that failed
├── ArtifactError            an exported file that is damaged or differs from what was frozen
├── GateError                a gate (--max-... or --min-...) was missed
├── HubError                 the Hugging Face Hub cannot be reached, or refused an upload
└── DeviceError              a device that cannot be reached or a runtime that failed there
"""


class QatEdgeError(Exception):
    """Base of all errors whose message is written for the user."""

    exit_code = 1


class UsageError(QatEdgeError):
    """A flag, a configuration key or a combination of them is impossible; the message names it."""

    exit_code = 2


class ModelError(QatEdgeError):
    """A model or tokenizer is missing or of the wrong kind."""


class DataError(QatEdgeError):
    """A data file or row cannot be used; the message names the file and the line."""


class RunError(QatEdgeError):
    """A run folder or one of its parts is missing, of another version, or in the way."""


class ExportError(QatEdgeError):
    """A target cannot express the model, or its compiler failed."""


class ArtifactError(QatEdgeError):
    """An exported artifact is damaged, incomplete or differs from the frozen checkpoint."""


class GateError(QatEdgeError):
    """A measured figure missed its gate."""


class HubError(QatEdgeError):
    """The Hugging Face Hub cannot be reached, or refused an upload."""


class DeviceError(QatEdgeError):
    """A device cannot be reached, or the runtime on it failed."""
