"""ONNX: int4 codes as trained in MatMulNBits nodes, run by onnxruntime-genai and by plain onnxruntime."""
