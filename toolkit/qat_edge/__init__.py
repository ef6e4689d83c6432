"""qat-edge: fine-tune with QAT-LoRA, export, verify and validate; the function trained is the function shipped."""

__version__ = "0.1.0"
