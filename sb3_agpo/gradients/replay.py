"""Going back to a moment of an episode and trying other actions from there."""

from __future__ import annotations

import copy
from typing import Any, Protocol

import gymnasium as gym
from gymnasium.envs.mujoco import MujocoEnv

from sb3_agpo.dynamics.private_copy import PrivateCopy, Situation


class CopyError(ValueError):
    """An environment that Python cannot copy."""


class Replay(Protocol):
    """Moments of a live environment, and copies of it that start there. The live environment is never changed."""

    def remember(self) -> Any:
        """
        Remember the live environment's present moment.

        :return: the moment
        """
        ...

    def restart(self, moment: Any) -> gym.Env[Any, Any]:
        """
        Go back to a moment.

        :param moment: what :meth:`remember` returned
        :return: an environment to be stepped from there, until the next call
        """
        ...


class MujocoReplay:
    """
    A :class:`Replay` of a MuJoCo environment, with one private copy that is put back again and again.

    :param env: unwrapped environment
    :raises TypeError: if an attribute of the environment cannot be copied
    """

    def __init__(self, env: MujocoEnv) -> None:
        self.private = PrivateCopy(env, careful=True)

    def remember(self) -> Situation:
        """
        Remember the live environment's present moment.

        :return: the moment
        """
        situation = self.private.capture_live()
        return situation._replace(data=copy.copy(situation.data))  # which the next call would write over

    def restart(self, moment: Situation) -> gym.Env[Any, Any]:
        """
        Go back to a moment.

        :param moment: what :meth:`remember` returned
        :return: the private copy
        """
        return self.private.restore(moment)


class CopyReplay:
    """
    A :class:`Replay` of any environment that Python can copy.

    :param env: unwrapped environment
    """

    def __init__(self, env: gym.Env[Any, Any]) -> None:
        self.env = env

    def remember(self) -> gym.Env[Any, Any]:
        """
        Remember the live environment's present moment.

        :return: the moment
        """
        return copy.deepcopy(self.env)

    def restart(self, moment: gym.Env[Any, Any]) -> gym.Env[Any, Any]:
        """
        Go back to a moment.

        :param moment: what :meth:`remember` returned
        :return: a copy of the environment
        """
        return copy.deepcopy(moment)


def make_replay(env: gym.Env[Any, Any]) -> Replay:
    """
    Choose how to go back in an environment.

    :param env: environment, wrapped or not
    :return: the way back into its unwrapped environment
    :raises CopyError: if Python cannot copy it
    """
    unwrapped = env.unwrapped
    if isinstance(unwrapped, MujocoEnv):
        return MujocoReplay(unwrapped)
    replay = CopyReplay(unwrapped)
    try:
        replay.remember()
    except Exception as error:  # whatever an attribute's own copying raises
        raise CopyError(
            f"{type(unwrapped).__name__} cannot be copied ({type(error).__name__}: {error}), which trying other actions "
            "needs; give it a `__deepcopy__`"
        ) from error
    return replay
