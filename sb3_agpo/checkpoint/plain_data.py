"""
State as plain data: JSON for structure, arrays for numbers, and nothing that runs code when it is read.

Classes are only ever named. Reading looks a name up among the classes that are allowed below; an object of such a class is
filled with its attributes without calling its constructor.
"""

from __future__ import annotations

import importlib
import random
from collections import OrderedDict, deque
from collections.abc import Iterable, Mapping
from enum import Enum
from typing import Any, NamedTuple

import gymnasium as gym
import numpy as np
import torch as th
from gymnasium.wrappers.utils import RunningMeanStd as GymnasiumRunningMeanStd
from numpy.typing import NDArray
from stable_baselines3.common.buffers import BaseBuffer
from stable_baselines3.common.noise import NormalActionNoise, OrnsteinUhlenbeckActionNoise, VectorizedActionNoise
from stable_baselines3.common.policies import BaseModel
from stable_baselines3.common.running_mean_std import RunningMeanStd
from stable_baselines3.common.type_aliases import TrainFreq, TrainFrequencyUnit
from stable_baselines3.common.utils import ConstantSchedule, FloatSchedule, LinearSchedule
from stable_baselines3.her.goal_selection_strategy import GoalSelectionStrategy

from sb3_agpo.agpo import gates
from sb3_agpo.agpo.rollout_buffer import StepDerivatives, Transition
from sb3_agpo.dynamics.interface import TransitionDerivatives
from sb3_agpo.dynamics.mujoco import FiniteDifferences
from sb3_agpo.dynamics.recorder import Record, StepRecords

#: marks a JSON object that stands for something else
TAG = "!"
#: tuples with names
RECORDS: tuple[type, ...] = (Record, StepDerivatives, StepRecords, Transition, TransitionDerivatives, TrainFreq)
#: objects that are nothing but their attributes
OBJECTS: tuple[type, ...] = (
    ConstantSchedule,
    FloatSchedule,
    LinearSchedule,
    NormalActionNoise,
    OrnsteinUhlenbeckActionNoise,
    VectorizedActionNoise,
    RunningMeanStd,
    GymnasiumRunningMeanStd,
    FiniteDifferences,
    gates.ConstantGate,
    gates.DisagreementGate,
    gates.InverseVarianceGate,
    gates.MagnitudeGate,
    gates.VarianceSwitch,
)
ENUMERATIONS: tuple[type[Enum], ...] = (TrainFrequencyUnit, GoalSelectionStrategy)
#: packages and kinds of the classes that may be named
CLASS_PACKAGES = ("torch", "stable_baselines3", "sb3_contrib", "sb3_agpo")
CLASS_KINDS: tuple[type, ...] = (th.nn.Module, th.optim.Optimizer, BaseBuffer, BaseModel)
#: what makes a ``SeedSequence``
SEED_SEQUENCE = ("entropy", "spawn_key", "pool_size", "n_children_spawned")

Arrays = dict[str, NDArray[Any]]


class NotPlainError(TypeError):
    """A value that plain data cannot hold."""


class PlainData(NamedTuple):
    """A value as structure and numbers."""

    structure: Any  # what JSON can hold
    arrays: Arrays


def encode(value: Any, name: str = "value") -> PlainData:
    """
    Turn a value into plain data.

    :param value: any nesting of the types this module knows
    :param name: what to call it in an error
    :return: the same as structure and arrays; arrays are not copied
    :raises NotPlainError: naming the part that is none of these types
    """
    arrays: Arrays = {}
    return PlainData(_encode(value, arrays, name), arrays)


def is_plain(value: Any) -> bool:
    """
    Whether plain data can hold a value.

    :param value: anything
    :return: whether :func:`encode` takes it
    """
    try:
        encode(value)
    except (NotPlainError, RecursionError):
        return False
    return True


def same_data(first: Any, second: Any) -> bool:
    """
    Whether two values are equal, lists and tuples of equal items included; NaN equals itself.

    :param first: a value
    :param second: another
    :return: whether they are
    """
    if isinstance(first, list | tuple) and isinstance(second, list | tuple):
        return len(first) == len(second) and all(map(same_data, first, second))
    if isinstance(first, Mapping) and isinstance(second, Mapping):
        return first.keys() == second.keys() and all(same_data(first[key], second[key]) for key in first)
    if isinstance(first, np.ndarray) or isinstance(second, np.ndarray):
        first, second = np.asarray(first), np.asarray(second)
        return np.array_equal(first, second, equal_nan=first.dtype.kind in "fc" and second.dtype.kind in "fc")
    both_nan = first != first and second != second
    return bool(both_nan or first == second)


