"""Windows that a real run cuts, against a log of the environments: ends of episodes, restarts, all sizes and frequencies."""

from __future__ import annotations

from typing import Any, NamedTuple

import gymnasium as gym
import numpy as np
import pytest
from gymnasium import spaces
from hypothesis import event, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from small_models import SMALL
from stable_baselines3.common.vec_env import DummyVecEnv

from sb3_agpo import AGPO
from sb3_agpo.agpo.rollout_buffer import RolloutWindows
from sb3_agpo.dynamics.interface import TransitionDerivatives

#: counted per environment, so that no two steps of a run have equal numbers
APART = 1000


class Step(NamedTuple):
    """One step as it happened."""

    before: float  # number of the state
    after: float
    action: float
    terminated: bool
    truncated: bool


class CountingEnv(gym.Env[Any, Any]):
    """
    Numbers its states, logs its steps, ends episodes by a plan, and offers derivatives that tell the step they belong to.

    :param index: of the environment
    :param plan: end of each episode: number of steps, and whether by a time limit; begun again when it is used up
    """

    state_size = tangent_size = 1
    deferred = True

    def __init__(self, index: int, plan: list[tuple[int, bool]]) -> None:
        self.observation_space = spaces.Box(-np.inf, np.inf, (1,), np.float32)
        self.action_space = spaces.Box(-1.0, 1.0, (1,), np.float32)
        self.number, self.plan = float(index * APART), plan
        self.episode, self.left = -1, 0
        self.log: list[Step] = []

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        self.episode += 1
        self.left = self.plan[self.episode % len(self.plan)][0]
        self.number += 1  # a state of its own
        return np.array([self.number], np.float32), {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        before, self.number, self.left = self.number, self.number + 1, self.left - 1
        limit = self.plan[self.episode % len(self.plan)][1]
        ended = self.left == 0
        self.log.append(Step(before, self.number, float(action[0]), ended and not limit, ended and limit))
        return np.array([self.number], np.float32), 0.0, ended and not limit, ended and limit, {}

    def get_state(self) -> NDArray[np.float64]:
        """The number of the state."""
        return np.array([self.number])

    def differentiate(self, states: NDArray[np.float64], actions: NDArray[Any]) -> TransitionDerivatives:
        """Derivatives whose entries are the number of the state that they were taken at."""
        n, numbers = len(states), states.reshape(-1, 1, 1)
        no = np.zeros(n, dtype=np.bool_)
        return TransitionDerivatives(
            A=numbers,
            B=-numbers,
            C=np.ones((n, 1, 1)),
            next_C=np.ones((n, 1, 1)),
            O_x=numbers,
            O_a=-numbers,
            r_x=states.copy(),
            r_a=-states,
            next_state=states + 1,
            next_obs=states + 1,
            reward=np.zeros(n),
            terminated=no,
            valid=~no,
        )


class WatchedAGPO(AGPO):
    """Remembers every batch of windows that it learns from."""

    batches: list[RolloutWindows]

    def _update_policy_from_windows(self, windows: RolloutWindows) -> None:
        self.batches.append(windows)
        super()._update_policy_from_windows(windows)


def check_batch(windows: RolloutWindows, logs: list[list[Step]], horizon: int, start: int) -> list[int]:
    """
    Compare a batch of windows with the log, step by step.

    :param windows: the batch
    :param logs: steps of each environment
    :param horizon: steps of a window
    :param start: index of the first step of the batch in the logs
    :return: index of the first step after it in each log
    """
    n_envs, n_windows = len(logs), windows.mask.shape[1]
    per_env = n_windows // n_envs
    assert n_windows == per_env * n_envs
    lengths = windows.mask.sum(0).int().tolist()
    ends = [start + sum(lengths[e::n_envs]) for e in range(n_envs)]
    for w in range(n_windows):
        e, number = w % n_envs, w // n_envs
        first = start + number * horizon
        assert lengths[w] == min(horizon, ends[e] - first) > 0
        for t in range(lengths[w]):
            step = logs[e][first + t]
            ended = step.terminated or step.truncated
            seen = [
                float(getattr(windows, name)[t, w].flatten()[0]) for name in ("observations", "next_observations", "actions")
            ]
            assert seen == pytest.approx([step.before, step.after, step.action], abs=1e-6)
            assert bool(windows.terminated[t, w]) == step.terminated
            assert bool(windows.boundary[t, w]) == (ended or t == horizon - 1 or first + t == ends[e] - 1)
            assert bool(windows.valid[t, w]) == (not step.terminated)
            if not step.terminated:
                assert float(windows.A[t, w]) == float(windows.O_x[t, w]) == float(windows.r_x[t, w]) == step.before
                assert float(windows.B[t, w]) == float(windows.O_a[t, w]) == float(windows.r_a[t, w]) == -step.before
    return ends


episodes = st.lists(st.tuples(st.integers(1, 9), st.booleans()), min_size=1, max_size=4)


@settings(max_examples=30, deadline=None)
@given(
    plans=st.lists(episodes, min_size=1, max_size=3),
    horizon=st.integers(1, 6),
    rollout_size=st.integers(1, 20),
    train_freq=st.sampled_from([1, 2, 5, 30]),
    learning_starts=st.sampled_from([0, 7]),
    parts=st.lists(st.tuples(st.integers(1, 40), st.booleans()), min_size=1, max_size=3),
)
def test_windows_of_a_run_equal_its_log(
    plans: list[list[tuple[int, bool]]],
    horizon: int,
    rollout_size: int,
    train_freq: int,
    learning_starts: int,
    parts: list[tuple[int, bool]],
) -> None:
    envs = [CountingEnv(index, plan) for index, plan in enumerate(plans)]
    options = {"horizon": horizon, "rollout_size": rollout_size, "train_freq": train_freq, "learning_starts": learning_starts}
    model = WatchedAGPO(
        "MlpPolicy",
        DummyVecEnv([lambda env=env: env for env in envs]),  # type: ignore[misc]
        policy_kwargs={"net_arch": [2]},
        rollout_epochs=1,
        **{**SMALL, **options},
    )
    model.batches = []
    logs, next_step = [env.log for env in envs], 0
    per_batch = -(-rollout_size // len(envs))
    for steps, restart in parts:
        if restart:  # what is not a batch yet is forgotten
            next_step = len(logs[0])
        model.learn(steps, reset_num_timesteps=restart)
        for batch in model.batches:
            first = next(i for i, step in enumerate(logs[0]) if step.before == float(batch.observations[0, 0, 0]))
            # No step is left out, but for the random ones at the beginning
            assert first == next_step or (first > next_step and learning_starts > 0)
            ends = check_batch(batch, logs, horizon, first)
            assert set(ends) == {first + max(horizon, per_batch)}
            next_step = ends[0]
        event(f"{min(len(model.batches), 3)} batches")
        model.batches.clear()
        # One batch may be on its way, and one may have been thrown away as it began with random steps
        assert len(logs[0]) - next_step <= learning_starts + max(horizon, per_batch) + 2 * per_batch + train_freq
