"""The benchmark's CSV files: columns, versions, safe concurrent writing."""

from __future__ import annotations

import csv
import fcntl
import importlib.metadata
import io
import json
import os
import platform
import re
import subprocess
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

from sb3_agpo.__about__ import __version__

Row = dict[str, str]

# The benchmark's tasks, with the environment steps of a run on each.
BUDGETS = {
    "HalfCheetah-v5": 100_000,
    "Hopper-v5": 100_000,
    "Walker2d-v5": 100_000,
    "Ant-v5": 100_000,
    "Humanoid-v5": 100_000,
    "InvertedDoublePendulum-v5": 50_000,
    "Reacher-v5": 50_000,
    "Pusher-v5": 50_000,
    "Swimmer-v5": 50_000,
    "InvertedPendulum-v5": 50_000,
}

#: where runs go, and reports come from, unless another file is given
DEFAULT_FILE = Path("docs/benchmarks/learning.csv")

COLUMNS = (
    "algorithm",
    "env",
    "seed",
    "steps",
    "simulator_calls",
    "seconds",
    "return",
    "return_std",
    "cpu_seconds",
    "episodes",
    "n_envs",
    "threads",
    "python",
    "torch",
    "stable_baselines3",
    "gymnasium",
    "mujoco",
    "sb3_agpo",
    "git_commit",
    "settings",
    "budget",
    "eval_every",
    "machine",
)
VERSION_COLUMNS = ("python", "torch", "stable_baselines3", "gymnasium", "mujoco", "sb3_agpo")


class RunKey(NamedTuple):
    """What identifies a run: two rows with equal keys are evaluations of the same run."""

    algorithm: str
    env: str
    seed: int
    settings: str
    budget: int

    @property
    def file_name(self) -> str:
        """Name of the run's own file, without its suffix."""
        return as_file_name(f"{self.algorithm}+{self.env}+{self.seed}+{self.settings}+{self.budget}")


def as_file_name(text: str) -> str:
    """
    Replace what does not belong into the name of a file, such as the slash of a task's namespace.

    :param text: any text
    :return: the same with underscores
    """
    return re.sub(r"[^\w.+-]", "_", text)


def key_of(row: Row) -> RunKey:
    """
    The run that a row belongs to.

    :param row: as read from a file
    :return: its key
    """
    return RunKey(row["algorithm"], row["env"], int(row["seed"]), row["settings"], int(row["budget"]))


def versions() -> dict[str, str]:
    """
    Versions of everything that results depend on.

    :return: column -> version, ``unknown`` for a library that is not installed as a package
    """
    found = {"python": platform.python_version(), "sb3_agpo": __version__}
    for column in VERSION_COLUMNS[1:-1]:
        try:
            found[column] = importlib.metadata.version(column.replace("_", "-"))
        except importlib.metadata.PackageNotFoundError:
            found[column] = "unknown"
    return found


