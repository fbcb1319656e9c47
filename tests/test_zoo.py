"""RL Baselines3 Zoo with AGPO: every script runs, alone and one after the other."""

import inspect
import os
import pickle
import shutil
import subprocess
import sys
from argparse import Namespace
from pathlib import Path
from typing import Any

import gymnasium as gym
import matplotlib as mpl
import numpy as np
import pytest
import rl_zoo3
import yaml
from stable_baselines3 import SAC, HerReplayBuffer
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.vec_env import DummyVecEnv, VecEnv
from zoo_runs import ENVIRONMENT, QUICK, SMALL, TASK, zoo

import sb3_agpo.zoo
from sb3_agpo import AGPO
from sb3_agpo.agpo.gates import VarianceSwitch
from sb3_agpo.vec_env import MujocoVecEnv
from sb3_agpo.zoo.algorithm import ZooAGPO
from sb3_agpo.zoo.manager import AGPOExperimentManager
from sb3_agpo.zoo.registration import register
from sb3_agpo.zoo.scripts import FUNCTIONS, MODULES, main, redirected, with_defaults

MUJOCO_TASKS = {
    "Ant-v5",
    "HalfCheetah-v5",
    "Hopper-v5",
    "Humanoid-v5",
    "HumanoidStandup-v5",
    "InvertedDoublePendulum-v5",
    "InvertedPendulum-v5",
    "Pusher-v5",
    "Reacher-v5",
    "Swimmer-v5",
    "Walker2d-v5",
}
CRITIC_ONLY_TASKS = {"Pendulum-v1", "BipedalWalker-v3"}


def python(*arguments: str, **variables: str) -> str:
    """
    Run Python in a process of its own.

    :param arguments: of the interpreter
    :param variables: of the environment, on top of this process's
    :return: what it printed
    """
    environment = {**os.environ, "PYTHONPATH": str(Path(sb3_agpo.__file__).parents[1]), **variables}
    done = subprocess.run([sys.executable, *arguments], env=environment, capture_output=True, text=True, timeout=1200)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


class Trained:
    """
    A finished training run of the zoo.

    :param logs: log folder
    :param output: what was printed
    """

    def __init__(self, logs: Path, output: str) -> None:
        self.logs, self.output = logs, output
        self.folder = logs / "agpo" / f"{ENVIRONMENT}_1"
        self.model = self.folder / f"{ENVIRONMENT}.zip"

    def config(self) -> dict[str, Any]:
        """The hyperparameters that the zoo saved."""
        text = (self.folder / ENVIRONMENT / "config.yml").read_text()
        return dict(yaml.load(text, Loader=yaml.UnsafeLoader))


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """One run that the tests share; they must not change its files."""
    logs = tmp_path_factory.mktemp("zoo") / "logs"
    evaluation = ["--eval-freq", "100", "--eval-episodes", "2", "--save-freq", "100", "--save-replay-buffer"]
    parameters = ["-params", *SMALL, "gate:'VarianceSwitch(4.0)'", "critic_learning_rate:'lin_5e-4'"]
    return Trained(logs, zoo("train", *QUICK, *evaluation, "-f", str(logs), "-n", "200", *parameters))


@pytest.fixture
def logs(trained: Trained, tmp_path: Path) -> Path:
    """A copy of the shared run's log folder."""
    return Path(shutil.copytree(trained.logs, tmp_path / "logs"))


# ---------------------------------------------------------------------- train


def test_training_leaves_what_the_zoo_promises(trained: Trained) -> None:
    """Models, checkpoints, evaluations and the replay buffer, with AGPO's own hyperparameters and derivatives."""
    names = {path.name for path in trained.folder.iterdir()}
    checkpoints = {"rl_model_100_steps.zip", "rl_model_200_steps.zip"}
    assert names >= {
        "0.monitor.csv",
        "best_model.zip",
        "evaluations.npz",
        "replay_buffer.pkl",
        trained.model.name,
        *checkpoints,
    }
    assert f"Loading hyperparameters from: {sb3_agpo.zoo.HYPERPARAMETER_FILE}" in trained.output
    assert "Simulator derivatives: from mujoco" in trained.output
    assert np.load(trained.folder / "evaluations.npz")["timesteps"].tolist() == [100, 200]
    assert trained.config()["policy"] == "MlpPolicy"


