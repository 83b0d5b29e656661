"""Train the same recipe with AdamW and with Muon, and probe weights and moving average of each.

``python launch/compare_optimizers.py`` starts ``launch/train.py`` for every optimizer and seed. A run that is finished
is not repeated, so the comparison can be stopped and continued.
"""

import argparse
import json
import platform
import shlex
import subprocess
import sys
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table

from lcl_ds.bench.table import open_console
from lcl_ds.cli import run_command
from lcl_ds.environment import versions
from lcl_ds.errors import UserError
from lcl_ds.files import check_output, write_whole
from lcl_ds.metrics import read_metrics

HERE = Path(__file__).resolve().parent
VARIANTS = {
    "adamw": ["train.optimizer=adamw"],
    "muon": ["train.optimizer=muon"],
    "muon_0.6": ["train.optimizer=muon", "train.muon_rms=0.6"],
}
"""Overrides by name. The last one's updates are three times as large: in short runs AdamW's are, too."""
AVERAGED_STEPS = 10
"""Steps that a point of a loss curve is the mean of."""


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--recipe", default="demo")
    parser.add_argument("--ds_config", type=Path, default=HERE.parent / "ds_configs" / "zero2.json")
    parser.add_argument("--ema_decay", type=float, default=0.98)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--out", type=Path, default=Path("runs/optimizers"))
    parser.add_argument("--json", type=Path, help="where to write the figures")
    parser.add_argument("overrides", nargs="*", metavar="key.sub=value")
    return parser


def main(argv: list[str] | None = None) -> int:
    arguments = build_parser().parse_intermixed_args(argv)
    command = "python launch/compare_optimizers.py " + shlex.join(sys.argv[1:] if argv is None else argv)
    return run_command(lambda: compare(arguments, command))


def compare(arguments: argparse.Namespace, command: str) -> int:
    """Run what is not finished, then show and write the figures.

    Raises:
        UserError: a run failed, or a file cannot be written.
    """
    check_output("--json", arguments.json)
    shared = [*arguments.overrides, f"train.ema_decay={arguments.ema_decay}", "checkpoint.keep=1"]
    for seed in arguments.seeds:
        for name, overrides in VARIANTS.items():
            folder = arguments.out / f"{name}-{seed}"
            program = [sys.executable, str(HERE / "train.py"), "--ds_config", str(arguments.ds_config)]
            program += ["--recipe", arguments.recipe, "--run_dir", str(folder)]
            ended = subprocess.run([*program, *shared, *overrides, f"train.seed={seed}"], check=False)
            if ended.returncode:
                raise UserError(f"{folder}: training ended with exit code {ended.returncode}")
    results = {name: summary([arguments.out / f"{name}-{seed}" for seed in arguments.seeds]) for name in VARIANTS}
    open_console().print(table_of(results))
    if arguments.json:
        record = {
            "command": command,
            "date": date.today().isoformat(),
            "machine": f"CPU, {platform.machine()}",
            "versions": versions(["torch", "transformers", "deepspeed"]),
            "settings": shared,
            "results": results,
        }
        write_whole(arguments.json, json.dumps(record, indent=1) + "\n")
    return 0


def summary(folders: list[Path]) -> dict[str, Any]:
    """Gather the figures of one optimizer's runs: lists over seeds, curves as means of some steps."""
    evaluations = [json.loads((folder / "evaluation.json").read_text()) for folder in folders]
    return {
        "curves": {
            key: [curve(folder, key) for folder in folders] for key in ("loss", "generation_loss", "contrastive_loss")
        },
        "probe": {
            label: {kind: [e["probe"][label][kind] for e in evaluations] for kind in scores}
            for label, scores in evaluations[0]["probe"].items()
        },
        "recall_at_1": [e["retrieval"]["recall_at_1"] for e in evaluations],
    }


def curve(folder: Path, key: str) -> list[float]:
    """Average a column of a run's metrics over every ten steps."""
    values = np.array([row[key] for row in read_metrics(folder)], dtype=float)
    points = values[: len(values) // AVERAGED_STEPS * AVERAGED_STEPS].reshape(-1, AVERAGED_STEPS)
    return [round(float(value), 4) for value in points.mean(1)]


def table_of(results: dict[str, dict[str, Any]]) -> Table:
    """Make a table with means and deviations over seeds."""
    table = Table(title="The same steps with each optimizer, mean and deviation over seeds")
    for column in ("", *results):
        table.add_column(column, justify="right" if column else "left")
    first = next(iter(results.values()))
    for key in first["curves"]:
        ends = [[curve[-1] for curve in result["curves"][key]] for result in results.values()]
        table.add_row(f"{key}, last {AVERAGED_STEPS} steps", *(_mean(values, "{:.3f}") for values in ends))
    for label, scores in first["probe"].items():
        for kind in scores:
            values = [result["probe"][label][kind] for result in results.values()]
            table.add_row(f"linear probe of {label}, {kind}", *(_mean(v, "{:.1%}") for v in values))
    table.add_row("image to context, recall at 1", *(_mean(r["recall_at_1"], "{:.1%}") for r in results.values()))
    return table


def _mean(values: list[float], form: str) -> str:
    return f"{form.format(np.mean(values))} ± {form.format(np.std(values))}"


if __name__ == "__main__":
    sys.exit(main())
