"""The training of the demonstration: how long it lasts, how it is evaluated and logged, and how Ctrl-C ends it."""

from __future__ import annotations

import math
import signal
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import NamedTuple

from stable_baselines3.common.callbacks import BaseCallback
from tqdm import tqdm

from sb3_agpo.agpo.agpo import AGPO
from sb3_agpo.benchmark.run import Evaluator

LOGS = 100  # rows of numbers that a run of the full budget logs
LOGS_PER_EVALUATION = 4
EVALUATION_EPISODES = 5
# Share of the time that evaluations may take where time is what ends the run: on a slow task, or a machine that is busy
# with other things, they would leave little of it to learn in.
EVALUATION_SHARE = 0.15


class Evaluation(NamedTuple):
    """Undiscounted returns of a few episodes."""

    steps: int  # environment steps of training before them
    mean: float
    deviation: float  # standard deviation over the episodes
    episodes: int

    @classmethod
    def of(cls, steps: int, returns: Sequence[float]) -> Evaluation:
        """
        Summarise episodes.

        :param steps: environment steps of training before them
        :param returns: one of each episode
        :return: the summary
        """
        mean = sum(returns) / len(returns)
        variance = sum((value - mean) ** 2 for value in returns) / len(returns)
        return cls(steps, mean, math.sqrt(variance), len(returns))


class Budget(NamedTuple):
    """When to stop: what comes first."""

    seconds: float | None
    steps: int | None

    def used(self, seconds: float, steps: int) -> float:
        """
        How much of the budget is used up.

        :param seconds: since the training started
        :param steps: environment steps
        :return: fraction, 1 or more at the end
        """
        by_time = seconds / self.seconds if self.seconds is not None else 0.0
        by_steps = steps / self.steps if self.steps is not None else 0.0
        return max(by_time, by_steps)


class DemoCallback(BaseCallback):
    """
    Evaluates the deterministic policy in environments of its own, logs, moves the progress bar and ends the training.

    :param env: Gymnasium's name of the task
    :param budget: when to stop
    :param stop: set when the training is to stop earlier
    :param bar: progress bar with a total of 1
    """

    model: AGPO

    def __init__(self, env: str, budget: Budget, stop: threading.Event, bar: tqdm) -> None:
        super().__init__()
        self.evaluator = Evaluator(env)
        self.budget, self.stop, self.bar = budget, stop, bar
        self.evaluations: list[Evaluation] = []
        self.seconds = self.evaluation_seconds = 0.0
        self._started, self._n_logs = 0.0, 0

    def _on_training_start(self) -> None:
        self._started = time.perf_counter()
        self._evaluate()
        self._log()

    def _on_step(self) -> bool:
        used = self._show_progress()
        if used >= 1.0 or self.stop.is_set():
            return False  # on_training_end evaluates
        # One evaluation or batch of updates can take longer than the time between two logs: catch up, but log once
        due = int(used * LOGS)
        if due > self._n_logs:
            if due // LOGS_PER_EVALUATION > self._n_logs // LOGS_PER_EVALUATION and self._worth_evaluating():
                self._evaluate()
            self._log()
            self._n_logs = due
        return True

    def _on_training_end(self) -> None:
        self._evaluate()
        self.evaluator.close()
        self._log()
        self._show_progress()

    def _show_progress(self) -> float:
        """Move the bar; :return: the fraction of the budget that is used up."""
        self.seconds = time.perf_counter() - self._started
        used = self.budget.used(self.seconds, self.num_timesteps)
        last = f", return {self.evaluations[-1].mean:,.1f}" if self.evaluations else ""
        self.bar.set_postfix_str(f"{self.num_timesteps:,} steps{last}", refresh=False)
        self.bar.update(min(used, 1.0) - self.bar.n)
        return used

    def _worth_evaluating(self) -> bool:
        """Whether the policy can have changed since the first evaluation, and evaluations have not taken too long."""
        affordable = self.budget.seconds is None or self.evaluation_seconds <= EVALUATION_SHARE * self.seconds
        return affordable and self.num_timesteps > self.model.learning_starts

    def _evaluate(self) -> None:
        start = time.perf_counter()
        returns = self.evaluator.play_model(self.model, EVALUATION_EPISODES)
        self.evaluation_seconds += time.perf_counter() - start
        self.evaluations.append(Evaluation.of(self.num_timesteps, returns))
        self.logger.record("eval/mean_reward", self.evaluations[-1].mean)
        self.logger.record("eval/std_reward", self.evaluations[-1].deviation)

    def _log(self) -> None:
        """Write what was recorded since the last time: means over all updates in between."""
        self.seconds = time.perf_counter() - self._started
        self.logger.record("time/learning_seconds", self.seconds - self.evaluation_seconds)
        self.logger.record("time/simulator_calls", self.model.simulator_calls)
        self.model.dump_logs()


@contextmanager
def first_interrupt_stops() -> Iterator[threading.Event]:
    """
    Let the first Ctrl-C stop the training after its current step, so that nothing is left half-done; a second one quits.

    :return: context with the event that the first Ctrl-C sets
    """
    stop = threading.Event()

    def handle(_number: int, _frame: FrameType | None) -> None:
        stop.set()
        signal.signal(signal.SIGINT, previous)
        tqdm.write("Ctrl-C: stopping and saving; press it again to quit at once", file=sys.stderr)

    previous = signal.signal(signal.SIGINT, handle)
    try:
        yield stop
    finally:
        signal.signal(signal.SIGINT, previous)
