"""The ``processes`` engine of the ``learning`` command: each run in a process of its own on this machine."""

from __future__ import annotations

import multiprocessing
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from typing import NoReturn

from tqdm import tqdm

from sb3_agpo.benchmark.plan import RunPlan, title
from sb3_agpo.benchmark.run import EXIT_BUSY, child

# Read by the numerical libraries when they are loaded, so they have to be set before a run's process starts.
THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")


def progress_bar(plans: Sequence[RunPlan]) -> tqdm[NoReturn]:
    """
    A bar of environment steps, shown on terminals alone.

    :param plans: the runs
    :return: the bar
    """
    total = sum(plan.key.budget for plan in plans)
    return tqdm(total=total, unit="step", unit_scale=True, disable=not sys.stderr.isatty())


def say(text: str) -> None:
    """
    Print a line above the bar.

    :param text: the line
    """
    tqdm.write(text)
    sys.stdout.flush()


@dataclass
class Running:
    """A run in progress, as its parent sees it."""

    plan: RunPlan
    process: SpawnProcess
    steps: int = 0
    error: str = ""


class Pool:
    """
    Does runs, each in a process of its own, and says how they go.

    :param plans: the runs
    :param processes: how many at the same time
    """

    def __init__(self, plans: Sequence[RunPlan], processes: int) -> None:
        self.waiting = list(reversed(plans))
        self.processes = processes
        self.running: dict[Connection, Running] = {}
        self.failed = 0
        self.bar = progress_bar(plans)

    def work(self) -> int:
        """
        Do all the runs.

        :return: number of runs that failed
        """
        try:
            while self.waiting or self.running:
                while self.waiting and len(self.running) < self.processes:
                    self._start(self.waiting.pop())
                for connection in wait(list(self.running)):
                    assert isinstance(connection, Connection)
                    self._receive(connection)
        finally:
            for running in self.running.values():
                running.process.terminate()
            self.bar.close()
        return self.failed

    def _start(self, plan: RunPlan) -> None:
        context = multiprocessing.get_context("spawn")
        receiver, sender = context.Pipe(duplex=False)
        # Not a daemon: an algorithm may want processes of its own.
        process = context.Process(target=child, args=(plan, sender), daemon=False)
        with thread_variables(plan.threads):
            process.start()
        sender.close()  # so that the pipe ends with the child
        self.running[receiver] = Running(plan, process)

    def _receive(self, connection: Connection) -> None:
        running = self.running[connection]
        try:
            message = connection.recv()
        except EOFError:
            del self.running[connection]
            self._finish(running)
            return
        if isinstance(message, str):
            running.error = message
            return
        say(
            f"{title(running.plan)}: return {float(message['return']):.1f} +- {float(message['return_std']):.1f} "
            f"after {message['steps']} steps, {float(message['seconds']):.0f} s"
        )
        self.bar.update(min(int(message["steps"]), running.plan.key.budget) - running.steps)
        running.steps = min(int(message["steps"]), running.plan.key.budget)

    def _finish(self, running: Running) -> None:
        running.process.join()
        code = running.process.exitcode
        if code == EXIT_BUSY:
            say(f"{title(running.plan)}: left out, {running.error}")
        elif code != 0:
            self.failed += 1
            say(f"{title(running.plan)}: FAILED, exit code {code}\n{running.error}".rstrip())
        self.bar.update(running.plan.key.budget - running.steps)


@contextmanager
def thread_variables(threads: int) -> Iterator[None]:
    """
    Set the environment variables that limit threads, for processes started meanwhile.

    :param threads: the limit
    """
    before = {name: os.environ.get(name) for name in THREAD_VARIABLES}
    os.environ.update(dict.fromkeys(THREAD_VARIABLES, str(threads)))
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
