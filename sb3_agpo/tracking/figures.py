"""
Figures of one training run, drawn from the ``progress.csv`` that SB3's logger writes.

Nothing here uses ``pyplot``: no backend is chosen and no figure stays open, so that callbacks can draw in any process.
"""

from __future__ import annotations

import csv
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

try:
    import matplotlib as mpl
    from matplotlib.axes import Axes
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine
    from matplotlib.ticker import FuncFormatter, MaxNLocator
except ImportError as error:
    raise ImportError(
        f"figures need matplotlib, which cannot be imported ({error}); install it with: pip install 'sb3-agpo[plot]'"
    ) from error

Array = NDArray[np.float64]
Progress = dict[str, Array]

STEPS = "time/total_timesteps"
#: seconds of training, evaluations left out; SB3 does not log it, whoever wants the second panel records it
SECONDS = "time/learning_seconds"
RETURN, RETURN_STD = "eval/mean_reward", "eval/std_reward"
GATE, GATE_STEP = "train/gate_mean", "train/gate_step_"

# The palette of Okabe and Ito, which people of any colour vision can tell apart; lines differ in dashes or markers as well.
ANALYTIC_COLOR, CRITIC_COLOR, NEUTRAL_COLOR, RETURN_COLOR = "#D55E00", "#0072B2", "#000000", "#D55E00"
RESOLUTION = 150  # dots per inch
FONT: dict[Any, Any] = {
    "font.size": 11,
    "axes.titlesize": 12,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
}


class NothingToDraw(ValueError):
    """A run has no numbers for a figure."""


def read_progress(path: Path) -> Progress:
    """
    Read what SB3's CSV logger wrote.

    :param path: the file; it may still be growing
    :return: column -> values of all rows, NaN for empty cells and for what is no number
    """
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    columns = rows[0].keys() if rows else ()
    return {column: np.array([_number(row[column]) for row in rows]) for column in columns}


def _number(cell: str | None) -> float:
    """
    Read a cell.

    :param cell: its text; None at the end of a line that is not complete yet
    :return: its value, NaN if it has none
    """
    try:
        return float(cell or "nan")
    except ValueError:
        return float("nan")


def _rows(progress: Mapping[str, Array], *columns: str) -> list[Array]:
    """
    The rows that have finite values in some columns.

    :param progress: see :func:`read_progress`
    :param columns: names
    :return: values of each column; no values where a column is missing
    """
    if not all(column in progress for column in columns):
        return [np.empty(0) for _ in columns]
    known = np.isfinite([progress[column] for column in columns]).all(axis=0)
    return [progress[column][known] for column in columns]


def thousands(value: float, _position: int | None = None) -> str:
    """
    Write a number on an axis.

    :param value: the number
    :return: with k for thousands, and the sign that Matplotlib writes by itself on other axes
    """
    text = f"{value / 1000:g}k" if abs(value) >= 1000 else f"{value:g}"
    return text.replace("-", "−")


def _finish(axes: Axes, label: str) -> None:
    """
    Give a panel its horizontal axis and its grid.

    :param axes: the panel
    :param label: of the horizontal axis
    """
    axes.set_xlabel(label)
    right = axes.dataLim.x1  # of the curves; not finite without any
    if np.isfinite(right) and right > 0:
        axes.set_xlim(-0.015 * right, 1.015 * right)  # all panels from zero on, with room for markers at either end
    axes.xaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 2.5, 5, 10]))
    axes.xaxis.set_major_formatter(FuncFormatter(thousands))
    axes.grid(alpha=0.25)


def write_figure(draw: Callable[[Figure], None], size: tuple[float, float], path: Path) -> None:
    """
    Draw a figure and write it.

    :param draw: fills the figure
    :param size: width and height in inches
    :param path: PNG file to be written
    """
    with mpl.rc_context(FONT):  # restores the user's own settings
        figure = Figure(figsize=size, layout=ConstrainedLayoutEngine(w_pad=0.1, h_pad=0.1))  # inches
        FigureCanvasAgg(figure)
        draw(figure)
        figure.savefig(path, dpi=RESOLUTION, format="png")


def learning_curve(progress: Path, path: Path, *, random_return: float | None = None, title: str = "") -> None:
    """
    Draw the returns of evaluations against environment steps and, where they were logged, seconds of learning.

    :param progress: CSV file of SB3's logger, with evaluations in ``eval/mean_reward``
    :param path: PNG file to be written
    :param random_return: mean return of a random policy, drawn as a line
    :param title: above everything
    :raises NothingToDraw: if there is no evaluation in the file
    """
    numbers = read_progress(progress)
    if not len(_rows(numbers, STEPS, RETURN)[0]):
        raise NothingToDraw(f"{progress} has no evaluations ({STEPS} and {RETURN})")
    panels = {STEPS: "environment steps"}
    if len(_rows(numbers, SECONDS, RETURN)[0]):
        panels[SECONDS] = "seconds of learning"

    def draw(figure: Figure) -> None:
        all_axes = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
        for axes, (column, label) in zip(all_axes, panels.items(), strict=True):
            _draw_returns(axes, numbers, column, random_return)
            _finish(axes, label)
        all_axes[0].set_ylabel("return")
        all_axes[0].yaxis.set_major_formatter(FuncFormatter(thousands))
        if title:
            figure.suptitle(title, fontsize=12)
        handles, labels = all_axes[0].get_legend_handles_labels()
        figure.legend(handles, labels, ncols=len(handles), loc="outside lower center")

    write_figure(draw, (4.8 * len(panels) + 0.4, 4.0), path)


