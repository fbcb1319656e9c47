"""Buffers of experience with derivatives: windows, normalisation, memory, pickling."""

import pickle
from typing import Any, NamedTuple

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from stable_baselines3.common.vec_env import DummyVecEnv, VecNormalize

from sb3_agpo.agpo.rollout_buffer import (
    DerivativeReplayBuffer,
    DerivativeSamples,
    DifferentiableRolloutBuffer,
    RolloutWindows,
    Transition,
    observation_scale,
    reward_scale,
)
from sb3_agpo.dynamics.interface import TransitionDerivatives, concatenate

NOBS, NU, NDX = 2, 1, 3
SHAPES = {
    "A": (NDX, NDX),
    "B": (NDX, NU),
    "C": (NOBS, NDX),
    "next_C": (NOBS, NDX),
    "O_x": (NOBS, NDX),
    "O_a": (NOBS, NU),
    "r_x": (NDX,),
    "r_a": (NU,),
    "next_state": (NDX,),
    "next_obs": (NOBS,),
    "reward": (),
}

seeds = st.integers(0, 2**31 - 1)


def random_derivatives(rng: np.random.Generator, n: int, p_invalid: float = 0.3) -> TransitionDerivatives:
    """Random numbers in the shape of ``n`` transitions."""
    fields = {name: rng.normal(size=(n, *shape)) for name, shape in SHAPES.items()}
    return TransitionDerivatives(**fields, terminated=rng.random(n) < 0.5, valid=rng.random(n) >= p_invalid)


def random_transition(
    rng: np.random.Generator, n_envs: int, p_end: float = 0.3, before: Transition | None = None, p_moved: float = 0.0
) -> Transition:
    """
    One step of all environments, as random numbers.

    :param p_end: chance that an episode ends
    :param before: the step before, whose successors this one starts from, unless the episode ended
    :param p_moved: chance that it does not, although the episode goes on
    """

    def normal(*shape: int) -> NDArray[np.float32]:
        return rng.normal(size=(n_envs, *shape)).astype(np.float32)

    done = rng.random(n_envs) < p_end
    terminated = done & (rng.random(n_envs) < 0.5)
    noise = normal(NU)
    noise[rng.random(n_envs) < 0.2] = np.nan  # the policy did not choose the action
    observations = normal(NOBS)
    if before is not None:
        goes_on = ~before.done & (rng.random(n_envs) >= p_moved)
        observations[goes_on] = before.next_observations[goes_on]
    return Transition(observations, normal(NOBS), normal(NU), noise, normal(), terminated, done)


class Filled(NamedTuple):
    """A buffer and what was put into it."""

    buffer: DifferentiableRolloutBuffer
    transitions: list[Transition]
    derivatives: TransitionDerivatives  # of the first steps
    n_ready: int  # steps that have derivatives


def fill(seed: int, n_envs: int, horizon: int, batches: list[int], n_pending: int = 0) -> Filled:
    """Fill a buffer with batches of so many steps, each followed by its derivatives, and some without them."""
    rng = np.random.default_rng(seed)
    buffer = DifferentiableRolloutBuffer(5, horizon, n_envs)
    transitions: list[Transition] = []
    parts = []
    for size in batches:
        for _ in range(size):
            last = transitions[-1] if transitions else None
            transitions.append(random_transition(rng, n_envs, before=last, p_moved=0.1))
            buffer.add(transitions[-1])
        assert buffer.n_pending == size
        parts.append(random_derivatives(rng, size * n_envs))
        returned = buffer.add_derivatives(parts[-1])
        assert all(a is b for a, b in zip(returned, transitions[-size:], strict=True))
        assert buffer.n_pending == 0
        # Enough transitions, and a whole window of every environment
        assert buffer.full == (len(transitions) * n_envs >= 5 and len(transitions) >= horizon)
    for _ in range(n_pending):
        buffer.add(random_transition(rng, n_envs))
    return Filled(buffer, transitions, concatenate(parts), len(transitions))


