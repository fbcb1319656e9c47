"""The algorithms that the benchmark compares, by name, with every setting in one place."""

from __future__ import annotations

import ast
import difflib
import hashlib
import inspect
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from sb3_contrib import TQC, CrossQ
from stable_baselines3 import PPO, SAC
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.policies import ContinuousCritic
from stable_baselines3.common.preprocessing import get_action_dim
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor, create_mlp
from stable_baselines3.common.utils import LinearSchedule
from stable_baselines3.sac.policies import SACPolicy
from torch import nn

# What ``sac-fast`` shares with AGPO: its own defaults, its number of environments included, and critics normalised by layers.
# SAC has one learning rate for all its networks: AGPO's policy's.
FAST_N_ENVS = 1
FAST_ACTIVATION: type[nn.Module] = nn.SiLU
FAST_SETTINGS: dict[str, Any] = {
    "learning_rate": 3e-4,
    "learning_starts": 1000,
    "batch_size": 64,
    "train_freq": 2,
    "gradient_steps": 4,
    "ent_coef": "auto_0.1",
    "n_steps": 3,
}
FAST_TAU = 0.01  # CrossQ has no target networks
# ``agpo-batch-norm``: critics normalised by batches, without target networks, and fewer updates with larger steps. Worse by
# steps, better by the clock; see docs/experiments.md. ``crossq-fast`` shares learning rate, updates, batches and returns.
BATCH_NORM = "agpo-batch-norm"
BATCH_NORM_UPDATES: dict[str, Any] = {"learning_rate": 1e-3, "train_freq": 4}
BATCH_NORM_SETTINGS: dict[str, Any] = {
    **BATCH_NORM_UPDATES,
    "critic_learning_rate": 1e-3,
    "policy_delay": 4,
    "policy_kwargs": {"normalization": "batch"},
    "tau": 0.005,
}

# ``agpo-four-updates``: twice as many updates of the critics as the defaults, with steps half as large.
FOUR_UPDATES = "agpo-four-updates"
FOUR_UPDATES_SETTINGS: dict[str, Any] = {"critic_learning_rate": 3e-4, "train_freq": 1, "policy_delay": 16, "tau": 0.005}
# ``agpo-correction``: replayed policy updates learn from windows too
CORRECTION = "agpo-correction"
CORRECTION_SETTINGS: dict[str, Any] = {"correction_updates": 4}
# Variants of AGPO that are no ablation, and what they change
VARIANTS = {BATCH_NORM: BATCH_NORM_SETTINGS, FOUR_UPDATES: FOUR_UPDATES_SETTINGS, CORRECTION: CORRECTION_SETTINGS}

GRADIENT_MODES = ("adaptive", "analytic", "q")
NO_MATCHING = "-nomatch"  # as AGPO's defaults are
MATCHING = 1.0  # weight of gradient matching otherwise
RANDOM = "random"
AGPO_NAMES = tuple(f"agpo-{mode}{suffix}" for mode in GRADIENT_MODES for suffix in ("", NO_MATCHING))
# ``agpo-four-updates`` without replayed policy updates: fresh windows are all that the policy learns from
WINDOWS = "-windows"
WINDOWS_NAMES = tuple(f"agpo-{mode}{WINDOWS}" for mode in GRADIENT_MODES)
NAMES = (RANDOM, "sac", "sac-fast", "tqc", "crossq", "crossq-fast", "ppo", *AGPO_NAMES, *WINDOWS_NAMES, *VARIANTS)

# Constructor arguments that identify a run or only say how to watch it: no hyperparameters.
NOT_SETTINGS = frozenset({"self", "env", "seed", "verbose", "tensorboard_log", "_init_setup_model", "stats_window_size"})

# Constructor arguments that are no choice: they come from the task, the seed or the algorithm.
GIVEN = frozenset({"self", "env", "seed", "observation_space", "action_space", "lr_schedule"})


