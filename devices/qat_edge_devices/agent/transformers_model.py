"""A Hugging Face folder with codes of compressed-tensors, in transformers on the CPU."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

# Relative, because the folder is sent under a shorter name.
from .model_errors import RequestRejected, token_chunks  # noqa: TID252

CONTEXT = "max_length"  # key of generation_config.json


class TransformersModel:
    """A folder in transformers; see `DeviceModel`."""

    def __init__(self) -> None:
        import compressed_tensors
        import torch
        import transformers

        self.torch, self.transformers = torch, transformers
        self.runtime, self.version = "compressed-tensors", str(compressed_tensors.__version__)
        self.context_length: int | None = None
        self.pool_threads: int | None = None
        self.cache: Any = None

    def load(self, artifact: Path, request: dict[str, Any], threads: int) -> None:
        """Load the folder; the first pass, here, unpacks its codes."""
        self.torch.set_num_threads(threads)
        self.pool_threads = threads
        self.context_length = json.loads((artifact / "generation_config.json").read_text(encoding="utf-8"))[CONTEXT]
        try:
            self.model = self.transformers.AutoModelForCausalLM.from_pretrained(
                artifact, local_files_only=True, use_safetensors=True, trust_remote_code=False
            ).eval()
        except (OSError, ValueError, RuntimeError, KeyError, AttributeError, ImportError) as error:
            if isinstance(error, ModuleNotFoundError):
                raise
            raise RequestRejected(f"transformers cannot load the folder: {' '.join(str(error).split())}") from error
        self._forward([0])
        self.cache = None

    def start(self, prompt: list[int], length: int) -> int:
        """Empty the cache, process the prompt, return the most likely next id."""
        self.cache = None
        for chunk in token_chunks(prompt, None):
            rows = self._forward(chunk)
        return int(rows[-1].argmax())

    def next(self, token: int) -> int:
        """Process an id, return the most likely id after it."""
        return int(self._forward([token])[-1].argmax())

    def read(self, ids: list[int], decode_from: int | None) -> Iterator[dict[str, Any]]:
        """Process a sequence from an empty cache; yield the logits of each chunk."""
        self.cache = None
        for chunk in token_chunks(ids, decode_from):
            yield {"logits": self._forward(chunk)}

    def _forward(self, ids: list[int]) -> Any:
        """Process ids after those in the cache; return their logits, float32 (rows, vocabulary)."""
        with self.torch.no_grad():
            output = self.model(self.torch.tensor([ids]), past_key_values=self.cache, use_cache=True)
        self.cache = output.past_key_values
        return output.logits[0].float().numpy()
