"""
Gates: how much of the policy gradient comes through the simulator.

The published abstract says that the gradient is taken from the Q function where the variance of batched gradients marks a
simulated transition as rough; it does not give the rule. Each rule here is one, and any callable of the same signature
will do. Where gradients that are infinite, or overflow when squared, leave a rule undefined, its weight is 0.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod

import torch as th


def check_positive(name: str, value: float) -> None:
    """
    Check a constructor argument.

    :param name: what to call it
    :param value: its value
    :raises ValueError: if it is not positive and finite
    """
    if not (math.isfinite(value) and value > 0.0):
        raise ValueError(f"`{name}` must be positive and finite, got {value!r}; usual values are 1 to 100")


class Gate(ABC):
    """Weight of the analytic gradient, in [0, 1]."""

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(f'{name}={value!r}' for name, value in vars(self).items())})"

    @abstractmethod
    def __call__(self, analytic: th.Tensor, critic: th.Tensor, step: int) -> th.Tensor:
        """
        Weigh a batch of gradients of one window step: those whose derivatives are trusted, at least one.

        :param analytic: dJ/da through the simulator, shape ``(n, nu)``
        :param critic: dQ/da, shape ``(n, nu)``
        :param step: step of the window, 0 the first
        :return: weights in [0, 1], shape ``(n,)``
        """


class ConstantGate(Gate):
    """
    The same weight everywhere: 0 is the critic's gradient alone, 1 the analytic one alone.

    :param weight: in [0, 1]
    :raises ValueError: if it is not
    """

    def __init__(self, weight: float) -> None:
        if not 0.0 <= weight <= 1.0:
            raise ValueError(f"`weight` must lie in [0, 1], got {weight!r}; 0 is the critic alone, 1 the simulator alone")
        self.weight = weight

    def __call__(self, analytic: th.Tensor, critic: th.Tensor, step: int) -> th.Tensor:
        """See :class:`Gate`."""
        return analytic.new_full((len(analytic),), self.weight)


class DisagreementGate(Gate):
    r"""
    Trust a sample's analytic gradient as far as it agrees with the critic's.

    :math:`w = c\,m / (c\,m + |g^{sim}_a - g^Q_a|^2)` with :math:`m` the batch mean of :math:`|g^Q_a|^2`; 1 where both
    gradients are equal, even if they are zero.

    :param tolerance: c; larger trusts the simulator more. Usual range 1 to 100
    :raises ValueError: if it is not positive and finite
    """

    def __init__(self, tolerance: float = 8.0) -> None:
        check_positive("tolerance", tolerance)
        self.tolerance = tolerance

    def __call__(self, analytic: th.Tensor, critic: th.Tensor, step: int) -> th.Tensor:
        """See :class:`Gate`."""
        scale = self.tolerance * critic.square().sum(-1).mean()
        distance = (analytic - critic).square().sum(-1)
        weight = th.where(distance == 0.0, 1.0, scale / (scale + distance))
        return weight.nan_to_num(nan=0.0)


class MagnitudeGate(Gate):
    r"""
    Weigh both gradients of a sample by the inverse of their squared size, as estimates are weighed by inverse variance.

    :math:`w = p\,(|g^Q_a|^2 + m) / (p\,(|g^Q_a|^2 + m) + |g^{sim}_a|^2 / u + m)` with :math:`m` the batch mean of
    :math:`|g^Q_a|^2`. A rough transition shows in a huge analytic gradient, an erring critic in a huge :math:`g^Q_a`:
    either loses its say in that sample alone, so that the mixture is never larger than a few times the critic's average.

    What is huge for an analytic gradient may depend on the others: a critic that has not learnt much is too flat, and all
    gradients of a simulator that is right are large beside it. So :math:`u` is the batch median of :math:`|g^{sim}_a|^2`
    in units of :math:`m`, as long as it is at least 1 and at most :math:`f^2`: a simulator whose typical gradients are
    larger than :math:`f` times the critic's is rough altogether. With :math:`f = 1`, the default, :math:`u = 1`.

    :param preference: p, the weight of the simulator relative to the critic where both gradients are small: 4 means four
        fifths. Usual range 1 to 16
    :param flatness: f, how much too flat a critic may be; 1 measures both gradients by the critic's. Usual range 1 to 10
    :raises ValueError: if ``preference`` is not positive and finite, or ``flatness`` not finite and at least 1
    """

    flatness = 1.0  # of gates that were saved before there was a choice

    def __init__(self, preference: float = 4.0, flatness: float = 1.0) -> None:
        check_positive("preference", preference)
        if not (math.isfinite(flatness) and flatness >= 1.0):
            raise ValueError(f"`flatness` must be finite and at least 1, got {flatness!r}; usual values are 1 to 10")
        self.preference, self.flatness = preference, flatness

    def __call__(self, analytic: th.Tensor, critic: th.Tensor, step: int) -> th.Tensor:
        """See :class:`Gate`."""
        critic_size, size = critic.square().sum(-1), analytic.square().sum(-1)  # (n,) each
        mean = critic_size.mean()
        unit = (size.median() / mean).nan_to_num(nan=1.0).clamp(1.0, self.flatness**2)
        trust = self.preference * (critic_size + mean)
        total = trust + size / unit + mean
        weight = th.where(total == 0.0, self.preference / (self.preference + 1.0), trust / total)
        return weight.nan_to_num(nan=0.0)


#: the gate of a model that is given none
DEFAULT_GATE = MagnitudeGate


def batch_variance(gradients: th.Tensor) -> th.Tensor:
    """
    Trace of the covariance of a batch of gradients.

    :param gradients: shape ``(n, nu)``
    :return: scalar
    """
    return (gradients - gradients.mean(0)).square().sum(-1).mean()


class VarianceSwitch(Gate):
    """
    All or nothing per window step: the simulator, unless the batch variance of its gradients is too large.

    A single sample has no variance and counts as smooth.

    :param ratio: largest variance of the analytic gradients, in units of the variance of the critic's, that is trusted
    :raises ValueError: if it is not positive and finite
    """

    def __init__(self, ratio: float = 8.0) -> None:
        check_positive("ratio", ratio)
        self.ratio = ratio

    def __call__(self, analytic: th.Tensor, critic: th.Tensor, step: int) -> th.Tensor:
        """See :class:`Gate`."""
        variance = batch_variance(analytic)
        smooth = (variance <= self.ratio * batch_variance(critic)) & variance.isfinite()
        return smooth.to(analytic).expand(len(analytic))


class InverseVarianceGate(Gate):
    """Weigh both gradients of a window step by the inverse of their batch variance; equally where neither varies."""

    def __call__(self, analytic: th.Tensor, critic: th.Tensor, step: int) -> th.Tensor:
        """See :class:`Gate`."""
        variance, critic_variance = batch_variance(analytic), batch_variance(critic)
        total = variance + critic_variance
        weight = th.where(total == 0.0, 0.5, critic_variance / total).nan_to_num(nan=0.0)
        return weight.expand(len(analytic))
