"""
The reference of the fidelity benchmark: dJ/da by brute force.

From each state many rollouts start with an action that is a little off the policy's, and the regression of their returns on
the deviation is the gradient. Nothing is differentiated, so that contacts count as they are; the price is noise, which the
standard error and the agreement of two independent halves tell.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from sb3_agpo.benchmark.fidelity_model import FloatArray, SavedModel
from sb3_agpo.benchmark.fidelity_rollouts import BatchSimulator, Progress, VisitedStates, discounted_returns

Array = NDArray[np.float64]

#: rollouts that are stepped together: enough to make the overhead of a step small, few enough for the processor's caches
BATCH = 6000


class Perturbation(NamedTuple):
    """How the first actions are varied, and how long the rollouts are."""

    n_rollouts: int  # of each state, an even number
    n_steps: int  # K, steps that follow the first
    sigma: float  # standard deviation of the first action, in units of the action in [-1, 1]


class ReferenceGradient(NamedTuple):
    """dJ/da at each state."""

    gradient: Array  # (S, nu)
    standard_error: Array  # (S, nu)
    halves: tuple[Array, Array]  # each (S, nu), from half of the rollouts


def perturbed_actions(actions: FloatArray, sigma: float, directions: FloatArray) -> tuple[FloatArray, FloatArray]:
    """
    Actions on both sides of given ones, within [-1, 1].

    Where an action is cut off at the limit, the pair is no longer symmetric, and the regression on what is left of the
    deviation gives the slope on the inner side: the policy's actions have no other.

    :param actions: in [-1, 1], shape ``(S, nu)``
    :param sigma: scale of the deviations
    :param directions: standard normal, shape ``(S, P, nu)``
    :return: the two actions of each pair, shape ``(S, P, nu)`` each
    """
    deviations = np.float32(sigma) * directions
    return np.clip(actions[:, None] + deviations, -1.0, 1.0), np.clip(actions[:, None] - deviations, -1.0, 1.0)


def regress(differences: Array, changes: Array) -> tuple[Array, Array]:
    """
    Least squares through the origin, for each state, with standard errors that allow for unequal variances (HC1).

    :param differences: of the actions of each pair, shape ``(S, P, nu)``
    :param changes: of the returns of each pair, shape ``(S, P)``; a pair whose change is not finite is left out
    :return: slopes and standard errors, shape ``(S, nu)`` each; zero for an action that was never varied
    """
    known = np.isfinite(changes)
    x, y = np.where(known[..., None], differences, 0.0), np.where(known, changes, 0.0)
    n_pairs, nu = known.sum(axis=1), x.shape[-1]
    inverse = np.linalg.pinv(np.einsum("spi,spj->sij", x, x), hermitian=True)
    slopes = np.einsum("sij,spj,sp->si", inverse, x, y)
    residuals = y - np.einsum("spi,si->sp", x, slopes)
    spread = np.einsum("spi,sp,spj->sij", x, np.square(residuals), x)
    variances = np.einsum("sij,sjk,ski->si", inverse, spread, inverse) * (n_pairs / np.maximum(n_pairs - nu, 1))[:, None]
    return slopes, np.sqrt(variances)


def reference_gradient(
    simulator: BatchSimulator,
    model: SavedModel,
    visited: VisitedStates,
    perturbation: Perturbation,
    seed: int,
    progress: Progress = lambda _: None,
) -> ReferenceGradient:
    """
    dJ/da by the regression of returns on perturbed actions.

    Rollouts come in pairs with opposite deviations and the same policy noise, so that all that does not depend on the action
    cancels. States have random numbers of their own: the result depends on no batch size.

    :param simulator: steps the task
    :param model: policy, critics, discount factor and temperature
    :param visited: states and the policy's actions there
    :param perturbation: number, length and deviations of the rollouts
    :param seed: of all random numbers
    :param progress: is told how many environment steps are done
    :return: the gradient
    """
    n_states, nu = visited.actions.shape
    n_pairs = perturbation.n_rollouts // 2
    differences, changes = np.empty((n_states, n_pairs, nu)), np.empty((n_states, n_pairs))
    size = max(1, BATCH // perturbation.n_rollouts)
    for start in range(0, n_states, size):
        chunk = slice(start, min(start + size, n_states))
        differences[chunk], changes[chunk] = _pairs(simulator, model, visited, perturbation, seed, chunk, progress)
    gradient, standard_error = regress(differences, changes)
    halves = [regress(differences[:, part], changes[:, part])[0] for part in (slice(None, None, 2), slice(1, None, 2))]
    return ReferenceGradient(gradient, standard_error, (halves[0], halves[1]))


def _pairs(
    simulator: BatchSimulator,
    model: SavedModel,
    visited: VisitedStates,
    perturbation: Perturbation,
    seed: int,
    chunk: slice,
    progress: Progress,
) -> tuple[Array, Array]:
    """
    Pairs of rollouts of some of the states.

    :param chunk: the states, others as in :func:`reference_gradient`
    :return: differences of the actions ``(n, P, nu)`` and of the returns ``(n, P)``
    """
    actions, n_pairs = visited.actions[chunk], perturbation.n_rollouts // 2
    shape = (n_pairs, actions.shape[1])
    generators = [np.random.default_rng([seed, 1, index]) for index in range(chunk.start, chunk.stop)]
    directions = np.stack([random.standard_normal(shape, dtype=np.float32) for random in generators])
    noise = np.stack(
        [random.standard_normal((perturbation.n_steps + 1, *shape), dtype=np.float32) for random in generators], axis=1
    )  # (K + 1, n, P, nu)
    pair = perturbed_actions(actions, perturbation.sigma, directions)
    first_actions = np.stack(pair, axis=1).reshape(-1, shape[1])  # state by state, first one side, then the other
    noise = np.repeat(noise[:, :, None], 2, axis=2).reshape(len(noise), -1, shape[1])
    states = np.repeat(visited.states[chunk], perturbation.n_rollouts, axis=0)
    returns = discounted_returns(simulator, model, states, first_actions, noise, progress)
    returns = returns.reshape(len(actions), 2, n_pairs)
    return pair[0].astype(np.float64) - pair[1], returns[:, 0] - returns[:, 1]
