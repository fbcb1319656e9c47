r"""
What fresh windows say about the critic's gradient, remembered for replayed transitions.

On a fresh window the adaptive gradient :math:`g_a`, (3) of :mod:`sb3_agpo.agpo.adaptive_gradient`, is there besides the
critic's; on a replayed transition the critic's is all there is. A small network learns what is missing,

.. math:: c(o, a) \approx \mathrm{E}[\, g_a - \partial Q / \partial a \,|\, o, a \,], \qquad (10)

from the newest windows. As a regression it averages over windows that began alike, each of which is one noisy sample. Replayed
policy updates then descend

.. math:: L = \mathrm{mean} [\, \alpha \log \pi(a | o) - \min_i Q_i(o, a) - k\, \mathrm{stop}(c(o, a)) \cdot a \,], \qquad (11)

where :math:`k` says how far to believe it. It is the coefficient of least squares, within [0, 1], between the network's
answers and the truth on windows that it has not learned from yet:

.. math:: k = \langle c, t \rangle / \langle c, c \rangle, \qquad t = g_a - \partial Q / \partial a. \qquad (12)
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch as th
from gymnasium import spaces
from stable_baselines3.common.torch_layers import create_mlp
from torch import nn
from torch.nn import functional as F

#: samples that are remembered, newest first to stay
CAPACITY = 8192
#: samples of one update of the network
BATCH_SIZE = 256
#: learning rate of the network
LEARNING_RATE = 1e-3
#: widths of its hidden layers
NET_ARCH = (256, 256)
#: targets longer than this many of the median length of their batch are shortened to it, as those of a rough step may be
LONGEST_TARGET = 10.0
#: targets from this length on are left out: squares of shorter ones add up without overflow
TOO_LONG = 1e15
#: weight of a new batch of windows in the running sums of :math:`k`
TRUST_MOMENTUM = 0.05


class CorrectionSamples(NamedTuple):
    """What the critic's gradient lacked, ``n`` times."""

    observations: th.Tensor  # (n, nobs), as the networks see them
    actions: th.Tensor  # (n, nu), in [-1, 1]
    targets: th.Tensor  # (n, nu), t of (12)


