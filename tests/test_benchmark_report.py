"""The benchmark's ``report`` command, on runs whose statistics were worked out by hand."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import astuple
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import pytest
import scipy.stats
from matplotlib.figure import Figure

from sb3_agpo.benchmark import figures, records
from sb3_agpo.benchmark.__main__ import main
from sb3_agpo.benchmark.algorithms import NAMES
from sb3_agpo.benchmark.reading import load
from sb3_agpo.benchmark.report import stock_settings
from sb3_agpo.benchmark.results import ORDER, Reached
from sb3_agpo.benchmark.statistics import (
    ScoredRuns,
    bootstrap_interval,
    first_reached,
    interquartile_mean,
    mean,
    performance_profile,
    pool,
    score_interval,
)
from sb3_agpo.benchmark.summary import summary_table
from sb3_agpo.benchmark.tables import number

HOPPER, CHEETAH = "Hopper-v5", "HalfCheetah-v5"


def run(algorithm: str, env: str, seed: int, returns: Sequence[float], **changes: Any) -> list[dict[str, Any]]:
    """
    Rows of a run evaluated every 5000 steps.

    :param returns: the last one is at the end of the budget
    :param changes: columns with another value; ``second`` is the seconds per 1000 steps, ``overshoot`` is added to steps
    """
    budget = 5000 * len(returns)
    second, overshoot = changes.pop("second", 1.0), changes.pop("overshoot", 0)
    constants = {
        **dict.fromkeys(records.COLUMNS, ""), **records.versions(), "algorithm": algorithm, "env": env, "seed": seed,
        "budget": budget, "eval_every": 5000, "threads": 1, "n_envs": 1, "machine": "Abacus, 1 cores", "git_commit": "abc1234",
        "settings": stock_settings(algorithm) or "changed", **changes,
    }  # fmt: skip
    rows = []
    for i, value in enumerate(returns):
        steps = 5000 * (i + 1) + overshoot
        times = {"seconds": second * steps / 1000, "cpu_seconds": 2 * second * steps / 1000}
        rows.append(constants | times | {"steps": steps, "simulator_calls": 3 * steps, "return": value, "return_std": 0})
    return rows


def random_row(env: str, value: float) -> dict[str, Any]:
    """The row of the random policy."""
    return run("random", env, 0, [value])[0] | {"steps": 0, "simulator_calls": 0, "budget": 0}


def write_csv(path: Path, *runs: list[dict[str, Any]] | dict[str, Any]) -> Path:
    """Write rows as ``learning`` does."""
    rows = [row for rows in runs for row in (rows if isinstance(rows, list) else [rows])]
    path.write_text(records.to_csv(rows, header=True))
    return path


@pytest.fixture
def two_tasks(tmp_path: Path) -> Path:
    """SAC and AGPO on two tasks with two seeds each."""
    return write_csv(
        tmp_path / "learning.csv",
        random_row(HOPPER, 0),
        random_row(CHEETAH, -100),
        run("sac", HOPPER, 0, [10, 50, 90], second=2),
        run("sac", HOPPER, 1, [30, 70, 110], second=4),  # final mean 100: scores 0.9 and 1.1
        run("sac", CHEETAH, 0, [0, 100]),
        run("sac", CHEETAH, 1, [0, 300]),  # final mean 200: scores 2/3 and 4/3
        run("agpo-adaptive", HOPPER, 0, [80, 110, 200], overshoot=8, n_envs=16),
        run("agpo-adaptive", HOPPER, 1, [100, 120, 300], overshoot=8, n_envs=16),  # scores 2 and 3
        run("agpo-adaptive", CHEETAH, 0, [0, 200], overshoot=8, n_envs=16),
        run("agpo-adaptive", CHEETAH, 1, [0, 1100], overshoot=8, n_envs=16),  # scores 1 and 4
    )


def test_each_task_counts_the_same() -> None:
    """A task that was run more often moves no statistic of all runs."""
    easy, hard = np.array([1.0, 1.1, 0.9]), np.array([2.0, 4.0, 6.0, 8.0, 10.0])
    pooled = pool([easy, hard])
    assert pooled.mean() == pytest.approx((easy.mean() + hard.mean()) / 2)
    twice = pool([easy, np.repeat(hard, 2)])
    assert twice.mean() == pytest.approx(pooled.mean())
    np.testing.assert_array_equal(pool([easy, hard[:3]]), np.concatenate([easy, hard[:3]]))  # as they are
    curves = pool([easy[None, :, None], np.stack([hard, hard])[:1, :, None]], axis=1)
    np.testing.assert_array_equal(curves[0, :, 0], pooled)


def test_interval_of_tasks_with_different_numbers_of_runs() -> None:
    """The interval is about the same statistic as the number, also where the second task has more runs."""
    generator = np.random.default_rng(0)
    few, many = generator.normal(0.0, 0.1, 3), generator.normal(5.0, 0.1, 30)
    low, high = bootstrap_interval([few, many], mean)
    assert low < pool([few, many]).mean() < high
    assert high < 3.0  # 4.5 if every run counted the same


def test_interquartile_mean_by_hand() -> None:
    """A quarter is cut off at either end, rounded down."""
    assert interquartile_mean([100, 1, 2, 3, 4, 5, 6, -100]) == pytest.approx((2 + 3 + 4 + 5) / 4)
    assert interquartile_mean([9, 1, 2, 3, 1000]) == pytest.approx((2 + 3 + 9) / 3)
    assert interquartile_mean([1, 2, 6]) == 3
    np.testing.assert_allclose(interquartile_mean([[1, 5, 9, 100], [0, 0, 2, 2]], axis=1), [7, 1])


def test_bootstrap_interval() -> None:
    """It agrees with SciPy's for one task, does not mix tasks, and is always the same."""
    values = np.random.default_rng(1).normal(size=30)
    low, high = bootstrap_interval([values], mean)
    reference = scipy.stats.bootstrap((values,), np.mean, method="percentile", random_state=0).confidence_interval
    assert low == pytest.approx(reference.low, abs=0.03)
    assert high == pytest.approx(reference.high, abs=0.03)
    assert bootstrap_interval([values], mean) == (low, high)
    # Runs of a task are alike: nothing is random, however different the tasks are.
    assert bootstrap_interval([[1.0] * 5, [100.0] * 5], mean) == (50.5, 50.5)
    lows, highs = bootstrap_interval([np.zeros((4, 3)), np.ones((4, 3))], interquartile_mean)
    assert lows.tolist() == highs.tolist() == [0.5, 0.5, 0.5]
    with pytest.raises(ValueError, match="no runs"):
        bootstrap_interval([[]], mean)


