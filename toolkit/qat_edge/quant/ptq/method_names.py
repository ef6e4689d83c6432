"""Names of the post-training quantization methods. Imports nothing, so that `--help` can list them at once."""

QAT = "qat"  # the method of a trained model, which is none of PTQ

# Name in commands, run folders and manifests -> name in reports.
PTQ_METHODS = {
    "rtn": "round-to-nearest",
    "hqq": "HQQ",
    "gptq": "GPTQ",
    "gptaq": "GPTAQ",
    "coordinate-descent": "coordinate descent",
    "awq": "AWQ",
}
RENAMED_METHODS = {"cd": "coordinate-descent"}  # names of 0.1.0 -> today's
# Methods whose weights compensate for each other's rounding errors.
COMPENSATED = ("gptq", "gptaq", "coordinate-descent")
CALIBRATED = (*COMPENSATED, "awq")  # methods that look at data, and change weights as well as scales
