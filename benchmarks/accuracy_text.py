"""Paragraphs of docs/accuracy.md: what each table shows and how it was measured."""

from __future__ import annotations

import math

from benchmarks.page import MISSING

EXAMPLE_DISAGREEMENT = 0.1  # share of answers on which two models differ, in the remark about chance


def introduction() -> str:
    """Explain where the figures come from and which model was measured."""
    return (
        "`python -m benchmarks.accuracy` writes this page from the JSON files of its measurements (cells); no figure "
        f'is typed by hand. "{MISSING}" marks a missing cell. Ranges are minimum to maximum over the seeds. Perplexity '
        "and KL divergence are teacher-forced on held-out rows, at the positions that training puts loss on. KL is in "
        "nats per token, relative to the FP32 fine-tune of the same task, seed and number of steps.\n\n"
        "The model is SmolLM2-135M-Instruct unless `--model` names another. Where the Hugging Face Hub is not "
        "reachable, its weights are read from a 4-bit GGUF file. These weights are already on an asymmetric 4-bit "
        "grid, so the loss of post-training quantization (PTQ) may differ from its loss on the original weights. All "
        "methods start from the same weights."
    )


def recovery() -> str:
    """Define recovery."""
    return (
        "*Recovered* = (ppl_ptq - ppl_qat) / (ppl_ptq - ppl_fp32) is the share of the PTQ loss that QAT avoids. "
        "ppl_ptq is the lower perplexity of round-to-nearest and HQQ, applied to the FP32 fine-tune, chosen per seed. "
        "Recovery is computed per seed and then averaged. Both sides train for the same number of optimizer steps: the "
        "FP32 fine-tune with plain LoRA, QAT with the defaults of `finetune`, which begin with plain LoRA. For the "
        "`.pte` and the ONNX folder, PTQ and QAT are measured on the artifacts in their own runtimes, and FP32 in "
        "torch."
    )


def exact_match(prompts: int) -> str:
    """Explain differences in exact match; prompts: answered per model."""
    by_chance = 100 * math.sqrt(EXAMPLE_DISAGREEMENT / prompts)
    return (
        "Exact match of QAT minus exact match of the FP32 fine-tune of the same seed, in percentage points. For scale: "
        f"if two models disagree on one answer in ten, one standard error of the difference is {by_chance:.1f} points "
        f"({prompts} answers)."
    )


def steps() -> str:
    """Explain the table with more training."""
    return (
        "FP32 and QAT both train for more steps, in torch emulation. An improvement that comes from more training "
        "does not count as recovery."
    )


def ablation() -> str:
    """Explain the table of recipes."""
    return (
        "The defaults of `finetune` with one change, at N steps, in torch emulation. With this few tokens, KL to the "
        "FP32 fine-tune separates recipes that perplexity does not. *Of recommended* divides it by the KL of the "
        "recommended recipe with the same seed. The other columns compare only recipes with the same seeds."
    )


def formulation() -> str:
    """Explain the table of formulations."""
    return (
        "Data, steps, seed, optimizer and rounding are the same, without phases or distillation; only the forward pass "
        "of the adapted layers differs. *As trained* is the perplexity of that forward pass. *Deployed* is the "
        "perplexity of the exported model: adapters merged, then rounded to nearest. The difference is the error that "
        "training did not see."
    )


def remaining() -> str:
    """Explain which rounding is off in each column."""
    return (
        "Perplexity above that of the FP32 fine-tune with parts of the rounding switched off, in torch emulation: "
        "weights (int4, all linear layers except the head), activations (the int8 inputs of those layers), embedding "
        "(int8), head (int8 weight and input). A part that is off has the values it had at the end of plain LoRA. "
        "*All off* is therefore the model at the start of QAT, after fewer training steps than the FP32 fine-tune."
    )


def tables() -> str:
    """Explain the bits of embedding and head."""
    return (
        "The QAT model with its embedding and head rounded to other bits, in torch emulation. 8 bits have one scale "
        "per row (the default), 4 bits one scale per group, as in linear layers (`finetune --embedding-bits 4 "
        "--head-bits 4`). The model was trained with 8 / 8. Training does not change either table, so only the last "
        "adapters could compensate for coarser ones."
    )


def cost(on_gpu: bool) -> str:
    """Explain step time and memory; on_gpu: the memory is the GPU's."""
    memory = "GPU memory allocated" if on_gpu else "resident memory"
    return (
        f"Median step time and peak {memory} of a process that trains a few steps, divided by those of plain LoRA in "
        "the same round. The schemes of a round run one after the other. Minimum and maximum over the rounds are in "
        "parentheses."
    )


def settings() -> str:
    """Explain the table of settings."""
    return "Amounts of each `--setting`. `reduced` is for 2 cores (`--jobs 2`), `full` is for CUDA."
