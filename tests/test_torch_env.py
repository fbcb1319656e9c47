"""Environments written in torch: derivatives, values, known optima, agreement with Gymnasium."""

import copy
import pickle
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from gymnasium.utils.env_checker import check_env as gymnasium_check_env
from hypothesis import given, settings
from hypothesis import strategies as st
from stable_baselines3.common.env_checker import check_env as sb3_check_env

from sb3_agpo.dynamics.interface import Array, DifferentiableDynamics, TransitionDerivatives
from sb3_agpo.dynamics.torch_env import TorchEnv
from sb3_agpo.dynamics.torch_tasks import (
    ENVIRONMENTS,
    LinearQuadraticEnv,
    PushAgainstWall,
    TorchPendulum,
    register_environments,
    riccati_gain,
)

THREE_STATES: dict[str, Any] = {
    "A": [[0.9, 0.3, 0.0], [-0.2, 1.05, 0.1], [0.0, 0.4, 0.7]],
    "B": [[0.0, 0.2], [0.5, 0.0], [0.1, 0.3]],
    "Q": [[2.0, 0.3, 0.0], [0.3, 1.0, 0.0], [0.0, 0.0, 0.5]],
    "R": [[0.5, 0.1], [0.1, 0.4]],
    "observation_matrix": [[1.0, 0.0, 0.5], [0.0, 2.0, 0.0]],
}


class Spiral(TorchEnv):
    """Smooth and nonlinear in everything: three states, two actions, four observations, a reward of the next state."""

    def __init__(self) -> None:
        observations = spaces.Box(-np.inf, np.inf, (4,), np.float64)
        super().__init__(3, observations, spaces.Box(-1.0, 1.0, (2,), np.float32))

    def dynamics(self, state: th.Tensor, action: th.Tensor) -> th.Tensor:
        x, y, z = state
        return th.stack([x + 0.1 * th.sin(y) * z, 0.9 * y + action[0] * th.cos(x), th.tanh(z) + 0.5 * action[1] ** 2 * y])

    def observation(self, state: th.Tensor) -> th.Tensor:
        return th.cat([th.exp(-(state**2)), state.prod()[None]])

    def reward(self, state: th.Tensor, action: th.Tensor, next_state: th.Tensor) -> th.Tensor:
        return th.sin(next_state[0]) * action[1] - (next_state - state) @ next_state

    def terminated(self, next_state: th.Tensor) -> th.Tensor:
        return next_state[1] > 0.5

    def initial_state(self, generator: np.random.Generator) -> Array:
        return generator.normal(size=3)


class Singular(TorchEnv):
    """Divides by the first entry of the state; the root has an infinite derivative where the second is zero."""

    def __init__(self, dtype: type[np.floating] = np.float64) -> None:
        super().__init__(2, spaces.Box(-np.inf, np.inf, (2,), dtype), spaces.Box(-1.0, 1.0, (1,), np.float32))

    def dynamics(self, state: th.Tensor, action: th.Tensor) -> th.Tensor:
        return th.stack([1.0 / state[0] + action[0], th.sqrt(state[1])])

    def observation(self, state: th.Tensor) -> th.Tensor:
        return state.clone()

    def reward(self, state: th.Tensor, action: th.Tensor, next_state: th.Tensor) -> th.Tensor:
        return next_state.sum()

    def initial_state(self, generator: np.random.Generator) -> Array:
        return np.ones(2)


def make_all() -> list[TorchEnv]:
    """One environment of every kind."""
    noisy = LinearQuadraticEnv(**THREE_STATES, noise_std=0.1, reward_scale=0.3)
    return [Spiral(), LinearQuadraticEnv(), noisy, TorchPendulum(), PushAgainstWall()]


every_environment = pytest.mark.parametrize("env", make_all(), ids=lambda env: f"{type(env).__name__}{env.state_size}")


def visit(env: TorchEnv, steps: int, seed: int = 0) -> tuple[Array, np.ndarray, list[Any]]:
    """States before, actions and results of ``steps`` random steps."""
    env.reset(seed=seed)
    env.action_space.seed(seed)
    states, actions, results = [], [], []
    for _ in range(steps):
        states.append(env.get_state())
        actions.append(env.action_space.sample())
        results.append(env.step(actions[-1]))
    return np.array(states), np.array(actions), results


