"""The demonstration, really run on a small task, and its figures."""

from __future__ import annotations

import argparse
import io
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import redirect_stdout
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import gymnasium as gym
import matplotlib as mpl
import matplotlib.image
import mujoco
import numpy as np
import pytest
import torch as th
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from sb3_agpo import AGPO, demo, demo_options, demo_training
from sb3_agpo.benchmark.run import Evaluator
from sb3_agpo.command_line import EXIT_USAGE
from sb3_agpo.demo import EXIT_INTERRUPTED
from sb3_agpo.tracking import figures

TASK = "InvertedPendulum-v5"
STEPS = 1300  # updates start after 1000


class Run(NamedTuple):
    """A finished demonstration."""

    code: int
    folder: Path
    output: str

    def number(self, row: str) -> float:
        """The number in a row of the printed table."""
        (line,) = (line for line in self.output.splitlines() if line.strip().startswith(row))
        return float(re.split(r"\s{2,}", line.strip())[1].replace(",", ""))


@pytest.fixture(scope="module", autouse=True)
def _mujoco_warnings() -> Iterator[None]:
    """Give other tests of this process MuJoCo's own handling of warnings back."""
    yield
    mujoco.set_mju_user_warning(None)


def run_demo(folder: Path, *arguments: str) -> Run:
    """Run the demonstration in this process."""
    output = io.StringIO()
    with redirect_stdout(output):
        code = demo.main(["--env", TASK, "--output", str(folder), *arguments])
    return Run(code, folder, output.getvalue())


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run with updates of every kind."""
    return run_demo(tmp_path_factory.mktemp("finished") / "demo", "--steps", str(STEPS), "--save-replay-buffer")


def test_files(finished: Run) -> None:
    """Everything that is promised lies in the folder, nothing else, and is named in the output."""
    assert finished.code == 0
    names = {path.name for path in finished.folder.iterdir()}
    (events,) = (name for name in names if name.startswith("events.out.tfevents."))
    assert names == {
        events, "model.zip", "replay_buffer.pkl", "progress.csv", "learning_curve.png", "gradients.png",
    }  # fmt: skip
    assert f"{finished.folder}/" in finished.output
    assert all(name in finished.output for name in (names - {events}) | {"events.out.tfevents.*"})


def test_model_and_buffer(finished: Run) -> None:
    """Model and replay buffer can be loaded."""
    model = AGPO.load(finished.folder / "model.zip", device="cpu")
    assert model.num_timesteps == STEPS
    assert model.gradient_mode == "adaptive"
    action, _ = model.predict(np.zeros(4), deterministic=True)
    assert np.isfinite(action).all()
    model.load_replay_buffer(finished.folder / "replay_buffer.pkl")
    assert model.replay_buffer is not None
    assert model.replay_buffer.size() == STEPS
    assert not model.replay_buffer.full


def test_progress(finished: Run) -> None:
    """The records are dense, from step 0 to the end, with evaluations in some."""
    progress = figures.read_progress(finished.folder / "progress.csv")
    steps = progress["time/total_timesteps"]
    assert steps[0] == 0 and steps[-1] == STEPS
    assert len(steps) == demo_training.LOGS + 1
    assert (np.diff(steps) > 0).all()
    evaluated = np.isfinite(progress["eval/mean_reward"])
    # Before the first update there is but one policy to evaluate
    np.testing.assert_allclose(steps[evaluated], [0, *(step for step in range(52, STEPS + 1, 52) if step > 1000)], atol=1)
    assert (progress["eval/mean_reward"][evaluated] >= 1).all()
    assert (np.diff(progress["time/learning_seconds"]) > 0).all()
    assert (np.diff(progress["time/simulator_calls"]) > 0).all()
    gate = progress["train/gate_mean"]
    known = np.isfinite(gate)
    assert known.any() and not known[steps <= 1000].any()
    assert ((gate[known] >= 0) & (gate[known] <= 1)).all()


def test_table(finished: Run) -> None:
    """The printed numbers are those of the records."""
    progress = figures.read_progress(finished.folder / "progress.csv")
    returns = progress["eval/mean_reward"]
    assert finished.number("first evaluation") == pytest.approx(returns[0], abs=0.051)
    assert finished.number("last evaluation") == pytest.approx(returns[-1], abs=0.051)
    assert finished.number("environment steps") == STEPS
    assert finished.number("simulator calls") == progress["time/simulator_calls"][-1] > 2 * STEPS
    assert finished.number("seconds") >= round(progress["time/learning_seconds"][-1], 1)  # as it is printed
    # An untouched pendulum stands some steps, one pushed at random falls at once
    assert 1 <= finished.number("random policy") < 30


def test_tensorboard(finished: Run) -> None:
    """TensorBoard finds the same numbers."""
    accumulator = EventAccumulator(str(finished.folder))
    accumulator.Reload()
    progress = figures.read_progress(finished.folder / "progress.csv")
    for tag in ("eval/mean_reward", "train/gate_mean", "train/grad_cosine", "time/simulator_calls"):
        values = [event.value for event in accumulator.Scalars(tag)]
        np.testing.assert_allclose(values, progress[tag][np.isfinite(progress[tag])], rtol=1e-6)


def has_color(image: np.ndarray, color: str) -> bool:
    """Whether an image has pixels of a colour."""
    return bool((np.abs(image[..., :3] - mpl.colors.to_rgb(color)).max(axis=-1) < 0.02).any())


def test_figures(finished: Run) -> None:
    """The curves are in the figures."""
    curve = mpl.image.imread(finished.folder / "learning_curve.png")
    assert has_color(curve, figures.RETURN_COLOR) and has_color(curve, figures.NEUTRAL_COLOR)
    gradients = mpl.image.imread(finished.folder / "gradients.png")
    assert has_color(gradients, figures.ANALYTIC_COLOR) and has_color(gradients, figures.CRITIC_COLOR)


def test_never_overwrites(finished: Run) -> None:
    """A second run goes to the next free folder and says so; without an update there is no figure of gradients."""
    before = {path: path.read_bytes() for path in finished.folder.iterdir()}
    finished.folder.with_name("demo-2").write_text("mine")
    again = run_demo(finished.folder, "--steps", "20")
    third = finished.folder.with_name("demo-3")
    assert f"{finished.folder} exists already and is kept: writing to {third}" in again.output
    assert {path: path.read_bytes() for path in finished.folder.iterdir()} == before
    assert finished.folder.with_name("demo-2").read_text() == "mine"
    assert {"model.zip", "progress.csv", "learning_curve.png"} <= {path.name for path in third.iterdir()}
    assert not (third / "gradients.png").exists() and "No gradients.png" in again.output
    assert not (third / "replay_buffer.pkl").exists() and "replay_buffer.pkl" not in again.output


def test_time_budget(tmp_path: Path) -> None:
    """The time ends a run that has no number of steps."""
    run = run_demo(tmp_path / "demo", "--minutes", "0.02", "--n-envs", "2")
    assert run.code == 0
    assert run.number("seconds") >= 1.2
    assert run.number("environment steps") > 0


def test_without_derivatives(tmp_path: Path) -> None:
    """A task that has none is learnt all the same, and the output says why a figure is missing."""
    run = run_demo(tmp_path / "demo", "--env", "Pendulum-v1", "--steps", "4")
    assert run.code == 0
    assert "Simulator derivatives: none (" in run.output
    assert "No gradients.png" in run.output and "offers no derivatives" in run.output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--minutes", "0"], "--minutes is 0; give a number above 0"),
        (["--minutes", "-1"], "--minutes is -1"),
        (["--minutes", "nan"], "--minutes is nan"),
        (["--minutes", "inf"], "--minutes is inf"),
        (["--steps", "0"], "--steps is 0; give a number of 1 or more"),
        (["--n-envs", "0"], "--n-envs is 0"),
        (["--seed", "-1"], "--seed is -1"),
        (["--env", "NoSuchTask-v5"], "--env 'NoSuchTask-v5' cannot be made"),
        (["--env", "no_such_module:Task-v0"], "--env 'no_such_module:Task-v0' cannot be made"),
        (["--env", "CartPole-v1"], "needs continuous actions"),
        (["--device", "abacus"], "--device 'abacus' cannot be used"),
        (["--device", "meta"], "--device 'meta' cannot be used"),
    ],
)
def test_refuses(arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Wrong options are told clearly, before anything is written."""
    assert demo.main(["--output", "demo", *arguments]) == EXIT_USAGE
    error = capsys.readouterr().err
    assert error.startswith("error: ") and message in error
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("size", "limit", "message"),
    [((4,), None, "has no time limit"), ((2, 2), 10, "needs a one-dimensional Box")],
)
def test_refuses_task(
    size: tuple[int, ...], limit: int | None, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """So are tasks that the demonstration cannot evaluate or learn."""

    class Task(gym.Env[Any, Any]):
        observation_space = gym.spaces.Box(-1, 1, size)
        action_space = gym.spaces.Box(-1, 1, (1,))

    name = f"RefusedTask{len(size)}-v0"
    gym.register(name, entry_point=lambda **_: Task(), max_episode_steps=limit)
    try:
        assert demo.main(["--env", name, "--output", "demo"]) == EXIT_USAGE
    finally:
        del gym.registry[name]
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_refuses_impossible_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """So is a folder that cannot be made."""
    (tmp_path / "file").write_text("")
    assert demo.main(["--env", TASK, "--output", "file/demo", "--steps", "10"]) == EXIT_USAGE
    assert "--output" in capsys.readouterr().err


@pytest.mark.parametrize("library", ["matplotlib", "tensorboard"])
def test_missing_extra(
    library: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Without a library of the extra, the command that installs it is told before anything is written."""
    monkeypatch.setitem(sys.modules, library, None)
    monkeypatch.delitem(sys.modules, "sb3_agpo.tracking.figures")
    assert demo.main(["--env", TASK, "--steps", "10"]) == EXIT_USAGE
    assert "pip install 'sb3-agpo[plot]'" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.fixture
def python_interrupts() -> Iterator[None]:
    """Python's own handler of Ctrl-C, which a process started in the background of a shell does not have."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_interrupts(python_interrupts: None) -> None:
    """The first Ctrl-C asks, the second one quits, and later ones are as before."""
    with demo_training.first_interrupt_stops() as stop:
        signal.raise_signal(signal.SIGINT)
        assert stop.is_set()
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


@pytest.mark.slow
def test_interrupted_run_is_saved(tmp_path: Path) -> None:
    """After Ctrl-C everything there is lies in the folder."""
    command = [sys.executable, "-m", "sb3_agpo.demo", "--env", TASK, "--minutes", "60", "--output", "demo"]
    package = str(Path(demo.__file__).resolve().parents[1])
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([package, *sys.path])}
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        deadline = time.monotonic() + 600
        progress = tmp_path / "demo" / "progress.csv"
        while not (progress.exists() and progress.stat().st_size) and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.1)
        process.send_signal(signal.SIGINT)
        output, errors = process.communicate(timeout=600)
    finally:
        process.kill()
    assert process.returncode == EXIT_INTERRUPTED, errors
    assert "Ctrl-C: stopping and saving" in errors and "Traceback" not in errors
    steps = Run(process.returncode, tmp_path / "demo", output).number("environment steps")
    assert AGPO.load(tmp_path / "demo" / "model.zip", device="cpu").num_timesteps == steps > 0
    assert (tmp_path / "demo" / "learning_curve.png").exists()


