"""Run ExecuTorch's own LLM runner, the one inside its phone apps, in a separate process.

Usage: `python -m qat_edge_exporters.executorch.llm_runner FOLDER TOKENS < PROMPT`, the prompt as JSON with "text" and
"ids".

The runner takes text only. So that it continues the token ids of training, its tokenizer library has to split the text
into these ids; otherwise the process ends with OTHER_IDS.

The runner itself prints the generated text to stdout, byte by byte (its Python callback fails on a token that is not
valid UTF-8 by itself), followed by a line of statistics that begins with STATISTICS.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path

STATISTICS = "\nPyTorchObserver"
# The wheel's attention starts OpenMP threads next to ExecuTorch's own pool. Between tokens they spin on its cores.
ENVIRONMENT = {"OMP_NUM_THREADS": "1"}
OTHER_IDS = 3  # exit code


def main() -> None:
    """Generate greedily from the prompt on stdin."""
    import executorch.kernels.quantized  # noqa: F401  (registers the embedding operators)
    from executorch.extension.llm.custom_ops import custom_ops  # noqa: F401  (registers the attention operators)
    from executorch.extension.llm.runner import GenerationConfig, TextLLMRunner

    folder, tokens = Path(sys.argv[1]), int(sys.argv[2])
    prompt = json.load(sys.stdin)
    difference = first_difference(_split(folder / "tokenizer.json", prompt["text"]), prompt["ids"])
    if difference:
        print(difference, file=sys.stderr)
        sys.exit(OTHER_IDS)

    runner = TextLLMRunner(str(folder / "model.pte"), str(folder / "tokenizer.json"))
    # num_bos and num_eos: a beginning-of-sequence token is part of the text.
    config = GenerationConfig(echo=False, max_new_tokens=tokens, temperature=0.0, num_bos=0, num_eos=0)
    runner.generate(prompt["text"], config)


def _split(path: Path, text: str) -> list[int]:
    """Return the ids that the runner's tokenizer splits a text into."""
    from pytorch_tokenizers import pytorch_tokenizers_cpp

    tokenizer = pytorch_tokenizers_cpp.HFTokenizer()
    tokenizer.load(str(path))
    return list(tokenizer.encode(text, 0, 0))  # no bos and eos tokens around the text


def first_difference(found: Sequence[int], ids: Sequence[int]) -> str:
    """Return how the ids of the runner's tokenizer differ from those of training; empty where they are equal."""
    if found == ids:
        return ""
    index = next((i for i, (a, b) in enumerate(zip(found, ids, strict=False)) if a != b), min(len(found), len(ids)))
    return f"{len(found)} tokens instead of {len(ids)}, the first difference at token {index}"


if __name__ == "__main__":
    main()
