"""
Example environments written in torch: a linear-quadratic regulator with a known optimum, Gymnasium's pendulum, and a wall.

Their derivatives are exact (see :mod:`sb3_agpo.dynamics.torch_env`), which makes them the reference for tests and for
comparing gradient estimators.
"""

from __future__ import annotations

from collections.abc import Callable

import gymnasium as gym
import numpy as np
import torch as th
from gymnasium import spaces
from numpy.typing import ArrayLike

from sb3_agpo.dynamics.interface import Array
from sb3_agpo.dynamics.torch_env import LARGEST_FINITE, TorchEnv, check_array


def check_linear_quadratic(A: ArrayLike, B: ArrayLike, Q: ArrayLike, R: ArrayLike) -> tuple[Array, Array, Array, Array]:
    """
    Copy the matrices of a linear quadratic problem to float64 and check them.

    :param A: shape ``(n, n)``
    :param B: shape ``(n, nu)``
    :param Q: symmetric positive semidefinite, shape ``(n, n)``
    :param R: symmetric positive definite, shape ``(nu, nu)``
    :return: the copies, in the same order
    :raises ValueError: naming the matrix whose shape, symmetry or definiteness is wrong
    """
    n = len(check_array("A", A, (-1, -1)))
    A, B = check_array("A", A, (n, n)), check_array("B", B, (n, -1))
    if B.size == 0:
        raise ValueError(f"`B` must have at least one row and one column, got the shape {B.shape}")
    Q, R = check_array("Q", Q, (n, n)), check_array("R", R, (B.shape[1], B.shape[1]))
    if not np.array_equal(Q, Q.T) or np.linalg.eigvalsh(Q).min() < -1e-12 * np.abs(Q).max():  # up to rounding
        raise ValueError(f"`Q` must be symmetric and positive semidefinite, got {Q.tolist()}; try the identity")
    if not np.array_equal(R, R.T) or np.linalg.eigvalsh(R).min() <= 0.0:
        raise ValueError(f"`R` must be symmetric and positive definite, got {R.tolist()}; try the identity")
    return A, B, Q, R


def riccati_gain(
    A: ArrayLike,
    B: ArrayLike,
    Q: ArrayLike,
    R: ArrayLike,
    gamma: float = 1.0,
    *,
    tolerance: float = 1e-13,
    max_iterations: int = 100_000,
) -> tuple[Array, Array]:
    """
    Optimal linear feedback for ``x' = A x + B a`` and the cost ``sum_t gamma^t (x'Qx + a'Ra)``.

    Value iteration on the discrete algebraic Riccati equation ``P = Q + gamma A'P (A - B K)``; source: D. P. Bertsekas,
    *Dynamic Programming and Optimal Control*, vol. I, linear quadratic problems.

    :param A: shape ``(n, n)``
    :param B: shape ``(n, nu)``
    :param Q: symmetric positive semidefinite, shape ``(n, n)``
    :param R: symmetric positive definite, shape ``(nu, nu)``
    :param gamma: discount, in (0, 1]
    :param tolerance: largest change of P in the last iteration, relative to P
    :param max_iterations: iterations after which to give up
    :return: gain ``K`` of the optimal action ``a = -K x``, shape ``(nu, n)``, and value matrix ``P`` of the optimal cost
        ``x'Px``, shape ``(n, n)``
    :raises ValueError: if an argument is wrong, or if P does not converge, i.e. the cost cannot be kept finite
    """
    A, B, Q, R = check_linear_quadratic(A, B, Q, R)
    if not 0.0 < gamma <= 1.0:
        raise ValueError(f"`gamma` must be in (0, 1], got {gamma!r}")
    P = Q
    for _ in range(max_iterations):
        K = np.linalg.solve(R / gamma + B.T @ P @ B, B.T @ P @ A).astype(np.float64)  # the cast is for the type only
        next_P = Q + gamma * A.T @ P @ (A - B @ K)
        next_P = 0.5 * (next_P + next_P.T)  # rounding must not build up an asymmetric part
        size = np.abs(next_P).max()
        if size > LARGEST_FINITE:
            break
        if np.abs(next_P - P).max() <= tolerance * size:
            return K, next_P
        P = next_P
    raise ValueError("`P` does not converge: `A`, `B` cannot be stabilised, or `gamma` is too large; lower `gamma`")


