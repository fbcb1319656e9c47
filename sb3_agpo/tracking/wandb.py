"""
Weights & Biases for AGPO: what wandb's own callback and its reading of TensorBoard files leave out.

Distributions of the gate, figures of the run, checkpoints with a history, videos, and runs that go on where they stopped.
"""

from __future__ import annotations

import hashlib
import inspect
import re
import sys
import tempfile
import weakref
from collections.abc import Callable, Mapping
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import gymnasium as gym
import numpy as np
import torch as th
from numpy.typing import NDArray
from PIL import Image as PillowImage
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.logger import Figure, Image, KVWriter, TensorBoardOutputFormat, Video
from stable_baselines3.common.off_policy_algorithm import OffPolicyAlgorithm
from stable_baselines3.common.vec_env import VecEnv

from sb3_agpo.agpo.agpo import AGPO
from sb3_agpo.agpo.checkpoint import TorchGenerators, constructor_arguments
from sb3_agpo.tracking.figures import NothingToDraw, gradient_statistics, learning_curve
from sb3_agpo.tracking.gate_recorder import GateRecorder
from sb3_agpo.tracking.outputs import ProgressFile, write_to_tensorboard
from sb3_agpo.tracking.pictures import frames_of, picture_of
from sb3_agpo.tracking.video import Animation, encode_animation, record_episode

try:
    import wandb
except ImportError as error:
    raise ImportError(f"wandb cannot be imported ({error}); install it with: pip install 'sb3-agpo[wandb]'") from error

if TYPE_CHECKING:
    from wandb.sdk.wandb_run import Run

#: environment steps, which everything is drawn against
STEP = "global_step"
DEFAULT_PROJECT = "sb3-agpo"
LONGEST_NAME = 128  # characters of an artifact's name
FIGURES: dict[str, Callable[..., None]] = {
    "figures/learning_curve": learning_curve,
    "figures/gradient_statistics": gradient_statistics,
}


class Unfinished(NamedTuple):
    """A run that a callback has started and not finished yet."""

    run: Run
    owner: weakref.ref[AGPOWandbCallback]


#: id -> the run
_UNFINISHED: dict[str, Unfinished] = {}
#: the callbacks that watch a model, or would have been the last to do so if nothing had ended their call of ``learn``
_WATCHING: weakref.WeakKeyDictionary[BaseAlgorithm, weakref.WeakSet[AGPOWandbCallback]] = weakref.WeakKeyDictionary()


class WandbOutputFormat(KVWriter):
    """
    Sends what SB3's logger writes to a run of Weights & Biases.

    :param run: the run
    """

    def __init__(self, run: Run) -> None:
        self.run = run

    def write(self, key_values: dict[str, Any], key_excluded: dict[str, tuple[str, ...]], step: int = 0) -> None:
        """
        Send values.

        :param key_values: names and values
        :param key_excluded: names and the outputs that are not to get them; ``"wandb"`` is this one
        :param step: environment steps
        """
        if getattr(self.run, "_is_finished", False):  # an error or Ctrl-C left this behind in a logger of the user's own
            return
        kept = {key: value for key, value in key_values.items() if "wandb" not in (key_excluded.get(key) or ())}
        converted = {key: to_wandb(value) for key, value in kept.items()}
        self.run.log({**{key: value for key, value in converted.items() if value is not None}, STEP: step})

    def close(self) -> None:
        """Nothing to close: whoever started the run finishes it."""


def to_wandb(value: Any) -> Any:
    """
    Turn a value of SB3's logger into what Weights & Biases shows.

    :param value: number, text, tensor or array (a histogram), figure, image, video or animation
    :return: the converted value; None for what cannot be shown
    :raises ValueError: if an image or video does not have the shape that it should
    """
    match value:
        case str():
            return value
        case bool() | int() | float() | np.number() | np.bool_():
            return float(value)
        case th.Tensor() if not value.is_complex():
            return histogram(value.detach().cpu().to_dense().double().numpy())
        case np.ndarray():
            return histogram(value)
        case Figure():
            picture = BytesIO()  # wandb's own conversion needs `pyplot`, which chooses a backend for the whole process
            value.figure.savefig(picture, format="png")
            if value.close and "matplotlib.pyplot" in sys.modules:  # else nothing holds it open
                sys.modules["matplotlib.pyplot"].close(value.figure)
            return wandb.Image(PillowImage.open(picture))
        case Image():
            return wandb.Image(picture_of(value))
        case Video():
            return to_wandb(encode_animation(frames_of(value), value.fps))
        case Animation():
            return wandb.Video(BytesIO(value.gif), format="gif")
    return None


