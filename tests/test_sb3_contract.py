"""AGPO takes what SB3's own off-policy algorithms take: spaces, policies, schedules, buffers, wrappers."""

import copy
import gc
import inspect
import io
import pickle
import re
import warnings
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from small_models import RandomEnv, flat_state, parameters_equal, small_model
from stable_baselines3 import SAC, HerReplayBuffer
from stable_baselines3.common.buffers import BaseBuffer, DictReplayBuffer, NStepReplayBuffer, ReplayBuffer
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.envs import BitFlippingEnv, FakeImageEnv, IdentityEnvBox, SimpleMultiObsEnv
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.logger import HumanOutputFormat, Logger, configure
from stable_baselines3.common.noise import NormalActionNoise, OrnsteinUhlenbeckActionNoise, VectorizedActionNoise
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor
from stable_baselines3.common.type_aliases import TrainFrequencyUnit
from stable_baselines3.common.utils import ConstantSchedule, LinearSchedule
from stable_baselines3.common.vec_env import DummyVecEnv, SubprocVecEnv, VecFrameStack, VecNormalize
from torch import nn

from sb3_agpo import AGPO
from sb3_agpo.agpo.agpo import CRITIC_LEARNING_RATE_FACTOR
from sb3_agpo.agpo.policies import AGPOPolicy
from sb3_agpo.agpo.rollout_buffer import RolloutWindows
from sb3_agpo.dynamics.mujoco import FiniteDifferences
from sb3_agpo.vec_env import MujocoVecEnv

#: with and without simulator derivatives
TASKS = ("InvertedPendulum-v5", "Pendulum-v1")
METRICS = Path(__file__).parent.parent / "docs" / "metrics.md"


@pytest.fixture(autouse=True)
def _no_warnings() -> Iterator[None]:
    """Nothing here may warn, inside ``learn`` least of all."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        # Not ours: importing tensorboard, and Monitor's open files when the interpreter collects them
        warnings.filterwarnings("ignore", category=DeprecationWarning, module="torch|tensorboard|google")
        yield


def test_constructor_takes_what_sacs_takes() -> None:
    """All of SAC's arguments, the first of them at SAC's positions."""
    ours, sacs = (list(inspect.signature(algorithm).parameters) for algorithm in (AGPO, SAC))
    shared = sacs.index("target_entropy") + 1
    assert ours[:shared] == sacs[:shared]
    assert set(sacs) <= set(ours)


class TanhExtractor(BaseFeaturesExtractor):
    """Features of another number than observations."""

    def __init__(self, observation_space: spaces.Space[Any], features_dim: int = 6) -> None:
        super().__init__(observation_space, features_dim)
        assert observation_space.shape is not None
        self.net = nn.Sequential(nn.Linear(observation_space.shape[0], features_dim), nn.Tanh())

    def forward(self, observations: th.Tensor) -> th.Tensor:
        return self.net(observations)


class BatchNormDropoutExtractor(BaseFeaturesExtractor):
    """Layers that act differently in training and in evaluation."""

    def __init__(self, observation_space: spaces.Space[Any]) -> None:
        assert observation_space.shape is not None
        super().__init__(observation_space, observation_space.shape[0])
        self.batch_norm = nn.BatchNorm1d(observation_space.shape[0])
        self.dropout = nn.Dropout(0.5)

    def forward(self, observations: th.Tensor) -> th.Tensor:
        return self.dropout(self.batch_norm(observations))


class FrozenExtractor(BaseFeaturesExtractor):
    """A pretrained network that is not to learn."""

    def __init__(self, observation_space: spaces.Space[Any]) -> None:
        super().__init__(observation_space, 4)
        assert observation_space.shape is not None
        self.net = nn.Linear(observation_space.shape[0], 4)
        self.requires_grad_(False)

    def forward(self, observations: th.Tensor) -> th.Tensor:
        return th.tanh(self.net(observations))


class StandardisingExtractor(BaseFeaturesExtractor):
    """Statistics of observations, in buffers of its own."""

    def __init__(self, observation_space: spaces.Space[Any]) -> None:
        assert observation_space.shape is not None
        super().__init__(observation_space, observation_space.shape[0])
        self.register_buffer("mean", th.zeros(observation_space.shape[0]))

    def forward(self, observations: th.Tensor) -> th.Tensor:
        if self.training:
            self.mean.lerp_(observations.detach().mean(0), 0.1)
        return observations - self.mean


# ---------------------------------------------------------------------- features extractors


@pytest.mark.parametrize("env_id", TASKS)
@pytest.mark.parametrize("share", [False, True])
def test_frozen_weights_stay_frozen(env_id: str, share: bool) -> None:
    policy_kwargs = {"features_extractor_class": FrozenExtractor, "share_features_extractor": share}
    model = small_model(env_id, policy_kwargs=policy_kwargs, critic_grad_coef=0.0)
    frozen = [parameter for parameter in model.policy.parameters() if not parameter.requires_grad]
    before = [parameter.clone() for parameter in frozen]
    model.learn(60)
    assert model._n_updates > 0
    for parameter, value in zip(frozen, before, strict=True):
        assert not parameter.requires_grad
        assert th.equal(parameter, value) or any(parameter is own for own in model.policy.average_actor.parameters())


@pytest.mark.parametrize("env_id", TASKS)
@pytest.mark.parametrize("part", ["actor", "critic"])
def test_one_of_the_networks_may_be_frozen(env_id: str, part: str) -> None:
    """As for a warm-up of the critics on a policy that is there already; the other one learns."""
    model = small_model(env_id, critic_grad_coef=0.0)
    parts = {"actor": model.actor, "critic": model.critic}
    parts[part].requires_grad_(False)
    before = {name: [p.clone() for p in module.parameters()] for name, module in parts.items()}
    model.learn(60)
    same = {name: all(map(th.equal, module.parameters(), before[name])) for name, module in parts.items()}
    assert same == {name: name == part for name in parts}


class Dropping(BaseFeaturesExtractor):
    """Random in training mode."""

    def __init__(self, observation_space: spaces.Space[Any]) -> None:
        assert observation_space.shape is not None
        super().__init__(observation_space, observation_space.shape[0])
        self.dropout = nn.Dropout(0.5)

    def forward(self, observations: th.Tensor) -> th.Tensor:
        dropped: th.Tensor = self.dropout(observations)
        return dropped


def test_deterministic_actions_after_a_training_loop_of_ones_own() -> None:
    model = small_model("Pendulum-v1", policy_kwargs={"features_extractor_class": Dropping})
    model.policy.train()
    actions = {model.predict(np.ones(3, np.float32), deterministic=True)[0].item() for _ in range(10)}
    assert len(actions) == 1


def test_buffers_of_an_extractor_reach_the_policy_that_acts() -> None:
    model = small_model("Pendulum-v1", policy_kwargs={"features_extractor_class": StandardisingExtractor}).learn(60)
    learned, acting = (actor.features_extractor.mean for actor in (model.actor, model.policy.average_actor))
    assert learned.abs().max() > 0.0
    assert th.equal(learned, acting)


def test_learning_goes_on_after_an_interrupt(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C in the middle of a policy update leaves the critics trainable."""
    model = small_model("Pendulum-v1").learn(40)

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("sb3_agpo.agpo.agpo.replayed_policy_loss", interrupt)
        model.learn(20, reset_num_timesteps=False)
    before = [parameter.clone() for parameter in model.critic.parameters()]
    model.learn(20, reset_num_timesteps=False)
    assert not any(map(th.equal, model.critic.parameters(), before))


