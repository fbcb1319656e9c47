"""
Robots that move over the ground: HalfCheetah, Swimmer, Hopper, Walker2d and Ant, versions 4 and 5.

All observe positions, without the root's horizontal ones unless told otherwise, then velocities, then readings if any.
"""

from __future__ import annotations

from abc import abstractmethod

import mujoco
import numpy as np
from gymnasium.envs.mujoco import MujocoEnv

from sb3_agpo.dynamics.tasks.base import Array, BoolArray, Outcome, Rows, Steps, StockTask, option, sum_of_squares
from sb3_agpo.dynamics.tasks.invariance import invariant_translations


class Mover(StockTask):
    """
    A robot whose root translates freely.

    Invariant are the translations that are hidden from the observation, unless the model's world notices them (see
    :func:`~sb3_agpo.dynamics.tasks.invariance.invariant_translations`). All rewards depend on them by differences only.

    :param env: the unwrapped environment whose options are honoured
    """

    horizontal_coordinates = 1  # leading entries of qpos that may be hidden
    velocity_limit = np.inf  # m/s and rad/s, observed velocities are clipped to it

    def __init__(self, env: MujocoEnv) -> None:
        super().__init__(env)
        hides = option(env, "exclude_current_positions_from_observation", True)
        self.n_hidden = self.horizontal_coordinates if hides else 0
        self.invariant = tuple(index for index in invariant_translations(env.model) if index < self.n_hidden)

    def observe(self, steps: Steps) -> Array:
        """
        The observation after each step.

        :param steps: the steps
        :return: shape ``(n, nobs)``
        """
        velocities = np.clip(steps.next_qvel, -self.velocity_limit, self.velocity_limit)
        return np.concatenate([steps.next_qpos[:, self.n_hidden :], velocities, *self.observe_readings(steps)], axis=1)

    def observe_readings(self, steps: Steps) -> list[Array]:
        """
        The parts of the observation that are readings.

        :param steps: the steps
        :return: ``n_observed_readings`` columns in all
        """
        return []

    def observation_rows(self, qpos: Array, qvel: Array) -> list[Rows]:
        """
        Positions that are not hidden, clipped velocities.

        :param qpos: shape ``(n, nq)``
        :param qvel: shape ``(n, nv)``
        :return: the entries of the observation, readings left out
        """
        not_clipped = (np.abs(qvel) < self.velocity_limit).astype(np.float64)
        return [Rows(False, slice(self.n_hidden, None)), Rows(True, slice(None), not_clipped)]


class Runner(Mover):
    """
    A robot that is rewarded for its velocity along x, less the cost of control.

    :param env: the unwrapped environment whose options are honoured
    """

    def __init__(self, env: MujocoEnv) -> None:
        super().__init__(env)
        self.forward_weight = option(env, "forward_reward_weight", 1.0)
        self.control_weight = option(env, "ctrl_cost_weight")

    def outcome(self, steps: Steps) -> Outcome:
        """
        Observation, reward and termination of a batch of steps.

        :param steps: the steps
        :return: the same numbers that Gymnasium computes
        """
        reward = self.forward_reward(steps) - self.costs(steps)
        return Outcome(self.observe(steps), reward, np.zeros(len(reward), dtype=np.bool_))

    def forward_reward(self, steps: Steps) -> Array:
        """
        Reward for the velocity along x.

        :param steps: the steps
        :return: shape ``(n,)``
        """
        before, after = self.x_positions(steps)
        return self.forward_weight * ((after - before) / self.dt)

    def x_positions(self, steps: Steps) -> tuple[Array, Array]:
        """
        Where the robot was and is.

        :param steps: the steps
        :return: x (m) before and after the step, each of shape ``(n,)``
        """
        return steps.qpos[:, 0], steps.next_qpos[:, 0]

    def costs(self, steps: Steps) -> Array:
        """
        What is taken off the reward: the cost of control, in the dtype of the action.

        :param steps: the steps
        :return: shape ``(n,)``
        """
        return self.control_weight * sum_of_squares(steps.actions)


class Swimmer(Runner):
    """Swimmer, versions 4 and 5."""

    horizontal_coordinates = 2


class Walker(Runner):
    """
    A runner that is paid for staying healthy, and whose episode may end when it is not.

    :param env: the unwrapped environment whose options are honoured
    """

    # Version 4 pays it in the step of a fall too if the fall ends the episode.
    pays_when_fallen = False

    def __init__(self, env: MujocoEnv) -> None:
        super().__init__(env)
        self.healthy_reward = option(env, "healthy_reward")
        self.terminates = bool(option(env, "terminate_when_unhealthy"))
        self.healthy_z_range = option(env, "healthy_z_range")

    def outcome(self, steps: Steps) -> Outcome:
        """
        Observation, reward and termination of a batch of steps.

        :param steps: the steps
        :return: the same numbers that Gymnasium computes
        """
        healthy = self.is_healthy(steps.next_qpos, steps.next_qvel)
        bonus = (healthy | (self.pays_when_fallen and self.terminates)) * self.healthy_reward
        reward = (self.forward_reward(steps) + bonus) - self.costs(steps)
        return Outcome(self.observe(steps), reward, ~healthy & self.terminates)

    @abstractmethod
    def is_healthy(self, qpos: Array, qvel: Array) -> BoolArray:
        """
        Whether the robot has not fallen.

        :param qpos: shape ``(n, nq)``
        :param qvel: shape ``(n, nv)``
        :return: shape ``(n,)``
        """


