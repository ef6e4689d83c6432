"""lm-evaluation-harness with the models of a run: its own command line, with one more value of --model.

    python -m qat_edge.public_tasks.harness --model qat-edge --model_args run=runs/mine,source=onnx --tasks arc_easy

The harness has no plug-ins: a model is known to it once it is registered in its process, which `register` does. All
other flags, and its task files, are the harness's.
"""

from __future__ import annotations

import sys
from importlib.util import find_spec

from qat_edge.errors import QatEdgeError, UsageError

NAME = "qat-edge"
MODEL = "qat_edge.public_tasks.harness_model:HarnessModel"


def register() -> None:
    """Make `--model qat-edge` known to the harness in this process.

    Raises:
        UsageError: The harness is not installed.
    """
    if find_spec("lm_eval") is None:
        raise UsageError('lm-evaluation-harness is not installed. `pip install "qat-edge[eval]"` installs it.')
    from lm_eval.api.registry import model_registry

    if NAME not in model_registry:
        model_registry.register(NAME, target=MODEL)


def main() -> None:
    """Run the harness's command line; our own errors end it with one paragraph."""
    try:
        register()
        from lm_eval.__main__ import cli_evaluate

        cli_evaluate()
    except QatEdgeError as error:
        print(f"Error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)


if __name__ == "__main__":
    main()
