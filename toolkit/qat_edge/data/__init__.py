"""Training and evaluation data: file formats, tokenization, encoder examples, calibration batches."""
