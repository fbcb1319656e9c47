"""
What all task models share: the interface, the observation Jacobian, and the few sums whose last bit matters.

NumPy adds and squares differently for scalars, vectors and batches, so a formula that is right in mathematics may still
differ from Gymnasium's in its last bit. The pure functions at the end of this file are the batched forms that do not.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, NamedTuple

import mujoco
import numpy as np
from gymnasium.envs.mujoco import MujocoEnv
from numpy.typing import NDArray

from sb3_agpo.dynamics.tangent import JointLayout, joint_layout, quaternion_multiply

Array = NDArray[np.float64]
BoolArray = NDArray[np.bool_]


class Steps(NamedTuple):
    """
    A batch of ``n`` environment steps as MuJoCo left them.

    *Readings* are the quantities that a task reads from ``MjData`` although they are no function of the physics state:
    body positions, contact forces, inertias, ... that MuJoCo computed during its last physics step.
    """

    qpos: Array  # (n, nq) before the step
    qvel: Array  # (n, nv) before the step
    readings: Array  # (n, n_readings) before the step
    actions: NDArray[Any]  # (n, nu) as given to ``env.step``, dtype preserved
    next_qpos: Array  # (n, nq)
    next_qvel: Array  # (n, nv)
    next_readings: Array  # (n, n_readings)


class Outcome(NamedTuple):
    """What ``env.step`` returned for a batch of steps."""

    obs: Array  # (n, nobs)
    reward: Array  # (n,)
    terminated: BoolArray  # (n,)


class TaskModel(ABC):
    """
    Observation, reward and termination of one stock task, with the options of a given environment.

    ``invariant`` holds those indices ``i < nv`` of tangent position coordinates that are translations of the root body
    with this property: adding the same constant to coordinate ``i`` before the step changes neither observation, reward
    nor termination of the step, and changes the next state by that constant in coordinate ``i`` and nowhere else. The
    readings before the step must be those of the shifted state (see :meth:`refresh`). The property is exact in
    mathematics and holds to rounding in floating point. Hence column ``i`` of ``dx'/dx`` is the unit vector, and column
    ``i`` of ``do/dx``, ``do'/dx`` and ``dr/dx`` is zero. An index that is missing claims nothing.

    :param env: the unwrapped environment whose options are honoured
    """

    n_readings: int = 0
    invariant: tuple[int, ...] = ()
    #: whether the reward compares readings after the step with the same before it, both functions of the positions
    compares_readings: bool = False

    def __init__(self, env: MujocoEnv) -> None:
        self.model: mujoco.MjModel = env.model
        self.dt = env.dt

    def read(self, data: mujoco.MjData) -> Array:
        """
        Read what :class:`Steps` calls readings, as they stand.

        :param data: MuJoCo's data, after ``mj_step`` and ``mj_rnePostConstraint``
        :return: shape ``(n_readings,)``
        """
        return np.empty(0)

    def refresh(self, data: mujoco.MjData) -> None:  # noqa: B027 (most tasks have nothing to refresh)
        """
        Recompute, from a state that was just written into ``data``, the readings that a step needs *before* it starts.

        :param data: private data, changed in place; nothing to do for tasks that need no such reading
        """

    @abstractmethod
    def outcome(self, steps: Steps) -> Outcome:
        """
        Observation, reward and termination of a batch of steps.

        :param steps: the steps
        :return: the same numbers that Gymnasium computes
        """

    @abstractmethod
    def observation_jacobian(self, qpos: Array, qvel: Array) -> Array:
        """
        Derivative of the observation with respect to the state, C = do/dx, in tangent coordinates.

        :param qpos: shape ``(n, nq)``
        :param qvel: shape ``(n, nv)``
        :return: shape ``(n, nobs, 2 nv + na)``; rows of observation parts that are readings are zero
        """


class Rows(NamedTuple):
    """Consecutive entries of the observation, each a function of one entry of ``qpos`` or of ``qvel``."""

    of_velocity: bool  # whether the entries are functions of ``qvel``, else of ``qpos``
    columns: slice  # the entries of ``qpos`` or ``qvel`` that they are functions of
    slope: Array | float = 1.0  # (n, number of columns) derivative of the functions


class StockTask(TaskModel):
    """
    A task whose observation starts with functions of the state and ends with readings, as all of Gymnasium's do.

    :param env: the unwrapped environment whose options are honoured
    """

    n_observed_readings: int = 0  # entries at the observation's end that are readings

    def __init__(self, env: MujocoEnv) -> None:
        super().__init__(env)
        self._layout = joint_layout(env.model)

    @abstractmethod
    def observation_rows(self, qpos: Array, qvel: Array) -> list[Rows]:
        """
        Describe the part of the observation that is a function of the state.

        :param qpos: shape ``(n, nq)``
        :param qvel: shape ``(n, nv)``
        :return: the entries in order, readings left out
        """

    def observation_jacobian(self, qpos: Array, qvel: Array) -> Array:
        """
        Derivative of the observation with respect to the state, C = do/dx, in tangent coordinates.

        :param qpos: shape ``(n, nq)``
        :param qvel: shape ``(n, nv)``
        :return: shape ``(n, nobs, 2 nv + na)``; rows of observation parts that are readings are zero
        """
        nv = self.model.nv
        tangents = (position_jacobian(self._layout, qpos, nv), np.eye(nv)[None])  # of qpos and of qvel
        rows = self.observation_rows(qpos, qvel)
        blocks = [tangents[part.of_velocity][:, part.columns] * np.asarray(part.slope)[..., None] for part in rows]
        n_rows = sum(block.shape[1] for block in blocks)
        jacobian = np.zeros((len(qpos), n_rows + self.n_observed_readings, 2 * nv + self.model.na))
        start = 0
        for part, block in zip(rows, blocks, strict=True):
            first_column = nv if part.of_velocity else 0
            jacobian[:, start : start + block.shape[1], first_column : first_column + nv] = block
            start += block.shape[1]
        return jacobian


def position_jacobian(layout: JointLayout, qpos: Array, nv: int) -> Array:
    """
    Derivative of ``qpos`` with respect to its tangent coordinates, as ``mj_integratePos`` integrates them.

    :param layout: where the joints keep their positions
    :param qpos: shape ``(n, nq)``
    :param nv: number of degrees of freedom
    :return: shape ``(n, nq, nv)``
    """
    jacobian = np.zeros((*qpos.shape, nv))
    for position, tangent in layout.scalars:
        jacobian[:, position, tangent] = 1.0
    for position, tangent in layout.quaternions:
        columns = quaternion_derivative(qpos[:, position : position + 4])
        jacobian[:, position : position + 4, tangent : tangent + 3] = columns
    return jacobian


def quaternion_derivative(quaternions: Array) -> Array:
    """
    Derivative of ``q exp(v / 2)`` with respect to the local rotation vector ``v`` at zero: half of ``q`` times (0, v).

    Gymnasium adds noise to ``qpos`` at reset without normalising it, so the first observation of an episode shows a
    quaternion of another length than one. Its length is kept here; ``mj_integratePos`` would set it to one.

    :param quaternions: shape ``(n, 4)``, real part first
    :return: shape ``(n, 4, 3)``
    """
    units = np.eye(4)[1:]
    return 0.5 * np.swapaxes(quaternion_multiply(quaternions[:, None], units[None]), 1, 2)


def option(env: MujocoEnv, name: str, constant: Any = None) -> Any:
    """
    An environment's constructor option.

    :param env: the unwrapped environment
    :param name: name of the constructor's parameter
    :param constant: the value in versions of the task that offer no such option
    :return: the option's value
    """
    return getattr(env, f"_{name}", constant)


def sum_of_squares(rows: NDArray[Any]) -> NDArray[Any]:
    """
    Row by row what ``np.sum(np.square(row))`` gives, in the dtype of the rows.

    The dtype is part of the formula: Gymnasium takes the control cost of a float32 action in float32.

    :param rows: shape ``(n, k)``
    :return: shape ``(n,)``
    """
    # NumPy adds pairwise only along memory that is contiguous, and in another order otherwise.
    return np.sum(np.square(np.ascontiguousarray(rows)), axis=1)


def euclidean_norm(vectors: Array) -> Array:
    """
    Row by row what ``np.linalg.norm(vector)`` gives.

    ``np.linalg.norm`` of one vector is the square root of a BLAS dot product, which may round once per fused
    multiply-add; with an ``axis`` argument it is a plain sum. A stacked matrix product calls the same dot product.

    :param vectors: shape ``(n, k)``
    :return: shape ``(n,)``
    """
    vectors = np.ascontiguousarray(vectors)
    return np.sqrt((vectors[:, None, :] @ vectors[:, :, None])[:, 0, 0])


def scalar_square(values: Array) -> Array:
    """
    Element by element what ``value**2`` gives for a NumPy scalar.

    NumPy squares arrays by multiplication and scalars by the C library's ``pow``, which differ in the last bit about once
    in a thousand values; ``np.float_power`` calls ``pow`` for arrays too.

    :param values: any shape
    :return: the same shape
    """
    return np.float_power(values, 2)
