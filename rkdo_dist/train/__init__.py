"""Floor 6: one training run (runtime, journal, step, loop)."""