def _draw_returns(axes: Axes, numbers: Progress, column: str, random_return: float | None) -> None:
    """
    Draw the returns against a column.

    :param axes: to draw on
    :param numbers: of the run
    :param column: of the horizontal axis
    :param random_return: of a random policy
    """
    x, center = _rows(numbers, column, RETURN)
    axes.plot(x, center, color=RETURN_COLOR, linewidth=1.8, marker="o", markersize=3.5, label="mean of an evaluation")
    x, center, deviation = _rows(numbers, column, RETURN, RETURN_STD)
    if len(x):
        band = "± standard deviation over its episodes"
        axes.fill_between(x, center - deviation, center + deviation, color=RETURN_COLOR, alpha=0.18, linewidth=0, label=band)
    if random_return is not None:
        axes.axhline(random_return, color=NEUTRAL_COLOR, linewidth=1.2, linestyle="--", label="random policy")


def gradient_statistics(progress: Path, path: Path, *, title: str = "") -> None:
    """
    Draw what AGPO logged about its gradients on fresh windows: gate, norms, batch variances and cosine.

    :param progress: CSV file of SB3's logger
    :param path: PNG file to be written
    :param title: above everything
    :raises NothingToDraw: if AGPO logged no gate: no derivatives, or no update yet
    """
    numbers = read_progress(progress)
    if not len(_rows(numbers, STEPS, GATE)[0]):
        raise NothingToDraw(f"{progress} has no gradient statistics ({STEPS} and {GATE})")

    def draw(figure: Figure) -> None:
        ((gate, cosine), (norm, variance)) = figure.subplots(2, 2)
        _draw_gate(gate, numbers)
        _draw_cosine(cosine, numbers)
        _draw_pair(norm, numbers, "grad_norm", "mean norm of action gradients")
        _draw_pair(variance, numbers, "grad_variance", "batch variance of action gradients")
        for axes in (gate, cosine, norm, variance):
            _finish(axes, "environment steps")
        if title:
            figure.suptitle(title, fontsize=12)

    write_figure(draw, (10.0, 7.2), path)


def _legend_above(axes: Axes, title: str) -> None:
    """
    Write a panel's title and, in one row between it and the panel, its legend, where no curve can run.

    :param axes: the panel
    :param title: its title
    """
    handles, labels = axes.get_legend_handles_labels()
    axes.set_title(title, pad=26)
    axes.legend(
        handles,
        labels,
        ncols=len(handles),
        loc="lower center",
        bbox_to_anchor=(0.5, 1.0),
        borderaxespad=0.2,
        columnspacing=1.4,
        handlelength=2.2,
    )


def _draw_gate(axes: Axes, numbers: Progress) -> None:
    """
    Draw the mean of the gate and its value at each step of the windows.

    :param axes: to draw on
    :param numbers: of the run
    """
    columns = sorted((c for c in numbers if c.startswith(GATE_STEP)), key=lambda c: int(c.removeprefix(GATE_STEP)))
    # Light to dark, readable in grey too. The lightest colours of the map would be lost on white.
    colors = mpl.colormaps["viridis_r"](np.linspace(0.15, 1.0, len(columns)))
    for i, (column, color) in enumerate(zip(columns, colors, strict=True)):
        # However long the windows are, first and last tell how to read the shades in between.
        label = {0: "first step", len(columns) - 1: "last step"}.get(i, "_nolegend_")
        axes.plot(*_rows(numbers, STEPS, column), color=color, linewidth=1.2, label=label)
    axes.plot(*_rows(numbers, STEPS, GATE), color=NEUTRAL_COLOR, linewidth=2.2, linestyle="--", label="mean")
    axes.set_ylim(-0.02, 1.02)
    axes.set_ylabel("0: critic   1: simulator")
    _legend_above(axes, "gate by step of the window")


def _draw_cosine(axes: Axes, numbers: Progress) -> None:
    """
    Draw the cosine between the gradients through the simulator and those of the critic.

    :param axes: to draw on
    :param numbers: of the run
    """
    axes.axhline(0, color=NEUTRAL_COLOR, linewidth=0.8, linestyle=":")
    axes.plot(*_rows(numbers, STEPS, "train/grad_cosine"), color=NEUTRAL_COLOR, linewidth=1.6, label="pooled over a batch")
    axes.set_ylim(-1.02, 1.02)
    _legend_above(axes, "cosine of simulator and critic gradients")


def _draw_pair(axes: Axes, numbers: Progress, statistic: str, title: str) -> None:
    """
    Draw a statistic of the gradients through the simulator and of those of the critic.

    :param axes: to draw on
    :param numbers: of the run
    :param statistic: end of the columns' names
    :param title: of the panel
    """
    for name, source, color, line in (
        ("simulator", "analytic", ANALYTIC_COLOR, "-"),
        ("critic", "critic", CRITIC_COLOR, "--"),
    ):
        steps, values = _rows(numbers, STEPS, f"train/{source}_{statistic}")
        positive = values > 0  # a logarithm has no place for the zeros of a batch whose derivatives were all distrusted
        axes.plot(steps[positive], values[positive], line, color=color, linewidth=1.8, label=name)
    axes.set_yscale("log")
    _legend_above(axes, title)
