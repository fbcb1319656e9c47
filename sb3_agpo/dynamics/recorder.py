"""
A recorder inside each environment: it remembers where every step started, so that the step can be differentiated later.

Its wrapper sits directly above the unwrapped environment, where actions are in the simulator's units and no auto-reset has
happened yet, and it works the same in this process and in the workers of a ``SubprocVecEnv``.
"""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Generic, NamedTuple, TypeVar

import gymnasium as gym
import numpy as np
from gymnasium import spaces
from gymnasium.envs.mujoco import MujocoEnv
from gymnasium.envs.registration import EnvSpec
from numpy.typing import NDArray

from sb3_agpo.dynamics.env_step import EnvStepDynamics
from sb3_agpo.dynamics.interface import (
    Array,
    DifferentiableDynamics,
    TransitionDerivatives,
    check_derivatives,
    concatenate,
    zero_invalid,
)
from sb3_agpo.dynamics.mujoco import LARGEST, FiniteDifferences, MujocoDynamics, discard_invalid
from sb3_agpo.dynamics.tangent import may_sleep, state_outside_tangent
from sb3_agpo.dynamics.tasks import find_task_model, foreign_method
from sb3_agpo.dynamics.wrappers import opaque_wrapper, unusable_spaces, wrapper_scales

R = TypeVar("R")

#: what a recorder keeps at most. Steps that nobody asks for, taken after training for example, must not fill the memory
MAX_RECORD_BYTES = 2**29


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
    rows_by_action: int = 0  # the same for one that is differentiated by the action alone
    signature: bytes = b""  # equal for environments that one engine can serve

    def simulator_calls(self, n_steps: int, by_state: NDArray[np.bool_] | None) -> int:
        """
        Environment steps simulated to differentiate consecutive steps.

        :param n_steps: number of steps
        :param by_state: those to differentiate by the state too, shape ``(n_steps,)``; None for all
        :return: the number
        """
        n_by_state = n_steps if by_state is None else int(by_state.sum())
        return n_by_state * self.rows_per_transition + (n_steps - n_by_state) * self.rows_by_action


class StepRecords(NamedTuple):
    """Steps waiting to be differentiated."""

    states: Array  # (T, nx)
    actions: np.ndarray[Any, Any]  # (T, nu), as given to the unwrapped environment
    rewards: Array  # (T,) as returned by it
    next_obs: Array  # (T, nobs) as returned by it


class Record(NamedTuple):
    """One step."""

    state: Array  # (nx,)
    action: np.ndarray[Any, Any]  # (nu,)
    reward: float
    next_obs: Array  # (nobs,)
    derivatives: TransitionDerivatives | None  # of an environment that must be differentiated before it moves on

    @property
    def n_bytes(self) -> int:
        """Memory that the record takes."""
        arrays = (self.state, self.action, self.next_obs, *(self.derivatives or ()))
        return sum(array.nbytes for array in arrays)


