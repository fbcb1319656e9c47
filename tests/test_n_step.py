"""n-step returns that end where replayed actions leave the policy."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from hypothesis import given, settings
from hypothesis import strategies as st
from small_models import small_model
from stable_baselines3.common.buffers import NStepReplayBuffer
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.type_aliases import ReplayBufferSamples
from stable_baselines3.common.vec_env import VecNormalize

from sb3_agpo import AGPO
from sb3_agpo.agpo.n_step import sample_n_step
from sb3_agpo.agpo.squashed_gaussian import action_distance, infer_noise, squashed_sample

#: a policy for observations of two numbers and actions of one
MODEL = small_model("MountainCarContinuous-v0")


def filled_buffer(size: int, n_envs: int, n_steps: int, n_added: int, seed: int) -> NStepReplayBuffer:
    """A buffer with random transitions, of which some end an episode by a failure or by a time limit."""
    rng = np.random.default_rng(seed)
    box, actions = MODEL.observation_space, MODEL.action_space
    assert isinstance(box, spaces.Box)
    buffer = NStepReplayBuffer(size * n_envs, box, actions, n_envs=n_envs, n_steps=n_steps, gamma=0.9)
    obs = rng.normal(size=(n_envs, 2))
    for _ in range(n_added):
        dones = rng.random(n_envs) < 0.3
        infos: list[dict[str, Any]] = [{"TimeLimit.truncated": bool(rng.random() < 0.5)} if done else {} for done in dones]
        next_obs = rng.normal(size=(n_envs, 2))
        buffer.add(obs, next_obs, rng.uniform(-1, 1, (n_envs, 1)), rng.normal(size=n_envs), dones, infos)
        obs = np.where(dones[:, None], rng.normal(size=(n_envs, 2)), next_obs)
    return buffer


def sample_both(buffer: NStepReplayBuffer, distance: float) -> tuple[ReplayBufferSamples, ReplayBufferSamples, float]:
    """SB3's sample and ours, with the same random numbers."""
    np.random.seed(0)
    theirs = buffer.sample(64)
    np.random.seed(0)
    ours, length = sample_n_step(buffer, 64, MODEL.actor, distance, None)
    return theirs, ours, length


@settings(deadline=None, max_examples=40)
@given(
    st.integers(3, 12), st.integers(1, 3), st.integers(2, 4), st.integers(1, 30), st.integers(0, 1000)
)  # some buffers are full, some are not
def test_without_cuts_it_is_the_replay_buffer_of_sb3(size: int, n_envs: int, n_steps: int, n_added: int, seed: int) -> None:
    theirs, ours, length = sample_both(filled_buffer(size, n_envs, n_steps, n_added, seed), math.inf)
    assert 1.0 <= length <= n_steps
    for expected, found in zip(theirs, ours, strict=True):
        assert expected.dtype == found.dtype and expected.shape == found.shape
        th.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


def slow_return(buffer: NStepReplayBuffer, first: int, env: int, distance: float) -> tuple[float, int]:
    """Return and last step of one trace, in the words of the docstring."""
    total, step = 0.0, first
    for k in range(buffer.n_steps):
        total += buffer.gamma**k * float(buffer.rewards[step, env])
        if buffer.dones[step, env] or step == (buffer.pos - 1) % buffer.buffer_size or k == buffer.n_steps - 1:
            break
        following = (step + 1) % buffer.buffer_size
        with th.no_grad():
            mean, log_std, _ = MODEL.actor.get_action_dist_params(th.as_tensor(buffer.observations[None, following, env]))
        noise = (np.arctanh(buffer.actions[following, env].astype(float)) - mean.numpy()) / log_std.exp().numpy()
        if np.sqrt((noise**2).mean()) > distance:
            break
        step = following
    return total, step


@settings(deadline=None, max_examples=25)
@given(st.integers(3, 12), st.integers(1, 2), st.integers(1, 30), st.sampled_from([0.1, 0.5, 1.0]), st.integers(0, 1000))
def test_returns_end_before_actions_that_the_policy_would_not_take(
    size: int, n_envs: int, n_added: int, distance: float, seed: int
) -> None:
    buffer = filled_buffer(size, n_envs, 3, n_added, seed)
    _, ours, _ = sample_both(buffer, distance)
    np.random.seed(0)
    first, envs = np.random.randint(0, buffer.size(), 64), np.random.randint(0, n_envs, 64)
    for i, (step, env) in enumerate(zip(first, envs, strict=True)):
        total, last = slow_return(buffer, int(step), int(env), distance)
        n_steps = (last - step) % buffer.buffer_size + 1
        assert ours.rewards[i].item() == pytest.approx(total, abs=1e-5)
        assert ours.discounts is not None and ours.discounts[i].item() == pytest.approx(0.9**n_steps, abs=1e-6)
        np.testing.assert_array_equal(ours.next_observations[i].numpy(), buffer.next_observations[last, env])
        assert ours.dones[i].item() == buffer.dones[last, env] * (1.0 - buffer.timeouts[last, env])


def test_distance_of_the_policys_own_actions_is_their_noise() -> None:
    th.manual_seed(0)
    mean, log_std, noise = 0.3 * th.randn(100, 6), 0.3 * th.randn(100, 6) - 1.0, th.randn(100, 6)
    actions, _ = squashed_sample(mean, log_std, noise)
    expected = noise.square().mean(1).sqrt()
    th.testing.assert_close(action_distance(actions, mean, log_std), expected, rtol=1e-3, atol=1e-3)
    th.testing.assert_close(infer_noise(actions, mean, log_std), noise, rtol=1e-2, atol=1e-2)


