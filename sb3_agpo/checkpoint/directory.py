"""
A directory of checkpoints of which the newest is always whole, whenever the process is killed or the disk is full.

A checkpoint is written to a temporary directory next to the others. Its files and the directory are flushed to the disk;
then one rename gives it its final name, so that a directory with such a name is complete by construction, and the one with
the highest number is the newest. Only after that do older ones go, renamed out of the way first.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import shutil
import zipfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np

from sb3_agpo.checkpoint.plain_data import PlainData

FORMAT = "sb3-agpo checkpoint"
VERSION = 1
STRUCTURE, ARRAYS, MANIFEST = "state.json", "arrays.npz", "manifest.json"
#: prefix of directories that are being written or removed
TEMPORARY = ".unfinished-"
_NAME = re.compile(r"(\d{6,})-step-(\d+)")
_CHUNK = 2**20


def complete_checkpoints(directory: Path) -> list[Path]:
    """
    The checkpoints in a directory.

    :param directory: the directory, which need not exist
    :return: oldest first
    """
    if not directory.is_dir():
        return []
    return sorted((path for path in directory.iterdir() if _NAME.fullmatch(path.name)), key=_number)


def _number(checkpoint: Path) -> int:
    """How many checkpoints have been written up to this one."""
    return int(checkpoint.name.partition("-")[0])


def write_checkpoint(directory: Path, data: PlainData, step: int, keep: int) -> Path:
    """
    Add a checkpoint to a directory, and remove the oldest ones once it is safe.

    :param directory: made if it does not exist
    :param data: what to write
    :param step: number of steps, for the name
    :param keep: checkpoints to keep, the new one included
    :return: the new checkpoint
    :raises OSError: if it cannot be written; the checkpoints that were there are as they were
    """
    directory.mkdir(parents=True, exist_ok=True)
    existing = complete_checkpoints(directory)
    number = 1 + max(map(_number, existing), default=0)
    final = directory / f"{number:06d}-step-{step}"
    temporary = directory / f"{TEMPORARY}{final.name}"
    try:
        remove_unfinished(directory)
        temporary.mkdir()
        _write_files(temporary, data)
        os.replace(temporary, final)
        flush_directory(directory)
    except OSError as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise explain(error, directory, existing) from error
    with contextlib.suppress(OSError):  # what cannot be removed now is removed next time
        for path in complete_checkpoints(directory)[:-keep]:
            # Renamed first, as a directory that is half removed must not look like a checkpoint
            os.replace(path, directory / f"{TEMPORARY}{path.name}")
    remove_unfinished(directory)
    return final


def explain(error: OSError, directory: Path, existing: list[Path]) -> OSError:
    """
    Say what a failure to write means and what to do.

    :param error: what went wrong
    :param directory: where
    :param existing: checkpoints that were there before
    :return: an error of the same number
    """
    kept = f"the last one, {existing[-1].name}, is still whole" if existing else "there was none before"
    advice = "check the path and its permissions"
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        advice = "the disk is full: free space, or lower `keep` or the model's `buffer_size`"
    message = f"the checkpoint could not be written to {directory} ({error.strerror or error}); {kept}; {advice}"
    return OSError(error.errno, message)


def remove_unfinished(directory: Path) -> None:
    """
    Remove what killed processes have left behind.

    :param directory: directory of checkpoints
    """
    for path in directory.glob(f"{TEMPORARY}*"):
        shutil.rmtree(path, ignore_errors=True)


def _write_files(directory: Path, data: PlainData) -> None:
    """Write and flush all files of a checkpoint; the manifest last."""
    with open(directory / ARRAYS, "wb") as file:
        np.savez(file, allow_pickle=False, **data.arrays)  # type: ignore[arg-type]
        _flush(file)
    _write_json(directory / STRUCTURE, data.structure)
    files = {name: _fingerprint(directory / name) for name in (ARRAYS, STRUCTURE)}
    _write_json(directory / MANIFEST, {"format": FORMAT, "version": VERSION, "files": files})
    flush_directory(directory)


def _write_json(path: Path, content: Any) -> None:
    with open(path, "w", encoding="utf-8") as file:
        json.dump(content, file)
        _flush(file)


def _flush(file: Any) -> None:
    """Make sure that a file is on the disk."""
    file.flush()
    os.fsync(file.fileno())


def flush_directory(directory: Path) -> None:
    """
    Make sure that the names in a directory are on the disk.

    :param directory: the directory
    """
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _fingerprint(path: Path) -> dict[str, int]:
    """Size and checksum of a file."""
    checksum = 0
    with open(path, "rb") as file:
        while chunk := file.read(_CHUNK):
            checksum = zlib.crc32(chunk, checksum)
    return {"size": path.stat().st_size, "crc32": checksum}


def find_checkpoint(path: Path) -> Path:
    """
    The checkpoint that a path stands for.

    :param path: a checkpoint, or a directory of checkpoints for the newest of them
    :return: the checkpoint
    :raises ValueError: if there is none
    """
    if (path / MANIFEST).is_file() or _NAME.fullmatch(path.name):
        return path
    checkpoints = complete_checkpoints(path)
    if not checkpoints:
        raise ValueError(f"there is no checkpoint in {path}; pass the directory that `save_checkpoint` was given")
    return checkpoints[-1]


def read_newest(path: Path) -> tuple[Path, PlainData]:
    """
    Read the checkpoint that a path stands for, while another process may be adding newer ones and removing the oldest.

    :param path: a checkpoint, or a directory of checkpoints for the newest of them
    :return: the checkpoint, and what was written
    :raises ValueError: if there is none, or it is damaged or of another version
    """
    while True:
        checkpoint = find_checkpoint(path)
        try:
            return checkpoint, read_checkpoint(checkpoint)
        except ValueError:
            if checkpoint.is_dir() or checkpoint == path:  # nobody has removed it
                raise


def read_checkpoint(checkpoint: Path) -> PlainData:
    """
    Read a checkpoint.

    :param checkpoint: as :func:`find_checkpoint` returned it
    :return: what was written
    :raises ValueError: if a file is missing, damaged or of another version
    """
    try:
        manifest = json.loads((checkpoint / MANIFEST).read_text(encoding="utf-8"))
        _check_version(checkpoint, manifest)
        for name in (ARRAYS, STRUCTURE):
            if _fingerprint(checkpoint / name) != manifest["files"][name]:
                raise ValueError(f"the checksum of {name} is wrong")
        structure = json.loads((checkpoint / STRUCTURE).read_text(encoding="utf-8"))
        with np.load(checkpoint / ARRAYS, allow_pickle=False) as arrays:
            return PlainData(structure, dict(arrays))
    except _VersionError:
        raise
    except (OSError, ValueError, KeyError, TypeError, zipfile.BadZipFile) as error:
        others = [path.name for path in complete_checkpoints(checkpoint.parent) if path != checkpoint]
        advice = f"resume from {checkpoint.parent / others[-1]}" if others else "there is no other one next to it"
        raise ValueError(f"the checkpoint {checkpoint} is damaged ({error}); {advice}") from error


class _VersionError(ValueError):
    """A checkpoint of another version."""


def _check_version(checkpoint: Path, manifest: Any) -> None:
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise ValueError(f"{MANIFEST} is not that of a {FORMAT}")
    if manifest.get("version") != VERSION:
        raise _VersionError(
            f"the checkpoint {checkpoint} has version {manifest.get('version')!r} of its format, this package reads version "
            f"{VERSION}; resume it with the version of sb3-agpo that wrote it"
        )
