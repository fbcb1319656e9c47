"""Buffers for experience with derivatives: fresh windows for the policy, recent transitions for the critic."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import torch as th
from numpy.typing import NDArray
from stable_baselines3.common.running_mean_std import RunningMeanStd
from stable_baselines3.common.vec_env import VecNormalize

from sb3_agpo.dynamics.interface import Array, TransitionDerivatives

FloatArray = NDArray[np.float32]


class RolloutWindows(NamedTuple):
    """``W`` windows of ``H`` consecutive steps; short windows are padded at the end with steps of mask 0."""

    observations: th.Tensor  # (H, W, nobs)
    next_observations: th.Tensor  # (H, W, nobs)
    actions: th.Tensor  # (H, W, nu) in [-1, 1]
    noise: th.Tensor  # (H, W, nu) acting noise eps; NaN where the policy did not choose the action
    terminated: th.Tensor  # (H, W) bool
    boundary: th.Tensor  # (H, W) bool: time limit, auto-reset, a step left out, or end of the window
    valid: th.Tensor  # (H, W) bool: derivatives are to be trusted
    mask: th.Tensor  # (H, W) 1 for real steps, 0 for padding
    A: th.Tensor  # (H, W, ndx, ndx)
    B: th.Tensor  # (H, W, ndx, nu)
    O_x: th.Tensor  # (H, W, nobs, ndx)
    O_a: th.Tensor  # (H, W, nobs, nu)
    r_x: th.Tensor  # (H, W, ndx)
    r_a: th.Tensor  # (H, W, nu)


class DerivativeSamples(NamedTuple):
    """Transitions with the derivatives that the differentiated Bellman equation needs."""

    observations: th.Tensor  # (n, nobs)
    actions: th.Tensor  # (n, nu)
    next_observations: th.Tensor  # (n, nobs)
    rewards: th.Tensor  # (n,)
    terminated: th.Tensor  # (n,) 1 where the episode ended for good
    C: th.Tensor  # (n, nobs, ndx)
    O_x: th.Tensor  # (n, nobs, ndx)
    O_a: th.Tensor  # (n, nobs, nu)
    r_x: th.Tensor  # (n, ndx)
    r_a: th.Tensor  # (n, nu)


class Transition(NamedTuple):
    """One step of all environments as the algorithm stored it, unnormalised."""

    observations: FloatArray  # (n_envs, nobs)
    next_observations: FloatArray  # (n_envs, nobs) true successors, not what an auto-reset put there
    actions: FloatArray  # (n_envs, nu) in [-1, 1]
    noise: FloatArray  # (n_envs, nu)
    rewards: FloatArray  # (n_envs,)
    terminated: NDArray[np.bool_]  # (n_envs,)
    done: NDArray[np.bool_]  # (n_envs,) terminated or truncated: the next stored step is of another episode


class StepDerivatives(NamedTuple):
    """What windows need of :class:`~sb3_agpo.dynamics.interface.TransitionDerivatives`; the rest would only take memory."""

    A: Array  # (n, ndx, ndx)
    B: Array  # (n, ndx, nu)
    O_x: Array  # (n, nobs, ndx)
    O_a: Array  # (n, nobs, nu)
    r_x: Array  # (n, ndx)
    r_a: Array  # (n, nu)
    valid: NDArray[np.bool_]  # (n,)


def observation_scale(observations: FloatArray, normalization: VecNormalize | None) -> FloatArray | float:
    """
    d(normalised observation) / d(raw observation) under the current statistics of ``VecNormalize``.

    :param observations: raw observations, shape ``(..., nobs)``
    :param normalization: the wrapper, None if there is none
    :return: the same shape, zero where the normalised value is clipped; 1.0 without normalisation
    """
    if normalization is None or not normalization.norm_obs:
        return 1.0
    statistics = normalization.obs_rms
    assert isinstance(statistics, RunningMeanStd)  # of a Box, the only space with derivatives
    deviation = np.sqrt(statistics.var + normalization.epsilon)
    inside = np.abs((observations - statistics.mean) / deviation) < normalization.clip_obs
    return (inside / deviation).astype(np.float32)


def reward_scale(rewards: FloatArray, normalization: VecNormalize | None) -> FloatArray | float:
    """
    d(normalised reward) / d(raw reward) under the current statistics of ``VecNormalize``.

    :param rewards: raw rewards, shape ``(...)``
    :param normalization: the wrapper, None if there is none
    :return: the same shape, zero where the normalised value is clipped; 1.0 without normalisation
    """
    if normalization is None or not normalization.norm_reward:
        return 1.0
    deviation = np.sqrt(normalization.ret_rms.var + normalization.epsilon)
    return ((np.abs(rewards / deviation) < normalization.clip_reward) / deviation).astype(np.float32)


def storable(fields: Mapping[str, NDArray[Any]]) -> NDArray[np.bool_]:
    """
    Transitions that are finite in float32, in which networks compute; one that is not would ruin their weights for good.

    :param fields: arrays of shape ``(n, ...)``
    :return: shape ``(n,)``
    """
    largest = np.finfo(np.float32).max
    within = [(np.abs(field) <= largest).reshape(len(field), -1).all(axis=1) for field in fields.values()]  # False for NaN
    return np.logical_and.reduce(within)


def _over(scale: FloatArray | float, field: NDArray[Any]) -> NDArray[Any]:
    """Multiply ``field`` by ``scale``, which lacks the last axis."""
    return field if isinstance(scale, float) else field * scale[..., None]


class DifferentiableRolloutBuffer:
    """
    Fresh experience in windows, with the derivatives of each step.

    Steps come in one at a time, their derivatives later and in one batch. Once ``rollout_size`` transitions have both,
    :attr:`full` is True and :meth:`take_windows` cuts each environment's steps into consecutive windows of ``horizon`` steps.
    Nothing depends on the training frequency: one environment fills the buffer with consecutive stretches of its steps, and
    where more than one batch has been collected, windows are taken batch by batch.
    Chains of derivatives end with episodes, and where a step does not start from the observation that the last one led to.

    :param rollout_size: transitions, over all environments, that make a batch of windows; at least ``horizon * n_envs``
        are waited for
    :param horizon: steps of a window
    :param n_envs: number of environments
    :param device: where windows are put
    :raises ValueError: if a size is not positive
    """

    def __init__(self, rollout_size: int, horizon: int, n_envs: int = 1, device: th.device | str = "cpu") -> None:
        for name, value in (("rollout_size", rollout_size), ("horizon", horizon), ("n_envs", n_envs)):
            if value < 1:
                raise ValueError(f"`{name}` must be at least 1, got {value!r}")
        self.rollout_size, self.horizon, self.n_envs, self.device = rollout_size, horizon, n_envs, device
        self.reset()

    def reset(self) -> None:
        """Forget everything."""
        self._transitions: list[Transition] = []
        self._derivatives: list[StepDerivatives] = []
        self._n_differentiated = 0

    @property
    def n_pending(self) -> int:
        """Steps (of all environments at once) that wait for their derivatives."""
        return len(self._transitions) - self._n_differentiated

    @property
    def full(self) -> bool:
        """Whether a batch of windows is ready."""
        return self._n_differentiated >= self.batch_steps

    @property
    def batch_steps(self) -> int:
        """Steps that make a batch: enough transitions, and with many environments at least one whole window."""
        return max(self.horizon, -(-self.rollout_size // self.n_envs))

    def add(self, transition: Transition) -> None:
        """
        Store one step of all environments.

        :param transition: the step
        """
        self._transitions.append(transition)

    def pending_inner(self) -> NDArray[np.bool_]:
        """
        Which pending steps come after another in their window, so that its gradient needs their derivatives by the state.

        :return: shape ``(n_pending,)``
        """
        return np.arange(self._n_differentiated, len(self._transitions)) % self.batch_steps % self.horizon != 0

    def pending_terminated(self) -> NDArray[np.bool_]:
        """
        Which pending transitions ended their episode for good.

        :return: shape ``(n_pending * n_envs,)``, in the order of :meth:`add_derivatives`
        """
        pending = self._transitions[self._n_differentiated :]
        return np.concatenate([transition.terminated for transition in pending])

    def pending_rewards(self) -> FloatArray:
        """
        Unnormalised rewards of the pending transitions.

        :return: shape ``(n_pending * n_envs,)``, in the order of :meth:`add_derivatives`
        """
        pending = self._transitions[self._n_differentiated :]
        return np.concatenate([transition.rewards for transition in pending])

    def add_derivatives(self, derivatives: TransitionDerivatives) -> list[Transition]:
        """
        Store the derivatives of all pending steps.

        :param derivatives: ``n_pending * n_envs`` transitions, environment by environment within each step
        :return: the steps they belong to
        :raises ValueError: if the number does not fit
        """
        expected = self.n_pending * self.n_envs
        if len(derivatives.reward) != expected:
            raise ValueError(f"expected the derivatives of {expected} transitions, got {len(derivatives.reward)}")
        pending = self._transitions[self._n_differentiated :]
        self._derivatives.append(StepDerivatives(*(getattr(derivatives, name) for name in StepDerivatives._fields)))
        self._n_differentiated = len(self._transitions)
        return pending

    def take_windows(self, normalization: VecNormalize | None = None) -> RolloutWindows:
        """
        Cut the oldest batch into windows and forget its steps.

        :param normalization: the environment's ``VecNormalize``, whose current statistics are applied
        :return: the windows
        :raises ValueError: if the buffer is not :attr:`full`
        """
        if not self.full:
            raise ValueError(f"a batch is {self.batch_steps} steps with derivatives, there are {self._n_differentiated}")
        joined = self._joined_derivatives()
        windows = self._windows(self.batch_steps, joined, normalization)
        del self._transitions[: self.batch_steps]
        self._n_differentiated -= self.batch_steps
        rest = StepDerivatives._make(field[self.batch_steps * self.n_envs :] for field in joined)
        self._derivatives = [rest] if self._n_differentiated else []
        return windows

    def windows(self, normalization: VecNormalize | None = None) -> RolloutWindows:
        """
        Cut all steps that have their derivatives into windows.

        :param normalization: the environment's ``VecNormalize``, whose current statistics are applied
        :return: the windows
        :raises ValueError: if there is no such step
        """
        if self._n_differentiated == 0:
            raise ValueError("there are no steps with derivatives to cut into windows; wait until the buffer is `full`")
        return self._windows(self._n_differentiated, self._joined_derivatives(), normalization)

    def _joined_derivatives(self) -> StepDerivatives:
        """All derivatives in one batch."""
        parts = zip(*self._derivatives, strict=True)
        return StepDerivatives._make(fields[0] if len(fields) == 1 else np.concatenate(fields) for fields in parts)

    def _windows(self, n_steps: int, joined: StepDerivatives, normalization: VecNormalize | None) -> RolloutWindows:
        """Cut the oldest ``n_steps`` steps into windows; ``joined`` has the derivatives of these and maybe more."""
        oldest, n = self._transitions[:n_steps], n_steps * self.n_envs
        steps = Transition._make(np.stack(fields) for fields in zip(*oldest, strict=True))  # (T, n_envs, ...)
        derivatives = StepDerivatives._make(field[:n].reshape(n_steps, self.n_envs, *field.shape[1:]) for field in joined)
        obs, next_obs, scale_next = self._normalized(steps, normalization)
        scale_r = reward_scale(steps.rewards, normalization)
        boundary = steps.done.copy()
        # Nor does a chain go on where the environment was moved in between, as by loading a buffer into a running model
        boundary[:-1] |= (steps.next_observations[:-1] != steps.observations[1:]).any(axis=-1)
        boundary[self.horizon - 1 :: self.horizon] = True
        boundary[-1] = True
        fields: dict[str, NDArray[Any]] = {
            "observations": obs,
            "next_observations": next_obs,
            "actions": steps.actions,
            "noise": steps.noise,
            "terminated": steps.terminated,
            "boundary": boundary,
            "valid": derivatives.valid,
            "mask": np.ones((n_steps, self.n_envs), dtype=np.float32),
            "A": derivatives.A,
            "B": derivatives.B,
            "O_x": _over(scale_next, derivatives.O_x),
            "O_a": _over(scale_next, derivatives.O_a),
            "r_x": _over(scale_r, derivatives.r_x),
            "r_a": _over(scale_r, derivatives.r_a),
        }
        return RolloutWindows(**{name: self._cut(field) for name, field in fields.items()})

    @staticmethod
    def _normalized(
        steps: Transition, normalization: VecNormalize | None
    ) -> tuple[FloatArray, FloatArray, FloatArray | float]:
        """Observations as the networks see them, and the scale of the next ones."""
        if normalization is None:
            return steps.observations, steps.next_observations, 1.0
        scale = observation_scale(steps.next_observations, normalization)
        return normalization.normalize_obs(steps.observations), normalization.normalize_obs(steps.next_observations), scale  # type: ignore[return-value]

    def _cut(self, field: NDArray[Any]) -> th.Tensor:
        """Cut ``(T, n_envs, ...)`` into ``(H, W, ...)`` on the device, padding the last window of each environment."""
        n_steps = len(field)
        n_windows = -(-n_steps // self.horizon)
        padding = n_windows * self.horizon - n_steps
        if padding > 0:
            field = np.concatenate([field, np.zeros((padding, *field.shape[1:]), dtype=field.dtype)])
        cut = field.reshape(n_windows, self.horizon, *field.shape[1:]).swapaxes(0, 1)
        cut = cut.reshape(self.horizon, n_windows * self.n_envs, *field.shape[2:])
        dtype = np.bool_ if field.dtype == np.bool_ else np.float32
        return th.as_tensor(np.array(cut, dtype=dtype, order="C"), device=self.device)  # always a copy


class DerivativeReplayBuffer:
    """
    The most recent transitions with their derivatives, within a memory budget, for the critic's gradient matching.

    Memory is reserved at the first transition, when its sizes are known, and grows into use as transitions come. Samples
    are drawn with NumPy's global generator, as those of SB3's buffers are, so that SB3's seed covers them.

    :param capacity: most transitions to keep
    :param memory_bytes: most bytes to use; lowers the capacity where derivatives are large
    :param device: where samples are put
    :raises ValueError: if a bound is not positive
    """

    def __init__(self, capacity: int, memory_bytes: int, device: th.device | str = "cpu") -> None:
        for name, value in (("capacity", capacity), ("memory_bytes", memory_bytes)):
            if value < 1:
                raise ValueError(f"`{name}` must be at least 1, got {value!r}")
        self.most, self.memory_bytes, self.device = capacity, memory_bytes, device
        self.capacity = capacity  # what the memory has room for, once sizes are known
        self._fields: dict[str, FloatArray] = {}
        self.position, self.size = 0, 0

    @staticmethod
    def bytes_per_transition(nobs: int, nu: int, ndx: int) -> int:
        """
        Memory that one transition takes.

        :param nobs: length of an observation
        :param nu: length of an action
        :param ndx: length of a tangent vector of the state
        :return: bytes
        """
        return 4 * (2 * nobs + nu + 2 + 2 * nobs * ndx + nobs * nu + ndx + nu)

    def add(self, transitions: list[Transition], derivatives: TransitionDerivatives) -> None:
        """
        Store transitions whose derivatives are valid; the oldest give way.

        :param transitions: steps of all environments, oldest first
        :param derivatives: of the same steps, environment by environment within each step
        """
        stacked = Transition(*(np.concatenate(fields) for fields in zip(*transitions, strict=True)))
        new = {
            "observations": stacked.observations,
            "actions": stacked.actions,
            "next_observations": stacked.next_observations,
            "rewards": stacked.rewards,
            "terminated": stacked.terminated,
            **{name: getattr(derivatives, name) for name in ("C", "O_x", "O_a", "r_x", "r_a")},
        }
        chosen = np.flatnonzero(derivatives.valid & storable(new))[-self.capacity :]
        count = len(chosen)
        if count == 0:
            return
        if any(name not in self._fields or self._fields[name].shape[1:] != new[name].shape[1:] for name in new):
            self._allocate(new)  # for the first time, or for another simulator than before
        index = (self.position + np.arange(count)) % self.capacity
        for name, values in new.items():
            self._fields[name][index] = values[chosen]
        self.position = (self.position + count) % self.capacity
        self.size = min(self.size + count, self.capacity)

    def _allocate(self, example: dict[str, NDArray[Any]]) -> None:
        """Reserve memory for the sizes of ``example``."""
        per_transition = sum(4 * int(np.prod(values.shape[1:])) for values in example.values())
        self.position, self.size = 0, 0
        self.capacity = max(1, min(self.most, self.memory_bytes // per_transition))
        self._fields = {n: np.zeros((self.capacity, *v.shape[1:]), dtype=np.float32) for n, v in example.items()}

    def __getstate__(self) -> dict[str, Any]:
        # Reserved memory that is not in use yet would make a pickle as large as the whole budget
        return {**self.__dict__, "_fields": {name: field[: self.size] for name, field in self._fields.items()}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        for name, used in state["_fields"].items():
            self._fields[name] = np.zeros((self.capacity, *used.shape[1:]), dtype=np.float32)
            self._fields[name][: self.size] = used

    def sample(self, batch_size: int, normalization: VecNormalize | None = None) -> DerivativeSamples:
        """
        Draw transitions with replacement.

        :param batch_size: number of transitions
        :param normalization: the environment's ``VecNormalize``, whose current statistics are applied
        :return: the samples
        :raises ValueError: if there is nothing to draw from
        """
        if self.size == 0:
            raise ValueError("there are no transitions with valid derivatives to sample from; check `size` first")
        index = np.random.randint(0, self.size, size=batch_size)
        batch = {name: field[index] for name, field in self._fields.items()}
        if normalization is not None:
            scale, next_scale = (
                observation_scale(batch[name], normalization) for name in ("observations", "next_observations")
            )
            scale_r = reward_scale(batch["rewards"], normalization)
            # o enters C^T dQ/do: the raw derivative of the normalised observation
            batch["C"] = _over(scale, batch["C"])
            batch["O_x"], batch["O_a"] = _over(next_scale, batch["O_x"]), _over(next_scale, batch["O_a"])
            batch["r_x"], batch["r_a"] = _over(scale_r, batch["r_x"]), _over(scale_r, batch["r_a"])
            batch["rewards"] = normalization.normalize_reward(batch["rewards"]).astype(np.float32)
            for name in ("observations", "next_observations"):
                batch[name] = normalization.normalize_obs(batch[name])  # type: ignore[assignment]
        return DerivativeSamples(**{n: th.as_tensor(v, device=self.device) for n, v in batch.items()})
