"""The task of a model: generate text, classify it, or embed it. The model's own configuration says which.

    CausalLM            tokens -> next token            logits (rows, length, vocabulary)
    SequenceClassifier  text -> one of several labels   logits (rows, labels)
    SentenceEncoder     text -> embedding               mean of the last hidden states, of length 1 (rows, width)

The latter two are encoders: every token attends to all others, there is no KV cache, and one forward pass gives the
result. Code that differs between tasks calls a method of `ModelTask` instead of testing for a class.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
)

from qat_edge import readers, remote_code
from qat_edge.errors import ModelError, UsageError
from qat_edge.manifest import MANIFEST, read_manifest
from qat_edge.run import Run

PAIRS = "text_pairs"  # key in the configuration of a classifier whose input may be two texts
POOLER = "pooler"  # BERT's layer on the first token's state, between the blocks and a classifier


class ModelTask(Protocol):
    """Everything that differs between models for one task and another.

    Attributes:
        name: The Hub's name of the task, as in manifests.
        title: A noun phrase for messages.
        auto_class: The class of transformers that loads such a model.
        is_encoder: Whether models for this task are encoders.
    """

    name: str
    title: str
    auto_class: Any
    is_encoder: bool

    def metadata(self) -> dict[str, Any]:
        """Return the manifest entries from which `task_from_metadata` rebuilds this task."""

    def configure(self, config: PretrainedConfig) -> None:
        """Edit a configuration so that `auto_class` builds a model for this task from it."""

    def prepare(self, model: PreTrainedModel) -> None:
        """Adapt a loaded model in place, so that `predict` needs token ids and a mask alone."""

    def predict(self, model: nn.Module, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Run the model and return the task's result, shaped as in the head of this file.

        Args:
            model: A model for this task.
            input_ids: int64 (rows, length).
            attention_mask: int64 (rows, length).
        """


