"""Collection: an off-policy algorithm that keeps fresh windows of experience with the derivatives of each simulator step."""

from __future__ import annotations

import copy
import functools
import io
import math
import pathlib
import time
import warnings
from collections.abc import Callable
from contextlib import suppress
from typing import Any, TypeVar

import numpy as np
import torch as th
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.buffers import DictReplayBuffer, NStepReplayBuffer, ReplayBuffer
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.noise import ActionNoise
from stable_baselines3.common.off_policy_algorithm import OffPolicyAlgorithm
from stable_baselines3.common.type_aliases import GymEnv, MaybeCallback, RolloutReturn
from stable_baselines3.common.vec_env import VecEnv
from stable_baselines3.her.her_replay_buffer import HerReplayBuffer

from sb3_agpo.agpo.arguments import check_learn_arguments
from sb3_agpo.agpo.checkpoint import TorchGenerators, begin_new_episodes, torch_generators
from sb3_agpo.agpo.faults import check_observations, check_step, explained_faults, is_mid_step
from sb3_agpo.agpo.n_step import end_last_episode
from sb3_agpo.agpo.pink_noise import next_processes, pink_noise
from sb3_agpo.agpo.policies import Actor, AGPOPolicy, predicts_by_itself, samples_by_itself
from sb3_agpo.agpo.rollout_buffer import DerivativeReplayBuffer, DifferentiableRolloutBuffer, Transition
from sb3_agpo.agpo.updates import gaussian_parameters
from sb3_agpo.dynamics.interface import TransitionDerivatives, absent_derivatives, zero_invalid
from sb3_agpo.dynamics.mujoco import FiniteDifferences
from sb3_agpo.dynamics.provider import VecDynamics, attach_dynamics
from sb3_agpo.dynamics.recorder import ProviderReport

# psutil tells how much memory is free; as in SB3, the check is left out without it
try:
    import psutil
except ImportError:
    psutil = None  # type: ignore[assignment]

SelfAlgorithm = TypeVar("SelfAlgorithm", bound="DifferentiableOffPolicyAlgorithm")
T = TypeVar("T")

#: what SB3 chooses from if no replay buffer class is given
AUTOMATIC_BUFFERS = (ReplayBuffer, DictReplayBuffer, NStepReplayBuffer)
#: derivatives over which the share of invalid ones is watched
INVALID_WINDOW = 1000
#: relative and absolute difference, of single precision and more, up to which two rewards are the same
REWARD_TOLERANCE = 1e-3


