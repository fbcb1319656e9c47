"""What a report of the learning benchmark says about its runs: what is missing, and what is not alike."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence

from sb3_agpo.benchmark.records import BUDGETS, VERSION_COLUMNS, Row, RunKey
from sb3_agpo.benchmark.results import ORDER, Results


def note_missing(results: Results, runs: Mapping[RunKey, Sequence[Row]], everything: bool) -> None:
    """
    Say what there are no results of.

    :param results: gets notes
    :param runs: all runs of the file
    :param everything: whether all algorithms are asked for
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
    there = {run[0]["algorithm"] for run in runs.values()}
    if everything and (absent := [name for name in ORDER if name not in there]):
        notes.append(f"No runs of {', '.join(f'`{name}`' for name in absent)}.")
    if absent := [task for task in BUDGETS if task not in {key.env for key in runs}]:
        notes.append(f"No runs on {', '.join(absent)}.")


def note_costs(results: Results, costs: Sequence[Row]) -> None:
    """
    Say where the short runs that times are reckoned from were made under different circumstances.

    :param results: gets notes
    :param costs: rows of those runs
    """
    used = {(row["settings"], row["env"]) for row in results.rows}
    for column in (*VERSION_COLUMNS, "machine", "threads"):
        found = {row[column] for row in costs if (row["settings"], row["env"]) in used}
        if len(found) > 1:
            names = ", ".join(sorted(found))
            results.notes.append(f"Short runs in {results.costs} differ in `{column}` ({names}): times are not comparable.")


def note_mixtures(results: Results, own: Collection[str]) -> None:
    """
    Say where runs were made under different circumstances.

    :param results: gets notes
    :param own: settings of algorithms that are this package's code
    """
    of_own = [row for row in results.rows if row["settings"] in own]
    for column in (*VERSION_COLUMNS, "machine", "threads"):
        of_time = column in ("machine", "threads")
        if of_time and results.costs:
            continue
        # The package's version says nothing about algorithms that are not its own.
        found = {row[column] for row in (of_own if column == "sb3_agpo" else results.rows)}
        if len(found) > 1:
            consequence = " times are not comparable" if of_time else " returns may differ for it"
            results.notes.append(f"Runs differ in `{column}` ({', '.join(sorted(found))}):{consequence}.")
    commits = defaultdict(set)
    for row in of_own:
        commits[row["algorithm"], row["settings"]].add(row["git_commit"])
    for (algorithm, _), found in sorted(commits.items()):
        if len(found) > 1:
            results.notes.append(
                f"Runs of `{algorithm}` are of several commits of this package ({', '.join(sorted(found))}), "
                "whose code may differ."
            )
