"""A grammar of llama.cpp (GBNF) that limits the tokens of an answer, through its C interface.

`llama_model` calls it for each token. The most likely token is tried alone first: most of the time the grammar permits
it, and trying all tokens of a vocabulary takes milliseconds.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from typing import Any

# Relative, because the folder is sent under a shorter name.
from .model_errors import RequestRejected  # noqa: TID252

CANDIDATE = [("id", "<i4"), ("logit", "<f4"), ("p", "<f4")]  # llama_token_data


class _Candidates(ctypes.Structure):
    """llama_token_data_array."""

    _fields_ = (
        ("data", ctypes.c_void_p),
        ("size", ctypes.c_size_t),
        ("selected", ctypes.c_int64),
        ("sorted", ctypes.c_bool),
    )


_POINTER, _INT = ctypes.c_void_p, ctypes.c_int32
# Functions of the interface: name -> result and arguments.
FUNCTIONS: dict[str, tuple[Any, tuple[Any, ...]]] = {
    "llama_sampler_init_grammar": (_POINTER, (_POINTER, ctypes.c_char_p, ctypes.c_char_p)),
    "llama_sampler_apply": (None, (_POINTER, ctypes.POINTER(_Candidates))),
    "llama_sampler_accept": (None, (_POINTER, _INT)),
    "llama_sampler_reset": (None, (_POINTER,)),
    "llama_vocab_is_eog": (ctypes.c_bool, (_POINTER, _INT)),
}


class LlamaGrammar:
    """The grammar of one loaded model.

    Args:
        call: Calls a function of the interface by name.
        vocabulary: Of the model.
        width: Tokens of the vocabulary.
        text: The grammar.
        ends: Ids that end an answer; all that llama.cpp knows where empty.
        reason: Returns why a call failed.
    """

    def __init__(
        self,
        call: Callable[..., Any],
        vocabulary: int,
        width: int,
        text: str,
        ends: Sequence[int],
        reason: Callable[[], str],
    ) -> None:
        import numpy

        self.numpy, self._call = numpy, call
        self._sampler = call("llama_sampler_init_grammar", vocabulary, text.encode("utf-8"), b"root")
        if not self._sampler:
            raise RequestRejected(f"llama.cpp refused the grammar: {reason()}")
        self._ends = [token for token in range(width) if call("llama_vocab_is_eog", vocabulary, token)]
        # Ends that llama.cpp knows by their text, and that the model was not trained to end with.
        self._foreign_ends = [token for token in self._ends if ends and token not in ends]

    def reset(self) -> None:
        """Begin a new answer."""
        self._call("llama_sampler_reset", self._sampler)

    def choose(self, logits: Any) -> int:
        """Return the most likely token that the grammar permits, and advance by it. logits: float32 (vocabulary,).

        Raises:
            RequestRejected: it permits none.
        """
        token = int(logits.argmax())
        if token in self._foreign_ends or not self._permitted([token])[0]:
            permitted = self._permitted(range(len(logits)))
            permitted[self._foreign_ends] = False
            if not permitted.any():
                raise RequestRejected("The grammar permits no token of the model here.")
            token = int(self.numpy.where(permitted, logits, -self.numpy.inf).argmax())
        # Nothing follows an end token, which is no part of the text.
        if token not in self._ends:
            self._call("llama_sampler_accept", self._sampler, token)
        return token

    def _permitted(self, tokens: Sequence[int]) -> Any:
        """Return for each token whether the grammar permits it next, bool (tokens,)."""
        candidates = self.numpy.zeros(len(tokens), CANDIDATE)
        candidates["id"] = tokens
        array = _Candidates(candidates.ctypes.data, len(tokens), -1, False)
        self._call("llama_sampler_apply", self._sampler, ctypes.byref(array))
        return candidates["logit"] != -self.numpy.inf  # which marks those that are not permitted
