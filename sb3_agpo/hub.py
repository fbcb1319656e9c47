"""
The files of a trained model for the Hugging Face Hub, in the format of ``huggingface_sb3``, written without any network.

``sb3-agpo card MODEL --env ENV`` writes a folder with the model, its settings, its evaluation and a model card. Look at it,
and then send it yourself: ``hf upload USER/NAME FOLDER``.
"""

from __future__ import annotations

import argparse
import datetime
import json
import pickle
import sys
import tempfile
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import gymnasium as gym
import stable_baselines3
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.vec_env import VecEnv, VecNormalize, unwrap_vec_normalize

from sb3_agpo.__about__ import __version__
from sb3_agpo.agpo.agpo import AGPO
from sb3_agpo.agpo.checkpoint import constructor_arguments
from sb3_agpo.command_line import EXIT_USAGE, check_at_least
from sb3_agpo.tracking.normalization import held_normalization

try:
    from huggingface_hub import ModelCard, ModelCardData
    from huggingface_hub.repocard import metadata_eval_result
except ImportError as error:
    raise ImportError(
        f"a model card needs huggingface_hub, which cannot be imported ({error}); install it with: pip install 'sb3-agpo[hub]'"
    ) from error

ALGORITHM = "agpo"
EPISODES = 10
NORMALIZATION = "vec_normalize.pkl"
#: of the first evaluated episode's environment; far from those of training, which count up from the run's seed
EVALUATION_SEED = 1_000_000
#: what files and environments that do not fit raise when they are loaded and made
FAULTS = (
    gym.error.Error,
    ImportError,
    AssertionError,
    AttributeError,
    ValueError,
    KeyError,
    TypeError,
    RuntimeError,
    EOFError,
    pickle.UnpicklingError,
)
TAGS = ["deep-reinforcement-learning", "reinforcement-learning", "stable-baselines3", "sb3-agpo"]
#: arguments that the card does not show: they do not matter, or stand elsewhere
HIDDEN = ("policy", "env", "stats_window_size", "tensorboard_log", "verbose", "seed", "device", "_init_setup_model")
TEMPLATE = """---
{{ card_data }}
---

# **AGPO** Agent playing **{{ env_id }}**

This is a trained model of an **AGPO** agent playing **{{ env_id }}**, made with sb3-agpo, a plugin for
[Stable-Baselines3](https://github.com/DLR-RM/stable-baselines3).

It was trained for {{ steps }} environment steps with seed {{ seed }}.
Simulator derivatives: {{ source }}.
Return of {{ episodes }} episodes of the deterministic policy: {{ result }}.
One model of one seed says little about an algorithm.

## Usage

```python
from huggingface_sb3 import load_from_hub
from sb3_agpo import AGPO
{{ make_env }}
# A pickle: load only models that you trust
model = AGPO.load(load_from_hub("USER/{{ name }}", "{{ name }}.zip"), env=env)

observations = env.reset()
for _ in range(1000):
    actions, _ = model.predict(observations, deterministic=True)
    observations, rewards, dones, infos = env.step(actions)
```

## Settings

```text
{{ settings }}
```

## Versions

{{ versions }}
"""
PLAIN_ENV = """from stable_baselines3.common.env_util import make_vec_env

env = make_vec_env("{env_id}")
"""
NORMALIZED_ENV = """from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.vec_env import VecNormalize

env = VecNormalize.load(load_from_hub("USER/{name}", "{file}"), make_vec_env("{env_id}"))
env.training = env.norm_reward = False
"""


class Evaluation(NamedTuple):
    """What the deterministic policy achieves."""

    mean: float
    deviation: float  # over the episodes
    episodes: int


def repository_name(env_id: str) -> str:
    """
    Name of a model by the convention of ``huggingface_sb3``.

    :param env_id: Gymnasium's id of the environment
    :return: algorithm and environment, without slashes and module names
    """
    return f"{ALGORITHM}-{env_id.rpartition(':')[2].replace('/', '-')}"