def _encode(value: Any, arrays: Arrays, where: str) -> Any:
    """Structure of a value; its arrays are added to ``arrays``."""
    if value is None or type(value) in (bool, int, float, str):
        return value
    if isinstance(value, np.generic) or type(value) in (np.ndarray, np.memmap):  # others compute in other ways
        return _encode_array(np.asarray(value), arrays, where, scalar=isinstance(value, np.generic))
    if isinstance(value, th.Tensor):
        return {**_encode_array(_bits(value, where), arrays, where), TAG: "tensor", "dtype": str(value.dtype).split(".")[1]}
    if isinstance(value, RECORDS):
        return {TAG: "record", "class": type(value).__name__, "items": _encode_all(value, arrays, where)}  # type: ignore[arg-type]
    if isinstance(value, Enum) and type(value) in ENUMERATIONS:
        return {TAG: "enumeration", "class": type(value).__name__, "name": value.name}
    if type(value) in (list, tuple, set, frozenset, deque):
        return _encode_sequence(value, arrays, where)
    if type(value) in (dict, OrderedDict):
        return _encode_mapping(value, arrays, where)
    if isinstance(value, np.random.Generator | np.random.RandomState | random.Random):
        return _encode_generator(value, arrays, where)
    if isinstance(value, type):
        return {TAG: "class", "name": _class_name(value, where)}
    if isinstance(value, np.dtype):
        return {TAG: "dtype", "description": _encode(_describe_dtype(value, where), arrays, where)}
    if type(value) in OBJECTS:
        attributes = {name: _encode(item, arrays, f"{where}.{name}") for name, item in vars(value).items()}
        return {TAG: "object", "class": _full_name(type(value)), "attributes": attributes}
    raise NotPlainError(f"{where} is a {type(value).__module__}.{type(value).__qualname__}")


def _bits(tensor: th.Tensor, where: str) -> NDArray[Any]:
    """The numbers of a tensor, which NumPy holds, as an array."""
    try:
        dense = tensor.detach().cpu().resolve_conj().resolve_neg()
        # NumPy has no bfloat16
        return (dense.view(th.int16) if dense.dtype == th.bfloat16 else dense).numpy()
    except (TypeError, RuntimeError) as error:  # sparse, nested or without memory, or of eight bits; also NotImplementedError
        raise NotPlainError(f"{where} is a tensor that NumPy cannot hold ({error})") from error


def _describe_dtype(dtype: np.dtype[Any], where: str) -> Any:
    """What NumPy's own files say of a type."""
    description = np.lib.format.dtype_to_descr(dtype)
    if dtype.hasobject or np.lib.format.descr_to_dtype(description) != dtype:
        raise NotPlainError(f"{where} is the data type {dtype}")
    return description


def _encode_all(values: Iterable[Any], arrays: Arrays, where: str) -> list[Any]:
    return [_encode(item, arrays, f"{where}[{index}]") for index, item in enumerate(values)]


def _encode_array(value: NDArray[Any], arrays: Arrays, where: str, scalar: bool = False) -> dict[str, Any]:
    if value.dtype.hasobject:
        raise NotPlainError(f"{where} is an array of Python objects")
    name = f"a{len(arrays)}"
    arrays[name] = value
    return {TAG: "scalar" if scalar else "array", "name": name}


def _encode_sequence(value: Any, arrays: Arrays, where: str) -> Any:
    items = _encode_all(value, arrays, where)
    if isinstance(value, list):
        return items
    structure = {TAG: type(value).__name__, "items": items}
    return {**structure, "maxlen": value.maxlen} if isinstance(value, deque) else structure


def _encode_mapping(value: Mapping[Any, Any], arrays: Arrays, where: str) -> dict[str, Any]:
    if type(value) is dict and all(type(key) is str for key in value) and TAG not in value:
        return {key: _encode(item, arrays, f"{where}.{key}") for key, item in value.items()}
    # An optimiser's state has integer keys
    items = [_encode_all(pair, arrays, f"{where}[{pair[0]!r}]") for pair in value.items()]
    return {TAG: type(value).__name__, "items": items}


def _encode_generator(value: Any, arrays: Arrays, where: str) -> dict[str, Any]:
    if isinstance(value, random.Random):
        if type(value) is not random.Random:
            raise NotPlainError(f"{where} is a {type(value).__qualname__}")
        return {TAG: "python_generator", "state": _encode(value.getstate(), arrays, where)}
    if isinstance(value, np.random.RandomState):
        return {TAG: "random_state", "state": _encode(value.get_state(legacy=False), arrays, where)}
    state = {TAG: "generator", "state": _encode(value.bit_generator.state, arrays, where)}
    seeds = getattr(value.bit_generator, "seed_seq", None)
    if type(seeds) is np.random.SeedSequence:  # from which ``spawn`` makes others
        state["seeds"] = _encode({name: getattr(seeds, name) for name in SEED_SEQUENCE}, arrays, where)
    return state


def _full_name(kind: type) -> str:
    return f"{kind.__module__}:{kind.__qualname__}"


def _class_name(kind: type, where: str) -> str:
    """Name of a class that reading will accept."""
    if issubclass(kind, np.generic):
        return f"numpy:{kind.__name__}"
    try:
        allowed = find_class(_full_name(kind)) is kind
    except ValueError:
        allowed = False
    if not allowed:
        raise NotPlainError(f"{where} is the class {_full_name(kind)}")
    return _full_name(kind)


