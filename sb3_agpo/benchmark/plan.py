"""A run of the learning benchmark that is to be done, and holding it against other processes."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from sb3_agpo.benchmark import records
from sb3_agpo.benchmark.records import RunKey


@dataclass(frozen=True)
class RunPlan:
    """
    A run to be done; small enough to be sent to another process.

    :param key: algorithm column, environment, seed, settings and budget
    :param base: name of the algorithm that ``overrides`` change
    :param output: CSV file of finished runs
    :param eval_every: environment steps between evaluations
    :param threads: torch threads
    :param n_envs: number of training environments; None: the algorithm's own
    :param overrides: constructor arguments to change
    :param models: folder to save models to; None: do not
    :param save_at: environment steps at which to save; empty: at the end
    :param command: identifies the command that does it, on every machine; empty where no other machine takes part
    :param replaced: runs of the file of finished runs whose place it takes
    """

    key: RunKey
    base: str
    output: Path
    eval_every: int
    threads: int = 1
    n_envs: int | None = None
    overrides: Mapping[str, Any] = field(default_factory=dict)
    models: Path | None = None
    save_at: tuple[int, ...] = ()
    command: str = ""
    replaced: frozenset[RunKey] = frozenset()


def title(plan: RunPlan) -> str:
    """
    Name a run for people.

    :param plan: the run
    :return: text
    """
    return f"{plan.key.algorithm} on {plan.key.env}, seed {plan.key.seed}"


def counterparts(key: RunKey, finished: list[records.Row]) -> list[records.Row]:
    """
    Find what a run is to be compared with.

    :param key: the run
    :param finished: rows of the file
    :return: its own rows; if there are none, those of runs that differ from it in their settings alone
    """
    own = [row for row in finished if records.key_of(row) == key]
    return own or [row for row in finished if records.key_of(row)._replace(settings="") == key._replace(settings="")]


def differences(plan: RunPlan, own: bool, finished: list[records.Row]) -> str | None:
    """
    Compare a run with those in the file.

    :param plan: the run
    :param own: whether this package's version matters to its results
    :param finished: rows of the file
    :return: None if the run is not in the file; else what differs, empty if nothing does
    """
    same = counterparts(plan.key, finished)
    if not same:
        return None
    columns = [column for column in records.VERSION_COLUMNS if own or column != "sb3_agpo"]
    now = {**records.versions(), "settings": plan.key.settings}
    changed = []
    for column in [*columns, "settings"]:
        if then := sorted({row[column] for row in same} - {now[column]}):
            changed.append(f"{column} was {', '.join(then)}, is {now[column]}")
    # The random policy is evaluated once, whatever the interval.
    if plan.key.budget and (intervals := sorted({row["eval_every"] for row in same} - {str(plan.eval_every)})):
        changed.append(f"--eval-every was {', '.join(intervals)}, is {plan.eval_every}")
    return "; ".join(changed)


class BusyError(RuntimeError):
    """Another process is at the same run, or has finished it."""


def _finished_meanwhile(plan: RunPlan, own: bool) -> bool:
    """Whether a run has come into the file of finished runs since it was planned."""
    rows = [row for row in records.read_rows(plan.output) if records.key_of(row) == plan.key]
    return bool(rows) and not (plan.key in plan.replaced and differences(plan, own, rows))


@contextmanager
def claimed(plan: RunPlan, own: bool) -> Iterator[IO[str]]:
    """
    Hold a run, so that no other process does it meanwhile.

    :param plan: the run
    :param own: whether this package's version matters to its results
    :return: context with the run's own file, open for writing
    :raises BusyError: if another process holds it, or has finished it since it was planned
    """
    path = records.partial_path(plan.output, plan.key)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise BusyError("another process is at it") from None
        # Whoever finishes a run removes its file: what is locked here may be no longer there, or another one by now.
        if not (path.exists() and os.path.samestat(os.fstat(file.fileno()), path.stat())):
            raise BusyError("another process was at it")
        if _finished_meanwhile(plan, own):
            path.unlink()
            raise BusyError("another process has finished it")
        yield file