def model_card(model: AGPO, env_id: str, evaluation: Evaluation, normalized: bool) -> ModelCard:
    """
    Write a model card.

    :param model: the model
    :param env_id: Gymnasium's id of the environment
    :param evaluation: of the model
    :param normalized: whether the model needs the file of a ``VecNormalize``
    :return: the card, its metadata included
    """
    name = repository_name(env_id)
    result = f"{evaluation.mean:.2f} +/- {evaluation.deviation:.2f}"
    results = metadata_eval_result(
        model_pretty_name="AGPO",
        task_pretty_name="reinforcement-learning",
        task_id="reinforcement-learning",
        metrics_pretty_name="mean_reward",
        metrics_id="mean_reward",
        metrics_value=result,
        dataset_pretty_name=env_id,
        dataset_id=env_id,
    )
    data = ModelCardData(library_name="stable-baselines3", tags=[env_id, *TAGS], **results)
    make_env = (NORMALIZED_ENV if normalized else PLAIN_ENV).format(env_id=env_id, name=name, file=NORMALIZATION)
    shown = [name for name in constructor_arguments(type(model)) if name not in HIDDEN and hasattr(model, name)]
    versions = stable_baselines3.get_system_info(print_info=False)[0]
    return ModelCard.from_template(
        data,
        template_str=TEMPLATE,
        env_id=env_id,
        name=name,
        steps=f"{model._earlier_timesteps + model.num_timesteps:,}",
        seed=model.seed,
        source=f"`{model.provider_report.kind}` ({model.provider_report.reason})",
        episodes=evaluation.episodes,
        result=result,
        make_env=make_env,
        settings="\n".join(f"{setting} = {_readable(getattr(model, setting))}" for setting in shown),
        versions="\n".join(f"- {what}: {which}" for what, which in {"sb3-agpo": __version__, **versions}.items()),
    )


def _readable(value: Any) -> str:
    """An argument as text, an object without a representation of its own by its class."""
    text = repr(value)
    return f"{type(value).__module__}.{type(value).__qualname__}" if " at 0x" in text else text


def write_hub_folder(
    model: AGPO, env_id: str, folder: Path, env: VecEnv | None = None, episodes: int = EPISODES
) -> Evaluation:
    """
    Evaluate a model and write what ``huggingface_sb3`` puts into a repository: ``README.md`` (the card), the model,
    ``config.json`` (its settings), ``results.json`` (its evaluation) and ``vec_normalize.pkl`` if it needs one.

    :param model: the model
    :param env_id: Gymnasium's id of its environment
    :param folder: to be written; must not exist or be empty. It gets everything, or nothing if there is an error
    :param env: to evaluate it in; None to make it by its id. A ``VecNormalize`` around it is left as it is; it is that of the
        model if the model has none of its own
    :param episodes: of the evaluation, which begin in the same states each time
    :return: the evaluation
    :raises ValueError: if the folder has something in it, or cannot be made
    """
    folder = Path(folder)
    _check_folder(folder)
    normalization = model.get_vec_normalize_env()
    if normalization is None and env is not None:  # a model that was loaded without its environment
        normalization = unwrap_vec_normalize(env)
    with _complete_or_not_at_all(folder) as place:
        evaluation = _evaluate(model, env_id, env, normalization, episodes)
        _write(model, env_id, place, normalization, evaluation)
    return evaluation


def _check_folder(folder: Path) -> None:
    """
    Refuse a folder that cannot be written to, and make those that it is to lie in.

    :param folder: of a user
    :raises ValueError: with what to change
    """
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder} is a file; give a folder that is empty, or that can be made")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        empty = not folder.exists() or not any(folder.iterdir())
    except OSError as error:
        raise ValueError(f"the folder {folder} cannot be made ({error}); give one that can") from error
    if not empty:
        raise ValueError(f"the folder {folder} is not empty; give one that is, or that can be made")


@contextmanager
def _complete_or_not_at_all(folder: Path) -> Iterator[Path]:
    """
    A folder to write to, of which another one gets everything at the end, and nothing after an error.

    :param folder: the other one; does not exist or is empty
    :return: context with the folder to write to
    """
    exists = folder.exists()  # as a mounted disk or the working directory, perhaps: nothing that can be replaced
    with tempfile.TemporaryDirectory(prefix=".", suffix=".partial", dir=folder if exists else folder.parent) as temporary:
        place = Path(temporary) / "folder"  # the temporary one itself is for its owner's eyes only
        place.mkdir()
        yield place
        for source, target in [(path, folder / path.name) for path in place.iterdir()] if exists else [(place, folder)]:
            source.rename(target)


def _evaluate(model: AGPO, env_id: str, env: VecEnv | None, normalization: VecNormalize | None, episodes: int) -> Evaluation:
    """
    Play episodes with the deterministic policy, which begin in the same states each time.

    :param model: the model
    :param env_id: Gymnasium's id of its environment
    :param env: to evaluate it in; None to make it by its id
    :param normalization: of the model's observations, if it needs one
    :param episodes: how many
    :return: the evaluation
    """
    own = None
    if env is None:
        env = own = make_vec_env(env_id)
    if normalization is not None and unwrap_vec_normalize(env) is None:
        env = VecNormalize(env, norm_obs=False)
    try:
        env.seed(EVALUATION_SEED)
        with held_normalization(env, normalization):
            mean, deviation = evaluate_policy(model, env, n_eval_episodes=episodes, deterministic=True)
    finally:
        if own is not None:
            own.close()
    return Evaluation(float(mean), float(deviation), episodes)  # type: ignore[arg-type]


