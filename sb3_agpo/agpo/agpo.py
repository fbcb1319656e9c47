"""Adaptive Gradient Policy Optimisation: SAC whose policy gradient may flow through the simulator."""

from __future__ import annotations

import inspect
import io
import math
import pathlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, ClassVar, TypeVar

import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.buffers import NStepReplayBuffer, ReplayBuffer
from stable_baselines3.common.noise import ActionNoise
from stable_baselines3.common.policies import BasePolicy
from stable_baselines3.common.type_aliases import (
    GymEnv,
    MaybeCallback,
    ReplayBufferSamples,
    Schedule,
    TrainFreq,
    TrainFrequencyUnit,
)
from stable_baselines3.common.utils import FloatSchedule, get_parameters_by_name, polyak_update, update_learning_rate

from sb3_agpo.agpo.adaptive_gradient import gradient_statistics, temporal_difference_loss, temporal_difference_unit
from sb3_agpo.agpo.arguments import check_arguments, check_names
from sb3_agpo.agpo.checkpoint import MADE_ANEW, TorchGenerators, resume, save_checkpoint
from sb3_agpo.agpo.collection import AUTOMATIC_BUFFERS, DifferentiableOffPolicyAlgorithm
from sb3_agpo.agpo.gates import DEFAULT_GATE, ConstantGate, Gate
from sb3_agpo.agpo.gradient_correction import correction_samples, make_gradient_correction
from sb3_agpo.agpo.n_step import sample_n_step
from sb3_agpo.agpo.policies import (
    Actor,
    AGPOPolicy,
    CnnPolicy,
    EnsembleCritic,
    MlpPolicy,
    MultiInputPolicy,
    samples_by_itself,
)
from sb3_agpo.agpo.rollout_buffer import RolloutWindows
from sb3_agpo.agpo.updates import (
    CriticBatch,
    WindowUpdate,
    critic_batches,
    gradient_matching_loss,
    replayed_policy_loss,
    sample_actions,
    temporal_difference_errors,
    window_update,
)
from sb3_agpo.dynamics.mujoco import FiniteDifferences

SelfAGPO = TypeVar("SelfAGPO", bound="AGPO")

#: steps of the critics' return by default
N_STEPS = 3
#: critic updates per policy update on replayed transitions, where fresh windows train the policy too
POLICY_DELAY_BESIDE_WINDOWS = 8
#: learning rate of the critics by default, in learning rates of the policy
CRITIC_LEARNING_RATE_FACTOR = 2.0
#: critic updates whose batches are drawn at once, from SB3's own replay buffers
BATCHES_AT_ONCE = 4
#: soft update coefficient of the averaged policy by default: this many over the number of policy updates so far, ...
AVERAGED_POLICY = 20
#: ... at most this
LARGEST_POLICY_TAU = 0.01
#: transitions that one update of the temperature may stand for
LONGEST_TEMPERATURE_STEP = 32
#: gradients in a row that may be non-finite before training stops
MAX_NONFINITE = 100


