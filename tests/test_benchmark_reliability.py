"""The benchmark's ``reliability`` command: small real runs, and what it makes of figures. Kills are in test_faults.py."""

import json
import time
from pathlib import Path
from typing import Any

import pytest

from sb3_agpo.benchmark import reliability
from sb3_agpo.benchmark.__main__ import main
from sb3_agpo.benchmark.records import update_page
from sb3_agpo.benchmark.reliability import SECTIONS, held, markdown
from sb3_agpo.benchmark.reliability_cycles import KINDS, ORDER, Holdings, cycle
from sb3_agpo.benchmark.reliability_soak import memory_summary

STAMP = {"date": "2026-01-01", "commit": "abc"}
CYCLES = {
    "cycles": 200,
    **dict.fromkeys(
        ("threads_before", "files_before", "children_before", "threads_after", "files_after", "children_after"), 3
    ),
    "memory_mb_before": 400.2,
    "memory_mb_after": 401.0,
}
SOAK = {
    "env": "Hopper-v5",
    "n_envs": 4,
    "steps": 100_000,
    "finite_weights": True,
    **dict.fromkeys(("threads_before", "files_before", "threads_after", "files_after"), 5),
    "memory_after_warm_up_mb": 500.0,
    "memory_at_the_end_mb": 501.0,
    "memory_most_mb": 502.0,
    "memory_slope_mb_per_100k_steps": 0.5,
}
KILLS = {
    "killed": 60,
    "killed_during_a_checkpoint": 31,
    "corrupt_checkpoints": 0,
    "steps_between_checkpoints": 20,
    "most_steps_lost": 20,
    "equal_to_an_uninterrupted_run": True,
}
SUITE = {"tried": 160, "wrong": 0}

BEGIN, END = "<!-- reliability: begin -->", "<!-- reliability: end -->"


@pytest.mark.parametrize(
    ("name", "good", "bad"),
    [
        ("wrong_calls", SUITE, {"wrong": 1}),
        ("faults", SUITE, {"tried": 0}),
        ("kills", KILLS, {"corrupt_checkpoints": 1}),
        ("kills", KILLS, {"most_steps_lost": 22}),
        ("kills", KILLS, {"equal_to_an_uninterrupted_run": False}),
        ("cycles", CYCLES, {"threads_after": 4}),
        ("cycles", CYCLES, {"files_after": 4}),
        ("cycles", CYCLES, {"children_after": 4}),
        ("soak_hopper", SOAK, {"memory_most_mb": 530.0}),
        ("soak_hopper", SOAK, {"finite_weights": False}),
        ("soak_hopper", SOAK, {"files_after": 6}),
    ],
)
def test_promises_that_do_not_hold_are_seen(name: str, good: dict[str, Any], bad: dict[str, Any]) -> None:
    assert held(name, good) and not held(name, {**good, **bad})
    assert markdown({name: {**STAMP, **good}}).splitlines()[2].endswith("| yes |")
    assert markdown({name: {**STAMP, **good, **bad}}).splitlines()[2].endswith("| **no** |")


def test_table_has_sections_in_order() -> None:
    results = {"soak_hopper": SOAK, "kills": KILLS, "wrong_calls": SUITE}
    lines = markdown({name: {**STAMP, **result} for name, result in results.items()}).splitlines()
    assert [line.split(" ")[1] for line in lines[2:5]] == ["160", "60", "100,000"]
    assert lines[-1] == "Measured: 2026-01-01, commit abc."


def test_page_is_written_between_its_markers(tmp_path: Path) -> None:
    page, results = tmp_path / "page.md", {"kills": {**STAMP, **KILLS}}
    update_page(page, "reliability", markdown(results))  # there is none
    page.write_text(f"before\n{BEGIN}\nold\n{END}\nafter\n")
    for _ in range(2):
        update_page(page, "reliability", markdown(results))
        assert page.read_text() == f"before\n{BEGIN}\n{markdown(results)}\n{END}\nafter\n"
    page.write_text("no markers")
    with pytest.raises(ValueError, match=r"page.md has no lines <!-- reliability: begin --> .*add them"):
        update_page(page, "reliability", markdown(results))


