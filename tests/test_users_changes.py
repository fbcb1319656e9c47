"""What users do to a SAC model from outside, in callbacks, subclasses and recipes, has the same effect on AGPO."""

from __future__ import annotations

from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from small_models import small_model
from stable_baselines3.common.buffers import ReplayBuffer
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.distributions import SquashedDiagGaussianDistribution
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor
from stable_baselines3.common.type_aliases import ReplayBufferSamples
from torch import nn

from sb3_agpo import AGPO
from sb3_agpo.agpo.n_step import sample_n_step
from sb3_agpo.agpo.policies import AGPOPolicy
from sb3_agpo.agpo.updates import act_as_recorded

TASK = "InvertedPendulum-v5"  # has derivatives
QUARTER = np.float32(0.25)


# ---------------------------------------------------------------------- who acts


class Guided(AGPOPolicy):
    """A guide acts, as in jump-start reinforcement learning."""

    def predict(self, observation: Any, state: Any = None, episode_start: Any = None, deterministic: bool = False) -> Any:
        """The same action always."""
        return np.full((len(observation), *self.action_space.shape), QUARTER), state  # type: ignore[misc]


class GuidedInside(AGPOPolicy):
    """The same at another place."""

    def _predict(self, observation: Any, deterministic: bool = False) -> th.Tensor:
        return th.full((len(observation), 1), float(QUARTER) / 3.0)  # in [-1, 1]


class GuidedAlgorithm(AGPO):
    """The same at another one."""

    def predict(self, observation: Any, *args: Any, **kwargs: Any) -> Any:
        """The same action always."""
        return np.full((len(observation), 1), QUARTER), None


class Calm(SquashedDiagGaussianDistribution):
    """A distribution that has a single action."""

    def sample(self) -> th.Tensor:
        """Its mode."""
        return super().mode()


def replayed_actions(model: AGPO) -> np.ndarray:
    """Actions after the random ones."""
    assert model.replay_buffer is not None
    return model.replay_buffer.actions[model.learning_starts : model.replay_buffer.size(), 0, 0]


@pytest.mark.parametrize("kind", [Guided, GuidedInside, GuidedAlgorithm])
def test_whoever_predicts_acts(kind: type) -> None:
    if kind is GuidedAlgorithm:
        model: AGPO = GuidedAlgorithm("MlpPolicy", TASK, learning_starts=16, policy_kwargs={"net_arch": [8]}, buffer_size=100)
    else:
        model = small_model(TASK, policy=kind, learning_starts=16, buffer_size=100)
    model.learn(60)
    assert model.provider_report.kind == "mujoco"
    np.testing.assert_allclose(replayed_actions(model), QUARTER / 3.0, rtol=1e-6)


def test_hooks_on_the_actor_see_it_act() -> None:
    model = small_model(TASK, learning_starts=16, gradient_steps=0)
    seen: list[int] = []
    model.actor.register_forward_hook(lambda *_: seen.append(1))
    model.learn(60)
    assert len(seen) == 60 - 16


def test_a_distribution_of_ones_own_acts() -> None:
    model = small_model(TASK, learning_starts=16, buffer_size=100, gradient_steps=0)
    model.actor.action_dist = Calm(1)
    model.learn(60)
    assert model.replay_buffer is not None
    observations = th.as_tensor(model.replay_buffer.observations[16:60, 0])
    with th.no_grad():
        expected = model.actor(observations, deterministic=True).numpy()[:, 0]
    np.testing.assert_allclose(replayed_actions(model), expected, atol=1e-6)


def test_noise_is_that_of_the_action_that_was_taken() -> None:
    """A subclass puts another action in place of the policy's: windows repeat the action, not the noise that it discarded."""

    class Mixed(AGPO):
        def _sample_action(self, *args: Any, **kwargs: Any) -> Any:
            _, scaled = super()._sample_action(*args, **kwargs)
            if self.num_timesteps % 2:
                scaled = np.full_like(scaled, 0.9)
            return self.policy.unscale_action(scaled), scaled

    model = Mixed("MlpPolicy", TASK, learning_starts=0, rollout_size=16, policy_kwargs={"net_arch": [8]}, seed=0)
    errors: list[float] = []
    update = model._update_policy_from_windows

    def compare(windows: Any) -> Any:
        if len(errors) % model.rollout_epochs == 0:  # later ones have another policy
            again = th.stack([act_as_recorded(model.actor, windows, step).actions for step in range(model.horizon)])
            errors.append((again - windows.actions).abs()[windows.mask > 0].max().item())
        return update(windows)

    model.learning_rate, model.lr_schedule = 0.0, lambda _: 0.0
    model._update_policy_from_windows = compare  # type: ignore[method-assign]
    model.learn(80)
    assert len(errors) >= 1 and max(errors) < 1e-4


