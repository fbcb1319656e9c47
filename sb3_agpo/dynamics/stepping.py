"""Stepping many copies of one MuJoCo model in threads: rows in, rows out."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import mujoco
import mujoco.rollout
import numpy as np
from numpy.typing import NDArray

from sb3_agpo.dynamics.tasks import TaskModel

Array = NDArray[np.float64]

FULL_PHYSICS = int(mujoco.mjtState.mjSTATE_FULLPHYSICS.value)


class SteppedRows(NamedTuple):
    """``N`` rows after one environment step."""

    physics: Array  # (N, nphysics) full physics state after the step
    readings: Array  # (N, n_readings) before the step, from the row's own state
    next_readings: Array  # (N, n_readings) after the step


class RolloutStepper:
    """
    Steps rows with ``mujoco.rollout``; for tasks that read nothing but the physics state.

    :param model: private model
    :param frame_skip: physics steps per environment step
    :param threads: threads to step with
    """

    def __init__(self, model: mujoco.MjModel, frame_skip: int, threads: int) -> None:
        self.model, self.frame_skip = model, frame_skip
        self._data = [mujoco.MjData(model) for _ in range(threads)]
        # With one thread the pool of zero workers runs in the calling thread
        self._rollout = mujoco.rollout.Rollout(nthread=threads if threads > 1 else 0)

    def step(self, physics: Array, warmstart: Array, controls: Array) -> SteppedRows:
        """
        Step every row by one environment step.

        :param physics: full physics states, shape ``(N, nphysics)``
        :param warmstart: constraint-solver warm starts, shape ``(N, nv)``
        :param controls: controls held during the step, shape ``(N, nu)``
        :return: the rows after the step
        """
        n_rows = len(physics)
        states = np.empty((n_rows, self.frame_skip, physics.shape[1]))
        sensors = np.empty((n_rows, self.frame_skip, self.model.nsensordata))
        self._rollout.rollout(
            [self.model] * n_rows,
            self._data,
            np.ascontiguousarray(physics),
            np.repeat(controls[:, None], self.frame_skip, axis=1),
            skip_checks=True,
            nstep=self.frame_skip,
            initial_warmstart=np.ascontiguousarray(warmstart),
            state=states,
            sensordata=sensors,
        )
        nothing = np.empty((n_rows, 0))
        return SteppedRows(states[:, -1], nothing, nothing)

    def close(self) -> None:
        """Stop the threads."""
        self._rollout.close()


class DataStepper:
    """
    Steps rows with ``mj_step`` on private ``MjData``, for tasks that read more from it than the physics state.

    MuJoCo releases the interpreter lock while it steps, so threads run in parallel.

    :param model: private model
    :param task: tells what to read before and after a step
    :param frame_skip: physics steps per environment step
    :param threads: threads to step with
    """

    def __init__(self, model: mujoco.MjModel, task: TaskModel, frame_skip: int, threads: int) -> None:
        self.model, self.task, self.frame_skip = model, task, frame_skip
        self._data = [mujoco.MjData(model) for _ in range(threads)]
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="sb3_agpo") if threads > 1 else None

    def step(self, physics: Array, warmstart: Array, controls: Array) -> SteppedRows:
        """
        Step every row by one environment step.

        :param physics: full physics states, shape ``(N, nphysics)``
        :param warmstart: constraint-solver warm starts, shape ``(N, nv)``
        :param controls: controls held during the step, shape ``(N, nu)``
        :return: the rows after the step
        """
        n_rows = len(physics)
        readings = np.empty((2, n_rows, self.task.n_readings))
        rows = SteppedRows(np.empty_like(physics), readings[0], readings[1])
        chunks = np.array_split(np.arange(n_rows), len(self._data))
        jobs = [(data, chunk, physics, warmstart, controls, rows) for data, chunk in zip(self._data, chunks, strict=True)]
        if self._pool is None:
            self._step_chunk(*jobs[0])
        else:
            for future in [self._pool.submit(self._step_chunk, *job) for job in jobs]:
                future.result()
        return rows

    def _step_chunk(
        self,
        data: mujoco.MjData,
        chunk: NDArray[np.intp],
        physics: Array,
        warmstart: Array,
        controls: Array,
        rows: SteppedRows,
    ) -> None:
        model, task, next_physics = self.model, self.task, rows.physics
        for row in chunk:
            mujoco.mj_setState(model, data, physics[row], FULL_PHYSICS)
            data.qacc_warmstart = warmstart[row]
            data.ctrl = controls[row]
            task.refresh(data)
            rows.readings[row] = task.read(data)
            mujoco.mj_step(model, data, nstep=self.frame_skip)
            mujoco.mj_rnePostConstraint(model, data)
            mujoco.mj_getState(model, data, next_physics[row], FULL_PHYSICS)
            rows.next_readings[row] = task.read(data)

    def close(self) -> None:
        """Stop the threads."""
        if self._pool is not None:
            self._pool.shutdown()
