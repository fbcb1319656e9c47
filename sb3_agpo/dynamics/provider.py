"""Derivatives of a whole vectorised environment, wherever its environments run."""

from __future__ import annotations

import numpy as np
from stable_baselines3.common.vec_env import (
    DummyVecEnv,
    VecCheckNan,
    VecEnv,
    VecEnvWrapper,
    VecMonitor,
    VecNormalize,
    VecVideoRecorder,
)

from sb3_agpo.dynamics.interface import TransitionDerivatives
from sb3_agpo.dynamics.mujoco import FiniteDifferences
from sb3_agpo.dynamics.recorder import ProviderReport, RecorderInstaller, StepRecords, TransitionRecorder, install_recorder

#: wrappers of vectorised environments that leave observations alone, or (VecNormalize) rescale them at sampling time
TRANSPARENT_VEC_WRAPPERS = (VecMonitor, VecNormalize, VecCheckNan, VecVideoRecorder)


class VecEnvDynamics:
    """
    Derivatives of the steps of a vectorised environment.

    Stock MuJoCo tasks that live in this process are differentiated in one batch over all environments and steps;
    environments in worker processes differentiate their own steps, all workers at the same time.

    :param env: vectorised environment with a recorder in each environment (see :func:`attach_dynamics`)
    :param report: where the derivatives come from
    :param batched: recorder of this process that can differentiate the steps of all environments at once, if any
    """

    def __init__(self, env: VecEnv, report: ProviderReport, batched: TransitionRecorder | None) -> None:
        self.env, self.report, self._batched = env, report, batched
        self.simulator_calls = 0  # environment steps simulated for differences

    def take(self, n_steps: int) -> TransitionDerivatives:
        """
        Differentiate the last steps of every environment, and forget what was recorded before.

        :param n_steps: steps per environment, counted back from the newest
        :return: batch of ``n_steps * n_envs`` transitions, environment by environment within each step
        """
        n_envs = self.env.num_envs
        if self._batched is None:
            parts = self.env.env_method("take_derivatives", n_steps)
            stacked = (np.stack(fields, axis=1) for fields in zip(*parts, strict=True))  # (T, n_envs, ...)
            derivatives = TransitionDerivatives(*(field.reshape(n_steps * n_envs, *field.shape[2:]) for field in stacked))
        else:
            records = self.env.env_method("take_records", n_steps)
            joined = (np.stack(fields, axis=1) for fields in zip(*records, strict=True))
            flat = StepRecords(*(field.reshape(n_steps * n_envs, *field.shape[2:]) for field in joined))
            derivatives = self._batched.differentiate_records(flat)
        self.simulator_calls += n_steps * n_envs * self.report.rows_per_transition
        return derivatives

    def keep_oldest(self, n_steps: int) -> None:
        """
        Forget all recorded steps but the oldest ones.

        :param n_steps: steps per environment to keep
        """
        self.env.env_method("keep_oldest_records", n_steps)

    def discard(self) -> None:
        """Forget the steps recorded so far."""
        self.env.env_method("discard_records")


def attach_dynamics(env: VecEnv, differences: FiniteDifferences) -> tuple[VecEnvDynamics | None, ProviderReport]:
    """
    Find out where the derivatives of a vectorised environment can come from, and put recorders into its environments.

    :param env: vectorised environment, wrapped or not; its environments are given a recorder in place
    :param differences: difference options of the MuJoCo sources
    :return: the derivatives, None where there are none, and what to tell about it
    """
    inner = env
    while isinstance(inner, VecEnvWrapper):
        if not isinstance(inner, TRANSPARENT_VEC_WRAPPERS):
            return None, ProviderReport("none", f"the wrapper {type(inner).__name__} cannot be differentiated through")
        inner = inner.venv
    if isinstance(inner, DummyVecEnv):
        inner.envs = [install_recorder(single, differences) for single in inner.envs]
    else:
        inner.env_is_wrapped(RecorderInstaller(differences))  # type: ignore[arg-type]
        if not inner.has_attr("provider_report"):
            reason = f"{type(inner).__name__} holds environments without any wrapper; wrap each in Monitor"
            return None, ProviderReport("none", reason)
    reports: list[ProviderReport] = inner.get_attr("provider_report")
    report = next((r for r in reports if r.kind == "none"), reports[0])
    if report.kind == "none":
        return None, report
    one_engine = isinstance(inner, DummyVecEnv) and report.kind == "mujoco" and len({r.signature for r in reports}) == 1
    batched = inner.envs[0].get_wrapper_attr("recorder") if one_engine else None  # type: ignore[attr-defined]
    return VecEnvDynamics(inner, report, batched), report
