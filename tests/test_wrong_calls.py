"""
Wrong calls: each raises the documented kind of error, whose message names the value and what to do instead, and leaves
files, models and random generators as they were.
"""

from __future__ import annotations

import hashlib
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from gymnasium.envs.mujoco.hopper_v5 import HopperEnv
from small_models import SMALL, RandomEnv, flat_state, small_model
from stable_baselines3 import PPO, SAC, HerReplayBuffer
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.vec_env import VecNormalize
from stable_baselines3.sac.policies import SACPolicy

from sb3_agpo import AGPO, demo
from sb3_agpo.agpo.gates import ConstantGate, DisagreementGate, MagnitudeGate, VarianceSwitch
from sb3_agpo.benchmark import __main__ as benchmark
from sb3_agpo.checkpoint.directory import complete_checkpoints
from sb3_agpo.dynamics.env_step import EnvStepDynamics
from sb3_agpo.dynamics.mujoco import FiniteDifferences, MujocoDynamics
from sb3_agpo.dynamics.torch_env import TorchEnv
from sb3_agpo.dynamics.torch_tasks import TorchPendulum
from sb3_agpo.tracking.callbacks import ResumableCheckpointCallback
from sb3_agpo.vec_env import MujocoVecEnv, make_mujoco_vec_env

TASK = "InvertedPendulum-v5"


class Wrong(NamedTuple):
    """What a wrong call leads to."""

    error: type[Exception] | tuple[type[Exception], ...]
    parts: tuple[str, ...]  # of the message: names, the value, the way out


def type_error(*parts: str) -> Wrong:
    """A value of the wrong type."""
    return Wrong(TypeError, parts)


def value_error(*parts: str) -> Wrong:
    """A value out of range."""
    return Wrong(ValueError, parts)


def assert_refused(call: Callable[[], Any], wrong: Wrong) -> None:
    """The call raises, and says all that it has to say."""
    with pytest.raises(wrong.error) as caught:
        call()
    missing = [part for part in wrong.parts if part not in str(caught.value)]
    assert not missing, f"{missing} not in: {caught.value}"


def generators() -> tuple[Any, ...]:
    """State of all global random generators."""
    return random.getstate(), np.random.get_state()[1].tobytes(), th.get_rng_state().numpy().tobytes()  # type: ignore[union-attr]


def files(folder: Path) -> dict[str, str]:
    """All files below a folder, with checksums."""
    paths = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}


def vector_env() -> gym.Env[Any, Any]:
    """Three numbers to observe, one action."""
    return RandomEnv(spaces.Box(-1.0, 1.0, (3,), np.float32))


# ---------------------------------------------------------------------- constructor

