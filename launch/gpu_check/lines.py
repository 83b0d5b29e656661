"""Measurements that go on after a failure: one JSON line for each, written as soon as it is there."""

import argparse
import json
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from launch.gpu_check.timing import GPU

Measurement = tuple[dict[str, Any], Callable[[], dict[str, Any]]]
"""What a line says beforehand, and the function that measures the rest of it."""


def main(description: str, measurements: Callable[[bool], Iterable[Measurement]], argv: list[str] | None) -> int:
    """Run a program that writes ``--out``; returns 1 if a measurement failed or there is no GPU.

    Args:
        measurements: most important first; takes whether shapes have to be tiny.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="file of JSON lines")
    parser.add_argument("--dry", action="store_true", help="tiny shapes, on a CPU too: checks the program alone")
    options = parser.parse_args(argv)
    if not (GPU or options.dry):
        print("error: no CUDA device; --dry runs tiny shapes without one", file=sys.stderr)
        return 1
    failed = 0
    with options.out.open("w", encoding="utf-8") as file:
        for known, measure in measurements(options.dry):
            try:
                line = {**known, **measure()}
            except Exception as error:
                failed += 1
                line = {**known, "message": f"{type(error).__name__}: {error}"[:300]}
            file.write(json.dumps(line) + "\n")
            file.flush()
            print(json.dumps(line))
    return 1 if failed else 0
