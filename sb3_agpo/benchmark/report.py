"""The ``report`` command: tables and figures from the CSV file of the learning benchmark."""

from __future__ import annotations

import argparse
import functools
import shlex
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from sb3_agpo.benchmark import figures, records
from sb3_agpo.benchmark.algorithms import VARIANTS, find_algorithm
from sb3_agpo.benchmark.costs import TIMES
from sb3_agpo.benchmark.figures import labels
from sb3_agpo.benchmark.reading import load
from sb3_agpo.benchmark.records import BUDGETS, DEFAULT_FILE, VERSION_COLUMNS, Row, settings_path
from sb3_agpo.benchmark.results import ABLATIONS, BASELINE, ORDER, RANDOM, Results
from sb3_agpo.benchmark.summary import MARKER, check_page, update_summary
from sb3_agpo.benchmark.tables import NONE, estimated_mean, estimated_score, highlighted, number, table

#: AGPO among the others: with and without gradient matching
MAIN_VARIANTS = ("agpo-adaptive", "agpo-adaptive-nomatch")

#: learning curves beside the summary of ``--page``: of all algorithms but variants, those with few runs included
SUMMARY_PICTURE = "learning_summary.png"

REACHED_TABLES = {
    "steps": "Environment steps",
    "simulator_calls": "Simulated steps, finite differences included",
    "seconds": "Seconds of learning",
    "cpu_seconds": "Processor seconds of learning",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """
    Define the command's options.

    :param parser: gets them
    """
    add = parser.add_argument
    default = DEFAULT_FILE.parent
    add("--input", type=Path, default=DEFAULT_FILE, help="CSV file that 'learning' wrote (default: %(default)s)")
    add("--output", type=Path, default=default, help="folder for report.md and the figures (default: %(default)s)")
    add("--baseline", default=BASELINE, help="algorithm with a normalised score of 1 (default: %(default)s)")
    add("--algorithms", nargs="+", metavar="NAME", help="algorithms to show besides the baseline (default: all)")
    add(
        "--time",
        choices=TIMES,
        default="seconds",
        help="clock of the figure and of --page (default: %(default)s)",
    )
    add("--costs", type=Path, help="CSV file of short runs made side by side: times are steps times the cost of one there")
    add("--steps", type=int, help="compare runs after so many environment steps, or at their end if that is sooner")
    add(
        "--page",
        type=Path,
        help=f"page to write a summary into, without variants, between the lines {' and '.join(records.markers(MARKER))}; "
        f"its picture is {SUMMARY_PICTURE} beside the report",
    )
    add("--live", action="store_true", help="use unfinished runs as well, for curves")


def names_in_file(results: Results, algorithms: Sequence[str]) -> str:
    """
    Say what the shown algorithms are called in the CSV file.

    :param results: the runs
    :param algorithms: names in the CSV file
    :return: Markdown
    """
    pairs = zip(labels(results, algorithms), algorithms, strict=True)
    return f"In the CSV file, {', '.join(f'{label} is `{name}`' for label, name in pairs)}.\n\n"


def final_table(results: Results, algorithms: Sequence[str]) -> str:
    """
    Returns at the end of the budget, task by task, and the interquartile mean of normalised scores.

    :param results: the runs
    :param algorithms: columns
    :return: Markdown
    """
    rows = []
    for task in results.tasks:
        finals = [results.final(algorithm, task) for algorithm in algorithms]
        texts = [f"{estimated_mean(final)} ({len(final)})" if len(final) else NONE for final in finals]
        title = f"{task}, {results.budgets[task] / 1000:g}k steps"
        rows.append([title, *highlighted(texts, finals), number(results.random.get(task, np.nan))])
    if results.scored_tasks:
        scores = [results.scores(algorithm) for algorithm in algorithms]
        n_tasks = len(results.scored_tasks)
        rows.append(["IQM of scores", *(estimated_score(results.final_runs(algorithm)) for algorithm in algorithms), "0"])
        rows.append(["tasks, runs in the IQM", *(f"{len(s)}/{n_tasks}, {sum(map(len, s))}" for s in scores), NONE])
    return table(["Task", *labels(results, algorithms), "Random"], rows)


def reached_table(results: Results, algorithms: Sequence[str], quantity: str) -> str:
    """
    What it took to reach the baseline's final return.

    :param results: the runs
    :param algorithms: columns
    :param quantity: field of :class:`Reached`
    :return: Markdown
    """
    tasks = [task for task in results.tasks if results.reach(results.baseline, task)]
    ratios: dict[str, list[float]] = defaultdict(list)
    rows = []
    for task in tasks:
        own = results.reach(results.baseline, task)
        cells = [task]
        for algorithm in algorithms:
            if not len(results.final(algorithm, task)):
                cells.append(NONE)
                continue
            reached = results.reach(algorithm, task)
            ratio = getattr(reached, quantity) / max(getattr(own, quantity), 1e-9) if reached else np.inf
            ratios[algorithm].append(ratio)
            cells.append(f"{getattr(reached, quantity):,.0f} ({number(ratio)}x)" if reached else "not reached")
        rows.append(cells)
    counts = [f"{sum(np.isfinite(ratios[name]))}/{len(ratios[name])}" if ratios[name] else NONE for name in algorithms]
    medians = [float(np.median(ratios[name])) if ratios[name] else np.nan for name in algorithms]
    rows.append(["tasks on which it was reached", *counts])
    rows.append(["median ratio", *(f"{number(median)}x" if np.isfinite(median) else NONE for median in medians)])
    return table(["Task", *labels(results, algorithms)], rows)


@functools.cache
def stock_settings(algorithm: str) -> str:
    """
    Identify the settings that an algorithm has in the benchmark unless they are changed.

    :param algorithm: its name
    :return: their hash; empty for a name that is not the benchmark's
    """
    return find_algorithm(algorithm).settings_hash() if algorithm in ORDER else ""


def is_stock(row: Row) -> bool:
    """
    Whether a row is of an algorithm as the benchmark has it, which its name alone makes again.

    :param row: an evaluation
    :return: whether its settings are those of the name
    """
    return row["settings"] == stock_settings(row["algorithm"])


def learning_commands(rows: Sequence[Row], output: Path) -> list[str]:
    """
    The commands that make the rows again.

    :param rows: evaluations
    :param output: file that they go to
    :return: one command for each budget, evaluation interval and number of threads; changed algorithms have none
    """
    groups: dict[tuple[str, str, str], list[Row]] = defaultdict(list)
    for row in rows:
        if is_stock(row):
            default = str(BUDGETS.get(row["env"])) == row["budget"]
            groups["" if default else row["budget"], row["eval_every"], row["threads"]].append(row)
    with_random = any(row["algorithm"] == RANDOM for row in rows)
    commands = []
    for (steps, every, threads), group in sorted(groups.items()):
        found = {column: {row[column] for row in group} for column in ("algorithm", "env", "seed")}
        names = [RANDOM] * with_random + [name for name in ORDER if name in found["algorithm"]]
        parts = ["python -m sb3_agpo.benchmark learning --algorithms", *names]
        parts += ["--envs", *sorted(found["env"]), "--seeds", *sorted(found["seed"], key=int)]
        parts += ["--steps", steps] if steps else []
        parts += ["--eval-every", every] if every != "5000" else []
        parts += ["--threads", threads] if threads != "1" else []
        parts += ["--output", shlex.quote(str(output))] if output != DEFAULT_FILE else []
        commands.append(" ".join(parts))
    return commands


def circumstances(results: Results, command: str) -> str:
    """
    How the results were made.

    :param results: the runs
    :param command: that made the report
    :return: Markdown
    """
    rows = [
        [column, ", ".join(sorted({row[column] for row in results.rows}))]
        for column in (*VERSION_COLUMNS, "git_commit", "machine", "threads")
    ]
    versions = "".join(f"| {name} | {value} |\n" for name, value in rows)
    text = "```\n" + "\n".join([*learning_commands(results.rows, results.source), command]) + "\n```\n\n"
    if changed := sorted(
        {(row["algorithm"], row["settings"]) for row in results.rows if row["algorithm"] != RANDOM and not is_stock(row)}
    ):
        named = ", ".join(f"`{name}` ({settings})" for name, settings in changed)
        text += (
            f"Of other settings than today's, which `{settings_path(results.source).name}` has by these hashes: {named}.\n\n"
        )
    return f"{text}| | |\n| --- | --- |\n{versions}\n"


def write_figures(results: Results, algorithms: Sequence[str], folder: Path, time: str) -> list[tuple[str, str]]:
    """
    Draw all figures.

    :param results: the runs
    :param algorithms: those to be drawn
    :param folder: for the PNG files
    :param time: column for the time axis
    :return: file name and caption of each
    """
    pictures = [("learning_steps.png", "Return against environment steps: mean over seeds, 95 % bootstrap interval")]
    figures.learning_curves(results, algorithms, folder / pictures[0][0])
    pictures.append(("learning_seconds.png", f"Return against {figures.TIME_LABELS[time]}, logarithmic scale"))
    figures.learning_curves(results, algorithms, folder / pictures[1][0], time)
    if results.complete(results.baseline):
        pictures.append(("learning_profile.png", "Performance profile: fraction of runs above a normalised score"))
        figures.profile(results, algorithms, folder / pictures[2][0])
    return pictures


def main_algorithms(results: Results) -> list[str]:
    """
    The algorithms to be compared with each other: all but those of the ablation, if there are others, and the baseline.

    :param results: the runs
    :return: their names
    """
    shown = {name for name in results.algorithms if name not in ABLATIONS or name in MAIN_VARIANTS}
    if not shown - {results.baseline}:
        return results.algorithms
    return [name for name in results.algorithms if name in {*shown, results.baseline}]


def write(results: Results, folder: Path, time: str, command: str) -> Path:
    """
    Write the report and its figures.

    :param results: the runs
    :param folder: where to
    :param time: column for the time axis
    :param command: that makes the report again
    :return: the Markdown file
    """
    folder.mkdir(parents=True, exist_ok=True)
    algorithms = main_algorithms(results)
    baseline = labels(results, [results.baseline])[0]
    pictures = [f"![{caption}]({name})\n\n" for name, caption in write_figures(results, algorithms, folder, time)]
    parts = [
        "# Learning benchmark\n\n",
        "Returns are undiscounted means of deterministic episodes in an environment of their own with the same initial states "
        "for every algorithm, 5 per evaluation and 10 at the end. Brackets are 95 % bootstrap intervals over seeds, resampled "
        f"within tasks, for scores {baseline}'s runs too. With three seeds they are too narrow: in simulations with means and "
        "deviations as in this benchmark, those of IQMs held the true value 87 to 89 times out of 100, those of single tasks' "
        "means 81 times (61 with two seeds). A normalised score is 0 at the random "
        f"policy's return and 1 at {baseline}'s mean final return, so that its own IQM is 1 by definition, or nearly so. IQM "
        "is the interquartile mean over runs and tasks, with the same weight for each task. Times are those of learning "
        f"alone, evaluations left out{_reckoned(results)}.\n\n",
        names_in_file(results, algorithms),
        "## Final return\n\nAfter the steps named: mean, interval and, in parentheses, number of seeds.\n\n",
        final_table(results, algorithms),
        *pictures[2:],
        f"## What it takes to reach {baseline}'s final return\n\n"
        "The first evaluation at which the mean over seeds reaches it, and in parentheses the ratio to what "
        f"{baseline} itself took to get there first. A task on which it was not reached counts as infinity in the median.\n\n",
        *(f"{title}:\n\n{reached_table(results, algorithms, name)}" for name, title in REACHED_TABLES.items()),
        "## Learning curves\n\n",
        *pictures[:2],
    ]
    ablation = [name for name in results.algorithms if name in ABLATIONS]
    if len(ablation) > 1:
        parts += ["## Ablation\n\nGradients of the policy, with and without matching of the critic's derivatives.\n\n"]
        parts += [names_in_file(results, ablation), final_table(results, ablation)]
    if results.notes:
        parts += ["## What is missing or to be known\n\n", *(f"- {note}\n" for note in results.notes), "\n"]
    parts += ["## How it was made\n\n", circumstances(results, command)]
    path = folder / "report.md"
    path.write_text("".join(parts).rstrip() + "\n")
    return path


def _reckoned(results: Results) -> str:
    """Where times come from, if not from the runs themselves."""
    return f": steps times what one cost in short runs made side by side (`{results.costs.name}`)" if results.costs else ""


def main(options: argparse.Namespace) -> int:
    """
    Run the command.

    :param options: of the command line
    :return: exit code 0
    :raises ValueError: if there is nothing to report, or options do not fit
    """
    results = load(options.input, options.baseline, options.algorithms, options.live, options.steps, options.costs)
    if not results.curves:
        raise ValueError(f"{options.input} has no runs to report with these options; see 'learning' to make some")
    command = ["python", "-m", "sb3_agpo.benchmark", "report", "--input", str(options.input), "--output", str(options.output)]
    command += ["--baseline", options.baseline] if options.baseline != BASELINE else []
    command += ["--algorithms", *options.algorithms] if options.algorithms else []
    command += ["--time", options.time] if options.time != "seconds" else []
    command += ["--costs", str(options.costs)] if options.costs else []
    command += ["--steps", str(options.steps)] if options.steps is not None else []
    command += ["--page", str(options.page)] if options.page else []
    command += ["--live"] if options.live else []
    if options.page:
        check_page(options.page)
    if options.output.exists() and not options.output.is_dir():
        raise ValueError(f"--output: {options.output} is a file; give a folder")
    path = write(results, options.output, options.time, shlex.join(command))
    if options.page:
        shown = [name for name in main_algorithms(results) if name not in VARIANTS or name == results.baseline]
        complete = [name for name in shown if results.complete(name)]
        update_summary(options.page, results, complete or shown, options.time)
        figures.learning_curves(results, shown, options.output / SUMMARY_PICTURE)
    for note in results.notes:
        print(f"note: {note}")
    print(f"wrote {path}")
    return 0
