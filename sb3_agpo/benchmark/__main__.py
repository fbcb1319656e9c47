"""Command line of the benchmarks, ``python -m sb3_agpo.benchmark COMMAND ...``."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence

from sb3_agpo.command_line import EXIT_USAGE

# Command -> what it does. The module of the same name in this package has ``add_arguments(parser)`` and
# ``main(options) -> int``; it is imported only when its command is asked for, as each pulls in heavy libraries.
COMMANDS = {
    "learning": "train algorithms x tasks x seeds and record their evaluations in a CSV file",
    "report": "tables and figures from the CSV files",
    "fidelity": "measure how well gradient estimates of a saved model agree with brute-force rollouts",
    "speed": "measure what derivatives, environments, updates and runs cost, beside references",
    "reliability": "kill, repeat, soak and misuse AGPO for real, and write down what came of it",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """
    Run one command.

    :param arguments: command line without the program's name; None: that of this process
    :return: exit code
    """
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    parser = argparse.ArgumentParser(prog="python -m sb3_agpo.benchmark", description=__doc__)
    subparsers = parser.add_subparsers(dest="command", required=True)
    for command, description in COMMANDS.items():
        subparser = subparsers.add_parser(command, help=description, description=description)
        if command in arguments[:1]:
            try:
                module = importlib.import_module(f"sb3_agpo.benchmark.{command}")
            except ImportError as error:
                print(f"error: `{command}` needs the extra 'plot': pip install 'sb3-agpo[plot]' ({error})", file=sys.stderr)
                return EXIT_USAGE
            module.add_arguments(subparser)
            subparser.set_defaults(main=module.main)
    options = parser.parse_args(arguments)
    try:
        return int(options.main(options))
    except (ValueError, ImportError) as error:
        # Wrong options are the user's to correct: the message says how, a traceback would only hide it.
        print(f"error: {error}", file=sys.stderr)
        return EXIT_USAGE


if __name__ == "__main__":
    sys.exit(main())
