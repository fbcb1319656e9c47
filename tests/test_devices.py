"""Networks on another device than the simulator: nothing meets the CPU by mistake, and data go there and back once."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch as th
from second_device import DEVICE, OtherDeviceError, RemoteTensor, Transfers, second_device
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.vec_env import VecNormalize

from sb3_agpo.agpo.agpo import AGPO
from sb3_agpo.agpo.gates import DisagreementGate, Gate, InverseVarianceGate, MagnitudeGate, VarianceSwitch
from sb3_agpo.benchmark.speed_updates import collect
from sb3_agpo.vec_env import make_mujoco_vec_env

GATES = [DisagreementGate, InverseVarianceGate, MagnitudeGate, VarianceSwitch]
SMALL: dict[str, Any] = {"learning_starts": 16, "batch_size": 8, "rollout_size": 16, "critic_grad_batch_size": 4}
SMALL |= {"train_freq": 8, "gradient_steps": 2, "rollout_epochs": 2, "critic_grad_coef": 1.0, "policy_delay": 2, "seed": 0}
#: steps in which everything is updated
N_STEPS = 40


@pytest.fixture
def transfers(monkeypatch: pytest.MonkeyPatch) -> Iterator[Transfers]:
    """The second device, and how often something was copied to it and back."""
    with second_device(monkeypatch) as counted:
        yield counted


def make_model(device: Any, env: Any = "Hopper-v5", **arguments: Any) -> AGPO:
    """A small model that uses all kinds of updates."""
    policy_kwargs = {"net_arch": [8], **arguments.pop("policy_kwargs", {})}
    return AGPO("MlpPolicy", env, device=device, policy_kwargs=policy_kwargs, **{**SMALL, **arguments})


class TestSecondDevice:
    """The device of these tests finds the mistakes that it is made for."""

    def test_computes(self, transfers: Transfers) -> None:
        values = th.as_tensor([1.0, 2.0], device=DEVICE)
        doubled = values + values
        assert isinstance(doubled, RemoteTensor) and doubled.device == DEVICE
        assert doubled.cpu().tolist() == [2.0, 4.0] and doubled.sum().item() == 6.0
        assert (transfers.there, transfers.back) == (1, 1)

    def test_finds_mistakes(self, transfers: Transfers) -> None:
        there = th.zeros(3, device=DEVICE)
        with pytest.raises(OtherDeviceError, match=r"\(3,\)"):
            there + th.ones(3)
        with pytest.raises(OtherDeviceError, match=r"\(3, 2\)"):
            th.nn.Linear(3, 2)(there)
        with pytest.raises(RuntimeError, match="numpy"):
            there.numpy()
        assert (transfers.there, transfers.back) == (0, 0)

    def test_finds_mistakes_in_models(self, transfers: Transfers) -> None:
        model = make_model(DEVICE)
        model.rollout_buffer.device = th.device("cpu")
        with pytest.raises(OtherDeviceError):
            model.learn(32)


class TestTraining:
    """Whole runs, which would end with an error if a single tensor were on the wrong device."""

    @pytest.mark.parametrize(
        "arguments",
        [
            {},
            {"gradient_mode": "analytic", "ent_coef": 0.1},
            {"gradient_mode": "q"},
            {"use_sde": True},
            {"exploration_noise": "white"},
            {"n_steps": 1, "horizon": 1},
            {"policy_kwargs": {"n_critics": 3, "normalization": "none", "share_features_extractor": True}},
        ],
    )
    def test_same_as_on_the_cpu(self, arguments: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
        expected = make_model("cpu", **arguments).learn(N_STEPS).policy.state_dict()
        with second_device(monkeypatch):
            model = make_model(DEVICE, **arguments).learn(N_STEPS)
            assert model._n_updates > 2 and all(
                isinstance(value, RemoteTensor) for value in model.policy.state_dict().values()
            )
            for name, value in model.policy.state_dict().items():
                assert th.equal(value.cpu(), expected[name]), name

    @pytest.mark.parametrize("threaded", [False, True])
    def test_several_normalised_environments(self, threaded: bool, transfers: Transfers) -> None:
        make = make_mujoco_vec_env if threaded else make_vec_env
        model = make_model(DEVICE, VecNormalize(make("Hopper-v5", 2, 0))).learn(2 * N_STEPS)
        assert model._n_updates > 0

    def test_without_derivatives(self, transfers: Transfers) -> None:
        assert make_model(DEVICE, "Pendulum-v1").learn(N_STEPS)._n_updates > 0

    def test_buffers_move(self, tmp_path: Path, transfers: Transfers) -> None:
        for source, target in (("cpu", DEVICE), (DEVICE, "cpu")):
            make_model(source).learn(N_STEPS - 16).save_replay_buffer(tmp_path / "buffer")
            model = make_model(target)
            model.load_replay_buffer(tmp_path / "buffer.pkl")
            assert model.rollout_buffer.n_pending > 0
            assert model.learn(N_STEPS, reset_num_timesteps=False)._n_updates > 2


class TestTransfers:
    """Every copy between devices waits for the device, so there is one each way per step of the environments."""

    @pytest.mark.parametrize("noise", ["pink", "white"])
    @pytest.mark.parametrize("n_envs", [1, 3])
    def test_collecting(self, noise: str, n_envs: int, transfers: Transfers) -> None:
        model = make_model(DEVICE, make_mujoco_vec_env("Hopper-v5", n_envs, 0), exploration_noise=noise, rollout_size=999)
        transfers.there = transfers.back = 0
        collect(model, 10)
        assert (transfers.there, transfers.back) == (10, 10)

    def test_one_copy_of_each_field(self, transfers: Transfers) -> None:
        model = make_model(DEVICE, learning_starts=0)
        collect(model, 16)
        transfers.there = 0
        for sample in (
            lambda: model.derivative_buffer.sample(4),
            lambda: model.rollout_buffer.windows(),
        ):
            transfers.there = 0
            fields = sample()
            assert all(isinstance(field, RemoteTensor) for field in fields) and transfers.there == len(fields)


@pytest.mark.parametrize("gate", GATES)
def test_gates(gate: type[Gate], transfers: Transfers) -> None:
    """Every gate computes where its arguments are."""
    analytic, critic = (th.randn(8, 3).to(DEVICE) for _ in range(2))
    weights = gate()(analytic, critic, 0)
    assert isinstance(weights, RemoteTensor) and transfers.back == 0
    assert th.equal(weights.cpu(), gate()(analytic.cpu(), critic.cpu(), 0))
