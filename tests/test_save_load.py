"""Saving and loading: models, parameters, policies and replay buffers."""

import io
import random
import warnings
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from small_models import flat_state, parameters_equal, small_model
from stable_baselines3 import HerReplayBuffer
from stable_baselines3.common.buffers import NStepReplayBuffer, ReplayBuffer
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.envs import BitFlippingEnv, FakeImageEnv, SimpleMultiObsEnv
from stable_baselines3.common.noise import NormalActionNoise
from stable_baselines3.common.utils import LinearSchedule
from stable_baselines3.common.vec_env import VecNormalize

from sb3_agpo import AGPO
from sb3_agpo.agpo.gates import VarianceSwitch
from sb3_agpo.agpo.policies import Actor, AGPOPolicy
from sb3_agpo.dynamics.mujoco import FiniteDifferences

TASKS = ("InvertedPendulum-v5", "Pendulum-v1")
CONFIGURATIONS: dict[str, dict[str, Any]] = {
    "defaults": {},
    "fixed_temperature": {"ent_coef": 0.1},
    "sde": {"use_sde": True},
    "n_steps": {"n_steps": 3},
    "noise": {"action_noise": NormalActionNoise(np.zeros(1), 0.1 * np.ones(1))},
    "schedules": {"learning_rate": LinearSchedule(1e-3, 1e-4, 1.0), "critic_learning_rate": lambda left: 1e-3 * left},
    "optimizer": {"policy_kwargs": {"optimizer_class": th.optim.AdamW, "n_critics": 3}},
    "gate": {"gate": VarianceSwitch(3.0), "finite_differences": FiniteDifferences(position_step=1e-2)},
}


@pytest.fixture(autouse=True)
def _no_warnings() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def observations(model: AGPO, n: int = 8) -> Any:
    """Observations of the model's space, always the same."""
    model.observation_space.seed(3)
    samples = [model.observation_space.sample() for _ in range(n)]
    if isinstance(samples[0], dict):
        return {key: np.stack([sample[key] for sample in samples]) for key in samples[0]}
    return np.stack(samples)


# ---------------------------------------------------------------------- models


@pytest.mark.parametrize("env_id", TASKS)
@pytest.mark.parametrize("kwargs", CONFIGURATIONS.values(), ids=CONFIGURATIONS)
def test_save_and_load(env_id: str, kwargs: dict[str, Any], tmp_path: Path) -> None:
    model = small_model(env_id, **kwargs).learn(80)
    model.save(tmp_path / "model.zip")
    loaded = AGPO.load(tmp_path / "model.zip", env=gym.make(env_id))
    assert parameters_equal(model, loaded)
    obs = observations(model)
    assert np.array_equal(model.predict(obs, deterministic=True)[0], loaded.predict(obs, deterministic=True)[0])
    for name in ("num_timesteps", "_n_updates", "_episode_num", "horizon", "rollout_size", "gradient_mode", "policy_delay"):
        assert getattr(model, name) == getattr(loaded, name), name
    assert type(loaded.gate) is type(model.gate) and loaded.finite_differences == model.finite_differences
    assert loaded.dynamics is not None or env_id == "Pendulum-v1"
    before = loaded._n_updates
    loaded.learn(60, reset_num_timesteps=False)
    assert loaded.num_timesteps == model.num_timesteps + 60
    assert loaded._n_updates > before


def test_load_with_another_fixed_temperature(tmp_path: Path) -> None:
    small_model("Pendulum-v1", ent_coef=0.1).save(tmp_path / "model")
    assert AGPO.load(tmp_path / "model", ent_coef=0.5)._current_ent_coef() == 0.5
    assert AGPO.load(tmp_path / "model")._current_ent_coef() == pytest.approx(0.1)


def test_load_without_environment(tmp_path: Path) -> None:
    model = small_model("InvertedPendulum-v5").learn(60)
    model.save(tmp_path / "model")
    loaded = AGPO.load(tmp_path / "model")
    obs = observations(model)
    assert np.array_equal(model.predict(obs, deterministic=True)[0], loaded.predict(obs, deterministic=True)[0])
    assert loaded.get_env() is None and loaded.dynamics is None
    loaded.set_env(gym.make("InvertedPendulum-v5"))
    assert loaded.dynamics is not None
    loaded.learn(40)


def test_load_with_another_number_of_torch_threads(tmp_path: Path) -> None:
    model = small_model("InvertedPendulum-v5").learn(60)
    model.save(tmp_path / "model")
    obs = observations(model)
    threads = th.get_num_threads()
    th.set_num_threads(threads + 1)
    try:
        loaded = AGPO.load(tmp_path / "model", env=gym.make("InvertedPendulum-v5"))
        assert parameters_equal(model, loaded)
        np.testing.assert_allclose(
            loaded.predict(obs, deterministic=True)[0], model.predict(obs, deterministic=True)[0], atol=1e-5
        )
        loaded.learn(30)
    finally:
        th.set_num_threads(threads)


