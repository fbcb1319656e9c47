"""Images and videos of SB3's logger as pictures, read as its TensorBoard writer reads them."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch as th
from numpy.typing import NDArray
from stable_baselines3.common.logger import Image, Video

AXES = {"HW", "CHW", "CHNW"}  # in the order of the alphabet: what an image may have, in any order
COLUMNS = 8  # of a grid of images


def picture_of(image: Image) -> NDArray[np.uint8]:
    """
    Turn an image of SB3's logger into a picture.

    :param image: tensor or array with the axes that ``dataformats`` names: height and width, maybe channels, maybe several
        images, which are put into a grid. Single bytes are colours from 0 to 255, anything else is from 0 to 1
    :return: the picture of shape ``(height, width, 3)``, or 4 if the image has that many channels
    :raises ValueError: if the image does not have the axes that it names, or not 1, 3 or 4 channels
    """
    values, axes = _array_of(image.image), image.dataformats.upper()
    if "".join(sorted(axes)) not in AXES or len(axes) != values.ndim:
        raise ValueError(
            f"an image of shape {values.shape} cannot have the axes {image.dataformats!r}; name each of them in "
            '`dataformats`, such as "HWC", "CHW" or "NCHW"'
        )
    for axis in "CN":
        if axis not in axes:
            values, axes = values[None], axis + axes
    return _grid(_colors(values.transpose([axes.index(axis) for axis in "NHWC"])))


def frames_of(video: Video) -> list[NDArray[np.uint8]]:
    """
    Turn a video of SB3's logger into pictures.

    :param video: with frames of shape ``(videos, time, channels, height, width)``; several are shown beside one another.
        Single bytes are colours from 0 to 255, anything else is from 0 to 1
    :return: pictures of shape ``(height, width, 3)``
    :raises ValueError: if the frames have another shape, or not 1, 3 or 4 channels
    """
    values = _array_of(video.frames)
    if values.ndim != 5:
        raise ValueError(
            f"frames of a video have the shape (videos, time, channels, height, width), got {values.shape}; add the axes "
            "that are missing, such as `frames[None]` for a single video"
        )
    return [_grid(frame)[..., :3] for frame in _colors(values.transpose(1, 0, 3, 4, 2))]


def _array_of(values: Any) -> NDArray[Any]:
    """A tensor or array as an array."""
    if not isinstance(values, th.Tensor):
        return np.asarray(values)
    values = values.detach().cpu()
    return (values.float() if values.is_floating_point() else values).numpy()  # NumPy has no bfloat16


def _colors(values: NDArray[Any]) -> NDArray[np.uint8]:
    """
    Scale pictures to single bytes.

    :param values: of shape ``(..., channels)``
    :return: the same shape, but three channels in place of one
    :raises ValueError: if there is nothing to see, or there are not 1, 3 or 4 channels
    """
    if values.shape[-1] not in (1, 3, 4) or not values.size:
        raise ValueError(
            f"an image has 1, 3 or 4 channels and at least one picture, got {values.shape[-1]} channel(s) and {values.size} "
            "value(s); name its axes in the order that they have"
        )
    scale = 1.0 if values.dtype == np.uint8 else 255.0
    colors = (values.astype(np.float32) * scale).clip(0, 255).astype(np.uint8)
    return np.repeat(colors, 3, axis=-1) if colors.shape[-1] == 1 else colors


def _grid(pictures: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """
    Put pictures beside and below one another.

    :param pictures: of shape ``(n, height, width, channels)``
    :return: one picture, black where there is none
    """
    n, height, width, channels = pictures.shape
    columns = min(n, COLUMNS)
    rows = -(-n // columns)
    black = np.zeros((rows * columns - n, height, width, channels), dtype=np.uint8)
    tiles = np.concatenate([pictures, black]).reshape(rows, columns, height, width, channels)
    return tiles.swapaxes(1, 2).reshape(rows * height, columns * width, channels)
