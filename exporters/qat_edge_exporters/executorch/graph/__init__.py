"""Model to exported program: tracing, attention, graph passes, lowering to XNNPACK."""