class ListBuffer(ReplayBuffer):
    """Keeps transitions in a list of its own."""

    def __init__(self, buffer_size: int, *args: Any, n_envs: int = 1, **_: Any) -> None:
        BaseBuffer.__init__(self, buffer_size, *args, n_envs=n_envs)
        self.transitions: list[Any] = []

    def add(self, *transition: Any) -> None:
        self.transitions.append(transition)
        self.pos += 1


def test_an_interrupt_with_a_buffer_of_ones_own() -> None:
    """What went wrong is what one is told."""

    def interrupt(local: Any, _: Any) -> bool:
        if local["self"].num_timesteps == 5:
            raise KeyboardInterrupt
        return True

    model = small_model("Pendulum-v1", replay_buffer_class=ListBuffer)
    with pytest.raises(KeyboardInterrupt):
        model.learn(10, callback=interrupt)
    assert isinstance(model.replay_buffer, ListBuffer) and len(model.replay_buffer.transitions) == 4


def test_an_interrupt_between_two_steps() -> None:
    def interrupt(local: Any, _: Any) -> bool:
        if local["self"].num_timesteps == 35:
            raise KeyboardInterrupt
        return True

    model = small_model("InvertedPendulum-v5")
    with pytest.raises(KeyboardInterrupt):
        model.learn(100, callback=interrupt)
    env = model.get_env()
    assert env is not None and model.dynamics is not None
    recorded = model.dynamics.n_recorded
    evaluate_policy(model, env, n_eval_episodes=2)
    assert model.dynamics.n_recorded == recorded
    # The step in between is lost, and none is made up
    buffer = model.replay_buffer
    assert isinstance(buffer, ReplayBuffer) and buffer.size() == 34 and buffer.dones[33] == 1.0
    model.learn(20, reset_num_timesteps=False)
    goes_on = buffer.dones[: buffer.size() - 1, 0] == 0.0
    assert np.array_equal(
        buffer.next_observations[: buffer.size() - 1][goes_on], buffer.observations[1 : buffer.size()][goes_on]
    )


# ---------------------------------------------------------------------- a model changed while it lives


def test_copies_learn_by_their_own_learning_rate() -> None:
    model = small_model("Pendulum-v1").learn(40)
    other = pickle.loads(pickle.dumps(copy.deepcopy(model)))
    other.learning_rate = 1e-5
    other._setup_lr_schedule()
    other.learn(10, reset_num_timesteps=False)
    for optimizer in (other.actor.optimizer, other.ent_coef_optimizer):
        assert optimizer.param_groups[0]["lr"] == pytest.approx(1e-5)
    for copied, learning_rate in ((other, 1e-5), (model, 3e-4)):
        expected = pytest.approx(CRITIC_LEARNING_RATE_FACTOR * learning_rate)
        assert copied.critic.optimizer.param_groups[0]["lr"] == expected


def test_discount_may_be_changed_on_the_way() -> None:
    model = small_model("Pendulum-v1", n_steps=3).learn(60)
    model.gamma = 0.5
    discounts = model._sample_transitions(64).discounts
    assert discounts is not None
    assert set(discounts.flatten().tolist()) <= {0.5, 0.25, 0.125}


def test_models_are_freed_at_once() -> None:
    """No cycle of references keeps a model, its replay buffer and its threads until the garbage collector runs."""
    model = small_model("InvertedPendulum-v5").learn(40)
    gone = weakref.ref(model)
    gc.collect()
    gc.disable()
    try:
        del model
        assert gone() is None
    finally:
        gc.enable()


# ---------------------------------------------------------------------- spaces

OBSERVATION_SPACES = {
    "float64": spaces.Box(-1.0, 1.0, (3,), np.float64),
    "float16": spaces.Box(-1.0, 1.0, (3,), np.float16),
    "matrix": spaces.Box(-1.0, 1.0, (2, 3), np.float32),
    "integers": spaces.Box(-5, 5, (3,), np.int32),
    "discrete": spaces.Discrete(4),
    "multi_discrete": spaces.MultiDiscrete([4, 3]),
    "multi_binary": spaces.MultiBinary(5),
}
ACTION_SPACES = {
    "float64": spaces.Box(-1.0, 1.0, (2,), np.float64),
    "matrix": spaces.Box(-1.0, 1.0, (2, 3), np.float32),
    "asymmetric": spaces.Box(np.array([-3.0, 1.0], np.float32), np.array([0.5, 20.0], np.float32)),
}


