"""Outline of a model: its modules and shapes as `load` would load them, without its weights.

Read are the configuration, the tokenizer, and of local files the names and shapes of tensors in their headers. Of a
model on the Hub no file of weights is downloaded.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import torch
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from qat_edge.errors import ModelError
from qat_edge.models import (
    gguf_metadata,
    gguf_model,
    gguf_tokenizer,
    load,
    source_check,
    tokenizer_check,
    weights_check,
)
from qat_edge.models.hub import one_line
from qat_edge.models.meta_model import model_without_weights
from qat_edge.models.tasks import CAUSAL_LM, ModelTask


class Outline(NamedTuple):
    """A model on the meta device.

    Attributes:
        model: All its tensors are float32, as `load` has them.
        tokenizer: Its tokenizer.
        name: Name of its source.
        is_stored_in_16_bits: Its configuration says that the weights are stored in bfloat16 or float16.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    name: str
    is_stored_in_16_bits: bool


def read_outline(source: str, trust_remote_code: bool = False, task: ModelTask = CAUSAL_LM) -> Outline:
    """Read a model without its weights.

    Args:
        source: Hub id, model folder or .gguf file.
        trust_remote_code: Run the code that comes with the model.
        task: The task the model is used for.

    Raises:
        ModelError: `load_model` would refuse it as well, for any other reason than the values of its weights.
    """
    path = Path(source).expanduser()
    if path.is_file():
        return _outline_gguf(path)
    if path.is_dir():
        return _outline_folder(path, trust_remote_code, task)
    source_check.refuse_missing(source)
    return _outline_hub(source, trust_remote_code, task)


def _outline_gguf(path: Path) -> Outline:
    with load.reading_gguf(path):
        metadata = gguf_metadata.read_metadata(path)
        config = gguf_model.read_config(path, metadata)
        model = _built(config, str(path), CAUSAL_LM)
        gguf_model.add_end_tokens(model, metadata, path)
        tokenizer = load.gguf_tokenizer_of(path)
    weights_check.check_vocabulary(model, tokenizer, str(path))
    gguf_tokenizer.check_tokenizer(tokenizer, metadata, path)
    return Outline(model, tokenizer, path.name, False)  # dequantized


def _outline_folder(path: Path, trust_remote_code: bool, task: ModelTask) -> Outline:
    checked = source_check.check_folder(path, trust_remote_code, task)
    is_narrow = _is_narrow(checked.config)
    if checked.by_torchao:
        model = _built(checked.config, str(path), task)
    else:
        # transformers matches names and shapes in the headers, and reads no values for this device.
        weights_check.check_files(path)
        try:
            model, report = load.read_weights(
                str(path), checked.config, trust_remote_code, torch.float32, task, checked.is_part,
                local_files_only=True, device_map="meta",
            )  # fmt: skip
        except load.PARSE_ERRORS as error:
            raise ModelError(
                f"{path}: its tensors do not fit config.json ({one_line(error)}). Save the model again, or correct "
                "config.json."
            ) from error
        load.check_names(model, report, str(path), task, checked.is_part)
    tokenizer = load.load_source_tokenizer(str(path), path, task, trust_remote_code, local_files_only=True)
    weights_check.check_vocabulary(model, tokenizer, str(path))
    task.prepare(model)
    return Outline(model, tokenizer, str(path.resolve()), is_narrow)


def _outline_hub(source: str, trust_remote_code: bool, task: ModelTask) -> Outline:
    snapshot, config, _ = source_check.check_hub(source, trust_remote_code, task)
    is_narrow = _is_narrow(config)
    model = _built(config, source, task)
    tokenizer = load.load_source_tokenizer(
        source, snapshot, task, trust_remote_code, local_files_only=False, revision=snapshot.name
    )
    weights_check.check_vocabulary(model, tokenizer, source)
    tokenizer_check.warn_of_losses(tokenizer, source)
    task.prepare(model)
    return Outline(model, tokenizer, source, is_narrow)


def _is_narrow(config: PretrainedConfig) -> bool:
    """Return whether the weights of a model are stored in 16 bits, by its configuration."""
    return str(config.dtype).removeprefix("torch.") in ("bfloat16", "float16")


def _built(config: PretrainedConfig, source: str, task: ModelTask) -> PreTrainedModel:
    """Build a model of a configuration in float32, on the meta device.

    Raises:
        ModelError: transformers cannot build it.
    """
    config.dtype = torch.float32
    try:
        return model_without_weights(config, task.auto_class)
    except load.PARSE_ERRORS as error:
        raise ModelError(
            f"{source}: transformers cannot build a model of its configuration ({one_line(error)}). Use another model."
        ) from error
