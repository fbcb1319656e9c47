"""A run that tests/test_checkpoint.py starts as a process of its own, kills and starts again."""

import sys
from pathlib import Path

from small_models import small_model
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.vec_env import VecEnv

from sb3_agpo import AGPO
from sb3_agpo.checkpoint.directory import complete_checkpoints
from sb3_agpo.tracking.callbacks import ResumableCheckpointCallback

#: steps of the whole run and between checkpoints
STEPS, SAVE_FREQ = 600, 20


def make_env() -> VecEnv:
    """The environments of the run."""
    return make_vec_env("InvertedPendulum-v5", 2, seed=7)


def run(directory: Path) -> AGPO:
    """Start the run, or go on with it where the last process left it, until the end."""
    model = AGPO.resume(directory, make_env()) if complete_checkpoints(directory) else small_model(make_env())
    print(f"at {model.num_timesteps}", flush=True)
    callback = ResumableCheckpointCallback(directory, SAVE_FREQ)
    return model.learn(STEPS - model.num_timesteps, callback=callback, reset_num_timesteps=False)


if __name__ == "__main__":
    run(Path(sys.argv[1]))
