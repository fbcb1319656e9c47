"""
What AGPO knows of a simulator: the derivatives of one environment step.

Notation (the whole package uses it): simulator state ``x`` in tangent coordinates (``ndx`` numbers, ``2 nv + na`` for
MuJoCo), action ``a`` in [-1, 1] as the policy emits it (``nu``), observation ``o`` (``nobs``), reward ``r``. A prime,
``next_`` in code, marks the value after the step.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


class TransitionDerivatives(NamedTuple):
    """
    Derivatives of a batch of ``n`` environment steps, with the values they were taken at.

    All derivatives are total derivatives of one whole environment step (every physics step of ``frame_skip`` included),
    relative to the action in [-1, 1]. All arrays are float64 except ``terminated`` and ``valid`` (bool).

    ``O_x`` and ``O_a`` are the derivatives of the next observation through the step. Where the observation is a function
    of the state alone they equal ``next_C @ A`` and ``next_C @ B``; they are also right where it is not (contact forces
    and other quantities that MuJoCo left behind during the step), and there the rows of ``C`` and ``next_C`` are zero:
    such a quantity is a memory of the step that wrote it, not a function of the state.
    """

    A: Array  # (n, ndx, ndx)  dx'/dx
    B: Array  # (n, ndx, nu)   dx'/da
    C: Array  # (n, nobs, ndx) do/dx
    next_C: Array  # (n, nobs, ndx) do'/dx'
    O_x: Array  # (n, nobs, ndx) do'/dx
    O_a: Array  # (n, nobs, nu)  do'/da
    r_x: Array  # (n, ndx) dr/dx
    r_a: Array  # (n, nu)  dr/da
    # (n, .) state after the step in the simulator's own coordinates; MuJoCo's is the full physics state, without what else
    # :meth:`DifferentiableDynamics.get_state` holds
    next_state: Array
    next_obs: Array  # (n, nobs) as the unwrapped environment returns it
    reward: Array  # (n,)
    terminated: NDArray[np.bool_]  # (n,)
    valid: NDArray[np.bool_]  # (n,) False: non-finite or exploding, all derivatives of the row are zero

    def take(self, index: NDArray[np.int64] | NDArray[np.bool_] | slice) -> TransitionDerivatives:
        """
        Select transitions.

        :param index: indices, mask or slice of the batch axis
        :return: the selected transitions
        """
        return TransitionDerivatives._make(field[index] for field in self)


def concatenate(parts: Sequence[TransitionDerivatives]) -> TransitionDerivatives:
    """
    Join batches along the batch axis.

    :param parts: batches of the same simulator, at least one
    :return: one batch, in the given order
    """
    return TransitionDerivatives._make(np.concatenate(fields) for fields in zip(*parts, strict=True))


def absent_derivatives(n: int, nobs: int, nu: int, ndx: int) -> TransitionDerivatives:
    """
    A batch of transitions whose derivatives are not known: ``valid`` is False everywhere, so that the critic takes over.

    :param n: number of transitions
    :param nobs: length of an observation
    :param nu: length of an action
    :param ndx: length of a tangent vector of the state
    :return: zeros
    """
    return TransitionDerivatives(
        A=np.zeros((n, ndx, ndx)),
        B=np.zeros((n, ndx, nu)),
        C=np.zeros((n, nobs, ndx)),
        next_C=np.zeros((n, nobs, ndx)),
        O_x=np.zeros((n, nobs, ndx)),
        O_a=np.zeros((n, nobs, nu)),
        r_x=np.zeros((n, ndx)),
        r_a=np.zeros((n, nu)),
        next_state=np.zeros((n, 1)),
        next_obs=np.zeros((n, nobs)),
        reward=np.zeros(n),
        terminated=np.zeros(n, dtype=np.bool_),
        valid=np.zeros(n, dtype=np.bool_),
    )


def check_derivatives(derivatives: Any, name: str, n: int, nobs: int, nu: int, ndx: int) -> TransitionDerivatives:
    """
    Check what an environment of somebody's own has returned as derivatives.

    :param derivatives: what ``differentiate`` returned
    :param name: name of the environment's class
    :param n: number of transitions
    :param nobs: length of an observation
    :param nu: length of an action
    :param ndx: length of a tangent vector of the state
    :return: the derivatives
    :raises TypeError: if it is no :class:`TransitionDerivatives`, or naming a field that is no array of the right kind
    :raises ValueError: naming a field of the wrong shape, and the right one
    """
    if not isinstance(derivatives, TransitionDerivatives):
        kind = type(derivatives).__name__
        raise TypeError(f"`differentiate` of {name} must return a TransitionDerivatives, got a {kind}")
    shapes: dict[str, tuple[Any, ...]]
    shapes = {key: value.shape for key, value in absent_derivatives(n, nobs, nu, ndx)._asdict().items()}
    shapes["next_state"] = (n, "any")
    for key, value in derivatives._asdict().items():
        told = f"`differentiate` of {name} must return `{key}` as a NumPy array"
        if not isinstance(value, np.ndarray):
            raise TypeError(f"{told}, got a {type(value).__name__}")
        kinds, expected = ("b", "bool") if key in ("terminated", "valid") else ("fiu", "float64")
        if value.dtype.kind not in kinds:
            raise TypeError(f"{told} of {expected}, got {value.dtype}")
        # How long a state is in the simulator's own coordinates is its own affair
        shape = (n, *value.shape[1:2]) if key == "next_state" else shapes[key]
        if value.shape != shape or value.ndim != len(shapes[key]):
            raise ValueError(f"{told} of the shape {shapes[key]}, got {value.shape}; see TransitionDerivatives")
    return TransitionDerivatives._make(np.array(field) for field in derivatives)


def zero_invalid(derivatives: TransitionDerivatives) -> TransitionDerivatives:
    """
    Zero all derivatives of the transitions that are marked as invalid.

    :param derivatives: a batch, its derivatives may be changed in place
    :return: the batch
    """
    d = derivatives
    if not d.valid.all():
        for field in (d.A, d.B, d.C, d.next_C, d.O_x, d.O_a, d.r_x, d.r_a):
            field[~d.valid] = 0.0
    return d


@runtime_checkable
class DifferentiableDynamics(Protocol):
    """
    A source of exact or approximate derivatives of an environment step.

    An environment whose ``unwrapped`` object has these members offers exact derivatives, and AGPO uses them before
    anything else; the MuJoCo providers of this package have the same members.

    The *state* is a flat float64 vector which, together with an action, determines the next step completely.
    """

    state_size: int  # nx, length of the flat state
    tangent_size: int  # ndx, length of a tangent vector at the state

    def get_state(self) -> Array:
        """
        Read the live environment's state, without changing anything.

        :return: flat state, shape ``(nx,)``
        """
        ...

    def differentiate(self, states: Array, actions: Array) -> TransitionDerivatives:
        """
        Differentiate one environment step at each of ``n`` states; the live environment is not touched.

        :param states: flat states, shape ``(n, nx)``
        :param actions: environment actions (in the units of the unwrapped environment's action space), shape ``(n, nu)``
        :return: derivatives relative to *these* actions; rescaling to [-1, 1] is done by the caller
        """
        ...
