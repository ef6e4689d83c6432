"""Generate text with an ONNX folder in onnxruntime-genai."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import onnxruntime_genai as genai
from transformers import PreTrainedTokenizerBase

from qat_edge.data.conversation import Prompt
from qat_edge.errors import ArtifactError


def generate(
    folder: Path,
    tokenizer: PreTrainedTokenizerBase,
    prompt: Prompt,
    emit: Callable[[str], None],
    max_new_tokens: int,
) -> None:
    """Continue `prompt` greedily; each piece of text goes to `emit` as it comes.

    Raises:
        ArtifactError: the runtime refused the folder.
    """
    special = set(tokenizer.all_special_ids)
    try:
        model = genai.Model(str(folder))
        stream = genai.Tokenizer(model).create_stream()

        params = genai.GeneratorParams(model)
        params.set_search_options(do_sample=False, max_length=len(prompt.ids) + max_new_tokens)
        generator = genai.Generator(model, params)
        generator.append_tokens(prompt.ids)

        while not generator.is_done():
            generator.generate_next_token()
            token = int(generator.get_next_tokens()[0])
            if token not in special:
                emit(stream.decode(token))
    except RuntimeError as error:
        raise ArtifactError(f"{folder}: onnxruntime-genai refused it: {error}") from error
