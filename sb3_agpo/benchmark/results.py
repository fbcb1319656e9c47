"""What the CSV file of the learning benchmark says: runs that may be compared, as curves."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from sb3_agpo.benchmark.costs import TIMES, costs_of_steps
from sb3_agpo.benchmark.records import BUDGETS, VERSION_COLUMNS, Row, RunKey, key_of, read_all, read_rows
from sb3_agpo.benchmark.statistics import ScoredRuns, first_reached, mean

Array = NDArray[np.float64]

RANDOM = "random"
VARIANTS = ("", "-nomatch", "-windows")
ABLATIONS = tuple(f"agpo-{mode}{suffix}" for mode in ("adaptive", "analytic", "q") for suffix in VARIANTS)
# In the order in which tables and legends show them; names given by ``--label`` come after.
ORDER = ("sac", "sac-fast", "tqc", "crossq", "crossq-fast", "ppo", *ABLATIONS, "agpo-four-updates", "agpo-batch-norm")


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
    :param costs: file that times are reckoned from, see :mod:`sb3_agpo.benchmark.costs`; None: times are those of the runs
    """

    baseline: str
    curves: dict[str, dict[str, list[Curve]]] = field(default_factory=dict)
    random: dict[str, float] = field(default_factory=dict)
    budgets: dict[str, int] = field(default_factory=dict)
    rows: list[Row] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    costs: Path | None = None

    @property
    def algorithms(self) -> list[str]:
        """All algorithms, in the order of display."""
        return sorted(self.curves, key=lambda name: (ORDER.index(name) if name in ORDER else len(ORDER), name))

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


def load(
    path: Path,
    baseline: str = "sac",
    algorithms: Sequence[str] | None = None,
    live: bool = False,
    steps: int | None = None,
    costs: Path | None = None,
) -> Results:
    """
    Read what can be compared from a CSV file.

    :param path: as ``learning`` wrote it
    :param baseline: algorithm whose final return is a normalised score of 1
    :param algorithms: names to be used besides the baseline and the random policy; None: all
    :param live: whether to use unfinished runs as well
    :param steps: environment steps to compare at, where budgets are larger; None: the budgets
    :param costs: CSV file of short runs to reckon times from; None: times are those of the runs
    :return: the results
    :raises ValueError: if there is nothing in it, ``steps`` lies between two evaluations, or ``costs`` lacks a run
    """
    rows = read_all(path) if live else read_rows(path)
    if not rows:
        raise ValueError(f"{path} has no evaluations; run 'python -m sb3_agpo.benchmark learning --output {path}' first")
    results = Results(baseline, costs=costs)
    runs = _group(rows, results)
    wanted = None if algorithms is None else {baseline, *algorithms}
    runs = {key: run for key, run in runs.items() if wanted is None or wanted & {key.algorithm, run[0]["algorithm"]}}
    if steps is not None:
        _check_steps(steps, runs)
    _find_budgets(runs, results, steps)
    for key, run in _choose(runs, results).items():
        curve = _curve(key, run, results.budgets[key.env])
        results.curves.setdefault(key.algorithm, {}).setdefault(key.env, []).append(curve)
        results.rows += run
    if costs is not None:
        _reckon_times(results, costs)
    _note_missing(results)
    _note_mixtures(results)
    return results


def _check_steps(steps: int, runs: dict[RunKey, list[Row]]) -> None:
    """
    Check the number of steps to compare at.

    :param steps: the number
    :param runs: all runs
    :raises ValueError: if it is not positive, or lies between two evaluations
    """
    intervals = {int(run[0]["eval_every"]) for run in runs.values()}
    if steps <= 0 or any(steps % interval for interval in intervals):
        every = " and ".join(f"{interval:,}" for interval in sorted(intervals))
        raise ValueError(f"`--steps` is {steps}; give a multiple of the {every} steps between evaluations")


def _group(rows: list[Row], results: Results) -> dict[RunKey, list[Row]]:
    """
    Group rows by run; the random policy goes to the results, different settings of an algorithm get different names.

    :param rows: of the file
    :param results: gets the random policy's returns and notes
    :return: run -> its rows in order
    """
    settings = defaultdict(set)
    for row in rows:
        settings[row["algorithm"]].add(row["settings"])
    runs: dict[RunKey, list[Row]] = defaultdict(list)
    for row in rows:
        key = key_of(row)
        if key.algorithm == RANDOM:
            results.random[key.env] = float(row["return"])
            results.rows.append(row)
            continue
        if len(settings[key.algorithm]) > 1:
            key = key._replace(algorithm=f"{key.algorithm} [{key.settings}]")
        runs[key].append(row)
    for algorithm, hashes in sorted(settings.items()):
        if len(hashes) > 1:
            results.notes.append(f"`{algorithm}` has runs of {len(hashes)} different settings, shown apart by their hashes.")
    return {key: sorted(run, key=lambda row: int(row["steps"])) for key, run in runs.items()}


