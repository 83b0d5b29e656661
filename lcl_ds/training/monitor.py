"""What a person sees while a run goes on, and what the run folder keeps of it."""

import json
import math
import os
import platform
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
import yaml
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from lcl_ds.config import Config

METRICS = "metrics.jsonl"
PACKAGES = ("torch", "deepspeed", "transformers", "accelerate", "webdataset", "triton", "safetensors", "numpy")


def write_run_files(run_dir: Path, config: Config, ds_config: dict[str, Any], world_size: int) -> None:
    """``config.yaml``, ``ds_config.json`` and ``environment.json``: enough to repeat the run."""
    run_dir.mkdir(parents=True, exist_ok=True)
    (run_dir / "config.yaml").write_text(yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False))
    (run_dir / "ds_config.json").write_text(json.dumps(ds_config, indent=2) + "\n")
    (run_dir / "environment.json").write_text(json.dumps(_environment(world_size), indent=2) + "\n")


def _environment(world_size: int) -> dict[str, Any]:
    git = subprocess.run(
        ["git", "rev-parse", "HEAD"], capture_output=True, text=True, cwd=Path(__file__).parent, check=False
    )
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "argv": sys.argv,
        "world_size": world_size,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "gpu": gpu,
        "cpu_count": os.cpu_count(),
        "git_commit": git.stdout.strip() or None,
        "packages": {name: _version(name) for name in PACKAGES},
    }


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


class Monitor:
    """Appends ``metrics.jsonl`` and shows a progress line; on other ranks than the first it does nothing.

    On a terminal one line is redrawn; elsewhere a line is printed every ``print_every`` steps.
    """

    def __init__(self, run_dir: Path, total_steps: int, first_step: int, print_every: int, enabled: bool):
        self.enabled = enabled
        if not enabled:
            return
        self.total_steps, self.print_every = total_steps, print_every
        self.console = Console(stderr=False, highlight=False)
        truncate_metrics(run_dir / METRICS, first_step)
        self._file = (run_dir / METRICS).open("a", encoding="utf-8")
        self._progress: Progress | None = None
        if self.console.is_terminal:
            columns = (BarColumn(8), TextColumn("{task.description}"))
            self._progress = Progress(*columns, console=self.console)
            self._task = self._progress.add_task("starting", total=total_steps, completed=first_step)
            self._progress.start()
        self._seconds_per_step: float | None = None

    def step(self, metrics: dict[str, Any]) -> None:
        """Record one optimizer step."""
        if not self.enabled:
            return
        self._file.write(json.dumps(finite(metrics)) + "\n")
        self._file.flush()
        average = self._seconds_per_step or metrics["step_s"]
        self._seconds_per_step = 0.95 * average + 0.05 * metrics["step_s"]
        left = int((self.total_steps - metrics["step"]) * self._seconds_per_step)
        losses = "  ".join(f"{k.removesuffix('_loss')} {v:.3f}" for k, v in metrics.items() if k.endswith("_loss"))
        text = (
            f"step {metrics['step']}/{self.total_steps}  ETA {left // 60}:{left % 60:02d}  "
            f"{losses}  "
            f"{metrics['images_per_s']:.0f} images/s  {metrics['tokens_per_s']:.0f} tokens/s"
        )
        if self._progress is not None:
            self._progress.update(self._task, completed=metrics["step"], description=text)
        elif metrics["step"] % self.print_every == 0 or metrics["step"] == self.total_steps:
            self.console.print(text, soft_wrap=True)

    def close(self) -> None:
        if self.enabled:
            self._file.close()
            if self._progress is not None:
                self._progress.stop()


def finite(metrics: dict[str, Any]) -> dict[str, Any]:
    """Metrics with null for what is not a finite number: JSON has no word for it."""
    return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in metrics.items()}


def truncate_metrics(path: Path, step: int) -> None:
    """Drop lines after ``step`` and a torn last line: a resumed run writes those steps again."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines(keepends=True):
        if not line.endswith("\n") or json.loads(line)["step"] > step:
            break
        kept.append(line)
    temporary = path.with_suffix(".tmp")
    temporary.write_text("".join(kept), encoding="utf-8")
    temporary.replace(path)
