"""The figures of one run as a small file: what is there is not run again, on whatever machine it was made."""

import hashlib
import json
from collections.abc import Collection
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np

from lcl_ds.config import load_config, recipe_path
from lcl_ds.environment import git_commit, git_modified, machine, versions
from lcl_ds.errors import UserError
from lcl_ds.files import read_json, read_yaml, write_whole
from lcl_ds.metrics import Row, loss_names, read_metrics
from lcl_ds.objectives import objective_module
from lcl_ds.settings import flatten
from lcl_ds.study.jobs import Job, Run
from lcl_ds.study.settings import Encoder, Study, arguments_of, config_of

VERSION = 1
"""Of the file; grows when a key changes its meaning."""
POINTS = 60
"""Points of a learning curve at most; each is the mean of as many steps."""
KEPT = ("task", "label", "features", "metric", "value", "low", "high", "count", "chance")
"""Of each figure of the evaluation."""

Record = dict[str, Any]


def record_path(results: Path, run: Run) -> Path:
    """Say where the figures of a run are."""
    return results / run.study / f"{run.name}.json"


def settings_of(study: Study, run: Run) -> dict[str, Any]:
    """Say what a run's figures are of; another recipe or other settings are another run."""
    return {
        "recipe": read_yaml(recipe_path(study.recipe)),
        "overrides": run.overrides,
        "ds_config": study.ds_config,
        "ranks": study.ranks,
        "match": study.match,
        "warmup": study.warmup,
        "measurements": [measurement.model_dump(exclude_defaults=True) for measurement in study.measurements],
    }


def find_record(results: Path, study: Study, run: Run) -> Record | None:
    """Read the figures of a run; None where there are none.

    Raises:
        UserError: they are of other settings, or the file is damaged.
    """
    path = record_path(results, run)
    if not path.exists():
        return None
    record = read_json(path)
    if not isinstance(record, dict) or record.get("version") != VERSION:
        raise UserError(f"{path}: holds no figures of a run of a study; remove it")
    wanted, known = (flatten(json.loads(json.dumps(tree))) for tree in (settings_of(study, run), record["settings"]))
    differing = [
        key
        for key in sorted(wanted.keys() | known.keys())
        if wanted.get(key) != known.get(key) and {} not in (wanted.get(key), known.get(key))
    ]
    # A recipe may change where the study overrides it: what counts is the run that comes out.
    if differing and fingerprint_of(study, Job(run, record["sizes"], None, None)) == record["fingerprint"]:
        differing = [key for key in differing if not key.startswith(("recipe.", "overrides."))]
    if differing:
        key = differing[0]
        raise UserError(
            f"{path}: was made with {key}={known.get(key)!r}, and the study says {wanted.get(key)!r}; remove the "
            "file to run it again, or give the variant another name"
        )
    return record


def fingerprint_of(study: Study, job: Job) -> str:
    """Hash everything that decides a run's figures: runs of several studies may be the same."""
    config = load_config(recipe_path(study.recipe), arguments_of(job.run.overrides | job.sizes))
    tree = {
        # A setting that is added later, and has its default, is no other run.
        "config": config.model_dump(mode="json", exclude={"name"}, exclude_defaults=True),
        "objective": config.objective.name,  # of each objective its own name is the default
        "ds_config": study.ds_config,
        "ranks": study.ranks,
        "measurements": [measurement.model_dump() for measurement in study.measurements],
    }
    return hashlib.sha256(json.dumps(tree, sort_keys=True).encode()).hexdigest()


def find_same(results: Path, study: Study, job: Job, encoders: Collection[Encoder]) -> Record | None:
    """Find the figures of the same run among those of other studies, with all that is to be measured; None: nowhere."""
    fingerprint = fingerprint_of(study, job)
    for path in sorted(results.glob("*/*.json")):
        record = read_json(path)
        if record.get("fingerprint") == fingerprint and set(encoders) <= record["figures"].keys():
            of_run = {"study": job.run.study, "variant": job.run.variant, "budget": job.run.budget}
            figures = {encoder: record["figures"][encoder] for encoder in encoders}
            origin = record.get("copy_of", f"{path.parent.name}/{path.stem}")
            return {**record, **of_run, "settings": settings_of(study, job.run), "figures": figures, "copy_of": origin}
    return None


def code_now() -> dict[str, Any]:
    """Say which code runs now; asked before a run, for the files may change while it trains."""
    return {
        "git_commit": git_commit(),
        "git_modified": git_modified("lcl_ds", "kernels", "launch", "ds_configs"),
        "versions": versions(),
    }


@dataclass(frozen=True)
class Finished:
    """What a run left, before it becomes a record."""

    run_dir: Path
    code: dict[str, Any]
    """From :func:`code_now`."""
    figures: dict[Encoder, list[dict[str, Any]]]
    commands: list[str]


def make_record(study: Study, path: Path, job: Job, finished: Finished) -> Record:
    """Put together what tables and the page need to know of a run."""
    run, rows = job.run, read_metrics(finished.run_dir)
    objective = config_of(study, path, run.variant).objective.name
    return {
        "version": VERSION,
        "study": run.study,
        "variant": run.variant,
        "budget": run.budget,
        "seed": run.seed,
        "settings": settings_of(study, run),
        "sizes": job.sizes,
        "fingerprint": fingerprint_of(study, job),
        "objective": objective,
        "decoder_passes_per_sample": objective_module(objective).Objective.decoder_passes,
        "steps": rows[-1]["step"],
        **{key: sum(row[key] for row in rows) for key in ("images", "documents", "tokens", "text_tokens")},
        "tflop": round(sum(row["tflop"] for row in rows), 3),
        "seconds_in_steps": round(sum(row["step_s"] for row in rows), 1),
        "skipped_steps": sum(row["applied"] is False for row in rows),
        "curves": curves_of(rows),
        "figures": {
            encoder: [{key: figure[key] for key in KEPT if key in figure} | _shots(figure) for figure in figures]
            for encoder, figures in finished.figures.items()
        },
        "commands": finished.commands,
        "date": date.today().isoformat(),
        **finished.code,
        "machine": machine(),
    }


def _shots(figure: dict[str, Any]) -> dict[str, int]:
    shots = figure.get("settings", {}).get("shots")
    return {} if shots is None else {"shots": shots}


def curves_of(rows: list[Row]) -> dict[str, list[float]]:
    """Thin the losses of a run: means over equal parts of its steps, with the images seen at the end of each."""
    parts = np.array_split(np.arange(len(rows)), min(POINTS, len(rows)))
    images = np.cumsum([row["images"] for row in rows])
    curves: dict[str, list[float]] = {
        "step": [rows[part[-1]]["step"] for part in parts],
        "images": [int(images[part[-1]]) for part in parts],
    }
    for name in loss_names(rows[-1]):
        values = np.array([row[name] for row in rows], dtype=float)
        curves[name] = [round(float(values[part].mean()), 4) for part in parts]
    return curves


def write_record(results: Path, run: Run, record: Record) -> Path:
    """Put a run's figures in place; returns the path."""
    path = record_path(results, run)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, json.dumps(record, indent=1) + "\n")
    return path
