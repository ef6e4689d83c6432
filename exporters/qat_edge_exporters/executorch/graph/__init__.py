"""From a model to an exported program, and from there to XNNPACK's delegates."""
