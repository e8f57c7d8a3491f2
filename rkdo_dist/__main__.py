"""`python -m rkdo_dist`, the same as `rkdo`."""

from rkdo_dist.cli import main

if __name__ == "__main__":
    main()
