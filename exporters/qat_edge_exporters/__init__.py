"""One package per target. Nothing is imported here: the tables name what `qat_edge.export` and `verify` resolve."""

EXPORTERS = {
    "executorch": "qat_edge_exporters.executorch.export:export",
    "onnx": "qat_edge_exporters.onnx.export:export",
}
READERS = {
    "executorch": "qat_edge_exporters.executorch.reader:read",
    "executorch-vulkan": "qat_edge_exporters.executorch.other_readers:read_vulkan",
    "executorch-coreml": "qat_edge_exporters.executorch.other_readers:read_coreml",
    "onnx": "qat_edge_exporters.onnx.reader:read",
}
# What makes a copy of an artifact that returns what passes through it.
TRACERS = {
    "executorch": "qat_edge_exporters.executorch.intermediate:expose",
    "onnx": "qat_edge_exporters.onnx.intermediate:expose",
}
# What asks an encoder's artifact on this machine.
ENCODERS = {"executorch": "qat_edge_exporters.executorch.answering:answers"}
