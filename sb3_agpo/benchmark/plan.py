"""A run of the learning benchmark that is to be done, and holding it against other processes."""

from __future__ import annotations

import fcntl
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


def title(plan: RunPlan) -> str:
    """
    Name a run for people.

    :param plan: the run
    :return: text
    """
    return f"{plan.key.algorithm} on {plan.key.env}, seed {plan.key.seed}"


class BusyError(RuntimeError):
    """Another process is at the same run."""


@contextmanager
def claimed(plan: RunPlan) -> Iterator[IO[str]]:
    """
    Hold a run, so that no other process does it meanwhile.

    :param plan: the run
    :return: context with the run's own file, open for writing
    :raises BusyError: if another process holds it
    """
    path = records.partial_path(plan.output, plan.key)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise BusyError from None
        if not path.exists():
            raise BusyError  # another process finished the run between the opening and the locking
        yield file
