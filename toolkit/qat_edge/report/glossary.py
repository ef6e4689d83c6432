"""Explanations of the terms on the pages, each a pair of term and meaning."""

from __future__ import annotations

from qat_edge.evaluate.encoder_results import MEASURES, EncoderReport

Glossary = tuple[tuple[str, str], ...]

PTQ_TERMS: Glossary = (
    (
        "Round-to-nearest (RTN)",
        "PTQ without data: each group's scale comes from its largest weight, and every weight is rounded to the "
        "nearest code.",
    ),
    (
        "HQQ",
        "Half-quadratic quantization: PTQ without data. It chooses each group's scale to minimize the error of the "
        "weights, and then rounds to nearest.",
    ),
    (
        "GPTQ",
        "PTQ with calibration rows: it rounds a layer's weights column by column and adjusts the columns that are not "
        "yet rounded, so that the layer's outputs on those rows change least.",
    ),
    (
        "GPTAQ",
        "GPTQ with another target: each layer reproduces the outputs of the float model, which also corrects errors "
        "from the layers before it.",
    ),
    (
        "Coordinate descent",
        "PTQ with calibration rows, continued from GPTAQ's result: it sets each code and each scale in turn to the "
        "value with the least output error while all others are fixed, and repeats.",
    ),
    (
        "AWQ",
        "Activation-aware weight quantization: PTQ with calibration rows. It scales up the weight columns that read "
        "large inputs, so that they are rounded more finely, and divides the inputs by the same factors.",
    ),
)
_FLOAT_AND_QUANTIZED: Glossary = (
    (
        "FP32 fine-tuned",
        "The fine-tune before quantization: the LoRA adapters of the first training phase, merged into the 32-bit "
        "float weights. All other models are compared with it.",
    ),
    (
        "QAT",
        "Quantization-aware training: the second training phase uses the quantized weights and activations in its "
        "forward pass. The codes and scales at the end of training are the ones in the exported artifact.",
    ),
    (
        "PTQ",
        "Post-training quantization: the FP32 fine-tune is quantized without further training, by one of the methods "
        "below.",
    ),
    *PTQ_TERMS,
)
_PARITY = (
    "Parity",
    "Agreement of an artifact with its own frozen checkpoint, which runs in torch: does the artifact compute what was "
    "trained?",
)
_MEMORY = (
    "Memory",
    "Peak resident memory, minus the memory the runtime used before it loaded the artifact.",
)

RUN_TERMS: Glossary = (
    ("FP32 base", "The model before fine-tuning, in 32-bit floats."),
    *_FLOAT_AND_QUANTIZED,
    ("Exact match", "Share of evaluation prompts for which the generated text equals the expected text."),
    (
        "Valid",
        "Share of answers that are valid by the JSON schema next to the artifact (schema.json). Constrained answers "
        "consist only of tokens that the runtime's grammar of this schema permits.",
    ),
    (
        "Perplexity",
        "Exponential of the mean loss (nats per token) on the evaluation text: the number of equally likely next "
        "tokens that would give the same loss. Lower is better.",
    ),
    (
        "KL",
        "Kullback–Leibler divergence of the model's next-token probabilities from those of the FP32 fine-tune, mean "
        "over tokens, in nats. 0 means equal distributions.",
    ),
    ("Top-1", "Share of tokens for which both models rank the same token first."),
    (
        "Same output, first difference",
        "Share of evaluation prompts for which the model generates the same tokens as the FP32 fine-tune; for the "
        "other prompts, the median position of the first different token, counted from 0.",
    ),
    (
        "SQNR",
        "Signal-to-quantization-noise ratio of the logits, in decibels. 20 dB: the error is a tenth of the signal; "
        "40 dB: a hundredth.",
    ),
    _PARITY,
    (
        "Noise floor",
        "KL between the frozen checkpoint and itself with its embeddings perturbed by one part in 10 million. A "
        "difference in the last bit changes how some activations are rounded, and later layers amplify it, so two "
        "correct runtimes differ by about this much.",
    ),
    ("Prefill, decode", "Speed of processing the prompt, and of generating tokens one at a time."),
    ("First token", "Time from the start of processing the prompt to the first generated token."),
    _MEMORY,
)

COMPARISON_TERMS: Glossary = (
    ("Base", "The model before fine-tuning, in 32-bit floats."),
    (
        "LoRA unmerged",
        "The FP32 base, with the adapters of the first training phase as separate matrices: Wx + sB(Ax).",
    ),
    (
        "Naive PTQ base + adapters",
        "The base rounded to nearest, with the same float adapters, which were trained without that rounding.",
    ),
    ("Merged", "The adapters added to the FP32 weights: the fine-tune that every row is compared with."),
    ("Merged PTQ", "The merged weights, quantized after training by one of the methods below."),
    *PTQ_TERMS,
    (
        "Fused QAT-LoRA",
        "Adapters trained with the quantized weights and activations in the forward pass, then merged and exported "
        "with the codes and scales from training.",
    ),
    ("ms per token", "Median time per generated token after the prompt: 1000 / decode speed."),
    _MEMORY,
    (
        "Perplexity",
        "Exponential of the mean loss (nats per token) on the evaluation text, measured in the runtime. Lower is "
        "better.",
    ),
    ("Exact match", "Share of evaluation prompts for which the generated text equals the expected text."),
    (
        "KL",
        "Divergence of the next-token probabilities from those of the FP32 fine-tune in torch, mean over tokens, in "
        "nats.",
    ),
    (
        "Gain kept",
        "The part of the improvement by fine-tuning that this deployment keeps, in log perplexity and in exact match: "
        "0% is the base, 100% the FP32 fine-tune. Below 0%, it is worse than the base.",
    ),
)


def encoder_terms(comparison: EncoderReport) -> Glossary:
    """Return the terms of an encoder's page; "Same label" only if a classifier was measured."""
    same_label = ("Same label", "Share of texts to which the model gives the same label as the FP32 fine-tune.")
    measure = MEASURES[comparison.measure]
    return (
        *_FLOAT_AND_QUANTIZED,
        (comparison.measure.capitalize(), f"On the evaluation rows: {measure}."),
        (
            "Cosine",
            "Cosine similarity of an artifact's output for a text (logits or embedding) and the output of the FP32 "
            "fine-tune: the mean and the minimum over the texts. 1 means the same direction.",
        ),
        *((same_label,) if any(row.agreement is not None for row in comparison.results) else ()),
        _PARITY,
    )
