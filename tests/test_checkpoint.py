"""Checkpoints: a resumed run equals an uninterrupted one bit for bit, and no failure harms the last one."""

import random
import warnings
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from small_models import SMALL, RandomEnv, parameters_equal, small_model
from stable_baselines3 import SAC, HerReplayBuffer
from stable_baselines3.common.buffers import NStepReplayBuffer, ReplayBuffer
from stable_baselines3.common.callbacks import BaseCallback, CallbackList, EveryNTimesteps
from stable_baselines3.common.distributions import StateDependentNoiseDistribution
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.envs import BitFlippingEnv
from stable_baselines3.common.noise import NormalActionNoise, OrnsteinUhlenbeckActionNoise
from stable_baselines3.common.torch_layers import FlattenExtractor
from stable_baselines3.common.utils import LinearSchedule, set_random_seed
from stable_baselines3.common.vec_env import DummyVecEnv, SubprocVecEnv, VecEnv, VecFrameStack, VecMonitor, VecNormalize

from sb3_agpo import AGPO
from sb3_agpo.agpo import checkpoint
from sb3_agpo.agpo.checkpoint import capture_attributes
from sb3_agpo.agpo.gates import VarianceSwitch
from sb3_agpo.checkpoint.directory import complete_checkpoints
from sb3_agpo.dynamics.mujoco import FiniteDifferences
from sb3_agpo.dynamics.torch_tasks import TorchPendulum
from sb3_agpo.tracking.callbacks import ResumableCheckpointCallback
from sb3_agpo.vec_env import MujocoVecEnv


@pytest.fixture(autouse=True)
def _no_warnings() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


# ---------------------------------------------------------------------- bit for bit

MakeEnv = Callable[[], Any]


def seeded(env: gym.Env[Any, Any]) -> gym.Env[Any, Any]:
    """An environment that draws from its observation space, which SB3 does not seed."""
    env.observation_space.seed(5)
    return env


RUNS: dict[str, tuple[MakeEnv, dict[str, Any]]] = {
    "mujoco": (lambda: make_vec_env("InvertedPendulum-v5", 1), {}),
    "many": (lambda: make_vec_env("HalfCheetah-v5", 3), {}),
    "stale_readings": (lambda: make_vec_env("Ant-v5", 1), {}),
    "no_derivatives": (lambda: "Pendulum-v1", {}),
    "exact_derivatives": (lambda: gym.wrappers.TimeLimit(TorchPendulum(), 30), {}),
    "mujoco_vec_env": (lambda: MujocoVecEnv("Hopper-v5", 2), {}),
    "mujoco_vec_env_full": (lambda: MujocoVecEnv("Reacher-v5", 2, full_info=True, max_episode_steps=20), {}),
    "vec_normalize": (lambda: VecNormalize(make_vec_env("InvertedPendulum-v5", 2)), {}),
    "vec_wrappers": (lambda: VecMonitor(VecFrameStack(DummyVecEnv([lambda: gym.make("InvertedPendulum-v5")] * 2), 2)), {}),
    "sde": (lambda: make_vec_env("InvertedPendulum-v5", 2), {"use_sde": True, "sde_sample_freq": 4}),
    "n_steps": (lambda: make_vec_env("InvertedPendulum-v5", 1), {"n_steps": 3}),
    "n_step_buffer_of_the_users_choice": (
        lambda: make_vec_env("InvertedPendulum-v5", 1),
        {"replay_buffer_class": NStepReplayBuffer, "replay_buffer_kwargs": {"n_steps": 2, "gamma": 0.9}},
    ),
    "schedules": (
        lambda: make_vec_env("InvertedPendulum-v5", 1),
        {"learning_rate": LinearSchedule(1e-3, 1e-5, 1.0), "critic_learning_rate": LinearSchedule(1e-2, 1e-4, 0.5)},
    ),
    "objects": (
        lambda: make_vec_env("InvertedPendulum-v5", 2),
        {
            "gate": VarianceSwitch(3.0),
            "action_noise": NormalActionNoise(np.zeros(1), 0.1 * np.ones(1)),
            "finite_differences": FiniteDifferences(position_step=1e-2),
            "ent_coef": 0.1,
            "policy_kwargs": {"optimizer_class": th.optim.AdamW, "features_extractor_class": FlattenExtractor},
        },
    ),
    "correlated_noise": (
        lambda: make_vec_env("InvertedPendulum-v5", 2),
        {"action_noise": OrnsteinUhlenbeckActionNoise(np.zeros(1), 0.5 * np.ones(1))},
    ),
    "full_buffer": (lambda: make_vec_env("InvertedPendulum-v5", 1), {"buffer_size": 40}),
    "memory_saving_buffer": (
        lambda: make_vec_env("InvertedPendulum-v5", 1),
        {"optimize_memory_usage": True, "replay_buffer_kwargs": {"handle_timeout_termination": False}, "buffer_size": 40},
    ),
    "dict": (
        lambda: seeded(RandomEnv(spaces.Dict({"x": spaces.Box(-1.0, 1.0, (2,)), "y": spaces.Discrete(3)}))),
        {"policy": "MultiInputPolicy", "buffer_size": 60},
    ),
    "her": (
        lambda: make_vec_env(lambda: BitFlippingEnv(4, continuous=True, max_steps=4), 2),
        {
            "policy": "MultiInputPolicy",
            "replay_buffer_class": HerReplayBuffer,
            "replay_buffer_kwargs": {"copy_info_dict": False},
        },
    ),
    "sampled_spaces": (lambda: seeded(RandomEnv(spaces.Box(-1.0, 1.0, (3,), np.float64))), {}),
}


