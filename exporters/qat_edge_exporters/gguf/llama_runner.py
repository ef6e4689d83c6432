"""Run llama.cpp in a separate process, which a damaged file may crash.

Usage: `python -m qat_edge_exporters.gguf.llama_runner FOLDER TOKENS < PROMPT`, the prompt as JSON with "ids", and with
"ends", the ids that end a generation. It prints each id that was generated as a line.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

from qat_edge_exporters.gguf.gguf_file import MODEL_FILE


def main() -> None:
    """Generate greedily from the prompt on stdin."""
    from qat_edge_devices.agent.llama_model import LlamaModel
    from qat_edge_devices.agent.model_errors import RequestRejected

    path, tokens = Path(sys.argv[1]) / MODEL_FILE, int(sys.argv[2])
    prompt = json.load(sys.stdin)
    ends = set(prompt["ends"])
    try:
        model = LlamaModel()
        model.load(path, {}, os.cpu_count() or 1)
        token = model.start(prompt["ids"], len(prompt["ids"]) + tokens)
        for count in range(1, tokens + 1):
            if token in ends:
                return
            print(token, flush=True)
            token = model.next(token) if count < tokens else token
    except (RequestRejected, ModuleNotFoundError) as error:
        sys.exit(" ".join(str(error).split()))


if __name__ == "__main__":
    main()
