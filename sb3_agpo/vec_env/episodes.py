"""Episodes of many environments: their lengths, returns and time limits, and what Monitor tells about them."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium.wrappers import TimeLimit
from numpy.typing import NDArray
from stable_baselines3.common.monitor import Monitor

from sb3_agpo.dynamics.interface import Array
from sb3_agpo.dynamics.wrappers import is_time_limit

_UNLIMITED = np.iinfo(np.int64).max


class Episodes:
    """
    What ``TimeLimit`` and ``Monitor`` do in each step, for all environments at once.

    The wrappers themselves stay in the environments: they are reset with them, they keep the statistics of past episodes
    and ``Monitor`` writes its file.

    :param envs: environments, with or without these wrappers
    """

    def __init__(self, envs: Sequence[gym.Env[Any, Any]]) -> None:
        self._monitors = [env if isinstance(env, Monitor) else None for env in envs]
        self._time_limits = [_time_limits(env) for env in envs]
        self._limits = np.empty(len(envs), dtype=np.int64)
        self.read_limits()
        self._lengths = np.zeros(len(envs), dtype=np.int64)  # steps since the last reset
        self._returns = np.zeros(len(envs))  # sums of rewards since the last reset
        self._n_steps = 0  # steps of each environment in all

    @property
    def info_keywords(self) -> tuple[str, ...]:
        """Keys of the task's info that a Monitor wants to record."""
        return tuple(key for monitor in self._monitors if monitor is not None for key in monitor.info_keywords)

    def read_limits(self) -> None:
        """Take the time limits that the wrappers have now, which somebody may have changed."""
        lengths = [[wrapper._max_episode_steps for wrapper in wrappers] for wrappers in self._time_limits]
        self._limits[:] = [min(steps, default=_UNLIMITED) for steps in lengths]

    def add(self, rewards: Array) -> NDArray[np.bool_]:
        """
        Count a step of every environment.

        :param rewards: shape ``(n_envs,)``
        :return: whether the time limit is reached, shape ``(n_envs,)``
        """
        self._n_steps += 1
        self._lengths += 1
        # Added up one by one, as Monitor does
        self._returns += rewards
        return self._lengths >= self._limits

    def end(self, index: int, info: dict[str, Any]) -> None:
        """
        End an episode: tell its statistics, as ``Monitor`` does.

        :param index: the environment
        :param info: its info of the last step, to which ``episode`` is added if it has a Monitor
        """
        monitor = self._monitors[index]
        if monitor is None:
            return
        # See Monitor.step in stable_baselines3.common.monitor
        episode_return, length = float(self._returns[index]), int(self._lengths[index])
        seconds = time.time() - monitor.t_start
        episode = {"r": round(episode_return, 6), "l": length, "t": round(seconds, 6)}
        episode |= {key: info[key] for key in monitor.info_keywords} | monitor.current_reset_info
        monitor.needs_reset = True
        monitor.episode_returns.append(episode_return)
        monitor.episode_lengths.append(length)
        monitor.episode_times.append(seconds)
        if monitor.results_writer is not None:
            monitor.results_writer.write_row(episode)
        info["episode"] = episode

    def begin(self, index: int) -> None:
        """
        Begin an episode, after the environment was reset.

        :param index: the environment
        """
        self._lengths[index] = 0
        self._returns[index] = 0.0

    def write_back(self, index: int) -> None:
        """
        Bring the counters of an environment's wrappers up to date, for somebody who looks at them.

        :param index: the environment
        """
        monitor = self._monitors[index]
        if monitor is not None:
            monitor.total_steps = self._n_steps
        for wrapper in self._time_limits[index]:
            if wrapper._elapsed_steps is not None:  # None before the first reset
                wrapper._elapsed_steps = int(self._lengths[index])

    def get_state(self) -> dict[str, Any]:
        """
        Read the counters.

        :return: their values
        """
        return {"lengths": self._lengths.copy(), "returns": self._returns.copy(), "n_steps": self._n_steps}

    def set_state(self, state: dict[str, Any]) -> None:
        """
        Put the counters back.

        :param state: as :meth:`get_state` returned it
        """
        self._lengths[:], self._returns[:], self._n_steps = state["lengths"], state["returns"], state["n_steps"]


def _time_limits(env: gym.Env[Any, Any]) -> list[TimeLimit[Any, Any]]:
    """The time limits among the wrappers of an environment."""
    found: list[TimeLimit[Any, Any]] = []
    while isinstance(env, gym.Wrapper):
        if is_time_limit(env):
            found.append(env)  # type: ignore[arg-type]
        env = env.env
    return found
