"""Run ExecuTorch's own LLM runner, the one inside its phone apps, in a separate process.

Usage: `python -m qat_edge_exporters.executorch.llm_runner FOLDER`, with requests on stdin (see `runner_turns`) that
have "text" and "ids", the prompt, and "mark", a text that is printed after the answer.

The runner takes text only. So that it continues the token ids of training, its tokenizer library has to split the text
into these ids; otherwise the process ends with OTHER_IDS. It does not return the ids that it generated either, so its
KV cache cannot be compared with the next prompt: each prompt is processed from its beginning.

The runner itself prints the generated text to stdout, byte by byte (its Python callback fails on a token that is not
valid UTF-8 by itself), followed by a line of statistics that begins with STATISTICS. A line with the mark and the
number of generated tokens follows.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from qat_edge_exporters.runner_turns import RunnerTurns

STATISTICS = "\nPyTorchObserver"
# The wheel's attention starts OpenMP threads next to ExecuTorch's own pool. Between tokens they spin on its cores.
ENVIRONMENT = {"OMP_NUM_THREADS": "1"}
OTHER_IDS = 3  # exit code


def main() -> None:
    """Answer the requests on stdin greedily."""
    import executorch.kernels.quantized  # noqa: F401  (registers the embedding operators)
    from executorch.extension.llm.custom_ops import custom_ops  # noqa: F401  (registers the attention operators)
    from executorch.extension.llm.runner import GenerationConfig, TextLLMRunner

    folder = Path(sys.argv[1])
    tokenizer = _load_tokenizer(folder / "tokenizer.json")
    runner = TextLLMRunner(str(folder / "model.pte"), str(folder / "tokenizer.json"))
    for request in RunnerTurns(runner.stop):
        difference = first_difference(_split(tokenizer, request["text"]), request["ids"])
        if difference:
            print(difference, file=sys.stderr)
            sys.exit(OTHER_IDS)

        # num_bos and num_eos: a beginning-of-sequence token is part of the text.
        config = GenerationConfig(echo=False, max_new_tokens=request["tokens"], temperature=0.0, num_bos=0, num_eos=0)
        found: list[Any] = []
        runner.reset()
        runner.generate(request["text"], config, stats_callback=found.append)
        # The statistics leave out the token that the prompt gave.
        print(request["mark"], found[-1].num_generated_tokens + 1, flush=True)


def _load_tokenizer(path: Path) -> Any:
    """Load the runner's tokenizer."""
    from pytorch_tokenizers import pytorch_tokenizers_cpp

    tokenizer = pytorch_tokenizers_cpp.HFTokenizer()
    tokenizer.load(str(path))
    return tokenizer


def _split(tokenizer: Any, text: str) -> list[int]:
    """Return the ids that the runner's tokenizer splits a text into."""
    return list(tokenizer.encode(text, 0, 0))  # no bos and eos tokens around the text


def first_difference(found: Sequence[int], ids: Sequence[int]) -> str:
    """Return how the ids of the runner's tokenizer differ from those of training; empty where they are equal."""
    if found == ids:
        return ""
    index = next((i for i, (a, b) in enumerate(zip(found, ids, strict=False)) if a != b), min(len(found), len(ids)))
    return f"{len(found)} tokens instead of {len(ids)}, the first difference at token {index}"


if __name__ == "__main__":
    main()
