"""`python -m rkdo_dist`, the same as `rkdo`."""

import signal


def main() -> None:
    """The command line; a Ctrl-C before it knows what to do with one ends the process without a traceback."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    from rkdo_dist.cli import main as command_line

    command_line()


if __name__ == "__main__":
    main()
