"""What to watch and keep of a training run: figures, callbacks and logger outputs."""
