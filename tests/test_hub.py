"""Files of a model for the Hugging Face Hub: in huggingface_sb3's format, loadable, and written without any network."""

from __future__ import annotations

import json
import re
import socket
from pathlib import Path

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
    card = hub.model_card(model, ENV, hub.Evaluation(12.345, 6.789, 3))
    own = card.data.to_dict()
    theirs = push_to_hub._generate_metadata("AGPO", ENV, 12.345, 6.789).to_dict()
    assert set(theirs["tags"]) <= set(own["tags"])
    assert {**own, "tags": None} == {**theirs, "tags": None}
    for name in (ENV, "package/Env-v0", "module:Env-v0"):
        assert hub.repository_name(name) == ModelName("agpo", EnvironmentName(name))


def test_card_says_how_the_model_was_made_and_its_code_is_complete(saved: Path) -> None:
    model = hub.load_for_card(saved / "model.zip", ENV, saved / "normalization.pkl")
    text = hub.model_card(model, ENV, hub.Evaluation(12.0, 1.0, 3)).text
    for part in (
        "60 environment steps",
        "seed 0",
        "`mujoco`",
        "12.00 +/- 1.00",
        "batch_size = 16",
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


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nope.zip", "--env", ENV], "there is no file nope.zip"),
        (["MODEL", "--env", "Nope-v0"], "do not go together"),
        (["MODEL", "--env", "Hopper-v5"], "do not go together"),
        (["MODEL", "--env", ENV, "--episodes", "0"], "--episodes is 0"),
        (["MODEL", "--env", ENV, "--output", "FULL"], "is not empty"),
    ],
)
def test_wrong_options(arguments: list[str], message: str, saved: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = [{"MODEL": f"{saved}/model.zip", "FULL": str(saved)}.get(each, each) for each in arguments]
    assert hub.main(given) == 2
    assert message in capsys.readouterr().err
