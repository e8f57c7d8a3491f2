"""Cost of a step: measured, by formula, and checked before training."""
