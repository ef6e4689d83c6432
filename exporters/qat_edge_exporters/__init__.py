"""Exporters: `targets` has one record for every kind of artifact; `executorch` and `onnx` write and read them.

targets.py     every kind of artifact: who writes it, who reads it, where it runs
checkpoint.py  the frozen or float checkpoint that an exporter reads, with or without adapters
artifact.py    the contents of an artifact, as a reader returns them
runner_process.py, runner_turns.py  both sides of a conversation with a runtime in a process of its own
executorch/    frozen checkpoint -> .pte, and back
onnx/          frozen checkpoint -> ONNX folder, and back

Shared by the targets that export encoders, or trace a model:

encoder_support.py      tell whether an encoder can be exported
full_attention.py       an encoder's attention, in operators that each target chooses
trace_check.py          checks around tracing
encoder_process.py      run an encoder's artifact in a process of its own
compat_transformers.py  private names of transformers
"""
