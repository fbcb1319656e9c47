"""The adaptive gradient: against closed forms, automatic differentiation and re-simulated environments."""

from collections.abc import Callable
from typing import Any, NamedTuple

import gymnasium as gym
import mujoco
import numpy as np
import pytest
import torch as th
from gymnasium.envs.mujoco import MujocoEnv
from hypothesis import given, settings
from hypothesis import strategies as st

from sb3_agpo.agpo.adaptive_gradient import (
    AdaptiveGradient,
    CriticGradients,
    PolicyPullback,
    WindowDerivatives,
    adaptive_gradient,
    gradient_scale,
    gradient_statistics,
    matching_loss,
    matching_targets,
    policy_loss,
    temporal_difference_loss,
    temporal_difference_unit,
)
from sb3_agpo.agpo.gates import ConstantGate, DisagreementGate, InverseVarianceGate, MagnitudeGate, VarianceSwitch
from sb3_agpo.agpo.squashed_gaussian import squashed_sample
from sb3_agpo.dynamics.interface import TransitionDerivatives, concatenate
from sb3_agpo.dynamics.mujoco import FiniteDifferences, MujocoDynamics
from sb3_agpo.dynamics.torch_tasks import LinearQuadraticEnv

NOBS, NU, NDX = 3, 2, 4
GAMMA, ALPHA = 0.9, 0.3

seeds = st.integers(0, 2**31 - 1)


def same(actual: th.Tensor, expected: th.Tensor, tolerance: float = 1e-12) -> None:
    """Equality up to rounding, in units of the largest entry."""
    scale = float(expected.abs().max().clamp(min=1.0))
    th.testing.assert_close(actual / scale, expected / scale, rtol=0.0, atol=tolerance)


class Windows(NamedTuple):
    """All that :func:`adaptive_gradient` takes, with a random nonlinear policy."""

    derivatives: WindowDerivatives
    critic: CriticGradients
    observations: th.Tensor  # (H, W, nobs)
    noise: th.Tensor  # (H, W, nu)
    network: th.nn.Module  # observations to mean and log standard deviation
    terminated: th.Tensor
    boundary: th.Tensor
    valid: th.Tensor

    def act(self, observations: th.Tensor, t: int) -> tuple[th.Tensor, th.Tensor]:
        """Action and log-density of the policy with the noise of step ``t``."""
        mean, log_std = self.network(observations).chunk(2, -1)
        return squashed_sample(mean, log_std, self.noise[t])

    def pullback(self, t: int, action_gradient: th.Tensor) -> th.Tensor:
        """The policy's share of equation (5)."""
        observations = self.observations[t].clone().requires_grad_(True)
        actions, log_prob = self.act(observations, t)
        return th.autograd.grad((action_gradient * actions).sum() - ALPHA * log_prob.sum(), observations)[0]

    def gradient(self, gate: Callable[[th.Tensor, th.Tensor, int], th.Tensor]) -> AdaptiveGradient:
        """Run the recursion under test."""
        chain = {"terminated": self.terminated, "boundary": self.boundary, "valid": self.valid}
        return adaptive_gradient(self.derivatives, self.critic, self.pullback, gate, gamma=GAMMA, **chain)

    def select(self, index: slice) -> "Windows":
        """Some of the windows."""
        return self._replace(
            derivatives=WindowDerivatives(*(field[:, index] for field in self.derivatives)),
            critic=CriticGradients(*(field[:, index] for field in self.critic)),
            **{name: getattr(self, name)[:, index] for name in ("observations", "noise", "terminated", "boundary", "valid")},
        )


def random_windows(seed: int, horizon: int = 4, n: int = 3, p_end: float = 0.2, p_invalid: float = 0.0) -> Windows:
    """Windows of random numbers; ``p_end`` is the chance of a termination and of a time limit at each step."""
    generator = th.Generator().manual_seed(seed)

    def normal(*shape: int) -> th.Tensor:
        return th.randn(horizon, n, *shape, generator=generator, dtype=th.float64)

    def chance(probability: float) -> th.Tensor:
        return th.rand(horizon, n, generator=generator) < probability

    derivatives = WindowDerivatives(
        normal(NDX, NDX), normal(NDX, NU), normal(NOBS, NDX), normal(NOBS, NU), normal(NDX), normal(NU)
    )
    critic = CriticGradients(normal(NU), normal(NOBS), normal(NOBS))
    network = th.nn.Sequential(th.nn.Linear(NOBS, 5), th.nn.Tanh(), th.nn.Linear(5, 2 * NU)).double()
    for parameter in network.parameters():
        th.nn.init.normal_(parameter, generator=generator)
    terminated, truncated = chance(p_end), chance(p_end)
    return Windows(
        derivatives, critic, normal(NOBS), normal(NU), network, terminated, terminated | truncated, ~chance(p_invalid)
    )


def table_gate(table: th.Tensor, valid: th.Tensor) -> Callable[[th.Tensor, th.Tensor, int], th.Tensor]:
    """A gate that reads its weights ``(H, W)`` from a table; it is asked about valid samples only."""
    return lambda analytic, critic, step: table[step][valid[step]]


