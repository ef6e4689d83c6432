"""Run a Hugging Face folder in transformers, in a process that imports compressed-tensors.

Usage: `python -m qat_edge_exporters.huggingface.hf_runner FOLDER`, with requests on stdin (see `runner_turns`) that
have "ids", the prompt, and "ends", the ids that end an answer.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from qat_edge_exporters.runner_turns import Take, serve


def main() -> None:
    """Answer the requests on stdin greedily."""
    from transformers import AutoModelForCausalLM

    from qat_edge.models.greedy_continuation import GreedyContinuation

    model = AutoModelForCausalLM.from_pretrained(
        Path(sys.argv[1]), local_files_only=True, use_safetensors=True, trust_remote_code=False
    ).eval()
    continuation = GreedyContinuation(model)

    def run(request: dict[str, Any], take: Take) -> None:
        continuation.run(request["ids"], request["ends"], request["tokens"], take)

    serve(run)


if __name__ == "__main__":
    main()
