"""Numbers, estimates and tables as the reports write them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

from sb3_agpo.benchmark.statistics import bootstrap_interval, mean

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


def estimate(strata: Sequence[Array], statistic: Callable[[Array, int], Array]) -> str:
    """
    Write a statistic with its 95 % bootstrap interval.

    :param strata: values of the runs of each task
    :param statistic: of an array along an axis
    :return: for example ``1.02 [0.95, 1.10]``; without an interval if there is but one run of each task
    """
    if not strata:
        return NONE
    center = number(float(statistic(np.concatenate(strata), 0)))
    if max(len(stratum) for stratum in strata) < 2:
        return center
    low, high = bootstrap_interval(strata, statistic)
    return f"{center} [{number(float(low))}, {number(float(high))}]"


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