def _write(model: AGPO, env_id: str, folder: Path, normalization: VecNormalize | None, evaluation: Evaluation) -> None:
    """
    Write the files.

    :param model: the model
    :param env_id: Gymnasium's id of its environment
    :param folder: of the files
    :param normalization: of the model's observations, if it needs one
    :param evaluation: of the model
    """
    path = folder / f"{repository_name(env_id)}.zip"
    model.save(path)
    if normalization is not None:
        normalization.save(str(folder / NORMALIZATION))
    system = stable_baselines3.get_system_info(print_info=False)[0]
    (folder / "config.json").write_text(json.dumps({**_saved_data(path), "system_info": system}))
    results = {
        "mean_reward": evaluation.mean,
        "std_reward": evaluation.deviation,
        "is_deterministic": True,
        "n_eval_episodes": evaluation.episodes,
        "eval_datetime": datetime.datetime.now().isoformat(),
    }
    (folder / "results.json").write_text(json.dumps(results))
    model_card(model, env_id, evaluation, normalization is not None).save(folder / "README.md")


def _saved_data(path: Path) -> dict[str, Any]:
    """
    Read what is readable in a saved model.

    :param path: file that ``AGPO.save`` wrote
    :return: names and values, or descriptions of them
    :raises ValueError: if it is another file
    """
    try:
        with zipfile.ZipFile(path) as archive:
            data = json.loads(archive.read("data"))
        if not isinstance(data, dict) or "buffer_size" not in data:
            raise ValueError("it has no settings of AGPO")
        return data
    except (zipfile.BadZipFile, zlib.error, KeyError, ValueError) as error:
        raise ValueError(f"{path} is no model that AGPO.save wrote, or not the whole of one ({error}); give one") from error


def load_for_card(path: Path, env_id: str, normalization: Path | None) -> AGPO:
    """
    Load a model together with its environment, to be looked at and not to be trained: its replay buffer has room for one step.

    :param path: file that ``AGPO.save`` wrote; a pickle: load only files that you trust
    :param env_id: Gymnasium's id of its environment
    :param normalization: file that ``VecNormalize.save`` wrote, if it was trained with one
    :return: the model
    :raises ValueError: if a file or the environment is missing or does not fit, with what to change
    """
    for file in (path, normalization):
        if file is not None and not file.is_file():
            raise ValueError(f"there is no file {file}")
    buffer_size = _saved_data(path)["buffer_size"]
    try:
        env: VecEnv = make_vec_env(env_id)
        if normalization is not None:
            env = VecNormalize.load(str(normalization), env)
        # A replay buffer of the size it was trained with would only take memory
        model = AGPO.load(path, env=env, device="cpu", custom_objects={"buffer_size": 1})
        model.buffer_size = buffer_size  # that of the file, which the card shows
        return model
    except FAULTS as error:
        raise ValueError(f"{path} and {env_id} do not go together, or one of them is wrong ({error})") from error


def main(arguments: Sequence[str] | None = None) -> int:
    """
    Write the files of a model.

    :param arguments: command line without the program's name; None: that of this process
    :return: exit code
    """
    parser = argparse.ArgumentParser(prog="sb3-agpo card", description="Write the files of a model for the Hugging Face Hub.")
    add = parser.add_argument
    add("model", type=Path, metavar="MODEL", help="file that AGPO.save wrote; a pickle: give a file that you trust")
    add("--env", required=True, metavar="ENV", help="Gymnasium's id of its environment")
    add("--normalization", type=Path, metavar="FILE", help="what VecNormalize.save wrote, if the model needs it")
    add("--episodes", type=int, default=EPISODES, help="episodes of the evaluation (default: %(default)s)")
    add("--output", type=Path, metavar="FOLDER", help="folder to be written (default: hub/agpo-ENV)")
    options = parser.parse_args(arguments)
    folder = options.output or Path("hub") / repository_name(options.env)
    try:
        check_at_least(1, options, "episodes")
        model = load_for_card(options.model, options.env, options.normalization)
        evaluation = write_hub_folder(model, options.env, folder, episodes=options.episodes)
    except (ValueError, OSError) as error:
        # Wrong options are the user's to correct: the message says how, a traceback would only hide it
        print(f"error: {error}", file=sys.stderr)
        return EXIT_USAGE
    print(f"return {evaluation.mean:.2f} +/- {evaluation.deviation:.2f} over {evaluation.episodes} episodes\n{folder}/")
    for path in sorted(folder.iterdir()):
        print(f"  {path.name}")
    print(f"Look at README.md, then send it: hf upload USER/{repository_name(options.env)} {folder}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
