"""The squashed Gaussian against SB3's, and its inverse."""

import math

import pytest
import torch as th
from hypothesis import given, settings
from hypothesis import strategies as st
from stable_baselines3.common.distributions import SquashedDiagGaussianDistribution

from sb3_agpo.agpo.squashed_gaussian import EPSILON, MAX_NOISE, infer_noise, squashed_sample

seeds = st.integers(0, 2**31 - 1)


def gaussian(seed: int, n: int = 8, nu: int = 3, dtype: th.dtype = th.float64) -> tuple[th.Tensor, th.Tensor, th.Tensor]:
    """Random means, log standard deviations and noise, ``(n, nu)`` each."""
    generator = th.Generator().manual_seed(seed)
    mean, log_std, noise = (th.randn(n, nu, generator=generator, dtype=dtype) for _ in range(3))
    return mean, log_std - 1.0, noise


@settings(max_examples=50, deadline=None)
@given(seeds)
def test_log_density_equals_sb3(seed: int) -> None:
    mean, log_std, noise = gaussian(seed)
    actions, log_prob = squashed_sample(mean, log_std, noise)
    distribution = SquashedDiagGaussianDistribution(3).proba_distribution(mean, log_std)
    th.testing.assert_close(actions, th.tanh(mean + log_std.exp() * noise))
    th.testing.assert_close(log_prob, distribution.log_prob(actions, mean + log_std.exp() * noise), rtol=1e-10, atol=1e-10)


def test_sample_equals_sb3_draw_for_draw() -> None:
    mean, log_std, _ = gaussian(0, dtype=th.float32)
    distribution = SquashedDiagGaussianDistribution(3)
    assert distribution.epsilon == EPSILON
    th.manual_seed(1)
    expected_actions, expected_log_prob = distribution.log_prob_from_params(mean, log_std)
    th.manual_seed(1)
    actions, log_prob = squashed_sample(mean, log_std, th.randn_like(mean))
    th.testing.assert_close(actions, expected_actions)
    th.testing.assert_close(log_prob, expected_log_prob)


def test_density_integrates_to_one() -> None:
    mean, log_std = th.tensor([[0.3]], dtype=th.float64), th.tensor([[-0.5]], dtype=th.float64)
    noise = th.linspace(-8.0, 8.0, 20_001, dtype=th.float64)[:, None]
    actions, log_prob = squashed_sample(mean, log_std, noise)
    assert th.trapezoid(log_prob.exp(), actions[:, 0]).item() == pytest.approx(1.0, abs=1e-4)


@settings(max_examples=50, deadline=None)
@given(seeds, st.sampled_from([(th.float64, 1e-8), (th.float32, 1e-2)]))
def test_infer_noise_inverts_the_sample(seed: int, precision: tuple[th.dtype, float]) -> None:
    dtype, tolerance = precision
    mean, log_std, noise = gaussian(seed, dtype=dtype)
    actions, _ = squashed_sample(mean, log_std, noise)
    inside = (actions.abs() < 0.99) & (noise.abs() < MAX_NOISE)  # beyond, rounding of the action hides the noise
    inferred = infer_noise(actions, mean, log_std)
    th.testing.assert_close(inferred[inside], noise[inside], rtol=tolerance, atol=tolerance)
    remade, _ = squashed_sample(mean, log_std, inferred)
    within = inferred.abs() < MAX_NOISE
    th.testing.assert_close(remade[within], actions[within], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [th.float32, th.float64])
@pytest.mark.parametrize("log_std", [-20.0, 0.0, 2.0])
def test_noise_of_saturated_and_unlikely_actions_is_bounded(dtype: th.dtype, log_std: float) -> None:
    actions = th.tensor([[1.0], [-1.0], [1.0 - 1e-7], [0.0], [0.999]], dtype=dtype)
    for mean in (-100.0, 0.0, 100.0):
        noise = infer_noise(actions, th.full_like(actions, mean), th.full_like(actions, log_std))
        assert noise.isfinite().all() and noise.abs().max() <= MAX_NOISE
    assert infer_noise(actions[3:4], th.full((1, 1), 100.0, dtype=dtype), th.zeros(1, 1, dtype=dtype)).item() == -MAX_NOISE


def test_saturated_actions_of_a_saturated_policy_are_likely() -> None:
    """Rescaling to the bounds of the action space and back may round an action out of [-1, 1]."""
    actions = th.tensor([[1.0], [1.0 + 1e-6]], dtype=th.float32)
    noise = infer_noise(actions, th.full((2, 1), 7.0), th.zeros(2, 1))
    assert noise.isfinite().all() and noise.abs().max() < 0.5


@pytest.mark.parametrize("dtype", [th.float32, th.float64])
@pytest.mark.parametrize("log_std", [-20.0, 0.0, 2.0])
@pytest.mark.parametrize("mean", [-1e3, -10.0, 0.0, 10.0, 1e3])
def test_saturated_actions_have_finite_densities_and_gradients(dtype: th.dtype, log_std: float, mean: float) -> None:
    means = th.full((1, 1), mean, dtype=dtype, requires_grad=True)
    log_stds = th.full((1, 1), log_std, dtype=dtype, requires_grad=True)
    actions, log_prob = squashed_sample(means, log_stds, th.full((1, 1), 2.0, dtype=dtype))
    assert actions.abs().max() <= 1.0 and log_prob.isfinite().all()
    for output in (actions.sum(), log_prob.sum()):
        for gradient in th.autograd.grad(output, (means, log_stds), retain_graph=True):
            assert gradient.isfinite().all()


def test_gradients_equal_differences() -> None:
    mean, log_std, noise = gaussian(3, n=4)
    inputs = (mean.requires_grad_(True), log_std.requires_grad_(True), noise)
    assert th.autograd.gradcheck(squashed_sample, inputs)


def test_log_density_by_hand() -> None:
    actions, log_prob = squashed_sample(th.zeros(1, 2), th.zeros(1, 2), th.zeros(1, 2))
    assert actions.tolist() == [[0.0, 0.0]]
    assert log_prob.item() == pytest.approx(-math.log(2.0 * math.pi), abs=1e-5)
