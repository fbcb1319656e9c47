"""AGPO learns: known optima, a torch environment, and a task whose only reward is not to fall."""

from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from stable_baselines3.common.callbacks import EvalCallback, StopTrainingOnRewardThreshold
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.vec_env import DummyVecEnv

from sb3_agpo import AGPO
from sb3_agpo.dynamics.torch_tasks import LinearQuadraticEnv

pytestmark = pytest.mark.slow

#: small networks, which learn fast with few large steps
SMALL: dict[str, Any] = {"policy_kwargs": {"net_arch": [64, 64]}, "device": "cpu", "train_freq": 1, "gradient_steps": 1}
SMALL |= {"tau": 0.005, "policy_delay": 16}
SMALL |= {"learning_rate": 1e-3, "critic_learning_rate": 5e-4, "ent_coef_learning_rate": 3e-4}


def linear_quadratic() -> gym.Env[Any, Any]:
    """Episodes of 30 steps of the default linear-quadratic task."""
    return Monitor(gym.wrappers.TimeLimit(LinearQuadraticEnv(), 30))


def episode_returns(act: Any, n_episodes: int = 10) -> float:
    """Mean return of a function of the observation, from the same starts every time."""
    env = linear_quadratic()
    returns = []
    for episode in range(n_episodes):
        obs, _ = env.reset(seed=episode)
        total, done = 0.0, False
        while not done:
            obs, reward, terminated, truncated, _ = env.step(act(obs))
            total, done = total + float(reward), terminated or truncated
        returns.append(total)
    return float(np.mean(returns))


@pytest.mark.parametrize("seed", [0, 1])
def test_linear_quadratic_policy_converges_to_the_known_optimum(seed: int) -> None:
    task = LinearQuadraticEnv()
    K, _ = task.optimal_gain(0.99)
    optimum = episode_returns(lambda obs: np.clip(-K @ obs, -1.0, 1.0).astype(np.float32))
    idle = episode_returns(lambda obs: np.zeros(task.action_space.shape, dtype=np.float32))
    # The smoothest of tasks: the critic's derivatives are worth learning
    model = AGPO("MlpPolicy", linear_quadratic(), learning_starts=100, critic_grad_coef=1.0, seed=seed, **SMALL)
    model.learn(6_000)
    learned = episode_returns(lambda obs: model.predict(obs, deterministic=True)[0])
    # Doing nothing counts 0, the Riccati solution 1
    assert (learned - idle) / (optimum - idle) > 0.95


def test_torch_environment_swings_up() -> None:
    model = AGPO("MlpPolicy", "sb3_agpo/TorchPendulum-v0", learning_starts=200, seed=0, **SMALL)
    assert model.provider_report.kind == "exact"
    before = evaluate_policy(model, model.get_env(), 10)[0]
    model.learn(12_000)
    after = evaluate_policy(model, model.get_env(), 10)[0]
    assert before < -800.0  # hangs or spins
    assert after > -600.0  # swings up and stays; the optimum is about -150, some starts need more swings than others


def best_return(model: AGPO, env_id: str, threshold: float, total_timesteps: int = 12_000) -> float:
    """Train until the return of an evaluation reaches a threshold."""
    evaluation = DummyVecEnv([lambda: Monitor(gym.make(env_id))])
    solved = StopTrainingOnRewardThreshold(threshold)
    model.learn(total_timesteps, callback=EvalCallback(evaluation, callback_on_new_best=solved, eval_freq=1000, verbose=0))
    return float(evaluate_policy(model, evaluation, 5)[0])


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_inverted_pendulum_reaches_1000(seed: int) -> None:
    model = AGPO("MlpPolicy", "InvertedPendulum-v5", learning_starts=200, seed=seed, **SMALL)
    assert best_return(model, "InvertedPendulum-v5", 999.0) == 1000.0


def test_defaults_balance_a_double_pendulum() -> None:
    model = AGPO("MlpPolicy", "InvertedDoublePendulum-v5", seed=0)
    assert best_return(model, "InvertedDoublePendulum-v5", 9300.0) > 9300.0