class LinearQuadraticEnv(TorchEnv):
    """
    Linear dynamics ``x' = A x + B a + w``, quadratic reward ``-reward_scale (x'Qx + a'Ra)``, observation ``C x``.

    Everything is known in closed form: the derivatives and, by :meth:`optimal_gain`, the optimal policy. Actions are
    not clipped, so the optimum holds as long as it stays inside the action space, as it does with the default values: a
    mass of 1 kg pushed along a line, position in m, velocity in m/s, force in N, 0.1 s per step.

    With noise, the state is ``(x, w)``, the noise of the coming step included (see :meth:`TorchEnv.draw_noise`).

    :param A: shape ``(n, n)``
    :param B: shape ``(n, nu)``
    :param Q: symmetric positive semidefinite, shape ``(n, n)``
    :param R: symmetric positive definite, shape ``(nu, nu)``
    :param observation_matrix: C, shape ``(nobs, n)``; None to observe x
    :param reward_scale: positive factor of the reward
    :param noise_std: standard deviation of each entry of the process noise w
    :param initial_scale: episodes start uniformly in ``[-initial_scale, initial_scale]^n``
    :param action_limit: the action space is ``[-action_limit, action_limit]^nu``
    :raises ValueError: if the shape, symmetry, definiteness or sign of a parameter is wrong
    """

    def __init__(
        self,
        A: ArrayLike = ((1.0, 0.1), (0.0, 1.0)),
        B: ArrayLike = ((0.005,), (0.1,)),
        Q: ArrayLike = ((1.0, 0.0), (0.0, 0.1)),
        R: ArrayLike = ((0.1,),),
        observation_matrix: ArrayLike | None = None,
        *,
        reward_scale: float = 1.0,
        noise_std: float = 0.0,
        initial_scale: float = 0.15,
        action_limit: float = 1.0,
    ) -> None:
        self.A, self.B, self.Q, self.R = check_linear_quadratic(A, B, Q, R)
        n, nu = self.B.shape
        self.C = np.eye(n) if observation_matrix is None else check_array("observation_matrix", observation_matrix, (-1, n))
        for name, value in (("reward_scale", reward_scale), ("action_limit", action_limit)):
            if not (np.isfinite(value) and value > 0.0):
                raise ValueError(f"`{name}` must be a positive finite number, got {value!r}")
        for name, value in (("noise_std", noise_std), ("initial_scale", initial_scale)):
            if not (np.isfinite(value) and value >= 0.0):
                raise ValueError(f"`{name}` must be a finite number, zero or more, got {value!r}")
        self.reward_scale, self.noise_std, self.initial_scale = reward_scale, noise_std, initial_scale
        # As tensors, once: the functions are called at every step
        self._A, self._B, self._C, self._Q, self._R = map(th.tensor, (self.A, self.B, self.C, self.Q, self.R))
        super().__init__(
            state_size=2 * n if noise_std > 0.0 else n,
            observation_space=spaces.Box(-np.inf, np.inf, (len(self.C),), np.float64),
            action_space=spaces.Box(-action_limit, action_limit, (nu,), np.float32),
        )

    def dynamics(self, state: th.Tensor, action: th.Tensor) -> th.Tensor:
        """
        Move one step on.

        :param state: ``x`` or ``(x, w)``
        :param action: shape ``(nu,)``
        :return: ``x'`` or ``(x', 0)``: the noise of the step after is drawn later
        """
        n = len(self._A)
        next_x = self._A @ state[:n] + self._B @ action
        if self.noise_std == 0.0:
            return next_x
        return th.cat([next_x + state[n:], th.zeros_like(state[n:])])

    def observation(self, state: th.Tensor) -> th.Tensor:
        """
        Observe a state.

        :param state: ``x`` or ``(x, w)``
        :return: ``C x``
        """
        return self._C @ state[: len(self._A)]

    def reward(self, state: th.Tensor, action: th.Tensor, next_state: th.Tensor) -> th.Tensor:
        """
        Reward of one step.

        :param state: ``x`` or ``(x, w)`` before the step
        :param action: shape ``(nu,)``
        :param next_state: not used
        :return: ``-reward_scale (x'Qx + a'Ra)``
        """
        x = state[: len(self._A)]
        return -self.reward_scale * (x @ self._Q @ x + action @ self._R @ action)

    def initial_state(self, generator: np.random.Generator) -> Array:
        """
        Draw the first state of an episode.

        :param generator: source of random numbers
        :return: shape ``(nx,)``
        """
        state = np.zeros(self.state_size)
        state[: len(self.A)] = generator.uniform(-self.initial_scale, self.initial_scale, len(self.A))
        return state

    def draw_noise(self, state: Array, generator: np.random.Generator) -> Array:
        """
        Draw the noise of the coming step.

        :param state: ``x`` or ``(x, w)``
        :param generator: source of random numbers
        :return: the state with ``w`` filled in
        """
        if self.noise_std > 0.0:
            state[len(self.A) :] = generator.normal(0.0, self.noise_std, len(self.A))
        return state

    def optimal_gain(self, gamma: float) -> tuple[Array, Array]:
        """
        The optimal policy.

        :param gamma: discount, in (0, 1]
        :return: K and P as :func:`riccati_gain` returns them; P without ``reward_scale``
        """
        return riccati_gain(self.A, self.B, self.Q, self.R, gamma)

    def optimal_return(self, states: ArrayLike, gamma: float) -> Array:
        """
        Expected discounted return of the optimal policy over infinite time, noise not yet known.

        :param states: shape ``(n, nx)``
        :param gamma: discount, in (0, 1), or 1 without noise
        :return: ``-reward_scale (x'Px + gamma noise_std^2 trace(P) / (1 - gamma))``, shape ``(n,)``
        :raises ValueError: if the return is infinite
        """
        if self.noise_std > 0.0 and gamma >= 1.0:
            raise ValueError(f"`gamma` must be less than 1 with noise, got {gamma!r}: the return is infinite")
        x = check_array("states", states, (-1, self.state_size))[:, : len(self.A)]
        _, P = self.optimal_gain(gamma)
        noise_cost = gamma * self.noise_std**2 * np.trace(P) / (1.0 - gamma) if self.noise_std > 0.0 else 0.0
        return -self.reward_scale * (np.einsum("ni,ij,nj->n", x, P, x) + noise_cost)


