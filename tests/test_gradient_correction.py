"""What the critic's gradient lacks: how it is learned, how far it is believed, and what it changes in training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch as th
from gymnasium import spaces
from hypothesis import given, settings
from hypothesis import strategies as st
from small_models import RandomEnv, parameters_equal, small_model
from stable_baselines3.common.buffers import ReplayBuffer
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.vec_env import VecNormalize

from sb3_agpo import AGPO
from sb3_agpo.agpo import gradient_correction
from sb3_agpo.agpo.gradient_correction import CorrectionSamples, GradientCorrection, correction_samples
from sb3_agpo.agpo.updates import replayed_policy_loss
from sb3_agpo.tracking.callbacks import ResumableCheckpointCallback

NOBS, NU = 3, 2


def draw(n: int, seed: int = 0, noise: float = 0.0) -> CorrectionSamples:
    """Samples whose targets are a smooth function of their inputs, plus noise."""
    generator = th.Generator().manual_seed(seed)
    observations = th.randn(n, NOBS, generator=generator)
    actions = 2.0 * th.rand(n, NU, generator=generator) - 1.0
    clean = 100.0 * th.stack([observations[:, 0] * actions[:, 1], th.sin(observations[:, 1])], dim=1)
    return CorrectionSamples(observations, actions, clean + noise * th.randn(n, NU, generator=generator))


def learn(correction: GradientCorrection, n_updates: int) -> None:
    for _ in range(n_updates):
        correction.optimizer.zero_grad()
        correction.loss().backward()
        correction.optimizer.step()


def kept_targets(correction: GradientCorrection) -> list[list[float]]:
    targets: th.Tensor = correction.get_memory()["samples"]["targets"]
    return sorted(targets.tolist())


@pytest.fixture
def correction() -> GradientCorrection:
    th.manual_seed(0)
    return GradientCorrection(NOBS, NU)


# ---------------------------------------------------------------------- the network and its memory


def test_begins_with_no_correction(correction: GradientCorrection) -> None:
    samples = draw(8)
    correction.remember(samples)
    assert correction.compare(samples) == 0.0
    assert correction.trust == 0.0
    assert not correction(samples.observations, samples.actions).any()


def test_learns_the_mean_of_noisy_targets(correction: GradientCorrection) -> None:
    """The noise is as large as the function, and new samples are foreseen better than by either."""
    correction.remember(draw(4096, noise=70.0))
    learn(correction, 400)
    new = draw(512, seed=1)
    for _ in range(200):
        explained = correction.compare(new)
    assert explained > 0.7
    assert correction.trust > 0.7
    error = (correction(new.observations, new.actions) - new.targets).square().mean()
    assert error < 0.3 * new.targets.square().mean()


@settings(max_examples=50, deadline=None)
@given(factor=st.floats(-3.0, 3.0), seed=st.integers(0, 1000))
def test_trust_is_the_best_coefficient(factor: float, seed: int) -> None:
    """No other coefficient in [0, 1] leaves a smaller error on what it was measured on."""
    with th.random.fork_rng():
        th.manual_seed(seed)
        correction = GradientCorrection(NOBS, NU)
    th.nn.init.normal_(correction.network[-1].bias)  # type: ignore[union-attr, arg-type]
    samples = draw(64, seed)
    answers = correction._predict(samples.observations, samples.actions).detach()
    samples = samples._replace(targets=factor * answers + 0.1 * samples.targets)
    correction.compare(samples)

    def error(coefficient: float) -> float:
        return (samples.targets - coefficient * answers).square().sum().item()

    trust = correction.trust.item()
    assert 0.0 <= trust <= 1.0
    others = th.linspace(0.0, 1.0, 21).tolist()
    assert error(trust) <= min(error(other) for other in others) * (1.0 + 1e-4) + 1e-6


def test_what_is_wrong_is_not_believed(correction: GradientCorrection) -> None:
    correction.remember(draw(512))
    learn(correction, 200)
    new = draw(512, seed=1)
    opposite = new._replace(targets=-new.targets)
    assert correction.compare(opposite) < 0.0
    assert not correction(new.observations, new.actions).any()


def test_oldest_samples_give_way(correction: GradientCorrection, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gradient_correction, "CAPACITY", 10)
    samples = draw(14)
    for first in range(0, 14, 7):
        correction.remember(CorrectionSamples(*(field[first : first + 7] for field in samples)))
    assert correction.size == 10
    assert kept_targets(correction) == sorted(samples.targets[4:].tolist())
    correction.remember(draw(25, seed=1))  # more at once than there is room for
    assert kept_targets(correction) == sorted(draw(25, seed=1).targets[-10:].tolist())


@pytest.mark.parametrize("n", [5, 10, 13])
def test_memory_goes_into_another_correction(n: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gradient_correction, "CAPACITY", 10)
    corrections = [GradientCorrection(NOBS, NU) for _ in range(2)]
    for first in range(n):
        corrections[0].remember(draw(1, seed=first))
    corrections[1].set_memory(corrections[0].get_memory())
    for correction in corrections:
        correction.remember(draw(3, seed=99))
    first, second = (correction.get_memory() for correction in corrections)
    assert first["position"] == second["position"]
    assert all(th.equal(first["samples"][name], second["samples"][name]) for name in first["samples"])
    assert th.equal(corrections[0].scale, corrections[1].scale)


def test_nothing_to_learn_from(correction: GradientCorrection) -> None:
    assert not correction.can_learn
    correction.set_memory(correction.get_memory())
    with pytest.raises(ValueError, match="remember"):
        correction.loss()


def test_targets_are_finite_and_not_too_long() -> None:
    adaptive = th.ones(2, 3, NU)
    adaptive[0, 0] = 1e17  # left out: its square would be too large to add up
    adaptive[0, 1] = th.nan  # left out, as is the padding
    mask = th.ones(2, 3)
    mask[1, 2] = 0.0
    observations = th.arange(6.0).reshape(2, 3, 1)
    samples = correction_samples(observations, th.zeros(2, 3, NU), adaptive, th.zeros(2, 3, NU), mask)
    assert samples.observations.flatten().tolist() == [2.0, 3.0, 4.0]
    adaptive[0, 0] = 1e6  # shortened
    samples = correction_samples(observations, th.zeros(2, 3, NU), adaptive, th.zeros(2, 3, NU), mask)
    assert samples.observations.flatten().tolist() == [0.0, 2.0, 3.0, 4.0]
    longest = gradient_correction.LONGEST_TARGET
    assert samples.targets[0].tolist() == pytest.approx([longest, longest], rel=1e-5)
    assert th.equal(samples.targets[1:], th.ones(3, NU))


def test_largest_targets_leave_everything_finite(correction: GradientCorrection) -> None:
    """One that were not would never be finite again, as sums and scale go on from batch to batch."""
    largest = th.full((1, 300, NU), 0.5 * gradient_correction.TOO_LONG)
    inputs = th.randn(1, 300, NOBS), th.zeros(1, 300, NU)
    samples = correction_samples(*inputs, largest, th.zeros(1, 300, NU), th.ones(1, 300))
    assert len(samples.targets) == 300
    correction.remember(samples)
    learn(correction, 20)
    assert 0.0 < correction.compare(samples) <= 1.0
    assert all(th.isfinite(value).all() for value in correction.state_dict().values())
    assert th.isfinite(correction(samples.observations, samples.actions)).all()


# ---------------------------------------------------------------------- in training


@pytest.fixture
def early(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let corrections learn from a handful of samples."""
    monkeypatch.setattr(gradient_correction, "BATCH_SIZE", 16)


