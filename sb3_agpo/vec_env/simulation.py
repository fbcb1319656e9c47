"""The simulators of many environments, stepped in threads and read into arrays."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple

import mujoco
import numpy as np
from gymnasium.envs.mujoco import MujocoEnv
from numpy.typing import NDArray

from sb3_agpo.dynamics.interface import Array
from sb3_agpo.dynamics.stepping import FULL_PHYSICS
from sb3_agpo.dynamics.tasks import Outcome, Steps, TaskModel
from sb3_agpo.vec_env.environments import share_model

Infos = list[dict[str, Any]]


class SharedWork:
    """
    Works through lists of jobs in helper threads and in the calling thread, each taking the next job when it is free.

    Which thread does a job depends on chance; nothing else may.

    :param function: what to do for a job, called with the job's items as arguments
    :param threads: threads to work with, the calling thread included
    """

    def __init__(self, function: Callable[..., None], threads: int) -> None:
        self._function, self._n_helpers = function, threads - 1
        self._pool = ThreadPoolExecutor(threads - 1, thread_name_prefix="sb3_agpo_vec_env") if threads > 1 else None
        self._jobs: Iterator[Any] = iter(())
        self._futures: list[Future[None]] = []

    def start(self, jobs: Iterable[Any]) -> None:
        """
        Let the helper threads start.

        :param jobs: the jobs, each a tuple of arguments
        """
        # All threads draw from one iterator, which the interpreter lock keeps whole
        self._jobs = iter(jobs)
        if self._pool is not None:
            self._futures = [self._pool.submit(self._work, self._jobs) for _ in range(self._n_helpers)]

    def finish(self) -> None:
        """
        Help, and wait until all jobs are done.

        :raises Exception: what a job raised, after all threads came to rest
        """
        futures, self._futures = self._futures, []
        try:
            self._work(self._jobs)
        finally:
            # No job is left for a helper that has not started yet, on a busy machine for example
            errors = [future.exception() for future in futures if not future.cancel()]
        for error in errors:
            if error is not None:
                raise error

    def _work(self, jobs: Iterator[Any]) -> None:
        function = self._function
        for job in jobs:
            function(*job)

    def close(self) -> None:
        """Wait for the helper threads and stop them."""
        if self._pool is not None:
            self._pool.shutdown()


def own_arrays(info: dict[str, Any]) -> dict[str, Any]:
    """
    Copy what is a view of MuJoCo's memory, as some entries are before Gymnasium 1.4: the next step would change it.

    :param info: of a step or a reset
    :return: the same, to keep
    """
    return {key: value.copy() if isinstance(value, np.ndarray) else value for key, value in info.items()}


class Snapshot(NamedTuple):
    """What the task model reads of all environments at one time."""

    qpos: Array  # (n_envs, nq)
    qvel: Array  # (n_envs, nv)
    readings: Array  # (n_envs, n_readings)


class BatchSimulation:
    """
    The simulators of all environments, each with its own ``MjData``, stepped by ``mj_step`` in threads.

    ``mujoco.rollout`` is no use here: it does not return the constraint solver's warm start, without which the next step
    differs from Gymnasium's in its last bits. MuJoCo releases the interpreter lock in ``mj_step``, so threads run in
    parallel, and the loop around it costs about a microsecond per environment.

    :param envs: unwrapped environments that share one model
    :param task: the task's model
    :param threads: threads to step with
    :param own_step: let each environment run Gymnasium's own ``step``, which is slower, for the sake of its info
    """

    def __init__(self, envs: Sequence[MujocoEnv], task: TaskModel, threads: int, own_step: bool = False) -> None:
        self.envs, self.task, self.threads, self.own_step = list(envs), task, threads, own_step
        self.model, self._frame_skip = envs[0].model, envs[0].frame_skip
        self._reads = task.n_readings > 0
        n_envs, model = len(self.envs), self.model
        # Views of MuJoCo's own memory, so that arrays are filled and emptied without asking each MjData
        self._datas = [env.data for env in self.envs]
        self._qpos_views = [data.qpos for data in self._datas]
        self._qvel_views = [data.qvel for data in self._datas]
        self._warmstart_views = [data.qacc_warmstart for data in self._datas]
        # The simulators as they stand, and room for what they will be after the next step
        self._now, self._next = (
            Snapshot(np.zeros((n_envs, model.nq)), np.zeros((n_envs, model.nv)), np.zeros((n_envs, task.n_readings)))
            for _ in range(2)
        )
        self._controls = np.zeros((n_envs, model.nu))
        self._actions: NDArray[Any] = self._controls
        controls = [data.ctrl for data in self._datas]
        self._jobs = list(zip(range(n_envs), self._datas, controls, self._controls, strict=True))
        self._results: list[Any] = [None] * n_envs
        self._work = SharedWork(self._step_own if own_step else self._step_one, threads)

    def __getstate__(self) -> dict[str, Any]:
        # In a copy, views of MuJoCo's memory would be arrays that MuJoCo knows nothing of, and threads cannot be copied
        return {"envs": self.envs, "task": self.task, "threads": self.threads, "own_step": self.own_step}

    def __setstate__(self, state: dict[str, Any]) -> None:
        for env in state["envs"][1:]:  # each was made anew, with a model of its own
            share_model(env, state["envs"][0].model)
        self.__init__(**state)  # type: ignore[misc]
        self.read()

    def is_replaced(self) -> bool:
        """
        Whether somebody has put another model or other data into an environment.

        :return: whether the simulators are not those of the environments any more
        """
        return any(
            env.model is not self.model or env.data is not data for env, data in zip(self.envs, self._datas, strict=True)
        )

    def start(self, actions: NDArray[Any]) -> None:
        """
        Start one environment step in all environments.

        :param actions: as the environments get them, shape ``(n_envs, nu)``; not to be changed until :meth:`finish`
        """
        self._actions = actions
        self._controls[:] = actions
        self._work.start(self._jobs)

    def _step_one(self, index: int, data: mujoco.MjData, ctrl: Array, control: Array) -> None:
        """What ``MujocoEnv.do_simulation`` does."""
        ctrl[:] = control
        mujoco.mj_step(self.model, data, self._frame_skip)
        mujoco.mj_rnePostConstraint(self.model, data)
        if self._reads:
            self._next.readings[index] = self.task.read(data)

    def _step_own(self, index: int, *_: Any) -> None:
        """Gymnasium's own step."""
        self._results[index] = self.envs[index].step(self._actions[index])

    def finish(self) -> tuple[Outcome, Infos | None]:
        """
        Wait for the step to end.

        :return: what Gymnasium's ``step`` returns, one row per environment; its infos if environments run their own step
        :raises Exception: what a step raised; some simulators have moved then, and others not
        """
        try:
            self._work.finish()
        except BaseException:
            self.read()  # the next step starts where the simulators are now
            raise
        if self.own_step:
            obs, rewards, terminated, _, infos = zip(*self._results, strict=True)
            self.read()
            outcome = Outcome(np.stack(obs), np.array(rewards, dtype=np.float64), np.array(terminated, dtype=np.bool_))
            return outcome, [own_arrays(info) for info in infos]
        before, after = self._now, self._next
        np.concatenate(self._qpos_views, out=after.qpos.reshape(-1))
        np.concatenate(self._qvel_views, out=after.qvel.reshape(-1))
        self._now, self._next = after, before
        return self.task.outcome(Steps(*before, self._actions, *after)), None

    def read(self, indices: Iterable[int] | None = None) -> None:
        """
        Read the simulators after something else than a step has changed them.

        :param indices: environments to read; None for all
        """
        qpos, qvel, readings = self._now
        for index in range(len(self.envs)) if indices is None else indices:
            qpos[index] = self._qpos_views[index]
            qvel[index] = self._qvel_views[index]
            readings[index] = self.task.read(self._datas[index])

    def states(self) -> Array:
        """
        The states that :meth:`sb3_agpo.dynamics.mujoco.MujocoDynamics.get_state` returns, of all environments.

        :return: shape ``(n_envs, nx)``
        """
        n_physics, nv = mujoco.mj_stateSize(self.model, FULL_PHYSICS), self.model.nv
        states = np.empty((len(self.envs), n_physics + nv + self.task.n_readings))
        for data, row in zip(self._datas, states, strict=True):
            mujoco.mj_getState(self.model, data, row[:n_physics], FULL_PHYSICS)
        states[:, n_physics : n_physics + nv] = self._warmstart_views
        states[:, n_physics + nv :] = self._now.readings
        return states

    def close(self) -> None:
        """Stop the threads."""
        self._work.close()
