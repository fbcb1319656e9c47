"""Tangent-space arithmetic on MuJoCo positions, vectorised over a batch (MuJoCo's own functions take one at a time)."""

from __future__ import annotations

import mujoco
import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


def quaternion_multiply(left: Array, right: Array) -> Array:
    """
    Hamilton product.

    :param left: quaternions (w, x, y, z), shape ``(..., 4)``
    :param right: the same shape
    :return: ``left * right``, shape ``(..., 4)``
    """
    w, x, y, z = np.moveaxis(left, -1, 0)
    a, b, c, d = np.moveaxis(right, -1, 0)
    return np.stack(
        [
            w * a - x * b - y * c - z * d,
            w * b + x * a + y * d - z * c,
            w * c - x * d + y * a + z * b,
            w * d + x * c - y * b + z * a,
        ],
        axis=-1,
    )


def quaternion_exponential(rotation: Array) -> Array:
    """
    Unit quaternion of a rotation vector.

    :param rotation: axis times angle in radians, shape ``(..., 3)``
    :return: shape ``(..., 4)``
    """
    angle = np.linalg.norm(rotation, axis=-1, keepdims=True)
    # sin(angle / 2) / angle, also at angle = 0
    return np.concatenate([np.cos(0.5 * angle), 0.5 * np.sinc(0.5 * angle / np.pi) * rotation], axis=-1)


def quaternion_logarithm(quaternion: Array) -> Array:
    """
    Rotation vector of a unit quaternion, the shorter way round.

    :param quaternion: shape ``(..., 4)``
    :return: axis times angle in radians, shape ``(..., 3)``
    """
    axis = quaternion[..., 1:]
    sine = np.linalg.norm(axis, axis=-1, keepdims=True)
    angle = 2.0 * np.arctan2(sine, quaternion[..., :1])
    angle = np.where(angle > np.pi, angle - 2.0 * np.pi, angle)
    return axis * np.where(sine > 0.0, angle / np.where(sine > 0.0, sine, 1.0), 2.0)


class PositionTangent:
    """
    Positions ``qpos`` of a model and their tangent vectors, as ``mj_integratePos`` and ``mj_differentiatePos`` define them.

    :param model: the model whose joints define the layout
    """

    def __init__(self, model: mujoco.MjModel) -> None:
        scalar_positions: list[int] = []
        scalar_velocities: list[int] = []
        self._quaternions: list[tuple[slice, slice]] = []
        for kind, position, velocity in zip(model.jnt_type, model.jnt_qposadr, model.jnt_dofadr, strict=True):
            kind, position, velocity = int(kind), int(position), int(velocity)
            if kind in (mujoco.mjtJoint.mjJNT_SLIDE, mujoco.mjtJoint.mjJNT_HINGE):
                scalar_positions.append(position)
                scalar_velocities.append(velocity)
                continue
            if kind == mujoco.mjtJoint.mjJNT_FREE:  # a translation comes before the quaternion
                scalar_positions.extend(range(position, position + 3))
                scalar_velocities.extend(range(velocity, velocity + 3))
                position, velocity = position + 3, velocity + 3
            self._quaternions.append((slice(position, position + 4), slice(velocity, velocity + 3)))
        self._positions = np.array(scalar_positions, dtype=np.intp)
        self._velocities = np.array(scalar_velocities, dtype=np.intp)
        self.nq, self.nv = int(model.nq), int(model.nv)

    def integrate(self, qpos: Array, tangent: Array) -> Array:
        """
        Move positions along tangent vectors.

        :param qpos: shape ``(..., nq)``
        :param tangent: shape ``(..., nv)``
        :return: shape ``(..., nq)``
        """
        moved = qpos.copy()
        moved[..., self._positions] += tangent[..., self._velocities]
        for position, velocity in self._quaternions:
            moved[..., position] = quaternion_multiply(qpos[..., position], quaternion_exponential(tangent[..., velocity]))
        return moved

    def difference(self, start: Array, end: Array) -> Array:
        """
        Tangent vector at ``start`` that leads to ``end``.

        :param start: shape ``(..., nq)``
        :param end: shape ``(..., nq)``
        :return: shape ``(..., nv)``
        """
        tangent = np.empty((*np.broadcast_shapes(start.shape, end.shape)[:-1], self.nv))
        tangent[..., self._velocities] = end[..., self._positions] - start[..., self._positions]
        for position, velocity in self._quaternions:
            inverse = start[..., position] * np.array([1.0, -1.0, -1.0, -1.0])
            inverse, turned = np.broadcast_arrays(inverse, end[..., position])
            tangent[..., velocity] = quaternion_logarithm(quaternion_multiply(inverse, turned))
        return tangent
