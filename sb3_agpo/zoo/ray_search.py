"""
``optimize_on_ray``: the zoo's search for hyperparameters, each trial a task of a Ray cluster, on this machine or on many.

The trials of a study meet in its storage, which all machines must reach. A trial whose worker dies is marked as failed, and
another one takes its place.
"""

from __future__ import annotations

import argparse
import io
import os
import sys
import uuid
from collections.abc import Sequence
from contextlib import redirect_stderr
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import optuna
from optuna.storages.journal import JournalFileBackend
from optuna.trial import FrozenTrial, TrialState

from sb3_agpo.benchmark.ray_cluster import connected, ray
from sb3_agpo.command_line import EXIT_USAGE, check_at_least
from sb3_agpo.zoo.manager import AGPOExperimentManager
from sb3_agpo.zoo.registration import register
from sb3_agpo.zoo.scripts import PROGRAM, RAY_SEARCH, command_line

EXIT_FAILED = 1
WORKER = "worker"  # attribute of a trial: which of our tasks does it


class Refused(argparse.Action):
    """An option of the zoo that has no meaning here; ``const`` is the one to use instead."""

    def __call__(self, parser: argparse.ArgumentParser, *arguments: Any, **named: Any) -> None:
        """
        End the program with a message.

        :param parser: of the command line
        :param arguments: see ``argparse``
        :param named: likewise
        """
        parser.error(f"{self.option_strings[0]} is not for searches on Ray; use {self.const}")


def make_parser() -> argparse.ArgumentParser:
    """
    Define the options that are not the zoo's, and those of the zoo that are needed here.

    :return: the parser
    """
    parser = argparse.ArgumentParser(
        f"{PROGRAM} {RAY_SEARCH}",
        description=__doc__.strip().split("\n")[0] if __doc__ else None,
        epilog=f"All other arguments are those of `{PROGRAM} optimize`.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--storage", required=True, help="of the study: a journal file (study.log) or the URL of a database")
    add("--study-name", required=True, help="name of the study, which is made if it does not exist")
    add("--n-trials", type=int, required=True, help="trials to add, over all workers")
    add("--processes", type=int, default=1, help="trials at the same time on a cluster started here (default: 1)")
    add("--address", metavar="HOST:PORT", help="Ray cluster to run on, as many trials at a time as it has room for "
        "(default: a cluster of --processes workers is started here)")  # fmt: skip
    add("--retries", type=int, default=2, help="how often to replace a failed trial by another one (default: %(default)s)")
    add("--num-threads", type=int, default=1, help="threads of each trial (default: 1)")
    add("--seed", type=int, default=-1, help="of the first trial; the others count up from it (default: random)")
    add("--n-jobs", action=Refused, nargs="?", const="--processes", help=argparse.SUPPRESS)
    add("--max-total-trials", action=Refused, nargs="?", const="--n-trials", help=argparse.SUPPRESS)
    return parser


def absolute_storage(storage: str) -> str:
    """
    Make the path of a storage in a file absolute, so that workers in other folders find it.

    :param storage: as given to the zoo
    :return: likewise
    """
    sqlite = "sqlite:///"
    if storage.endswith(".log"):
        return str(Path(storage).resolve())
    if storage.startswith(sqlite):
        return f"{sqlite}{Path(storage.removeprefix(sqlite)).resolve()}"
    return storage


def open_storage(storage: str) -> optuna.storages.BaseStorage:
    """
    Open a storage, as the zoo does: names that end with ``.log`` are journals.

    :param storage: as given to the zoo
    :return: the storage
    """
    if not storage.endswith(".log"):
        return optuna.storages.get_storage(storage)
    return optuna.storages.JournalStorage(JournalFileBackend(storage))


