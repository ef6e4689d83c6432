"""Subcommand of optimum's own command line: `optimum-cli export qat-edge --model MODEL OUTPUT`.

Optimum imports every module of its namespace package `optimum.commands.register`; neither this folder nor those above
it may have an `__init__.py`. Nothing heavy is imported here, because `optimum-cli --help` imports it too.
https://github.com/huggingface/optimum/blob/v2.3.0/optimum/commands/optimum_cli.py
"""

from __future__ import annotations

import sys
from argparse import ArgumentParser
from pathlib import Path

from optimum.commands.base import BaseOptimumCLICommand, CommandInfo
from optimum.commands.export.base import ExportCommand

from qat_edge.options import DEFAULT_FORMATS, FORMATS
from qat_edge.quant.ptq.method_names import PTQ_METHODS

METHOD = "coordinate-descent"


class QatEdgeExportCommand(BaseOptimumCLICommand):
    """Quantize a model by a PTQ method, and export it."""

    COMMAND = CommandInfo(name="qat-edge", help="Quantize a model to int4, and export it to .pte, ONNX, GGUF or hf.")

    @staticmethod
    def parse_args(parser: ArgumentParser) -> None:
        """Add the flags."""
        parser.add_argument("output", type=Path, metavar="OUTPUT", help="Run folder, with the artifacts in exports/.")
        parser.add_argument("-m", "--model", required=True, help="Hub id, local folder or .gguf file of a model.")
        parser.add_argument("--calibration-data", required=True, help="Rows of the model's task.")
        parser.add_argument("--method", choices=PTQ_METHODS, default=METHOD, help=f"PTQ method; by default {METHOD}.")
        formats = " and ".join(DEFAULT_FORMATS)
        parser.add_argument("--target", action="append", choices=FORMATS, help=f"Format; by default {formats}.")
        parser.add_argument("--context-length", type=int, help="Tokens of prompt and answer together.")
        parser.add_argument("--force", action="store_true", help="Replace what exists already.")
        parser.add_argument("--trust-remote-code", action="store_true", help="Run Python code of the model.")

    def run(self) -> None:
        """Run it; print an error as one paragraph, and exit with its code."""
        from qat_edge import progress
        from qat_edge.cli.console import ConsoleReporter
        from qat_edge.errors import QatEdgeError
        from qat_edge.logs import quiet_libraries

        quiet_libraries(verbose=False)
        try:
            with progress.report_to(ConsoleReporter()):
                self._export()
        except QatEdgeError as error:
            print(f"Error: {error}", file=sys.stderr)
            sys.exit(error.exit_code)

    def _export(self) -> None:
        from qat_edge import export, progress, quantize_model
        from qat_edge.run import Run

        given = self.args
        assert given is not None
        quantize_model(
            given.model,
            given.output,
            method=given.method,
            calibration_data=given.calibration_data,
            force=given.force,
            trust_remote_code=given.trust_remote_code,
        )
        export(
            Run(given.output),
            target=given.target or DEFAULT_FORMATS,
            ptq=["none"],
            **({} if given.context_length is None else {"context_length": given.context_length}),
            trust_remote_code=given.trust_remote_code,
        )
        progress.info(f"Next: qat-edge verify {given.output}")


REGISTER_COMMANDS = [(QatEdgeExportCommand, ExportCommand)]
