"""Exporters, one package per target."""

EXPORTERS = {
    "executorch": "qat_edge_exporters.executorch.export_pte:export",
    "onnx": "qat_edge_exporters.onnx.export_onnx:export",
}
READERS = {
    "executorch": "qat_edge_exporters.executorch.pte.pte_reader:read",
    "executorch-vulkan": "qat_edge_exporters.executorch.pte.backend_readers:read_vulkan",
    "executorch-coreml": "qat_edge_exporters.executorch.pte.backend_readers:read_coreml",
    "onnx": "qat_edge_exporters.onnx.onnx_reader:read",
}
# What makes a copy of an artifact that returns what passes through it.
TRACERS = {
    "executorch": "qat_edge_exporters.executorch.pte.intermediate_outputs:expose",
    "onnx": "qat_edge_exporters.onnx.matrix_outputs:expose",
}
# What asks an encoder's artifact on this machine.
ENCODERS = {"executorch": "qat_edge_exporters.executorch.encoder_runtime:run_encoder"}
