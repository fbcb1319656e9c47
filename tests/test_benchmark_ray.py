"""The benchmark on a real Ray cluster of this machine, and runs that go on after a failure."""

from __future__ import annotations

import functools
import json
import os
import signal
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from stable_baselines3.common.vec_env import DummyVecEnv

from sb3_agpo.benchmark import records
from sb3_agpo.benchmark.__main__ import main
from sb3_agpo.benchmark.algorithms import find_algorithm
from sb3_agpo.benchmark.plan import RunPlan
from sb3_agpo.benchmark.records import RunKey
from sb3_agpo.benchmark.recovery import Recovery
from sb3_agpo.benchmark.run import learn

TASK = "InvertedPendulum-v5"
SETTINGS: dict[str, Any] = {
    "policy_kwargs.net_arch": [8],
    "batch_size": 8,
    "train_freq": 4,
    "buffer_size": 1000,
    "learning_starts": 50,
}
#: columns that may differ: times, and the state of the repository, in which somebody may be working
TIMING = {"seconds", "cpu_seconds", "git_commit"}


def without_timing(rows: list[records.Row]) -> list[dict[str, str]]:
    """Rows without what is different each time, in an order of their own."""
    plain = [{column: value for column, value in row.items() if column not in TIMING} for row in rows]
    return sorted(plain, key=lambda row: (row["algorithm"], row["seed"], int(row["steps"])))


# ---------------------------------------------------------------------- going on


class PowerCut(Exception):
    """Ends a run in the middle."""


def numbers_of(name: str, recovery: Recovery | None, fail_after: int | None = None) -> list[dict[str, Any]]:
    """Evaluations of a run of 600 steps, one every 150; fails after a number of them."""
    spec = find_algorithm(name, overrides=SETTINGS)
    plan = RunPlan(RunKey(name, TASK, 3, spec.settings_hash(), 600), name, Path("unused.csv"), 150, overrides=SETTINGS)
    numbers: list[dict[str, Any]] = []

    def record(found: dict[str, Any]) -> None:
        if len(numbers) == fail_after:
            raise PowerCut
        numbers.append(found)

    if fail_after is None:
        learn(plan, spec, record, recovery)
    else:
        with pytest.raises(PowerCut):
            learn(plan, spec, record, recovery)
    return numbers


@pytest.mark.parametrize("name", ["agpo-adaptive", "sac"])
def test_interrupted_run_equals_one_that_was_not(name: str, tmp_path: Path) -> None:
    """Bit for bit; AGPO goes on from its last checkpoint, SAC starts over."""
    from stable_baselines3.common.env_util import make_vec_env

    whole = numbers_of(name, None)
    recovery = Recovery(tmp_path / "recovery")
    begun = numbers_of(name, recovery, fail_after=2)
    left = recovery.resume(make_vec_env(TASK, seed=3))
    assert (left is not None and left.num_timesteps >= 300) if name == "agpo-adaptive" else left is None
    finished = numbers_of(name, recovery)
    assert [numbers["steps"] for numbers in finished] == [150, 300, 450, 600]
    for one, other in zip(whole, finished, strict=True):
        assert {**one, "seconds": 0, "cpu_seconds": 0} == {**other, "seconds": 0, "cpu_seconds": 0}
    if name == "agpo-adaptive":
        assert finished[:2] == begun  # with the time that they took then
    seconds = [numbers["seconds"] for numbers in finished]
    assert seconds == sorted(seconds)
    recovery.forget()
    assert not list(tmp_path.iterdir())


def test_run_interrupted_after_its_last_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The evaluation at the end is made again and is there once, with the time that it took, and the model is saved again."""
    spec = find_algorithm("agpo-adaptive", overrides=SETTINGS)
    key = RunKey("agpo-adaptive", TASK, 3, spec.settings_hash(), 300)
    plan = RunPlan(key, "agpo-adaptive", Path("unused.csv"), 150, overrides=SETTINGS, models=tmp_path / "models")
    recovery = Recovery(tmp_path / "recovery")

    def cut(*_: Any) -> None:
        raise PowerCut

    first: list[dict[str, Any]] = []
    with monkeypatch.context() as patch:
        patch.setattr(DummyVecEnv, "close", cut)
        with pytest.raises(PowerCut):
            learn(plan, spec, first.append, recovery)
    assert [numbers["steps"] for numbers in first] == [150, 300]
    (model,) = (tmp_path / "models").iterdir()
    model.unlink()
    again: list[dict[str, Any]] = []
    learn(plan, spec, again.append, recovery)
    assert [(numbers["steps"], numbers["return"]) for numbers in again] == [(n["steps"], n["return"]) for n in first]
    assert again[-1]["seconds"] >= first[-1]["seconds"]
    assert list((tmp_path / "models").iterdir()) == [model]


def test_useless_checkpoint_is_started_over(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recovery = Recovery(tmp_path)
    numbers_of("agpo-adaptive", recovery, fail_after=2)
    for path in recovery.checkpoints.rglob("*"):
        if path.is_file():
            path.write_bytes(b"")
    assert [numbers["steps"] for numbers in numbers_of("agpo-adaptive", recovery)] == [150, 300, 450, 600]
    assert "starting over" in capsys.readouterr().err


# ---------------------------------------------------------------------- Ray


class News:
    """Takes the place of Ray's queue, and fails after a number of evaluations."""

    def __init__(self, fail_after: int | None = None) -> None:
        self.heard, self.fail_after = 0, fail_after

    def put(self, _: Any) -> None:
        """Take news."""
        if self.heard == self.fail_after:
            raise PowerCut
        self.heard += 1


