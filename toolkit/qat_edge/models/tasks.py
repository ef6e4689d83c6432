"""What a model is for: to generate text, to classify it, or to embed it. Its own configuration says which.

    CausalLM            tokens -> the next one            logits (rows, length, vocabulary)
    SequenceClassifier  text -> one of some labels        logits (rows, labels)
    SentenceEncoder     text -> where its meaning lies    mean of the last hidden states, of length 1: (rows, width)

The latter two are encoders: every token sees all others, no cache is kept, one call answers.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
)

from qat_edge.errors import UsageError
from qat_edge.run import MANIFEST, Run, read_manifest

PAIRS = "text_pairs"  # in the configuration of a model whose texts may be two
POOLER = "pooler"  # BERT's layer over the first token's state, between the blocks and a classifier


class Kind(Protocol):
    """What differs between models of one use and another.

    name: as in manifests, the Hub's name of the task. title: in messages. auto: transformers' class that loads one.
    encodes: whether it is an encoder.
    """

    name: str
    title: str
    auto: Any
    encodes: bool

    def facts(self) -> dict[str, Any]:
        """What `recorded` makes it of again."""

    def configure(self, config: Any) -> None:
        """Make a configuration one that `auto` builds such a model of."""

    def settle(self, model: Any) -> None:
        """Take out of a loaded model what its answer does not depend on, in place."""

    def answer(self, model: Any, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Of ids and mask, int64 (rows, length)."""


