"""
The state of one Gymnasium environment, wrappers included, as plain data.

A layer, that is a wrapper or the environment itself, may offer ``get_checkpoint_state`` and ``set_checkpoint_state``. For one
that does not, its plain attributes are its state: numbers, strings, arrays, containers of them, random generators. The
simulator of a MuJoCo environment is saved in full, derived quantities too, as some tasks read those that the last step left
behind. An environment with any other attribute that could hold state (a Box2D world, for example) cannot be saved.
"""

from __future__ import annotations

import copy
import functools
import inspect
import random
import types
import zlib
from collections.abc import Iterator
from typing import Any

import gymnasium as gym
import mujoco
import numpy as np
import torch as th
from gymnasium.envs.mujoco import MujocoEnv
from gymnasium.envs.registration import EnvSpec
from gymnasium.wrappers import RecordVideo
from numpy.lib.array_utils import byte_bounds
from numpy.typing import NDArray
from stable_baselines3.common.monitor import Monitor, ResultsWriter
from stable_baselines3.common.vec_env import VecMonitor, VecVideoRecorder

from sb3_agpo.checkpoint.plain_data import is_plain, same_data, set_space_generators, space_generators
from sb3_agpo.checkpoint.sharing import bounds, contents, describe_sharing, restore_sharing
from sb3_agpo.dynamics.recorder import RecorderWrapper
from sb3_agpo.dynamics.wrappers import is_time_limit

State = dict[str, Any]

#: attributes that are no state of their own
STRUCTURAL = ("env", "mujoco_renderer", "render_mode", "_ezpickle_args", "_ezpickle_kwargs", "_saved_kwargs")
#: arguments of an environment that only make pictures
OF_PICTURES = ("render_mode", "width", "height", "camera_id", "camera_name", "max_geom", "default_camera_config")
#: an argument that names a file; the model in it is compared itself
OF_FILES = ("xml_file",)
#: types that hold no state of an episode
INERT: tuple[type, ...] = (
    *(types.FunctionType, types.MethodType, types.BuiltinFunctionType, types.ModuleType, type, np.ufunc, functools.partial),
    *(EnvSpec, ResultsWriter),
)
#: generators that are put back in their place
GLOBAL_GENERATORS = (random.random.__self__, np.random.random.__self__)  # type: ignore[attr-defined]
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
        if not isinstance(env, RecorderWrapper):
            yield env
        env = env.env
    yield env


def capture_environment(env: gym.Env[Any, Any]) -> State:
    """
    Read the state of an environment, without changing anything.

    :param env: environment, wrapped or not
    :return: its state; ``unknown`` names what could hold state and is no plain data
    """
    captured, unknown, detached = zip(*(capture_layer(layer) for layer in layers(env)), strict=True)
    unwrapped = env.unwrapped
    return {
        "layers": list(captured),
        "sharing": describe_sharing(list(captured)),
        "simulator": capture_simulator(unwrapped) if isinstance(unwrapped, MujocoEnv) else None,
        "unknown": [name for names in (*unknown, *detached) for name in names],
        "lost": bool(unknown[-1]),
        "options": given_options(env),
    }


def given_options(env: gym.Env[Any, Any]) -> dict[str, Any]:
    """
    The numbers and texts that ``gymnasium.make`` was given for an environment, alone or in lists, tuples and dictionaries.

    :param env: environment, wrapped or not
    :return: name -> value, without what may differ from one machine to another; empty for one made in another way
    """
    if env.spec is None:
        return {}
    given = {"max_episode_steps": env.spec.max_episode_steps, **env.spec.kwargs}
    return {name: value for name, value in given.items() if name not in (*OF_PICTURES, *OF_FILES) and _is_option(value)}


