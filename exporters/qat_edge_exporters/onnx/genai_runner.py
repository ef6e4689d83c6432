"""Run onnxruntime-genai in a separate process, which a damaged folder may crash.

Usage: `python -m qat_edge_exporters.onnx.genai_runner FOLDER`, with requests on stdin (see `runner_turns`) that have

    ids      the prompt
    ends     ids that end an answer
    context  tokens that the KV cache may hold at most
    keep     whether the part of the cache that the prompt begins with may be kept
    grammar  which the answer follows; absent for none
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from qat_edge.models.token_ids import reusable_length
from qat_edge_exporters.onnx import names
from qat_edge_exporters.onnx.genai_config import NEUTRAL_SEARCH
from qat_edge_exporters.runner_turns import Take, serve

ROOM = 2  # size of the KV cache as a multiple of the first prompt and answer: the next turns fit without another one


ADAPTER = "adapter"  # name of the folder's adapter while it is loaded


class GenaiRunner:
    """A folder in onnxruntime-genai, with the KV cache of the turn before.

    The folder's adapter, where it has one, is active in every answer.
    """

    def __init__(self, folder: str) -> None:
        import onnxruntime_genai as genai

        self._genai = genai
        self._model = genai.Model(folder)
        adapter = Path(folder) / names.ADAPTER_FILE
        self._adapters = genai.Adapters(self._model) if adapter.is_file() else None
        if self._adapters is not None:
            self._adapters.load(str(adapter), ADAPTER)
        self._generator: Any = None
        self._room = 0  # tokens that the generator's cache holds

    def run(self, request: dict[str, Any], take: Take) -> None:
        """Pass each id of an answer to `take`."""
        ids, most = request["ids"], request["tokens"]
        generator = self._prepared(ids, most, request)
        for _ in range(most):
            generator.generate_next_token()
            token = int(generator.get_next_tokens()[0])
            if token in request["ends"] or not take(token):
                return

    def _prepared(self, ids: Sequence[int], most: int, request: dict[str, Any]) -> Any:
        """Return a generator that has processed the prompt."""
        needed, grammar = len(ids) + most, request.get("grammar")
        # A generator's grammar is at the end after an answer, so that each answer has a generator of its own.
        if self._generator is None or not request["keep"] or needed > self._room or grammar is not None:
            self._room = max(needed, min(request["context"], ROOM * needed))
            params = self._genai.GeneratorParams(self._model)
            # Whatever genai_config.json keeps of the model's own settings for apps.
            params.set_search_options(**NEUTRAL_SEARCH, max_length=self._room)
            if grammar is not None:
                params.set_guidance("lark_grammar", grammar)
            self._generator = self._genai.Generator(self._model, params)
            if self._adapters is not None:
                self._generator.set_active_adapter(self._adapters, ADAPTER)
            kept = 0
        else:
            kept = reusable_length(self._generator.get_sequence(0).tolist(), ids)
            self._generator.rewind_to(kept)
        self._generator.append_tokens(ids[kept:])
        return self._generator


def main() -> None:
    """Answer the requests on stdin greedily."""
    try:
        serve(GenaiRunner(sys.argv[1]).run)
    except RuntimeError as error:
        sys.exit(" ".join(str(error).split()))


if __name__ == "__main__":
    main()
