"""Sum up a run: who ran it where and how, and what it took."""

import shlex
from dataclasses import dataclass
from typing import Any

import numpy as np

from lcl_ds.metrics import Row, loss_names
from lcl_ds.report.figures import column
from lcl_ds.report.numbers import ABSENT, count, duration, is_number, number, percent, when
from lcl_ds.report.run import Run

LAST_STEPS = 20
"""Steps that the final losses are averaged over."""


@dataclass(frozen=True)
class Command:
    """A command that goes on from here."""

    what: str
    words: str


def readable(name: str) -> str:
    """Write the name of a metric as words."""
    return name.replace("_", " ").capitalize()


def final(rows: list[Row], key: str) -> float:
    """Average the last steps of one key; NaN where none is finite."""
    values = column(rows[-LAST_STEPS:], key)
    with np.errstate(over="ignore"):
        return float(np.nanmean(values)) if np.isfinite(values).any() else float("nan")


def total(rows: list[Row], key: str) -> float:
    """Sum one key over all steps."""
    return float(np.nansum(column(rows, key)))


def key_figures(rows: list[Row]) -> dict[str, str]:
    """Sum up what was done, written for a reader, by the label to show with it; ``rows`` must not be empty."""
    seconds = total(rows, "step_s")
    padding = column(rows, "padding_fraction")
    last = f"mean of last {min(LAST_STEPS, len(rows))} steps"
    figures = {
        "Steps": f"{rows[-1]['step']:,}",
        "Images": count(total(rows, "images")),
        "Documents": count(total(rows, "documents")),
        "Tokens": count(total(rows, "tokens")),
        "Time in steps": duration(seconds),
        "Mean tokens per second": count(total(rows, "tokens") / seconds) if seconds else ABSENT,
        "Mean images per second": count(total(rows, "images") / seconds) if seconds else ABSENT,
        "Padding": percent(np.nanmean(padding) if np.isfinite(padding).any() else None),
        "Samples skipped": f"{total(rows, 'skipped_samples'):,.0f}",
        "Steps not applied": f"{sum(row.get('applied') is False for row in rows):,}",
        **{f"{readable(name)}, {last}": number(final(rows, name)) for name in loss_names(rows[-1])},
    }
    evaluating = total(rows, "evaluation_s")
    utilisation, memory = column(rows, "mfu"), column(rows, "memory_gb")
    if evaluating:
        figures["Time in evaluations"] = duration(evaluating)
    if np.isfinite(utilisation).any():
        figures["Model FLOPs utilisation"] = percent(np.nanmean(utilisation))
    if np.isfinite(memory).any():
        figures["Peak memory"] = f"{np.nanmax(memory):.1f} GiB"
    return figures


def state_of(run: Run) -> str:
    """Say how far a run is."""
    if run.planned_steps is None:
        return f"step {run.last_step:,}"
    if run.last_step >= run.planned_steps:
        return "finished"
    return f"step {run.last_step:,} of {run.planned_steps:,}"


def identity_of(run: Run) -> dict[str, str]:
    """Say when, where, on what and from which code a run was made, as far as its folder tells."""
    if not run.starts:
        return {}
    first, last = run.starts[0], run.starts[-1]
    facts = {"Started": when(first.get("started"))}
    if len(run.starts) > 1:
        times = "once" if len(run.starts) == 2 else f"{len(run.starts) - 1} times"
        facts["Continued"] = f"{times}, last {when(last.get('started'))}"
    facts["Host"] = _text(last.get("host"))
    facts["Device"] = device_of(last)
    facts["Ranks"] = _text(last.get("world_size"))
    stage = run.engine.get("zero_optimization")
    facts["ZeRO stage"] = _text(stage.get("stage") if isinstance(stage, dict) else None)
    facts["Precision"] = run.settings.get("precision", ABSENT)
    facts["Objective"] = run.settings.get("objective.name", ABSENT)
    facts["Commit"] = _text(last.get("git_commit"))[:12]
    return {label: fact for label, fact in facts.items() if fact != ABSENT}


def device_of(start: dict[str, Any]) -> str:
    """Name the device of a start."""
    if gpu := start.get("gpu"):
        return _text(gpu)
    cores = start.get("cpu_count")
    return f"CPU, {cores} cores" if is_number(cores) else ABSENT


def command_of(run: Run) -> str:
    """Write the command of the last start; empty where the folder does not tell."""
    words = run.starts[-1].get("argv") if run.starts else None
    if not isinstance(words, list):
        return ""
    return shlex.join(str(word) for word in words if not str(word).startswith("--local_rank"))


def _text(value: Any) -> str:
    return ABSENT if value is None or value == "" else str(value)


def commands_after(run: Run) -> list[Command]:
    """Say how to go on with a run."""
    folder = shlex.quote(str(run.folder))
    if not (run.folder / "checkpoints" / "latest").is_file():
        return []
    data = "" if run.settings.get("evaluation.shards", "None") != "None" else " --data FOLDER"
    commands = [
        Command("Release the encoder", f"lcl convert {folder} out"),
        Command("Measure more", f"lcl evaluate {folder} --task linear attentive knn{data}"),
        Command("Compare with another run", f"lcl report {folder} OTHER_RUN"),
    ]
    if run.planned_steps and run.last_step < run.planned_steps and (command := command_of(run)):
        launcher = "python" if run.starts[-1].get("world_size") == 1 else "deepspeed"
        commands.insert(0, Command("Train on", f"{launcher} {command}" if command.startswith("launch/") else command))
    return commands