def values(env: TorchEnv, states: Array, actions: Array) -> tuple[Array, Array, Array]:
    """Next state, exact (not rounded) next observation and reward of live steps, each ``(n, ...)``."""
    next_states, next_obs, rewards = [], [], []
    for state, action in zip(states, actions, strict=True):
        env.set_state(state)
        rewards.append(env.step(action)[1])
        next_states.append(env.get_state())
        next_obs.append(env.observation(th.tensor(next_states[-1])).numpy())
    return np.array(next_states), np.array(next_obs), np.array(rewards)[:, None]


def central_differences(env: TorchEnv, state: Array, action: Array, step: float = 1e-5) -> list[Array]:
    """Derivatives of next state, next observation and reward by (state, action), each ``(m, nx + nu)``."""
    nx = env.state_size
    point = np.concatenate([state, action])
    rows = np.concatenate([point + step * np.eye(len(point)), point - step * np.eye(len(point))])
    above_below = (np.split(field, 2) for field in values(env, rows[:, :nx], rows[:, nx:]))
    return [(above - below).T / (2.0 * step) for above, below in above_below]


def observation_differences(env: TorchEnv, state: Array, step: float = 1e-5) -> Array:
    """Derivative of the observation, ``(nobs, nx)``."""
    rows = np.concatenate([state + step * np.eye(len(state)), state - step * np.eye(len(state))])
    above, below = np.split(np.array([env.observation(th.tensor(row)).numpy() for row in rows]), 2)
    return (above - below).T / (2.0 * step)


def assert_equals_differences(env: TorchEnv, states: Array, actions: Array, tolerance: float = 1e-7) -> None:
    """Every derivative against central differences."""
    d = env.differentiate(states, actions)
    assert d.valid.all()
    for row, (state, action) in enumerate(zip(states, actions, strict=True)):
        for derivatives, expected in zip(
            ((d.A[row], d.B[row]), (d.O_x[row], d.O_a[row]), (d.r_x[row][None], d.r_a[row][None])),
            central_differences(env, state, action),
            strict=True,
        ):
            np.testing.assert_allclose(np.concatenate(derivatives, axis=1), expected, rtol=tolerance, atol=tolerance)
        np.testing.assert_allclose(d.C[row], observation_differences(env, state), rtol=tolerance, atol=tolerance)
        next_C = observation_differences(env, d.next_state[row])
        np.testing.assert_allclose(d.next_C[row], next_C, rtol=tolerance, atol=tolerance)


@settings(max_examples=15, deadline=None)
@given(st.lists(st.floats(-2.0, 2.0), min_size=3, max_size=3), st.lists(st.floats(-1.0, 1.0), min_size=2, max_size=2))
def test_derivatives_equal_central_differences(state: list[float], action: list[float]) -> None:
    assert_equals_differences(Spiral(), np.array([state]), np.array([action]), tolerance=1e-6)


@settings(max_examples=15, deadline=None)
@given(st.floats(-3.1, 3.1), st.floats(-6.5, 6.5), st.floats(-1.9, 1.9))
def test_pendulum_derivatives_equal_central_differences(angle: float, speed: float, torque: float) -> None:
    assert_equals_differences(TorchPendulum(), np.array([[angle, speed]]), np.array([[torque]]), tolerance=1e-6)


def test_pendulum_derivatives_vanish_beyond_the_limits() -> None:
    d = TorchPendulum().differentiate([[1.0, 0.5], [1.0, 0.5], [1.0, 0.5]], [[3.0], [-3.0], [2.0]])
    assert not d.B[:2].any() and not d.r_a[:2].any()
    assert d.B[2].all() and d.valid.all()  # at the limit: the derivative of the inside
    fast = TorchPendulum().differentiate([[1.0, 8.0]], [[2.0]])
    np.testing.assert_array_equal(fast.A[0], [[1.0, 0.0], [0.0, 0.0]])


def test_wall_derivatives_equal_central_differences_off_the_kinks() -> None:
    env = PushAgainstWall()
    before, inside, leaving = [-0.05, 2.0], [0.001, 0.1], [-0.01, -1.0]
    assert_equals_differences(env, np.array([before, inside, leaving]), np.full((3, 1), 0.5), tolerance=1e-5)
    states, actions, _ = visit(env, 100)
    d = env.differentiate(states, actions)
    differences = [central_differences(env, *row, step=1e-7)[0] for row in zip(states, actions, strict=True)]
    agree = [
        np.allclose(np.hstack([d.A[i], d.B[i]]), expected, rtol=1e-4, atol=1e-4) for i, expected in enumerate(differences)
    ]
    assert np.mean(agree) > 0.95  # a kink within the difference step is rare