def _find_budgets(runs: dict[RunKey, list[Row]], results: Results, steps: int | None = None) -> None:
    """
    Choose the number of steps to compare at: for each task the one that most of the baseline's runs have.

    :param runs: all runs
    :param results: gets the budgets
    :param steps: no more than these, if given
    """
    for task in {key.env for key in runs}:
        of_task = [key for key in runs if key.env == task]
        counts = Counter(key.budget for key in of_task if key.algorithm == results.baseline)
        counts = counts or Counter(key.budget for key in of_task)
        usual = max(counts, key=lambda budget: (counts[budget], budget))
        results.budgets[task] = usual if steps is None else min(usual, steps)


def _choose(runs: dict[RunKey, list[Row]], results: Results) -> dict[RunKey, list[Row]]:
    """
    Choose one run per algorithm, task and seed.

    :param runs: all runs
    :param results: with the budgets; gets notes
    :return: of each the shortest run that is long enough
    """
    chosen: dict[tuple[str, str, int], RunKey] = {}
    too_short: Counter[tuple[str, str]] = Counter()
    for key in sorted(runs, key=lambda key: (key.algorithm, key.env, key.seed, key.budget)):
        if key.budget < results.budgets[key.env]:
            too_short[key.algorithm, key.env] += 1
        else:
            chosen.setdefault((key.algorithm, key.env, key.seed), key)
    for (algorithm, task), count in sorted(too_short.items()):
        results.notes.append(
            f"{count} run(s) of `{algorithm}` on {task} are left out: shorter than the {results.budgets[task]} steps compared."
        )
    return {key: runs[key] for key in chosen.values()}


def _curve(key: RunKey, run: list[Row], budget: int) -> Curve:
    """
    Make a curve of a run.

    :param key: the run
    :param run: its rows in order
    :param budget: steps to cut it at
    :return: the curve
    """
    steps = np.array([int(row["steps"]) for row in run], dtype=float)
    interval = int(run[0]["eval_every"])
    nominal = np.where(steps >= key.budget, key.budget, steps // interval * interval)
    keep = nominal <= budget
    columns = ("return", "simulator_calls", *TIMES)
    quantities = {column: np.array([float(row[column]) for row in run])[keep] for column in columns}
    return Curve(key.seed, key.settings, nominal[keep], quantities)


def _reckon_times(results: Results, costs: Path) -> None:
    """
    Replace the times of runs, which may be of different machines and days, by steps times the cost of a step.

    :param results: the runs; gets other times
    :param costs: CSV file of short runs
    :raises ValueError: if an algorithm has no run there on one of its tasks
    """
    known = costs_of_steps(costs)
    curves = (
        (name, task, curve) for name, tasks in results.curves.items() for task, of_task in tasks.items() for curve in of_task
    )
    for name, task, curve in curves:
        if (curve.settings, task) not in known:
            raise ValueError(f"{costs} has no run of `{name}` ({curve.settings}) on {task}; see 'learning'")
        curve.quantities.update({column: curve.steps * cost for column, cost in known[curve.settings, task].items()})


def _note_missing(results: Results) -> None:
    """
    Say what there are no results of.

    :param results: gets notes
    """
    notes = results.notes
    if results.baseline not in results.curves:
        others = [f"`{name}`" for name in results.algorithms if name.startswith(f"{results.baseline} [")]
        hint = f"; give one of {', '.join(others)}" if others else ""
        notes.append(f"There are no runs of the baseline `{results.baseline}`, hence no normalised scores{hint}.")
    else:
        for task in results.tasks:
            if task not in results.random:
                notes.append(f"{task} has no normalised scores: the random policy was not run.")
            elif not len(results.final(results.baseline, task)):
                notes.append(f"{task} has no normalised scores: no run of `{results.baseline}` is finished.")
            elif results.scale(task) is None:
                notes.append(f"{task} has no normalised scores: `{results.baseline}` is no better than the random policy.")
    for algorithm in results.algorithms:
        missing = [task for task in results.tasks if not len(results.final(algorithm, task))]
        if missing:
            notes.append(f"`{algorithm}` has no finished runs on {', '.join(missing)}.")
        if results.scored_tasks and not results.complete(algorithm):
            notes.append(f"`{algorithm}`: its IQM is over fewer tasks than others'; left out of the figures over all tasks.")
    if absent := [name for name in ORDER if name not in results.curves]:
        notes.append(f"No runs of {', '.join(f'`{name}`' for name in absent)}.")
    if absent := [task for task in BUDGETS if task not in results.budgets]:
        notes.append(f"No runs on {', '.join(absent)}.")


def _note_mixtures(results: Results) -> None:
    """
    Say where runs were made under different circumstances.

    :param results: gets notes
    """
    for column in (*VERSION_COLUMNS, "machine", "threads"):
        # The package's version says nothing about algorithms that are not its own.
        own_only = column == "sb3_agpo"
        found = {row[column] for row in results.rows if not own_only or row["algorithm"].startswith("agpo")}
        if len(found) > 1:
            of_time = column in ("machine", "threads")
            if of_time and results.costs:
                continue
            consequence = " times are not comparable" if of_time else " returns may differ for it"
            results.notes.append(f"Runs differ in `{column}` ({', '.join(sorted(found))}):{consequence}.")