class GradientCorrection(nn.Module):
    """
    The network of (10), its memory and how far it is believed.

    :param nobs: length of an observation
    :param nu: length of an action
    :param device: where network and memory are
    """

    scale: th.Tensor
    trust_sums: th.Tensor

    def __init__(self, nobs: int, nu: int, device: th.device | str = "cpu") -> None:
        super().__init__()
        layers = create_mlp(nobs + nu, nu, list(NET_ARCH), nn.SiLU, post_linear_modules=[nn.LayerNorm])
        self.network = nn.Sequential(*layers)
        for parameter in layers[-1].parameters():  # begin with no correction
            nn.init.zeros_(parameter)
        self.register_buffer("scale", th.ones(()))  # root mean square of the targets in memory
        self.register_buffer("trust_sums", th.zeros(2))  # running <c, t> and <c, c>
        self.to(device)
        self.optimizer = th.optim.Adam(self.network.parameters(), lr=LEARNING_RATE, fused=True)
        self.forget()

    def forget(self) -> None:
        """Empty the memory; the network stays as it is."""
        self._memory: CorrectionSamples | None = None
        self._position = self.size = 0

    @property
    def trust(self) -> th.Tensor:
        """Equation (12), a scalar."""
        product, square = self.trust_sums
        return th.where(square > 0.0, product / square, 0.0).clamp(0.0, 1.0)

    def forward(self, observations: th.Tensor, actions: th.Tensor) -> th.Tensor:
        """
        Correct the critic's gradient as far as the network is believed.

        :param observations: shape ``(n, nobs)``
        :param actions: in [-1, 1], shape ``(n, nu)``
        :return: k c(o, a) of (11), without gradient, shape ``(n, nu)``
        """
        with th.no_grad():
            return self.trust * self._predict(observations, actions)

    def _predict(self, observations: th.Tensor, actions: th.Tensor) -> th.Tensor:
        answers: th.Tensor = self.network(th.cat([observations.to(actions.dtype), actions], dim=-1))
        return self.scale * answers

    def compare(self, samples: CorrectionSamples) -> float:
        """
        See how the network does on samples that it has not learned from, (12).

        :param samples: new ones
        :return: share of the targets' squared length that it explains; negative if it is worse than no correction
        """
        with th.no_grad():
            answers = self._predict(samples.observations, samples.actions)
            sums = th.stack([(answers * samples.targets).sum(), answers.square().sum()])
            self.trust_sums.lerp_(sums, TRUST_MOMENTUM)
            missed = (samples.targets - answers).square().sum()
            return (1.0 - missed / samples.targets.square().sum().clamp(min=1e-12)).item()

    def remember(self, samples: CorrectionSamples) -> None:
        """
        Add samples to the memory; the oldest give way.

        :param samples: finite ones
        """
        samples = CorrectionSamples(*(field[-CAPACITY:] for field in samples))
        if self._memory is None:
            self._memory = CorrectionSamples(*(field.new_zeros(CAPACITY, field.shape[1]) for field in samples))
        count = len(samples.actions)
        index = (self._position + th.arange(count, device=self.scale.device)) % CAPACITY
        for memory, field in zip(self._memory, samples, strict=True):
            memory[index] = field
        self._position = (self._position + count) % CAPACITY
        self.size = min(self.size + count, CAPACITY)
        self.scale.copy_(self._memory.targets[: self.size].square().mean().sqrt().clamp(min=1e-6))

    @property
    def can_learn(self) -> bool:
        """Whether there are enough samples; the network would learn fewer by heart."""
        return self.size >= BATCH_SIZE

    def loss(self) -> th.Tensor:
        """
        Smooth-L1 error on a batch out of the memory, in units of ``scale``.

        :return: scalar
        :raises ValueError: if the memory is empty
        """
        if self._memory is None:
            raise ValueError("there are no samples to learn from; call `remember` first")
        index = th.randint(self.size, (BATCH_SIZE,), device=self.scale.device)
        samples = CorrectionSamples(*(memory[index] for memory in self._memory))
        answers = self.network(th.cat([samples.observations, samples.actions], dim=-1))
        return F.smooth_l1_loss(answers, samples.targets / self.scale)

    def get_memory(self) -> dict[str, Any]:
        """
        What :meth:`set_memory` takes.

        :return: the samples in use, and where the next one goes
        """
        used = {} if self._memory is None else {k: v[: self.size] for k, v in self._memory._asdict().items()}
        return {"samples": used, "position": self._position}

    def set_memory(self, state: dict[str, Any]) -> None:
        """
        Put the memory of another correction here.

        :param state: as :meth:`get_memory` returned it
        """
        self.forget()
        if state["samples"]:
            self.remember(CorrectionSamples(**{k: v.to(self.scale.device) for k, v in state["samples"].items()}))
            self._position = state["position"]


def correction_samples(
    observations: th.Tensor, actions: th.Tensor, adaptive: th.Tensor, critic: th.Tensor, mask: th.Tensor
) -> CorrectionSamples:
    """
    What the critic's gradient lacks beside that of windows, t of (12).

    :param observations: of the windows' steps, shape ``(H, W, nobs)``
    :param actions: in [-1, 1], shape ``(H, W, nu)``
    :param adaptive: g_a, shape ``(H, W, nu)``
    :param critic: dQ/da, shape ``(H, W, nu)``
    :param mask: 1 for the steps that count, 0 for the others, shape ``(H, W)``
    :return: those whose difference is shorter than ``TOO_LONG``, then shortened to ``LONGEST_TARGET`` times the median length
    """
    targets = adaptive - critic
    lengths = targets.norm(dim=-1)
    counts = (mask > 0) & (lengths < TOO_LONG)  # False for NaN
    targets, lengths = targets[counts], lengths[counts]
    if len(lengths) > 0:
        longest = LONGEST_TARGET * lengths.median()
        targets = targets * (longest / lengths.clamp(min=1e-12)).clamp(max=1.0).unsqueeze(-1)
    return CorrectionSamples(observations[counts], actions[counts], targets)


def make_gradient_correction(
    observation_space: spaces.Space[Any], action_space: spaces.Box, device: th.device | str
) -> GradientCorrection | None:
    """
    Make the correction for a task, without touching PyTorch's generator: other networks do not depend on there being one.

    :param observation_space: observation space
    :param action_space: action space
    :param device: where to put it
    :return: the correction, None where there can be no simulator derivatives
    """
    if not isinstance(observation_space, spaces.Box) or len(observation_space.shape) != 1 or len(action_space.shape) != 1:
        return None
    with th.random.fork_rng(devices=[]):
        return GradientCorrection(observation_space.shape[0], action_space.shape[0], device)