def trained(**options: Any) -> AGPO:
    return small_model(make_vec_env("InvertedPendulum-v5", 1, seed=0), critic_grad_coef=0.0, **options).learn(150)


def test_gradient_of_the_replayed_loss_is_corrected() -> None:
    """By actions, the loss has minus (dQ/da + the correction) as its gradient where there is no entropy."""
    policy = trained().policy
    observations = th.randn(5, 4)
    given = th.randn(5, 1)
    gradients = []
    for corrects in (None, lambda observations, actions: given):
        policy.actor.zero_grad()
        th.manual_seed(0)
        loss, _ = replayed_policy_loss(policy, observations, th.zeros(()), corrects)
        loss.backward()
        gradients.append([parameter.grad.clone() for parameter in policy.actor.parameters() if parameter.grad is not None])
    th.manual_seed(0)
    actions, _ = policy.actor.action_log_prob(observations)
    policy.actor.zero_grad()
    (-(given * actions).sum(-1).mean()).backward()
    parts = [parameter.grad for parameter in policy.actor.parameters() if parameter.grad is not None]
    for without, corrected, part in zip(*gradients, parts, strict=True):
        assert th.allclose(corrected, without + part, atol=1e-5)


def test_it_changes_the_policy_and_is_logged(early: None) -> None:
    model = small_model(
        make_vec_env("InvertedPendulum-v5", 1, seed=0), critic_grad_coef=0.0, correction_updates=4, policy_delay=1
    )
    seen: dict[str, list[float]] = {}
    record = model._record
    model._record = lambda name, value: (seen.setdefault(name, []).append(value), record(name, value))[1]  # type: ignore[method-assign]
    model.learn(150)
    assert not parameters_equal(model, trained(policy_delay=1))
    assert model.gradient_correction is not None and model.gradient_correction.size > 64
    assert len(seen["correction_explained"]) == len(seen["correction_trust"]) > 4
    assert any(seen["correction_trust"])
    assert all(0.0 <= trust <= 1.0 for trust in seen["correction_trust"])


