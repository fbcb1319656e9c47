"""Remembers what a model's gate decides, for histograms."""

from __future__ import annotations

from collections import deque

import torch as th

from sb3_agpo.agpo.adaptive_gradient import GateFunction
from sb3_agpo.agpo.agpo import AGPO

MAX_BATCHES = 1000  # of a gate's weights between two histograms; the newest are kept


class GateRecorder:
    """
    Remembers the weights of a model's gate.

    The model's class is replaced, not its gate, which files that are saved in the meantime would contain.

    :param model: the model
    """

    def __init__(self, model: AGPO) -> None:
        self.model, self.kind = model, type(model)
        self._weights: dict[int, deque[th.Tensor]] = {}

        def gate(watched: AGPO) -> GateFunction:
            return self._recorded(self.kind._gate(watched))

        attributes = {"_gate": gate, "_gate_recorder": self, "__module__": self.kind.__module__}
        self.watching = type(self.kind.__name__, (self.kind,), attributes)
        model.__class__ = self.watching

    def _recorded(self, gate: GateFunction) -> GateFunction:
        """
        Make a gate that is remembered.

        :param gate: the gate
        :return: one that gives the same weights
        """

        def recorded(analytic: th.Tensor, critic: th.Tensor, step: int) -> th.Tensor:
            weights = gate(analytic, critic, step)
            self._weights.setdefault(step, deque(maxlen=MAX_BATCHES)).append(weights.detach())
            return weights

        return recorded

    def take(self) -> dict[int, th.Tensor]:
        """
        Hand over the weights remembered and forget them.

        :return: step of the window -> weights of all samples
        """
        taken = {step: th.cat(list(weights)) for step, weights in sorted(self._weights.items())}
        self._weights.clear()
        return {step: weights[weights.isfinite()] for step, weights in taken.items() if weights.isfinite().any()}

    def close(self) -> None:
        """Give the model its class back, or that of the next recorder beneath."""
        above = type(self.model)
        if above is self.watching:
            self.model.__class__ = self.kind
            return
        while above.__dict__["_gate_recorder"].kind is not self.watching:  # another recorder has come later
            above = above.__dict__["_gate_recorder"].kind
        above.__dict__["_gate_recorder"].kind = self.kind
