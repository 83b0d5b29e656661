"""Train each objective on the same images and compare the encoders: ``python launch/compare_objectives.py``.

Every run is ``launch/train.py`` with one setting changed. Rows per step are chosen so that a step holds about as many
images as the recipe's own objective sees, and steps so that every run sees ``--images`` of them. A run that is finished
is not repeated, so the comparison can be stopped and continued.
"""

import argparse
import json
import os
import platform
import shlex
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table

from lcl_ds.assembly import lane_settings
from lcl_ds.bench.table import open_console
from lcl_ds.cli import run_command
from lcl_ds.config import Config, load_config, recipe_path
from lcl_ds.data.corpus import open_data
from lcl_ds.data.stream.loader import BatchLoader
from lcl_ds.environment import versions
from lcl_ds.errors import UserError
from lcl_ds.files import check_output, write_whole
from lcl_ds.metrics import read_metrics
from lcl_ds.objectives import NAMES, objective_module

HERE = Path(__file__).resolve().parent
SAMPLED_ROWS = 128
"""Rows that images per row are measured on."""


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--recipe", default="demo")
    parser.add_argument("--ds_config", type=Path, default=HERE.parent / "ds_configs" / "zero3.json")
    parser.add_argument("--objectives", nargs="+", default=list(NAMES), choices=NAMES)
    parser.add_argument("--images", type=int, default=20_000, help="images that every run sees")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time; with several, each uses one core")
    parser.add_argument("--out", type=Path, default=Path("runs/objectives"))
    parser.add_argument("--json", type=Path, help="where to write the figures")
    parser.add_argument("overrides", nargs="*", metavar="key.sub=value")
    return parser


def main(argv: list[str] | None = None) -> int:
    arguments = build_parser().parse_intermixed_args(argv)
    command = "python launch/compare_objectives.py " + shlex.join(sys.argv[1:] if argv is None else argv)
    return run_command(lambda: compare(arguments, command))


def compare(arguments: argparse.Namespace, command: str) -> int:
    """Run what is not finished, then show and write the figures.

    Raises:
        UserError: a run failed, or a file cannot be written.
    """
    check_output("--json", arguments.json)
    recipe = recipe_path(arguments.recipe)
    wanted = images_per_row(load_config(recipe, arguments.overrides))
    settings = {}
    for name in arguments.objectives:
        overrides = [*arguments.overrides, f"objective.name={name}"]
        config = load_config(recipe, overrides)
        per_row = images_per_row(config)
        rows = max(1, round(config.train.global_batch_rows * wanted / per_row))
        steps = max(1, round(arguments.images / (rows * per_row)))
        sizes = [f"train.global_batch_rows={rows}", f"train.steps={steps}", "checkpoint.keep=1"]
        settings[name] = [*overrides, *sizes]

    def train(name: str, seed: int) -> None:
        command = [sys.executable, str(HERE / "train.py"), "--ds_config", str(arguments.ds_config)]
        command += ["--recipe", str(recipe), "--run_dir", str(arguments.out / f"{name}-{seed}")]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"} if arguments.jobs > 1 else None
        ended = subprocess.run([*command, *settings[name], f"train.seed={seed}"], check=False, env=environment)
        if ended.returncode:
            raise UserError(f"{arguments.out / f'{name}-{seed}'}: training ended with exit code {ended.returncode}")

    with ThreadPoolExecutor(arguments.jobs) as pool:
        runs = [pool.submit(train, name, seed) for seed in arguments.seeds for name in settings]
        for run in runs:
            run.result()
    results = {
        name: {
            "settings": settings[name],
            **summary(name, [arguments.out / f"{name}-{seed}" for seed in arguments.seeds]),
        }
        for name in settings
    }
    open_console().print(table_of(results))
    if arguments.json:
        record = {
            "command": command,
            "date": date.today().isoformat(),
            "machine": f"CPU, {platform.machine()}",
            "versions": versions(["torch", "transformers", "deepspeed"]),
            "results": results,
        }
        write_whole(arguments.json, json.dumps(record, indent=1) + "\n")
    return 0


def images_per_row(config: Config) -> float:
    """Mean over the first rows of the stream."""
    data = open_data(config.data)
    batch = next(BatchLoader(data.sources, lane_settings(config), data.tokenizer, SAMPLED_ROWS))
    return batch.image_count / SAMPLED_ROWS


def summary(name: str, folders: list[Path]) -> dict[str, Any]:
    """Figures of the runs of one objective, lists over seeds."""
    metrics = [read_metrics(folder) for folder in folders]
    evaluations = [json.loads((folder / "evaluation.json").read_text()) for folder in folders]
    losses = objective_module(name).Objective.losses
    return {
        "decoder_passes_per_sample": objective_module(name).Objective.decoder_passes,
        "images": [sum(row["images"] for row in rows) for rows in metrics],
        "decoder_tokens_per_image": [
            sum(row["tokens"] for row in rows) / sum(row["images"] for row in rows) for rows in metrics
        ],
        "losses": {
            loss: {
                "first": [float(np.mean([row[loss] for row in rows[:10]])) for rows in metrics],
                "last": [float(np.mean([row[loss] for row in rows[-10:]])) for rows in metrics],
            }
            for loss in losses
        },
        "probe": {
            label: {kind: [e["probe"][label][kind] for e in evaluations] for kind in evaluations[0]["probe"][label]}
            for label in evaluations[0]["probe"]
        },
    }


def table_of(results: dict[str, Any]) -> Table:
    """Probe accuracies as mean and range over seeds, with what they cost."""
    labels = list(next(iter(results.values()))["probe"])
    table = Table(title="Linear probe after equal images seen: mean (lowest to highest seed)")
    table.add_column("objective")
    for column in ("images", "decoder passes", "decoder tokens/image", *labels):
        table.add_column(column, justify="right")
    for name, result in results.items():
        cells = [f"{np.mean(result['images']):,.0f}", str(result["decoder_passes_per_sample"])]
        cells.append(f"{np.mean(result['decoder_tokens_per_image']):.1f}")
        table.add_row(name, *cells, *(spread(result["probe"][label]["trained"]) for label in labels))
    for kind in ("untrained", "raw_pixels", "chance"):
        cells = [spread([v for r in results.values() for v in r["probe"][label][kind]]) for label in labels]
        table.add_row(kind.replace("_", " "), "", "", "", *cells, style="dim")
    return table


def spread(values: list[float]) -> str:
    return f"{np.mean(values):.1%} ({min(values):.1%} to {max(values):.1%})"


if __name__ == "__main__":
    sys.exit(main())
