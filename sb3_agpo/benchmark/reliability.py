"""The ``reliability`` command: kill, repeat, soak and misuse AGPO for real, and write down what came of it."""

from __future__ import annotations

import argparse
import datetime
import json
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from tqdm import tqdm

from sb3_agpo.benchmark import records
from sb3_agpo.benchmark.reliability_cycles import run_cycles
from sb3_agpo.benchmark.reliability_kills import kill_again_and_again
from sb3_agpo.benchmark.reliability_soak import SOAKS, run_soak
from sb3_agpo.command_line import check_at_least

#: told how much is done
Notify = Callable[[int], None]

OUTPUT = Path("docs/benchmarks/reliability.json")
PAGE = Path("docs/reliability.md")
#: tests, one per case, that the sections of the same name run and count
SUITES = {"wrong_calls": "test_wrong_calls.py", "faults": "test_faults.py"}
SECTIONS = ("wrong_calls", "faults", "kills", "cycles", *SOAKS)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """
    Define the command's options.

    :param parser: gets them
    """
    add = parser.add_argument
    add("--sections", nargs="+", default=list(SECTIONS), metavar="NAME", help=f"from {', '.join(SECTIONS)} (default: all)")
    add("--kills", type=int, default=60, help="processes to kill (default: 60)")
    add("--cycles", type=int, default=200, help="models to make, train and close (default: 200)")
    add("--pendulum-steps", type=int, default=300_000, help="steps of the long run on Pendulum (default: 300000)")
    add("--hopper-steps", type=int, default=100_000, help="steps of the long run on Hopper (default: 100000)")
    add("--output", type=Path, default=OUTPUT, help=f"JSON file of results, added to (default: {OUTPUT})")
    add("--page", type=Path, default=PAGE, help=f"page whose table is written anew, if it exists (default: {PAGE})")
    add("--redo", action="store_true", help="redo sections that the file already has")


def _check(options: argparse.Namespace) -> None:
    """
    Refuse options that make no sense.

    :param options: of the command line
    :raises ValueError: with what to change
    """
    if unknown := sorted(set(options.sections) - set(SECTIONS)):
        raise ValueError(f"--sections: there is no '{unknown[0]}'; choose from {', '.join(SECTIONS)}")
    check_at_least(2, options, "kills")
    check_at_least(1, options, "cycles")
    check_at_least(1000, options, "pendulum_steps", "hopper_steps")
    if options.output.suffix != ".json":
        raise ValueError(f"--output is {options.output}; give the name of a file that ends in .json")


def main(options: argparse.Namespace) -> int:
    """
    Do the sections that are missing, each written down as soon as it is done.

    :param options: of the command line
    :return: exit code, 1 if something did not hold
    """
    _check(options)
    output, page = options.output.absolute(), options.page.absolute()
    results = _read(output)
    for name in options.sections:
        if name not in results or options.redo:
            result = _measure(name, options)
            with records.locked(output):  # another command may have added sections meanwhile
                results = _read(output) | {name: result}
                records.replace_file(output, json.dumps(results, indent=1) + "\n")
                records.update_page(page, "reliability", markdown(results))
    print(markdown(results))
    return 0 if all(held(name, results[name]) for name in options.sections) else 1


def _read(output: Path) -> dict[str, Any]:
    """Figures of all sections that are done; none if there is no file yet."""
    found: dict[str, Any] = json.loads(output.read_text()) if output.exists() else {}
    return found


def _measure(name: str, options: argparse.Namespace) -> dict[str, Any]:
    """Do one section in a folder of its own, and note the circumstances."""
    # Before it starts: hours later the code on the disk may be another
    start, commit = time.perf_counter(), records.git_commit()
    with tempfile.TemporaryDirectory(prefix="sb3_agpo_reliability") as folder:
        result = _section(name, options)(Path(folder))
    return {
        **result,
        "seconds": round(time.perf_counter() - start, 1),
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d"),
        "commit": commit,
        "machine": records.machine(),
        **records.versions(),
    }


def _section(name: str, options: argparse.Namespace) -> Callable[[Path], dict[str, Any]]:
    """The function that does a section."""
    if name in SUITES:
        return lambda folder: run_suite(SUITES[name], folder)
    total, work = _long_work(name, options)
    return lambda folder: _with_bar(name, total, partial(work, folder))


def _long_work(name: str, options: argparse.Namespace) -> tuple[int, Callable[[Path, Notify], dict[str, Any]]]:
    """How much there is to do in a section that takes long, and the function that does it."""
    if name == "kills":
        count = options.kills
        return count, lambda folder, notify: kill_again_and_again(folder / "checkpoints", count, notify).summary()
    if name == "cycles":
        return options.cycles, lambda folder, notify: run_cycles(folder, options.cycles, notify)
    steps = options.pendulum_steps if name == "soak_pendulum" else options.hopper_steps
    return steps, lambda folder, notify: run_soak(SOAKS[name], folder, steps, notify)


