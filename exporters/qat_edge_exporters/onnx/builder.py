"""Run onnxruntime-genai's model builder: `python -m qat_edge_exporters.onnx.builder`, with the builder's arguments.

The builder reads configurations of transformers 4. Where transformers 5 writes them differently, or leaves something to
the code of the model, `adapt_config` adds what the builder looks for:

- One window for all layers (Mistral, Phi-3) needs `layer_types`, or the builder takes it for full attention.
- Rotary parameters by layer type (Gemma 3) are expected as two base frequencies.
- The epsilon of norms is read as `rms_norm_eps` alone, and 1e-6 where a configuration (Nemotron) calls it otherwise.
- Types of rotary embedding that the builder does not know, or would switch at run time, become the default type. They
  differ in their tables only, and `repair` replaces all rotary tables by the model's own.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from qat_edge_exporters.onnx import onnx_compat

if TYPE_CHECKING:
    from transformers import PretrainedConfig


def main() -> None:
    """Build as the builder's own command line does, with an adapted configuration."""
    onnx_compat.run_model_builder(adapt_config)


def adapt_config(config: PretrainedConfig) -> None:
    """Change a configuration of transformers 5, in place, into one that the builder reads correctly."""
    if getattr(config, "sliding_window", None) and getattr(config, "layer_types", None) is None:
        config.layer_types = ["sliding_attention"] * config.num_hidden_layers

    config.rms_norm_eps = onnx_compat.norm_epsilon(config)

    rotary: dict[str, Any] = getattr(config, "rope_parameters", None) or {}
    if rotary and all(isinstance(value, dict) for value in rotary.values()):
        config.rope_local_base_freq = rotary["sliding_attention"]["rope_theta"]
        rotary = rotary["full_attention"]
    if rotary:
        kept = {key: rotary[key] for key in ("rope_theta", "partial_rotary_factor") if key in rotary}
        config.rope_parameters = {"rope_type": "default", **kept}

    # The builder would switch between two tables at this length.
    if hasattr(config, "original_max_position_embeddings"):
        config.original_max_position_embeddings = config.max_position_embeddings


if __name__ == "__main__":
    main()