def obvious_windows(filled: Filled, n_envs: int, horizon: int) -> list[list[dict[str, Any] | None]]:
    """The windows one number at a time, each a list of ``horizon`` steps, None where nothing happened."""
    windows = []
    for start in range(0, filled.n_ready, horizon):
        for e in range(n_envs):
            window: list[dict[str, Any] | None] = []
            for t in range(start, start + horizon):
                if t >= filled.n_ready:
                    window.append(None)
                    continue
                step, row = filled.transitions[t], t * n_envs + e
                entry = {
                    name: getattr(filled.derivatives, name)[row] for name in ("A", "B", "O_x", "O_a", "r_x", "r_a", "valid")
                }
                for name in ("observations", "next_observations", "actions", "noise", "terminated"):
                    entry[name] = getattr(step, name)[e]
                entry["boundary"] = step.done[e] or t == start + horizon - 1 or t == filled.n_ready - 1
                if not entry["boundary"]:
                    moved = step.next_observations[e].tolist() != filled.transitions[t + 1].observations[e].tolist()
                    entry["boundary"] = moved
                entry["mask"] = 1.0
                window.append(entry)
            windows.append(window)
    return windows


def assert_equals_obvious_windows(windows: RolloutWindows, expected: list[list[dict[str, Any] | None]], horizon: int) -> None:
    """Every entry of every window, and zeros in the padding."""
    for name, field in windows._asdict().items():
        assert field.shape[:2] == (horizon, len(expected))
        assert field.dtype == (th.bool if name in ("terminated", "boundary", "valid") else th.float32)
        for w, window in enumerate(expected):
            for t, entry in enumerate(window):
                value = 0.0 if entry is None else np.asarray(entry[name]).astype(np.float32)
                np.testing.assert_array_equal(field[t, w].numpy().astype(np.float32), value, err_msg=f"{name} {t} {w}")


@settings(max_examples=60, deadline=None)
@given(seeds, st.integers(1, 4), st.integers(1, 7), st.lists(st.integers(1, 6), min_size=1, max_size=4), st.integers(0, 3))
def test_windows_equal_an_obvious_reference(seed: int, n_envs: int, horizon: int, batches: list[int], n_pending: int) -> None:
    filled = fill(seed, n_envs, horizon, batches, n_pending)
    assert_equals_obvious_windows(filled.buffer.windows(), obvious_windows(filled, n_envs, horizon), horizon)


def test_one_environment_gives_consecutive_stretches() -> None:
    buffer = DifferentiableRolloutBuffer(7, 3)
    rng = np.random.default_rng(0)
    for t in range(7):
        number = np.full((1, NOBS), t, dtype=np.float32)
        buffer.add(random_transition(rng, 1, p_end=0.0)._replace(observations=number, next_observations=number + 1))
    buffer.add_derivatives(random_derivatives(rng, 7))
    windows = buffer.windows()
    assert windows.observations[..., 0].T.tolist() == [[0.0, 1.0, 2.0], [3.0, 4.0, 5.0], [6.0, 0.0, 0.0]]
    assert windows.next_observations[..., 0].T.tolist() == [[1.0, 2.0, 3.0], [4.0, 5.0, 6.0], [7.0, 0.0, 0.0]]
    assert windows.mask.T.tolist() == [[1.0, 1.0, 1.0], [1.0, 1.0, 1.0], [1.0, 0.0, 0.0]]
    assert windows.boundary.T.tolist() == [[False, False, True], [False, False, True], [True, False, False]]
    assert not windows.valid[windows.mask == 0.0].any()  # padding never asks to be trusted


@pytest.mark.parametrize("rollout_size,n_envs,steps", [(5, 2, 3), (6, 2, 3), (1, 4, 2), (64, 1, 64)])
def test_full_counts_transitions_with_derivatives(rollout_size: int, n_envs: int, steps: int) -> None:
    rng = np.random.default_rng(0)
    buffer = DifferentiableRolloutBuffer(rollout_size, 2, n_envs)
    for _ in range(steps):
        assert not buffer.full
        buffer.add(random_transition(rng, n_envs))
        assert not buffer.full
        buffer.add_derivatives(random_derivatives(rng, n_envs))
    assert buffer.full


def test_first_steps_of_windows_need_no_derivatives_by_the_state() -> None:
    rng = np.random.default_rng(0)
    buffer = DifferentiableRolloutBuffer(8, 3, 2)
    # A batch is of four steps: a window of three and one of one
    for n_new, expected in ((3, [False, True, True]), (3, [False, False, True]), (3, [True, False, False])):
        for _ in range(n_new):
            buffer.add(random_transition(rng, 2))
        assert buffer.pending_inner().tolist() == expected
        buffer.add_derivatives(random_derivatives(rng, 2 * n_new))
    buffer.take_windows()
    buffer.add(random_transition(rng, 2))
    assert buffer.pending_inner().tolist() == [True]