ARGUMENTS: list[tuple[dict[str, Any], Wrong]] = [
    ({"learning_rate": -1e-3}, value_error("`learning_rate`", "-0.001", "a schedule")),
    ({"learning_rate": float("nan")}, value_error("`learning_rate`", "nan", "a rate such as")),
    ({"learning_rate": "fast"}, type_error("`learning_rate`", "'fast'", "a rate such as")),
    ({"learning_rate": print}, type_error("`learning_rate`", "print", "NoneType", "a schedule")),
    ({"learning_rate": lambda progress: -progress}, value_error("`learning_rate(1.0)`", "-1.0", "a schedule")),
    ({"critic_learning_rate": lambda: 1e-3}, type_error("`critic_learning_rate`", "remaining progress 1.0", "argument")),
    ({"critic_learning_rate": float("inf")}, value_error("`critic_learning_rate`", "inf", "finite")),
    ({"critic_learning_rate": "slow"}, type_error("`critic_learning_rate`", "'slow'", "a schedule")),
    ({"buffer_size": 0}, value_error("`buffer_size`", "at least 1", "got 0", "1_000_000")),
    ({"buffer_size": 1e6}, type_error("`buffer_size`", "integer", "1000000.0")),
    ({"learning_starts": -1}, value_error("`learning_starts`", "at least 0", "got -1")),
    ({"batch_size": 0}, value_error("`batch_size`", "at least 1", "got 0", "such as 256")),
    ({"batch_size": 64.0}, type_error("`batch_size`", "integer", "64.0")),
    ({"tau": -0.1}, value_error("`tau`", "at least 0 and at most 1", "got -0.1", "0.005")),
    ({"tau": 2}, value_error("`tau`", "at most 1", "got 2")),
    ({"policy_tau": 0.0}, value_error("`policy_tau`", "greater than 0 and at most 1", "got 0.0", "averaging off")),
    ({"trace_distance": 0.0}, value_error("`trace_distance`", "greater than 0", "got 0.0", "infinity never ends")),
    ({"gamma": 1.01}, value_error("`gamma`", "at most 1", "1.01", "0.95 to 0.999")),
    ({"gamma": -0.1}, value_error("`gamma`", "at least 0", "-0.1")),
    ({"gamma": None}, type_error("`gamma`", "a number", "None")),
    ({"train_freq": 0}, value_error("`train_freq`", "at least 1", "got 0", '(1, "episode")')),
    ({"train_freq": (0, "episode")}, value_error("`train_freq`", "at least 1", "got 0")),
    ({"train_freq": (1, "year")}, value_error("unit of `train_freq`", '"step" or "episode"', "'year'")),
    ({"train_freq": (1, "step", 2)}, value_error("`train_freq`", "(1, 'step', 2)", "a pair such as")),
    ({"train_freq": 2.5}, value_error("`train_freq`", "integer", "2.5")),
    ({"train_freq": "4"}, value_error("`train_freq`", "integer", "'4'")),
    ({"gradient_steps": -2}, value_error("`gradient_steps`", "at least -1", "got -2", "one per transition")),
    ({"action_noise": 0.1}, type_error("`action_noise`", "0.1", "NormalActionNoise")),
    ({"replay_buffer_class": dict}, type_error("`replay_buffer_class`", "<class 'dict'>", "subclass of `ReplayBuffer`")),
    ({"replay_buffer_class": "her"}, type_error("`replay_buffer_class`", "'her'", "or None")),
    ({"replay_buffer_kwargs": [1]}, type_error("`replay_buffer_kwargs`", "[1]", "dictionary")),
    ({"n_steps": 0}, value_error("`n_steps`", "at least 1", "got 0", "one-step")),
    ({"ent_coef": -0.1}, value_error("`ent_coef`", "-0.1", '"auto_0.1"')),
    ({"ent_coef": "automatic"}, value_error("`ent_coef`", "'automatic'", '"auto"')),
    ({"ent_coef": "auto_-1"}, value_error("`ent_coef`", "'auto_-1'", "positive start")),
    ({"ent_coef": "auto_"}, value_error("`ent_coef`", "'auto_'", "positive start")),
    ({"ent_coef": float("nan")}, value_error("`ent_coef`", "nan", "fixed value")),
    ({"target_update_interval": 0}, value_error("`target_update_interval`", "got 0", "every update")),
    ({"target_entropy": "low"}, type_error("`target_entropy`", "'low'", '"auto"')),
    ({"target_entropy": float("inf")}, value_error("`target_entropy`", "inf", "such as -3.0")),
    ({"gradient_mode": "analytical"}, value_error("`gradient_mode`", "'analytical'", "'analytic'")),
    ({"horizon": 0}, value_error("`horizon`", "at least 1", "got 0", "1 to 16")),
    ({"horizon": True}, type_error("`horizon`", "integer", "True")),
    ({"rollout_size": 0}, value_error("`rollout_size`", "got 0", "32 to 512")),
    ({"rollout_epochs": -1}, value_error("`rollout_epochs`", "got -1", "0 turns it off")),
    ({"rollout_epochs": 1.5}, type_error("`rollout_epochs`", "integer", "1.5")),
    ({"gate": MagnitudeGate}, type_error("`gate`", "an instance", "`MagnitudeGate()`")),
    ({"gate": "soft"}, type_error("`gate`", "'soft'", "callable (analytic, critic, step)")),
    ({"critic_grad_coef": -1.0}, value_error("`critic_grad_coef`", "-1.0", "0 turns it off")),
    ({"critic_grad_batch_size": 0}, value_error("`critic_grad_batch_size`", "got 0", "16 to 256")),
    ({"policy_delay": -1}, value_error("`policy_delay`", "got -1", "0 turns it off")),
    ({"max_grad_norm": 0.0}, value_error("`max_grad_norm`", "greater than 0", "got 0.0", "infinity")),
    ({"derivative_memory": 0}, value_error("`derivative_memory`", "got 0", "gigabytes")),
    ({"derivative_memory": 1e-10}, value_error("`derivative_memory`", "at least 1e-06", "got 1e-10")),
    ({"derivative_memory": "1GB"}, type_error("`derivative_memory`", "'1GB'", "gigabytes")),
    ({"finite_differences": 1e-3}, type_error("`finite_differences`", "0.001", "FiniteDifferences(...)")),
    ({"max_invalid_fraction": 50}, value_error("`max_invalid_fraction`", "at most 1", "got 50")),
    ({"sde_sample_freq": -2}, value_error("`sde_sample_freq`", "got -2", "once per rollout")),
    ({"stats_window_size": 0}, value_error("`stats_window_size`", "got 0", "such as 100")),
    ({"policy_kwargs": [64, 64]}, type_error("`policy_kwargs`", "[64, 64]", "dict(net_arch=[64, 64])")),
    ({"policy_kwargs": {"net_arch": [64, 0]}}, value_error("net_arch", "got 0", "such as [64, 64]")),
    ({"policy_kwargs": {"net_arch": 64}}, type_error("net_arch", "a list", "got 64", "such as [64, 64]")),
    ({"policy_kwargs": {"net_arch": {"pi": [8], "qf": None}}}, type_error("net_arch", "dictionary of lists", "None")),
    ({"policy_kwargs": {"net_arch": {"pi": [-1], "qf": [8]}}}, value_error("net_arch", "got -1", "widths")),
    ({"policy_kwargs": {"n_critics": 0}}, value_error("n_critics", "got 0", "SAC has 2")),
    ({"seed": -1}, value_error("`seed`", "from 0 to 4294967295", "got -1", "None for no seed")),
    ({"seed": 2**32}, value_error("`seed`", "got 4294967296")),
    ({"seed": 0.5}, type_error("`seed`", "integer", "0.5")),
    ({"horizn": 3}, type_error("horizn")),
]