def histogram(values: NDArray[Any]) -> wandb.Histogram | None:
    """
    The distribution of the finite ones of some numbers; wandb has no place for the others.

    :param values: any shape
    :return: None if there are none, or if they are no real numbers
    """
    if values.dtype.kind not in "biuf":
        return None
    finite = values[np.isfinite(values)].astype(np.float64)
    return wandb.Histogram(finite.tolist()) if len(finite) else None


def settings_of(model: BaseAlgorithm) -> dict[str, Any]:
    """
    The hyperparameters of a model, for the configuration of a run.

    :param model: the model
    :return: constructor argument -> number, text, or a description of anything else
    """
    kind = type(model)
    known = constructor_arguments(kind) if issubclass(kind, AGPO) else inspect.signature(kind.__init__).parameters
    names = set(known) & set(vars(model))
    settings = {name: _plain(getattr(model, name)) for name in sorted(names - {"policy", "env", "_init_setup_model"})}
    described = {"algo": type(model).__name__, "policy": type(model.policy).__name__, "n_envs": model.n_envs}
    if isinstance(model, AGPO):
        described["derivatives"] = f"{model.provider_report.kind} ({model.provider_report.reason})"
    return {**settings, **described}


def _plain(value: Any) -> Any:
    """
    Describe a hyperparameter.

    :param value: its value
    :return: the value itself if it is a number or text
    """
    if value is None or isinstance(value, bool | int | float | str):
        return value
    return str(value)


def artifact_name(run_id: str) -> str:
    """
    Name the artifact of a run's checkpoints.

    :param run_id: id of the run, in which wandb allows more than in names of artifacts
    :return: ``checkpoint-<run id>``; if that is no valid name, dashes are put for what is not allowed, what is too long is
        cut, and a hash at the end tells it from ids that would become the same
    """
    wanted = f"checkpoint-{run_id}"
    allowed = re.sub(r"[^a-zA-Z0-9_.-]", "-", wanted)
    if allowed == wanted and len(wanted) <= LONGEST_NAME:
        return wanted
    mark = f"-{hashlib.sha256(run_id.encode()).hexdigest()[:8]}"
    return f"{allowed[: LONGEST_NAME - len(mark)]}{mark}"


