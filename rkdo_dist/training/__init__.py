"""Training: the loop, the step, strategies of summation, persistent rows, checkpoints and log of a run."""
