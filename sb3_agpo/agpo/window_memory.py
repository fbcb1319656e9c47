r"""
The newest windows, step by step: what replayed updates learn from them.

The critics learn from them by matching: besides temporal differences, whose loss is :math:`L_{TD}`, they descend

.. math:: L = L_{TD} + \kappa\, \mathrm{stop}(L_{TD})\, M, \qquad (13)

where :math:`M` is the loss of gradient matching, :func:`~sb3_agpo.agpo.adaptive_gradient.matching_loss`, between
:math:`\partial Q / \partial a` and the :math:`g_a` of (3) that the windows had when the policy first learned from them.
:math:`M` has no unit, :math:`L_{TD}` has that of squared rewards: so :math:`\kappa` means the same whatever rewards are
multiplied by.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch as th

#: gradients from this length on are left out: squares of shorter ones add up without overflow
TOO_LONG = 1e15


class WindowSamples(NamedTuple):
    """``n`` steps of windows, and what was found out about them."""

    observations: th.Tensor  # (n, nobs), as the networks see them
    actions: th.Tensor  # (n, nu), in [-1, 1]
    targets: th.Tensor  # (n, nu), a gradient by the action


class WindowMemory:
    """
    A ring of samples; new ones take the place of the oldest.

    :param capacity: samples that there is room for
    :param device: where they are kept
    """

    def __init__(self, capacity: int, device: th.device | str = "cpu") -> None:
        self.capacity, self.device = capacity, th.device(device)
        self.forget()

    def __len__(self) -> int:
        return self._size

    def forget(self) -> None:
        """Empty the memory."""
        self._fields: WindowSamples | None = None
        self._position = self._size = 0

    @property
    def samples(self) -> WindowSamples:
        """
        All samples, in no order that would mean anything.

        :raises ValueError: if there are none
        """
        if self._fields is None:
            raise ValueError("there are no samples to learn from; call `remember` first")
        return WindowSamples(*(field[: self._size] for field in self._fields))

    def remember(self, samples: WindowSamples) -> None:
        """
        Add samples; the oldest give way.

        :param samples: finite ones, in single precision
        """
        samples = WindowSamples(*(field[-self.capacity :] for field in samples))
        if self._fields is None:
            self._fields = WindowSamples(*(field.new_zeros(self.capacity, field.shape[1]) for field in samples))
        count = len(samples.actions)
        index = (self._position + th.arange(count, device=self.device)) % self.capacity
        for kept, field in zip(self._fields, samples, strict=True):
            kept[index] = field
        self._position = (self._position + count) % self.capacity
        self._size = min(self._size + count, self.capacity)

    def draw(self, n: int) -> WindowSamples:
        """
        Draw samples, any of them more than once.

        :param n: how many
        :return: the samples
        :raises ValueError: if there are none
        """
        samples = self.samples
        index = th.randint(self._size, (n,), device=self.device)
        return WindowSamples(*(field[index] for field in samples))

    def get_state(self) -> dict[str, Any]:
        """
        What :meth:`set_state` takes.

        :return: the samples, and where the next one goes
        """
        return {"samples": self.samples._asdict() if self._size > 0 else {}, "position": self._position}

    def set_state(self, state: dict[str, Any]) -> None:
        """
        Put the samples of another memory of the same capacity here.

        :param state: as :meth:`get_state` returned it
        """
        self.forget()
        if state["samples"]:
            self.remember(WindowSamples(**{name: field.to(self.device) for name, field in state["samples"].items()}))
            self._position = state["position"]


def window_samples(observations: th.Tensor, actions: th.Tensor, targets: th.Tensor, counts: th.Tensor) -> WindowSamples:
    """
    Steps of windows as samples.

    :param observations: shape ``(H, W, nobs)``
    :param actions: in [-1, 1], shape ``(H, W, nu)``
    :param targets: gradients by the action, shape ``(H, W, nu)``
    :param counts: steps that count, shape ``(H, W)``, bool
    :return: those whose target is shorter than ``TOO_LONG``
    """
    counts = counts & (targets.norm(dim=-1) < TOO_LONG)  # False for NaN
    return WindowSamples(observations[counts], actions[counts], targets[counts])
