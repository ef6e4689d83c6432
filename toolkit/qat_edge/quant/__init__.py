"""Quantization: which weights are quantized and how, fake quantization in training, and the frozen checkpoint."""
