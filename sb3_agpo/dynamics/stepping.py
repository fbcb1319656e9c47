"""Stepping many copies of one MuJoCo model in threads: rows in, rows out."""

from __future__ import annotations

import ctypes
import os
import threading
import weakref
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import pairwise
from typing import Any, NamedTuple

import mujoco
import mujoco.rollout
import numpy as np
from numpy.typing import NDArray

from sb3_agpo.dynamics.tasks import TaskModel

Array = NDArray[np.float64]

FULL_PHYSICS = int(mujoco.mjtState.mjSTATE_FULLPHYSICS.value)
#: MuJoCo's signs of divergence
DIVERGED = (mujoco.mjtWarning.mjWARN_BADQPOS, mujoco.mjtWarning.mjWARN_BADQVEL, mujoco.mjtWarning.mjWARN_BADQACC)
#: everything that a row starts from, in one call
START = FULL_PHYSICS | int(mujoco.mjtState.mjSTATE_WARMSTART.value) | int(mujoco.mjtState.mjSTATE_CTRL.value)


class _Silence:
    """How many threads want MuJoCo to be silent, and who listened to its warnings before the first of them."""

    lock = threading.Lock()
    depth = 0
    listener: Any = None


@contextmanager
def silent_mujoco() -> Iterator[None]:
    """
    Let MuJoCo keep its warnings to itself while perturbed rows are stepped.

    A row may well diverge where the simulator is at its limits. Its transition is left out and counted; without this, MuJoCo
    would print a line for every such row, and write it to ``MUJOCO_LOG.TXT``, which fills a disk overnight.
    """
    with _Silence.lock:
        if _Silence.depth == 0:
            _Silence.listener = mujoco.get_mju_user_warning()
            mujoco.set_mju_user_warning(_ignore)
        _Silence.depth += 1
    try:
        yield
    finally:
        with _Silence.lock:
            _Silence.depth -= 1
            if _Silence.depth == 0:
                mujoco.set_mju_user_warning(_Silence.listener)


def _ignore(message: str) -> None:
    """Take a warning and do nothing."""


#: steppers whose threads run
_STARTED: weakref.WeakSet[RolloutStepper | DataStepper] = weakref.WeakSet()


def _forget_threads() -> None:
    """In a process that was just forked: threads did not come along, and to wait for them would be to wait for ever."""
    for stepper in list(_STARTED):
        stepper.forget()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_threads)


class SteppedRows(NamedTuple):
    """``N`` rows after one environment step; NaN where a row or one before it in the same transition diverged."""

    physics: Array  # (N, nphysics) full physics state after the step
    readings: Array  # (N, n_readings) before the step, from the row's own state; zero for a task that needs none
    next_readings: Array  # (N, n_readings) after the step
    # (N, n_readings) what was still to come until the state after the step, for a reward that compares readings; else None
    missing: Array | None = None


class RolloutStepper:
    """
    Steps rows with ``mujoco.rollout``; for tasks that read nothing but the physics state.

    Threads start with the first step, in whichever process that happens, and anew in a process that was forked later.

    :param model: private model
    :param frame_skip: physics steps per environment step
    :param threads: threads to step with
    """

    def __init__(self, model: mujoco.MjModel, frame_skip: int, threads: int) -> None:
        self.model, self.frame_skip, self.threads = model, frame_skip, threads
        self._rollout: mujoco.rollout.Rollout | None = None
        self._data: list[mujoco.MjData] = []

    def step(self, physics: Array, warmstart: Array, controls: Array, n_rows: int = 1) -> SteppedRows:
        """
        Step every row by one environment step.

        :param physics: full physics states, shape ``(N, nphysics)``
        :param warmstart: constraint-solver warm starts, shape ``(N, nv)``
        :param controls: controls held during the step, shape ``(N, nu)``
        :param n_rows: rows of a transition, one after the other
        :return: the rows after the step
        """
        if self._rollout is None:
            # With one thread the pool of zero workers runs in the calling thread
            self._rollout = mujoco.rollout.Rollout(nthread=self.threads if self.threads > 1 else 0)
            self._data = [mujoco.MjData(self.model) for _ in range(self.threads)]
            _STARTED.add(self)
        total = len(physics)
        states = np.empty((total, self.frame_skip, physics.shape[1]))
        sensors = np.empty((total, self.frame_skip, self.model.nsensordata))
        nothing = np.empty((total, 0))
        if total == 0:  # of which MuJoCo dies
            return SteppedRows(np.empty_like(physics), nothing, nothing)
        self._rollout.rollout(
            [self.model] * total,
            self._data,
            np.ascontiguousarray(physics),
            np.repeat(controls[:, None], self.frame_skip, axis=1),
            skip_checks=True,
            nstep=self.frame_skip,
            initial_warmstart=np.ascontiguousarray(warmstart),
            state=states,
            sensordata=sensors,
        )
        return SteppedRows(states[:, -1], nothing, nothing)

    def close(self) -> None:
        """Stop the threads; another step would start them again."""
        if self._rollout is not None:
            self._rollout.close()
        self._rollout, self._data = None, []

    def forget(self) -> None:
        """Leave the threads to themselves, as after a fork; another step starts new ones."""
        # Never destroyed, which would be to wait for its threads
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(self._rollout))
        self._rollout, self._data = None, []

    def __getstate__(self) -> dict[str, Any]:
        """Threads stay behind when a stepper is copied or sent to another process."""
        return {**vars(self), "_rollout": None, "_data": []}


