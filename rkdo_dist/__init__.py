"""rkdo_dist: Recursive KL Divergence Optimization at scale."""

__version__ = "0.1.0"
