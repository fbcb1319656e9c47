"""Derivatives of any ``MujocoEnv``, its own observation and reward included, by differences through its own ``step``."""

from __future__ import annotations

import copy
from typing import Any

import mujoco
import numpy as np
from gymnasium import spaces
from gymnasium.envs.mujoco import MujocoEnv
from numpy.typing import NDArray

from sb3_agpo.dynamics.interface import Array, TransitionDerivatives
from sb3_agpo.dynamics.mujoco import FiniteDifferences, Perturbations, check_batch, discard_invalid
from sb3_agpo.dynamics.stepping import FULL_PHYSICS
from sb3_agpo.dynamics.tangent import PositionTangent

#: attributes that the private copy keeps for itself
PRIVATE_ATTRIBUTES = ("model", "data", "mujoco_renderer", "render_mode")


class EnvStepDynamics:
    """
    Derivatives of one step of an arbitrary ``MujocoEnv`` subclass.

    Every row runs the environment's own ``step`` on a private copy: the same Python attributes (random generator
    included, so that all rows draw the same noise) and private ``MjData``. It is slower than
    :class:`~sb3_agpo.dynamics.mujoco.MujocoDynamics`, needs no knowledge of the task, and must be asked *before* the live
    environment moves on, because attributes written in Python are part of the state.

    ``C`` and ``next_C`` come from differences of ``_get_obs``, the method that Gymnasium's MuJoCo tasks have by
    convention; without it they are zero, and only the critic's matching of dQ/dx goes without them.

    :param env: unwrapped environment
    :param differences: step sizes and scheme; ``threads`` has no effect, rows run one after the other
    """

    #: must be differentiated before the environment moves on
    deferred = False

    def __init__(self, env: MujocoEnv, differences: FiniteDifferences | None = None) -> None:
        assert isinstance(env.action_space, spaces.Box)
        self.env, self.differences = env, differences or FiniteDifferences()
        self.tangent = PositionTangent(env.model)
        self.perturbations = Perturbations(self.tangent, int(env.model.na), env.action_space, self.differences)
        self.state_size = mujoco.mj_stateSize(env.model, FULL_PHYSICS)
        self.tangent_size = self.perturbations.ndx
        # one row more than the scheme: the first reproduces the live step, the second is the base of the differences
        self.rows_per_transition = self.perturbations.n_rows + 1
        self._private = private_copy(env)
        self._base = mujoco.MjData(env.model)

    def get_state(self) -> Array:
        """
        Read the live environment's physics state.

        :return: flat state, shape ``(nx,)``
        """
        state = np.empty(self.state_size)
        mujoco.mj_getState(self.env.model, self.env.data, state, FULL_PHYSICS)
        return state

    def differentiate(self, states: Array, actions: NDArray[np.floating]) -> TransitionDerivatives:
        """
        Differentiate one step at each state; attributes other than the physics state are the live environment's.

        :param states: flat states as :meth:`get_state` returns them, shape ``(n, nx)``
        :param actions: actions as given to ``env.step``, shape ``(n, nu)``
        :return: derivatives relative to ``actions``
        :raises ValueError: if the shapes do not fit
        """
        check_batch(states, actions, self.state_size, self.perturbations.nu)
        parts = [self._differentiate_one(state, action) for state, action in zip(states, actions, strict=True)]
        return TransitionDerivatives(*(np.stack(fields) for fields in zip(*parts, strict=True)))

    def _differentiate_one(self, state: Array, action: NDArray[np.floating]) -> TransitionDerivatives:
        """Derivatives of one step, without the batch axis."""
        attributes = {k: v for k, v in vars(self.env).items() if k not in PRIVATE_ATTRIBUTES}
        snapshot = copy.deepcopy(attributes)
        mujoco.mj_copyData(self._base, self.env.model, self.env.data)
        mujoco.mj_setState(self.env.model, self._base, state, FULL_PHYSICS)
        nominal = self._run(snapshot, None, action)
        rows, row_actions, distance = self.perturbations.perturb(state[None], action[None].astype(np.float64))
        outcomes = [self._run(snapshot, *row) for row in zip(rows[0], row_actions[0], strict=True)]
        physics, obs, reward, ended = (np.stack(values) for values in zip(*outcomes, strict=True))
        A, B = self._quotient(self._tangent_states(physics), distance)
        O_x, O_a = self._quotient(obs, distance)
        flips = self._change(ended[:, None].astype(np.float64)) != 0.0
        r_x, r_a = self.perturbations.quotient(np.where(flips, 0.0, self._change(reward[:, None]))[None], distance)
        batch = TransitionDerivatives(
            A=A,
            B=B,
            C=self._observation_jacobian(state, len(nominal[1])),
            next_C=self._observation_jacobian(nominal[0], len(nominal[1])),
            O_x=O_x,
            O_a=O_a,
            r_x=r_x[:, 0],
            r_a=r_a[:, 0],
            next_state=nominal[0][None],
            next_obs=nominal[1][None],
            reward=nominal[2][None],
            terminated=nominal[3][None],
            valid=np.ones(1, dtype=np.bool_),
        )
        return TransitionDerivatives(*(field[0] for field in discard_invalid(batch, self.differences.max_derivative)))

    def _run(
        self, snapshot: dict[str, Any], physics: Array | None, action: NDArray[np.floating]
    ) -> tuple[Array, Array, Array, NDArray[np.bool_]]:
        """Step the private copy once from a physics state; None starts exactly where the live environment stands."""
        env = self._prepare(snapshot, physics)
        obs, reward, terminated, _, _ = env.step(action)
        state = np.empty(self.state_size)
        mujoco.mj_getState(env.model, env.data, state, FULL_PHYSICS)
        return state, np.asarray(obs, dtype=np.float64), np.float64(reward), np.bool_(terminated)  # type: ignore[return-value]

    def _prepare(self, snapshot: dict[str, Any], physics: Array | None) -> MujocoEnv:
        """Bring the private copy to the start of a step."""
        env = self._private
        vars(env).update(copy.deepcopy(snapshot))
        mujoco.mj_copyData(env.data, env.model, self._base)
        if physics is not None:
            warmstart = self._base.qacc_warmstart.copy()
            mujoco.mj_setState(env.model, env.data, physics, FULL_PHYSICS)
            mujoco.mj_forward(env.model, env.data)  # what the environment reads before its step must fit the moved state
            env.data.qacc_warmstart = warmstart
        return env

    def _observation_jacobian(self, physics: Array, nobs: int) -> Array:
        """C at a physics state, shape ``(1, nobs, ndx)``."""
        observe = getattr(self._private, "_get_obs", None)
        if observe is None:
            return np.zeros((1, nobs, self.perturbations.ndx))
        snapshot = {k: v for k, v in vars(self._private).items() if k not in PRIVATE_ATTRIBUTES}
        rows, _, distance = self.perturbations.perturb(physics[None], np.zeros((1, self.perturbations.nu)))
        observations = []
        for row in rows[0]:
            self._prepare(snapshot, row)
            observations.append(np.asarray(observe(), dtype=np.float64))
        return self._quotient(np.stack(observations), distance)[0]

    def _tangent_states(self, physics: Array) -> Array:
        """Physics states of rows as tangent vectors at the first row, ``(n_rows, ndx)``."""
        qpos = physics[:, 1 : 1 + self.tangent.nq]
        rest = physics[:, 1 + self.tangent.nq : 1 + self.tangent.nq + self.perturbations.ndx - self.tangent.nv]
        return np.concatenate([self.tangent.difference(qpos[:1], qpos), rest], axis=-1)

    def _change(self, values: Array) -> Array:
        """Change between the rows of each column, ``(n_rows, m)`` to ``(n_columns, m)``."""
        return self.perturbations.change(values[None])[0]

    def _quotient(self, values: Array, distance: Array) -> tuple[Array, Array]:
        """Derivatives of row values ``(n_rows, m)`` by state and action, with a batch axis of one."""
        return self.perturbations.quotient(self._change(values)[None], distance)


def private_copy(env: MujocoEnv) -> MujocoEnv:
    """
    A copy of an environment that shares its model and nothing else.

    :param env: the live environment, not changed
    :return: a copy with its own ``MjData`` and no renderer, whose ``step`` never draws
    """
    private = object.__new__(type(env))
    vars(private).update({k: copy.deepcopy(v) for k, v in vars(env).items() if k not in PRIVATE_ATTRIBUTES})
    private.model, private.data = env.model, mujoco.MjData(env.model)
    private.mujoco_renderer = None
    private.render_mode = None
    return private
