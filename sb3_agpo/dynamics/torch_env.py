"""
Environments written in torch: exact derivatives of a step by automatic differentiation (``torch.func``).

:class:`TorchEnv` is the base class for own environments; :mod:`sb3_agpo.dynamics.torch_tasks` has examples.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, NamedTuple

import gymnasium as gym
import numpy as np
import torch as th
from gymnasium import spaces
from numpy.typing import ArrayLike, NDArray
from torch.func import jacrev, vmap

from sb3_agpo.dynamics.interface import Array, TransitionDerivatives, zero_invalid

# Networks compute in float32: what overflows there is as useless to them as an infinity
LARGEST_FINITE = float(np.finfo(np.float32).max)


class Outcome(NamedTuple):
    """Values of one step, the observation in the dtype of the observation space."""

    next_state: Array  # (nx,)
    obs: NDArray[np.floating]  # (nobs,)
    reward: float
    terminated: bool


class TorchEnv(gym.Env[Any, Any], ABC):
    """
    Base class of environments written in torch, a :class:`~sb3_agpo.dynamics.interface.DifferentiableDynamics`.

    A subclass writes pure functions of single, unbatched float64 tensors: :meth:`dynamics`, :meth:`observation`,
    :meth:`reward`, and if needed :meth:`terminated`; and draws the start of an episode in :meth:`initial_state`. The
    functions are vectorised with ``torch.func.vmap`` and differentiated with ``torch.func.jacrev``, hence

    - no Python ``if`` on values, no ``.item()``, no NumPy: use ``torch.where``, ``torch.clamp``;
    - no in-place changes of the arguments and no random numbers: noise belongs into the state, see :meth:`draw_noise`;
    - constants in float64: ``torch.tensor(..., dtype=state.dtype)``;
    - where a kink makes the derivative infinite or NaN (``sqrt`` or ``norm`` at zero), the transition is marked invalid.

    States are flat vectors, so tangent coordinates are the state's own. Episodes have no time limit: use
    ``gymnasium.wrappers.TimeLimit`` or ``max_episode_steps``.

    :param state_size: length ``nx`` of the flat state
    :param observation_space: one-dimensional floating-point box. With float32, ``step`` and :meth:`differentiate` round
        observations alike
    :param action_space: one-dimensional floating-point box; derivatives are relative to actions in its units. Actions
        outside it are handed to :meth:`dynamics` as they are
    :raises ValueError: if the size or a space does not fit
    """

    metadata: dict[str, Any] = {"render_modes": []}  # noqa: RUF012 - the type of gymnasium.Env

    #: many states can be differentiated at once, after the environment has moved on
    deferred = True

    def __init__(self, state_size: int, observation_space: spaces.Box, action_space: spaces.Box) -> None:
        if state_size < 1:
            raise ValueError(f"`state_size` must be at least 1, got {state_size!r}")
        for name, space in (("observation_space", observation_space), ("action_space", action_space)):
            if not isinstance(space, spaces.Box) or len(space.shape) != 1 or not np.issubdtype(space.dtype, np.floating):
                raise ValueError(f"`{name}` must be a one-dimensional floating-point `Box`, got {space}")
        self.observation_space, self.action_space = observation_space, action_space
        self.state_size = self.tangent_size = state_size
        self.observation_size, self.action_size = observation_space.shape[0], action_space.shape[0]
        self._state: Array | None = None

    @abstractmethod
    def dynamics(self, state: th.Tensor, action: th.Tensor) -> th.Tensor:
        """
        Move one environment step on.

        :param state: shape ``(nx,)``, float64
        :param action: shape ``(nu,)``, float64, in the units of the action space
        :return: next state, shape ``(nx,)``, float64
        """

    @abstractmethod
    def observation(self, state: th.Tensor) -> th.Tensor:
        """
        Observe a state.

        :param state: shape ``(nx,)``, float64
        :return: observation, shape ``(nobs,)``, float64
        """

    @abstractmethod
    def reward(self, state: th.Tensor, action: th.Tensor, next_state: th.Tensor) -> th.Tensor:
        """
        Reward of one step.

        :param state: state before the step, shape ``(nx,)``, float64
        :param action: shape ``(nu,)``, float64
        :param next_state: state after the step, shape ``(nx,)``, float64
        :return: scalar, shape ``()``, float64
        """

    @abstractmethod
    def initial_state(self, generator: np.random.Generator) -> Array:
        """
        Draw the first state of an episode.

        :param generator: the environment's seeded source of random numbers
        :return: shape ``(nx,)``
        """

    def terminated(self, next_state: th.Tensor) -> th.Tensor:
        """
        Whether the episode ends with this state, other than by a time limit. Never, unless overridden.

        :param next_state: state after the step, shape ``(nx,)``, float64
        :return: scalar, shape ``()``, bool
        """
        return th.zeros((), dtype=th.bool)

    def draw_noise(self, state: Array, generator: np.random.Generator) -> Array:
        """
        Fill in the part of a state which holds the random numbers that the *next* step will use.

        Called after reset and after every step, outside the differentiated functions. A state so completed determines
        the next step, which is what derivatives along the step taken need. Nothing is drawn unless overridden;
        observation, reward and termination must not depend on this part.

        :param state: shape ``(nx,)``, may be changed
        :param generator: the environment's seeded source of random numbers
        :return: completed state, shape ``(nx,)``
        """
        return state

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[NDArray[np.floating], dict[str, Any]]:
        """
        Start an episode.

        :param seed: seed of the random numbers; None to go on with the present ones
        :param options: ``{"state": array}`` starts at that state, shape ``(nx,)``, instead of a drawn one
        :return: observation and an empty info
        :raises ValueError: on any other option, or if the state has the wrong shape or is not finite
        """
        super().reset(seed=seed)
        unknown = set(options or {}) - {"state"}
        if unknown:
            raise ValueError(f"`options` of `reset` knows the key 'state' only, got {sorted(unknown)}")
        if options and "state" in options:
            self.set_state(options["state"])
        else:
            state = check_array("initial_state", self.initial_state(self.np_random), (self.state_size,))
            self._state = self.draw_noise(state, self.np_random)
        return self._observe(self.get_state()), {}

    def step(self, action: ArrayLike) -> tuple[NDArray[np.floating], float, bool, bool, dict[str, Any]]:
        """
        Take one step.

        :param action: shape ``(nu,)``, in the units of the action space
        :return: observation, reward, terminated, False (no time limit) and an empty info
        :raises ValueError: if the action has the wrong shape or is not finite, or if the step leads out of the finite
            numbers, which would poison everything learned from it; the environment then stays where it was
        """
        state, action = self.get_state(), check_array("action", action, (self.action_size,))
        outcome = self._evaluate(state, action)
        values = {"dynamics": outcome.next_state, "observation": outcome.obs, "reward": np.array(outcome.reward)}
        for name, value in values.items():
            if not np.isfinite(value).all():
                raise ValueError(
                    f"`{name}` returned {value} at state {state} and action {action}; bound the state, or let "
                    "`terminated` end the episode before"
                )
        self._state = self.draw_noise(outcome.next_state, self.np_random)
        return outcome.obs, outcome.reward, outcome.terminated, False, {}

    def get_state(self) -> Array:
        """
        Read the live environment's state, without changing anything.

        :return: flat state, a copy, shape ``(nx,)``
        :raises gymnasium.error.ResetNeeded: if there is no state yet
        """
        if self._state is None:
            raise gym.error.ResetNeeded("The environment has no state yet; call `reset` or `set_state` first")
        return self._state.copy()

    def set_state(self, state: ArrayLike) -> None:
        """
        Move the live environment to a state.

        :param state: flat state, shape ``(nx,)``
        :raises ValueError: if the shape is wrong or a value is not finite
        """
        self._state = check_array("state", state, (self.state_size,))

    def differentiate(self, states: ArrayLike, actions: ArrayLike) -> TransitionDerivatives:
        """
        Differentiate one environment step at each of ``n`` states; the live environment is not touched.

        :param states: flat states, shape ``(n, nx)``
        :param actions: actions as given to :meth:`step`, shape ``(n, nu)``
        :return: exact derivatives relative to ``actions``. The values equal those of :meth:`step` bit for bit, except that
            the noise of the step after (:meth:`draw_noise`) is not in ``next_state``. Rows with a value or a derivative
            that is not finite in float32 have ``valid`` False and zero derivatives
        :raises ValueError: if a shape is wrong or a given value is not finite
        """
        states = check_array("states", states, (-1, self.state_size))
        actions = check_array("actions", actions, (len(states), self.action_size))
        if len(states) == 0:  # not every operation can be vectorised over no rows
            return self.differentiate(np.zeros((1, self.state_size)), np.zeros((1, self.action_size))).take(slice(0))
        # One by one: batched kernels round differently, and these are to be the values that `step` returned
        outcomes = [self._evaluate(state, action) for state, action in zip(states, actions, strict=True)]
        next_states = np.array([outcome.next_state for outcome in outcomes])
        A, B, r_x, r_a = self._transition_jacobians(states, actions)
        C, next_C = np.split(self._observation_jacobian(np.concatenate([states, next_states])), 2)
        with np.errstate(invalid="ignore", over="ignore"):  # `discard_not_finite` sees to that
            O_x, O_a = next_C @ A, next_C @ B
        derivatives = TransitionDerivatives(
            A=A,
            B=B,
            C=C,
            next_C=next_C,
            O_x=O_x,
            O_a=O_a,
            r_x=r_x,
            r_a=r_a,
            next_state=next_states,
            next_obs=np.array([outcome.obs for outcome in outcomes], dtype=np.float64),
            reward=np.array([outcome.reward for outcome in outcomes], dtype=np.float64),
            terminated=np.array([outcome.terminated for outcome in outcomes], dtype=np.bool_),
            valid=np.ones(len(states), dtype=np.bool_),
        )
        return discard_not_finite(derivatives)

    def _evaluate(self, state: Array, action: Array) -> Outcome:
        """Values of one step from ``state`` ``(nx,)`` with ``action`` ``(nu,)``."""
        with th.no_grad():
            state_, action_ = th.tensor(state), th.tensor(action)
            next_state = check_output("dynamics", self.dynamics(state_, action_), (self.state_size,))
            reward = check_output("reward", self.reward(state_, action_, next_state), ())
            terminated = bool(self.terminated(next_state))
        next_state_ = next_state.numpy().copy()  # a copy, should the function have returned a tensor that it keeps
        return Outcome(next_state_, self._observe(next_state_), float(reward), terminated)

    def _observe(self, state: Array) -> NDArray[np.floating]:
        """Observation of ``state`` ``(nx,)``, in the dtype of the observation space."""
        with th.no_grad():
            obs = check_output("observation", self.observation(th.tensor(state)), (self.observation_size,))
        with np.errstate(over="ignore"):  # an infinity is reported where it matters
            return obs.numpy().astype(self.observation_space.dtype)

    def _transition_jacobians(self, states: Array, actions: Array) -> tuple[Array, Array, Array, Array]:
        """A ``(n, nx, nx)``, B ``(n, nx, nu)``, r_x ``(n, nx)`` and r_a ``(n, nu)``; next state and reward in one pass."""

        def transition(state: th.Tensor, action: th.Tensor) -> tuple[th.Tensor, th.Tensor]:
            next_state = self.dynamics(state, action)
            return next_state, self.reward(state, action, next_state)

        # Reverse mode covers more operations than forward mode, and states are too short for their speeds to differ
        jacobians = vmap(jacrev(transition, argnums=(0, 1)))(th.tensor(states), th.tensor(actions))
        (A, B), (r_x, r_a) = jacobians
        return to_numpy(A), to_numpy(B), to_numpy(r_x), to_numpy(r_a)

    def _observation_jacobian(self, states: Array) -> Array:
        """Jacobian of the observation ``(n, nobs, nx)`` at ``states`` ``(n, nx)``."""
        return to_numpy(vmap(jacrev(self.observation))(th.tensor(states)))


def to_numpy(tensor: th.Tensor) -> Array:
    """
    Copy a tensor to an array of its own, so that it can be changed.

    :param tensor: any shape, float64
    :return: same shape, float64
    """
    return tensor.detach().numpy().copy()


def check_array(name: str, value: ArrayLike, shape: tuple[int, ...]) -> Array:
    """
    Copy a user's array to float64 and check it.

    :param name: what to call it in the error
    :param value: the array
    :param shape: expected shape, -1 for any length
    :return: the copy
    :raises ValueError: if the shape is wrong or a value is not finite
    """
    array = np.array(value, dtype=np.float64)
    if array.ndim != len(shape) or any(given not in (-1, size) for given, size in zip(shape, array.shape, strict=True)):
        expected = str(shape).replace("-1", "n")
        raise ValueError(f"`{name}` must have the shape {expected}, got {array.shape}")
    if not np.isfinite(array).all():
        where = np.argwhere(~np.isfinite(array))[0].tolist()
        raise ValueError(f"`{name}` must be finite, the entry at {where} is {array[tuple(where)]}; leave out diverged values")
    return array


def check_output(name: str, value: th.Tensor, shape: tuple[int, ...]) -> th.Tensor:
    """
    Check what a function of a subclass returned.

    :param name: name of the function
    :param value: what it returned
    :param shape: expected shape
    :return: ``value``
    :raises ValueError: if it is no float64 tensor of that shape
    """
    if not isinstance(value, th.Tensor):
        raise ValueError(f"`{name}` must return a torch tensor, got {type(value).__name__}")
    if value.shape != shape:
        raise ValueError(f"`{name}` must return a tensor of the shape {shape}, got {tuple(value.shape)}")
    if value.dtype != th.float64:
        raise ValueError(
            f"`{name}` must return float64, got {value.dtype}; build constants with `dtype=state.dtype` and do not convert"
        )
    return value


def discard_not_finite(derivatives: TransitionDerivatives) -> TransitionDerivatives:
    """
    Zero the derivatives of transitions in which anything is not finite in float32, and mark them.

    :param derivatives: a batch, its derivatives are changed in place
    :return: the batch with ``valid`` updated
    """
    d = derivatives
    valid = d.valid.copy()
    for field in (d.A, d.B, d.C, d.next_C, d.O_x, d.O_a, d.r_x, d.r_a, d.next_state, d.next_obs, d.reward):
        valid &= (np.abs(field) <= LARGEST_FINITE).all(axis=tuple(range(1, field.ndim)))  # False for NaN
    return zero_invalid(d._replace(valid=valid))