def test_budget() -> None:
    """What comes first ends the training."""
    assert demo_training.Budget(100.0, None).used(25.0, 10**9) == 0.25
    assert demo_training.Budget(None, 1000).used(10.0**9, 100) == 0.1
    assert demo_training.Budget(100.0, 1000).used(25.0, 100) == 0.25
    assert demo_training.Budget(100.0, 1000).used(25.0, 1000) == 1.0


def test_evaluations_leave_time_to_learn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Evaluations that take long become rare where the time is limited: the first and the last one are all there is."""
    make_model, now = demo.make_model, 0.0

    def clock() -> float:
        """A clock on which a hundredth of a second passes each time that somebody looks."""
        nonlocal now
        now += 0.01
        return now

    def make_learning_model(options: argparse.Namespace) -> AGPO:
        model = make_model(options)
        model.learning_starts = 10
        return model

    def play_slowly(*_: object) -> list[float]:
        nonlocal now
        now += 0.3
        return [1.0]

    monkeypatch.setattr(demo_training, "time", SimpleNamespace(perf_counter=clock))
    monkeypatch.setattr(demo, "make_model", make_learning_model)
    monkeypatch.setattr(Evaluator, "play_model", play_slowly)
    run = run_demo(tmp_path / "demo", "--minutes", "0.02")
    returns = figures.read_progress(run.folder / "progress.csv")["eval/mean_reward"]
    assert np.isfinite(returns).sum() == 2 < len(returns)


def test_no_environment_is_left_open(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither those of training nor those of evaluations and of the random policy."""
    make, made, closed = gym.make, [], []

    def make_watched(*args: Any, **named: Any) -> gym.Env[Any, Any]:
        env = make(*args, **named)
        close = env.close
        made.append(id(env))
        monkeypatch.setattr(env, "close", lambda: (closed.append(id(env)), close()))
        return env

    monkeypatch.setattr(gym, "make", make_watched)
    assert run_demo(tmp_path / "demo", "--steps", "20").code == 0
    assert len(made) >= demo.RANDOM_EPISODES and set(made) == set(closed)


