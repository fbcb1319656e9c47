"""Figures of the learning benchmark."""

from __future__ import annotations

from collections.abc import Sequence
from math import ceil
from pathlib import Path
from typing import Literal, NamedTuple

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator
from numpy.typing import NDArray

from sb3_agpo.benchmark.results import Results
from sb3_agpo.benchmark.statistics import (
    ScoredRuns,
    bootstrap_interval,
    interquartile_mean,
    mean,
    performance_profile,
    pool,
    score_interval,
)
from sb3_agpo.tracking.figures import FONT, RESOLUTION, thousands

Array = NDArray[np.float64]
LineStyle = Literal["-", "--", ":", "-."]


class Style(NamedTuple):
    """How an algorithm is drawn."""

    label: str
    color: str
    line: LineStyle = "-"
    marker: str = "o"


# The palette of Okabe and Ito, which people of any colour vision can tell apart, and a dark purple; markers differ as well.
# AGPO's defaults match no gradients.
STYLES = {
    "agpo-adaptive": Style("AGPO, matching", "#D55E00", ":", "o"),
    "sac": Style("SAC", "#0072B2", marker="s"),
    "sac-fast": Style("SAC, AGPO's settings", "#56B4E9", marker="D"),
    "tqc": Style("TQC", "#009E73", marker="^"),
    "crossq": Style("CrossQ", "#CC79A7", marker="v"),
    "crossq-fast": Style("CrossQ, settings of AGPO with batch norm.", "#CC79A7", "--", "v"),
    "ppo": Style("PPO", "#E69F00", marker="P"),
    "agpo-correction": Style("AGPO, correction", "#1B7837", "-.", "P"),
    "agpo-four-updates": Style("AGPO, four updates", "#8C510A", "-.", "h"),
    "agpo-batch-norm": Style("AGPO, batch normalisation", "#762A83", "-.", "p"),
    "agpo-analytic": Style("AGPO, analytic, matching", "#000000", ":", "X"),
    "agpo-q": Style("AGPO, critic only, matching", "#7F7F7F", ":", "<"),
    "agpo-adaptive-nomatch": Style("AGPO", "#D55E00", marker="o"),
    "agpo-analytic-nomatch": Style("AGPO, analytic", "#000000", "--", "X"),
    "agpo-q-nomatch": Style("AGPO, critic only", "#7F7F7F", "--", "<"),
    "agpo-adaptive-windows": Style("AGPO, windows alone", "#D55E00", "-.", "o"),
    "agpo-analytic-windows": Style("AGPO, analytic, windows alone", "#000000", "-.", "X"),
    "agpo-q-windows": Style("AGPO, critic only, windows alone", "#7F7F7F", "-.", "<"),
}
# For names that the table does not know, in order; they go on with dashes when the colours are used up.
SPARE_COLORS = ("#000000", "#7F7F7F", "#1B7837", "#6B6B00")
SPARE_LINES: tuple[LineStyle, ...] = ("-", "--", ":", "-.")

TIME_LABELS = {"seconds": "seconds of learning", "cpu_seconds": "processor seconds of learning"}
WIDTH = 10.0  # inches; at 150 dots per inch, text of 11 points is legible where READMEs are shown at half that width


