"""The console script ``sb3-agpo``: one name for the package's command lines, ``python -m sb3_agpo.demo`` and its siblings."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import NamedTuple

from sb3_agpo.command_line import EXIT_USAGE


class Command(NamedTuple):
    """A command; its module is imported only when it is asked for, as each pulls in heavy libraries."""

    run: Callable[[Sequence[str]], int]
    description: str


def _demo(arguments: Sequence[str]) -> int:
    from sb3_agpo.demo import main

    return main(arguments)


def _zoo(script: str) -> Callable[[Sequence[str]], int]:
    """A script of RL Baselines3 Zoo, with AGPO as its algorithm unless another is given."""

    def run(arguments: Sequence[str]) -> int:
        try:
            from sb3_agpo.zoo import ALGORITHM_NAME, register

            register()
        except ImportError as error:
            print(f"error: `sb3-agpo {script}` needs the extra 'zoo': pip install 'sb3-agpo[zoo]' ({error})", file=sys.stderr)
            return EXIT_USAGE
        from sb3_agpo.zoo.scripts import main

        given = any(argument.partition("=")[0] == "--algo" for argument in arguments)
        return main([script, *([] if given else ["--algo", ALGORITHM_NAME]), *arguments])

    return run


def _gradients(arguments: Sequence[str]) -> int:
    from sb3_agpo.gradients.__main__ import main

    return main(arguments)


def _benchmark(arguments: Sequence[str]) -> int:
    from sb3_agpo.benchmark.__main__ import main

    return main(arguments)


def _card(arguments: Sequence[str]) -> int:
    try:
        from sb3_agpo.hub import main
    except ImportError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_USAGE
    return main(arguments)


COMMANDS = {
    "demo": Command(_demo, "train for a few minutes and draw what came of it"),
    "train": Command(_zoo("train"), "train with RL Baselines3 Zoo (extra 'zoo'); --algo is agpo unless given"),
    "enjoy": Command(_zoo("enjoy"), "watch what 'train' has trained"),
    "gradients": Command(_gradients, "tell whether AGPO can gain from the simulator in an environment"),
    "benchmark": Command(_benchmark, "measure learning and gradients, make tables and figures"),
    "card": Command(_card, "write the files of a model for the Hugging Face Hub, without sending anything"),
}


def usage() -> str:
    """
    Describe the commands.

    :return: text
    """
    width = max(map(len, COMMANDS))
    commands = "\n".join(f"  {name:<{width}}  {command.description}" for name, command in COMMANDS.items())
    return f"usage: sb3-agpo COMMAND [ARGUMENTS]\n\n{commands}\n\n`sb3-agpo COMMAND --help` lists a command's arguments."


def main(arguments: Sequence[str] | None = None) -> int:
    """
    Run a command.

    :param arguments: command line without the program's name; None: that of this process
    :return: exit code
    """
    name, *rest = (sys.argv[1:] if arguments is None else arguments) or [""]
    if name in ("-h", "--help"):
        print(usage())
        return 0
    if name == "--version":
        from sb3_agpo.__about__ import __version__

        print(f"sb3-agpo {__version__}")
        return 0
    if name not in COMMANDS:
        problem = f"there is no command {name!r}" if name else "give a command"
        print(f"sb3-agpo: {problem}\n\n{usage()}", file=sys.stderr)
        return EXIT_USAGE
    return COMMANDS[name].run(rest)


if __name__ == "__main__":
    sys.exit(main())