def git_commit() -> str:
    """
    The commit of the package's code.

    :return: short hash, with ``-dirty`` where the code differs from it; ``unknown`` outside of a repository with commits
    """
    package = Path(__file__).resolve().parents[1]

    def git(*arguments: str) -> str:
        # Optional locks off: looking must not write, even into the index.
        command = ["git", "--no-optional-locks", "-C", str(package), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        if Path(git("rev-parse", "--show-toplevel")).resolve() != package.parent:
            return "unknown"  # installed somewhere inside another project's repository
        commit = git("rev-parse", "--short", "HEAD")
        return commit + ("-dirty" if git("status", "--porcelain", "--", "*.py") else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def machine() -> str:
    """
    The processor that results were obtained on.

    :return: model and number of cores
    """
    model = platform.processor() or platform.machine()
    try:
        match = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
        model = match[1] if match else model
    except OSError:
        pass
    return f"{model}, {os.cpu_count()} cores"


def read_rows(path: Path, growing: bool = False) -> list[Row]:
    """
    Read a CSV file of evaluations.

    :param path: the file
    :param growing: whether rows are added to it as they come, so that a crash can cut the last line off, which is dropped
    :return: its rows, with columns that are not ours too; none if there is no such file
    :raises ValueError: if it is a folder, a column is missing, or a row has not as many entries as there are columns
    """
    try:
        text = path.read_text()
    except FileNotFoundError:
        return []
    except OSError as error:
        raise ValueError(f"{path} cannot be read ({error.strerror}); give the name of a CSV file") from error
    reader = csv.DictReader(io.StringIO(text[: text.rfind("\n") + 1] if growing else text))
    if missing := set(COLUMNS) - set(reader.fieldnames or COLUMNS):
        raise ValueError(f"{path} lacks the columns {', '.join(sorted(missing))}; give a file that 'learning' wrote")
    rows = []
    for row in reader:
        if None in row or None in row.values():
            raise ValueError(f"{path}: line {reader.line_num} has not as many entries as there are columns; complete it")
        rows.append(row)
    return rows


def to_csv(rows: Iterable[Mapping[str, Any]], header: bool, more: Iterable[str] = ()) -> str:
    """
    Write rows as CSV.

    :param rows: evaluations, with all of ``COLUMNS``
    :param header: whether to begin with the column names
    :param more: other columns, left empty in rows without them
    :return: the text
    """
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, [*COLUMNS, *more], lineterminator="\n")
    if header:
        writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def replace_file(path: Path, text: str) -> None:
    """
    Write a file such that readers see the old or the new one, never a part, even after a crash.

    :param path: the file; its folder must exist
    :param text: new contents
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with temporary.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def markers(name: str) -> tuple[str, str]:
    """
    The lines of a page between which a text is written anew.

    :param name: of the text
    :return: first and last line
    """
    return f"<!-- {name}: begin -->", f"<!-- {name}: end -->"


def check_markers(page: Path, name: str) -> None:
    """
    See to it that a page has a place for a text.

    :param page: Markdown file
    :param name: of the text
    :raises ValueError: if the page has no markers
    """
    begin, end = markers(name)
    if not re.search(f"{begin}.*{end}", page.read_text(), re.DOTALL):
        raise ValueError(f"--page: {page} has no lines {begin} and {end} to write between; add them")


def update_page(page: Path, name: str, text: str) -> None:
    """
    Write a text between its markers on a page.

    :param page: left alone if it does not exist
    :param name: of the markers
    :param text: Markdown
    :raises ValueError: if the page has no markers
    """
    if not page.exists():
        return
    check_markers(page, name)
    begin, end = markers(name)
    new = f"{begin}\n{text.rstrip()}\n{end}"
    replace_file(page, re.sub(f"{begin}.*{end}", lambda _: new, page.read_text(), flags=re.DOTALL))


def partial_folder(output: Path) -> Path:
    """
    Where everything that is not worth keeping lies: rows of unfinished runs, and a lock.

    :param output: the CSV file of finished runs
    :return: folder beside it
    """
    return output.with_suffix(".partial")


def partial_path(output: Path, key: RunKey) -> Path:
    """
    Where an unfinished run keeps its rows.

    :param output: the CSV file of finished runs
    :param key: the run
    :return: path of the run's own CSV file
    """
    return partial_folder(output) / f"{key.file_name}.csv"


@contextmanager
def locked(output: Path) -> Iterator[None]:
    """
    Hold the lock under which the CSV file of finished runs and its settings file are rewritten.

    :param output: the CSV file of finished runs
    """
    folder = partial_folder(output)
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def read_all(output: Path) -> list[Row]:
    """
    Read finished and unfinished runs.

    :param output: the CSV file of finished runs
    :return: its rows, then those of unfinished runs that it does not hold
    """
    rows = read_rows(output)
    return rows + read_unfinished(output, rows)


def read_unfinished(output: Path, finished: list[Row]) -> list[Row]:
    """
    Read unfinished runs.

    :param output: the CSV file of finished runs
    :param finished: its rows
    :return: rows of runs that it does not hold
    """
    keys = {key_of(row) for row in finished}
    unfinished = [row for path in sorted(partial_folder(output).glob("*.csv")) for row in read_rows(path, growing=True)]
    return [row for row in unfinished if key_of(row) not in keys]


def merge_run(output: Path, key: RunKey, rows: list[Row], replaced: frozenset[RunKey] = frozenset()) -> None:
    """
    Move a finished run into the CSV file of finished runs.

    :param output: the CSV file of finished runs
    :param key: the run
    :param rows: all its evaluations
    :param replaced: runs whose place it takes, as the user has said that they are to be redone; all others stay
    """
    with locked(output):
        kept = [row for row in read_rows(output) if key_of(row) not in {key, *replaced}]
        more = [column for column in dict.fromkeys(chain(*kept)) if column not in COLUMNS]  # somebody's own
        replace_file(output, to_csv(kept + rows, header=True, more=more))


def settings_path(output: Path) -> Path:
    """
    Where the meaning of the hashes in the ``settings`` column is kept.

    :param output: the CSV file of finished runs
    :return: path of a JSON file
    """
    return output.with_name(f"{output.stem}_settings.json")


def own_settings(output: Path, rows: Iterable[Row]) -> set[str]:
    """
    Find the settings of algorithms that are this package's code.

    :param output: the CSV file of finished runs
    :param rows: evaluations
    :return: hashes; where their meaning is not kept, names that begin with ``agpo`` decide
    """
    path = settings_path(output)
    known = json.loads(path.read_text()) if path.exists() else {}
    own = set()
    for row in rows:
        settings = known.get(row["settings"])
        if row["algorithm"].startswith("agpo") if settings is None else settings["algorithm"].startswith("sb3_agpo."):
            own.add(row["settings"])
    return own


def remember_settings(output: Path, settings_hash: str, settings: Mapping[str, Any]) -> None:
    """
    Note what a hash in the ``settings`` column stands for.

    :param output: the CSV file of finished runs
    :param settings_hash: the hash
    :param settings: the full settings
    """
    path = settings_path(output)
    with locked(output):
        known = json.loads(path.read_text()) if path.exists() else {}
        if settings_hash not in known:
            known[settings_hash] = settings
            replace_file(path, json.dumps(known, indent=1, sort_keys=True) + "\n")
