"""Reads what an offline run of Weights & Biases leaves; wandb itself has no reader in Python."""

import json
import struct
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from wandb.proto import wandb_internal_pb2

from sb3_agpo.tracking.wandb import STEP

BLOCK = 32768  # bytes; records of a .wandb file do not cross blocks
WHOLE, LAST = 1, 4  # kinds of pieces that end a record


class Offline:
    """
    What an offline run left.

    :param folder: the run's ``dir``
    """

    def __init__(self, folder: Path) -> None:
        (self.file,) = folder.glob("wandb/offline-run-*/run-*.wandb")
        self.files = self.file.parent / "files"
        deadline = time.monotonic() + 600.0
        self.records = list(read_records(self.file))
        while not self.records[-1:] or not self.records[-1].HasField("exit"):  # wandb's own process is still writing
            assert time.monotonic() < deadline, f"{self.file} has no end"
            time.sleep(0.05)
            self.records = list(read_records(self.file))
        self.run_id = next(record.run.run_id for record in self.records if record.HasField("run"))
        self.rows = [row_of(record) for record in self.records if record.HasField("history")]
        self.artifacts = [record.artifact for record in self.records if record.HasField("artifact")]

    def series(self, key: str) -> dict[int, Any]:
        """Environment steps -> values of a key."""
        return {row[STEP]: row[key] for row in self.rows if key in row}

    def config(self) -> dict[str, Any]:
        """The run's configuration."""
        updates = [update for record in self.records if record.HasField("config") for update in record.config.update]
        return {update.key: json.loads(update.value_json) for update in updates}


def read_records(path: Path) -> Iterator[Any]:
    """
    Read a ``.wandb`` file: seven bytes, then the pieces of a LevelDB log, of which one or more make a record.

    :param path: the file
    :return: its records; one that is not wholly written yet is left out
    """
    data, position, pieces = path.read_bytes(), 7, b""
    assert data[:4] in (b":W&B", b"")
    while position + 7 <= len(data):
        if BLOCK - position % BLOCK < 7:  # no room for a header
            position += BLOCK - position % BLOCK
            continue
        _checksum, length, kind = struct.unpack("<IHB", data[position : position + 7])
        if position + 7 + length > len(data):  # wandb's own process is still writing it
            return
        pieces += data[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (WHOLE, LAST):
            record = wandb_internal_pb2.Record()
            record.ParseFromString(pieces)
            pieces = b""
            yield record


def row_of(record: Any) -> dict[str, Any]:
    """
    Read a row of the history.

    :param record: of a ``.wandb`` file
    :return: names and values, those of histograms and media as dictionaries
    """
    row: dict[str, Any] = {}
    for item in record.history.item:
        first, *rest = item.nested_key or [item.key]
        value = json.loads(item.value_json)
        if rest:
            row.setdefault(first, {})[rest[0]] = value
        else:
            row[first] = value
    return row