def test_threads_where_the_cores_are_unknown(monkeypatch: pytest.MonkeyPatch) -> None:
    """On platforms that do not tell which cores a process may use, or not even how many there are."""
    before, threads = th.get_num_threads(), []
    try:
        monkeypatch.delattr(os, "sched_getaffinity")
        for cores in (3, 16, None):
            th.set_num_threads(8)
            monkeypatch.setattr(os, "cpu_count", lambda cores=cores: cores)
            demo.limit_threads()
            threads.append(th.get_num_threads())
    finally:
        th.set_num_threads(before)
    assert threads == [2, 4, 1]


def test_default_budget() -> None:
    """Four minutes, unless something was asked for."""
    options = demo_options.parse([])
    assert (options.env, options.minutes, options.steps) == ("HalfCheetah-v5", 4.0, None)
    assert demo_options.parse(["--steps", "7"]).minutes is None
    options = demo_options.parse(["--steps", "7", "--minutes", "1.5"])
    assert (options.minutes, options.steps) == (1.5, 7)


def test_read_progress(tmp_path: Path) -> None:
    """Empty cells, words and a line that is not complete yet are NaN."""
    path = tmp_path / "progress.csv"
    path.write_text("a,b,c\n1,,inf\n2,word,3\n4")
    numbers = figures.read_progress(path)
    np.testing.assert_array_equal(numbers["a"], [1, 2, 4])
    np.testing.assert_array_equal(numbers["b"], [np.nan] * 3)
    np.testing.assert_array_equal(numbers["c"], [np.inf, 3, np.nan])
    path.write_text("")
    assert figures.read_progress(path) == {}


