"""
Derivatives of stock Gymnasium MuJoCo tasks by batched finite differences through the whole frame-skipped step.

Differences work with any integrator (``mjd_transitionFD`` refuses RK4, which most tasks use), include contacts, and act
as smoothing over the size of the step. Positions are perturbed in tangent coordinates, so quaternions stay unit.
"""

from __future__ import annotations

import copy
import hashlib
import os
from dataclasses import dataclass

import mujoco
import numpy as np
from gymnasium import spaces
from gymnasium.envs.mujoco import MujocoEnv
from numpy.typing import NDArray

from sb3_agpo.dynamics.interface import Array, TransitionDerivatives
from sb3_agpo.dynamics.stepping import FULL_PHYSICS, DataStepper, RolloutStepper, SteppedRows
from sb3_agpo.dynamics.tangent import PositionTangent
from sb3_agpo.dynamics.tasks import Outcome, Steps, TaskModel, find_task_model


@dataclass(frozen=True)
class FiniteDifferences:
    """
    How to take differences.

    A larger step smooths contacts more and is further from the local derivative; a smaller one the reverse. Steps from
    1e-6 (local) to 0.1 (strong smoothing) are of use on the stock tasks.

    :param position_step: step of joint positions, in metres or radians
    :param velocity_step: step of joint velocities, in metres or radians per second
    :param activation_step: step of actuator activations
    :param action_step: step of actions, in units of the action in [-1, 1]
    :param centred: centred instead of forward differences: twice the rows, error of second order
    :param threads: threads to step with; None for the number of cores. Never changes a result
    :param max_derivative: a transition with an entry of A or B above this in absolute value is not trusted (``valid``
        is False, its derivatives are zero)
    :raises ValueError: if a step, the number of threads or the bound is not positive
    """

    position_step: float = 1e-3
    velocity_step: float = 1e-2
    activation_step: float = 1e-3
    action_step: float = 1e-2
    centred: bool = False
    threads: int | None = None
    max_derivative: float = 1e5

    def __post_init__(self) -> None:
        for name in ("position_step", "velocity_step", "activation_step", "action_step", "max_derivative"):
            value = getattr(self, name)
            if not (np.isfinite(value) and value > 0.0):
                raise ValueError(f"`{name}` must be a positive finite number, got {value!r}; try {type(self).__dict__[name]}")
        if self.threads is not None and self.threads < 1:
            raise ValueError(f"`threads` must be at least 1 or None (one per core), got {self.threads!r}")

    @property
    def n_threads(self) -> int:
        """Threads to use on this machine."""
        return self.threads if self.threads is not None else len(os.sched_getaffinity(0))


