"""Videos of a policy, without any codec."""

from __future__ import annotations

import math
from io import BytesIO
from typing import Any, NamedTuple

import gymnasium as gym
import numpy as np
from numpy.typing import NDArray
from PIL import Image as PillowImage
from PIL import ImageDraw
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.vec_env import DummyVecEnv, VecEnv

from sb3_agpo.agpo.agpo import AGPO
from sb3_agpo.agpo.rollout_buffer import DifferentiableRolloutBuffer, RolloutWindows, Transition
from sb3_agpo.agpo.updates import window_update
from sb3_agpo.dynamics.recorder import TransitionRecorder, install_recorder, kept_recorder
from sb3_agpo.tracking.normalization import held_normalization

MAX_FRAMES = 200  # of a video; a longer episode is cut
DEFAULT_SPEED = 30  # frames per second of an environment that does not say
SHORTEST_PICTURE = 20  # milliseconds that a picture of an animation is shown at least
BAR = 0.06  # height of the drawn gate, as a share of the picture's
SIMULATOR_COLOR, CRITIC_COLOR, TEXT_COLOR = (213, 94, 0), (0, 114, 178), (255, 255, 255)  # Okabe and Ito


class Animation(NamedTuple):
    """A video as an animated GIF, which TensorBoard and Weights & Biases show without any codec."""

    gif: bytes
    height: int
    width: int


def encode_animation(frames: list[NDArray[np.uint8]], frames_per_second: float) -> Animation:
    """
    Encode a video. Of more than 50 pictures per second some are left out.

    :param frames: pictures of shape ``(height, width, 3)``, at least one
    :param frames_per_second: speed of playing
    :return: the video
    :raises ValueError: if the speed is not positive
    """
    if frames_per_second <= 0.0:
        raise ValueError(f"`frames_per_second` must be positive, got {frames_per_second!r}; 30 is usual")
    # GIF counts in hundredths of a second, and browsers show a picture of less than two of them much longer
    every = math.ceil(SHORTEST_PICTURE * frames_per_second / 1000.0)
    duration = round(every * 100.0 / frames_per_second) * 10  # milliseconds
    first, *others = (PillowImage.fromarray(frame) for frame in frames[::every])
    buffer = BytesIO()
    first.save(buffer, "GIF", save_all=True, append_images=others, duration=duration, loop=0)
    return Animation(buffer.getvalue(), first.height, first.width)


def record_episode(
    model: BaseAlgorithm, env: gym.Env[Any, Any] | VecEnv, max_frames: int = MAX_FRAMES
) -> tuple[list[NDArray[np.uint8]], float]:
    """
    Play one episode with the deterministic policy.

    :param model: the model; observations are normalised as in its training environment
    :param env: environment with ``render_mode="rgb_array"``. A ``VecNormalize`` of its own does as that of the training
        environment meanwhile
    :param max_frames: pictures at which a longer episode is cut
    :return: pictures of shape ``(height, width, 3)``, how many of them make a second
    :raises ValueError: if the environment draws no pictures
    """
    venv = env if isinstance(env, VecEnv) else DummyVecEnv([lambda: env])
    if venv.render_mode != "rgb_array":
        raise ValueError(f'videos need an environment with `render_mode="rgb_array"`, got {venv.render_mode!r}')
    frames: list[NDArray[np.uint8]] = []
    training = model.get_vec_normalize_env()
    with held_normalization(venv, training) as own:
        normalization = training if own is None else None  # what the environment does not do itself
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
    return frames, float(venv.metadata.get("render_fps") or DEFAULT_SPEED)  # type: ignore[arg-type]


