"""Updates of the critics: batches, several of them at once, and the loss."""

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
from stable_baselines3.common.buffers import ReplayBuffer
from stable_baselines3.common.type_aliases import ReplayBufferSamples

from sb3_agpo import AGPO
from sb3_agpo.agpo import agpo
from sb3_agpo.agpo.adaptive_gradient import temporal_difference_loss, temporal_difference_unit
from sb3_agpo.agpo.updates import _split, critic_batches, gradient_matching_loss, temporal_difference_errors

GAMMA = 0.9
ENT_COEF = th.tensor(0.3)


def transitions(n: int, discounts: bool = False, seed: int = 0) -> ReplayBufferSamples:
    """Random transitions of two observations and one action, of which half end their episode."""
    generator = th.Generator().manual_seed(seed)
    obs, next_obs = th.randn(2, n, 2, generator=generator)
    actions, rewards, share = th.rand(3, n, 1, generator=generator)
    dones = (th.rand(n, 1, generator=generator) < 0.5).float()
    return ReplayBufferSamples(obs, actions, next_obs, dones, rewards, share if discounts else None)


MODELS = {name: small_model("MountainCarContinuous-v0", policy_kwargs={"normalization": name}) for name in ("batch", "layer")}


@pytest.mark.parametrize("discounts", [False, True])
@pytest.mark.parametrize("normalization", MODELS)
def test_loss_is_that_of_sac(discounts: bool, normalization: str) -> None:
    """With targets from target networks, or from the critics themselves, normalised by both batches together."""
    data, policy = transitions(32, discounts), MODELS[normalization].policy
    th.manual_seed(1)
    (batch,) = critic_batches(policy, data, GAMMA, ENT_COEF, 32)
    found = temporal_difference_loss(temporal_difference_errors(policy, batch))
    th.manual_seed(1)  # the policy's next actions, from the distribution of SB3's actor with the same noise
    mean, log_std, _ = policy.actor.get_action_dist_params(data.next_observations)
    gaussian = th.distributions.Normal(mean, log_std.exp())
    before_tanh = mean + log_std.exp() * th.randn_like(mean)
    next_actions = th.tanh(before_tanh)
    log_prob = (gaussian.log_prob(before_tanh) - th.log(1.0 - next_actions.square() + 1e-6)).sum(1, keepdim=True)
    if normalization == "batch":
        both = policy.critic.joint_q_values(data.observations, data.actions, data.next_observations, next_actions)
        q_values, next_q_values = (values[:, :, None] for values in both)
    else:
        q_values = th.stack(policy.critic(data.observations, data.actions))
        next_q_values = th.stack(policy.critic_target(data.next_observations, next_actions))
    discount: Any = data.discounts if discounts else GAMMA
    next_values = next_q_values.min(0).values - ENT_COEF * log_prob
    targets = (data.rewards + (1.0 - data.dones) * discount * next_values).detach()
    expected = 0.5 * sum(th.nn.functional.mse_loss(q_value, targets) for q_value in q_values)
    th.testing.assert_close(found, expected)


@pytest.mark.parametrize("normalization", MODELS)
def test_targets_have_no_gradient(normalization: str) -> None:
    policy = MODELS[normalization].policy
    (batch,) = critic_batches(policy, transitions(32), GAMMA, ENT_COEF, 32)
    assert not any(field.requires_grad for field in batch)
    policy.actor.optimizer.zero_grad()
    temporal_difference_loss(temporal_difference_errors(policy, batch)).backward()
    assert all(parameter.grad is None for parameter in policy.actor.parameters())


def test_step_of_the_critics_with_matching(monkeypatch: pytest.MonkeyPatch) -> None:
    """Plain gradient descent goes along the gradient of (13)."""
    model = small_model("InvertedPendulum-v5", critic_grad_coef=0.7).learn(60)
    parameters = list(model.critic.parameters())
    model.critic.optimizer = th.optim.SGD(parameters, lr=1.0)
    (batch,) = model._sample_for_critic(1, 16)
    derivatives = model.derivative_buffer.sample(8)
    monkeypatch.setattr(model.derivative_buffer, "sample", lambda *args: derivatives)
    before = [parameter.detach().clone() for parameter in parameters]
    th.manual_seed(0)
    errors = temporal_difference_errors(model.policy, batch)
    matching = gradient_matching_loss(model.policy, derivatives, model.gamma, model._current_ent_coef())
    unit = temporal_difference_unit(errors).item()
    assert unit > 0.0 and matching > 0.0
    expected = th.autograd.grad(temporal_difference_loss(errors) + 0.7 * unit * matching, parameters)
    th.manual_seed(0)
    model._update_critic(batch)
    for parameter, old, gradient in zip(parameters, before, expected, strict=True):
        th.testing.assert_close(parameter, old - gradient, rtol=1e-4, atol=1e-5)