class LayerNormCritic(ContinuousCritic):
    """
    SB3's critics with layer normalisation between each hidden linear layer and its activation.

    :param observation_space: observation space
    :param action_space: action space
    :param net_arch: widths of the hidden layers
    :param features_extractor: network in front of the critics
    :param features_dim: number of features that it gives
    :param activation_fn: activation of the hidden layers
    :param normalize_images: whether to divide images by 255
    :param n_critics: number of critics
    :param share_features_extractor: whether actor and critics share the network in front
    """

    def __init__(
        self,
        observation_space: Any,
        action_space: Any,
        net_arch: list[int],
        features_extractor: BaseFeaturesExtractor,
        features_dim: int,
        activation_fn: type[nn.Module] = nn.ReLU,
        normalize_images: bool = True,
        n_critics: int = 2,
        share_features_extractor: bool = True,
    ) -> None:
        # No critics from the parent: it could only build them without normalisation.
        super().__init__(
            observation_space,
            action_space,
            net_arch,
            features_extractor,
            features_dim,
            activation_fn,
            normalize_images,
            n_critics=0,
            share_features_extractor=share_features_extractor,
        )
        self.n_critics = n_critics
        input_dim = features_dim + get_action_dim(self.action_space)
        for index in range(n_critics):
            layers = create_mlp(input_dim, 1, net_arch, activation_fn, post_linear_modules=[nn.LayerNorm])
            self.add_module(f"qf{index}", critic := nn.Sequential(*layers))
            self.q_networks.append(critic)


class LayerNormSACPolicy(SACPolicy):
    """SB3's SAC policy with :class:`LayerNormCritic` critics; the parameters are those of ``SACPolicy``."""

    def make_critic(self, features_extractor: BaseFeaturesExtractor | None = None) -> ContinuousCritic:
        """
        Build the critics, or their target networks.

        :param features_extractor: network in front of them; None: a new one
        :return: the critics, on the policy's device
        """
        critic_kwargs = self._update_features_extractor(self.critic_kwargs, features_extractor)
        return LayerNormCritic(**critic_kwargs).to(self.device)


@dataclass(frozen=True)
class AlgorithmSpec:
    """
    An algorithm of the benchmark.

    :param name: name in the ``algorithm`` column
    :param algorithm: SB3 algorithm class; None: uniformly random actions
    :param n_envs: number of training environments, in one ``DummyVecEnv``
    :param kwargs: constructor arguments other than the environment and the seed
    """

    name: str
    algorithm: type[BaseAlgorithm] | None
    n_envs: int = 1
    kwargs: Mapping[str, Any] = field(default_factory=dict)

    def settings(self) -> dict[str, Any]:
        """
        All hyperparameters, the defaults of the algorithm and of its policy included.

        :return: in a form that JSON can hold
        """
        if self.algorithm is None:
            return {"algorithm": RANDOM}
        arguments = _defaults(self.algorithm) | dict(self.kwargs)
        policy = arguments["policy"]
        policy_class = self.algorithm.policy_aliases.get(policy, policy) if isinstance(policy, str) else policy
        arguments["policy"] = policy_class
        policy_arguments = _defaults(policy_class) if inspect.isclass(policy_class) else {}
        policy_arguments |= arguments.get("policy_kwargs") or {}
        # Given by the algorithm, from the environment and from its own settings.
        for name in GIVEN:
            policy_arguments.pop(name, None)
        arguments["policy_kwargs"] = policy_arguments
        if self.own:
            arguments |= _own_choices(arguments)
        return {"algorithm": _plain(self.algorithm), "n_envs": self.n_envs, "arguments": _plain(arguments)}

    def settings_hash(self) -> str:
        """
        Identify the hyperparameters.

        :return: 8 hexadecimal digits that change with any of them
        """
        text = json.dumps(self.settings(), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:8]

    @property
    def own(self) -> bool:
        """Whether the algorithm itself is code of this package, so that the package's version matters to its results."""
        return self.algorithm is not None and self.algorithm.__module__.partition(".")[0] == "sb3_agpo"


def _defaults(constructed: type) -> dict[str, Any]:
    """
    Default arguments of a constructor.

    :param constructed: a class
    :return: argument -> default, those named in ``NOT_SETTINGS`` left out
    """
    parameters = inspect.signature(constructed).parameters.values()
    return {
        parameter.name: parameter.default
        for parameter in parameters
        if parameter.name not in NOT_SETTINGS and parameter.default is not inspect.Parameter.empty
    }


