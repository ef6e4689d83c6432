"""Run onnxruntime-genai in a separate process, which a damaged folder may crash.

Usage: `python -m qat_edge_exporters.onnx.genai_runner FOLDER TOKENS < PROMPT`, the prompt as JSON with "ids", and with
"special", the ids that have no text. It prints each piece of generated text as a line of JSON.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from qat_edge_exporters.onnx.genai_config import NEUTRAL_SEARCH


def main() -> None:
    """Generate greedily from the prompt on stdin."""
    import onnxruntime_genai as genai

    folder, tokens = Path(sys.argv[1]), int(sys.argv[2])
    prompt = json.load(sys.stdin)
    special = set(prompt["special"])
    try:
        model = genai.Model(str(folder))
        stream = genai.Tokenizer(model).create_stream()
        params = genai.GeneratorParams(model)
        # Whatever genai_config.json keeps of the model's own settings for apps.
        params.set_search_options(**NEUTRAL_SEARCH, max_length=len(prompt["ids"]) + tokens)
        generator = genai.Generator(model, params)
        generator.append_tokens(prompt["ids"])

        while not generator.is_done():
            generator.generate_next_token()
            token = int(generator.get_next_tokens()[0])
            if token not in special:
                print(json.dumps(stream.decode(token)), flush=True)
    except RuntimeError as error:
        sys.exit(" ".join(str(error).split()))


if __name__ == "__main__":
    main()
