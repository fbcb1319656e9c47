"""
Killing a training run with SIGKILL again and again, and looking at what is left of it.

The run is a process of its own. It goes on from the newest checkpoint, tells each step through a pipe, and saves checkpoints
until it is killed. Processes come from a fork server that has the libraries loaded already.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import multiprocessing
import random
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, NamedTuple

from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.vec_env import VecEnv

from sb3_agpo.agpo.agpo import AGPO
from sb3_agpo.agpo.checkpoint import capture_model
from sb3_agpo.checkpoint.directory import TEMPORARY, complete_checkpoints, read_checkpoint
from sb3_agpo.checkpoint.plain_data import encode
from sb3_agpo.tracking.callbacks import ResumableCheckpointCallback

ENV, N_ENVS, SEED = "InvertedPendulum-v5", 2, 7
#: small, so that most of a process's life is the writing of checkpoints; with derivatives and learning all the same
SETTINGS: dict[str, Any] = {
    "policy_kwargs": {"net_arch": [64, 64]},
    "buffer_size": 2000,
    "learning_starts": 20,
    "train_freq": 1,
    "batch_size": 16,
    "rollout_size": 16,
    "critic_grad_coef": 1.0,
    "critic_grad_batch_size": 8,
    "seed": SEED,
}
#: steps between checkpoints
SAVE_FREQ = 20
#: most steps of a process before its end is near; counted in steps, as a busy machine does few of them in a second
LIFE = 4 * SAVE_FREQ
#: most seconds from then on, or from the beginning of a checkpoint; about as long as one step, or one checkpoint, takes
DELAY = 0.02
#: seconds between two looks at the folder, while waiting for a checkpoint to begin
LOOK = 0.0005
ENDLESS = 10**9
#: parts of a model's state that depend on nothing but the steps taken; others hold times of day
COMPARED = ("parameters", "variables", "replay_buffer", "rollout_buffer", "derivative_buffer", "generators")


class Killed(NamedTuple):
    """One killed process."""

    resumed_at: int  # steps
    reached: int  # steps, the last that it told
    left: int  # step of the newest checkpoint after it
    corrupt: int  # checkpoints that cannot be read
    unfinished: bool  # whether it died in the middle of a checkpoint

    @property
    def lost(self) -> int:
        """Steps to be done again."""
        return max(0, self.reached - self.left)


@dataclass
class Kills:
    """What came of all of them."""

    processes: list[Killed]
    equal: bool  # whether the run, gone on with to its end, equals one that was never killed
    steps: int  # of the whole run

    def summary(self) -> dict[str, Any]:
        """
        Figures for the record.

        :return: by name
        """
        return {
            "killed": len(self.processes),
            "killed_during_a_checkpoint": sum(process.unfinished for process in self.processes),
            "resumed": sum(process.resumed_at > 0 for process in self.processes),
            "corrupt_checkpoints": sum(process.corrupt for process in self.processes),
            "steps_between_checkpoints": SAVE_FREQ,
            "most_steps_lost": max(process.lost for process in self.processes),
            "steps_of_the_run": self.steps,
            "equal_to_an_uninterrupted_run": self.equal,
        }


def make_env() -> VecEnv:
    """
    Make the environments of the run.

    :return: vectorised environment
    """
    return make_vec_env(ENV, N_ENVS, seed=SEED)


class TellSteps(BaseCallback):
    """
    Tells the number of steps, each time before something could be saved.

    :param connection: end of a pipe
    """

    def __init__(self, connection: Connection) -> None:
        super().__init__()
        self.connection = connection

    def _on_rollout_start(self) -> None:
        self.connection.send(self.num_timesteps)

    def _on_step(self) -> bool:
        return True


def go_on(directory: Path, steps: int, connection: Connection | None = None) -> AGPO:
    """
    Start the run, or go on with it from its newest checkpoint.

    :param directory: of checkpoints
    :param steps: to stop at
    :param connection: end of a pipe, told the number of steps again and again; None for none
    :return: the model
    """
    if complete_checkpoints(directory):
        model = AGPO.resume(directory, make_env())
    else:
        model = AGPO("MlpPolicy", make_env(), **SETTINGS)
    callbacks: list[BaseCallback] = [] if connection is None else [TellSteps(connection)]
    callbacks.append(ResumableCheckpointCallback(directory, SAVE_FREQ))
    return model.learn(max(0, steps - model.num_timesteps), callback=callbacks, reset_num_timesteps=False)


def fingerprint(model: AGPO) -> str:
    """
    A short text that is equal for models that will go on equally, bit for bit.

    :param model: the model
    :return: checksum of its networks, optimisers, buffers and random generators
    """
    state = capture_model(model)
    data = encode({name: state[name] for name in COMPARED})
    checksum = hashlib.sha256(json.dumps(data.structure, sort_keys=True).encode())
    for name in sorted(data.arrays):
        checksum.update(name.encode() + data.arrays[name].tobytes())
    return checksum.hexdigest()


def kill_again_and_again(directory: Path, kills: int, notify: Callable[[int], None] = lambda done: None) -> Kills:
    """
    Kill the run at random moments, every second time while it writes a checkpoint; then let it come to its end.

    :param directory: of checkpoints, empty
    :param kills: how often
    :param notify: told the number of processes killed
    :return: what came of it
    """
    generator = random.Random()
    processes = []
    for number in range(kills):
        processes.append(kill_once(directory, generator, during_checkpoint=number % 2 == 1))
        notify(number + 1)
    steps = max(process.reached for process in processes) + 2 * SAVE_FREQ
    resumed = fingerprint(go_on(directory, steps))
    whole = fingerprint(AGPO("MlpPolicy", make_env(), **SETTINGS).learn(steps))
    return Kills(processes, resumed == whole, steps)


def kill_once(directory: Path, generator: random.Random, during_checkpoint: bool) -> Killed:
    """
    Start the run as a process, kill it, and look at what it left.

    :param directory: of checkpoints
    :param generator: of the moment
    :param during_checkpoint: whether to wait until it writes a checkpoint
    :return: what became of it
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    reader, writer = context.Pipe(duplex=False)
    process = context.Process(target=go_on, args=(directory, ENDLESS, writer), daemon=True)
    process.start()
    writer.close()  # so that reading ends when the process does
    told = _read(reader, generator.randrange(LIFE))
    if during_checkpoint:
        _wait_for_checkpoint(directory, process)
    time.sleep(generator.uniform(0.0, DELAY))
    process.kill()
    told += _read(reader, ENDLESS)
    process.join()
    if process.exitcode != -signal.SIGKILL or not told:
        raise RuntimeError(f"the run ended by itself with exit code {process.exitcode}; see its error above")
    return Killed(told[0], told[-1], *look_at(directory))


def _read(reader: Connection, steps: int) -> list[int]:
    """Read what a process tells until it has done so many steps, or ended."""
    told: list[int] = []
    with contextlib.suppress(EOFError):
        while not told or told[-1] - told[0] < steps:
            told.append(reader.recv())
    return told


def _wait_for_checkpoint(directory: Path, process: BaseProcess) -> None:
    """Wait until a process begins to write."""
    while process.is_alive() and not any(directory.glob(f"{TEMPORARY}*")):
        time.sleep(LOOK)


def look_at(directory: Path) -> tuple[int, int, bool]:
    """
    What a killed process left.

    :param directory: of checkpoints
    :return: step of the newest checkpoint (0 for none), checkpoints that cannot be read, whether one is unfinished
    """
    checkpoints = complete_checkpoints(directory)
    corrupt = 0
    for checkpoint in checkpoints:
        try:
            read_checkpoint(checkpoint)
        except ValueError:
            corrupt += 1
    newest = int(checkpoints[-1].name.rpartition("-")[2]) if checkpoints else 0
    return newest, corrupt, any(directory.glob(f"{TEMPORARY}*"))
