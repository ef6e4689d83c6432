"""Run a Hugging Face folder in transformers, in a process that imports compressed-tensors.

Usage: `python -m qat_edge_exporters.huggingface.hf_runner FOLDER TOKENS < PROMPT`, the prompt as JSON with "ids", and
with "ends", the ids that end the text. It prints the id of each generated token as a line.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any


def main() -> None:
    """Generate greedily from the prompt on stdin."""
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.generation.streamers import BaseStreamer

    from qat_edge.models.generation_settings import greedy_decoding

    class Ids(BaseStreamer):
        """Prints ids; the first call has those of the prompt."""

        begun = False

        def put(self, value: Any) -> None:
            for token in value.flatten().tolist() if self.begun else []:
                print(token, flush=True)
            self.begun = True

        def end(self) -> None:
            """Do nothing: every id has been printed."""

    folder, tokens = Path(sys.argv[1]), int(sys.argv[2])
    request = json.load(sys.stdin)
    model = AutoModelForCausalLM.from_pretrained(
        folder, local_files_only=True, use_safetensors=True, trust_remote_code=False
    ).eval()
    ids, ends = torch.tensor([request["ids"]]), request["ends"]
    with torch.no_grad(), greedy_decoding(model, ends, ends[0], tokens):
        model.generate(ids, attention_mask=torch.ones_like(ids), streamer=Ids())


if __name__ == "__main__":
    main()