def test_attempts_go_on_within_a_command_only(tmp_path: Path) -> None:
    """A worker that shares no folder with the command goes on from its own checkpoint, once, and leaves nothing behind."""
    pytest.importorskip("ray")
    from sb3_agpo.benchmark.ray_engine import forget_other_commands, recovery_of, remote_run

    spec = find_algorithm("agpo-adaptive", overrides=SETTINGS)
    key = RunKey("agpo-adaptive", TASK, 3, spec.settings_hash(), 450)
    plan = RunPlan(key, "agpo-adaptive", tmp_path / "learning.csv", 150, overrides=SETTINGS, command="first")
    with pytest.raises(PowerCut):
        remote_run(0, 0, plan, News(fail_after=1))  # type: ignore[arg-type]
    evaluations = recovery_of(plan).evaluations
    begun = [json.loads(line) for line in evaluations.read_text().splitlines()]
    assert [numbers["steps"] for numbers in begun] == [150, 300]
    begun[0]["seconds"] = 1234.0  # how the first attempt's evaluation is told from one of another attempt
    evaluations.write_text("".join(f"{json.dumps(numbers)}\n" for numbers in begun))
    other = replace(plan, command="second")
    started_over = remote_run(0, 0, other, News())  # type: ignore[arg-type]
    assert float(started_over[0]["seconds"]) < 1234.0
    assert not recovery_of(other).folder.exists() and recovery_of(plan).folder.exists()
    went_on = remote_run(0, 1, plan, News())  # type: ignore[arg-type]
    assert float(went_on[0]["seconds"]) == 1234.0
    assert without_timing(went_on) == without_timing(started_over)
    folder = records.partial_folder(plan.output)
    assert not list(folder.iterdir())
    longer = replace(plan, key=key._replace(budget=4500))
    for left in (other, longer):
        recovery_of(left).checkpoints.mkdir(parents=True)
    forget_other_commands(plan)
    assert list(folder.iterdir()) == [recovery_of(longer).folder]


def command(output: Path, *changes: str) -> list[str]:
    """Command line of two small runs of AGPO and one of SAC."""
    settings = [f"{key}={value!r}" for key, value in SETTINGS.items()]
    return [
        "learning", "--algorithms", "agpo-adaptive", "--envs", TASK, "--seeds", "0-1", "--steps", "1200",
        "--eval-every", "150", "--processes", "2", "--output", str(output), "--set", *settings, *changes,
    ]  # fmt: skip


@pytest.mark.slow
def test_killed_worker_changes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A cluster of two workers, one of which is killed: the same rows as from the plain engine, nothing left behind."""
    pytest.importorskip("ray")
    from sb3_agpo.benchmark import ray_engine

    plain, distributed = tmp_path / "plain.csv", tmp_path / "ray.csv"
    assert main(command(plain)) == 0
    remote_run = ray_engine.remote_run

    def killed_once(index: int, attempt: int, plan: RunPlan, news: Any) -> list[records.Row]:
        """Do a run; the worker of the first one is killed when it has told two evaluations, with a checkpoint in between."""

        def put(told: tuple[int, int, records.Row]) -> None:
            news.put(told)
            if (index, attempt, told[2]["steps"]) == (0, 0, "300"):
                assert list(ray_engine.recovery_of(plan).checkpoints.glob("*-step-150"))
                os.kill(os.getpid(), signal.SIGKILL)

        return remote_run(index, attempt, plan, SimpleNamespace(put=put))

    monkeypatch.setattr(ray_engine, "remote_run", killed_once)
    assert main(command(distributed, "--engine", "ray")) == 0
    assert capsys.readouterr().out.count("attempt 2 of 3") == 1
    rows = records.read_rows(distributed)
    assert len(rows) == 2 * 8
    assert without_timing(rows) == without_timing(records.read_rows(plain))
    assert records.settings_path(distributed).read_text() == records.settings_path(plain).read_text()
    assert [path.name for path in records.partial_folder(distributed).iterdir()] == [".lock"]


@pytest.mark.slow
def test_failing_run_is_repeated_and_reported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("ray")
    arguments = command(tmp_path / "ray.csv", "learning_rate='nonsense'", "--seeds", "0", "--engine", "ray", "--retries", "1")
    assert main(arguments) == 1
    output = capsys.readouterr().out
    assert output.count("attempt 2 of 2") == 1 and "FAILED" in output and "nonsense" in output


@pytest.mark.parametrize("address", ["auto", "127.0.0.1:1", "nonsense"])
def test_no_cluster_at_the_address(
    address: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("ray")
    from ray._private import services

    # "auto" would find the cluster of another test that runs at the same time
    monkeypatch.setattr(services, "find_gcs_addresses", functools.cache(set))
    monkeypatch.setattr(services, "find_bootstrap_address", lambda folder: None)
    assert main(command(tmp_path / "ray.csv", "--engine", "ray", "--address", address)) == 2
    assert f"error: --address {address}: there is no Ray cluster (" in capsys.readouterr().err


@pytest.mark.slow
def test_cluster_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without --address one is started here, whatever RAY_ADDRESS says; models lie in this process's folder."""
    pytest.importorskip("ray")
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    short = ["--algorithms", "sac", "--seeds", "0", "--steps", "150", "--models", "models"]
    assert main(command(tmp_path / "ray.csv", "--engine", "ray", *short)) == 0
    assert [path.name for path in Path("models").iterdir()] == [f"sac-{TASK}-0-150.zip"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [(["--address", "somewhere:6379"], "add --engine ray"), (["--retries", "-1"], "--retries is -1")],
)
def test_wrong_options(changes: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(command(tmp_path / "ray.csv", *changes)) == 2
    assert message in capsys.readouterr().err
