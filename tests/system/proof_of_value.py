"""Show that a change changed nothing: ``python -m tests.system.proof_of_value BEFORE AFTER``.

BEFORE and AFTER are run folders of the same command, one made by the code before the change, for instance with

    deepspeed launch/train.py --ds_config ds_configs/zero3.json --run_dir /tmp/before

and the other after it. Keys of ``metrics.jsonl`` and their order have to be the same, and every number equal to the
last bit, but for those that a clock gives, or the memory of a GPU.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

from lcl_ds.metrics import read_metrics
from tests.support.runs import without_timing


def first_difference(before: list[dict[str, Any]], after: list[dict[str, Any]]) -> str | None:
    """Name the first step that differs, with its values; None where all are equal, NaN to NaN as well."""
    for number, (old, new) in enumerate(zip(before, after, strict=False), 1):
        if [*old] != [*new]:
            return f"line {number}: keys {', '.join(old)} -> {', '.join(new)}"
        changed = [key for key in old if repr(old[key]) != repr(new[key])]
        if changed:
            return f"line {number}: " + ", ".join(f"{key} {old[key]!r} -> {new[key]!r}" for key in changed)
    return None if len(before) == len(after) else f"{len(before)} steps before, {len(after)} after"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.system.proof_of_value", description=__doc__.splitlines()[0])
    parser.add_argument("before", type=Path)
    parser.add_argument("after", type=Path)
    arguments = parser.parse_args(argv)
    before, after = (without_timing(read_metrics(run)) for run in (arguments.before, arguments.after))
    difference = first_difference(before, after)
    print(difference or f"{len(before)} steps are equal in all {len(before[0])} numbers")
    return 1 if difference else 0


if __name__ == "__main__":
    sys.exit(main())
