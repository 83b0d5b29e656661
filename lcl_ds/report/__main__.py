"""``python -m lcl_ds.report RUN [RUN ...] [--out FILE]`` writes the page about a run, or compares several on one."""

import argparse
import sys
from pathlib import Path

from lcl_ds.cli import program_name, run_command
from lcl_ds.report.page import write_report


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog=program_name("report"), description=__doc__)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="run folder; several are compared")
    parser.add_argument(
        "--out", type=Path, metavar="FILE", help="HTML file to write (default: in the first run folder)"
    )
    arguments = parser.parse_args(argv)

    def report() -> int:
        print(write_report(arguments.runs, arguments.out))
        return 0

    return run_command(report)


if __name__ == "__main__":
    sys.exit(main())
