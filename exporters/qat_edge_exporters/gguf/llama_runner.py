"""Run llama.cpp in a separate process, which a damaged file may crash.

Usage: `python -m qat_edge_exporters.gguf.llama_runner FOLDER`, with requests on stdin (see `runner_turns`) that have
"ids", the prompt, "ends", the ids that end an answer, and "grammar", which limits all answers, or no such key. The part
of a prompt that is in the KV cache already, with the same ids before it, is not processed again.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

from qat_edge.models.token_ids import reusable_length
from qat_edge_exporters.gguf.gguf_file import MODEL_FILE
from qat_edge_exporters.runner_turns import Take, serve


def main() -> None:
    """Answer the requests on stdin greedily."""
    from qat_edge_devices.agent.llama_model import LlamaModel
    from qat_edge_devices.agent.model_errors import RequestRejected

    cached: list[int] = []
    try:
        model = LlamaModel()
        model.load(Path(sys.argv[1]) / MODEL_FILE, {}, os.cpu_count() or 1)

        def run(request: dict[str, Any], take: Take) -> None:
            ids, most = request["ids"], request["tokens"]
            if model.grammar is None and "grammar" in request:
                model.constrain(request["grammar"], request["ends"])
            token = model.resume(ids, reusable_length(cached, ids))
            cached[:] = ids
            for count in range(1, most + 1):
                if token in request["ends"] or not take(token) or count == most:
                    return
                cached.append(token)
                token = model.next(token)

        serve(run)
    except (RequestRejected, ModuleNotFoundError) as error:
        sys.exit(" ".join(str(error).split()))


if __name__ == "__main__":
    main()
