"""Data sets of the demo and the examples. `python -m qat_edge.demo_data.NAME FOLDER` writes one.

assistant         phone-assistant requests and JSON tool calls, generated from intents and words
python_reference  Python's language reference, from the standard library
"""