class AGPOWandbCallback(BaseCallback):
    """
    Logs a training run to Weights & Biases.

    Everything that SB3's logger writes, unless ``sync_tensorboard`` already sends it; and on top of it, to TensorBoard
    too if there is a log: histograms of the gate at each step of the windows (``gate/step_0`` ...), the learning curve
    and AGPO's gradient statistics as figures, videos. Checkpoints become versions of one artifact,
    ``checkpoint-<run id>`` (see :func:`artifact_name`). Other algorithms of SB3 can be logged as well; they have no gate.

    A run that is active (``wandb.run``) is used and left open; otherwise one is started and finished. wandb's own
    settings, such as ``WANDB_MODE=offline`` or ``disabled``, apply.

    :param run_id: id of a run to go on with, or to give to a new one; :attr:`run_id` has it once training has started
    :param run_arguments: arguments of ``wandb.init`` if a run is started: project, group, tags, mode, dir, ...
    :param histogram_freq: environment steps between histograms; 0 for none
    :param figure_freq: environment steps between figures, which are also drawn at the end; 0 for none at all
    :param checkpoint_freq: environment steps between checkpoints, one of which is also taken at the end; 0 for none at all
    :param resumable_checkpoints: put into checkpoints what :meth:`~sb3_agpo.AGPO.resume` needs, or the replay buffer of
        another algorithm; this can be large
    :param video_env: environment with ``render_mode="rgb_array"`` to record in; not the one that evaluations use
    :param video_freq: environment steps between videos of one episode, recorded at the end as well
    :param verbose: 0 nothing, 1 information
    :raises ValueError: if a frequency is negative, or another run than ``run_id`` is active when training starts
    """

    def __init__(
        self,
        run_id: str | None = None,
        run_arguments: Mapping[str, Any] | None = None,
        histogram_freq: int = 1000,
        figure_freq: int = 10_000,
        checkpoint_freq: int = 0,
        resumable_checkpoints: bool = False,
        video_env: gym.Env[Any, Any] | VecEnv | None = None,
        video_freq: int = 0,
        verbose: int = 0,
    ) -> None:
        super().__init__(verbose)
        self.run_id, self.run_arguments = run_id, dict(run_arguments or {})
        self.histogram_freq, self.resumable_checkpoints, self.video_env = histogram_freq, resumable_checkpoints, video_env
        frequencies = {"histogram": histogram_freq, "figure": figure_freq, "video": video_freq, "checkpoint": checkpoint_freq}
        for name, frequency in frequencies.items():
            if frequency < 0:
                raise ValueError(f"`{name}_freq` must be a number of steps, or 0 for never, got {frequency!r}")
        if bool(video_freq) != (video_env is not None):
            raise ValueError(f"videos need both `video_env` and `video_freq`, got {video_env!r} and {video_freq!r}")
        actions = (self._log_gate, self._log_figures, self._log_video, self._log_checkpoint)
        self._schedule = [(every, act) for every, act in zip(frequencies.values(), actions, strict=True) if every > 0]
        self._torch_generator: TorchGenerators | None = None
        self._run: Run | None = None
        self._finish_run = False
        self._gate: GateRecorder | None = None
        self._own_outputs: list[KVWriter] = []
        self._folder: tempfile.TemporaryDirectory[str] | None = None
        self._past: tuple[str | None, str] = None, ""  # id of the run and rows of figures when `learn` ended

    # ------------------------------------------------------------------ start and end

    def _on_training_start(self) -> None:
        self._stop_watching()  # where an error or Ctrl-C ended the last call of `learn`, nobody else has done so
        watching = _WATCHING.setdefault(self.model, weakref.WeakSet())
        for stale in [other for other in watching if other.locals is not self.locals]:
            stale._stop_watching()
            watching.discard(stale)
        watching.add(self)
        self._run = self._start_run()
        self.run_id = self._run.id
        self._run.define_metric(STEP)
        self._run.define_metric("*", step_metric=STEP)
        self._run.config.setdefaults(settings_of(self.model))
        outputs = self.logger.output_formats
        self._tensorboard = [output for output in outputs if isinstance(output, TensorBoardOutputFormat)]
        # In a run of our own wandb has come too late to see SB3 open its TensorBoard file
        synchronized = bool(self._run.settings.sync_tensorboard and self._tensorboard and not self._finish_run)
        self._wandb = None if synchronized else WandbOutputFormat(self._run)
        self._folder = tempfile.TemporaryDirectory()
        self._progress = Path(self._folder.name) / "progress.csv"
        run_id, rows = self._past
        goes_on = run_id == self._run.id and self.num_timesteps > 0
        self._own_outputs = [ProgressFile(str(self._progress), rows if goes_on else "")]
        if self._wandb is not None:
            self._own_outputs.append(self._wandb)
        outputs.extend(self._own_outputs)
        if self.histogram_freq and isinstance(self.model, AGPO) and self.model.gradient_mode == "adaptive":
            self._gate = GateRecorder(self.model)
        self._last = {act: self.num_timesteps for _, act in self._schedule}

    def _start_run(self) -> Run:
        """
        Use the active run, or start one.

        :return: the run
        :raises ValueError: if the active run is another one than the user asked for
        """
        active = wandb.run
        started_here = active is not None and active.id in _UNFINISHED and _UNFINISHED[active.id].run is active
        self._finish_run = active is None or started_here
        if active is not None and started_here and not self._share(active.id):
            active.finish()
            active = None
        if active is None:
            # "allow": a new run if there is none of this id
            resume = {} if self.run_id is None else {"id": self.run_id, "resume": "allow"}
            active = wandb.init(**{"project": DEFAULT_PROJECT, **self.run_arguments, **resume})
        if self.run_id not in (None, active.id):
            raise ValueError(
                f"the run {active.id!r} is active, but `run_id` is {self.run_id!r}; call `wandb.finish()` first, or "
                "leave `run_id` out"
            )
        if self._finish_run:
            _UNFINISHED[active.id] = Unfinished(active, weakref.ref(self))
        return active

    def _share(self, run_id: str) -> bool:
        """
        Take over a run from the callback that started it.

        :param run_id: of the run
        :return: whether to go on with it; not if an error or Ctrl-C ended another call of ``learn`` before its callback
            could finish the run
        """
        owner = _UNFINISHED.pop(run_id).owner()
        if owner is not None and owner is not self and owner.locals is self.locals:
            owner._finish_run = False  # both are of this call: whoever begins last ends last
            return True
        if owner is not None:
            owner._stop_watching()
        return self.run_id == run_id

    def _stop_watching(self) -> None:
        """Give the model its class back and the logger its outputs."""
        if self._gate is not None:
            self._gate.close()
            self._gate = None
        for output in self._own_outputs:
            if output in self.logger.output_formats:
                self.logger.output_formats.remove(output)
            output.close()
        self._own_outputs = []
        if self._folder is not None:
            self._past = self.run_id, self._progress.read_text()
            self._folder.cleanup()
            self._folder = None

    def _on_rollout_start(self) -> None:
        # The only moment of training at which nothing is half done: a checkpoint can be resumed from it
        self._torch_generator = getattr(self.model, "_state_before_rollout", None)
        for every, act in self._schedule:
            if self.model.num_timesteps - self._last[act] >= every:
                self._last[act] = self.num_timesteps = self.model.num_timesteps
                act()

    def _on_step(self) -> bool:
        return True

    def _on_training_end(self) -> None:
        if self._run is None:  # the zoo ends its first callback a second time
            return
        self._torch_generator = None
        for _, act in self._schedule:
            if self._last[act] < self.num_timesteps:
                act()
        self._stop_watching()
        if self._finish_run:
            _UNFINISHED.pop(self._run.id, None)
            self._run.finish()
        self._run = None

    # ------------------------------------------------------------------ what is logged

    def _write(self, values: Mapping[str, Any]) -> None:
        """
        Write values at once: SB3's logger keeps the last one only, until it writes at the end of an episode.

        :param values: names and values
        """
        for output in self._tensorboard:
            write_to_tensorboard(output, values, self.num_timesteps)
        if self._wandb is not None:
            self._wandb.write(dict(values), {}, self.num_timesteps)

    def _log_gate(self) -> None:
        """Histograms of the gate's weights since the last ones, for each step of the windows."""
        weights = {} if self._gate is None else self._gate.take()
        if weights:
            self._write({f"gate/step_{step}": values for step, values in weights.items()})

    def _log_figures(self) -> None:
        """Figures of the run so far, where there is something to draw."""
        assert self._folder is not None
        path = Path(self._folder.name) / "figure.png"
        pictures = {}
        for name, draw in FIGURES.items():
            try:
                draw(self._progress, path)
            except NothingToDraw:
                continue
            with PillowImage.open(path) as picture:
                pictures[name] = Image(np.asarray(picture.convert("RGB")), "HWC")
        if pictures:
            self._write(pictures)

    def _log_checkpoint(self) -> None:
        """The model and what it needs to go on, as the next version of the run's artifact."""
        assert self._run is not None
        metadata = {"num_timesteps": self.num_timesteps, "algo": type(self.model).__name__}
        artifact = wandb.Artifact(artifact_name(self._run.id), "model", metadata=metadata)
        with tempfile.TemporaryDirectory() as folder:
            self.model.save(Path(folder) / "model.zip")
            normalization = self.model.get_vec_normalize_env()
            if normalization is not None:
                normalization.save(str(Path(folder) / "vecnormalize.pkl"))
            if self.resumable_checkpoints and isinstance(self.model, AGPO):
                self.model.save_checkpoint(Path(folder) / "resumable", torch_generator=self._torch_generator)
            elif self.resumable_checkpoints and isinstance(self.model, OffPolicyAlgorithm):
                self.model.save_replay_buffer(Path(folder) / "replay_buffer.pkl")
            artifact.add_dir(folder)
        self._run.log_artifact(artifact, aliases=["latest", f"step-{self.num_timesteps}"])

    def _log_video(self) -> None:
        """A video of one episode of the deterministic policy."""
        assert self.video_env is not None
        frames, speed = record_episode(self.model, self.video_env)
        self._write({"video/episode": encode_animation(frames, speed)})
