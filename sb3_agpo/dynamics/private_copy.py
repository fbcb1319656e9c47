"""A private copy of a ``MujocoEnv`` that can be put back into a situation again and again, the live one untouched."""

from __future__ import annotations

import copy
import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import mujoco
import numpy as np
import torch as th
from gymnasium.envs.mujoco import MujocoEnv
from numpy.typing import NDArray

from sb3_agpo.dynamics.interface import Array
from sb3_agpo.dynamics.linked_copies import CONSTANTS, GLOBAL_GENERATORS, Linked, copy_linked, named
from sb3_agpo.dynamics.references import Place, find_references
from sb3_agpo.dynamics.stepping import FULL_PHYSICS

#: attributes that the private copy keeps for itself
PRIVATE_ATTRIBUTES = ("model", "data", "mujoco_renderer", "render_mode")
#: attributes that describe how an environment was made; nothing changes them, so they need no copy
SHARED_ATTRIBUTES = ("spec", "metadata", "_ezpickle_args", "_ezpickle_kwargs")


@dataclass
class Source:
    """A model as it is before steps that may change it."""

    model: mujoco.MjModel


class Situation(NamedTuple):
    """What an environment was like at some time: all that its next step can depend on."""

    constants: dict[str, Any]  # attributes that all rows share
    attributes: dict[str, Any]  # all others
    model: mujoco.MjModel  # which the attributes refer to, if any does
    source: Source  # the model to step with
    data: mujoco.MjData
    drawn: GlobalGenerators  # the global generators to step with
    generators: list[tuple[np.random.Generator, Any]]  # those that the attributes refer to, and their states then
    shared: list[Any]  # what other attributes may refer to and is shared too
    places: list[Place]  # what stands in the attributes for views and other parts of the simulator
    linked: list[Linked]  # what the attributes refer to and is not copied in the usual way


class PrivateCopy:
    """
    A copy of an environment, with its own attributes, model, ``MjData`` and random generators, and without a renderer.

    Attributes may hold views of the simulator's memory: those of the copy are views of its own. Read-only arrays are shared,
    all others are copied in each :meth:`restore`. What it cannot copy is what the environment's code holds by other ways than
    its attributes, such as global variables and attributes of its class.

    :param live: unwrapped environment, never changed
    :param careful: expect from the start that steps change the model or draw from global generators, which costs time in each
        :meth:`restore`; else it is noticed by :meth:`capture`
    :raises TypeError: if an attribute of the environment cannot be copied, holds a function that was defined inside a method
        and uses the environment, or a tensor of the simulator's memory
    """

    def __init__(self, live: MujocoEnv, careful: bool = False) -> None:
        self.live = live
        self._live_bytes, self._source = model_bytes(live.model), Source(private_model(live.model))
        self._model_bytes = model_bytes(self._source.model)
        self._data = [mujoco.MjData(self._source.model) for _ in range(2)]  # of the situations
        self._changes_model = self._draws_globally = careful
        self.env: MujocoEnv = object.__new__(type(live))
        self.env.model, self.env.data = self._source.model, mujoco.MjData(self._source.model)
        self.env.render_mode = None  # its `step` never draws
        self.env.mujoco_renderer = None  # type: ignore[assignment]
        self.capture_live()  # raises now if it ever will

    def capture_live(self, physics: Array | None = None) -> Situation:
        """
        What the live environment is like. The situation holds until the next call.

        :param physics: full physics state to move it to; None to leave it where it is
        :return: the situation
        :raises TypeError: if an attribute of the environment cannot be copied
        :raises RuntimeError: if the model was replaced by one of another size
        """
        live = self.live
        live_bytes = model_bytes(live.model)
        if len(live_bytes) != len(self._live_bytes):
            raise RuntimeError("the environment has another model than when it was attached")
        if not np.array_equal(live_bytes, self._live_bytes):
            self._live_bytes, self._source = live_bytes, Source(private_model(live.model))
            self._model_bytes = model_bytes(self._source.model)
        self._globals = GlobalGenerators.now()
        model = self._source.model
        mujoco.mj_copyData(self._data[0], model, live.data)
        if physics is not None:
            mujoco.mj_setState(model, self._data[0], physics, FULL_PHYSICS)
        twins = {id(live): self.env, id(live.data): self.env.data, id(live.model): model}
        twins[id(live.mujoco_renderer)] = None  # type: ignore[assignment]
        return copy_situation(live, self._source, model, self._data[0], self._globals, twins)

    def capture(self) -> Situation:
        """
        What the private copy is like after its first step from a situation. The situation holds until the next call.

        :return: the situation
        """
        env = self.env
        mujoco.mj_copyData(self._data[1], env.model, env.data)
        # Few environments do either of this, and both cost time in each row: from now on they are allowed for
        self._draws_globally |= not self._globals.is_now()
        if not self._changes_model and not np.array_equal(self._model_bytes, model_bytes(env.model)):
            self._changes_model, self._source.model = True, private_model(self.live.model)
        source = Source(env.model) if self._changes_model else self._source
        twins = {id(thing): thing for thing in (env, env.data, env.model)}
        return copy_situation(env, source, env.model, self._data[1], self._globals, twins)

    def restore(self, situation: Situation, physics: Array | None = None) -> MujocoEnv:
        """
        Put the private copy into a situation.

        :param situation: of the live environment or of the copy
        :param physics: full physics state to move it to, with everything MuJoCo derives from it; None for none
        :return: the private copy
        """
        env = self.env
        env.model = copy.copy(situation.source.model) if self._changes_model else situation.source.model
        twins = {id(thing): thing for thing in (env, env.data, *situation.shared)}
        twins |= {id(situation.model): env.model} | {id(place): place.of(env) for place in situation.places}
        copy_linked(situation.linked, twins)
        attributes = copy_attributes(situation.attributes, twins)
        kept = {name: vars(env)[name] for name in PRIVATE_ATTRIBUTES}
        vars(env).clear()  # also of what `step` sets for the first time
        vars(env).update(situation.constants, **attributes, **kept)
        for generator, state in situation.generators:
            generator.bit_generator.state = state
        if self._draws_globally:
            situation.drawn.put_back()
        mujoco.mj_copyData(env.data, env.model, situation.data)
        if physics is not None:
            mujoco.mj_setState(env.model, env.data, physics, FULL_PHYSICS)
            mujoco.mj_forward(env.model, env.data)  # what the environment reads before its step must fit the moved state
            env.data.qacc_warmstart = situation.data.qacc_warmstart
        return env


