"""Updates of the critics: targets, batches, and several of both at once."""

from __future__ import annotations

import math
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from hypothesis import given, settings
from hypothesis import strategies as st
from small_models import small_model
from stable_baselines3.common.type_aliases import ReplayBufferSamples

from sb3_agpo import AGPO
from sb3_agpo.agpo import agpo
from sb3_agpo.agpo.updates import CriticBatch, critic_batches, temporal_difference_loss, temporal_difference_targets

GAMMA = 0.9
ENT_COEF = th.tensor(0.3)
MODEL = small_model("MountainCarContinuous-v0")


def transitions(n: int, discounts: bool = False, seed: int = 0) -> ReplayBufferSamples:
    """Random transitions of two observations and one action, of which half end their episode."""
    generator = th.Generator().manual_seed(seed)
    obs, next_obs = th.randn(2, n, 2, generator=generator)
    actions, rewards, share = th.rand(3, n, 1, generator=generator)
    dones = (th.rand(n, 1, generator=generator) < 0.5).float()
    return ReplayBufferSamples(obs, actions, next_obs, dones, rewards, share if discounts else None)


@pytest.mark.parametrize("discounts", [False, True])
def test_target_is_the_entropy_regularised_return_of_sac(discounts: bool) -> None:
    data, policy = transitions(32, discounts), MODEL.policy
    th.manual_seed(1)
    found = temporal_difference_targets(policy, data, GAMMA, ENT_COEF)
    th.manual_seed(1)  # the policy's next actions, from the distribution of SB3's actor with the same noise
    mean, log_std, _ = policy.actor.get_action_dist_params(data.next_observations)
    gaussian = th.distributions.Normal(mean, log_std.exp())
    before_tanh = mean + log_std.exp() * th.randn_like(mean)
    next_actions = th.tanh(before_tanh)
    log_prob = (gaussian.log_prob(before_tanh) - th.log(1.0 - next_actions.square() + 1e-6)).sum(1, keepdim=True)
    next_q = th.cat(policy.critic_target(data.next_observations, next_actions), 1).min(1, keepdim=True).values
    discount: Any = data.discounts if discounts else GAMMA
    expected = data.rewards + (1.0 - data.dones) * discount * (next_q - ENT_COEF * log_prob)
    assert found.shape == (32,) and not found.requires_grad
    th.testing.assert_close(found, expected[:, 0])


def test_loss_is_that_of_sac() -> None:
    data, targets = transitions(16), th.randn(16)
    loss = temporal_difference_loss(MODEL.critic, CriticBatch(data.observations, data.actions, targets))
    q_values = MODEL.critic(data.observations, data.actions)
    expected = 0.5 * sum(th.nn.functional.mse_loss(q_value, targets[:, None]) for q_value in q_values)
    th.testing.assert_close(loss, expected)


@settings(deadline=None, max_examples=30)
@given(st.integers(1, 5), st.integers(1, 7), st.booleans())
def test_batches_are_the_transitions_in_order(n_batches: int, batch_size: int, dictionary: bool) -> None:
    n = n_batches * batch_size
    data, targets = transitions(n), th.arange(float(n))
    whole: Any = {"a": data.observations, "b": data.observations[:, :1] + 1.0} if dictionary else data.observations
    data = data._replace(observations=whole)
    batches = critic_batches(data, targets, batch_size)
    assert len(batches) == n_batches and all(len(batch.actions) == batch_size for batch in batches)
    assert th.equal(th.cat([batch.targets for batch in batches]), targets)
    assert th.equal(th.cat([batch.actions for batch in batches]), data.actions)
    for key in ("a", "b") if dictionary else (slice(None),):
        assert th.equal(th.cat([batch.observations[key] for batch in batches]), whole[key])


def watch_samples(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Numbers of transitions that were drawn for the critics from now on."""
    numbers, sample = [], AGPO._sample_transitions

    def watched(self: AGPO, n: int) -> ReplayBufferSamples:
        numbers.append(n)
        return sample(self, n)

    monkeypatch.setattr(AGPO, "_sample_transitions", watched)
    return numbers


@pytest.mark.parametrize("gradient_steps,expected", [(1, [8]), (4, [32]), (6, [32, 16]), (9, [32, 32, 8])])
def test_a_few_batches_are_drawn_at_once(monkeypatch: pytest.MonkeyPatch, gradient_steps: int, expected: list[int]) -> None:
    model = small_model("MountainCarContinuous-v0", batch_size=8).learn(30)
    numbers, before = watch_samples(monkeypatch), model._n_updates
    model.train(gradient_steps, batch_size=8)
    assert numbers == expected and model._n_updates == before + gradient_steps


class TwoNumbers(gym.ObservationWrapper[Any, Any, Any]):
    """The same observation as a dictionary."""

    def __init__(self, env: gym.Env[Any, Any]) -> None:
        super().__init__(env)
        self.observation_space = gym.spaces.Dict({"both": env.observation_space})

    def observation(self, observation: np.ndarray) -> dict[str, np.ndarray]:
        return {"both": observation}


def test_several_updates_at_once_with_dictionaries() -> None:
    env = TwoNumbers(gym.make("MountainCarContinuous-v0"))
    model = small_model(env, policy="MultiInputPolicy", gradient_steps=6).learn(40)
    assert model._n_updates > 0 and all(parameter.isfinite().all() for parameter in model.policy.parameters())


def test_at_once_or_one_by_one_learns_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """The critics' predictions after as many updates differ by no more than their noise, however the targets were made."""

    def critic_loss(at_once: int) -> float:
        monkeypatch.setattr(agpo, "BATCHES_AT_ONCE", at_once)
        model = small_model("Pendulum-v1", gradient_steps=4, batch_size=32, seed=0).learn(400)
        assert model.replay_buffer is not None
        np.random.seed(0)
        th.manual_seed(0)
        data = model.replay_buffer.sample(256)
        targets = temporal_difference_targets(model.policy, data, model.gamma, model._current_ent_coef())
        return temporal_difference_loss(model.critic, CriticBatch(data.observations, data.actions, targets)).item()

    one_by_one, at_once = critic_loss(1), critic_loss(4)
    assert math.isfinite(at_once) and 0.5 < at_once / one_by_one < 2.0