class DifferentiableOffPolicyAlgorithm(OffPolicyAlgorithm):
    """
    SB3's off-policy algorithm, which collects into two more buffers where the environment's steps have derivatives.

    ``rollout_buffer`` holds the newest steps, of which it makes windows, and ``derivative_buffer`` older ones for gradient
    matching. A subclass sets the attributes below, calls :meth:`_set_up_collection` once its networks are there, and takes
    windows out of ``rollout_buffer`` in its ``train``.

    :param args: see SB3
    :param kwargs: see SB3
    """

    policy: AGPOPolicy
    actor: Actor
    gradient_mode: str
    horizon: int
    rollout_size: int
    rollout_epochs: int
    critic_grad_coef: float
    exploration_noise: str
    derivative_memory: float
    finite_differences: FiniteDifferences
    max_invalid_fraction: float

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.dynamics: VecDynamics | None = None
        self.provider_report = ProviderReport("none", "no environment yet")
        self._earlier_timesteps = 0  # of calls of `learn` before `num_timesteps` was last reset
        self._difference_calls = 0
        self._is_mid_rollout = False
        self._stored_timesteps: int | None = None  # steps whose transitions have been stored; None outside of `learn`
        self._is_step_unrecorded = False  # the source of derivatives was attached after the step that is to be stored next
        self._valid_history: list[bool] = []
        self._statistics: dict[str, list[float]] = {}
        self._acting_noise: np.ndarray | None = None
        self._acting_actions: np.ndarray | None = None  # in [-1, 1], made from it
        self._noise_processes: np.ndarray | None = None
        self._state_before_rollout: TorchGenerators | None = None

    # ------------------------------------------------------------------ buffers and the source of derivatives

    def _set_up_collection(self) -> None:
        """Make both buffers, empty, and find the source of derivatives."""
        self.rollout_buffer = self._empty_rollout_buffer()
        self.derivative_buffer = DerivativeReplayBuffer(self.buffer_size, int(self.derivative_memory * 1e9), self.device)
        self._attach_dynamics()

    def _empty_rollout_buffer(self) -> DifferentiableRolloutBuffer:
        return DifferentiableRolloutBuffer(self.rollout_size, self.horizon, self.n_envs, self.device)

    def _store_single_precision(self) -> None:
        """Keep replayed observations in the precision of the networks, which is half the memory and the same numbers."""
        buffer = self.replay_buffer
        # Other buffers may compute with what they hold, and so does normalisation
        if type(buffer) not in AUTOMATIC_BUFFERS or self._vec_normalize_env is not None:
            return
        for name in ("observations", "next_observations"):
            stored = getattr(buffer, name, None)
            if isinstance(stored, np.ndarray) and stored.dtype == np.float64:
                setattr(buffer, name, np.zeros(stored.shape, dtype=np.float32))
            elif isinstance(stored, dict):
                for key, values in stored.items():
                    if values.dtype == np.float64:
                        stored[key] = np.zeros(values.shape, dtype=np.float32)

    def _attach_dynamics(self) -> None:
        """Find the source of derivatives of the current environment, and say once what it is."""
        if self.env is None:
            return
        if reason := self._reason_against_derivatives():
            self.dynamics, self.provider_report = None, ProviderReport("none", reason)
        else:
            with explained_faults(self.env):
                self.dynamics, self.provider_report = attach_dynamics(self.env, self.finite_differences)
                if self.dynamics is not None:  # until `learn`, nobody needs derivatives of steps that others take
                    self.dynamics.pause()
        if self.verbose >= 1:
            source = f"from {self.provider_report.kind}" if self.dynamics is not None else "none, the critic's gradient alone"
            print(f"Simulator derivatives: {source} ({self.provider_report.reason})")
        if self.dynamics is not None and self.critic_grad_coef > 0.0:
            self._warn_about_memory()

    def _reason_against_derivatives(self) -> str:
        """Why there can be none, whatever the environment is; nothing if there can."""
        if isinstance(self.replay_buffer, HerReplayBuffer):
            return "HerReplayBuffer relabels rewards, whose derivatives are unknown"
        if samples_by_itself(self.actor):
            return f"{type(self.actor).__name__} samples actions in its own way, whose noise windows cannot repeat"
        return ""

    def _sizes(self) -> tuple[int, int]:
        """Lengths of an observation and of an action, where there are derivatives."""
        return self.observation_space.shape[0], self.action_space.shape[0]  # type: ignore[index]

    def _warn_about_memory(self) -> None:
        """Count stored derivatives in the same kind of warning that SB3's replay buffer gives."""
        nobs, nu = self._sizes()
        each = DerivativeReplayBuffer.bytes_per_transition(nobs, nu, self.provider_report.tangent_size)
        needed = min(int(self.derivative_memory * 1e9), each * self.buffer_size)
        available = psutil.virtual_memory().available if psutil is not None else math.inf
        if needed > available:
            warnings.warn(
                "This system does not have enough memory to store the derivatives: "
                f"{needed / 1e9:.2f}GB > {available / 1e9:.2f}GB; lower `derivative_memory` (in GB)",
                stacklevel=2,
            )

    def set_env(self, env: GymEnv, force_reset: bool = True) -> None:
        """
        Change the environment, see SB3; its source of derivatives is found anew, and windows begin anew.

        :param env: the new environment
        :param force_reset: reset it before training goes on
        """
        super().set_env(env, force_reset)
        self.rollout_buffer.reset()
        self._valid_history.clear()
        self._attach_dynamics()
        if self.dynamics is not None and self._stored_timesteps is not None:  # a callback did it
            self._is_step_unrecorded = self.num_timesteps > self._stored_timesteps
            self._record_what_is_needed()

    @property
    def simulator_calls(self) -> int:
        """Environment steps simulated since the model was made, in all calls of ``learn``, finite differences included."""
        return self._earlier_timesteps + self.num_timesteps + self._difference_calls

    @property
    def needs_derivatives(self) -> bool:
        """Whether anything makes use of simulator derivatives."""
        by_policy = self.gradient_mode != "q" and self.rollout_epochs > 0
        return self.gradient_steps != 0 and (by_policy or self.critic_grad_coef > 0.0)

    # ------------------------------------------------------------------ steps

    def _sample_action(
        self, learning_starts: int, action_noise: ActionNoise | None = None, n_envs: int = 1
    ) -> tuple[np.ndarray, np.ndarray]:
        self._is_mid_rollout = True
        self._acting_noise = None
        plain = action_noise is None and not self.use_sde and self._acts_as_its_gaussian()
        if self.dynamics is None or self.num_timesteps < learning_starts or not plain:
            return super()._sample_action(learning_starts, action_noise, n_envs)
        with th.no_grad():
            observations, _ = self.policy.obs_to_tensor(self._last_obs)  # type: ignore[arg-type]
            mean, log_std = th.stack(gaussian_parameters(self.actor, observations)).cpu()  # the only copy from the device
            noise = self._draw_noise(mean)
            scaled = th.tanh(mean + log_std.exp() * noise).numpy()
        self._acting_noise, self._acting_actions = noise.numpy(), scaled
        return self.policy.unscale_action(scaled), scaled

    def _acts_as_its_gaussian(self) -> bool:
        """Whether acting is sampling from the actor's Gaussian, without anybody's own ``predict`` in between."""
        own = type(self).predict is not BaseAlgorithm.predict or "predict" in vars(self)
        return not own and not predicts_by_itself(self.policy)

    def _draw_noise(self, mean: th.Tensor) -> th.Tensor:
        """Standard normal noise of the shape of ``mean``."""
        if self.exploration_noise == "white":
            return th.randn_like(mean)
        self._noise_processes = next_processes(self._noise_processes, tuple(mean.shape))
        return pink_noise(self._noise_processes).to(mean)

    def collect_rollouts(self, env: VecEnv, callback: BaseCallback, *args: Any, **kwargs: Any) -> RolloutReturn:
        """See :meth:`stable_baselines3.common.off_policy_algorithm.OffPolicyAlgorithm.collect_rollouts`."""
        # gSDE draws a matrix before callbacks are asked: a checkpoint saved by one of them is to draw the same again
        self._state_before_rollout = torch_generators(self.device) if self.use_sde else None
        self._is_mid_rollout = False
        self._follow_window_sizes()
        try:
            rollout = super().collect_rollouts(env, callback, *args, **kwargs)
            if not rollout.continue_training:
                self._store_last_step(callback.locals)
        except BaseException:  # Ctrl-C as well: the environment has been stepped, or it has not
            begin_new_episodes(self)
            raise
        finally:
            self._is_mid_rollout = False
        return rollout

    def _follow_window_sizes(self) -> None:
        """Begin windows anew where a callback has changed their sizes."""
        if (self.rollout_size, self.horizon) != (self.rollout_buffer.rollout_size, self.rollout_buffer.horizon):
            self.rollout_buffer = self._empty_rollout_buffer()
            if self.dynamics is not None:
                self._record_what_is_needed()

    def _store_last_step(self, step: dict[str, Any]) -> None:
        """
        Store the step after which a callback stopped training. SB3 drops it, and would then go on as if it had not been.

        :param step: local variables of SB3's ``collect_rollouts``
        """
        self._update_info_buffer(step["infos"], step["dones"])
        self._store_transition(
            step["replay_buffer"], step["buffer_actions"], step["new_obs"], step["rewards"], step["dones"], step["infos"]
        )
        for index in np.flatnonzero(step["dones"]):
            self._episode_num += 1
            if self.action_noise is not None:
                self.action_noise.reset(**({"indices": [index]} if self.n_envs > 1 else {}))

    def _store_transition(
        self,
        replay_buffer: ReplayBuffer,
        buffer_action: np.ndarray,
        new_obs: np.ndarray | dict[str, np.ndarray],
        reward: np.ndarray,
        dones: np.ndarray,
        infos: list[dict[str, Any]],
    ) -> None:
        check_step(
            new_obs,
            reward,
            infos,
            space=self.observation_space,
            normalization=self._vec_normalize_env,
            n_steps=self.num_timesteps,
        )
        self._stored_timesteps, is_unrecorded, self._is_step_unrecorded = self.num_timesteps, self._is_step_unrecorded, False
        if self.dynamics is None or is_unrecorded:
            super()._store_transition(replay_buffer, buffer_action, new_obs, reward, dones, infos)
            return
        observations = self._last_original_obs if self._vec_normalize_env is not None else self._last_obs
        super()._store_transition(replay_buffer, buffer_action, new_obs, reward, dones, infos)
        raw_reward = self._vec_normalize_env.get_original_reward() if self._vec_normalize_env is not None else reward
        truncated = np.array([info.get("TimeLimit.truncated", False) for info in infos])
        next_observations = self._successors(new_obs, dones, infos)
        noise = np.full_like(buffer_action, np.nan)
        if self._acting_noise is not None:  # it says nothing about an action that a subclass has put in place of the policy's
            noise = np.where((buffer_action == self._acting_actions).all(-1, keepdims=True), self._acting_noise, noise)
        self.rollout_buffer.add(
            Transition(
                np.array(observations, dtype=np.float32),
                next_observations,
                np.array(buffer_action, dtype=np.float32),
                noise.astype(np.float32),
                np.array(raw_reward, dtype=np.float32),
                dones & ~truncated,
                dones.copy(),
            )
        )
        if self.rollout_buffer.n_pending * self.n_envs >= self.rollout_size:
            self._differentiate_pending()

    def _successors(
        self, new_obs: np.ndarray | dict[str, np.ndarray], dones: np.ndarray, infos: list[dict[str, Any]]
    ) -> np.ndarray:
        """Unnormalised next observations, before any auto-reset."""
        normalization = self._vec_normalize_env
        raw = normalization.get_original_obs() if normalization is not None else new_obs
        successors: np.ndarray = np.array(raw, dtype=np.float32)
        for i in np.flatnonzero(dones):
            terminal = infos[i].get("terminal_observation")
            if terminal is not None:
                successors[i] = terminal if normalization is None else normalization.unnormalize_obs(terminal)
        return successors

    # ------------------------------------------------------------------ derivatives of steps

    def _differentiate_pending(self) -> None:
        """Differentiate the steps collected since the last call, for both buffers."""
        assert self.dynamics is not None
        start = time.perf_counter()
        n_pending = self.rollout_buffer.n_pending
        is_needed = self._needs_derivatives_at(self.num_timesteps)
        if is_needed and self.dynamics.n_recorded == n_pending:
            # Gradient matching is about all derivatives, windows about the action of their first step alone
            by_state = self.rollout_buffer.pending_inner() if self.critic_grad_coef == 0.0 else None
            calls = self.dynamics.simulator_calls
            derivatives = self.dynamics.take(n_pending, by_state)
            self._difference_calls += self.dynamics.simulator_calls - calls
            derivatives = self._distrust_other_rewards(derivatives)
        else:  # nobody wants them; or somebody else has stepped the environment, so that it is unknown which steps are ours
            derivatives = absent_derivatives(n_pending * self.n_envs, *self._sizes(), self.provider_report.tangent_size)
        if is_needed:
            self._check_derivatives(derivatives.valid)
        # A derivative does not see that the episode ends, which is all that matters where it does: the critic knows better
        derivatives = derivatives._replace(valid=derivatives.valid & ~self.rollout_buffer.pending_terminated())
        transitions = self.rollout_buffer.add_derivatives(derivatives)
        if self.critic_grad_coef > 0.0:
            self.derivative_buffer.add(transitions, derivatives)
        self._record("derivative_seconds", time.perf_counter() - start)
        if not self._has_windows_at(self.num_timesteps):
            self.rollout_buffer.reset()
        self._record_what_is_needed()

    def _distrust_other_rewards(self, derivatives: TransitionDerivatives) -> TransitionDerivatives:
        """Where something above the environment, such as a callback, changed a reward, its derivatives are of another one."""
        differentiated, stored = derivatives.reward, self.rollout_buffer.pending_rewards()
        with np.errstate(invalid="ignore"):
            same = np.isclose(differentiated, stored, rtol=REWARD_TOLERANCE, atol=REWARD_TOLERANCE)
        return zero_invalid(derivatives._replace(valid=derivatives.valid & same))

    def _has_windows_at(self, num_timesteps: int) -> bool:
        """Whether steps collected until then make windows: not if no action was the policy's, or nobody uses them."""
        return num_timesteps > self.learning_starts and self.gradient_steps != 0

    def _needs_derivatives_at(self, num_timesteps: int) -> bool:
        """Whether steps collected until then are to be differentiated."""
        return self.needs_derivatives and (self.critic_grad_coef > 0.0 or self._has_windows_at(num_timesteps))

    def _record_what_is_needed(self) -> None:
        """Let the environment record steps, which takes time, only if the next batch of them is to be differentiated."""
        assert self.dynamics is not None
        n_missing = -(-self.rollout_size // self.n_envs) - self.rollout_buffer.n_pending
        if self._needs_derivatives_at(self.num_timesteps + n_missing * self.n_envs):
            self.dynamics.keep_oldest(self.rollout_buffer.n_pending)
        else:
            self.dynamics.discard()
            self.dynamics.pause()

    def _check_derivatives(self, valid: np.ndarray) -> None:
        """Count derivatives that are not to be trusted; too many of them are an error."""
        self._record("derivatives_skipped", float(1.0 - valid.mean()))
        self._valid_history = [*self._valid_history, *valid.tolist()][-INVALID_WINDOW:]
        invalid = 1.0 - float(np.mean(self._valid_history))
        if len(self._valid_history) == INVALID_WINDOW and invalid > self.max_invalid_fraction:
            self._valid_history.clear()  # whoever has helped it gets another try
            own = (
                "see that the environment keeps what its steps depend on in MuJoCo's data or in attributes of its own, not in "
                "global variables, in attributes of its class or where no copy of it can follow; "
            )
            raise ValueError(
                f"{invalid:.0%} of the last {INVALID_WINDOW} simulator derivatives were not finite, exploded, or did not "
                f"reproduce the environment's step (`max_invalid_fraction` is {self.max_invalid_fraction:.0%}). Use larger "
                "steps in `finite_differences`, or smaller ones if they make the simulation unstable; call "
                "`model.set_env(model.get_env(), force_reset=False)` after a change of the environment's options or of the "
                "simulator's model; check that no callback steps the environment (an "
                "evaluation needs one of its own) or changes rewards; "
                f"{own if self.provider_report.kind == 'env_step' else ''}"
                'or train with `gradient_mode="q"`, `critic_grad_coef=0`'
            )

    def _record(self, name: str, value: float) -> None:
        self._statistics.setdefault(name, []).append(value)

    # ------------------------------------------------------------------ learning

    def _setup_learn(
        self,
        total_timesteps: int,
        callback: MaybeCallback = None,
        reset_num_timesteps: bool = True,
        tb_log_name: str = "run",
        progress_bar: bool = False,
    ) -> tuple[int, BaseCallback]:
        will_reset = reset_num_timesteps or self._last_obs is None  # the environment
        if isinstance(self.replay_buffer, NStepReplayBuffer):  # it may be a loaded one, too
            last_obs = self._last_original_obs if self._vec_normalize_env is not None else self._last_obs
            end_last_episode(self.replay_buffer, None if will_reset else last_obs)  # type: ignore[arg-type]
        if self.dynamics is not None and will_reset:
            self.dynamics.discard()
            self.rollout_buffer.reset()
        if reset_num_timesteps:
            self._earlier_timesteps += self.num_timesteps
        noise = None if will_reset else self.action_noise
        noise_process = copy.deepcopy(vars(noise)) if noise is not None else {}
        result = super()._setup_learn(total_timesteps, callback, reset_num_timesteps, tb_log_name, progress_bar)
        self._stored_timesteps = self.num_timesteps
        if noise is not None:  # which SB3 begins anew, although the episode goes on
            vars(noise).update(noise_process)
        try:
            check_observations(self._last_obs, self._vec_normalize_env)  # type: ignore[arg-type]
        except ValueError:
            self._last_obs = None  # the next call resets the environment once more
            raise
        if self.dynamics is not None:
            self._record_what_is_needed()
        return result

    def learn(
        self: SelfAlgorithm,
        total_timesteps: int,
        callback: MaybeCallback = None,
        log_interval: int = 4,
        tb_log_name: str = "run",
        reset_num_timesteps: bool = True,
        progress_bar: bool = False,
    ) -> SelfAlgorithm:
        """See :meth:`stable_baselines3.common.base_class.BaseAlgorithm.learn`."""
        check_learn_arguments(total_timesteps, callback, log_interval)
        assert self.env is not None, "You must set the environment before calling learn(), with `set_env`"
        if is_mid_step(self.env):
            raise RuntimeError(
                "the environment was interrupted inside a step, whose outcome its workers still hold; `set_env` a new one and "
                "call `learn(..., reset_num_timesteps=False)`"
            )
        try:
            with explained_faults(self.env):
                super().learn(
                    total_timesteps=total_timesteps,
                    callback=callback,
                    log_interval=log_interval,
                    tb_log_name=tb_log_name,
                    reset_num_timesteps=reset_num_timesteps,
                    progress_bar=progress_bar,
                )
        finally:
            self._stored_timesteps, self._is_step_unrecorded = None, False
            if self.dynamics is not None:  # steps that others take in the environment need no derivatives
                self._ask_workers(self.dynamics.pause)
        return self

    def _ask_workers(self, question: Callable[[], T]) -> T | None:
        """Ask workers for what can be done without; None if they are closed, dead or inside an interrupted step."""
        if self.env is not None and not is_mid_step(self.env):
            with suppress(OSError, EOFError):
                return question()
        return None

    # ------------------------------------------------------------------ files

    def save_replay_buffer(self, path: str | pathlib.Path | io.BufferedIOBase) -> None:
        """
        Save the replay buffer, and with it the windows and stored derivatives, in one pickle.

        SB3 can read it too, where this package is installed. Windows are left out if the environment has been closed.

        :param path: file
        """
        assert self.replay_buffer is not None, "The replay buffer is not defined"
        records = [] if self.dynamics is None else self._ask_workers(self.dynamics.get_records)
        self.replay_buffer.differentiable = {  # type: ignore[attr-defined]
            "derivatives": self.derivative_buffer,
            "windows": self.rollout_buffer if records is not None else self._empty_rollout_buffer(),
            "window_settings": self._window_settings(),
            "records": records or [],
        }
        try:
            super().save_replay_buffer(path)
        finally:
            del self.replay_buffer.differentiable  # type: ignore[attr-defined]

    def load_replay_buffer(self, path: str | pathlib.Path | io.BufferedIOBase, truncate_last_traj: bool = True) -> None:
        """
        Load a replay buffer, and the windows and stored derivatives if the file has them.

        :param path: file; loading a pickle runs code that it contains, so load only files you trust
        :param truncate_last_traj: see SB3
        """
        super().load_replay_buffer(path, truncate_last_traj)
        if hasattr(self.replay_buffer, "differentiable"):
            saved = self.replay_buffer.differentiable  # type: ignore[union-attr]
            del self.replay_buffer.differentiable  # type: ignore[union-attr]
            self.derivative_buffer = saved["derivatives"]
            self.rollout_buffer = self._empty_rollout_buffer()
            if self.dynamics is not None and saved["window_settings"] == self._window_settings():
                self._ask_workers(functools.partial(self._continue_windows, saved))
            self.rollout_buffer.device = self.derivative_buffer.device = self.device

    def _continue_windows(self, saved: dict[str, Any]) -> None:
        assert self.dynamics is not None
        self.dynamics.set_records(saved["records"])
        self.rollout_buffer = saved["windows"]

    def _window_settings(self) -> tuple[Any, ...]:
        """What must be equal for windows under construction to be continued."""
        source = (type(self.dynamics).__name__, self.provider_report.kind, self.provider_report.signature)
        return (self.rollout_size, self.horizon, self.n_envs, *source)