@settings(deadline=None, max_examples=30)
@given(st.integers(1, 5), st.integers(1, 7), st.booleans())
def test_batches_are_the_transitions_in_order(n_batches: int, batch_size: int, dictionary: bool) -> None:
    n = n_batches * batch_size
    data, policy = transitions(n), MODELS["batch"].policy
    th.manual_seed(0)
    batches = critic_batches(policy, data, GAMMA, ENT_COEF, batch_size)
    assert len(batches) == n_batches and all(len(batch.actions) == batch_size for batch in batches)
    joined = [th.cat(field) for field in zip(*batches, strict=True)]
    th.manual_seed(0)
    (whole,) = critic_batches(policy, data, GAMMA, ENT_COEF, n)
    assert all(th.equal(ours, theirs) for ours, theirs in zip(joined, whole, strict=True))
    assert th.equal(whole.observations, data.observations) and th.equal(whole.actions, data.actions)
    assert th.equal(whole.discounts, GAMMA * (1.0 - data.dones[:, 0]))
    if dictionary:
        parts = _split({"a": data.observations, "b": data.observations[:, :1]}, batch_size)
        assert th.equal(th.cat([part["a"] for part in parts]), data.observations)
        assert th.equal(th.cat([part["b"] for part in parts]), data.observations[:, :1])


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


def test_temperature_learns_from_real_steps_of_windows_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ten steps are two windows of four and one of two, which is filled up with zeros."""
    seen, sample = [], agpo.sample_actions

    def watched(actor: Any, observations: th.Tensor) -> Any:
        seen.append(observations)
        return sample(actor, observations)

    monkeypatch.setattr(agpo, "sample_actions", watched)
    small_model("InvertedPendulum-v5", rollout_size=10, horizon=4, rollout_epochs=1).learn(60)
    assert len(seen) > 1 and all(observations.shape == (10, 4) for observations in seen)
    assert all((observations != 0.0).any(1).all() for observations in seen)


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


class InHalves(ReplayBuffer):
    """Old experience first, then new, as buffers that join demonstrations or relabelled goals return it."""

    def sample(self, batch_size: int, env: Any = None) -> ReplayBufferSamples:
        """Half of the transitions from each half of the memory."""
        middle, half = self.size() // 2, batch_size // 2
        old, new = np.random.randint(0, middle, half), np.random.randint(middle, self.size(), batch_size - half)
        samples = self._get_samples(np.concatenate([old, new]), env)
        return samples._replace(rewards=(th.arange(batch_size) >= half).float().unsqueeze(-1))


def test_batches_are_those_of_a_replay_buffer_of_ones_own() -> None:
    """Each critic update has the mixture that the buffer made."""
    model = small_model("Pendulum-v1", replay_buffer_class=InHalves, gradient_steps=4, ent_coef=0.0)
    shares: list[float] = []
    update = model._update_critic
    model._update_critic = lambda batch: (shares.append(batch.rewards.mean().item()), update(batch))[1]  # type: ignore
    model.learn(60)
    assert len(shares) >= 40 and set(shares) == {0.5}


def test_at_once_or_one_by_one_learns_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """The critics' predictions after as many updates differ by no more than their noise, however the targets were made."""

    def critic_loss(at_once: int) -> float:
        monkeypatch.setattr(agpo, "BATCHES_AT_ONCE", at_once)
        model = small_model("Pendulum-v1", gradient_steps=4, batch_size=32, seed=0).learn(400)
        assert model.replay_buffer is not None
        np.random.seed(0)
        th.manual_seed(0)
        data = model.replay_buffer.sample(256)
        (batch,) = critic_batches(model.policy, data, model.gamma, model._current_ent_coef(), 256)
        return temporal_difference_loss(temporal_difference_errors(model.policy, batch)).item()

    one_by_one, at_once = critic_loss(1), critic_loss(4)
    assert math.isfinite(at_once) and 0.5 < at_once / one_by_one < 2.0
