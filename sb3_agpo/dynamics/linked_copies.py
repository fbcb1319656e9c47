"""Copies of what ``copy.deepcopy`` shares with the original or takes apart: functions, weak references, views of arrays."""

from __future__ import annotations

import copy
import functools
import random
import types
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import numpy as np
import torch as th
from numpy.lib.array_utils import byte_bounds
from numpy.typing import NDArray

#: types of values that nothing can change
CONSTANTS = (bool, int, float, complex, str, bytes, type(None), np.generic)
#: types of values that lead nowhere
ENDS = (*CONSTANTS, type, types.ModuleType)
#: random generators that belong to no environment; rows share them and put them back
GLOBAL_GENERATORS = (random.random.__self__, th.default_generator)  # type: ignore[attr-defined]

#: name of the attribute that leads to an object, and the object
Linked = tuple[str, Any]


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


def has_memory(thing: Any) -> bool:
    """
    Whether an object is a function that may remember something from one call to the next.

    :param thing: any object
    :return: False also for functions of modules, and for methods of objects that are copied anyway
    """
    if isinstance(thing, types.FunctionType):
        return any(not isinstance(held, ENDS) for held in held_by_function(thing))
    if isinstance(thing, types.MethodType):
        return has_memory(thing.__func__)
    if isinstance(thing, types.BuiltinFunctionType):
        owner = thing.__self__
        if isinstance(owner, ENDS) or any(owner is generator for generator in GLOBAL_GENERATORS):
            return False
        return getattr(owner, thing.__name__, None) == thing  # extensions keep other things in this place
    return isinstance(thing, functools._lru_cache_wrapper) and has_memory(thing.__wrapped__)


def weak_target(thing: Any) -> Any:
    """
    What an object refers to weakly.

    :param thing: any object
    :return: None if it is no weak reference, or if what it refers to is gone
    """
    if type(thing) in weakref.ProxyTypes:  # which look like what they refer to
        try:
            return thing.__init__.__self__
        except ReferenceError:
            return None
    return weakref.ReferenceType.__call__(thing) if isinstance(thing, weakref.ReferenceType) else None


def owner_of(view: Any) -> NDArray[Any] | None:
    """
    The array whose memory a view shows.

    :param view: any object
    :return: None if it is no view of an ordinary array that can be changed
    """
    if type(view) is not np.ndarray or view.flags.owndata or view.size == 0 or view.dtype.hasobject:
        return None
    owner: Any = view
    while isinstance(owner.base, np.ndarray):
        owner = owner.base
    ordinary = type(owner) is np.ndarray and owner.base is None and not owner.dtype.hasobject
    return owner if ordinary and owner.flags.c_contiguous and owner.flags.writeable else None


def connected_views(arrays: Sequence[Linked]) -> list[Linked]:
    """
    The views that have memory in common with another array.

    :param arrays: all arrays that attributes lead to
    :return: those views of which something else could see a change
    """
    reached = {id(array) for _, array in arrays}
    by_owner: dict[int, list[Linked]] = {}
    for name, array in arrays:
        if (owner := owner_of(array)) is not None:
            by_owner.setdefault(id(owner), []).append((name, array))
    found = []
    for key, views in by_owner.items():
        ordered = sorted((view for _, view in views), key=lambda view: byte_bounds(view)[0])
        # Alone, a few numbers of a large table need no copy of the whole table
        if key in reached or any(np.shares_memory(*pair) for pair in pairwise(ordered)):
            found += views
    return found


def copy_linked(linked: Sequence[Linked], twins: dict[int, Any]) -> list[Linked]:
    """
    Copy functions with a memory, weak references and views, together with what they are linked to.

    :param linked: the originals
    :param twins: by the ``id`` of objects that must not be copied, what to put in their place; added to
    :return: the copies, in the same order
    :raises TypeError: naming an attribute that cannot be copied
    """
    functions = [(name, thing) for name, thing in linked if isinstance(thing, types.FunctionType)]
    for _, function in functions:
        twins[id(function)] = empty_function(function, twins)
    for name, thing in linked:
        if not isinstance(thing, types.FunctionType):
            with named(name):
                twins[id(thing)] = copy_link(thing, twins)
    for name, function in functions:
        with named(name):
            fill_function(function, twins)
    return [(name, twins[id(thing)]) for name, thing in linked]


@contextmanager
def named(name: str) -> Iterator[None]:
    """
    Tell which attribute it was that could not be copied.

    :param name: name of the attribute
    :raises TypeError: instead of any exception
    """
    try:
        yield
    except Exception as error:
        raise TypeError(f"its attribute `{name}` cannot be copied ({error})") from error


def copy_link(thing: Any, twins: dict[int, Any]) -> Any:
    """
    Copy a view, a weak reference or a function of an object.

    :param thing: the original
    :param twins: see :func:`copy_linked`
    :return: the same of a copy of what it is linked to
    """
    if (owner := owner_of(thing)) is not None:
        view: NDArray[Any] = thing
        offset = view.__array_interface__["data"][0] - owner.__array_interface__["data"][0]
        twin = np.ndarray(view.shape, view.dtype, copy.deepcopy(owner, twins), offset, view.strides)
        twin.flags.writeable = view.flags.writeable
        return twin
    if (target := weak_target(thing)) is not None:
        refer = weakref.proxy if type(thing) in weakref.ProxyTypes else weakref.ref
        return refer(copy.deepcopy(target, twins))
    if isinstance(thing, functools._lru_cache_wrapper):
        return functools.lru_cache(**thing.cache_parameters())(copy.deepcopy(thing.__wrapped__, twins))  # type: ignore[arg-type]
    owner_twin = copy.deepcopy(thing.__self__, twins)
    if isinstance(thing, types.MethodType):
        return types.MethodType(copy.deepcopy(thing.__func__, twins), owner_twin)
    return getattr(owner_twin, thing.__name__)


def empty_function(function: types.FunctionType, twins: dict[int, Any]) -> types.FunctionType:
    """
    A function with the same code that holds nothing yet, so that it can be referred to while what it holds is copied.

    :param function: the original
    :param twins: see :func:`copy_linked`; variables that several functions use stay common to them
    :return: the function
    """
    cells = tuple(twins.setdefault(id(cell), types.CellType()) for cell in function.__closure__ or ())
    twin = types.FunctionType(function.__code__, function.__globals__, function.__name__, None, cells or None)
    twin.__qualname__ = function.__qualname__
    return twin


def fill_function(function: types.FunctionType, twins: dict[int, Any]) -> None:
    """
    Give the copy of a function copies of what the original holds.

    :param function: the original
    :param twins: see :func:`copy_linked`, with the copy
    """
    twin = twins[id(function)]
    twin.__defaults__ = copy_held(function.__defaults__, twins)
    twin.__kwdefaults__ = copy_held(function.__kwdefaults__, twins)
    vars(twin).update(copy_held(vars(function), twins))
    for cell in function.__closure__ or ():
        try:
            twins[id(cell)].cell_contents = copy_held(cell.cell_contents, twins)
        except ValueError:  # not assigned yet
            continue


def copy_held(held: Any, twins: dict[int, Any]) -> Any:
    """
    Copy what a function holds.

    :param held: the original
    :param twins: see :func:`copy_linked`
    :return: the copy; modules, which have none, as they are
    """
    return held if isinstance(held, ENDS) else copy.deepcopy(held, twins)