@pytest.mark.parametrize(("n_seeds", "expected"), [(2, 0.61), (3, 0.81)])
def test_how_often_intervals_of_few_seeds_hold_the_truth(n_seeds: int, expected: float) -> None:
    """The numbers of the docstring, for runs that are normally distributed around zero."""
    rng = np.random.default_rng(1)
    intervals = (bootstrap_interval([rng.normal(size=n_seeds)], mean, resamples=1000) for _ in range(2000))
    assert np.mean([low <= 0.0 <= high for low, high in intervals]) == pytest.approx(expected, abs=0.025)


# Final returns in docs/benchmarks/learning.csv: random policy; mean and deviation of SAC; mean and deviation of AGPO.
RETURNS = [
    (-264.4, 3792, 820, 5606, 1210),  # HalfCheetah-v5
    (17.15, 890, 271, 3171, 45.3),  # Hopper-v5
    (1.339, 859.9, 162, 4025, 221),  # Walker2d-v5
    (-72.01, 524.1, 51.1, 3829, 1540),  # Ant-v5
    (41.72, 9359, 0.377, 9358, 1.25),  # InvertedDoublePendulum-v5
    (-43.09, -3.901, 0.179, -4.014, 0.226),  # Reacher-v5
    (-149.3, -49.52, 17.4, -33.03, 0.487),  # Pusher-v5
    (0.4663, 47.81, 2.55, 41.5, 2.77),  # Swimmer-v5
]


def test_how_often_intervals_of_scores_hold_the_truth() -> None:
    """The numbers of the docstring: a baseline of three seeds that is taken as exact makes intervals far too narrow."""
    rng = np.random.default_rng(1)
    random, base, base_deviation, ours, deviation = np.array(RETURNS).T[:, :, None]
    many = rng.normal(ours, deviation, size=(8, 20_000))
    truth = interquartile_mean(((many - random) / (base - random)).ravel())
    held: dict[str, list[bool]] = {"resampled": [], "exact": []}
    for seed in range(200):
        runs, baseline = rng.normal(ours, deviation, size=(8, 3)), rng.normal(base, base_deviation, size=(8, 3))
        tasks = [ScoredRuns(*of_task) for of_task in zip(runs, baseline, random.ravel().tolist(), strict=True)]
        low, high = score_interval(tasks, interquartile_mean, 500, seed)
        held["resampled"].append(bool(low <= truth <= high))
        low, high = bootstrap_interval([of_task.scores() for of_task in tasks], interquartile_mean, 500, seed)
        held["exact"].append(bool(low <= truth <= high))
    assert np.mean(held["resampled"]) == pytest.approx(0.89, abs=0.06)
    assert np.mean(held["exact"]) == pytest.approx(0.50, abs=0.09)