class Perturbations:
    """
    The rows of a difference scheme: which coordinates are moved, by how much, and how rows become a derivative.

    :param tangent: layout of the positions
    :param n_activations: length of the activation part of the state
    :param action_space: bounds of the actions that rows must not leave
    :param differences: step sizes and scheme
    :param fixed: tangent position coordinates that need no row, because a shift along them changes nothing
    """

    def __init__(
        self,
        tangent: PositionTangent,
        n_activations: int,
        action_space: spaces.Box,
        differences: FiniteDifferences,
        fixed: tuple[int, ...] = (),
    ) -> None:
        nv = tangent.nv
        self.tangent, self.centred, self.fixed = tangent, differences.centred, fixed
        self.ndx, self.nu = 2 * nv + n_activations, action_space.shape[0]
        self.low, self.high = action_space.low.astype(np.float64), action_space.high.astype(np.float64)
        steps = np.empty(self.ndx + self.nu)
        steps[:nv], steps[nv : 2 * nv] = differences.position_step, differences.velocity_step
        steps[2 * nv : self.ndx] = differences.activation_step
        steps[self.ndx :] = 0.5 * differences.action_step * (self.high - self.low)
        self.steps = steps  # (ndx + nu,)
        self.columns = np.setdiff1d(np.arange(self.ndx + self.nu), np.array(fixed, dtype=np.intp))
        self.n_rows = 1 + len(self.columns) * (2 if self.centred else 1)

    def perturb(self, physics: Array, actions: Array) -> tuple[Array, Array, Array]:
        """
        Build the rows of ``n`` transitions.

        :param physics: full physics states, shape ``(n, nphysics)``
        :param actions: shape ``(n, nu)``
        :return: physics ``(n, n_rows, nphysics)``, actions ``(n, n_rows, nu)``, row 0 unperturbed, and the distance
            between the two rows that make a column, ``(n, n_columns)``, negative where the first is the smaller
        """
        n, n_columns = len(physics), len(self.columns)
        row_physics = np.repeat(physics[:, None], self.n_rows, axis=1)
        row_actions = np.repeat(actions[:, None], self.n_rows, axis=1)
        forward, backward = slice(1, 1 + n_columns), slice(1 + n_columns, self.n_rows)
        signed = np.diag(self.steps)[self.columns]  # (n_columns, ndx + nu)
        self._move(row_physics[:, forward], signed)
        moved = self._move_actions(row_actions[:, forward], signed[:, self.ndx :], inward=not self.centred)
        distance = np.broadcast_to(self.steps[self.columns], (n, n_columns)).copy()
        if self.centred:
            self._move(row_physics[:, backward], -signed)
            moved = moved - self._move_actions(row_actions[:, backward], -signed[:, self.ndx :], inward=False)
        is_action = self.columns >= self.ndx
        distance[:, ~is_action] *= 2.0 if self.centred else 1.0
        distance[:, is_action] = moved.sum(axis=-1)[:, is_action]
        return row_physics, row_actions, distance

    def _move(self, row_physics: Array, signed: Array) -> None:
        """Move physics rows ``(n, n_columns, nphysics)`` in place by ``signed`` ``(n_columns, ndx + nu)``."""
        nq, nv = self.tangent.nq, self.tangent.nv
        positions = slice(1, 1 + nq)  # time comes first
        rest = slice(1 + nq, 1 + nq + self.ndx - nv)  # velocities and activations
        row_physics[..., positions] = self.tangent.integrate(row_physics[..., positions], signed[None, :, :nv])
        row_physics[..., rest] += signed[None, :, nv : self.ndx]

    def _move_actions(self, row_actions: Array, signed: Array, *, inward: bool) -> Array:
        """Move actions in place without leaving their bounds; the way moved, shape ``(n, n_columns, nu)``."""
        before = row_actions.copy()
        target = before + signed
        if inward:  # one-sided at the limit
            target = np.where((target > self.high) | (target < self.low), before - signed, target)
        row_actions[...] = np.where(signed == 0.0, before, np.clip(target, self.low, self.high))
        return row_actions - before

    def quotient(self, change: Array, distance: Array) -> tuple[Array, Array]:
        """
        Difference quotients.

        :param change: change of a quantity between the rows of each column, shape ``(n, n_columns, m)``
        :param distance: as returned by :meth:`perturb`
        :return: derivative by the state ``(n, m, ndx)`` and by the action ``(n, m, nu)``; zero for fixed coordinates
        """
        jacobian = np.zeros((len(change), change.shape[-1], self.ndx + self.nu))
        jacobian[:, :, self.columns] = np.swapaxes(change / distance[..., None], 1, 2)
        return jacobian[..., : self.ndx], jacobian[..., self.ndx :]


    def change(self, values: Array) -> Array:
        """
        Change of row values between the two rows that make each column.

        :param values: shape ``(n, n_rows, m)``
        :return: shape ``(n, n_columns, m)``
        """
        n_columns = len(self.columns)
        if self.centred:
            return values[:, 1 : 1 + n_columns] - values[:, 1 + n_columns :]
        return values[:, 1:] - values[:, :1]


