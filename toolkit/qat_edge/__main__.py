"""`python -m qat_edge` is the `qat-edge` command."""

from qat_edge.cli.commands import main

main(prog_name="qat-edge")
