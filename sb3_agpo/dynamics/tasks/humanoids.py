"""Humanoid and HumanoidStandup, versions 4 and 5."""

from __future__ import annotations

import mujoco
import numpy as np
from gymnasium.envs.mujoco import MujocoEnv

from sb3_agpo.dynamics.tasks.base import Array, BoolArray, Outcome, Steps, option, sum_of_squares
from sb3_agpo.dynamics.tasks.locomotion import Mover, Walker, is_inside

# Arrays of MjData that version 5 may observe before the contact forces, with the first row that it observes: it leaves
# out the world and the root joint, which are constant.
_ARRAYS = {"cinert": 1, "cvel": 1, "qfrc_actuator": 6}


class HumanoidBody(Mover):
    """
    What the two tasks share: inertias, velocities, forces of all bodies in the observation, and the price of contact.

    Readings: ``n_leading`` numbers of the task's own, then the observed arrays in Gymnasium's order, then the contact
    forces of all bodies, the world's included.

    :param env: the unwrapped environment whose options are honoured
    """

    horizontal_coordinates = 2
    n_leading = 0
    # Version 4 has no options for it, and observes the constant rows too.
    observes_everything = False

    def __init__(self, env: MujocoEnv) -> None:
        super().__init__(env)
        self.arrays = tuple((name, first) for name, first in self._observed_arrays(env))
        self._n_forces = 6 * env.model.nbody
        n_rows = sum(getattr(env.data, name)[first:].size for name, first in self.arrays)
        self.n_readings = self.n_leading + n_rows + self._n_forces
        self._n_hidden_forces = self._hidden_forces(env)
        self.n_observed_readings = n_rows + self._n_forces - self._n_hidden_forces

    def _observed_arrays(self, env: MujocoEnv) -> list[tuple[str, int]]:
        """
        Which arrays are observed before the contact forces.

        :param env: the unwrapped environment
        :return: name of the array and first observed row
        """
        if self.observes_everything:
            return [(name, 0) for name in _ARRAYS]
        # Gymnasium compares with `is True`, so a 1 would not do.
        return [(name, first) for name, first in _ARRAYS.items() if option(env, f"include_{name}_in_observation") is True]

    def _hidden_forces(self, env: MujocoEnv) -> int:
        """
        How many contact forces, from the world's on, are left out of the observation.

        :param env: the unwrapped environment
        :return: the number
        """
        if self.observes_everything:
            return 0
        return 6 if option(env, "include_cfrc_ext_in_observation") is True else self._n_forces

    def read(self, data: mujoco.MjData) -> Array:
        """
        Read the task's own numbers, the observed arrays and the contact forces.

        :param data: MuJoCo's data, after a step
        :return: shape ``(n_readings,)``
        """
        arrays = [getattr(data, name)[first:].ravel() for name, first in self.arrays]
        return np.concatenate([*self.read_leading(data), *arrays, data.cfrc_ext.ravel()])

    def read_leading(self, data: mujoco.MjData) -> list[Array]:
        """
        Read the numbers that only this task needs.

        :param data: MuJoCo's data, after a step
        :return: ``n_leading`` numbers in all
        """
        return []

    def observe_readings(self, steps: Steps) -> list[Array]:
        """
        The arrays and contact forces that are observed.

        :param steps: the steps
        :return: ``n_observed_readings`` columns in all
        """
        first_force = self.n_readings - self._n_forces
        readings = steps.next_readings
        return [readings[:, self.n_leading : first_force], readings[:, first_force + self._n_hidden_forces :]]

    def contact_cost(self, steps: Steps, weight: float, limits: tuple[float, float]) -> Array:
        """
        The price of contact.

        :param steps: the steps
        :param weight: price of one squared newton or newton metre
        :param limits: lowest and highest price
        :return: shape ``(n,)``
        """
        return np.clip(weight * sum_of_squares(steps.next_readings[:, -self._n_forces :]), *limits)


class Humanoid(HumanoidBody, Walker):
    """
    Humanoid-v5.

    The reading of the task's own is the mass centre's x (m).

    :param env: the unwrapped environment whose options are honoured
    """

    n_leading = 1
    compares_readings = True

    def __init__(self, env: MujocoEnv) -> None:
        super().__init__(env)
        self.contact_weight = option(env, "contact_cost_weight", 0.0)
        self.contact_cost_range = option(env, "contact_cost_range", (-np.inf, np.inf))

    def read_leading(self, data: mujoco.MjData) -> list[Array]:
        """
        Read the mass centre's x, by the very sums Gymnasium takes.

        :param data: MuJoCo's data, after a step
        :return: one array of one number
        """
        masses = self.model.body_mass
        return [np.einsum("b,bj->j", masses, data.xipos)[:1] / masses.sum()]

    def refresh(self, data: mujoco.MjData) -> None:
        """
        Recompute the positions of the bodies' mass centres.

        :param data: private data, changed in place
        """
        mujoco.mj_kinematics(self.model, data)

    def x_positions(self, steps: Steps) -> tuple[Array, Array]:
        """
        Where the mass centre was and is, as MuJoCo left it.

        :param steps: the steps
        :return: x (m) before and after the step, each of shape ``(n,)``
        """
        return steps.readings[:, 0], steps.next_readings[:, 0]

    def costs(self, steps: Steps) -> Array:
        """
        The costs of control and of contact; control's is in float64 because Gymnasium takes it from ``data.ctrl``.

        :param steps: the steps
        :return: shape ``(n,)``
        """
        control_cost = super().costs(steps._replace(actions=steps.actions.astype(np.float64)))
        return control_cost + self.contact_cost(steps, self.contact_weight, self.contact_cost_range)

    def is_healthy(self, qpos: Array, qvel: Array) -> BoolArray:
        """
        Whether the torso's height is right.

        :param qpos: shape ``(n, nq)``
        :param qvel: shape ``(n, nv)``
        :return: shape ``(n,)``
        """
        return is_inside(qpos[:, 2], self.healthy_z_range)


class HumanoidV4(Humanoid):
    """Humanoid-v4: contact costs nothing."""

    observes_everything = True
    pays_when_fallen = True


class HumanoidStandup(HumanoidBody):
    """
    HumanoidStandup-v5: the reward is for the torso's height after the step, so it does not depend on x and y.

    :param env: the unwrapped environment whose options are honoured
    """

    def __init__(self, env: MujocoEnv) -> None:
        super().__init__(env)
        self.control_weight = option(env, "ctrl_cost_weight", 0.1)
        self.impact_weight = option(env, "impact_cost_weight", 5e-7)
        self.impact_cost_range = option(env, "impact_cost_range", (-np.inf, 10))

    def outcome(self, steps: Steps) -> Outcome:
        """
        Observation, reward and termination of a batch of steps.

        :param steps: the steps
        :return: the same numbers that Gymnasium computes
        """
        # Gymnasium divides by the physics time step, not by the environment's, and does not use `uph_cost_weight`.
        height_reward = steps.next_qpos[:, 2] / self.model.opt.timestep
        control_cost = self.control_weight * sum_of_squares(steps.actions.astype(np.float64))
        impact_cost = self.contact_cost(steps, self.impact_weight, self.impact_cost_range)
        reward = height_reward - control_cost - impact_cost + 1
        return Outcome(self.observe(steps), reward, np.zeros(len(reward), dtype=np.bool_))


class HumanoidStandupV4(HumanoidStandup):
    """HumanoidStandup-v4."""

    observes_everything = True
