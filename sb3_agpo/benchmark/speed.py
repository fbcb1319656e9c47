"""The ``speed`` command: what AGPO costs, beside what it is to be compared with, measured side by side."""

from __future__ import annotations

import argparse
import datetime
import json
import os
from pathlib import Path

from tqdm import tqdm

from sb3_agpo.benchmark import records
from sb3_agpo.benchmark.speed_measures import MEASURES, SECTIONS
from sb3_agpo.benchmark.speed_records import joined_circumstances, read, tables, write
from sb3_agpo.benchmark.speed_timing import Case, Effort, torch_threads
from sb3_agpo.dynamics.mujoco import FiniteDifferences

OUTPUT = Path("docs/benchmarks/speed.csv")
PAGE = Path("docs/performance.md")
CLOCKS = ("auto", "wall")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """
    Define the command's options.

    :param parser: gets them
    """
    add = parser.add_argument
    add("--sections", nargs="+", default=list(SECTIONS), metavar="NAME", help=f"from {', '.join(SECTIONS)} (default: all)")
    add("--tasks", nargs="+", metavar="ID", help="only rows of these environments (default: all)")
    add("--n-envs", nargs="+", type=int, metavar="N", help="only rows with so many environments (default: all)")
    add("--threads", nargs="+", type=int, metavar="N", help="numbers of threads (default: 1, and 2 if there are two cores)")
    add("--seconds", type=float, default=2.0, help="time to spend on a row, at least (default: 2)")
    add(
        "--clock",
        choices=CLOCKS,
        default="auto",
        help="auto: CPU time of the process for one thread, which other programs disturb little, and the wall clock for more "
        "threads and other processes; wall: the wall clock for all (default: auto)",
    )
    add("--output", type=Path, help=f"CSV file of results, added to (default: {OUTPUT})")
    add("--page", type=Path, help=f"page whose table is written anew, if it exists (default: {PAGE})")
    add("--redo", action="store_true", help="measure rows again that the file already has")
    add("--quick", action="store_true", help="a look at whether everything works; needs an --output of its own")


def _check(options: argparse.Namespace) -> None:
    """
    Refuse options that make no sense.

    :param options: of the command line
    :raises ValueError: with what to change
    """
    if unknown := sorted(set(options.sections) - set(SECTIONS)):
        raise ValueError(f"--sections: there is no '{unknown[0]}'; choose from {', '.join(SECTIONS)}")
    for name in ("n_envs", "threads"):
        if any(count < 1 for count in getattr(options, name) or ()):
            raise ValueError(f"--{name.replace('_', '-')} is {getattr(options, name)}; give numbers of 1 or more")
    if options.seconds <= 0:
        raise ValueError(f"--seconds is {options.seconds}; give a positive number")
    if options.output is not None and options.output.suffix != ".csv":
        raise ValueError(f"--output is {options.output}; give the name of a file that ends in .csv")
    if options.quick and options.output is None:
        raise ValueError(f"--quick results are no results: keep them out of {OUTPUT} with an --output of their own")


def plan(options: argparse.Namespace) -> list[Case]:
    """
    Choose the rows to measure.

    :param options: of the command line
    :return: the rows
    :raises ValueError: if there are none
    """
    threads = options.threads or [count for count in (1, 2) if count <= FiniteDifferences().n_threads]
    cases = [case for name in SECTIONS if name in options.sections for case in SECTIONS[name](threads)]
    for name, wanted in (("task", options.tasks), ("n_envs", options.n_envs)):
        if wanted is not None:
            cases = [case for case in cases if getattr(case, name) in wanted]
    if not cases:
        raise ValueError("no row is left by --sections, --tasks, --n-envs and --threads; leave one of them out")
    return list(dict.fromkeys(cases))


def main(options: argparse.Namespace) -> int:
    """
    Measure the rows that are missing, each written down as soon as it is measured.

    :param options: of the command line
    :return: exit code
    """
    _check(options)
    cases, output = plan(options), (options.output or OUTPUT).absolute()
    page = options.page or (None if options.output else PAGE)
    results, notes = read(output), output.with_suffix(".json")
    missing = [case for case in cases if options.redo or case not in results]
    least, seconds = (2, 0.0) if options.quick else (5, options.seconds)
    effort = Effort(seconds, least, always_wall=options.clock == "wall", quick=options.quick)
    with torch_threads(1):
        for case in tqdm(missing, desc="speed", unit="row"):
            medians = MEASURES[case.measure].measure(case, effort)
            with records.locked(output):  # another command may have added rows meanwhile
                results = read(output) | {case: medians}
                remember(notes, case, options.clock)
                write(output, results)
    texts = joined_circumstances(_read_notes(notes).values())
    if page is not None:
        with records.locked(output):
            records.update_page(page.absolute(), "speed", tables(read(output), texts))
    print(tables({case: results[case] for case in cases}, texts))
    return 0


def remember(path: Path, case: Case, clock: str) -> None:
    """
    Note when, where and with what a row was measured, which the CSV file has no room for.

    :param path: JSON file beside the CSV file
    :param case: the row
    :param clock: the option
    """
    versions = ", ".join(f"{name} {version}" for name, version in records.versions().items())
    date = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d")
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else float("nan")
    machine = f"{records.machine()} (load {load:.1f})"
    text = f"{date}, commit {records.git_commit()}, {machine}, clock {clock}, {versions}"
    known = _read_notes(path) | {" ".join(map(str, case)): text}
    records.replace_file(path, json.dumps(known, indent=1) + "\n")


def _read_notes(path: Path) -> dict[str, str]:
    """Circumstances of all rows, by the row; none if there is no file yet."""
    known: dict[str, str] = json.loads(path.read_text()) if path.exists() else {}
    return known
