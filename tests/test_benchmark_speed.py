"""The ``speed`` command: what it measures is what it says, and its files can be added to."""

from __future__ import annotations

import json
import re
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gymnasium as gym
import mujoco.rollout
import numpy as np
import pytest
import torch as th
from gymnasium.envs.mujoco import MujocoEnv
from stable_baselines3 import SAC

from sb3_agpo.agpo.agpo import AGPO
from sb3_agpo.agpo.policies import EnsembleLinear
from sb3_agpo.benchmark import speed_timing, speed_updates
from sb3_agpo.benchmark.__main__ import main
from sb3_agpo.benchmark.speed_derivatives import (
    N_TRANSITIONS,
    chain_transition_fd,
    measure_floor,
    opened,
    simulation_alone,
)
from sb3_agpo.benchmark.speed_learning import (
    MEMORY_LIMIT,
    QUICK_GROWTH_STEPS,
    measure_growth,
    measure_matmul_precision,
    project_memory,
    replay_bytes,
)
from sb3_agpo.benchmark.speed_measures import MEASURES, SECTIONS, Goal, section_of
from sb3_agpo.benchmark.speed_profile import PARTS, Stopwatches, watch_model
from sb3_agpo.benchmark.speed_records import COLUMNS, four_digits, joined_circumstances, read, tables, write
from sb3_agpo.benchmark.speed_timing import Case, Effort, Medians, compare, timed, torch_threads
from sb3_agpo.benchmark.speed_updates import BATCH_SIZE, SACStopwatch, make_learners
from sb3_agpo.dynamics.mujoco import FiniteDifferences, MujocoDynamics

BEGIN, END = "<!-- speed: begin -->", "<!-- speed: end -->"


def speed(*arguments: str, output: str = "speed.csv") -> int:
    """
    Run the command for a look.

    :param arguments: of the command line
    :param output: its file
    :return: exit code
    """
    return main(["speed", "--quick", "--threads", "1", "--output", output, *arguments])