def test_linear_quadratic_derivatives_are_those_of_the_closed_form() -> None:
    env = LinearQuadraticEnv(**THREE_STATES, reward_scale=0.25)
    states, actions = np.random.default_rng(0).normal(size=(2, 7, 3))
    actions = actions[:, :2]
    d = env.differentiate(states, actions)
    C = np.array(THREE_STATES["observation_matrix"])
    for jacobian, expected in ((d.A, env.A), (d.B, env.B), (d.C, C), (d.next_C, C), (d.O_x, C @ env.A), (d.O_a, C @ env.B)):
        np.testing.assert_allclose(jacobian, np.broadcast_to(expected, jacobian.shape), rtol=0.0, atol=1e-15)
    np.testing.assert_allclose(d.r_x, -0.5 * states @ env.Q, atol=1e-14)
    np.testing.assert_allclose(d.r_a, -0.5 * actions @ env.R, atol=1e-14)
    np.testing.assert_allclose(d.next_state, states @ env.A.T + actions @ env.B.T, atol=1e-14)
    assert not d.terminated.any() and d.valid.all()


def test_noise_is_part_of_the_state() -> None:
    env = LinearQuadraticEnv(**THREE_STATES, noise_std=0.1)
    states, actions, _ = visit(env, 500)
    x, w = states[:, :3], states[:, 3:]
    np.testing.assert_allclose(x[1:], (x @ env.A.T + actions.astype(np.float64) @ env.B.T + w)[:-1], atol=1e-12)
    assert abs(w.std() - 0.1) < 0.005 and abs(np.corrcoef(w[1:, 0], w[:-1, 0])[0, 1]) < 0.1
    d = env.differentiate(states, actions)
    np.testing.assert_array_equal(d.A[0], np.block([[env.A, np.eye(3)], [np.zeros((3, 6))]]))
    assert not d.C[..., 3:].any() and not d.next_state[:, 3:].any()


@every_environment
def test_values_equal_those_of_step_bit_for_bit(env: TorchEnv) -> None:
    states, actions, results = visit(env, 50)
    d = env.differentiate(states, actions)
    noise = isinstance(env, LinearQuadraticEnv) and env.noise_std > 0.0
    known = slice(None, 3) if noise else slice(None)  # the noise of the next step is not known
    np.testing.assert_array_equal(d.next_state[:-1, known], states[1:, known])
    np.testing.assert_array_equal(d.next_obs, np.array([result[0] for result in results], dtype=np.float64))
    np.testing.assert_array_equal(d.reward, [result[1] for result in results])
    np.testing.assert_array_equal(d.terminated, [result[2] for result in results])


@every_environment
def test_differentiate_has_the_documented_shapes_and_types_and_touches_nothing(env: TorchEnv) -> None:
    assert isinstance(env, DifferentiableDynamics)
    states, actions, _ = visit(env, 6)
    before, random_before = env.get_state(), copy.deepcopy(env.np_random.bit_generator.state)
    states_before, actions_before = states.copy(), actions.copy()
    for n in (6, 1, 0):
        assert_shapes(env.differentiate(states[:n], actions[:n]), n, env)
    np.testing.assert_array_equal(env.get_state(), before)
    assert env.np_random.bit_generator.state == random_before
    np.testing.assert_array_equal(states, states_before)
    np.testing.assert_array_equal(actions, actions_before)


def assert_shapes(d: TransitionDerivatives, n: int, env: TorchEnv) -> None:
    """Shapes and types of all fields."""
    nx, nu, nobs = env.state_size, env.action_size, env.observation_size
    shapes: dict[str, tuple[int, ...]] = {
        "A": (nx, nx),
        "B": (nx, nu),
        "C": (nobs, nx),
        "next_C": (nobs, nx),
        "O_x": (nobs, nx),
        "O_a": (nobs, nu),
    }
    shapes |= {"r_x": (nx,), "r_a": (nu,), "next_state": (nx,), "next_obs": (nobs,)}
    for name, field in d._asdict().items():
        assert field.shape == (n, *shapes.get(name, ())), name
        assert field.dtype == (np.bool_ if name in ("terminated", "valid") else np.float64), name
        assert field.flags.writeable, name