def test_load_from_memory_and_with_other_arguments() -> None:
    model = small_model("InvertedPendulum-v5").learn(40)
    file = io.BytesIO()
    model.save(file)
    file.seek(0)
    loaded = AGPO.load(file, env=model.get_env(), learning_rate=1e-5, critic_learning_rate=1e-6, rollout_size=8, horizon=2)
    assert loaded.rollout_buffer.rollout_size == 8 and loaded.rollout_buffer.horizon == 2
    loaded.learn(40)
    assert loaded.actor.optimizer.param_groups[0]["lr"] == 1e-5
    assert loaded.critic.optimizer.param_groups[0]["lr"] == 1e-6
    file.seek(0)
    with pytest.raises(ValueError, match="policy kwargs"):
        AGPO.load(file, policy_kwargs={"net_arch": [3]})
    file.seek(0)
    with pytest.raises(ValueError, match="spaces do not match"):
        AGPO.load(file, env=gym.make("Pendulum-v1"))


@pytest.mark.parametrize(("saved", "loaded"), [(3, 1), (3, 2), (1, 3)])
def test_automatic_replay_buffer_fits_the_steps_of_the_return(saved: int, loaded: int, tmp_path: Path) -> None:
    small_model("Pendulum-v1", n_steps=saved).learn(30).save(tmp_path / "model")
    model = AGPO.load(tmp_path / "model", env=gym.make("Pendulum-v1"), n_steps=loaded, gamma=0.5)
    assert type(model.replay_buffer) is (NStepReplayBuffer if loaded > 1 else ReplayBuffer)
    if isinstance(model.replay_buffer, NStepReplayBuffer):
        assert (model.replay_buffer.n_steps, model.replay_buffer.gamma) == (loaded, 0.5)
    assert model.learn(40)._n_updates > 0


class OwnReplayBuffer(ReplayBuffer):
    """A class of the user's own."""


@pytest.mark.parametrize("kind", [OwnReplayBuffer, ReplayBuffer])
def test_replay_buffer_class_given_on_loading(kind: type[ReplayBuffer], tmp_path: Path) -> None:
    small_model("Pendulum-v1").save(tmp_path / "model")
    model = AGPO.load(tmp_path / "model", env=gym.make("Pendulum-v1"), replay_buffer_class=kind, n_steps=1)
    assert type(model.replay_buffer) is kind
    model.save(tmp_path / "second")
    assert type(AGPO.load(tmp_path / "second").replay_buffer) is kind
    automatic = AGPO.load(tmp_path / "second", replay_buffer_class=None, n_steps=3)
    assert type(automatic.replay_buffer) is NStepReplayBuffer


def test_attributes_that_are_no_arguments_may_be_given_on_loading(tmp_path: Path) -> None:
    """Of the model or of a class of one's own, although some of their names are a little like that of an argument."""
    small_model("Pendulum-v1").learn(30).save(tmp_path / "model")
    model = AGPO.load(tmp_path / "model", num_timesteps=5, env_id="Pendulum-v1")
    assert model.num_timesteps == 5


@pytest.mark.parametrize(("n_envs", "others"), [(1, 3), (3, 1)])
@pytest.mark.parametrize("env_id", TASKS)
def test_load_with_another_number_of_environments(env_id: str, n_envs: int, others: int, tmp_path: Path) -> None:
    small_model(make_vec_env(env_id, n_envs)).learn(60).save(tmp_path / "model")
    loaded = AGPO.load(tmp_path / "model", env=make_vec_env(env_id, others))
    assert loaded.n_envs == loaded.rollout_buffer.n_envs == others
    loaded.learn(60)
    assert loaded._n_updates > 0


def test_load_in_the_same_environment_while_another_model_uses_it() -> None:
    """A second model in one environment takes the recorder over; the first goes on with the new one."""
    first = small_model("InvertedPendulum-v5").learn(40)
    second = small_model(first.get_env()).learn(40)
    first.learn(40)
    second.learn(40)
    assert first.num_timesteps == second.num_timesteps == 40


def test_exclude_and_include(tmp_path: Path) -> None:
    model = small_model("Pendulum-v1").learn(30)
    model.save(tmp_path / "model", exclude=["gate"], include=["_valid_history"])
    loaded = AGPO.load(tmp_path / "model")
    assert loaded._valid_history == model._valid_history


