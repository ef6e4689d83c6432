"""Internals of other libraries that the ONNX exporter reads or replaces at run time.

Everything here depends on names that their authors do not document and may change. Each function states the version in
which they were read and the reason. `onnxruntime_genai` is imported only where a function needs it.
"""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, cast

from qat_edge.models import config_keys

if TYPE_CHECKING:
    from torch import Tensor, nn
    from transformers import PretrainedConfig, PreTrainedModel


class RotaryEmbedding(Protocol):
    """Rotary embedding module of transformers, as far as the exporter uses it.

    Attributes:
        config: configuration that it was made from.
        rope_type: type of rotary embedding, or one for each layer type.
    """

    config: PretrainedConfig
    rope_type: str | dict[str, str]

    def __init__(self, config: PretrainedConfig) -> None: ...

    def __call__(self, x: Tensor, position_ids: Tensor, layer_type: str | None = None) -> tuple[Tensor, Tensor]:
        """Return cosines and sines (1, positions, rotated width) in the dtype of `x`."""


def known_architectures() -> set[str]:
    """Return the architectures that the installed model builder supports; empty if its source cannot be read.

    onnxruntime-genai 0.18: `models/builder.py` compares `config.architectures[0]` with a literal in each branch of
    `create_model`, and has no list. The source is read as text because importing it takes seconds.
    """
    spec = importlib.util.find_spec("onnxruntime_genai")
    source = Path(spec.origin).parent / "models/builder.py" if spec and spec.origin else None
    if source is None or not source.is_file():
        return set()
    return set(re.findall(r'architectures\[0\] == "(\w+)"', source.read_text(encoding="utf-8")))


def run_model_builder(adapt_config: Callable[[PretrainedConfig], None]) -> None:
    """Run the model builder on the arguments of this process, as its own `__main__` block does.

    onnxruntime-genai 0.18: the builder is a script. `get_args`, `parse_extra_options` and `create_model` are its three
    steps. They are called one by one here because the configuration, which the second one loads into
    `options["hf_details"]["hf_config"]`, has to be changed before the third reads it.

    Args:
        adapt_config: changes the configuration in place.
    """
    from onnxruntime_genai.models import builder

    args = builder.get_args()
    source_and_target = (
        args.model_name, args.input, args.output, args.precision, args.execution_provider, args.cache_dir,
    )  # fmt: skip
    options = builder.parse_extra_options(*source_and_target, args.extra_options)
    adapt_config(options["hf_details"]["hf_config"])

    # Its class for SmolLM3 gives layers without rotary embeddings some of another kind. The class for Llama rotates in
    # every layer, and `repair` removes the rotation where the model has none.
    builder.SmolLM3Model = builder.LlamaModel
    builder.create_model(*source_and_target, **options)


def find_rotary_embedding(model: nn.Module) -> RotaryEmbedding | None:
    """Return the first rotary embedding of a model, or None.

    transformers 5.23: these modules have no common base class; the attribute `rope_type` is what they share.
    """
    found = next((module for module in model.modules() if hasattr(module, "rope_type")), None)
    return cast("RotaryEmbedding | None", found)


def embedding_scale(model: PreTrainedModel) -> float:
    """Return the factor by which a model multiplies looked-up embeddings; 1 if it has none.

    transformers 5.23: Gemma's embedding class has it in `scalar_embed_scale`. The buffer `embed_scale` next to it
    holds no value on the meta device. Granite multiplies outside of the class, by a number of its configuration.
    """
    inside = getattr(model.get_input_embeddings(), "scalar_embed_scale", None)
    factor = inside
    if factor is None and config_keys.reads(model.config, "embedding_multiplier"):
        factor = getattr(model.config, "embedding_multiplier", None)
    return 1.0 if factor is None else float(factor)


# Names of the epsilon of a model's norms in configurations, the one that the builder reads first.
NORM_EPSILONS = ("rms_norm_eps", "norm_eps", "layer_norm_eps", "norm_epsilon", "layer_norm_epsilon")
# Activation functions of `Model.make_activation` that transformers computes in the same way.
ACTIVATIONS = {"silu", "swish", "gelu_new", "gelu_fast", "gelu_pytorch_tanh", "gelu", "relu", "relu2"}
# Architectures whose class writes LayerNorm; the others write RMS norms, whatever the model has.
WITH_LAYER_NORM = {"NemotronForCausalLM", "PhiForCausalLM"}
# Architectures whose class reads the multipliers of embeddings, residuals, attention and logits.
WITH_MULTIPLIERS = {"GraniteForCausalLM"}


def norm_epsilon(config: PretrainedConfig) -> float:
    """Return the epsilon of all norms in the builder's graph, for a configuration that `builder.adapt_config` changed.

    onnxruntime-genai 0.18, `Model.__init__`: `rms_norm_eps`, or 1e-6 where the configuration has none.
    """
    return float(next((getattr(config, n) for n in NORM_EPSILONS if getattr(config, n, None) is not None), 1e-6))


def attention_scale(config: PretrainedConfig, head_width: int) -> float:
    """Return the factor of attention scores in the builder's graph.

    onnxruntime-genai 0.18: Gemma's classes and Granite's read it from the configuration.
    """
    if getattr(config, "query_pre_attn_scalar", None) is not None:
        return float(config.query_pre_attn_scalar**-0.5)
    if (config.architectures or [""])[0] in WITH_MULTIPLIERS:
        return float(config.attention_multiplier)
    return float(head_width**-0.5)