def test_one_row_does_not_depend_on_the_others() -> None:
    env = Spiral()
    states, actions, _ = visit(env, 20)
    whole = env.differentiate(states, actions)
    for row in range(20):
        for one, all_rows in zip(env.differentiate(states[row : row + 1], actions[row : row + 1]), whole, strict=True):
            np.testing.assert_allclose(one[0], all_rows[row], rtol=1e-13, atol=1e-15)
    assert whole.terminated.any() and not whole.terminated.all()


@every_environment
def test_seeding_makes_episodes_equal(env: TorchEnv) -> None:
    first, _, first_results = visit(env, 20, seed=3)
    again, _, again_results = visit(env, 20, seed=3)
    other, _, _ = visit(env, 20, seed=4)
    np.testing.assert_array_equal(first, again)
    assert all(np.array_equal(a[0], b[0]) and a[1:] == b[1:] for a, b in zip(first_results, again_results, strict=True))
    assert not np.array_equal(first, other)


@every_environment
def test_copies_are_independent(env: TorchEnv) -> None:
    env.reset(seed=0)
    for twin in (copy.deepcopy(env), pickle.loads(pickle.dumps(env))):
        start = env.get_state()
        np.testing.assert_array_equal(twin.get_state(), start)
        twin.step(np.full(env.action_size, 0.5))
        np.testing.assert_array_equal(env.get_state(), start)
        assert twin.differentiate(start[None], np.zeros((1, env.action_size))).valid.all()


def test_set_state_and_reset_at_a_state() -> None:
    env = TorchPendulum()
    env.set_state([0.3, -1.0])
    first = env.step([0.5])
    obs, info = env.reset(options={"state": np.array([0.3, -1.0])})
    np.testing.assert_array_equal(obs, np.array([np.cos(0.3), np.sin(0.3), -1.0], dtype=np.float32))
    second = env.step(np.array([0.5], dtype=np.float32))
    np.testing.assert_array_equal(first[0], second[0])
    assert first[1:] == second[1:] and info == {}
    env.get_state()[:] = 0.0  # a copy
    assert env.get_state().all()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("environment_id", [environment_id for environment_id, _, _ in ENVIRONMENTS])
def test_checkers_pass_and_registration_is_idempotent(environment_id: str) -> None:
    register_environments()
    spec = gym.spec(environment_id)
    register_environments()
    assert gym.spec(environment_id) is spec
    env = gym.make(environment_id)
    sb3_check_env(env)
    gymnasium_check_env(env.unwrapped)
    env.reset(seed=0)
    truncated = [env.step(env.action_space.sample())[3] for _ in range(spec.max_episode_steps or 0)]
    assert truncated[-1] and not any(truncated[:-1])


def test_pendulum_equals_gymnasium_step_by_step() -> None:
    ours = TorchPendulum()
    theirs: Any = gym.make("Pendulum-v1").unwrapped
    assert ours.observation_space == theirs.observation_space and ours.action_space == theirs.action_space
    generator = np.random.default_rng(0)
    limited = fast = 0
    for seed in range(5):
        np.testing.assert_array_equal(ours.reset(seed=seed)[0], theirs.reset(seed=seed)[0])
        push = generator.normal(0.0, 1.0 + seed)  # strong enough to reach the limits of torque and speed
        for _ in range(200):
            # float64, because Gymnasium computes in the dtype of the action
            action = np.array([push + generator.normal()]) * np.sign(ours.get_state()[1])
            obs, reward, *ends = ours.step(action)
            their_obs, their_reward, *their_ends = theirs.step(action)
            np.testing.assert_allclose(ours.get_state(), theirs.state, rtol=0.0, atol=1e-9)
            np.testing.assert_allclose(obs, their_obs, rtol=0.0, atol=1e-6)  # float32
            assert abs(reward - float(their_reward)) < 1e-9 and ends == their_ends
            assert obs.dtype == their_obs.dtype
            limited, fast = limited + (abs(action[0]) > 2.0), fast + (abs(ours.get_state()[1]) == 8.0)
    assert limited > 50 and fast > 10


