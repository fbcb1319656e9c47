"""Where the time of a run goes."""

from __future__ import annotations

import functools
from collections import defaultdict
from collections.abc import Callable
from functools import lru_cache
from typing import Any

from gymnasium.envs.mujoco import MujocoEnv
from stable_baselines3.common.vec_env import DummyVecEnv

from sb3_agpo.agpo.agpo import AGPO
from sb3_agpo.benchmark.speed_learning import LEARNING_STARTS
from sb3_agpo.benchmark.speed_timing import Case, Clock, Effort, Medians
from sb3_agpo.dynamics.mujoco import FiniteDifferences, MujocoDynamics
from sb3_agpo.dynamics.recorder import find_recorder

#: parts of a run: what is simulated once and again, and everything around it
PARTS = (
    "physics",
    "environment",
    "derivative_physics",
    "derivatives",
    "acting",
    "collection",
    "critic",
    "policy",
    "logging",
)
#: the parts that no program can do without
SIMULATION = ("physics", "derivative_physics")
#: batches of windows that are looked at
N_BATCHES, QUICK_BATCHES = 8, 1


class Stopwatches:
    """
    Adds up the time spent in methods, each second counted for the innermost watched method only.

    :param clock: to look at
    """

    def __init__(self, clock: Clock) -> None:
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self._clock, self._last = clock, clock()
        self._running: list[str] = []

    def _charge(self) -> None:
        """Count the time since the last change for what has been running."""
        now = self._clock()
        if self._running:
            self.seconds[self._running[-1]] += now - self._last
        self._last = now

    def watch(self, owner: Any, method: str, part: str) -> None:
        """
        Watch a method from now on.

        :param owner: object that the method is called on
        :param method: its name
        :param part: what its time is counted for
        """
        function: Callable[..., Any] = getattr(owner, method)

        @functools.wraps(function)
        def watched(*args: Any, **kwargs: Any) -> Any:
            self._charge()
            self._running.append(part)
            try:
                return function(*args, **kwargs)
            finally:
                self._charge()
                self._running.pop()

        setattr(owner, method, watched)


@lru_cache(maxsize=1)  # the parts of a task are rows of their own
def profile(task: str, threads: int, n_batches: int, clock: Clock) -> dict[str, float]:
    """
    Take the time of a run at AGPO's defaults apart.

    :param task: id of a stock MuJoCo task
    :param threads: of the derivatives
    :param n_batches: batches of windows to collect and to train on
    :param clock: to look at
    :return: part -> milliseconds per environment step
    """
    differences = FiniteDifferences(threads=threads)
    model = AGPO("MlpPolicy", task, seed=0, device="cpu", learning_starts=LEARNING_STARTS, finite_differences=differences)
    model.learn(LEARNING_STARTS + model.rollout_size)
    watches = Stopwatches(clock)
    watch_model(watches, model)
    n_steps = n_batches * model.rollout_size
    model.learn(n_steps, reset_num_timesteps=False)
    model.env.close()  # type: ignore[union-attr]
    return {part: 1e3 * watches.seconds[part] / n_steps for part in PARTS}


def watch_model(watches: Stopwatches, model: AGPO) -> None:
    """
    Watch the parts of a run.

    :param watches: the watches
    :param model: with one environment, a stock MuJoCo task
    """
    assert isinstance(model.env, DummyVecEnv)
    env, recorder = model.env.envs[0].unwrapped, find_recorder(model.env.envs[0])
    assert isinstance(env, MujocoEnv) and recorder is not None and isinstance(recorder.dynamics, MujocoDynamics)
    watches.watch(model, "learn", "collection")  # all of it that is not told apart below
    watches.watch(env, "do_simulation", "physics")
    watches.watch(model.env, "step_wait", "environment")
    watches.watch(recorder.dynamics._stepper, "step", "derivative_physics")
    watches.watch(model, "_differentiate_pending", "derivatives")
    watches.watch(model, "_sample_action", "acting")
    for method in ("_sample_for_critic", "_update_critic", "_update_target"):
        watches.watch(model, method, "critic")
    for method in ("_update_policy_from_windows", "_update_policy_from_replay"):
        watches.watch(model, method, "policy")
    for method in ("_write_statistics", "dump_logs"):
        watches.watch(model, method, "logging")


def measure_part(case: Case, effort: Effort) -> Medians:
    """
    A part of a run beside the whole; the part is the end of the measure's name.

    :param case: task and threads
    :param effort: how long
    :return: milliseconds per environment step
    """
    milliseconds = _profile(case, effort)
    return Medians(milliseconds[case.measure.removeprefix("profile_")], sum(milliseconds.values()))


def measure_limit(case: Case, effort: Effort) -> Medians:
    """
    A whole run beside its simulation, which is the physical limit.

    :param case: task and threads
    :param effort: how long
    :return: milliseconds per environment step
    """
    milliseconds = _profile(case, effort)
    return Medians(sum(milliseconds.values()), sum(milliseconds[part] for part in SIMULATION))


def _profile(case: Case, effort: Effort) -> dict[str, float]:
    n_batches = QUICK_BATCHES if effort.quick else N_BATCHES
    return profile(case.task, case.threads, n_batches, effort.clock(case.threads))
