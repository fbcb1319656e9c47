"""Tangent-space arithmetic on MuJoCo positions, vectorised over a batch (MuJoCo's own functions take one at a time)."""

from __future__ import annotations

from typing import NamedTuple

import mujoco
import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

#: parts of MuJoCo's state that have tangent coordinates; and the time, on which nothing has an effect
TANGENT_STATE = ("mjSTATE_TIME", "mjSTATE_QPOS", "mjSTATE_QVEL", "mjSTATE_ACT")


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


class JointLayout(NamedTuple):
    """Where the joints of a model keep their positions; plain numbers, so that equal layouts print equally."""

    scalars: tuple[tuple[int, int], ...]  # index in qpos, index in the tangent, of each number that is a length or angle
    quaternions: tuple[tuple[int, int], ...]  # first index in qpos, first index in the tangent, of each quaternion


def joint_layout(model: mujoco.MjModel) -> JointLayout:
    """
    Find where the joints of a model keep their positions.

    :param model: MuJoCo's model, any mixture of joints
    :return: the layout
    """
    scalars: list[tuple[int, int]] = []
    quaternions: list[tuple[int, int]] = []
    addresses = zip(model.jnt_type.tolist(), model.jnt_qposadr.tolist(), model.jnt_dofadr.tolist(), strict=True)
    for kind, position, tangent in addresses:
        if kind == mujoco.mjtJoint.mjJNT_FREE:
            scalars += [(position + axis, tangent + axis) for axis in range(3)]
            quaternions.append((position + 3, tangent + 3))
        elif kind == mujoco.mjtJoint.mjJNT_BALL:
            quaternions.append((position, tangent))
        else:
            scalars.append((position, tangent))
    return JointLayout(tuple(scalars), tuple(quaternions))


def state_outside_tangent(model: mujoco.MjModel) -> list[str]:
    """
    Parts of MuJoCo's state that carry something from step to step and are not among the tangent coordinates.

    :param model: MuJoCo's model
    :return: their names, such as "history" of delayed actuators or "plugin"; none for most models
    """
    full = int(mujoco.mjtState.mjSTATE_FULLPHYSICS.value)
    found = []
    for name, kind in mujoco.mjtState.__members__.items():
        part = int(kind.value)
        single = part.bit_count() == 1 and bool(part & full) and name != "mjNSTATE"
        if single and name not in TANGENT_STATE and mujoco.mj_stateSize(model, part) > 0:
            found.append(name.removeprefix("mjSTATE_").lower())
    return found


def may_sleep(model: mujoco.MjModel) -> bool:
    """
    Whether a model lets bodies sleep; which of them do is no part of MuJoCo's physics state.

    :param model: MuJoCo's model
    :return: False also for a MuJoCo that does not know sleep
    """
    flag = mujoco.mjtEnableBit.__members__.get("mjENBL_SLEEP")
    return flag is not None and bool(model.opt.enableflags & int(flag.value))


class PositionTangent:
    """
    Positions ``qpos`` of a model and their tangent vectors, as ``mj_integratePos`` and ``mj_differentiatePos`` define them.

    :param model: the model whose joints define the layout
    """

    def __init__(self, model: mujoco.MjModel) -> None:
        layout = joint_layout(model)
        self._positions, self._velocities = np.array(layout.scalars, dtype=np.intp).reshape(-1, 2).T
        self._quaternions = [(slice(q, q + 4), slice(v, v + 3)) for q, v in layout.quaternions]
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
