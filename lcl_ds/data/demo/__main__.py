"""``python -m lcl_ds.data.demo OUT`` makes the embedded demo corpus, with ``--textured`` the harder one."""

import argparse
import sys
from pathlib import Path

from lcl_ds.cli import positive, run_command
from lcl_ds.data.demo.corpus import build_demo
from lcl_ds.data.demo.textured import ensure_textured
from lcl_ds.data.settings import TexturedSettings


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m lcl_ds.data.demo", description="Make an embedded corpus.")
    parser.add_argument("out", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--textured", action="store_true", help="the harder corpus, or sets of it that are missing")
    parser.add_argument("--documents", type=positive, help="of the harder corpus")
    parser.add_argument("--mismatch", type=float, help="fraction of its images that are described as another picture")
    parser.add_argument("--pairs", action="store_true", default=None, help="its images with their sentences")
    arguments = parser.parse_args(argv)

    def make() -> int:
        if arguments.textured:
            chosen = {name: getattr(arguments, name) for name in ("seed", "documents", "mismatch", "pairs")}
            given = {name: value for name, value in chosen.items() if value is not None}
            ensure_textured(TexturedSettings(folder=str(arguments.out), **given))
        else:
            build_demo(arguments.out, seed=arguments.seed)
        print(arguments.out)
        return 0

    return run_command(make)


if __name__ == "__main__":
    sys.exit(main())
