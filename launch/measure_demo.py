"""Train the demo over several seeds and evaluate each encoder, trained and untrained.

``python launch/measure_demo.py --json bench_results/demo_seeds_cpu.json`` starts ``launch/train.py`` for every seed and
``python -m lcl_ds.evaluate`` for what it leaves. What is finished is not repeated, so it can be stopped and continued.
"""

import argparse
import json
import shlex
import subprocess
import sys
from collections import defaultdict
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table

from lcl_ds.bench.table import open_console
from lcl_ds.cli import run_command
from lcl_ds.environment import machine, versions
from lcl_ds.errors import UserError
from lcl_ds.files import check_output, write_whole

HERE = Path(__file__).resolve().parent
TASKS = ("linear", "attentive", "knn", "zeroshot", "retrieval")
ENCODERS: dict[str, list[str]] = {"trained": [], "untrained": ["--untrained"]}
"""Options of the evaluation by what is evaluated."""


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ds_config", type=Path, default=HERE.parent / "ds_configs" / "zero3.json")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--out", type=Path, default=Path("runs/demo_seeds"))
    parser.add_argument("--json", type=Path, help="where to write the figures")
    parser.add_argument("overrides", nargs="*", metavar="key.sub=value")
    return parser


def main(argv: list[str] | None = None) -> int:
    arguments = build_parser().parse_intermixed_args(argv)
    command = "python launch/measure_demo.py " + shlex.join(sys.argv[1:] if argv is None else argv)
    return run_command(lambda: measure(arguments, command))


def measure(arguments: argparse.Namespace, command: str) -> int:
    """Run what is not finished, then show and write the figures.

    Raises:
        UserError: a run or an evaluation failed, or a file cannot be written.
    """
    check_output("--json", arguments.json)
    figures: dict[str, dict[int, list[dict[str, Any]]]] = {name: {} for name in ENCODERS}
    for seed in arguments.seeds:
        run = arguments.out / f"seed-{seed}"
        train = [str(HERE / "train.py"), "--ds_config", str(arguments.ds_config), "--run_dir", str(run)]
        execute([*train, *arguments.overrides, f"train.seed={seed}"])
        for name, options in ENCODERS.items():
            found = arguments.out / f"seed-{seed}-{name}.json"
            if not found.exists():
                evaluate = ["-m", "lcl_ds.evaluate", str(run), "--task", *TASKS, "--json", str(found)]
                execute([*evaluate, "--cache", str(arguments.out / "features"), *options])
            figures[name][seed] = json.loads(found.read_text())["figures"]
    open_console().print(table_of(figures))
    if arguments.json:
        record = {
            "command": command,
            "date": date.today().isoformat(),
            "machine": machine(),
            "versions": versions(),
            "figures": figures,
        }
        write_whole(arguments.json, json.dumps(record, indent=1) + "\n")
    return 0


def execute(arguments: list[str]) -> None:
    """Run Python with these arguments. Raises: UserError when it does not end well."""
    ended = subprocess.run([sys.executable, *arguments], check=False)
    if ended.returncode:
        raise UserError(f"{shlex.join(arguments)}: ended with exit code {ended.returncode}")


def table_of(figures: dict[str, dict[int, list[dict[str, Any]]]]) -> Table:
    """Make a table with a row for each figure: mean and deviation over seeds, in percent."""
    values: dict[tuple[str, ...], dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for encoder, seeds in figures.items():
        for rows in seeds.values():
            for row in rows:
                key = tuple(row.get(name) or "" for name in ("task", "label", "features", "metric"))
                values[key][encoder].append(100 * row["value"])
    table = Table("task", "label", "features", "metric", *figures, title="mean and deviation over seeds, percent")
    for key, found in values.items():
        cells = (found[encoder] for encoder in figures)
        table.add_row(*key, *(f"{np.mean(cell):.1f} ± {np.std(cell):.1f}" if cell else "" for cell in cells))
    return table


if __name__ == "__main__":
    sys.exit(main())