def test_memory_summary_by_hand() -> None:
    """100 MB while it warms up, then 2 MB more with every 100 steps."""
    samples = [(100, 50.0), (200, 100.0), (300, 102.0), (400, 104.0), (500, 106.0), (1000, 116.0)]
    summary = memory_summary(samples, 1000)
    assert (summary["memory_after_warm_up_mb"], summary["memory_at_the_end_mb"], summary["memory_most_mb"]) == (100, 116, 116)
    assert summary["memory_slope_mb_per_100k_steps"] == pytest.approx(2000.0)


def settled() -> Holdings:
    """Holdings when no thread ends any more: the system lists one for a moment after it was waited for."""
    found = Holdings.now()
    while True:
        time.sleep(0.1)
        before, found = found, Holdings.now()
        if found[:3] == before[:3]:
            return found


def more_than(before: Holdings) -> list[int]:
    """Threads, files and processes that are held beside earlier ones; those that are about to end are waited for."""
    deadline = time.monotonic() + 120.0
    while any(more := [now - then for now, then in zip(Holdings.now()[:3], before[:3], strict=True) if now > then]):
        if time.monotonic() > deadline:
            break
        time.sleep(0.1)
    return more


def test_holdings_see_what_is_held(tmp_path: Path) -> None:
    before = settled()
    with (tmp_path / "file").open("w"):
        assert Holdings.now().files == before.files + 1
    assert Holdings.now()[:3] == before[:3]


def test_every_kind_is_in_turn() -> None:
    assert set(ORDER) == set(KINDS)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "worker processes"])
def test_models_leave_nothing_behind(kind: str, tmp_path: Path) -> None:
    cycle(kind, tmp_path)
    before = settled()
    for _ in range(2):
        cycle(kind, tmp_path)
    assert more_than(before) == []


def test_commands_keep_each_others_sections(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that is begun and ended while another one measures."""
    output, page = tmp_path / "r.json", tmp_path / "page.md"
    page.write_text(f"{BEGIN}\n{END}\n")
    line = ["reliability", "--output", str(output), "--page", str(page), "--sections"]
    measured: list[str] = []

    def measure(name: str, _: Any) -> dict[str, Any]:
        measured.append(name)
        if name == "wrong_calls":
            assert main([*line, "faults"]) == 0
        return {**STAMP, **SUITE}

    monkeypatch.setattr(reliability, "_measure", measure)
    assert main([*line, "wrong_calls"]) == 0
    assert measured == ["wrong_calls", "faults"]
    assert json.loads(output.read_text()) == {name: {**STAMP, **SUITE} for name in ("faults", "wrong_calls")}
    assert page.read_text().count("160 wrong calls") == page.read_text().count("160 faults") == 1


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output, page = tmp_path / "results" / "r.json", tmp_path / "page.md"
    page.write_text(f"{BEGIN}\n{END}\n")
    line = f"reliability --sections soak_pendulum --pendulum-steps 1008 --output {output} --page {page}"
    main(line.split())  # whether memory is flat shows in long runs only
    result = json.loads(output.read_text())["soak_pendulum"]
    assert result["steps"] == 1008 and result["finite_weights"] and not result["mujoco_log_written"]
    assert "1,008 steps on Pendulum-v1, 4 environments" in page.read_text()
    written = output.stat().st_mtime_ns
    capsys.readouterr()
    main(line.split())
    assert output.stat().st_mtime_ns == written and "1,008 steps" in capsys.readouterr().out
    assert set(SECTIONS) >= {"kills", "cycles", "soak_pendulum", "soak_hopper", "wrong_calls", "faults"}