class MujocoDynamics:
    """
    Derivatives of one step of a stock Gymnasium MuJoCo task.

    The state is the full physics state (time, positions, velocities, activations, ...), the constraint solver's warm
    start and the task's readings (see :class:`~sb3_agpo.dynamics.tasks.Steps`). The unperturbed row equals ``env.step``
    bit for bit. All stepping happens on a private copy of the model; the live environment is only ever read.

    :param env: unwrapped environment of one of Gymnasium's own classes
    :param differences: step sizes, scheme and threads
    :raises TypeError: if the environment is not a stock task
    """

    #: many states can be differentiated at once, after the environment has moved on
    deferred = True

    def __init__(self, env: MujocoEnv, differences: FiniteDifferences | None = None) -> None:
        task = find_task_model(env)
        if task is None:
            raise TypeError(f"{type(env).__name__} is no stock Gymnasium MuJoCo task; use `EnvStepDynamics` instead")
        assert isinstance(env.action_space, spaces.Box)
        self.env, self.task = env, task
        self.differences = differences or FiniteDifferences()
        self.model = private_model(env.model)
        self.tangent = PositionTangent(self.model)
        self.perturbations = Perturbations(
            self.tangent, int(self.model.na), env.action_space, self.differences, getattr(task, "invariant", ())
        )
        self.physics_size = mujoco.mj_stateSize(self.model, FULL_PHYSICS)
        self.state_size = self.physics_size + int(self.model.nv) + task.n_readings
        self.tangent_size = self.perturbations.ndx
        self.simulator_calls = 0  # environment steps simulated for differences
        self._stepper = make_stepper(self.model, task, env.frame_skip, self.differences.n_threads)

    def get_state(self) -> Array:
        """
        Read the live environment's state.

        :return: flat state, shape ``(nx,)``
        """
        state = np.empty(self.state_size)
        mujoco.mj_getState(self.env.model, self.env.data, state[: self.physics_size], FULL_PHYSICS)
        readings = self.physics_size + int(self.model.nv)
        state[self.physics_size : readings] = self.env.data.qacc_warmstart
        state[readings:] = self.task.read(self.env.data)
        return state

    def differentiate(self, states: Array, actions: NDArray[np.floating]) -> TransitionDerivatives:
        """
        Differentiate one environment step at each of ``n`` states.

        :param states: flat states as :meth:`get_state` returns them, shape ``(n, nx)``
        :param actions: actions as given to ``env.step``, shape ``(n, nu)``; the dtype is kept for the reward's arithmetic
        :return: derivatives relative to ``actions``
        :raises ValueError: if the shapes do not fit
        """
        check_batch(states, actions, self.state_size, self.perturbations.nu)
        physics, warmstart, readings = np.split(states, [self.physics_size, self.physics_size + int(self.model.nv)], axis=1)
        rows, row_actions, distance = self.perturbations.perturb(physics, actions.astype(np.float64))
        n, n_rows = rows.shape[:2]
        stepped = self._stepper.step(
            rows.reshape(n * n_rows, -1), np.repeat(warmstart, n_rows, axis=0), row_actions.reshape(n * n_rows, -1)
        )
        self.simulator_calls += n * n_rows
        steps = self._steps(rows, row_actions, readings, stepped)
        nominal = self.task.outcome(select_rows(steps, n_rows, actions))
        return self._assemble(steps, nominal, distance, stepped.physics.reshape(n, n_rows, -1)[:, 0])

    def _steps(self, rows: Array, row_actions: Array, readings: Array, stepped: SteppedRows) -> Steps:
        """All rows as one batch of steps, ``(n * n_rows, ...)``."""
        n, n_rows = rows.shape[:2]
        # What MuJoCo had left before the live step is kept; only its change from row to row is taken from the rows
        own = stepped.readings.reshape(n, n_rows, -1)
        before = readings[:, None] + own - own[:, :1]
        positions, velocities = self._parts(rows.reshape(n * n_rows, -1))
        next_positions, next_velocities = self._parts(stepped.physics)
        return Steps(
            positions,
            velocities,
            before.reshape(n * n_rows, -1),
            row_actions.reshape(n * n_rows, -1),
            next_positions,
            next_velocities,
            stepped.next_readings,
        )

    def _parts(self, physics: Array) -> tuple[Array, Array]:
        """Positions and velocities of full physics states."""
        nq, nv = self.tangent.nq, self.tangent.nv
        return physics[:, 1 : 1 + nq], physics[:, 1 + nq : 1 + nq + nv]

    def _assemble(self, steps: Steps, nominal: Outcome, distance: Array, next_physics: Array) -> TransitionDerivatives:
        """Turn stepped rows into derivatives."""
        n, n_columns = distance.shape
        perturbed = self.task.outcome(steps)
        tangents = self._tangents(steps, n)
        A, B = self.perturbations.quotient(self.perturbations.change(tangents), distance)
        A[:, self.perturbations.fixed, self.perturbations.fixed] = 1.0
        O_x, O_a = self.perturbations.quotient(self.perturbations.change(perturbed.obs.reshape(n, -1, nominal.obs.shape[1])), distance)
        reward_change = self.perturbations.change(perturbed.reward.reshape(n, -1, 1))
        # The jump of the reward at an episode's end is no slope
        flips = self.perturbations.change(perturbed.terminated.reshape(n, -1, 1).astype(np.float64)) != 0.0
        r_x, r_a = self.perturbations.quotient(np.where(flips, 0.0, reward_change), distance)
        first = slice(None, None, self.perturbations.n_rows)
        derivatives = TransitionDerivatives(
            A=A,
            B=B,
            C=self.task.observation_jacobian(steps.qpos[first], steps.qvel[first]),
            next_C=self.task.observation_jacobian(steps.next_qpos[first], steps.next_qvel[first]),
            O_x=O_x,
            O_a=O_a,
            r_x=r_x[:, 0],
            r_a=r_a[:, 0],
            next_state=next_physics,
            next_obs=nominal.obs,
            reward=nominal.reward,
            terminated=nominal.terminated,
            valid=np.ones(n, dtype=np.bool_),
        )
        return discard_invalid(derivatives, self.differences.max_derivative)

    def _tangents(self, steps: Steps, n: int) -> Array:
        """Next states as tangent vectors at the unperturbed next state, ``(n, n_rows, ndx)``."""
        next_qpos = steps.next_qpos.reshape(n, self.perturbations.n_rows, -1)
        next_qvel = steps.next_qvel.reshape(n, self.perturbations.n_rows, -1)
        return np.concatenate([self.tangent.difference(next_qpos[:, :1], next_qpos), next_qvel], axis=-1)

    def signature(self) -> bytes:
        """
        Digest of model and task options; environments of equal signature can be differentiated in one batch.

        :return: the digest
        """
        buffer = np.empty(mujoco.mj_sizeModel(self.model), dtype=np.uint8)
        mujoco.mj_saveModel(self.model, None, buffer)
        options = {name: value for name, value in sorted(vars(self.task).items()) if name != "model"}
        return hashlib.sha256(buffer.tobytes() + repr((type(self.task), options)).encode()).digest()

    def close(self) -> None:
        """Stop the threads."""
        self._stepper.close()