@dataclass(frozen=True)
class CausalLM:
    """Generate text, token by token."""

    name = "text-generation"
    title = "a causal language model"
    auto_class = AutoModelForCausalLM
    is_encoder = False

    def metadata(self) -> dict[str, Any]:
        return {}

    def configure(self, config: PretrainedConfig) -> None:
        pass

    def prepare(self, model: PreTrainedModel) -> None:
        pass

    def predict(self, model: nn.Module, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return torch.as_tensor(model(input_ids=input_ids, attention_mask=attention_mask).logits)


@dataclass(frozen=True)
class SequenceClassifier:
    """Assign a text one of several labels.

    Attributes:
        labels: Names of the labels, in the order of the logits. Empty: those of the model's configuration.
        pairs: Whether the input may be two texts. The model finds the token types of both itself, see `token_types`.
    """

    labels: tuple[str, ...] = ()
    pairs: bool = False
    name = "text-classification"
    title = "a sequence classifier"
    auto_class = AutoModelForSequenceClassification
    is_encoder = True

    def metadata(self) -> dict[str, Any]:
        return {"kind": self.name, "labels": list(self.labels), "pairs": self.pairs}

    def configure(self, config: PretrainedConfig) -> None:
        config.problem_type = "single_label_classification"
        if self.pairs:
            setattr(config, PAIRS, True)
        if self.labels:
            config.id2label = dict(enumerate(self.labels))
            config.label2id = {label: i for i, label in enumerate(self.labels)}

    def prepare(self, model: PreTrainedModel) -> None:
        # Token types are computed inside the model, so that an artifact takes the same two inputs for every task.
        if getattr(model.config, PAIRS, False) and getattr(model.config, "type_vocab_size", 1) > 1:
            model.base_model.register_forward_pre_hook(_add_token_types, with_kwargs=True)

    def predict(self, model: nn.Module, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return torch.as_tensor(model(input_ids=input_ids, attention_mask=attention_mask).logits)


@dataclass(frozen=True)
class SentenceEncoder:
    """Embed a text as a vector of length 1; texts of similar meaning have a cosine close to 1.

    Attributes:
        scored: Whether it is trained on pairs with a score, rather than on pairs that belong together.
    """

    scored: bool = True
    name = "sentence-similarity"
    title = "a sentence encoder"
    auto_class = AutoModel
    is_encoder = True

    def metadata(self) -> dict[str, Any]:
        return {"kind": self.name, "scored": self.scored}

    def configure(self, config: PretrainedConfig) -> None:
        pass

    def prepare(self, model: PreTrainedModel) -> None:
        # The embedding is the mean of the hidden states, so the pooler would be dead weight in every artifact.
        if getattr(model, POOLER, None) is not None:
            setattr(model, POOLER, None)

    def predict(self, model: nn.Module, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        hidden = model(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        # The sum has the direction of the mean, and scaling to length 1 keeps the direction alone.
        summed = torch.matmul(attention_mask.to(hidden.dtype).unsqueeze(1), hidden).squeeze(1)
        return functional.normalize(summed, dim=-1)


CAUSAL_LM: ModelTask = CausalLM()


# --- token types of text pairs -----------------------------------------------------------------------------


def token_types(input_ids: Tensor, attention_mask: Tensor) -> Tensor:
    """Return the token types of one text or two: 0 for the first, 1 for the second, int64 (rows, length).

    The token that ends the whole input also ends the first text: [CLS] a [SEP] b [SEP]. Types of padding have no
    meaning.
    """
    # Padding is on the right, so the sum of the mask is the length of the text.
    last = attention_mask.sum(1, keepdim=True) - 1
    ends = (input_ids == input_ids.gather(1, last)).to(torch.int64)
    # The number of separators before a token, without the token itself: [SEP] still belongs to the text it ends.
    return (ends.cumsum(1) - ends).clamp(max=1)


def _add_token_types(
    module: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any]
) -> tuple[Any, dict[str, Any]]:
    """Forward pre-hook: add `token_type_ids` to the arguments of a call."""
    # Callers pass the ids by position or by keyword.
    ids = arguments[0] if arguments else keywords["input_ids"]
    return arguments, keywords | {"token_type_ids": token_types(ids, keywords["attention_mask"])}


# --- find the task of a model ------------------------------------------------------------------------------


def is_encoder_config(config: PretrainedConfig) -> bool:
    """Return whether models of this configuration are encoders: transformers has a masked language model of them."""
    # BERT and others can be configured as decoders, whose tokens attend to earlier ones alone.
    decodes = getattr(config, "is_encoder_decoder", False) or getattr(config, "is_decoder", False)
    return not decodes and config.model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES


def task_of_config(config: PretrainedConfig) -> ModelTask:
    """Return the task that a model's configuration names. An encoder without a classification head embeds."""
    return _task_of_architectures(config, config.architectures or [])


def task_of_folder(folder: Path) -> ModelTask:
    """Return the task of the model in a folder, read from its config.json."""
    # Two keys of the file are enough. AutoConfig would have to know the model type.
    values = readers.read_object(folder / "config.json", ModelError)
    remote_code.require_no_kernels(values, folder)
    return task_of_config(SimpleNamespace(**{"architectures": None, "model_type": None, **values}))


def task_of_model(model: PreTrainedModel) -> ModelTask:
    """Return the task of a model that is loaded already."""
    return _task_of_architectures(model.config, [type(model).__name__])


def _task_of_architectures(config: PretrainedConfig, architectures: list[str]) -> ModelTask:
    if not is_encoder_config(config):
        return CAUSAL_LM
    # Any other head, such as that of a masked language model, is dropped: the body embeds.
    classifiers = set(MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES.values())
    return SequenceClassifier() if classifiers.intersection(architectures) else SentenceEncoder()


def task_from_metadata(metadata: Mapping[str, Any]) -> ModelTask:
    """Rebuild the task from what `ModelTask.metadata` put into a manifest. Without an entry, it is text generation."""
    name = metadata.get("kind", CausalLM.name)
    if name == SequenceClassifier.name:
        return SequenceClassifier(tuple(metadata["labels"]), metadata.get("pairs", False))
    if name == SentenceEncoder.name:
        return SentenceEncoder(metadata["scored"])
    return CAUSAL_LM


def task_of_run(run: Run) -> ModelTask:
    """Return the task of the model that a run trained, read from the run's manifests."""
    # Both have the same entry; a run that was stopped in phase 2 has the reference alone.
    for folder in (run.reference, run.adapter):
        if (folder / MANIFEST).is_file():
            return task_from_metadata(read_manifest(folder)["model"])
    return CAUSAL_LM


def require_causal_lm(run: Run, feature: str) -> None:
    """Refuse a feature that exists for text generation alone.

    Args:
        run: The run whose model is checked.
        feature: The command or flag as the user typed it.

    Raises:
        UsageError: The run's model is an encoder.
    """
    task = task_of_run(run)
    if task.is_encoder:
        raise UsageError(
            f"{feature} is for models that generate text; {run.path} holds {task.title}. Encoders support "
            f"`qat-edge export {run.path}` with --target executorch and onnx, then verify, validate (with the gates "
            "--min-quality, --min-cosine, --max-size-mb and, for a classifier, --min-top1) and report."
        )


# --- parts of an encoder -----------------------------------------------------------------------------------


def head_layers(model: PreTrainedModel) -> list[str]:
    """Return the names of an encoder's linear layers after its blocks, in order: pooler and classifier."""
    # A model without a head is its own body.
    body = model.base_model
    if body is model:
        return []

    # A pooler is part of the body in transformers, but it comes after the blocks.
    pooler = getattr(body, POOLER, None)
    pooler_ids = {id(m) for m in pooler.modules()} if pooler is not None else set()
    body_ids = {id(m) for m in body.modules()} - pooler_ids
    return [name for name, m in model.named_modules() if isinstance(m, nn.Linear) and id(m) not in body_ids]


def max_text_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> int:
    """Return the number of tokens of the longest text that an encoder and its tokenizer take."""
    limit = int(model.config.max_position_embeddings)
    for name, table in model.named_modules():
        is_positions = name.rpartition(".")[2] == "position_embeddings"
        if is_positions and getattr(table, "padding_idx", None) is not None:
            # RoBERTa numbers positions from padding_idx + 1 on, so the rows up to there are not available.
            limit = min(limit, table.num_embeddings - table.padding_idx - 1)
    return min(limit, int(tokenizer.model_max_length))


def embedding_tables(model: PreTrainedModel) -> list[str]:
    """Return the names of an encoder's embedding tables, the token embeddings first."""
    token_table = model.get_input_embeddings()
    tables = [(name, m) for name, m in model.named_modules() if isinstance(m, nn.Embedding)]
    return [name for name, _ in sorted(tables, key=lambda named: named[1] is not token_table)]
