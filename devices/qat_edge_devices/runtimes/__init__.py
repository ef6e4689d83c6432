"""Runtimes: this machine's side of running an artifact on a device.

agent_runtime.py    ExecuTorch and ONNX artifacts in the Python agent: send it, write requests, read results
browser_runtime.py  ONNX artifacts in onnxruntime-web, by the agent's equal in a page
native_runtime.py   a .pte in a C++ runner that the user built (executor_runner or llama_main), for --runner-binary
program_runs.py     shared by both: check free memory, retry after a dropped connection, explain exit codes
"""