class TorchPendulum(TorchEnv):
    """
    Swing-up of a pendulum, equal to Gymnasium's Pendulum-v1 in spaces, dynamics, reward and start (without rendering).

    State: angle in rad, 0 upright, not wrapped; angular velocity in rad/s. Action: torque in N m, clipped to 2. Beyond
    the limits of torque and speed derivatives are zero, at the limits they are those of the inside.

    Source: ``gymnasium.envs.classic_control.pendulum``, MIT licence.

    :param g: acceleration of gravity, in m/s^2
    :raises ValueError: if g is not finite
    """

    MAX_SPEED = 8.0  # rad/s
    MAX_TORQUE = 2.0  # N m
    TIME_STEP = 0.05  # s
    MASS = 1.0  # kg
    LENGTH = 1.0  # m

    def __init__(self, g: float = 10.0) -> None:
        self.g = float(check_array("g", g, ()))
        high = np.array([1.0, 1.0, self.MAX_SPEED], dtype=np.float32)
        super().__init__(
            state_size=2,
            observation_space=spaces.Box(-high, high, dtype=np.float32),
            action_space=spaces.Box(-self.MAX_TORQUE, self.MAX_TORQUE, (1,), np.float32),
        )

    def dynamics(self, state: th.Tensor, action: th.Tensor) -> th.Tensor:
        """
        Move one step on (semi-implicit Euler).

        :param state: angle and angular velocity
        :param action: torque
        :return: next angle and angular velocity
        """
        angle, speed = state[0], state[1]
        torque = th.clamp(action[0], -self.MAX_TORQUE, self.MAX_TORQUE)
        gravity = 3 * self.g / (2 * self.LENGTH) * th.sin(angle)
        next_speed = speed + (gravity + 3.0 / (self.MASS * self.LENGTH**2) * torque) * self.TIME_STEP
        next_speed = th.clamp(next_speed, -self.MAX_SPEED, self.MAX_SPEED)
        return th.stack([angle + next_speed * self.TIME_STEP, next_speed])

    def observation(self, state: th.Tensor) -> th.Tensor:
        """
        Observe a state.

        :param state: angle and angular velocity
        :return: cosine and sine of the angle, angular velocity
        """
        return th.stack([th.cos(state[0]), th.sin(state[0]), state[1]])

    def reward(self, state: th.Tensor, action: th.Tensor, next_state: th.Tensor) -> th.Tensor:
        """
        Reward of one step.

        :param state: angle and angular velocity before the step
        :param action: torque
        :param next_state: not used
        :return: minus the cost of angle, velocity and torque
        """
        wrapped = th.remainder(state[0] + th.pi, 2 * th.pi) - th.pi
        torque = th.clamp(action[0], -self.MAX_TORQUE, self.MAX_TORQUE)
        return -(wrapped**2 + 0.1 * state[1] ** 2 + 0.001 * torque**2)

    def initial_state(self, generator: np.random.Generator) -> Array:
        """
        Draw the first state of an episode, with the same draws as Pendulum-v1.

        :param generator: source of random numbers
        :return: any angle, slow
        """
        high = np.array([np.pi, 1.0])
        return generator.uniform(low=-high, high=high)


