"""Find out from a configuration alone whether a runtime's operators can take the place of a decoder's own.

The model is built without weights, on the meta device, and run once with an attention function that only records how it
is called. The same calls are what an exporter's attention gets when a model with weights is traced.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from qat_edge.models.meta_model import model_without_weights
from qat_edge_exporters import compat_transformers

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

PROBE_NAME = "qat_edge_probe"  # in AttentionInterface
TOKENS = 3
KNOWN_LAYERS = {"full_attention", "sliding_attention"}
WINDOW, SOFT_CAP = "sliding_window", "softcap"  # arguments of transformers' attention call
SINKS = "s_aux"  # gpt-oss's logits of a token that is not there


@dataclass(frozen=True)
class AttentionSettings:
    """Numbers that a layer's attention is computed with.

    Attributes:
        heads: of queries.
        key_heads: of keys and values.
        scale: factor of the scores.
        window: tokens that a token attends to, itself included; None for all.
        soft_cap: largest score; None without one.
    """

    heads: int
    key_heads: int
    scale: float
    window: int | None
    soft_cap: float | None


@dataclass
class _Calls:
    """Calls of the attention function.

    Attributes:
        operator: What computes attention instead, for messages.
        layers: How often each layer called it.
        faults: Why the operator cannot compute a call, as sentences.
        settings: Numbers of the last call of each layer.
    """

    operator: str

    layers: Counter[int] = field(default_factory=Counter)
    faults: list[str] = field(default_factory=list)
    settings: dict[int, AttentionSettings] = field(default_factory=dict)

    def attend(
        self,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        scaling: float | None = None,
        **extras: Any,
    ) -> tuple[Tensor, None]:
        """Record one call, and return an output of the right shape."""
        name = type(module).__name__
        layer = int(getattr(module, "layer_idx", -1))
        self.layers[layer] += 1
        self.settings[layer] = AttentionSettings(
            heads=query.shape[1],
            key_heads=key.shape[1],
            scale=query.shape[3] ** -0.5 if scaling is None else float(scaling),
            window=extras.get(WINDOW),
            soft_cap=extras.get(SOFT_CAP),
        )
        if extras.get(SINKS) is not None:
            self.faults.append(f"{name} has attention sinks ({SINKS}), which {self.operator} cannot compute.")
        if attention_mask is not None:
            self.faults.append(f"{name} builds a mask of its own, and only causal ones export.")
        if key.shape[2] != query.shape[2] or value.shape[2] != query.shape[2]:
            self.faults.append(f"{name} attends to other tokens than its own.")
        if value.shape[3] != key.shape[3]:
            self.faults.append(
                f"{name} has keys of {key.shape[3]} channels and values of {value.shape[3]}; {self.operator} "
                "needs as many of both."
            )
        return query.new_zeros(query.shape[0], query.shape[2], query.shape[1], value.shape[3]), None


def layer_gap(config: PretrainedConfig, lack: str) -> str:
    """Return which layers have no cache of keys and values of earlier tokens, as a sentence; empty if all have one.

    lack: end of the sentence about layers of another type.
    """
    unknown = sorted(set(getattr(config, "layer_types", None) or []) - KNOWN_LAYERS)
    if unknown:
        return f"layers of type {', '.join(unknown)} {lack}."
    if getattr(config, "use_bidirectional_attention", False):
        return "its attention is not causal."
    return ""


def obstacle(config: PretrainedConfig, operator: str = "ExecuTorch's operator") -> str:
    """Return why an attention operator cannot take the place of a decoder's own, a sentence; empty if it can.

    operator: what computes attention instead, for messages.
    """
    model = _build(config)
    if model is None:
        return ""

    # A factor in this attribute is applied to the rows by the exporter.
    embedding = model.get_input_embeddings()
    if type(embedding).forward is not nn.Embedding.forward and not hasattr(embedding, "scalar_embed_scale"):
        return f"{type(embedding).__name__} of {type(model).__name__} does more than look up rows."

    calls, failure = _run(model, operator)
    if calls.faults:
        return calls.faults[0]
    layers, name = config.num_hidden_layers, type(model).__name__
    if failure and calls.layers:
        return ""  # after the attention of a layer: experts, for one, whose models are refused for them
    if not calls.layers:
        return (
            f"{name} computes attention by code of its own, which cannot be replaced"
            f"{f' ({failure})' if failure else ''}."
        )
    if len(calls.layers) != layers:
        return f"{len(calls.layers)} of the {layers} layers of {name} compute attention in a replaceable way."
    if max(calls.layers.values()) > 1:
        return f"{name} computes attention {max(calls.layers.values())} times in a layer, and a layer has one KV cache."
    return ""


def attention_settings(config: PretrainedConfig) -> dict[int, AttentionSettings]:
    """Return the numbers of each layer's attention, by its index; empty where it cannot be run without weights."""
    model = _build(config)
    return {} if model is None else _run(model, "")[0].settings


def _build(config: PretrainedConfig) -> PreTrainedModel | None:
    """Build the model without weights; None where that needs code of its own, which is not run here."""
    try:
        return model_without_weights(config)
    except (ValueError, KeyError, TypeError, AttributeError):
        return None


def _run(model: Any, operator: str) -> tuple[_Calls, str]:
    """Run a model once on the meta device; return its calls of attention, and why it failed."""
    calls = _Calls(operator)
    ids = torch.zeros(1, TOKENS, dtype=torch.int64, device="meta")
    positions = torch.arange(TOKENS, device="meta").unsqueeze(0)
    modules: list[Any] = list(model.modules())
    for module in modules:
        # Compares the positions, which have no values here. The exporter fixes its frequencies as well.
        if "dynamic" in str(getattr(module, "rope_type", "")):
            module.rope_type = "default"
    with compat_transformers.replace_attention(PROBE_NAME, calls.attend, model.config), torch.no_grad():
        try:
            model.eval()(input_ids=ids, position_ids=positions, use_cache=False, logits_to_keep=1)
        except NotImplementedError:
            return calls, ""  # an operator that has no values to compute with, which says nothing about attention
        except (RuntimeError, TypeError, AttributeError, ValueError, IndexError, KeyError) as error:
            text = " ".join(str(error).split())
            return calls, "" if "meta" in text else text
    return calls, ""
