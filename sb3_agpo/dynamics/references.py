"""What the attributes of an environment refer to that a copy of them would lose: its simulator's memory, and itself."""

from __future__ import annotations

import functools
import gc
import types
import weakref
from collections.abc import Collection, Iterator
from functools import cached_property
from mmap import mmap
from typing import Any, NamedTuple

import numpy as np
import torch as th
from gymnasium.envs.mujoco import MujocoEnv
from numpy.lib.array_utils import byte_bounds
from numpy.typing import NDArray

from sb3_agpo.dynamics.linked_copies import ENDS, Linked, connected_views, has_memory, held_by_function, weak_target

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


class Parts(NamedTuple):
    """The arrays and structures of a simulator."""

    names: list[tuple[str, str]]  # "model" or "data", and the name of each array
    bounds: NDArray[np.uintp]  # (2, number of arrays) addresses of the first byte, and of the first after the last
    structures: dict[int, tuple[str, str, Any]]  # by ``id``: where, and the structure itself, so that it lives on


class SimulatorMemory:
    """
    Tells what is a part of an environment's simulator.

    :param env: unwrapped environment, whose simulator is looked at when the first question comes that needs it
    """

    def __init__(self, env: MujocoEnv) -> None:
        self.env = env

    @cached_property
    def _parts(self) -> Parts:
        names, bounds, structures = [], [], {}
        for part in ("data", "model"):
            simulator = getattr(self.env, part)
            for name in dir(simulator):
                found = None if name.startswith("_") else getattr(simulator, name)
                if isinstance(found, np.ndarray) and found.size > 0:
                    names.append((part, name))
                    bounds.append(byte_bounds(found))
                elif type(found).__module__.startswith("mujoco"):
                    structures[id(found)] = part, name, found
        return Parts(names, np.array(bounds, dtype=np.uintp).reshape(-1, 2).T, structures)

    def _find_array(self, first: int, end: int) -> tuple[str, str] | None:
        """The array that has bytes in a range of addresses, if any has."""
        starts, ends = self._parts.bounds
        hits = np.flatnonzero((starts < end) & (first < ends))
        return self._parts.names[hits[0]] if len(hits) else None

    def find(self, thing: Any) -> Place | None:
        """
        Find out whether an object is a part of the simulator.

        :param thing: any object
        :return: its place there; None if it lies elsewhere
        """
        if isinstance(thing, np.ndarray) and not thing.flags.owndata and thing.size > 0:
            if (array := self._find_array(*byte_bounds(thing))) is None:
                return None
            whole = getattr(getattr(self.env, array[0]), array[1])
            offset = thing.__array_interface__["data"][0] - whole.__array_interface__["data"][0]
            return Place(*array, (thing.shape, thing.dtype, offset, thing.strides))
        if type(thing).__module__.startswith("mujoco") and id(thing) in self._parts.structures:
            return Place(*self._parts.structures[id(thing)][:2], None)
        return None

    def is_shown_by(self, thing: Any) -> bool:
        """
        Find out whether an object is a tensor of the simulator's memory, as ``torch.from_numpy`` makes it.

        :param thing: any object
        :return: whether it is
        """
        if not isinstance(thing, th.Tensor) or thing.device.type != "cpu" or thing.layout is not th.strided:
            return False
        return thing.numel() > 0 and self._find_array(thing.data_ptr(), thing.data_ptr() + 1) is not None


class Found(NamedTuple):
    """What attributes refer to that is not to be copied, by its ``id``, and what is not copied in the usual way."""

    places: dict[int, Place]  # of parts of the simulator
    frozen: dict[int, NDArray[Any]]  # views of arrays that nothing can change
    linked: list[Linked]  # functions with a memory, weak references, connected views


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
    Find everything in attributes that is a part of an environment's simulator, or that is not copied in the usual way.

    :param attributes: of the environment, by name
    :param env: the environment
    :param stops: ``id`` of objects that need not be looked into
    :return: what was found
    :raises TypeError: naming an attribute by which a function keeps a hold of the environment or of its simulator, or another
        object that a copy of would go on using the original
    """
    memory, whole = SimulatorMemory(env), {id(env), id(env.data), id(env.model)}
    places, frozen = {}, {}
    arrays, weak, functions = {}, {}, {}
    for name, value in attributes.items():
        for thing, by_function in reachable(value, stops):
            place = memory.find(thing)
            if by_function and (place is not None or id(thing) in whole):
                raise TypeError(
                    f"its attribute `{name}` holds a function that keeps a hold of the environment, so that a copy would go "
                    "on using the original; make the function a method of the class"
                )
            if memory.is_shown_by(thing):
                raise TypeError(
                    f"its attribute `{name}` holds a tensor of MuJoCo's memory, so that a copy would lose the connection; "
                    "hold the NumPy array instead, and make the tensor where it is used"
                )
            if place is not None:
                places[id(thing)] = place
            elif is_frozen(thing):
                frozen[id(thing)] = thing.view()  # which cannot be made writeable again
            elif type(thing) is np.ndarray:
                arrays[id(thing)] = name, thing
            elif has_memory(thing):
                functions[id(thing)] = name, thing
            elif weak_target(thing) is not None:
                weak[id(thing)] = name, thing
    followed = copied_targets(list(weak.values()), attributes, whole, stops) if weak else []
    linked = [*connected_views(list(arrays.values())), *followed, *functions.values()]
    return Found(places, frozen, linked)


def copied_targets(
    weak: Collection[Linked], attributes: dict[str, Any], whole: Collection[int], stops: Collection[int]
) -> list[Linked]:
    """
    The weak references to what is copied; others are shared, like global variables, or belong to a collection.

    :param weak: weak references, with the names of attributes
    :param attributes: of the environment, by name
    :param whole: ``id`` of the environment, its data and its model
    :param stops: ``id`` of objects that need not be looked into
    :return: plain ones to the environment or to what its attributes lead to
    :raises TypeError: naming an attribute with one to the environment that has a callback or is of another class
    """
    copied = {id(thing) for value in attributes.values() for thing, _ in reachable(value, stops)}.union(whole)
    found = []
    for name, reference in weak:
        is_reference = type(reference) is weakref.ReferenceType and reference.__callback__ is None
        target = id(weak_target(reference))
        if target in copied and (is_reference or type(reference) in weakref.ProxyTypes):
            found.append((name, reference))
        elif target in whole:
            raise TypeError(
                f"its attribute `{name}` holds a {type(reference).__name__}, a weak reference that would go on leading to the "
                "original from a copy; use `weakref.ref` without a callback"
            )
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
        if type(thing) in weakref.ProxyTypes:
            if weak_target(thing) is not None:
                yield thing, by_function
            continue
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
