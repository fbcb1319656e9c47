"""Figure of the fidelity benchmark: agreement with the reference against the horizon."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter, NullLocator

from sb3_agpo.benchmark.fidelity_metrics import ReferenceQuality
from sb3_agpo.benchmark.fidelity_windows import ANALYTIC, CORRECTED, CRITIC
from sb3_agpo.benchmark.figures import WIDTH
from sb3_agpo.benchmark.records import Row
from sb3_agpo.tracking.figures import FONT, RESOLUTION

# The palette of Okabe and Ito; markers differ as well.
STYLES = {
    ANALYTIC: ("#000000", "X"),
    "magnitude": ("#E69F00", "D"),
    "disagreement": ("#D55E00", "o"),
    "variance": ("#009E73", "^"),
    "inverse": ("#CC79A7", "s"),
}
CRITIC_COLOR, REFERENCE_COLOR = "#0072B2", "#7F7F7F"
# Gradients that need no window
FLAT_STYLES = {CRITIC: "-", CORRECTED: "--"}
LINES = ("-", "--", ":", "-.")


class Panel(NamedTuple):
    """One row of the figure: all rows of the CSV file about one set of critics."""

    title: str
    rows: Sequence[Row]


def fidelity(panels: Sequence[Panel], path: Path) -> None:
    """
    Draw the cosines of averaged windows against the horizon, for actions on the left and policy parameters on the right.

    :param panels: one per model and set of critics
    :param path: PNG file to be written
    """
    with mpl.rc_context(FONT):
        figure = Figure(figsize=(WIDTH, 3.4 * len(panels) + 1.2), layout="constrained")
        axes = figure.subplots(len(panels), 2, squeeze=False)
        for panel, (left, right) in zip(panels, axes, strict=True):
            _draw(left, panel.rows, "action_cosine", "split_half")
            _draw(right, panel.rows, "parameter_cosine", "parameter_split_half")
            left.set_title(panel.title.replace(" (", "\n("), fontsize=10, loc="left")  # in two lines
            left.set_ylabel("cosine, actions")
            right.set_ylabel("cosine, policy parameters")
        lines = [line for ax in axes.flat for line in ax.get_lines() if not str(line.get_label()).startswith("_")]
        handles = {line.get_label(): line for line in lines}  # each label once
        figure.legend(handles=list(handles.values()), handlelength=2.8, ncols=3, loc="outside upper center", fontsize=9)
        most = max(int(row["windows"]) for panel in panels for row in panel.rows)
        figure.supxlabel(f"horizon: steps of a window; gradients are means of {most} windows from each state", fontsize=11)
        figure.savefig(path, dpi=RESOLUTION)


def _value(text: str) -> float:
    """Read a number of the CSV file; empty is what is not known."""
    return float(text or "nan")


def _draw(axes: Axes, rows: Sequence[Row], column: str, split_half: str) -> None:
    """
    Draw one panel.

    :param axes: to draw on
    :param rows: of one set of critics
    :param column: the cosine
    :param split_half: column of the agreement between the reference's halves
    """
    ceiling = ReferenceQuality.attainable(_value(rows[0][split_half]))
    axes.axhline(ceiling, color=REFERENCE_COLOR, linestyle=":", label="a perfect estimate")
    for row in rows:
        if row["method"] in FLAT_STYLES:
            axes.axhline(_value(row[column]), color=CRITIC_COLOR, label=row["method"], linestyle=FLAT_STYLES[row["method"]])
    most = max(int(row["windows"]) for row in rows)
    averaged = [row for row in rows if int(row["windows"]) == most and row["method"] not in FLAT_STYLES]
    steps = list(dict.fromkeys(row["difference_step"] for row in averaged))
    for method in dict.fromkeys(row["method"] for row in averaged):
        color, marker = STYLES[method]
        for step in steps:
            points = [
                (int(row["horizon"]), _value(row[column]))
                for row in averaged
                if (row["method"], row["difference_step"]) == (method, step)
            ]
            label = f"{method}, difference step {step}"
            line = LINES[steps.index(step) % len(LINES)]
            axes.plot(*zip(*sorted(points), strict=True), line, color=color, marker=marker, markersize=4.5, label=label)
    axes.axhline(0.0, color="black", linewidth=0.6)
    axes.set_xscale("log", base=2)
    if horizons := sorted({int(row["horizon"]) for row in averaged}):
        axes.set_xticks(horizons, [str(horizon) for horizon in horizons])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.grid(alpha=0.25)
