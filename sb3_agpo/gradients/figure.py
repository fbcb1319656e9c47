"""What was found out, as one picture."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from sb3_agpo.gradients.inspection import Inspection, notes_on_steps
from sb3_agpo.tracking.figures import ANALYTIC_COLOR, CRITIC_COLOR, NEUTRAL_COLOR, write_figure

COORDINATES = 12  # coordinates to be shown at most
SMALLEST = 0.005  # share of the roughness
TOUCH_COLOR = "#009E73"  # Okabe and Ito's green


def draw_inspection(found: Inspection, path: Path, title: str) -> None:
    """
    Draw sizes and roughness over the steps, where the roughness comes from, and how well derivatives predict.

    :param found: what was found out
    :param path: PNG file to be written
    :param title: above everything
    """

    def draw(figure: Figure) -> None:
        grid = figure.add_gridspec(3, 2, height_ratios=[1.0, 1.0, 1.3])
        sizes = figure.add_subplot(grid[0, :])
        rough = figure.add_subplot(grid[1, :], sharex=sizes)
        _draw_norms(sizes, found)
        _draw_roughness(rough, found)
        _draw_coordinates(figure.add_subplot(grid[2, 0]), found)
        _draw_predictions(figure.add_subplot(grid[2, 1]), found)
        figure.suptitle(title, fontsize=12)

    write_figure(draw, (11.0, 9.5), path)


def _mark_ends(axes: Axes, found: Inspection) -> None:
    """Draw a line after each step that ended an episode."""
    for step in np.flatnonzero(found.recording.ends[:-1]):
        axes.axvline(step + 0.5, color=NEUTRAL_COLOR, linewidth=0.7, linestyle=":", alpha=0.6)


def _draw_norms(axes: Axes, found: Inspection) -> None:
    """Draw the norms of the Jacobians over the steps."""
    valid = found.recording.jacobians[found.recording.base].valid
    for values, label, color in ((found.norm_A, "dx'/dx", ANALYTIC_COLOR), (found.norm_B, "dx'/da", CRITIC_COLOR)):
        shown = np.where(valid & (values > 0.0), values, np.nan)
        axes.plot(shown, color=color, linewidth=1.2, label=label)
    axes.set_yscale("log")
    axes.set_ylabel("norm")
    ends = " (dotted lines: ends of episodes)" if found.recording.ends[:-1].any() else ""
    axes.set_title(f"Size of the derivatives{ends}", loc="left")
    axes.legend(loc="upper right", ncols=2, bbox_to_anchor=(1.0, 1.2), borderaxespad=0.0)
    axes.tick_params(labelbottom=False)
    _mark_ends(axes, found)


def _draw_roughness(axes: Axes, found: Inspection) -> None:
    """Draw roughness over the steps, and the number of touching pairs of bodies."""
    steps = np.arange(len(found.roughness.by_step))
    axes.plot(steps, found.roughness.by_step, color=NEUTRAL_COLOR, linewidth=1.0, label="roughness")
    changed = found.contacts_changed
    label = "contacts change"
    axes.plot(steps[changed], found.roughness.by_step[changed], "o", color=ANALYTIC_COLOR, markersize=3.5, label=label)
    axes.set_ylim(-0.03, 1.03)
    axes.set_ylabel("roughness")
    axes.set_xlabel("step")
    axes.set_title("Roughness: relative change of the derivatives, at most 1", loc="left")
    touching = np.array([len(pairs) for pairs in found.recording.contacts])
    if touching.any():
        twin = axes.twinx()
        twin.fill_between(steps, touching, step="mid", color=TOUCH_COLOR, alpha=0.15, linewidth=0, label="touching bodies")
        twin.set_ylim(0, max(4, 1.5 * touching.max()))
        twin.set_ylabel("touching pairs", color=TOUCH_COLOR)
        twin.spines["right"].set_visible(True)
        axes.set_zorder(twin.get_zorder() + 1)
        axes.patch.set_visible(False)
    if changed.any():
        axes.legend(loc="upper right", ncols=2, bbox_to_anchor=(1.0, 1.2), borderaxespad=0.0)
    _mark_ends(axes, found)


def _draw_coordinates(axes: Axes, found: Inspection) -> None:
    """Draw which coordinates the roughness comes from."""
    shares = found.roughness.by_coordinate
    order = [i for i in np.argsort(-shares, kind="stable")[:COORDINATES] if shares[i] >= SMALLEST][::-1]
    axes.barh([found.coordinates[i] for i in order], shares[order], color=ANALYTIC_COLOR)
    axes.set_xlabel("share of the roughness")
    axes.set_title("Roughness by moved coordinate", loc="left")
    axes.grid(alpha=0.25, axis="x")
    axes.set_axisbelow(True)


def _draw_predictions(axes: Axes, found: Inspection) -> None:
    """Draw how well derivatives predict, by difference step."""
    explained = np.clip([each.explained for each in found.predictions], 0.0, 1.0)
    direction = [each.direction for each in found.predictions]
    exact = found.recording.report.kind == "exact"
    steps = ["exact" if exact else f"{options.position_step:g}" for options in found.recording.differences]
    labels = [f"{step}\n{note}" for step, note in zip(steps, notes_on_steps(found), strict=True)]
    places = np.arange(len(labels))
    axes.bar(places - 0.2, explained, 0.38, color=ANALYTIC_COLOR, label="explained")
    axes.bar(places + 0.2, direction, 0.38, color=CRITIC_COLOR, label="right direction")
    axes.set_xticks(places, labels)
    axes.set_ylim(0.0, 1.0)
    axes.set_xlabel("" if exact else "difference step of positions (the others in proportion)")
    axes.set_title(f"Prediction of the next {found.horizon} rewards", loc="left", pad=26)
    axes.legend(loc="lower left", ncols=2, bbox_to_anchor=(0.0, 1.0), borderaxespad=0.2)
    axes.grid(alpha=0.25, axis="y")
    axes.set_axisbelow(True)
