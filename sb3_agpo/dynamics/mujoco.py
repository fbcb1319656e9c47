"""
Derivatives of stock Gymnasium MuJoCo tasks by batched finite differences through the whole frame-skipped step.

Differences work with any integrator (``mjd_transitionFD`` refuses RK4, which most tasks use), include contacts, and act
as smoothing over the size of the step. Positions are perturbed in tangent coordinates, so quaternions stay unit.
"""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from typing import Any

import mujoco
import numpy as np
from gymnasium import spaces
from gymnasium.envs.mujoco import MujocoEnv
from numpy.typing import NDArray

from sb3_agpo.dynamics.interface import Array, TransitionDerivatives, concatenate, zero_invalid
from sb3_agpo.dynamics.private_copy import model_bytes, private_model
from sb3_agpo.dynamics.stepping import FULL_PHYSICS, DataStepper, RolloutStepper, SteppedRows, silent_mujoco
from sb3_agpo.dynamics.tangent import PositionTangent
from sb3_agpo.dynamics.tasks import Outcome, Steps, TaskModel, find_task_model

NUMBERS = (int, float, np.integer, np.floating)
#: what is larger in absolute value is infinite in the single precision of networks
LARGEST = float(np.finfo(np.float32).max)


@dataclass(frozen=True)
class FiniteDifferences:
    """
    How to take differences.

    A larger step smooths contacts more and is further from the local derivative; a smaller one the reverse. Steps from
    1e-6 (local) to 0.1 (strong smoothing) are of use on the stock tasks.

    :param position_step: step of joint positions, in metres or radians
    :param velocity_step: step of joint velocities, in metres or radians per second
    :param activation_step: step of actuator activations
    :param action_step: step of actions, in units of the action in [-1, 1]; at most 1, half of the range, so that there is
        room for it on at least one side of every action
    :param centred: centred instead of forward differences: twice the rows, error of second order
    :param threads: threads to step with; None for the number of cores. Never changes a result
    :param max_derivative: a transition with an entry of A or B above this in absolute value is not trusted (``valid``
        is False, its derivatives are zero)
    :raises ValueError: naming the option whose value makes no sense
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
            if isinstance(value, bool) or not isinstance(value, NUMBERS) or not (np.isfinite(value) and value > 0.0):
                raise ValueError(f"`{name}` must be a positive finite number, got {value!r}; try {type(self).__dict__[name]}")
        if self.action_step > 1.0:
            raise ValueError(
                f"`action_step` must be at most 1.0, half of the range [-1, 1], got {self.action_step!r}; try 0.1"
            )
        if not isinstance(self.centred, (bool, np.bool_)):
            raise ValueError(f"`centred` must be True (centred differences) or False (forward), got {self.centred!r}")
        count = self.threads
        if count is not None and (isinstance(count, bool) or not isinstance(count, (int, np.integer)) or count < 1):
            raise ValueError(f"`threads` must be an integer of at least 1, or None (one per core), got {count!r}; try None")

    @property
    def n_threads(self) -> int:
        """Threads to use on this machine."""
        if self.threads is not None:
            return int(self.threads)
        # Not every platform tells how many of its cores this process may use
        return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else (os.cpu_count() or 1)


class Perturbations:
    """
    The rows of a difference scheme: which coordinates are moved, by how much, and how rows become a derivative.

    :param tangent: layout of the positions
    :param n_activations: length of the activation part of the state
    :param action_space: bounds of the actions that rows must not leave, all of them finite
    :param differences: step sizes and scheme
    :param fixed: tangent position coordinates that need no row, because a shift along them changes nothing
    :param by_state: move the state too; without, only actions, and derivatives by the state are zero
    """

    def __init__(
        self,
        tangent: PositionTangent,
        n_activations: int,
        action_space: spaces.Box,
        differences: FiniteDifferences,
        fixed: tuple[int, ...] = (),
        by_state: bool = True,
    ) -> None:
        nv = tangent.nv
        self.tangent, self.centred, self.by_state = tangent, differences.centred, by_state
        self.fixed = fixed if by_state else ()
        self.ndx, self.nu = 2 * nv + n_activations, action_space.shape[0]
        self.low, self.high = action_space.low.astype(np.float64), action_space.high.astype(np.float64)
        steps = np.empty(self.ndx + self.nu)
        steps[:nv], steps[nv : 2 * nv] = differences.position_step, differences.velocity_step
        steps[2 * nv : self.ndx] = differences.activation_step
        steps[self.ndx :] = 0.5 * differences.action_step * (self.high - self.low)
        self.steps = steps  # (ndx + nu,)
        # An action whose range is a single point cannot be moved: its derivative stays zero
        movable = np.setdiff1d(np.flatnonzero(steps), np.array(fixed, dtype=np.intp))
        self.columns = movable if by_state else movable[movable >= self.ndx]
        self.n_rows = 1 + len(self.columns) * (2 if self.centred else 1)

    def perturb(self, physics: Array, actions: NDArray[np.floating]) -> tuple[Array, NDArray[np.floating], Array]:
        """
        Build the rows of ``n`` transitions.

        :param physics: full physics states, shape ``(n, nphysics)``
        :param actions: shape ``(n, nu)``; the rows' actions are of the same dtype
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

    def _move_actions(self, row_actions: NDArray[np.floating], signed: Array, *, inward: bool) -> Array:
        """Move actions in place without leaving their bounds; the way moved, shape ``(n, n_columns, nu)``."""
        before = row_actions.astype(np.float64)
        # An action that is out of bounds already, which an environment may accept, is moved no further out
        low, high = np.minimum(self.low, before), np.maximum(self.high, before)
        target = before + signed
        if inward:  # one-sided at the limit
            target = np.where((target > high) | (target < low), before - signed, target)
        row_actions[...] = np.where(signed == 0.0, before, np.clip(target, low, high))
        return row_actions - before  # as it was rounded to the actions' own dtype

    def quotient(self, change: Array, distance: Array) -> tuple[Array, Array]:
        """
        Difference quotients.

        :param change: change of a quantity between the rows of each column, shape ``(n, n_columns, m)``
        :param distance: as returned by :meth:`perturb`
        :return: derivative by the state ``(n, m, ndx)`` and by the action ``(n, m, nu)``; zero for fixed coordinates
        """
        jacobian = np.zeros((len(change), change.shape[-1], self.ndx + self.nu))
        with np.errstate(all="ignore"):  # what overflows is discarded later
            jacobian[:, :, self.columns] = np.swapaxes(change / distance[..., None], 1, 2)
        return jacobian[..., : self.ndx], jacobian[..., self.ndx :]

    def tangents(self, physics: Array) -> Array:
        """
        States of rows as tangent vectors at the first row: positions relative to it, velocities and activations as they are.

        :param physics: full physics states, shape ``(n, n_rows, nphysics)``
        :return: shape ``(n, n_rows, ndx)``
        """
        nq, nv = self.tangent.nq, self.tangent.nv
        qpos, rest = physics[..., 1 : 1 + nq], physics[..., 1 + nq : 1 + nq + self.ndx - nv]
        with np.errstate(all="ignore"):
            return np.concatenate([self.tangent.difference(qpos[:, :1], qpos), rest], axis=-1)

    def change(self, values: Array) -> Array:
        """
        Change of row values between the two rows that make each column.

        :param values: shape ``(n, n_rows, ...)``
        :return: shape ``(n, n_columns, ...)``
        """
        n_columns = len(self.columns)
        with np.errstate(all="ignore"):
            if self.centred:
                return values[:, 1 : 1 + n_columns] - values[:, 1 + n_columns :]
            return values[:, 1:] - values[:, :1]


