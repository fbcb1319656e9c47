"""The fidelity benchmark's CSV file: one row per estimator, from the current and from earlier measurements."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Sequence
from pathlib import Path

from sb3_agpo.benchmark.records import VERSION_COLUMNS, Row, locked, replace_file

#: what identifies a measurement: a new one with equal values takes the place of the old one
KEY = (
    "env",
    "model",
    "algorithm",
    "steps",
    "critics",
    "estimator",
    "seed",
    "n_states",
    "spacing",
    "n_rollouts",
    "rollout_steps",
    "sigma",
)
COLUMNS = (
    "env",
    "steps",
    "estimator",
    "action_cosine",
    "parameter_cosine",
    "norm_ratio",
    "split_half",  # pooled cosine between the gradients of two halves of the reference's rollouts
    "action_cosine_error",  # standard error, by resampling states
    "bias_squared",  # in units of the squared norm of the true gradient; unbiased, so that noise can make it negative
    "variance",  # of the average of `windows` windows, in the same units
    "standard_error",  # of the reference: root mean square, in units of that of the true gradient
    "parameter_split_half",
    "method",
    "horizon",
    "difference_step",
    "windows",  # averaged; 1: the numbers of single windows, averaged; 0: the critic, which needs none
    "gate",  # mean weight of the analytic gradient at the first step
    "valid",  # share of steps whose derivatives are trusted
    "critics",  # as saved, or refitted
    "algorithm",
    "model",
    "seed",
    "n_states",
    "spacing",
    "n_rollouts",
    "rollout_steps",
    "sigma",
    "simulator_calls",  # environment steps that the estimate took, differences included
    "seconds",  # that it took, the differences counted as if no other estimator shared them
    "reference_simulator_calls",
    "reference_seconds",
    *VERSION_COLUMNS,
    "git_commit",
    "machine",
)


def read(path: Path) -> list[Row]:
    """
    Read a file.

    :param path: the file
    :return: its rows, none if there is no such file
    :raises ValueError: if a column is missing
    """
    try:
        text = path.read_text()
    except FileNotFoundError:
        return []
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"--output: {path} cannot be read ({error}); give another file") from error
    reader = csv.DictReader(io.StringIO(text))
    if missing := set(COLUMNS) - set(reader.fieldnames or COLUMNS):
        raise ValueError(f"--output: {path} lacks the columns {', '.join(sorted(missing))}; give another file")
    rows = list(reader)
    if any(None in row or None in row.values() for row in rows):
        raise ValueError(f"--output: {path} has lines with more or fewer entries than columns; complete them")
    return rows


def merge(path: Path, rows: Sequence[Row]) -> None:
    """
    Add rows to a file, in the place of those that measured the same.

    :param path: the file; its folder is made
    :param rows: new rows
    """
    new = {_key(row) for row in rows}
    with locked(path):
        kept = [row for row in read(path) if _key(row) not in new]
        replace_file(path, _to_csv([*kept, *rows]))


def _key(row: Row) -> tuple[str, ...]:
    return tuple(row[column] for column in KEY)


def _to_csv(rows: Iterable[Row]) -> str:
    text = io.StringIO(newline="")
    rows = list(rows)
    more = dict.fromkeys(column for row in rows for column in row if column not in COLUMNS)  # of the user's own
    writer = csv.DictWriter(text, [*COLUMNS, *more], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()
