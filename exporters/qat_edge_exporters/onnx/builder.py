"""`python -m qat_edge_exporters.onnx.builder`: onnxruntime-genai's model builder, told what it does not find by itself.

It reads configurations of transformers 4; what transformers 5 writes otherwise, or leaves to the model's code, is
spelled out for it. Rotary tables come out plain here: repair.py puts the model's own in their place.

- One window for all layers (Mistral, Phi-3) needs layer types, or it is taken for full attention.
- Rotary parameters by layer type (Gemma 3) are read as two bases.
- Kinds of rotary embedding that it does not know, or would switch at run time, differ in their tables only.
- Its class for SmolLM3 gives layers without rotary embeddings some of another kind; repair.py takes them out.
"""

from __future__ import annotations

from typing import Any

from onnxruntime_genai.models import builder


def main() -> None:
    """Build as the builder's own command line does."""
    args = builder.get_args()
    where = (args.model_name, args.input, args.output, args.precision, args.execution_provider, args.cache_dir)
    options = builder.parse_extra_options(*where, args.extra_options)
    spell_out(options["hf_details"]["hf_config"])
    builder.SmolLM3Model = builder.LlamaModel
    builder.create_model(*where, **options)


def spell_out(config: Any) -> None:
    """Change a configuration of transformers 5, in place, into one that the builder reads rightly."""
    if getattr(config, "sliding_window", None) and getattr(config, "layer_types", None) is None:
        config.layer_types = ["sliding_attention"] * config.num_hidden_layers
    by_type: dict[str, Any] = getattr(config, "rope_parameters", None) or {}
    if by_type and all(isinstance(value, dict) for value in by_type.values()):
        config.rope_local_base_freq = by_type["sliding_attention"]["rope_theta"]
        by_type = by_type["full_attention"]
    plain = {key: by_type[key] for key in ("rope_theta", "partial_rotary_factor") if key in by_type}
    if by_type:
        config.rope_parameters = {"rope_type": "default", **plain}
    if hasattr(config, "original_max_position_embeddings"):
        config.original_max_position_embeddings = config.max_position_embeddings


if __name__ == "__main__":
    main()
