"""What the attributes of an environment refer to that a copy of them would lose: its simulator's memory, and itself."""

from __future__ import annotations

import functools
import gc
import types
from collections.abc import Collection, Iterator
from mmap import mmap
from typing import Any, NamedTuple

import numpy as np
from gymnasium.envs.mujoco import MujocoEnv
from numpy.typing import NDArray

#: types of values that nothing can change
CONSTANTS = (bool, int, float, complex, str, bytes, type(None), np.generic)
#: types of values that lead nowhere
ENDS = (*CONSTANTS, type, types.ModuleType)
#: functions that are never copied, such as ``list.append`` of a list; what they hold can be asked for
HOLDERS = (types.BuiltinFunctionType, functools._lru_cache_wrapper)


class Place(NamedTuple):
    """Where something lies in a simulator: a view of one of its arrays, or a structure such as ``model.opt``."""

    part: str  # "model" or "data"
    name: str  # of the array or the structure
    layout: tuple[Any, ...] | None  # shape, dtype, offset in bytes and strides of a view; None for a structure

    def of(self, env: MujocoEnv) -> Any:
        """
        What lies there in another simulator.

        :param env: environment with a simulator of the same sizes
        :return: the view or the structure
        """
        found = getattr(getattr(env, self.part), self.name)
        if self.layout is None:
            return found
        shape, dtype, offset, strides = self.layout
        return np.ndarray(shape, dtype, found, offset, strides)


def find_place(thing: Any, env: MujocoEnv) -> Place | None:
    """
    Find out whether an object is a part of a simulator.

    :param thing: any object
    :param env: unwrapped environment with the simulator
    :return: its place there; None if it lies elsewhere
    """
    is_view = isinstance(thing, np.ndarray) and not thing.flags.owndata and thing.size > 0
    if not is_view and not type(thing).__module__.startswith("mujoco"):
        return None
    for part in ("data", "model"):
        for name in dir(getattr(env, part)):
            found = None if name.startswith("_") else getattr(getattr(env, part), name)
            if found is thing and not is_view:
                return Place(part, name, None)
            if is_view and isinstance(found, np.ndarray) and np.may_share_memory(found, thing):
                offset = thing.__array_interface__["data"][0] - found.__array_interface__["data"][0]
                return Place(part, name, (thing.shape, thing.dtype, offset, thing.strides))
    return None


class Found(NamedTuple):
    """What attributes refer to that is not to be copied, by its ``id``."""

    places: dict[int, Place]  # of parts of the simulator
    frozen: dict[int, NDArray[Any]]  # views of arrays that nothing can change


def is_frozen(array: Any) -> bool:
    """
    Whether an object is an array that nothing can change.

    :param array: any object
    :return: True for arrays that are read-only, and no view of one that is not
    """
    if not isinstance(array, np.ndarray) or array.dtype.hasobject:
        return False
    memory: Any = array
    while isinstance(memory, np.ndarray):
        if memory.flags.writeable:
            return False
        memory = memory.base
    return memory is None or isinstance(memory, (bytes, mmap))


def find_references(attributes: dict[str, Any], env: MujocoEnv, stops: Collection[int]) -> Found:
    """
    Find everything in attributes that is a part of an environment's simulator, or that copies can share.

    :param attributes: of the environment, by name
    :param env: the environment
    :param stops: ``id`` of objects that need not be looked into
    :return: what was found
    :raises TypeError: naming an attribute by which a function keeps a hold of the environment or of its simulator
    """
    found = Found({}, {})
    whole = {id(env), id(env.data), id(env.model)}
    for name, value in attributes.items():
        for thing, by_function in reachable(value, stops):
            place = find_place(thing, env)
            if by_function and (place is not None or id(thing) in whole):
                raise TypeError(
                    f"its attribute `{name}` holds a function that keeps a hold of the environment, so that a copy would go "
                    "on using the original; make the function a method of the class"
                )
            if place is not None:
                found.places[id(thing)] = place
            elif is_frozen(thing):
                found.frozen[id(thing)] = thing.view()  # which cannot be made writeable again
    return found


def reachable(value: Any, stops: Collection[int]) -> Iterator[tuple[Any, bool]]:
    """
    Walk through everything that a value refers to.

    :param value: any object
    :param stops: ``id`` of objects that need not be looked into
    :return: each object, and whether a function leads there, which is not copied together with what it holds
    """
    todo, seen = [(value, False)], set()
    while todo:
        thing, by_function = todo.pop()
        if isinstance(thing, ENDS) or (id(thing), by_function) in seen:
            continue
        seen.add((id(thing), by_function))
        yield thing, by_function
        if id(thing) in stops:
            continue
        if isinstance(thing, types.FunctionType):
            todo += [(held, True) for held in held_by_function(thing)]
        else:
            todo += [(held, by_function or isinstance(thing, HOLDERS)) for held in gc.get_referents(thing)]


def held_by_function(function: types.FunctionType) -> list[Any]:
    """
    What a function got where it was defined.

    :param function: the function
    :return: the variables around it that it uses, and its arguments' defaults
    """
    held = [*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values()]
    for cell in function.__closure__ or ():
        try:
            held.append(cell.cell_contents)
        except ValueError:  # not assigned yet
            continue
    return held
