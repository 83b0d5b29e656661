"""Read what a run folder says about its run."""

import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from lcl_ds.errors import UserError
from lcl_ds.files import printable
from lcl_ds.metrics import METRICS, Row, read_metrics
from lcl_ds.report.examples import Pictures, read_pictures

EVALUATION = "evaluation.json"
"""File of a run folder with the figures of its final evaluation."""
SHOWN_FILES = ("config.yaml", "ds_config.json", "environment.json")


@dataclass(frozen=True)
class Run:
    """A run, as its folder tells of it."""

    name: str
    folder: Path
    rows: list[Row]
    """At least one."""
    settings: dict[str, str]
    """``key.sub: text``; empty without ``config.yaml``."""
    starts: list[dict[str, Any]]
    """What each start of the run wrote into ``environment.json``, the first one first."""
    evaluation: dict[str, Any]
    """``evaluation.json``; empty without it."""
    pictures: Pictures
    """What the final evaluation shows in pictures."""
    engine: dict[str, Any] = field(default_factory=dict)
    """``ds_config.json``."""

    @property
    def last_step(self) -> int:
        return int(self.rows[-1]["step"])

    @property
    def planned_steps(self) -> int | None:
        """Say how many steps the settings ask for; None where they do not say."""
        text = self.settings.get("train.steps", "")
        return int(text) if text.isdecimal() else None

    def evaluated_rows(self) -> list[Row]:
        """Choose the steps after which there was an evaluation."""
        return [row for row in self.rows if isinstance(row.get("evaluation"), dict)]

    def files(self) -> list[tuple[str, str]]:
        """Read the files of settings and environment, by name."""
        paths = [self.folder / name for name in SHOWN_FILES]
        return [(path.name, path.read_text(encoding="utf-8", errors="replace")) for path in paths if path.is_file()]


def read_runs(run_dirs: Iterable[Path]) -> list[Run]:
    """Read run folders, each once.

    Raises:
        UserError: a run folder without a recorded step or with an unreadable file; all of them are named.
    """
    runs, problems = [], []
    for name, folder in _by_name(run_dirs).items():
        try:
            runs.append(_read_run(name, folder))
        except UserError as error:
            problems += error.problems
    if problems:
        raise UserError(problems)
    return runs


def _read_run(name: str, folder: Path) -> Run:
    rows = read_metrics(folder)
    if not rows:
        raise UserError(f"{folder / METRICS}: holds no complete step yet; let the run do at least one")
    evaluation = _read_evaluation(folder / EVALUATION)
    starts = sorted((folder / "history").glob("*/environment.json")) or [folder / "environment.json"]
    return Run(
        name=name,
        folder=folder,
        rows=rows,
        settings=_read_settings(folder / "config.yaml"),
        starts=[_object_in(path) for path in starts if path.is_file()],
        evaluation=evaluation,
        pictures=read_pictures(folder, evaluation.get("step")),
        engine=_object_in(folder / "ds_config.json"),
    )


def _by_name(run_dirs: Iterable[Path]) -> dict[str, Path]:
    """Name each run folder once, by as much of the end of its path as distinguishes it from the others."""
    folders = {path.resolve(): path for path in run_dirs}
    depths = range(1, max(len(folder.parts) for folder in folders) + 1)
    by_depth = ({"/".join(folder.parts[-depth:]): path for folder, path in folders.items()} for depth in depths)
    names = next(names for names in by_depth if len(names) == len(folders))
    return {printable(name): path for name, path in names.items()}


def _read_evaluation(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        results = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: is not JSON ({error}); evaluate the run again or remove the file") from None
    return results if isinstance(results, dict) else {}


def _object_in(path: Path) -> dict[str, Any]:
    """Read a JSON object that the page can do without; empty where there is none."""
    try:
        value = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


def _read_settings(path: Path) -> dict[str, str]:
    def flatten(value: Any, prefix: str) -> dict[str, str]:
        if isinstance(value, dict):
            return {k: v for key, inner in value.items() for k, v in flatten(inner, f"{prefix}.{key}").items()}
        return {prefix[1:]: str(value)}

    if not path.is_file():
        return {}
    try:
        return flatten(yaml.safe_load(path.read_text(encoding="utf-8")), "")
    except (yaml.YAMLError, UnicodeDecodeError):
        raise UserError(f"{path}: is not YAML; restore the file that the run wrote") from None
