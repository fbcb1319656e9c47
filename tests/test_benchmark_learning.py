"""The benchmark's ``learning`` command, with small real runs."""

from __future__ import annotations

import argparse
import fcntl
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from stable_baselines3 import SAC
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.utils import LinearSchedule
from stable_baselines3.common.vec_env import SubprocVecEnv
from torch import nn

import sb3_agpo
from sb3_agpo.agpo.agpo import POLICY_DELAY_BESIDE_WINDOWS
from sb3_agpo.agpo.gates import DEFAULT_GATE
from sb3_agpo.benchmark import clock as clock_module
from sb3_agpo.benchmark import learning, records
from sb3_agpo.benchmark.__main__ import main
from sb3_agpo.benchmark.algorithms import (
    NAMES,
    AlgorithmSpec,
    LayerNormSACPolicy,
    check_arguments,
    find_algorithm,
    torch_module,
)
from sb3_agpo.benchmark.clock import LearningClock
from sb3_agpo.benchmark.plan import BusyError, RunPlan, claimed, differences
from sb3_agpo.benchmark.records import RunKey
from sb3_agpo.benchmark.run import Evaluator, learn

TASK = "InvertedPendulum-v5"
TINY = ["policy_kwargs.net_arch=[8]", "batch_size=8", "train_freq=4", "buffer_size=1000"]
REPOSITORY = Path(sb3_agpo.__file__).resolve().parents[1]


def arguments(output: Path, *changes: str, algorithms: str = "random sac") -> list[str]:
    """Command line of a small run."""
    return [
        "learning", "--algorithms", *algorithms.split(), "--envs", TASK, "--seeds", "0", "--steps", "300",
        "--eval-every", "128", "--output", str(output), "--set", *TINY, *changes,
    ]  # fmt: skip


def learning_options(_command: str, *line: str) -> argparse.Namespace:
    """Options of the command as it reads them."""
    parser = argparse.ArgumentParser()
    learning.add_arguments(parser)
    return parser.parse_args(line)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A CSV file with a finished run of SAC and of the random policy; models are beside it."""
    folder = tmp_path_factory.mktemp("finished")
    output = folder / "learning.csv"
    assert main(arguments(output, "--models", str(folder / "models"), "--save-at", "128", "300")) == 0
    return output


def test_rows(finished: Path) -> None:
    """Every evaluation is a row, with what the report needs."""
    rows = records.read_rows(finished)
    assert (
        finished.read_text()
        .splitlines()[0]
        .startswith(
            "algorithm,env,seed,steps,simulator_calls,seconds,return,return_std,cpu_seconds,episodes,n_envs,threads,python,torch,"
            "stable_baselines3,gymnasium,mujoco,sb3_agpo,git_commit,settings"
        )
    )
    assert [(row["algorithm"], row["steps"], row["episodes"]) for row in rows] == [
        ("random", "0", "20"),
        ("sac", "128", "5"),
        ("sac", "256", "5"),
        ("sac", "300", "10"),
    ]
    sac = rows[1:]
    assert all(row["simulator_calls"] == row["steps"] and float(row["return"]) > 0 for row in sac)
    seconds = [float(row["seconds"]) for row in sac]
    assert 0 < seconds[0] < seconds[1] < seconds[2]
    assert all(0 < float(row["cpu_seconds"]) for row in sac)
    assert {row["n_envs"] for row in sac} == {"1"}
    assert records.read_all(finished) == rows  # nothing is left of the unfinished run
    assert [path.name for path in records.partial_folder(finished).iterdir()] == [".lock"]


def test_settings_file(finished: Path) -> None:
    """The hash in a row stands for all hyperparameters, defaults included."""
    settings = json.loads(records.settings_path(finished).read_text())
    sac = settings[records.read_rows(finished)[1]["settings"]]
    assert sac["algorithm"] == "stable_baselines3.sac.sac.SAC"
    assert sac["arguments"]["batch_size"] == 8
    assert sac["arguments"]["tau"] == 0.005  # a default of SAC
    assert sac["arguments"]["policy_kwargs"]["net_arch"] == [8]
    assert sac["arguments"]["policy_kwargs"]["n_critics"] == 2  # a default of its policy
    assert not {"env", "seed", "verbose"} & set(sac["arguments"])


def test_models(finished: Path) -> None:
    """Models are saved at the steps asked for."""
    models = finished.parent / "models"
    assert sorted(path.name for path in models.iterdir()) == [f"sac-{TASK}-0-128.zip", f"sac-{TASK}-0-300.zip"]
    assert SAC.load(models / f"sac-{TASK}-0-128.zip").num_timesteps == 128


def test_finished_runs_are_skipped(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The same command again does nothing."""
    before = finished.read_bytes()
    assert main(arguments(finished)) == 0
    assert "2 runs: 2 finished, 0 finished but different, 0 to do" in capsys.readouterr().out
    assert finished.read_bytes() == before


