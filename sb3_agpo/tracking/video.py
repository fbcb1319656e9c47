"""Videos of a policy, without any codec."""

from __future__ import annotations

from io import BytesIO
from typing import Any, NamedTuple

import gymnasium as gym
import numpy as np
from numpy.typing import NDArray
from PIL import Image as PillowImage
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.vec_env import DummyVecEnv, VecEnv

MAX_FRAMES = 200  # of a video; a longer episode is cut
DEFAULT_SPEED = 30  # frames per second of an environment that does not say


class Animation(NamedTuple):
    """A video as an animated GIF, which TensorBoard and Weights & Biases show without any codec."""

    gif: bytes
    height: int
    width: int


def encode_animation(frames: list[NDArray[np.uint8]], frames_per_second: float) -> Animation:
    """
    Encode a video.

    :param frames: pictures of shape ``(height, width, 3)``, at least one
    :param frames_per_second: speed of playing
    :return: the video
    """
    first, *others = (PillowImage.fromarray(frame) for frame in frames)
    buffer = BytesIO()
    first.save(buffer, "GIF", save_all=True, append_images=others, duration=1000.0 / frames_per_second, loop=0)
    return Animation(buffer.getvalue(), first.height, first.width)


def record_episode(
    model: BaseAlgorithm, env: gym.Env[Any, Any] | VecEnv, max_frames: int = MAX_FRAMES
) -> tuple[list[NDArray[np.uint8]], float]:
    """
    Play one episode with the deterministic policy.

    :param model: the model; observations are normalised as in its training environment
    :param env: environment with ``render_mode="rgb_array"``
    :param max_frames: pictures at which a longer episode is cut
    :return: pictures of shape ``(height, width, 3)``, how many of them make a second
    :raises ValueError: if the environment draws no pictures
    """
    venv = env if isinstance(env, VecEnv) else DummyVecEnv([lambda: env])
    if venv.render_mode != "rgb_array":
        raise ValueError(f'videos need an environment with `render_mode="rgb_array"`, got {venv.render_mode!r}')
    normalization = model.get_vec_normalize_env()
    frames: list[NDArray[np.uint8]] = []
    observations, done = venv.reset(), False
    while not done and len(frames) < max_frames:
        frame = venv.render()
        assert frame is not None
        frames.append(frame)
        if normalization is not None:
            observations = normalization.normalize_obs(observations)  # type: ignore[arg-type,assignment]
        actions, _ = model.predict(observations, deterministic=True)  # type: ignore[arg-type]
        observations, _, dones, _ = venv.step(actions)
        done = bool(dones[0])
    return frames, float(venv.metadata.get("render_fps", DEFAULT_SPEED))  # type: ignore[arg-type]