def test_replay_buffer_in_the_file_of_the_model(tmp_path: Path) -> None:
    """Observations before normalisation are kept in double precision, and stay what they are."""
    env = VecNormalize(make_vec_env("InvertedPendulum-v5"))
    model = small_model(env).learn(60)
    model.save(tmp_path / "model", include=["replay_buffer"])
    loaded = AGPO.load(tmp_path / "model")
    loaded.set_env(env)
    assert model.replay_buffer is not None and loaded.replay_buffer is not None
    assert np.abs(model.replay_buffer.observations[:60]).max() > 0.0
    assert np.array_equal(model.replay_buffer.observations, loaded.replay_buffer.observations)


@pytest.mark.parametrize("kind", ["image", "dict", "her"])
def test_save_and_load_other_observations(kind: str, tmp_path: Path) -> None:
    env, policy, kwargs = {
        "image": (lambda: FakeImageEnv(36, 36, discrete=False, n_channels=1), "CnnPolicy", {"features_dim": 8}),
        "dict": (lambda: SimpleMultiObsEnv(discrete_actions=False), "MultiInputPolicy", {"cnn_output_dim": 8}),
        "her": (lambda: BitFlippingEnv(4, continuous=True), "MultiInputPolicy", {}),
    }[kind]
    options: dict[str, Any] = {"policy_kwargs": {"features_extractor_kwargs": kwargs}} if kwargs else {}
    if kind == "her":
        options["replay_buffer_class"] = HerReplayBuffer
    model = small_model(make_vec_env(env, 1), policy, buffer_size=60, batch_size=4, **options).learn(30)
    model.save(tmp_path / "model")
    loaded = AGPO.load(tmp_path / "model", env=make_vec_env(env, 1))
    assert parameters_equal(model, loaded)
    obs = observations(model, 2)
    assert np.array_equal(model.predict(obs, deterministic=True)[0], loaded.predict(obs, deterministic=True)[0])
    loaded.learn(30)


# ---------------------------------------------------------------------- parameters


def test_get_and_set_parameters(tmp_path: Path) -> None:
    model = small_model("Pendulum-v1").learn(60)
    parameters = model.get_parameters()
    of_sac = {"policy", "actor.optimizer", "critic.optimizer", "ent_coef_optimizer"}
    assert set(parameters) == of_sac | {"gradient_correction", "gradient_correction.optimizer"}
    other = small_model("Pendulum-v1", seed=1)
    other.set_parameters(parameters, exact_match=True)
    assert all(th.equal(a, b) for a, b in zip(model.policy.parameters(), other.policy.parameters(), strict=True))
    model.save(tmp_path / "model")
    other = small_model("Pendulum-v1", seed=2)
    other.set_parameters(str(tmp_path / "model"))
    assert all(th.equal(a, b) for a, b in zip(model.policy.parameters(), other.policy.parameters(), strict=True))
    # Part of them
    other = small_model("Pendulum-v1", seed=3)
    other.set_parameters({"policy": parameters["policy"]}, exact_match=False)
    with pytest.raises(ValueError, match="do not match"):
        other.set_parameters({"policy": parameters["policy"]}, exact_match=True)
    for exact in (True, False):
        with pytest.raises(ValueError, match="invalid object name"):
            other.set_parameters({**parameters, "nothing": {}}, exact_match=exact)
    incomplete = {**parameters, "policy": dict(list(parameters["policy"].items())[1:])}
    with pytest.raises(RuntimeError, match="Missing key"):
        other.set_parameters(incomplete, exact_match=True)
    other.set_parameters(incomplete, exact_match=False)


def test_temperature_after_loading_is_the_one_that_is_optimized(tmp_path: Path) -> None:
    """See SB3 #391: the optimiser must hold the loaded tensor, not one that it replaced."""
    small_model("Pendulum-v1").learn(40).save(tmp_path / "model")
    loaded = AGPO.load(tmp_path / "model", env=gym.make("Pendulum-v1"))
    assert loaded.ent_coef_optimizer is not None
    assert loaded.ent_coef_optimizer.param_groups[0]["params"][0] is loaded.log_ent_coef
    before = loaded._current_ent_coef().item()
    loaded.learn(40)
    assert loaded._current_ent_coef().item() != before


# ---------------------------------------------------------------------- policies


@pytest.mark.parametrize("use_sde", [False, True])
@pytest.mark.parametrize("share", [False, True])
def test_save_and_load_policy(use_sde: bool, share: bool, tmp_path: Path) -> None:
    net_arch = {"pi": [8], "qf": [8, 4]}
    kwargs = {"share_features_extractor": share, "normalization": "none", "net_arch": net_arch, "n_critics": 3}
    model = small_model("Pendulum-v1", policy_kwargs=kwargs, use_sde=use_sde).learn(40)
    model.policy.save(tmp_path / "policy.pt")
    model.policy.average_actor.save(tmp_path / "actor.pt")
    policy = AGPOPolicy.load(tmp_path / "policy.pt")
    actor = Actor.load(tmp_path / "actor.pt")
    assert all(th.equal(a, b) for a, b in zip(model.policy.parameters(), policy.parameters(), strict=True))
    obs = observations(model)
    expected = model.predict(obs, deterministic=True)[0]
    assert np.array_equal(policy.predict(obs, deterministic=True)[0], expected)
    assert policy.critic.n_critics == 3
    with th.no_grad():
        actions = actor(th.as_tensor(obs), deterministic=True).numpy()
    assert np.allclose(model.policy.unscale_action(actions), expected, atol=1e-6)


