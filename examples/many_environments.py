"""Train on many copies of a MuJoCo task at once, which are stepped and differentiated in threads, with normalisation."""

import argparse

from stable_baselines3.common.vec_env import VecNormalize

from sb3_agpo import AGPO
from sb3_agpo.vec_env import make_mujoco_vec_env

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--steps", type=int, default=100_000, help="environment steps, all copies together (default: %(default)s)")
parser.add_argument("--n-envs", type=int, default=8, help="copies of the environment (default: %(default)s)")
options = parser.parse_args()

env = VecNormalize(make_mujoco_vec_env("HalfCheetah-v5", n_envs=options.n_envs, seed=0))
# One critic update per transition: -1 stands for as many as were collected (a single environment makes two)
model = AGPO("MlpPolicy", env, gradient_steps=-1, seed=0, verbose=1)
model.learn(options.steps, log_interval=options.n_envs)

model.save("agpo_cheetah")
env.save("vec_normalize.pkl")  # the model needs it: VecNormalize.load("vec_normalize.pkl", venv)
print(f"{model.num_timesteps} environment steps, {model.simulator_calls} simulated ones with those for derivatives")
env.close()