def linearised_value(
    windows: Windows, weights: th.Tensor, t: int, w: int, dx: th.Tensor, do: th.Tensor, da: th.Tensor
) -> th.Tensor:
    """
    The gated value of one window's rest as a graph: linear in the simulator and critic, nonlinear in the policy.

    :param windows: what is given
    :param weights: gate of each step, ``(H, W)``
    :param t: step to start from
    :param w: the window
    :param dx: displacement of the state at ``t``
    :param do: displacement of the observation at ``t``
    :param da: displacement of the action at ``t``, added to what the policy does at the displaced observation
    :return: value at ``t``, up to a constant
    """
    one = windows.select(slice(w, w + 1))
    derivatives = WindowDerivatives(*(field[t, 0] for field in one.derivatives))
    q_a, q_o, v_o = (field[t, 0] for field in one.critic)
    action, log_prob = (value[0] for value in one.act(one.observations[t] + do, t))
    change = action - action.detach() + da
    next_dx = derivatives.A @ dx + derivatives.B @ change
    next_do = derivatives.O_x @ dx + derivatives.O_a @ change
    if one.terminated[t, 0]:
        rest = th.zeros((), dtype=th.float64)
    elif one.boundary[t, 0] or t == len(one.terminated) - 1:
        rest = v_o @ next_do
    else:
        rest = linearised_value(windows, weights, t + 1, w, next_dx, next_do, th.zeros_like(da))
    simulated = derivatives.r_x @ dx + derivatives.r_a @ change + GAMMA * rest
    weight = weights[t, w]
    return weight * simulated + (1.0 - weight) * (q_a @ change + q_o @ do) - ALPHA * log_prob


def oracle(windows: Windows, weights: th.Tensor) -> th.Tensor:
    """Equation (3) at every step by automatic differentiation of :func:`linearised_value`, ``(H, W, nu)``."""
    result = th.empty_like(windows.critic.q_a)
    for t, w in np.ndindex(*windows.terminated.shape):
        da = th.zeros(NU, dtype=th.float64, requires_grad=True)
        dx, do = th.zeros(NDX, dtype=th.float64), th.zeros(NOBS, dtype=th.float64)
        result[t, w] = th.autograd.grad(linearised_value(windows, weights, t, w, dx, do, da), da)[0]
    return result


# --- against automatic differentiation


@settings(max_examples=25, deadline=None)
@given(seeds, st.integers(1, 5), st.integers(1, 3), st.sampled_from([0.0, 0.3]))
def test_recursion_equals_automatic_differentiation(seed: int, horizon: int, n: int, p_invalid: float) -> None:
    windows = random_windows(seed, horizon, n, p_invalid=p_invalid)
    table = th.rand(horizon, n, generator=th.Generator().manual_seed(seed), dtype=th.float64)
    result = windows.gradient(table_gate(table, windows.valid))
    same(result.g_a, oracle(windows, table * windows.valid))
    assert th.equal(result.weight, table * windows.valid)


@pytest.mark.parametrize("weight", [0.0, 1.0])
def test_gate_zero_is_exactly_the_critic_and_one_exactly_the_simulator(weight: float) -> None:
    windows = random_windows(1, 5, 4)
    result = windows.gradient(ConstantGate(weight))
    assert th.equal(result.g_a, result.analytic if weight else windows.critic.q_a)
    assert th.equal(result.weight, th.full((5, 4), weight, dtype=th.float64))


@pytest.mark.parametrize("dtype", [th.float32, th.float64])
def test_dtype_is_kept(dtype: th.dtype) -> None:
    windows = random_windows(2)
    windows = windows._replace(
        derivatives=WindowDerivatives(*(field.to(dtype) for field in windows.derivatives)),
        critic=CriticGradients(*(field.to(dtype) for field in windows.critic)),
        observations=windows.observations.to(dtype),
        noise=windows.noise.to(dtype),
        network=windows.network.to(dtype),
    )
    for gate in (ConstantGate(0.5), DisagreementGate(), MagnitudeGate(), VarianceSwitch(), InverseVarianceGate()):
        assert all(field.dtype == dtype and not field.requires_grad for field in windows.gradient(gate))


def test_batch_of_windows_equals_one_at_a_time() -> None:
    windows = random_windows(3, 5, 6, p_invalid=0.2)
    batch = windows.gradient(ConstantGate(0.7))
    for w in range(6):
        single = windows.select(slice(w, w + 1)).gradient(ConstantGate(0.7))
        for both, one in zip(batch, single, strict=True):
            same(both[:, w : w + 1], one)


