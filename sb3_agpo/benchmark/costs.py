"""What a step of an algorithm costs, by short runs made side by side: the clock for runs of different machines and days."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path

import numpy as np

from sb3_agpo.benchmark.records import Row, RunKey, key_of, read_rows

#: columns of the CSV file for times
TIMES = ("seconds", "cpu_seconds")


def costs_of_steps(path: Path, column: str) -> dict[tuple[str, str], float]:
    """
    The mean time of an environment step, with all that is learned from it.

    It is the slope between the first and the last evaluation of a run, so that neither the start nor the steps with random
    actions count.

    :param path: CSV file that ``learning`` wrote
    :param column: for times, one of ``TIMES``
    :return: hash of the settings, task -> seconds per step, the mean over its runs
    :raises ValueError: if there is no file or a run has one evaluation only
    """
    runs: dict[RunKey, list[Row]] = defaultdict(list)
    for row in read_rows(path):
        runs[key_of(row)].append(row)
    if not runs:
        raise ValueError(f"{path} has no evaluations; short runs of all algorithms belong there, see 'learning'")
    slopes: dict[tuple[str, str], list[float]] = defaultdict(list)
    for key, run in runs.items():
        if len(run) < 2:
            raise ValueError(f"{path}: `{key.algorithm}` on {key.env} was evaluated once; the cost of a step takes two")
        times, steps = (np.sort([float(row[name]) for row in run]) for name in (column, "steps"))
        slopes[key.settings, key.env].append((times[-1] - times[0]) / (steps[-1] - steps[0]))
    return {key: float(np.mean(found)) for key, found in slopes.items()}
