"""Policy classes of AGPO: SB3's squashed Gaussian actor, and an ensemble of smooth critics evaluated as one network."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from itertools import pairwise
from operator import is_not
from typing import Any

import torch as th
from gymnasium import spaces
from stable_baselines3.common.distributions import SquashedDiagGaussianDistribution, StateDependentNoiseDistribution
from stable_baselines3.common.policies import BaseModel
from stable_baselines3.common.preprocessing import get_action_dim
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor, CombinedExtractor, FlattenExtractor, NatureCNN
from stable_baselines3.common.type_aliases import PyTorchObs, Schedule
from stable_baselines3.sac.policies import Actor, SACPolicy
from torch import nn
from torch.nn import functional as F

#: how critics may be normalised
NORMALIZATIONS = ("layer", "batch", "none")
#: weight of a batch in the running statistics of batch normalisation; with less they lag behind weights that move fast
BATCH_NORM_MOMENTUM = 0.1


class EnsembleLinear(nn.Module):
    """
    Linear layers of ``n`` networks, applied in one batched product.

    :param n: number of networks
    :param in_features: inputs of each
    :param out_features: outputs of each
    """

    def __init__(self, n: int, in_features: int, out_features: int) -> None:
        super().__init__()
        layers = [nn.Linear(in_features, out_features) for _ in range(n)]  # PyTorch's own initialisation
        self.weight = nn.Parameter(th.stack([layer.weight.detach().T for layer in layers]))  # (n, in, out)
        self.bias = nn.Parameter(th.stack([layer.bias.detach()[None] for layer in layers]))  # (n, 1, out)

    def forward(self, inputs: th.Tensor) -> th.Tensor:
        """
        Apply each network's layer to its own inputs.

        :param inputs: shape ``(n, batch, in_features)``
        :return: shape ``(n, batch, out_features)``
        """
        if self.weight.shape[-1] == 1:  # as a sum: a matrix product with one column is several times slower
            return (inputs * self.weight.mT).sum(-1, keepdim=True) + self.bias
        return th.baddbmm(self.bias, inputs, self.weight)


class EnsembleLayerNorm(nn.Module):
    """
    Layer normalisation of ``n`` networks with their own scales and shifts.

    :param n: number of networks
    :param features: features to normalise over
    """

    def __init__(self, n: int, features: int) -> None:
        super().__init__()
        self.features = features
        self.weight = nn.Parameter(th.ones(n, 1, features))
        self.bias = nn.Parameter(th.zeros(n, 1, features))

    def forward(self, inputs: th.Tensor) -> th.Tensor:
        """
        Normalise each row.

        :param inputs: shape ``(n, batch, features)``
        :return: the same shape
        """
        return th.addcmul(self.bias, F.layer_norm(inputs, (self.features,)), self.weight)


class EnsembleBatchNorm(nn.Module):
    r"""
    Batch normalisation (Ioffe and Szegedy 2015) of ``n`` networks with their own statistics, scales and shifts.

    It uses running statistics, in training mode too, except inside :meth:`EnsembleCritic.joint_q_values`. Those of a batch
    join the running ones by :meth:`EnsembleCritic.update_statistics` only, so that a batch which is thrown away leaves no
    trace.

    :param n: number of networks
    :param features: features to normalise
    :param epsilon: added to the variance
    """

    running_mean: th.Tensor
    running_var: th.Tensor

    def __init__(self, n: int, features: int, epsilon: float = 1e-3) -> None:
        super().__init__()
        self.epsilon = epsilon
        self.weight = nn.Parameter(th.ones(n, 1, features))
        self.bias = nn.Parameter(th.zeros(n, 1, features))
        self.register_buffer("running_mean", th.zeros(n, 1, features))
        self.register_buffer("running_var", th.ones(n, 1, features))
        self.uses_batch = False
        self.batch_statistics: tuple[th.Tensor, th.Tensor] | None = None  # mean and variance, without gradient

    def forward(self, inputs: th.Tensor) -> th.Tensor:
        """
        Normalise each feature.

        :param inputs: shape ``(n, batch, features)``
        :return: the same shape
        """
        if self.uses_batch:
            return self._normalize_by_batch(inputs)
        scale = self.weight * th.rsqrt(self.running_var + self.epsilon)  # (n, 1, features)
        return th.addcmul(self.bias - self.running_mean * scale, inputs, scale)

    def _normalize_by_batch(self, inputs: th.Tensor) -> th.Tensor:
        n, batch, features = inputs.shape
        mean, variance = th.zeros_like(self.running_mean), th.zeros_like(self.running_var)
        # As features of one network, for which PyTorch has a kernel that is several times faster than means over an axis
        joined = inputs.transpose(0, 1).reshape(batch, n * features)
        statistics = mean.view(-1), variance.view(-1)  # a momentum of 1 makes them those of this batch
        weight, bias = self.weight.view(-1), self.bias.view(-1)
        outputs = F.batch_norm(joined, *statistics, weight, bias, training=True, momentum=1.0, eps=self.epsilon)
        self.batch_statistics = mean, variance
        return outputs.view(batch, n, features).transpose(0, 1)


def normalization_layer(normalization: str, n: int, features: int) -> list[nn.Module]:
    """
    The layer between a hidden layer of critics and its activation.

    :param normalization: one of ``NORMALIZATIONS``
    :param n: number of critics
    :param features: width of the hidden layer
    :return: at most one layer
    """
    if normalization == "batch":
        return [EnsembleBatchNorm(n, features)]
    return [EnsembleLayerNorm(n, features)] if normalization == "layer" else []


class EnsembleCritic(BaseModel):
    """
    ``n_critics`` Q-functions with the interface of SB3's ``ContinuousCritic``, evaluated as one batched network.

    :param observation_space: observation space
    :param action_space: action space
    :param net_arch: widths of the hidden layers
    :param features_extractor: network that extracts features from observations
    :param features_dim: number of features
    :param activation_fn: activation; a smooth one gives much better action gradients than ReLU
    :param normalization: of each hidden layer before its activation, one of ``NORMALIZATIONS``; batch normalisation comes
        before the first layer too
    :param normalize_images: divide images by 255
    :param n_critics: number of Q-functions
    :param share_features_extractor: the features extractor belongs to the actor and is not trained here
    """

    features_extractor: BaseFeaturesExtractor

    def __init__(
        self,
        observation_space: spaces.Space[Any],
        action_space: spaces.Box,
        net_arch: list[int],
        features_extractor: BaseFeaturesExtractor,
        features_dim: int,
        activation_fn: type[nn.Module] = nn.SiLU,
        normalization: str = "layer",
        normalize_images: bool = True,
        n_critics: int = 2,
        share_features_extractor: bool = True,
    ) -> None:
        super().__init__(
            observation_space, action_space, features_extractor=features_extractor, normalize_images=normalize_images
        )
        self.n_critics, self.share_features_extractor = n_critics, share_features_extractor
        widths = [features_dim + get_action_dim(action_space), *net_arch]
        layers: list[nn.Module] = [EnsembleBatchNorm(n_critics, widths[0])] if normalization == "batch" else []
        for width_in, width_out in pairwise(widths):
            layers.append(EnsembleLinear(n_critics, width_in, width_out))
            layers += [*normalization_layer(normalization, n_critics, width_out), activation_fn()]
        self.q_networks = nn.Sequential(*layers, EnsembleLinear(n_critics, widths[-1], 1))
        self.batch_norms = [layer for layer in layers if isinstance(layer, EnsembleBatchNorm)]

    def q_values(self, obs: PyTorchObs, actions: th.Tensor) -> th.Tensor:
        """
        Values of all critics.

        :param obs: observations, batch of ``n``
        :param actions: actions in [-1, 1], shape ``(n, nu)``
        :return: shape ``(n_critics, n)``
        """
        # The features extractor is the actor's when shared: it learns from the actor's loss alone. Gradients with respect
        # to observations still pass through it
        wanted = not self.share_features_extractor or (isinstance(obs, th.Tensor) and obs.requires_grad)
        with th.set_grad_enabled(th.is_grad_enabled() and wanted):
            features = self.extract_features(obs, self.features_extractor)
        inputs = th.cat([features, actions], dim=1)
        return self.q_networks(inputs.expand(self.n_critics, *inputs.shape)).squeeze(-1)

    def joint_q_values(
        self, obs: PyTorchObs, actions: th.Tensor, next_obs: PyTorchObs, next_actions: th.Tensor
    ) -> tuple[th.Tensor, th.Tensor]:
        """
        Values of transitions and of their successors, normalised by the statistics of both together.

        Batch normalisation needs no target networks if it is made so (CrossQ, Bhatt et al. 2024): normalised by the statistics
        of replayed actions alone, the policy's own next actions would be inputs of a kind that the critics have never seen.

        :param obs: observations, batch of ``n``
        :param actions: actions in [-1, 1], shape ``(n, nu)``
        :param next_obs: next observations, batch of ``n``
        :param next_actions: next actions, shape ``(n, nu)``
        :return: shape ``(n_critics, n)`` each, the second without gradient
        """
        with self._using_batch_statistics():
            q_values = self.q_values(_concatenate(obs, next_obs), th.cat([actions, next_actions]))
        return q_values[:, : len(actions)], q_values[:, len(actions) :].detach()

    @contextmanager
    def _using_batch_statistics(self) -> Iterator[None]:
        for layer in self.batch_norms:
            layer.uses_batch = True
        try:
            yield
        finally:
            for layer in self.batch_norms:
                layer.uses_batch = False

    def update_statistics(self) -> None:
        """Let the statistics of the last call of :meth:`joint_q_values` join the running ones."""
        running: list[th.Tensor] = []
        newest: list[th.Tensor] = []
        for layer in self.batch_norms:
            if layer.batch_statistics is not None:
                running += [layer.running_mean, layer.running_var]
                newest += layer.batch_statistics
                layer.batch_statistics = None
        if running:
            th._foreach_lerp_(running, newest, BATCH_NORM_MOMENTUM)

    def input_gradients(self, obs: th.Tensor, actions: th.Tensor) -> tuple[th.Tensor, th.Tensor]:
        """
        Derivatives of each critic's values by its inputs, which can be differentiated again.

        :param obs: observations, shape ``(n, nobs)``
        :param actions: actions in [-1, 1], shape ``(n, nu)``
        :return: dQ/do ``(n_critics, n, nobs)``, dQ/da ``(n_critics, n, nu)``
        """
        obs, actions = (x.expand(self.n_critics, *x.shape).clone().requires_grad_(True) for x in (obs, actions))
        features = self.extract_features(obs.flatten(0, 1), self.features_extractor)  # (n_critics * n, features)
        inputs = th.cat([features.reshape(*obs.shape[:2], -1), actions], dim=-1)
        q_o, q_a = th.autograd.grad(self.q_networks(inputs).sum(), (obs, actions), create_graph=True)
        return q_o, q_a

    def forward(self, obs: PyTorchObs, actions: th.Tensor) -> tuple[th.Tensor, ...]:
        """
        Values of all critics in the form of SB3's ``ContinuousCritic``.

        :param obs: observations, batch of ``n``
        :param actions: actions in [-1, 1], shape ``(n, nu)``
        :return: one tensor of shape ``(n, 1)`` per critic
        """
        return tuple(self.q_values(obs, actions).unsqueeze(-1))

    def q1_forward(self, obs: PyTorchObs, actions: th.Tensor) -> th.Tensor:
        """
        Value of the first critic alone.

        :param obs: observations, batch of ``n``
        :param actions: actions in [-1, 1], shape ``(n, nu)``
        :return: shape ``(n, 1)``
        """
        return self(obs, actions)[0]


def _concatenate(first: PyTorchObs, second: PyTorchObs) -> PyTorchObs:
    if isinstance(first, th.Tensor) and isinstance(second, th.Tensor):
        return th.cat([first, second])
    return {key: th.cat([first[key], second[key]]) for key in first}  # type: ignore[index, call-overload, union-attr]


def samples_by_itself(actor: Actor) -> bool:
    """
    Whether an actor has a way of its own to sample actions or to compute their density.

    :param actor: the actor
    :return: False for SB3's, also if it is a subclass with another network or other parameters of the Gaussian
    """
    names = ("forward", "action_log_prob")
    own = any(getattr(type(actor), name) is not getattr(Actor, name) or name in vars(actor) for name in names)
    return own or type(actor.action_dist) not in DISTRIBUTIONS


def predicts_by_itself(policy: AGPOPolicy) -> bool:
    """
    Whether a policy has a way of its own to act, or somebody watches its actor act.

    :param policy: the policy
    :return: False if it is enough to sample from the actor's Gaussian
    """
    own = any(
        getattr(type(policy), name) is not getattr(AGPOPolicy, name) or name in vars(policy)
        for name in ("predict", "_predict", "forward")
    )
    return own or samples_by_itself(policy.actor) or bool(policy.actor._forward_hooks or policy.actor._forward_pre_hooks)


#: distributions of actions whose samples are known functions of a Gaussian's noise
DISTRIBUTIONS = (SquashedDiagGaussianDistribution, StateDependentNoiseDistribution)
#: modules that do the same in training and in evaluation
MODELESS = (
    *(
        Actor,
        EnsembleCritic,
        EnsembleLinear,
        EnsembleLayerNorm,
        EnsembleBatchNorm,
        FlattenExtractor,
        NatureCNN,
        CombinedExtractor,
    ),
    *(nn.Sequential, nn.ModuleDict, nn.Flatten, nn.Linear, nn.LayerNorm, nn.Conv2d, nn.Identity),
    *(nn.ReLU, nn.LeakyReLU, nn.ELU, nn.GELU, nn.SiLU, nn.Mish, nn.Softplus, nn.Tanh, nn.Sigmoid, nn.Hardtanh),
)


class AGPOPolicy(SACPolicy):
    """
    Actor and critics of AGPO. The actor is SAC's; the critics are smooth, normalised and evaluated together.

    ``average_actor`` is a running average of the actor's weights (Polyak and Juditsky, 1992), which acts where no exploration
    is asked for: single updates of a policy are noisy, their average is not.

    Parameters are those of SB3's ``SACPolicy``, and:

    :param activation_fn: activation of actor and critics, ``nn.SiLU`` by default
    :param normalization: of the critics. "layer": layer normalisation, and target networks as in SAC; "batch": batch
        normalisation, and no target networks (CrossQ, Bhatt et al. 2024); "none": no normalisation, as in SAC
    :raises ValueError: if ``normalization`` is none of these
    :raises TypeError: if a subclass makes critics of another kind
    """

    critic: EnsembleCritic  # type: ignore[assignment]
    critic_target: EnsembleCritic  # type: ignore[assignment]
    average_actor: Actor
    #: whether policy updates have moved ``average_actor``, or a file has set it; until then it is what the actor is
    is_averaged = True

    def __init__(
        self,
        observation_space: spaces.Space[Any],
        action_space: spaces.Box,
        lr_schedule: Schedule,
        net_arch: list[int] | dict[str, list[int]] | None = None,
        activation_fn: type[nn.Module] = nn.SiLU,
        *args: Any,
        normalization: str = "layer",
        **kwargs: Any,
    ) -> None:
        if normalization not in NORMALIZATIONS:
            raise ValueError(f"`normalization` must be one of {', '.join(map(repr, NORMALIZATIONS))}, got {normalization!r}")
        self.normalization = normalization
        if kwargs.get("optimizer_class", th.optim.Adam) is th.optim.Adam:
            # One kernel for all parameters; the arithmetic is Adam's. Some options of Adam exclude it
            options = kwargs.get("optimizer_kwargs") or {}
            excluded = any(options.get(name) for name in ("foreach", "differentiable", "capturable"))
            kwargs["optimizer_kwargs"] = {"fused": not excluded, **options}
        super().__init__(observation_space, action_space, lr_schedule, net_arch, activation_fn, *args, **kwargs)

    def _build(self, lr_schedule: Schedule) -> None:
        super()._build(lr_schedule)
        if not isinstance(self.critic, EnsembleCritic):
            raise TypeError(
                f"`make_critic` must return an `EnsembleCritic`, got a {type(self.critic).__name__}; change it by "
                "`n_critics`, `net_arch`, `activation_fn` and `normalization`, or subclass it"
            )
        if self.critic.batch_norms:
            self.critic_target = self.critic
        self._averaged: list[nn.Module | nn.Parameter] = []  # what the average is of
        self.begin_average()
        self.find_modes()

    def set_training_mode(self, mode: bool) -> None:
        """
        Put actor and critics into training or evaluation mode, as SB3 does twice per step.

        Where all modules do the same in both, none is visited: that would take as long as acting.

        :param mode: training, or evaluation
        """
        if self._mode_matters:
            super().set_training_mode(mode)
            self.average_actor.set_training_mode(False)  # as it may no longer be after ``policy.train()``
        else:
            self.actor.training = self.critic.training = self.training = mode

    def begin_average(self) -> None:
        """
        Let the average begin with the weights that the actor has by now, cloned ones for example. Later, do nothing, unless
        somebody has replaced the actor or a layer of it: then it begins anew.
        """
        parts: list[nn.Module | nn.Parameter] = [*self.actor.modules(), *self.actor.parameters()]
        if len(parts) != len(self._averaged) or any(map(is_not, parts, self._averaged)):
            self._averaged = parts
            self._replace_average()
        if not self.is_averaged:
            self.average_actor.load_state_dict(self.actor.state_dict())

    def _replace_average(self) -> None:
        """A frozen copy of the actor, with modules of its own where actor and critics share some."""
        # Its optimiser is none of its business, and its distribution may hold an old graph
        own = {id(self.actor.optimizer): None} if hasattr(self.actor, "optimizer") else {}
        self.average_actor = copy.deepcopy(self.actor, {**own, id(self.actor.action_dist): copy.copy(self.actor.action_dist)})
        self.average_actor.requires_grad_(False).set_training_mode(False)
        self.is_averaged = False

    def find_modes(self) -> None:
        """Find out whether any module does something else in training than in evaluation."""
        modules = (*self.actor.modules(), *self.critic.modules())
        self._mode_matters = any(type(module) not in MODELESS for module in modules)

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:  # type: ignore[override]
        """See :meth:`torch.nn.Module.state_dict`."""
        self.begin_average()
        return super().state_dict(*args, **kwargs)

    def load_state_dict(self, state_dict: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
        """
        See :meth:`torch.nn.Module.load_state_dict`. Where only the actor is loaded, the average begins anew with it.
        """
        answer = super().load_state_dict(state_dict, *args, **kwargs)
        if any(name.startswith("average_actor.") for name in state_dict):
            pairs = zip(self.average_actor.state_dict().values(), self.actor.state_dict().values(), strict=True)
            self.is_averaged = not all(th.equal(average, current) for average, current in pairs)
        elif any(name.startswith("actor.") for name in state_dict):
            self.is_averaged = False
        return answer

    def _predict(self, observation: PyTorchObs, deterministic: bool = False) -> th.Tensor:
        if deterministic:
            self.begin_average()
        actor = self.average_actor if deterministic else self.actor
        return actor(observation, deterministic)

    def make_critic(self, features_extractor: BaseFeaturesExtractor | None = None) -> EnsembleCritic:  # type: ignore[override]
        """
        Build the critics.

        :param features_extractor: the actor's, if shared
        :return: a new ensemble
        """
        critic_kwargs = self._update_features_extractor(self.critic_kwargs, features_extractor)
        return EnsembleCritic(**critic_kwargs, normalization=self.normalization).to(self.device)

    def _get_constructor_parameters(self) -> dict[str, Any]:
        parameters = super()._get_constructor_parameters()
        parameters.update(normalization=self.normalization, share_features_extractor=self.share_features_extractor)
        return parameters


MlpPolicy = AGPOPolicy


class CnnPolicy(AGPOPolicy):
    """:class:`AGPOPolicy` for images: SB3's ``NatureCNN`` by default."""

    def __init__(self, *args: Any, features_extractor_class: type[BaseFeaturesExtractor] = NatureCNN, **kwargs: Any) -> None:
        super().__init__(*args, features_extractor_class=features_extractor_class, **kwargs)


class MultiInputPolicy(AGPOPolicy):
    """:class:`AGPOPolicy` for dictionary observations: SB3's ``CombinedExtractor`` by default."""

    def __init__(
        self, *args: Any, features_extractor_class: type[BaseFeaturesExtractor] = CombinedExtractor, **kwargs: Any
    ) -> None:
        super().__init__(*args, features_extractor_class=features_extractor_class, **kwargs)


__all__ = [
    "AGPOPolicy",
    "Actor",
    "CnnPolicy",
    "EnsembleCritic",
    "FlattenExtractor",
    "MlpPolicy",
    "MultiInputPolicy",
]
