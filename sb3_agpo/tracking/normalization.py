"""``VecNormalize`` in environments that only show what a policy can do."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager

from stable_baselines3.common.vec_env import VecEnv, VecNormalize, unwrap_vec_normalize

#: what decides how observations are normalised
OF_OBSERVATIONS = ("norm_obs", "norm_obs_keys", "obs_rms", "clip_obs", "epsilon")


def copy_normalization(source: VecNormalize, target: VecNormalize) -> None:
    """
    Normalise observations in one environment as in another.

    :param source: whose settings and statistics are copied
    :param target: which gets them
    """
    for name in OF_OBSERVATIONS:
        if name in vars(source):  # there are no statistics where observations are not normalised
            setattr(target, name, copy.deepcopy(vars(source)[name]))


@contextmanager
def held_normalization(env: VecEnv, like: VecNormalize | None = None) -> Iterator[VecNormalize | None]:
    """
    Keep the statistics of an environment's ``VecNormalize`` as they are for a while, and its rewards as they come.

    :param env: vectorised environment, wrapped or not
    :param like: normalises its observations in the meantime; None for its own ``VecNormalize``
    :return: its ``VecNormalize``, None if it has none
    """
    normalization = unwrap_vec_normalize(env)
    if normalization is None:
        yield None
        return
    names = ("training", "norm_reward", *OF_OBSERVATIONS)
    before = {name: vars(normalization)[name] for name in names if name in vars(normalization)}
    normalization.training, normalization.norm_reward = False, False
    if like is not None and like is not normalization:
        copy_normalization(like, normalization)
    try:
        yield normalization
    finally:
        for name in vars(normalization).keys() & set(names) - before.keys():
            delattr(normalization, name)
        vars(normalization).update(before)