@pytest.mark.parametrize("gamma", [0.5, 0.99, 1.0])
@pytest.mark.parametrize("parameters", [{}, THREE_STATES], ids=["default", "three states"])
def test_riccati_solves_the_bellman_equation_and_stabilises(parameters: dict[str, Any], gamma: float) -> None:
    env = LinearQuadraticEnv(**parameters)
    K, P = env.optimal_gain(gamma)
    closed_loop = env.A - env.B @ K
    np.testing.assert_allclose(P, env.Q + K.T @ env.R @ K + gamma * closed_loop.T @ P @ closed_loop, rtol=1e-9, atol=1e-12)
    assert np.abs(np.linalg.eigvals(np.sqrt(gamma) * closed_loop)).max() < 1.0
    # No other action is better in any state, the next value given: zero gradient and a positive definite Hessian
    states = np.random.default_rng(0).normal(size=(5, len(env.A)))
    d = env.differentiate(states, -states @ K.T)
    next_value_slope = -2.0 * d.next_state @ P
    np.testing.assert_allclose(d.r_a + gamma * np.einsum("nxu,nx->nu", d.B, next_value_slope), 0.0, atol=1e-9)
    assert np.linalg.eigvalsh(env.R + gamma * env.B.T @ P @ env.B).min() > 0.0


def test_riccati_equals_the_best_action_sequence_found_by_least_squares() -> None:
    gamma, horizon = 0.9, 150
    env = LinearQuadraticEnv(**THREE_STATES)
    K, P = env.optimal_gain(gamma)
    x = np.array([0.5, -1.0, 2.0])
    # All states as a linear function of all actions, cost = |free + forced @ actions|^2
    root_Q, root_R = np.linalg.cholesky(env.Q).T, np.linalg.cholesky(env.R).T
    free, forced, power = [], np.zeros((horizon, 3, horizon, 2)), np.eye(3)
    powers = [power := power if step == 0 else env.A @ power for step in range(horizon)]
    for step in range(horizon):
        scale = gamma ** (step / 2)
        free.append(scale * root_Q @ powers[step] @ x)
        for earlier in range(step):
            forced[step, :, earlier] = scale * root_Q @ powers[step - 1 - earlier] @ env.B
    effort = np.kron(np.diag(gamma ** (np.arange(horizon) / 2)), root_R)
    matrix = np.vstack([forced.reshape(horizon * 3, horizon * 2), effort])
    target = np.concatenate([*free, np.zeros(2 * horizon)])
    actions, *_ = np.linalg.lstsq(matrix, -target, rcond=None)
    np.testing.assert_allclose(actions[:2], -K @ x, atol=1e-4)
    np.testing.assert_allclose(np.sum((target + matrix @ actions) ** 2), x @ P @ x, rtol=1e-5)


def test_optimal_return_is_what_the_optimal_policy_earns() -> None:
    gamma = 0.95
    env = LinearQuadraticEnv(reward_scale=2.0)
    K, _ = env.optimal_gain(gamma)
    returns, starts, largest = [], [], 0.0
    for seed in range(3):
        env.reset(seed=seed)
        starts.append(env.get_state())
        total = 0.0
        for step in range(300):
            action = -K @ env.get_state()
            largest = max(largest, float(np.abs(action).max()))
            total += gamma**step * env.step(action)[1]
        returns.append(total)
    np.testing.assert_allclose(returns, env.optimal_return(starts, gamma), rtol=1e-5)
    # The documented claim that actions stay inside the space: from the worst corner, at any discount
    assert largest < 1.0 and np.abs(env.optimal_gain(1.0)[0]).sum() * env.initial_scale < 1.0


def test_optimal_return_with_noise_is_the_mean_of_many_episodes() -> None:
    gamma, std, n = 0.8, 0.2, 20_000
    env = LinearQuadraticEnv(noise_std=std)
    K, _ = env.optimal_gain(gamma)
    generator = np.random.default_rng(0)
    x, total = np.tile([0.3, -0.2], (n, 1)), np.zeros(n)
    for step in range(60):
        action = -x @ K.T
        total -= gamma**step * (np.einsum("ni,ij,nj->n", x, env.Q, x) + np.einsum("ni,ij,nj->n", action, env.R, action))
        x = x @ env.A.T + action @ env.B.T + generator.normal(0.0, std, x.shape)
    expected = env.optimal_return([[0.3, -0.2, 0.0, 0.0]], gamma)[0]
    assert abs(total.mean() - expected) < 4.0 * total.std() / np.sqrt(n)


