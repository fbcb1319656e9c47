"""n-step returns that end before an action which the policy of now would hardly take."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch as th
from stable_baselines3.common.buffers import NStepReplayBuffer, ReplayBuffer
from stable_baselines3.common.type_aliases import ReplayBufferSamples
from stable_baselines3.common.vec_env import VecNormalize

from sb3_agpo.agpo.policies import Actor
from sb3_agpo.agpo.squashed_gaussian import action_distance
from sb3_agpo.agpo.updates import gaussian_parameters


def sample_n_step(
    buffer: NStepReplayBuffer, batch_size: int, actor: Actor, trace_distance: float, vec_normalize: VecNormalize | None
) -> tuple[ReplayBufferSamples, float]:
    r"""
    Replayed transitions with n-step returns whose traces are cut where they leave the policy.

    The return :math:`r_0 + \gamma r_1 + \dots + \gamma^n V(o_n)` estimates :math:`Q(o_0, a_0)` of the policy only if
    :math:`a_1, \dots, a_{n-1}` are its actions. Replayed ones come from policies of the past, the first from uniform noise.
    Here the return ends, with the value of :math:`o_k`, before the first action :math:`a_k` that is further than
    ``trace_distance`` from what the policy does at :math:`o_k`. Retrace (Munos et al. 2016) cuts by the ratio of both
    policies' densities; this needs none of the old policy's. It ends as well where the next transition in memory does not go
    on where this one led, as in data that somebody has shuffled. Otherwise it is what
    :class:`~stable_baselines3.common.buffers.NStepReplayBuffer` does, random numbers included.

    :param buffer: replay buffer
    :param batch_size: number of transitions
    :param actor: the policy of now
    :param trace_distance: in standard deviations, see :func:`~sb3_agpo.agpo.squashed_gaussian.action_distance`
    :param vec_normalize: normalisation of observations and rewards
    :return: the transitions, ``next_observations`` and ``discounts`` being those where the return ends; and the mean
        number of steps of a return
    """
    n_steps, gamma = buffer.n_steps, buffer.gamma
    first = np.random.randint(0, buffer.size(), size=batch_size)  # (batch,)
    env = np.random.randint(0, buffer.n_envs, size=batch_size)  # (batch,)
    rows, column = (first[:, None] + np.arange(n_steps)) % buffer.buffer_size, env[:, None]  # (batch, n_steps), (batch, 1)

    later = rows[:, 1:], column
    observations = buffer._normalize_obs(buffer.observations[later], vec_normalize)
    far = _distances(buffer, actor, observations, buffer.actions[later]) > trace_distance  # (batch, n_steps - 1)
    newest = (buffer.pos - 1) % buffer.buffer_size  # what follows it in memory is older, or not there yet
    leaves = (buffer.next_observations[rows[:, :-1], column] != buffer.observations[later]).reshape(*far.shape, -1).any(-1)
    stops = (buffer.dones[rows[:, :-1], column] > 0.0) | (rows[:, :-1] == newest) | far | leaves
    ends = np.concatenate([stops, np.ones((batch_size, 1), dtype=bool)], axis=1)  # (batch, n_steps)
    length = ends.argmax(1)  # steps after the first

    rewards = buffer._normalize_reward(buffer.rewards[rows, column], vec_normalize)
    powers = gamma ** np.arange(n_steps + 1, dtype=np.float32)
    returns = (rewards * powers[:-1] * (np.arange(n_steps) <= length[:, None])).sum(1)
    last = (first + length) % buffer.buffer_size, env
    terminated = buffer.dones[last] * (1.0 - buffer.timeouts[last])
    samples = ReplayBufferSamples(
        observations=buffer.to_torch(buffer._normalize_obs(buffer.observations[first, env], vec_normalize)),  # type: ignore[arg-type]
        actions=buffer.to_torch(buffer.actions[first, env]),
        next_observations=buffer.to_torch(buffer._normalize_obs(buffer.next_observations[last], vec_normalize)),  # type: ignore[arg-type]
        dones=buffer.to_torch(terminated[:, None]),
        rewards=buffer.to_torch(returns[:, None]),
        discounts=buffer.to_torch(powers[length + 1, None]),
    )
    return samples, float(length.mean()) + 1.0


def end_last_episode(buffer: ReplayBuffer, observations: np.ndarray | None = None) -> None:
    """
    Let episodes that are not over end with the newest transitions, as by a time limit: what follows begins another one.

    :param buffer: replay buffer other than ``HerReplayBuffer``
    :param observations: where the environments stand, shape ``(n_envs, ...)``, unnormalised; episodes that lead there go on.
        None if all begin anew
    """
    if buffer.size() == 0:
        return
    newest = (buffer.pos - 1) % buffer.buffer_size
    unfinished = buffer.dones[newest] == 0.0  # (n_envs,)
    if observations is not None:
        successors = buffer.next_observations[newest]  # (n_envs, ...)
        differ = successors != np.asarray(observations, dtype=successors.dtype).reshape(successors.shape)
        unfinished &= differ.reshape(len(differ), -1).any(axis=1)
    buffer.dones[newest, unfinished] = 1.0
    # Without memory of its own for successors, that of the newest transition is about to become another episode's first
    # observation, on which no value may be built
    if not buffer.optimize_memory_usage:
        buffer.timeouts[newest, unfinished] = 1.0


def _distances(buffer: NStepReplayBuffer, actor: Actor, observations: Any, actions: np.ndarray) -> np.ndarray:
    """How far actions of shape ``(batch, n, nu)`` are from the policy, shape ``(batch, n)``."""
    with th.no_grad():
        mean, log_std = gaussian_parameters(actor, buffer.to_torch(observations).flatten(0, 1))
        distances = action_distance(buffer.to_torch(actions).flatten(0, 1), mean, log_std)
    return distances.cpu().numpy().reshape(actions.shape[:2])
