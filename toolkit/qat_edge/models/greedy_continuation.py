"""Greedy continuation of prompts in transformers, which keeps the KV cache from one prompt to the next."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from transformers import StoppingCriteria, StoppingCriteriaList
from transformers.cache_utils import Cache, DynamicLayer
from transformers.generation.streamers import BaseStreamer

from qat_edge.models.generation_settings import greedy_decoding
from qat_edge.models.token_ids import reusable_length

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class GreedyContinuation:
    """A loaded model that continues prompts greedily.

    A prompt that begins like the one before keeps that part of the cache: in a conversation, all earlier turns. Only
    caches with plain attention layers can be cut at a token; other models process each prompt from its beginning.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self._model = model
        self._cache: Cache | None = None
        self._cached: list[int] = []

    def run(self, ids: Sequence[int], ends: Sequence[int], most: int, take: Callable[[int], bool]) -> None:
        """Pass each new id to `take`, up to an end token, which is left out.

        Args:
            ids: Prompt.
            ends: Tokens that end an answer, at least one.
            most: Longest continuation, in tokens.
            take: Returns whether the next token is wanted.
        """
        # Until the call returns, nothing is known about the cache.
        cache, self._cache = self._cut(ids), None
        prompt, new = torch.tensor([ids]), _NewIds(ends, take)
        # One prompt needs no padding, so any id will do; the mask says that every token counts.
        with torch.no_grad(), greedy_decoding(self._model, ends, ends[0], most):
            output: Any = self._model.generate(
                prompt,
                attention_mask=torch.ones_like(prompt),
                streamer=new,
                stopping_criteria=StoppingCriteriaList([_Unwanted(new)]),
                return_dict_in_generate=True,
                **({} if cache is None else {"past_key_values": cache}),
            )
        self._keep(output)

    def _keep(self, output: Any) -> None:
        """Keep the cache of a continuation, where it can be cut. The last token was not processed."""
        cache = getattr(output, "past_key_values", None)
        if isinstance(cache, Cache) and all(type(layer) is DynamicLayer for layer in cache.layers):
            self._cache = cache
            self._cached = output.sequences[0, : cache.get_seq_length()].tolist()

    def _cut(self, ids: Sequence[int]) -> Cache | None:
        """Return the cache of the ids with which a prompt begins; None where there is none."""
        length = reusable_length(self._cached, ids)
        if self._cache is None or length == 0:
            return None
        self._cache.crop(length - len(self._cached))
        return self._cache


class _NewIds(BaseStreamer):
    """Passes new ids on; the first call has those of the prompt."""

    def __init__(self, ends: Sequence[int], take: Callable[[int], bool]) -> None:
        self.wanted = True
        self._ends = ends
        self._take = take
        self._begun = False

    def put(self, value: torch.Tensor) -> None:
        # transformers may compute one more token before it reads `wanted`.
        for token in value.flatten().tolist() if self._begun and self.wanted else []:
            self.wanted = token not in self._ends and self._take(token)
        self._begun = True

    def end(self) -> None:
        """Do nothing: every id has been passed on."""


class _Unwanted(StoppingCriteria):
    """Ends a generation whose next token is not wanted."""

    def __init__(self, new: _NewIds) -> None:
        self._new = new

    def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        return torch.full((len(input_ids),), not self._new.wanted, device=input_ids.device)
