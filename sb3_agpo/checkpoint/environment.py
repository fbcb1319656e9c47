"""
The state of one Gymnasium environment, wrappers included, as plain data.

A layer, that is a wrapper or the environment itself, may offer ``get_checkpoint_state`` and ``set_checkpoint_state``. For one
that does not, its plain attributes are its state: numbers, strings, arrays, containers of them, random generators. The
simulator of a MuJoCo environment is saved in full, derived quantities too, as some tasks read those that the last step left
behind. An environment with any other attribute that could hold state (a Box2D world, for example) cannot be saved.
"""

from __future__ import annotations

import functools
import itertools
import types
import zlib
from collections.abc import Iterator
from typing import Any

import gymnasium as gym
import mujoco
import numpy as np
from gymnasium.envs.mujoco import MujocoEnv
from gymnasium.envs.registration import EnvSpec
from numpy.typing import NDArray
from stable_baselines3.common.monitor import ResultsWriter

from sb3_agpo.checkpoint.plain_data import is_plain, set_space_generators, space_generators
from sb3_agpo.dynamics.recorder import TransitionRecorder
from sb3_agpo.dynamics.wrappers import is_time_limit

State = dict[str, Any]

#: attributes that are no state of their own
STRUCTURAL = ("env", "mujoco_renderer", "_ezpickle_args", "_ezpickle_kwargs", "_saved_kwargs")
#: types that hold no state of an episode
INERT: tuple[type, ...] = (
    *(types.FunctionType, types.MethodType, types.BuiltinFunctionType, types.ModuleType, type, np.ufunc, functools.partial),
    *(EnvSpec, ResultsWriter),
)
#: packages and modules whose objects only make pictures
PICTURES = (
    *("pygame", "glfw", "cv2", "PIL", "matplotlib", "gymnasium.envs.mujoco.mujoco_rendering"),
    *("mujoco.renderer", "mujoco.rendering", "mujoco.viewer"),  # the first two are the same in versions 3 and 4 of MuJoCo
)
#: packages whose wrappers keep all state that matters in plain attributes
KNOWN_PACKAGES = ("gymnasium", "stable_baselines3", "sb3_agpo")


def layers(env: gym.Env[Any, Any]) -> Iterator[gym.Env[Any, Any]]:
    """
    The wrappers of an environment and the environment itself.

    :param env: environment, wrapped or not
    :return: the outermost first; recorders, whose records are saved elsewhere, left out
    """
    while isinstance(env, gym.Wrapper):
        if not isinstance(env, TransitionRecorder):
            yield env
        env = env.env
    yield env


def capture_environment(env: gym.Env[Any, Any]) -> State:
    """
    Read the state of an environment, without changing anything.

    :param env: environment, wrapped or not
    :return: its state; ``unknown`` names what could hold state and is no plain data
    """
    captured, unknown = zip(*(capture_layer(layer) for layer in layers(env)), strict=True)
    unwrapped = env.unwrapped
    return {
        "layers": list(captured),
        "simulator": capture_simulator(unwrapped) if isinstance(unwrapped, MujocoEnv) else None,
        "unknown": [name for names in unknown for name in names],
        "lost": bool(unknown[-1]),
    }


def layer_name(layer: gym.Env[Any, Any]) -> str:
    """
    What a wrapper or an environment is called in a checkpoint.

    :param layer: the layer
    :return: the name of its class; that of Gymnasium's time limit also for the one that RL Zoo puts in its place
    """
    return "TimeLimit" if is_time_limit(layer) else type(layer).__name__


