"""Exporters: `targets` has one record for every kind of artifact; `executorch` and `onnx` write and read them.

targets.py     every kind of artifact: who writes it, who reads it, where it runs
checkpoint.py  the frozen or float checkpoint that an exporter reads, with or without adapters
artifact.py    the contents of an artifact, as a reader returns them
runner_process.py, runner_turns.py  both sides of a conversation with a runtime in a process of its own
executorch/    frozen checkpoint -> .pte, and back
onnx/          frozen checkpoint -> ONNX folder, and back
"""