def test_window_equals_chain_of_single_steps() -> None:
    """One step at a time, the state as a part of what is observed and acted upon, so that adjoints can be handed over."""
    weight = 0.6
    windows = random_windows(4, 5, 3)
    expected = windows.gradient(ConstantGate(weight))
    adjoint = th.zeros(3, NOBS + NDX, dtype=th.float64)  # mu', lambda'
    for t in reversed(range(5)):
        d = WindowDerivatives(*(field[t] for field in windows.derivatives))
        ends = windows.boundary[t] | (t == 4)
        bootstrap = th.cat([windows.critic.v_o[t], th.zeros(3, NDX, dtype=th.float64)], -1)
        adjoint = th.where(ends[:, None], bootstrap, adjoint)
        observed = th.cat([th.cat([d.O_a, d.O_x], -1), th.cat([d.B, d.A], -1)], -2)  # of (o', x') by (a, x)
        acted = th.cat([d.r_a, d.r_x], -1)
        nothing = th.zeros(3, 1, dtype=th.float64)
        step = adaptive_gradient(
            WindowDerivatives(
                *(field[None] for field in (nothing[..., None], th.zeros(3, 1, NU + NDX), observed[..., :1] * 0, observed)),
                nothing[None],
                acted[None],
            ),
            CriticGradients(acted[None] * 0, adjoint[None] * 0, adjoint[None]),
            lambda t, gradient: th.zeros(3, NOBS + NDX, dtype=th.float64),
            ConstantGate(1.0),
            gamma=GAMMA,
            terminated=windows.terminated[t : t + 1],
            boundary=windows.boundary[t : t + 1],
            valid=windows.valid[t : t + 1],
        )
        analytic, state_gradient = step.g_a[0, :, :NU], step.g_a[0, :, NU:]
        gradient = weight * analytic + (1.0 - weight) * windows.critic.q_a[t]
        same(expected.analytic[t], analytic)
        same(expected.g_a[t], gradient)
        obs_adjoint = (1.0 - weight) * windows.critic.q_o[t] + windows.pullback(t, gradient)
        adjoint = th.cat([obs_adjoint, weight * state_gradient], -1)


# --- where the chain ends


@pytest.mark.parametrize("end", [0, 1, 2, 3])
def test_nothing_after_an_episode_matters(end: int) -> None:
    windows = random_windows(5, 5, 2, p_end=0.0)
    other = random_windows(6, 5, 2, p_end=0.0)
    windows.terminated[end], windows.boundary[end] = True, True
    # From the step after the end on, everything is of another episode
    mixed = windows._replace(
        derivatives=WindowDerivatives(
            *(th.cat([a[: end + 1], b[end + 1 :]]) for a, b in zip(windows.derivatives, other.derivatives, strict=True))
        ),
        critic=CriticGradients(
            *(th.cat([a[: end + 1], b[end + 1 :]]) for a, b in zip(windows.critic, other.critic, strict=True))
        ),
        observations=th.cat([windows.observations[: end + 1], other.observations[end + 1 :]]),
    )
    mixed.critic.v_o[end] = th.nan  # a terminal state has no value, whatever the critic says
    expected, result = windows.gradient(ConstantGate(0.8)), mixed.gradient(ConstantGate(0.8))
    assert th.equal(expected.g_a[: end + 1], result.g_a[: end + 1])
    assert th.equal(result.analytic[end], windows.derivatives.r_a[end])
    assert not th.allclose(expected.g_a[end + 1 :], result.g_a[end + 1 :])


def test_time_limit_bootstraps() -> None:
    windows = random_windows(7, 3, 2, p_end=0.0)
    windows.boundary[1] = True
    analytic = windows.gradient(ConstantGate(1.0)).analytic[1]
    through_value = th.einsum("won,wo->wn", windows.derivatives.O_a[1], windows.critic.v_o[1])
    same(analytic, windows.derivatives.r_a[1] + GAMMA * through_value)


def test_last_step_is_a_boundary_even_if_not_marked() -> None:
    windows = random_windows(8, 3, 2, p_end=0.0)
    marked = windows._replace(boundary=windows.boundary.clone())
    marked.boundary[-1] = True
    assert th.equal(windows.gradient(ConstantGate(1.0)).g_a, marked.gradient(ConstantGate(1.0)).g_a)


# --- what cannot be trusted


@pytest.mark.parametrize(
    "gate", [ConstantGate(1.0), DisagreementGate(), MagnitudeGate(), VarianceSwitch(), InverseVarianceGate()]
)
@pytest.mark.parametrize("value", [th.nan, th.inf, -th.inf, 1e308])
@pytest.mark.parametrize("field", range(6))
def test_bad_row_falls_back_to_the_critic_and_poisons_nothing(gate: Any, value: float, field: int) -> None:
    windows = random_windows(9, 4, 3, p_end=0.0)
    windows.critic.v_o[:] *= 10.0  # so that 1e308 overflows wherever it is put
    marked = windows._replace(valid=windows.valid.clone())
    marked.valid[2, 1] = False
    expected = marked.gradient(gate)  # told that the row is bad
    windows.derivatives[field][2, 1] = value
    windows.derivatives[field][2, 1, ..., 0] *= -1.0
    if value == 1e308:
        windows.derivatives[field][2, 1] *= 100.0
    result = windows.gradient(gate)  # has to find out
    assert all(th.equal(a, b) for a, b in zip(result, expected, strict=True))
    assert th.equal(result.g_a[2, 1], windows.critic.q_a[2, 1])
    assert result.weight[2, 1] == 0.0
    assert th.isfinite(result.g_a).all()


