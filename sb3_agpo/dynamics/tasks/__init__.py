"""
Vectorised observation, reward and termination models of Gymnasium's MuJoCo tasks.

Gymnasium computes these one step at a time from ``MjData``. Here the same formulas work on a batch of steps, equal to
Gymnasium's own ``step`` bit for bit, which the tests check on every task. (Equal with NumPy 2, whose rules decide in which
precision Gymnasium adds up a float32 action; and unless MuJoCo reset the simulation because it diverged.)
"""

from __future__ import annotations

import sys

from gymnasium.envs.mujoco import MujocoEnv

from sb3_agpo.dynamics.tasks.arms import Pusher, Reacher, ReacherV4
from sb3_agpo.dynamics.tasks.base import Outcome, Steps, TaskModel
from sb3_agpo.dynamics.tasks.humanoids import Humanoid, HumanoidStandup, HumanoidStandupV4, HumanoidV4
from sb3_agpo.dynamics.tasks.locomotion import Ant, AntV4, Hopper, HopperV4, Runner, Swimmer, Walker2d, Walker2dV4
from sb3_agpo.dynamics.tasks.pendulums import (
    InvertedDoublePendulum,
    InvertedDoublePendulumV4,
    InvertedPendulum,
    InvertedPendulumV4,
)

__all__ = ["Outcome", "Steps", "TaskModel", "find_task_model", "foreign_method"]

#: methods that have no part in a step, so that they may be anybody's
BESIDE_STEPS = ("reset", "reset_model", "_get_reset_info", "set_state", "render", "close")
_PACKAGE = "gymnasium.envs.mujoco."

# By name, so that a Gymnasium without one of the old versions can still be used.
_MODELS: dict[str, type[TaskModel]] = {
    "ant_v4.AntEnv": AntV4,
    "ant_v5.AntEnv": Ant,
    "half_cheetah_v4.HalfCheetahEnv": Runner,
    "half_cheetah_v5.HalfCheetahEnv": Runner,
    "hopper_v4.HopperEnv": HopperV4,
    "hopper_v5.HopperEnv": Hopper,
    "humanoid_v4.HumanoidEnv": HumanoidV4,
    "humanoid_v5.HumanoidEnv": Humanoid,
    "humanoidstandup_v4.HumanoidStandupEnv": HumanoidStandupV4,
    "humanoidstandup_v5.HumanoidStandupEnv": HumanoidStandup,
    "inverted_double_pendulum_v4.InvertedDoublePendulumEnv": InvertedDoublePendulumV4,
    "inverted_double_pendulum_v5.InvertedDoublePendulumEnv": InvertedDoublePendulum,
    "inverted_pendulum_v4.InvertedPendulumEnv": InvertedPendulumV4,
    "inverted_pendulum_v5.InvertedPendulumEnv": InvertedPendulum,
    "pusher_v5.PusherEnv": Pusher,
    "reacher_v4.ReacherEnv": ReacherV4,
    "reacher_v5.ReacherEnv": Reacher,
    "swimmer_v4.SwimmerEnv": Swimmer,
    "swimmer_v5.SwimmerEnv": Swimmer,
    "walker2d_v4.Walker2dEnv": Walker2dV4,
    "walker2d_v5.Walker2dEnv": Walker2d,
}


def find_task_model(env: MujocoEnv) -> TaskModel | None:
    """
    The model of a stock Gymnasium task.

    :param env: an unwrapped environment
    :return: its model; None if its class is not exactly one of Gymnasium's own (a subclass may have changed anything), or if
        a method was replaced (see :func:`foreign_method`)
    """
    module, name = type(env).__module__, type(env).__qualname__
    model = _MODELS.get(f"{module.removeprefix(_PACKAGE)}.{name}") if module.startswith(_PACKAGE) else None
    return None if model is None or foreign_method(env) is not None else model(env)


def foreign_method(env: MujocoEnv) -> str | None:
    """
    A method that has a part in steps, and that somebody put into an environment or into one of Gymnasium's own classes.

    :param env: an unwrapped environment
    :return: the method's name; None if there is none, whatever methods a class of the user's own has
    """
    for name, value in vars(env).items():
        if name not in BESIDE_STEPS and callable(value) and hasattr(type(env), name):
            return name
    for base in type(env).__mro__:
        if not base.__module__.startswith(_PACKAGE):
            continue
        own = getattr(sys.modules.get(base.__module__), "__dict__", None)
        for name, value in vars(base).items():
            method = value.fget if isinstance(value, property) else value
            # Where a function was defined shows in its globals, even if it has taken over another one's name and module
            if callable(method) and not name.startswith("__") and getattr(method, "__globals__", None) is not own:
                if name not in BESIDE_STEPS:
                    return name
    return None
