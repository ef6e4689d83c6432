"""Describe the recipe of a training: what `finetune` does with the options, in the order in which it does it."""

from __future__ import annotations

from qat_edge.options import FinetuneOptions
from qat_edge.quant.codebook import FEWEST
from qat_edge.train.trainer import qat_learning_rate

PAGE, TWO_BITS_PAGE = "docs/accuracy.md", "docs/frontier.md"  # compare recipes at equal steps


def describe_recipe(options: FinetuneOptions, start: int, layers: str, rotated: bool) -> str:
    """Return the recipe in one line.

    Args:
        options: All options of finetune.
        start: Last step of phase 1.
        layers: Bits and group sizes: "210 int4 (group 32), 2 int8 (per channel)".
        rotated: Hidden states or values of attention are rotated at the start of QAT.
    """
    trained = "LoRA" if options.method == "lora" else "full fine-tuning"
    phases = [f"{start} steps of {trained} at a learning rate of {options.learning_rate:g}"] if start else []
    if not options.steps:
        phases.append("no training")
    if options.frozen_base is not None:
        phases.append(f"the frozen weights of {options.frozen_base} ({_initialization(options)})")
    else:
        phases.append(("rotation and " if rotated else "") + _initialization(options))
    steps = options.steps - start
    if steps:
        trained = _qat_phase(options)
        phases.append(f"{steps} steps of {trained} ({steps / options.steps:.0%}) at {_rates(options)}")
    elif options.steps:
        phases.append("no step of QAT")
    page = TWO_BITS_PAGE if options.weight_bits == FEWEST else PAGE
    return f"Recipe: {layers}; {', then '.join(phases)}. {page} compares recipes"


def _qat_phase(options: FinetuneOptions) -> str:
    if options.frozen_base is not None:
        return "unmerged adapters next to them"
    return "QAT of scales alone" if options.has_fixed_codes else "QAT"


def _initialization(options: FinetuneOptions) -> str:
    return "no PTQ initialization" if options.ptq_init == "none" else options.ptq_init


def _rates(options: FinetuneOptions) -> str:
    scales = {
        "learned": f"learned scales at {options.scale_learning_rate:g}",
        "fixed": "fixed scales",
        "absmax": "scales by the largest weights",
    }
    teacher = f", {options.distill_weight:.0%} of the loss from the teacher" if options.distill_weight else ""
    if options.frozen_base is not None:
        return f"{qat_learning_rate(options):g}{teacher}"
    if options.has_fixed_codes:
        return f"{options.scale_learning_rate:g}{teacher}"
    return f"{qat_learning_rate(options):g}, {scales[options.scales]}{teacher}"