@pytest.mark.parametrize("gate", [DisagreementGate(), MagnitudeGate(), VarianceSwitch(), InverseVarianceGate()])
def test_bad_rows_do_not_count_in_the_gate(gate: Any) -> None:
    """Padding and invalid rows have zero derivatives, which would pass for a small variance."""
    windows = random_windows(10, 3, 4, p_end=0.0)
    windows.valid[:, 2:] = False
    result = windows.gradient(gate)
    expected = windows.select(slice(0, 2)).gradient(gate)
    for both, trusted in zip(result, expected, strict=True):
        same(both[:, :2], trusted)
    assert th.equal(result.g_a[:, 2:], windows.critic.q_a[:, 2:])


def test_nothing_trusted() -> None:
    windows = random_windows(11)
    windows.valid[:] = False

    def gate(analytic: th.Tensor, critic: th.Tensor, step: int) -> th.Tensor:
        raise AssertionError("asked about nothing")

    assert th.equal(windows.gradient(gate).g_a, windows.critic.q_a)


def test_gate_of_the_wrong_shape_is_refused() -> None:
    with pytest.raises(ValueError, match=r"one weight per sample, shape \(3,\), got \(3, 1\)"):
        random_windows(12).gradient(lambda analytic, critic, step: th.ones(len(analytic), 1))


def test_gate_that_returns_no_tensor_is_refused() -> None:
    with pytest.raises(TypeError, match=r"a tensor of one weight per sample, shape \(3,\), got 0.5"):
        random_windows(12).gradient(lambda analytic, critic, step: 0.5)


@pytest.mark.parametrize("weight", [-0.1, 1.1])
def test_gate_out_of_range_is_refused(weight: float) -> None:
    with pytest.raises(ValueError, match=r"weights in \[0, 1\], got 0.5 to 1.1|weights in \[0, 1\], got -0.1 to 0.5"):
        random_windows(12).gradient(lambda analytic, critic, step: th.tensor([weight] + [0.5] * (len(analytic) - 1)))


# --- linear quadratic system