def run_and_resume(make_env: MakeEnv, options: dict[str, Any], directory: Path, steps: int = 90) -> tuple[AGPO, AGPO]:
    """A run without checkpoints, and the same run resumed from the first checkpoint of a third one."""
    whole = small_model(make_env(), **options).learn(steps)
    small_model(make_env(), **options).learn(steps, callback=ResumableCheckpointCallback(directory, 40, keep=9))
    resumed = AGPO.resume(complete_checkpoints(directory)[0], make_env())
    assert 40 <= resumed.num_timesteps < 60
    resumed.learn(steps - resumed.num_timesteps, reset_num_timesteps=False)
    return whole, resumed


def assert_equal_runs(whole: AGPO, resumed: AGPO) -> None:
    """Counters, experience, networks and optimisers are equal."""
    for name in ("num_timesteps", "_n_updates", "_episode_num", "_current_progress_remaining", "simulator_calls"):
        assert getattr(whole, name) == getattr(resumed, name), name
    assert whole.replay_buffer is not None and resumed.replay_buffer is not None
    for name in ("actions", "rewards", "dones", "timeouts"):
        differs = getattr(whole.replay_buffer, name) != getattr(resumed.replay_buffer, name)
        assert not differs.any(), f"{name} differ from step {np.argmax(differs.reshape(len(differs), -1).any(axis=1))}"
    returns = [[episode["r"] for episode in model.ep_info_buffer or ()] for model in (whole, resumed)]
    assert returns[0] == returns[1]
    assert whole.derivative_buffer.size == resumed.derivative_buffer.size
    assert parameters_equal(whole, resumed)


@pytest.mark.parametrize(("make_env", "options"), RUNS.values(), ids=RUNS)
def test_resumed_run_equals_uninterrupted_one(make_env: MakeEnv, options: dict[str, Any], tmp_path: Path) -> None:
    whole, resumed = run_and_resume(make_env, options, tmp_path)
    assert whole._n_updates > 10
    assert_equal_runs(whole, resumed)
    assert capture_attributes(resumed)[1] == []  # nothing of a model is left out


