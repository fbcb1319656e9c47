"""Stepping copies of one stock task from given states, and finding states that a policy visits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import gymnasium as gym
import numpy as np
from gymnasium.envs.mujoco import MujocoEnv
from numpy.typing import NDArray

from sb3_agpo.benchmark.fidelity_model import FloatArray, SavedModel
from sb3_agpo.dynamics.mujoco import FiniteDifferences, MujocoDynamics, make_stepper
from sb3_agpo.dynamics.tasks import Outcome, Steps

Array = NDArray[np.float64]
#: called with the number of environment steps that were simulated
Progress = Callable[[int], object]


class BatchSimulator:
    """
    Copies of one stock task that are stepped together, from any states.

    States are those of :meth:`~sb3_agpo.dynamics.mujoco.MujocoDynamics.get_state`. The first step from such a state equals
    ``env.step`` bit for bit. Later ones do up to the constraint solver's rounding errors: its warm start is not known any
    more, and it starts from the unconstrained acceleration (measured: neither slower nor, to 13 digits, different).

    :param env: unwrapped environment of one of Gymnasium's own classes, which is only ever read
    :param threads: threads to step with; never changes a result
    """

    def __init__(self, env: MujocoEnv, threads: int = 1) -> None:
        self.dynamics = MujocoDynamics(env, FiniteDifferences(threads=threads))
        model = self.dynamics.model
        self._stepper = make_stepper(model, self.dynamics.task, env.frame_skip, threads)
        self._limits = np.cumsum([1, model.nq, model.nv])  # of time, positions and velocities in the physics state
        self._parts = (self.dynamics.physics_size, self.dynamics.physics_size + int(model.nv))
        self.simulator_calls = 0  # environment steps simulated

    def step(self, states: Array, actions: NDArray[Any]) -> tuple[Array, Outcome]:
        """
        Step every copy by one environment step.

        :param states: flat states, shape ``(n, nx)``
        :param actions: as the environment gets them, shape ``(n, nu)``
        :return: the next states ``(n, nx)`` and what ``env.step`` returns; NaN or infinite where a simulation diverged
        """
        physics, warmstart, readings = np.split(states, self._parts, axis=1)
        stepped = self._stepper.step(physics, warmstart, actions.astype(np.float64))
        self.simulator_calls += len(states)
        _, qpos, qvel, _ = np.split(physics, self._limits, axis=1)
        _, next_qpos, next_qvel, _ = np.split(stepped.physics, self._limits, axis=1)
        steps = Steps(qpos, qvel, readings, actions, next_qpos, next_qvel, stepped.next_readings)
        with np.errstate(all="ignore"):  # of copies that diverged
            outcome = self.dynamics.task.outcome(steps)
        return np.concatenate([stepped.physics, np.zeros_like(warmstart), stepped.next_readings], axis=1), outcome

    def close(self) -> None:
        """Stop the threads."""
        self._stepper.close()
        self.dynamics.close()


class VisitedStates(NamedTuple):
    """States that the stochastic policy came to, and what it does there."""

    states: Array  # (S, nx) flat simulator states
    observations: FloatArray  # (S, nobs)
    noise: FloatArray  # (S, nu) acting noise
    actions: FloatArray  # (S, nu) in [-1, 1]


def visit_states(
    env: gym.Env[Any, Any], simulator: BatchSimulator, model: SavedModel, *, n_states: int, spacing: int, seed: int
) -> VisitedStates:
    """
    Let the stochastic policy play, and keep one state, at random, of every ``spacing`` steps.

    :param env: the task, wrapped as it is played; its unwrapped environment is that of ``simulator``
    :param simulator: tells the state
    :param model: the policy
    :param n_states: number of states
    :param spacing: steps of the game per state; more make the states more independent of each other
    :param seed: of the environment and of the noise
    :return: the states
    """
    random = np.random.default_rng([seed, 0])
    observation, _ = env.reset(seed=seed)
    kept: list[VisitedStates] = []
    for _ in range(n_states):
        chosen = int(random.integers(spacing))
        for step in range(spacing):
            seen = np.asarray(observation, dtype=np.float32)
            noise = random.standard_normal((1, len(model.low)), dtype=np.float32)
            action, _ = model.act(seen[None], noise)
            if step == chosen:
                kept.append(VisitedStates(simulator.dynamics.get_state(), seen, noise[0], action[0]))
            observation, _, terminated, truncated, _ = env.step(model.unscale(action)[0])
            if terminated or truncated:
                observation, _ = env.reset()
    return VisitedStates._make(np.stack(fields) for fields in zip(*kept, strict=True))


def discounted_returns(
    simulator: BatchSimulator,
    model: SavedModel,
    states: Array,
    actions: FloatArray,
    noise: FloatArray,
    progress: Progress = lambda _: None,
) -> Array:
    """
    Returns, entropy bonus included, of given first actions, then the policy, then the critic.

    :param simulator: steps the task; time limits are ignored
    :param model: policy, critics, discount factor and temperature
    :param states: flat simulator states, shape ``(n, nx)``
    :param actions: first actions, in [-1, 1], shape ``(n, nu)``
    :param noise: of the policy, shape ``(K + 1, n, nu)``: K steps follow the first, the last noise is for the action
        whose value ends the sum
    :param progress: is told how many environment steps are done
    :return: shape ``(n,)``, NaN where the simulation diverged
    """
    total, discount, alpha = np.zeros(len(states)), 1.0, float(model.ent_coef)
    rows = np.arange(len(states))  # those whose episode goes on
    log_prob: Array | float = 0.0  # the entropy of the first action is no consequence of it
    observations = np.empty((0, 0))
    for step_noise in noise:
        progress(len(total))
        if not len(rows):
            continue
        states, outcome = simulator.step(states, model.unscale(actions))
        finite = np.isfinite(outcome.obs).all(axis=1) & np.isfinite(states).all(axis=1)
        total[rows] += np.where(finite, discount * (outcome.reward - alpha * log_prob), np.nan)
        discount *= model.gamma
        going = ~outcome.terminated & finite
        rows, states, observations = rows[going], states[going], outcome.obs[going]
        actions, log_prob = model.act(observations, step_noise[rows])
    if len(rows):
        total[rows] += discount * model.values(observations, noise[-1, rows])
    return total
