"""Weights of the batched critics as those of SB3's separate ones, and back."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch as th
from torch import nn

from sb3_agpo.agpo.policies import AGPOPolicy, EnsembleCritic, EnsembleLinear

StateDict = dict[str, th.Tensor]
ACTOR, AVERAGE_ACTOR = "actor.", "average_actor."


def separate_critics(module: nn.Module) -> StateDict:
    """
    Weights under the names and in the shapes of SB3's critics: ``q_networks.0.weight`` becomes ``qf0.0.weight``, ...

    SB3's ``SACPolicy`` with the same architecture loads them: ``net_arch`` and ``activation_fn`` as here, and
    ``normalization="none"`` here, as its critics have no normalisation.

    SB3's policy has one actor. It becomes the averaged one, so that both act alike without exploration; but where actor and
    critics share a features extractor, it becomes the one that learns, whose features the critics know.

    :param module: a policy, or critics
    :return: its state dictionary, of which everything but critics and actor is unchanged
    :raises ValueError: if the critics are normalised by batches, for which separate ones have no place
    """
    state = dict(module.state_dict())
    if isinstance(module, AGPOPolicy):
        average = _renamed(state, AVERAGE_ACTOR, ACTOR)
        state = {name: value for name, value in state.items() if not name.startswith(AVERAGE_ACTOR)}
        if not module.share_features_extractor:
            state |= average
    names = list(_correspondence(module))
    separate_state = {separate: _swap(state[batched][index], is_matrix) for batched, separate, index, is_matrix in names}
    for batched, *_ in names:
        state.pop(batched, None)
    return state | separate_state


def join_critics(module: nn.Module, separate_state: Mapping[str, th.Tensor]) -> StateDict:
    """
    The reverse of :func:`separate_critics`: weights of separate critics for ``module.load_state_dict``. The averaged actor
    begins as the actor.

    :param module: a policy, or critics, to load them into; it is not changed
    :param separate_state: state dictionary with separate critics, of SB3's ``SACPolicy`` for example
    :return: state dictionary of ``module``
    :raises ValueError: if it lacks critics of the module, or has others, naming one; or if those of the module are
        normalised by batches
    """
    parts: dict[str, list[th.Tensor]] = {}
    state = dict(separate_state)
    for batched, separate, _, is_matrix in _correspondence(module):
        if separate not in state:
            raise ValueError(f"the weights have no {separate!r}; give those of critics of the same number and architecture")
        parts.setdefault(batched, []).append(_swap(state.pop(separate), is_matrix))
    if left := [name for name in state if ".qf" in f".{name}"]:
        raise ValueError(
            f"the weights have {left[0]!r}, for which there is no place; build as many critics, of as many layers"
        )
    if isinstance(module, AGPOPolicy):
        state |= _renamed(state, ACTOR, AVERAGE_ACTOR)
    return state | {batched: th.stack(tensors) for batched, tensors in parts.items()}


def _renamed(state: StateDict, prefix: str, new_prefix: str) -> StateDict:
    """The entries below a prefix, below another one."""
    return {new_prefix + name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}


def _correspondence(module: nn.Module) -> Iterator[tuple[str, str, int, bool]]:
    """Names of a batched weight and of its separate counterpart, the critic's index, and whether it is a matrix."""
    for prefix, critic in module.named_modules():
        if not isinstance(critic, EnsembleCritic):
            continue
        if critic.batch_norms:
            raise ValueError(
                "SB3 has no critics with batch normalisation; to convert critics, train them with "
                '`policy_kwargs={"normalization": "none"}`'
            )
        start = f"{prefix}." if prefix else ""
        for position, layer in critic.q_networks.named_children():
            for parameter, _ in layer.named_parameters():
                for index in range(critic.n_critics):
                    is_matrix = isinstance(layer, EnsembleLinear) and parameter == "weight"
                    name = f"{position}.{parameter}"
                    yield f"{start}q_networks.{name}", f"{start}qf{index}.{name}", index, is_matrix


def _swap(tensor: th.Tensor, is_matrix: bool) -> th.Tensor:
    """Turn ``(in, out)`` into ``(out, in)`` and ``(1, features)`` into ``(features,)``, or the reverse."""
    if is_matrix:
        return tensor.T.contiguous()
    return tensor[0] if tensor.dim() == 2 else tensor[None]