def test_exploration_that_is_drawn_on_another_device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU has a generator of its own, from which gSDE draws before a callback saves a checkpoint."""
    generator = th.Generator()

    def sample_weights(self: StateDependentNoiseDistribution, log_std: th.Tensor, batch_size: int = 1) -> None:
        std = self.get_std(log_std)
        self.exploration_mat = th.randn(std.shape, generator=generator) * std
        self.exploration_matrices = th.randn((batch_size, *std.shape), generator=generator) * std

    def make_env() -> VecEnv:
        generator.manual_seed(0)
        return make_vec_env("InvertedPendulum-v5", 2)

    monkeypatch.setattr(StateDependentNoiseDistribution, "sample_weights", sample_weights)
    monkeypatch.setattr(checkpoint, "_is_gpu", lambda _: True)
    monkeypatch.setattr(th.cuda, "get_rng_state_all", lambda: [generator.get_state()])
    monkeypatch.setattr(th.cuda, "set_rng_state_all", lambda states: generator.set_state(states[0]))
    assert_equal_runs(*run_and_resume(make_env, {"use_sde": True}, tmp_path))


class GlobalNoise(RandomEnv):
    """Rewards from the global generators of its process, which the first reset seeds."""

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        if seed is not None:
            set_random_seed(seed)
        return super().reset(seed=seed)

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        obs, _, *rest = super().step(action)
        return obs, random.random() + np.random.random() + float(th.rand(())), *rest


@pytest.mark.parametrize("task", ["InvertedPendulum-v5", lambda: seeded(GlobalNoise(spaces.Box(-1.0, 1.0, (3,), np.float32)))])
def test_worker_processes(task: Any, tmp_path: Path) -> None:
    environments: list[VecEnv] = []

    def make_env() -> VecEnv:
        environments.append(make_vec_env(task, 1, vec_env_cls=SubprocVecEnv))
        return environments[-1]

    assert_equal_runs(*run_and_resume(make_env, {}, tmp_path))
    for env in environments:
        env.close()


def test_resume_before_learning_starts_and_between_two_calls(tmp_path: Path) -> None:
    whole = small_model("InvertedPendulum-v5").learn(10)
    whole.save_checkpoint(tmp_path / "early")
    whole.learn(40, reset_num_timesteps=False)
    whole.save_checkpoint(tmp_path / "late")
    whole.learn(40, reset_num_timesteps=False)
    for name in ("early", "late"):
        resumed = AGPO.resume(tmp_path / name, "InvertedPendulum-v5")
        while resumed.num_timesteps < whole.num_timesteps:
            resumed.learn(40, reset_num_timesteps=False)
        assert_equal_runs(whole, resumed)


@pytest.mark.parametrize("make_env", [lambda: make_vec_env("Hopper-v5", 2), lambda: MujocoVecEnv("Hopper-v5", 2)])
@pytest.mark.parametrize("is_new", [True, False])
def test_seeds_that_wait_for_the_first_reset(make_env: MakeEnv, is_new: bool, tmp_path: Path) -> None:
    whole = small_model(make_env())
    if not is_new:
        whole.learn(40).set_env(make_env())
        whole.env.seed(7)  # type: ignore[union-attr]
    whole.save_checkpoint(tmp_path)
    whole.learn(60, reset_num_timesteps=False)
    assert_equal_runs(whole, AGPO.resume(tmp_path, make_env()).learn(60, reset_num_timesteps=False))


def test_checkpoint_of_a_resumed_run(tmp_path: Path) -> None:
    """From one checkpoint to the next through several processes' worth of models."""
    whole = small_model(make_vec_env("InvertedPendulum-v5", 2)).learn(160)
    small_model(make_vec_env("InvertedPendulum-v5", 2)).learn(40, callback=ResumableCheckpointCallback(tmp_path, 1000))
    for _ in range(3):
        model = AGPO.resume(tmp_path, make_vec_env("InvertedPendulum-v5", 2))
        model.learn(40, callback=ResumableCheckpointCallback(tmp_path, 1000), reset_num_timesteps=False)
    assert_equal_runs(whole, model)


@pytest.mark.parametrize("kind", ["dummy", "mujoco_vec_env"])
def test_resumed_with_another_number_of_threads(kind: str, tmp_path: Path) -> None:
    """Threads of the simulator never change a bit; a machine with other cores goes on exactly."""

    def make_env(threads: int) -> VecEnv:
        return MujocoVecEnv("Hopper-v5", 2, threads=threads) if kind == "mujoco_vec_env" else make_vec_env("Hopper-v5", 2)

    first = small_model(make_env(1), finite_differences=FiniteDifferences(threads=1)).learn(50)
    first.save_checkpoint(tmp_path)
    first.learn(40, reset_num_timesteps=False)
    resumed = AGPO.resume(tmp_path, make_env(2), finite_differences=FiniteDifferences(threads=3))
    assert_equal_runs(first, resumed.learn(40, reset_num_timesteps=False))


def test_user_may_change_arguments(tmp_path: Path) -> None:
    small_model("InvertedPendulum-v5").learn(40).save_checkpoint(tmp_path)
    resumed = AGPO.resume(tmp_path, "InvertedPendulum-v5", learning_rate=1e-5, batch_size=8, verbose=0, device="cpu")
    resumed.learn(20, reset_num_timesteps=False)
    assert resumed.batch_size == 8
    assert resumed.actor.optimizer.param_groups[0]["lr"] == 1e-5


