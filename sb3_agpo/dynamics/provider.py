"""Derivatives of a whole vectorised environment, wherever its environments run."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray
from stable_baselines3.common.vec_env import (
    DummyVecEnv,
    SubprocVecEnv,
    VecCheckNan,
    VecEnv,
    VecEnvWrapper,
    VecMonitor,
    VecNormalize,
    VecVideoRecorder,
)

from sb3_agpo.dynamics.interface import TransitionDerivatives
from sb3_agpo.dynamics.mujoco import FiniteDifferences
from sb3_agpo.dynamics.recorder import (
    ProviderReport,
    RecorderInstaller,
    RecorderRemover,
    StepRecords,
    TransitionRecorder,
    check_available,
    find_recorder,
    install_recorder,
    remove_recorder,
)
from sb3_agpo.dynamics.wrappers import inherits_unchanged

#: wrappers of vectorised environments that leave observations alone, or (VecNormalize) rescale them at sampling time
TRANSPARENT_VEC_WRAPPERS = (VecMonitor, VecNormalize, VecCheckNan, VecVideoRecorder)
#: methods by which a wrapper can change what the agent sees, does and gets
VEC_WRAPPER_METHODS = ("step_async", "step_wait", "reset", "normalize_obs", "normalize_reward")
#: vectorised environments that show what their environments return
KNOWN_VEC_ENVS = (DummyVecEnv, SubprocVecEnv)
#: methods by which a class derived from one of them could change that
VEC_ENV_METHODS = ("step_async", "step_wait", "reset")


class VecDynamics(Protocol):
    """Derivatives of the steps of a vectorised environment, which records them from the moment it is attached."""

    report: ProviderReport  # where the derivatives come from
    simulator_calls: int  # environment steps simulated for differences

    @property
    def n_recorded(self) -> int:
        """Steps per environment that can be taken."""
        ...

    def take(self, n_steps: int, by_state: NDArray[np.bool_] | None = None) -> TransitionDerivatives:
        """
        Differentiate the last steps of every environment, and forget what was recorded before.

        :param n_steps: steps per environment, counted back from the newest
        :param by_state: steps to differentiate by the state too, shape ``(n_steps,)``; None for all. Derivatives of the others
            by the state are zero where that saves work
        :return: batch of ``n_steps * n_envs`` transitions, environment by environment within each step, relative to the
            action in [-1, 1] and the observation the agent sees
        :raises ValueError: if ``n_steps`` is not positive
        :raises RuntimeError: if fewer were recorded
        """
        ...

    def keep_oldest(self, n_steps: int) -> None:
        """
        Forget all recorded steps but the oldest ones; record from now on.

        :param n_steps: steps per environment to keep
        """
        ...

    def discard(self) -> None:
        """Forget the steps recorded so far; record from now on."""
        ...

    def pause(self) -> None:
        """Record no further steps until :meth:`discard` or :meth:`keep_oldest`; those recorded so far are kept."""
        ...

    def get_records(self) -> Sequence[Any]:
        """
        Look at the steps recorded so far, without forgetting them.

        :return: what :meth:`set_records` takes, made of named tuples, lists and arrays
        """
        ...

    def set_records(self, records: Sequence[Any]) -> None:
        """
        Replace the steps recorded so far.

        :param records: what :meth:`get_records` of this class returned for the same environments
        """
        ...


@runtime_checkable
class DifferentiableVecEnv(Protocol):
    """A vectorised environment that records and differentiates its own steps; no recorder is put into its environments."""

    def attach_dynamics(self, differences: FiniteDifferences) -> tuple[VecDynamics | None, ProviderReport]:
        """
        Start to record steps so that they can be differentiated.

        :param differences: difference options
        :return: the derivatives, None where there are none, and what to tell about it
        """
        ...


class VecEnvDynamics:
    """
    Derivatives of the steps of a vectorised environment that knows nothing of them (a :class:`VecDynamics`).

    Stock MuJoCo tasks that live in this process are differentiated in one batch over all environments and steps;
    environments in worker processes differentiate their own steps, all workers at the same time.

    :param env: vectorised environment with a recorder in each environment (see :func:`attach_dynamics`)
    :param report: where the derivatives come from
    :param batched: recorder of this process that can differentiate the steps of all environments at once, if any
    """

    def __init__(self, env: VecEnv, report: ProviderReport, batched: TransitionRecorder | None) -> None:
        self.env, self.report, self._batched = env, report, batched
        self.simulator_calls = 0  # environment steps simulated for differences

    @property
    def n_recorded(self) -> int:
        """Steps per environment that can be taken."""
        return min(self.env.get_attr("agpo_n_recorded"))

    def take(self, n_steps: int, by_state: NDArray[np.bool_] | None = None) -> TransitionDerivatives:
        """
        Differentiate the last steps of every environment, and forget what was recorded before.

        :param n_steps: steps per environment, counted back from the newest
        :param by_state: steps to differentiate by the state too, shape ``(n_steps,)``; None for all. Derivatives of the others
            by the state are zero where that saves work
        :return: batch of ``n_steps * n_envs`` transitions, environment by environment within each step
        :raises ValueError: if ``n_steps`` is not positive
        :raises RuntimeError: if fewer were recorded
        """
        n_envs = self.env.num_envs
        check_available(n_steps, self.n_recorded)  # here, as an error would end a worker process
        if self._batched is None:
            parts = self.env.env_method("agpo_call", "take_derivatives", n_steps, by_state)
            stacked = (np.stack(fields, axis=1) for fields in zip(*parts, strict=True))  # (T, n_envs, ...)
            derivatives = TransitionDerivatives._make(field.reshape(-1, *field.shape[2:]) for field in stacked)
        else:
            records = self.env.env_method("agpo_call", "take_records", n_steps)
            joined = (np.stack(fields, axis=1) for fields in zip(*records, strict=True))
            flat = StepRecords._make(field.reshape(-1, *field.shape[2:]) for field in joined)
            derivatives = self._batched.differentiate_records(flat, None if by_state is None else by_state.repeat(n_envs))
        self.simulator_calls += n_envs * self.report.simulator_calls(n_steps, by_state)
        return derivatives

    def keep_oldest(self, n_steps: int) -> None:
        """
        Forget all recorded steps but the oldest ones; record from now on.

        :param n_steps: steps per environment to keep
        """
        self.env.env_method("agpo_call", "keep_oldest_records", n_steps)

    def discard(self) -> None:
        """Forget the steps recorded so far; record from now on."""
        self.env.env_method("agpo_call", "discard_records")

    def pause(self) -> None:
        """
        Record no further steps until :meth:`discard` or :meth:`keep_oldest`; those recorded so far are kept.

        To be called when learning ends: steps taken afterwards, in an evaluation for example, then cost nothing.
        """
        self.env.env_method("agpo_call", "pause_records")

    def get_records(self) -> Sequence[Any]:
        """
        Look at the steps recorded so far, without forgetting them.

        :return: one list of records per environment
        """
        return self.env.env_method("agpo_call", "get_records")

    def set_records(self, records: Sequence[Any]) -> None:
        """
        Replace the steps recorded so far.

        :param records: one list of records per environment
        """
        for index, own in enumerate(records):
            self.env.env_method("agpo_call", "set_records", own, indices=index)


def attach_dynamics(env: VecEnv, differences: FiniteDifferences) -> tuple[VecDynamics | None, ProviderReport]:
    """
    Find out where the derivatives of a vectorised environment can come from, and let its steps be recorded.

    :param env: vectorised environment, wrapped or not; unless it is a :class:`DifferentiableVecEnv`, its environments are
        given a recorder in place
    :param differences: difference options of the MuJoCo sources
    :return: the derivatives, None where there are none, and what to tell about it
    """
    inner = env
    n_normalizations = 0
    while isinstance(inner, VecEnvWrapper):
        if not any(inherits_unchanged(type(inner), base, VEC_WRAPPER_METHODS) for base in TRANSPARENT_VEC_WRAPPERS):
            return None, ProviderReport("none", f"the wrapper {type(inner).__name__} cannot be differentiated through")
        n_normalizations += isinstance(inner, VecNormalize)
        inner = inner.venv
    if n_normalizations > 1:  # SB3 keeps the outermost for the replay buffer, and nobody else knows the scale of the others
        return None, ProviderReport("none", "of two VecNormalize, the inner one's scale is not known; use a single one")
    if _changes_steps(type(inner)):
        reason = f"{type(inner).__name__} has steps or resets of its own, which cannot be differentiated through"
        return None, ProviderReport("none", reason)
    if isinstance(inner, DifferentiableVecEnv):
        return inner.attach_dynamics(differences)
    if isinstance(inner, DummyVecEnv):
        return _attach_here(inner, differences)
    return _attach_elsewhere(inner, differences)


def _changes_steps(kind: type) -> bool:
    """Whether a vectorised environment is derived from one that is known, and may change what the agent sees and gets."""
    known = next((base for base in kind.__mro__ if base in KNOWN_VEC_ENVS or "attach_dynamics" in vars(base)), kind)
    return not inherits_unchanged(kind, known, VEC_ENV_METHODS)


def _attach_here(env: DummyVecEnv, differences: FiniteDifferences) -> tuple[VecEnvDynamics | None, ProviderReport]:
    """Put recorders into environments of this process."""
    env.envs = [install_recorder(single, differences) for single in env.envs]
    recorders = [recorder for recorder in map(find_recorder, env.envs) if recorder is not None]
    report = summarise([recorder.provider_report for recorder in recorders])
    if report.kind == "none":
        env.envs = [remove_recorder(single) for single in env.envs]
        return None, report
    one_engine = report.kind == "mujoco" and len({recorder.provider_report.signature for recorder in recorders}) == 1
    return VecEnvDynamics(env, report, recorders[0] if one_engine else None), report


def _attach_elsewhere(env: VecEnv, differences: FiniteDifferences) -> tuple[VecEnvDynamics | None, ProviderReport]:
    """Put recorders into environments of other processes."""
    if differences.threads is None:  # workers share the cores
        differences = replace(differences, threads=max(1, differences.n_threads // env.num_envs))
    report = _install_elsewhere(env, differences)
    if report.kind != "none":
        return VecEnvDynamics(env, report, None), report
    with suppress(AttributeError, NotImplementedError):
        env.env_is_wrapped(RecorderRemover())  # type: ignore[arg-type]
    return None, report


def _install_elsewhere(env: VecEnv, differences: FiniteDifferences) -> ProviderReport:
    """Put recorders into the environments that have a place for one, and ask them where derivatives come from."""
    name = type(env).__name__
    try:
        wrapped = env.env_is_wrapped(RecorderInstaller(differences))  # type: ignore[arg-type]
        installed = np.flatnonzero(wrapped).tolist()
        reports = env.get_attr("agpo_report", indices=installed) if installed else []
    except (AttributeError, NotImplementedError):
        return ProviderReport("none", f"{name} gives no access to its environments")
    if not all(isinstance(report, ProviderReport) for report in reports):
        return ProviderReport("none", f"{name} gives no access to its environments")
    if len(installed) < env.num_envs:
        reason = f"{name} holds environments without any wrapper, which leaves no place to record; wrap each in Monitor"
        return ProviderReport("none", reason)
    return summarise(reports)


def summarise(reports: Sequence[ProviderReport]) -> ProviderReport:
    """
    What to tell about all environments of a vectorised environment.

    :param reports: of each environment, at least one
    :return: the report of one that has no derivatives, if there is one, else of the first
    """
    report = next((report for report in reports if report.kind == "none"), reports[0])
    if report.kind != "none" and len({report.tangent_size for report in reports}) > 1:
        return ProviderReport("none", "the environments' simulators are of different sizes, so there is no common batch")
    return report
