"""The mathematics of the supervisory field (torch only: no configuration, no ranks, no files)."""