def test_changed_arguments_hold_although_something_of_them_is_saved(tmp_path: Path) -> None:
    small_model("InvertedPendulum-v5", ent_coef=0.1).learn(40).save_checkpoint(tmp_path)
    resumed = AGPO.resume(tmp_path, "InvertedPendulum-v5", ent_coef=0.5, stats_window_size=5)
    assert resumed._current_ent_coef() == 0.5
    assert resumed.ep_info_buffer is not None and resumed.ep_info_buffer.maxlen == 5
    given: list[dict[str, Any]] = [{}, {"seed": 0}, {"seed": 1}, {"seed": 1}, {"seed": 2}]  # it was 0
    runs = [AGPO.resume(tmp_path, "InvertedPendulum-v5", **seed).learn(40, reset_num_timesteps=False) for seed in given]
    assert [parameters_equal(first, second) for first, second in pairwise(runs)] == [True, False, True, False]


def make_hindsight_env() -> VecEnv:
    """Environments for hindsight experience replay."""
    return make_vec_env(lambda: BitFlippingEnv(4, continuous=True, max_steps=4), 2)


def test_arguments_of_a_replay_buffer_may_be_changed(tmp_path: Path) -> None:
    kind: dict[str, Any] = {"policy": "MultiInputPolicy", "replay_buffer_class": HerReplayBuffer}
    small_model(make_hindsight_env(), **kind, replay_buffer_kwargs={"n_sampled_goal": 4}).learn(40).save_checkpoint(tmp_path)
    buffer = AGPO.resume(tmp_path, make_hindsight_env(), replay_buffer_kwargs={"n_sampled_goal": 1}).replay_buffer
    assert isinstance(buffer, HerReplayBuffer) and (buffer.n_sampled_goal, buffer.her_ratio, buffer.size()) == (1, 0.5, 20)
    with pytest.raises(ValueError, match="copy_info_dict` is True, that of the checkpoint was None; do not change it, as"):
        AGPO.resume(tmp_path, make_hindsight_env(), replay_buffer_kwargs={"n_sampled_goal": 4, "copy_info_dict": True})


