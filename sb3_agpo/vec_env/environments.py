"""Building the environments of a :class:`~sb3_agpo.vec_env.MujocoVecEnv`, and refusing those that it cannot step."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import gymnasium as gym
import mujoco
import numpy as np
from gymnasium.envs.mujoco import MujocoEnv
from gymnasium.wrappers import OrderEnforcing, PassiveEnvChecker, TimeLimit
from stable_baselines3.common.monitor import Monitor

from sb3_agpo.dynamics.mujoco import MujocoDynamics
from sb3_agpo.dynamics.tasks import find_task_model

GymEnv = gym.Env[Any, Any]

#: wrappers that ``gymnasium.make`` adds by itself; what they do in ``step`` is done for all environments at once
STEPPED_WRAPPERS = (TimeLimit, OrderEnforcing, PassiveEnvChecker)


def check_integer(name: str, value: Any, least: int, otherwise: str) -> None:
    """
    Check an argument.

    :param name: name of the argument
    :param value: what the user passed
    :param least: the least that makes sense
    :param otherwise: what to pass instead, for the message
    :raises TypeError: if it is no integer
    :raises ValueError: if it is too small
    """
    if isinstance(value, (bool, np.bool_)) or not isinstance(value, (int, np.integer)):
        raise TypeError(f"`{name}` must be an integer, got {value!r}; {otherwise}")
    if value < least:
        raise ValueError(f"`{name}` must be at least {least}, got {value!r}; {otherwise}")


@contextmanager
def explain_unknown_id(env_id: Any) -> Iterator[None]:
    """
    Turn Gymnasium's errors on an environment's id into a ``ValueError``.

    :param env_id: the id
    :raises ValueError: if there is no such environment
    """
    try:
        yield
    except (gym.error.UnregisteredEnv, gym.error.DeprecatedEnv) as error:
        raise ValueError(f"`env_id` {env_id!r} is not known to Gymnasium ({error}); pass one such as 'Hopper-v5'") from error
    except gym.error.Error as error:
        if isinstance(error, gym.error.DependencyNotInstalled):
            raise
        raise ValueError(f"`env_id` {env_id!r} cannot be made ({error}); pass one such as 'Hopper-v5'") from error


def environment_functions(env_id: str, n_envs: int, options: dict[str, Any], seed: int | None) -> list[Callable[[], GymEnv]]:
    """
    What ``make_vec_env`` of SB3 passes to a vectorised environment.

    :param env_id: id of a registered environment
    :param n_envs: number of environments
    :param options: options of ``gymnasium.make``
    :param seed: the i-th environment's action space is seeded with ``seed + i``; None for no seed
    :return: functions that build one environment each
    """

    def build(rank: int) -> GymEnv:
        with explain_unknown_id(env_id):
            env = gym.make(env_id, **{"render_mode": "rgb_array", **options})
        if seed is not None:
            env.action_space.seed(seed + rank)
        return Monitor(env)

    return [lambda rank=rank: build(rank) for rank in range(n_envs)]  # type: ignore[misc]


def build_environments(functions: Sequence[Callable[[], GymEnv]]) -> list[GymEnv]:
    """
    Build environments that can be stepped together, and let them share one model.

    :param functions: functions that build one environment each
    :return: the environments
    :raises ValueError: if one is not a stock task, has a wrapper that changes steps, or differs from the first
    """
    envs: list[GymEnv] = []
    signature = b""
    for index, function in enumerate(functions):
        env = function()
        unwrapped = check_environment(env)
        if any(unwrapped is other.unwrapped for other in envs):
            raise ValueError(f"function {index} returned the environment of another one; let each build a new one")
        own = MujocoDynamics(unwrapped).signature()
        if index == 0:
            signature = own
        elif own != signature:
            raise ValueError(
                f"environment {index} differs from environment 0 in its model or its task's options; "
                "pass environments built with equal options, or use DummyVecEnv"
            )
        else:
            share_model(unwrapped, envs[0].unwrapped.model)  # type: ignore[attr-defined]
        envs.append(env)
    return envs


def check_environment(env: GymEnv) -> MujocoEnv:
    """
    Refuse an environment whose step is not known to be the stock task's.

    :param env: environment, wrapped or not
    :return: the unwrapped environment
    :raises ValueError: naming what cannot be stepped
    """
    unwrapped = env.unwrapped
    name = f"{type(unwrapped).__module__}.{type(unwrapped).__qualname__}"
    if not isinstance(unwrapped, MujocoEnv) or find_task_model(unwrapped) is None:
        raise ValueError(
            f"{name} is not one of Gymnasium's own MuJoCo tasks (versions 4 and 5), whose steps are known; "
            "use DummyVecEnv or SubprocVecEnv for it"
        )
    inner = env.env if type(env) is Monitor else env
    while isinstance(inner, gym.Wrapper):
        if type(inner) not in STEPPED_WRAPPERS:
            where = ", which must be the outermost wrapper" if isinstance(inner, Monitor) else ""
            raise ValueError(
                f"the wrapper {type(inner).__name__}{where} is not stepped in threads; "
                "leave it out, use a wrapper of vectorised environments such as VecNormalize, or use DummyVecEnv"
            )
        inner = inner.env
    return unwrapped


def share_model(env: MujocoEnv, model: mujoco.MjModel) -> None:
    """
    Let an environment use another one's model, which saves memory, and cache misses in every step.

    :param env: unwrapped environment that has not been reset yet, changed in place
    :param model: a model equal to its own
    """
    env.model, env.data = model, mujoco.MjData(model)
    env.mujoco_renderer.model, env.mujoco_renderer.data = env.model, env.data
