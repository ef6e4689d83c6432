"""The agent: a Python program that is sent to a device and runs an artifact there.

    agent.py           entry point: read a request, run its task, write the results
    loaded_models.py   an artifact in each of the runtimes, behind one interface
    machine.py         pin CPUs; read memory, clocks, heat and battery

It needs Python with numpy and one runtime on the device, and nothing else of this package.
"""
