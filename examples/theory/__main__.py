"""`python -m examples.theory [--out DIR] [--repeats N]`, also as `rkdo verify-theory`."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from examples.theory import conditions, results, statements
from rkdo_dist.console import say
from rkdo_dist.studies import sheets


def verify(out: Path | None, repeats: int) -> int:
    """Measure, print a table and a list, and write `theory.json` and a figure into `out`.

    Returns:
        0 if every statement held on every case, otherwise 1.

    Raises:
        ValueError: for fewer than one repeat.
    """
    if repeats < 1:
        raise ValueError(f"--repeats must be at least 1, got {repeats}")
    console = sheets.console()
    with console.status("measuring"):
        tallies, findings = statements.measure(repeats=repeats), conditions.findings()
    sheets.show(console, [results.statement_table(tallies)])
    say(console, "What the statements need beyond what they say\n", "bold")
    for number, finding in enumerate(findings, start=1):
        say(console, results.finding_text(number, finding, console.width) + "\n")
    if out:
        for path in results.write_results(out, tallies, findings):
            say(console, f"written: {path}")
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
