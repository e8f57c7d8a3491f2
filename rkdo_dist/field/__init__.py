"""Floor 1: the mathematics of the supervisory field (torch only: no configuration, no ranks, no files)."""