@settings(max_examples=60, deadline=None)
@given(seeds, st.integers(1, 4), st.integers(1, 7), st.lists(st.integers(1, 30), min_size=1, max_size=4), st.integers(0, 3))
def test_windows_are_taken_batch_by_batch(seed: int, n_envs: int, horizon: int, batches: list[int], n_pending: int) -> None:
    """Each batch is what a buffer that holds nothing else gives; what is left over waits for the next steps."""
    filled = fill(seed, n_envs, horizon, batches, n_pending)
    buffer, steps = filled.buffer, filled.buffer.batch_steps
    rows = steps * n_envs
    for start in range(0, filled.n_ready - steps + 1, steps):
        assert buffer.full
        transitions = filled.transitions[start : start + steps]
        derivatives = TransitionDerivatives(*(f[start * n_envs : start * n_envs + rows] for f in filled.derivatives))
        batch = Filled(buffer, transitions, derivatives, steps)
        assert_equals_obvious_windows(buffer.take_windows(), obvious_windows(batch, n_envs, horizon), horizon)
    assert not buffer.full and buffer.n_pending == n_pending
    with pytest.raises(ValueError, match=f"a batch is {steps} steps with derivatives, there are {filled.n_ready % steps}"):
        buffer.take_windows()


def test_chain_ends_where_the_environment_was_moved() -> None:
    rng = np.random.default_rng(0)
    buffer = DifferentiableRolloutBuffer(12, 4, n_envs=3)
    transitions = [random_transition(rng, 3, p_end=0.0)]
    for _ in range(3):
        transitions.append(random_transition(rng, 3, p_end=0.0, before=transitions[-1]))
    transitions[2].observations[1, 0] += 1e-3
    for transition in transitions:
        buffer.add(transition)
    buffer.add_derivatives(random_derivatives(rng, 12))
    assert buffer.windows().boundary.T.tolist() == [[False] * 3 + [True], [False, True, False, True], [False] * 3 + [True]]


def test_reset_forgets_everything() -> None:
    buffer = fill(1, 2, 3, [4], n_pending=2).buffer
    buffer.reset()
    assert buffer.n_pending == 0 and not buffer.full
    with pytest.raises(ValueError, match="no steps with derivatives"):
        buffer.windows()


def test_windows_own_their_memory() -> None:
    buffer = fill(1, 1, 4, [4]).buffer
    for field in buffer.windows():
        field.fill_(1)
    assert_equals_obvious_windows(buffer.windows(), obvious_windows(fill(1, 1, 4, [4]), 1, 4), 4)


def test_wrong_number_of_derivatives_is_refused() -> None:
    buffer = fill(1, 2, 3, [2], n_pending=3).buffer
    with pytest.raises(ValueError, match="expected the derivatives of 6 transitions, got 4"):
        buffer.add_derivatives(random_derivatives(np.random.default_rng(0), 4))


@pytest.mark.parametrize("name", ["rollout_size", "horizon", "n_envs"])
def test_rollout_sizes_are_checked(name: str) -> None:
    with pytest.raises(ValueError, match=f"`{name}` must be at least 1, got 0"):
        DifferentiableRolloutBuffer(**{"rollout_size": 1, "horizon": 1, name: 0})


def test_rollout_buffer_pickles() -> None:
    for buffer in (DifferentiableRolloutBuffer(5, 2), fill(3, 2, 3, [4, 2], n_pending=1).buffer):
        copy: DifferentiableRolloutBuffer = pickle.loads(pickle.dumps(buffer))
        assert (copy.n_pending, copy.full, copy.horizon) == (buffer.n_pending, buffer.full, buffer.horizon)
        if buffer.full:
            for a, b in zip(copy.windows(), buffer.windows(), strict=True):
                np.testing.assert_array_equal(a.numpy(), b.numpy())


# --- VecNormalize


class Nothing(gym.Env[Any, Any]):
    """An environment that only has spaces."""

    observation_space = spaces.Box(-np.inf, np.inf, (NOBS,))
    action_space = spaces.Box(-1.0, 1.0, (NU,))