@dataclass(frozen=True)
class CausalLM:
    """Generates text, token by token."""

    name = "text-generation"
    title = "a causal language model"
    auto = AutoModelForCausalLM
    encodes = False

    def facts(self) -> dict[str, Any]:
        return {}

    def configure(self, config: Any) -> None:
        pass

    def settle(self, model: Any) -> None:
        pass

    def answer(self, model: Any, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return torch.as_tensor(model(input_ids=input_ids, attention_mask=attention_mask).logits)


@dataclass(frozen=True)
class SequenceClassifier:
    """Gives a text one of `labels`; without any, those of the model's configuration, in their order.

    pairs: whether a text may be two. A model that has types for both finds them itself, see `token_types`.
    """

    labels: tuple[str, ...] = ()
    pairs: bool = False
    name = "text-classification"
    title = "a sequence classifier"
    auto = AutoModelForSequenceClassification
    encodes = True

    def facts(self) -> dict[str, Any]:
        return {"kind": self.name, "labels": list(self.labels), "pairs": self.pairs}

    def configure(self, config: Any) -> None:
        config.problem_type = "single_label_classification"
        if self.pairs:
            setattr(config, PAIRS, True)
        if self.labels:
            config.id2label = dict(enumerate(self.labels))
            config.label2id = {label: i for i, label in enumerate(self.labels)}

    def settle(self, model: Any) -> None:
        if getattr(model.config, PAIRS, False) and getattr(model.config, "type_vocab_size", 1) > 1:
            model.base_model.register_forward_pre_hook(_with_types, with_kwargs=True)

    def answer(self, model: Any, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return torch.as_tensor(model(input_ids=input_ids, attention_mask=attention_mask).logits)


@dataclass(frozen=True)
class SentenceEncoder:
    """Gives a text a vector; texts of like meaning have a cosine close to 1.

    scored: whether it learns from pairs with a score, or from pairs that belong together.
    """

    scored: bool = True
    name = "sentence-similarity"
    title = "a sentence encoder"
    auto = AutoModel
    encodes = True

    def facts(self) -> dict[str, Any]:
        return {"kind": self.name, "scored": self.scored}

    def configure(self, config: Any) -> None:
        pass

    def settle(self, model: Any) -> None:
        if getattr(model, POOLER, None) is not None:
            setattr(model, POOLER, None)

    def answer(self, model: Any, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        hidden = model(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        # The mean's direction is the sum's, and only that is left once the length is 1.
        summed = torch.matmul(attention_mask.to(hidden.dtype).unsqueeze(1), hidden).squeeze(1)
        return functional.normalize(summed, dim=-1)


CAUSAL_LM: Kind = CausalLM()
KINDS = (CausalLM, SequenceClassifier, SentenceEncoder)


def token_types(input_ids: Tensor, attention_mask: Tensor) -> Tensor:
    """1 for the second of two texts and 0 for the first, int64 (rows, length); what padding gets has no meaning.

    The token that ends a text as a whole ends the first of two, too: [CLS] a [SEP] b [SEP].
    """
    last = attention_mask.sum(1, keepdim=True) - 1
    ends = (input_ids == input_ids.gather(1, last)).to(torch.int64)
    return (ends.cumsum(1) - ends).clamp(max=1)


def _with_types(module: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """What a model is called with, and the types of its tokens."""
    ids = arguments[0] if arguments else keywords["input_ids"]
    return arguments, keywords | {"token_type_ids": token_types(ids, keywords["attention_mask"])}


def is_encoder(config: Any) -> bool:
    """Whether models of a configuration's type see a whole text at once: transformers can mask their words."""
    decodes = getattr(config, "is_encoder_decoder", False) or getattr(config, "is_decoder", False)
    return not decodes and config.model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES


def of_config(config: Any) -> Kind:
    """Of a model's configuration; an encoder that has no head over labels embeds."""
    return _of(config, config.architectures or [])


def of_folder(folder: Path) -> Kind:
    """Of a model folder, by its config.json."""
    facts = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    return of_config(SimpleNamespace(**{"architectures": None, "model_type": None, **facts}))


def of_model(model: nn.Module) -> Kind:
    """Of a model that was built already."""
    return _of(model.config, [type(model).__name__])


def _of(config: Any, architectures: list[str]) -> Kind:
    if not is_encoder(config):
        return CAUSAL_LM
    heads = set(MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES.values())
    return SequenceClassifier() if heads.intersection(architectures) else SentenceEncoder()


def recorded(facts: Mapping[str, Any]) -> Kind:
    """Of what `Kind.facts` wrote, among other facts; models that say nothing generate text."""
    name = facts.get("kind", CausalLM.name)
    if name == SequenceClassifier.name:
        return SequenceClassifier(tuple(facts["labels"]), facts.get("pairs", False))
    return SentenceEncoder(facts["scored"]) if name == SentenceEncoder.name else CAUSAL_LM


def of_run(run: Run) -> Kind:
    """Of the model that a run trained, as its manifests have it."""
    folders = [folder for folder in (run.reference, run.adapter) if (folder / MANIFEST).is_file()]
    return recorded(read_manifest(folders[0])["model"]) if folders else CAUSAL_LM


def require_generating(run: Run, what: str) -> None:
    """Refuse what can only be done with a model that generates text; what: as the user typed it.

    Raises:
        UsageError: the run's model is an encoder.
    """
    kind = of_run(run)
    if kind.encodes:
        raise UsageError(
            f"{what} is for models that generate text; {run.path} holds {kind.title}. What there is for it: "
            f"`qat-edge export {run.path} --target executorch`, then verify, validate (its limits are --min-quality, "
            "--min-cosine, --max-size-mb and, of a classifier, --min-top1) and report."
        )


def head_layers(model: nn.Module) -> list[str]:
    """An encoder's linear layers after its blocks, in order: they make the answer of the blocks' last states."""
    body: Any = model.base_model
    pooler: Any = getattr(body, POOLER, None)
    inside = {id(m) for m in body.modules()} - {id(m) for m in (pooler.modules() if pooler is not None else ())}
    if body is model:
        return []
    return [n for n, m in model.named_modules() if isinstance(m, nn.Linear) and id(m) not in inside]


def longest_text(model: nn.Module, tokenizer: Any) -> int:
    """Tokens of the longest text that an encoder has positions for, as its tables and its tokenizer say."""
    config: Any = model.config
    most = int(config.max_position_embeddings)
    modules: list[tuple[str, Any]] = list(model.named_modules())
    for name, table in modules:
        if name.rpartition(".")[2] == "position_embeddings" and getattr(table, "padding_idx", None) is not None:
            most = min(most, table.num_embeddings - table.padding_idx - 1)  # positions begin after the padding's
    return min(most, int(tokenizer.model_max_length))


def tables(model: Any) -> list[str]:
    """An encoder's embeddings, the tokens' own first."""
    first = model.get_input_embeddings()
    names = [(name, m) for name, m in model.named_modules() if isinstance(m, nn.Embedding)]
    return [name for name, _ in sorted(names, key=lambda named: named[1] is not first)]
