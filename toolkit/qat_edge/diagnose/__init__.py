"""Explain a loss of accuracy: error budget, fault test, first diverging layer, runtime rounding."""