def test_parameters_given_as_text_reach_agpo(trained: Trained) -> None:
    """`-params` and YAML can name gates and decreasing learning rates."""
    model = AGPO.load(trained.model)
    assert isinstance(model.gate, VarianceSwitch) and model.gate.ratio == 4.0
    assert model.critic_lr_schedule(0.5) == pytest.approx(2.5e-4)
    assert (model.rollout_size, model.buffer_size, model._n_updates) == (32, 1000, 60)


def test_continuing_starts_from_the_agent_and_its_memory(trained: Trained, logs: Path) -> None:
    """`-i` loads weights and replay buffer; with no further update they stay."""
    start = logs / "agpo" / f"{ENVIRONMENT}_1" / trained.model.name
    arguments = ["-i", str(start), "-f", str(logs), "-n", "40", "--save-replay-buffer", "-params", *SMALL[:-1]]
    assert "Loading replay buffer" in zoo("train", *QUICK, *arguments)
    folder = logs / "agpo" / f"{ENVIRONMENT}_2"
    before, after = AGPO.load(start), AGPO.load(folder / f"{ENVIRONMENT}.zip")
    assert all((p == q).all() for p, q in zip(before.policy.parameters(), after.policy.parameters(), strict=True))
    before.load_replay_buffer(trained.folder / "replay_buffer.pkl")
    after.load_replay_buffer(folder / "replay_buffer.pkl")
    assert before.replay_buffer is not None and after.replay_buffer is not None
    assert (before.replay_buffer.pos, after.replay_buffer.pos) == (200, 240)
    assert after.derivative_buffer.size > before.derivative_buffer.size > 0


def test_environments_in_worker_processes(tmp_path: Path) -> None:
    """`--vec-env subproc` through `python -m`, whose file the workers import too; derivatives come from the workers."""
    arguments = ["-f", str(tmp_path), "-n", "100", "--vec-env", "subproc", "-params", "n_envs:2", *SMALL]
    output = python("-m", "sb3_agpo.zoo", "train", *QUICK, *arguments)
    assert "Using 2 environments" in output
    assert "Simulator derivatives: from mujoco" in output
    assert (tmp_path / "agpo" / f"{ENVIRONMENT}_1" / "1.monitor.csv").is_file()