class GlobalGenerators(NamedTuple):
    """State of Python's, NumPy's and torch's (CPU) global random generators, which an environment should not use but may."""

    python: tuple[Any, ...]
    numpy: tuple[Any, ...]
    torch: th.Tensor

    @classmethod
    def now(cls) -> GlobalGenerators:
        """
        Read the state.

        :return: the present state
        """
        return cls(random.getstate(), np.random.get_state(), th.get_rng_state())  # type: ignore[arg-type]

    def put_back(self) -> None:
        """Make this the present state."""
        random.setstate(self.python)
        np.random.set_state(self.numpy)  # type: ignore[arg-type]
        th.set_rng_state(self.torch)

    def is_now(self) -> bool:
        """
        Compare with the present state.

        :return: whether nothing was drawn since
        """
        python, numpy, torch = GlobalGenerators.now()
        same = python == self.python and all(np.array_equal(a, b) for a, b in zip(numpy, self.numpy, strict=True))
        return same and th.equal(torch, self.torch)


@contextmanager
def kept_global_generators() -> Iterator[None]:
    """Leave the global random generators as they were before the block."""
    before = GlobalGenerators.now()
    try:
        yield
    finally:
        before.put_back()


def copy_situation(
    env: MujocoEnv,
    source: Source,
    model: mujoco.MjModel,
    data: mujoco.MjData,
    drawn: GlobalGenerators,
    twins: dict[int, Any],
) -> Situation:
    """
    Copy an environment's attributes.

    :param env: the environment, not changed
    :param source: the model to step with
    :param model: what the copies refer to as their model
    :param data: what to put beside them
    :param drawn: the same
    :param twins: by the ``id`` of objects that must not be copied, what to put in their place
    :return: the situation
    :raises TypeError: naming an attribute that cannot be copied, or holds a function that uses the environment
    """
    attributes = {name: value for name, value in vars(env).items() if name not in PRIVATE_ATTRIBUTES}
    shared = [attributes[name] for name in SHARED_ATTRIBUTES if name in attributes]
    twins = twins | {id(thing): thing for thing in shared}
    references = find_references(attributes, env, twins)
    twins |= references.places | references.frozen
    shared += [*references.frozen.values(), *GLOBAL_GENERATORS]
    owners = (env, attributes.get("action_space"), attributes.get("observation_space"))
    found = (getattr(owner, "_np_random", None) for owner in owners)
    # Making a generator is slow, setting its state is not: rows share the copies made here, and the spaces that use them
    originals = [generator for generator in found if isinstance(generator, np.random.Generator)]
    generators = [(copy.deepcopy(generator, twins), generator.bit_generator.state) for generator in originals]
    twins |= {id(generator): generator for generator in GLOBAL_GENERATORS}
    linked = copy_linked(references.linked, twins)
    copied = copy_attributes(attributes, twins)
    shared += [copied[name] for name in ("action_space", "observation_space") if name in copied]
    shared += [generator for generator, _ in generators]
    kept = {name for name, value in copied.items() if is_constant(value) or any(value is thing for thing in shared)}
    constants = {name: copied.pop(name) for name in kept}
    places = list(references.places.values())
    return Situation(constants, copied, model, source, data, drawn, generators, shared, places, linked)


def is_constant(value: Any) -> bool:
    """
    Whether a value is one that nothing can change.

    :param value: any object
    :return: True for numbers, texts and tuples of them
    """
    return isinstance(value, CONSTANTS) or (type(value) is tuple and all(map(is_constant, value)))


def copy_attributes(attributes: dict[str, Any], twins: dict[int, Any]) -> dict[str, Any]:
    """
    Copy attributes and everything they refer to; what they have in common they still have in common.

    :param attributes: by name
    :param twins: by the ``id`` of objects that must not be copied, what to put in their place; added to
    :return: the copies by name
    :raises TypeError: naming an attribute that cannot be copied
    """
    copies = {}
    for name, value in attributes.items():
        with named(name):
            copies[name] = copy.deepcopy(value, twins)
    return copies


def private_model(model: mujoco.MjModel) -> mujoco.MjModel:
    """
    A copy of a model to step perturbed rows with.

    :param model: the live environment's model, not changed
    :return: a copy that does not silently reset itself when a row diverges, so that divergence is seen
    """
    private = copy.copy(model)
    private.opt.disableflags |= int(mujoco.mjtDisableBit.mjDSBL_AUTORESET)
    return private


def model_bytes(model: mujoco.MjModel) -> NDArray[np.uint8]:
    """
    Everything that is in a model.

    :param model: the model, not changed
    :return: equal for equal models
    """
    content = np.empty(mujoco.mj_sizeModel(model), dtype=np.uint8)
    mujoco.mj_saveModel(model, None, content)
    return content
