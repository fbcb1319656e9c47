"""The command line of the demonstration, and what cannot work."""

from __future__ import annotations

import argparse
import importlib.util
import math
from collections.abc import Sequence
from pathlib import Path

import gymnasium as gym
import torch as th
from gymnasium import spaces

from sb3_agpo.command_line import check_at_least

DEFAULT_MINUTES = 4.0


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """
    Read the command line.

    :param arguments: without the program's name; None: those of this process
    :return: options
    """
    parser = argparse.ArgumentParser(
        prog="python -m sb3_agpo.demo", description="Train AGPO for a few minutes and show what came of it."
    )
    add = parser.add_argument
    add("--env", default="HalfCheetah-v5", help="Gymnasium's name of the task (default: %(default)s)")
    add("--minutes", type=float, help=f"stop after this time (default: {DEFAULT_MINUTES:g}, or no limit with --steps)")
    add("--steps", type=int, help="stop after this many environment steps (default: no limit)")
    add("--seed", type=int, default=0, help="seed of everything random (default: %(default)s)")
    add("--n-envs", type=int, default=1, help="training environments, stepped in turn (default: %(default)s)")
    add("--device", default="cpu", help="device of the networks: cpu, cuda or auto (default: %(default)s)")
    add("--output", type=Path, default=Path("runs/demo"), help="folder of the results; if it exists, the next free "
        "number is appended (default: %(default)s)")  # fmt: skip
    add("--save-replay-buffer", action="store_true", help="save the replay buffer too: hundreds of megabytes on large tasks")
    options = parser.parse_args(arguments)
    if options.minutes is None and options.steps is None:
        options.minutes = DEFAULT_MINUTES
    return options


def check(options: argparse.Namespace) -> None:
    """
    Refuse what cannot work, before anything is written.

    :param options: of the command line
    :raises ValueError: with what to change
    :raises ImportError: if an optional library is missing, with how to install it
    """
    if options.minutes is not None and not (math.isfinite(options.minutes) and options.minutes > 0):
        raise ValueError(f"--minutes is {options.minutes:g}; give a number above 0")
    check_at_least(1, options, "steps", "n_envs")
    if not 0 <= options.seed < 2**32:
        raise ValueError(f"--seed is {options.seed}; give a number from 0 to {2**32 - 1}")
    _check_device(options.device)
    _check_env(options.env)
    import sb3_agpo.tracking.figures  # noqa: F401 - raises ImportError without matplotlib

    if importlib.util.find_spec("tensorboard") is None:
        raise ImportError("the demo logs for TensorBoard, which is not installed: pip install 'sb3-agpo[plot]'")


def _check_device(name: str) -> None:
    """
    Refuse a device that torch does not have, or that does not compute.

    :param name: of the command line
    :raises ValueError: with what to change
    """
    try:
        th.zeros(1, device="cpu" if name == "auto" else name).item()  # "meta" has shapes only, and no values to be read
    # AssertionError: torch without CUDA
    except (RuntimeError, AssertionError) as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(f"--device '{name}' cannot be used ({reason}); give cpu, cuda or auto") from error


def _check_env(name: str) -> None:
    """
    Refuse a task that AGPO cannot learn or whose episodes need not end.

    :param name: of the command line
    :raises ValueError: with what to change
    """
    try:
        env = gym.make(name)
    except (gym.error.Error, ImportError) as error:
        raise ValueError(f"--env '{name}' cannot be made: {error}") from error
    observations, actions, spec = env.observation_space, env.action_space, env.spec
    env.close()
    if not isinstance(actions, spaces.Box):
        raise ValueError(f"--env '{name}' has the action space {actions}; AGPO needs continuous actions (Box)")
    if not isinstance(observations, spaces.Box) or len(observations.shape) != 1:
        raise ValueError(f"--env '{name}' has the observation space {observations}; the demo needs a one-dimensional Box")
    if spec is None or spec.max_episode_steps is None:
        raise ValueError(f"--env '{name}' has no time limit, so an evaluation might never end; give one that has")