def make_normalization(**kwargs: Any) -> VecNormalize:
    """Statistics far from the default ones, and bounds that clip a good part of standard normal numbers."""
    normalization = VecNormalize(DummyVecEnv([Nothing]), clip_obs=1.0, clip_reward=0.6, **kwargs)
    if normalization.norm_obs:
        normalization.obs_rms.mean, normalization.obs_rms.var = np.array([0.5, -1.0]), np.array([0.25, 4.0])
    normalization.ret_rms.var = np.float64(2.0)
    return normalization


EVERY_NORMALIZATION = pytest.mark.parametrize(
    "kwargs", [{}, {"norm_obs": False}, {"norm_reward": False}, {"norm_obs": False, "norm_reward": False}]
)
STEP = 1e-2


def away_from_clipping(normalization: VecNormalize, observations: NDArray[Any]) -> NDArray[np.bool_]:
    """Where differences of the normalised observation do not straddle its kink."""
    if not normalization.norm_obs:
        return np.ones(observations.shape, dtype=np.bool_)
    rms = normalization.obs_rms
    return np.abs(np.abs((observations - rms.mean) / np.sqrt(rms.var)) - normalization.clip_obs) > 20 * STEP


def observation_derivative(normalization: VecNormalize, observations: NDArray[Any], raw: NDArray[Any]) -> NDArray[Any]:
    """Brute-force derivative of the normalised observation along the columns of ``raw``, ``(..., nobs, k)``."""
    columns = []
    for column in np.moveaxis(raw, -1, 0):
        size = STEP / max(1.0, np.abs(column).max())
        above, below = (normalization.normalize_obs(observations + sign * size * column) for sign in (1.0, -1.0))
        columns.append((above - below) / (2.0 * size))
    return np.stack(columns, axis=-1)


def assert_derivatives_close(actual: th.Tensor, expected: NDArray[Any], where: NDArray[np.bool_]) -> None:
    """Comparison with differences of float32 numbers."""
    np.testing.assert_allclose(actual.numpy()[where], expected[where], rtol=1e-3, atol=1e-3)


@EVERY_NORMALIZATION
def test_windows_are_normalised_with_current_statistics(kwargs: dict[str, bool]) -> None:
    n_envs, n_steps = 3, 20
    filled = fill(4, n_envs, n_steps, [n_steps])
    normalization = make_normalization(**kwargs)
    filled.buffer.windows(normalization)
    if normalization.norm_obs:
        normalization.obs_rms.mean = np.array([-0.5, 1.0])  # as training goes on
    raw, windows = filled.buffer.windows(), filled.buffer.windows(normalization)
    for name in ("observations", "next_observations"):
        expected = normalization.normalize_obs(getattr(raw, name).numpy())
        np.testing.assert_allclose(getattr(windows, name).numpy(), expected, rtol=1e-6)
    next_obs = raw.next_observations.numpy().astype(np.float64)
    where = away_from_clipping(normalization, next_obs)
    assert where.mean() > 0.5
    for name in ("O_x", "O_a"):
        expected = observation_derivative(normalization, next_obs, getattr(raw, name).numpy())
        assert_derivatives_close(getattr(windows, name), expected, where)
    rewards = np.stack([transition.rewards for transition in filled.transitions]).astype(np.float64)
    for name in ("r_x", "r_a"):
        expected = reward_derivative(normalization, rewards, getattr(raw, name).numpy())
        np.testing.assert_allclose(getattr(windows, name).numpy(), expected, rtol=1e-3, atol=1e-3)
    unchanged = set(RolloutWindows._fields) - {"observations", "next_observations", "O_x", "O_a", "r_x", "r_a"}
    for name in unchanged:
        np.testing.assert_array_equal(getattr(windows, name).numpy(), getattr(raw, name).numpy())


def reward_derivative(normalization: VecNormalize, rewards: NDArray[Any], raw: NDArray[Any]) -> NDArray[Any]:
    """Brute-force derivative of the normalised reward along the entries of ``raw``, ``(..., k)``."""
    size = 1e-3
    above, below = (normalization.normalize_reward(rewards + sign * size) for sign in (1.0, -1.0))
    return ((above - below) / (2.0 * size))[..., None] * raw


