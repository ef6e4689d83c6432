"""Generated data sets of the demo and the examples. `python -m qat_edge.demo_data.NAME FOLDER` writes one."""
