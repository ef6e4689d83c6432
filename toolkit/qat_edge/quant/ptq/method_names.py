"""Names of the post-training quantization methods. Imports nothing, so that `--help` can list them at once."""

QAT = "qat"  # the method of a trained model, which is none of PTQ

# In reports, a run's own model without a step of QAT, "quantized (coordinate descent)", and one whose adapters stay
# unmerged next to weights of a method, "adapters (coordinate descent)".
OWN_PTQ, OWN_ADAPTERS = "quantized", "adapters"

# Name in commands, run folders and manifests -> name in reports.
PTQ_METHODS = {
    "rtn": "round-to-nearest",
    "hqq": "HQQ",
    "gptq": "GPTQ",
    "gptaq": "GPTAQ",
    "coordinate-descent": "coordinate descent",
    "awq": "AWQ",
}
# Not a method that rounds: codes and scales of a model that is quantized already stay as they are.
STORED = "stored"
TITLES = {**PTQ_METHODS, STORED: "stored codes"}
METHOD_OF = {"none": "rtn"}  # --ptq-init none keeps the weights; learned scales then begin at round-to-nearest's
RENAMED_METHODS = {"cd": "coordinate-descent"}  # names of 0.1.0 -> today's
# Methods whose weights compensate for each other's rounding errors.
COMPENSATED = ("gptq", "gptaq", "coordinate-descent")
CALIBRATED = (*COMPENSATED, "awq")  # methods that look at data, and change weights as well as scales


def is_own(name: str) -> bool:
    """Return whether a name in reports is that of a run's own model, which is no variant of PTQ and no float model."""
    return name == QAT or name.startswith((f"{OWN_PTQ} (", f"{OWN_ADAPTERS} ("))
