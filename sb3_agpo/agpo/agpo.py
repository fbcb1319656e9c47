"""Adaptive Gradient Policy Optimisation: SAC whose policy gradient may flow through the simulator."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable
from typing import Any, ClassVar, TypeVar

import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.buffers import ReplayBuffer
from stable_baselines3.common.noise import ActionNoise
from stable_baselines3.common.off_policy_algorithm import OffPolicyAlgorithm
from stable_baselines3.common.policies import BasePolicy
from stable_baselines3.common.type_aliases import GymEnv, MaybeCallback, Schedule
from stable_baselines3.common.utils import FloatSchedule, get_parameters_by_name, update_learning_rate
from torch.nn import functional as F

from sb3_agpo.agpo.adaptive_gradient import (
    AdaptiveGradient,
    CriticGradients,
    WindowDerivatives,
    adaptive_gradient,
    gradient_statistics,
    matching_loss,
    matching_targets,
    policy_loss,
)
from sb3_agpo.agpo.gates import ConstantGate, DisagreementGate, Gate
from sb3_agpo.agpo.policies import AGPOPolicy, CnnPolicy, EnsembleCritic, MlpPolicy, MultiInputPolicy
from sb3_agpo.agpo.rollout_buffer import (
    DerivativeReplayBuffer,
    DifferentiableRolloutBuffer,
    RolloutWindows,
    Transition,
)
from sb3_agpo.agpo.squashed_gaussian import infer_noise, squashed_sample
from sb3_agpo.dynamics.mujoco import FiniteDifferences
from sb3_agpo.dynamics.provider import VecEnvDynamics, attach_dynamics

SelfAGPO = TypeVar("SelfAGPO", bound="AGPO")

GRADIENT_MODES = ("adaptive", "analytic", "q")


class AGPO(OffPolicyAlgorithm):
    """
    Adaptive Gradient Policy Optimisation (AGPO).
    """

    policy_aliases: ClassVar[dict[str, type[BasePolicy]]] = {
        "MlpPolicy": MlpPolicy,
        "CnnPolicy": CnnPolicy,
        "MultiInputPolicy": MultiInputPolicy,
    }
    policy: AGPOPolicy
    critic: EnsembleCritic
    critic_target: EnsembleCritic

    def __init__(
        self,
        policy: str | type[AGPOPolicy],
        env: GymEnv | str,
        learning_rate: float | Schedule = 1e-3,
        buffer_size: int = 1_000_000,
        learning_starts: int = 1000,
        batch_size: int = 256,
        tau: float = 0.005,
        gamma: float = 0.99,
        train_freq: int | tuple[int, str] = 2,
        gradient_steps: int = 1,
        action_noise: ActionNoise | None = None,
        replay_buffer_class: type[ReplayBuffer] | None = None,
        replay_buffer_kwargs: dict[str, Any] | None = None,
        optimize_memory_usage: bool = False,
        n_steps: int = 1,
        ent_coef: str | float = "auto_0.02",
        target_update_interval: int = 1,
        target_entropy: str | float = "auto",
        gradient_mode: str = "adaptive",
        horizon: int = 4,
        rollout_size: int = 64,
        rollout_epochs: int = 1,
        gate: Gate | Callable[[th.Tensor, th.Tensor, int], th.Tensor] | None = None,
        critic_learning_rate: float | Schedule | None = 5e-4,
        critic_grad_coef: float = 1.0,
        critic_grad_batch_size: int = 64,
        policy_delay: int = 2,
        max_grad_norm: float = 1.0,
        derivative_memory: float = 0.5,
        finite_differences: FiniteDifferences | None = None,
        use_sde: bool = False,
        sde_sample_freq: int = -1,
        use_sde_at_warmup: bool = False,
        stats_window_size: int = 100,
        tensorboard_log: str | None = None,
        policy_kwargs: dict[str, Any] | None = None,
        verbose: int = 0,
        seed: int | None = None,
        device: th.device | str = "auto",
        _init_setup_model: bool = True,
    ) -> None:
        super().__init__(
            policy,
            env,
            learning_rate,
            buffer_size,
            learning_starts,
            batch_size,
            tau,
            gamma,
            train_freq,
            gradient_steps,
            action_noise,
            replay_buffer_class=replay_buffer_class,
            replay_buffer_kwargs=replay_buffer_kwargs,
            optimize_memory_usage=optimize_memory_usage,
            n_steps=n_steps,
            policy_kwargs=policy_kwargs,
            stats_window_size=stats_window_size,
            tensorboard_log=tensorboard_log,
            verbose=verbose,
            device=device,
            seed=seed,
            use_sde=use_sde,
            sde_sample_freq=sde_sample_freq,
            use_sde_at_warmup=use_sde_at_warmup,
            supported_action_spaces=(spaces.Box,),
            support_multi_env=True,
        )
        self.target_entropy = target_entropy
        self.log_ent_coef: th.Tensor | None = None
        self.ent_coef = ent_coef
        self.target_update_interval = target_update_interval
        self.ent_coef_optimizer: th.optim.Adam | None = None
        self.gradient_mode = gradient_mode
        self.horizon, self.rollout_size, self.rollout_epochs = horizon, rollout_size, rollout_epochs
        self.gate = gate
        self.critic_learning_rate = critic_learning_rate
        self.critic_grad_coef, self.critic_grad_batch_size = critic_grad_coef, critic_grad_batch_size
        self.policy_delay = policy_delay
        self.max_grad_norm = max_grad_norm
        self.derivative_memory = derivative_memory
        self.finite_differences = finite_differences or FiniteDifferences()
        self.dynamics: VecEnvDynamics | None = None
        self._statistics: dict[str, list[float]] = {}
        self._acting_noise: np.ndarray | None = None
        if _init_setup_model:
            self._setup_model()

    # ------------------------------------------------------------------ set-up

    def _setup_model(self) -> None:
        super()._setup_model()
        self._create_aliases()
        self.batch_norm_stats = get_parameters_by_name(self.critic, ["running_"])
        self.batch_norm_stats_target = get_parameters_by_name(self.critic_target, ["running_"])
        self._setup_entropy()
        self.critic_lr_schedule = FloatSchedule(self.critic_learning_rate or self.learning_rate)
        self.rollout_buffer = DifferentiableRolloutBuffer(self.rollout_size, self.horizon, self.n_envs, self.device)
        self.derivative_buffer = DerivativeReplayBuffer(self.buffer_size, int(self.derivative_memory * 1e9), self.device)
        if self.env is not None:
            self.dynamics, self.provider_report = attach_dynamics(self.env, self.finite_differences)
            if self.verbose >= 1:
                print(f"Derivatives: {self.provider_report.kind} ({self.provider_report.reason})")

    def _create_aliases(self) -> None:
        self.actor = self.policy.actor
        self.critic = self.policy.critic
        self.critic_target = self.policy.critic_target

    def _setup_entropy(self) -> None:
        if self.target_entropy == "auto":
            self.target_entropy = float(-np.prod(self.action_space.shape).astype(np.float32))  # type: ignore[arg-type]
        else:
            self.target_entropy = float(self.target_entropy)
        if isinstance(self.ent_coef, str) and self.ent_coef.startswith("auto"):
            init_value = 1.0
            if "_" in self.ent_coef:
                init_value = float(self.ent_coef.split("_")[1])
                assert init_value > 0.0, "The initial value of ent_coef must be greater than 0"
            self.log_ent_coef = th.log(th.ones(1, device=self.device) * init_value).requires_grad_(True)
            self.ent_coef_optimizer = th.optim.Adam([self.log_ent_coef], lr=self.lr_schedule(1))
        else:
            self.ent_coef_tensor = th.tensor(float(self.ent_coef), device=self.device)

    @property
    def simulator_calls(self) -> int:
        """Environment steps simulated in total, finite differences included."""
        return self.num_timesteps + (self.dynamics.simulator_calls if self.dynamics is not None else 0)

    # ------------------------------------------------------------------ collection

    def _sample_action(
        self, learning_starts: int, action_noise: ActionNoise | None = None, n_envs: int = 1
    ) -> tuple[np.ndarray, np.ndarray]:
        self._acting_noise = None
        if self.dynamics is None or self.num_timesteps < learning_starts or action_noise is not None or self.use_sde:
            return super()._sample_action(learning_starts, action_noise, n_envs)
        with th.no_grad():
            observations, _ = self.policy.obs_to_tensor(self._last_obs)  # type: ignore[arg-type]
            mean, log_std, _ = self.actor.get_action_dist_params(observations)  # type: ignore[operator]
            noise = th.randn_like(mean)
            scaled = th.tanh(mean + log_std.exp() * noise).cpu().numpy()
        self._acting_noise = noise.cpu().numpy()
        return self.policy.unscale_action(scaled), scaled

    def _store_transition(
        self,
        replay_buffer: ReplayBuffer,
        buffer_action: np.ndarray,
        new_obs: np.ndarray | dict[str, np.ndarray],
        reward: np.ndarray,
        dones: np.ndarray,
        infos: list[dict[str, Any]],
    ) -> None:
        if self.dynamics is None:
            super()._store_transition(replay_buffer, buffer_action, new_obs, reward, dones, infos)
            return
        observations = self._last_original_obs if self._vec_normalize_env is not None else self._last_obs
        position = replay_buffer.pos
        super()._store_transition(replay_buffer, buffer_action, new_obs, reward, dones, infos)
        raw_reward = self._vec_normalize_env.get_original_reward() if self._vec_normalize_env is not None else reward
        truncated = np.array([info.get("TimeLimit.truncated", False) for info in infos])
        next_observations = self._successors(new_obs, dones, infos)
        del position
        noise = self._acting_noise if self._acting_noise is not None else np.full_like(buffer_action, np.nan)
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
        successors = np.array(raw, dtype=np.float32)
        for i in np.flatnonzero(dones):
            terminal = infos[i].get("terminal_observation")
            if terminal is not None:
                successors[i] = normalization.unnormalize_obs(terminal) if normalization is not None else terminal
        return successors

    def _differentiate_pending(self) -> None:
        """Differentiate the steps collected since the last call, for both buffers."""
        assert self.dynamics is not None
        start = time.perf_counter()
        derivatives = self.dynamics.take(self.rollout_buffer.n_pending)
        transitions = self.rollout_buffer.add_derivatives(derivatives)
        if self.critic_grad_coef > 0.0:
            self.derivative_buffer.add(transitions, derivatives)
        self._record("derivative_seconds", time.perf_counter() - start)
        self._record("derivatives_skipped", float(1.0 - derivatives.valid.mean()))
        if self.num_timesteps <= self.learning_starts:  # actions were not the policy's
            self.rollout_buffer.reset()

    # ------------------------------------------------------------------ training

    def train(self, gradient_steps: int, batch_size: int = 64) -> None:
        """
        Update critics, temperature and policy.

        :param gradient_steps: critic updates
        :param batch_size: replayed transitions of each
        """
        self.policy.set_training_mode(True)
        self._update_learning_rates()
        for _ in range(gradient_steps):
            self._update_critic(batch_size)
            if self.policy_delay and self._n_updates % self.policy_delay == 0:
                self._update_policy_from_replay(batch_size)
            if self._n_updates % self.target_update_interval == 0:
                self._update_target()
            self._n_updates += 1
        if self.dynamics is not None and self.rollout_buffer.full:
            for _ in range(self.rollout_epochs):
                self._update_policy_from_windows()
            self.rollout_buffer.reset()
        self._write_statistics()

    def _update_learning_rates(self) -> None:
        optimizers = [self.actor.optimizer]
        if self.ent_coef_optimizer is not None:
            optimizers.append(self.ent_coef_optimizer)
        self._update_learning_rate(optimizers)
        update_learning_rate(self.critic.optimizer, self.critic_lr_schedule(self._current_progress_remaining))

    def _current_ent_coef(self) -> th.Tensor:
        return self.log_ent_coef.detach().exp() if self.log_ent_coef is not None else self.ent_coef_tensor

    def _act(self, observations: th.Tensor) -> tuple[th.Tensor, th.Tensor]:
        """Reparametrised actions ``(n, nu)`` and log-densities ``(n,)``."""
        if self.use_sde:
            return self.actor.action_log_prob(observations)  # type: ignore[operator]
        mean, log_std, _ = self.actor.get_action_dist_params(observations)  # type: ignore[operator]
        return squashed_sample(mean, log_std, th.randn_like(mean))

    def _next_values(self, observations: th.Tensor) -> th.Tensor:
        """V(o'), equation (6), from the target critics, ``(n,)``."""
        actions, log_prob = self._act(observations)
        return self.critic_target.q_values(observations, actions).min(0).values - self._current_ent_coef() * log_prob

    def _update_critic(self, batch_size: int) -> None:
        data = self.replay_buffer.sample(batch_size, env=self._vec_normalize_env)  # type: ignore[union-attr]
        discounts = data.discounts.squeeze(-1) if data.discounts is not None else self.gamma
        if self.use_sde:
            self.actor.reset_noise()
        with th.no_grad():
            next_values = self._next_values(data.next_observations)
            targets = data.rewards.squeeze(-1) + (1 - data.dones.squeeze(-1)) * discounts * next_values
        q_values = self.critic.q_values(data.observations, data.actions)
        loss = 0.5 * (q_values - targets).square().mean(1).sum()
        self._record("critic_loss", loss.item())
        if self.critic_grad_coef > 0.0 and self.derivative_buffer.size > 0:
            matching = self._matching_loss()
            self._record("matching_loss", matching.item())
            loss = loss + self.critic_grad_coef * matching
        self._step(self.critic.optimizer, loss, float("inf"))

    def _matching_loss(self) -> th.Tensor:
        """Gradient matching, equations (8) and (9)."""
        batch = self.derivative_buffer.sample(self.critic_grad_batch_size, self._vec_normalize_env)
        next_obs = batch.next_observations.requires_grad_(True)
        (next_value_gradient,) = th.autograd.grad(self._next_values(next_obs).sum(), next_obs)
        discount = self.gamma * (1.0 - batch.terminated)
        action_targets = matching_targets(batch.r_a, batch.O_a, next_value_gradient, discount)
        state_targets = matching_targets(batch.r_x, batch.O_x, next_value_gradient, discount)
        n = self.critic.n_critics
        obs = batch.observations.expand(n, -1, -1).clone().requires_grad_(True)  # (n_critics, batch, nobs)
        actions = batch.actions.expand(n, -1, -1).clone().requires_grad_(True)
        q_values = self.critic.q_networks(th.cat([obs, actions], dim=-1))
        q_o, q_a = th.autograd.grad(q_values.sum(), (obs, actions), create_graph=True)
        q_x = th.einsum("nbo,box->nbx", q_o, batch.C)
        return matching_loss(q_a, action_targets) + matching_loss(q_x, state_targets)

    def _update_policy_from_replay(self, batch_size: int) -> None:
        data = self.replay_buffer.sample(batch_size, env=self._vec_normalize_env)  # type: ignore[union-attr]
        actions, log_prob = self._act(data.observations)
        self._update_temperature(log_prob)
        self.critic.requires_grad_(False)
        q_values = self.critic.q_values(data.observations, actions).min(0).values
        loss = (self._current_ent_coef() * log_prob - q_values).mean()
        self._record("actor_loss", loss.item())
        self._step(self.actor.optimizer, loss, float("inf"))
        self.critic.requires_grad_(True)

    def _update_temperature(self, log_prob: th.Tensor) -> None:
        self._record("ent_coef", self._current_ent_coef().item())
        if self.log_ent_coef is None or self.ent_coef_optimizer is None:
            return
        loss = -(self.log_ent_coef * (log_prob.detach() + self.target_entropy)).mean()
        self._record("ent_coef_loss", loss.item())
        self._step(self.ent_coef_optimizer, loss, float("inf"))

    def _update_policy_from_windows(self) -> None:
        windows = self.rollout_buffer.windows(self._vec_normalize_env)
        steps = [self._act_as_recorded(windows, t) for t in range(self.horizon)]
        ent_coef = self._current_ent_coef()

        def pullback(t: int, action_gradient: th.Tensor) -> th.Tensor:
            obs, actions, log_prob = steps[t]
            outputs = ((action_gradient * actions).sum() - ent_coef * log_prob.sum()).squeeze()
            return th.autograd.grad(outputs, obs, retain_graph=True)[0]

        critic = self._critic_gradients(windows)
        gradient = adaptive_gradient(
            WindowDerivatives(*(getattr(windows, name) for name in WindowDerivatives._fields)),
            critic,
            pullback,
            self._gate(),
            gamma=self.gamma,
            terminated=windows.terminated,
            boundary=windows.boundary,
            valid=windows.valid,
        )
        loss = self._window_loss(steps, gradient, windows.mask)
        for name, value in gradient_statistics(gradient, critic.q_a, windows.mask).items():
            self._record(name, value)
        self._step(self.actor.optimizer, loss, self.max_grad_norm)

    def _act_as_recorded(self, windows: RolloutWindows, t: int) -> tuple[th.Tensor, th.Tensor, th.Tensor]:
        """Step ``t`` as the policy of now acts with the noise of then: leaf observations, actions, log-densities."""
        obs = windows.observations[t].requires_grad_(True)
        mean, log_std, _ = self.actor.get_action_dist_params(obs)  # type: ignore[operator]
        inferred = infer_noise(windows.actions[t], mean.detach(), log_std.detach())
        noise = th.where(th.isnan(windows.noise[t]), inferred, windows.noise[t])
        return obs, *squashed_sample(mean, log_std, noise)

    def _critic_gradients(self, windows: RolloutWindows) -> CriticGradients:
        obs = windows.observations.detach().flatten(0, 1).requires_grad_(True)
        actions = windows.actions.flatten(0, 1).requires_grad_(True)
        next_obs = windows.next_observations.flatten(0, 1).requires_grad_(True)
        q_values = self.critic.q_values(obs, actions).min(0).values
        q_o, q_a = th.autograd.grad(q_values.sum(), (obs, actions))
        (v_o,) = th.autograd.grad(self._next_values(next_obs).sum(), next_obs)
        shape = windows.terminated.shape
        return CriticGradients(*(g.reshape(*shape, -1) for g in (q_a, q_o, v_o)))

    def _window_loss(
        self, steps: list[tuple[th.Tensor, th.Tensor, th.Tensor]], gradient: AdaptiveGradient, mask: th.Tensor
    ) -> th.Tensor:
        actions = th.cat([step[1] for step in steps])
        log_prob = th.cat([step[2] for step in steps])
        return policy_loss(actions, log_prob, gradient.g_a.flatten(0, 1), self._current_ent_coef(), mask.flatten())

    def _gate(self) -> Callable[[th.Tensor, th.Tensor, int], th.Tensor]:
        if self.gradient_mode == "adaptive":
            return self.gate if self.gate is not None else DisagreementGate()
        return ConstantGate(1.0 if self.gradient_mode == "analytic" else 0.0)

    def _step(self, optimizer: th.optim.Optimizer, loss: th.Tensor, max_norm: float) -> None:
        optimizer.zero_grad()
        loss.backward()
        if np.isfinite(max_norm):
            parameters = [p for group in optimizer.param_groups for p in group["params"]]
            self._record("policy_grad_norm", th.nn.utils.clip_grad_norm_(parameters, max_norm).item())
        optimizer.step()

    def _update_target(self) -> None:
        with th.no_grad():
            th._foreach_lerp_(list(self.critic_target.parameters()), list(self.critic.parameters()), self.tau)

    # ------------------------------------------------------------------ logging

    def _record(self, name: str, value: float) -> None:
        self._statistics.setdefault(name, []).append(value)

    def _write_statistics(self) -> None:
        for name, values in self._statistics.items():
            self.logger.record_mean(f"train/{name}", float(np.mean(values)))
        self._statistics.clear()
        self.logger.record("train/n_updates", self._n_updates, exclude="tensorboard")

    # ------------------------------------------------------------------ SB3

    def _setup_learn(self, *args: Any, **kwargs: Any) -> Any:
        if self.dynamics is not None:
            self.dynamics.discard()
            self.rollout_buffer.reset()
        return super()._setup_learn(*args, **kwargs)

    def learn(
        self: SelfAGPO,
        total_timesteps: int,
        callback: MaybeCallback = None,
        log_interval: int = 4,
        tb_log_name: str = "AGPO",
        reset_num_timesteps: bool = True,
        progress_bar: bool = False,
    ) -> SelfAGPO:
        """See :meth:`stable_baselines3.common.base_class.BaseAlgorithm.learn`."""
        return super().learn(
            total_timesteps=total_timesteps,
            callback=callback,
            log_interval=log_interval,
            tb_log_name=tb_log_name,
            reset_num_timesteps=reset_num_timesteps,
            progress_bar=progress_bar,
        )

    def _excluded_save_params(self) -> list[str]:
        return [
            *super()._excluded_save_params(),
            "actor",
            "critic",
            "critic_target",
            "dynamics",
            "derivative_buffer",
            "_statistics",
            "_acting_noise",
        ]

    def _get_torch_save_params(self) -> tuple[list[str], list[str]]:
        state_dicts = ["policy", "actor.optimizer", "critic.optimizer"]
        if self.ent_coef_optimizer is not None:
            return [*state_dicts, "ent_coef_optimizer"], ["log_ent_coef"]
        return state_dicts, ["ent_coef_tensor"]