def capture_layer(layer: gym.Env[Any, Any]) -> tuple[State, list[str]]:
    """
    Read the state of a wrapper or an environment, what it wraps left out.

    :param layer: the layer
    :return: its state, and what could be state and is no plain data
    """
    name = layer_name(layer)
    if callable(getattr(type(layer), "get_checkpoint_state", None)):
        return {"class": name, "own": layer.get_checkpoint_state()}, []  # type: ignore[attr-defined]
    attributes: State = {}
    generators: State = {}
    unknown: list[str] = []
    simulator = layer.unwrapped if isinstance(layer.unwrapped, MujocoEnv) else None
    for key, value in vars(layer).items():
        if key in STRUCTURAL:
            continue
        parts = [] if simulator is None else [_is_part(leaf, simulator) for _, leaf in _leaves(value, key)]
        if parts and all(parts):
            continue
        if any(parts):
            unknown.append(f"{name}.{key} holds memory of the simulator")
        elif isinstance(value, gym.Space):
            generators[key] = space_generators(value)
        elif is_plain(value):
            attributes[key] = value
        elif not is_inert(value):
            unknown.append(f"{name}.{key} is a {type(value).__name__}")
    known = isinstance(layer, gym.Wrapper) and type(layer).__module__.split(".")[0] in KNOWN_PACKAGES
    state = {"class": name, "attributes": attributes, "spaces": generators, "shared": shared_leaves(attributes)}
    return state, [] if known else unknown


def is_inert(value: Any) -> bool:
    """
    Whether an object can be expected to hold nothing that an episode depends on.

    :param value: value of an attribute
    :return: whether it is a function, a module or something that makes pictures
    """
    module = f"{type(value).__module__}."
    return isinstance(value, INERT) or any(module.startswith(f"{name}.") for name in PICTURES)


def _leaves(value: Any, path: str) -> Iterator[tuple[str, Any]]:
    """What a container holds, containers within it opened as well, and what to call it."""
    if isinstance(value, dict):
        for key, item in value.items():
            yield from _leaves(item, f"{path}[{key!r}]")
    elif isinstance(value, list | tuple):
        for index, item in enumerate(value):
            yield from _leaves(item, f"{path}[{index}]")
    else:
        yield path, value


def shared_leaves(attributes: State) -> list[list[str]]:
    """
    Find arrays that are views of one another, and random generators that have two names.

    :param attributes: name -> value
    :return: pairs of names such as ``position`` or ``parts['position']``
    """
    leaves = [leaf for key, value in attributes.items() for leaf in _leaves(value, key)]
    arrays = [(path, leaf) for path, leaf in leaves if isinstance(leaf, np.ndarray) and leaf.size]
    generators = [(path, leaf) for path, leaf in leaves if isinstance(leaf, np.random.Generator)]
    pairs = [[one, other] for (one, a), (other, b) in itertools.combinations(arrays, 2) if np.may_share_memory(a, b)]
    pairs += [[one, other] for (one, a), (other, b) in itertools.combinations(generators, 2) if a is b]
    return pairs


def _is_part(value: Any, simulator: MujocoEnv) -> bool:
    """Whether an object is the simulator or memory of it, so that a copy of its own must not take its place."""
    parts = (simulator.model, simulator.data)
    if not isinstance(value, np.ndarray):
        return any(value is part for part in parts)
    return not value.flags.owndata and any(np.may_share_memory(value, array) for part in parts for _, array in _arrays(part))


def restore_environment(env: gym.Env[Any, Any], state: State) -> list[str]:
    """
    Put an environment where another one was.

    :param env: environment made as the other one was, and reset
    :param state: as :func:`capture_environment` returned it, with ``lost`` False
    :return: in words, what may differ all the same
    :raises ValueError: if the environment is made in another way
    """
    own = list(layers(env))
    names, expected = ([layer_name(layer) for layer in own], [layer["class"] for layer in state["layers"]])
    if names != expected:
        raise ValueError(
            f"the environment is made of {' around '.join(names)}, that of the checkpoint of {' around '.join(expected)}; "
            "make it with the same wrappers"
        )
    notes = list(state["unknown"])
    for layer, layer_state in zip(own, state["layers"], strict=True):
        notes += restore_layer(layer, layer_state)
    if state["simulator"] is not None:
        if not isinstance(env.unwrapped, MujocoEnv):
            raise ValueError(f"{names[-1]} is no MujocoEnv, that of the checkpoint was; make the same environment")
        notes += restore_simulator(env.unwrapped, state["simulator"])
    return notes


