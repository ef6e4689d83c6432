"""Example tasks whose data is made on the spot: each module writes its rows, `python -m qat_edge.tasks.NAME FOLDER`."""
