"""``VecNormalize`` in environments that only show what a policy can do."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from stable_baselines3.common.vec_env import VecEnv, VecNormalize, unwrap_vec_normalize


@contextmanager
def held_normalization(env: VecEnv) -> Iterator[VecNormalize | None]:
    """
    Keep the statistics of an environment's ``VecNormalize`` as they are for a while, and its rewards as they come.

    :param env: vectorised environment, wrapped or not
    :return: its ``VecNormalize``, None if it has none
    """
    normalization = unwrap_vec_normalize(env)
    if normalization is None:
        yield None
        return
    before = normalization.training, normalization.norm_reward
    normalization.training, normalization.norm_reward = False, False
    try:
        yield normalization
    finally:
        normalization.training, normalization.norm_reward = before
