"""What was found out, as text on a terminal."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table
from rich.text import Text

from sb3_agpo.dynamics.recorder import ProviderReport
from sb3_agpo.gradients.inspection import Inspection, notes_on_steps, steps_as_code, verdict

ROUGHEST = 5  # steps, coordinates and contacts to be listed
WITHOUT_DERIVATIVES = (
    "AGPO would learn here from its critic alone, as SAC does, and has nothing to gain from the simulator. What would have to "
    "change is in the reason above; the page on providers in the documentation says where derivatives can come from."
)


def print_without_derivatives(console: Console, name: str, report: ProviderReport) -> None:
    """
    Say that there is nothing to inspect, and why.

    :param console: where to
    :param name: of the environment
    :param report: with the reason
    """
    console.print(Text.assemble((name, "bold"), f": no simulator derivatives ({report.reason}).\n\n{WITHOUT_DERIVATIVES}"))


def print_inspection(console: Console, name: str, found: Inspection) -> None:
    """
    Print everything.

    :param console: where to
    :param name: of the environment
    :param found: what was found out
    """
    recording = found.recording
    lengths = f"{len(recording.rewards)} steps, {int(recording.ends.sum())} ends of episodes, {found.policy}"
    console.print(Text.assemble((name, "bold"), f": {lengths}\n"))
    for table in (_overview(found), _reward(found), _roughest_steps(found), _roughest_coordinates(found), _differences(found)):
        if table.row_count:
            console.print(table, markup=False)  # names of joints and rewards may look like it
            console.print()
    console.print(Text.assemble(("Suggested:", "bold"), f" {_suggestion(found)}"))
    console.print(Text.assemble(("In short:", "bold"), f" {verdict(found)}"))


def _table(title: str, *columns: str) -> Table:
    """An empty table, its first column to the left and the others to the right."""
    table = Table(title=title, title_justify="left", title_style="bold", box=None, pad_edge=False, padding=(0, 3, 0, 0))
    for i, column in enumerate(columns):
        table.add_column(column, justify="right" if i and column else "left")
    return table


def _quantiles(values: Any) -> str:
    """Median and range of numbers, without those that are NaN."""
    finite = np.asarray(values)[np.isfinite(values)]
    if not len(finite):
        return "none"
    low, middle, high = np.quantile(finite, [0.0, 0.5, 1.0])
    return f"{middle:.3g} (from {low:.3g} to {high:.3g})"


def _overview(found: Inspection) -> Table:
    """Source, differentiable parts, sizes, cost."""
    recording, cost = found.recording, found.cost
    jacobians, effects = recording.jacobians[recording.base], recording.effects
    table = _table("Derivatives", "", "")
    table.add_row("source", f"{recording.report.kind}: {recording.report.reason}")
    table.add_row("usable steps", f"{found.usable.mean():.1%} (finite, not exploding, of the step that was really taken)")
    idle = [name for name, matters in zip(found.states, effects.state_matters, strict=True) if not matters]
    without = f"; without effect: {', '.join(idle)}" if idle else ""
    table.add_row("state", f"{effects.state_matters.sum()} of {len(found.states)} coordinates matter{without}")
    moves, memory = effects.observation_moves, effects.observation_moves & ~effects.observation_of_state
    table.add_row(
        "observation",
        f"{moves.sum()} of {len(moves)} entries are differentiable"
        + (f", {memory.sum()} of them a memory of the last step (contact forces, ...)" if memory.any() else ""),
    )
    if found.usable.any():
        by_action, by_state = (d[found.usable].any(axis=1).mean() for d in (jacobians.r_a, jacobians.r_x))
        table.add_row("reward", f"changes with the action in {by_action:.0%} of the steps, with the state in {by_state:.0%}")
    table.add_row("norm of dx'/dx", _quantiles(found.norm_A[found.usable]))
    table.add_row("norm of dx'/da", _quantiles(found.norm_B[found.usable]))
    grown = ", ".join(f"{value:.3g} in {steps}" for steps, value in found.growth.items() if np.isfinite(value))
    table.add_row("growth of small changes", f"{grown} steps" if grown else "none")
    table.add_row("roughness (0 to 1)", f"{_quantiles(found.roughness.by_step)}{_contact_note(found)}")
    rows = f", {cost.rows} simulated steps" if cost.rows else ""
    table.add_row("cost of a step", f"{1e3 * cost.step:.3g} ms to play, {1e3 * cost.derivative:.3g} ms to differentiate{rows}")
    return table


def _contact_note(found: Inspection) -> str:
    """Roughness where contacts change and where they do not."""
    changed = found.contacts_changed
    if not changed.any():
        return ""
    with_change, without = (found.roughness.by_step[where] for where in (changed, ~changed))
    if not (np.isfinite(with_change).any() and np.isfinite(without).any()):
        return ""
    return (
        f"; median {np.nanmedian(with_change):.3g} in the {changed.mean():.0%} of the steps in which contacts change, "
        f"{np.nanmedian(without):.3g} in the others"
    )


def _reward(found: Inspection) -> Table:
    """Parts of the reward."""
    table = _table("Parts of the reward", "part", "mean", "deviation", "changes with the action in", "with the state in")
    for part in found.reward:
        shares = [f"{share:.0%}" for share in (part.by_action, part.by_state)]
        table.add_row(part.name, f"{part.mean:.3g}", f"{part.deviation:.3g}", *shares)
    return table


def _roughest_steps(found: Inspection) -> Table:
    """The steps whose derivatives change most."""
    last = "bodies that touch (* newly, or no more)"
    table = _table("Roughest steps", "step", "roughness", "norm of dx'/dx", "most in", last)
    by_step = np.nan_to_num(found.roughness.by_step, nan=-1.0)
    for step in np.argsort(-by_step, kind="stable")[:ROUGHEST]:
        if by_step[step] <= 0.0:
            break
        coordinate = found.coordinates[found.roughness.worst[step]]
        table.add_row(
            str(step), f"{by_step[step]:.3g}", f"{found.norm_A[step]:.3g}", coordinate, _contacts_of(found, int(step))
        )
    table.columns[4].justify = "left"
    return table


def _contacts_of(found: Inspection, step: int) -> str:
    """The pairs of bodies that touch in a step."""
    contacts = found.recording.contacts
    before = contacts[step - 1] if step and not found.recording.ends[step - 1] else contacts[step]
    pairs = sorted(contacts[step] | before)
    changed = contacts[step] ^ before
    return ", ".join(f"{'-'.join(pair)}{'*' if pair in changed else ''}" for pair in pairs)


def _roughest_coordinates(found: Inspection) -> Table:
    """The coordinates whose derivatives change most, and the contacts that come with them."""
    table = _table("Roughness comes from", "moved coordinate", "share", "contact", "touches in", "median roughness then")
    shares = found.roughness.by_coordinate
    order = [i for i in np.argsort(-shares, kind="stable")[:ROUGHEST] if shares[i] > 0.0]
    coordinates = [(found.coordinates[i], f"{shares[i]:.0%}") for i in order]
    touching = Counter(pair for pairs in found.recording.contacts for pair in pairs)
    contacts = []
    for pair, count in touching.most_common(ROUGHEST):
        where = np.array([pair in pairs for pairs in found.recording.contacts])
        rough = found.roughness.by_step[where]
        median = f"{np.nanmedian(rough):.3g}" if np.isfinite(rough).any() else ""
        contacts.append(("-".join(pair), f"{count / len(where):.0%}", median))
    for i in range(max(len(coordinates), len(contacts))):
        left = coordinates[i] if i < len(coordinates) else ("", "")
        table.add_row(*left, *(contacts[i] if i < len(contacts) else ("", "", "")))
    return table


def _differences(found: Inspection) -> Table:
    """How well derivatives predict, for each difference step."""
    moments = f"{max(each.n_windows for each in found.predictions)} moments"
    title = f"How derivatives predict the next {found.horizon} rewards ({moments}, noise {found.noise:g} on the first action)"
    table = _table(title, "difference step", "explained", "right direction", "")
    for options, prediction, note in zip(found.recording.differences, found.predictions, notes_on_steps(found), strict=True):
        exact = found.recording.report.kind == "exact"
        step = "exact" if exact else f"position {options.position_step:g}, action {options.action_step:g}"
        known = (f"{share:.0%}" if np.isfinite(share) else "none" for share in (prediction.explained, prediction.direction))
        table.add_row(step, *known, note)
    return table


def _suggestion(found: Inspection) -> str:
    """What to write."""
    recording = found.recording
    if recording.report.kind == "exact":
        return "derivatives are exact, there is no difference step to choose"
    if found.best == recording.base:
        return "the difference steps in use"
    return f"finite_differences={steps_as_code(recording.differences[found.best])}"