@pytest.mark.parametrize("options", [{"gradient_mode": "q"}, {"rollout_epochs": 0}])
def test_it_changes_nothing_where_there_is_nothing_to_learn_from(options: dict[str, Any], early: None) -> None:
    with_it, without = (trained(correction_updates=n, policy_delay=1, **options) for n in (4, 0))
    assert parameters_equal(with_it, without)


def test_spaces_without_derivatives() -> None:
    env = RandomEnv(spaces.Dict({"x": spaces.Box(-1.0, 1.0, (2,))}))
    model = small_model(env, policy="MultiInputPolicy", correction_updates=4).learn(60)
    assert model.gradient_correction is None


def test_nonfinite_windows_leave_no_trace(early: None) -> None:
    """A gradient that is not finite is not remembered."""
    model = small_model(make_vec_env("InvertedPendulum-v5", 1, seed=0), correction_updates=4, critic_grad_coef=0.0)
    with th.no_grad():
        model.critic.q_networks[0].weight.fill_(th.inf)  # type: ignore[union-attr, operator]
    model.learn(80)
    assert model.gradient_correction is not None
    assert model.gradient_correction.size == 0
    assert all(th.isfinite(weights).all() for weights in model.gradient_correction.parameters())


def test_saved_and_loaded(early: None, tmp_path: Path) -> None:
    model = trained(correction_updates=4, policy_delay=1)
    model.save(tmp_path / "model")
    loaded = AGPO.load(tmp_path / "model")
    assert model.gradient_correction is not None and loaded.gradient_correction is not None
    saved, put_back = model.gradient_correction.state_dict(), loaded.gradient_correction.state_dict()
    assert all(th.equal(saved[name], put_back[name]) for name in saved)
    assert put_back["trust_sums"].any()
    steps = [
        correction.optimizer.state_dict()["state"][0]["step"]
        for correction in (model.gradient_correction, loaded.gradient_correction)
    ]
    assert steps[0] == steps[1] > 0
    for change in ({"correction_updates": 0}, {"gradient_mode": "q"}):
        AGPO.load(tmp_path / "model", env=make_vec_env("InvertedPendulum-v5", 1), **change).learn(40)


def test_resumed_run_equals_uninterrupted_one(early: None, tmp_path: Path) -> None:
    options: dict[str, Any] = {"correction_updates": 2, "policy_delay": 1, "critic_grad_coef": 0.0}

    def make() -> Any:
        return make_vec_env("InvertedPendulum-v5", 2, seed=0)

    whole = small_model(make(), **options).learn(240)
    small_model(make(), **options).learn(140, callback=ResumableCheckpointCallback(tmp_path, 120))
    resumed = AGPO.resume(tmp_path, make())
    resumed.learn(240 - resumed.num_timesteps, reset_num_timesteps=False)
    assert parameters_equal(whole, resumed)
    assert whole.gradient_correction is not None and resumed.gradient_correction is not None
    first, second = (model.gradient_correction.state_dict() for model in (whole, resumed))
    assert first["trust_sums"].any()
    assert all(th.equal(first[name], second[name]) for name in first)


class OwnBuffer(ReplayBuffer):
    """A class of the user's own, which gives observations as the environment does, in double precision."""


@pytest.mark.parametrize("kwargs", [{}, {"replay_buffer_class": OwnBuffer}])
def test_observations_in_double_precision(kwargs: dict[str, Any]) -> None:
    env = VecNormalize(make_vec_env("InvertedPendulum-v5"), norm_obs=False)
    model = small_model(env, correction_updates=1, **kwargs).learn(100)
    assert model.gradient_correction is not None and model.gradient_correction.size > 0