def test_wall_is_rough_at_contact_and_smooth_elsewhere() -> None:
    env = PushAgainstWall()
    generator = np.random.default_rng(0)
    states = np.column_stack([generator.uniform(-0.1, 0.0, 200), generator.uniform(-2.0, 2.0, 200)])
    A = env.differentiate(states, generator.uniform(-1.0, 1.0, (200, 1))).A
    size = np.linalg.norm(A, axis=(1, 2))
    touched = size > 2.0
    assert 0.2 < touched.mean() < 0.8
    assert size[~touched].max() < 1.5  # in the air: close to a free mass
    assert np.median(size[touched]) > 30.0 and size.std() > 20.0
    assert (A[touched, 0, 0] < 0.0).mean() > 0.2  # and the sign of the derivative turns over


def test_wall_makes_analytic_gradients_blow_up_with_the_horizon() -> None:
    env, rollouts = PushAgainstWall(), 60
    deviations = []
    for horizon in (4, 32):
        actions = np.random.default_rng(0).normal(0.3, 0.3, (rollouts, horizon, 1))
        states, steps = np.tile([-0.15, 1.0], (rollouts, 1)), []
        for step in range(horizon):
            steps.append(env.differentiate(states, actions[:, step]))
            states = steps[-1].next_state
        return_slope = np.zeros((rollouts, 2))  # of the return after each step by the state
        for d in reversed(steps):
            action_slope = d.r_a + np.einsum("nxu,nx->nu", d.B, return_slope)
            return_slope = d.r_x + np.einsum("nxy,nx->ny", d.A, return_slope)
        deviations.append(action_slope.std())
    assert deviations[0] < 0.05 and deviations[1] > 50.0 * deviations[0]


def test_rows_that_are_not_finite_are_marked_and_zeroed() -> None:
    env = Singular()
    # fine; next state infinite; next state NaN; derivative infinite; beyond float32 after the step
    states = np.array([[2.0, 4.0], [0.0, 4.0], [2.0, -1.0], [2.0, 0.0], [1e-39, 4.0]])
    d = env.differentiate(states, np.zeros((5, 1)))
    np.testing.assert_array_equal(d.valid, [True, False, False, False, False])
    np.testing.assert_allclose(d.A[0], [[-0.25, 0.0], [0.0, 0.25]])
    for jacobian in d[:8]:
        assert jacobian[0].any() and not jacobian[1:].any()
    assert np.isinf(d.next_state[1, 0]) and np.isnan(d.next_state[2, 1])  # values stay as they are
    assert not Singular(np.float32).differentiate(states, np.zeros((5, 1))).valid[1:].any()


@pytest.mark.parametrize("state", [[0.0, 1.0], [1.0, -1.0]])
def test_a_step_out_of_the_finite_numbers_is_refused(state: list[float]) -> None:
    env = Singular()
    env.set_state(state)
    with pytest.raises(ValueError, match=r"`dynamics` returned .* `terminated`"):
        env.step([0.0])
    np.testing.assert_array_equal(env.get_state(), state)


