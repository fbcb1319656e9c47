"""The zoo's search with its trials on a real Ray cluster of this machine."""

import functools
import os
import signal
from pathlib import Path
from typing import Any

import optuna
import pytest
from optuna.trial import TrialState
from zoo_runs import QUICK, SMALL

from sb3_agpo.zoo.scripts import main

pytest.importorskip("ray")
from sb3_agpo.zoo import ray_search  # needs Ray
from sb3_agpo.zoo.ray_search import absolute_storage, open_storage


@pytest.fixture(autouse=True)
def no_plots(monkeypatch: pytest.MonkeyPatch) -> None:
    """No figures in windows."""
    monkeypatch.setenv("MPLBACKEND", "agg")


def command(journal: Path, *changes: str) -> list[str]:
    """Command line of a small search."""
    return [
        "optimize_on_ray", *QUICK, "--storage", str(journal), "--study-name", "agpo", "-n", "150", "--n-evaluations", "1",
        "-f", str(journal.parent / "logs"),
        "--eval-episodes", "1", "--pruner", "none", "--sampler", "random", *changes, "-params", *SMALL,
    ]  # fmt: skip


@pytest.mark.slow
def test_trial_of_a_killed_worker_is_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """All trials are there in the end, and the one that was cut off does not count as running."""
    journal, remote_trial = tmp_path / "study.log", ray_search.remote_trial

    def killed_once(folder: Path, arguments: list[str], worker: str) -> None:
        """Do a trial; the worker of the first one is killed when its agent is to learn."""
        if worker.endswith("-0"):
            from sb3_agpo import AGPO

            def learn(*_: Any, **__: Any) -> None:
                os.kill(os.getpid(), signal.SIGKILL)

            AGPO.learn = learn  # type: ignore[assignment, method-assign]
        remote_trial(folder, arguments, worker)

    monkeypatch.setattr(ray_search, "remote_trial", killed_once)
    assert main(command(journal, "--n-trials", "2", "--processes", "1")) == 0
    output = capsys.readouterr().out
    assert output.count("attempt 2 of 3") == 1 and "(2 of 2)" in output and "train with --trial-id" in output
    trials = optuna.load_study(study_name="agpo", storage=open_storage(str(journal))).trials
    states = [trial.state for trial in trials]
    assert sorted(states) == sorted([TrialState.FAIL, *[TrialState.COMPLETE] * 2])
    drawn = [trial.params["learning_rate"] for trial in trials]
    assert len(set(drawn)) == len(drawn)  # each with a seed of its own
    assert not (tmp_path / "logs").exists()  # where `enjoy` would look for an agent


@pytest.mark.slow
def test_search_that_cannot_work_ends(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """After the attempts at one trial no others are begun."""
    assert main(command(tmp_path / "study.log", "--n-trials", "9", "--retries", "0", "--optimise-fast")) == 1
    printed = capsys.readouterr()
    assert printed.out.count("unrecognized arguments: --optimise-fast") == 1
    assert "9 of 9 trials are missing" in printed.err


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["--n-trials", "0"], "--n-trials is 0"),
        (["--n-trials", "2", "--retries", "-1"], "--retries is -1"),
        (["--n-trials", "2", "--n-jobs", "2"], "use --processes"),
        (["--max-total-trials", "2"], "use --n-trials"),
    ],
)
def test_wrong_options(changes: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(command(tmp_path / "study.log", *changes))
    assert message in capsys.readouterr().err
    assert not (tmp_path / "study.log").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["--storage", "nonsense"], "--storage nonsense cannot be opened (ArgumentError: "),
        (["--storage", "sqlite:///no/such/folder/study.db"], "cannot be opened (OperationalError: "),
        (["--storage", f"{__file__}/study.log"], "cannot be opened (FileExistsError: "),
        (["--address", "auto"], "--address auto: there is no Ray cluster (Could not find any running Ray instance"),
    ],
)
def test_what_cannot_be_reached(
    changes: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from ray._private import services

    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    # "auto" would find the cluster of another test that runs at the same time
    monkeypatch.setattr(services, "find_gcs_addresses", functools.cache(set))
    monkeypatch.setattr(services, "find_bootstrap_address", lambda folder: None)
    assert main([*command(tmp_path / "study.log", "--n-trials", "1"), *changes]) == 2
    assert f"error: {changes[0]}" in (printed := capsys.readouterr().err) and message in printed


def test_storages_are_found_from_other_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert absolute_storage("logs/study.log") == str(tmp_path / "logs/study.log")
    assert absolute_storage("sqlite:///study.db") == f"sqlite:///{tmp_path}/study.db"
    assert absolute_storage("postgresql://server/studies") == "postgresql://server/studies"