def _is_option(value: Any) -> bool:
    """Whether a value is made of numbers and of texts that are no paths, which belong to a machine."""
    if isinstance(value, dict | list | tuple):
        return all(map(_is_option, contents(value).values()))
    if isinstance(value, str):
        return "/" not in value and "\\" not in value
    if isinstance(value, np.ndarray):
        return not value.dtype.hasobject
    return value is None or isinstance(value, bool | int | float | np.generic)


def check_given_options(env: gym.Env[Any, Any], state: State) -> None:
    """
    Refuse an environment that was made with other options, which those of the checkpoint would silently replace.

    :param env: environment
    :param state: the checkpoint's, as :func:`capture_environment` returned it
    :raises ValueError: naming what differs
    """
    own, expected = given_options(env), state.get("options")
    if expected is None:  # checkpoints of before held numbers alone
        expected = state.get("made_with", {})
        own = {name: value for name, value in own.items() if isinstance(value, int | float)}
    if not own or not expected:  # one of them was made in another way, which tells nothing
        return
    parameters = inspect.signature(type(env.unwrapped).__init__).parameters
    for name in [*own, *(name for name in expected if name not in own)]:
        default = parameters[name].default if name in parameters else None
        here, there = own.get(name, default), expected.get(name, default)
        if not same_data(here, there):
            raise ValueError(
                f"the environment was made with {name}={here!r}, that of the checkpoint with {there!r}; make it in the "
                "same way, or use `load` to train in another one"
            )


def layer_name(layer: gym.Env[Any, Any]) -> str:
    """
    What a wrapper or an environment is called in a checkpoint.

    :param layer: the layer
    :return: the name of its class; that of Gymnasium's time limit also for the one that RL Zoo puts in its place
    """
    return "TimeLimit" if is_time_limit(layer) else type(layer).__name__


def capture_layer(layer: gym.Env[Any, Any]) -> tuple[State, list[str], list[str]]:
    """
    Read the state of a wrapper or an environment, what it wraps left out.

    :param layer: the layer
    :return: its state; what could be state and is no plain data; functions that would not draw from the generators put back
    """
    name = layer_name(layer)
    if callable(getattr(type(layer), "get_checkpoint_state", None)):
        return {"class": name, "own": layer.get_checkpoint_state()}, [], []  # type: ignore[attr-defined]
    attributes: State = {}
    generators: State = {}
    unknown: list[str] = []
    detached: list[str] = []
    simulator = layer.unwrapped if isinstance(layer.unwrapped, MujocoEnv) else None
    for key, value in vars(layer).items():
        if key in STRUCTURAL:
            continue
        parts = [] if simulator is None else [_is_part(leaf, simulator) for leaf in _leaves(value)]
        if parts and all(parts):
            continue
        if any(parts):
            unknown.append(f"{name}.{key} holds memory of the simulator")
        elif isinstance(value, gym.Space):
            generators[key] = space_generators(value)
        elif is_plain(value):
            attributes[key] = value
        elif (generator := hidden_generator(value)) is not None:
            detached.append(f"{name}.{key} is a method of a {type(generator).__name__}")
        elif not is_inert(value):
            unknown.append(f"{name}.{key} is a {type(value).__name__}")
    state = {"class": name, "attributes": attributes, "spaces": generators, "names": list(vars(layer))}
    return state, [] if isinstance(layer, gym.Wrapper) and _is_of_known_package(layer) else unknown, detached


def _is_of_known_package(layer: gym.Env[Any, Any]) -> bool:
    return type(layer).__module__.split(".")[0] in KNOWN_PACKAGES


def is_inert(value: Any) -> bool:
    """
    Whether an object can be expected to hold nothing that an episode depends on.

    :param value: value of an attribute
    :return: whether it is a function, a module or something that makes pictures
    """
    module = f"{type(value).__module__}."
    return isinstance(value, INERT) or any(module.startswith(f"{name}.") for name in PICTURES)


