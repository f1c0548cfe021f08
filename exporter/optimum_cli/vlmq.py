"""`optimum-cli export vlmq ...`: what `vlmq export ...` is, where people who know optimum look for it.

Installed as a module of optimum's namespace `optimum.commands.register`, its extension point (see pyproject.toml), and
imported by optimum-cli alone, at every start: so nothing else is imported before it runs.
"""

from __future__ import annotations

import sys
from argparse import REMAINDER, ArgumentParser

from optimum.commands.base import BaseOptimumCLICommand, CommandInfo
from optimum.commands.export.base import ExportCommand


class VlmqExportCommand(BaseOptimumCLICommand):
    """Hands its arguments on to the command line of vlmq, and its exit code back."""

    COMMAND = CommandInfo(name="vlmq", help="Export BLIP-2 and LLaVA to INT4/INT8 safetensors and ONNX with vlmq.")

    @staticmethod
    def parse_args(parser: ArgumentParser) -> None:
        """Leave all flags, --help too, to vlmq, which knows them."""
        parser.add_argument("arguments", nargs=REMAINDER, help="what `vlmq export` takes; --help lists it")
        parser.prefix_chars = "\0"  # or argparse would take the first flag for one of its own
        parser._option_string_actions.clear()

    def run(self) -> None:
        """Run `vlmq export` in this process."""
        from vlmq.cli import main

        sys.argv = ["vlmq", "export", *self.args.arguments]  # type: ignore[union-attr]
        main()


REGISTER_COMMANDS = [(VlmqExportCommand, ExportCommand)]
