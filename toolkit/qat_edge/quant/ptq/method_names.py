"""Names of the post-training quantization methods. Imports nothing, so that `--help` can list them at once."""

# Name in commands, run folders and manifests -> name in reports.
PTQ_METHODS = {
    "rtn": "round-to-nearest",
    "hqq": "HQQ",
    "gptq": "GPTQ",
    "gptaq": "GPTAQ",
    "coordinate-descent": "coordinate descent",
    "awq": "AWQ",
}
