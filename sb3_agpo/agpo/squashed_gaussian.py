"""The tanh-squashed Gaussian of SAC as functions of its noise, so that an action can be re-made with the noise it had."""

from __future__ import annotations

import math

import torch as th

#: keeps log(1 - a^2) finite, as SB3's distribution does
EPSILON = 1e-6
#: largest noise that an inferred action is given credit for
MAX_NOISE = 5.0


def squashed_sample(mean: th.Tensor, log_std: th.Tensor, noise: th.Tensor) -> tuple[th.Tensor, th.Tensor]:
    r"""
    Reparametrised action :math:`a = \tanh(\mu + \sigma \epsilon)` and its log-density.

    :param mean: of the Gaussian, shape ``(n, nu)``
    :param log_std: shape ``(n, nu)``
    :param noise: standard normal, shape ``(n, nu)``
    :return: actions in [-1, 1] ``(n, nu)``, log-densities ``(n,)`` (Haarnoja et al. 2018, appendix C)
    """
    actions = th.tanh(mean + log_std.exp() * noise)
    gaussian = -0.5 * noise.square() - log_std - 0.5 * math.log(2.0 * math.pi)
    return actions, (gaussian - th.log(1.0 - actions.square() + EPSILON)).sum(-1)


def infer_noise(actions: th.Tensor, mean: th.Tensor, log_std: th.Tensor) -> th.Tensor:
    """
    The noise with which the policy would have taken given actions.

    :param actions: in [-1, 1], shape ``(n, nu)``
    :param mean: of the Gaussian, shape ``(n, nu)``
    :param log_std: shape ``(n, nu)``
    :return: noise, shape ``(n, nu)``, limited to +-5
    """
    gaussian = th.atanh(actions.clamp(-1.0 + EPSILON, 1.0 - EPSILON))
    return ((gaussian - mean) * (-log_std).exp()).clamp(-MAX_NOISE, MAX_NOISE)


def action_distance(actions: th.Tensor, mean: th.Tensor, log_std: th.Tensor) -> th.Tensor:
    """
    How far actions are from what the policy does, before squashing; where both are as good as saturated, not at all.

    :param actions: in [-1, 1], shape ``(n, nu)``
    :param mean: of the Gaussian, shape ``(n, nu)``
    :param log_std: shape ``(n, nu)``
    :return: root mean square over the components of the noise that the policy would need, shape ``(n,)``: near 1 for the
        policy's own actions
    """
    gaussian = th.atanh(actions.clamp(-1.0 + EPSILON, 1.0 - EPSILON))
    limit = mean.new_full((1,), 1.0 - EPSILON).atanh()  # in the precision of the actions: one of 1 is at it, not near it
    return ((gaussian - mean.clamp(-limit, limit)) * (-log_std).exp()).square().mean(-1).sqrt()
