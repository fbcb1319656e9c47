"""
Reacher, versions 4 and 5, and Pusher, version 5.

Gymnasium refuses to build Pusher-v4 with any MuJoCo that this package supports. No translation of these robots is
invariant: they are fixed to the ground, and the objects' positions are observed.
"""

from __future__ import annotations

import mujoco
import numpy as np
from gymnasium.envs.mujoco import MujocoEnv

from sb3_agpo.dynamics.tasks.base import Array, Outcome, Rows, Steps, StockTask, euclidean_norm, option, sum_of_squares


class Reacher(StockTask):
    """
    Reacher-v5: a two-link arm in the plane points at a target.

    Readings: fingertip minus target (m), three numbers.

    :param env: the unwrapped environment whose options are honoured
    """

    n_readings = 3
    n_observed_readings = 2

    def __init__(self, env: MujocoEnv) -> None:
        super().__init__(env)
        self.distance_weight = option(env, "reward_dist_weight", 1)
        self.control_weight = option(env, "reward_control_weight", 1)
        self._fingertip = env.data.body("fingertip").id
        self._target = env.data.body("target").id

    def read(self, data: mujoco.MjData) -> Array:
        """
        Read the way from the target to the fingertip.

        :param data: MuJoCo's data, after a step
        :return: shape ``(3,)``
        """
        positions = data.xpos
        return positions[self._fingertip] - positions[self._target]

    def outcome(self, steps: Steps) -> Outcome:
        """
        Observation, reward and termination of a batch of steps.

        :param steps: the steps
        :return: the same numbers that Gymnasium computes
        """
        angles = np.ascontiguousarray(steps.next_qpos[:, :2])
        state = [np.cos(angles), np.sin(angles), steps.next_qpos[:, 2:], steps.next_qvel[:, :2]]
        obs = np.concatenate([*state, steps.next_readings[:, : self.n_observed_readings]], axis=1)
        distance_reward = -euclidean_norm(self.rewarded_readings(steps)) * self.distance_weight
        control_reward = -sum_of_squares(steps.actions) * self.control_weight
        return Outcome(obs, distance_reward + control_reward, np.zeros(len(obs), dtype=np.bool_))

    def rewarded_readings(self, steps: Steps) -> Array:
        """
        The readings that decide the reward.

        :param steps: the steps
        :return: shape ``(n, 3)``: those after the step
        """
        return steps.next_readings

    def observation_rows(self, qpos: Array, qvel: Array) -> list[Rows]:
        """
        Cosines and sines of the arm's angles, the target's position, the arm's velocities.

        :param qpos: shape ``(n, nq)``
        :param qvel: shape ``(n, nv)``
        :return: the entries of the observation, readings left out
        """
        angles, arm = qpos[:, :2], slice(2)
        return [
            Rows(False, arm, -np.sin(angles)),
            Rows(False, arm, np.cos(angles)),
            Rows(False, slice(2, None)),
            Rows(True, arm),
        ]


class ReacherV4(Reacher):
    """Reacher-v4: it observes the height difference too, and is rewarded for the distance *before* the step."""

    n_observed_readings = 3

    def refresh(self, data: mujoco.MjData) -> None:
        """
        Recompute the bodies' positions.

        :param data: private data, changed in place
        """
        mujoco.mj_kinematics(self.model, data)

    def rewarded_readings(self, steps: Steps) -> Array:
        """
        The readings that decide the reward.

        :param steps: the steps
        :return: shape ``(n, 3)``: those before the step
        """
        return steps.readings


class Pusher(StockTask):
    """
    Pusher-v5: a seven-joint arm pushes an object to a goal.

    Readings: positions (m) of the arm's tip, the object and the goal, nine numbers, all of them observed.

    :param env: the unwrapped environment whose options are honoured
    """

    n_readings = 9
    n_observed_readings = 9

    def __init__(self, env: MujocoEnv) -> None:
        super().__init__(env)
        self.near_weight = option(env, "reward_near_weight")
        self.distance_weight = option(env, "reward_dist_weight")
        self.control_weight = option(env, "reward_control_weight")
        self._bodies = np.array([env.data.body(name).id for name in ("tips_arm", "object", "goal")])

    def read(self, data: mujoco.MjData) -> Array:
        """
        Read the positions of tip, object and goal.

        :param data: MuJoCo's data, after a step
        :return: shape ``(9,)``
        """
        return data.xpos[self._bodies].ravel()

    def outcome(self, steps: Steps) -> Outcome:
        """
        Observation, reward and termination of a batch of steps.

        :param steps: the steps
        :return: the same numbers that Gymnasium computes
        """
        tip, item, goal = (steps.next_readings[:, first : first + 3] for first in (0, 3, 6))
        obs = np.concatenate([steps.next_qpos[:, :7], steps.next_qvel[:, :7], steps.next_readings], axis=1)
        near_reward = -euclidean_norm(item - tip) * self.near_weight
        distance_reward = -euclidean_norm(item - goal) * self.distance_weight
        control_reward = -sum_of_squares(steps.actions) * self.control_weight
        # This order of addition, and in it the dtype of the action, is Gymnasium's.
        return Outcome(obs, distance_reward + control_reward + near_reward, np.zeros(len(obs), dtype=np.bool_))

    def observation_rows(self, qpos: Array, qvel: Array) -> list[Rows]:
        """
        The arm's positions and velocities.

        :param qpos: shape ``(n, nq)``
        :param qvel: shape ``(n, nv)``
        :return: the entries of the observation, readings left out
        """
        return [Rows(False, slice(7)), Rows(True, slice(7))]
