"""Building the environments of a :class:`~sb3_agpo.vec_env.MujocoVecEnv`, and refusing those that it cannot step."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import gymnasium as gym
import mujoco
import numpy as np
from gymnasium.envs.mujoco import MujocoEnv
from gymnasium.wrappers import OrderEnforcing, PassiveEnvChecker
from stable_baselines3.common.monitor import Monitor

from sb3_agpo.dynamics.mujoco import MujocoDynamics
from sb3_agpo.dynamics.tasks import TaskModel, find_task_model, foreign_method
from sb3_agpo.dynamics.wrappers import is_patched, is_time_limit

GymEnv = gym.Env[Any, Any]

#: wrappers that ``gymnasium.make`` adds by itself, beside the time limit; what they do in ``step`` is done for all
#: environments at once
STEPPED_WRAPPERS = (OrderEnforcing, PassiveEnvChecker)
#: attributes of an unwrapped environment that begin with an underscore and are no options of its task
NO_OPTIONS = ("_np_random", "_np_random_seed", "_ezpickle_args", "_ezpickle_kwargs")


def check_integers(n_envs: int | None, threads: int | None, seed: int | None, max_episode_steps: int | None) -> None:
    """
    Check the arguments that are integers; None stands for a default.

    :param n_envs: number of environments, at least 1
    :param threads: number of threads, at least 1
    :param seed: at least 0
    :param max_episode_steps: at least 1, or -1
    :raises TypeError: if one is no integer
    :raises ValueError: if one is out of range
    """
    checks: list[tuple[str, Any, int, str]] = [
        ("n_envs", n_envs, 1, "pass the number of environments"),
        ("threads", threads, 1, "pass None for one per core"),
        ("seed", seed, 0, "pass None for random seeds"),
        ("max_episode_steps", max_episode_steps, 1, "pass None for the task's own limit or -1 for no limit"),
    ]
    for name, value, least, otherwise in checks:
        if value is None:
            continue
        if isinstance(value, (bool, np.bool_)) or not isinstance(value, (int, np.integer)):
            raise TypeError(f"`{name}` must be an integer, got {value!r}; {otherwise}")
        if value < least and (name, value) != ("max_episode_steps", -1):
            raise ValueError(f"`{name}` must be at least {least}, got {value!r}; {otherwise}")


def check_functions(functions: Any, n_envs: int | None, options: dict[str, Any]) -> Sequence[Callable[[], GymEnv]]:
    """
    Check functions that build environments, and that no argument is lost on them.

    :param functions: functions that build one environment each
    :param n_envs: number of environments that the user asked for, if any
    :param options: options of ``gymnasium.make`` that the user gave
    :return: the functions
    :raises TypeError: if they are anything else
    :raises ValueError: if the other arguments do not fit
    """
    if not isinstance(functions, Sequence) or not all(callable(function) for function in functions):
        raise TypeError(f"`env_id` must be an id such as 'Hopper-v5', or a list of functions, got {functions!r}")
    if len(functions) == 0 or n_envs not in (None, len(functions)):
        raise ValueError(f"`n_envs` {n_envs!r} does not fit a list of {len(functions)} functions; pass one for each")
    if options:
        raise ValueError(f"the options {options} have no effect on functions; pass them to gymnasium.make inside of them")
    return functions


def make_options(env_kwargs: Any, max_episode_steps: int | None) -> dict[str, Any]:
    """
    Options of ``gymnasium.make``.

    :param env_kwargs: the user's options, None for none
    :param max_episode_steps: time limit; None for the registered one
    :return: the options
    :raises TypeError: if the options are no mapping
    """
    if not isinstance(env_kwargs, (Mapping, type(None))):
        raise TypeError(f"`env_kwargs` must be a dictionary of gymnasium.make's options, got {env_kwargs!r}")
    limit = {} if max_episode_steps is None else {"max_episode_steps": int(max_episode_steps)}
    return {**(env_kwargs or {}), **limit}


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
    signature = None
    for index, function in enumerate(functions):
        env = function()
        unwrapped = check_environment(env)
        if any(unwrapped is other.unwrapped for other in envs):
            raise ValueError(f"function {index} returned the environment of another one; let each build a new one")
        signature = check_signature(unwrapped, index, signature)
        if index > 0:
            share_model(unwrapped, envs[0].unwrapped.model)  # type: ignore[attr-defined]
        envs.append(env)
    return envs


def check_signature(env: MujocoEnv, index: int, first: bytes | None) -> bytes:
    """
    Refuse an environment that differs from the first in more than its state.

    :param env: unwrapped environment of a stock task
    :param index: its number
    :param first: signature of the first environment; None if this is the first
    :return: its signature
    :raises ValueError: if it is another one
    """
    signature = MujocoDynamics(env).signature()
    if first not in (None, signature):
        raise ValueError(
            f"environment {index} differs from environment 0 in its model or its task's options; "
            "give all environments equal options, or use DummyVecEnv"
        )
    return signature


def find_task(envs: Sequence[GymEnv]) -> TaskModel:
    """
    The model of the task that environments have in common, with the options that they have now.

    :param envs: environments, wrapped or not
    :return: the model
    :raises ValueError: if somebody has changed one of them such that they cannot be stepped together any more
    """
    signature = None
    for index, env in enumerate(envs):
        signature = check_signature(check_environment(env), index, signature)
    task = find_task_model(envs[0].unwrapped)  # type: ignore[arg-type]
    assert task is not None
    return task


def describe_options(env: GymEnv) -> str:
    """
    Everything that the step of a stock task depends on beside its state and its model, or that tells that it may be another.

    :param env: environment, wrapped or not
    :return: equal as long as nobody has changed it
    """
    unwrapped = env.unwrapped
    assert isinstance(unwrapped, MujocoEnv)
    own = {name: value for name, value in vars(unwrapped).items() if name.startswith("_") and name not in NO_OPTIONS}
    names = list(vars(unwrapped))
    while isinstance(env, gym.Wrapper):
        names += vars(env)  # a method may be put in any of them
        env = env.env
    return repr((own, names, unwrapped.frame_skip, unwrapped.model.opt.timestep))


def check_shared_model(envs: Sequence[GymEnv]) -> None:
    """
    Check that environments whose models were replaced share one again.

    :param envs: environments, wrapped or not
    :raises ValueError: naming the first that does not
    """
    models = [env.unwrapped.model for env in envs]  # type: ignore[attr-defined]
    for index, model in enumerate(models):
        if model is not models[0]:
            raise ValueError(
                f"environment {index} has another MjModel than environment 0, which it shared before; give all environments "
                "the same new one, each with an MjData of its own, or use DummyVecEnv"
            )


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
        method = foreign_method(unwrapped) if isinstance(unwrapped, MujocoEnv) else None
        raise ValueError(
            f"{name} is not one of Gymnasium's own MuJoCo tasks (versions 4 and 5), whose steps are known"
            f"{'' if method is None else f': its method `{method}` is not the original'}; "
            "use DummyVecEnv or SubprocVecEnv for it"
        )
    inner = env
    while isinstance(inner, gym.Wrapper):
        outermost = inner is env and type(inner) is Monitor
        known = outermost or type(inner) in STEPPED_WRAPPERS or is_time_limit(inner)
        if not known or is_patched(inner):
            where = ", which must be the outermost wrapper" if isinstance(inner, Monitor) and not outermost else ""
            changed = ", one of whose methods was replaced," if known else ""
            raise ValueError(
                f"the wrapper {type(inner).__name__}{where}{changed} is not stepped in threads; "
                "leave it out, use a wrapper of vectorised environments such as VecNormalize, or use DummyVecEnv"
            )
        inner = inner.env
    return unwrapped


def can_be_threaded(env: GymEnv) -> bool:
    """
    Whether a :class:`~sb3_agpo.vec_env.MujocoVecEnv` can hold environments like this one.

    :param env: environment, wrapped or not
    :return: True for a stock task with no wrapper that changes steps
    """
    try:
        check_environment(env)
    except ValueError:
        return False
    return True


def share_model(env: MujocoEnv, model: mujoco.MjModel) -> None:
    """
    Let an environment use another one's model, which saves memory, and cache misses in every step.

    :param env: unwrapped environment that has not been reset yet, changed in place
    :param model: a model equal to its own
    """
    env.model, env.data = model, mujoco.MjData(model)
    env.mujoco_renderer.model, env.mujoco_renderer.data = env.model, env.data