def make_study(storage: str, name: str) -> optuna.Study:
    """
    Make a study, or open it if it exists.

    :param storage: as given to the zoo
    :param name: of the study
    :return: the study
    :raises ValueError: if the storage cannot be opened
    """
    try:
        if storage.endswith(".log"):
            Path(storage).parent.mkdir(parents=True, exist_ok=True)
        return optuna.create_study(storage=open_storage(storage), study_name=name, direction="maximize", load_if_exists=True)
    except Exception as error:  # each kind of storage has errors of its own
        reason = str(error).strip().partition("\n")[0]
        raise ValueError(
            f"--storage {storage} cannot be opened ({type(error).__name__}: {reason}); "
            "give a journal such as study.log, sqlite:///study.db or the URL of a database server"
        ) from error


class OneTrialManager(AGPOExperimentManager):
    """
    The zoo's experiments, with a search that adds one trial to an existing study and writes no report.

    :param arguments: see ``rl_zoo3.exp_manager.ExperimentManager``
    :param worker: written to the trial
    :param named: likewise
    """

    def __init__(self, *arguments: Any, worker: str, **named: Any) -> None:
        super().__init__(*arguments, **named)
        self.worker = worker

    def hyperparameters_optimization(self) -> None:
        """Do a trial."""
        assert self.storage is not None
        study = optuna.load_study(
            study_name=self.study_name,
            storage=open_storage(self.storage),
            sampler=self._create_sampler(self.sampler),
            pruner=self._create_pruner(self.pruner),
        )
        study.optimize(self._marked_objective, n_trials=1)

    def _marked_objective(self, trial: optuna.Trial) -> float:
        trial.set_user_attr(WORKER, self.worker)
        return float(self.objective(trial))


def remote_trial(folder: Path, arguments: list[str], worker: str) -> None:
    """
    Do a trial in a worker of the cluster.

    :param folder: what relative paths in the arguments start from, where this machine has it
    :param arguments: of the zoo's ``train``
    :param worker: written to the trial
    :raises ValueError: if the zoo refuses the arguments
    """
    register()
    import rl_zoo3.train

    rl_zoo3.train.ExperimentManager = partial(OneTrialManager, worker=worker)  # type: ignore[assignment,misc]
    if folder.is_dir():
        os.chdir(folder)
    said = io.StringIO()
    try:
        # What the zoo logs of a search is a folder with no agent in it, which it would later take for the latest experiment
        with TemporaryDirectory() as logs, redirect_stderr(said):
            with command_line([f"{PROGRAM} {RAY_SEARCH}", *arguments, "--log-folder", logs]):
                rl_zoo3.train.train()
    except SystemExit as end:
        raise ValueError(said.getvalue().strip().splitlines()[-1] if said.getvalue() else f"exit code {end.code}") from end


