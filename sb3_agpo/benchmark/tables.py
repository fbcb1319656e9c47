"""Numbers, estimates and tables as the reports write them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

from sb3_agpo.benchmark.statistics import ScoredRuns, bootstrap_interval, interquartile_mean, mean, pool, score_interval

Array = NDArray[np.float64]

NONE = "–"  # in an empty cell


def number(value: float) -> str:
    """
    Write a number with about three digits.

    :param value: the number
    :return: text, a dash if it is not finite
    """
    if not np.isfinite(value):
        return NONE
    return f"{value:.{0 if abs(value) >= 99.95 else 1 if abs(value) >= 9.995 else 2}f}"


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """
    Write a Markdown table.

    :param head: column names
    :param rows: cells; all columns but the first are aligned to the right
    :return: text ending with an empty line
    """
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines) + "\n"


def estimated_mean(values: Array) -> str:
    """
    Write a mean with its 95 % bootstrap interval.

    :param values: of the runs of a task
    :return: for example ``1.02 [0.95, 1.10]``; without an interval if there is but one run
    """
    if not len(values):
        return NONE
    return _with_interval(mean(values), bootstrap_interval([values], mean) if len(values) > 1 else None)


def estimated_score(tasks: Sequence[ScoredRuns]) -> str:
    """
    Write the interquartile mean of normalised scores with its 95 % bootstrap interval.

    :param tasks: runs of each task
    :return: for example ``1.02 [0.95, 1.10]``; without an interval if there is but one run of each task
    """
    if not tasks:
        return NONE
    center = interquartile_mean(pool([task.scores() for task in tasks]))
    several = max(len(task.returns) for task in tasks) > 1
    return _with_interval(center, score_interval(tasks, interquartile_mean) if several else None)


def _with_interval(center: Array, bounds: tuple[Array, Array] | None) -> str:
    """Write a number and its interval, if there is one."""
    return " ".join([number(float(center)), *([f"[{', '.join(number(float(bound)) for bound in bounds)}]"] if bounds else [])])


def highlighted(texts: Sequence[str], samples: Sequence[Array]) -> list[str]:
    """
    Make the cells with the highest mean bold.

    :param texts: cells
    :param samples: values of each cell, none where it is empty
    :return: cells
    """
    means = [float(mean(sample)) if len(sample) else -np.inf for sample in samples]
    best = max(means, default=-np.inf)
    return [f"**{text}**" if value == best > -np.inf else text for text, value in zip(texts, means, strict=True)]
