"""Explain a loss of accuracy, for `validate --error-budget`.

error_budget       cost of each step from the FP32 fine-tune to the artifact, and of each quantized part
fault_test         decide whether an artifact differs from the frozen checkpoint by more than rounding noise
locate_fault       find the first layer at which an artifact diverges from the frozen checkpoint
runtime_rounding   emulate in torch what a runtime rounds differently from the frozen checkpoint
"""