def _with_bar(name: str, total: int, work: Callable[[Notify], dict[str, Any]]) -> dict[str, Any]:
    """Do work that tells how far it is."""
    with tqdm(total=total, desc=name, mininterval=10.0) as bar:
        return work(lambda done: bar.update(done - bar.n) and None)


def run_suite(file: str, folder: Path) -> dict[str, Any]:
    """
    Run a file of tests and count its cases.

    :param file: name of the file in ``tests``
    :param folder: for the report
    :return: figures for the record
    :raises ValueError: outside of a checkout, which has the tests
    """
    path = Path(__file__).resolve().parents[2] / "tests" / file
    if not path.is_file():
        raise ValueError(f"--sections: {path} does not exist; run this in a checkout of the repository, which has the tests")
    report = folder / "report.xml"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(path), f"--junitxml={report}"]
    subprocess.run(command, cwd=path.parents[1], check=False)
    suite = ElementTree.parse(report).getroot().find("testsuite")
    assert suite is not None
    counts = {name: int(suite.get(name, 0)) for name in ("tests", "failures", "errors", "skipped")}
    return {"tried": counts["tests"] - counts["skipped"], "wrong": counts["failures"] + counts["errors"], **counts}


# ---------------------------------------------------------------------- what came of it


def held(name: str, result: Mapping[str, Any]) -> bool:
    """
    Whether a section's promise held.

    :param name: of the section
    :param result: its figures
    :return: whether it did
    """
    if name in SUITES:
        return result["tried"] > 0 and result["wrong"] == 0
    if name == "kills":
        whole = result["corrupt_checkpoints"] == 0 and result["equal_to_an_uninterrupted_run"]
        return whole and result["most_steps_lost"] <= result["steps_between_checkpoints"]
    leaks = any(result[f"{kind}_after"] > result[f"{kind}_before"] for kind in ("threads", "files"))
    if name == "cycles":
        return not leaks and result["children_after"] <= result["children_before"]
    flat = result["memory_most_mb"] <= 1.05 * result["memory_after_warm_up_mb"]
    return bool(not leaks and flat and result["finite_weights"])


def _tell(name: str, result: Mapping[str, Any]) -> tuple[str, str]:
    """What was tried and what came of it, in words."""
    if name == "wrong_calls":
        return f"{result['tried']} wrong calls", f"{result['tried'] - result['wrong']} refused as documented"
    if name == "faults":
        return f"{result['tried']} faults of environments, simulators and disks", f"{result['wrong']} handled wrongly"
    if name == "kills":
        tried = f"{result['killed']} processes killed with SIGKILL, {result['killed_during_a_checkpoint']} in a checkpoint"
        same = "equals" if result["equal_to_an_uninterrupted_run"] else "differs from"
        return tried, (
            f"{result['corrupt_checkpoints']} corrupt checkpoints; at most {result['most_steps_lost']} steps lost, with "
            f"{result['steps_between_checkpoints']} between checkpoints; the run {same} an uninterrupted one, bit for bit"
        )
    changes = "; ".join(
        f"{kind} {result[f'{kind}_before']} → {result[f'{kind}_after']}"
        for kind in ("threads", "files", "children")
        if f"{kind}_before" in result
    )
    if name == "cycles":
        memory = f"{result['memory_mb_before']:.0f} → {result['memory_mb_after']:.0f} MB"
        return f"{result['cycles']} models made, trained and closed", f"{changes}; memory {memory}"
    return f"{result['steps']:,} steps on {result['env']}, {result['n_envs']} environments", (
        f"memory {result['memory_after_warm_up_mb']:.0f} MB after the warm-up, {result['memory_at_the_end_mb']:.0f} MB at the "
        f"end, {result['memory_most_mb']:.0f} MB at most ({result['memory_slope_mb_per_100k_steps']:+.1f} MB per 100k steps); "
        f"{changes}"
    )


def markdown(results: Mapping[str, Any]) -> str:
    """
    A table of the results.

    :param results: section -> figures
    :return: Markdown
    """
    names = [name for name in SECTIONS if name in results]
    lines = ["| tried | what came of it | holds |", "|---|---|---|"]
    for name in names:
        lines.append(f"| {' | '.join(_tell(name, results[name]))} | {'yes' if held(name, results[name]) else '**no**'} |")
    circumstances = sorted({f"{results[name]['date']}, commit {results[name]['commit']}" for name in names})
    return "\n".join([*lines, "", f"Measured: {'; '.join(circumstances)}."])
