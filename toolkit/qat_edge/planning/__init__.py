"""Predictions before training: memory of a training step, and the fit of artifacts with devices."""
