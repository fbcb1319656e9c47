"""What the CSV file of the learning benchmark says: runs that may be compared, as curves."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from sb3_agpo.benchmark.costs import TIMES
from sb3_agpo.benchmark.records import BUDGETS, Row
from sb3_agpo.benchmark.statistics import ScoredRuns, first_reached, mean

Array = NDArray[np.float64]

RANDOM = "random"
BASELINE = "sac"  # unless another one is asked for
VARIANTS = ("", "-nomatch", "-windows")
ABLATIONS = tuple(f"agpo-{mode}{suffix}" for mode in ("adaptive", "analytic", "q") for suffix in VARIANTS)
# In the order in which tables and legends show them; names given by ``--label`` come after.
ORDER = (
    "sac",
    "sac-fast",
    "tqc",
    "crossq",
    "crossq-fast",
    "ppo",
    *ABLATIONS,
    "agpo-correction",
    "agpo-four-updates",
    "agpo-batch-norm",
)


@dataclass(frozen=True)
class Curve:
    """
    The evaluations of one run, up to the task's budget.

    :param seed: of the run
    :param settings: hash of its hyperparameters
    :param steps: *nominal* environment steps, shape ``(n,)``: an evaluation takes place as soon as a multiple of its
        interval is reached, which several environments overshoot by a few steps; without them, runs can be compared
    :param quantities: column of the CSV file -> shape ``(n,)``
    """

    seed: int
    settings: str
    steps: Array
    quantities: dict[str, Array]

    def at(self, steps: Array, column: str) -> Array:
        """
        Read a quantity at given steps.

        :param steps: shape ``(m,)``
        :param column: of the CSV file, such as ``return``
        :return: shape ``(m,)``, linear between evaluations, NaN outside of them
        """
        return np.interp(steps, self.steps, self.quantities[column], left=np.nan, right=np.nan)


@dataclass(frozen=True)
class Reached:
    """What it took an algorithm to reach a return, on average over its seeds."""

    steps: float
    simulator_calls: float
    seconds: float
    cpu_seconds: float


@dataclass
class Results:
    """
    Comparable runs.

    :param baseline: algorithm whose final return is a normalised score of 1
    :param curves: algorithm -> task -> runs
    :param random: task -> return of the random policy
    :param budgets: task -> environment steps at which algorithms are compared
    :param rows: rows that the above was made of
    :param notes: what was left out or is to be known, one sentence each
    :param source: file that the rows were read from
    :param costs: file that times are reckoned from, see :mod:`sb3_agpo.benchmark.costs`; None: times are those of the runs
    """

    baseline: str
    curves: dict[str, dict[str, list[Curve]]] = field(default_factory=dict)
    random: dict[str, float] = field(default_factory=dict)
    budgets: dict[str, int] = field(default_factory=dict)
    rows: list[Row] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    source: Path = Path("learning.csv")
    costs: Path | None = None

    @property
    def algorithms(self) -> list[str]:
        """All algorithms, in the order of display."""
        return sorted(self.curves, key=lambda name: (ORDER.index(name) if name in ORDER else len(ORDER), name))

    def all_curves(self) -> Iterator[tuple[str, str, Curve]]:
        """
        Go through all runs.

        :return: algorithm, task and curve of each
        """
        for algorithm, tasks in self.curves.items():
            for task, curves in tasks.items():
                yield from ((algorithm, task, curve) for curve in curves)

    @property
    def tasks(self) -> list[str]:
        """All tasks, in the order of display."""
        order = list(BUDGETS)
        return sorted(self.budgets, key=lambda task: (order.index(task) if task in order else len(order), task))

    @property
    def scored_tasks(self) -> list[str]:
        """Tasks that normalised scores exist for: with the baseline and the random policy, the former the better one."""
        return [task for task in self.tasks if self.scale(task) is not None]

    def final(self, algorithm: str, task: str) -> Array:
        """
        Returns at the task's budget.

        :param algorithm: its name
        :param task: its name
        :return: one return for each run that has got there
        """
        at_end = np.array([float(self.budgets[task])])
        returns = [curve.at(at_end, "return")[0] for curve in self.curves.get(algorithm, {}).get(task, [])]
        return np.array([value for value in returns if np.isfinite(value)])

    def scale(self, task: str) -> tuple[float, float] | None:
        """
        How returns become normalised scores.

        :param task: its name
        :return: the returns with scores 0 and 1; None if the task has no normalised scores
        """
        finals = self.final(self.baseline, task)
        if task not in self.random or not len(finals) or mean(finals) <= self.random[task]:
            return None
        return self.random[task], float(mean(finals))

    def scored(self, algorithm: str, task: str, returns: Array) -> ScoredRuns:
        """
        Returns with what makes normalised scores of them.

        :param algorithm: its name
        :param task: one of ``scored_tasks``
        :param returns: of its runs, shape ``(n_runs, ...)``, the last ones of each run being the final ones
        :return: the same with the returns of the baseline and of the random policy
        """
        baseline = None if algorithm == self.baseline else self.final(self.baseline, task)
        return ScoredRuns(returns, baseline, self.random[task])

    def final_runs(self, algorithm: str) -> list[ScoredRuns]:
        """
        Final returns with what makes normalised scores of them.

        :param algorithm: its name
        :return: for each of ``scored_tasks`` that the algorithm has finished runs of
        """
        runs = [self.scored(algorithm, task, self.final(algorithm, task)) for task in self.scored_tasks]
        return [of_task for of_task in runs if len(of_task.returns)]

    def scores(self, algorithm: str) -> list[Array]:
        """
        Normalised final scores.

        :param algorithm: its name
        :return: for each of ``scored_tasks`` that the algorithm has finished runs of, the scores of its runs
        """
        return [of_task.scores() for of_task in self.final_runs(algorithm)]

    def complete(self, algorithm: str) -> bool:
        """
        Whether an algorithm can be compared over all tasks.

        :param algorithm: its name
        :return: whether it has finished runs on every one of ``scored_tasks``, and there are any
        """
        return bool(self.scored_tasks) and len(self.scores(algorithm)) == len(self.scored_tasks)

    def grid(self, algorithm: str, task: str) -> Array:
        """
        Steps at which an algorithm was evaluated.

        :param algorithm: its name
        :param task: its name
        :return: nominal environment steps, ascending
        """
        curves = self.curves.get(algorithm, {}).get(task, [])
        return np.unique(np.concatenate([curve.steps for curve in curves])) if curves else np.empty(0)

    def matrix(self, algorithm: str, task: str, steps: Array, column: str = "return") -> Array:
        """
        A quantity of all runs at given steps.

        :param algorithm: its name
        :param task: its name
        :param steps: shape ``(m,)``
        :param column: of the CSV file
        :return: shape ``(n_runs, m)``
        """
        curves = self.curves.get(algorithm, {}).get(task, [])
        return np.array([curve.at(steps, column) for curve in curves]).reshape(len(curves), len(steps))

    def reach(self, algorithm: str, task: str) -> Reached | None:
        """
        What it takes an algorithm to reach the baseline's final return, by the mean over its runs.

        :param algorithm: its name
        :param task: its name
        :return: steps and times, None if it is not reached within the budget or not known
        """
        target = self.final(self.baseline, task)
        steps = self.grid(algorithm, task)
        if not len(target) or not len(steps):
            return None
        index = first_reached(mean(self.matrix(algorithm, task, steps)), float(mean(target)))
        if index is None:
            return None
        columns = ("simulator_calls", *TIMES)
        return Reached(
            float(steps[index]),
            *(float(mean(self.matrix(algorithm, task, steps[index : index + 1], column)[:, 0])) for column in columns),
        )
