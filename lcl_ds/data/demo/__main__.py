"""``python -m lcl_ds.data.demo OUT`` makes the embedded demo corpus."""

import argparse
import sys
from pathlib import Path

from lcl_ds.cli import run_command
from lcl_ds.data.demo.corpus import build_demo


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m lcl_ds.data.demo", description="Make the embedded demo corpus.")
    parser.add_argument("out", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args(argv)

    def make() -> int:
        build_demo(arguments.out, seed=arguments.seed)
        print(arguments.out)
        return 0

    return run_command(make)


if __name__ == "__main__":
    sys.exit(main())