class MujocoDynamics:
    """
    Derivatives of one step of a stock Gymnasium MuJoCo task.

    The state is the full physics state (time, positions, velocities, activations, ...), the constraint solver's warm
    start and the task's readings (see :class:`~sb3_agpo.dynamics.tasks.Steps`). The unperturbed row equals ``env.step``
    bit for bit. All stepping happens on a private copy of the model; the live environment is only ever read.

    Not differentiated is what a model keeps beside positions, velocities and activations, the past of delayed actuators for
    example (see :func:`~sb3_agpo.dynamics.tangent.state_outside_tangent`): AGPO does not use this class for such models.

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
        layout = (self.tangent, int(self.model.na), env.action_space, self.differences, task.invariant)
        self.perturbations = Perturbations(*layout)
        self.action_perturbations = Perturbations(*layout, by_state=False)
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

    def differentiate(
        self, states: Array, actions: NDArray[np.floating], by_state: NDArray[np.bool_] | None = None
    ) -> TransitionDerivatives:
        """
        Differentiate one environment step at each of ``n`` states.

        :param states: flat states as :meth:`get_state` returns them, shape ``(n, nx)``
        :param actions: actions as given to ``env.step``, shape ``(n, nu)``; the dtype is kept for the reward's arithmetic
        :param by_state: steps to differentiate by the state too, shape ``(n,)``; None for all. The others' ``A``, ``O_x`` and
            ``r_x`` are zero, and cost nothing
        :return: derivatives relative to ``actions``
        :raises ValueError: if the shapes do not fit
        """
        check_batch(states, actions, self.state_size, self.perturbations.nu)
        if by_state is None or by_state.all():
            return self._differentiate(states, actions, self.perturbations)
        if not by_state.any():
            return self._differentiate(states, actions, self.action_perturbations)
        parts = [(np.flatnonzero(by_state), self.perturbations), (np.flatnonzero(~by_state), self.action_perturbations)]
        derivatives = concatenate([self._differentiate(states[index], actions[index], scheme) for index, scheme in parts])
        return derivatives.take(np.argsort(np.concatenate([index for index, _ in parts])))

    def _differentiate(self, states: Array, actions: NDArray[np.floating], scheme: Perturbations) -> TransitionDerivatives:
        physics, warmstart, readings = np.split(states, [self.physics_size, self.physics_size + int(self.model.nv)], axis=1)
        rows, row_actions, distance = scheme.perturb(physics, actions.astype(np.float64))
        n_rows = scheme.n_rows
        starts = join_rows(rows), np.repeat(warmstart, n_rows, axis=0), join_rows(row_actions)
        with silent_mujoco():
            stepped = self._stepper.step(*starts, n_rows)
        self.simulator_calls += len(states) * n_rows
        steps = self._steps(rows, row_actions, readings, stepped)
        return self._assemble(scheme, steps, actions, distance, split_rows(stepped.physics, n_rows))

    def _steps(self, rows: Array, row_actions: NDArray[np.floating], readings: Array, stepped: SteppedRows) -> Steps:
        """All rows as one batch of steps, ``(n * n_rows, ...)``."""
        # What MuJoCo had left before the live step is kept; only its change from row to row is taken from the rows. The
        # change comes first, so that the unperturbed row's readings are exactly those that the live step started from
        own = split_rows(stepped.readings, rows.shape[1])
        with np.errstate(all="ignore"):
            before = readings[:, None] + (own - own[:, :1])
        after = stepped.next_readings
        if stepped.missing is not None:
            # The next step is differentiated from readings that fit its state. Those after this step must fit it too, or a
            # physics step of each would be missing along a window. Values stay what Gymnasium returns
            missing = split_rows(stepped.missing, rows.shape[1])
            after = after + join_rows(missing - missing[:, :1])
        positions, velocities = self._parts(join_rows(rows))
        next_positions, next_velocities = self._parts(stepped.physics)
        return Steps(
            positions,
            velocities,
            join_rows(before),
            join_rows(row_actions),
            next_positions,
            next_velocities,
            after,
        )

    def _parts(self, physics: Array) -> tuple[Array, Array]:
        """Positions and velocities of full physics states."""
        nq, nv = self.tangent.nq, self.tangent.nv
        return physics[:, 1 : 1 + nq], physics[:, 1 + nq : 1 + nq + nv]

    def _assemble(
        self, scheme: Perturbations, steps: Steps, actions: NDArray[np.floating], distance: Array, next_physics: Array
    ) -> TransitionDerivatives:
        """Turn stepped rows, their physics ``(n, n_rows, nphysics)`` after the step, into derivatives."""
        with np.errstate(all="ignore"):  # rows may have diverged
            nominal = self.task.outcome(select_rows(steps, scheme.n_rows, actions))
            perturbed = Outcome(*(split_rows(field, scheme.n_rows) for field in self.task.outcome(steps)))
        A, B = scheme.quotient(scheme.change(scheme.tangents(next_physics)), distance)
        A[:, scheme.fixed, scheme.fixed] = 1.0
        O_x, O_a = scheme.quotient(scheme.change(perturbed.obs), distance)
        changes = reward_change(scheme, perturbed.reward, perturbed.terminated)
        r_x, r_a = scheme.quotient(changes[..., None], distance)
        first = slice(None, None, scheme.n_rows)
        derivatives = TransitionDerivatives(
            A=A,
            B=B,
            C=self.task.observation_jacobian(steps.qpos[first], steps.qvel[first]),
            next_C=self.task.observation_jacobian(steps.next_qpos[first], steps.next_qvel[first]),
            O_x=O_x,
            O_a=O_a,
            r_x=r_x[:, 0],
            r_a=r_a[:, 0],
            next_state=next_physics[:, 0],
            next_obs=nominal.obs,
            reward=nominal.reward,
            terminated=nominal.terminated,
            valid=np.ones(len(distance), dtype=np.bool_),
        )
        return discard_invalid(derivatives, self.differences.max_derivative)

    def signature(self) -> bytes:
        """
        Digest of model and task options; environments of equal signature can be differentiated in one batch.

        :return: the digest
        """
        options = {name: value for name, value in sorted(vars(self.task).items()) if name != "model"}
        bounds = self.perturbations.low.tobytes() + self.perturbations.high.tobytes()
        text = repr((type(self.task), options, self.env.frame_skip))
        return hashlib.sha256(model_bytes(self.model).tobytes() + bounds + text.encode()).digest()

    def close(self) -> None:
        """Stop the threads; another call of :meth:`differentiate` would start them again."""
        self._stepper.close()


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


def reward_change(scheme: Perturbations, rewards: Array, terminated: NDArray[np.bool_]) -> Array:
    """
    Change of the reward between the two rows that make each column.

    :param scheme: the difference scheme
    :param rewards: of all rows, shape ``(n, n_rows)``
    :param terminated: of all rows, the same shape
    :return: shape ``(n, n_columns)``; zero where the episode ends in one of the two rows only
    """
    # The jump of the reward at an episode's end is no slope
    flips = scheme.change(terminated.astype(np.float64)) != 0.0
    return np.where(flips, 0.0, scheme.change(rewards))


def join_rows(rows: NDArray[Any]) -> NDArray[Any]:
    """
    Put the rows of all transitions one after the other.

    :param rows: shape ``(n, n_rows, ...)``
    :return: shape ``(n * n_rows, ...)``
    """
    return rows.reshape(rows.shape[0] * rows.shape[1], *rows.shape[2:])


def split_rows(values: NDArray[Any], n_rows: int) -> NDArray[Any]:
    """
    The reverse of :func:`join_rows`.

    :param values: shape ``(n * n_rows, ...)``
    :param n_rows: rows per transition
    :return: shape ``(n, n_rows, ...)``
    """
    return values.reshape(len(values) // n_rows, n_rows, *values.shape[1:])


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


def discard_invalid(
    derivatives: TransitionDerivatives, max_derivative: float, max_state: float = mujoco.mjMAXVAL
) -> TransitionDerivatives:
    """
    Zero the derivatives of transitions that cannot be trusted, and mark them.

    :param derivatives: a batch, its derivatives may be changed in place
    :param max_derivative: bound on the absolute value of the entries of A and B
    :param max_state: bound on that of the state after the step; beyond the default MuJoCo takes a state for unstable
    :return: the batch with ``valid`` updated: False also where values or derivatives are not finite in single precision
    """
    d = derivatives
    valid = d.valid.copy()
    bounded = [(field, LARGEST) for field in (d.C, d.next_C, d.O_x, d.O_a, d.r_x, d.r_a, d.next_obs, d.reward)]
    bounded += [(d.next_state, max_state), (d.A, max_derivative), (d.B, max_derivative)]
    for field, bound in bounded:
        valid &= (np.abs(field) <= bound).all(axis=tuple(range(1, field.ndim)))  # False for NaN
    return zero_invalid(d._replace(valid=valid))