def test_scales_are_zero_where_values_are_clipped() -> None:
    normalization = make_normalization()
    scale = observation_scale(np.array([[0.5, 1.5], [1.25, -9.0]], dtype=np.float32), normalization)
    np.testing.assert_allclose(scale, [[2.0, 0.0], [0.0, 0.0]], rtol=1e-6)
    np.testing.assert_allclose(reward_scale(np.array([0.5, -1.0, 2.0]), normalization), [0.5**0.5, 0.0, 0.0], atol=1e-6)


def test_scales_without_normalisation() -> None:
    off = make_normalization(norm_obs=False, norm_reward=False)
    for normalization in (None, off):
        assert observation_scale(np.ones((2, NOBS), dtype=np.float32), normalization) == 1.0
        assert reward_scale(np.ones(2, dtype=np.float32), normalization) == 1.0


@EVERY_NORMALIZATION
def test_samples_are_normalised_with_current_statistics(kwargs: dict[str, bool]) -> None:
    buffer, _ = filled_replay_buffer(5, 40)
    normalization = make_normalization(**kwargs)
    np.random.seed(0)
    raw = buffer.sample(64)
    np.random.seed(0)
    batch = buffer.sample(64, normalization)
    for name, jacobians in (("observations", ("C",)), ("next_observations", ("O_x", "O_a"))):
        obs = getattr(raw, name).numpy().astype(np.float64)
        np.testing.assert_allclose(getattr(batch, name).numpy(), normalization.normalize_obs(obs), rtol=1e-6)
        where = away_from_clipping(normalization, obs)
        for jacobian in jacobians:
            expected = observation_derivative(normalization, obs, getattr(raw, jacobian).numpy())
            assert_derivatives_close(getattr(batch, jacobian), expected, where)
    rewards = raw.rewards.numpy().astype(np.float64)
    np.testing.assert_allclose(batch.rewards.numpy(), normalization.normalize_reward(rewards), rtol=1e-6)
    for name in ("r_x", "r_a"):
        expected = reward_derivative(normalization, rewards, getattr(raw, name).numpy())
        np.testing.assert_allclose(getattr(batch, name).numpy(), expected, rtol=1e-3, atol=1e-3)
    assert th.equal(batch.actions, raw.actions) and th.equal(batch.terminated, raw.terminated)
    assert all(field.dtype == th.float32 for field in batch)
    np.random.seed(0)
    again = buffer.sample(64)  # normalisation must not have touched what is stored
    assert all(th.equal(a, b) for a, b in zip(again, raw, strict=True))


def test_matching_with_a_normalised_critic_gives_the_gradient_by_the_state() -> None:
    """C^T dQ/do of a sample is dQ/dx for Q of the normalised observation of a linear observation o = C x + c."""
    buffer, _ = filled_replay_buffer(6, 30)
    normalization = make_normalization()
    np.random.seed(0)
    raw = buffer.sample(32)
    np.random.seed(0)
    batch = buffer.sample(32, normalization)
    obs = raw.observations.numpy().astype(np.float64)
    where = away_from_clipping(normalization, obs).all(axis=1)

    def q(observations: NDArray[Any]) -> NDArray[Any]:
        return np.sin(normalization.normalize_obs(observations).astype(np.float64) @ [1.0, 2.0])

    q_o = np.cos(batch.observations.numpy() @ [1.0, 2.0])[:, None] * np.array([1.0, 2.0])
    q_x = np.einsum("nox,no->nx", batch.C.numpy(), q_o)
    for i in range(NDX):
        direction = raw.C.numpy()[..., i]
        expected = (q(obs + STEP * direction) - q(obs - STEP * direction)) / (2.0 * STEP)
        np.testing.assert_allclose(q_x[where, i], expected[where], rtol=0.02, atol=0.02)


# --- replay of derivatives


def filled_replay_buffer(
    seed: int, n_steps: int, n_envs: int = 2, capacity: int = 1000
) -> tuple[DerivativeReplayBuffer, list[dict[str, Any]]]:
    """A buffer, and all valid transitions that were put into it, oldest first."""
    rng = np.random.default_rng(seed)
    buffer = DerivativeReplayBuffer(capacity, 10**9)
    stored: list[dict[str, Any]] = []
    while n_steps > 0:
        size = int(rng.integers(1, n_steps + 1))
        stored += add_batch(buffer, rng, size, n_envs)
        n_steps -= size
    return buffer, stored