def private_model(model: mujoco.MjModel) -> mujoco.MjModel:
    """
    A copy of a model to step perturbed rows with.

    :param model: the live environment's model, not changed
    :return: a copy that does not silently reset itself when a row diverges, so that divergence is seen
    """
    private = copy.copy(model)
    private.opt.disableflags |= int(mujoco.mjtDisableBit.mjDSBL_AUTORESET)
    return private


def make_stepper(model: mujoco.MjModel, task: TaskModel, frame_skip: int, threads: int) -> RolloutStepper | DataStepper:
    """
    The fastest stepper that gives what a task reads.

    :param model: private model
    :param task: the task
    :param frame_skip: physics steps per environment step
    :param threads: threads to step with
    :return: the stepper
    """
    if task.n_readings == 0:
        return RolloutStepper(model, frame_skip, threads)
    return DataStepper(model, task, frame_skip, threads)


def select_rows(steps: Steps, every: int, actions: NDArray[np.floating]) -> Steps:
    """
    The unperturbed rows of a batch of rows.

    :param steps: all rows
    :param every: rows per transition
    :param actions: the actions in the dtype in which the environment got them, shape ``(n, nu)``
    :return: the first row of each transition
    """
    return Steps(*(field[::every] for field in steps))._replace(actions=actions)


def check_batch(states: Array, actions: NDArray[np.floating], state_size: int, nu: int) -> None:
    """
    Check the shapes of a batch of states and actions.

    :param states: expected shape ``(n, state_size)``
    :param actions: expected shape ``(n, nu)``
    :param state_size: length of a flat state
    :param nu: length of an action
    :raises ValueError: naming the array with the wrong shape
    """
    if states.ndim != 2 or states.shape[1] != state_size:
        raise ValueError(f"`states` must have the shape (n, {state_size}), got {states.shape}; see `get_state`")
    if actions.shape != (len(states), nu):
        raise ValueError(f"`actions` must have the shape ({len(states)}, {nu}), got {actions.shape}")


def discard_invalid(derivatives: TransitionDerivatives, max_derivative: float) -> TransitionDerivatives:
    """
    Zero the derivatives of transitions that cannot be trusted, and mark them.

    :param derivatives: a batch
    :param max_derivative: bound on the absolute value of the entries of A and B
    :return: the batch with ``valid`` updated
    """
    fields = (derivatives.A, derivatives.B, derivatives.O_x, derivatives.O_a, derivatives.r_x, derivatives.r_a)
    with np.errstate(invalid="ignore", over="ignore"):
        finite = np.all([np.isfinite(field).reshape(len(field), -1).all(axis=1) for field in fields], axis=0)
        bounded = np.all([np.abs(field).reshape(len(field), -1).max(axis=1) <= max_derivative for field in fields[:2]], axis=0)
    valid = derivatives.valid & finite & bounded
    if valid.all():
        return derivatives
    for field in (*fields, derivatives.C, derivatives.next_C):
        field[~valid] = 0.0
    return derivatives._replace(valid=valid)
