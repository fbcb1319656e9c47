"""What a step of an algorithm costs, by short runs made side by side: the clock for runs of different machines and days."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path

import numpy as np

from sb3_agpo.benchmark.records import Row, RunKey, key_of, read_rows

#: columns of the CSV file for times
TIMES = ("seconds", "cpu_seconds")


def costs_of_steps(path: Path) -> dict[tuple[str, str], dict[str, float]]:
    """
    The mean times of an environment step, with all that is learned from it.

    They are the slopes between the first and the last evaluation of a run, so that neither its start nor its steps with
    random actions count.

    :param path: CSV file that ``learning`` wrote
    :return: (hash of the settings, task) -> column of ``TIMES`` -> seconds per step, the mean over its runs
    :raises ValueError: if there is no such file, or one of its runs has one evaluation only
    """
    runs: dict[RunKey, list[Row]] = defaultdict(list)
    for row in read_rows(path):
        runs[key_of(row)].append(row)
    if not runs:
        raise ValueError(f"{path} has no evaluations; short runs of all algorithms belong there, see 'learning'")
    slopes: dict[tuple[str, str], list[list[float]]] = defaultdict(list)
    for key, run in runs.items():
        if len(run) < 2:
            raise ValueError(f"{path}: `{key.algorithm}` on {key.env} was evaluated once; the cost of a step takes two")
        first, last = (pick(run, key=lambda row: int(row["steps"])) for pick in (min, max))
        steps = int(last["steps"]) - int(first["steps"])
        slopes[key.settings, key.env].append([(float(last[column]) - float(first[column])) / steps for column in TIMES])
    return {key: dict(zip(TIMES, np.mean(found, axis=0).tolist(), strict=True)) for key, found in slopes.items()}
