"""Callbacks of their own kind: checkpoints that a run goes on from bit for bit."""

from __future__ import annotations

from pathlib import Path

from stable_baselines3.common.callbacks import BaseCallback

from sb3_agpo.agpo.agpo import AGPO


class ResumableCheckpointCallback(BaseCallback):
    """
    Saves checkpoints from which :meth:`~sb3_agpo.AGPO.resume` goes on bit for bit.

    A checkpoint is saved when a rollout begins, that is after the updates that follow the rollout before: then nothing is
    half done. SB3's ``CheckpointCallback`` saves in the middle of a rollout, before its last transition is stored.

    :param directory: directory of checkpoints; the newest in it is always complete
    :param save_freq: environment steps (of all environments together) between checkpoints, at least
    :param keep: checkpoints to keep
    :param verbose: 1 to print where each checkpoint is
    :raises ValueError: if ``save_freq`` or ``keep`` is not positive
    """

    model: AGPO  # type: ignore[assignment]

    def __init__(self, directory: str | Path, save_freq: int, keep: int = 1, verbose: int = 0) -> None:
        super().__init__(verbose)
        for name, value in (("save_freq", save_freq), ("keep", keep)):
            if value < 1:
                raise ValueError(f"`{name}` must be at least 1, got {value!r}")
        self.directory, self.save_freq, self.keep = Path(directory), save_freq, keep
        self._saved_at = 0
        self._is_told_of_rollouts = False

    def _init_callback(self) -> None:
        if not isinstance(self.model, AGPO):
            raise TypeError(f"checkpoints that can be resumed are AGPO's, got {self.model!r}; use SB3's CheckpointCallback")
        self._saved_at = self.model.num_timesteps
        self._is_told_of_rollouts = False

    def _on_rollout_start(self) -> None:
        self._is_told_of_rollouts = True
        steps = self.model.num_timesteps
        if steps // self.save_freq > self._saved_at // self.save_freq:
            # The exploration matrix of gSDE has been drawn already, and will be drawn again when the run goes on
            self._save(self.model._state_before_rollout)

    def _on_step(self) -> bool:
        if not self._is_told_of_rollouts:
            raise TypeError(
                "checkpoints that can be resumed are saved between rollouts, of which events such as EveryNTimesteps tell "
                "their callbacks nothing; pass ResumableCheckpointCallback to `learn`, in a list with others, and set its "
                "`save_freq`"
            )
        return True

    def _on_training_end(self) -> None:
        if self.model.num_timesteps > self._saved_at:
            self._save(None)

    def _save(self, torch_generator: object) -> None:
        path = self.model.save_checkpoint(self.directory, self.keep, torch_generator)  # type: ignore[arg-type]
        self._saved_at = self.model.num_timesteps
        if self.verbose >= 1:
            print(f"Saved the checkpoint {path}")
