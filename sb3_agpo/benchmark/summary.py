"""One table of the learning benchmark with its legend, for pages that have room for no more, such as the README."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from sb3_agpo.benchmark import records
from sb3_agpo.benchmark.figures import labels
from sb3_agpo.benchmark.results import Results
from sb3_agpo.benchmark.statistics import mean
from sb3_agpo.benchmark.tables import NONE, estimated_score, highlighted, number, table

#: name of the markers on a page
MARKER = "summary"
#: columns for times -> as the table calls them
CLOCKS = {"seconds": "time", "cpu_seconds": "processor time"}


def summary_table(results: Results, algorithms: Sequence[str], time: str) -> str:
    """
    Final returns, and what it took to get to the baseline's.

    :param results: the runs
    :param algorithms: columns
    :param time: column of the CSV file for times
    :return: Markdown, and what it means; the best return of each task is bold
    """
    names, (baseline,) = labels(results, algorithms), labels(results, [results.baseline])
    head = ["task", "steps", *names, *(f"to {baseline}'s return: {name}" for name in names)]
    rows = []
    for task in results.tasks:
        finals = [results.final(algorithm, task) for algorithm in algorithms]
        texts = [f"{_return(float(mean(final)))} ({len(final)})" if len(final) else NONE for final in finals]
        taken = [_taken(results, algorithm, task, time) for algorithm in algorithms]
        rows.append([task, _thousands(results.budgets[task]), *highlighted(texts, finals), *taken])
    if results.scored_tasks:
        scores = [estimated_score(results.final_runs(algorithm)) for algorithm in algorithms]
        rows.append(["score: interquartile mean", "", *scores, *[""] * len(names)])
    reckoned = "; time is steps times what one costs beside the others" if results.costs else ""
    explained = (
        "Means over seeds, whose number stands in parentheses. The last columns have environment steps and "
        f"{CLOCKS[time]} at the first evaluation whose mean reaches {baseline}'s final return{reckoned}. "
        f"Scores are 0 for random actions and 1 for {baseline}, with a 95 % interval.\n"
    )
    return table(head, rows) + explained


def check_page(page: Path) -> None:
    """
    See to it that there is a page with a place for the table.

    :param page: Markdown file
    :raises ValueError: if there is no such page, or it has no markers
    """
    if not page.is_file():
        raise ValueError(f"--page: there is no file {page}")
    records.check_markers(page, MARKER)


def update_summary(page: Path, results: Results, algorithms: Sequence[str], time: str) -> None:
    """
    Write the table anew between its markers on a page.

    :param page: Markdown file, see :func:`check_page`
    :param results: the runs
    :param algorithms: columns
    :param time: column of the CSV file for times
    """
    records.update_page(page, MARKER, summary_table(results, algorithms, time))


def _taken(results: Results, algorithm: str, task: str, time: str) -> str:
    """Steps and time to the baseline's final return."""
    if not len(results.final(results.baseline, task)) or not len(results.final(algorithm, task)):
        return NONE
    reached = results.reach(algorithm, task)
    return f"{_thousands(reached.steps)}, {getattr(reached, time):,.0f} s" if reached else "not reached"


def _return(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 999.5 else number(value)


def _thousands(steps: float) -> str:
    return f"{steps / 1000:g}k"