def test_figures_of_other_logs(tmp_path: Path) -> None:
    """What SB3's own EvalCallback logs can be drawn, long windows too, and the user's settings are left alone."""
    path = tmp_path / "progress.csv"
    gates = [f"train/gate_step_{t}" for t in range(12)]
    path.write_text(
        f"time/total_timesteps,eval/mean_reward,train/gate_mean,train/analytic_grad_norm,{','.join(gates)}\n"
        f"5000,-3,0.5,0.0,{','.join(['0.5'] * 12)}\n10000,40,0.25,0.1,{','.join(['0.25'] * 12)}\n"
    )
    with mpl.rc_context({"font.size": 3.0, "lines.linewidth": 9.0}):
        before = dict(mpl.rcParams)
        figures.learning_curve(path, tmp_path / "curve.png")
        figures.gradient_statistics(path, tmp_path / "gradients.png", title="long windows")
        assert dict(mpl.rcParams) == before
    assert has_color(mpl.image.imread(tmp_path / "curve.png"), figures.RETURN_COLOR)
    assert has_color(mpl.image.imread(tmp_path / "gradients.png"), figures.NEUTRAL_COLOR)


@pytest.mark.parametrize("draw", [figures.learning_curve, figures.gradient_statistics])
def test_nothing_to_draw(draw: object, tmp_path: Path) -> None:
    """A run without the numbers is told apart from a mistake, and no file is written."""
    path = tmp_path / "progress.csv"
    path.write_text("time/total_timesteps,train/critic_loss\n100,1.0\n")
    with pytest.raises(figures.NothingToDraw, match="progress"):
        draw(path, tmp_path / "figure.png")  # type: ignore[operator]
    assert not (tmp_path / "figure.png").exists()