def _own_choices(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """
    What AGPO chooses where an argument is None: a setting, too.

    :param arguments: constructor arguments of AGPO
    :return: those that are None, as AGPO takes them on the tasks of the benchmark
    """
    # Only here, so that the baselines run without it.
    from sb3_agpo.agpo.agpo import CRITIC_LEARNING_RATE_FACTOR, POLICY_DELAY_BESIDE_WINDOWS
    from sb3_agpo.agpo.gates import DEFAULT_GATE

    chosen: dict[str, Any] = {}
    if arguments["gradient_mode"] == "adaptive" and arguments["gate"] is None:
        chosen["gate"] = DEFAULT_GATE()
    if arguments["policy_delay"] is None:
        chosen["policy_delay"] = POLICY_DELAY_BESIDE_WINDOWS if arguments["rollout_epochs"] > 0 else 1
    if arguments["critic_learning_rate"] is None:
        rate = arguments["learning_rate"]
        factor = CRITIC_LEARNING_RATE_FACTOR
        chosen["critic_learning_rate"] = factor * rate if isinstance(rate, int | float) else f"{factor} * {_plain(rate)}"
    return chosen


def _plain(value: Any) -> Any:
    """
    A value as JSON can hold it, the same in every process.

    :param value: argument of a constructor
    :return: numbers, strings, lists and dictionaries; classes and functions by name
    """
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if hasattr(value, "__qualname__"):
        return f"{value.__module__}.{value.__qualname__}"
    # A representation with an address in it would be another one in every process.
    return f"{type(value).__module__}.{type(value).__qualname__}" if " at 0x" in repr(value) else repr(value)


def find_algorithm(name: str, n_envs: int | None = None, overrides: Mapping[str, Any] | None = None) -> AlgorithmSpec:
    """
    Look an algorithm up and apply changes to it.

    :param name: one of ``NAMES``
    :param n_envs: number of training environments; None: the algorithm's own
    :param overrides: constructor argument -> value; ``policy_kwargs.net_arch`` changes one entry of a dictionary
    :return: the algorithm
    :raises ValueError: for an unknown name
    """
    spec = _stock_algorithm(name)
    if spec.algorithm is None:
        return spec
    kwargs = _nested_copy(spec.kwargs)
    for key, value in (overrides or {}).items():
        *groups, last = key.split(".")
        target = kwargs
        for group in groups:
            target = target.setdefault(group, {})
            if not isinstance(target, dict):
                raise ValueError(f"cannot set '{key}': '{group}' is {target!r}, not a dictionary; set '{group}' itself")
        target[last] = value
    return replace(spec, n_envs=n_envs or spec.n_envs, kwargs=kwargs)


def check_arguments(spec: AlgorithmSpec) -> None:
    """
    Refuse changes to arguments that an algorithm or its policy does not have, before any run of it fails.

    :param spec: the algorithm, with its changes
    :raises ValueError: naming the argument, and one that may be meant
    """
    if spec.algorithm is None:
        return
    for name, option in (("env", "--envs"), ("seed", "--seeds")):
        if name in spec.kwargs:
            raise ValueError(f"--set {name}: give {option} instead")
    _check_names(spec.name, "", spec.kwargs, spec.algorithm)
    policy = spec.kwargs["policy"]
    policy_class = spec.algorithm.policy_aliases.get(policy) if isinstance(policy, str) else policy
    policy_kwargs = spec.kwargs.get("policy_kwargs")
    if inspect.isclass(policy_class) and isinstance(policy_kwargs, Mapping):
        _check_names(f"the policy of {spec.name}", "policy_kwargs.", policy_kwargs, policy_class)


def _check_names(owner: str, prefix: str, given: Iterable[str], constructed: type) -> None:
    """Refuse names that are no arguments of a constructor."""
    known = [name for name in _argument_names(constructed) if not name.startswith("_") and name not in GIVEN]
    for name in given:
        if name not in known:
            meant = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {prefix}{meant[0]}?" if meant else f"choose from {', '.join(known)}"
            raise ValueError(f"--set {prefix}{name}: {owner} has no such argument; {hint}")


def _argument_names(constructed: type) -> list[str]:
    """Arguments of a constructor, and of those that it hands others on to."""
    names: list[str] = []
    for constructor in (vars(base)["__init__"] for base in constructed.__mro__ if "__init__" in vars(base)):
        parameters = inspect.signature(constructor).parameters.values()
        kinds = {parameter.name: parameter.kind for parameter in parameters}
        named = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
        names += [name for name, kind in kinds.items() if kind in named]
        if inspect.Parameter.VAR_KEYWORD not in kinds.values():
            break
    return list(dict.fromkeys(names))


def _nested_copy(mapping: Mapping[str, Any]) -> dict[str, Any]:
    """
    Copy a dictionary and the dictionaries in it, not their values.

    :param mapping: keyword arguments
    :return: a copy whose entries can be replaced
    """
    return {key: _nested_copy(value) if isinstance(value, Mapping) else value for key, value in mapping.items()}


def _stock_algorithm(name: str) -> AlgorithmSpec:
    """
    An algorithm as the benchmark compares it.

    :param name: one of ``NAMES``
    :return: the algorithm
    :raises ValueError: for an unknown name
    """
    # The same device everywhere: networks of this size gain nothing on a GPU, and timings stay comparable.
    common: dict[str, Any] = {"policy": "MlpPolicy", "device": "cpu"}
    plain: dict[str, type[BaseAlgorithm]] = {"sac": SAC, "tqc": TQC, "crossq": CrossQ, "ppo": PPO}
    if name == RANDOM:
        return AlgorithmSpec(name, None)
    if name in plain:
        return AlgorithmSpec(name, plain[name], kwargs=common)
    if name == "sac-fast":
        policy_kwargs: dict[str, Any] = {"activation_fn": FAST_ACTIVATION}
        kwargs = {**common, **FAST_SETTINGS, "tau": FAST_TAU, "policy": LayerNormSACPolicy, "policy_kwargs": policy_kwargs}
        return AlgorithmSpec(name, SAC, FAST_N_ENVS, kwargs)
    if name == "crossq-fast":
        policy_kwargs = {"activation_fn": FAST_ACTIVATION, "net_arch": [256, 256]}
        kwargs = {**common, **FAST_SETTINGS, **BATCH_NORM_UPDATES, "policy_kwargs": policy_kwargs}
        return AlgorithmSpec(name, CrossQ, FAST_N_ENVS, kwargs)
    if name in (*AGPO_NAMES, *WINDOWS_NAMES, *VARIANTS):
        # Only here, so that the baselines run without it.
        from sb3_agpo import AGPO

        return AlgorithmSpec(name, AGPO, FAST_N_ENVS, {**common, **_agpo_settings(name)})
    raise ValueError(f"unknown algorithm '{name}'; choose from {', '.join(NAMES)}")


def _agpo_settings(name: str) -> dict[str, Any]:
    """
    What a variant of AGPO is made of.

    :param name: one of ``AGPO_NAMES``, ``WINDOWS_NAMES`` or ``VARIANTS``
    :return: constructor arguments
    """
    if name in VARIANTS:
        return VARIANTS[name]
    mode = name.removeprefix("agpo-").removesuffix(NO_MATCHING).removesuffix(WINDOWS)
    if name.endswith(WINDOWS):
        return FOUR_UPDATES_SETTINGS | {"gradient_mode": mode, "critic_grad_coef": 0.0, "policy_delay": 0}
    return {"gradient_mode": mode, "critic_grad_coef": 0.0 if name.endswith(NO_MATCHING) else MATCHING}


def called(text: str) -> Any:
    """
    A gate or a schedule by the call that makes it.

    :param text: for example ``MagnitudeGate(flatness=1.0)`` or ``LinearSchedule(1e-3, 1e-4, 1.0)``
    :return: what the call makes; None if it is the call of anything else, or none
    :raises ValueError: if an argument is no Python literal, or out of range
    :raises TypeError: if there is no such argument
    :raises SyntaxError: if it is no Python expression
    """
    from sb3_agpo.agpo import gates

    call = ast.parse(text, mode="eval").body
    if not (isinstance(call, ast.Call) and isinstance(call.func, ast.Name)):
        return None
    kind = LinearSchedule if call.func.id == "LinearSchedule" else getattr(gates, call.func.id, None)
    if not (kind is LinearSchedule or (inspect.isclass(kind) and issubclass(kind, gates.Gate))):
        return None
    named = {str(keyword.arg): ast.literal_eval(keyword.value) for keyword in call.keywords}
    return kind(*map(ast.literal_eval, call.args), **named)


def torch_module(name: str) -> type[nn.Module]:
    """
    A module class by its name, such as an activation.

    :param name: for example ``torch.nn.SiLU``
    :return: the class
    :raises ValueError: if there is none of this name
    """
    found = getattr(torch.nn, name.removeprefix("torch.nn."), None)
    if not (inspect.isclass(found) and issubclass(found, nn.Module)):
        raise ValueError(f"'{name}' is no module class of torch.nn; write for example torch.nn.SiLU")
    return found
