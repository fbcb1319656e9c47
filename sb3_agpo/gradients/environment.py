"""The environment to inspect, and who acts in it."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import pickle
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import gymnasium as gym
import numpy as np
from gymnasium import spaces
from numpy.typing import NDArray
from stable_baselines3.common.vec_env import DummyVecEnv, VecNormalize

from sb3_agpo.agpo.agpo import AGPO
from sb3_agpo.benchmark.fidelity_model import load_model
from sb3_agpo.dynamics.mujoco import FiniteDifferences

#: what files raise that ``VecNormalize.save`` did not write, or for another environment
UNREADABLE = (pickle.UnpicklingError, EOFError, AttributeError, ImportError, AssertionError, ValueError, KeyError, TypeError)

#: actions of an observation, both as the environment has them
Act = Callable[[Any], NDArray[Any]]


class Policy(NamedTuple):
    """Who acts, and how AGPO would look at it."""

    act: Act
    description: str
    horizon: int
    differences: FiniteDifferences = FiniteDifferences()


def make_environment(name: str, arguments: Mapping[str, Any] | None = None) -> gym.Env[Any, Any]:
    """
    Make an environment from what the user typed.

    :param name: a registered id such as ``Hopper-v5``; ``package.module:Name``, where ``Name`` is a class or function that
        returns an environment, or an id that importing the module registers; or ``path/to/file.py:Name``
    :param arguments: of its constructor
    :return: the environment
    :raises ValueError: if there is no such environment, with what to change
    """
    arguments = dict(arguments or {})
    source, colon, attribute = name.rpartition(":")
    try:
        module = _import(source) if colon else None
        maker = getattr(module, attribute, None)
        if maker is None and source.endswith(".py"):  # whose path is no name that Gymnasium could import
            raise ImportError(f"the file {source} has no `{attribute}`")
        env = gym.make(name, **arguments) if maker is None else maker(**arguments)
    except (gym.error.Error, ImportError, OSError, TypeError, AttributeError) as error:
        raise ValueError(
            f"'{name}' cannot be made ({type(error).__name__}: {error}); give a registered id such as Hopper-v5, or your "
            "own class as package.module:ClassName or path/to/file.py:ClassName, and its arguments by --set"
        ) from error
    if not isinstance(env, gym.Env):
        raise ValueError(f"'{name}' is a {type(env).__name__} and no Gymnasium environment; give the class or its id")
    if not isinstance(env.action_space, spaces.Box):
        raise ValueError(f"'{name}' has the action space {env.action_space}; AGPO needs continuous actions (Box)")
    return env


def _import(source: str) -> ModuleType:
    """
    Import the user's code.

    :param source: dotted name of a module, or path of a Python file
    :return: the module
    """
    path = Path(source).resolve()
    is_file = source.endswith(".py")
    if is_file and not path.is_file():
        raise ImportError(f"there is no file {source}")
    folder = str(path.parent if is_file else Path.cwd())  # as a script and ``python -m`` have it, and a console script not
    if folder not in sys.path:
        sys.path.insert(0, folder)
    if not is_file:
        return importlib.import_module(source)
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module
    spec.loader.exec_module(module)
    return module


def default_of(argument: str) -> Any:
    """
    What AGPO does unless one says otherwise.

    :param argument: of its constructor
    :return: the argument's default
    """
    return inspect.signature(AGPO).parameters[argument].default


def make_policy(env: gym.Env[Any, Any], model: Path | None, normalization: Path | None, seed: int) -> Policy:
    """
    Who acts: a saved model's stochastic policy, or a uniformly random one.

    :param env: the environment
    :param model: file that ``save`` of AGPO or SAC wrote; None for random actions
    :param normalization: file that ``VecNormalize.save`` wrote, if the model was trained with it
    :param seed: of the random actions
    :return: the policy
    :raises ValueError: if a file cannot be used, with what to change
    """
    if model is None:
        if normalization is not None:
            raise ValueError(f"--normalization {normalization} is of no use without --model; give both")
        env.action_space.seed(seed)
        return Policy(lambda _: env.action_space.sample(), "uniformly random actions", default_of("horizon"))
    loaded = load_model(model, env)
    normalize: Callable[[Any], Any] = _read_normalization(normalization, env).normalize_obs if normalization else np.asarray

    def act(observation: Any) -> NDArray[Any]:
        return loaded.predict(normalize(observation), deterministic=False)[0]

    loaded.set_random_seed(seed)
    description = f"stochastic policy of {model.name} ({loaded.num_timesteps:,} steps of training)"
    if isinstance(loaded, AGPO):
        return Policy(act, description, loaded.horizon, loaded.finite_differences)
    return Policy(act, description, default_of("horizon"))


def _read_normalization(path: Path, env: gym.Env[Any, Any]) -> VecNormalize:
    """
    Read the statistics of observations that a model was trained with.

    :param path: file that ``VecNormalize.save`` wrote; a pickle: load only files that you trust
    :param env: the environment
    :return: the normalisation
    :raises ValueError: if it is no such file, or that of another environment
    """
    if not path.is_file():
        raise ValueError(f"--normalization: there is no file {path}; give what `VecNormalize.save` wrote")
    try:
        return VecNormalize.load(str(path), DummyVecEnv([lambda: env]))
    except UNREADABLE as error:
        raise ValueError(
            f"--normalization: {path} does not fit ({type(error).__name__}: {error}); give what `VecNormalize.save` wrote "
            "for this environment"
        ) from error
