"""Checkpoints that a run goes on from bit for bit: plain data, files, and the state of environments."""