def hidden_generator(value: Any) -> Any:
    """
    The generator that a function draws from, if it is a method of one.

    :param value: value of an attribute
    :return: the generator; None if it is anything else, or the method of a global generator, which keeps its place
    """
    while isinstance(value, functools.partial):
        value = value.func
    owner = getattr(value, "__self__", None)
    own = isinstance(owner, np.random.Generator | np.random.RandomState | random.Random)
    return owner if own and not any(owner is generator for generator in GLOBAL_GENERATORS) else None


def _leaves(value: Any) -> Iterator[Any]:
    """What a container holds, containers within it opened as well."""
    items = contents(value)
    if not items:
        yield value
    for item in items.values():
        yield from _leaves(item)


def _is_part(value: Any, simulator: MujocoEnv) -> bool:
    """Whether an object is the simulator or memory of it, so that a copy of its own must not take its place."""
    parts = (simulator.model, simulator.data)
    if isinstance(value, th.Tensor) and is_plain(value):
        low, high = bounds(value)
        ranges = [byte_bounds(array) for part in parts for _, array in _arrays(part)]
        return any(low < end and start < high for start, end in ranges)
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
    check_given_options(env, state)
    layer_states = copy.deepcopy(state["layers"])  # what is put in belongs to this environment alone
    if "sharing" in state:
        restore_sharing(layer_states, state["sharing"])
    for layer, layer_state in zip(own, layer_states, strict=True):
        restore_layer(layer, layer_state)
    notes = list(state["unknown"])
    if state["simulator"] is not None:
        if not isinstance(env.unwrapped, MujocoEnv):
            raise ValueError(f"{names[-1]} is no MujocoEnv, that of the checkpoint was; make the same environment")
        notes += restore_simulator(env.unwrapped, state["simulator"])
    return notes


def restore_layer(layer: gym.Env[Any, Any], state: State) -> None:
    """
    Put a wrapper or an environment where another one was.

    :param layer: the layer
    :param state: as :func:`capture_layer` returned it
    """
    if "own" in state:
        layer.set_checkpoint_state(state["own"])  # type: ignore[attr-defined]
        return
    kept = output_attributes(layer)
    if "sharing" in state:  # checkpoints of before described it for each layer
        restore_sharing(state["attributes"], state["sharing"])
    for key, value in state["attributes"].items():
        if key not in kept:
            setattr(layer, key, value)
    if not _is_of_known_package(layer):  # none of theirs ever deletes an attribute, but later versions may have more
        _forget_others(layer, state.get("names"))
    for key, generators in state["spaces"].items():
        space = getattr(layer, key)
        if space is not None:
            set_space_generators(space, generators)


def output_attributes(wrapper: Any) -> tuple[str, ...]:
    """
    Attributes that say where and since when a wrapper writes: those of the new one count.

    :param wrapper: any wrapper, of an environment or of a vectorised one
    :return: names
    """
    if isinstance(wrapper, RecordVideo | VecVideoRecorder):
        return ("video_folder", "name_prefix")
    return ("t_start",) if begins_file(wrapper) else ()


def begins_file(monitor: Any) -> bool:
    """
    Whether a Monitor writes a new file, which begins with its ``t_start``: seconds in it are to be counted from there.

    :param monitor: ``Monitor``, ``VecMonitor``, or any other wrapper
    :return: False if there is no file, or an old one is added to
    """
    writer = getattr(monitor, "results_writer", None) if isinstance(monitor, Monitor | VecMonitor) else None
    return writer is not None and writer.file_handler.mode.startswith("w")


def _forget_others(layer: gym.Env[Any, Any], names: list[str] | None) -> None:
    """Remove plain attributes that a reset has made, and that the layer did not have any more at the checkpoint."""
    for key, value in list(vars(layer).items()):
        if names is None or key in names or key in STRUCTURAL or isinstance(value, gym.Space) or not is_plain(value):
            continue
        if not isinstance(layer.unwrapped, MujocoEnv) or not any(_is_part(leaf, layer.unwrapped) for leaf in _leaves(value)):
            delattr(layer, key)


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