def add_batch(buffer: DerivativeReplayBuffer, rng: np.random.Generator, n_steps: int, n_envs: int) -> list[dict[str, Any]]:
    """Add random steps; returns the valid ones."""
    transitions = [random_transition(rng, n_envs) for _ in range(n_steps)]
    derivatives = random_derivatives(rng, n_steps * n_envs)
    buffer.add(transitions, derivatives)
    stored = []
    for row in np.flatnonzero(derivatives.valid):
        step, e = transitions[row // n_envs], row % n_envs
        entry = {name: getattr(derivatives, name)[row].copy() for name in ("C", "O_x", "O_a", "r_x", "r_a")}
        names = ("observations", "actions", "next_observations", "rewards", "terminated")
        stored.append(entry | {name: np.array(getattr(step, name)[e]) for name in names})
    return stored


def contents(buffer: DerivativeReplayBuffer) -> DerivativeSamples:
    """Everything in the buffer, oldest first."""
    start = buffer.position if buffer.size == buffer.capacity else 0
    order = (start + np.arange(buffer.size)) % buffer.capacity
    return DerivativeSamples(*(th.as_tensor(buffer._fields[name][order]) for name in DerivativeSamples._fields))


def assert_contents(buffer: DerivativeReplayBuffer, stored: list[dict[str, Any]]) -> None:
    """The newest of ``stored`` that fit, in order."""
    expected = stored[-buffer.capacity :]
    assert buffer.size == len(expected)
    if not expected:  # nothing may be reserved yet
        return
    for name, field in contents(buffer)._asdict().items():
        assert field.dtype == th.float32
        for actual, entry in zip(field.numpy(), expected, strict=True):
            np.testing.assert_array_equal(actual, np.asarray(entry[name], dtype=np.float32))


@settings(max_examples=40, deadline=None)
@given(seeds, st.integers(1, 12), st.integers(1, 9), st.integers(1, 3))
def test_ring_holds_the_newest_valid_transitions(seed: int, n_steps: int, capacity: int, n_envs: int) -> None:
    buffer, stored = filled_replay_buffer(seed, n_steps, n_envs, capacity)
    assert buffer.capacity == capacity
    assert_contents(buffer, stored)


def test_batches_larger_than_the_capacity() -> None:
    buffer, rng = DerivativeReplayBuffer(4, 10**9), np.random.default_rng(0)
    stored: list[dict[str, Any]] = []
    for _ in range(5):
        stored += add_batch(buffer, rng, 9, 2)
        assert_contents(buffer, stored)


@pytest.mark.parametrize("name", ["observations", "next_observations", "actions", "rewards", "C", "O_x", "O_a", "r_x", "r_a"])
@pytest.mark.parametrize("value", [np.nan, np.inf, -1e39])
def test_what_is_not_finite_in_float32_is_never_stored(name: str, value: float) -> None:
    """-1e39 is finite in the simulator's float64 and infinite in the network's float32."""
    rng = np.random.default_rng(0)
    transition, derivatives = random_transition(rng, 3), random_derivatives(rng, 3, p_invalid=0.0)
    with np.errstate(over="ignore"):
        getattr(transition if name in Transition._fields else derivatives, name)[1] = value
    buffer = DerivativeReplayBuffer(10, 10**9)
    buffer.add([transition], derivatives)
    assert buffer.size == 2
    assert all(field.isfinite().all() for field in buffer.sample(50))


def test_nothing_valid_stores_nothing() -> None:
    rng = np.random.default_rng(0)
    buffer = DerivativeReplayBuffer(10, 10**9)
    for p_invalid, size in ((1.0, 0), (0.0, 3), (1.0, 3)):
        buffer.add([random_transition(rng, 3)], random_derivatives(rng, 3, p_invalid))
        assert buffer.size == size


def test_stored_transitions_are_copies() -> None:
    rng = np.random.default_rng(0)
    transition, derivatives = random_transition(rng, 3), random_derivatives(rng, 3, p_invalid=0.0)
    buffer = DerivativeReplayBuffer(10, 10**9)
    buffer.add([transition], derivatives)
    before = contents(buffer)
    before = DerivativeSamples(*(field.clone() for field in before))
    for array in (*transition, *derivatives):
        array[...] = 1
    assert all(th.equal(a, b) for a, b in zip(contents(buffer), before, strict=True))
    for field in buffer.sample(10):
        field.fill_(7.0)
    assert all(th.equal(a, b) for a, b in zip(contents(buffer), before, strict=True))


def test_samples_cover_everything_evenly_and_follow_the_global_generator() -> None:
    buffer, stored = filled_replay_buffer(7, 8)
    np.random.seed(3)
    first = buffer.sample(4000).rewards
    np.random.seed(3)
    assert th.equal(first, buffer.sample(4000).rewards)
    values, counts = np.unique(first.numpy(), return_counts=True)
    assert values.tolist() == sorted(float(np.float32(entry["rewards"])) for entry in stored)
    np.testing.assert_allclose(counts / 4000, 1.0 / len(stored), atol=5.0 * (1.0 / len(stored) / 4000) ** 0.5)


def test_unused_memory_is_never_sampled() -> None:
    buffer, stored = filled_replay_buffer(8, 3, capacity=500)
    assert buffer.size == len(stored) < 10
    assert (buffer.sample(1000).observations != 0.0).all()


def test_empty_buffer_says_so() -> None:
    buffer = DerivativeReplayBuffer(10, 10**9)
    with pytest.raises(ValueError, match="no transitions with valid derivatives to sample from"):
        buffer.sample(1)


@pytest.mark.parametrize("name", ["capacity", "memory_bytes"])
def test_replay_bounds_are_checked(name: str) -> None:
    with pytest.raises(ValueError, match=f"`{name}` must be at least 1, got 0"):
        DerivativeReplayBuffer(**{"capacity": 1, "memory_bytes": 1, name: 0})


# Sizes of InvertedPendulum, HalfCheetah and Humanoid: nobs, nu, ndx
@pytest.mark.parametrize("nobs,nu,ndx", [(4, 1, 4), (17, 6, 18), (348, 17, 46)])
@pytest.mark.parametrize("memory", [10**6, 500_000_000])
def test_memory_stays_below_the_budget(nobs: int, nu: int, ndx: int, memory: int) -> None:
    def zeros(*shape: int) -> NDArray[Any]:
        return np.zeros((1, *shape))

    derivatives = TransitionDerivatives(
        A=zeros(ndx, ndx),
        B=zeros(ndx, nu),
        C=zeros(nobs, ndx),
        next_C=zeros(nobs, ndx),
        O_x=zeros(nobs, ndx),
        O_a=zeros(nobs, nu),
        r_x=zeros(ndx),
        r_a=zeros(nu),
        next_state=zeros(ndx),
        next_obs=zeros(nobs),
        reward=zeros(),
        terminated=np.zeros(1, dtype=np.bool_),
        valid=np.ones(1, dtype=np.bool_),
    )
    flag = np.zeros(1, dtype=np.bool_)
    transition = Transition(zeros(nobs), zeros(nobs), zeros(nu), zeros(nu), zeros(), flag, flag)
    buffer = DerivativeReplayBuffer(10_000, memory)
    buffer.add([transition], derivatives)
    each = DerivativeReplayBuffer.bytes_per_transition(nobs, nu, ndx)
    allocated = sum(field.nbytes for field in buffer._fields.values())
    assert allocated == buffer.capacity * each <= memory
    assert buffer.capacity == 10_000 or allocated + each > memory  # and the budget is used


def test_replay_buffer_pickles() -> None:
    empty: DerivativeReplayBuffer = pickle.loads(pickle.dumps(DerivativeReplayBuffer(10, 10**9)))
    assert empty.size == 0 and empty.capacity == 10
    for n_steps in (3, 60):  # partly filled, and wrapped around
        buffer, stored = filled_replay_buffer(9, n_steps, capacity=50)
        copy: DerivativeReplayBuffer = pickle.loads(pickle.dumps(buffer))
        assert_contents(copy, stored)
        for both in (buffer, copy):  # and they go on in the same way
            add_batch(both, np.random.default_rng(0), 5, 2)
        assert copy.position == buffer.position
        assert all(th.equal(a, b) for a, b in zip(contents(copy), contents(buffer), strict=True))


def test_pickle_leaves_unused_memory_out() -> None:
    buffer, _ = filled_replay_buffer(10, 3, capacity=100_000)
    assert len(pickle.dumps(buffer)) < 5_000
    assert sum(field.nbytes for field in buffer._fields.values()) > 5_000_000
