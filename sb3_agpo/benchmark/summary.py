"""One table of the learning benchmark, for pages that have room for no more, such as the README."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from sb3_agpo.benchmark import records
from sb3_agpo.benchmark.markdown import NONE, estimate, labels, number, table
from sb3_agpo.benchmark.results import Reached, Results
from sb3_agpo.benchmark.statistics import interquartile_mean, mean

#: name of the markers on a page
MARKER = "summary"


def summary_table(results: Results, algorithms: Sequence[str], time: str) -> str:
    """
    Final returns, and what it took to get to the baseline's.

    :param results: the runs
    :param algorithms: columns
    :param time: column of the CSV file for times
    :return: Markdown; the best return of each task is bold, the number of seeds in parentheses
    """
    names, (baseline,) = labels(results, algorithms), labels(results, [results.baseline])
    head = ["task", "steps", *names, *(f"{name}, to {baseline}'s return" for name in names)]
    rows = []
    for task in results.tasks:
        reached = [results.reach(algorithm, task) for algorithm in algorithms]
        known = [len(results.final(algorithm, task)) > 0 for algorithm in algorithms]
        taken = [_taken(each, time) if runs else NONE for each, runs in zip(reached, known, strict=True)]
        rows.append([task, _thousands(results.budgets[task]), *_finals(results, algorithms, task), *taken])
    if results.scored_tasks:
        scores = [estimate(results.scores(algorithm), interquartile_mean) for algorithm in algorithms]
        rows.append(["score: interquartile mean", "", *scores, *[""] * len(names)])
    return table(head, rows)


def update_summary(page: Path, results: Results, algorithms: Sequence[str], time: str) -> None:
    """
    Write the table anew between ``<!-- summary: begin -->`` and ``<!-- summary: end -->``.

    :param page: Markdown file
    :param results: the runs
    :param algorithms: columns
    :param time: column of the CSV file for times
    :raises ValueError: if there is no such page, or it has no such lines
    """
    if not page.exists():
        raise ValueError(f"--page: there is no {page}")
    records.update_page(page, MARKER, summary_table(results, algorithms, time))


def _finals(results: Results, algorithms: Sequence[str], task: str) -> list[str]:
    """Mean final returns, the best in bold."""
    finals = [results.final(algorithm, task) for algorithm in algorithms]
    means = [float(mean(final)) if len(final) else float("-inf") for final in finals]
    texts = [f"{_return(value)} ({len(final)})" if len(final) else NONE for value, final in zip(means, finals, strict=True)]
    return [f"**{text}**" if value == max(means) and text != NONE else text for value, text in zip(means, texts, strict=True)]


def _return(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 999.5 else number(value)


def _taken(reached: Reached | None, time: str) -> str:
    return f"{_thousands(reached.steps)}, {getattr(reached, time):,.0f} s" if reached else "not reached"


def _thousands(steps: float) -> str:
    return f"{steps / 1000:g}k"
