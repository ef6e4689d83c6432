"""Run ExecuTorch's own LLM runner, the one inside its phone apps, in a separate process.

Usage: `python -m qat_edge_exporters.executorch.llm_runner FOLDER TOKENS < PROMPT`.

The runner itself prints the generated text to stdout, byte by byte (its Python callback fails on a token that is not
valid UTF-8 by itself), followed by a line of statistics that begins with STATISTICS.
"""

from __future__ import annotations

import sys
from pathlib import Path

STATISTICS = "\nPyTorchObserver"
# The wheel's attention starts OpenMP threads next to ExecuTorch's own pool. Between tokens they spin on its cores.
ENVIRONMENT = {"OMP_NUM_THREADS": "1"}


def main() -> None:
    """Generate greedily from the prompt on stdin."""
    import executorch.kernels.quantized  # noqa: F401  (registers the embedding operators)
    from executorch.extension.llm.custom_ops import custom_ops  # noqa: F401  (registers the attention operators)
    from executorch.extension.llm.runner import GenerationConfig, TextLLMRunner

    folder, tokens = Path(sys.argv[1]), int(sys.argv[2])
    runner = TextLLMRunner(str(folder / "model.pte"), str(folder / "tokenizer.json"))
    runner.generate(sys.stdin.read(), GenerationConfig(echo=False, max_new_tokens=tokens, temperature=0.0))


if __name__ == "__main__":
    main()
