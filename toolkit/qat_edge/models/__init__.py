"""Load base models, merge adapters, and find out what task a model is for."""