def test_intervals_of_scores_by_hand() -> None:
    """Runs of the baseline are resampled like all others, as far again from their mean by sqrt(2) if there are two."""
    runs, baseline = np.array([200.0, 200.0]), np.array([90.0, 110.0])
    bounds = 200 / (100 + 10 * np.sqrt(2)), 200 / (100 - 10 * np.sqrt(2))
    assert score_interval([ScoredRuns(runs, baseline, 0.0)], mean) == pytest.approx(bounds)
    # Of a baseline without scatter, it is the interval of the scores.
    tasks = [ScoredRuns(np.array([1.0, 4.0, 5.0]), np.array([2.0, 2.0]), 0.0)]
    assert score_interval(tasks, mean) == pytest.approx(bootstrap_interval([tasks[0].scores()], mean), abs=0.05)
    # The baseline's own mean is 1 in every resample, by its last returns.
    own = ScoredRuns(np.array([[0.0, 90.0], [50.0, 110.0]]), None, 0.0)
    np.testing.assert_allclose(own.scores().mean(axis=0), [0.25, 1.0])
    low, high = score_interval([own], mean)
    assert (low[1], high[1]) == pytest.approx((1.0, 1.0)) and low[0] < 0.25 < high[0]
    # Where resampled runs of the baseline are no better than random actions, there is no score.
    low, high = score_interval([ScoredRuns(runs, np.array([1.0, 100.0]), 0.0)], mean)
    assert 0.0 < low < high < np.inf
    with pytest.raises(ValueError, match="no runs"):
        score_interval([], mean)


def test_bands_of_profiles_are_fractions() -> None:
    """However resampled runs scatter, no more than all of them and no fewer than none are above a score."""
    tasks = [ScoredRuns(np.array([1.0, 2.0, 9.0]), np.array([2.0, 3.0]), 0.0)] * 2
    center, band = figures.profile_of(tasks, np.linspace(0, 5, 21))
    assert band is not None
    assert 0.0 <= np.min(band) and np.max(band) == 1.0
    assert np.all(band[0] <= center) and np.all(center <= band[1])
    assert figures.profile_of([ScoredRuns(np.ones(1), np.ones(1), 0.0)], np.array([0.5, 1.0]))[1] is None


def test_performance_profile() -> None:
    """The fraction of runs that is strictly better."""
    assert performance_profile([0, 0.5, 1, 2], np.array([-1, 0, 0.5, 1.5, 2])).tolist() == [1, 0.75, 0.5, 0.25, 0]


def test_first_reached() -> None:
    """The first evaluation counts, falling back later does not matter."""
    assert first_reached([1, 5, 3, 6], 5) == 1
    assert first_reached([np.nan, 1, 7], 5) == 2
    assert first_reached([1, 2], 5) is None


@pytest.mark.parametrize("n_seeds", [3, 8, 10])
def test_the_baseline_reaches_its_own_return(tmp_path: Path, n_seeds: int) -> None:
    """However the numbers of its mean are added up: at its last evaluation, at the latest."""
    rng = np.random.default_rng(0)
    for _ in range(20):
        runs = [run("sac", HOPPER, seed, rng.normal([0, 1000], 100).round(4)) for seed in range(n_seeds)]
        reached = load(write_csv(tmp_path / "learning.csv", *runs)).reach("sac", HOPPER)
        assert reached is not None and reached.steps == 10_000


def test_scores_by_hand(two_tasks: Path) -> None:
    """Normalised scores at equal steps and their interquartile mean."""
    results = load(two_tasks)
    assert (results.algorithms, results.tasks) == (["sac", "agpo-adaptive"], [CHEETAH, HOPPER])
    assert results.budgets == {HOPPER: 15000, CHEETAH: 10000}
    assert results.random == {HOPPER: 0, CHEETAH: -100}
    assert results.scale(CHEETAH) == (-100, 200)
    for scores, expected in zip(results.scores("sac"), [[2 / 3, 4 / 3], [0.9, 1.1]], strict=True):
        np.testing.assert_allclose(scores, expected)
    assert [scores.tolist() for scores in results.scores("agpo-adaptive")] == [[1, 4], [2, 3]]
    # Of 1, 2, 3, 4 the middle half.
    assert interquartile_mean(np.concatenate(results.scores("agpo-adaptive"))) == 2.5
    # Resamples of [1, 4] and [2, 3], all four at the extremes: 1, 1, 2, 2 and 4, 4, 3, 3, as far again from 2.5 by sqrt(2),
    # since two runs scatter less around their own mean than around the true one.
    expected = 2.5 - np.sqrt(2), 2.5 + np.sqrt(2)
    assert bootstrap_interval(results.scores("agpo-adaptive"), interquartile_mean) == pytest.approx(expected)


def test_time_to_threshold_by_hand(two_tasks: Path) -> None:
    """The seed mean decides, steps are nominal, times are means over seeds."""
    results = load(two_tasks)
    # SAC: 20, 60, 100 reaches 100 at the end, after 30 s and 60 s.
    assert results.reach("sac", HOPPER) == Reached(15000, 45000, 45, 90)
    # AGPO: 90, 115, 250 reaches it second, although one seed has it at once.
    reached = results.reach("agpo-adaptive", HOPPER)
    assert reached is not None
    np.testing.assert_allclose(astuple(reached), [10000, 3 * 10008, 10.008, 20.016])
    assert results.reach("tqc", HOPPER) is None


