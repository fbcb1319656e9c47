"""InvertedPendulum and InvertedDoublePendulum, versions 4 and 5."""

from __future__ import annotations

import mujoco
import numpy as np
from gymnasium.envs.mujoco import MujocoEnv

from sb3_agpo.dynamics.tasks.base import Array, Outcome, Rows, Steps, StockTask, option, scalar_square

_VELOCITY_LIMIT = 10  # InvertedDoublePendulum observes velocities (m/s, rad/s) and forces (N, N m) clipped to +-10


class InvertedPendulum(StockTask):
    """
    InvertedPendulum-v5: a cart on a limited rail balances a pole.

    The cart's position is observed and its rail ends, so no translation is invariant.

    :param env: the unwrapped environment whose options are honoured
    """

    pays_when_fallen = False

    def outcome(self, steps: Steps) -> Outcome:
        """
        Observation, reward and termination of a batch of steps.

        :param steps: the steps
        :return: the same numbers that Gymnasium computes
        """
        obs = np.concatenate([steps.next_qpos, steps.next_qvel], axis=1)
        terminated = ~np.isfinite(obs).all(axis=1) | (np.abs(obs[:, 1]) > 0.2)
        return Outcome(obs, (~terminated | self.pays_when_fallen).astype(np.float64), terminated)

    def observation_rows(self, qpos: Array, qvel: Array) -> list[Rows]:
        """
        All positions, then all velocities.

        :param qpos: shape ``(n, nq)``
        :param qvel: shape ``(n, nv)``
        :return: the entries of the observation
        """
        return [Rows(False, slice(None)), Rows(True, slice(None))]


class InvertedPendulumV4(InvertedPendulum):
    """InvertedPendulum-v4: it is rewarded in the step of its fall too."""

    pays_when_fallen = True


class InvertedDoublePendulum(StockTask):
    """
    InvertedDoublePendulum-v5: a cart on a limited rail balances two poles.

    Readings: the tip's x and z (m), then the constraint forces that are observed. The cart's position is observed, its
    rail ends and the reward depends on the tip's x, so no translation is invariant.

    :param env: the unwrapped environment whose options are honoured
    """

    pays_when_fallen = False

    def __init__(self, env: MujocoEnv) -> None:
        super().__init__(env)
        self.healthy_reward = option(env, "healthy_reward", 10)
        self.n_observed_readings = self.observed_forces()
        self.n_readings = 2 + self.n_observed_readings

    def observed_forces(self) -> int:
        """
        How many of the constraint forces are observed.

        :return: the number, counted from the first degree of freedom
        """
        return 1

    def read(self, data: mujoco.MjData) -> Array:
        """
        Read the tip's position and the constraint forces.

        :param data: MuJoCo's data, after a step
        :return: shape ``(n_readings,)``
        """
        readings = np.empty(self.n_readings)
        readings[:2] = data.site_xpos[0, ::2]
        readings[2:] = data.qfrc_constraint[: self.n_observed_readings]
        return readings

    def outcome(self, steps: Steps) -> Outcome:
        """
        Observation, reward and termination of a batch of steps.

        :param steps: the steps
        :return: the same numbers that Gymnasium computes
        """
        x, height = steps.next_readings[:, 0], steps.next_readings[:, 1]
        terminated = height <= 1
        v1, v2 = steps.next_qvel[:, 1], steps.next_qvel[:, 2]
        distance_penalty = 0.01 * scalar_square(x) + scalar_square(height - 2)
        velocity_penalty = 0.001 * scalar_square(v1) + 0.005 * scalar_square(v2)
        alive_bonus = self.healthy_reward * (~terminated | self.pays_when_fallen)
        return Outcome(self._observe(steps), alive_bonus - distance_penalty - velocity_penalty, terminated)

    def _observe(self, steps: Steps) -> Array:
        """
        The observation after each step.

        :param steps: the steps
        :return: shape ``(n, nobs)``
        """
        angles = np.ascontiguousarray(steps.next_qpos[:, 1:])
        velocities = np.clip(steps.next_qvel, -_VELOCITY_LIMIT, _VELOCITY_LIMIT)
        forces = np.clip(steps.next_readings[:, 2:], -_VELOCITY_LIMIT, _VELOCITY_LIMIT)
        return np.concatenate([steps.next_qpos[:, :1], np.sin(angles), np.cos(angles), velocities, forces], axis=1)

    def observation_rows(self, qpos: Array, qvel: Array) -> list[Rows]:
        """
        The cart's position, sines and cosines of the angles, clipped velocities.

        :param qpos: shape ``(n, nq)``
        :param qvel: shape ``(n, nv)``
        :return: the entries of the observation, readings left out
        """
        angles, poles = qpos[:, 1:], slice(1, None)
        return [
            Rows(False, slice(1)),
            Rows(False, poles, np.cos(angles)),
            Rows(False, poles, -np.sin(angles)),
            Rows(True, slice(None), (np.abs(qvel) < _VELOCITY_LIMIT).astype(np.float64)),
        ]


class InvertedDoublePendulumV4(InvertedDoublePendulum):
    """InvertedDoublePendulum-v4: all constraint forces are observed, and the bonus is paid in the step of a fall too."""

    pays_when_fallen = True

    def observed_forces(self) -> int:
        """
        How many of the constraint forces are observed.

        :return: all of them
        """
        return int(self.model.nv)