def test_other_settings_are_not_mixed(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Runs with other settings are kept and said to be different, until ``--redo``."""
    before = finished.read_bytes()
    changed = arguments(finished, "--set", "tau=0.01")
    assert main(changed) == 1
    captured = capsys.readouterr()
    old = records.read_rows(finished)[1]["settings"]
    assert "2 runs: 1 finished, 1 finished but different, 0 to do" in captured.out
    assert f"kept, not redone without --redo: sac on {TASK}, seed 0 is finished, but settings was {old}, is " in captured.err
    assert finished.read_bytes() == before
    assert main([*changed, "--redo", "--dry-run"]) == 0
    assert f"to do: sac on {TASK}, seed 0, 300 steps" in capsys.readouterr().out
    # Only what was there when the run was planned will be replaced, and what has the same settings is compared alone.
    options = learning_options(*changed, "--redo")
    (plan,), _ = learning.select_missing(learning.plan_runs(options), redo=True)
    assert plan.replaced == {plan.key._replace(settings=old)}
    both = [*records.read_rows(finished), records.read_rows(finished)[1] | {"settings": plan.key.settings}]
    assert differences(plan, False, both) == ""
    # Another label is another run.
    assert main([*arguments(finished, "--label", "slow-target", algorithms="sac"), "--dry-run"]) == 0
    assert f"to do: slow-target on {TASK}, seed 0, 300 steps" in capsys.readouterr().out


def test_another_interval_is_said(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Evaluations of a finished run are not made anew, and that is no silent matter; the random policy has but one."""
    assert main(arguments(finished, "--eval-every", "50")) == 1
    printed = capsys.readouterr()
    assert "2 runs: 1 finished, 1 finished but different, 0 to do" in printed.out
    assert f"sac on {TASK}, seed 0 is finished, but --eval-every was 128, is 50" in printed.err


def test_every_argument_can_be_set() -> None:
    """No algorithm of the benchmark is refused for what it is made of."""
    for name in NAMES:
        check_arguments(find_algorithm(name, overrides={"learning_rate": 1e-3, "policy_kwargs.net_arch": [4]}))


def test_other_versions_are_not_mixed(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The message names the library; the version of this package matters only to its own algorithms."""
    rows = records.read_rows(finished)
    plan = RunPlan(records.key_of(rows[1]), "sac", finished, 128)
    changed = [row | {"torch": "1.0", "sb3_agpo": "0.0"} for row in rows]
    assert differences(plan, False, changed) == f"torch was 1.0, is {rows[1]['torch']}"
    assert "sb3_agpo was 0.0" in str(differences(plan, True, changed))
    assert differences(plan, True, rows) == ""
    assert differences(replace(plan, key=plan.key._replace(seed=1)), True, rows) is None


def test_merging_replaces_the_run(tmp_path: Path, finished: Path) -> None:
    """A redone run takes the place of the ones that it was planned to replace; other runs and settings stay."""
    rows = records.read_rows(finished)
    output = tmp_path / "learning.csv"
    output.write_text(records.to_csv(rows, header=True))
    old = records.key_of(rows[1])
    first, second = (old._replace(settings=settings) for settings in ("00000000", "11111111"))
    for key, replaced in ((first, frozenset[RunKey]()), (second, frozenset({old}))):
        records.merge_run(output, key, [rows[3] | {"settings": key.settings}], replaced)
        assert [records.key_of(row) for row in records.read_rows(output)] == [
            records.key_of(rows[0]),
            *([old] * 3 if key == first else []),
            first,
            *([second] if key == second else []),
        ]
    # The same run again, whose rows are never there twice.
    records.merge_run(output, second, [rows[3] | {"settings": second.settings}])
    assert len(records.read_rows(output)) == 3


def wait_for(condition: Any, seconds: float = 600) -> None:
    """Wait until a condition holds, also on a machine with much else to do."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.02)


#: the command, whose runs wait between two evaluations until a file is there
WAITING = """
import sys
import time
from pathlib import Path

from sb3_agpo.benchmark.__main__ import main
from sb3_agpo.benchmark.run import EvaluationCallback

on_step = EvaluationCallback._on_step


def wait(callback):
    while callback.num_timesteps == 500 and not Path(sys.argv[1]).exists():
        time.sleep(0.02)
    return on_step(callback)


EvaluationCallback._on_step = wait  # in the processes of runs too, which import this file
if __name__ == "__main__":
    sys.exit(main(sys.argv[2:]))
"""


def test_killed_run_is_resumed(tmp_path: Path) -> None:
    """After a kill the partial rows can be seen, the child has ended, and the same command completes the run."""
    output, script, go_on = tmp_path / "learning.csv", tmp_path / "waiting.py", tmp_path / "go_on"
    script.write_text(WAITING)
    command = arguments(output, "--steps", "1600", "--eval-every", "200", algorithms="sac")
    folder = records.partial_folder(output)
    paths = os.pathsep.join([str(REPOSITORY), *sys.path])
    process = subprocess.Popen(
        [sys.executable, str(script), str(go_on), *command],
        env={**os.environ, "PYTHONPATH": paths},
        stdout=subprocess.DEVNULL,
    )
    try:
        wait_for(lambda: len(records.read_all(output)) >= 2)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
        go_on.touch()
    (partial,) = folder.glob("*.csv")

    def lock_is_free() -> bool:
        with partial.open("a") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return False
            return True

    wait_for(lock_is_free)
    assert not output.exists()
    left = records.read_all(output)
    assert [row["steps"] for row in left] == ["200", "400"]
    assert main(command) == 0
    rows = records.read_rows(output)
    assert [int(row["steps"]) for row in rows] == list(range(200, 1601, 200))
    assert [row["return"] for row in rows[: len(left)]] == [row["return"] for row in left]  # seeded, from the start
    assert not list(folder.glob("*.csv"))


def test_crash_does_not_stop_the_others(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A run that fails is reported, the next one is done, and the exit code tells."""
    output = tmp_path / "learning.csv"
    assert main(arguments(output, "learning_rate='nonsense'", algorithms="sac random")) == 1
    captured = capsys.readouterr()
    assert f"sac on {TASK}, seed 0: FAILED, exit code 1" in captured.out
    assert "nonsense" in captured.out
    assert "1 of 2 runs failed" in captured.err
    assert [row["algorithm"] for row in records.read_rows(output)] == ["random"]


def test_run_in_progress_elsewhere_is_left_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Two benchmarks on one file share the work."""
    output = tmp_path / "learning.csv"
    key = RunKey("random", TASK, 0, find_algorithm("random").settings_hash(), 0)
    path = records.partial_path(output, key)
    path.parent.mkdir(parents=True)
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert main(arguments(output, algorithms="random")) == 0
    assert "left out, another process is at it" in capsys.readouterr().out
    assert not output.exists()


def test_run_finished_elsewhere_is_left_out(tmp_path: Path, finished: Path) -> None:
    """A run that another process finishes after it was planned is not done again; one that is redone is, once."""
    output = tmp_path / "learning.csv"
    rows = [row for row in records.read_rows(finished) if row["algorithm"] == "sac"]
    plan = RunPlan(records.key_of(rows[0]), "sac", output, 128)
    with claimed(plan, own=False) as file:
        assert file.name == str(records.partial_path(output, plan.key))
        records.merge_run(output, plan.key, rows)
        records.partial_path(output, plan.key).unlink()
    for planned in (plan, replace(plan, replaced=frozenset({plan.key}))):
        with pytest.raises(BusyError, match="another process has finished it"), claimed(planned, own=False):
            pass
        assert not records.partial_path(output, plan.key).exists()
    records.merge_run(output, plan.key, [row | {"torch": "1.0"} for row in rows])
    with claimed(replace(plan, replaced=frozenset({plan.key})), own=False):
        pass


def test_claim_of_a_removed_file_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between opening and locking the file another process can finish the run, and a third one begin it anew."""
    plan = RunPlan(RunKey("sac", TASK, 0, "", 300), "sac", tmp_path / "learning.csv", 128)
    path = records.partial_path(plan.output, plan.key)
    flock = fcntl.flock

    def late(file: Any, operation: int) -> None:
        path.unlink()
        path.touch()
        flock(file, operation)

    monkeypatch.setattr(fcntl, "flock", late)
    with pytest.raises(BusyError, match="was at it"), claimed(plan, own=False):
        pass
    assert path.exists()


def test_two_commands_share_the_runs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What one command finishes while another one waits to begin it is done once."""
    output = tmp_path / "learning.csv"
    work = learning.Pool.work
    others: list[int] = []

    def late(pool: learning.Pool) -> int:
        if not others:
            others.append(1)
            assert main(arguments(output, algorithms="random")) == 0
        return work(pool)

    monkeypatch.setattr(learning.Pool, "work", late)
    assert main(arguments(output, algorithms="random")) == 0
    printed = capsys.readouterr().out
    assert printed.count("return ") == 1 and "left out, another process has finished it" in printed
    assert len(records.read_rows(output)) == 1
    assert [path.name for path in records.partial_folder(output).iterdir()] == [".lock"]


def test_cut_off_line_is_dropped(tmp_path: Path, finished: Path) -> None:
    """A crash in the middle of a line costs that line of an unfinished run only; a file of another kind is refused."""
    text, rows = finished.read_text(), records.read_rows(finished)
    path = tmp_path / "cut.csv"
    path.write_text(text.rstrip("\n"))  # as some editors leave a file
    assert records.read_rows(path) == rows
    path.write_text(text[: text.rindex(",300,")])
    assert records.read_rows(path, growing=True) == rows[:-1]
    with pytest.raises(ValueError, match=r"cut.csv: line 5 has not as many entries as there are columns"):
        records.read_rows(path)
    path.write_text("algorithm,env\nsac,Hopper-v5\n")
    with pytest.raises(ValueError, match=r"lacks the columns .*budget"):
        records.read_rows(path)


def test_columns_of_ones_own_are_kept(tmp_path: Path, finished: Path) -> None:
    """A run is added to a file in which somebody has made a column of notes, at its last line without an end too."""
    head, *lines = finished.read_text().splitlines()
    path = tmp_path / "learning.csv"
    path.write_text("\n".join([f"{head},note", *(f"{line},seen" for line in lines)]))
    rows = records.read_rows(path)
    new = [records.read_rows(finished)[1] | {"seed": "7"}]
    records.merge_run(path, records.key_of(new[0]), new)
    assert records.read_rows(path) == [*rows, new[0] | {"note": ""}]
    assert {row["note"] for row in rows} == {"seen"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["--seeds", "3-1"], "'3-1' is no seed"),
        (["--seeds", "x"], "'x' is no seed"),
        (["--set", "tau"], "not of the form key=value"),
        (["--set", "ent_coef=auto"], "is no Python literal"),
        (["--set", "policy_kwargs.activation_fn=torch.nn.Silu"], "no module class"),
        (["--set", "tau.x=1", "tau=0.1", "tau.y=1"], "not a dictionary"),
        (["--steps", "0"], "--steps is 0"),
        (["--label", "mine"], "names one algorithm, but 2"),
        (["--envs", "NoSuchTask-v0"], "unknown task 'NoSuchTask-v0'"),
        (["--envs", "no_such_module:Task-v0"], "unknown task 'no_such_module:Task-v0': No module named"),
        (["--envs", "Blackjack-v1"], "task 'Blackjack-v1' has no time limit"),
        (["--algorithms", "sacc"], "unknown algorithm 'sacc'"),
        (["--set", "lerning_rate=1e-3"], "--set lerning_rate: sac has no such argument; did you mean learning_rate?"),
        (["--set", "x=1"], "--set x: sac has no such argument; choose from policy, learning_rate"),
        (["--set", "seed=1"], "--set seed: give --seeds instead"),
        (["--set", "env='Hopper-v5'"], "--set env: give --envs instead"),
        (
            ["--algorithms", "agpo-q", "--set", "policy_kwargs.net_arhc=[4]"],
            "--set policy_kwargs.net_arhc: the policy of agpo-q has no such argument; did you mean policy_kwargs.net_arch?",
        ),
        (["--save-at", "100"], "--save-at 100 saves nothing without a folder; add --models FOLDER"),
        (["--models", "models", "--save-at", "0"], "--save-at is 0"),
        (["--models", "models", "--save-at", "100", "301"], f"--save-at 301 is after the 300 steps of {TASK}"),
        (["--models", __file__], "is a file; give a folder"),
        (["--output", str(Path(__file__).parent)], "give the name of a file that ends in .csv"),
        (["--output", "runs/v0.1"], "--output is runs/v0.1; give the name of a file that ends in .csv"),
        (["--output", f"{__file__}/learning.csv"], "cannot be read (Not a directory); give the name of a CSV file"),
    ],
)
def test_wrong_options(tmp_path: Path, capsys: pytest.CaptureFixture[str], changes: list[str], message: str) -> None:
    """Wrong options end with a message that names the value, and nothing is written."""
    for more in ([], ["--dry-run"]):
        assert main([*arguments(tmp_path / "learning.csv", *changes), *more]) == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_parsing() -> None:
    """Seeds and changes of settings as written on the command line."""
    assert learning.parse_seeds(["7", "0-2", "2"]) == [7, 0, 1, 2]
    parsed = learning.parse_overrides(["ent_coef='auto_0.1'", "policy_kwargs={'net_arch': [4]}", "a.b=torch.nn.SiLU"])
    assert parsed == {"ent_coef": "auto_0.1", "policy_kwargs": {"net_arch": [4]}, "a.b": nn.SiLU}
    assert torch_module("Tanh") is nn.Tanh
    gate = learning.parse_overrides(["gate=MagnitudeGate(2.0, flatness=1.0)"])["gate"]
    assert repr(gate) == "MagnitudeGate(preference=2.0, flatness=1.0)"
    hashes = {find_algorithm("agpo-adaptive", overrides={"gate": gate}).settings_hash() for _ in range(2)}
    assert len(hashes) == 1 and find_algorithm("agpo-adaptive").settings_hash() not in hashes
    schedule = learning.parse_overrides(["learning_rate=LinearSchedule(1e-3, end=1e-4, end_fraction=1.0)"])["learning_rate"]
    assert [schedule(remaining) for remaining in (1.0, 0.5, 0.0)] == pytest.approx([1e-3, 5.5e-4, 1e-4])
    for wrong in (
        "gate=LinearSchedule(1e-3)",
        "gate=MagnitudeGate(-1.0)",
        "gate=MagnitudeGate(x)",
        "gate=MagnitudeGate(wrong=1)",
        "gate=Gate()",
        "gate=Unknown()",
    ):
        with pytest.raises(ValueError, match="--set gate"):
            learning.parse_overrides([f"gate={wrong}"])


def test_every_algorithm_is_defined() -> None:
    """Each name is an algorithm with settings of its own."""
    specs = {name: find_algorithm(name) for name in NAMES}
    assert len({spec.settings_hash() for spec in specs.values()}) == len(NAMES)
    assert [name for name, spec in specs.items() if spec.own] == [name for name in NAMES if name.startswith("agpo")]
    assert specs["agpo-q-nomatch"].kwargs["gradient_mode"] == "q"
    assert specs["agpo-q-nomatch"].kwargs["critic_grad_coef"] == 0
    four = specs["agpo-four-updates"].kwargs
    assert specs["agpo-q-windows"].kwargs == four | {"gradient_mode": "q", "critic_grad_coef": 0.0, "policy_delay": 0}
    assert specs["agpo-analytic"].kwargs["critic_grad_coef"] > 0


def test_settings_hash() -> None:
    """It changes with the number of environments and with every argument, and with nothing else."""
    spec = find_algorithm("sac")
    assert spec.settings_hash() == find_algorithm("sac").settings_hash()
    assert spec.settings_hash() != find_algorithm("sac", n_envs=2).settings_hash()
    assert spec.settings_hash() != find_algorithm("sac", overrides={"policy_kwargs.use_expln": True}).settings_hash()
    # Writing a default down changes nothing.
    assert spec.settings_hash() == find_algorithm("sac", overrides={"tau": 0.005}).settings_hash()


def test_settings_hold_what_agpo_chooses() -> None:
    """A default that becomes another one is another setting, even where the argument is None."""
    for rollout_epochs, policy_delay in ((4, POLICY_DELAY_BESIDE_WINDOWS), (0, 1)):
        spec = find_algorithm("agpo-adaptive-nomatch", overrides={"rollout_epochs": rollout_epochs})
        arguments = spec.settings()["arguments"]
        assert arguments["policy_delay"] == policy_delay and arguments["gate"] == repr(DEFAULT_GATE())
    for learning_rate, critic_learning_rate in (
        (1e-3, 2e-3),
        (LinearSchedule(1e-3, 0, 1), f"2.0 * {LinearSchedule(1e-3, 0, 1)}"),
    ):
        spec = find_algorithm("agpo-adaptive-nomatch", overrides={"learning_rate": learning_rate})
        assert spec.settings()["arguments"]["critic_learning_rate"] == critic_learning_rate


def test_overrides_leave_the_algorithm_alone() -> None:
    """A change to one selection is no change to the next."""
    changed = find_algorithm("sac-fast", overrides={"policy_kwargs.net_arch": [8]})
    assert changed.kwargs["policy_kwargs"]["net_arch"] == [8]
    assert "net_arch" not in find_algorithm("sac-fast").kwargs["policy_kwargs"]


def plan_of(spec: AlgorithmSpec, budget: int, eval_every: int) -> RunPlan:
    """A run in this process."""
    return RunPlan(RunKey(spec.name, TASK, 0, "", budget), spec.name, Path("learning.csv"), eval_every)


def test_fast_sac_learns_with_layer_norm(tmp_path: Path) -> None:
    """``sac-fast``: with many environments, which overshoot; normalised layers in critics and targets; can be saved."""
    overrides = {"policy_kwargs.net_arch": [8, 8], "learning_starts": 32, "train_freq": 4}
    spec = find_algorithm("sac-fast", n_envs=16, overrides=overrides)
    rows: list[dict[str, Any]] = []
    learn(plan_of(spec, 128, 50), spec, rows.append)
    assert [row["steps"] for row in rows] == [64, 112, 128]
    model = SAC(env=make_vec_env(TASK), **spec.kwargs)
    assert isinstance(model.policy, LayerNormSACPolicy)
    for critic in (model.critic, model.critic_target):
        assert len(critic.q_networks) == 2
        for network in critic.q_networks:
            assert isinstance(network, nn.Sequential)
            layers = [type(layer) for layer in network]
            assert layers == [nn.Linear, nn.LayerNorm, nn.SiLU, nn.Linear, nn.LayerNorm, nn.SiLU, nn.Linear]
    model.save(tmp_path / "model.zip")
    observation = np.zeros(4)
    loaded = SAC.load(tmp_path / "model.zip")
    np.testing.assert_array_equal(
        loaded.predict(observation, deterministic=True)[0], model.predict(observation, None, None, True)[0]
    )


class CountingSAC(SAC):
    """An algorithm that simulates more steps than it takes."""

    @property
    def simulator_calls(self) -> int:
        """Ten simulated steps for each one taken."""
        return 10 * self.num_timesteps


def test_simulator_calls_are_those_of_the_algorithm() -> None:
    """Algorithms that count their simulated steps are believed."""
    spec = AlgorithmSpec("counting", CountingSAC, 1, {"policy": "MlpPolicy", "policy_kwargs": {"net_arch": [4]}})
    rows: list[dict[str, Any]] = []
    learn(plan_of(spec, 60, 40), spec, rows.append)
    assert [row["simulator_calls"] for row in rows] == [400, 600]


def test_evaluation_is_the_same_for_all() -> None:
    """Initial states are always the same, episodes that end early do not disturb the others."""
    evaluator = Evaluator(TASK)
    starts: list[np.ndarray] = []

    def choose(observations: np.ndarray) -> np.ndarray:
        starts.append(observations.copy())
        return np.zeros((len(observations), 1), dtype=np.float32)

    first = evaluator.play(choose, 5)
    start = starts[0]
    starts.clear()
    second = evaluator.play(choose, 3)
    np.testing.assert_array_equal(starts[0], start[:3])
    assert second == first[:3]
    env = gym.make(TASK)
    total, done = 0.0, False
    env.reset(seed=1_000_000)
    while not done:
        _, reward, terminated, truncated, _ = env.step(np.zeros(1, dtype=np.float32))
        total += float(reward)
        done = terminated or truncated
    assert first[0] == total
    assert evaluator.play_random(3, 4) == evaluator.play_random(3, 4) != evaluator.play_random(4, 4)


class Times:
    """Clocks of the learning clock, which a test moves."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.wall = self.cpu = 0.0
        named = SimpleNamespace(perf_counter=lambda: self.wall, process_time=lambda: self.cpu)
        monkeypatch.setattr(clock_module, "time", named)

    def compute(self, seconds: float) -> None:
        """Use the processor."""
        self.wall += seconds
        self.cpu += seconds

    def sleep(self, seconds: float) -> None:
        """Use nothing."""
        self.wall += seconds


def test_clock_leaves_out_what_is_paused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only what lies between start and stop counts; sleeping is wall-clock time only."""
    times, clock = Times(monkeypatch), LearningClock(make_vec_env("Pendulum-v1"))
    times.compute(8.0)
    clock.start()
    times.compute(0.5)
    times.sleep(1.0)
    clock.stop()
    times.compute(2.0)
    clock.stop()
    assert clock.read() == (1.5, 0.5)


def test_evaluations_take_no_learning_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """However slow an evaluation is, times and returns of the run do not show it."""
    times, sample_action = Times(monkeypatch), SAC._sample_action

    def slow(evaluator: Evaluator, model: Any, episodes: int) -> list[float]:
        times.compute(100.0)
        return [0.0] * episodes

    def slow_action(*args: Any, **kwargs: Any) -> Any:
        times.compute(0.5)
        return sample_action(*args, **kwargs)

    monkeypatch.setattr(Evaluator, "play_model", slow)
    monkeypatch.setattr(SAC, "_sample_action", slow_action)
    spec = find_algorithm("sac", overrides={"policy_kwargs.net_arch": [4], "learning_starts": 1000})
    rows: list[dict[str, Any]] = []
    learn(plan_of(spec, 60, 20), spec, rows.append)
    assert [(row["seconds"], row["cpu_seconds"]) for row in rows] == [(10.0, 10.0), (20.0, 20.0), (30.0, 30.0)]


class Busy(gym.Wrapper[Any, Any, Any, Any]):
    """A slow environment."""

    def step(self, action: Any) -> Any:
        """Take a step."""
        end = time.process_time() + 0.2
        while time.process_time() < end:
            pass
        return self.env.step(action)


def test_clock_counts_environment_processes() -> None:
    """Processor time of environments in processes of their own is part of learning."""
    env = make_vec_env(
        "Pendulum-v1", 2, wrapper_class=Busy, vec_env_cls=SubprocVecEnv, vec_env_kwargs={"start_method": "fork"}
    )
    env.reset()
    clock = LearningClock(env)
    clock.start()
    env.step(np.zeros((2, 1), dtype=np.float32))
    clock.stop()
    env.close()
    assert clock.read()[1] >= 0.3  # the system counts in hundredths


def test_tasks_of_a_module_and_names_of_their_files() -> None:
    """As ``gym.make`` takes them: the module registers the task."""
    learning._check_task(f"gymnasium:{TASK}")
    assert records.as_file_name("sac-own/Task-v0-0-20.zip") == "sac-own_Task-v0-0-20.zip"
    assert records.as_file_name(f"agpo-q-{TASK}-0-20.zip") == f"agpo-q-{TASK}-0-20.zip"
