"""What can go wrong in an environment while a model learns in it, noticed before it reaches a buffer or a weight."""

from __future__ import annotations

import signal
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from multiprocessing import connection
from typing import Any

import numpy as np
from gymnasium import spaces
from numpy.typing import NDArray
from stable_baselines3.common.vec_env import SubprocVecEnv, VecEnv, VecEnvWrapper, VecNormalize

Observations = NDArray[Any] | dict[str, NDArray[Any]] | tuple[NDArray[Any], ...]

#: networks compute in float32, and their losses and norms square what they get
LARGEST = float(np.sqrt(np.finfo(np.float32).max))
#: seconds to wait for the system to tell how a worker process ended
PATIENCE = 2.0
ADVICE = (
    "AGPO stops before it learns from it: weights and replay buffer are as they were. Make the environment return moderate "
    "finite numbers (`VecNormalize` scales them, `VecCheckNan` finds where they come from) or end the episode before that"
)
ADVICE_ON_STATISTICS = f"{ADVICE}. The running statistics of `VecNormalize` hold it already: make or load a new one"


def check_observations(
    observations: Observations, normalization: VecNormalize | None = None, moment: str = "after the reset"
) -> None:
    """
    Refuse observations with which networks cannot compute.

    :param observations: what the agent sees, one row per environment
    :param normalization: the environment's ``VecNormalize``, whose raw observations are looked at too; None for none
    :param moment: when they were returned, in words
    :raises ValueError: naming the environment and the value
    """
    if normalization is not None:
        _check_numbers("observation", normalization.get_original_obs(), np.inf, moment, advice=ADVICE_ON_STATISTICS)
    _check_numbers("observation", observations, LARGEST, moment)


def check_step(
    observations: Observations,
    rewards: NDArray[Any],
    infos: list[dict[str, Any]],
    *,
    space: spaces.Space[Any],
    normalization: VecNormalize | None,
    n_steps: int,
) -> None:
    """
    Refuse a step of the environments that would spoil a replay buffer.

    :param observations: after the step, as the agent sees them, one row per environment
    :param rewards: as the agent gets them, shape ``(n_envs,)``
    :param infos: one per environment
    :param space: observation space
    :param normalization: the environment's ``VecNormalize``, whose raw values are looked at too; None for none
    :param n_steps: steps so far, to be told
    :raises ValueError: naming the environment and the value
    """
    moment = f"at step {n_steps}"
    if normalization is not None:
        _check_numbers("reward", normalization.get_original_reward(), np.inf, moment, advice=ADVICE_ON_STATISTICS)
    _check_numbers("reward", np.asarray(rewards), LARGEST, moment)
    check_observations(observations, normalization, moment)
    for index, info in enumerate(infos):
        if (last := info.get("terminal_observation")) is not None:
            _check_terminal(last, space, moment, index)


def _check_terminal(observation: Any, space: spaces.Space[Any], moment: str, index: int) -> None:
    """The last observation of an episode is the one that SB3 hands on as the environment returned it."""
    if isinstance(space, spaces.Dict) and isinstance(observation, Mapping):
        for key, part in space.spaces.items():
            _check_terminal(observation.get(key), part, moment, index)
        return
    if np.shape(observation) != space.shape:
        raise ValueError(
            f"{moment} environment {index} returned an observation of the shape {np.shape(observation)}, its observation "
            f"space has the shape {space.shape}; make both equal (`stable_baselines3.common.env_checker.check_env` looks "
            "for more)"
        )
    _check_numbers("last observation of an episode", np.asarray(observation)[None], LARGEST, moment, index)


def _check_numbers(what: str, values: Observations, largest: float, moment: str, first: int = 0, advice: str = ADVICE) -> None:
    """Check arrays whose first axis counts environments, from ``first`` on; integers need no check."""
    if isinstance(values, Mapping):
        for key, part in values.items():
            _check_numbers(f"{what} {key!r}", part, largest, moment, first, advice)
        return
    if isinstance(values, tuple) or values.dtype.kind != "f":
        return
    with np.errstate(invalid="ignore"):
        fits = np.abs(values) < np.float64(largest)  # False for NaN; half precision would overflow
    if fits.all():
        return
    where = tuple(int(index) for index in np.argwhere(~fits)[0])
    place = f" (entry {list(where[1:])})" if len(where) > 1 else ""
    value = float(values[where])
    problem = "which is too large for networks in float32" if np.isfinite(value) else "which is not finite"
    raise ValueError(f"{moment} environment {first + where[0]} returned the {what} {value:g}{place}, {problem}. {advice}")


# ---------------------------------------------------------------------- errors from elsewhere


@contextmanager
def explained_faults(env: VecEnv) -> Iterator[None]:
    """
    Say what errors mean that a vectorised environment raises while it is in use.

    :param env: the vectorised environment
    :raises RuntimeError: in place of a broken connection, if a worker process has ended, naming it
    """
    try:
        yield
    except (EOFError, ConnectionError) as error:
        if (ended := ended_workers(env)) is None:
            raise
        raise RuntimeError(
            f"{ended}; what the environment raised, if anything, is printed above. The model is as it was before this step: "
            "save it, or `set_env` a new environment and call `learn(..., reset_num_timesteps=False)`; or go on from the "
            "last checkpoint with `AGPO.resume`"
        ) from error
    except (ValueError, TypeError, IndexError) as error:
        frames = {frame.f_code.co_name for frame, _ in traceback.walk_tb(error.__traceback__)}
        if "step_wait" in frames:
            error.add_note(
                "The environment raised this, or returned what does not fit its spaces; "
                "`stable_baselines3.common.env_checker.check_env(env)` tells more."
            )
        raise


def is_mid_step(env: VecEnv) -> bool:
    """
    Whether a step of a vectorised environment was interrupted before its workers answered: the next answers are to that step.

    :param env: vectorised environment, wrapped or not, between two steps
    :return: False also for environments without workers
    """
    while isinstance(env, VecEnvWrapper):
        env = env.venv
    return isinstance(env, SubprocVecEnv) and env.waiting and not env.closed


def ended_workers(env: VecEnv) -> str | None:
    """
    Which worker processes of a vectorised environment have ended.

    :param env: vectorised environment, wrapped or not
    :return: in words, None if none has or there are none
    """
    while isinstance(env, VecEnvWrapper):
        env = env.venv
    processes = getattr(env, "processes", [])
    connection.wait([process.sentinel for process in processes], timeout=PATIENCE)
    ended = [
        f"worker {index} (process {process.pid}) {_ending(process.exitcode)}"
        for index, process in enumerate(processes)
        if process.exitcode is not None
    ]
    return f"of the {len(processes)} environments of {type(env).__name__}, {', '.join(ended)}" if ended else None


def _ending(exitcode: int) -> str:
    """How a process ended."""
    return f"was ended by {signal.Signals(-exitcode).name}" if exitcode < 0 else f"ended with exit code {exitcode}"
