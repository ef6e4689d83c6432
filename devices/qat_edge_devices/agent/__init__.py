"""The agent: a Python program that is sent to a device and runs an artifact there.

    agent.py           entry point: read a request, run its task, write the results
    loaded_models.py   an artifact in each of the runtimes, behind one interface
    active_adapter.py  the LoRA adapter of an ONNX folder
    machine.py         pin CPUs; read memory, clocks, heat and battery
    agent.html         page of a browser that starts agent.js
    agent.js           the same tasks in onnxruntime-web, with the same requests and results

It needs Python with numpy and one runtime on the device, and nothing else of this package.
"""

import os

# Before ONNX Runtime is imported: it would report its use to its maker, and keep an identifier in the user's cache.
os.environ["ORT_DISABLE_TELEMETRY"] = "1"