def describe(case: tuple[dict[str, Any], Any]) -> str:
    """A short name of a case."""
    # By name where it has one: what is printed of a function is another in each process
    return ",".join(f"{name}={getattr(value, '__name__', value)}" for name, value in case[0].items())[:60]


@pytest.mark.parametrize("case", ARGUMENTS, ids=map(describe, ARGUMENTS))
def test_constructor(case: tuple[dict[str, Any], Wrong], tmp_path: Path) -> None:
    arguments, wrong = case
    env = vector_env()
    before, attributes = generators(), dict(vars(env))
    assert_refused(lambda: AGPO("MlpPolicy", env, **{**SMALL, "tensorboard_log": str(tmp_path), **arguments}), wrong)
    assert generators() == before
    assert not files(tmp_path)
    assert vars(env) == attributes  # neither seeded nor reset


#: policy, environment and arguments that do not go together; SB3 refuses most of them, by assertions too
COMBINATIONS: dict[str, tuple[Any, Callable[[], Any], dict[str, Any], Wrong]] = {
    "discrete actions": ("MlpPolicy", lambda: "CartPole-v1", {}, Wrong(AssertionError, ("Discrete(2)", "Box"))),
    "`MultiDiscrete` or `MultiBinary` actions": (
        "MlpPolicy",
        lambda: RandomEnv(spaces.Box(-1, 1, (3,)), spaces.MultiDiscrete([2, 2])),
        {},
        Wrong(AssertionError, ("MultiDiscrete", "Box")),
    ),
    "actions without bounds": (
        "MlpPolicy",
        lambda: RandomEnv(spaces.Box(-1, 1, (3,)), spaces.Box(-np.inf, np.inf, (1,))),
        {},
        Wrong(AssertionError, ("finite",)),
    ),
    "the wrapper `ClipAction`": (
        "MlpPolicy",
        lambda: gym.wrappers.ClipAction(gym.make("Pendulum-v1")),
        {},
        Wrong(AssertionError, ("finite",)),
    ),
    "`MlpPolicy` or `CnnPolicy` with `Dict` observations": (
        "MlpPolicy",
        lambda: RandomEnv(spaces.Dict({"x": spaces.Box(-1, 1, (3,))})),
        {},
        value_error("MultiInputPolicy"),
    ),
    "`CnnPolicy` without images": ("CnnPolicy", vector_env, {}, Wrong(AssertionError, ("NatureCNN", "MlpPolicy"))),
    '`train_freq=(n, "episode")` with several environments': (
        "MlpPolicy",
        lambda: make_vec_env("Pendulum-v1", 2),
        {"train_freq": (1, "episode")},
        Wrong(AssertionError, ("only one env", "got 2")),
    ),
    "`n_steps > 1` with `Dict` observations": (
        "MultiInputPolicy",
        lambda: RandomEnv(spaces.Dict({"x": spaces.Box(-1, 1, (3,))})),
        {"n_steps": 3},
        Wrong(AssertionError, ("N-step", "Dict")),
    ),
    "`optimize_memory_usage` with time limits": (
        "MlpPolicy",
        vector_env,
        {"optimize_memory_usage": True},
        value_error("optimize_memory_usage", "handle_timeout_termination"),
    ),
    "`optimize_memory_usage` with `n_steps > 1`": (
        "MlpPolicy",
        vector_env,
        {"optimize_memory_usage": True, "n_steps": 3, "replay_buffer_kwargs": {"handle_timeout_termination": False}},
        Wrong(NotImplementedError, ("optimize_memory_usage",)),
    ),
    "`optimize_memory_usage` with `Dict` observations": (
        "MultiInputPolicy",
        lambda: RandomEnv(spaces.Dict({"x": spaces.Box(-1, 1, (3,))})),
        {"optimize_memory_usage": True},
        Wrong(AssertionError, ("optimize_memory_usage",)),
    ),
    "`HerReplayBuffer` without `Dict` observations": (
        "MlpPolicy",
        vector_env,
        {"replay_buffer_class": HerReplayBuffer},
        Wrong(AssertionError, ("must be used with Dict obs space only",)),
    ),
    "a policy class that is no `AGPOPolicy`, or a file of SAC": (
        SACPolicy,
        vector_env,
        {},
        value_error("SACPolicy", "`AGPOPolicy`"),
    ),
}