@pytest.mark.parametrize("n_envs", [1, 2])
@pytest.mark.parametrize("space", OBSERVATION_SPACES.values(), ids=OBSERVATION_SPACES)
def test_observation_spaces(space: spaces.Space[Any], n_envs: int) -> None:
    env = make_vec_env(lambda: RandomEnv(space), n_envs)
    model = small_model(env, learning_starts=10).learn(30)
    actions, _ = model.predict(env.reset(), deterministic=True)
    assert actions.shape == (n_envs, 1)
    assert model._n_updates > 0


@pytest.mark.parametrize("space", ACTION_SPACES.values(), ids=ACTION_SPACES)
def test_action_spaces(space: spaces.Box) -> None:
    env = RandomEnv(spaces.Box(-1.0, 1.0, (3,), np.float32), space)
    model = small_model(env, learning_starts=10).learn(30)
    action, _ = model.predict(env.reset()[0])
    assert action.shape == space.shape
    assert np.all(action >= space.low) and np.all(action <= space.high)
    assert model.target_entropy == -np.prod(space.shape)


@pytest.mark.parametrize("space", [spaces.Discrete(2), spaces.MultiDiscrete([2, 2]), spaces.MultiBinary(2)])
def test_wrong_action_space(space: spaces.Space[Any]) -> None:
    with pytest.raises(AssertionError, match="only supports"):
        small_model(RandomEnv(spaces.Box(-1.0, 1.0, (3,)), space))


def test_unbounded_actions() -> None:
    with pytest.raises(AssertionError, match="finite"):
        small_model(RandomEnv(spaces.Box(-1.0, 1.0, (3,)), spaces.Box(-np.inf, np.inf, (1,))))


def test_dict_observation_needs_multi_input_policy() -> None:
    with pytest.raises(ValueError, match="MultiInputPolicy"):
        small_model(SimpleMultiObsEnv(discrete_actions=False))


