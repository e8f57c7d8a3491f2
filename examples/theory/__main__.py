"""`python -m examples.theory [--out DIR] [--repeats N]`, also as `rkdo verify-theory`."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from rich.console import Console

from examples.theory import conditions, results, statements


def verify(out: Path | None, repeats: int) -> int:
    """Measure, print two tables, and write `theory.json` and a figure into `out`.

    Returns:
        0 if every statement held on every case, otherwise 1.

    Raises:
        ValueError: for fewer than one repeat.
    """
    if repeats < 1:
        raise ValueError(f"--repeats must be at least 1, got {repeats}")
    console = Console()
    with console.status("measuring"):
        tallies, findings = statements.measure(repeats=repeats), conditions.findings()
    console.print(results.statement_table(tallies))
    console.print(results.finding_table(findings))
    if out:
        for path in results.write_results(out, tallies, findings):
            console.print(f"written: {path}", soft_wrap=True)
    return 0 if all(tally.holds for tally in tallies) else 1


def main() -> int:
    """Parse the command line and run."""
    parser = argparse.ArgumentParser(prog="python -m examples.theory", description=__doc__)
    parser.add_argument("--out", type=Path, metavar="DIR", help="write theory.json and a figure here (.png and .svg)")
    parser.add_argument("--repeats", type=int, default=1, metavar="N", help="random draws of every kind (default 1)")
    options = parser.parse_args()
    try:
        return verify(options.out, options.repeats)
    except ValueError as error:
        parser.error(str(error))


if __name__ == "__main__":
    sys.exit(main())