#: the same for names that do not exist
UNKNOWN: dict[str, tuple[Any, Callable[[], Any], dict[str, Any], Wrong]] = {
    "unknown_policy": ("MlpPolicie", vector_env, {}, value_error("MlpPolicie", "unknown")),
    "unknown_environment": ("MlpPolicy", lambda: "Hoper-v5", {}, Wrong(gym.error.Error, ("Hoper",))),
    "unknown_policy_argument": ("MlpPolicy", vector_env, {"policy_kwargs": {"depth": 3}}, type_error("depth")),
}


@pytest.mark.parametrize(
    ("policy", "make", "arguments", "wrong"), [*COMBINATIONS.values(), *UNKNOWN.values()], ids=[*COMBINATIONS, *UNKNOWN]
)
def test_combinations(policy: Any, make: Callable[[], Any], arguments: dict[str, Any], wrong: Wrong, tmp_path: Path) -> None:
    options = {**SMALL, "tensorboard_log": str(tmp_path), **arguments}
    assert_refused(lambda: AGPO(policy, make(), **options), wrong)
    assert not files(tmp_path)


# ---------------------------------------------------------------------- learn, load, resume


class Material(NamedTuple):
    """What calls could spoil."""

    folder: Path
    model: AGPO

    @property
    def env(self) -> Any:
        """An environment like the model's."""
        return make_vec_env(TASK, 2)


@pytest.fixture(scope="module")
def material(tmp_path_factory: pytest.TempPathFactory) -> Material:
    """A trained model and everything that it can write."""
    folder = tmp_path_factory.mktemp("material")
    model = small_model(make_vec_env(TASK, 2), buffer_size=100).learn(60)
    model.save(folder / "model.zip")
    model.save_replay_buffer(folder / "buffer.pkl")
    model.policy.save(str(folder / "policy.pth"))
    model.save_checkpoint(folder / "checkpoints")
    SAC("MlpPolicy", "Pendulum-v1", buffer_size=10, policy_kwargs={"net_arch": [4]}).save(folder / "sac.zip")
    (folder / "text.zip").write_text("no archive")
    (folder / "text.pkl").write_text("no pickle")
    (folder / "empty").mkdir()
    shutil.copytree(folder / "checkpoints", folder / "damaged")
    arrays = complete_checkpoints(folder / "damaged")[0] / "arrays.npz"
    arrays.write_bytes(arrays.read_bytes()[:-1])
    return Material(folder, model)