def test_saturated_actions_are_near_a_saturated_policy() -> None:
    """Beyond single precision, an action does not tell how far the policy went."""
    actions, log_std = th.tensor([[1.0], [1.0], [-1.0]]), th.full((3, 1), -2.0)
    distances = action_distance(actions, th.tensor([[20.0], [0.0], [20.0]]), log_std)
    assert distances[0] < 0.1 and distances[1] > 40.0 and distances[2] > 80.0
    # However sure the policy is
    assert action_distance(actions[:1], th.tensor([[8.0]]), th.tensor([[-7.0]])) == 0.0


def test_traces_grow_when_the_policy_is_left_alone() -> None:
    """Uniform actions of the start are cut, those that the policy of now took are not."""
    # One dimension: noise is beyond three standard deviations in three actions of a thousand
    model = small_model("Pendulum-v1", learning_starts=200, learning_rate=0.0, critic_learning_rate=1e-3, n_steps=3)
    model.policy.actor.log_std.bias.data.fill_(-3.0)  # type: ignore[union-attr]
    model.learn(200)
    assert isinstance(model.replay_buffer, NStepReplayBuffer)
    _, random_length = sample_n_step(model.replay_buffer, 1000, model.actor, model.trace_distance, None)
    model.replay_buffer.reset()
    model.learn(200, reset_num_timesteps=False)
    _, own_length = sample_n_step(model.replay_buffer, 1000, model.actor, model.trace_distance, None)
    assert random_length < 1.5 and own_length > 2.9


@pytest.mark.parametrize("normalise", [False, True])
def test_length_is_logged_where_traces_are_cut(normalise: bool) -> None:
    def lengths(**kwargs: Any) -> float | None:
        env = make_vec_env("Pendulum-v1", 2)
        model = small_model(VecNormalize(env) if normalise else env, **kwargs).learn(60, log_interval=1000)
        return model.logger.name_to_value.get("train/trace_length")

    logged = lengths()
    assert logged is not None and 1.0 < logged < 3.0
    assert lengths(trace_distance=math.inf) is None
    assert lengths(n_steps=1) is None


@pytest.mark.parametrize("reset", [True, False])
def test_returns_do_not_cross_a_reset_of_the_environment(reset: bool) -> None:
    """``learn`` begins new episodes unless it is told to go on; the old ones did not end by themselves, though."""
    model = small_model("Pendulum-v1", learning_starts=1000, n_steps=3).learn(30)
    model.learn(30, reset_num_timesteps=reset)
    buffer = model.replay_buffer
    assert isinstance(buffer, NStepReplayBuffer) and buffer.pos == 60
    assert buffer.dones[:60, 0].tolist() == buffer.timeouts[:60, 0].tolist()
    assert np.flatnonzero(buffer.dones[:60, 0]).tolist() == ([29] if reset else [])
    np.random.seed(0)
    data, _ = sample_n_step(buffer, 500, model.actor, math.inf, None)
    assert data.discounts is not None and not data.dones.any()
    lengths = {round(math.log(discount, model.gamma)) for discount in data.discounts.flatten().tolist()}
    assert lengths == {1, 2, 3}  # shorter ones at the end of the buffer, in any case


def test_returns_do_not_lead_from_a_loaded_buffer_into_other_episodes(tmp_path: Path) -> None:
    """Unless the environments stand where its newest transitions led to."""
    model = small_model(make_vec_env("Pendulum-v1", 2, seed=0), learning_starts=1000, n_steps=3).learn(40)
    model.save_replay_buffer(tmp_path / "buffer")
    other = small_model(make_vec_env("Pendulum-v1", 2, seed=1), learning_starts=1000, n_steps=3).learn(10)
    for trained, ends in ((model, False), (other, True)):
        trained.load_replay_buffer(tmp_path / "buffer")
        trained.learn(10, reset_num_timesteps=False)  # where it shows
        buffer = trained.replay_buffer
        assert isinstance(buffer, NStepReplayBuffer) and buffer.pos == 25
        assert (buffer.dones[19] == ends).all() and (buffer.timeouts[19] == ends).all()
        assert not buffer.dones[:19].any() and not buffer.dones[20:25].any()


def test_infinite_distance_learns_as_with_the_replay_buffer_of_sb3(monkeypatch: pytest.MonkeyPatch) -> None:
    def weights(**kwargs: Any) -> list[th.Tensor]:
        # Fast enough for the policy to leave some of its own actions behind
        model = small_model("Pendulum-v1", learning_rate=1e-2, **kwargs)
        return [each.detach() for each in model.learn(60).policy.parameters()]

    plain = weights(trace_distance=math.inf)
    cut = weights(trace_distance=3.0)
    monkeypatch.setattr(AGPO, "_sample_transitions", lambda self, n: self.replay_buffer.sample(n, env=self._vec_normalize_env))
    direct = weights()
    assert all(th.equal(a, b) for a, b in zip(plain, direct, strict=True))
    assert not all(th.equal(a, b) for a, b in zip(cut, direct, strict=True))