class Ticking:
    """A clock that a function moves."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def spend(self, seconds: float) -> None:
        """Let time pass."""
        self.now += seconds


class Striking(Ticking):
    """A clock on which a second passes each time that somebody looks."""

    def __call__(self) -> float:
        self.spend(1.0)
        return self.now


class TestTiming:
    """Sides take turns, and the clock is the one that fits."""

    def test_interleaved_medians(self) -> None:
        clock, order = Ticking(), []
        durations = {"ours": iter([9.0, 1.0, 2.0, 30.0]), "reference": iter([9.0, 5.0, 4.0, 4.5])}

        def work(name: str) -> None:
            order.append(name)
            clock.spend(next(durations[name]))

        samples = [timed(lambda name=name: work(name), clock) for name in durations]  # type: ignore[misc]
        assert compare(*samples, Effort(seconds=0.0, least=3)) == (2.0, 4.5)
        assert order == ["ours", "reference"] * 2 + ["reference", "ours"] + ["ours", "reference"]

    def test_as_long_as_wanted(self, monkeypatch: pytest.MonkeyPatch) -> None:
        clock, taken = Ticking(), []
        monkeypatch.setattr(speed_timing, "time", SimpleNamespace(perf_counter=clock))
        compare(lambda: taken.append(clock.spend(0.25)) or 0.0, lambda: 0.0, Effort(seconds=2.0, least=1))
        assert clock.now == 2.25 and len(taken) == 9  # the first is done beforehand

    def test_clocks(self) -> None:
        assert Effort().clock(1) is time.process_time
        assert Effort().clock(2) is Effort(always_wall=True).clock(1) is time.perf_counter

    def test_torch_threads_are_put_back(self) -> None:
        before = th.get_num_threads()
        with pytest.raises(KeyError), torch_threads(before + 1):
            assert th.get_num_threads() == before + 1
            raise KeyError
        assert th.get_num_threads() == before


class TestReferences:
    """What ours is measured beside does the same work."""

    def test_the_floor_steps_the_same_rows(self) -> None:
        with opened("Hopper-v5", 1) as (env, dynamics, visited):
            expected = dynamics.differentiate(*visited)
            with simulation_alone(env, dynamics, visited, 1) as alone:
                stepped = alone()[:: dynamics.perturbations.n_rows, -1]
        np.testing.assert_array_equal(stepped, expected.next_state)

    def test_the_floor_steps_as_many_rows(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """On a clock on which a simulated row takes a second, derivatives take as long as their floor."""
        clock, rollout = Ticking(), mujoco.rollout.Rollout.rollout

        def watched(self: Any, model: Any, data: Any, initial: Any, *args: Any, **kwargs: Any) -> Any:
            clock.spend(len(initial))
            return rollout(self, model, data, initial, *args, **kwargs)

        monkeypatch.setattr(mujoco.rollout.Rollout, "rollout", watched)
        monkeypatch.setattr(Effort, "clock", lambda *_: clock)
        medians = measure_floor(Case("jacobian", "Hopper-v5", 1, 1), Effort(0.0, 1, quick=True))
        assert medians.ours == medians.reference == 1e3 * N_TRANSITIONS * (1 + 11 + 3)

    def test_transition_fd_is_the_same_derivative(self) -> None:
        env = gym.make("HalfCheetah-v5").unwrapped
        assert isinstance(env, MujocoEnv)
        small = FiniteDifferences(1e-6, 1e-6, 1e-6, 1e-6, threads=1)
        dynamics = MujocoDynamics(env, small)
        env.reset(seed=0)
        env.set_state(env.data.qpos + np.eye(9)[1], env.data.qvel)  # in the air, where differences of any kind agree
        action, state = np.full(6, 0.3, dtype=np.float32), dynamics.get_state()
        ours = dynamics.differentiate(state[None], action[None])
        A, B = chain_transition_fd(dynamics.model, env.data, env.frame_skip, state[: dynamics.physics_size], action)
        np.testing.assert_allclose(ours.A[0], A, atol=1e-3)
        np.testing.assert_allclose(ours.B[0], B, atol=1e-3)

    def test_parts_of_sac_add_up(self) -> None:
        model = SAC("MlpPolicy", "Pendulum-v1", policy_kwargs={"net_arch": [8]}, learning_starts=0, seed=0, device="cpu")
        speed_updates.collect(model, 20)
        before = [parameter.clone() for parameter in model.policy.parameters()]
        stopwatch = SACStopwatch(model, Striking())
        # Of the critic: sampling, its loss and the target networks; of the policy: the temperature and its loss
        assert stopwatch.train() == (3.0, 2.0)
        assert any(not th.equal(*pair) for pair in zip(before, model.policy.parameters(), strict=True))
        stopwatch.close()
        assert model.replay_buffer is not None and model.replay_buffer.sample == stopwatch._sample
        assert not model.actor.optimizer._optimizer_step_post_hooks

    def test_learners_are_alike(self) -> None:
        make_learners.cache_clear()  # those of another test may have learned
        ours, reference = make_learners("HalfCheetah-v5")
        actors = [{name: value.shape for name, value in model.actor.state_dict().items()} for model in (ours, reference)]
        assert actors[0] == actors[1]
        batched = [layer.weight.shape[1:] for layer in ours.critic.modules() if isinstance(layer, EnsembleLinear)]
        plain = [layer.weight.T.shape for layer in reference.critic.qf0 if isinstance(layer, th.nn.Linear)]  # type: ignore
        assert batched == plain and ours.critic.n_critics == reference.critic.n_critics
        assert ours.batch_size == reference.batch_size == BATCH_SIZE
        assert ours.rollout_buffer.windows().mask.sum() == BATCH_SIZE
        assert ours.derivative_buffer.size == BATCH_SIZE and ours._n_updates == 0

    def test_bytes_of_a_replayed_step(self) -> None:
        model = SAC("MlpPolicy", "Pendulum-v1", buffer_size=50)
        expected = 2 * 3 * 4 + 4 + 4 + 4 + 4  # two observations, action, reward, done, time limit
        assert replay_bytes(model) == expected


class TestProfile:
    """Time is counted once, for the innermost part."""

    def test_nested(self) -> None:
        clock = Ticking()

        class Work:
            def outer(self) -> None:
                clock.spend(1.0)
                self.inner()
                clock.spend(2.0)

            def inner(self) -> None:
                clock.spend(10.0)

        work, watches = Work(), Stopwatches(clock)
        watches.watch(work, "outer", "outside")
        watches.watch(work, "inner", "inside")
        work.outer()
        clock.spend(100.0)
        work.inner()
        assert watches.seconds == {"outside": 3.0, "inside": 20.0}

    def test_all_of_a_run(self) -> None:
        small: dict[str, Any] = {"rollout_size": 16, "learning_starts": 20, "policy_kwargs": {"net_arch": [8]}}
        model = AGPO("MlpPolicy", "Hopper-v5", device="cpu", seed=0, policy_delay=2, **small)
        clock = Striking()
        watches = Stopwatches(clock)
        watch_model(watches, model)
        start = clock()
        model.learn(64)
        assert set(watches.seconds) == set(PARTS) and min(watches.seconds.values()) > 0.0
        assert sum(watches.seconds.values()) == clock.now - (start + 1.0)  # from the first look to the last


class TestRows:
    """Every row has a unit, a section and a function; goals are those of their rows."""

    def test_every_section(self) -> None:
        cases = [case for rows in SECTIONS.values() for case in rows((1, 2))]
        assert len(set(cases)) == len(cases) and {case.measure for case in cases} == set(MEASURES)
        for name, rows in SECTIONS.items():
            assert {section_of(case) for case in rows((1, 2))} == {name}

    def test_goals(self) -> None:
        assert str(MEASURES["vec_env_dummy"].goal(Case("vec_env_dummy", "Hopper-v5", 16, 2))) == "≥ 2.5"
        assert MEASURES["vec_env_dummy"].goal(Case("vec_env_dummy", "Hopper-v5", 8, 2)) is None
        assert str(MEASURES["learn"].goal(Case("learn", "Ant-v5", 1, 1))) == "≥ 1.5"
        assert Goal(1.25, True).is_reached(1.25) and not Goal(1.25, True).is_reached(1.26)
        assert Goal(3.0, False).is_reached(3.0) and not Goal(3.0, False).is_reached(2.99)


class TestFiles:
    """The CSV file and the table."""

    def test_round_trip(self) -> None:
        results = {Case("jacobian", "Hopper-v5", 1, 2): Medians(2.0, 4.0), Case("columns", "Ant-v5", 1, 1): Medians(35, 37)}
        write(Path("new/speed.csv"), results)
        assert read(Path("new/speed.csv")) == results
        lines = Path("new/speed.csv").read_text().splitlines()
        assert lines == [",".join(COLUMNS), "jacobian,Hopper-v5,1,2,2,4,0.5", "columns,Ant-v5,1,1,35,37,0.9459"]

    @pytest.mark.parametrize(("value", "text"), [(123456.0, "123500"), (0.00012346, "0.0001235"), (2.0, "2"), (10.5, "10.5")])
    def test_numbers(self, value: float, text: str) -> None:
        assert four_digits(value) == text

    def test_loads_are_joined(self) -> None:
        texts = ["a, Abacus (load 1.5), b", "a, Abacus (load 0.9), b", "a, Abacus (load 1.5), b", "c (load nan), d", "e"]
        assert joined_circumstances(texts) == ["a, Abacus, b (load 0.9 to 1.5)", "c (load nan), d", "e"]

    def test_table(self) -> None:
        slow = {Case("jacobian", "Hopper-v5", 1, 1): Medians(3.0, 2.0), Case("columns", "Ant-v5", 1, 1): Medians(35, 37)}
        text = tables(slow, ["2020-02-02"])
        assert text.index("**jacobian**") < text.index("**columns**") and text.endswith("Measured: 2020-02-02.\n")
        assert "| Hopper-v5 | 1 | 1 | 3 | 2 | 1.50 | ≤ 1.25 | **no** |" in text
        assert "| Ant-v5 | 1 | 1 | 35 | 37 | 0.95 |  |  |" in text


class TestCommand:
    """A small run of every section, with the real work."""

    def test_derivatives_and_resuming(self, capsys: pytest.CaptureFixture[str]) -> None:
        page = Path("page.md")
        page.write_text(f"before\n{BEGIN}\nold\n{END}\nafter\n")
        arguments = ["--sections", "jacobian", "columns", "--tasks", "InvertedPendulum-v5", "Pusher-v5", "--page", str(page)]
        assert speed(*arguments) == 0
        first = read(Path("speed.csv"))
        assert [case.measure for case in first] == ["columns"] * 2 + ["jacobian"] * 2 + ["transition_fd"]
        assert all(min(medians) > 0.0 for medians in first.values())
        text = page.read_text()
        assert text.startswith("before\n") and text.endswith(f"{END}\nafter\n") and "old" not in text
        assert "| Pusher-v5 | 1 | 1 | 30 | 30 | 1.00 |" in text and "| Pusher-v5" in capsys.readouterr().out
        assert speed(*arguments, "--sections", "columns", "--tasks", "Hopper-v5") == 0
        second = read(Path("speed.csv"))
        assert {case: second[case] for case in first} == first  # not measured again
        assert second[Case("columns", "Hopper-v5", 1, 1)] == Medians(15, 16)

    def test_commands_keep_each_others_rows(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """One that is begun and ended while another one measures."""
        columns, others = MEASURES["columns"], ["Hopper-v5"]

        def measure(case: Case, effort: Effort) -> Medians:
            if others:
                assert speed("--sections", "columns", "--tasks", others.pop(), "--page", "page.md") == 0
            return columns.measure(case, effort)

        monkeypatch.setitem(MEASURES, "columns", replace(columns, measure=measure))
        Path("page.md").write_text(f"{BEGIN}\n{END}\n")
        assert speed("--sections", "columns", "--tasks", "Pusher-v5", "--page", "page.md") == 0
        assert sorted(case.task for case in read(Path("speed.csv"))) == ["Hopper-v5", "Pusher-v5"]
        assert all(f"| {task} |" in Path("page.md").read_text() for task in ("Hopper-v5", "Pusher-v5"))
        assert len(json.loads(Path("speed.json").read_text())) == 2

    @pytest.mark.parametrize(
        ("section", "task", "n_rows"),
        [
            ("vec_env", "Hopper-v5", 2),
            ("updates", "HalfCheetah-v5", 5),
            ("end_to_end", "Hopper-v5", 2),
            ("profile", "Hopper-v5", 10),
        ],
    )
    def test_sections(self, section: str, task: str, n_rows: int) -> None:
        assert speed("--sections", section, "--tasks", task, "--n-envs", "1") == 0
        results = read(Path("speed.csv"))
        assert len(results) == n_rows and all(min(medians) > 0.0 for medians in results.values())
        if section == "profile":
            shares = [medians.ours / medians.reference for case, medians in results.items() if case.measure != "profile_limit"]
            assert sum(shares) == pytest.approx(1.0, abs=0.01)

    def test_precision_of_products(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Both sides learn as often, at the precision they are named after; then it is put back."""
        found: list[str] = []
        learn = SAC.learn

        def watched(*args: Any, **kwargs: Any) -> Any:
            found.append(th.get_float32_matmul_precision())
            return learn(*args, **kwargs)

        monkeypatch.setattr(SAC, "learn", watched)
        measure_matmul_precision(Case("learn_medium_sac", "Hopper-v5", 1, 1), Effort(0.0, 1, quick=True), SAC)
        assert found == ["highest", "medium", "highest", "medium", "highest"]  # warm-up, once beforehand, once measured
        assert th.get_float32_matmul_precision() == "highest"

    def test_memory(self) -> None:
        effort = Effort(quick=True)
        growth = measure_growth(Case("memory_growth", "Ant-v5", 1, 1), effort)
        assert growth.reference == pytest.approx(QUICK_GROWTH_STEPS * (2 * 105 * 4 + 8 * 4 + 12) / 1e6)  # MB
        # Few steps: what the allocator keeps for itself is of the same size
        assert 0.5 * growth.reference < growth.ours < growth.reference + 20.0
        projected = project_memory(Case("memory_1m_steps", "Ant-v5", 1, 1), effort)
        assert projected.ours > 200 * growth.reference and projected.reference == MEMORY_LIMIT

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (["--sections", "nothing"], "'nothing'.*jacobian"),
            (["--threads", "0"], "--threads.*0"),
            (["--n-envs", "-1"], "--n-envs.*-1"),
            (["--seconds", "0"], "--seconds.*0"),
            (["--tasks", "CartPole-v1"], "no row"),
            (["--output", "speed.json"], "speed.json.*csv"),
            (["--quick"], "--output"),
        ],
    )
    def test_refusals(self, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
        assert main(["speed", *arguments]) == 2
        assert re.search(message, capsys.readouterr().err)

    def test_other_files_are_left_alone(self, capsys: pytest.CaptureFixture[str]) -> None:
        Path("speed.csv").write_text("algorithm,env\nsac,Hopper-v5\n")
        assert speed("--sections", "columns") == 2
        assert "algorithm" in capsys.readouterr().err and Path("speed.csv").read_text().startswith("algorithm")
        Path("page.md").write_text("no markers\n")
        assert speed("--sections", "columns", "--page", "page.md", output="other.csv") == 2
        assert BEGIN in capsys.readouterr().err and Path("page.md").read_text() == "no markers\n"