def style_of(algorithm: str, algorithms: Sequence[str]) -> Style:
    """
    How an algorithm is drawn.

    :param algorithm: its name
    :param algorithms: all names in the report, so that those without a style of their own get different ones
    :return: its style
    """
    if algorithm in STYLES:
        return STYLES[algorithm]
    index = [name for name in algorithms if name not in STYLES].index(algorithm)
    line = SPARE_LINES[index // len(SPARE_COLORS) % len(SPARE_LINES)]
    return Style(algorithm, SPARE_COLORS[index % len(SPARE_COLORS)], line, "dhp*"[index % 4])


def labels(results: Results, algorithms: Sequence[str]) -> list[str]:
    """
    Names of algorithms as shown.

    :param results: the runs
    :param algorithms: names in the CSV file
    :return: names in tables and legends
    """
    return [style_of(algorithm, results.algorithms).label for algorithm in algorithms]


def _draw(axes: Axes, x: Array, center: Array, band: tuple[Array, Array] | None, style: Style) -> None:
    """
    Draw one curve.

    :param axes: to draw on
    :param x: horizontal positions, shape ``(n,)``
    :param center: shape ``(n,)``
    :param band: lower and upper bounds, each of shape ``(n,)``
    :param style: how
    """
    if band is not None:
        axes.fill_between(x, *band, color=style.color, alpha=0.18, linewidth=0)
    every = max(1, ceil(len(x) / 6))
    axes.plot(x, center, style.line, color=style.color, linewidth=1.8, marker=style.marker, markersize=4.5, markevery=every)


def _legend_columns(algorithms: Sequence[str], names: Sequence[str], width: float) -> int:
    """
    Columns of the legend, so that it is no wider than the figure.

    :param algorithms: those that are drawn
    :param names: all names in the report
    :param width: of the figure, in inches
    :return: their number, 1 to 4
    """
    longest = max(len(style_of(algorithm, names).label) for algorithm in algorithms)
    entry = 0.9 + 0.085 * longest  # inches: the line, space, and letters of 11 points
    return max(1, min(4, len(algorithms), int(width / entry)))


def _legend(figure: Figure, algorithms: Sequence[str], names: Sequence[str]) -> None:
    """
    Write a legend above everything.

    :param figure: gets it
    :param algorithms: those that are drawn
    :param names: all names in the report
    """
    handles = []
    for algorithm in algorithms:
        style = style_of(algorithm, names)
        line = mpl.lines.Line2D([], [], color=style.color, linestyle=style.line, marker=style.marker, linewidth=1.8)
        line.set_label(style.label)
        handles.append(line)
    n_columns = _legend_columns(algorithms, names, figure.get_figwidth())
    # Matplotlib fills columns, people read rows.
    handles = [handle for column in range(n_columns) for handle in handles[column::n_columns]]
    figure.legend(handles=handles, handlelength=2.8, ncols=n_columns, loc="outside upper center")


def _draw_scores(axes: Axes, results: Results, algorithm: str, style: Style) -> None:
    """
    Draw the interquartile mean of normalised scores of all tasks against the used-up fraction of the budget.

    :param axes: to draw on
    :param results: the runs
    :param algorithm: its name, one with runs on all scored tasks
    :param style: how
    """
    tasks = results.scored_tasks
    first = max(curve.steps[0] / results.budgets[task] for task in tasks for curve in results.curves[algorithm][task])
    fractions = np.arange(1, 21) / 20
    fractions = fractions[fractions >= first]
    runs = []
    for task in tasks:
        returns = results.matrix(algorithm, task, fractions * results.budgets[task])
        runs.append(results.scored(algorithm, task, returns[np.isfinite(returns).all(axis=1)]))
    band = score_interval(runs, interquartile_mean) if max(len(of_task.returns) for of_task in runs) > 1 else None
    center = interquartile_mean(pool([of_task.scores() for of_task in runs]))
    _draw(axes, 100 * fractions, center, band, style)


def _draw_task(axes: Axes, results: Results, algorithm: str, task: str, time: str | None, style: Style) -> None:
    """
    Draw the mean return of an algorithm on a task.

    :param axes: to draw on
    :param results: the runs
    :param algorithm: its name
    :param task: its name
    :param time: column of the horizontal axis, its mean over seeds; None: environment steps
    :param style: how
    """
    steps = results.grid(algorithm, task)
    if not len(steps):
        return
    returns = results.matrix(algorithm, task, steps)
    # Where an unfinished run has ended, the mean of the others would be one of other seeds.
    known = np.isfinite(returns).all(axis=0)
    steps, returns = steps[known], returns[:, known]
    x = steps if time is None else mean(results.matrix(algorithm, task, steps, time))
    _draw(axes, x, mean(returns), bootstrap_interval([returns], mean) if len(returns) > 1 else None, style)


def _finish_task(axes: Axes, task: str, time: str | None) -> None:
    """
    Label the panel of a task.

    :param axes: the panel
    :param task: its name
    :param time: column of the horizontal axis, None: environment steps
    """
    axes.set_title(task.removesuffix("-v5"), fontsize="medium")  # the longest name fits
    axes.yaxis.set_major_locator(MaxNLocator(5))
    axes.yaxis.set_major_formatter(FuncFormatter(thousands))
    axes.grid(alpha=0.25)
    if time is None:
        axes.set_xlim(left=0)
        axes.xaxis.set_major_locator(MaxNLocator(4, steps=[1, 2, 2.5, 5, 10]))
    else:
        axes.set_xscale("log")
        axes.xaxis.set_minor_formatter(mpl.ticker.NullFormatter())
    axes.xaxis.set_major_formatter(FuncFormatter(thousands))


def learning_curves(results: Results, algorithms: Sequence[str], path: Path, time: str | None = None) -> None:
    """
    Draw returns against environment steps or time: one panel per task, means over seeds with 95 % bootstrap intervals.

    Against steps, a first panel shows the interquartile mean of normalised scores over all tasks.

    :param results: the runs
    :param algorithms: those to be drawn
    :param path: PNG file to be written
    :param time: column for the horizontal axis, ``seconds`` or ``cpu_seconds``; None: environment steps
    """
    with mpl.rc_context(FONT):
        scores = time is None and len(results.scored_tasks) > 1
        n_panels = len(results.tasks) + scores
        n_columns = n_panels if n_panels <= 4 else min((4, 3), key=lambda columns: -n_panels % columns)  # few empty places
        n_rows = ceil(n_panels / n_columns)
        legend_rows = ceil(len(algorithms) / _legend_columns(algorithms, results.algorithms, WIDTH))
        height = 2.5 * n_rows + 0.28 * legend_rows + 0.35
        figure = Figure(figsize=(WIDTH, height), layout="constrained")
        panels = list(figure.subplots(n_rows, n_columns, squeeze=False).flat)
        for axes in panels[n_panels:]:
            axes.set_axis_off()
        drawn = [(algorithm, style_of(algorithm, results.algorithms)) for algorithm in reversed(algorithms)]
        if scores:
            axes = panels.pop(0)
            for algorithm, style in drawn:
                if not results.complete(algorithm):
                    continue  # a mean over other tasks is no comparison
                _draw_scores(axes, results, algorithm, style)
            axes.axhline(1, color="black", linewidth=0.8, linestyle=":")
            axes.set_title("All tasks, score", fontsize="medium")
            axes.set_xlim(left=0)
            axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g} %"))
            axes.grid(alpha=0.25)
        for axes, task in zip(panels, results.tasks, strict=False):
            for algorithm, style in drawn:
                _draw_task(axes, results, algorithm, task, time, style)
            _finish_task(axes, task, time)
        figure.supxlabel("environment steps" if time is None else TIME_LABELS[time], fontsize=11)
        figure.supylabel("return", fontsize=11)
        _legend(figure, algorithms, results.algorithms)
        figure.savefig(path, dpi=RESOLUTION)