class RecordQueue(Generic[R]):
    """Records of steps that wait to be differentiated: the newest, as many as fit into ``MAX_RECORD_BYTES``."""

    def __init__(self) -> None:
        self.recording = True
        self._records: deque[R] = deque()

    def __len__(self) -> int:
        return len(self._records)

    def add(self, record: R, n_bytes: int) -> None:
        """
        Add the newest record.

        :param record: not to be changed later
        :param n_bytes: memory that it and each of those after it take
        """
        if not self._records:
            self._records = deque(maxlen=max(1, MAX_RECORD_BYTES // n_bytes))
        self._records.append(record)

    def get(self) -> list[R]:
        """
        Look at all records.

        :return: the records, oldest first
        """
        return list(self._records)

    def take(self, n_steps: int) -> list[R]:
        """
        Hand over the newest records, and forget all.

        :param n_steps: number of records
        :return: the records, oldest first
        :raises ValueError: if ``n_steps`` is not positive
        :raises RuntimeError: if there are fewer
        """
        check_available(n_steps, len(self))
        taken = self.get()[-n_steps:]
        self.clear()
        return taken

    def keep_oldest(self, n_steps: int) -> None:
        """
        Forget all records but the oldest ones; record from now on.

        :param n_steps: number of records to keep
        """
        while len(self._records) > n_steps:
            self._records.pop()
        self.recording = True

    def clear(self) -> None:
        """Forget all records."""
        self._records = deque()

    def discard(self) -> None:
        """Forget all records; record from now on."""
        self.clear()
        self.recording = True

    def pause(self) -> None:
        """Ask for no further records until :meth:`discard` or :meth:`keep_oldest`."""
        self.recording = False


class TransitionRecorder:
    """
    Records each step's starting state and action, and differentiates them on demand.

    :param env: the environment to step
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
        self.env = env
        self.dynamics, self.provider_report = dynamics, report
        self.action_scale, self.observation_scale = action_scale, observation_scale
        self._deferred = getattr(dynamics, "deferred", True)
        self._queue: RecordQueue[Record] = RecordQueue()

    @property
    def n_recorded(self) -> int:
        """Number of steps that can be taken."""
        return len(self._queue)

    def step(self, action: Any) -> tuple[Any, Any, bool, bool, dict[str, Any]]:
        """
        Step the environment and remember where the step started.

        :param action: as the environment takes it
        :return: what the environment returns
        """
        if self.dynamics is None or not self._queue.recording:
            return self.env.step(action)
        action = np.asarray(action)
        state = np.array(self.dynamics.get_state())  # which may be what the environment is about to change
        derivatives = None if self._deferred else self._differentiate(state[None], action[None])
        taken = action.copy()  # the environment may write into its argument
        result = self.env.step(action)
        record = Record(state, taken, float(result[1]), np.array(result[0], dtype=np.float64), derivatives)
        self._queue.add(record, record.n_bytes)
        return result

    def get_records(self) -> list[Record]:
        """
        Look at the steps that can be taken.

        :return: the steps, oldest first
        """
        return self._queue.get()

    def set_records(self, records: Sequence[Record]) -> None:
        """
        Put back what :meth:`get_records` returned.

        :param records: the steps, oldest first
        """
        self._queue.clear()
        for record in records:
            self._queue.add(record, record.n_bytes)

    def discard_records(self) -> None:
        """Forget what was recorded; record from now on."""
        self._queue.discard()

    def keep_oldest_records(self, n_steps: int) -> None:
        """
        Forget all recorded steps but the oldest ones; record from now on.

        :param n_steps: number of steps to keep
        """
        self._queue.keep_oldest(n_steps)

    def pause_records(self) -> None:
        """Record no further steps, which then cost nothing, until records are discarded or the oldest kept."""
        self._queue.pause()

    def take_records(self, n_steps: int) -> StepRecords:
        """
        Hand over the last steps and forget everything recorded.

        :param n_steps: number of steps, counted back from the newest
        :return: the steps, oldest first
        :raises ValueError: if ``n_steps`` is not positive
        :raises RuntimeError: if fewer were recorded
        """
        return stack_records(self._queue.take(n_steps))

    def take_derivatives(self, n_steps: int, by_state: NDArray[np.bool_] | None = None) -> TransitionDerivatives:
        """
        Differentiate the last steps and forget everything recorded.

        :param n_steps: number of steps, counted back from the newest
        :param by_state: see :meth:`differentiate_records`
        :return: their derivatives, oldest first, relative to the action in [-1, 1] and the observation the agent sees
        :raises ValueError: if ``n_steps`` is not positive
        :raises RuntimeError: if fewer were recorded
        """
        records = self._queue.take(n_steps)
        if self._deferred:
            return self.differentiate_records(stack_records(records), by_state)
        parts = [record.derivatives for record in records if record.derivatives is not None]
        return self._finish(concatenate(parts), stack_records(records))

    def differentiate_records(self, records: StepRecords, by_state: NDArray[np.bool_] | None = None) -> TransitionDerivatives:
        """
        Differentiate steps recorded here or in an environment of the same signature.

        :param records: ``T`` steps
        :param by_state: steps to differentiate by the state too, shape ``(T,)``; None for all. Derivatives of the others by
            the state are zero where that saves work
        :return: their derivatives, relative to the action in [-1, 1] and the observation the agent sees
        """
        # Other sources have nothing to save: exact derivatives come at once, others were taken before the step
        options = {"by_state": by_state} if isinstance(self.dynamics, MujocoDynamics) else {}
        return self._finish(self._differentiate(records.states, records.actions, **options), records)

    def _differentiate(self, states: Array, actions: NDArray[Any], **options: Any) -> TransitionDerivatives:
        """Ask the source, and check what somebody's own environment answers."""
        assert self.dynamics is not None
        derivatives = self.dynamics.differentiate(states, actions, **options)
        if self.provider_report.kind != "exact":
            return derivatives
        space = self.env.observation_space
        assert isinstance(space, spaces.Box)
        sizes = len(states), space.shape[0], actions.shape[1], self.dynamics.tangent_size
        return check_derivatives(derivatives, type(self.env.unwrapped).__name__, *sizes)

    def _finish(self, derivatives: TransitionDerivatives, records: StepRecords) -> TransitionDerivatives:
        """Apply the chain rule of the wrappers, and distrust steps that the engine did not reproduce."""
        exact = self.provider_report.kind == "exact"
        if exact:  # the other sources have done so themselves
            derivatives = discard_invalid(derivatives, LARGEST, LARGEST)
        # A model or an option changed since the environment was attached would give derivatives of another simulator.
        # Differences go through the very same computation; exact ones may come by another way and in another precision
        tolerance = 1e-3 if exact else 1e-6
        with np.errstate(invalid="ignore"):
            reproduced = np.isclose(derivatives.reward, records.rewards, rtol=tolerance, atol=tolerance)
            reproduced &= np.isclose(derivatives.next_obs, records.next_obs, rtol=tolerance, atol=tolerance).all(axis=1)
        scale = self.observation_scale[:, None]
        return zero_invalid(
            derivatives._replace(
                B=derivatives.B * self.action_scale,
                C=scale * derivatives.C,
                next_C=scale * derivatives.next_C,
                O_x=scale * derivatives.O_x,
                O_a=scale * derivatives.O_a * self.action_scale,
                r_a=derivatives.r_a * self.action_scale,
                valid=derivatives.valid & reproduced,
            )
        )

    def close(self) -> None:
        """Stop the engine's threads."""
        if isinstance(self.dynamics, MujocoDynamics):
            self.dynamics.close()


class RecorderWrapper(gym.Wrapper[Any, Any, Any, Any]):
    """
    Has a recorder step the environment, and is otherwise what the environment is.

    Attributes are read from the environment and written to it, for wrappers above this one cannot know that it is there. Its
    own names, and those alone, begin with ``agpo_``.

    :param recorder: the recorder, of the unwrapped environment
    """

    def __init__(self, recorder: TransitionRecorder) -> None:
        # Without Gymnasium's own, which would set attributes of the environment
        object.__setattr__(self, "agpo_recorder", recorder)

    def __getattr__(self, name: str) -> Any:
        """What neither this object nor its class has is the environment's."""
        if name.startswith("__") or name in ("env", "agpo_recorder"):  # as in a copy that has nothing yet
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        return getattr(self.env, name)

    def __setattr__(self, name: str, value: Any) -> None:
        """Write into the environment, unless the environment itself is replaced."""
        setattr(self.agpo_recorder if name == "env" else self.env, name, value)

    def __delattr__(self, name: str) -> None:
        """Delete from the environment."""
        delattr(self.env, name)

    @property
    def env(self) -> gym.Env[Any, Any]:  # type: ignore[override]
        """The environment."""
        return self.agpo_recorder.env

    @property  # type: ignore[misc]
    def action_space(self) -> spaces.Space[Any]:  # type: ignore[override]
        """The environment's."""
        return self.env.action_space

    @property  # type: ignore[misc]
    def observation_space(self) -> spaces.Space[Any]:  # type: ignore[override]
        """The environment's."""
        return self.env.observation_space

    @property  # type: ignore[misc]
    def metadata(self) -> dict[str, Any]:  # type: ignore[override]
        """The environment's."""
        return self.env.metadata

    @property
    def spec(self) -> EnvSpec | None:  # type: ignore[override]
        """How the environment was made; a recorder is no part of that."""
        return self.env.spec

    @property
    def agpo_report(self) -> ProviderReport:
        """Where the derivatives come from, for whoever holds the outermost wrapper."""
        return self.agpo_recorder.provider_report

    @property
    def agpo_n_recorded(self) -> int:
        """Number of steps that can be taken."""
        return self.agpo_recorder.n_recorded

    def agpo_call(self, method: str, *arguments: Any) -> Any:
        """
        Call a method of the recorder, which may be in another process.

        :param method: its name
        :param arguments: its arguments
        :return: what it returns
        """
        return getattr(self.agpo_recorder, method)(*arguments)

    def reset(self, **kwargs: Any) -> tuple[Any, dict[str, Any]]:  # type: ignore[override]
        """Reset with exactly the given arguments: environments need not take ``seed`` and ``options`` alike."""
        return self.env.reset(**kwargs)

    def step(self, action: Any) -> tuple[Any, Any, bool, bool, dict[str, Any]]:
        """Step the environment and remember where the step started."""
        return self.agpo_recorder.step(action)

    def close(self) -> None:
        """Close the environment and stop the engine's threads."""
        self.agpo_recorder.close()
        self.env.close()


def check_available(n_steps: int, n_recorded: int) -> None:
    """
    Check that steps can be taken.

    :param n_steps: number of steps asked for
    :param n_recorded: number of steps recorded
    :raises ValueError: if ``n_steps`` is not positive
    :raises RuntimeError: if fewer were recorded
    """
    if n_steps < 1:
        raise ValueError(f"`n_steps` must be at least 1, got {n_steps!r}")
    if n_recorded < n_steps:
        raise RuntimeError(
            f"{n_steps} steps were to be differentiated but only {n_recorded} were recorded; take the derivatives of every "
            "step once, soon after it, and do not step the training environment outside `learn`"
        )


def stack_records(records: Sequence[Record]) -> StepRecords:
    """
    Make arrays of records.

    :param records: at least one
    :return: the same in the same order
    """
    states, actions, rewards, next_obs, _ = zip(*records, strict=True)
    return StepRecords(np.stack(states), np.stack(actions), np.array(rewards), np.stack(next_obs))


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
    if (problem := unusable_spaces(env) or unusable_spaces(unwrapped)) is not None:
        return None, ProviderReport("none", problem)
    if (opaque := opaque_wrapper(env)) is not None:
        return None, ProviderReport("none", f"the wrapper {opaque} cannot be differentiated through")
    if isinstance(unwrapped, DifferentiableDynamics):
        return unwrapped, ProviderReport("exact", f"{name} offers its own derivatives", unwrapped.tangent_size)
    if not isinstance(unwrapped, MujocoEnv):
        return None, ProviderReport("none", f"{name} is no MuJoCo environment and offers no derivatives")
    if outside := state_outside_tangent(unwrapped.model):
        parts = ", ".join(outside)
        return None, ProviderReport("none", f"the model of {name} keeps a state that is not differentiated ({parts})")
    is_stock = find_task_model(unwrapped) is not None
    if is_stock and not may_sleep(unwrapped.model):
        stock = MujocoDynamics(unwrapped, differences)
        scales = b"".join(scale.tobytes() for scale in wrapper_scales(env))
        report = ProviderReport(
            "mujoco",
            f"{name} is a stock task: batched finite differences",
            stock.tangent_size,
            stock.perturbations.n_rows,
            stock.action_perturbations.n_rows,
            hashlib.sha256(stock.signature() + scales).digest(),
        )
        return stock, report
    method = foreign_method(unwrapped)
    what = "is a custom MujocoEnv" if method is None else f"has a method `{method}` that is not Gymnasium's"
    if is_stock:
        what = "has a model whose bodies may sleep"
    try:
        custom = EnvStepDynamics(unwrapped, differences)
    except TypeError as error:
        return None, ProviderReport("none", f"{name} {what}, but {error}")
    reason = f"{name} {what}: finite differences through its own step"
    rows = custom.rows_per_transition
    return custom, ProviderReport("env_step", reason, custom.tangent_size, rows, rows)


class RecorderInstaller:
    """
    Puts a :class:`RecorderWrapper` into environments that already run inside a vectorised environment.

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


class RecorderRemover:
    """Takes recorders out again, in the way in which :class:`RecorderInstaller` puts them in."""

    def __instancecheck__(self, env: Any) -> bool:
        remove_recorder(env)
        return True


def install_recorder(env: gym.Env[Any, Any], differences: FiniteDifferences) -> gym.Env[Any, Any]:
    """
    Insert a recorder directly above the unwrapped environment, replacing one that is already there.

    :param env: environment, wrapped or not; wrappers are kept, the innermost one is pointed at the recorder
    :param differences: difference options of the MuJoCo sources
    :return: the environment with its recorder: ``env`` itself, or the recorder's wrapper if ``env`` had none
    """
    env = remove_recorder(env)
    dynamics, report = choose_dynamics(env, differences)
    nothing = np.ones(0)
    scales = (nothing, nothing) if dynamics is None else wrapper_scales(env)
    wrapper = RecorderWrapper(TransitionRecorder(env.unwrapped, dynamics, report, *scales))
    if not isinstance(env, gym.Wrapper):
        return wrapper
    _insert(wrapper, env)
    return env


def _insert(wrapper: RecorderWrapper, env: gym.Wrapper[Any, Any, Any, Any]) -> None:
    """Point the innermost wrapper at that of a recorder."""
    innermost = env
    while isinstance(innermost.env, gym.Wrapper):
        innermost = innermost.env
    innermost.env = wrapper


def find_wrapper(env: gym.Env[Any, Any]) -> RecorderWrapper | None:
    """
    The wrapper of the recorder in an environment.

    :param env: environment, wrapped or not
    :return: the outermost such wrapper, None if there is none
    """
    while isinstance(env, gym.Wrapper):
        if isinstance(env, RecorderWrapper):
            return env
        env = env.env
    return None


def find_recorder(env: gym.Env[Any, Any]) -> TransitionRecorder | None:
    """
    The recorder in an environment.

    :param env: environment, wrapped or not
    :return: its recorder, None if it has none
    """
    wrapper = find_wrapper(env)
    return None if wrapper is None else wrapper.agpo_recorder


def remove_recorder(env: gym.Env[Any, Any]) -> gym.Env[Any, Any]:
    """
    Take recorders out again.

    :param env: environment, wrapped or not, with any number of recorders
    :return: the environment without: ``env`` itself, or the unwrapped environment if it had no other wrapper
    """
    while isinstance(env, RecorderWrapper):
        env = env.env
    wrapper = env
    while isinstance(wrapper, gym.Wrapper):
        while isinstance(wrapper.env, RecorderWrapper):
            wrapper.env = wrapper.env.env
        wrapper = wrapper.env
    return env


@contextmanager
def kept_recorder(env: gym.Env[Any, Any]) -> Iterator[None]:
    """
    Let others put recorders into an environment for a while.

    :param env: environment, wrapped or not; afterwards it has the recorder that it had, or none
    """
    before = find_wrapper(env)
    try:
        yield
    finally:
        bare = remove_recorder(env)
        if before is not None and isinstance(bare, gym.Wrapper):
            _insert(before, bare)
