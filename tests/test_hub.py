"""Files of a model for the Hugging Face Hub: in huggingface_sb3's format, loadable, and written without any network."""

from __future__ import annotations

import json
import re
import socket
import zipfile
from pathlib import Path

import numpy as np
import pytest
from small_models import SMALL, small_model
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.vec_env import VecCheckNan, VecNormalize

from sb3_agpo import AGPO
from sb3_agpo.agpo.gates import VarianceSwitch

hub = pytest.importorskip("sb3_agpo.hub", exc_type=ImportError)
ENV = "InvertedPendulum-v5"


@pytest.fixture(autouse=True)
def _no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """Refuse every connection."""

    def refuse(*_: object) -> None:
        raise AssertionError("a connection was opened")

    monkeypatch.setattr(socket.socket, "connect", refuse)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A trained model and its normalisation."""
    folder = tmp_path_factory.mktemp("saved")
    env = VecNormalize(make_vec_env(ENV, seed=0))
    model = small_model(env, gate=VarianceSwitch())
    model.learn(60)
    model.save(folder / "model.zip")
    env.save(str(folder / "normalization.pkl"))
    return folder


def test_folder(saved: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Everything that huggingface_sb3 writes but a video, consistent in itself."""
    code = hub.main([f"{saved}/model.zip", "--env", ENV, "--normalization", f"{saved}/normalization.pkl", "--episodes", "3"])
    assert code == 0
    folder = Path("hub") / f"agpo-{ENV}"
    files = {"README.md", "config.json", "results.json", "vec_normalize.pkl", f"agpo-{ENV}.zip"}
    assert {path.name for path in folder.iterdir()} == files
    assert all(name in capsys.readouterr().out or name for name in files)
    results = json.loads((folder / "results.json").read_text())
    assert (results["n_eval_episodes"], results["is_deterministic"]) == (3, True) and results["mean_reward"] >= 1.0
    config = json.loads((folder / "config.json").read_text())
    assert config["buffer_size"] == SMALL["buffer_size"]
    assert config["num_timesteps"] == 60 and "OS" in config["system_info"]
    env = VecNormalize.load(str(folder / "vec_normalize.pkl"), make_vec_env(ENV))
    model = AGPO.load(folder / f"agpo-{ENV}.zip", env=env)
    assert (model.num_timesteps, model.buffer_size) == (60, SMALL["buffer_size"])


def test_statistics_of_the_given_environment_stay(saved: Path, tmp_path: Path) -> None:
    """Also where another wrapper is around them."""
    normalized = VecNormalize.load(f"{saved}/normalization.pkl", make_vec_env(ENV))
    model = AGPO.load(saved / "model.zip", env=normalized)
    count = normalized.obs_rms.count  # type: ignore[union-attr]
    for name, env in (("plain", normalized), ("wrapped", VecCheckNan(normalized))):
        hub.write_hub_folder(model, ENV, tmp_path / name, env, episodes=1)
        assert normalized.obs_rms.count == count  # type: ignore[union-attr]
        assert normalized.training and normalized.norm_reward


def test_card_has_the_metadata_of_huggingface_sb3(saved: Path) -> None:
    """The Hub reads library, tags and result from the card as from those that huggingface_sb3 writes."""
    push_to_hub = pytest.importorskip("huggingface_sb3.push_to_hub")
    from huggingface_sb3 import EnvironmentName, ModelName

    model = hub.load_for_card(saved / "model.zip", ENV, saved / "normalization.pkl")
    card = hub.model_card(model, ENV, hub.Evaluation(12.345, 6.789, 3), normalized=True)
    own = card.data.to_dict()
    theirs = push_to_hub._generate_metadata("AGPO", ENV, 12.345, 6.789).to_dict()
    assert set(theirs["tags"]) <= set(own["tags"])
    assert {**own, "tags": None} == {**theirs, "tags": None}
    for name in (ENV, "package/Env-v0", "module:Env-v0"):
        assert hub.repository_name(name) == ModelName("agpo", EnvironmentName(name))


def test_card_says_how_the_model_was_made_and_its_code_is_complete(saved: Path) -> None:
    model = hub.load_for_card(saved / "model.zip", ENV, saved / "normalization.pkl")
    text = hub.model_card(model, ENV, hub.Evaluation(12.0, 1.0, 3), normalized=True).text
    for part in (
        "60 environment steps",
        "seed 0",
        "`mujoco`",
        "12.00 +/- 1.00",
        "batch_size = 16",
        "n_steps = ",
        "exploration_noise = 'white'",
        "horizon = ",
        "gate = VarianceSwitch(ratio=8.0)\n",
        "PyTorch",
    ):
        assert part in text, part
    (code,) = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    # The code of the card, with the files here in place of downloaded ones
    local = {"agpo-InvertedPendulum-v5.zip": saved / "model.zip", "vec_normalize.pkl": saved / "normalization.pkl"}
    code = code.replace("from huggingface_sb3 import load_from_hub\n", "")
    names: dict[str, object] = {"load_from_hub": lambda repository, file: str(local[file])}
    exec(code.replace("range(1000)", "range(10)"), names)
    assert isinstance(names["model"], AGPO) and names["env"].training is False  # type: ignore[attr-defined]


def episodes_of(folder: Path) -> tuple[float, float]:
    """Mean and deviation of the evaluation in a folder."""
    results = json.loads((folder / "results.json").read_text())
    return results["mean_reward"], results["std_reward"]


