"""How well estimates of dJ/da agree with a reference, as functions of arrays."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch as th
from numpy.typing import NDArray

from sb3_agpo.agpo.squashed_gaussian import squashed_sample
from sb3_agpo.agpo.updates import gaussian_parameters
from sb3_agpo.benchmark.fidelity_model import SavedModel
from sb3_agpo.benchmark.fidelity_rollouts import VisitedStates
from sb3_agpo.benchmark.reference_gradient import ReferenceGradient

Array = NDArray[np.float64]

RESAMPLES = 400


class PolicyPullback:
    """
    Pulls action gradients back to the policy's parameters: the sum over states of (da/dtheta)^T g_a.

    :param model: the policy
    :param visited: states and acting noise
    """

    def __init__(self, model: SavedModel, visited: VisitedStates) -> None:
        actor = model.policy.actor
        self._parameters = [parameter for parameter in actor.parameters() if parameter.requires_grad]
        mean, log_std = gaussian_parameters(actor, th.as_tensor(visited.observations))
        self._actions, _ = squashed_sample(mean, log_std, th.as_tensor(visited.noise))

    def __call__(self, gradient: Array) -> Array:
        """
        Pull one gradient back.

        :param gradient: dJ/da, shape ``(S, nu)``
        :return: dJ/dtheta, shape ``(number of parameters,)``
        """
        outputs = (self._actions * th.as_tensor(gradient, dtype=th.float32)).sum()
        parts = th.autograd.grad(outputs, self._parameters, retain_graph=True, materialize_grads=True)
        return th.cat([part.flatten() for part in parts]).double().numpy()


class ReferenceQuality(NamedTuple):
    """How far the reference itself can be trusted."""

    split_half: float  # pooled cosine between the gradients of two halves of the rollouts
    parameter_split_half: float  # the same after pulling back to the policy's parameters
    standard_error: float  # root mean square, in units of the root mean square of the true gradient

    @staticmethod
    def attainable(split_half: float) -> float:
        """
        The cosine that a perfect estimate would have with the reference, which is noisy itself (Spearman and Brown).

        :param split_half: cosine between the halves
        :return: in [0, 1]; 0 if the halves contradict each other, or if there is no gradient
        """
        return float(np.sqrt(2.0 * split_half / (1.0 + split_half))) if split_half > 0.0 else 0.0


class Agreement(NamedTuple):
    """
    How well an estimate agrees with the reference.

    For the mean of one window the numbers are averages over windows, each taken by itself.
    """

    action_cosine: float
    action_cosine_error: float  # standard error, by resampling states
    parameter_cosine: float
    norm_ratio: float  # |estimate| / |reference|
    # both in units of the squared norm of the true gradient; unbiased estimates, so that noise can make them negative
    bias_squared: float  # NaN where a single window leaves bias and variance mixed up
    variance: float


def cosine(first: Array, second: Array) -> float:
    """
    Pooled cosine of two arrays.

    :param first: any shape
    :param second: the same
    :return: in [-1, 1]; NaN if one is zero everywhere
    """
    norms = np.linalg.norm(first) * np.linalg.norm(second)
    return float((first * second).sum() / norms) if norms > 0.0 else np.nan


def true_energy(reference: ReferenceGradient) -> float:
    """
    Squared norm of the gradient that the reference estimates: its own less what its noise adds.

    :param reference: the reference
    :return: NaN if nothing is left
    """
    energy = float(np.square(reference.gradient).sum() - np.square(reference.standard_error).sum())
    return energy if energy > 0.0 else np.nan


def reference_quality(reference: ReferenceGradient, pullback: PolicyPullback) -> ReferenceQuality:
    """
    Judge the reference.

    :param reference: the reference
    :param pullback: to the policy's parameters
    :return: its quality
    """
    first, second = reference.halves
    error = float(np.sqrt(np.square(reference.standard_error).sum() / true_energy(reference)))
    return ReferenceQuality(cosine(first, second), cosine(pullback(first), pullback(second)), error)


def cosine_error(estimates: Array, reference: Array) -> float:
    """
    Standard error of the pooled cosine, averaged over windows, by resampling states.

    :param estimates: shape ``(n_windows, S, nu)``
    :param reference: shape ``(S, nu)``
    :return: the error, for the choice of states
    """
    n_states = len(reference)
    counts = np.random.default_rng(0).multinomial(n_states, np.full(n_states, 1.0 / n_states), size=RESAMPLES)
    dots, squares = ((estimates * other).sum(axis=-1) for other in (reference, estimates))  # (n_windows, S) each
    norms = np.sqrt((counts @ squares.T) * (counts @ np.square(reference).sum(axis=1))[:, None])  # (RESAMPLES, n_windows)
    with np.errstate(invalid="ignore", divide="ignore"):
        return float(np.nanstd(np.mean((counts @ dots.T) / norms, axis=1)))


def agreement(estimates: Array, reference: ReferenceGradient, pullback: PolicyPullback, n_averaged: int) -> Agreement:
    """
    Compare estimates with the reference.

    :param estimates: one per window, shape ``(n_windows, S, nu)``; one only for an estimator that never varies
    :param reference: the reference
    :param pullback: to the policy's parameters
    :param n_averaged: 1 to judge single windows, ``n_windows`` to judge their average, 0 for an estimator that never varies
    :return: the numbers
    """
    mean = estimates.mean(axis=0)
    judged = mean[None] if n_averaged > 1 else estimates
    target, parameter_target = reference.gradient, pullback(reference.gradient)
    norm = np.linalg.norm(target)
    bias_squared, variance = np.nan, np.nan
    if n_averaged == 0 or len(estimates) > 1:
        spread = float(estimates.var(axis=0, ddof=1).sum()) if n_averaged > 0 else 0.0
        noise = float(np.square(reference.standard_error).sum()) + spread / len(estimates)
        bias_squared = (float(np.square(mean - target).sum()) - noise) / true_energy(reference)
        variance = spread / max(1, n_averaged) / true_energy(reference)
    return Agreement(
        float(np.mean([cosine(estimate, target) for estimate in judged])),
        cosine_error(judged, target),
        float(np.mean([cosine(pullback(estimate), parameter_target) for estimate in judged])),
        float(np.mean([np.linalg.norm(estimate) / norm if norm > 0.0 else np.nan for estimate in judged])),
        bias_squared,
        variance,
    )
