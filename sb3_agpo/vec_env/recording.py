"""Derivatives of the steps of a :class:`~sb3_agpo.vec_env.MujocoVecEnv`, recorded in whole arrays."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import gymnasium as gym
import numpy as np
from numpy.typing import NDArray

from sb3_agpo.dynamics.interface import DifferentiableDynamics, TransitionDerivatives
from sb3_agpo.dynamics.recorder import ProviderReport, RecordQueue, StepRecords, TransitionRecorder
from sb3_agpo.dynamics.wrappers import wrapper_scales


class BatchRecorder:
    """
    Remembers where the steps of all environments started, and differentiates them on demand.

    It is the :class:`~sb3_agpo.dynamics.provider.VecDynamics` of a :class:`~sb3_agpo.vec_env.MujocoVecEnv`.

    :param env: one of the environments, all of which are alike
    :param dynamics: its derivatives
    :param report: where they come from
    """

    def __init__(self, env: gym.Env[Any, Any], dynamics: DifferentiableDynamics, report: ProviderReport) -> None:
        self.report = report
        self.simulator_calls = 0  # environment steps simulated for differences
        # Never stepped, and never put into the environment: it knows the chain rule and which steps to distrust
        self._engine = TransitionRecorder(env.unwrapped, dynamics, report, *wrapper_scales(env))
        self._queue: RecordQueue[StepRecords] = RecordQueue()

    @property
    def n_recorded(self) -> int:
        """Steps per environment that can be taken."""
        return len(self._queue)

    @property
    def recording(self) -> bool:
        """Whether steps are to be recorded."""
        return self._queue.recording

    def record(self, records: StepRecords) -> None:
        """
        Remember one step of every environment.

        :param records: one row per environment, not to be changed later
        """
        self._queue.add(records, sum(array.nbytes for array in records))

    def take(self, n_steps: int, by_state: NDArray[np.bool_] | None = None) -> TransitionDerivatives:
        """
        Differentiate the last steps of every environment, and forget what was recorded before.

        :param n_steps: steps per environment, counted back from the newest
        :param by_state: steps to differentiate by the state too, shape ``(n_steps,)``; None for all. Derivatives of the others
            by the state are zero where that saves work
        :return: batch of ``n_steps * n_envs`` transitions, environment by environment within each step
        :raises ValueError: if ``n_steps`` is not positive
        :raises RuntimeError: if fewer were recorded
        """
        taken = self._queue.take(n_steps)
        records = StepRecords._make(np.concatenate(parts) for parts in zip(*taken, strict=True))
        n_envs = len(taken[0].rewards)
        self.simulator_calls += n_envs * self.report.simulator_calls(n_steps, by_state)
        return self._engine.differentiate_records(records, None if by_state is None else by_state.repeat(n_envs))

    def keep_oldest(self, n_steps: int) -> None:
        """
        Forget all recorded steps but the oldest ones; record from now on.

        :param n_steps: steps per environment to keep
        """
        self._queue.keep_oldest(n_steps)

    def discard(self) -> None:
        """Forget the steps recorded so far; record from now on."""
        self._queue.discard()

    def pause(self) -> None:
        """Record no further steps until :meth:`discard` or :meth:`keep_oldest`; those recorded so far are kept."""
        self._queue.pause()

    def get_records(self) -> list[StepRecords]:
        """
        Look at the steps that can be taken.

        :return: the steps of all environments, oldest first
        """
        return self._queue.get()

    def set_records(self, records: Sequence[StepRecords]) -> None:
        """
        Put back what :meth:`get_records` returned.

        :param records: the steps of all environments, oldest first
        """
        self._queue.clear()
        for step in records:
            self.record(step)

    def close(self) -> None:
        """Stop the engine's threads."""
        self._engine.dynamics.close()  # type: ignore[union-attr]
