"""What the command lines of this package have in common."""

from __future__ import annotations

import argparse

#: exit code for options that cannot work, as argparse has it
EXIT_USAGE = 2


def check_at_least(least: int, options: argparse.Namespace, *names: str) -> None:
    """
    Refuse numbers that are too small.

    :param least: smallest number allowed
    :param options: of the command line
    :param names: of the options; None stands for an option that was not given
    :raises ValueError: naming the option and the smallest number
    """
    for name in names:
        value = getattr(options, name)
        if value is not None and value < least:
            raise ValueError(f"--{name.replace('_', '-')} is {value}; give a number of {least} or more")
