"""
A recorder inside each environment: it remembers where every step started, so that the step can be differentiated later.

It sits directly above the unwrapped environment, where actions are in the simulator's units and no auto-reset has
happened yet, and it works the same in this process and in the workers of a ``SubprocVecEnv``.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import gymnasium as gym
import numpy as np
from gymnasium import spaces
from gymnasium.envs.mujoco import MujocoEnv
from gymnasium.wrappers import (
    ClipAction,
    DtypeObservation,
    OrderEnforcing,
    PassiveEnvChecker,
    RecordEpisodeStatistics,
    RecordVideo,
    RescaleAction,
    RescaleObservation,
    TimeLimit,
)
from stable_baselines3.common.monitor import Monitor

from sb3_agpo.dynamics.env_step import EnvStepDynamics
from sb3_agpo.dynamics.interface import Array, DifferentiableDynamics, TransitionDerivatives
from sb3_agpo.dynamics.mujoco import FiniteDifferences, MujocoDynamics
from sb3_agpo.dynamics.tasks import find_task_model

#: wrappers that override ``step`` and still leave observation, action and reward as they are
TRANSPARENT_WRAPPERS = (TimeLimit, Monitor, OrderEnforcing, PassiveEnvChecker, RecordEpisodeStatistics, RecordVideo)
#: wrappers that rescale, which the chain rule follows
AFFINE_WRAPPERS = (RescaleAction, RescaleObservation, ClipAction, DtypeObservation)


class ProviderReport(NamedTuple):
    """
    Where the derivatives of an environment come from, and why.

    ``kind`` is ``"exact"`` (the environment implements the interface), ``"mujoco"`` (a stock task), ``"env_step"`` (any
    other ``MujocoEnv``, differenced through its own ``step``) or ``"none"`` (the critic's gradient alone).
    """

    kind: str
    reason: str
    tangent_size: int = 0  # ndx
    rows_per_transition: int = 0  # environment steps simulated to differentiate one
    signature: bytes = b""  # equal for environments that one engine can serve


class StepRecords(NamedTuple):
    """Steps waiting to be differentiated."""

    states: Array  # (T, nx)
    actions: np.ndarray[Any, Any]  # (T, nu), as given to the unwrapped environment
    rewards: Array  # (T,) as returned by it


class TransitionRecorder(gym.Wrapper[Any, Any, Any, Any]):
    """
    Records each step's starting state and action, and differentiates them on demand.

    :param env: the unwrapped environment
    :param dynamics: where derivatives come from; None records nothing
    :param report: what to tell about it
    :param action_scale: d(environment action) / d(action in [-1, 1]), shape ``(nu,)``
    :param observation_scale: d(observation that the agent sees) / d(environment observation), shape ``(nobs,)``
    """

    def __init__(
        self,
        env: gym.Env[Any, Any],
        dynamics: DifferentiableDynamics | None,
        report: ProviderReport,
        action_scale: Array,
        observation_scale: Array,
    ) -> None:
        super().__init__(env)
        self.dynamics, self.provider_report = dynamics, report
        self.action_scale, self.observation_scale = action_scale, observation_scale
        self._deferred = getattr(dynamics, "deferred", True)
        self.discard_records()

    @property
    def recorder(self) -> TransitionRecorder:
        """This recorder, for whoever holds the outermost wrapper."""
        return self

    def step(self, action: Any) -> tuple[Any, Any, bool, bool, dict[str, Any]]:
        """Step the environment and remember where the step started."""
        if self.dynamics is None:
            return self.env.step(action)
        action = np.asarray(action)
        state = self.dynamics.get_state()
        if not self._deferred:
            self._differentiated.append(self.dynamics.differentiate(state[None], action[None]))
        result = self.env.step(action)
        self._records.append((state, action.copy(), float(result[1])))
        return result

    def discard_records(self) -> None:
        """Forget what was recorded."""
        self._records: list[tuple[Array, np.ndarray[Any, Any], float]] = []
        self._differentiated: list[TransitionDerivatives] = []

    def keep_oldest_records(self, n_steps: int) -> None:
        """
        Forget all recorded steps but the oldest ones.

        :param n_steps: number of steps to keep
        """
        del self._records[n_steps:], self._differentiated[n_steps:]

    def take_records(self, n_steps: int) -> StepRecords:
        """
        Hand over the last steps and forget everything recorded.

        :param n_steps: number of steps, counted back from the newest
        :return: the steps, oldest first
        :raises RuntimeError: if fewer were recorded
        """
        if len(self._records) < n_steps:
            raise RuntimeError(
                f"{n_steps} steps were to be differentiated but only {len(self._records)} were recorded; "
                "do not step the training environment outside `learn`"
            )
        states, actions, rewards = zip(*self._records[-n_steps:], strict=True)
        self.discard_records()
        return StepRecords(np.stack(states), np.stack(actions), np.array(rewards))

    def take_derivatives(self, n_steps: int) -> TransitionDerivatives:
        """
        Differentiate the last steps and forget everything recorded.

        :param n_steps: number of steps, counted back from the newest
        :return: their derivatives, oldest first, relative to the action in [-1, 1] and the observation the agent sees
        """
        differentiated = self._differentiated[-n_steps:]
        records = self.take_records(n_steps)
        if self._deferred:
            return self.differentiate_records(records)
        parts = TransitionDerivatives(*(np.concatenate(fields) for fields in zip(*differentiated, strict=True)))
        return self._finish(parts, records.rewards)

    def differentiate_records(self, records: StepRecords) -> TransitionDerivatives:
        """
        Differentiate steps recorded here or in an environment of the same signature.

        :param records: the steps
        :return: their derivatives, relative to the action in [-1, 1] and the observation the agent sees
        """
        assert self.dynamics is not None
        return self._finish(self.dynamics.differentiate(records.states, records.actions), records.rewards)

    def _finish(self, derivatives: TransitionDerivatives, rewards: Array) -> TransitionDerivatives:
        """Apply the chain rule of the wrappers, and distrust steps that the engine did not reproduce."""
        # A model changed since the environment was attached would give derivatives of another simulator
        reproduced = np.isclose(derivatives.reward, rewards, rtol=1e-6, atol=1e-6)
        scale = self.observation_scale[:, None]
        return derivatives._replace(
            B=derivatives.B * self.action_scale,
            C=scale * derivatives.C,
            next_C=scale * derivatives.next_C,
            O_x=scale * derivatives.O_x,
            O_a=scale * derivatives.O_a * self.action_scale,
            r_a=derivatives.r_a * self.action_scale,
            valid=derivatives.valid & reproduced,
        )

    def close(self) -> None:
        """Close the environment and stop the engine's threads."""
        if isinstance(self.dynamics, MujocoDynamics):
            self.dynamics.close()
        super().close()


def opaque_wrapper(env: gym.Env[Any, Any]) -> str | None:
    """
    The first wrapper that derivatives cannot be followed through.

    :param env: wrapped environment
    :return: the wrapper's name, None if all can be seen through
    """
    while isinstance(env, gym.Wrapper):
        if not (isinstance(env, (*TRANSPARENT_WRAPPERS, *AFFINE_WRAPPERS, TransitionRecorder)) or _changes_nothing(env)):
            return type(env).__name__
        env = env.env
    return None


def _changes_nothing(env: gym.Wrapper[Any, Any, Any, Any]) -> bool:
    """Whether a wrapper of unknown class inherits both ``step`` and ``reset`` unchanged."""
    kind = type(env)
    return kind.step is gym.Wrapper.step and kind.reset is gym.Wrapper.reset


def wrapper_scales(env: gym.Env[Any, Any]) -> tuple[Array, Array]:
    """
    Chain-rule factors of the wrappers of an environment, all of them affine.

    :param env: wrapped environment
    :return: d(environment action) / d(action in [-1, 1]), d(agent's observation) / d(environment observation)
    """
    assert isinstance(env.action_space, spaces.Box)
    low, high = env.action_space.low.astype(np.float64), env.action_space.high.astype(np.float64)
    observation_wrappers: list[gym.ObservationWrapper[Any, Any, Any]] = []
    while isinstance(env, gym.Wrapper):
        if isinstance(env, gym.ActionWrapper):
            low, high = env.action(low), env.action(high)
        if isinstance(env, RescaleObservation):
            observation_wrappers.append(env)
        env = env.env
    assert env.observation_space.shape is not None
    zero, one = np.zeros(env.observation_space.shape), np.ones(env.observation_space.shape)
    for wrapper in reversed(observation_wrappers):
        zero, one = wrapper.observation(zero), wrapper.observation(one)
    return 0.5 * (high - low), (one - zero).astype(np.float64)


def choose_dynamics(
    env: gym.Env[Any, Any], differences: FiniteDifferences
) -> tuple[DifferentiableDynamics | None, ProviderReport]:
    """
    The best source of derivatives for an environment.

    :param env: environment as the agent sees it, wrappers included
    :param differences: difference options of the MuJoCo sources
    :return: the source, None where there is none, and what to tell about it
    """
    unwrapped = env.unwrapped
    name = type(unwrapped).__name__
    for space, what in ((env.action_space, "action"), (env.observation_space, "observation")):
        if not isinstance(space, spaces.Box) or len(space.shape) != 1:
            return None, ProviderReport("none", f"the {what} space {space} is not a one-dimensional Box")
    if (opaque := opaque_wrapper(env)) is not None:
        return None, ProviderReport("none", f"the wrapper {opaque} cannot be differentiated through")
    if isinstance(unwrapped, DifferentiableDynamics):
        return unwrapped, ProviderReport("exact", f"{name} offers its own derivatives", unwrapped.tangent_size)
    if not isinstance(unwrapped, MujocoEnv):
        return None, ProviderReport("none", f"{name} is no MuJoCo environment and offers no derivatives")
    if find_task_model(unwrapped) is not None:
        stock = MujocoDynamics(unwrapped, differences)
        report = ProviderReport(
            "mujoco",
            f"{name} is a stock task: batched finite differences",
            stock.tangent_size,
            stock.perturbations.n_rows,
            stock.signature(),
        )
        return stock, report
    custom = EnvStepDynamics(unwrapped, differences)
    reason = f"{name} is a custom MujocoEnv: finite differences through its own step"
    return custom, ProviderReport("env_step", reason, custom.tangent_size, custom.rows_per_transition)


class RecorderInstaller:
    """
    Puts a :class:`TransitionRecorder` into environments that already run inside a vectorised environment.

    SB3 has no call that adds a wrapper inside a running ``SubprocVecEnv`` worker. ``env_is_wrapped(X)`` is the one call
    that hands the worker's environment to something of ours: the worker evaluates ``isinstance(env, X)``, and Python
    lets ``X`` answer that through ``__instancecheck__``.

    :param differences: difference options of the MuJoCo sources
    """

    def __init__(self, differences: FiniteDifferences) -> None:
        self.differences = differences

    def __instancecheck__(self, env: Any) -> bool:
        install_recorder(env, self.differences)
        return True


def install_recorder(env: gym.Env[Any, Any], differences: FiniteDifferences) -> gym.Env[Any, Any]:
    """
    Insert a recorder directly above the unwrapped environment, replacing one that is already there.

    :param env: environment, wrapped or not; wrappers are kept, the innermost one is pointed at the recorder
    :param differences: difference options of the MuJoCo sources
    :return: the environment with its recorder: ``env`` itself, or the recorder if ``env`` had no wrapper
    """
    if isinstance(env, TransitionRecorder):
        env = env.env
    innermost: gym.Wrapper[Any, Any, Any, Any] | None = None
    while isinstance(env if innermost is None else innermost.env, gym.Wrapper):
        candidate = env if innermost is None else innermost.env
        if isinstance(candidate, TransitionRecorder):
            assert innermost is not None
            innermost.env = candidate.env
            continue
        innermost = candidate  # type: ignore[assignment]
    dynamics, report = choose_dynamics(env, differences)
    if dynamics is None:
        recorder = TransitionRecorder(env.unwrapped, None, report, np.ones(0), np.ones(0))
    else:
        recorder = TransitionRecorder(env.unwrapped, dynamics, report, *wrapper_scales(env))
    if innermost is None:
        return recorder
    innermost.env = recorder
    return env
