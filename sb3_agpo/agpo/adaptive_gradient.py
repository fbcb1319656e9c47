r"""
The adaptive gradient as pure functions.

Notation of :mod:`sb3_agpo.dynamics.interface`; ``H`` steps of ``W`` windows, all terms batched over windows. Two adjoints
run backward through a window: :math:`\lambda = dJ/dx` along the simulator's state and :math:`\mu = dJ/do` along what the
agent sees. Keeping them apart needs no inverse of the observation, and stays right where an observation is no function of
the state. With gate :math:`w` and ``d`` = terminated:

.. math::

    g^{sim}_a &= r_a + \gamma (1 - d) (B^T \lambda' + O_a^T \mu')        && (1) \\
    g^{sim}_x &= r_x + \gamma (1 - d) (A^T \lambda' + O_x^T \mu')        && (2) \\
    g_a       &= w\, g^{sim}_a + (1 - w)\, \partial Q / \partial a       && (3) \\
    \lambda   &= w\, g^{sim}_x                                           && (4) \\
    \mu       &= (1 - w)\, \partial Q / \partial o + (da/do)^T g_a - \alpha\, d \log \pi / do  && (5)

At a window's end, a time limit or an auto-reset :math:`\lambda' = 0` and :math:`\mu' = dV/do'` with
:math:`V(o) = \min_i Q_i(o, a) - \alpha \log \pi(a | o)`, (6). The policy descends

.. math:: L = \mathrm{mean}_t [ \alpha \log \pi(a_t | o_t) - \mathrm{stop}(g_{a,t}) \cdot a_t ], \qquad (7)

and critics that match the differentiated Bellman equation satisfy

.. math::

    \partial Q / \partial a = r_a + \gamma (1 - d) O_a^T dV/do' \qquad (8) \qquad
    C^T \partial Q / \partial o = r_x + \gamma (1 - d) O_x^T dV/do' \qquad (9).

Their violation has no unit, temporal differences :math:`\delta` have that of rewards. With

.. math:: L = \tfrac12 \mathrm{mean}[\delta^2] + \kappa\, \tfrac12 \mathrm{median}[\delta^2]\, L_{match}, \qquad (13)

where no gradient flows into the median, the weight :math:`\kappa` means the same whatever rewards are multiplied by, and where
a few transitions, such as those that end an episode, have errors much larger than the others'. (10) to (12) are in
:mod:`sb3_agpo.agpo.gradient_correction`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch as th

#: maps dJ/da of step t, shape (W, nu), to the policy's share of mu: (da/do)^T g_a - alpha dlogpi/do, shape (W, nobs)
PolicyPullback = Callable[[int, th.Tensor], th.Tensor]
#: maps analytic and critic action gradients, each (n, nu), and the step to the weight of the analytic one, (n,); asked
#: about the n <= W windows whose derivatives are trusted at this step
GateFunction = Callable[[th.Tensor, th.Tensor, int], th.Tensor]


class WindowDerivatives(NamedTuple):
    """Derivatives along ``W`` windows of ``H`` steps (see :class:`~sb3_agpo.dynamics.interface.TransitionDerivatives`)."""

    A: th.Tensor  # (H, W, ndx, ndx)
    B: th.Tensor  # (H, W, ndx, nu)
    O_x: th.Tensor  # (H, W, nobs, ndx)
    O_a: th.Tensor  # (H, W, nobs, nu)
    r_x: th.Tensor  # (H, W, ndx)
    r_a: th.Tensor  # (H, W, nu)


class CriticGradients(NamedTuple):
    """What the critic says about the steps of the windows."""

    q_a: th.Tensor  # (H, W, nu)   dQ/da at (o, a)
    q_o: th.Tensor  # (H, W, nobs) dQ/do at (o, a)
    v_o: th.Tensor  # (H, W, nobs) dV/do' at o'


class AdaptiveGradient(NamedTuple):
    """Result of the backward recursion."""

    g_a: th.Tensor  # (H, W, nu) equation (3)
    analytic: th.Tensor  # (H, W, nu) equation (1)
    weight: th.Tensor  # (H, W) the gate


def transposed_product(matrix: th.Tensor, vector: th.Tensor) -> th.Tensor:
    """
    Batched ``matrix^T vector``.

    :param matrix: shape ``(..., m, n)``
    :param vector: shape ``(..., m)``
    :return: shape ``(..., n)``
    """
    return (matrix * vector.unsqueeze(-1)).sum(-2)


def adaptive_gradient(
    derivatives: WindowDerivatives,
    critic: CriticGradients,
    policy_pullback: PolicyPullback,
    gate: GateFunction,
    *,
    gamma: float,
    terminated: th.Tensor,
    boundary: th.Tensor,
    valid: th.Tensor,
) -> AdaptiveGradient:
    """
    Backward recursion, equations (1) to (5).

    :param derivatives: of the windows' steps
    :param critic: gradients of Q at each step and of V after it
    :param policy_pullback: the policy's share of equation (5)
    :param gate: weight of the analytic gradient
    :param gamma: discount factor
    :param terminated: steps after which nothing follows, shape ``(H, W)``, bool
    :param boundary: steps after which the chain ends and V takes over, shape ``(H, W)``, bool; the last step always is one
    :param valid: False where derivatives are not to be trusted: the gate is 0 there, shape ``(H, W)``, bool
    :return: gradient, analytic part and gate
    """
    horizon = len(terminated)
    next_state_adjoint = th.zeros_like(derivatives.r_x[0])  # lambda', (W, ndx)
    next_obs_adjoint = th.zeros_like(critic.v_o[0])  # mu', (W, nobs)
    gradients, analytics, weights = [], [], []
    for t in reversed(range(horizon)):
        over = terminated[t].unsqueeze(-1)  # nothing follows, whatever the critic says there: zero, not 0 times infinity
        ends = over | (boundary[t] if t < horizon - 1 else th.ones_like(boundary[t])).unsqueeze(-1)
        next_state_adjoint = th.where(ends, 0.0, next_state_adjoint)
        next_obs_adjoint = th.where(over, 0.0, th.where(ends, critic.v_o[t], next_obs_adjoint))
        step = WindowDerivatives(*(field[t] for field in derivatives))
        analytic = step.r_a + gamma * (  # (1)
            transposed_product(step.B, next_state_adjoint) + transposed_product(step.O_a, next_obs_adjoint)
        )
        state_gradient = step.r_x + gamma * (  # (2)
            transposed_product(step.A, next_state_adjoint) + transposed_product(step.O_x, next_obs_adjoint)
        )
        trusted = valid[t] & th.isfinite(analytic).all(-1) & th.isfinite(state_gradient).all(-1)
        analytic = th.where(trusted.unsqueeze(-1), analytic, 0.0)
        weight = gate_weights(gate, analytic, critic.q_a[t], t, trusted).unsqueeze(-1)  # (W, 1)
        gradient = weight * analytic + (1.0 - weight) * critic.q_a[t]  # (3)
        next_state_adjoint = th.where(trusted.unsqueeze(-1), weight * state_gradient, 0.0)  # (4)
        next_obs_adjoint = (1.0 - weight) * critic.q_o[t] + policy_pullback(t, gradient)  # (5)
        gradients.append(gradient)
        analytics.append(analytic)
        weights.append(weight.squeeze(-1))
    return AdaptiveGradient(*(th.stack(values[::-1]) for values in (gradients, analytics, weights)))


def gate_weights(gate: GateFunction, analytic: th.Tensor, critic: th.Tensor, step: int, trusted: th.Tensor) -> th.Tensor:
    """
    Ask the gate about the trusted samples alone: the zeros that stand for the others would count in its statistics.

    :param gate: the gate
    :param analytic: shape ``(W, nu)``
    :param critic: shape ``(W, nu)``
    :param step: step of the window
    :param trusted: samples to ask about, shape ``(W,)``, bool
    :return: weights, 0 for the samples that are not trusted, shape ``(W,)``
    :raises TypeError: if the gate returns no tensor
    :raises ValueError: if it returns another shape than one weight per sample, or weights outside [0, 1]
    """
    weights = analytic.new_zeros(len(analytic))
    n_trusted = int(trusted.sum())
    if n_trusted == 0:
        return weights
    answer = gate(analytic[trusted], critic[trusted], step)
    if not isinstance(answer, th.Tensor):
        raise TypeError(f"a gate must return a tensor of one weight per sample, shape ({n_trusted},), got {answer!r}")
    if answer.shape != (n_trusted,):
        raise ValueError(f"a gate must return one weight per sample, shape ({n_trusted},), got {tuple(answer.shape)}")
    if ((answer < 0.0) | (answer > 1.0)).any():  # not NaN, which the optimiser's step skips and counts
        raise ValueError(f"a gate must return weights in [0, 1], got {float(answer.min()):g} to {float(answer.max()):g}")
    weights[trusted] = answer.to(weights)
    return weights


def policy_loss(
    actions: th.Tensor, log_prob: th.Tensor, action_gradients: th.Tensor, ent_coef: th.Tensor | float, mask: th.Tensor
) -> th.Tensor:
    """
    Policy loss, equation (7).

    :param actions: reparametrised actions of the policy, shape ``(n, nu)``
    :param log_prob: their log-densities, shape ``(n,)``
    :param action_gradients: dJ/da, shape ``(n, nu)``; no gradient flows into them
    :param ent_coef: entropy temperature alpha
    :param mask: 1 for the samples that count, 0 for the others, shape ``(n,)``
    :return: scalar
    """
    counts = mask > 0
    gradients = th.where(counts.unsqueeze(-1), action_gradients.detach(), 0.0)
    per_sample = ent_coef * log_prob - (gradients * actions).sum(-1)
    return th.where(counts, per_sample, 0.0).sum() / mask.sum().clamp(min=1.0)


def matching_targets(
    reward_gradient: th.Tensor, obs_jacobian: th.Tensor, next_value_gradient: th.Tensor, discount: th.Tensor
) -> th.Tensor:
    """
    Right-hand side of the differentiated Bellman equation, (8) or (9).

    :param reward_gradient: r_a or r_x, shape ``(n, k)``
    :param obs_jacobian: O_a or O_x, shape ``(n, nobs, k)``
    :param next_value_gradient: dV/do', shape ``(n, nobs)``
    :param discount: gamma (1 - d), shape ``(n,)``
    :return: shape ``(n, k)``
    """
    return reward_gradient + discount.unsqueeze(-1) * transposed_product(obs_jacobian, next_value_gradient)


def matching_loss(predictions: th.Tensor, targets: th.Tensor) -> th.Tensor:
    """
    Smooth-L1 loss between gradients, each coordinate in units of the batch median of its target.

    The median makes coordinates comparable, and rough transitions, whose targets are huge, count linearly only. The loss
    does not change when predictions and targets are multiplied by the same factor.

    :param predictions: gradients of each critic, shape ``(n_critics, n, k)``
    :param targets: shape ``(n, k)``
    :return: scalar, summed over critics
    """
    scale = gradient_scale(targets)
    errors = (predictions - targets) / scale  # differences first: huge gradients that agree must not become inf - inf
    losses = th.nn.functional.smooth_l1_loss(errors, th.zeros_like(errors), reduction="none")
    return losses.mean(dim=(1, 2)).sum()


def temporal_difference_loss(errors: th.Tensor) -> th.Tensor:
    """
    SAC's critic loss.

    :param errors: temporal differences of each critic, shape ``(n_critics, n)``
    :return: half the mean squared error, summed over critics
    """
    return 0.5 * errors.square().mean(1).sum()


def temporal_difference_unit(errors: th.Tensor) -> th.Tensor:
    """
    Unit of gradient matching in equation (13).

    :param errors: temporal differences of each critic, shape ``(n_critics, n)``
    :return: half the median squared error, summed over critics, without gradient
    """
    return 0.5 * errors.detach().square().median(1).values.sum()


def gradient_scale(targets: th.Tensor) -> th.Tensor:
    """
    Unit of each coordinate of a batch of gradients: the median of its absolute values.

    :param targets: shape ``(n, k)``
    :return: positive, not less than a thousandth of the largest; the mean over all coordinates where every median is
        zero, 1 where every target is, so that no unit is so small that the loss explodes; shape ``(k,)``
    """
    magnitudes = targets.abs()
    medians = magnitudes.median(dim=0).values
    largest, mean = medians.max(), magnitudes.mean()
    smallest = th.finfo(targets.dtype).tiny ** 0.5  # below it, dividing by the unit may overflow; it counts as zero
    fallback = th.where(mean > smallest, mean, 1.0)
    return th.where(largest > smallest, medians.clamp(min=1e-3 * largest), fallback)


def gradient_statistics(adaptive: AdaptiveGradient, q_a: th.Tensor, mask: th.Tensor) -> dict[str, float]:
    """
    What is logged about a batch of gradients.

    :param adaptive: result of the recursion
    :param q_a: the critic's gradients, shape ``(H, W, nu)``
    :param mask: 1 for the steps that count, shape ``(H, W)``
    :return: gate mean and per step, norms, batch variances and cosine
    """
    count = mask.sum().clamp(min=1.0)
    weights = (adaptive.weight * mask).sum(1) / mask.sum(1).clamp(min=1.0)  # (H,)
    statistics = {"gate_mean": ((adaptive.weight * mask).sum() / count).item()}
    statistics.update({f"gate_step_{t}": value for t, value in enumerate(weights.tolist())})
    for name, gradient in (("analytic", adaptive.analytic), ("critic", q_a)):
        mean = (gradient * mask.unsqueeze(-1)).sum((0, 1)) / count
        deviation = (gradient - mean).square().sum(-1)
        statistics[f"{name}_grad_norm"] = ((gradient.norm(dim=-1) * mask).sum() / count).item()
        statistics[f"{name}_grad_variance"] = ((deviation * mask).sum() / count).item()
    dot = ((adaptive.analytic * q_a).sum(-1) * mask).sum()
    norms = [((gradient.square().sum(-1) * mask).sum()).sqrt() for gradient in (adaptive.analytic, q_a)]
    statistics["grad_cosine"] = (dot / (norms[0] * norms[1]).clamp(min=1e-12)).item()
    return statistics
