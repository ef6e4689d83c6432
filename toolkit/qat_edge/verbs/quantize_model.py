"""Quantize a model that was not trained here: make a run without a training step of it, and freeze that.

The run is the one of `finetune --steps 0`: its FP32 reference is the model itself, so every verb works on it.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from qat_edge import config
from qat_edge.errors import UsageError
from qat_edge.options import FinetuneOptions, QuantizeOptions
from qat_edge.quant.ptq.method_names import CALIBRATED, PTQ_METHODS, QAT, STORED
from qat_edge.run import Run
from qat_edge.verbs.finetune import finetune
from qat_edge.verbs.quantize import OF_MODELS, Quantized, quantize

# Options that both verbs have under one name, and that are left at finetune's default where they are not given.
OF_CODES = ("bits", "weight_bits", "weight_levels", "calibration_tokens", *OF_MODELS)
SHARED = (*OF_CODES, "seed")


def quantize_model(model: str, out: Path, options: QuantizeOptions, force: bool = False) -> Quantized:
    """Quantize a model into the run folder `out`, by a PTQ method or as it is stored; RUN/quantized has the result.

    Args:
        model: Hub id, local folder or .gguf file.
        out: run folder to write.
        options: method, bits, rotation and calibration data.
        force: replace a run folder that exists.

    Raises:
        UsageError: no PTQ method or no rows; an impossible combination of options.
        RunError: `out` exists, and `force` is not set.
        ModelError: the model cannot be loaded, or the method cannot process it.
        DataError: the rows cannot be used, or are too few.
    """
    if options.method == QAT:
        raise UsageError(
            f"--method qat and --out: {model} was not trained here. Give --method {'|'.join(reversed(PTQ_METHODS))}."
        )
    if options.rotate and options.method not in CALIBRATED:
        raise UsageError(
            f"--rotate and --method {options.method}: a rotation needs a method that changes the weights. Give "
            f"--method {'|'.join(CALIBRATED)}, or leave it out."
        )
    for name in OF_CODES if options.method == STORED else ():
        if getattr(options, name) is not None:
            raise UsageError(
                f"{config.flag_name(name)} and --method {STORED}: codes and groups stay as they are. Leave it out."
            )
    if options.calibration_data is None:
        raise UsageError(
            "--calibration-data: with --out, every method needs rows of the model's task: they show how its answers "
            "end, and most methods are calibrated on them."
        )
    training = config.load(FinetuneOptions, "finetune", None, _as_training(model, options), config.flag_name)
    finetune(training, out, force=force)
    return dataclasses.replace(quantize(Run.open(out), QuantizeOptions()), method=options.method)


def _as_training(model: str, options: QuantizeOptions) -> dict[str, Any]:
    """Return the options of a training without steps that ends in the same model."""
    is_rtn = options.method == "rtn"
    shared = {name: value for name in SHARED if (value := getattr(options, name)) is not None}
    return {
        "model": model, "data": options.calibration_data, "steps": 0, "track": (),
        "ptq_init": "none" if is_rtn else options.method, "scales": "absmax" if is_rtn else "learned",
        "rotate": "on" if options.rotate else "off", **shared,
    }  # fmt: skip