class LinearQuadratic(NamedTuple):
    """A linear system with a linear policy ``a = -K C^+ o + d`` whose exact Q is known."""

    env: LinearQuadraticEnv
    K: np.ndarray  # (nu, n)
    P: np.ndarray  # (n, n), the return of the policy is -x'Px
    invert: np.ndarray  # (n, nobs), the left inverse C^+ of the observation

    @property
    def policy(self) -> th.Tensor:
        """da/do, ``(nu, nobs)``."""
        return th.as_tensor(-self.K @ self.invert)

    def q_gradients(self, x: np.ndarray, a: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """dQ/dx and dQ/da in closed form, for ``x`` ``(..., n)`` and ``a`` ``(..., nu)``."""
        env = self.env
        next_value = -2.0 * GAMMA * (x @ env.A.T + a @ env.B.T) @ self.P
        return next_value @ env.A - 2.0 * x @ env.Q, next_value @ env.B - 2.0 * a @ env.R


def random_system(seed: int, optimal: bool) -> LinearQuadratic:
    """A random system of three states, two actions and four observations."""
    rng = np.random.default_rng(seed)
    A, B, C = (rng.normal(size=shape) for shape in ((3, 3), (3, 2), (4, 3)))
    A *= 0.9 / np.abs(np.linalg.eigvals(A)).max()
    roots = rng.normal(size=(3, 3)), rng.normal(size=(2, 2))
    Q, R = (root @ root.T + 0.1 * np.eye(len(root)) for root in roots)
    env = LinearQuadraticEnv(A, B, 0.5 * (Q + Q.T), 0.5 * (R + R.T), C)
    K, P = env.optimal_gain(GAMMA)
    if not optimal:
        K = K * 0.7
        closed = env.A - env.B @ K
        while GAMMA * np.abs(np.linalg.eigvals(closed)).max() ** 2 > 0.95:  # the return must be finite
            K = 0.5 * (K + env.optimal_gain(GAMMA)[0])
            closed = env.A - env.B @ K
        cost = env.Q + K.T @ env.R @ K
        # vec(P) = vec(cost) + gamma (closed' x closed') vec(P)
        P = np.linalg.solve(np.eye(9) - GAMMA * np.kron(closed.T, closed.T), cost.reshape(-1)).reshape(3, 3)
    return LinearQuadratic(env, K, P, np.linalg.pinv(env.C))


def linear_quadratic_gradient(
    system: LinearQuadratic, horizon: int, n: int, offsets: np.ndarray, gate: Any, seed: int = 0
) -> tuple[AdaptiveGradient, np.ndarray]:
    """
    The recursion along windows of the system, with its exact critic.

    :param offsets: noise added to the policy's actions, ``(H, W, nu)``
    :return: what the recursion gives, and dQ/da in closed form
    """
    env = system.env
    x = np.empty((horizon + 1, n, 3))
    x[0] = np.random.default_rng(seed).normal(size=(n, 3))
    actions = np.empty((horizon, n, 2))
    for t in range(horizon):
        actions[t] = -x[t] @ system.K.T + offsets[t]
        x[t + 1] = x[t] @ env.A.T + actions[t] @ env.B.T
    derivatives = env.differentiate(x[:-1].reshape(-1, 3), actions.reshape(-1, 2))
    fields = (getattr(derivatives, name) for name in WindowDerivatives._fields)
    q_x, q_a = system.q_gradients(x[:-1], actions)
    bootstrap_x, bootstrap_a = system.q_gradients(x[1:], -x[1:] @ system.K.T)
    policy = system.policy
    critic = CriticGradients(
        th.as_tensor(q_a),
        th.as_tensor(q_x @ system.invert),
        th.as_tensor(bootstrap_x @ system.invert + bootstrap_a @ policy.numpy()),
    )
    end = th.zeros(horizon, n, dtype=th.bool)
    result = adaptive_gradient(
        WindowDerivatives(*(th.as_tensor(field.reshape(horizon, n, *field.shape[1:])) for field in fields)),
        critic,
        lambda t, gradient: gradient @ policy,  # the entropy of a Gaussian of constant width has no gradient
        gate,
        gamma=GAMMA,
        terminated=end,
        boundary=end,
        valid=~end,
    )
    return result, q_a


@settings(max_examples=20, deadline=None)
@given(seeds, st.integers(1, 12), st.booleans())
def test_all_gates_agree_where_the_critic_is_exact(seed: int, horizon: int, optimal: bool) -> None:
    system = random_system(seed, optimal)
    offsets = np.zeros((horizon, 2, 2))
    offsets[0] = np.random.default_rng(seed).normal(size=(2, 2))  # later noise the critic knows in the mean only
    table = th.rand(horizon, 2, generator=th.Generator().manual_seed(seed), dtype=th.float64)
    valid = th.ones(horizon, 2, dtype=th.bool)
    for gate in (ConstantGate(1.0), ConstantGate(0.0), ConstantGate(0.3), table_gate(table, valid), DisagreementGate()):
        result, q_a = linear_quadratic_gradient(system, horizon, 2, offsets, gate)
        same(result.g_a, th.as_tensor(q_a), tolerance=1e-10)
        same(result.analytic, th.as_tensor(q_a), tolerance=1e-10)


def test_gradient_vanishes_at_the_riccati_optimum() -> None:
    system = random_system(0, optimal=True)
    result, _ = linear_quadratic_gradient(system, 8, 4, np.zeros((8, 4, 2)), ConstantGate(1.0))
    assert result.g_a.abs().max() < 1e-10


def test_noisy_windows_have_the_critics_gradient_in_the_mean() -> None:
    """A sampled path is not its mean; the gradient is linear in the noise, so opposite noises average to the mean."""
    system = random_system(1, optimal=False)
    noise = np.random.default_rng(0).normal(size=(6, 3, 2))
    pair = [linear_quadratic_gradient(system, 6, 3, sign * noise, ConstantGate(1.0)) for sign in (1.0, -1.0)]
    _, expected = linear_quadratic_gradient(system, 6, 3, 0.0 * noise, ConstantGate(0.0))
    assert not th.allclose(pair[0][0].g_a, th.as_tensor(pair[0][1]))
    same(0.5 * (pair[0][0].g_a + pair[1][0].g_a), th.as_tensor(expected), tolerance=1e-10)


def test_policy_gradient_is_the_derivative_of_the_closed_form_return() -> None:
    """dJ/dK of -x0' P(K) x0 by central differences, against the discounted sum of the steps' gradients."""
    system, horizon = random_system(2, optimal=False), 400
    result, _ = linear_quadratic_gradient(system, horizon, 1, np.zeros((horizon, 1, 2)), ConstantGate(1.0))
    env, x0 = system.env, np.random.default_rng(0).normal(size=3)

    def total_return(K: np.ndarray) -> float:
        x, total = x0, 0.0
        for t in range(horizon):
            a = -K @ x
            total -= GAMMA**t * (x @ env.Q @ x + a @ env.R @ a)
            x = env.A @ x + env.B @ a
        return total

    steps = 1e-5 * np.eye(6).reshape(6, 2, 3)
    expected = np.array([total_return(system.K + step) - total_return(system.K - step) for step in steps]) / 2e-5
    x, gradient = x0, np.zeros((2, 3))
    for t in range(horizon):
        gradient -= GAMMA**t * np.outer(result.g_a[t, 0].numpy(), x)
        x = (env.A - env.B @ system.K) @ x
    np.testing.assert_allclose(gradient.reshape(-1), expected, rtol=1e-6, atol=1e-6)


# --- real environments, re-simulated


class Rollout(NamedTuple):
    """A policy with frozen noise in a MuJoCo task, its return bootstrapped with a smooth value function."""

    env: MujocoEnv
    policy: th.nn.Module
    value: th.nn.Module
    noise: np.ndarray  # (H, nu)

    def act(self, obs: th.Tensor, t: int) -> tuple[th.Tensor, th.Tensor]:
        """Action in [-1, 1] and log-density."""
        mean, log_std = self.policy(obs).chunk(2, -1)
        return squashed_sample(0.2 * mean, 0.2 * log_std - 2.0, th.as_tensor(self.noise[t]).expand_as(mean))

    def step(self, action: th.Tensor) -> tuple[np.ndarray, float]:
        """One step of the environment, its action scaled."""
        obs, reward, terminated, _, _ = self.env.step(action.numpy() * self.env.action_space.high)
        assert not terminated
        return obs, float(reward)

    def run(self, data: mujoco.MjData, obs: np.ndarray, start: int, offset: np.ndarray) -> float:
        """Return from step ``start`` on, with ``offset`` added to the first action."""
        mujoco.mj_copyData(self.env.data, self.env.model, data)
        total = 0.0
        for t in range(start, len(self.noise)):
            with th.no_grad():
                action, log_prob = self.act(th.as_tensor(obs)[None], t)
            action = action[0] + th.as_tensor(offset) * (t == start)
            obs, reward = self.step(action)
            # The entropy of the first action is not the gradient's business: equation (7) adds it
            total += GAMMA ** (t - start) * (reward - ALPHA * float(log_prob[0]) * (t > start))
        with th.no_grad():
            return total + GAMMA ** (len(self.noise) - start) * float(self.value(th.as_tensor(obs)[None]))


def make_rollout(name: str, horizon: int) -> Rollout:
    """HalfCheetah is lifted off the ground, so that it falls freely for the whole window."""
    env = gym.make(name).unwrapped
    assert isinstance(env, MujocoEnv)
    obs, _ = env.reset(seed=3)
    if name.startswith("HalfCheetah"):
        qpos = env.data.qpos.copy()
        qpos[1] += 3.0
        env.set_state(qpos, env.data.qvel.copy())
    generator = th.Generator().manual_seed(0)
    nu = env.action_space.shape[0]
    networks = [
        th.nn.Sequential(th.nn.Linear(len(obs), 8), th.nn.Tanh(), th.nn.Linear(8, out)).double() for out in (2 * nu, 1)
    ]
    for parameter in (parameter for network in networks for parameter in network.parameters()):
        th.nn.init.normal_(parameter, std=0.5, generator=generator)
    return Rollout(env, *networks, np.random.default_rng(0).normal(size=(horizon, nu)))


@pytest.mark.parametrize("name", ["HalfCheetah-v5", "InvertedDoublePendulum-v5"])
def test_gradient_equals_differences_of_the_simulated_return(name: str) -> None:
    horizon = 5
    rollout = make_rollout(name, horizon)
    env = rollout.env
    differences = FiniteDifferences(1e-6, 1e-6, 1e-6, 1e-6, centred=True, threads=1)
    dynamics = MujocoDynamics(env, differences)
    obs = env._get_obs()
    observations, saved, parts = [], [], []
    for t in range(horizon):
        with th.no_grad():
            action = rollout.act(th.as_tensor(obs)[None], t)[0][0]
        observations.append(obs)
        saved.append(mujoco.MjData(env.model))
        mujoco.mj_copyData(saved[-1], env.model, env.data)
        parts.append(dynamics.differentiate(dynamics.get_state()[None], (action.numpy() * env.action_space.high)[None]))
        obs, _ = rollout.step(action)
        assert env.data.ncon == 0
    result = real_gradient(rollout, np.stack(observations), obs, concatenate(parts))
    size = 1e-5
    for t in range(horizon):
        rows = size * np.eye(env.action_space.shape[0])
        expected = [
            (rollout.run(saved[t], observations[t], t, row) - rollout.run(saved[t], observations[t], t, -row)) / (2 * size)
            for row in rows
        ]
        np.testing.assert_allclose(result[t], expected, rtol=1e-4, atol=1e-4 * np.abs(expected).max())
    dynamics.close()
    env.close()


def real_gradient(
    rollout: Rollout, observations: np.ndarray, last: np.ndarray, derivatives: TransitionDerivatives
) -> np.ndarray:
    """The analytic gradient of every step of one window, ``(H, nu)``."""
    scale = rollout.env.action_space.high.astype(np.float64)
    derivatives = derivatives._replace(B=derivatives.B * scale, O_a=derivatives.O_a * scale, r_a=derivatives.r_a * scale)
    horizon, nu = rollout.noise.shape
    last_obs = th.as_tensor(last)[None].requires_grad_(True)
    (v_o,) = th.autograd.grad(rollout.value(last_obs).sum(), last_obs)
    v_o = th.cat([th.full((horizon - 1, *v_o.shape), th.nan, dtype=th.float64), v_o[None]])  # only the last is used

    def pullback(t: int, gradient: th.Tensor) -> th.Tensor:
        obs = th.as_tensor(observations[t])[None].requires_grad_(True)
        action, log_prob = rollout.act(obs, t)
        return th.autograd.grad((gradient * action).sum() - ALPHA * log_prob.sum(), obs)[0]

    end = th.zeros(horizon, 1, dtype=th.bool)
    result = adaptive_gradient(
        WindowDerivatives(*(th.as_tensor(getattr(derivatives, name))[:, None] for name in WindowDerivatives._fields)),
        CriticGradients(th.zeros(horizon, 1, nu, dtype=th.float64), th.zeros_like(v_o), v_o),
        pullback,
        ConstantGate(1.0),
        gamma=GAMMA,
        terminated=end,
        boundary=end,
        valid=th.as_tensor(derivatives.valid)[:, None],
    )
    assert result.weight.min() == 1.0
    return result.g_a[:, 0].numpy()


# --- policy loss


def test_policy_loss_has_the_expected_parameter_gradient() -> None:
    windows = random_windows(13, 1, 7)
    mask = th.tensor([1.0, 0.0, 1.0, 1.0, 0.0, 1.0, 1.0], dtype=th.float64)
    gradients = windows.critic.q_a[0].clone().requires_grad_(True)
    actions, log_prob = windows.act(windows.observations[0], 0)
    loss = policy_loss(actions, log_prob, gradients * 2.0, ALPHA, mask)
    parameters = list(windows.network.parameters())
    results = th.autograd.grad(loss, [*parameters, gradients], retain_graph=True, allow_unused=True)
    assert results[-1] is None  # no gradient through dJ/da
    expected = [th.zeros_like(parameter) for parameter in parameters]
    for i in th.nonzero(mask).flatten().tolist():
        sample = ALPHA * log_prob[i] - 2.0 * gradients.detach()[i] @ actions[i]
        for total, part in zip(expected, th.autograd.grad(sample, parameters, retain_graph=True), strict=True):
            total += part / 5.0
    for result, reference in zip(results[:-1], expected, strict=True):
        same(result, reference)


def test_masked_samples_have_no_influence_whatever_they_hold() -> None:
    actions = th.tensor([[0.5], [0.25]], requires_grad=True)
    loss = policy_loss(actions, th.tensor([1.0, th.nan]), th.tensor([[2.0], [th.inf]]), 0.1, th.tensor([1.0, 0.0]))
    loss.backward()
    assert loss.item() == pytest.approx(0.1 - 1.0)
    assert actions.grad is not None and actions.grad.tolist() == [[-2.0], [0.0]]


def test_policy_loss_of_nothing_is_zero() -> None:
    loss = policy_loss(th.ones(2, 1), th.ones(2), th.ones(2, 1), th.tensor([0.1]), th.zeros(2))
    assert loss.item() == 0.0 and loss.shape == ()


# --- gradient matching


def test_matching_targets_equal_the_exact_critics_gradients() -> None:
    """(8) and (9) hold in closed form on a linear quadratic system, for any action taken."""
    system = random_system(3, optimal=False)
    rng = np.random.default_rng(0)
    x, actions = rng.normal(size=(6, 3)), rng.normal(size=(6, 2))
    d = system.env.differentiate(x, actions)
    next_x = th.as_tensor(d.next_state)
    v_o = th.as_tensor(-2.0 * next_x.numpy() @ system.P @ system.invert)
    terminated = th.tensor([0.0, 0.0, 1.0, 0.0, 1.0, 0.0], dtype=th.float64)
    fields = {name: th.as_tensor(getattr(d, name)) for name in ("r_a", "r_x", "O_a", "O_x", "C")}
    discount = GAMMA * (1.0 - terminated)
    q_x, q_a = (th.as_tensor(gradient) for gradient in system.q_gradients(x, actions))
    goes_on = terminated == 0.0
    action_targets = matching_targets(fields["r_a"], fields["O_a"], v_o, discount)
    state_targets = matching_targets(fields["r_x"], fields["O_x"], v_o, discount)
    same(action_targets[goes_on], q_a[goes_on])
    same(state_targets[goes_on], q_x[goes_on])
    same(th.einsum("nox,no->nx", fields["C"], q_x @ th.as_tensor(system.invert))[goes_on], state_targets[goes_on])
    assert th.equal(action_targets[~goes_on], fields["r_a"][~goes_on])
    assert matching_loss(action_targets.expand(3, -1, -1), action_targets).item() == 0.0


def test_matching_loss_by_hand() -> None:
    targets = th.tensor([[1.0, 10.0], [2.0, -30.0], [-3.0, 20.0]])  # medians of the magnitudes: 2 and 20
    errors = th.tensor([[[0.0, 0.0], [1.0, 0.0], [0.0, 60.0]], [[-6.0, 0.0], [0.0, 0.0], [0.0, 0.0]]])
    # In units of the medians 0.5, 3 and -3: quadratic below 1, linear above; mean over samples and coordinates, summed
    expected = (0.5 * 0.5**2 + (3.0 - 0.5)) / 6.0 + (3.0 - 0.5) / 6.0
    assert matching_loss(targets + errors, targets).item() == pytest.approx(expected)


def test_gradient_scale() -> None:
    assert gradient_scale(th.tensor([[1.0, -4.0, 0.0], [-2.0, 5.0, 0.0], [1e9, 6.0, 0.0]])).tolist() == pytest.approx(
        [2.0, 5.0, 0.005]
    )
    assert gradient_scale(th.tensor([[0.0, 0.0], [0.0, 0.0], [0.0, -6.0]])).tolist() == [1.0, 1.0]
    assert gradient_scale(th.zeros(5, 2)).tolist() == [1.0, 1.0]
    assert gradient_scale(th.full((5, 2), 1e-44)).tolist() == [1.0, 1.0]
    assert gradient_scale(th.tensor([[3.0, 0.0]])).tolist() == pytest.approx([3.0, 0.003])


numbers = st.floats(-1e3, 1e3, width=32) | st.sampled_from([0.0, 1e-6, 1e15, -1e15])


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(numbers, numbers), min_size=1, max_size=9), seeds)
def test_matching_loss_and_its_gradient_are_bounded(rows: list[tuple[float, float]], seed: int) -> None:
    targets = th.tensor(rows)
    predictions = (targets + th.randn(2, *targets.shape, generator=th.Generator().manual_seed(seed))).requires_grad_(True)
    loss = matching_loss(predictions, targets)
    loss.backward()
    assert loss.isfinite() and loss >= 0.0
    assert predictions.grad is not None
    # |d loss / d prediction| <= 1 / (samples, coordinates, scale)
    bound = 1.0 / (targets.numel() * gradient_scale(targets))
    assert (predictions.grad.abs() <= bound * (1.0 + 1e-5)).all()
    assert (gradient_scale(targets) >= 1e-3 * gradient_scale(targets).max() * (1.0 - 1e-5)).all()