class Stranger(BaseCallback):
    """A callback for another purpose."""

    def _on_step(self) -> bool:
        return True


CALLS: dict[str, tuple[Callable[[Material], Any], Wrong]] = {
    "learn_negative": (lambda m: m.model.learn(-1), value_error("`total_timesteps`", "at least 0", "got -1")),
    "learn_nan": (lambda m: m.model.learn(float("nan")), value_error("`total_timesteps`", "nan", "steps")),  # type: ignore[arg-type]
    "learn_endless": (lambda m: m.model.learn(float("inf")), value_error("`total_timesteps`", "inf", "finite")),  # type: ignore[arg-type]
    "learn_text": (lambda m: m.model.learn("1e6"), type_error("`total_timesteps`", "'1e6'", "a number")),  # type: ignore[arg-type]
    "learn_log_interval": (
        lambda m: m.model.learn(10, log_interval=0),
        value_error("`log_interval`", "got 0", "None for no log"),
    ),
    "learn_callback": (lambda m: m.model.learn(10, callback=3), type_error("`callback`", "got 3", "a list of them")),  # type: ignore[arg-type]
    "learn_callbacks": (
        lambda m: m.model.learn(10, callback=[Stranger(), print]),
        type_error("`callback`", "print", "BaseCallback"),
    ),  # type: ignore[list-item]
    "learn_without_env": (
        lambda m: AGPO.load(m.folder / "model.zip").learn(10),
        Wrong(AssertionError, ("environment", "`set_env`")),
    ),
    "set_env_number": (
        lambda m: m.model.set_env(make_vec_env(TASK, 3)),
        Wrong(AssertionError, ("number of environments", "3", ".load(")),
    ),
    "set_env_task": (lambda m: m.model.set_env(make_vec_env("Pendulum-v1", 2)), value_error("spaces do not match")),
    "load_nothing": (lambda m: AGPO.load(m.folder / "nothing"), Wrong(FileNotFoundError, ("nothing",))),
    "load_text": (lambda m: AGPO.load(m.folder / "text.zip"), value_error("text.zip", "zip")),
    "load_other_algorithm": (
        lambda m: AGPO.load(m.folder / "sac.zip"),
        value_error("SACPolicy", "`AGPOPolicy`", "by its own class"),
    ),
    "load_misspelt": (lambda m: AGPO.load(m.folder / "model.zip", horizn=2), type_error("`horizn`", "did you mean `horizon`")),
    "load_out_of_range": (
        lambda m: AGPO.load(m.folder / "model.zip", horizon=0),
        value_error("`horizon`", "got 0", "1 to 16"),
    ),
    "load_type": (lambda m: AGPO.load(m.folder / "model.zip", gate=3), type_error("`gate`", "got 3")),
    "load_task": (
        lambda m: AGPO.load(m.folder / "model.zip", env=gym.make("Pendulum-v1")),
        value_error("spaces do not match"),
    ),
    "load_policy_kwargs": (
        lambda m: AGPO.load(m.folder / "model.zip", policy_kwargs={"net_arch": [3]}),
        value_error("policy kwargs", "[3]", "[16]"),
    ),
    "set_parameters_unknown": (lambda m: m.model.set_parameters({"nobody": {}}), value_error("nobody")),
    "set_parameters_missing": (
        lambda m: m.model.set_parameters({"policy": m.model.policy.state_dict()}),
        value_error("expected", "'policy'"),
    ),
    "load_replay_buffer_nothing": (
        lambda m: m.model.load_replay_buffer(m.folder / "nothing"),
        Wrong(FileNotFoundError, ("nothing",)),
    ),
    "resume_nothing": (
        lambda m: AGPO.resume(m.folder / "empty", m.env),
        value_error("no checkpoint in", "empty", "`save_checkpoint`"),
    ),
    "resume_file": (lambda m: AGPO.resume(m.folder / "model.zip", m.env), value_error("no checkpoint in", "model.zip")),
    "resume_damaged": (
        lambda m: AGPO.resume(m.folder / "damaged", m.env),
        value_error("is damaged", "arrays.npz", "no other one"),
    ),
    "resume_number": (
        lambda m: AGPO.resume(m.folder / "checkpoints", make_vec_env(TASK, 3)),
        value_error("number of environments", "is 3", "is 2", "`load`"),
    ),
    "resume_task": (
        lambda m: AGPO.resume(m.folder / "checkpoints", make_vec_env("Pendulum-v1", 2)),
        value_error("observation space", "like the one"),
    ),
    "resume_wrappers": (
        lambda m: AGPO.resume(m.folder / "checkpoints", VecNormalize(m.env)),
        value_error("['VecNormalize']", "the same way"),
    ),
    "resume_argument": (lambda m: AGPO.resume(m.folder / "checkpoints", m.env, horizn=2), type_error("horizn")),
    "resume_out_of_range": (lambda m: AGPO.resume(m.folder / "checkpoints", m.env, tau=2.0), value_error("`tau`", "got 2.0")),
    "resume_buffer_size": (
        lambda m: AGPO.resume(m.folder / "checkpoints", m.env, buffer_size=10),
        value_error("room for 5 steps", "for 50", "do not change `buffer_size`"),
    ),
    "resume_networks": (
        lambda m: AGPO.resume(m.folder / "checkpoints", m.env, policy_kwargs={"net_arch": [3]}),
        value_error("networks differ", "do not change `policy_kwargs`"),
    ),
    "save_checkpoint_keep": (
        lambda m: m.model.save_checkpoint(m.folder / "checkpoints", keep=0),
        value_error("`keep`", "at least 1", "got 0"),
    ),
    "save_checkpoint_to_a_file": (
        lambda m: m.model.save_checkpoint(m.folder / "model.zip"),
        Wrong(OSError, ("model.zip",)),
    ),
    "save_checkpoint_without_env": (
        lambda m: AGPO.load(m.folder / "model.zip").save_checkpoint(m.folder / "empty"),
        value_error("`set_env`", "`save`"),
    ),
    "checkpoint_callback_frequency": (
        lambda m: ResumableCheckpointCallback(m.folder / "empty", 0),
        value_error("`save_freq`", "at least 1", "got 0"),
    ),
    "checkpoint_callback_keep": (
        lambda m: ResumableCheckpointCallback(m.folder / "empty", 10, keep=-1),
        value_error("`keep`", "at least 1", "got -1"),
    ),
    "checkpoint_callback_algorithm": (
        lambda m: PPO("MlpPolicy", "Pendulum-v1", n_steps=8, batch_size=8).learn(
            8, ResumableCheckpointCallback(m.folder / "empty", 4)
        ),
        type_error("AGPO", "PPO", "CheckpointCallback"),
    ),
}


