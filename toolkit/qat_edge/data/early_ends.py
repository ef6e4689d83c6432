"""End tokens inside of answers: a generation stops there, so that such an answer is never given in full."""

from __future__ import annotations

from collections import Counter
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass, field

from transformers import PreTrainedTokenizerBase

from qat_edge.readers import show


@dataclass
class EarlyEnds:
    """Answers with an end token inside.

    Attributes:
        answers: Number of all answers that were looked at.
        found: Number of answers by the id of the first end token inside.
    """

    answers: int = 0
    found: Counter[int] = field(default_factory=Counter)

    def add(self, token: int | None) -> None:
        """Count an answer. token: the end token inside; None for none."""
        self.answers += 1
        if token is not None:
            self.found[token] += 1

    def describe(self, origins: Mapping[int, str], tokenizer: PreTrainedTokenizerBase) -> str:
        """Return a sentence about the answers that stop early; empty where there are none.

        Args:
            origins: File that names an end token, by id.
            tokenizer: The model's tokenizer.
        """
        if not self.found:
            return ""
        named = [
            f"{show(tokenizer.decode([token]))} (id {token}, from {origins[token]}) in {count}"
            for token, count in self.found.most_common()
        ]
        return (
            f"{self.found.total()} of {self.answers} answers contain an end token, at which a generation stops, and "
            f"cannot be given in full: {', '.join(named)}. Remove it from the model's end tokens (eos_token_id), or "
            "from the answers, and train again"
        )


def early_end(ids: Sequence[int], ends: Container[int], tokenizer: PreTrainedTokenizerBase) -> int | None:
    """Return the first end token of a trained answer if text of the answer follows; None otherwise.

    Args:
        ids: Token ids of the answer, with the token that ends it.
        ends: Ids of the tokens that end a generation.
        tokenizer: The model's tokenizer.
    """
    first = next((i for i, token in enumerate(ids) if token in ends), len(ids))
    if first + 1 >= len(ids):
        return None
    # An ordinary token is text itself, such as a full stop, which the generated answer lacks.
    is_text = ids[first] not in tokenizer.added_tokens_decoder
    rest = str(tokenizer.decode(ids[first if is_text else first + 1 :], skip_special_tokens=True))
    return ids[first] if rest.strip() else None