class RenamingBuffer(ReplayBuffer):
    """A replay buffer of the user's own that keeps an argument under another name."""

    def __init__(self, *args: Any, alpha: float = 0.5, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.exponent = alpha


def test_argument_that_a_replay_buffer_renames_cannot_be_changed(tmp_path: Path) -> None:
    small_model("Pendulum-v1", replay_buffer_class=RenamingBuffer).learn(30).save_checkpoint(tmp_path)
    with pytest.raises(ValueError, match=r"in \['alpha'\], which RenamingBuffer keeps under other names; do not change them"):
        AGPO.resume(tmp_path, "Pendulum-v1", replay_buffer_class=RenamingBuffer, replay_buffer_kwargs={"alpha": 0.9})


def test_memory_of_derivatives_may_be_changed_while_there_are_none(tmp_path: Path) -> None:
    small_model("InvertedPendulum-v5", critic_grad_coef=0.0).learn(40).save_checkpoint(tmp_path)
    resumed = AGPO.resume(tmp_path, "InvertedPendulum-v5", derivative_memory=0.25, critic_grad_coef=1.0)
    resumed.learn(40, reset_num_timesteps=False)
    assert resumed.derivative_buffer.memory_bytes == 250_000_000 and resumed.derivative_buffer.size > 0


@pytest.mark.parametrize("n_steps", [1, 2])
def test_arguments_that_buffers_keep_may_be_changed_too(n_steps: int, tmp_path: Path) -> None:
    small_model("InvertedPendulum-v5").learn(45).save_checkpoint(tmp_path / "first")
    changed = {"n_steps": n_steps, "gamma": 0.5, "horizon": 2, "rollout_size": 8}
    resumed = AGPO.resume(tmp_path / "first", "InvertedPendulum-v5", **changed)
    for _ in range(2):  # and the next checkpoint keeps them
        buffer = resumed.replay_buffer
        assert buffer is not None and buffer.pos == resumed.num_timesteps
        assert type(buffer) is (NStepReplayBuffer if n_steps > 1 else ReplayBuffer)
        assert n_steps == 1 or (buffer.n_steps, buffer.gamma) == (n_steps, 0.5)  # type: ignore[attr-defined]
        assert (resumed.rollout_buffer.horizon, resumed.rollout_buffer.rollout_size) == (2, 8)
        resumed.learn(20, reset_num_timesteps=False).save_checkpoint(tmp_path / "second")
        resumed = AGPO.resume(tmp_path / "second", "InvertedPendulum-v5")


def test_replay_buffer_class_may_be_changed(tmp_path: Path) -> None:
    small_model("InvertedPendulum-v5").learn(30).save_checkpoint(tmp_path)
    own: dict[str, Any] = {"replay_buffer_class": NStepReplayBuffer, "replay_buffer_kwargs": {"n_steps": 2, "gamma": 0.9}}
    for options in ({**own, "n_steps": 1}, {}):  # the next checkpoint keeps it
        model = AGPO.resume(tmp_path, "InvertedPendulum-v5", **options)
        assert isinstance(model.replay_buffer, NStepReplayBuffer)
        assert (model.replay_buffer.n_steps, model.replay_buffer.gamma) == (2, 0.9)
        assert model.replay_buffer.size() == model.num_timesteps == 30
        model.save_checkpoint(tmp_path)


# ---------------------------------------------------------------------- what cannot be saved


class OwnExtractor(FlattenExtractor):
    """A class of the user's own."""


def test_arguments_that_must_be_given_again(tmp_path: Path) -> None:
    options: dict[str, Any] = {
        "learning_rate": lambda left: 1e-3 * left,
        "policy_kwargs": {"features_extractor_class": OwnExtractor, "net_arch": [16]},
    }
    whole = small_model("InvertedPendulum-v5", **options).learn(90)
    callback = ResumableCheckpointCallback(tmp_path, 40, keep=9)
    small_model("InvertedPendulum-v5", **options).learn(90, callback=callback)
    first = complete_checkpoints(tmp_path)[0]
    with pytest.raises(ValueError, match=r"give them again: resume\(directory, env, learning_rate=..., policy_kwargs=...\)"):
        AGPO.resume(first, "InvertedPendulum-v5")
    resumed = AGPO.resume(first, "InvertedPendulum-v5", **options)
    resumed.learn(90 - resumed.num_timesteps, reset_num_timesteps=False)
    assert_equal_runs(whole, resumed)


class Opaque:
    """Something that cannot be saved."""


class UnsavableEnv(RandomEnv):
    """Keeps its state in an object, as environments with a foreign physics engine do."""

    def __init__(self) -> None:
        super().__init__(spaces.Box(-1.0, 1.0, (3,), np.float32))
        self.world = Opaque()


class SavableEnv(UnsavableEnv):
    """The same, with methods that save and restore it."""

    def get_checkpoint_state(self) -> dict[str, Any]:
        return {
            "steps": self.steps,
            "generator": self.np_random,
            "spaces": [self.observation_space._np_random, self.action_space._np_random],
        }

    def set_checkpoint_state(self, state: dict[str, Any]) -> None:
        self.steps, self._np_random = state["steps"], state["generator"]
        self.observation_space._np_random, self.action_space._np_random = state["spaces"]


def test_environment_that_cannot_be_saved_begins_new_episodes(tmp_path: Path) -> None:
    small_model(UnsavableEnv()).learn(46).save_checkpoint(tmp_path)
    with pytest.warns(UserWarning, match=r"new episodes, as UnsavableEnv.world is a Opaque, which cannot be saved; offer"):
        resumed = AGPO.resume(tmp_path, UnsavableEnv())
    resumed.learn(44, reset_num_timesteps=False)
    assert resumed.num_timesteps == 90 and resumed._n_updates > 0


def test_environment_that_saves_itself(tmp_path: Path) -> None:
    assert_equal_runs(*run_and_resume(lambda: seeded(SavableEnv()), {}, tmp_path))


class WrapperWithObject(gym.Wrapper[Any, Any, Any, Any]):
    """A wrapper of the user's own whose state is out of reach."""

    def __init__(self, env: gym.Env[Any, Any]) -> None:
        super().__init__(env)
        self.memory = Opaque()


def test_wrapper_that_cannot_be_saved_is_named(tmp_path: Path) -> None:
    small_model(WrapperWithObject(gym.make("Pendulum-v1"))).learn(45).save_checkpoint(tmp_path)
    with pytest.warns(UserWarning, match="not go on bit for bit: WrapperWithObject.memory is a Opaque"):
        resumed = AGPO.resume(tmp_path, WrapperWithObject(gym.make("Pendulum-v1")))
    assert resumed._last_obs is not None


class BufferWithObject(ReplayBuffer):
    """A replay buffer of the user's own, part of which is out of reach."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.priorities, self.tree = np.ones(self.buffer_size), Opaque()


def test_part_of_a_replay_buffer_that_cannot_be_saved_is_named(tmp_path: Path) -> None:
    small_model("Pendulum-v1", replay_buffer_class=BufferWithObject).learn(45).save_checkpoint(tmp_path)
    with pytest.warns(UserWarning, match=r"not go on bit for bit: replay_buffer.tree could not be saved$"):
        resumed = AGPO.resume(tmp_path, "Pendulum-v1", replay_buffer_class=BufferWithObject)
    assert resumed.replay_buffer is not None and resumed.replay_buffer.size() == 45


class GrowingBuffer(ReplayBuffer):
    """A replay buffer of the user's own with arrays whose lengths change."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.returns, self.last = np.array([]), np.zeros(100)

    def add(self, *args: Any) -> None:
        super().add(*args)
        self.returns, self.last = np.append(self.returns, args[3]), np.array(args[3])


def test_arrays_of_a_replay_buffer_that_change_their_lengths(tmp_path: Path) -> None:
    first = small_model("Pendulum-v1", replay_buffer_class=GrowingBuffer).learn(45)
    first.save_checkpoint(tmp_path)
    resumed = AGPO.resume(tmp_path, "Pendulum-v1", replay_buffer_class=GrowingBuffer)
    buffers: Any = first.replay_buffer, resumed.replay_buffer
    for name in ("returns", "last", "rewards", "next_observations"):
        assert np.array_equal(*(getattr(buffer, name) for buffer in buffers)), name


def test_changed_simulator_is_noticed(tmp_path: Path) -> None:
    small_model("InvertedPendulum-v5").learn(45).save_checkpoint(tmp_path)
    env = gym.make("InvertedPendulum-v5")
    env.unwrapped.model.opt.gravity[2] = -1.0  # type: ignore[attr-defined]
    with pytest.warns(UserWarning, match="the simulator's model of InvertedPendulumEnv has changed"):
        AGPO.resume(tmp_path, env)


# ---------------------------------------------------------------------- errors


@pytest.fixture(scope="module")
def _checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("checkpoint")
    small_model(make_vec_env("InvertedPendulum-v5", 2)).learn(40).save_checkpoint(directory)
    return directory


@pytest.mark.parametrize(
    ("make_env", "options", "message"),
    [
        (lambda: make_vec_env("InvertedPendulum-v5", 3), {}, "the number of environments of the environment is 3"),
        (lambda: make_vec_env("Pendulum-v1", 2), {}, "observation space .* use `load` to train in another one"),
        (lambda: make_vec_env("Reacher-v5", 2), {}, "observation space"),
        (lambda: VecNormalize(make_vec_env("InvertedPendulum-v5", 2)), {}, r"wrappers .*\['VecNormalize'\].* \[\]"),
        (
            lambda: make_vec_env("InvertedPendulum-v5", 2, wrapper_class=WrapperWithObject),
            {},
            "make it with the same wrappers",
        ),
        (lambda: MujocoVecEnv("InvertedPendulum-v5", 2), {}, "is not that of a MujocoVecEnv"),
        (
            lambda: make_vec_env("InvertedPendulum-v5", 2, env_kwargs={"reset_noise_scale": 0.5}),
            {},
            "made with reset_noise_scale=0.5, that of the checkpoint with 0.01; make it in the same way",
        ),
        (
            lambda: make_vec_env("InvertedPendulum-v5", 2, env_kwargs={"max_episode_steps": 50}),
            {},
            "made with max_episode_steps=50, that of the checkpoint with 1000",
        ),
        (lambda: make_vec_env("InvertedPendulum-v5", 2), {"buffer_size": 100}, "do not change `buffer_size`"),
        (lambda: make_vec_env("InvertedPendulum-v5", 2), {"policy_kwargs": {"net_arch": [4]}}, "`policy_kwargs`"),
        (lambda: make_vec_env("InvertedPendulum-v5", 2), {"ent_coef": 0.1}, "nor `ent_coef` from a learned"),
        (
            lambda: make_vec_env("InvertedPendulum-v5", 2),
            {"ent_coef": "auto_0.7"},
            "`ent_coef` is 'auto_0.7', .* as it has been",
        ),
        (lambda: make_vec_env("InvertedPendulum-v5", 2), {"optimize_memory_usage": True}, "stored in another way"),
        (
            lambda: make_vec_env("InvertedPendulum-v5", 2),
            {"policy_kwargs": {"net_arch": [16], "optimizer_kwargs": {"weight_decay": 0.1}}},
            "`policy_kwargs.optimizer_kwargs` is .*, that of the checkpoint was None; do not change it",
        ),
        (
            lambda: make_vec_env("InvertedPendulum-v5", 2),
            {"derivative_memory": 0.25},
            "`derivative_memory` is 0.25 GB, that of the checkpoint was 0.5 GB; do not change it",
        ),
    ],
)
def test_wrong_environment_or_argument(make_env: MakeEnv, options: dict[str, Any], message: str, _checkpoint: Path) -> None:
    with pytest.raises(ValueError, match=message):
        AGPO.resume(_checkpoint, make_env(), **options)


def test_pictures_may_be_drawn_in_another_way(_checkpoint: Path) -> None:
    env = make_vec_env("InvertedPendulum-v5", 2, env_kwargs={"render_mode": "rgb_array", "width": 64, "height": 32})
    AGPO.resume(_checkpoint, env)
    assert env.get_attr("render_mode") == ["rgb_array"] * 2


def test_nothing_is_saved_in_the_middle_of_a_rollout(tmp_path: Path) -> None:
    """A step that is not stored yet would be lost."""
    model = small_model("Pendulum-v1", train_freq=4)
    with pytest.raises(RuntimeError, match=r"the last step is not stored yet.* let `ResumableCheckpointCallback` save"):
        model.learn(40, callback=lambda local, _: bool(local["self"].save_checkpoint(tmp_path)))
    assert not list(tmp_path.iterdir())
    model.learn(40, callback=lambda *_: False)
    model.save_checkpoint(tmp_path)


def test_fixed_temperature_cannot_become_a_learned_one(tmp_path: Path) -> None:
    small_model("Pendulum-v1", ent_coef=0.1).learn(30).save_checkpoint(tmp_path)
    assert AGPO.resume(tmp_path, "Pendulum-v1").ent_coef == 0.1
    with pytest.raises(ValueError, match="nor `ent_coef` from a learned temperature to a fixed one or back"):
        AGPO.resume(tmp_path, "Pendulum-v1", ent_coef="auto")


def test_nothing_to_resume(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(ValueError, match="no checkpoint in"):
            AGPO.resume(path, "Pendulum-v1")


def test_nothing_to_save(tmp_path: Path) -> None:
    model = small_model("Pendulum-v1")
    model.save(tmp_path / "model")
    with pytest.raises(ValueError, match="call `set_env`"):
        AGPO.load(tmp_path / "model").save_checkpoint(tmp_path)
    with pytest.raises(ValueError, match="`keep` must be at least 1"):
        model.save_checkpoint(tmp_path, keep=0)


def test_her_with_infos_is_refused(tmp_path: Path) -> None:
    model = small_model(
        BitFlippingEnv(4, continuous=True),
        "MultiInputPolicy",
        replay_buffer_class=HerReplayBuffer,
        replay_buffer_kwargs={"copy_info_dict": True},
    ).learn(30)
    with pytest.raises(ValueError, match="copy_info_dict"):
        model.save_checkpoint(tmp_path)


# ---------------------------------------------------------------------- the callback


def test_callback_saves_and_keeps(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    small_model("Pendulum-v1").learn(100, callback=ResumableCheckpointCallback(tmp_path, 30, keep=2, verbose=1))
    assert [path.name for path in complete_checkpoints(tmp_path)] == ["000003-step-90", "000004-step-100"]
    assert capsys.readouterr().out.count("Saved the checkpoint") == 4
    small_model("Pendulum-v1").learn(50, callback=ResumableCheckpointCallback(tmp_path, 30))
    assert [path.name for path in complete_checkpoints(tmp_path)] == ["000006-step-50"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["000006-step-50"]


def test_callback_arguments(tmp_path: Path) -> None:
    for name in ("save_freq", "keep"):
        with pytest.raises(ValueError, match=f"`{name}` must be at least 1"):
            ResumableCheckpointCallback(tmp_path, **{"save_freq": 1, "keep": 1, name: 0})
    with pytest.raises(TypeError, match="CheckpointCallback"):
        SAC("MlpPolicy", "Pendulum-v1", buffer_size=10).learn(1, callback=ResumableCheckpointCallback(tmp_path, 10))


def test_callback_of_an_event(tmp_path: Path) -> None:
    """Events call what they trigger in the middle of a rollout: no checkpoint would ever be saved."""
    for callback in (ResumableCheckpointCallback(tmp_path, 5), CallbackList([ResumableCheckpointCallback(tmp_path, 5)])):
        with pytest.raises(TypeError, match="events such as EveryNTimesteps tell their callbacks nothing"):
            small_model("InvertedPendulum-v5").learn(50, callback=EveryNTimesteps(10, callback))


class Annotated(AGPO):
    """A subclass with an argument of its own, which hands the others on."""

    def __init__(self, *args: Any, note: str = "", **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.note = note


class LongSighted(AGPO):
    """A subclass that sets an argument itself."""

    def __init__(self, policy: Any, env: Any, **kwargs: Any) -> None:
        super().__init__(policy, env, horizon=8, **kwargs)


class Hurried(AGPO):
    """A subclass that makes an argument out of another, and looks at its networks."""

    def __init__(self, policy: Any, env: Any, fast: bool = False, **kwargs: Any) -> None:
        super().__init__(policy, env, learning_rate=1e-3 if fast else 3e-4, **kwargs)
        self.fast, self.width = fast, self.actor.mu.in_features


class Fixed(AGPO):
    """A subclass that takes no other arguments."""

    def __init__(self, policy: Any, env: Any) -> None:
        super().__init__(policy, env, **{**SMALL, "gamma": 0.9})


def test_subclass_that_chooses_arguments_by_itself(tmp_path: Path) -> None:
    Hurried("MlpPolicy", "InvertedPendulum-v5", fast=True, **SMALL).learn(40).save_checkpoint(tmp_path / "hurried")
    assert Hurried.resume(tmp_path / "hurried", "InvertedPendulum-v5").lr_schedule(1.0) == 1e-3
    assert Hurried.resume(tmp_path / "hurried", "InvertedPendulum-v5", fast=False).lr_schedule(1.0) == 3e-4
    with pytest.raises(TypeError, match="learning_rate"):
        Hurried.resume(tmp_path / "hurried", "InvertedPendulum-v5", learning_rate=1e-4)
    Fixed("MlpPolicy", "InvertedPendulum-v5").learn(40).save_checkpoint(tmp_path / "fixed")
    assert Fixed.resume(tmp_path / "fixed", "InvertedPendulum-v5").gamma == 0.9


@pytest.mark.parametrize(("subclass", "options"), [(Annotated, {"note": "x", "horizon": 8}), (LongSighted, {})])
def test_subclass_that_hands_arguments_on(subclass: type[AGPO], options: dict[str, Any], tmp_path: Path) -> None:
    settings = {**SMALL, "learning_rate": 1e-3, "gamma": 0.9, "train_freq": (2, "step"), "policy_kwargs": {"net_arch": [8]}}
    model = subclass("MlpPolicy", "InvertedPendulum-v5", **settings, **options).learn(40)
    model.save_checkpoint(tmp_path)
    model.learn(40, reset_num_timesteps=False)
    resumed = subclass.resume(tmp_path, "InvertedPendulum-v5").learn(40, reset_num_timesteps=False)
    assert_equal_runs(model, resumed)
    assert resumed.rollout_buffer.horizon == 8 and resumed.lr_schedule(1.0) == 1e-3
    assert getattr(resumed, "note", None) == options.get("note")
    changed = subclass.resume(tmp_path, "InvertedPendulum-v5", gamma=0.8)
    assert changed.gamma == changed.replay_buffer.gamma == 0.8  # type: ignore[union-attr]
    with pytest.raises(ValueError, match="`gamma`"):
        subclass.resume(tmp_path, "InvertedPendulum-v5", gamma=2.0)
    with pytest.raises(TypeError, match="gama"):
        subclass.resume(tmp_path, "InvertedPendulum-v5", gama=0.5)


def test_callback_among_others(tmp_path: Path) -> None:
    """Inside other callbacks it works as well, and a stopped run can be resumed."""
    callbacks: list[BaseCallback] = [CallbackList([ResumableCheckpointCallback(tmp_path, 20)])]
    model = small_model("InvertedPendulum-v5").learn(50, callback=callbacks)
    assert AGPO.resume(tmp_path, "InvertedPendulum-v5").num_timesteps == model.num_timesteps