def test_slower_algorithm_does_not_reach(tmp_path: Path) -> None:
    """Below the baseline's final return there is no time, above it before the end there is."""
    path = write_csv(
        tmp_path / "learning.csv",
        run("sac", HOPPER, 0, [10, 120, 100]),
        run("ppo", HOPPER, 0, [10, 50, 99.9]),
    )
    results = load(path)
    assert results.reach("ppo", HOPPER) is None
    # The baseline itself got there before it fell back.
    assert results.reach("sac", HOPPER) == Reached(10000, 30000, 10, 20)


def test_report(two_tasks: Path, tmp_path: Path) -> None:
    """Tables, figures, commands and circumstances are all there."""
    output = tmp_path / "report"
    assert main(["report", "--input", str(two_tasks), "--output", str(output)]) == 0
    text = (output / "report.md").read_text()
    assert "| HalfCheetah-v5, 10k steps | 200 [58.6, 341] (2) | **650 [13.6, 1286] (2)** | -100 |" in text
    assert "| IQM of scores | 1.00 [1.00, 1.00] | 2.50 [0.97, 5.97] | 0 |" in text
    assert "| tasks, runs in the IQM | 2/2, 4 | 2/2, 4 | – |" in text
    assert "In the CSV file, SAC is `sac`, AGPO, matching is `agpo-adaptive`." in text
    assert "| Hopper-v5 | 15,000 (1.00x) | 10,000 (0.67x) |" in text
    assert "| Hopper-v5 | 45 (1.00x) | 10 (0.22x) |" in text
    assert "| tasks on which it was reached | 2/2 | 2/2 |" in text
    assert f"--envs HalfCheetah-v5 --seeds 0 1 --steps 10000 --output {two_tasks}" in text
    assert "--algorithms random sac agpo-adaptive --envs HalfCheetah-v5" in text
    assert "--algorithms random sac agpo-adaptive --envs Hopper-v5 --seeds 0 1 --steps 15000" in text
    assert f"report --input {two_tasks} --output {output}" in text
    assert "| machine | Abacus, 1 cores |" in text
    assert f"| mujoco | {records.versions()['mujoco']} |" in text
    assert "- No runs of `sac-fast`, `tqc`, `crossq`, `crossq-fast`, `ppo`, `agpo-adaptive-nomatch`" in text
    assert "## Ablation" not in text
    for name in ("learning_steps.png", "learning_seconds.png", "learning_profile.png"):
        assert f"]({name})" in text
        assert (output / name).read_bytes().startswith(b"\x89PNG")


def test_summary_on_a_page(two_tasks: Path, tmp_path: Path) -> None:
    """One table of algorithms with runs on all tasks, without variants, between markers; the rest of the page is untouched."""
    page = tmp_path / "README.md"
    page.write_text("before\n<!-- summary: begin -->\nold\n<!-- summary: end -->\nafter\n")
    more = [
        run(name, *of) for name in ("tqc", "agpo-batch-norm") for of in ((CHEETAH, 0, [-50, 20]), (HOPPER, 0, [1, 1, 4000]))
    ]
    write_csv(tmp_path / "more.csv", *more, run("ppo", HOPPER, 0, [1, 2, 3000]))
    two_tasks.write_text(two_tasks.read_text() + "".join((tmp_path / "more.csv").read_text().splitlines(keepends=True)[1:]))
    arguments = ["--input", str(two_tasks), "--output", str(tmp_path), "--time", "cpu_seconds", "--page", str(page)]
    assert main(["report", *arguments]) == 0
    text = page.read_text()
    assert text.startswith("before\n<!-- summary: begin -->\n| task | steps | SAC |") and text.endswith("end -->\nafter\n")
    assert "old" not in text and text.count("| to SAC's return: ") == 3 and "steps and processor time at" in text
    report = (tmp_path / "report.md").read_text()
    assert all(name not in text and name in report for name in ("PPO", "batch normalisation"))
    assert "| Hopper-v5 | 15k | 100 (2) | **4,000 (1)** | 250 (2) | 15k, 90 s | 15k, 30 s | 10k, 20 s |" in text
    assert "| HalfCheetah-v5 | 10k | 200 (2) | 20.0 (1) | **650 (2)** | 10k, 20 s | not reached | 10k, 20 s |" in text
    assert "| score: interquartile mean |  | 1.00 [1.00, 1.00] |" in text
    assert f"--time cpu_seconds --page {page}" in report
    assert (tmp_path / "learning_summary.png").read_bytes().startswith(b"\x89PNG")


