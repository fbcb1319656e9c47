"""Reading what can be compared from a CSV file of the learning benchmark."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from sb3_agpo.benchmark.costs import TIMES, costs_of_steps
from sb3_agpo.benchmark.notes import note_costs, note_missing, note_mixtures
from sb3_agpo.benchmark.records import Row, RunKey, key_of, own_settings, read_rows, read_unfinished
from sb3_agpo.benchmark.results import BASELINE, RANDOM, Curve, Results


def load(
    path: Path,
    baseline: str = BASELINE,
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
    :raises ValueError: if there is nothing in it, nothing of a name that is asked for, ``steps`` lies between two evaluations,
        or ``costs`` lacks a run
    """
    results = Results(baseline, costs=costs, source=path)
    rows = read_rows(path)
    rows += _unfinished(path, rows, results) if live else []
    if not rows:
        raise ValueError(f"{path} has no evaluations; run 'python -m sb3_agpo.benchmark learning --output {path}' first")
    in_file = _group(rows, results)
    _check_names(path, baseline, algorithms or (), in_file)
    wanted = None if algorithms is None else {baseline, *algorithms}
    runs = {key: run for key, run in in_file.items() if wanted is None or wanted & {key.algorithm, run[0]["algorithm"]}}
    if steps is not None:
        _check_steps(steps, runs)
    _find_budgets(runs, results, steps)
    for key, run in _choose(runs, results).items():
        curve = _curve(key, run, results.budgets[key.env])
        results.curves.setdefault(key.algorithm, {}).setdefault(key.env, []).append(curve)
        results.rows += run
    _replace_what_is_not_finite(results)
    if costs is not None:
        _reckon_times(results, costs)
        note_costs(results, read_rows(costs))
    note_missing(results, in_file, everything=algorithms is None)
    note_mixtures(results, own_settings(path, results.rows))
    return results


def _unfinished(path: Path, finished: list[Row], results: Results) -> list[Row]:
    """
    Read unfinished runs, but for those of settings that no finished run of their algorithm has: perhaps given up long ago.

    :param path: the file of finished runs
    :param finished: its rows
    :param results: gets notes
    :return: rows
    """
    settings = defaultdict(set)
    for row in finished:
        settings[row["algorithm"]].add(row["settings"])
    rows, left_out = [], set()
    for row in read_unfinished(path, finished):
        if row["settings"] in settings.get(row["algorithm"], {row["settings"]}):
            rows.append(row)
        else:
            left_out.add((row["algorithm"], row["settings"]))
    for algorithm, other in sorted(left_out):
        results.notes.append(
            f"Unfinished runs of `{algorithm}` with other settings ({other}) than finished ones are left out."
        )
    return rows


def _check_names(path: Path, baseline: str, algorithms: Sequence[str], runs: dict[RunKey, list[Row]]) -> None:
    """
    Check the names on the command line.

    A file without runs of the default baseline can be reported, without scores.

    :param path: the file
    :param baseline: ``--baseline``
    :param algorithms: ``--algorithms``
    :param runs: all runs of the file
    :raises ValueError: if the file has no runs of one of them, or if runs of several settings can be the baseline
    """
    shown, names = {key.algorithm for key in runs}, {run[0]["algorithm"] for run in runs.values()}
    for option, name in [("--baseline", baseline), *(("--algorithms", name) for name in algorithms)]:
        if name not in {*shown, *names, BASELINE if option == "--baseline" else RANDOM}:
            raise ValueError(f"{option}: {path} has no runs of `{name}`; choose from {', '.join(sorted(shown))}")
    if baseline not in {*shown, BASELINE}:
        several = ", ".join(f"'{name}'" for name in sorted(shown) if name.startswith(f"{baseline} ["))
        raise ValueError(f"--baseline: {path} has runs of several settings of `{baseline}`; give one of {several}")


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
            if np.isfinite(float(row["return"])):
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
    :return: of each the shortest run that is long enough, an unfinished one only where there is no finished one
    """

    def order(key: RunKey) -> tuple[str, str, int, bool, int]:
        unfinished = int(runs[key][-1]["steps"]) < key.budget
        return key.algorithm, key.env, key.seed, unfinished, key.budget

    chosen: dict[tuple[str, str, int], RunKey] = {}
    too_short: Counter[tuple[str, str]] = Counter()
    for key in sorted(runs, key=order):
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


def _replace_what_is_not_finite(results: Results) -> None:
    """
    Give the random policy's return to policies that are broken, so that such a run counts and does not vanish.

    :param results: the runs; gets other returns, and notes
    """
    for name, task, curve in results.all_curves():
        returns = curve.quantities["return"]
        if count := int(np.sum(~np.isfinite(returns))):
            counted = "counted as random actions" if task in results.random else "left out"
            results.notes.append(
                f"`{name}` on {task}, seed {curve.seed}: {count} of {len(returns)} returns are not finite, {counted}."
            )
            curve.quantities["return"] = np.where(np.isfinite(returns), returns, results.random.get(task, np.nan))


def _reckon_times(results: Results, costs: Path) -> None:
    """
    Replace the times of runs, which may be of different machines and days, by steps times the cost of a step.

    :param results: the runs; gets other times
    :param costs: CSV file of short runs
    :raises ValueError: if an algorithm has no run there on one of its tasks
    """
    known = costs_of_steps(costs)
    for name, task, curve in results.all_curves():
        if (curve.settings, task) not in known:
            raise ValueError(f"{costs} has no run of `{name}` ({curve.settings}) on {task}; see 'learning'")
        curve.quantities.update({column: curve.steps * cost for column, cost in known[curve.settings, task].items()})