@pytest.mark.parametrize(
    ("arguments", "parameters", "expected"),
    [
        ([], [], MujocoVecEnv),
        (["--vec-env", "dummy"], [], DummyVecEnv),
        (["--vec=dummy"], [], DummyVecEnv),
        ([], ["env_wrapper:'rl_zoo3.wrappers.TimeFeatureWrapper'"], DummyVecEnv),
        ([], ["monitor_kwargs:dict(info_keywords=('reward_survive',))"], DummyVecEnv),
        (["--env", "Pendulum-v1"], [], DummyVecEnv),
        (["--algo", "sac"], [], DummyVecEnv),
    ],
)
def test_several_environments(
    arguments: list[str], parameters: list[str], expected: type[VecEnv], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Several environments of a stock task are stepped in threads, for training and evaluation, unless it is not wanted."""
    made: list[tuple[int, type[VecEnv]]] = []
    create = AGPOExperimentManager.create_envs

    def watched(self: AGPOExperimentManager, n_envs: int, *others: Any, **named: Any) -> VecEnv:
        env = create(self, n_envs, *others, **named)
        made.append((n_envs, type(env.unwrapped)))
        return env

    monkeypatch.setattr(AGPOExperimentManager, "create_envs", watched)
    monkeypatch.setattr(rl_zoo3.exp_manager.ExperimentManager, "learn", lambda *_: None, raising=True)
    monkeypatch.setattr(rl_zoo3.exp_manager.ExperimentManager, "save_trained_model", lambda *_: None)
    command = [*QUICK[:-2], "--eval-freq", "100", "--n-eval-envs", "2", "-n", "20", "-f", str(tmp_path), *arguments]
    zoo("train", *command, "-params", "n_envs:3", "policy:'MlpPolicy'", "n_timesteps:20", *parameters)
    assert sorted(made, key=str) == [(2, expected), (3, expected)]


@pytest.mark.filterwarnings("error:Training and eval env:UserWarning")
def test_training_in_threads(tmp_path: Path) -> None:
    """Two environments in threads, one in the evaluation; the files of Monitor and the derivatives are there."""
    evaluation = ["--eval-freq", "50", "--eval-episodes", "1"]
    output = zoo("train", *QUICK[:-2], *evaluation, "-f", str(tmp_path), "-n", "100", "-params", "n_envs:2", *SMALL)
    assert "Using 2 environments" in output and "Simulator derivatives: from mujoco" in output
    folder = tmp_path / "agpo" / f"{ENVIRONMENT}_1"
    assert (folder / "1.monitor.csv").is_file() and np.load(folder / "evaluations.npz")["timesteps"].size > 0


def test_tracking_offline(tmp_path: Path) -> None:
    """`--track` leaves an offline run, and TensorBoard's file where the zoo puts it; AGPO's callback adds to both."""
    variables = {"WANDB_MODE": "offline", "WANDB_DIR": str(tmp_path), "WANDB_SILENT": "true", "WANDB_CONSOLE": "off"}
    parameters = [*SMALL, "callback:'sb3_agpo.tracking.wandb.AGPOWandbCallback'"]
    python("-m", "sb3_agpo.zoo", "train", *QUICK, "-n", "120", "--track", "-f", "logs", "-params", *parameters, **variables)
    assert len(list(tmp_path.glob("wandb/offline-run-*/run-*.wandb"))) == 1
    (events,) = tmp_path.glob(f"runs/*/{ENVIRONMENT}/AGPO_1/events*")
    assert b"gate/step_0" in events.read_bytes()


def test_the_users_own_configuration_has_precedence(tmp_path: Path) -> None:
    """`--conf-file` replaces the shipped file; `lin_` is the only schedule it may name."""
    configuration = tmp_path / "own.yml"
    settings = {"n_timesteps": 20, "policy": "MlpPolicy", "buffer_size": 50, "critic_learning_rate": "step_1"}
    configuration.write_text(yaml.dump({ENVIRONMENT: settings}))
    arguments = ["-f", str(tmp_path), "--conf-file", str(configuration)]
    with pytest.raises(ValueError, match="'lin_5e-4', got 'step_1'"):
        zoo("train", *QUICK, *arguments)
    zoo("train", *QUICK, *arguments, "-params", "critic_learning_rate:3e-4")
    model = AGPO.load(tmp_path / "agpo" / f"{ENVIRONMENT}_1" / f"{ENVIRONMENT}.zip")
    assert (model.buffer_size, model.num_timesteps, model.critic_learning_rate) == (50, 20, 3e-4)


def make_manager(algo: str, **named: Any) -> AGPOExperimentManager:
    """
    Set up an experiment and run nothing.

    :param algo: name of the algorithm
    :param named: arguments of the manager
    :return: the experiment
    """
    return AGPOExperimentManager(Namespace(), algo, "Pendulum-v1", "logs", **named)


def test_other_algorithms_are_left_alone() -> None:
    """Registration adds an entry, and only AGPO's file and arguments are treated in another way."""
    assert rl_zoo3.ALGOS["sac"] is SAC
    manager = make_manager("sac", trial_id=0)
    assert Path(manager.config).parent == Path(rl_zoo3.__file__).parent / "hyperparams"
    assert not manager.trial_id
    hyperparameters = {"n_timesteps": 1, "gate": "kept", "critic_learning_rate": "kept"}
    assert manager._preprocess_hyperparams(hyperparameters)[0] == {"gate": "kept", "critic_learning_rate": "kept"}
    assert make_manager("agpo").config == str(sb3_agpo.zoo.HYPERPARAMETER_FILE)
    assert make_manager("agpo", config="given.yml").config == "given.yml"


# ---------------------------------------------------------------------- hyperparameters


def test_hyperparameters_of_every_task() -> None:
    """An entry for each MuJoCo task, two without derivatives and all others; AGPO takes what is in them."""
    assert set(sb3_agpo.zoo.hyperparameters) == MUJOCO_TASKS | CRITIC_ONLY_TASKS | {"default"}
    assert set(gym.registry) >= MUJOCO_TASKS | CRITIC_ONLY_TASKS
    known = {*inspect.signature(AGPO).parameters, "n_timesteps", "n_envs", "normalize", "env_kwargs"}
    for name, entry in sb3_agpo.zoo.hyperparameters.items():
        assert entry["n_timesteps"] > 0 and entry["policy"] == "MlpPolicy", name
        assert set(entry) <= known, name


@pytest.mark.parametrize("environment", ["Hopper-v5", "Pendulum-v1", "CartPoleSwingUp-none"])
def test_entries_can_be_used_without_the_zoo(environment: str) -> None:
    """The same file from Python."""
    settings = sb3_agpo.zoo.hyperparameters.get(environment, sb3_agpo.zoo.hyperparameters["default"])
    arguments = {name: value for name, value in settings.items() if name != "n_timesteps"}
    env = environment if environment in gym.registry else "Pendulum-v1"
    assert AGPO(env=env, **{**arguments, "buffer_size": 10}).policy_class.__name__ == "AGPOPolicy"


# ---------------------------------------------------------------------- playback


def test_enjoy(trained: Trained, capsys: pytest.CaptureFixture[str]) -> None:
    """Plays an agent back, the best one too."""
    for choice in ([], ["--load-best"], ["--load-checkpoint", "100"]):
        output = zoo("enjoy", *TASK, "-f", str(trained.logs), "-n", "200", "--no-render", *choice)
        assert "Mean reward" in output


def test_playback_needs_no_memory(trained: Trained) -> None:
    """Loading as `enjoy` and `record_video` do gives a buffer of one and leaves the environment alone."""
    env = make_vec_env(ENVIRONMENT)
    model = ZooAGPO.load(trained.model, env=env, custom_objects={"learning_rate": 0.0, "lr_schedule": None})
    assert model.replay_buffer is not None and model.replay_buffer.buffer_size == 1
    assert model.dynamics is None and not env.has_attr("agpo_report")
    with pytest.raises(ValueError, match="Observation spaces do not match"):
        ZooAGPO.load(trained.model, env=make_vec_env("Pendulum-v1"), custom_objects={"lr_schedule": None})
    training = ZooAGPO.load(trained.model, env=env)
    assert training.replay_buffer is not None and training.replay_buffer.buffer_size == 1000
    assert training.dynamics is not None


def test_playback_of_an_agent_with_hindsight(tmp_path: Path) -> None:
    """Hindsight replay cannot be set up without an environment; playback does without it."""
    from stable_baselines3.common.envs import BitFlippingEnv

    env = BitFlippingEnv(n_bits=2, continuous=True)
    model = AGPO("MultiInputPolicy", env, replay_buffer_class=HerReplayBuffer, buffer_size=100)
    model.save(tmp_path / "hindsight.zip")
    loaded = ZooAGPO.load(tmp_path / "hindsight.zip", custom_objects={"lr_schedule": None})
    assert not isinstance(loaded.replay_buffer, HerReplayBuffer)
    assert loaded.predict(env.reset()[0], deterministic=True)[0].shape == (2,)


@pytest.fixture(scope="module")
def renderer() -> str:
    """A way for MuJoCo to draw without a screen."""
    code = "import mujoco; mujoco.GLContext(8, 8).make_current()"
    for candidate in ("egl", "osmesa"):
        command = [sys.executable, "-c", code]
        if not subprocess.run(
            command, env={**os.environ, "MUJOCO_GL": candidate}, capture_output=True, timeout=1200
        ).returncode:
            return candidate
    pytest.skip("MuJoCo can draw neither with EGL nor with OSMesa on this machine")


def test_record_training(logs: Path, renderer: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """`record_training` starts `record_video` in new processes, which know AGPO, and joins the videos."""
    probe = [sys.executable, "-c", PROBE_DRAWTEXT]
    if subprocess.run(probe, capture_output=True, timeout=1200).returncode:
        pytest.skip("ffmpeg finds no font to label videos with")
    folder = logs / "agpo" / f"{ENVIRONMENT}_1"
    for name in ("best_model.zip", "rl_model_100_steps.zip"):
        (folder / name).unlink()
    monkeypatch.setenv("MUJOCO_GL", renderer)
    monkeypatch.setenv("PYTHONPATH", str(Path(sb3_agpo.__file__).parents[1]))
    path = os.environ["PATH"]
    zoo("record_training", *TASK, "-f", str(logs), "-n", "3")
    names = sorted(video.name for video in (folder / "videos").glob("*.mp4"))
    prefixes = [f"checkpoint-200-agpo-{ENVIRONMENT}", f"final-model-agpo-{ENVIRONMENT}", "training.mp4"]
    assert [name.startswith(prefix) for name, prefix in zip(names, prefixes, strict=True)] == [True] * 3
    assert all(video.stat().st_size > 0 for video in (folder / "videos").glob("*.mp4"))
    assert os.environ["PATH"] == path


PROBE_DRAWTEXT = """
import subprocess, sys
from sb3_agpo.zoo.scripts import _ffmpeg_on_path
with _ffmpeg_on_path():
    source = ["-f", "lavfi", "-i", "color=c=black:s=32x32:d=0.1"]
    sys.exit(subprocess.call(["ffmpeg", *source, "-vf", "drawtext=text=a", "-f", "null", "-"]))
"""


def test_calls_between_scripts_are_redirected() -> None:
    """Scripts start each other through AGPO's entry, in the same Python; other programs are called as they are."""
    entry = [sys.executable, "-m", "sb3_agpo.zoo"]
    assert redirected(["python", "-m", "rl_zoo3.record_video", "--algo", "agpo"]) == [*entry, "record_video", "--algo", "agpo"]
    assert redirected(["python", "enjoy.py", "-n", "1"]) == [*entry, "enjoy", "-n", "1"]
    assert redirected(["ffmpeg", "-i", "x"]) == ["ffmpeg", "-i", "x"]


def test_benchmark_and_plots(logs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the zoo makes of finished runs: a table from playing back, curves from monitors and evaluations."""
    monkeypatch.setenv("PYTHONPATH", str(Path(sb3_agpo.__file__).parents[1]))
    runs = logs / "agpo"
    shutil.copytree(runs / f"{ENVIRONMENT}_1", runs / f"{ENVIRONMENT}_2")  # the zoo's plots need more than one
    call = subprocess.call
    zoo("benchmark", "--log-dir", str(logs), "--benchmark-dir", "table", "--no-hub", "-n", "200", "--num-threads", "1")
    assert subprocess.call is call
    assert f"|agpo|{ENVIRONMENT}|" in Path("table/benchmark.md").read_text()
    monkeypatch.setattr(mpl.pyplot, "show", lambda: None)
    zoo("plot_train", "-a", "agpo", "-e", ENVIRONMENT, "-f", str(logs), "-w", "5")
    zoo("all_plots", "-a", "agpo", "-e", ENVIRONMENT, "-f", str(logs), "-o", "results", "--no-display")
    curves = pickle.loads(Path("results.pkl").read_bytes())
    assert curves[ENVIRONMENT][f"AGPO-{logs}"]["timesteps"].tolist() == [100, 200]
    zoo("plot_from_file", "-i", "results.pkl", "-o", "curves.png", "--format", "png", "-b")
    assert Path("curves.png").stat().st_size > 0
    mpl.pyplot.close("all")


# ---------------------------------------------------------------------- entry


def test_what_was_trained_is_looked_for_where_training_puts_it() -> None:
    """The zoo would look for agents of its own, and for AGPO's on the network."""
    for script in ("enjoy", "record_video", "record_training"):
        for algo in (["--algo", "agpo"], ["--algo=agpo"]):
            assert with_defaults(script, algo) == ["-f", "logs", *algo]
        assert with_defaults(script, ["--algo", "sac"]) == ["--algo", "sac"]
    assert with_defaults("train", ["--algo", "agpo"]) == ["--algo", "agpo"]
    assert with_defaults("optimize", ["--algo", "agpo"]) == ["-optimize", "--algo", "agpo"]


def test_usage_and_unknown_scripts(capsys: pytest.CaptureFixture[str]) -> None:
    """Help lists the scripts; a name that is none of them is an error of usage."""
    assert main(["--help"]) == 0
    usage = capsys.readouterr().out
    assert all(script in usage for script in (*FUNCTIONS, *MODULES))
    assert main([]) == 2
    assert main(["tain"]) == 2
    assert "there is no script 'tain'" in capsys.readouterr().err


def test_command_line_is_put_back() -> None:
    """Also after a script that ends the process."""
    before = list(sys.argv)
    with pytest.raises(SystemExit, match="0"):
        zoo("enjoy", "--help")
    assert sys.argv == before


def test_registration_in_a_users_own_script() -> None:
    """Two lines before the zoo's own entry."""
    own = "import sb3_agpo.zoo; sb3_agpo.zoo.register(); from rl_zoo3.train import train; train()"
    assert "agpo" in python("-c", own, "--help")


def test_without_the_zoo(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """The hyperparameters are there; registering names the extra to install."""
    monkeypatch.setitem(sys.modules, "rl_zoo3.exp_manager", None)
    with pytest.raises(ImportError, match=r"pip install 'sb3-agpo\[zoo\]'"):
        register()
    assert main(["train"]) == 2
    assert capsys.readouterr().err.startswith("error: RL Baselines3 Zoo cannot be imported")