@pytest.mark.parametrize(("call", "wrong"), CALLS.values(), ids=CALLS)
def test_models_and_files(call: Callable[[Material], Any], wrong: Wrong, material: Material) -> None:
    before = files(material.folder)
    weights = [value.clone() if isinstance(value, th.Tensor) else value for value in flat_state(material.model)]
    counters = (material.model.num_timesteps, material.model._n_updates)
    assert_refused(lambda: call(material), wrong)
    assert files(material.folder) == before
    assert counters == (material.model.num_timesteps, material.model._n_updates)
    for old, new in zip(weights, flat_state(material.model), strict=True):
        assert th.equal(old, new) if isinstance(old, th.Tensor) else old == new


# ---------------------------------------------------------------------- providers and gates


def hopper_dynamics() -> MujocoDynamics:
    """An engine of a stock task."""
    return MujocoDynamics(HopperEnv())


PARTS: dict[str, tuple[Callable[[], Any], Wrong]] = {
    "position_step": (lambda: FiniteDifferences(position_step=0.0), value_error("`position_step`", "0.0", "try")),
    "velocity_step": (lambda: FiniteDifferences(velocity_step=-1.0), value_error("`velocity_step`", "-1.0", "try")),
    "activation_step": (lambda: FiniteDifferences(activation_step=float("nan")), value_error("`activation_step`", "nan")),
    "action_step_text": (lambda: FiniteDifferences(action_step="0.1"), value_error("`action_step`", "'0.1'", "try")),  # type: ignore[arg-type]
    "action_step_large": (lambda: FiniteDifferences(action_step=1.5), value_error("`action_step`", "1.5", "at most 1.0")),
    "centred": (lambda: FiniteDifferences(centred="yes"), value_error("`centred`", "'yes'", "True")),  # type: ignore[arg-type]
    "threads": (lambda: FiniteDifferences(threads=0), value_error("`threads`", "got 0", "None")),
    "max_derivative": (lambda: FiniteDifferences(max_derivative=float("inf")), value_error("`max_derivative`", "inf", "try")),
    "no_stock_task": (lambda: MujocoDynamics(TorchPendulum()), type_error("TorchPendulum", "no stock", "`EnvStepDynamics`")),  # type: ignore[arg-type]
    "states": (
        lambda: hopper_dynamics().differentiate(np.zeros((1, 2)), np.zeros((1, 3))),
        value_error("`states`", "(1, 2)", "`get_state`"),
    ),
    "actions": (
        lambda: (engine := hopper_dynamics()).differentiate(engine.get_state()[None], np.zeros((1, 2))),
        value_error("`actions`", "(1, 2)", "(1, 3)"),
    ),
    "actions_of_own_step": (
        lambda: (engine := EnvStepDynamics(HopperEnv())).differentiate(engine.get_state()[None], np.zeros((2, 3))),
        value_error("`actions`", "(2, 3)", "(1, 3)"),
    ),
    "torch_env_state": (lambda: TorchPendulum().set_state(np.array([np.nan, 0.0])), value_error("finite", "nan")),
    "torch_env_action": (
        lambda: ((env := TorchPendulum()).reset(), env.step(np.array([np.nan]))),
        value_error("finite", "nan"),
    ),
    "torch_env_option": (lambda: TorchPendulum().reset(options={"position": 1.0}), value_error("position", "'state'")),
    "torch_env_size": (
        lambda: TorchEnv.__init__(TorchPendulum(), 0, spaces.Box(-1, 1, (1,)), spaces.Box(-1, 1, (1,))),
        value_error("`state_size`", "got 0"),
    ),
    "torch_env_space": (
        lambda: TorchEnv.__init__(TorchPendulum(), 2, spaces.Box(-1, 1, (1,)), spaces.Discrete(2)),  # type: ignore[arg-type]
        value_error("`action_space`", "Discrete(2)", "`Box`"),
    ),
    "vec_env_id": (lambda: MujocoVecEnv("Hoper-v5"), value_error("`env_id`", "'Hoper-v5'", "such as 'Hopper-v5'")),
    "vec_env_task": (lambda: MujocoVecEnv("Pendulum-v1"), value_error("PendulumEnv", "MuJoCo tasks", "DummyVecEnv")),
    "vec_env_number": (lambda: MujocoVecEnv("Hopper-v5", 0), value_error("`n_envs`", "got 0", "number of environments")),
    "vec_env_number_type": (lambda: make_mujoco_vec_env("Hopper-v5", 2.0), type_error("`n_envs`", "2.0", "integer")),  # type: ignore[arg-type]
    "vec_env_threads": (lambda: MujocoVecEnv("Hopper-v5", threads=-1), value_error("`threads`", "got -1", "None")),
    "vec_env_seed": (lambda: MujocoVecEnv("Hopper-v5", seed=-5), value_error("`seed`", "got -5", "None")),
    "vec_env_limit": (
        lambda: MujocoVecEnv("Hopper-v5", max_episode_steps=0),
        value_error("`max_episode_steps`", "got 0", "-1"),
    ),
    "vec_env_kwargs": (lambda: MujocoVecEnv("Hopper-v5", env_kwargs=[1]), type_error("`env_kwargs`", "[1]", "dictionary")),  # type: ignore[arg-type]
    "vec_env_actions": (
        lambda: ((env := MujocoVecEnv("Hopper-v5", 2)).reset(), env.step(np.zeros((1, 3)))),
        value_error("actions", "(2, 3)", "(1, 3)"),
    ),
    "vec_env_nan_action": (
        lambda: ((env := MujocoVecEnv("Hopper-v5", 2)).reset(), env.step(np.full((2, 3), np.nan))),
        value_error("environment 0", "nan", "VecCheckNan"),
    ),
    "vec_env_no_reset": (lambda: MujocoVecEnv("Hopper-v5").step(np.zeros((1, 3))), Wrong(RuntimeError, ("`reset`", "`step`"))),
    "gate_weight": (lambda: ConstantGate(1.5), value_error("`weight`", "1.5", "[0, 1]")),
    "gate_weight_nan": (lambda: ConstantGate(float("nan")), value_error("`weight`", "nan", "0 is the critic alone")),
    "gate_tolerance": (lambda: DisagreementGate(0.0), value_error("`tolerance`", "0.0", "1 to 100")),
    "gate_ratio": (lambda: VarianceSwitch(float("inf")), value_error("`ratio`", "inf", "1 to 100")),
    "gate_of_the_wrong_shape": (
        lambda: small_model(TASK, gate=lambda analytic, critic, step: analytic).learn(80),
        value_error("gate", "one weight per sample", "got ("),
    ),
}