def is_inside(values: Array, limits: tuple[float, float]) -> BoolArray:
    """
    Whether values lie strictly within limits.

    :param values: any shape
    :param limits: lower and upper limit
    :return: the same shape
    """
    return (limits[0] < values) & (values < limits[1])


class Walker2d(Walker):
    """
    Walker2d-v5.

    :param env: the unwrapped environment whose options are honoured
    """

    velocity_limit = 10

    def __init__(self, env: MujocoEnv) -> None:
        super().__init__(env)
        self.healthy_angle_range = option(env, "healthy_angle_range")

    def is_healthy(self, qpos: Array, qvel: Array) -> BoolArray:
        """
        Whether the torso is high and upright enough.

        :param qpos: shape ``(n, nq)``
        :param qvel: shape ``(n, nv)``
        :return: shape ``(n,)``
        """
        return is_inside(qpos[:, 1], self.healthy_z_range) & is_inside(qpos[:, 2], self.healthy_angle_range)


class Walker2dV4(Walker2d):
    """Walker2d-v4."""

    pays_when_fallen = True


class Hopper(Walker2d):
    """
    Hopper-v5.

    :param env: the unwrapped environment whose options are honoured
    """

    def __init__(self, env: MujocoEnv) -> None:
        super().__init__(env)
        self.healthy_state_range = option(env, "healthy_state_range")

    def is_healthy(self, qpos: Array, qvel: Array) -> BoolArray:
        """
        Whether the torso is high and upright enough and nothing runs away.

        :param qpos: shape ``(n, nq)``
        :param qvel: shape ``(n, nv)``
        :return: shape ``(n,)``
        """
        state = np.concatenate([qpos[:, 2:], qvel], axis=1)
        return super().is_healthy(qpos, qvel) & is_inside(state, self.healthy_state_range).all(axis=1)


class HopperV4(Hopper):
    """Hopper-v4."""

    pays_when_fallen = True


class Ant(Walker):
    """
    Ant-v5.

    Readings: x (m) of the main body, then the external contact forces and torques of all bodies, if the task uses them.

    :param env: the unwrapped environment whose options are honoured
    """

    horizontal_coordinates = 2
    compares_readings = True

    def __init__(self, env: MujocoEnv) -> None:
        super().__init__(env)
        self.contact_weight = option(env, "contact_cost_weight")
        self.force_range = option(env, "contact_force_range")
        self._main_body = env.data.body(option(env, "main_body", "torso")).id
        uses_forces, self._n_hidden_forces = self.force_use(env)
        n_forces = 6 * env.model.nbody if uses_forces else 0
        self.n_readings = 1 + n_forces
        self.n_observed_readings = n_forces - min(self._n_hidden_forces, n_forces)

    def force_use(self, env: MujocoEnv) -> tuple[bool, int]:
        """
        How the task uses contact forces.

        :param env: the unwrapped environment
        :return: whether it uses them, and how many of them, from the world's on, are left out of the observation
        """
        n_world, n_all = 6, 6 * env.model.nbody
        return True, n_world if option(env, "include_cfrc_ext_in_observation") else n_all

    def read(self, data: mujoco.MjData) -> Array:
        """
        Read the main body's x and the contact forces.

        :param data: MuJoCo's data, after a step
        :return: shape ``(n_readings,)``
        """
        readings = np.empty(self.n_readings)
        readings[0] = data.xpos[self._main_body, 0]
        if self.n_readings > 1:
            readings[1:] = data.cfrc_ext.ravel()
        return readings

    def refresh(self, data: mujoco.MjData) -> None:
        """
        Recompute the main body's position.

        :param data: private data, changed in place
        """
        mujoco.mj_kinematics(self.model, data)

    def x_positions(self, steps: Steps) -> tuple[Array, Array]:
        """
        Where the main body was and is, as MuJoCo left it.

        :param steps: the steps
        :return: x (m) before and after the step, each of shape ``(n,)``
        """
        return steps.readings[:, 0], steps.next_readings[:, 0]

    def _contact_forces(self, steps: Steps) -> Array:
        """
        Clipped contact forces after each step.

        :param steps: the steps
        :return: shape ``(n, number of forces)``
        """
        return np.clip(steps.next_readings[:, 1:], *self.force_range)

    def observe_readings(self, steps: Steps) -> list[Array]:
        """
        The contact forces that are observed.

        :param steps: the steps
        :return: ``n_observed_readings`` columns in all
        """
        return [self._contact_forces(steps)[:, self._n_hidden_forces :]]

    def costs(self, steps: Steps) -> Array:
        """
        The costs of control and of contact.

        :param steps: the steps
        :return: shape ``(n,)``
        """
        return super().costs(steps) + self.contact_weight * sum_of_squares(self._contact_forces(steps))

    def is_healthy(self, qpos: Array, qvel: Array) -> BoolArray:
        """
        Whether the torso's height is right and all numbers are finite.

        :param qpos: shape ``(n, nq)``
        :param qvel: shape ``(n, nv)``
        :return: shape ``(n,)``
        """
        low, high = self.healthy_z_range
        finite = np.isfinite(qpos).all(axis=1) & np.isfinite(qvel).all(axis=1)
        return finite & (low <= qpos[:, 2]) & (qpos[:, 2] <= high)


class AntV4(Ant):
    """Ant-v4: contact forces are used only on request, and then the world's are observed too."""

    pays_when_fallen = True

    def force_use(self, env: MujocoEnv) -> tuple[bool, int]:
        """
        How the task uses contact forces.

        :param env: the unwrapped environment
        :return: whether it uses them, and that none is left out of the observation
        """
        return bool(option(env, "use_contact_forces")), 0
