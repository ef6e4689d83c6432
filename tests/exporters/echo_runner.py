"""A runner without a model, for tests of the protocol: it answers with the prompt, and then counts on slowly."""

from __future__ import annotations

import os
import signal
import time
from typing import Any

from qat_edge_exporters.runner_turns import Take, serve

CRASH = 666  # an id at which the process ends


def run(request: dict[str, Any], take: Take) -> None:
    """Pass the ids of the prompt on, then 0, 1, 2, ..."""
    for count, token in enumerate([*request["ids"], *range(request["tokens"])]):
        if token == CRASH:
            os.kill(os.getpid(), signal.SIGKILL)
        if count == request["tokens"] or not take(token):
            return
        time.sleep(0.001 if token in request["ids"] else 0.01)


if __name__ == "__main__":
    print("A library prints a line.")
    serve(run)
