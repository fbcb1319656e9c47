"""What derivatives along an episode say: sizes, roughness, growth over windows, and how well they predict. Pure functions."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from sb3_agpo.dynamics.interface import Array, TransitionDerivatives


class Jacobians(NamedTuple):
    """Derivatives of ``T`` consecutive steps at one difference step."""

    A: Array  # (T, ndx, ndx) dx'/dx
    B: Array  # (T, ndx, nu) dx'/da
    r_x: Array  # (T, ndx) dr/dx
    r_a: Array  # (T, nu) dr/da
    valid: NDArray[np.bool_]  # (T,) False: not finite, exploding, or of another step; all derivatives are zero

    @classmethod
    def of(cls, derivatives: TransitionDerivatives) -> Jacobians:
        """
        Keep what is inspected.

        :param derivatives: of consecutive steps
        :return: a part of them
        """
        return cls._make(getattr(derivatives, name) for name in cls._fields)


class Roughness(NamedTuple):
    """How much derivatives change between two difference steps, or between two neighbouring points."""

    by_step: Array  # (T,) 0: not at all, 1: they have nothing in common; NaN where one of the two is invalid
    by_coordinate: Array  # (ndx + nu,) shares of the coordinates that are moved, of state and action; they add up to 1
    worst: NDArray[np.intp]  # (T,) the coordinate with the largest share in each step


def norms(matrices: Array) -> Array:
    """
    Spectral norms: by how much a small change can grow.

    :param matrices: shape ``(T, m, n)``
    :return: shape ``(T,)``
    """
    return np.linalg.norm(matrices, ord=2, axis=(1, 2))


def roughness(one: Jacobians, other: Jacobians) -> Roughness:
    """
    Compare derivatives of the same steps, ``|J - J'| / (|J| + |J'|)`` in Frobenius norms, ``J = [A B]``.

    :param one: derivatives
    :param other: derivatives of the same steps with another difference step, or at neighbouring points
    :return: the roughness of each step and where it comes from
    """
    first, second = (np.concatenate([part.A, part.B], axis=2) for part in (one, other))
    squared = np.square(first - second).sum(axis=1)  # (T, ndx + nu)
    size = np.linalg.norm(first, axis=(1, 2)) + np.linalg.norm(second, axis=(1, 2))
    usable = one.valid & other.valid & (size > 0.0)
    by_step = np.full(len(size), np.nan)
    by_step[usable] = np.sqrt(squared[usable].sum(axis=1)) / size[usable]
    # Relative to the step's own size, so that a single exploding step does not hide all others
    relative = (squared[usable] / np.square(size[usable])[:, None]).sum(axis=0)
    total = relative.sum()
    shares = relative / total if total > 0.0 else np.zeros(squared.shape[1])
    return Roughness(by_step, shares, squared.argmax(axis=1))


def windows(ends: NDArray[np.bool_], horizon: int) -> NDArray[np.intp]:
    """
    Find stretches of steps without a reset in between.

    :param ends: whether a step ended its episode, shape ``(T,)``
    :param horizon: length of the stretches
    :return: their first steps
    """
    if len(ends) < horizon:
        return np.empty(0, dtype=np.intp)
    inside = np.lib.stride_tricks.sliding_window_view(ends, horizon)[:, :-1]
    return np.flatnonzero(~inside.any(axis=1))


def growth(jacobians: Jacobians, ends: NDArray[np.bool_], horizon: int) -> float:
    """
    By how much a small change of the state grows within a window, at most: the median norm of the product of the A.

    :param jacobians: of the steps
    :param ends: whether a step ended its episode, shape ``(T,)``
    :param horizon: steps of a window
    :return: NaN if no window fits or none is valid throughout
    """
    starts = windows(ends, horizon)
    usable = [start for start in starts if jacobians.valid[start : start + horizon].all()]
    if not usable:
        return float("nan")
    products = jacobians.A[usable]
    for step in range(1, horizon):
        products = jacobians.A[np.array(usable) + step] @ products
    return float(np.median(norms(products)))


def reward_gradient(jacobians: Jacobians, start: int, horizon: int) -> Array:
    """
    Derivative of the sum of the rewards of a window with respect to its first action, the later actions held.

    :param jacobians: of the steps
    :param start: first step
    :param horizon: steps of the window
    :return: shape ``(nu,)``
    """
    adjoint = np.zeros(jacobians.A.shape[1])  # of the state after the step
    for step in range(start + horizon - 1, start, -1):
        adjoint = jacobians.r_x[step] + jacobians.A[step].T @ adjoint
    return jacobians.r_a[start] + jacobians.B[start].T @ adjoint


class Prediction(NamedTuple):
    """How well a derivative predicts what other actions really lead to."""

    explained: float  # median over windows of 1 - error^2 / change^2; 1 perfect, 0 no better than "nothing changes"
    direction: float  # share of the changes, weighted by their size, whose sign is predicted; 0.5 is guessing
    n_windows: int  # number of windows in which anything changes
    n_moments: int  # number of windows


def prediction(gradients: Array, deviations: Array, changes: Array) -> Prediction:
    """
    Compare predicted with real changes.

    :param gradients: derivative of the summed reward by the first action, shape ``(n, nu)``
    :param deviations: of the first action, shape ``(n, K, nu)``
    :param changes: of the summed reward, shape ``(n, K)``
    :return: the agreement; NaN if nothing changes
    """
    usable = np.abs(changes).max(axis=1, initial=0.0) > 1e-12
    if not usable.any():
        return Prediction(float("nan"), float("nan"), 0, len(changes))
    predicted = np.einsum("nku,nu->nk", deviations[usable], gradients[usable])
    changes = changes[usable]
    explained = 1.0 - np.square(changes - predicted).sum(axis=1) / np.square(changes).sum(axis=1)
    size = np.abs(changes)
    agree = np.where(predicted == 0.0, 0.5, np.sign(predicted) == np.sign(changes))  # no answer is a guess
    direction = float((size * agree).sum() / size.sum())
    return Prediction(float(np.median(explained)), direction, int(usable.sum()), len(usable))
