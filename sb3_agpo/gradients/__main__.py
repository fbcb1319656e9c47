"""
Inspect a task or your own environment: ``python -m sb3_agpo.gradients ENV``.

Plays some steps, differentiates each of them with several difference steps, and tells whether AGPO can gain from the
simulator there: tables on the terminal and one picture.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import gymnasium as gym
from rich.console import Console
from tqdm import tqdm

from sb3_agpo.benchmark.learning import parse_overrides
from sb3_agpo.benchmark.run import show_warnings_once
from sb3_agpo.command_line import EXIT_USAGE, check_at_least
from sb3_agpo.dynamics.recorder import ProviderReport
from sb3_agpo.gradients.environment import Policy, make_environment, make_policy
from sb3_agpo.gradients.inspection import Sizes, inspect_environment
from sb3_agpo.gradients.replay import CopyError
from sb3_agpo.gradients.report import print_inspection, print_without_derivatives

DEFAULT = Sizes()


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """
    Read the command line.

    :param arguments: without the program's name; None: those of this process
    :return: options
    """
    parser = argparse.ArgumentParser(
        prog="python -m sb3_agpo.gradients",
        description="Tell whether AGPO can gain from a simulator's derivatives on a task or in your own environment.",
    )
    add = parser.add_argument
    own = "package.module:ClassName or path/to/file.py:ClassName"
    add("env", metavar="ENV", help=f"a registered id such as Hopper-v5, or your own class, {own}")
    add("--set", nargs="+", action="extend", default=[], metavar="KEY=VALUE", dest="arguments",
        help="arguments of the environment's constructor, Python literals")  # fmt: skip
    add("--model", type=Path, metavar="FILE", help=
        "act with this model of AGPO or SAC, and look at it with its own options; a pickle: give a file that you trust "
        "(default: random actions)")  # fmt: skip
    add("--normalization", type=Path, metavar="FILE", help="what VecNormalize.save wrote, if the model needs it")
    add("--steps", type=int, default=DEFAULT.steps, help="steps to play (default: %(default)s)")
    add("--horizon", type=int, metavar="STEPS", help="rewards to predict (default: the model's or AGPO's horizon)")
    add("--noise", type=float, default=DEFAULT.noise, help=
        "standard deviation of actions that are tried, in units of the action in [-1, 1] (default: %(default)s)")  # fmt: skip
    add("--moments", type=int, default=DEFAULT.moments, help="moments at which actions are tried (default: %(default)s)")
    add("--seed", type=int, default=0, help="seed of everything random (default: %(default)s)")
    add("--output", type=Path, default=Path("gradients.png"), metavar="FILE", help="the picture (default: %(default)s)")
    return parser.parse_args(arguments)


def check(options: argparse.Namespace) -> None:
    """
    Refuse what cannot work, before anything is computed.

    :param options: of the command line
    :raises ValueError: with what to change
    :raises ImportError: without matplotlib, with how to install it
    """
    check_at_least(1, options, "steps", "horizon", "moments")
    if not 0.0 < options.noise <= 1.0:
        raise ValueError(f"--noise is {options.noise:g}; give a number above 0 and up to 1, such as 0.1")
    if options.horizon is not None and options.horizon > options.steps:
        raise ValueError(f"--horizon is {options.horizon}, more than the {options.steps} of --steps; play more steps")
    if not 0 <= options.seed < 2**32:
        raise ValueError(f"--seed is {options.seed}; give a number from 0 to {2**32 - 1}")
    if options.output.suffix.lower() != ".png" or options.output.is_dir():
        raise ValueError(f"--output is {options.output}; give the name of a picture, such as gradients.png")
    if not options.output.parent.is_dir():
        raise ValueError(f"--output: there is no folder {options.output.parent}; make it first")
    import sb3_agpo.tracking.figures  # noqa: F401 - raises ImportError without matplotlib


class Bars:
    """Progress bars, one for each part of the work."""

    def __init__(self) -> None:
        self._bar: tqdm | None = None
        self._name = ""

    def __call__(self, name: str, done: int, total: int) -> None:
        """Move the bar of a part, which may be a new one."""
        if name != self._name:
            self.close()
            self._bar, self._name = tqdm(desc=name, total=total, leave=False, disable=not sys.stderr.isatty()), name
        assert self._bar is not None
        self._bar.update(done)

    def close(self) -> None:
        """Remove the last bar."""
        if self._bar is not None:
            self._bar.close()


def run(options: argparse.Namespace, env: gym.Env, policy: Policy) -> int:
    """
    Inspect, print and draw.

    :param options: of the command line
    :param env: the environment
    :param policy: who acts
    :return: exit code
    """
    from sb3_agpo.gradients.figure import draw_inspection

    console, bars = Console(), Bars()
    sizes = Sizes(options.steps, options.moments, DEFAULT.actions, options.noise)
    try:
        found = inspect_environment(env, policy._replace(horizon=options.horizon or policy.horizon), sizes, options.seed, bars)
    except CopyError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_USAGE
    finally:
        bars.close()
    if isinstance(found, ProviderReport):
        print_without_derivatives(console, options.env, found)
        return 0
    print_inspection(console, options.env, found)
    draw_inspection(found, options.output, f"{options.env}, {found.policy}: derivatives from {found.recording.report.kind}")
    console.print(f"Picture: {options.output}", highlight=False, markup=False)
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    """
    Run the inspection.

    :param arguments: command line without the program's name; None: that of this process
    :return: exit code
    """
    options = parse(arguments)
    show_warnings_once()
    try:
        check(options)
        env = make_environment(options.env, parse_overrides(options.arguments))
        policy = make_policy(env, options.model, options.normalization, options.seed)
    except (ValueError, ImportError) as error:
        # Wrong options are the user's to correct: the message says how, a traceback would only hide it
        print(f"error: {error}", file=sys.stderr)
        return EXIT_USAGE
    return run(options, env, policy)


if __name__ == "__main__":
    sys.exit(main())