# ---------------------------------------------------------------------- networks


def test_replaced_networks_are_followed() -> None:
    """Periodic resets (Nikishin et al. 2022): targets and the averaged policy belong to the new networks."""
    model = small_model(TASK).learn(60)
    policy = model.policy
    policy.actor, policy.critic, policy.critic_target = policy.make_actor(), policy.make_critic(), policy.make_critic()
    policy.critic_target.load_state_dict(policy.critic.state_dict())
    for network in (policy.actor, policy.critic):
        network.optimizer = th.optim.Adam(network.parameters(), lr=3e-4)
    model.actor, model.critic, model.critic_target = policy.actor, policy.critic, policy.critic_target
    before = [weights.clone() for weights in model.critic_target.parameters()]
    obs = np.full((1, 4), 0.1, dtype=np.float32)
    with th.no_grad():
        expected = policy.unscale_action(model.actor(th.as_tensor(obs), deterministic=True).numpy())
    np.testing.assert_allclose(model.predict(obs, deterministic=True)[0], expected, rtol=1e-6)
    model.learn(60, reset_num_timesteps=False)
    assert not all(map(th.equal, before, model.critic_target.parameters()))
    average, current = (list(network.parameters()) for network in (policy.average_actor, model.actor))
    assert all((a - b).abs().max() < 0.1 for a, b in zip(average, current, strict=True))


def test_a_replaced_layer_is_followed() -> None:
    model = small_model(TASK).learn(60)
    model.actor.mu = nn.Linear(16, 1)
    nn.init.zeros_(model.actor.mu.weight)
    nn.init.constant_(model.actor.mu.bias, 2.0)
    action = model.predict(np.zeros((1, 4)), deterministic=True)[0]
    np.testing.assert_allclose(action, 3.0 * np.tanh(2.0), rtol=1e-5)


def test_modules_added_later_know_their_mode() -> None:
    model = small_model(TASK).learn(30)
    model.actor.latent_pi.append(nn.Dropout(0.5))
    model.learn(30, reset_num_timesteps=False)
    model.policy.set_training_mode(False)
    assert not model.actor.latent_pi[-1].training
    observations = th.ones(1, 4)
    with th.no_grad():
        assert len({model.actor(observations, deterministic=True).item() for _ in range(10)}) == 1


class Pretrained(BaseFeaturesExtractor):
    """Features of a module that is given."""

    def __init__(self, space: Any, encoder: nn.Module) -> None:
        super().__init__(space, 8)
        self.encoder = encoder

    def forward(self, observations: th.Tensor) -> th.Tensor:
        """Encode."""
        return self.encoder(observations)


@pytest.mark.parametrize("share", [True, False])
def test_a_pretrained_encoder_goes_on_learning(share: bool) -> None:
    encoder = nn.Linear(4, 8)
    before = encoder.weight.clone()
    extractor = {"features_extractor_class": Pretrained, "features_extractor_kwargs": {"encoder": encoder}}
    model = small_model(TASK, policy_kwargs={**extractor, "share_features_extractor": share}).learn(60)
    assert encoder.weight.requires_grad and not th.equal(before, encoder.weight)
    average = model.policy.average_actor.features_extractor.encoder  # type: ignore[union-attr]
    assert average is not encoder and not any(weights.requires_grad for weights in average.parameters())


# ---------------------------------------------------------------------- replay buffers


