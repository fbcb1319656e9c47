"""
The ``ray`` engine of the ``learning`` command: runs are tasks of a Ray cluster, on this machine or on many.

The CSV files are written by this process alone, so that the machines of a cluster need no common folder. They do need the
same version of this package. A run that fails, or whose worker dies, is repeated; where the workers see the folder of the
output, AGPO goes on from its last checkpoint, and everything else starts over.
"""

from __future__ import annotations

import traceback
import uuid
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import IO, Any

from sb3_agpo.benchmark import records
from sb3_agpo.benchmark.algorithms import find_algorithm
from sb3_agpo.benchmark.plan import BusyError, RunPlan, claimed, title
from sb3_agpo.benchmark.pool import progress_bar, say
from sb3_agpo.benchmark.ray_cluster import Queue, connected, ray
from sb3_agpo.benchmark.recovery import Recovery
from sb3_agpo.benchmark.run import complete_row, describe, learn, prepare

POLL = 0.2  # seconds between two looks at the cluster


def recovery_of(plan: RunPlan) -> Recovery:
    """
    Where a run keeps what another attempt of the same command goes on from.

    Another command may be of other code or versions, so its runs start over.

    :param plan: the run
    :return: beside the file of its rows
    """
    return Recovery(records.partial_folder(plan.output) / f"{plan.key.file_name}.{plan.command}.recovery")


def forget_other_commands(plan: RunPlan) -> None:
    """
    Remove what commands that were ended have left of a run, on the machine that writes the results.

    :param plan: the run, held by this process
    """
    for folder in records.partial_folder(plan.output).glob(f"{plan.key.file_name}.*.recovery"):
        Recovery(folder).forget()


def remote_run(index: int, attempt: int, plan: RunPlan, news: Queue) -> list[records.Row]:
    """
    Do a run in a worker of the cluster.

    :param index: of the run
    :param attempt: counts the attempts at it
    :param plan: the run
    :param news: takes (index, attempt, row) for every evaluation
    :return: all its rows
    """
    spec = prepare(plan)
    constants = describe(plan, spec)
    rows: list[records.Row] = []

    def record(numbers: dict[str, Any]) -> None:
        rows.append(complete_row(constants, numbers))
        news.put((index, attempt, rows[-1]))

    recovery = recovery_of(plan)
    learn(plan, spec, record, recovery)
    recovery.forget()  # here, as nobody else may see this machine's folder
    return rows


@dataclass
class RemoteRun:
    """A run of the cluster, as this process sees it."""

    plan: RunPlan
    file: IO[str]  # rows of the present attempt, held exclusively
    claim: ExitStack
    attempt: int = 0
    steps: int = 0  # that the progress bar has counted
    n_rows: int = 0  # in the file


class RayPool:
    """
    Does runs on a Ray cluster, and says how they go.

    :param plans: the runs
    :param processes: how many at the same time on a cluster that is started here
    :param address: of a running cluster; None to start one
    :param retries: how often to repeat a failed run
    """

    def __init__(self, plans: Sequence[RunPlan], processes: int, address: str | None, retries: int) -> None:
        command = uuid.uuid4().hex[:8]
        # Workers have folders of their own, so that relative paths would lead elsewhere.
        self.plans = [
            replace(plan, output=plan.output.resolve(), models=plan.models and plan.models.resolve(), command=command)
            for plan in plans
        ]
        self.processes, self.address, self.retries = processes, address, retries
        self.runs: dict[int, RemoteRun] = {}
        self.pending: dict[Any, int] = {}  # task -> index of its run
        self.failed = 0
        self.bar = progress_bar(plans)

    def work(self) -> int:
        """
        Do all the runs.

        :return: number of runs that failed
        :raises ValueError: if there is no cluster at the address
        """
        threads = self.plans[0].threads
        try:
            with connected(self.address, self.processes, threads):
                self.news = Queue(actor_options={"num_cpus": 0})
                # Repeated by us and not by Ray, which would do so silently; a worker serves one run, as a process does
                self.task = ray.remote(num_cpus=threads, max_retries=0, max_calls=1)(remote_run)
                for index, plan in enumerate(self.plans):
                    self._claim(index, plan)
                while self.pending:
                    finished, _ = ray.wait(list(self.pending), timeout=POLL)
                    self._hear()
                    for task in finished:
                        self._finish(task)
        finally:
            for run in self.runs.values():
                run.claim.close()
            self.bar.close()
        return self.failed

    def _claim(self, index: int, plan: RunPlan) -> None:
        """Start a run, unless another process is at it or has finished it."""
        spec = find_algorithm(plan.base, plan.n_envs, plan.overrides)
        claim = ExitStack()
        try:
            file = claim.enter_context(claimed(plan, spec.own))
        except BusyError as error:
            say(f"{title(plan)}: left out, {error}")
            self.bar.update(plan.key.budget)
            return
        records.remember_settings(plan.output, plan.key.settings, spec.settings())
        forget_other_commands(plan)
        self.runs[index] = RemoteRun(plan, file, claim)
        self._submit(index)

    def _submit(self, index: int) -> None:
        """Start an attempt at a run."""
        run = self.runs[index]
        run.file.truncate(0)  # only now are the rows of an earlier attempt given up
        run.n_rows = 0
        self.pending[self.task.remote(index, run.attempt, run.plan, self.news)] = index

    def _hear(self) -> None:
        """Take the rows that have arrived: into the runs' own files, for ``report --live``, and to the terminal."""
        for index, attempt, row in self.news.get_nowait_batch(self.news.qsize()):
            run = self.runs.get(index)
            if run is None or attempt != run.attempt:
                continue
            run.file.write(records.to_csv([row], header=run.n_rows == 0))
            run.file.flush()
            run.n_rows += 1
            steps = min(int(row["steps"]), run.plan.key.budget)
            if steps > run.steps or run.plan.key.budget == 0:
                say(f"{title(run.plan)}: return {float(row['return']):.1f} after {row['steps']} steps")
                self.bar.update(steps - run.steps)
                run.steps = steps

    def _finish(self, task: Any) -> None:
        """Keep the rows of a finished run, or try again."""
        index = self.pending.pop(task)
        run = self.runs[index]
        try:
            rows = ray.get(task)
        except ray.exceptions.RayError as error:
            reason = str(error).strip().splitlines()[-1]
            if run.attempt < self.retries:
                run.attempt += 1
                say(f"{title(run.plan)}: failed ({reason}); attempt {run.attempt + 1} of {self.retries + 1}")
                self._submit(index)
                return
            self.failed += 1
            say(f"{title(run.plan)}: FAILED\n{''.join(traceback.format_exception_only(error))}".rstrip())
        else:
            records.merge_run(run.plan.output, run.plan.key, rows, run.plan.replaced)
            records.partial_path(run.plan.output, run.plan.key).unlink()
            recovery_of(run.plan).forget()
        run.claim.close()
        del self.runs[index]
        self.bar.update(run.plan.key.budget - run.steps)