def record_gate(
    model: AGPO, env: gym.Env[Any, Any], max_frames: int = MAX_FRAMES, seed: int | None = None
) -> tuple[list[NDArray[np.uint8]], NDArray[np.float64], float]:
    """
    Play one episode with the stochastic policy, as in training, and weigh each of its steps as an update would.

    :param model: the model; observations are normalised as in its training environment
    :param env: environment with ``render_mode="rgb_array"`` whose steps have derivatives
    :param max_frames: pictures at which a longer episode is cut
    :param seed: of the episode
    :return: pictures of shape ``(height, width, 3)``, the gate's weight at each of them (1: the gradient is the
        simulator's, 0: the critic's), how many of them make a second
    :raises ValueError: if the environment draws no pictures or its steps have no derivatives
    """
    if env.render_mode != "rgb_array":
        raise ValueError(f'videos need an environment with `render_mode="rgb_array"`, got {env.render_mode!r}')
    with kept_recorder(env):
        frames, windows = _play_windows(model, install_recorder(env, model.finite_differences), max_frames, seed)
    update = window_update(model.policy, windows, model._gate(), model.gamma, model._current_ent_coef())
    weights = update.gradient.weight.detach().double().cpu().numpy().T.flatten()[: len(frames)]  # one window after another
    return frames, weights, float(env.metadata.get("render_fps") or DEFAULT_SPEED)


def _play_windows(
    model: AGPO, env: gym.Env[Any, Any], max_frames: int, seed: int | None
) -> tuple[list[NDArray[np.uint8]], RolloutWindows]:
    """Play an episode with the stochastic policy; its pictures, and its steps as windows."""
    recorder = env.get_wrapper_attr("agpo_recorder")
    assert isinstance(recorder, TransitionRecorder)
    if recorder.dynamics is None:
        raise ValueError(f"there is no gate without derivatives: {recorder.provider_report.reason}")
    frames: list[NDArray[np.uint8]] = []
    normalization = model.get_vec_normalize_env()
    buffer = DifferentiableRolloutBuffer(1, model.horizon)
    observation, _ = env.reset(seed=seed)
    done = False
    while not done and len(frames) < max_frames:
        frames.append(np.asarray(env.render()))
        seen = observation if normalization is None else normalization.normalize_obs(observation)
        action, _ = model.predict(seen, deterministic=False)
        next_observation, reward, terminated, truncated, _ = env.step(action)
        done = bool(terminated or truncated)
        actions = model.policy.scale_action(action[None])
        unknown = np.full_like(actions, np.nan)  # noise, which the update works out
        rewards, ends = np.array([reward], dtype=np.float32), [np.array([end]) for end in (terminated, done)]
        before, after = (np.asarray(each, dtype=np.float32)[None] for each in (observation, next_observation))
        buffer.add(Transition(before, after, actions, unknown, rewards, *ends))
        observation = next_observation
    derivatives = recorder.take_derivatives(len(frames))
    # As in training: where an episode ends, a derivative sees nothing of what matters
    buffer.add_derivatives(derivatives._replace(valid=derivatives.valid & ~buffer.pending_terminated()))
    return frames, buffer.windows(normalization)


def draw_gate(frames: list[NDArray[np.uint8]], weights: NDArray[np.float64]) -> list[NDArray[np.uint8]]:
    """
    Draw the gate's weight over pictures: a bar, the simulator's part in orange, the critic's in blue, and the number.

    :param frames: pictures of shape ``(height, width, 3)``, which are not changed
    :param weights: of the simulator at each of them, 0 to 1
    :return: pictures of the same shape
    """
    drawn = []
    for frame, weight in zip(frames, weights, strict=True):
        picture = PillowImage.fromarray(frame)
        draw = ImageDraw.Draw(picture)
        width, height = picture.size
        top, split = round((1.0 - BAR) * height), round(weight * width)
        draw.rectangle((0, top, width, height), fill=CRITIC_COLOR)
        if split:
            draw.rectangle((0, top, split - 1, height), fill=SIMULATOR_COLOR)
        text = f"gate {weight:.2f}   orange: simulator, blue: critic"
        draw.text((6, top + 1), text, fill=TEXT_COLOR, font_size=max(8, round(0.7 * BAR * height)))
        drawn.append(np.asarray(picture))
    return drawn