def profile_of(tasks: Sequence[ScoredRuns], thresholds: Array) -> tuple[Array, tuple[Array, Array] | None]:
    """
    The performance profile of an algorithm.

    :param tasks: its final returns on each task
    :param thresholds: scores, shape ``(n,)``
    :return: fraction of runs above each of them, shape ``(n,)``, and its 95 % interval; None for single runs
    """

    def fractions(scores: Array, axis: int) -> Array:
        return performance_profile(scores, thresholds, axis)

    band = score_interval(tasks, fractions) if max(len(of_task.returns) for of_task in tasks) > 1 else None
    return fractions(pool([of_task.scores() for of_task in tasks]), 0), band


def profile(results: Results, algorithms: Sequence[str], path: Path) -> None:
    """
    Draw performance profiles: the fraction of runs above each normalised score, with 95 % bootstrap intervals.

    :param results: the runs
    :param algorithms: those to be drawn, if they have runs on all scored tasks; the baseline must be among them
    :param path: PNG file to be written
    """
    with mpl.rc_context(FONT):
        figure = Figure(figsize=(WIDTH * 0.75, 4.2), layout="constrained")
        axes = figure.subplots()
        scores = {algorithm: results.scores(algorithm) for algorithm in algorithms if results.complete(algorithm)}
        # A single outlier must not squeeze the rest together.
        right = max(1.5, float(np.quantile(np.concatenate([np.concatenate(s) for s in scores.values()]), 0.97)))
        thresholds = np.linspace(0, right, 121)
        for algorithm in reversed(scores):
            center, band = profile_of(results.final_runs(algorithm), thresholds)
            _draw(axes, thresholds, center, band, style_of(algorithm, results.algorithms))
        axes.axvline(1, color="black", linewidth=0.8, linestyle=":")
        axes.set_xlim(0, right)
        axes.set_ylim(0, 1.02)
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:g} %"))
        baseline = style_of(results.baseline, results.algorithms).label
        axes.set_xlabel(f"normalised score at the end of the budget (0: random policy, 1: {baseline})")
        axes.set_ylabel("runs with a higher score")
        axes.grid(alpha=0.25)
        _legend(figure, list(scores), results.algorithms)
        figure.savefig(path, dpi=RESOLUTION)