@settings(max_examples=25, deadline=None)
@given(seeds, st.floats(-12.0, 12.0))
def test_matching_loss_has_no_unit(seed: int, exponent: float) -> None:
    generator, factor = th.Generator().manual_seed(seed), 10.0**exponent
    targets, predictions = th.randn(8, 3, generator=generator), th.randn(2, 8, 3, generator=generator)
    expected = matching_loss(predictions, targets).item()
    assert matching_loss(factor * predictions, factor * targets).item() == pytest.approx(expected, rel=1e-3)


@settings(max_examples=25, deadline=None)
@given(seeds, st.floats(-3.0, 3.0))
def test_weight_of_matching_has_no_unit(seed: int, exponent: float) -> None:
    """Rewards that are multiplied by a factor, and critics with them, give the loss times its square, whatever the weight."""
    generator, factor = th.Generator().manual_seed(seed), 10.0**exponent
    errors, targets, predictions = (th.randn(*shape, generator=generator) for shape in ((2, 8), (8, 3), (2, 8, 3)))

    def loss(factor: float) -> float:
        matching = matching_loss(factor * predictions, factor * targets)
        return (temporal_difference_loss(factor * errors) + 0.7 * temporal_difference_unit(factor * errors) * matching).item()

    assert loss(factor) == pytest.approx(factor**2 * loss(1.0), rel=1e-3)


