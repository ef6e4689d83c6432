"""Every error a user can cause or meet. `cli.main` turns them into one paragraph and an exit code.

QatEdgeError                 exit 1
├── UsageError               exit 2: a flag, a configuration key or a combination that cannot be
├── ModelError               a model or tokenizer that cannot be used
├── DataError                a data file or row
├── RunError                 a run folder: missing, of another version, already there
├── ExportError              a model that a target cannot express, or a compiler that failed
├── ArtifactError            an exported file that is damaged or differs from what was frozen
├── GateError                a limit set with --max-... or --min-... was missed
└── DeviceError              a device that cannot be reached or a runtime that failed there
"""


class QatEdgeError(Exception):
    """Base of all errors whose message is written for the user."""

    exit_code = 1


class UsageError(QatEdgeError):
    """What was asked for cannot be: the message names the flag or key."""

    exit_code = 2


class ModelError(QatEdgeError):
    """A model or tokenizer is missing or of the wrong kind."""


class DataError(QatEdgeError):
    """A data file or row cannot be used; the message names the file and the line."""


class RunError(QatEdgeError):
    """A run folder or one of its parts is missing, foreign or in the way."""


class ExportError(QatEdgeError):
    """A target cannot express the model, or its compiler failed."""


class ArtifactError(QatEdgeError):
    """An exported artifact is damaged, incomplete or not what was frozen."""


class GateError(QatEdgeError):
    """A measured figure missed the limit set for it."""


class DeviceError(QatEdgeError):
    """A device cannot be reached, or the runtime on it failed."""