class RaySearch:
    """
    Adds trials to a study on a Ray cluster, and says how they go.

    :param options: see :func:`make_parser`
    :param arguments: all others, for the zoo
    :raises ValueError: if the storage cannot be opened
    """

    def __init__(self, options: argparse.Namespace, arguments: Sequence[str]) -> None:
        self.options, self.folder = options, Path.cwd()
        self.storage = absolute_storage(options.storage)
        # Here, as two workers that make it at the same time get into each other's way
        self.study = make_study(self.storage, options.study_name)
        if "command" not in self.study.user_attrs:  # as the zoo does
            self.study.set_user_attr("command", " ".join(sys.orig_argv))
        self.arguments = [
            "-optimize", *arguments, "--storage", self.storage, "--study-name", options.study_name,
            "--num-threads", str(options.num_threads),
        ]  # fmt: skip
        self.name = uuid.uuid4().hex[:8]
        # With the seed of an earlier trial it would draw the same, so they count up, also from one command to the next
        self.next_seed = options.seed + len(self.study.get_trials(deepcopy=False))
        self.n_begun = 0
        self.attempts: list[int] = [0] * options.n_trials  # of those that are to be begun
        self.pending: dict[Any, tuple[str, int]] = {}  # task -> worker and attempt
        self.n_finished = self.n_failed = 0

    def work(self) -> int:
        """
        Do all the trials.

        :return: number of trials that are missing in the end
        :raises ValueError: if there is no cluster at the address
        """
        threads = self.options.num_threads
        try:
            with connected(self.options.address, self.options.processes, threads):
                # A worker does one trial, so that nothing of it is left for the next one
                self.task = ray.remote(num_cpus=threads, max_retries=0, max_calls=1)(remote_trial)
                room = max(1, int(ray.cluster_resources().get("CPU", 0)) // threads)
                while self.pending or (self.attempts and not self.n_failed):
                    # After a failure in spite of all attempts others would hardly fare better
                    while self.attempts and len(self.pending) < room and not self.n_failed:
                        self._begin(self.attempts.pop())
                    finished, _ = ray.wait(list(self.pending))
                    for task in finished:
                        self._finish(task)
        finally:
            for worker, _ in self.pending.values():  # which have been ended with the connection
                self._close(worker)
        return self.options.n_trials - self.n_finished

    def _begin(self, attempt: int) -> None:
        """Start a trial."""
        worker = f"{self.name}-{self.n_begun}"
        seed = self.next_seed + self.n_begun if self.options.seed >= 0 else -1
        task = self.task.remote(self.folder, [*self.arguments, "--seed", str(seed)], worker)
        self.pending[task] = worker, attempt
        self.n_begun += 1

    def _finish(self, task: Any) -> None:
        """Say how a trial went, and replace it if it failed."""
        worker, attempt = self.pending.pop(task)
        trial = self._close(worker)
        title = f"trial {trial.number}" if trial else "a trial"
        try:
            ray.get(task)
        except ray.exceptions.RayError as error:
            reason = str(error).strip().splitlines()[-1]
            if attempt < self.options.retries:
                print(f"{title}: failed ({reason}); attempt {attempt + 2} of {self.options.retries + 1}", flush=True)
                self.attempts.append(attempt + 1)
            else:
                self.n_failed += 1
                print(f"{title}: FAILED ({reason})", flush=True)
            return
        self.n_finished += 1
        assert trial is not None
        value = "" if trial.value is None else f", return {trial.value:.1f}"
        print(f"{title}: {trial.state.name.lower()}{value} ({self.n_finished} of {self.options.n_trials})", flush=True)

    def _close(self, worker: str) -> FrozenTrial | None:
        """
        Find the trial of a worker that has ended; if it was cut off, mark it as failed.

        :param worker: of the trial
        :return: the trial; None if the worker had not begun it
        """
        found = [trial for trial in self.study.get_trials(deepcopy=False) if trial.user_attrs.get(WORKER) == worker]
        if found and found[0].state == TrialState.RUNNING:
            self.study.tell(found[0].number, state=TrialState.FAIL)
        return found[0] if found else None


def report(study: optuna.Study) -> None:
    """
    Print the best trial of a study.

    :param study: the study
    """
    trials = study.get_trials(deepcopy=False)
    complete = [trial for trial in trials if trial.state == TrialState.COMPLETE]
    print(f"{study.study_name}: {len(trials)} trials, {len(complete)} complete")
    if not complete:
        return
    best = study.best_trial
    print(f"best: trial {best.number}, return {best.value:.1f}; train with --trial-id {best.number}")
    for name, value in best.params.items():
        print(f"    {name}: {value}")


def main(arguments: Sequence[str]) -> int:
    """
    Run the command.

    :param arguments: of the command line
    :return: exit code: 1 if trials are missing in the end, 2 if there is no such storage or cluster
    """
    parser = make_parser()
    options, others = parser.parse_known_args(arguments)
    try:
        check_at_least(1, options, "n_trials", "processes", "num_threads")
        check_at_least(0, options, "retries")
    except ValueError as error:
        parser.error(str(error))
    try:
        search = RaySearch(options, others)
        missing = search.work()
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_USAGE
    report(search.study)
    if missing:
        print(f"{missing} of {options.n_trials} trials are missing; the same command with --n-trials {missing} adds them",
              file=sys.stderr)  # fmt: skip
    return EXIT_FAILED if missing else 0