def test_returns_do_not_jump_over_data_that_somebody_has_shuffled() -> None:
    model = small_model("Pendulum-v1", buffer_size=64, learning_starts=1000)
    buffer = model.replay_buffer
    assert buffer is not None and model.n_steps == 3
    numbers = np.random.default_rng(0).permutation(64).astype(np.float32)
    for number in [*numbers[:32], *np.arange(100, 132, dtype=np.float32)]:  # shuffled ones, and a trajectory
        here, there = (np.full((1, 3), value, dtype=np.float32) for value in (number, number + 1.0))
        buffer.add(here, there, np.zeros((1, 1), dtype=np.float32), np.ones(1), np.zeros(1), [{}])
    samples, _ = sample_n_step(buffer, 500, model.actor, 1e9, None)  # type: ignore[arg-type]
    span = (samples.next_observations - samples.observations)[:, 0]  # the number of steps, if they follow each other
    assert set(samples.rewards.flatten().tolist()) >= {1.0} and {1.0, 3.0} <= set(span.tolist()) <= {1.0, 2.0, 3.0}
    expected = sum(model.gamma**k * (span > k) for k in range(3))
    assert th.allclose(samples.rewards.flatten(), expected)


class WithDemonstrations(ReplayBuffer):
    """As many demonstrations as own experience, each as many as asked for (Ball et al. 2023)."""

    def sample(self, batch_size: int, env: Any = None) -> ReplayBufferSamples:
        """Twice as many transitions."""
        own, demonstrations = super().sample(batch_size, env), super().sample(batch_size, env)
        marked = demonstrations._replace(rewards=th.full_like(own.rewards, 100.0))
        fields = zip(own, marked, strict=True)
        return ReplayBufferSamples(*(None if a is None or b is None else th.cat([a, b]) for a, b in fields))


def test_a_batch_is_what_a_buffer_returns() -> None:
    model = small_model("Pendulum-v1", replay_buffer_class=WithDemonstrations, ent_coef=0.0, train_freq=1, gradient_steps=2)
    batches: list[tuple[int, float]] = []
    update = model._update_critic

    def note(batch: Any) -> None:
        batches.append((len(batch.rewards), (batch.rewards > 50.0).float().mean().item()))
        update(batch)

    model._update_critic = note  # type: ignore[method-assign]
    model.learn(40)
    assert len(batches) == model._n_updates == 2 * (40 - model.learning_starts)
    assert set(batches) == {(2 * model.batch_size, 0.5)}


def test_training_on_a_replay_buffer_alone_updates_the_policy_as_sac_does() -> None:
    """No windows come, whose updates the longer delay leaves room for."""
    model = small_model(TASK, learning_starts=1000, policy_delay=None).learn(60)
    calls: list[int] = []
    update = model._update_policy_from_replay
    model._update_policy_from_replay = lambda size: (calls.append(size), update(size))[1]  # type: ignore
    model.train(16, 8)
    assert len(calls) == 16


# ---------------------------------------------------------------------- hyperparameters


def test_a_temperature_that_is_fixed_later() -> None:
    model = small_model(TASK, ent_coef="auto_0.1").learn(40)
    model.ent_coef_optimizer, model.ent_coef_tensor = None, th.tensor(0.005)
    assert model._current_ent_coef().item() == pytest.approx(0.005)
    model.learn(20, reset_num_timesteps=False)
    assert model._current_ent_coef().item() == pytest.approx(0.005)


def test_learning_rates_are_set_up_together() -> None:
    model = small_model(TASK, critic_learning_rate=1e-3).learn(40)
    model.critic_learning_rate = model.ent_coef_learning_rate = model.learning_rate = 1e-5
    model._setup_lr_schedule()
    model.learn(20, reset_num_timesteps=False)
    for optimizer in (model.actor.optimizer, model.critic.optimizer):
        assert optimizer.param_groups[0]["lr"] == 1e-5


def test_a_curriculum_of_horizons() -> None:
    class Longer(BaseCallback):
        def _on_step(self) -> bool:
            if self.num_timesteps == 100:
                self.model.horizon, self.model.rollout_size = 8, 32  # type: ignore[attr-defined]
            return True

    model = small_model(gym.make(TASK), learning_starts=0, horizon=2, rollout_size=16, train_freq=2)
    shapes: list[tuple[int, int]] = []
    update = model._update_policy_from_windows
    model._update_policy_from_windows = lambda w: (shapes.append(tuple(w.mask.shape)), update(w))[1]  # type: ignore
    model.learn(240, callback=Longer())
    assert shapes[0] == (2, 8) and shapes[-1] == (8, 4) and len(set(shapes)) == 2
    assert all(model._valid_history)