class AGPO(DifferentiableOffPolicyAlgorithm):
    """
    Adaptive Gradient Policy Optimisation (AGPO).

    SAC, whose policy gradient on fresh windows of experience flows through the simulator where the environment offers
    derivatives of its step, except where a gate takes it from the Q function because the transition is rough. On request
    (``critic_grad_coef``) the critics are also trained to satisfy the differentiated Bellman equation on stored transitions
    (gradient matching). Where there are no derivatives, AGPO is SAC with AGPO's networks and settings.

    Arguments up to ``target_entropy`` are SAC's, in SAC's order.

    Implements the idea of the abstract of Gao et al., "Adaptive-Gradient Policy Optimization: Enhancing Policy Learning
    in Non-Smooth Differentiable Simulations", ICML 2024; the gate rule is this package's own. Equation numbers refer to
    :mod:`sb3_agpo.agpo.adaptive_gradient`.

    :param policy: policy class or its alias ("MlpPolicy", "CnnPolicy", "MultiInputPolicy")
    :param env: environment or the id of a registered one
    :param learning_rate: of policy, temperature and, times ``CRITIC_LEARNING_RATE_FACTOR``, critics, unless the latter two are
        given rates of their own; a float or a schedule of the remaining progress (1 to 0)
    :param buffer_size: transitions in the replay buffer
    :param learning_starts: steps with random actions before the first update
    :param batch_size: replayed transitions of each critic and policy update
    :param tau: soft update coefficient of the target critics, in [0, 1], where there are any: with batch normalisation
        the critics are their own targets
    :param gamma: discount factor
    :param train_freq: update every ``train_freq`` steps of the vectorised environment, or ``(n, "episode")``
    :param gradient_steps: critic updates each time; -1 for as many as transitions were collected
    :param action_noise: noise added to actions, in [-1, 1]
    :param replay_buffer_class: replay buffer class; chosen by the observation space if None
    :param replay_buffer_kwargs: its keyword arguments
    :param optimize_memory_usage: memory-efficient replay buffer, see SB3
    :param n_steps: steps of the critics' return; None for ``N_STEPS`` where SB3 has a replay buffer for them and 1 where it
        has not (dictionary observations, ``optimize_memory_usage``, a replay buffer class of your own). The
        gradient-matching target always spans one step
    :param ent_coef: entropy temperature, "auto" to learn it, "auto_0.1" to start from 0.1
    :param target_update_interval: critic updates between updates of the target critics
    :param target_entropy: entropy that a learned temperature aims at; "auto" for minus the number of action dimensions
    :param trace_distance: the critics' return ends before an action further than this from what the policy of now does, in
        its standard deviations (see :func:`~sb3_agpo.agpo.n_step.sample_n_step`); infinity for SB3's return, which never
        ends early. It has a meaning for SB3's ``NStepReplayBuffer`` only, and for actors that sample from SB3's Gaussian
    :param gradient_mode: "adaptive" (gated), "analytic" (gate always 1) or "q" (gate always 0) on fresh windows
    :param horizon: steps of a window. Longer windows rely less on the critic, and more on the simulator being smooth;
        usual range 1 to 16
    :param rollout_size: transitions that make a batch of fresh windows. Smaller batches give more frequent, noisier policy
        updates; usual range 32 to 512
    :param rollout_epochs: policy updates on each batch of fresh windows; 0 turns them off
    :param correction_updates: updates, after each batch of fresh windows, of a network that learns what the critic's gradient
        lacks beside theirs, and corrects it in replayed policy updates
        (:mod:`sb3_agpo.agpo.gradient_correction`); 0 turns it off. Usual range 4 to 16
    :param gate: rule of the gate, an instance of :class:`~sb3_agpo.agpo.gates.Gate` or any callable of its signature
    :param critic_learning_rate: of the critics, a float or a schedule; None for ``CRITIC_LEARNING_RATE_FACTOR`` times
        ``learning_rate``
    :param ent_coef_learning_rate: of a learned temperature, a float or a schedule, per transition collected: an update on
        windows, which stands for many of them, takes a longer step. None for ``learning_rate``
    :param critic_grad_coef: weight of gradient matching in the critics' loss, in units of temporal differences; 0 turns it
        off. It makes an update of the critics half as long again or more, and pays on smooth tasks; 1 is a good first value
    :param critic_grad_batch_size: transitions with derivatives in each critic update
    :param policy_delay: critic updates per policy update on replayed transitions, as SAC makes them; 0 for none, None for
        ``POLICY_DELAY_BESIDE_WINDOWS`` where fresh windows train the policy and 1 where they do not
    :param max_grad_norm: the policy gradient is clipped to this norm, where fresh windows train the policy
    :param policy_tau: soft update coefficient, in (0, 1], of the averaged policy that ``predict`` follows when
        ``deterministic``; 1 for the policy as it is. None for an average over the last twentieth of all policy updates, with
        a coefficient of at most ``LARGEST_POLICY_TAU``
    :param exploration_noise: noise of the policy's own Gaussian while it collects: "white" as in SAC, or "pink", correlated
        over time (see :mod:`sb3_agpo.agpo.pink_noise`). Where there are no derivatives, under gSDE and with
        ``action_noise`` it is white
    :param derivative_memory: most memory for stored derivatives, in gigabytes; the oldest transitions give way
    :param finite_differences: step sizes, scheme and threads of finite differences
    :param max_invalid_fraction: training stops with an error when more than this share of the last
        ``INVALID_WINDOW`` derivatives was not finite or exploded
    :param use_sde: generalised state-dependent exploration
    :param sde_sample_freq: steps between new exploration matrices; -1 for once per rollout
    :param use_sde_at_warmup: use it before ``learning_starts`` too
    :param stats_window_size: episodes that rollout statistics average over
    :param tensorboard_log: folder of the TensorBoard log
    :param policy_kwargs: arguments of the policy, see :class:`~sb3_agpo.agpo.policies.AGPOPolicy`
    :param verbose: 0 nothing, 1 information, 2 debug messages
    :param seed: seed of the pseudo-random generators
    :param device: device of the networks
    :param _init_setup_model: build the networks on construction
    :raises ValueError: if an argument is out of range, naming it
    :raises TypeError: if one is of the wrong type
    """

    policy_aliases: ClassVar[dict[str, type[BasePolicy]]] = {
        "MlpPolicy": MlpPolicy,
        "CnnPolicy": CnnPolicy,
        "MultiInputPolicy": MultiInputPolicy,
    }
    policy: AGPOPolicy
    actor: Actor
    critic: EnsembleCritic
    critic_target: EnsembleCritic

    def __init__(
        self,
        policy: str | type[AGPOPolicy],
        env: GymEnv | str,
        learning_rate: float | Schedule = 3e-4,
        buffer_size: int = 1_000_000,
        learning_starts: int = 1000,
        batch_size: int = 64,
        tau: float = 0.01,
        gamma: float = 0.99,
        train_freq: int | tuple[int, str] = 2,
        gradient_steps: int = 4,
        action_noise: ActionNoise | None = None,
        replay_buffer_class: type[ReplayBuffer] | None = None,
        replay_buffer_kwargs: dict[str, Any] | None = None,
        optimize_memory_usage: bool = False,
        n_steps: int | None = None,
        ent_coef: str | float = "auto_0.1",
        target_update_interval: int = 1,
        target_entropy: str | float = "auto",
        trace_distance: float = 3.0,
        gradient_mode: str = "adaptive",
        horizon: int = 4,
        rollout_size: int = 64,
        rollout_epochs: int = 4,
        correction_updates: int = 0,
        gate: Gate | Callable[[th.Tensor, th.Tensor, int], th.Tensor] | None = None,
        critic_learning_rate: float | Schedule | None = None,
        ent_coef_learning_rate: float | Schedule | None = None,
        critic_grad_coef: float = 0.0,
        critic_grad_batch_size: int = 32,
        policy_delay: int | None = None,
        max_grad_norm: float = 1.0,
        policy_tau: float | None = None,
        exploration_noise: str = "white",
        derivative_memory: float = 0.5,
        finite_differences: FiniteDifferences | None = None,
        max_invalid_fraction: float = 0.5,
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
        check_arguments(locals())
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
            n_steps=n_steps,  # type: ignore[arg-type]  # None is resolved before it is used
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
        self.trace_distance = trace_distance
        self._automatic_buffer = replay_buffer_class is None
        self.target_entropy = target_entropy
        self.log_ent_coef: th.Tensor | None = None
        self.ent_coef = ent_coef
        self.target_update_interval = target_update_interval
        self.ent_coef_optimizer: th.optim.Adam | None = None
        self.gradient_mode = gradient_mode
        self.horizon, self.rollout_size, self.rollout_epochs = horizon, rollout_size, rollout_epochs
        self.correction_updates = correction_updates
        self.gate = gate
        self.critic_learning_rate = critic_learning_rate
        self.ent_coef_learning_rate = ent_coef_learning_rate
        self.critic_grad_coef, self.critic_grad_batch_size = critic_grad_coef, critic_grad_batch_size
        self.policy_delay = policy_delay
        self.max_grad_norm = max_grad_norm
        self.policy_tau = policy_tau
        self.exploration_noise = exploration_noise
        self.derivative_memory = derivative_memory
        self.finite_differences = finite_differences or FiniteDifferences()
        self.max_invalid_fraction = max_invalid_fraction
        self._n_policy_updates = 0
        self._nonfinite_in_a_row: dict[str, int] = {}  # gradients, by what they are of
        if _init_setup_model:
            self._setup_model()

    # ------------------------------------------------------------------ set-up

    def _setup_model(self) -> None:
        if not issubclass(self.policy_class, AGPOPolicy):
            raise ValueError(
                f"`policy` must be a subclass of `AGPOPolicy`, got {self.policy_class.__name__}; load a file of another "
                "algorithm by its own class"
            )
        # SB3 would find out after the first steps
        episodic = isinstance(self.train_freq, (tuple, list)) and self.train_freq[1] in ("episode", TrainFrequencyUnit.EPISODE)
        assert self.n_envs == 1 or not episodic, f"You must use only one env when doing episodic training, got {self.n_envs}"
        self._choose_n_steps()
        given = dict(self.replay_buffer_kwargs)
        is_loaded = self.replay_buffer is not None  # by `load`, from a file that `save(include=["replay_buffer"])` wrote
        super()._setup_model()
        self.replay_buffer_kwargs = given  # without what SB3 added for the buffer of its choice: another would not take it
        if not is_loaded:
            self._store_single_precision()
        self._create_aliases()
        self.batch_norm_stats = get_parameters_by_name(self.critic, ["running_"])
        self.batch_norm_stats_target = get_parameters_by_name(self.critic_target, ["running_"])
        self._setup_entropy()
        self.gradient_correction = make_gradient_correction(self.observation_space, self.action_space, self.device)  # type: ignore[arg-type]
        self._set_up_collection()

    def _choose_n_steps(self) -> None:
        """Resolve ``n_steps=None``, and let SB3 choose its replay buffer anew for a loaded model."""
        self.replay_buffer_kwargs = dict(self.replay_buffer_kwargs or {})  # SB3 adds to it, and it may be the caller's
        self._automatic_buffer &= self.replay_buffer_class in (None, *AUTOMATIC_BUFFERS)  # a file may not say
        if self._automatic_buffer:  # chosen before the model was saved
            self.replay_buffer_class = None
        if self.n_steps is None:
            stock = self.replay_buffer_class is None and not self.optimize_memory_usage
            self.n_steps = N_STEPS if stock and not isinstance(self.observation_space, spaces.Dict) else 1

    def _setup_lr_schedule(self) -> None:
        """SB3's, and those of the learning rates that SB3 does not know."""
        super()._setup_lr_schedule()
        self.critic_lr_schedule, self.ent_coef_lr_schedule = (
            None if learning_rate is None else FloatSchedule(learning_rate)
            for learning_rate in (self.critic_learning_rate, self.ent_coef_learning_rate)
        )

    def _create_aliases(self) -> None:
        self.actor = self.policy.actor
        self.critic = self.policy.critic
        self.critic_target = self.policy.critic_target
        self._list_parameters()

    def _list_parameters(self) -> None:
        """Parameters that follow others; anew before each training, as users may have replaced networks or layers of them."""
        self.policy.begin_average()
        self.policy.find_modes()
        self._critic_parameters: list[th.Tensor] = list(self.critic.parameters())
        self._target_parameters: list[th.Tensor] = list(self.critic_target.parameters())
        self._actor_parameters: list[th.Tensor] = list(self.actor.parameters())
        self._average_parameters: list[th.Tensor] = list(self.policy.average_actor.parameters())

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
            self.ent_coef_optimizer = th.optim.Adam([self.log_ent_coef], lr=self.lr_schedule(1), fused=True)
        else:
            self.ent_coef_tensor = th.tensor(float(self.ent_coef), device=self.device)

    def _convert_train_freq(self) -> None:
        """As in SB3, which takes no lists and no integers of NumPy's."""
        if not isinstance(self.train_freq, TrainFreq):
            steps, unit = self.train_freq if isinstance(self.train_freq, list | tuple) else (self.train_freq, "step")
            self.train_freq = int(steps), unit
        super()._convert_train_freq()

    # ------------------------------------------------------------------ training

    def train(self, gradient_steps: int, batch_size: int = 64) -> None:
        """
        Update critics, temperature and policy.

        :param gradient_steps: critic updates
        :param batch_size: replayed transitions of each
        """
        self._list_parameters()
        self.policy.set_training_mode(True)
        self._update_learning_rates()
        policy_delay = self._current_policy_delay()
        # The samples of another buffer may have an order, and belong into one batch as they are
        at_once = BATCHES_AT_ONCE if type(self.replay_buffer) in AUTOMATIC_BUFFERS else 1
        for first in range(0, gradient_steps, at_once):
            for batch in self._sample_for_critic(min(at_once, gradient_steps - first), batch_size):
                self._update_critic(batch)
                if policy_delay and self._n_updates % policy_delay == 0:
                    self._update_policy_from_replay(batch_size)
                if self._n_updates % self.target_update_interval == 0:
                    self._update_target()
                self._n_updates += 1
        while self.dynamics is not None and self.rollout_buffer.full:
            windows = self.rollout_buffer.take_windows(self._vec_normalize_env)
            for epoch in range(self.rollout_epochs):
                update = self._update_policy_from_windows(windows)
                if epoch == 0 and self._corrects_replay():
                    self._update_correction(windows, update)
        self._write_statistics()

    def _update_learning_rates(self) -> None:
        self._update_learning_rate(self.actor.optimizer)
        critic_learning_rate = self._current_learning_rate(self.critic_lr_schedule, CRITIC_LEARNING_RATE_FACTOR)
        update_learning_rate(self.critic.optimizer, critic_learning_rate)
        self.logger.record("train/critic_learning_rate", critic_learning_rate)

    def _current_learning_rate(self, schedule: Schedule | None, factor: float = 1.0) -> float:
        """The learning rate of a schedule; None stands for ``factor`` times that of ``learning_rate``."""
        if schedule is None:
            return factor * self.lr_schedule(self._current_progress_remaining)
        return schedule(self._current_progress_remaining)

    def _current_policy_delay(self) -> int:
        """Critic updates per replayed policy update, which remind the policy of states that fresh windows do not visit."""
        if self.policy_delay is not None:
            return self.policy_delay
        return POLICY_DELAY_BESIDE_WINDOWS if self._trains_on_windows() else 1

    def _trains_on_windows(self) -> bool:
        """Not, for example, if ``train`` is called on a replay buffer alone."""
        come = self._stored_timesteps is not None or self.rollout_buffer.full
        return self.dynamics is not None and self.rollout_epochs > 0 and come

    def _corrects_replay(self) -> bool:
        """Whether replayed policy updates learn from windows, where there are any."""
        return self.correction_updates > 0 and self.gradient_mode != "q" and self.gradient_correction is not None

    def _current_ent_coef(self) -> th.Tensor:
        if self.log_ent_coef is not None and self.ent_coef_optimizer is not None:
            return self.log_ent_coef.detach().exp()
        return self.ent_coef_tensor

    def _sample_for_critic(self, n_batches: int, batch_size: int) -> list[CriticBatch]:
        """Batches of replayed transitions; drawing them and acting after them at once saves time."""
        if self.use_sde:
            self.actor.reset_noise()
        data = self._sample_transitions(n_batches * batch_size)
        if n_batches == 1:  # all that a buffer of one's own returned, which may be more
            batch_size = len(data.actions)
        return critic_batches(self.policy, data, self.gamma, self._current_ent_coef(), batch_size)

    def _sample_transitions(self, n: int) -> ReplayBufferSamples:
        """Replayed transitions with the critics' returns, cut where they leave the policy."""
        buffer, env = self.replay_buffer, self._vec_normalize_env
        if self._automatic_buffer and isinstance(buffer, NStepReplayBuffer):
            # A callback may have changed them, and the buffer may be a loaded one
            buffer.gamma, buffer.n_steps = self.gamma, self.n_steps
        cuts_traces = self.trace_distance < math.inf and not samples_by_itself(self.actor)  # whose Gaussian says nothing
        if type(buffer) is NStepReplayBuffer and buffer.n_steps > 1 and cuts_traces:
            data, trace_length = sample_n_step(buffer, n, self.actor, self.trace_distance, env)
            self._record("trace_length", trace_length)
            return data
        return buffer.sample(n, env=env)  # type: ignore[union-attr]

    def _update_critic(self, batch: CriticBatch) -> None:
        """Temporal differences on replayed transitions, gradient matching on stored derivatives."""
        errors = temporal_difference_errors(self.policy, batch)
        loss = temporal_difference_loss(errors)
        self._record("critic_loss", loss.item())
        if self.critic_grad_coef > 0.0 and self.derivative_buffer.size > 0:
            derivatives = self.derivative_buffer.sample(self.critic_grad_batch_size, self._vec_normalize_env)
            matching = gradient_matching_loss(self.policy, derivatives, self.gamma, self._current_ent_coef())
            self._record("matching_loss", matching.item())
            loss = loss + self.critic_grad_coef * temporal_difference_unit(errors) * matching  # (13)
        if math.isfinite(self._step("critic", self.critic.optimizer, loss)):
            self.critic.update_statistics()

    def _update_policy_from_replay(self, batch_size: int) -> None:
        """SAC's update of policy and temperature, on states that the critics have not just been fitted to."""
        if self.use_sde:
            self.actor.reset_noise()
        data = self.replay_buffer.sample(batch_size, env=self._vec_normalize_env)  # type: ignore[union-attr]
        # Beside windows, both kinds of update have a say in Adam's moments only if they are of one size
        beside_windows = self._trains_on_windows()
        max_norm = self.max_grad_norm if beside_windows else math.inf
        correction = self.gradient_correction if beside_windows and self._corrects_replay() else None
        with self._critic_held_fixed():
            loss, log_prob = replayed_policy_loss(self.policy, data.observations, self._current_ent_coef(), correction)
            self._record("actor_loss", loss.item())
            self._step("actor", self.actor.optimizer, loss, max_norm)
        self._update_average_policy()
        self._update_temperature(log_prob, 1.0)

    @contextmanager
    def _critic_held_fixed(self) -> Iterator[None]:
        """Take no gradients by the critics' weights, which the policy's loss would compute for nothing."""
        # Not all of the critic's parameters: a features extractor shared with the actor learns from the actor's loss
        parameters = [parameter for group in self.critic.optimizer.param_groups for parameter in group["params"]]
        trainable = [parameter for parameter in parameters if parameter.requires_grad]  # users may have frozen some
        for parameter in trainable:
            parameter.requires_grad_(False)
        try:
            yield
        finally:
            for parameter in trainable:
                parameter.requires_grad_(True)

    def _update_temperature(self, log_prob: th.Tensor, n_transitions: float) -> None:
        """Move the temperature as far as SAC does in ``n_transitions`` updates, within reason."""
        self._record("ent_coef", self._current_ent_coef().item())
        if self.log_ent_coef is None or self.ent_coef_optimizer is None:
            return
        assert isinstance(self.target_entropy, float)
        loss = -(self.log_ent_coef * (log_prob.detach() + self.target_entropy)).mean()
        self._record("ent_coef_loss", loss.item())
        learning_rate = self._current_learning_rate(self.ent_coef_lr_schedule)
        update_learning_rate(self.ent_coef_optimizer, learning_rate * min(n_transitions, LONGEST_TEMPERATURE_STEP))
        self._step("ent_coef", self.ent_coef_optimizer, loss)

    def _update_policy_from_windows(self, windows: RolloutWindows) -> WindowUpdate:
        """The adaptive gradient on fresh windows; then the temperature, which must not run ahead of the policy."""
        update = window_update(self.policy, windows, self._gate(), self.gamma, self._current_ent_coef())
        for name, value in gradient_statistics(update.gradient, update.critic.q_a, windows.mask).items():
            self._record(name, value)
        norm = self._step("actor (on windows)", self.actor.optimizer, update.loss, self.max_grad_norm)
        self._record("policy_grad_norm", norm)
        self._update_average_policy()
        with th.no_grad():  # fresh noise: that of recorded actions was seen by the policy that it made better
            _, log_prob = sample_actions(self.actor, windows.observations[windows.mask > 0])
        self._update_temperature(log_prob, float(windows.mask.sum()) / self.rollout_epochs)
        return update

    def _update_correction(self, windows: RolloutWindows, update: WindowUpdate) -> None:
        """Learn what the critic's gradient lacks on the newest windows, once it is known how well that was foreseen."""
        correction = self.gradient_correction
        assert correction is not None
        adaptive, critic = update.gradient.g_a, update.critic.q_a
        samples = correction_samples(windows.observations, windows.actions, adaptive, critic, windows.mask)
        if len(samples.targets) == 0:
            return
        self._record("correction_explained", correction.compare(samples))
        self._record("correction_trust", correction.trust.item())
        correction.remember(samples)
        for _ in range(self.correction_updates if correction.can_learn else 0):
            self._step("correction", correction.optimizer, correction.loss())

    def _gate(self) -> Callable[[th.Tensor, th.Tensor, int], th.Tensor]:
        if self.gradient_mode == "adaptive":
            return self.gate if self.gate is not None else DEFAULT_GATE()
        return ConstantGate(1.0 if self.gradient_mode == "analytic" else 0.0)

    def _step(self, name: str, optimizer: th.optim.Optimizer, loss: th.Tensor, max_norm: float = math.inf) -> float:
        """
        Take one optimiser step, unless the gradient is not finite.

        :param name: what the gradient is of; non-finite ones in a row are counted for each name
        :param optimizer: the optimiser
        :param loss: scalar
        :param max_norm: the gradient is clipped to this norm
        :return: norm of the gradient before clipping; 0 if all that the loss depends on is frozen
        :raises ValueError: after ``MAX_NONFINITE`` such gradients in a row
        """
        if not loss.requires_grad:
            return 0.0
        optimizer.zero_grad()
        loss.backward()
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        total_norm = th.nn.utils.get_total_norm([parameter.grad for parameter in parameters if parameter.grad is not None])
        if math.isfinite(max_norm):
            th.nn.utils.clip_grads_with_norm_(parameters, max_norm, total_norm)
        norm = total_norm.item()
        self._record("nonfinite_skipped", float(not np.isfinite(norm)))
        if np.isfinite(norm):
            self._nonfinite_in_a_row[name] = 0
            optimizer.step()
            return norm
        optimizer.zero_grad()
        self._nonfinite_in_a_row[name] = self._nonfinite_in_a_row.get(name, 0) + 1
        if self._nonfinite_in_a_row[name] >= MAX_NONFINITE:
            raise ValueError(
                f"The last {MAX_NONFINITE} {name} gradients were not finite; the weights are still those before them. "
                "Check that observations and rewards are moderate numbers (`VecNormalize` scales them), or lower "
                "`learning_rate`"
            )
        return norm

    def _update_target(self) -> None:
        if self.critic_target is self.critic:  # batch normalisation needs no target networks
            return
        with th.no_grad():
            th._foreach_lerp_(self._target_parameters, self._critic_parameters, self.tau)
        # Running statistics of batch normalisation are copied, see SB3 GH issue #996
        polyak_update(self.batch_norm_stats, self.batch_norm_stats_target, 1.0)

    def _update_average_policy(self) -> None:
        """Move the averaged policy towards the policy."""
        self._n_policy_updates += 1
        self.policy.is_averaged = True
        with th.no_grad():
            th._foreach_lerp_(self._average_parameters, self._actor_parameters, self._current_policy_tau())
            for average, current in zip(self.policy.average_actor.buffers(), self.actor.buffers(), strict=True):
                average.copy_(current)

    def _current_policy_tau(self) -> float:
        if self.policy_tau is not None:
            return self.policy_tau
        return min(AVERAGED_POLICY / self._n_policy_updates, LARGEST_POLICY_TAU)

    # ------------------------------------------------------------------ logging

    def _write_statistics(self) -> None:
        for name, values in self._statistics.items():
            self.logger.record_mean(f"train/{name}", float(np.mean(values)))
        self._statistics.clear()
        self.logger.record("train/n_updates", self._n_updates, exclude="tensorboard")

    # ------------------------------------------------------------------ SB3

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
        return super().learn(total_timesteps, callback, log_interval, tb_log_name, reset_num_timesteps, progress_bar)

    @classmethod
    def load(cls: type[SelfAGPO], path: str | pathlib.Path | io.BufferedIOBase, *args: Any, **kwargs: Any) -> SelfAGPO:
        """
        Load a model, see SB3: ``load(path, env=None, device="auto", custom_objects=None, ...)``.

        :param path: file that ``save`` wrote; it is a pickle, so load only files you trust
        :param args: other arguments of SB3's ``load``
        :param kwargs: likewise, and constructor arguments to change
        :return: the model
        :raises ValueError: if an argument to change is out of range
        :raises TypeError: if one is of the wrong type, or misspelt
        """
        check_names(set(kwargs) - set(inspect.signature(super().load).parameters), cls.__init__)
        check_arguments(kwargs)
        if "replay_buffer_class" in kwargs:
            kwargs["_automatic_buffer"] = kwargs["replay_buffer_class"] is None
        model = super().load(path, *args, **kwargs)
        if "ent_coef" in kwargs and model.ent_coef_optimizer is None:
            model.ent_coef_tensor.fill_(float(model.ent_coef))  # SB3 has put back the file's
        return model

    def save_checkpoint(
        self, directory: str | pathlib.Path, keep: int = 1, torch_generator: TorchGenerators | th.Tensor | None = None
    ) -> pathlib.Path:
        """
        Add a checkpoint to a directory, from which :meth:`resume` goes on bit for bit; see :mod:`sb3_agpo.agpo.checkpoint`.

        To be called between two calls of ``learn``;
        :class:`~sb3_agpo.tracking.callbacks.ResumableCheckpointCallback` does it while learning.

        :param directory: directory of checkpoints, made if it does not exist; the newest in it is always complete
        :param keep: checkpoints to keep, the new one included
        :param torch_generator: state of torch's generators to go on with, or of that of the CPU alone; None for those of now
        :return: the new checkpoint
        :raises OSError: if it cannot be written; checkpoints that were there stay as they were
        """
        return save_checkpoint(self, directory, keep, torch_generator)

    @classmethod
    def resume(cls: type[SelfAGPO], directory: str | pathlib.Path, env: GymEnv | str, **kwargs: Any) -> SelfAGPO:
        """
        Make a model that goes on where a checkpoint was saved: ``learn(remaining steps, reset_num_timesteps=False)``.

        Nothing in a checkpoint runs code, other than in the files of ``save`` and ``save_replay_buffer``.

        :param directory: directory of checkpoints, or one of them
        :param env: environment made as that of the checkpoint was; it is put back to where it was
        :param kwargs: constructor arguments to change, and those that could not be saved, such as functions. Another ``seed``
            is that of what comes; an episode that has begun goes on as it would have
        :return: the model
        :raises ValueError: if there is no whole checkpoint that fits, naming what to do
        """
        return resume(cls, directory, env, **kwargs)

    def _excluded_save_params(self) -> list[str]:
        return [
            *super()._excluded_save_params(),
            *MADE_ANEW,
            "_acting_noise",
            "_acting_actions",
            "_noise_processes",
            "_valid_history",
        ]

    def _get_torch_save_params(self) -> tuple[list[str], list[str]]:
        state_dicts = ["policy", "actor.optimizer", "critic.optimizer"]
        if self.gradient_correction is not None:
            state_dicts += ["gradient_correction", "gradient_correction.optimizer"]
        if self.ent_coef_optimizer is not None:
            return [*state_dicts, "ent_coef_optimizer"], ["log_ent_coef"]
        return state_dicts, ["ent_coef_tensor"]
