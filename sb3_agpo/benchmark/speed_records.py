"""The CSV file of the ``speed`` command, and the table made of it."""

from __future__ import annotations

import csv
import io
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from itertools import groupby
from pathlib import Path

from sb3_agpo.benchmark import records
from sb3_agpo.benchmark.speed_measures import MEASURES, section_of
from sb3_agpo.benchmark.speed_timing import Case, Medians
from sb3_agpo.benchmark.tables import table

#: how busy the machine was, in a note of circumstances
LOAD = re.compile(r" \(load ([\d.]+)\)")
COLUMNS = ("measure", "task", "n_envs", "threads", "ours", "reference", "ratio")

Results = dict[Case, Medians]


def read(path: Path) -> Results:
    """
    Read what has been measured.

    :param path: the file
    :return: row -> its numbers; none if there is no such file
    :raises ValueError: if it is another kind of file
    """
    if not path.exists():
        return {}
    reader = csv.DictReader(io.StringIO(path.read_text()))
    if tuple(reader.fieldnames or ()) != COLUMNS:
        raise ValueError(f"--output: {path} has the columns {reader.fieldnames}, not {', '.join(COLUMNS)}; give another file")
    return {
        Case(row["measure"], row["task"], int(row["n_envs"]), int(row["threads"])): Medians(
            float(row["ours"]), float(row["reference"])
        )
        for row in reader
    }


def write(path: Path, results: Mapping[Case, Medians]) -> None:
    """
    Write everything that has been measured.

    :param path: the file, whose folder is made
    :param results: row -> its numbers
    """
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(COLUMNS)
    for case, medians in results.items():
        writer.writerow([*case, *(four_digits(value) for value in (*medians, ratio(medians)))])
    path.parent.mkdir(parents=True, exist_ok=True)
    records.replace_file(path, text.getvalue())


def ratio(medians: Medians) -> float:
    """
    Ours divided by the reference.

    :param medians: the two
    :return: the ratio
    """
    return medians.ours / medians.reference


def four_digits(value: float) -> str:
    """
    Write a number with four significant digits, and without an exponent.

    :param value: the number
    :return: the text
    """
    return f"{float(f'{value:.4g}'):.10f}".rstrip("0").rstrip(".")


def tables(results: Mapping[Case, Medians], circumstances: Iterable[str]) -> str:
    """
    Tables of the results, one for each section.

    :param results: row -> its numbers
    :param circumstances: when, where and with what they were measured
    :return: Markdown
    """
    parts = []
    ordered = sorted(results, key=lambda case: list(MEASURES).index(case.measure))
    for section, cases in groupby(ordered, key=section_of):
        rows = [_cells(case, results[case]) for case in cases]
        head = ("measured", "task", "envs", "threads", "ours", "reference", "ratio", "goal", "reached")
        parts.append(f"**{section}**\n\n{table(head, rows)}")
    return "".join(parts) + "".join(f"Measured: {text}.\n" for text in circumstances)


def joined_circumstances(texts: Iterable[str]) -> list[str]:
    """
    Circumstances that differ in the machine's load alone, in one text.

    :param texts: most with ``(load NUMBER)``
    :return: each once, with ``(load LEAST to MOST)``
    """
    loads: dict[str, list[float]] = defaultdict(list)
    for text in texts:
        loads[LOAD.sub("", text)] += [float(load) for load in LOAD.findall(text)]
    spreads = {text: f" (load {min(found):g} to {max(found):g})" if found else "" for text, found in loads.items()}
    return sorted(f"{text}{spread}" for text, spread in spreads.items())


def _cells(case: Case, medians: Medians) -> tuple[str, ...]:
    measure = MEASURES[case.measure]
    goal, value = measure.goal(case), ratio(medians)
    words = f"{measure.ours} / {measure.reference} ({measure.unit})"
    reached = "" if goal is None else "yes" if goal.is_reached(value) else "**no**"
    numbers = (four_digits(medians.ours), four_digits(medians.reference), f"{value:.2f}")
    return words, case.task, str(case.n_envs), str(case.threads), *numbers, str(goal or ""), reached