@pytest.mark.parametrize(
    ("states", "actions", "message"),
    [
        (np.zeros(2), np.zeros((1, 1)), r"`states` must have the shape \(n, 2\), got \(2,\)"),
        (np.zeros((3, 4)), np.zeros((3, 1)), r"`states` must have the shape \(n, 2\), got \(3, 4\)"),
        (np.zeros((3, 2)), np.zeros((2, 1)), r"`actions` must have the shape \(3, 1\), got \(2, 1\)"),
        (np.array([[0.0, 0.0], [0.0, np.nan]]), np.zeros((2, 1)), r"`states` must be finite, the entry at \[1, 1\] is nan"),
        (np.zeros((1, 2)), np.array([[np.inf]]), r"`actions` must be finite, the entry at \[0, 0\] is inf"),
    ],
)
def test_differentiate_names_what_is_wrong(states: Array, actions: Array, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TorchPendulum().differentiate(states, actions)


def test_step_reset_and_state_name_what_is_wrong() -> None:
    env = TorchPendulum()
    with pytest.raises(gym.error.ResetNeeded, match="call `reset` or `set_state`"):
        env.step([0.0])
    env.reset(seed=0)
    with pytest.raises(ValueError, match=r"`action` must have the shape \(1,\), got \(2,\)"):
        env.step([0.0, 0.0])
    with pytest.raises(ValueError, match="`action` must be finite"):
        env.step([np.nan])
    with pytest.raises(ValueError, match=r"`state` must have the shape \(2,\), got \(3,\)"):
        env.set_state(np.zeros(3))
    with pytest.raises(ValueError, match=r"knows the key 'state' only, got \['low'\]"):
        env.reset(options={"low": 0.0})


@pytest.mark.parametrize(
    ("function", "returned", "message"),
    [
        ("dynamics", np.zeros(3), "`dynamics` must return a torch tensor, got ndarray"),
        ("dynamics", th.zeros(2, dtype=th.float64), r"`dynamics` must return a tensor of the shape \(3,\), got \(2,\)"),
        ("observation", th.zeros(4), "`observation` must return float64, got torch.float32; build constants"),
        ("reward", th.zeros(1, dtype=th.float64), r"`reward` must return a tensor of the shape \(\), got \(1,\)"),
        ("initial_state", np.zeros(2), r"`initial_state` must have the shape \(3,\), got \(2,\)"),
    ],
)
def test_functions_of_a_subclass_are_checked(
    monkeypatch: pytest.MonkeyPatch, function: str, returned: Any, message: str
) -> None:
    monkeypatch.setattr(Spiral, function, lambda *_: returned)
    env = Spiral()
    with pytest.raises(ValueError, match=message):
        env.reset(seed=0)
        env.step(np.zeros(2))


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"A": [[1.0, 0.0]]}, r"`A` must have the shape \(1, 1\), got \(1, 2\)"),
        ({"B": [[1.0]]}, r"`B` must have the shape \(2, n\), got \(1, 1\)"),
        ({"B": np.zeros((2, 0))}, "`B` must have at least one row and one column"),
        ({"Q": [[1.0, 1.0], [0.0, 1.0]]}, "`Q` must be symmetric"),
        ({"Q": [[1.0, 0.0], [0.0, -1.0]]}, "`Q` must be symmetric and positive semidefinite"),
        ({"R": [[0.0]]}, "`R` must be symmetric and positive definite"),
        ({"observation_matrix": [[1.0, 0.0, 0.0]]}, r"`observation_matrix` must have the shape \(n, 2\)"),
        ({"reward_scale": 0.0}, "`reward_scale` must be a positive"),
        ({"action_limit": np.inf}, "`action_limit` must be a positive"),
        ({"noise_std": -0.1}, "`noise_std` must be a finite number, zero or more"),
        ({"initial_scale": np.nan}, "`initial_scale` must be a finite number, zero or more"),
    ],
)
def test_linear_quadratic_parameters_are_checked(parameters: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LinearQuadraticEnv(**parameters)


def test_riccati_names_what_is_wrong() -> None:
    with pytest.raises(ValueError, match=r"`gamma` must be in \(0, 1\], got 1.5"):
        riccati_gain([[1.0]], [[1.0]], [[1.0]], [[1.0]], 1.5)
    with pytest.raises(ValueError, match="`P` does not converge"):
        riccati_gain([[2.0]], [[0.0]], [[1.0]], [[1.0]], 1.0)
    with pytest.raises(ValueError, match="`gamma` must be less than 1 with noise"):
        LinearQuadraticEnv(noise_std=0.1).optimal_return(np.zeros((1, 4)), 1.0)


@pytest.mark.parametrize(
    ("size", "observations", "actions", "message"),
    [
        (0, spaces.Box(-1.0, 1.0, (1,)), spaces.Box(-1.0, 1.0, (1,)), "`state_size` must be at least 1, got 0"),
        (1, spaces.Box(-1.0, 1.0, (1, 1)), spaces.Box(-1.0, 1.0, (1,)), "`observation_space` must be a one-dimensional"),
        (1, spaces.Box(-1.0, 1.0, (1,)), spaces.Discrete(2), "`action_space` must be a one-dimensional floating-point `Box`"),
        (1, spaces.Box(-1, 1, (1,)), spaces.Box(-1, 1, (1,), np.int64), "`action_space` must be a one-dimensional floating"),
    ],
)
def test_spaces_are_checked(size: int, observations: Any, actions: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TorchEnv.__init__(Spiral(), size, observations, actions)