class PushAgainstWall(TorchEnv):
    """
    A puck pushed along a line against a stiff wall: a smooth task with one rough place, to compare gradient estimators.

    The puck is to reach a goal that lies behind the wall, so a good policy lives in contact. The wall is a damped spring
    that acts on penetration: a time step is long enough for a whole bounce, so across a contact ``|A|`` grows from 1.4 to
    as much as ``sqrt(STIFFNESS / MASS)`` = 100 and the sign of the derivatives flips with the phase of the bounce. The
    damper's force jumps at touch, and no derivative sees a jump.

    What that does to the analytic derivative of the return by the first action, in 20,000 rollouts with action noise 0.3
    about 0.3 from position -0.15 m, velocity 1 m/s: its standard deviation is 0.03, 0.4, 2.7 and 75 over 4, 8, 16 and 32
    steps, and over 16 steps its mean is -0.93 where that of the return itself (score function) is -0.79, each +-0.02.

    State and observation: position in m, velocity in m/s. Action: force in units of ``MAX_FORCE``, clipped to [-1, 1].
    Reward: ``-(x' - GOAL)^2``, in m^2, of the next position. The episode is to be ended by a time limit.
    """

    MASS = 1.0  # kg
    MAX_FORCE = 10.0  # N
    DRAG = 0.5  # N s/m, everywhere
    WALL = 0.0  # m, the wall fills x > WALL
    STIFFNESS = 1e4  # N/m: MAX_FORCE presses the puck 1 mm into the wall
    DAMPING = 10.0  # N s/m, inside the wall only: a bounce keeps 84% of the speed
    GOAL = 0.2  # m, behind the surface of the wall
    TIME_STEP = 0.005  # s
    SUBSTEPS = 10  # one environment step is 0.05 s, half a period of the spring 0.031 s

    def __init__(self) -> None:
        super().__init__(
            state_size=2,
            observation_space=spaces.Box(-np.inf, np.inf, (2,), np.float64),
            action_space=spaces.Box(-1.0, 1.0, (1,), np.float32),
        )

    def dynamics(self, state: th.Tensor, action: th.Tensor) -> th.Tensor:
        """
        Move one environment step on (semi-implicit Euler).

        :param state: position and velocity
        :param action: force in units of ``MAX_FORCE``
        :return: next position and velocity
        """
        position, velocity = state[0], state[1]
        push = self.MAX_FORCE * th.clamp(action[0], -1.0, 1.0)
        for _ in range(self.SUBSTEPS):
            depth = position - self.WALL
            contact = th.where(depth > 0.0, self.STIFFNESS * depth + self.DAMPING * velocity, 0.0)
            velocity = velocity + self.TIME_STEP / self.MASS * (push - self.DRAG * velocity - contact)
            position = position + self.TIME_STEP * velocity
        return th.stack([position, velocity])

    def observation(self, state: th.Tensor) -> th.Tensor:
        """
        Observe a state.

        :param state: position and velocity
        :return: the same
        """
        return state.clone()

    def reward(self, state: th.Tensor, action: th.Tensor, next_state: th.Tensor) -> th.Tensor:
        """
        Reward of one step.

        :param state: not used
        :param action: not used
        :param next_state: position and velocity after the step
        :return: minus the squared distance from the goal
        """
        return -((next_state[0] - self.GOAL) ** 2)

    def initial_state(self, generator: np.random.Generator) -> Array:
        """
        Draw the first state of an episode.

        :param generator: source of random numbers
        :return: in front of the wall, moving either way
        """
        return generator.uniform(low=[-1.0, -2.0], high=[-0.1, 2.0])


#: id, class and steps per episode of the environments that :func:`register_environments` makes known
ENVIRONMENTS: tuple[tuple[str, Callable[..., TorchEnv], int], ...] = (
    ("sb3_agpo/TorchPendulum-v0", TorchPendulum, 200),
    ("sb3_agpo/LinearQuadratic-v0", LinearQuadraticEnv, 100),
    ("sb3_agpo/PushAgainstWall-v0", PushAgainstWall, 100),
)


def register_environments() -> None:
    """Make the environments of this module known to ``gymnasium.make``; calling it again does nothing."""
    for environment_id, environment, steps in ENVIRONMENTS:
        if environment_id not in gym.registry:
            gym.register(environment_id, f"{__name__}:{environment.__name__}", max_episode_steps=steps)
