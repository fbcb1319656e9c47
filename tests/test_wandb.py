"""Weights & Biases: real offline runs, read back from the files that they leave."""

import gc
import itertools
import json
import math
import shutil
import weakref
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path
from typing import Any

import gymnasium as gym
import matplotlib.figure
import numpy as np
import pytest
import torch as th
import wandb
from numpy.typing import NDArray
from PIL import Image as PillowImage
from stable_baselines3 import SAC
from stable_baselines3.common.callbacks import BaseCallback, EvalCallback
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.logger import Figure, HParam, Image, TensorBoardOutputFormat, Video, configure
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.vec_env import DummyVecEnv, VecNormalize
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from wandb_files import Offline

from sb3_agpo import AGPO
from sb3_agpo.agpo.gates import ConstantGate, DisagreementGate, VarianceSwitch
from sb3_agpo.dynamics.recorder import find_recorder
from sb3_agpo.tracking.figures import read_progress
from sb3_agpo.tracking.gate_recorder import GateRecorder
from sb3_agpo.tracking.outputs import ProgressFile
from sb3_agpo.tracking.pictures import frames_of, picture_of
from sb3_agpo.tracking.video import encode_animation, record_episode, record_gate
from sb3_agpo.tracking.wandb import (
    FIGURES,
    STEP,
    AGPOWandbCallback,
    WandbOutputFormat,
    artifact_name,
    settings_of,
    to_wandb,
)

ENVIRONMENT = "InvertedPendulum-v5"
SMALL: dict[str, Any] = {
    "critic_grad_coef": 1.0,
    "buffer_size": 1000,
    "learning_starts": 20,
    "train_freq": 10,
    "rollout_size": 32,
    "horizon": 2,
    "policy_kwargs": {"net_arch": [16]},
    "seed": 0,
    "device": "cpu",
}