def test_times_reckoned_from_costs(two_tasks: Path, tmp_path: Path) -> None:
    """Steps times the cost of one, by the settings and not by the name; what is missing is named."""
    runs = [run("sac", env, seed, [0, 0], second=7 + 2 * seed) for env in (HOPPER, CHEETAH) for seed in (0, 1)]
    ours = [run("label", env, 0, [0, 0], settings=stock_settings("agpo-adaptive"), second=3) for env in (HOPPER, CHEETAH)]
    costs = write_csv(tmp_path / "costs.csv", *runs, *ours)
    results = load(two_tasks, costs=costs)
    for algorithm, cost in (("sac", 8e-3), ("agpo-adaptive", 3e-3)):
        for task in (HOPPER, CHEETAH):
            reached = results.reach(algorithm, task)
            assert reached is not None
            assert reached.seconds == pytest.approx(cost * reached.steps)
            assert reached.cpu_seconds == pytest.approx(2 * cost * reached.steps)
    arguments = ["--input", str(two_tasks), "--output", str(tmp_path), "--costs", str(costs)]
    assert main(["report", *arguments]) == 0
    text = (tmp_path / "report.md").read_text()
    assert "in short runs made side by side (`costs.csv`)" in text and f"--costs {costs}" in text

    write_csv(costs, *runs, ours[0])
    with pytest.raises(ValueError, match=f"`agpo-adaptive` \\({stock_settings('agpo-adaptive')}\\) on {CHEETAH}"):
        load(two_tasks, costs=costs)
    write_csv(costs, *runs, ours[0][:1])
    with pytest.raises(ValueError, match="`label` on Hopper-v5 was evaluated once"):
        load(two_tasks, costs=costs)
    with pytest.raises(ValueError, match="has no evaluations"):
        load(two_tasks, costs=tmp_path / "none.csv")


def test_summary_without_the_baseline(two_tasks: Path) -> None:
    """Nobody can get to a return that is not there."""
    rows = [line for line in two_tasks.read_text().splitlines() if not line.startswith(f"sac,{HOPPER}")]
    two_tasks.write_text("\n".join([*rows, ""]))
    text = summary_table(load(two_tasks), ["sac", "agpo-adaptive"], "seconds")
    assert "| Hopper-v5 | 15k | – | **250 (2)** | – | – |" in text
    assert "steps and time at" in text and "| 10k, 10 s | 10k, 10 s |" in text


