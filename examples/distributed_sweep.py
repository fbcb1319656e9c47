"""Algorithms x seeds x settings on Ray: a local cluster, or several machines with --address."""

import argparse

from sb3_agpo.benchmark.__main__ import main

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--steps", type=int, default=10_000, help="environment steps of each run (default: %(default)s)")
parser.add_argument("--seeds", default="0-2", help="seeds of each setting (default: %(default)s)")
parser.add_argument("--address", help="of a Ray cluster (default: one is started here)")
options = parser.parse_args()

where = ["--engine", "ray", *(["--address", options.address] if options.address else [])]
common = ["learning", "--envs", "InvertedPendulum-v5", "--seeds", options.seeds, "--steps", str(options.steps),
          "--eval-every", str(max(1, options.steps // 5)), "--processes", "2", "--output", "sweep.csv", *where]  # fmt: skip
main([*common, "--algorithms", "random", "sac", "agpo-adaptive-nomatch"])
for horizon in (2, 8):
    main([*common, "--algorithms", "agpo-adaptive-nomatch", "--set", f"horizon={horizon}", "--label", f"agpo-h{horizon}"])
main(["report", "--input", "sweep.csv", "--output", "sweep"])
