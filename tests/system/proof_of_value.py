"""Show that a change changed nothing: ``python -m tests.system.proof_of_value BEFORE AFTER``.

BEFORE and AFTER are run folders of the same command, one made by the code before the change, for instance with

    deepspeed launch/train.py --ds_config ds_configs/zero3.json --run_dir /tmp/before

and the other after it. Every number of ``metrics.jsonl`` has to be equal to the last bit, but for those a clock gives.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

MEASURED = {"step_s", "data_s", "images_per_s", "tokens_per_s", "mfu", "memory_gb"}
"""Keys whose values no two runs share."""


def read_steps(run: Path) -> list[dict[str, Any]]:
    lines = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [{key: value for key, value in json.loads(line).items() if key not in MEASURED} for line in lines]


def first_difference(before: list[dict[str, Any]], after: list[dict[str, Any]]) -> str | None:
    """Name the first step that differs, with its values; None where all are equal, NaN to NaN as well."""
    for number, (old, new) in enumerate(zip(before, after, strict=False), 1):
        changed = [key for key in {**old, **new} if repr(old.get(key)) != repr(new.get(key))]
        if changed:
            return f"line {number}: " + ", ".join(f"{key} {old.get(key)!r} -> {new.get(key)!r}" for key in changed)
    return None if len(before) == len(after) else f"{len(before)} steps before, {len(after)} after"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.system.proof_of_value", description=__doc__.splitlines()[0])
    parser.add_argument("before", type=Path)
    parser.add_argument("after", type=Path)
    arguments = parser.parse_args(argv)
    before, after = read_steps(arguments.before), read_steps(arguments.after)
    difference = first_difference(before, after)
    print(difference or f"{len(before)} steps are equal in all {len(before[0])} numbers")
    return 1 if difference else 0


if __name__ == "__main__":
    sys.exit(main())