@pytest.mark.parametrize(("text", "message"), [(None, "there is no file"), ("nothing to write between", "has no lines")])
def test_summary_without_a_place(
    text: str | None, message: str, two_tasks: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page = tmp_path / "page.md"
    if text is not None:
        page.write_text(text)
    assert main(["report", "--input", str(two_tasks), "--output", str(tmp_path / "report"), "--page", str(page)]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "report").exists()  # refused before anything was written


def test_ablation(two_tasks: Path, tmp_path: Path) -> None:
    """Variants have a table of their own and stay out of the main ones."""
    rows = records.read_rows(two_tasks)
    path = write_csv(tmp_path / "ablation.csv", rows, run("agpo-q-nomatch", HOPPER, 0, [0, 0, 50]))  # type: ignore[arg-type]
    assert main(["report", "--input", str(path), "--output", str(tmp_path)]) == 0
    main_part, ablation = (tmp_path / "report.md").read_text().split("## Ablation")
    assert "critic only" not in main_part
    assert "| Task | AGPO, matching | AGPO, critic only | Random |" in ablation
    assert "| Hopper-v5, 15k steps | **250 [179, 321] (2)** | 50.0 (1) | 0.00 |" in ablation
    assert "`agpo-q-nomatch` has no finished runs on HalfCheetah-v5." in ablation
    assert "`agpo-q-nomatch`: its IQM is over fewer tasks than others'" in ablation


@pytest.mark.parametrize("others", [["agpo-q"], ["agpo-adaptive"], ["ppo"], ["ppo", "agpo-adaptive"]])
def test_baseline_is_always_shown(two_tasks: Path, tmp_path: Path, others: list[str]) -> None:
    """Also one of the ablation, whatever else is asked for."""
    rows = records.read_rows(two_tasks)
    more = [
        run(name, env, 0, returns)
        for name in ("agpo-analytic-windows", "agpo-q", "ppo")
        for env, returns in ((HOPPER, [1, 2, 3]), (CHEETAH, [1, 2]))
    ]
    path = write_csv(tmp_path / "more.csv", rows, *more)  # type: ignore[arg-type]
    page = tmp_path / "README.md"
    page.write_text("<!-- summary: begin -->\n<!-- summary: end -->\n")
    options = ["--baseline", "agpo-analytic-windows", "--algorithms", *others, "--page", str(page)]
    assert main(["report", "--input", str(path), "--output", str(tmp_path), *options]) == 0
    label = "AGPO, analytic, windows alone"
    text = (tmp_path / "report.md").read_text()
    heads = [line for line in text.partition("## Learning curves")[0].splitlines() if line.startswith("| Task |")]
    assert len(heads) == 5 and all(label in head and head.count("|") == 3 + len(others) for head in heads[1:])
    assert f"| {label}" in page.read_text()
    assert "No runs of `" not in text


def test_names_are_those_of_the_file(two_tasks: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What there are no runs of is an error that says what there is; what was not asked for is not missing."""
    path = write_csv(
        tmp_path / "two.csv",
        records.read_rows(two_tasks),  # type: ignore[arg-type]
        *(run("mine", HOPPER, seed, [1, 2, 3], settings=settings) for seed, settings in enumerate("ab")),
    )
    for options, message in (
        (
            ["--baseline", "xyz"],
            f"--baseline: {path} has no runs of `xyz`; choose from agpo-adaptive, mine [a], mine [b], sac",
        ),
        (["--baseline", "random"], f"--baseline: {path} has no runs of `random`; choose from"),
        (["--baseline", "mine"], "several settings of `mine`; give one of 'mine [a]', 'mine [b]'"),
        (["--algorithms", "sac", "xyz"], f"--algorithms: {path} has no runs of `xyz`; choose from"),
    ):
        assert main(["report", "--input", str(path), "--output", str(tmp_path / "report"), *options]) == 2
        assert message in capsys.readouterr().err
    assert not (tmp_path / "report").exists()
    notes = load(path, algorithms=["mine", "random"]).notes
    assert not [note for note in notes if note.startswith("No runs of ")]
    assert "No runs on Walker2d-v5, Ant-v5" in " ".join(notes) and "on HalfCheetah" not in notes[-1]
    assert "`mine`" not in next(note for note in load(path).notes if note.startswith("No runs of "))


@pytest.mark.parametrize(
    ("rows", "note"),
    [
        ([run("tqc", HOPPER, 0, [1, 2])], "There are no runs of the baseline `sac`"),
        ([run("sac", HOPPER, 0, [1, 2])], "Hopper-v5 has no normalised scores: the random policy was not run."),
        (
            [random_row(HOPPER, 5), run("sac", HOPPER, 0, [1, 2])],
            "Hopper-v5 has no normalised scores: `sac` is no better than the random policy.",
        ),
        (
            [run("sac", HOPPER, 0, [1, 2, 3]), run("tqc", HOPPER, 0, [1, 2])],
            "1 run(s) of `tqc` on Hopper-v5 are left out: shorter than the 15000 steps compared.",
        ),
        (
            [run("sac", HOPPER, 0, [1, 2]), run("sac", HOPPER, 1, [1, 2], torch="0.1")],
            "Runs differ in `torch` (0.1, ",
        ),
        (
            [
                run("sac", HOPPER, 0, [1, 2]),
                run("tqc", HOPPER, 1, [1, 2], settings="a"),
                run("tqc", HOPPER, 0, [1], settings="b"),
            ],
            "`tqc` has runs of 2 different settings, shown apart by their hashes.",
        ),
    ],
)
def test_partial_data(tmp_path: Path, rows: list[Any], note: str) -> None:
    """Whatever is missing is said, and the report is written all the same."""
    path = write_csv(tmp_path / "learning.csv", *rows)
    assert main(["report", "--input", str(path), "--output", str(tmp_path)]) == 0
    assert note in (tmp_path / "report.md").read_text()


def test_code_is_not_mixed_silently(tmp_path: Path) -> None:
    """Runs of this package's own algorithms say which commits they are of; their settings tell, whatever their label."""
    commits = [{"settings": settings, "git_commit": f"{settings}{i}"} for settings in ("mine", "other") for i in (0, 1)]
    versions = [{"sb3_agpo": "1.0"}, {"sb3_agpo": "2.0"}]
    path = write_csv(
        tmp_path / "learning.csv",
        *(run("sac", HOPPER, seed, [1, 2], git_commit=f"sac{seed}", **versions[seed]) for seed in (0, 1)),
        *(run("faster", HOPPER, i, [1, 2], **commits[i], **versions[i]) for i in (0, 1)),
        *(run("agpo-q", HOPPER, i, [1, 2], git_commit=f"q{i}", **versions[0]) for i in (0, 1)),
        *(run("agpo-mine", HOPPER, i, [1, 2], **commits[2 + i]) for i in (0, 1)),
    )
    settings = {"mine": "sb3_agpo.agpo.agpo.AGPO", "other": "stable_baselines3.sac.sac.SAC"}
    records.settings_path(path).write_text(json.dumps({name: {"algorithm": value} for name, value in settings.items()}))
    notes = load(path).notes
    assert [note for note in notes if "commits" in note] == [
        "Runs of `agpo-q` are of several commits of this package (q0, q1), whose code may differ.",
        "Runs of `faster` are of several commits of this package (mine0, mine1), whose code may differ.",
    ]
    assert "Runs differ in `sb3_agpo` (1.0, 2.0): returns may differ for it." in notes
    notes = load(path, algorithms=["agpo-q", "agpo-mine"]).notes
    assert not [note for note in notes if "`sb3_agpo`" in note]


def test_settings_are_not_mixed(tmp_path: Path) -> None:
    """Runs of different settings are different algorithms, which ``--baseline`` can tell apart too."""
    rows = [run("sac", HOPPER, seed, [1, 2], settings=settings) for seed, settings in enumerate("aab")]
    path = write_csv(tmp_path / "learning.csv", random_row(HOPPER, 0), *rows)
    assert "give one of `sac [a]`, `sac [b]`" in " ".join(load(path).notes)
    assert sorted(load(path, algorithms=["sac"]).curves) == ["sac [a]", "sac [b]"]
    results = load(path, "sac [a]")
    assert sorted(results.curves) == ["sac [a]", "sac [b]"]
    assert len(results.scores("sac [a]")[0]) == 2


def test_longer_runs_are_compared_at_equal_steps(tmp_path: Path) -> None:
    """A run of more steps is read where the baseline ends; the baseline's most frequent budget counts."""
    path = write_csv(
        tmp_path / "learning.csv",
        run("sac", HOPPER, 0, [1, 2]),
        run("sac", HOPPER, 1, [1, 2]),
        run("sac", HOPPER, 0, [1, 2, 3]),
        run("tqc", HOPPER, 0, [4, 5, 6, 7]),
    )
    results = load(path)
    assert results.budgets == {HOPPER: 10000}
    assert results.final("sac", HOPPER).tolist() == [2, 2]
    assert results.final("tqc", HOPPER).tolist() == [5]


def test_comparison_before_the_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """``--steps`` compares sooner where budgets are larger, and changes nothing where they are smaller."""
    path = write_csv(
        tmp_path / "learning.csv",
        run("sac", HOPPER, 0, [1, 2, 3]),
        run("agpo-q", HOPPER, 0, [4, 5]),
        run("agpo-adaptive", HOPPER, 0, [6, 7, 8, 9]),
        run("sac", CHEETAH, 0, [1]),
    )
    results = load(path, steps=10_000)
    assert results.budgets == {HOPPER: 10_000, CHEETAH: 5_000}
    finals = [results.final(name, HOPPER).tolist() for name in ("sac", "agpo-q", "agpo-adaptive")]
    assert finals == [[2], [5], [7]]
    assert main(["report", "--input", str(path), "--output", str(tmp_path), "--steps", "10000"]) == 0
    text = (tmp_path / "report.md").read_text()
    assert "Hopper-v5, 10k steps" in text
    assert "--steps 10000" in text
    for steps in ("0", "7500"):
        assert main(["report", "--input", str(path), "--output", str(tmp_path), "--steps", steps]) == 2
        assert f"`--steps` is {steps}; give a multiple of the 5,000 steps" in capsys.readouterr().err


def test_unfinished_runs_are_live_only(tmp_path: Path) -> None:
    """Rows of a run in progress make a curve on demand, and no final return."""
    path = write_csv(tmp_path / "learning.csv", run("sac", HOPPER, 0, [1, 2, 3]))
    partial = run("sac", HOPPER, 1, [4, 5, 6])[:2]
    key = records.key_of({name: str(value) for name, value in partial[0].items()})
    records.partial_folder(path).mkdir()
    write_csv(records.partial_path(path, key), partial)
    assert len(load(path).curves["sac"][HOPPER]) == 1
    results = load(path, live=True)
    assert len(results.curves["sac"][HOPPER]) == 2
    assert results.final("sac", HOPPER).tolist() == [3]


def test_finished_runs_come_before_shorter_unfinished_ones(tmp_path: Path) -> None:
    """A run that was killed is of use where there is no other."""
    path = write_csv(tmp_path / "learning.csv", *(run("sac", HOPPER, seed, [1, 2, 3]) for seed in range(2)))
    partial = run("sac", HOPPER, 0, [7, 8])[:1]
    records.partial_folder(path).mkdir()
    key = records.key_of({name: str(value) for name, value in partial[0].items()})
    write_csv(records.partial_path(path, key), partial)
    assert load(path, steps=5_000, live=True).final("sac", HOPPER).tolist() == [1, 1]


def test_scores_are_drawn_where_all_runs_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs that were evaluated less often are among those whose score is drawn."""
    rows = [random_row(HOPPER, 0), random_row(CHEETAH, 0)]
    for env in (HOPPER, CHEETAH):
        rows += [row for seed in range(2) for row in run("sac", env, seed, [1, 2, 3, 4])]
        rows += [row | {"eval_every": 10_000} for row in run("sac", env, 2, [1, 2, 3, 4]) if row["steps"] % 10_000 == 0]
    drawn = []
    interval = figures.score_interval
    monkeypatch.setattr(figures, "score_interval", lambda runs, *args: drawn.append(runs) or interval(runs, *args))
    results = load(write_csv(tmp_path / "learning.csv", rows))
    figures.learning_curves(results, ["sac"], tmp_path / "curves.png")
    assert [task.returns.shape for task in drawn[0]] == [(3, 11), (3, 11)]  # from half of the budget on


def test_every_name_of_the_benchmark_has_its_place() -> None:
    assert set(NAMES) == {*ORDER, "random"}


def test_stale_partial_runs_do_not_disturb(tmp_path: Path) -> None:
    """An aborted run of other settings than the finished ones has no part in anything."""
    path = write_csv(tmp_path / "learning.csv", random_row(HOPPER, 0), run("sac", HOPPER, 0, [1, 2, 3]))
    records.partial_folder(path).mkdir()
    for seed, name, settings in ((7, "sac", "old"), (8, "sac", stock_settings("sac")), (0, "tqc", "any")):
        partial = run(name, HOPPER, seed, [4, 5, 6], settings=settings)[:1]
        key = records.key_of({name: str(value) for name, value in partial[0].items()})
        write_csv(records.partial_path(path, key), partial)
    results = load(path, live=True)
    assert sorted(results.curves) == ["sac", "tqc"] and results.scored_tasks == [HOPPER]
    assert [curve.seed for curve in results.curves["sac"][HOPPER]] == [0, 8]
    assert "Unfinished runs of `sac` with other settings (old) than finished ones are left out." in results.notes


@pytest.mark.parametrize(("random", "counted"), [(True, "counted as random actions"), (False, "left out")])
def test_returns_that_are_not_finite(tmp_path: Path, random: bool, counted: str) -> None:
    """A run whose policy broke is named, and is worth as much as random actions."""
    path = write_csv(
        tmp_path / "learning.csv",
        *([random_row(HOPPER, -10)] if random else []),
        run("sac", HOPPER, 0, [10, 90]),
        run("tqc", HOPPER, 0, [10, 190]),
        run("tqc", HOPPER, 1, [10, float("nan")]),
    )
    results = load(path)
    assert results.final("tqc", HOPPER).tolist() == ([190, -10] if random else [190])
    assert [scores.tolist() for scores in results.scores("tqc")] == ([[2, 0]] if random else [])
    assert f"`tqc` on Hopper-v5, seed 1: 1 of 2 returns are not finite, {counted}." in results.notes
    assert results.reach("tqc", HOPPER) == (Reached(10000, 30000, 10, 20) if random else None)
    assert main(["report", "--input", str(path), "--output", str(tmp_path)]) == 0


def test_costs_are_not_mixed_silently(two_tasks: Path, tmp_path: Path) -> None:
    """Times are comparable only if the short runs were made alike."""
    runs = [
        run(name, env, 0, [0, 0], threads=threads, machine=machine)
        for name, threads, machine in (("sac", 1, "Abacus"), ("agpo-adaptive", 8, "Other"), ("tqc", 4, "Third"))
        for env in (HOPPER, CHEETAH)
    ]
    costs = write_csv(tmp_path / "costs.csv", *runs)
    notes = [note for note in load(two_tasks, costs=costs).notes if "costs.csv" in note]
    assert notes == [
        f"Short runs in {costs} differ in `machine` (Abacus, Other): times are not comparable.",
        f"Short runs in {costs} differ in `threads` (1, 8): times are not comparable.",
    ]


def test_nothing_to_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Without rows there is a message instead of an empty report."""
    assert main(["report", "--input", str(tmp_path / "no.csv"), "--output", str(tmp_path)]) == 2
    (tmp_path / "folder.csv").mkdir()
    assert main(["report", "--input", str(tmp_path / "folder.csv"), "--output", str(tmp_path)]) == 2
    written = write_csv(tmp_path / "learning.csv", run("sac", HOPPER, 0, [1, 2, 3]))
    assert main(["report", "--input", str(written), "--output", str(written)]) == 2
    errors = capsys.readouterr().err
    assert "folder.csv cannot be read (Is a directory); give the name of a CSV file" in errors
    assert f"--output: {written} is a file; give a folder" in errors
    assert "no.csv has no evaluations; run 'python -m sb3_agpo.benchmark learning" in errors


def test_numbers() -> None:
    """About three digits, no exponents."""
    texts = [number(value) for value in (0, 0.994, 9.996, 99.96, -12345.6, float("nan"))]
    assert texts == ["0.00", "0.99", "10.0", "100", "-12346", "–"]


@pytest.mark.parametrize("names", [["sac", "agpo-q"], ["sac", *(f"agpo-adaptive-nomatch [{i:08x}]" for i in range(5))]])
def test_legend_is_no_wider_than_the_figure(names: list[str]) -> None:
    with mpl.rc_context(figures.FONT):
        figure = Figure(figsize=(figures.WIDTH, 4.0), layout="constrained")
        figure.subplots()
        figures._legend(figure, names, names)
        figure.canvas.draw()
        (legend,) = figure.legends
        box = legend.get_window_extent()
    assert box.x0 >= 0.0 and box.x1 <= figure.bbox.x1
    assert len(legend.get_texts()) == len(names)