def test_the_evaluation_is_the_same_each_time(tmp_path: Path) -> None:
    """In environments of its own as in a given one that has been played in."""
    task = "InvertedDoublePendulum-v5"  # whose returns are not whole numbers
    model, given = small_model(task), make_vec_env(task)
    for name, env in (("first", None), ("second", None), ("third", given), ("fourth", given)):
        hub.write_hub_folder(model, task, tmp_path / name, env, episodes=3)
    evaluations = {episodes_of(tmp_path / name) for name in ("first", "second", "third", "fourth")}
    assert len(evaluations) == 1 and evaluations.pop()[1] > 0.0  # different states within an evaluation


def test_one_normalisation_is_evaluated_and_written(tmp_path: Path) -> None:
    """The model's, whatever the given environment does; and the environment's if the model has none."""
    task = "InvertedDoublePendulum-v5"
    model = small_model(VecNormalize(make_vec_env(task, seed=0))).learn(60)
    other = VecNormalize(make_vec_env(task, seed=1))
    other.reset()
    mean = other.obs_rms.mean.copy()  # type: ignore[union-attr]
    for name, env in (("own", None), ("given", other)):
        hub.write_hub_folder(model, task, tmp_path / name, env, episodes=3)
    assert np.array_equal(other.obs_rms.mean, mean)  # type: ignore[union-attr]
    model.save(tmp_path / "model.zip")
    model.get_vec_normalize_env().save(str(tmp_path / "normalization.pkl"))  # type: ignore[union-attr]
    normalized = VecNormalize.load(str(tmp_path / "normalization.pkl"), make_vec_env(task))
    hub.write_hub_folder(AGPO.load(tmp_path / "model.zip"), task, tmp_path / "loaded", normalized, episodes=3)
    assert len({episodes_of(tmp_path / name) for name in ("own", "given", "loaded")}) == 1
    assert (tmp_path / "loaded" / "vec_normalize.pkl").is_file()
    assert "VecNormalize.load" in (tmp_path / "loaded" / "README.md").read_text()


def test_rewards_alone_are_normalised(tmp_path: Path) -> None:
    model = small_model(VecNormalize(make_vec_env(ENV, seed=0), norm_obs=False)).learn(60)
    model.learn(60)
    hub.write_hub_folder(model, ENV, tmp_path / "card", episodes=1)
    assert "trained for 120 environment steps" in (tmp_path / "card" / "README.md").read_text()


@pytest.mark.parametrize("exists", [False, True])
def test_a_failure_midway_leaves_nothing(
    exists: bool, saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """So that the next try finds what the first one found; folders of both have everybody's usual rights."""
    arguments = [f"{saved}/model.zip", "--env", ENV, "--episodes", "1", "--output", "some/where"]
    folder = tmp_path / "some" / "where"
    if exists:
        folder.mkdir(parents=True)

    def fail(*_: object) -> None:
        raise OSError("no space left")

    with monkeypatch.context() as patch:
        patch.setattr(hub, "model_card", fail)
        assert hub.main(arguments) == 2
    assert "error: no space left" in capsys.readouterr().err
    assert list((tmp_path / "some").rglob("*")) == ([folder] if exists else [])
    assert hub.main(arguments) == 0
    assert {path.name for path in folder.iterdir()} == {"README.md", "config.json", "results.json", f"agpo-{ENV}.zip"}
    (tmp_path / "usual").mkdir()
    assert folder.stat().st_mode == (tmp_path / "usual").stat().st_mode
    assert list((tmp_path / "some").iterdir()) == [folder]


def replace_in_model(saved: Path, name: str, part: str, content: bytes | None) -> None:
    """
    Write a model with something else in it.

    :param saved: folder of the model
    :param name: file to be written
    :param part: of the model
    :param content: in its place; None to leave it out
    """
    with zipfile.ZipFile(saved / "model.zip") as model, zipfile.ZipFile(name, "w") as other:
        for each in model.namelist():
            if each != part:
                other.writestr(each, model.read(each))
            elif content is not None:
                other.writestr(each, content)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nope.zip", "--env", ENV], "there is no file nope.zip"),
        (["MODEL", "--env", "Nope-v0"], "do not go together"),
        (["MODEL", "--env", "Hopper-v5"], "do not go together"),
        (["MODEL", "--env", ENV, "--episodes", "0"], "--episodes is 0"),
        (["MODEL", "--env", ENV, "--output", "FULL"], "is not empty"),
        (["MODEL", "--env", ENV, "--output", "file"], "file is a file; give a folder"),
        (["MODEL", "--env", ENV, "--output", "file/below"], "the folder file/below cannot be made"),
        (["file", "--env", ENV], "file is no model that AGPO.save wrote, or not the whole of one"),
        (["without-data.zip", "--env", ENV], "without-data.zip is no model that AGPO.save wrote, or not the whole of one"),
        (["no-agpo.zip", "--env", ENV], "it has no settings of AGPO"),
        (["without-weights.zip", "--env", ENV], "do not go together"),
    ],
)
def test_wrong_options(arguments: list[str], message: str, saved: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("file").write_text("")
    replace_in_model(saved, "without-data.zip", "data", None)
    replace_in_model(saved, "no-agpo.zip", "data", b"[]")
    replace_in_model(saved, "without-weights.zip", "policy.pth", b"")
    given = [{"MODEL": f"{saved}/model.zip", "FULL": str(saved)}.get(each, each) for each in arguments]
    assert hub.main(given) == 2
    assert message in capsys.readouterr().err
