"""Markdown tables of the fidelity benchmark."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from sb3_agpo.benchmark.fidelity_metrics import ReferenceQuality
from sb3_agpo.benchmark.fidelity_windows import DEFAULT_STEP
from sb3_agpo.benchmark.records import Row
from sb3_agpo.benchmark.tables import NONE, table

AS_SAVED = "as saved"  # critics that were not refitted


def markdown(rows: Sequence[Row]) -> str:
    """
    Table of one model with one set of critics.

    :param rows: of the CSV file
    :return: Markdown, with a heading and a line about the reference
    """
    first = rows[0]
    attainable = [ReferenceQuality.attainable(float(first[name] or 0.0)) for name in ("split_half", "parameter_split_half")]
    most = max(int(row["windows"]) for row in rows)
    by_name = {row["estimator"]: row for row in rows}
    lines = []
    for row in rows:
        windows = int(row["windows"])
        if windows > 1:
            continue  # shown beside the row of its single windows
        averaged = by_name.get(row["estimator"].removesuffix("windows=1") + f"windows={most}", {}) if most > 1 else {}
        lines.append([
            row["method"], row["horizon"] if windows else NONE, row["difference_step"] or NONE,
            f"{_number(row['action_cosine'])} ± {_number(row['action_cosine_error'])}",
            _number(averaged.get("action_cosine")),
            _number(row["parameter_cosine"]), _number(averaged.get("parameter_cosine")),
            _number(row["norm_ratio"]), _number(row["bias_squared"]), _number(row["variance"]),
            _number(row["gate"]), row["simulator_calls"],
        ])  # fmt: skip
    head = [
        "gradient", "horizon", "difference step", "action cosine", f"mean of {most}", "parameter cosine", f"mean of {most}",
        "norm ratio", "bias²", "variance", "gate", "simulated steps",
    ]  # fmt: skip
    about = (
        f"{first['n_states']} states, seed {first['seed']}. Reference: {first['n_rollouts']} rollouts of "
        f"{first['rollout_steps']} steps from each, σ = {first['sigma']}; split-half cosine {_number(first['split_half'])} "
        f"(actions), {_number(first['parameter_split_half'])} (policy parameters), so that a perfect estimate would have "
        f"{attainable[0]:.2f} and {attainable[1]:.2f}; standard error {_number(first['standard_error'])} of the gradient's "
        f"size. {int(first['reference_simulator_calls']):,} simulated steps, {float(first['reference_seconds']):.0f} s."
    )
    return f"### {title(first)}\n\n{about}\n\n{table(head, lines)}"


def overview(groups: Sequence[Sequence[Row]]) -> str:
    """
    Tables of several models side by side: cosines of single windows with the reference, one column for each estimator.

    :param groups: rows of the CSV file, a group for each model with one set of critics
    :return: Markdown, empty for a single group
    """
    if len(groups) < 2:
        return ""
    single = [{_column(row): row for row in group if int(row["windows"]) <= 1} for group in groups]
    columns = list(dict.fromkeys(column for rows in single for column in rows))
    parts = ["### Overview\n"]
    for of, cosine, reference in (
        ("dJ/da", "action_cosine", "split_half"),
        ("the gradient of the policy's parameters", "parameter_cosine", "parameter_split_half"),
    ):
        parts.append(f"Cosines with the reference of {of}, by single windows; *reference* is that of its two halves.\n")
        lines = []
        for (first, *_), rows in zip(groups, single, strict=True):
            cosines = [_number(rows[column][cosine]) if column in rows else NONE for column in columns]
            lines.append([title(first), _number(first[reference]), *cosines])
        parts.append(table(["model", "reference", *columns], lines))
    return "\n".join(parts)


def _column(row: Row) -> str:
    """Name an estimator in the head of a table."""
    if int(row["windows"]) == 0:
        return row["method"]
    step = "" if row["difference_step"] == DEFAULT_STEP else f", {row['difference_step']}"
    return f"{row['method']} H={row['horizon']}{step}"


def title(row: Row) -> str:
    """
    Name a model and its critics.

    :param row: one of its rows
    :return: text
    """
    critics = "" if row["critics"] == AS_SAVED else f", critics with {row['critics']}"
    return f"{row['env']}, {row['algorithm']} after {int(row['steps']):,} steps ({row['model']}{critics})"


def _number(text: str | None) -> str:
    """Write a number of the CSV file with two decimals, or three digits where it is large."""
    if not text:
        return NONE
    value = float(text)
    return f"{value:.2f}" if abs(value) < 100.0 else f"{value:.3g}"


def split(rows: Iterable[Row]) -> list[list[Row]]:
    """
    Split rows by model and critics.

    :param rows: of the CSV file
    :return: groups, in order
    """
    groups: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        groups.setdefault((row["model"], row["critics"]), []).append(row)
    return list(groups.values())