def test_temporal_differences_by_hand() -> None:
    errors = th.tensor([[1.0, -2.0, 100.0], [0.0, 3.0, -4.0]], requires_grad=True)
    assert temporal_difference_loss(errors).item() == pytest.approx((1 + 4 + 10_000) / 6 + (9 + 16) / 6)
    unit = temporal_difference_unit(errors)
    assert unit.item() == pytest.approx(4 / 2 + 9 / 2)  # one error of a hundred does not count as such
    assert not unit.requires_grad


# --- statistics


def test_gradient_statistics_by_hand() -> None:
    analytic = th.tensor([[[3.0, 4.0], [100.0, 0.0]], [[0.0, -1.0], [-3.0, -3.0]]])
    q_a = th.tensor([[[1.0, 0.0], [0.0, 100.0]], [[0.0, 2.0], [-4.0, -2.0]]])
    weight = th.tensor([[0.25, 0.9], [0.75, 0.5]])
    mask = th.tensor([[1.0, 0.0], [1.0, 1.0]])
    statistics = gradient_statistics(AdaptiveGradient(q_a, analytic, weight), q_a, mask)
    assert statistics == pytest.approx(
        {
            "gate_mean": 0.5,
            "gate_step_0": 0.25,
            "gate_step_1": 0.625,
            # (3, 4), (0, -1), (-3, -3) have the mean zero
            "analytic_grad_norm": (5.0 + 1.0 + 18.0**0.5) / 3.0,
            "analytic_grad_variance": (25.0 + 1.0 + 18.0) / 3.0,
            # (1, 0), (0, 2), (-4, -2) have the mean (-1, 0)
            "critic_grad_norm": (1.0 + 2.0 + 20.0**0.5) / 3.0,
            "critic_grad_variance": (4.0 + 5.0 + 13.0) / 3.0,
            "grad_cosine": (3.0 - 2.0 + 18.0) / (44.0 * 25.0) ** 0.5,
        }
    )


def test_gradient_statistics_of_nothing() -> None:
    zeros = th.zeros(2, 3, 1)
    statistics = gradient_statistics(AdaptiveGradient(zeros, zeros, zeros[..., 0]), zeros, zeros[..., 0])
    assert set(statistics.values()) == {0.0}


def test_pullback_is_asked_with_the_gated_gradient() -> None:
    windows = random_windows(14, 3, 2)
    asked: dict[int, th.Tensor] = {}

    def pullback(t: int, gradient: th.Tensor) -> th.Tensor:
        asked[t] = gradient
        return windows.pullback(t, gradient)

    chain = {"terminated": windows.terminated, "boundary": windows.boundary, "valid": windows.valid}
    typed: PolicyPullback = pullback
    result = adaptive_gradient(windows.derivatives, windows.critic, typed, ConstantGate(0.5), gamma=GAMMA, **chain)
    assert all(th.equal(asked[t], result.g_a[t]) for t in range(3))