@pytest.mark.parametrize(("call", "wrong"), PARTS.values(), ids=PARTS)
def test_providers_and_gates(call: Callable[[], Any], wrong: Wrong, tmp_path: Path) -> None:
    assert_refused(call, wrong)
    assert not files(tmp_path)


# ---------------------------------------------------------------------- command lines

COMMANDS: dict[str, tuple[Callable[[list[str]], int], str, tuple[str, ...]]] = {
    "no_command": (benchmark.main, "", ("required",)),
    "unknown_command": (benchmark.main, "lerning", ("lerning", "learning")),
    "learning_steps": (benchmark.main, "learning --steps 0", ("--steps is 0", "1 or more")),
    "learning_processes": (benchmark.main, "learning --processes 0", ("--processes is 0", "1 or more")),
    "learning_seed": (benchmark.main, "learning --seeds one", ("'one' is no seed", "0-4")),
    "learning_task": (benchmark.main, "learning --envs Hoper-v5", ("unknown task 'Hoper-v5'",)),
    "learning_algorithm": (benchmark.main, "learning --algorithms sacc", ("unknown algorithm 'sacc'", "choose from")),
    "learning_set": (benchmark.main, "learning --algorithms sac --label x --set gamma", ("--set 'gamma'", "key=value")),
    "learning_literal": (benchmark.main, "learning --algorithms sac --label x --set policy=mlp", ("mlp", "needs quotes")),
    "report_nothing": (benchmark.main, "report --input nothing.csv", ("nothing.csv",)),
    "fidelity_rollouts": (
        benchmark.main,
        "fidelity --env Hopper-v5 --models x.zip --rollouts 3",
        ("--rollouts is 3", "8 or more"),
    ),
    "reliability_section": (benchmark.main, "reliability --sections kill", ("'kill'", "choose from", "kills")),
    "reliability_kills": (benchmark.main, "reliability --kills 0", ("--kills is 0", "2 or more")),
    "reliability_output": (benchmark.main, "reliability --output r.csv", ("r.csv", "ends in .json")),
    "demo_minutes": (demo.main, "--minutes 0", ("--minutes is 0", "above 0")),
    "demo_env": (demo.main, "--env Hoper-v5", ("--env 'Hoper-v5' cannot be made",)),
    "demo_discrete": (demo.main, "--env CartPole-v1", ("CartPole-v1", "Discrete(2)", "continuous actions")),
    "demo_device": (demo.main, "--device gpu", ("--device 'gpu'", "cpu, cuda or auto")),
    "demo_seed": (demo.main, "--seed -1", ("--seed is -1", "from 0 to")),
    "demo_option": (demo.main, "--minute x", ("minute",)),
}


@pytest.mark.parametrize(("program", "line", "parts"), COMMANDS.values(), ids=COMMANDS)
def test_command_lines(
    program: Callable[[list[str]], int], line: str, parts: tuple[str, ...], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Wrong options end with exit code 2 and a message; nothing is written."""
    try:
        code: Any = program(line.split())
    except SystemExit as end:  # of argparse
        code = end.code
    message = capsys.readouterr().err
    assert code == 2
    assert not [part for part in parts if part not in message], message
    assert not files(tmp_path)


def test_zoo(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("rl_zoo3")
    from sb3_agpo.zoo.scripts import main

    assert main(["trian"]) == 2
    message = capsys.readouterr().err
    assert "'trian'" in message and "train" in message
    assert not files(tmp_path)
