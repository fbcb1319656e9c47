"""Outputs of SB3's logger: a CSV file for figures, and TensorBoard's with animations."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from stable_baselines3.common.logger import CSVOutputFormat, TensorBoardOutputFormat

from sb3_agpo.tracking.video import Animation


class ProgressFile(CSVOutputFormat):
    """
    SB3's CSV file, for figures to be drawn from; unlike SB3's it passes over what is no number.

    :param filename: the file, which is made anew
    :param rows: text of an earlier file, to go on with
    """

    def __init__(self, filename: str, rows: str = "") -> None:
        super().__init__(filename)
        self.file.write(rows)
        self.keys = rows.partition("\n")[0].split(self.separator) if rows else []

    def write(self, key_values: dict[str, Any], key_excluded: dict[str, tuple[str, ...]], step: int = 0) -> None:
        """
        Add a row.

        :param key_values: names and values
        :param key_excluded: does not matter here
        :param step: environment steps
        """
        numbers = {key: value for key, value in key_values.items() if isinstance(value, int | float | np.number)}
        super().write(numbers, dict.fromkeys(numbers, ()), step)


def write_to_tensorboard(output: TensorBoardOutputFormat, values: Mapping[str, Any], step: int) -> None:
    """
    Write values to TensorBoard's file.

    :param output: SB3's writer
    :param values: names and values; animations too, for which SB3 has no type
    :param step: environment steps
    """
    others = {key: value for key, value in values.items() if not isinstance(value, Animation)}
    output.write(others, dict.fromkeys(others, ()), step)
    for key, value in values.items():
        if isinstance(value, Animation):
            from tensorboard.compat.proto.summary_pb2 import Summary

            image = Summary.Image(height=value.height, width=value.width, colorspace=3, encoded_image_string=value.gif)
            assert output.writer.file_writer is not None
            output.writer.file_writer.add_summary(Summary(value=[Summary.Value(tag=key, image=image)]), step)