@pytest.fixture(scope="module", autouse=True)
def _offline(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """No account, no network, nothing printed, and nothing written outside temporary folders."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("DIR", "DATA_DIR", "CACHE_DIR", "CONFIG_DIR", "ARTIFACT_DIR"):
            patch.setenv(f"WANDB_{name}", str(tmp_path_factory.mktemp("wandb")))
        for name, value in (("MODE", "offline"), ("SILENT", "true"), ("CONSOLE", "off")):
            patch.setenv(f"WANDB_{name}", value)
        yield
        wandb.teardown()


@pytest.fixture(autouse=True)
def _no_run_left() -> Iterator[None]:
    """A test that fails leaves no active run to the next."""
    yield
    wandb.finish()


class Painted(gym.Wrapper):  # type: ignore[type-arg]
    """
    An environment that can draw itself on any machine.

    :param env: environment
    """

    render_mode = "rgb_array"

    def render(self) -> NDArray[np.uint8]:
        """A random picture."""
        return np.random.default_rng(0).integers(0, 255, (12, 16, 3), dtype=np.uint8)


def callback_in(folder: Path, **named: Any) -> AGPOWandbCallback:
    """
    A callback whose run is written to a folder.

    :param folder: the folder
    :param named: other arguments of the callback
    :return: the callback
    """
    return AGPOWandbCallback(run_arguments={"dir": str(folder), "tags": ["test"]}, **named)


class Logged:
    """
    A finished training run with everything logged.

    :param folder: of W&B and TensorBoard
    """

    def __init__(self, folder: Path) -> None:
        self.model = AGPO("MlpPolicy", ENVIRONMENT, tensorboard_log=str(folder / "tb"), gate=VarianceSwitch(2.0), **SMALL)
        evaluation = EvalCallback(Monitor(gym.make(ENVIRONMENT)), n_eval_episodes=1, eval_freq=100, verbose=0)
        painted = Painted(gym.make(ENVIRONMENT))
        self.callback = callback_in(
            folder, histogram_freq=100, figure_freq=150, checkpoint_freq=150, video_env=painted, video_freq=200
        )
        self.model.learn(250, callback=[evaluation, self.callback])
        self.run = Offline(folder)
        self.events = EventAccumulator(str(folder / "tb" / "AGPO_1"), size_guidance={"histograms": 0, "images": 0})
        self.events.Reload()


@pytest.fixture(scope="module")
def logged(tmp_path_factory: pytest.TempPathFactory) -> Logged:
    """One run that the tests share."""
    return Logged(tmp_path_factory.mktemp("logged"))


def test_scalars_of_the_logger(logged: Logged) -> None:
    """Everything that SB3's logger writes arrives, against environment steps, AGPO's statistics among it."""
    assert list(logged.run.series("eval/mean_reward")) == [100, 200]
    for key in ("gate_mean", "analytic_grad_norm", "critic_grad_norm", "grad_cosine", "matching_loss", "critic_loss"):
        values = logged.run.series(f"train/{key}")
        assert values and np.isfinite(list(values.values())).all(), key
    metrics = {record.metric.glob_name or record.metric.name for record in logged.run.records if record.HasField("metric")}
    assert metrics == {STEP, "*"}


def test_histograms_of_the_gate(logged: Logged) -> None:
    """One per window step, of weights between 0 and 1."""
    for step in range(SMALL["horizon"]):
        histograms = logged.run.series(f"gate/step_{step}")
        assert list(histograms) == [100, 200, 250]
        for histogram in histograms.values():
            assert histogram["_type"] == "histogram"
            low, high = histogram["bins"][0], histogram["bins"][-1]
            assert -0.5 <= low and high <= 1.5  # a constant is drawn half a unit wide on each side
            assert sum(histogram["values"]) > 0


def test_figures_and_video(logged: Logged) -> None:
    """Pictures of the run so far at their steps and at the end, kept in the run's files."""
    for key, steps in {"figures/learning_curve": [150, 250], "figures/gradient_statistics": [150, 250]}.items():
        pictures = logged.run.series(key)
        assert list(pictures) == steps
        assert all((logged.run.files / picture["path"]).read_bytes()[:4] == b"\x89PNG" for picture in pictures.values())
    videos = logged.run.series("video/episode")
    assert list(videos) == [200, 250]
    assert all((logged.run.files / video["path"]).read_bytes()[:3] == b"GIF" for video in videos.values())


def test_checkpoints_are_versions_of_one_artifact(logged: Logged) -> None:
    """Named after the run, found by step, and loadable without the callback."""
    artifacts = logged.run.artifacts
    assert {artifact.name for artifact in artifacts} == {f"checkpoint-{logged.run.run_id}"}
    assert [set(artifact.aliases) for artifact in artifacts] == [{"latest", "step-150"}, {"latest", "step-250"}]
    assert json.loads(artifacts[0].metadata) == {"num_timesteps": 150, "algo": "AGPO"}
    (entry,) = artifacts[0].manifest.contents
    assert entry.path == "model.zip"
    model = AGPO.load(entry.local_path)
    assert model.num_timesteps == 150
    assert isinstance(model.gate, VarianceSwitch) and model.gate.ratio == 2.0


def test_checkpoints_of_any_run_id(tmp_path: Path) -> None:
    """wandb allows more in an id than in an artifact's name: training goes on, and no two runs share an artifact."""
    callback = callback_in(tmp_path, run_id="my run@1", checkpoint_freq=20)
    model = AGPO("MlpPolicy", ENVIRONMENT, **SMALL).learn(40, callback=callback)
    assert model.num_timesteps == 40
    assert [artifact.name for artifact in Offline(tmp_path).artifacts] == [artifact_name("my run@1")] * 2
    ids = ["my run", "my@run", "my-run", "läuft", "%", "x" * 117, "x" * 118, "x" * 119]
    names = [wandb.Artifact(artifact_name(run_id), "model").name for run_id in ids]
    assert len(set(names)) == len(ids)
    assert (names[2], names[5]) == ("checkpoint-my-run", f"checkpoint-{'x' * 117}")  # as they are, where that is possible


def test_configuration(logged: Logged) -> None:
    """Hyperparameters, the source of derivatives, and what a run was asked to be."""
    config = logged.run.config()
    assert (config["algo"], config["horizon"], config["learning_rate"]) == ("AGPO", 2, logged.model.learning_rate)
    assert config["gate"] == "VarianceSwitch(ratio=2.0)"
    assert config["derivatives"].startswith("mujoco (")
    (run,) = (record.run for record in logged.run.records if record.HasField("run"))
    assert (run.project, list(run.tags)) == ("sb3-agpo", ["test"])


def test_tensorboard_gets_the_same(logged: Logged) -> None:
    """Histograms, figures and videos, next to SB3's scalars."""
    tags = logged.events.Tags()
    assert tags["histograms"] == ["gate/step_0", "gate/step_1"]
    assert set(tags["images"]) == {"figures/learning_curve", "figures/gradient_statistics", "video/episode"}
    assert [event.step for event in logged.events.Histograms("gate/step_0")] == [100, 200, 250]
    (*_, video) = logged.events.Images("video/episode")
    assert video.encoded_image_string[:3] == b"GIF" and (video.height, video.width) == (12, 16)
    assert "train/gate_mean" in tags["scalars"]


def test_the_model_is_left_as_it_was(logged: Logged) -> None:
    """After training class and gate are the user's, the logger has its own outputs only, and the run is over."""
    assert type(logged.model) is AGPO and isinstance(logged.model.gate, VarianceSwitch)
    assert {type(output).__name__ for output in logged.model.logger.output_formats} == {"TensorBoardOutputFormat"}
    assert wandb.run is None
    logged.callback.on_training_end()  # the zoo does so twice


def test_going_on_by_id(tmp_path: Path) -> None:
    """A second process of training, with its own folder, adds to the run of the first."""
    model = AGPO("MlpPolicy", ENVIRONMENT, **SMALL)
    first = callback_in(tmp_path / "first", histogram_freq=50)
    (tmp_path / "first").mkdir(), (tmp_path / "second").mkdir()
    model.learn(100, callback=first)
    assert model.gate is None
    model.save(tmp_path / "model.zip")
    loaded = AGPO.load(tmp_path / "model.zip", env=gym.make(ENVIRONMENT))
    assert first.run_id is not None
    second = callback_in(tmp_path / "second", run_id=first.run_id, histogram_freq=50)
    loaded.learn(100, callback=second, reset_num_timesteps=False)
    before, after = Offline(tmp_path / "first"), Offline(tmp_path / "second")
    assert before.run_id == after.run_id == first.run_id == second.run_id
    assert list(before.series("gate/step_0")) == [50, 100]
    assert list(after.series("gate/step_0"))[-1] == 200 and min(after.series("train/ent_coef")) > 100


def test_figures_go_on_with_their_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They show all calls of `learn` that the callback saw of the run, also an interrupted one; a new count begins anew."""
    drawn: list[list[float]] = []

    def draw(progress: Path, path: Path) -> None:
        drawn.append(read_progress(progress)["time/total_timesteps"].tolist())
        PillowImage.new("RGB", (2, 2)).save(path)

    class Dump(BaseCallback):
        def _on_step(self) -> bool:
            if self.num_timesteps == 60:
                self.model.dump_logs()  # type: ignore[attr-defined]
                raise KeyboardInterrupt
            return True

        def _on_training_end(self) -> None:
            self.model.dump_logs()  # type: ignore[attr-defined]

    monkeypatch.setitem(FIGURES, "figures/learning_curve", draw)
    wandb.init(dir=str(tmp_path))
    callbacks = [Dump(), AGPOWandbCallback(figure_freq=1000)]
    named: dict[str, Any] = {"callback": callbacks, "log_interval": 1000}
    model = AGPO("MlpPolicy", ENVIRONMENT, **SMALL).learn(40, **named)
    with pytest.raises(KeyboardInterrupt):
        model.learn(40, reset_num_timesteps=False, **named)
    model.learn(20, reset_num_timesteps=False, **named)
    model.learn(30, **named)
    assert drawn == [[40.0], [40.0, 60.0, 80.0], [30.0]]


def test_an_active_run_is_used_and_stays_open(tmp_path: Path) -> None:
    """The user's run keeps its configuration; a run of another id is refused."""
    run = wandb.init(dir=str(tmp_path), project="mine", config={"horizon": "given"})
    callback = AGPOWandbCallback()
    AGPO("MlpPolicy", ENVIRONMENT, gradient_mode="q", **SMALL).learn(40, callback=callback)
    assert wandb.run is run and callback.run_id == run.id
    assert (run.config["horizon"], run.config["gradient_mode"]) == ("given", "q")
    with pytest.raises(ValueError, match=r"is active, but `run_id` is 'other'; call `wandb.finish\(\)` first"):
        AGPO("MlpPolicy", ENVIRONMENT, **SMALL).learn(1, callback=AGPOWandbCallback(run_id="other"))


def test_synchronised_tensorboard_sends_nothing_twice(tmp_path: Path) -> None:
    """With `sync_tensorboard` everything comes from TensorBoard's file, once."""
    run = wandb.init(dir=str(tmp_path), sync_tensorboard=True)
    model = AGPO("MlpPolicy", ENVIRONMENT, tensorboard_log=str(tmp_path / "tb"), **SMALL)
    painted = Painted(gym.make(ENVIRONMENT))
    model.learn(100, callback=AGPOWandbCallback(histogram_freq=50, video_env=painted, video_freq=100))
    run.finish()
    wandb.tensorboard.unpatch()
    offline = Offline(tmp_path)
    steps = [row[STEP] for row in offline.rows if "gate/step_0" in row]
    assert steps == [50, 100]
    assert len([row for row in offline.rows if "train/ent_coef" in row]) == len(offline.series("train/ent_coef")) > 0
    assert list(offline.series("video/episode")) == [100]


def test_a_run_of_its_own_cannot_be_synchronised(tmp_path: Path) -> None:
    """TensorBoard's file is open before the run is: what is asked for in vain must not leave the run empty."""
    model = AGPO("MlpPolicy", ENVIRONMENT, tensorboard_log=str(tmp_path / "tb"), **SMALL)
    arguments = {"dir": str(tmp_path), "sync_tensorboard": True}
    model.learn(100, callback=AGPOWandbCallback(run_arguments=arguments, histogram_freq=50))
    wandb.tensorboard.unpatch()
    offline = Offline(tmp_path)
    assert list(offline.series("gate/step_0")) == [50, 100]
    assert offline.series("train/ent_coef")


class Interrupt(BaseCallback):
    """Ctrl-C, after 60 steps."""

    def _on_step(self) -> bool:
        if self.num_timesteps == 60:
            raise KeyboardInterrupt
        return True


def test_after_an_interrupt_a_run_of_the_users_own_is_used(tmp_path: Path) -> None:
    """Also if it goes on with the callback's: whoever opened it closes it."""
    model = AGPO("MlpPolicy", ENVIRONMENT, **SMALL)
    callback = callback_in(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        model.learn(100, callback=[callback, Interrupt()])
    wandb.finish()
    run = wandb.init(id=callback.run_id, resume="allow", dir=str(tmp_path))
    for used in (callback, AGPOWandbCallback()):
        model.learn(20, callback=used, reset_num_timesteps=False)
        assert wandb.run is run and used.run_id == run.id


@pytest.mark.parametrize("again", [False, True])
def test_after_an_interrupt_the_users_logger_goes_on(again: bool, tmp_path: Path) -> None:
    """It is kept over calls of ``learn``, unlike SB3's own; nothing of the finished run is left in the way."""
    model = AGPO("MlpPolicy", ENVIRONMENT, **SMALL)
    model.set_logger(configure(str(tmp_path / "log"), ["csv"]))
    first = callback_in(tmp_path)
    with pytest.raises(KeyboardInterrupt), wandb.init(dir=str(tmp_path)):
        model.learn(100, callback=[first, Interrupt()])
    model.learn(200, callback=callback_in(tmp_path) if again else None, reset_num_timesteps=False)
    assert (type(model) is AGPO) is again
    assert len(model.logger.output_formats) == (1 if again else 3)


def test_a_run_that_was_interrupted_is_not_gone_on_with(tmp_path: Path) -> None:
    """SB3 tells callbacks nothing of an error or Ctrl-C; the next run is another one, the same callback's is the same."""
    model = AGPO("MlpPolicy", ENVIRONMENT, **SMALL)
    first, second = (callback_in(tmp_path / name, histogram_freq=20) for name in ("first", "second"))
    (tmp_path / "first").mkdir(), (tmp_path / "second").mkdir()
    with pytest.raises(KeyboardInterrupt):
        model.learn(100, callback=[first, Interrupt()])
    model.learn(40, callback=first, reset_num_timesteps=False)  # long enough for windows of a new episode
    assert wandb.run is None and type(model) is AGPO
    assert {40, 100} <= set(Offline(tmp_path / "first").series("gate/step_0"))
    with pytest.raises(KeyboardInterrupt):
        model.learn(100, callback=[first, Interrupt()])
    gone = weakref.ref(first)
    other = AGPO("MlpPolicy", ENVIRONMENT, **SMALL).learn(40, callback=second)
    assert second.run_id != first.run_id and wandb.run is None
    assert type(model) is type(other) is AGPO
    first_id, first = first.run_id, None  # type: ignore[assignment]
    del model
    gc.collect()
    assert gone() is None and first_id is not None


def test_two_callbacks_share_a_run(tmp_path: Path) -> None:
    """The first of a call of `learn` starts it, the last one finishes it; both watch the gate."""
    pair = [callback_in(tmp_path, histogram_freq=frequency) for frequency in (20, 1000)]
    model = AGPO("MlpPolicy", ENVIRONMENT, **SMALL).learn(40, callback=[*pair])
    assert pair[0].run_id == pair[1].run_id and wandb.run is None and type(model) is AGPO
    assert list(Offline(tmp_path).series("gate/step_0")) == [40]


def test_without_histograms_nothing_is_collected(tmp_path: Path) -> None:
    """The model keeps its class while it learns, and no histogram is there; with them, both are otherwise."""

    class Watch(BaseCallback):
        kinds: set[type]

        def _on_training_start(self) -> None:
            self.kinds = set()

        def _on_step(self) -> bool:
            self.kinds.add(type(self.model))
            return True

    for frequency, kept in ((0, True), (20, False)):
        folder, watch = tmp_path / str(frequency), Watch()
        folder.mkdir()
        model = AGPO("MlpPolicy", ENVIRONMENT, **SMALL)
        model.learn(40, callback=[callback_in(folder, histogram_freq=frequency), watch])
        assert (watch.kinds == {AGPO}) is kept and type(model) is AGPO
        assert any("gate/step_0" in row for row in Offline(folder).rows) is not kept


def test_disabled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything is called and nothing is written."""
    monkeypatch.setenv("WANDB_MODE", "disabled")
    painted = Painted(gym.make(ENVIRONMENT))
    everything = {"histogram_freq": 40, "figure_freq": 80, "checkpoint_freq": 40, "video_env": painted, "video_freq": 40}
    callback = AGPOWandbCallback(run_arguments={"dir": str(tmp_path), "mode": "disabled"}, **everything)  # type: ignore[arg-type]
    AGPO("MlpPolicy", ENVIRONMENT, **SMALL).learn(80, callback=callback)
    assert not list(tmp_path.iterdir())


def test_other_algorithms(tmp_path: Path) -> None:
    """SAC has no gate and no gradient statistics; the rest is logged, with its normalisation and memory in checkpoints."""
    env = VecNormalize(make_vec_env(ENVIRONMENT))
    model = SAC("MlpPolicy", env, seed=0, learning_starts=20, train_freq=20, buffer_size=100, policy_kwargs={"net_arch": [8]})
    callback = callback_in(tmp_path, histogram_freq=20, checkpoint_freq=60, resumable_checkpoints=True)
    model.learn(60, callback=callback, log_interval=1)  # an episode ends, and is logged, after the first update
    offline = Offline(tmp_path)
    assert offline.series("train/critic_loss")
    assert not [key for row in offline.rows for key in row if key.startswith("gate/")]
    names = {entry.path for entry in offline.artifacts[0].manifest.contents}
    assert names == {"model.zip", "vecnormalize.pkl", "replay_buffer.pkl"}
    assert "derivatives" not in offline.config()


# ---------------------------------------------------------------------- parts


def test_animations_play_at_the_speed_of_the_task() -> None:
    """GIF counts in hundredths of a second, and browsers show less than two of them as ten."""
    frames = [np.full((4, 4, 3), 20 * index, dtype=np.uint8) for index in range(12)]
    for speed, every, duration in ((10.0, 1, 100), (50.0, 1, 20), (67.0, 2, 30), (125.0, 3, 20)):
        with PillowImage.open(BytesIO(encode_animation(frames, speed).gif)) as picture:
            assert picture.n_frames == len(frames) // every  # type: ignore[attr-defined]
            assert picture.info["duration"] == duration


def test_environments_that_normalise_do_so_as_in_training() -> None:
    """Once, with the statistics of training, which a video does not move."""
    model = AGPO("MlpPolicy", VecNormalize(make_vec_env(ENVIRONMENT)), **SMALL).learn(40)
    seen: list[Any] = []
    predict = model.predict
    model.predict = lambda observation, **_: (seen.append(observation), predict(observation))[1]  # type: ignore[method-assign]
    training = model.get_vec_normalize_env()
    assert training is not None
    env = VecNormalize(DummyVecEnv([lambda: Painted(gym.make(ENVIRONMENT))]))
    env.seed(3)
    first = training.normalize_obs(env.venv.reset())
    env.seed(3)
    count = env.obs_rms.count  # type: ignore[union-attr]
    record_episode(model, env, max_frames=1)
    assert np.array_equal(seen[0], first)
    assert env.obs_rms.count == count and env.training and env.norm_reward  # type: ignore[union-attr]


def test_videos_where_rewards_alone_are_normalised() -> None:
    """``VecNormalize`` has no statistics of observations then."""
    model = AGPO("MlpPolicy", VecNormalize(make_vec_env(ENVIRONMENT), norm_obs=False), **SMALL).learn(40)
    for norm_obs in (True, False):
        env = VecNormalize(DummyVecEnv([lambda: Painted(gym.make(ENVIRONMENT))]), norm_obs=norm_obs)
        frames, _ = record_episode(model, env, max_frames=2)
        assert len(frames) == 2 and env.norm_obs is norm_obs


def test_gate_of_an_episode() -> None:
    """As updates see it: the critic has the step that ends it; the environment's own recorder comes back."""
    model = AGPO("MlpPolicy", Painted(gym.make(ENVIRONMENT)), gate=ConstantGate(1.0), **SMALL).learn(40)
    env = model.env.envs[0]  # type: ignore[union-attr]
    recorder = find_recorder(env)
    frames, weights, _ = record_gate(model, env, seed=0)
    assert weights.tolist() == [1.0] * (len(frames) - 1) + [0.0]
    assert find_recorder(env) is recorder is not None
    model.learn(40)
    other = Painted(gym.make(ENVIRONMENT))
    record_gate(model, other, seed=0)
    assert find_recorder(other) is None


def test_recording_a_gate_leaves_the_model_alone() -> None:
    """Weights are passed on and handed over once; the model's attributes are the user's, and so is its class afterwards."""
    model = AGPO("MlpPolicy", ENVIRONMENT, gate=ConstantGate(0.25), **SMALL)
    before = dict(vars(model))
    recorder = GateRecorder(model)
    assert isinstance(model, AGPO) and type(model).__name__ == "AGPO" and vars(model) == before
    gradients = th.ones(3, 2)
    for step in (1, 0, 1):
        assert model._gate()(gradients, gradients, step).tolist() == [0.25] * 3
    assert {step: len(weights) for step, weights in recorder.take().items()} == {0: 3, 1: 6}
    assert recorder.take() == {}
    recorder.close()
    assert type(model) is AGPO


def test_watching_changes_nothing(tmp_path: Path) -> None:
    """A watched run takes the same course as an unwatched one, and its checkpoint goes on to the same weights."""
    plain = AGPO("MlpPolicy", ENVIRONMENT, **SMALL).learn(150)
    watched = AGPO("MlpPolicy", ENVIRONMENT, **SMALL)
    watched.learn(150, callback=callback_in(tmp_path, checkpoint_freq=100, resumable_checkpoints=True))
    assert_equal_weights(plain, watched)
    (first, _) = Offline(tmp_path).artifacts
    folder = tmp_path / "downloaded"
    for entry in first.manifest.contents:
        (folder / entry.path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(entry.local_path, folder / entry.path)
    resumed = AGPO.resume(folder / "resumable", ENVIRONMENT)
    assert resumed.num_timesteps == 100
    assert_equal_weights(plain, resumed.learn(50, reset_num_timesteps=False))


def assert_equal_weights(one: AGPO, other: AGPO) -> None:
    """
    Compare two models bit for bit.

    :param one: model
    :param other: model
    """
    assert all(map(th.equal, one.policy.state_dict().values(), other.policy.state_dict().values()))


def test_settings() -> None:
    """Numbers and text as they are, anything else described, and nothing that is no setting."""
    settings = settings_of(AGPO("MlpPolicy", ENVIRONMENT, gate=DisagreementGate(3.0), **SMALL))
    assert (settings["gate"], settings["horizon"]) == ("DisagreementGate(tolerance=3.0)", 2)
    assert settings["finite_differences"].startswith("FiniteDifferences(")
    assert not {"env", "policy_class", "_init_setup_model"} & set(settings)


@pytest.mark.parametrize(
    ("value", "kind"),
    [
        (1, float),
        (np.float32(0.5), float),
        (True, float),
        ("text", str),
        (th.rand(4, 2), wandb.Histogram),
        (np.arange(3), wandb.Histogram),
        (th.tensor([1.0, math.nan, math.inf]), wandb.Histogram),
        (np.full(2, math.nan), type(None)),
        (np.linspace(0.0, 1.0, 5)[::-1], wandb.Histogram),
        (np.arange(3, dtype=">f4"), wandb.Histogram),
        (np.arange(3, dtype=np.longdouble), wandb.Histogram),
        (th.eye(2).to_sparse(), wandb.Histogram),
        (th.ones(2, requires_grad=True), wandb.Histogram),
        (np.array(["a"]), type(None)),
        (np.array([object()]), type(None)),
        (np.ones(2, dtype=complex), type(None)),
        (th.ones(2, dtype=th.complex64), type(None)),
        (Figure(matplotlib.figure.Figure(), close=False), wandb.Image),
        (Image(np.zeros((4, 4, 3), dtype=np.uint8), "HWC"), wandb.Image),
        (Image(np.zeros((3, 4, 4), dtype=np.uint8), "CHW"), wandb.Image),
        (Image(th.rand(4, 4), "HW"), wandb.Image),
        (Video(th.zeros(1, 2, 3, 4, 4), 10.0), wandb.Video),
        (encode_animation([np.zeros((4, 4, 3), dtype=np.uint8)] * 2, 10.0), wandb.Video),
        (HParam({}, {"a": 1}), type(None)),
    ],
)
def test_conversion(value: Any, kind: type) -> None:
    """What SB3's logger takes, as Weights & Biases shows it."""
    assert isinstance(to_wandb(value), kind)


def test_images_are_read_as_tensorboard_does(tmp_path: Path) -> None:
    """In every order of their axes, with one, three or four channels, as bytes and as fractions, and several in a grid."""
    draw = np.random.default_rng(0)
    images: dict[str, Image] = {}
    for axes, channels in (("HW", 0), ("CHW", 1), ("CHW", 3), ("CHW", 4), ("NCHW", 1), ("NCHW", 3)):
        for order in map("".join, itertools.permutations(axes)):
            shape = [{"N": 11, "C": channels, "H": 4, "W": 5}[axis] for axis in order]
            images[f"bytes/{channels}/{order}"] = Image(draw.integers(0, 256, shape, dtype=np.uint8), order)
            images[f"fractions/{channels}/{order}"] = Image(th.as_tensor(draw.uniform(-0.2, 1.2, shape)), order.lower())
    writer = TensorBoardOutputFormat(str(tmp_path))
    writer.write(images, dict.fromkeys(images, ()), 0)  # type: ignore[arg-type]
    writer.close()
    events = EventAccumulator(str(tmp_path), size_guidance={"images": 0})
    events.Reload()
    assert len(images) == 2 * (2 + 3 * 6 + 2 * 24)
    for name, image in images.items():
        (event,) = events.Images(name)
        with PillowImage.open(BytesIO(event.encoded_image_string)) as picture:
            assert np.array_equal(picture_of(image), np.asarray(picture)), name


def test_figures_are_closed_if_they_should_be() -> None:
    """As TensorBoard's writer does, which need not be there; those that stay open would add up."""
    from matplotlib import pyplot

    for close in (True, False):
        figure = pyplot.figure()
        assert isinstance(to_wandb(Figure(figure, close=close)), wandb.Image)
        assert pyplot.fignum_exists(figure.number) is not close
        pyplot.close(figure)


def test_videos_of_the_logger(tmp_path: Path) -> None:
    """Frame by frame at their speed, several beside one another, and sent without a codec."""
    frames = th.zeros(2, 6, 1, 4, 5, dtype=th.uint8)
    frames[0] = 40 * th.arange(6, dtype=th.uint8)[:, None, None, None]
    pictures = frames_of(Video(frames, 10))
    assert [picture.shape for picture in pictures] == [(4, 10, 3)] * 6
    assert all((picture[:, :5] == 40 * i).all() and not picture[:, 5:].any() for i, picture in enumerate(pictures))
    colors = np.random.default_rng(0).random((1, 3, 4, 4, 5))
    first, *_ = frames_of(Video(th.as_tensor(colors), 10))
    assert np.array_equal(first, (255 * colors[0, 0, :3].transpose(1, 2, 0).astype(np.float32)).astype(np.uint8))
    with wandb.init(dir=str(tmp_path)) as run:
        WandbOutputFormat(run).write({"seen": Video(frames, 10)}, {}, 7)
    offline = Offline(tmp_path)
    with PillowImage.open(offline.files / offline.series("seen")[7]["path"]) as picture:
        assert (picture.format, picture.n_frames, picture.info["duration"]) == ("GIF", 6, 100)  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (Image(np.zeros((4, 4, 3)), "HW"), r"of shape \(4, 4, 3\) cannot have the axes 'HW'; name each of them"),
        (Image(np.zeros((4, 4, 3)), "XYC"), "cannot have the axes 'XYC'"),
        (Image(np.zeros((4, 2, 3)), "HCW"), "got 2 channel"),
        (Image(np.zeros((5, 4, 4)), "CHW"), "1, 3 or 4 channels and at least one picture, got 5 channel"),
        (Image(np.zeros((0, 3, 4, 4)), "NCHW"), r"and 0 value\(s\)"),
        (Video(th.zeros(2, 3, 4, 4), 10.0), r"got \(2, 3, 4, 4\); add the axes that are missing"),
        (Video(th.zeros(1, 2, 8, 8, 3), 10.0), "got 8 channel"),
        (Video(th.zeros(1, 0, 3, 4, 4), 10.0), r"and 0 value\(s\)"),
    ],
)
def test_images_that_cannot_be_read(value: Any, message: str) -> None:
    """An error that tells the shape, instead of a picture that is none."""
    with pytest.raises(ValueError, match=message):
        to_wandb(value)


def test_exclusion(tmp_path: Path) -> None:
    """Values can be kept from this output, as from SB3's own."""
    with wandb.init(dir=str(tmp_path)) as run:
        values: dict[str, Any] = {"kept": 1, "excluded": 2, "unknown": object()}
        WandbOutputFormat(run).write(values, {"excluded": ("wandb",), "kept": ("stdout",)}, 7)
    (row,) = Offline(tmp_path).rows
    assert {key for key in row if not key.startswith("_")} == {"kept", STEP}


def test_the_file_behind_the_figures_takes_what_users_record(tmp_path: Path) -> None:
    """SB3's CSV writer raises an error for a figure that the user excluded from other outputs only."""
    output = ProgressFile(str(tmp_path / "progress.csv"))
    output.write({"a": 1, "picture": Figure(matplotlib.figure.Figure(), close=False), "text": "b"}, {"picture": ("stdout",)})
    output.write({"a": np.float32(2.0), "c": 0.5}, {"a": ("csv",)})
    output.close()
    rows = (tmp_path / "progress.csv").read_text()
    longer = ProgressFile(str(tmp_path / "longer.csv"), rows)
    longer.write({"c": 2.0, "b": 3}, {})
    longer.close()
    values = read_progress(tmp_path / "longer.csv")
    assert np.array_equal(values["c"], [np.nan, 0.5, 2.0], equal_nan=True) and values["b"][-1] == 3.0
    assert {name: values.tolist() for name, values in read_progress(tmp_path / "progress.csv").items()}["a"] == [1.0, 2.0]


def test_refusals() -> None:
    """Arguments that make no sense name the fix."""
    with pytest.raises(ValueError, match="`figure_freq` must be a number of steps, or 0 for never, got -1"):
        AGPOWandbCallback(figure_freq=-1)
    with pytest.raises(ValueError, match="videos need both `video_env` and `video_freq`"):
        AGPOWandbCallback(video_freq=10)
    with pytest.raises(ValueError, match='`render_mode="rgb_array"`, got None'):
        record_episode(AGPO("MlpPolicy", ENVIRONMENT, **SMALL), gym.make(ENVIRONMENT))


def test_episodes_are_recorded_as_the_policy_sees_them() -> None:
    """Observations are normalised with the statistics of training; long episodes are cut."""
    env = VecNormalize(make_vec_env(ENVIRONMENT))
    model = AGPO("MlpPolicy", env, **SMALL)
    env.obs_rms.mean[:] = 5.0  # type: ignore[union-attr]
    seen = []
    predict = model.predict

    def spy(observation: Any, **named: Any) -> Any:
        seen.append(observation)
        return predict(observation, **named)

    model.predict = spy  # type: ignore[method-assign]
    frames, speed = record_episode(model, Painted(gym.make(ENVIRONMENT)), max_frames=2)
    assert len(frames) == 2 and frames[0].shape == (12, 16, 3) and speed > 0
    assert all((observation < -2.0).all() for observation in seen)