def find_class(name: str) -> type:
    """
    Look up a class that may be named.

    :param name: ``module:qualified name``
    :return: the class, an allowed kind from an allowed package
    :raises ValueError: if it is not allowed or does not exist
    """
    module_name, _, qualified = name.partition(":")
    if module_name == "numpy" and isinstance(getattr(np, qualified, None), type):
        kind = getattr(np, qualified)
        if issubclass(kind, np.generic):
            return kind
    if module_name.split(".")[0] not in CLASS_PACKAGES:
        raise ValueError(f"the class {name!r} is not from one of the packages {CLASS_PACKAGES}")
    try:
        found: Any = importlib.import_module(module_name)
        for part in qualified.split("."):
            found = getattr(found, part)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"the class {name!r} does not exist here ({error})") from error
    if not (isinstance(found, type) and issubclass(found, CLASS_KINDS)):
        raise ValueError(f"{name!r} is not a network, optimiser or buffer class")
    return found


def decode(structure: Any, arrays: Mapping[str, NDArray[Any]]) -> Any:
    """
    Turn plain data back into the value it was made from.

    :param structure: as :func:`encode` made it
    :param arrays: the arrays it names
    :return: the value, made of new objects
    :raises ValueError: if it is not what :func:`encode` makes
    """
    if isinstance(structure, list):
        return [decode(item, arrays) for item in structure]
    if not isinstance(structure, dict):
        return structure
    if TAG not in structure:
        return {key: decode(item, arrays) for key, item in structure.items()}
    try:
        return _decode_tagged(structure, arrays)
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{str(structure)[:100]} is not understood ({type(error).__name__}: {error})") from error


def _decode_tagged(structure: dict[str, Any], arrays: Mapping[str, NDArray[Any]]) -> Any:
    """Value of a JSON object that stands for something else."""
    tag = structure[TAG]
    if tag in ("array", "scalar", "tensor"):
        return _decode_array(structure, arrays[structure["name"]])
    if tag == "class":
        return find_class(structure["name"])
    if tag == "dtype":  # which had a name in checkpoints of before
        return np.dtype(structure["name"]) if "name" in structure else _decode_dtype(structure["description"], arrays)
    if tag == "enumeration":
        return {kind.__name__: kind for kind in ENUMERATIONS}[structure["class"]][structure["name"]]
    if tag == "object":
        kind = {_full_name(kind): kind for kind in OBJECTS}[structure["class"]]
        instance: Any = object.__new__(kind)
        vars(instance).update(decode(structure["attributes"], arrays))
        return instance
    if tag in ("generator", "random_state", "python_generator"):
        return _decode_generator(tag, decode(structure["state"], arrays), decode(structure.get("seeds"), arrays))
    items = decode(structure["items"], arrays)
    if tag == "record":
        return {kind.__name__: kind for kind in RECORDS}[structure["class"]](*items)
    if tag == "deque":
        return deque(items, maxlen=structure["maxlen"])
    return {"tuple": tuple, "set": set, "frozenset": frozenset, "dict": dict, "OrderedDict": OrderedDict}[tag](items)


def _decode_array(structure: dict[str, Any], array: NDArray[Any]) -> Any:
    if structure[TAG] == "scalar":
        return array[()]
    if structure[TAG] == "array":
        return array
    tensor = th.from_numpy(np.array(array))
    return tensor.view(th.bfloat16) if structure["dtype"] == "bfloat16" else tensor


def _decode_dtype(description: Any, arrays: Mapping[str, NDArray[Any]]) -> np.dtype[Any]:
    return np.lib.format.descr_to_dtype(decode(description, arrays))


def _decode_generator(tag: str, state: Any, seeds: dict[str, Any] | None) -> Any:
    """A generator of random numbers in a given state."""
    if tag == "python_generator":
        python_generator = random.Random()
        python_generator.setstate(state)
        return python_generator
    kind = getattr(np.random, state["bit_generator"])
    if not (isinstance(kind, type) and issubclass(kind, np.random.BitGenerator)):
        raise ValueError(f"{state['bit_generator']!r} is no bit generator of NumPy")
    if tag == "random_state":
        random_state = np.random.RandomState(kind())
        random_state.set_state(state)
        return random_state
    generator = np.random.Generator(kind() if seeds is None else kind(np.random.SeedSequence(**seeds)))
    generator.bit_generator.state = state
    return generator


def space_generators(space: gym.Space[Any]) -> list[np.random.Generator | None]:
    """
    The random generators of a space and of all its parts, as they are.

    :param space: any space
    :return: generators in an order that depends on the space alone; None where nothing has been sampled yet
    """
    return [part._np_random for part in _parts(space)]


def set_space_generators(space: gym.Space[Any], generators: list[np.random.Generator | None]) -> None:
    """
    Put random generators back.

    :param space: the same kind of space
    :param generators: as :func:`space_generators` returned them
    """
    for part, generator in zip(_parts(space), generators, strict=True):
        part._np_random = generator  # type: ignore[assignment]


def _parts(space: gym.Space[Any]) -> list[gym.Space[Any]]:
    """A space and the spaces it is made of."""
    inner = getattr(space, "spaces", ())
    children = list(inner.values()) if isinstance(inner, Mapping) else list(inner)
    return [space, *(part for child in children for part in _parts(child))]