def restore_layer(layer: gym.Env[Any, Any], state: State) -> list[str]:
    """
    Put a wrapper or an environment where another one was.

    :param layer: the layer
    :param state: as :func:`capture_layer` returned it
    :return: in words, what may differ all the same
    """
    if "own" in state:
        layer.set_checkpoint_state(state["own"])  # type: ignore[attr-defined]
        return []
    attributes, shared = state["attributes"], state["shared"]
    in_place = {path.split("[")[0] for pair in shared for path in pair}
    for key, value in attributes.items():
        setattr(layer, key, _put_back(getattr(layer, key, None), value) if key in in_place else value)
    for key, generators in state["spaces"].items():
        space = getattr(layer, key)
        if space is not None:
            set_space_generators(space, generators)
    left = shared_leaves({key: getattr(layer, key) for key in attributes if key in in_place})
    name = layer_name(layer)
    return [
        f"{name}.{one} and {name}.{other} are no longer the same memory" for one, other in shared if [one, other] not in left
    ]


def _put_back(current: Any, value: Any) -> Any:
    """``current`` with the contents of ``value``, as others may hold it too; ``value`` where they are of different kinds."""
    if isinstance(value, np.ndarray) and _same_shape(value, current) and current.flags.writeable:
        current[...] = value
        return current
    if isinstance(value, np.random.Generator) and type(current) is type(value):
        current.bit_generator.state = value.bit_generator.state
        return current
    if isinstance(value, dict) and isinstance(current, dict):
        contents = {key: _put_back(current.get(key), item) for key, item in value.items()}
        current.clear()
        current.update(contents)
        return current
    if isinstance(value, list) and isinstance(current, list) and len(value) == len(current):
        current[:] = [_put_back(*pair) for pair in zip(current, value, strict=True)]
        return current
    return value


def capture_simulator(env: MujocoEnv) -> State:
    """
    Read everything that MuJoCo keeps between two steps.

    :param env: unwrapped environment
    :return: its state
    """
    # Contacts and constraints live in an arena, are empty in fresh data, and are made anew in every step
    fresh = mujoco.MjData(env.model)
    arrays = {name: view.copy() for name, view in _arrays(env.data) if _same_shape(view, getattr(fresh, name))}
    warnings = [[int(warning.lastinfo), int(warning.number)] for warning in env.data.warning]
    return {"time": float(env.data.time), "arrays": arrays, "warnings": warnings, "model": model_checksum(env.model)}


def restore_simulator(env: MujocoEnv, state: State) -> list[str]:
    """
    Put a simulator where another one was.

    :param env: unwrapped environment with a model of the same sizes
    :param state: as :func:`capture_simulator` returned it
    :return: in words, what may differ all the same
    :raises ValueError: if the model has other sizes
    """
    model, data = env.model, env.data
    for name, array in state["arrays"].items():
        if not _same_shape(array, getattr(data, name, None)):
            raise ValueError(
                f"MuJoCo's `{name}` has another size than in the checkpoint; make the environment with the same model"
            )
    for name, array in state["arrays"].items():
        getattr(data, name)[...] = array
    data.time = state["time"]
    # Gives contacts and flags values that fit, and then every array gets back the very numbers it had
    mujoco.mj_forward(model, data)
    for name, array in state["arrays"].items():
        getattr(data, name)[...] = array
    for warning, (last, number) in zip(data.warning, state["warnings"], strict=True):
        warning.lastinfo, warning.number = last, number
    if model_checksum(model) != state["model"]:
        return [f"the simulator's model of {type(env).__name__} has changed; change it as it was before going on"]
    return []


def _arrays(part: mujoco.MjData | mujoco.MjModel) -> Iterator[tuple[str, NDArray[Any]]]:
    for name in dir(part):
        if not name.startswith("_") and isinstance(view := getattr(part, name), np.ndarray) and view.size:
            yield name, view


def _same_shape(array: NDArray[Any], other: Any) -> bool:
    return isinstance(other, np.ndarray) and array.shape == other.shape and array.dtype == other.dtype


def model_checksum(model: mujoco.MjModel) -> int:
    """
    A number that tells models apart.

    :param model: a model
    :return: checksum of all its contents
    """
    buffer = np.empty(mujoco.mj_sizeModel(model), dtype=np.uint8)
    mujoco.mj_saveModel(model, None, buffer)
    return zlib.crc32(buffer.data)
