"""Post-training quantization (PTQ): one file per method, each named after the method."""
