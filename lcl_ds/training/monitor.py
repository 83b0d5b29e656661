"""What a person sees while a run goes on, and the metrics that the run folder keeps of it."""

import math
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from lcl_ds.metrics import LOSS_ENDING, METRICS, MetricsFile, StepMetrics, keep_metrics
from lcl_ds.training.checkpoint import all_checkpoints
from lcl_ds.training.trackers import Trackers


class Monitor:
    """Appends ``metrics.jsonl``, feeds trackers, shows a progress line; on other ranks than the first it does nothing.

    On a terminal one line is redrawn; elsewhere a line is printed every ``print_every`` steps.

    Args:
        trackers: what gets every step's metrics as well; closed together with the monitor.
    """

    def __init__(
        self,
        run_dir: Path,
        total_steps: int,
        first_step: int,
        print_every: int,
        enabled: bool,
        trackers: Trackers | None = None,
    ):
        self.enabled = enabled
        if not enabled:
            return
        self.total_steps, self.print_every = total_steps, print_every
        self.trackers = trackers or Trackers({})
        self.console = Console(stderr=False, highlight=False)
        keep_metrics(run_dir / METRICS, first_step, kept_metrics(run_dir))
        self._file = MetricsFile(run_dir / METRICS)
        self._progress: Progress | None = None
        if self.console.is_terminal:
            columns = (BarColumn(8), TextColumn("{task.description}"))
            self._progress = Progress(*columns, console=self.console)
            self._task = self._progress.add_task("starting", total=total_steps, completed=first_step)
            self._progress.start()
        self._seconds_per_step: float | None = None

    def step(self, metrics: StepMetrics) -> None:
        """Record one optimizer step."""
        if not self.enabled:
            return
        row = metrics.row()
        self._file.append(row)
        self.trackers.log(row)
        average = self._seconds_per_step or metrics.step_s
        self._seconds_per_step = 0.95 * average + 0.05 * metrics.step_s
        left = time_left((self.total_steps - metrics.step) * self._seconds_per_step)
        text = progress_line(metrics, self.total_steps, left)
        if self._progress is not None:
            self._progress.update(self._task, completed=metrics.step, description=text)
        elif metrics.step % self.print_every == 0 or metrics.step == self.total_steps:
            self.console.print(text, soft_wrap=True)
        if metrics.evaluation is not None:
            self.console.print(evaluation_line(metrics), soft_wrap=True)

    def unsaved_lines(self) -> bytes:
        """Return the lines of ``metrics.jsonl`` since the last checkpoint, which the next one keeps a copy of."""
        return b"".join(self._file.since_saved) if self.enabled else b""

    def saved(self) -> None:
        """Flush ``metrics.jsonl`` to disk: a checkpoint has just been written."""
        if self.enabled:
            self._file.flush_to_disk()

    def close(self) -> None:
        """Close the file and leave the terminal as it was."""
        if self.enabled:
            self._file.close()
            if self._progress is not None:
                self._progress.stop()
            self.trackers.close()


def progress_line(metrics: StepMetrics, total_steps: int, left: str) -> str:
    """Write one step in a line: the losses without their weighted total, throughput, memory, the slowest rank."""
    unweighted = {name: value for name, value in metrics.losses.items() if name != "loss"}
    losses = "  ".join(f"{name.removesuffix(LOSS_ENDING)} {value:.3f}" for name, value in unweighted.items())
    words = [
        f"step {metrics.step}/{total_steps}  ETA {left}  {losses}",
        f"{metrics.images_per_s:.0f} images/s  {metrics.tokens_per_s:.0f} tokens/s",
    ]
    if metrics.mfu is not None:
        words.append(f"MFU {100 * metrics.mfu:.1f} %")
    if metrics.memory_gb is not None:
        words.append(f"{metrics.memory_gb:.1f} GiB")
    if metrics.slowest_rank_s is not None and metrics.median_rank_s is not None:
        words.append(f"slowest rank {metrics.slowest_rank} +{metrics.slowest_rank_s - metrics.median_rank_s:.2f} s")
    return "  ".join(words)


def evaluation_line(metrics: StepMetrics) -> str:
    """Write the figures on held-out documents in a line: losses as they are, all else in percent."""
    figures = [
        f"{name.removesuffix(LOSS_ENDING)} {_figure(name, value)}" for name, value in (metrics.evaluation or {}).items()
    ]
    return f"held out, step {metrics.step}: {', '.join(figures)} ({metrics.evaluation_s or 0:.1f} s)"


def _figure(name: str, value: float | None) -> str:
    if value is None:
        return "?"
    return f"{value:.3f}" if name.endswith(LOSS_ENDING) else f"{100 * value:.1f} %"


def kept_metrics(run_dir: Path) -> list[Path]:
    """List the copies of ``metrics.jsonl`` in a run's checkpoints, oldest first."""
    return [checkpoint / METRICS for checkpoint in all_checkpoints(run_dir)]


def time_left(seconds: float) -> str:
    """Write a duration as ``12:04``, ``13:20:00`` or ``5d 13:20:00``; ``?`` where it is not known."""
    if not math.isfinite(seconds):
        return "?"
    minutes, second = divmod(int(seconds), 60)
    hours, minute = divmod(minutes, 60)
    days, hour = divmod(hours, 24)
    if days:
        return f"{days}d {hour:02d}:{minute:02d}:{second:02d}"
    return f"{hour}:{minute:02d}:{second:02d}" if hour else f"{minute}:{second:02d}"
