"""Derivatives of any ``MujocoEnv``, its own observation and reward included, by differences through its own ``step``."""

from __future__ import annotations

import warnings
from typing import NamedTuple

import mujoco
import numpy as np
from gymnasium import spaces
from gymnasium.envs.mujoco import MujocoEnv
from numpy.typing import NDArray

from sb3_agpo.dynamics.interface import Array, TransitionDerivatives, absent_derivatives, concatenate
from sb3_agpo.dynamics.mujoco import FiniteDifferences, Perturbations, check_batch, discard_invalid, reward_change
from sb3_agpo.dynamics.private_copy import PrivateCopy, Situation, kept_global_generators
from sb3_agpo.dynamics.stepping import FULL_PHYSICS, silent_mujoco
from sb3_agpo.dynamics.tangent import PositionTangent


class Row(NamedTuple):
    """What one step of the private copy gave."""

    physics: Array  # (nphysics,) after the step
    obs: Array  # (nobs,)
    reward: NDArray[np.float64]  # ()
    terminated: NDArray[np.bool_]  # ()


class EnvStepDynamics:
    """
    Derivatives of one step of an arbitrary ``MujocoEnv`` subclass.

    Every row runs the environment's own ``step`` on a private copy (see
    :class:`~sb3_agpo.dynamics.private_copy.PrivateCopy`), random generators included, so that all rows draw the same
    noise. It is slower than :class:`~sb3_agpo.dynamics.mujoco.MujocoDynamics`, needs no knowledge of the task, and must be
    asked *before* the live environment moves on, because attributes written in Python are part of the state.

    ``C`` and ``next_C`` come from differences of ``_get_obs``, the method that Gymnasium's MuJoCo tasks have by
    convention; without it they are zero, and only the critic's matching of dQ/dx goes without them. An entry of the
    observation is taken for a memory of the step, so that its rows are zero, if another number comes out when MuJoCo computes
    it from the state again. Where the same number happens to come out, as for the place of a body at rest, it is taken for a
    function of the state, at this step and perhaps not at the next. The rows of entries that ``step`` changes after
    ``_get_obs`` are zero too, unless ``_get_obs`` returns other numbers each time, as it does with noise.

    The coordinates that are moved are MuJoCo's positions, velocities and activations, as in the other class. What else an
    environment carries from step to step, in attributes written in Python for example, is the same in all rows: a step starts
    from it, but an effect by way of it on later steps is missing in ``A`` and ``B``.

    A step that raises an exception has no derivatives: ``valid`` is False, and the first such exception is warned about.

    :param env: unwrapped environment
    :param differences: step sizes and scheme; ``threads`` has no effect, rows run one after the other
    :raises TypeError: if an attribute of the environment cannot be copied
    """

    #: must be differentiated before the environment moves on
    deferred = False

    def __init__(self, env: MujocoEnv, differences: FiniteDifferences | None = None) -> None:
        assert isinstance(env.action_space, spaces.Box)
        assert env.observation_space.shape is not None
        self.env, self.differences = env, differences or FiniteDifferences()
        self.tangent = PositionTangent(env.model)
        self.perturbations = Perturbations(self.tangent, int(env.model.na), env.action_space, self.differences)
        self.state_size = mujoco.mj_stateSize(env.model, FULL_PHYSICS)
        self.tangent_size = self.perturbations.ndx
        # one row more than the scheme: the first reproduces the live step, the second is the base of the differences
        self.rows_per_transition = self.perturbations.n_rows + 1
        self._n_obs = env.observation_space.shape[0]
        self._private = PrivateCopy(env)
        self._warned = False

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
        :param actions: actions as given to ``env.step``, shape ``(n, nu)``; rows get theirs in the same dtype
        :return: derivatives relative to ``actions``
        :raises ValueError: if the shapes do not fit
        """
        check_batch(states, actions, self.state_size, self.perturbations.nu)
        if len(states) == 0:
            return self._no_derivatives().take(slice(0))
        batch = concatenate([self._try(state, action) for state, action in zip(states, actions, strict=True)])
        return discard_invalid(batch, self.differences.max_derivative)

    def _try(self, state: Array, action: NDArray[np.floating]) -> TransitionDerivatives:
        """Derivatives of one step, or none if the environment's own code fails."""
        try:
            with kept_global_generators(), silent_mujoco():
                return self._differentiate_one(state, action)
        except Exception as error:
            # An odd perturbed row must not end a training run. If the live step fails too, it will say so itself
            if not self._warned:
                self._warned = True
                message = "cannot be differentiated at some steps, which are left out; the first raised"
                description = f"{type(self.env).__name__} {message} {type(error).__name__}: {error}"
                warnings.warn(description, RuntimeWarning, stacklevel=2)
            return self._no_derivatives()

    def _no_derivatives(self) -> TransitionDerivatives:
        """A batch of one invalid transition."""
        unknown = [np.full((1, *shape), np.nan) for shape in ((self.state_size,), (self._n_obs,), ())]
        absent = absent_derivatives(1, self._n_obs, self.perturbations.nu, self.perturbations.ndx)
        return absent._replace(next_state=unknown[0], next_obs=unknown[1], reward=unknown[2])

    def _differentiate_one(self, state: Array, action: NDArray[np.floating]) -> TransitionDerivatives:
        """Derivatives of one step, a batch of one."""
        scheme = self.perturbations
        before = self._private.capture_live(state)
        nominal = self._run(before, None, action)
        if not np.isfinite(nominal.physics).all():  # MuJoCo takes very long for a step with NaN
            return self._no_derivatives()
        after = self._private.capture()
        physics, actions, distance = scheme.perturb(state[None], action[None])
        rows = [self._run(before, *start) for start in zip(physics[0], actions[0], strict=True)]
        next_physics, obs, reward, terminated = (np.stack(values)[None] for values in zip(*rows, strict=True))
        A, B = scheme.quotient(scheme.change(scheme.tangents(next_physics)), distance)
        O_x, O_a = scheme.quotient(scheme.change(obs), distance)
        r_x, r_a = scheme.quotient(reward_change(scheme, reward, terminated)[..., None], distance)
        C = self._observation_jacobian(before, state, self._observe(before, None))
        left = self._observe(after, None)
        next_C = self._observation_jacobian(after, nominal.physics, left)
        if left is not None:
            changed = self._changed_by_step(after, left, nominal.obs)
            C[changed] = next_C[changed] = 0.0
        return TransitionDerivatives(
            A=A,
            B=B,
            C=C[None],
            next_C=next_C[None],
            O_x=O_x,
            O_a=O_a,
            r_x=r_x[:, 0],
            r_a=r_a[:, 0],
            next_state=nominal.physics[None],
            next_obs=nominal.obs[None],
            reward=nominal.reward[None],
            terminated=nominal.terminated[None],
            valid=np.ones(1, dtype=np.bool_),
        )

    def _run(self, situation: Situation, physics: Array | None, action: NDArray[np.floating]) -> Row:
        """Step the private copy once from a situation, moved to a physics state if one is given."""
        env = self._private.restore(situation, physics)
        # A copy, and another below: the environment may write into what it gets and reuse what it returns
        obs, reward, terminated, _, _ = env.step(action.copy())
        state = np.empty(self.state_size)
        mujoco.mj_getState(env.model, env.data, state, FULL_PHYSICS)
        return Row(state, np.array(obs, dtype=np.float64), np.array(reward, dtype=np.float64), np.array(bool(terminated)))

    def _observation_jacobian(self, situation: Situation, physics: Array, left: Array | None) -> Array:
        """C in a situation that has a given physics state and leaves a given observation, shape ``(nobs, ndx)``."""
        scheme = self.perturbations
        jacobian = np.zeros((self._n_obs, scheme.ndx))
        rows, _, distance = scheme.perturb(physics[None], np.zeros((1, scheme.nu)))
        base = self._observe(situation, rows[0, 0])
        if left is None or base is None:
            return jacobian
        # Rows that move an action only would observe the same as the base
        moved = np.append(True, np.tile(scheme.columns < scheme.ndx, 2 if scheme.centred else 1))
        values = [self._observe(situation, row) if moves else base for row, moves in zip(rows[0], moved, strict=True)]
        if any(value is None for value in values):
            return jacobian
        jacobian = scheme.quotient(scheme.change(np.stack(values)[None]), distance)[0][0]  # type: ignore[arg-type]
        # What MuJoCo had left there and does not compute from the state again is a memory, no function of the state
        jacobian[left != base] = 0.0
        return jacobian

    def _changed_by_step(self, after: Situation, left: Array, obs: Array) -> NDArray[np.bool_]:
        """Which entries of a step's observation are not what ``_get_obs`` gives after the step, shape ``(nobs,)``."""
        changed = ~np.isclose(left, obs, rtol=1e-3, atol=1e-6)  # rounding is no change
        if changed.any():
            env = self._private.restore(after)
            env._get_obs()  # type: ignore[attr-defined]
            changed &= env._get_obs() == left  # type: ignore[attr-defined]
        return changed

    def _observe(self, situation: Situation, physics: Array | None) -> Array | None:
        """Observation in a situation, moved to a physics state if one is given; None if the environment has no method."""
        env = self._private.restore(situation, physics)
        try:
            obs = np.array(env._get_obs(), dtype=np.float64)  # type: ignore[attr-defined]
        except (AttributeError, TypeError, ValueError):  # no such method, or by that name something of the user's own
            return None
        return obs if obs.shape == (self._n_obs,) else None
