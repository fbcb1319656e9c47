"""What several places of a nested state have in common: one object, or one memory. Copies of their own would drift apart."""

from __future__ import annotations

import random
from collections import deque
from typing import Any

import numpy as np
import torch as th
from numpy.lib.array_utils import byte_bounds
from numpy.typing import NDArray

from sb3_agpo.checkpoint.plain_data import OBJECTS, RECORDS

Memory = NDArray[Any] | th.Tensor
#: keys that lead from a state to something in it
Path = list[Any]

#: types of objects that can be changed, so that it matters whether two are one
CHANGEABLE = (
    *(list, dict, set, deque, np.ndarray, th.Tensor, *OBJECTS),
    *(np.random.Generator, np.random.RandomState, random.Random),
)


def contents(value: Any) -> dict[Any, Any]:
    """
    What a container or an object of plain data holds.

    :param value: anything
    :return: its items by key; empty if it is no container
    """
    if isinstance(value, dict):
        return value
    if isinstance(value, list | tuple | deque):
        return dict(enumerate(value))
    return vars(value) if isinstance(value, OBJECTS) else {}


def describe_sharing(state: Any) -> dict[str, Any]:
    """
    Describe objects that several keys lead to, and arrays and tensors that are views of the same memory.

    :param state: plain data
    :return: ``objects``: for each object with several places the keys that lead to each; ``memory``: for each memory with
        several views its size in bytes and where each view lies in it
    """
    places: dict[int, list[Path]] = {}
    views: list[tuple[Path, Memory]] = []

    def visit(value: Any, path: Path) -> None:
        if isinstance(value, CHANGEABLE):
            if id(value) in places:
                places[id(value)].append(path)
                return  # what it holds is found at its first place
            places[id(value)] = [path]
            if isinstance(value, np.ndarray | th.Tensor) and 0 not in value.shape:
                views.append((path, value))
        for key, item in contents(value).items():
            visit(item, [*path, key])

    visit(state, [])
    return {
        "objects": [paths for paths in places.values() if len(paths) > 1],
        "memory": [_layout(group) for group in _overlapping(views) if len(group) > 1],
    }


def _overlapping(views: list[tuple[Path, Memory]]) -> list[list[tuple[Path, Memory]]]:
    """Groups of views of the same memory."""
    groups: list[list[tuple[Path, Memory]]] = []
    end = -1
    for path, view in sorted(views, key=lambda item: bounds(item[1])[0]):
        low, high = bounds(view)
        if low < end:
            groups[-1].append((path, view))
        else:
            groups.append([(path, view)])
        end = max(end, high)
    return groups


def bounds(view: Memory) -> tuple[int, int]:
    """
    Where a view lies in memory.

    :param view: an array, or a tensor with strides
    :return: addresses of its first byte and of the one behind its last
    """
    if isinstance(view, np.ndarray):
        return byte_bounds(view)
    size = 1 + sum((length - 1) * stride for length, stride in zip(view.shape, view.stride(), strict=True))
    return view.data_ptr(), view.data_ptr() + size * view.element_size()


def _layout(group: list[tuple[Path, Memory]]) -> dict[str, Any]:
    """Where views lie in the memory that they share."""
    start = min(bounds(view)[0] for _, view in group)
    views: list[dict[str, Any]] = []
    for path, view in group:
        if isinstance(view, np.ndarray):
            address, strides = view.__array_interface__["data"][0], list(view.strides)
        else:
            address, strides = view.data_ptr(), [stride * view.element_size() for stride in view.stride()]
        views.append({"path": path, "offset": address - start, "strides": strides})
    return {"size": max(bounds(view)[1] for _, view in group) - start, "views": views}


def restore_sharing(state: Any, sharing: dict[str, Any]) -> None:
    """
    Put one object and one memory where :func:`describe_sharing` found them.

    :param state: the state, of which every part is a copy of its own; changed in place
    :param sharing: the description
    """
    for memory in sharing["memory"]:
        buffer = np.zeros(memory["size"], dtype=np.uint8)
        for view in memory["views"]:
            put(state, view["path"], _view(buffer, view, at(state, view["path"])))
    # Checkpoints of before knew of generators alone
    for first, *others in sharing["objects" if "objects" in sharing else "generators"]:
        for path in others:
            put(state, path, at(state, first))


def _view(buffer: NDArray[np.uint8], view: dict[str, Any], copy: Memory) -> Memory:
    """A view of memory, filled with what its copy holds."""
    shared: Memory
    if isinstance(copy, np.ndarray):
        shared = np.ndarray(copy.shape, copy.dtype, buffer, view["offset"], view["strides"])
    else:
        strides = [stride // copy.element_size() for stride in view["strides"]]
        count = (len(buffer) - view["offset"]) // copy.element_size()
        whole = th.frombuffer(buffer, dtype=copy.dtype, offset=view["offset"], count=count)
        shared = whole.as_strided(copy.shape, strides, 0)
    shared[...] = copy  # type: ignore[assignment, index]
    return shared


def at(state: Any, path: Path) -> Any:
    """
    What keys lead to.

    :param state: plain data
    :param path: the keys
    :return: what is there
    """
    for key in path:
        state = contents(state)[key]
    return state


def put(state: Any, path: Path, value: Any) -> None:
    """
    Put something where keys lead to.

    :param state: plain data, changed in place
    :param path: the keys
    :param value: what to put there
    """
    *outer, key = path
    holder = at(state, outer)
    if isinstance(holder, tuple):
        items = [value if index == key else item for index, item in enumerate(holder)]
        put(state, outer, type(holder)(*items) if isinstance(holder, RECORDS) else tuple(items))
    elif isinstance(holder, OBJECTS):
        vars(holder)[key] = value
    else:
        holder[key] = value
