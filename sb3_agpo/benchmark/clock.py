"""What learning takes: wall-clock and processor time, evaluations left out."""

from __future__ import annotations

import os
import time
from pathlib import Path

from stable_baselines3.common.vec_env import VecEnv


class LearningClock:
    """
    Wall-clock and processor time spent in learning, evaluations left out.

    :param env: training environments; processes of theirs count as processor time too
    :param before: wall-clock and processor seconds of an earlier attempt that this one goes on from
    """

    def __init__(self, env: VecEnv, before: tuple[float, float] = (0.0, 0.0)) -> None:
        self._processes = [process.pid for process in getattr(env, "processes", [])]
        self._seconds, self._cpu_seconds = before
        self._started: tuple[float, float] | None = None

    def _now(self) -> tuple[float, float]:
        cpu_seconds = time.process_time()
        for process in self._processes:
            try:
                # User and system time, the 14th and 15th field; the second one, the name, may contain spaces.
                fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
                cpu_seconds += (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
            except OSError:
                pass  # no /proc on this system: only this process counts
        return time.perf_counter(), cpu_seconds

    def start(self) -> None:
        """Count from now on."""
        self._started = self._now()

    def stop(self) -> None:
        """Stop counting, if it was started."""
        if self._started is not None:
            seconds, cpu_seconds = self._now()
            self._seconds += seconds - self._started[0]
            self._cpu_seconds += cpu_seconds - self._started[1]
            self._started = None

    def read(self) -> tuple[float, float]:
        """
        Time counted so far; only while stopped.

        :return: wall-clock seconds, processor seconds
        """
        return self._seconds, self._cpu_seconds
