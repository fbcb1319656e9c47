"""A video of a policy with the gate's weight drawn over it: where does AGPO believe the simulator?

Where there is no screen: MUJOCO_GL=egl python examples/gate_video.py (or osmesa).
"""

import argparse
from pathlib import Path

import gymnasium as gym

from sb3_agpo import AGPO
from sb3_agpo.tracking.video import draw_gate, encode_animation, record_gate

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--steps", type=int, default=20_000, help="environment steps of training (default: %(default)s)")
parser.add_argument("--frames", type=int, default=150, help="pictures (default: %(default)s)")
parser.add_argument("--env", default="HalfCheetah-v5", help="Gymnasium's id of a MuJoCo task (default: %(default)s)")
options = parser.parse_args()

env = gym.make(options.env, render_mode="rgb_array", width=480, height=360)
env.reset()
env.render()  # where MuJoCo cannot draw it fails here, and not after the training

model = AGPO("MlpPolicy", options.env, seed=0)
model.learn(options.steps, progress_bar=True)

frames, weights, frames_per_second = record_gate(model, env, options.frames, seed=0)
path = Path("gate.gif")
path.write_bytes(encode_animation(draw_gate(frames, weights), frames_per_second).gif)
print(
    f"wrote {path}; weight of the simulator {weights.mean():.2f} on average, from {weights.min():.2f} to {weights.max():.2f}"
)
