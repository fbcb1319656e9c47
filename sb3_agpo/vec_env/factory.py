"""The counterpart of SB3's ``make_vec_env``."""

from __future__ import annotations

from typing import Any

from stable_baselines3.common.env_util import make_vec_env

from sb3_agpo.vec_env.environments import check_integers, explain_unknown_id, make_options
from sb3_agpo.vec_env.mujoco_vec_env import MujocoVecEnv


def make_mujoco_vec_env(
    env_id: str,
    n_envs: int = 1,
    seed: int | None = None,
    start_index: int = 0,
    monitor_dir: str | None = None,
    *,
    env_kwargs: dict[str, Any] | None = None,
    monitor_kwargs: dict[str, Any] | None = None,
    threads: int | None = None,
    max_episode_steps: int | None = None,
    full_info: bool = False,
) -> MujocoVecEnv:
    """
    Make a :class:`MujocoVecEnv` by SB3's ``make_vec_env``, with its arguments and their meaning.

    Those that choose wrappers and another class (``wrapper_class``, ``wrapper_kwargs``, ``vec_env_cls``, ``vec_env_kwargs``)
    are left out.

    :param env_id: id of a stock task, such as "Hopper-v5"
    :param n_envs: number of environments
    :param seed: environment i is seeded with ``seed + i`` at the first reset; None for random seeds
    :param start_index: index of the first environment, for its action space's seed and its Monitor's file
    :param monitor_dir: folder for Monitor's files; None for no files
    :param env_kwargs: options of ``gymnasium.make``
    :param monitor_kwargs: arguments of ``Monitor``
    :param threads: threads to step with, see :class:`MujocoVecEnv`
    :param max_episode_steps: steps after which an episode is truncated, see :class:`MujocoVecEnv`
    :param full_info: whether ``info`` holds the task's own entries, see :class:`MujocoVecEnv`
    :return: the vectorised environment
    :raises TypeError: if an argument is of the wrong type
    :raises ValueError: if an argument is out of range, the id is not known, or the task is not a stock one
    """
    check_integers(n_envs=n_envs, threads=threads, seed=seed, max_episode_steps=max_episode_steps)
    with explain_unknown_id(env_id):
        return make_vec_env(  # type: ignore[return-value]
            env_id,
            n_envs,
            seed,
            start_index,
            monitor_dir,
            env_kwargs=make_options(env_kwargs, max_episode_steps),
            vec_env_cls=MujocoVecEnv,  # type: ignore[arg-type]
            vec_env_kwargs={"threads": threads, "full_info": full_info},
            monitor_kwargs=monitor_kwargs,
        )