class DataStepper:
    """
    Steps rows with ``mj_step`` on private ``MjData``, for tasks that read more from it than the physics state.

    MuJoCo releases the interpreter lock while it steps, so threads run in parallel. They start with the first step, in
    whichever process that happens, and anew in a process that was forked later.

    A transition of which one row diverged is not to be trusted, so that its other rows may be left out. They are: MuJoCo
    takes up to a thousand times as long for a step with NaN, where everything touches everything.

    :param model: private model
    :param task: tells what to read before and after a step
    :param frame_skip: physics steps per environment step
    :param threads: threads to step with
    """

    def __init__(self, model: mujoco.MjModel, task: TaskModel, frame_skip: int, threads: int) -> None:
        self.model, self.task, self.frame_skip, self.threads = model, task, frame_skip, threads
        self._data: list[mujoco.MjData] = []
        self._pool: ThreadPoolExecutor | None = None
        self._reads_before = type(task).refresh is not TaskModel.refresh
        # MuJoCo leaves the positions that the last physics step began with; with Runge-Kutta, almost those at its end
        is_late = int(model.opt.integrator) != int(mujoco.mjtIntegrator.mjINT_RK4)
        self._reads_missing = task.compares_readings and is_late

    def step(self, physics: Array, warmstart: Array, controls: Array, n_rows: int = 1) -> SteppedRows:
        """
        Step every row by one environment step.

        :param physics: full physics states, shape ``(N, nphysics)``
        :param warmstart: constraint-solver warm starts, shape ``(N, nv)``
        :param controls: controls held during the step, shape ``(N, nu)``
        :param n_rows: rows of a transition, one after the other
        :return: the rows after the step
        """
        if not self._data:
            self._data = [mujoco.MjData(self.model) for _ in range(self.threads)]
            self._pool = ThreadPoolExecutor(self.threads, thread_name_prefix="sb3_agpo") if self.threads > 1 else None
            _STARTED.add(self)
        starts = starting_states(self.model, physics, warmstart, controls)
        readings = np.zeros((2 + self._reads_missing, len(physics), self.task.n_readings))
        rows = SteppedRows(np.full_like(physics, np.nan), *readings)
        limits = np.linspace(0, len(physics), self.threads + 1).astype(int)
        chunks = [slice(start, stop) for start, stop in pairwise(limits.tolist())]
        if self._pool is None:
            self._step_chunk(self._data[0], chunks[0], starts, rows, n_rows)
            return rows
        jobs = zip(self._data, chunks, strict=True)
        for future in [self._pool.submit(self._step_chunk, data, chunk, starts, rows, n_rows) for data, chunk in jobs]:
            future.result()
        return rows

    def _step_chunk(self, data: mujoco.MjData, chunk: slice, starts: Array, rows: SteppedRows, n_rows: int) -> None:
        # This loop runs thousands of times per batch: names are bound and arrays cut into rows outside of it
        model, frame_skip, reads_before = self.model, self.frame_skip, self._reads_before
        read, refresh = self.task.read, self.task.refresh
        set_state, get_state, step = mujoco.mj_setState, mujoco.mj_getState, mujoco.mj_step
        finish = mujoco.mj_rnePostConstraint
        bad_position, bad_velocity, bad_acceleration = (data.warning[kind] for kind in DIVERGED)
        before, after = rows.readings[chunk], rows.next_readings[chunk]
        missing = None if rows.missing is None else rows.missing[chunk]
        given_up = -1  # the last transition that diverged
        for row, (start, end) in enumerate(zip(starts[chunk], rows.physics[chunk], strict=True)):
            if given_up >= 0 and (chunk.start + row) // n_rows == given_up:
                continue
            set_state(model, data, start, START)
            if reads_before:
                refresh(data)
                before[row] = read(data)
            step(model, data, frame_skip)
            if bad_position.number or bad_velocity.number or bad_acceleration.number:
                given_up = (chunk.start + row) // n_rows
                bad_position.number = bad_velocity.number = bad_acceleration.number = 0
                continue
            finish(model, data)
            get_state(model, data, end, FULL_PHYSICS)
            after[row] = read(data)
            if missing is not None:
                refresh(data)
                missing[row] = read(data) - after[row]

    def close(self) -> None:
        """Stop the threads; another step would start them again."""
        if self._pool is not None:
            self._pool.shutdown()
        self._pool, self._data = None, []

    def forget(self) -> None:
        """Leave the threads to themselves, as after a fork; another step starts new ones."""
        self._pool, self._data = None, []

    def __getstate__(self) -> dict[str, Any]:
        """Threads stay behind when a stepper is copied or sent to another process."""
        return {**vars(self), "_pool": None, "_data": []}


def starting_states(model: mujoco.MjModel, physics: Array, warmstart: Array, controls: Array) -> Array:
    """
    Join what a row starts from in the order in which MuJoCo keeps it.

    :param model: the model
    :param physics: full physics states, shape ``(N, nphysics)``
    :param warmstart: constraint-solver warm starts, shape ``(N, nv)``
    :param controls: shape ``(N, nu)``
    :return: states of the specification :data:`START`, shape ``(N, nphysics + nv + nu)``
    """
    # Components are ordered by their bit: those of the physics state with a lower one than the warm start come first
    head = mujoco.mj_stateSize(model, FULL_PHYSICS & (int(mujoco.mjtState.mjSTATE_WARMSTART.value) - 1))
    return np.concatenate([physics[:, :head], warmstart, controls, physics[:, head:]], axis=1)