# ---------------------------------------------------------------------- replay buffers


@pytest.mark.parametrize("env_id", TASKS)
def test_save_and_load_replay_buffer(env_id: str, tmp_path: Path) -> None:
    model = small_model(env_id).learn(70)
    model.save(tmp_path / "model")
    model.save_replay_buffer(tmp_path / "buffer.pkl")
    assert not hasattr(model.replay_buffer, "differentiable")
    loaded = AGPO.load(tmp_path / "model", env=gym.make(env_id))
    assert loaded.replay_buffer is not None and loaded.replay_buffer.size() == 0
    loaded.load_replay_buffer(tmp_path / "buffer.pkl")
    old, new = model.replay_buffer, loaded.replay_buffer
    assert isinstance(old, ReplayBuffer) and isinstance(new, ReplayBuffer)
    for name in ("observations", "next_observations", "actions", "rewards", "dones", "timeouts", "pos", "full"):
        assert np.array_equal(getattr(old, name), getattr(new, name)), name
    assert loaded.derivative_buffer.size == model.derivative_buffer.size
    assert loaded.derivative_buffer.size > 0 or env_id == "Pendulum-v1"
    obs = model.observation_space.sample()
    new.extend(*[np.array([item])[None] for item in (obs, obs, np.zeros(1), 0.0, False)], [[{}]])
    loaded.learn(60, reset_num_timesteps=False)


@pytest.mark.parametrize("env_id", TASKS)
@pytest.mark.parametrize("steps", [64, 70])  # at the end of a batch of windows, and in the middle of one
def test_resume_in_the_living_environment_is_exact(env_id: str, steps: int, tmp_path: Path) -> None:
    """As with SAC: model, replay buffer, generators and environment put back, the run goes on as if it had not stopped."""
    whole = small_model(env_id).learn(steps + 50)
    model = small_model(env_id).learn(steps)
    env, generators = model.get_env(), (random.getstate(), np.random.get_state(), th.get_rng_state())
    assert env is not None
    model.save(tmp_path / "model")
    model.save_replay_buffer(tmp_path / "buffer.pkl")
    sampler = env.action_space._np_random
    loaded = AGPO.load(tmp_path / "model", env=env, force_reset=False, seed=None)
    loaded.load_replay_buffer(tmp_path / "buffer.pkl")
    random.setstate(generators[0])
    np.random.set_state(generators[1])
    th.set_rng_state(generators[2])
    env.action_space._np_random = sampler
    env._reset_seeds()
    loaded.learn(50, reset_num_timesteps=False)
    assert loaded.num_timesteps == whole.num_timesteps
    assert parameters_equal(whole, loaded)


def test_replay_buffer_from_another_model(tmp_path: Path) -> None:
    """Windows under construction go on only where they fit; the experience itself is kept."""
    model = small_model("InvertedPendulum-v5").learn(70)
    model.save_replay_buffer(tmp_path / "buffer.pkl")
    other = small_model("InvertedPendulum-v5", horizon=2, rollout_size=8)
    other.load_replay_buffer(tmp_path / "buffer.pkl")
    assert other.rollout_buffer.horizon == 2 and other.rollout_buffer.n_pending == 0
    assert other.derivative_buffer.size == model.derivative_buffer.size
    other.learn(40)
    without = small_model("InvertedPendulum-v5")
    without.get_env()
    plain = small_model("Pendulum-v1").learn(40)
    plain.save_replay_buffer(tmp_path / "plain.pkl")
    small_model("Pendulum-v1").load_replay_buffer(tmp_path / "plain.pkl")


def test_vec_normalize(tmp_path: Path) -> None:
    env = VecNormalize(make_vec_env("InvertedPendulum-v5", 2))
    model = small_model(env).learn(80)
    model.save(tmp_path / "model")
    env.save(str(tmp_path / "statistics.pkl"))
    restored = VecNormalize.load(str(tmp_path / "statistics.pkl"), make_vec_env("InvertedPendulum-v5", 2))
    loaded = AGPO.load(tmp_path / "model", env=restored)
    assert loaded.get_vec_normalize_env() is restored
    loaded.learn(40)


def test_flat_state_is_not_empty() -> None:
    assert sum(isinstance(value, th.Tensor) for value in flat_state(small_model("Pendulum-v1"))) > 10
