"""Going on with a run of the benchmark that was killed: its last checkpoint, and the evaluations before it."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.vec_env import VecEnv

from sb3_agpo.checkpoint.directory import complete_checkpoints

Record = Callable[[dict[str, Any]], None]


class Recovery:
    """
    What is kept of a run so that another attempt can go on from it.

    Only AGPO has checkpoints that a run goes on from bit for bit. Other algorithms start over, and so does AGPO on a
    machine that does not see the folder.

    :param folder: of this run alone
    """

    def __init__(self, folder: Path) -> None:
        self.checkpoints, self.evaluations = folder / "checkpoints", folder / "evaluations.jsonl"
        self.folder = folder

    def resume(self, env: VecEnv) -> Any | None:
        """
        Load the newest checkpoint.

        :param env: environments, made as those of the first attempt
        :return: the model, None if there is no checkpoint that can be used
        """
        if not self.checkpoints.is_dir() or not complete_checkpoints(self.checkpoints):
            return None
        from sb3_agpo import AGPO  # here, as the baselines run without it

        try:
            return AGPO.resume(self.checkpoints, env)
        except (ValueError, TypeError, OSError) as error:
            print(f"starting over, as the checkpoint in {self.checkpoints} cannot be used: {error}", file=sys.stderr)
            return None

    def replay(self, steps: int, budget: int, record: Record) -> tuple[float, float]:
        """
        Record the evaluations that took place before a checkpoint once more, and forget later ones.

        That at the end of the budget is forgotten too: a run that goes on from its last checkpoint makes it again.

        :param steps: environment steps at the checkpoint; 0 for a run that starts over
        :param budget: environment steps of the whole run
        :param record: called with the numbers of each evaluation
        :return: wall-clock and processor seconds of learning until the checkpoint's last evaluation
        """
        passed: list[dict[str, Any]] = []
        if self.evaluations.exists():
            lines = self.evaluations.read_text().splitlines(keepends=True)
            all_numbers = [json.loads(line) for line in lines if line.endswith("\n")]  # a crash can cut the last one off
            passed = [numbers for numbers in all_numbers if 0 < numbers["steps"] <= steps]
        kept = [numbers for numbers in passed if numbers["steps"] < budget]
        self.folder.mkdir(parents=True, exist_ok=True)
        self.evaluations.write_text("".join(f"{json.dumps(numbers)}\n" for numbers in kept))
        for numbers in kept:
            record(numbers)
        return (passed[-1]["seconds"], passed[-1]["cpu_seconds"]) if passed else (0.0, 0.0)

    def recorder(self, record: Record) -> Record:
        """
        Keep evaluations as they come.

        :param record: called with the numbers of each evaluation, too
        :return: the function to be called with them
        """

        def keep(numbers: dict[str, Any]) -> None:
            with self.evaluations.open("a") as file:
                file.write(f"{json.dumps(numbers)}\n")
            record(numbers)

        return keep

    def callback(self, save_freq: int) -> BaseCallback:
        """
        What saves checkpoints of AGPO.

        :param save_freq: environment steps between them
        :return: the callback
        """
        from sb3_agpo.tracking.callbacks import ResumableCheckpointCallback

        return ResumableCheckpointCallback(self.checkpoints, save_freq)

    def forget(self) -> None:
        """Remove everything, when the run is finished."""
        shutil.rmtree(self.folder, ignore_errors=True)