class ResetWithoutOptions(gym.Env[Any, Any]):
    """``reset`` takes no ``options``, as SB3 allows."""

    observation_space = spaces.Box(-1.0, 1.0, (3,), np.float32)
    action_space = spaces.Box(-1.0, 1.0, (1,), np.float32)

    def reset(self, *, seed: int | None = None) -> tuple[Any, dict[str, Any]]:  # type: ignore[override]
        return self.observation_space.sample(), {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        return self.observation_space.sample(), 0.0, False, bool(self.np_random.random() < 0.2), {}


def test_reset_without_options() -> None:
    small_model(ResetWithoutOptions()).learn(40)


# ---------------------------------------------------------------------- policies


@pytest.mark.parametrize("share", [False, True])
def test_cnn_policy(share: bool) -> None:
    env = FakeImageEnv(screen_height=36, screen_width=36, n_channels=1, discrete=False)
    env.observation_space.seed(0)  # which it draws from, and SB3 does not seed
    kwargs = {"features_extractor_kwargs": {"features_dim": 8}, "share_features_extractor": share}
    model = small_model(env, "CnnPolicy", kwargs, buffer_size=40, learning_starts=5, batch_size=4)
    assert (model.actor.features_extractor is model.critic.features_extractor) == share
    before = {name: value.clone() for name, value in model.policy.named_parameters()}
    model.learn(20)
    # A shared extractor learns from the actor's loss, the critic's own one from the critic's, and the target follows both
    assert not [name for name, value in model.policy.named_parameters() if th.equal(value, before[name])]
    action, _ = model.predict(env.reset()[0])  # channels last, as the environment gives it
    assert action.shape == env.action_space.shape


@pytest.mark.parametrize("channels_last", [False, True])
def test_multi_input_policy(channels_last: bool) -> None:
    env = make_vec_env(lambda: SimpleMultiObsEnv(random_start=True, discrete_actions=False, channel_last=channels_last), 2)
    kwargs = {"features_extractor_kwargs": {"cnn_output_dim": 8}}
    model = small_model(env, "MultiInputPolicy", kwargs, buffer_size=60, learning_starts=10, batch_size=4)
    model.learn(30)
    assert isinstance(model.replay_buffer, DictReplayBuffer)
    evaluate_policy(model, env, n_eval_episodes=1, warn=False)


POLICY_KWARGS: dict[str, dict[str, Any]] = {
    "net_arch": {"net_arch": {"pi": [8], "qf": [16, 8]}},
    "linear": {"net_arch": []},
    "activation": {"activation_fn": nn.ReLU},
    "optimizer": {"optimizer_class": th.optim.AdamW, "optimizer_kwargs": {"weight_decay": 1e-3}},
    "adam_options": {"optimizer_kwargs": {"foreach": True, "eps": 1e-5}},
    "one_critic": {"n_critics": 1},
    "three_critics": {"n_critics": 3},
    "layer_norm": {"normalization": "layer"},
    "no_normalization": {"normalization": "none"},
    "extractor": {"features_extractor_class": TanhExtractor, "features_extractor_kwargs": {"features_dim": 5}},
    "shared_extractor": {"features_extractor_class": TanhExtractor, "share_features_extractor": True},
    "batch_norm": {"features_extractor_class": BatchNormDropoutExtractor},
    "shared_batch_norm": {"features_extractor_class": BatchNormDropoutExtractor, "share_features_extractor": True},
}


@pytest.mark.parametrize("env_id", TASKS)
@pytest.mark.parametrize("kwargs", POLICY_KWARGS.values(), ids=POLICY_KWARGS)
def test_policy_kwargs(kwargs: dict[str, Any], env_id: str) -> None:
    model = small_model(env_id, policy_kwargs=kwargs)
    before = [value.clone() for value in model.policy.parameters()]
    model.learn(60)
    after = list(model.policy.parameters())
    changed = sum(not th.equal(old, new) for old, new in zip(before, after, strict=True))
    assert changed >= 0.9 * len(after)  # a target's copy of a shared extractor may stand still
    assert all(th.isfinite(value).all() for value in after)


def test_policy_class_and_alias() -> None:
    assert parameters_equal(small_model("Pendulum-v1"), small_model("Pendulum-v1", AGPOPolicy))
    with pytest.raises(ValueError, match="unknown"):
        small_model("Pendulum-v1", "NoPolicy")


def test_training_mode() -> None:
    """Batch normalisation and dropout are off when acting, on when learning, and the targets never learn."""
    model = small_model(
        "InvertedPendulum-v5", policy_kwargs={**POLICY_KWARGS["batch_norm"], "normalization": "layer"}, learning_starts=10
    )
    model.learn(10)
    modes = {"actor": model.actor, "critic": model.critic, "critic_target": model.critic_target}
    assert not any(module.training for module in modes.values())
    obs = model.observation_space.sample()
    first, _ = model.predict(obs, deterministic=True)
    assert np.array_equal(first, model.predict(obs, deterministic=True)[0])  # no dropout
    running = [m.features_extractor.batch_norm.running_mean.clone() for m in modes.values()]
    model.train(gradient_steps=1, batch_size=8)
    assert {name: module.training for name, module in modes.items()} == {
        "actor": True,
        "critic": True,
        "critic_target": False,
    }
    moved = [
        not th.equal(m.features_extractor.batch_norm.running_mean, r) for m, r in zip(modes.values(), running, strict=True)
    ]
    assert moved == [True, True, True]  # the target's are copied, see SB3 GH #996
    critics = (model.critic.features_extractor.batch_norm, model.critic_target.features_extractor.batch_norm)
    assert th.equal(critics[0].running_mean, critics[1].running_mean)
    model.predict(obs)
    assert not model.actor.training


# ---------------------------------------------------------------------- hyperparameters


@pytest.mark.parametrize("ent_coef", ["auto", "auto_0.01", 0.1, 0, 0.0])
def test_ent_coef(ent_coef: str | float) -> None:
    model = small_model("InvertedPendulum-v5", ent_coef=ent_coef)
    start = {"auto": 1.0, "auto_0.01": 0.01}.get(str(ent_coef), ent_coef)
    assert model._current_ent_coef().item() == pytest.approx(float(start))
    model.learn(60, log_interval=1000)  # what is dumped is forgotten
    learned = isinstance(ent_coef, str)
    assert (model._current_ent_coef().item() != pytest.approx(float(start), rel=1e-5)) == learned
    assert ("train/ent_coef_loss" in model.logger.name_to_value) == learned


def test_ent_coef_out_of_range() -> None:
    with pytest.raises((AssertionError, ValueError), match="ent_coef"):
        small_model("Pendulum-v1", ent_coef="auto_-1")


@pytest.mark.parametrize("learning_rate", [1e-3, ConstantSchedule(1e-3), LinearSchedule(1e-3, 1e-4, 0.5), lambda _: 1e-3])
@pytest.mark.parametrize("critic_learning_rate", [None, 0.0, LinearSchedule(1e-2, 1e-4, 1.0)])
def test_learning_rates(learning_rate: Any, critic_learning_rate: Any) -> None:
    model = small_model("Pendulum-v1", learning_rate=learning_rate, critic_learning_rate=critic_learning_rate)
    critic_before = [value.clone() for value in model.critic.parameters()]
    model.learn(40)
    progress = model._current_progress_remaining
    expected = learning_rate(progress) if callable(learning_rate) else learning_rate
    assert model.actor.optimizer.param_groups[0]["lr"] == pytest.approx(expected)
    expected = (
        model.critic_lr_schedule(progress) if critic_learning_rate is not None else CRITIC_LEARNING_RATE_FACTOR * expected
    )
    assert model.critic.optimizer.param_groups[0]["lr"] == pytest.approx(expected)
    assert model.ent_coef_optimizer is not None  # its pace is SAC's: one step for each transition
    assert model.ent_coef_optimizer.param_groups[0]["lr"] == pytest.approx(
        model._current_learning_rate(model.ent_coef_lr_schedule)
    )
    frozen = all(th.equal(a, b) for a, b in zip(critic_before, model.critic.parameters(), strict=True))
    assert frozen == (critic_learning_rate == 0.0)


@pytest.mark.parametrize("env_id", TASKS)
@pytest.mark.parametrize(
    ("train_freq", "gradient_steps", "n_envs", "expected"),
    [
        (4, 2, 1, 20),
        ((4, "step"), 1, 1, 10),
        (1, -1, 1, 40),
        (4, -1, 1, 40),
        (4, -1, 2, 48),  # 8 transitions at a time, from step 24 to step 64
        (4, 0, 2, 0),
    ],
)
def test_number_of_updates(env_id: str, train_freq: Any, gradient_steps: int, n_envs: int, expected: int) -> None:
    env = make_vec_env(env_id, n_envs)
    model = small_model(env, train_freq=train_freq, gradient_steps=gradient_steps).learn(60)
    assert model.num_timesteps >= 60
    assert model._n_updates == expected


def test_number_of_policy_updates_does_not_depend_on_the_training_frequency(monkeypatch: pytest.MonkeyPatch) -> None:
    """More steps than a batch of windows has make more batches, not a larger one."""
    sizes: list[float] = []
    update = AGPO._update_policy_from_windows

    def watched(model: AGPO, windows: RolloutWindows) -> None:
        sizes.append(float(windows.mask.sum()))
        update(model, windows)

    monkeypatch.setattr(AGPO, "_update_policy_from_windows", watched)
    for train_freq in (1, 16, 40):
        small_model("InvertedPendulum-v5", train_freq=train_freq, learning_starts=0).learn(80)
        assert sizes == [16.0] * 4 * 5
        sizes.clear()


def test_numbers_in_other_forms() -> None:
    """Lists and NumPy's integers, as read from files; texts, as SAC takes them."""
    for train_freq in ([4, "step"], (np.int64(4), "step"), np.int64(4)):
        model = small_model("Pendulum-v1", train_freq=train_freq, ent_coef="0.3", target_entropy="-2")
        assert model.train_freq == (4, TrainFrequencyUnit.STEP)
        assert (float(model._current_ent_coef()), model.target_entropy) == (pytest.approx(0.3), -2.0)
    assert model.learn(30)._n_updates > 0


def test_train_freq_episode() -> None:
    model = small_model("InvertedPendulum-v5", train_freq=(1, "episode"), gradient_steps=-1).learn(100)
    assert 0 < model._n_updates <= model.num_timesteps
    with pytest.raises(AssertionError, match="one env"):
        small_model(make_vec_env("InvertedPendulum-v5", 2), train_freq=(1, "episode")).learn(100)
    with pytest.raises(ValueError, match="unit"):
        small_model("InvertedPendulum-v5", train_freq=(1, "year"))


def test_no_training_stores_nothing_for_ever() -> None:
    """``gradient_steps=0`` collects experience alone: windows that nobody will use must not pile up."""
    model = small_model("InvertedPendulum-v5", gradient_steps=0).learn(200)
    assert len(model.rollout_buffer._transitions) < 60
    assert model._n_updates == 0


def test_derivatives_that_nobody_uses_are_not_computed() -> None:
    for critic_grad_coef in (0.0, 1.0):
        model = small_model("InvertedPendulum-v5", rollout_epochs=0, critic_grad_coef=critic_grad_coef).learn(60)
        assert model.dynamics is not None and model._n_updates > 0
        assert (model.simulator_calls > model.num_timesteps) == (critic_grad_coef > 0.0)


def test_derivatives_of_random_actions_are_not_computed() -> None:
    """Before ``learning_starts`` nothing but gradient matching has a use for them."""
    for critic_grad_coef in (0.0, 1.0):
        model = small_model("Hopper-v5", learning_starts=100, critic_grad_coef=critic_grad_coef).learn(100)
        assert (model.simulator_calls > model.num_timesteps) == (critic_grad_coef > 0.0)


def test_steps_that_nobody_differentiates_are_not_recorded() -> None:
    """Recording takes time, and where an environment is differentiated through its own ``step``, much of it."""
    for options, expected in (({"gradient_mode": "q"}, 0), ({"learning_starts": 100}, 0), ({"learning_starts": 40}, 8)):
        model = small_model("InvertedPendulum-v5", critic_grad_coef=0.0, **options).learn(40)
        assert model.dynamics is not None and model.rollout_buffer.n_pending == 8
        assert model.dynamics.n_recorded == expected


def test_simulator_calls_are_counted_over_the_life_of_a_model(tmp_path: Path) -> None:
    model = small_model("Hopper-v5").learn(60)
    first = model.simulator_calls
    assert first > 3 * 60
    model.learn(60)
    assert 2 * first - 60 < model.simulator_calls < 2 * first + 60  # the second begins with the policy's actions
    second = model.simulator_calls
    model.set_env(gym.make("Hopper-v5"))
    assert model.simulator_calls == second
    model.save(tmp_path / "model")
    assert AGPO.load(tmp_path / "model", env=gym.make("Hopper-v5")).simulator_calls == second


def test_steps_are_recorded_while_learning_alone() -> None:
    model = small_model("Hopper-v5")
    env = model.get_env()
    assert env is not None and model.dynamics is not None
    for _ in range(2):
        before = model.dynamics.n_recorded
        env.reset()
        env.step(np.zeros((1, 3), dtype=np.float32))
        assert model.dynamics.n_recorded == before
        model.learn(40)
    assert model.dynamics.n_recorded > 0


@pytest.mark.parametrize("train_freq", [1, 40])
@pytest.mark.parametrize("horizon", [1, 3])
def test_derivatives_that_are_not_computed_change_nothing(
    monkeypatch: pytest.MonkeyPatch, horizon: int, train_freq: int
) -> None:
    """Leaving out derivatives by the state where windows begin saves simulator calls and nothing else."""
    models = []
    for everything in (False, True):
        model = small_model("Hopper-v5", horizon=horizon, critic_grad_coef=0.0, train_freq=train_freq)
        if everything:
            take = model.dynamics.take  # type: ignore[union-attr]
            monkeypatch.setattr(model.dynamics, "take", lambda n_steps, by_state, take=take: take(n_steps))
        models.append(model.learn(150))
    fewer, more = (model.simulator_calls for model in models)
    assert fewer < more
    for left, right in zip(*(model.policy.parameters() for model in models), strict=True):
        assert th.equal(left, right)


@pytest.mark.parametrize("env_id", TASKS)
@pytest.mark.parametrize("kind", ["normal", "ornstein_uhlenbeck"])
@pytest.mark.parametrize("n_envs", [1, 2])
def test_action_noise(env_id: str, kind: str, n_envs: int) -> None:
    noise_class = {"normal": NormalActionNoise, "ornstein_uhlenbeck": OrnsteinUhlenbeckActionNoise}[kind]
    model = small_model(make_vec_env(env_id, n_envs), action_noise=noise_class(np.zeros(1), 0.1 * np.ones(1)))
    model.learn(60)
    assert isinstance(model.action_noise, VectorizedActionNoise) == (n_envs > 1)
    assert model._n_updates > 0


@pytest.mark.parametrize("env_id", TASKS)
@pytest.mark.parametrize("sde_sample_freq", [-1, 8])
@pytest.mark.parametrize("policy_kwargs", [{}, {"use_expln": True, "log_std_init": -2}])
def test_sde(env_id: str, sde_sample_freq: int, policy_kwargs: dict[str, Any]) -> None:
    env = make_vec_env(env_id, 2)
    options: dict[str, Any] = {"use_sde": True, "sde_sample_freq": sde_sample_freq, "use_sde_at_warmup": True}
    model = small_model(env, policy_kwargs=policy_kwargs, **options).learn(80)
    assert model.actor.get_std().isfinite().all()
    model.policy.reset_noise()
    model.predict(env.reset(), deterministic=False)


@pytest.mark.parametrize("env_id", TASKS)
@pytest.mark.parametrize("n_envs", [1, 2])
def test_n_steps(env_id: str, n_envs: int) -> None:
    model = small_model(make_vec_env(env_id, n_envs), n_steps=3).learn(60)
    assert isinstance(model.replay_buffer, NStepReplayBuffer)
    assert model.replay_buffer.n_steps == 3
    assert model.replay_buffer.sample(8).discounts is not None


@pytest.mark.parametrize("env_id", TASKS)
def test_optimize_memory_usage(env_id: str) -> None:
    with pytest.raises(ValueError, match="handle_timeout_termination"):
        small_model(env_id, optimize_memory_usage=True)
    model = small_model(
        env_id, optimize_memory_usage=True, replay_buffer_kwargs={"handle_timeout_termination": False}, gradient_steps=1
    )
    model.learn(60)
    with pytest.warns(UserWarning, match="last trajectory in the replay buffer will be truncated"):
        model.learn(30)


class CountingReplayBuffer(ReplayBuffer):
    """A custom buffer class."""

    def __init__(self, *args: Any, note: str = "", **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.note = note


def test_custom_replay_buffer() -> None:
    model = small_model(
        "InvertedPendulum-v5", replay_buffer_class=CountingReplayBuffer, replay_buffer_kwargs={"note": "here"}
    ).learn(60)
    assert isinstance(model.replay_buffer, CountingReplayBuffer)
    assert model.replay_buffer.note == "here"


def test_normalized_dictionaries() -> None:
    env = make_vec_env(lambda: RandomEnv(spaces.Dict({"x": spaces.Box(-1.0, 1.0, (2,)), "y": spaces.MultiBinary(3)})), 2)
    model = small_model(VecNormalize(env, norm_obs_keys=["x"]), "MultiInputPolicy", learning_starts=10).learn(40)
    assert model._n_updates > 0


def test_her_by_episodes() -> None:
    env = BitFlippingEnv(n_bits=4, continuous=True, max_steps=4)
    options: dict[str, Any] = {"replay_buffer_class": HerReplayBuffer, "train_freq": (1, "episode"), "gradient_steps": -1}
    assert small_model(env, "MultiInputPolicy", **options).learn(60)._n_updates > 0


@pytest.mark.parametrize("wrap", [VecNormalize, lambda env: env])
@pytest.mark.parametrize("options", [{"use_sde": True}, {"n_steps": 1}, {"n_steps": 5, "train_freq": 3, "gradient_steps": -1}])
def test_mujoco_vec_env_with_other_features(options: dict[str, Any], wrap: Any) -> None:
    model = small_model(wrap(MujocoVecEnv("Hopper-v5", 2)), **options).learn(80)
    assert model.provider_report.kind == "mujoco" and model._n_updates > 0 and model.derivative_buffer.size > 0


@pytest.mark.parametrize("n_envs", [1, 2])
@pytest.mark.parametrize("strategy", ["future", "final"])
def test_her(n_envs: int, strategy: str) -> None:
    env = make_vec_env(lambda: BitFlippingEnv(n_bits=4, continuous=True, max_steps=4), n_envs)
    model = small_model(
        env,
        "MultiInputPolicy",
        replay_buffer_class=HerReplayBuffer,
        replay_buffer_kwargs={"n_sampled_goal": 2, "goal_selection_strategy": strategy},
    )
    model.learn(60)
    assert model._n_updates > 0
    assert model.dynamics is None and model.provider_report.kind == "none"


# ---------------------------------------------------------------------- vectorised environments


@pytest.mark.parametrize("env_id", TASKS)
@pytest.mark.parametrize("options", [{}, {"norm_obs": False}, {"norm_reward": False}, {"clip_obs": 0.1, "clip_reward": 0.1}])
def test_vec_normalize(env_id: str, options: dict[str, Any]) -> None:
    env = VecNormalize(make_vec_env(env_id, 2), gamma=0.99, **options)
    model = small_model(env).learn(80)
    assert model.get_vec_normalize_env() is env
    assert all(th.isfinite(value).all() for value in model.policy.parameters())


def test_subproc_vec_env() -> None:
    env = make_vec_env("InvertedPendulum-v5", 2, vec_env_cls=SubprocVecEnv)
    model = small_model(env).learn(60)
    env.close()
    assert model.provider_report.kind == "mujoco" and model._n_updates > 0


def test_frame_stack() -> None:
    model = small_model(VecFrameStack(make_vec_env("InvertedPendulum-v5", 2), 2)).learn(60)
    assert model.provider_report.kind == "none" and model._n_updates > 0


def test_bare_environment_and_id() -> None:
    """An id, a Gymnasium environment and its unwrapped core are all wrapped in a Monitor."""
    for env in ("InvertedPendulum-v5", gym.make("InvertedPendulum-v5"), gym.make("InvertedPendulum-v5").unwrapped):
        model = small_model(env).learn(40)
        assert model.provider_report.kind == "mujoco"
        assert len(model.ep_info_buffer or []) > 0


def test_set_env() -> None:
    model = small_model("InvertedPendulum-v5").learn(40)
    model.set_env(gym.make("InvertedPendulum-v5"))
    model.learn(40, reset_num_timesteps=False)
    assert model.num_timesteps == 80 and model.dynamics is not None
    normalized = VecNormalize(make_vec_env("InvertedPendulum-v5", 1))
    model.set_env(normalized)
    model.learn(40, reset_num_timesteps=False)
    assert model.get_vec_normalize_env() is normalized
    model.set_env(make_vec_env("InvertedPendulum-v5", 1), force_reset=True)
    assert model.get_vec_normalize_env() is None
    with pytest.raises(AssertionError, match="number of environments"):
        model.set_env(make_vec_env("InvertedPendulum-v5", 2))
    with pytest.raises(ValueError, match="spaces do not match"):
        model.set_env(gym.make("Pendulum-v1"))


def test_set_logger_and_stats_window(tmp_path: Path) -> None:
    model = small_model("InvertedPendulum-v5", stats_window_size=3)
    logger = configure(str(tmp_path), ["csv", "json"])
    model.set_logger(logger)
    model.learn(120, log_interval=1)
    logger.close()
    assert model.logger is logger
    assert model.ep_info_buffer is not None and model.ep_info_buffer.maxlen == 3
    assert "train/critic_loss" in (tmp_path / "progress.csv").read_text().splitlines()[0]


def test_tensorboard(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    model = small_model("InvertedPendulum-v5", tensorboard_log=str(tmp_path)).learn(40)
    model.learn(20, reset_num_timesteps=False)
    assert [path.name for path in tmp_path.iterdir()] == ["AGPO_1"]
    model.learn(20, tb_log_name="other")
    model.logger.close()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["AGPO_1", "other_1"]


# ---------------------------------------------------------------------- reproducibility


@pytest.mark.parametrize("env_id", TASKS)
@pytest.mark.parametrize("n_envs", [1, 3])
def test_same_seed_twice(env_id: str, n_envs: int) -> None:
    first, second = (small_model(make_vec_env(env_id, n_envs, seed=0)).learn(150) for _ in range(2))
    assert parameters_equal(first, second)
    rewards = [model.replay_buffer.rewards for model in (first, second)]
    assert np.array_equal(*rewards)
    other = small_model(make_vec_env(env_id, n_envs), seed=1).learn(150)
    assert not np.array_equal(rewards[0], other.replay_buffer.rewards)


@pytest.mark.parametrize("env_id", TASKS)
@pytest.mark.parametrize("n_envs", [1, 2])
def test_learning_in_two_parts(env_id: str, n_envs: int) -> None:
    whole = small_model(make_vec_env(env_id, n_envs)).learn(160)
    parts = small_model(make_vec_env(env_id, n_envs)).learn(100)
    parts.learn(60, reset_num_timesteps=False)
    assert whole.num_timesteps == parts.num_timesteps == 160
    assert parameters_equal(whole, parts)


@pytest.mark.parametrize("n_envs", [1, 2])
def test_correlated_noise_goes_on_in_the_second_part(n_envs: int) -> None:
    def make() -> AGPO:
        noise = OrnsteinUhlenbeckActionNoise(np.zeros(1), 0.5 * np.ones(1))
        return small_model(make_vec_env("Pendulum-v1", n_envs), action_noise=noise)

    parts = make().learn(100)
    parts.learn(60, reset_num_timesteps=False)
    assert parameters_equal(make().learn(160), parts)


def test_steps_of_a_return_may_be_changed_with_a_loaded_replay_buffer(tmp_path: Path) -> None:
    small_model("Pendulum-v1", n_steps=3).learn(60).save_replay_buffer(tmp_path / "buffer")
    for n_steps in (1, 5):
        model = small_model("Pendulum-v1", n_steps=n_steps, trace_distance=np.inf)
        model.load_replay_buffer(tmp_path / "buffer")
        assert model._sample_transitions(200).discounts.min() == pytest.approx(0.99**n_steps)  # type: ignore[union-attr]


@pytest.mark.parametrize("env_id", ["HalfCheetah-v5", "Reacher-v5"])  # stepped by rollout, and with sensors read
@pytest.mark.parametrize("kind", ["dummy", "mujoco_vec_env"])
def test_threads_never_change_a_bit(env_id: str, kind: str) -> None:
    """Neither those that differentiate nor those that step."""
    models = []
    for threads in (1, 3):
        env = MujocoVecEnv(env_id, 2, threads=threads, seed=0) if kind == "mujoco_vec_env" else make_vec_env(env_id, 2, seed=0)
        models.append(small_model(env, finite_differences=FiniteDifferences(threads=threads)).learn(80))
        env.close()
    assert models[0].derivative_buffer.size > 0
    assert np.array_equal(*(model.replay_buffer.observations for model in models))  # type: ignore[union-attr]
    assert parameters_equal(*models)


def test_mujoco_vec_env_and_workers_give_the_bits_of_a_plain_run() -> None:
    """Where the environments run does not matter."""
    kinds = (
        make_vec_env("InvertedPendulum-v5", 2, seed=3),
        MujocoVecEnv("InvertedPendulum-v5", 2, seed=3),
        make_vec_env("InvertedPendulum-v5", 2, seed=3, vec_env_cls=SubprocVecEnv),
    )
    plain, *others = (small_model(env).learn(80) for env in kinds)
    for env in kinds:
        env.close()
    assert plain._n_updates > 0
    assert all(parameters_equal(plain, other) for other in others)


def test_evaluation_between_two_parts() -> None:
    """Steps of the training environment outside ``learn`` are not taken for experience, and none is remembered."""
    model = small_model("InvertedPendulum-v5").learn(50)
    env = model.get_env()
    assert env is not None
    evaluate_policy(model, env, n_eval_episodes=2)
    assert max(env.get_attr("agpo_n_recorded")) <= model.rollout_buffer.n_pending
    model.learn(50)
    assert model.num_timesteps == 50


# ---------------------------------------------------------------------- learning


class InfiniteHorizonEnv(gym.Env[Any, Any]):
    """A ring of states that never ends, one unit of reward each step."""

    def __init__(self, n_states: int = 4) -> None:
        self.n_states, self.state = n_states, 0
        self.observation_space = spaces.Discrete(n_states)
        self.action_space = spaces.Box(-1.0, 1.0, (1,), np.float32)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[int, dict[str, Any]]:
        super().reset(seed=seed)
        self.state = 0
        return self.state, {}

    def step(self, action: Any) -> tuple[int, float, bool, bool, dict[str, Any]]:
        self.state = (self.state + 1) % self.n_states
        return self.state, 1.0, False, False, {}


@pytest.mark.parametrize("handle_timeout_termination", [False, True])
def test_infinite_horizon_value(handle_timeout_termination: bool) -> None:
    """A time limit is no end of the task: the value is that of the endless one, 1 / (1 - gamma)."""
    model = small_model(
        gym.wrappers.TimeLimit(InfiniteHorizonEnv(), 8),
        policy_kwargs={"net_arch": [16], "n_critics": 1, "normalization": "layer"},  # few updates, fast targets
        gamma=0.98,
        tau=0.5,
        learning_rate=0.01,
        learning_starts=0,
        batch_size=64,
        train_freq=1,
        ent_coef=0.0,
        policy_delay=1,
        replay_buffer_kwargs={"handle_timeout_termination": handle_timeout_termination},
    ).learn(500)
    obs, _ = model.policy.obs_to_tensor(np.array(0))
    value = model.critic(obs, model.actor(obs))[0].item()
    endless = 1.0 / (1.0 - 0.98)
    assert abs(value - endless) < 1.0 if handle_timeout_termination else value < endless - 5.0


@pytest.mark.parametrize("n_steps", [1, 3])
def test_single_precision_replay_changes_nothing(n_steps: int) -> None:
    """MuJoCo tasks observe in double precision, networks compute in single precision: the buffer need not hold more."""
    weights = []
    for dtype in (np.float32, np.float64):
        model = small_model("Hopper-v5", n_steps=n_steps)
        assert model.observation_space.dtype == np.float64
        for name in ("observations", "next_observations"):
            stored = getattr(model.replay_buffer, name)
            assert stored.dtype == np.float32
            setattr(model.replay_buffer, name, stored.astype(dtype))
        weights.append(list(model.learn(60).policy.parameters()))
    assert all(th.equal(single, double) for single, double in zip(*weights, strict=True))


def test_other_replay_buffers_and_normalised_ones_keep_double_precision() -> None:
    """Small changes of large numbers are what a buffer or a normalisation may have to tell apart."""
    env = make_vec_env("Hopper-v5", 1)
    for model in (small_model(env, replay_buffer_class=CountingReplayBuffer), small_model(VecNormalize(env))):
        assert model.replay_buffer is not None
        model.learn(30)
        stored = model.replay_buffer.observations
        assert stored.dtype == np.float64
        assert (stored != stored.astype(np.float32)).any()


def test_learns_identity_with_critic_alone() -> None:
    env = IdentityEnvBox(eps=0.5)
    env.observation_space.seed(0)  # which it draws from, and SB3 does not seed
    model = small_model(
        env,
        policy_kwargs={"net_arch": [64, 64]},
        gamma=0.95,
        learning_rate=1e-3,
        critic_learning_rate=1e-3,
        learning_starts=100,
        batch_size=64,
        buffer_size=600,
        train_freq=1,
        policy_delay=1,
    ).learn(600)
    reward, _ = evaluate_policy(model, env, n_eval_episodes=20, reward_threshold=90, warn=False)
    assert reward > 90


# ---------------------------------------------------------------------- logger


def documented_keys() -> list[str]:
    """Keys in the first column of the tables of docs/metrics.md, as regular expressions."""
    keys = re.findall(r"^\| `(train/[^`]+)` \|", METRICS.read_text(), flags=re.MULTILINE)
    return [re.sub(r"<[a-z]+>", r"\\d+", key) for key in keys]


def logged_keys(env_id: str, **kwargs: Any) -> set[str]:
    """Keys that a short run leaves in the logger."""
    return set(small_model(env_id, **kwargs).learn(101, log_interval=1000).logger.name_to_value)


@pytest.mark.parametrize("env_id", TASKS)
@pytest.mark.parametrize(
    "kwargs", [{}, {"use_sde": True}, {"gradient_mode": "q"}, {"ent_coef": 0.1}, {"correction_updates": 2}]
)
def test_logged_keys_are_documented_and_short(env_id: str, kwargs: dict[str, Any]) -> None:
    keys = logged_keys(env_id, **kwargs)
    assert "train/critic_loss" in keys and "train/learning_rate" in keys
    training = {key for key in keys if key.startswith("train/")}
    undocumented = {key for key in training if not any(re.fullmatch(pattern, key) for pattern in documented_keys())}
    assert not undocumented, f"add {sorted(undocumented)} to {METRICS.name}"
    names = [key.split("/")[1] for key in training]
    assert max(map(len, names)) < 34
    assert len({name[:30] for name in names}) == len(names)
    # SB3's text output cuts long keys, and raises if two become one
    HumanOutputFormat(io.StringIO()).write(dict.fromkeys(training, 0.0), dict.fromkeys(training, ()), 0)


def test_documented_keys_are_logged() -> None:
    keys = set().union(*(logged_keys(env_id, correction_updates=2) for env_id in TASKS))
    keys |= {"train/std"}  # written by SB3 itself, under gSDE, when it dumps
    gone = [pattern for pattern in documented_keys() if not any(re.fullmatch(pattern, key) for key in keys)]
    assert not gone, f"{METRICS.name} describes what is not logged: {gone}"


def test_logged_values_are_finite_numbers() -> None:
    model = small_model("InvertedPendulum-v5")
    model.set_logger(Logger(folder=None, output_formats=[]))
    model.learn(101, log_interval=1000)
    values = {key: value for key, value in model.logger.name_to_value.items() if key.startswith("train/")}
    assert all(isinstance(value, (int, float)) and np.isfinite(value) for value in values.values()), values


def test_verbose_says_where_derivatives_come_from(capsys: pytest.CaptureFixture[str]) -> None:
    small_model("InvertedPendulum-v5", verbose=1)
    assert "Simulator derivatives: from mujoco" in capsys.readouterr().out
    small_model("Pendulum-v1", verbose=1)
    assert "Simulator derivatives: none" in capsys.readouterr().out
    small_model("Pendulum-v1")
    assert capsys.readouterr().out == ""


def test_flat_state_sees_every_parameter() -> None:
    """The comparison that this file relies on must notice a single changed weight."""
    first, second = small_model("Pendulum-v1"), small_model("Pendulum-v1")
    assert parameters_equal(first, second) and len(flat_state(first)) > 20
    with th.no_grad():
        next(iter(second.critic.parameters())).view(-1)[0] += 1e-6
    assert not parameters_equal(first, second)


def test_arguments_in_the_order_of_sb3() -> None:
    model = AGPO("MlpPolicy", DummyVecEnv([lambda: gym.make("Pendulum-v1")]), 1e-3, 300, 10, 8, 0.01, 0.9)
    assert (model.buffer_size, model.learning_starts, model.batch_size, model.tau, model.gamma) == (300, 10, 8, 0.01, 0.9)
