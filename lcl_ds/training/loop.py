"""The training loop."""

import gc
import logging
import signal
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lcl_ds.batch import Batch
from lcl_ds.config import Config
from lcl_ds.data.stream.loader import BatchLoader
from lcl_ds.errors import UserError
from lcl_ds.flops import GridWork, StepFlops, StepWork, total
from lcl_ds.gpus import peak_flops
from lcl_ds.metrics import SourceCounts, StepMetrics
from lcl_ds.objectives.base import LossNormalizers, Objective
from lcl_ds.phases import last_step_of_phase
from lcl_ds.training.agreement import StopAgreement
from lcl_ds.training.averaging import EncoderAverage
from lcl_ds.training.checkpoint import Progress
from lcl_ds.training.distributed import RankInfo, Totals, collective_timeout_s, noted_problems, raise_for_all
from lcl_ds.training.drawing import DrawnStep, flat, loss_normalizers
from lcl_ds.training.engine import refresh_exact_scalars, release_engine
from lcl_ds.training.evaluating import HeldOutEvaluation
from lcl_ds.training.exchange import Exchange
from lcl_ds.training.first_steps import FirstSteps
from lcl_ds.training.garbage import collect_garbage, garbage_between_steps
from lcl_ds.training.monitor import Monitor
from lcl_ds.training.odd_steps import SKIPPED_STEPS, DrawnRows, OddSteps
from lcl_ds.training.pace import Pace, peak_memory_gb
from lcl_ds.training.profiling import StepProfiler
from lcl_ds.training.pulse import PULSE
from lcl_ds.training.saver import Saver
from lcl_ds.training.schedule import learning_rate
from lcl_ds.training.signals import STOP
from lcl_ds.training.trackers import open_trackers

logger = logging.getLogger(__name__)


@dataclass
class Trainer:
    """One rank's training state."""

    engine: Any
    loader: BatchLoader
    config: Config
    rank_info: RankInfo
    run_dir: Path
    vocab_size: int
    progress: Progress
    average: EncoderAverage | None = None
    rolled_back: bool = field(default=False, init=False)
    """Whether the training ended because a step is to be taken back: the run goes on from the newest checkpoint."""

    def __post_init__(self) -> None:
        self.saver = Saver(self.engine, self.config, self.rank_info, self.run_dir, self.vocab_size, self.average)
        self._position = self.loader.state()
        """Of the data after the last step that is done: a step that is given up has taken more."""

    @property
    def is_finished(self) -> bool:
        """Say whether the run is at its end, and not to go on from the newest checkpoint."""
        return not self.rolled_back and self.progress.step >= self.config.train.steps

    @property
    def objective(self) -> Objective:
        return self.engine.module

    @property
    def source_names(self) -> list[str]:
        return [source.name for source in self.config.data.shards]

    def train(self) -> int | None:
        """Run to the last step, or to the last one with images of this size.

        Returns:
            None there, or where the run is ``rolled_back``; the signal's number, on all ranks, if one of them was
            asked to stop, after a checkpoint was saved.

        Raises:
            UserError: on all ranks: ``train.max_skipped_steps`` steps in a row were skipped, the run was rolled back
                too often, or what a rank finds wrong with its data.
        """
        first, done = self.rank_info.is_first, self.progress.step
        self._odd_steps = OddSteps(self.run_dir, self.config.train, self.progress, self.rank_info)
        self._first_steps = FirstSteps(self.config, done, self.rank_info)
        self._profiler = StepProfiler(self.run_dir, self.config.log, self.rank_info)
        trackers = open_trackers(self.config, self.run_dir, done) if first else None
        monitor = Monitor(self.run_dir, self.config.train.steps, done, self.config.log.every, first, trackers)
        self._flops = StepFlops(self.objective)
        self._pace = Pace(self.rank_info, self.objective.model.decoder)
        self._peak = peak_flops(self.rank_info.device)
        self._stop = StopAgreement(collective_timeout_s(self.config.train))
        self._last_step = last_step_of_phase(self.config, done + 1)
        self._drawn: DrawnStep | None = None
        """What the next step takes, if it was drawn already."""
        self._rows: list[list[float]] = []
        """What each rank told last, see :meth:`_row`."""
        self._names: list[str] = []
        """Of what the losses are averaged over."""
        self._evaluation = HeldOutEvaluation(self.engine, self.config, self.rank_info, self._stop.reached)
        try:
            with self.saver.finishing(), garbage_between_steps():
                return self._run(monitor)
        finally:
            self._profiler.close(self.progress.step)
            del self._evaluation  # it holds the engine
            self.saver.close()
            monitor.close()
            self._pace.close()
            self._stop.close()

    def _run(self, monitor: Monitor) -> int | None:
        self._saved_step = PULSE.saved_step = self.progress.step
        while not self._stop.reached() and self.progress.step < self._last_step:
            metrics = self._step()
            if metrics is None:
                break
            metrics = self._evaluated(metrics)
            monitor.step(metrics)
            self.rolled_back = self._odd_steps.judge(metrics, self._saved_step)
            if self.rolled_back:
                self._stop.reached()  # a signal of this very step
                break
            self._check_skipped()
            if is_saved(self.progress.step, self.config):
                self._save(monitor)
        if self._stop.signal and not self.rolled_back and self.progress.step > self._saved_step:
            self._save(monitor)
        PULSE.begin("saving", self.progress.step)
        self.saver.finish()
        if not self._stop.signal:
            return None
        if self.rank_info.is_first:
            name, step = signal.Signals(self._stop.signal).name, self._saved_step
            logger.info("%s: step %d is saved in %s; run the same command again to continue", name, step, self.run_dir)
        return self._stop.signal

    def _evaluated(self, metrics: StepMetrics) -> StepMetrics:
        """Add the figures on held-out documents, after the steps that ``evaluation.every`` divides."""
        started, figures = time.perf_counter(), None
        if self._evaluation.is_due(metrics.step):
            figures = self._evaluation.measure(metrics.step)
            PULSE.begin("training", metrics.step)
        self.saver.evaluation = figures
        if figures is None:
            return metrics
        return replace(metrics, evaluation=figures, evaluation_s=time.perf_counter() - started)

    def _save(self, monitor: Monitor) -> None:
        PULSE.begin("saving", self.progress.step)
        self.save(monitor.unsaved_lines())
        monitor.saved()
        self._saved_step = self.progress.step
        PULSE.begin("training", self.progress.step)

    def save(self, metrics: bytes = b"") -> Path:
        """Begin a checkpoint of the last step that is done; collective.

        Args:
            metrics: lines since the checkpoint before.
        """
        return self.saver.begin(self.progress, self._position, metrics)

    def release(self) -> None:
        """Give back the memory of weights, optimizer and batches; the trainer cannot be used afterwards."""
        release_engine(self.engine)
        del self.engine, self.loader, self.saver, self.average
        gc.collect()
        if self.rank_info.device.type == "cuda":
            torch.cuda.empty_cache()

    def _step(self) -> StepMetrics | None:
        """Take one optimizer step; None where the ranks agreed to stop within it, which gives it up.

        The host waits for the device once: when the engine looks at the norm of the gradients. Before that it has drawn
        the next step, and told the others what they need of both.
        """
        started = time.perf_counter()
        number = self.progress.step + 1
        self._profiler.begin(number, self.objective.model)
        self._pace.begin()
        drawn, normalizers_of = self._begin(number)
        lr = self._set_learning_rate()
        self._first_steps.begin(number, self.objective.model)
        self.objective.progress = self.progress.step / self.config.train.steps
        summed = outputs_to_sum(self.objective)
        sums = torch.zeros(len(summed), dtype=torch.float64, device=self.rank_info.device)
        for micro_step, (batch, normalizers) in enumerate(zip(drawn.batches, normalizers_of, strict=True), 1):
            if micro_step > 1 and self._stop.reached():
                return None
            PULSE.begin("training", number, micro_step)
            self._profiler.enter("losses")
            outputs = self.engine(batch, normalizers)
            self._profiler.enter("backward")
            # DeepSpeed averages gradients over ranks; the losses are shares of a sum over ranks.
            self.engine.backward(outputs["loss"] * self.rank_info.world_size, scale_wrt_gas=False)
            sums += torch.stack([outputs[name].detach().reshape(()) for name in summed])
            if micro_step == len(drawn.batches):
                exchange = self._tell(number, drawn, dict(zip(summed, sums, strict=True)), outputs)
            self._profiler.enter("optimizer")
            self.engine.step()
        applied = self.engine.was_step_applied() and not self.engine.basic_optimizer.left_out
        if applied:
            refresh_exact_scalars(self.engine)
            if self.average is not None:
                self.average.update()
        self._profiler.enter("bookkeeping")
        self._advance(applied, drawn)
        totals, self._rows = exchange.read()
        self.saver.advance(totals)
        metrics = self._metrics(totals, normalizers_of, lr, applied, time.perf_counter() - started)
        self._first_steps.judge(metrics, normalizers_of, self.engine)
        collect_garbage(number)
        self._profiler.end(number)
        return metrics

    def _begin(self, number: int) -> tuple[DrawnStep, list[LossNormalizers]]:
        """Take what was drawn for this step, and make what its losses are divided by.

        Raises:
            UserError: on all ranks: what a rank finds wrong with its data.
        """
        drawn = self._drawn
        if drawn is None:  # the first step of this start
            drawn = self._draw()
            raise_for_all(drawn.problems, self.rank_info)
            self._profiler.enter("communication")
            _, self._rows = Exchange(self.rank_info, row=self._row(drawn)).read()
        elif any(problems for problems, *_ in self._rows):
            raise_for_all(drawn.problems, self.rank_info)
        self._profiler.enter("bookkeeping")
        PULSE.begin("training", number)
        self.engine.basic_optimizer.limit_norm(self._odd_steps.begin(drawn.rows))
        torch.manual_seed(step_seed(self.config.train.seed, self.rank_info.rank, self.progress.step))
        counts = [counts for _, _, *counts in self._rows]
        return drawn, loss_normalizers(self._names, counts, self.rank_info, self.config.objective)

    def _set_learning_rate(self) -> float:
        lr = learning_rate(self.progress.applied_steps, self.config.train)
        for group in self.engine.optimizer.param_groups:
            group["lr"] = lr * group["learning_rate_factor"]
        return lr

    def _tell(self, number: int, drawn: DrawnStep, sums: dict[str, Tensor], outputs: dict[str, Tensor]) -> Exchange:
        """Draw the next step, and tell the others about both; collective.

        Args:
            sums: of this rank's outputs.
            outputs: of the last micro-step.
        """
        self._drawn = self._draw() if number < self._last_step else None
        self._profiler.enter("communication")
        STOP.enter("training")  # before the ranks meet: once one of them has done a step, all save when asked to stop
        numbers: dict[Any, float] = {
            **summed_metrics(drawn.batches),
            **summed_by_source(drawn.batches, self.source_names),
            **summed_grids(drawn.batches),
            **self.saver.counts(),
        }
        same = {name: outputs[name] for name, combination in self.objective.reports.items() if combination == "same"}
        return Exchange(self.rank_info, sums, numbers, self._row(self._drawn), same)

    def _row(self, drawn: DrawnStep | None) -> list[float]:
        """List what every rank is to know of this one: number of problems, seconds it was busy, counts of ``drawn``."""
        if drawn is None:
            return [0, self._pace.busy_s()]
        return [len(drawn.problems), self._pace.busy_s(), *flat(drawn.terms)]

    def _draw(self) -> DrawnStep:
        """Draw the rows of a step; those that are to be passed over are drawn and dropped."""
        self._profiler.enter("data")
        batches: list[Batch] = []
        steps = self.config.train.accumulation_steps
        with PULSE.waiting_for_data(), self._pace.drawing(), noted_problems() as problems:
            passed_over = True
            while passed_over:
                first = self.loader.next_row
                batches = [next(self.loader) for _ in range(steps)]
                passed_over = self._odd_steps.passes_over(first, self.loader.next_row)
        if problems:
            nothing = [dict.fromkeys(self._names, 0)] * steps
            return DrawnStep([], nothing, DrawnRows(0, 0), {}, problems)
        rows = DrawnRows(first, self.loader.next_row, tuple(key for batch in batches for key in batch.keys))
        terms = [self.objective.count_terms(batch) for batch in batches]
        self._names = [*terms[0]]
        on_device = [batch.to(self.rank_info.device) for batch in batches]
        return DrawnStep(on_device, terms, rows, self.loader.state(), [])

    def _advance(self, applied: bool, drawn: DrawnStep) -> None:
        self.progress.step += 1
        self._position = drawn.position
        PULSE.has_stepped = True
        if applied:
            self.progress.applied_steps += 1
            self.progress.skipped_in_a_row = 0
            return
        self.progress.skipped_in_a_row += 1

    def _check_skipped(self) -> None:
        if self.progress.skipped_in_a_row >= self.config.train.max_skipped_steps:
            raise UserError(
                f"step {self.progress.step}: {self.progress.skipped_in_a_row} steps in a row were skipped; the reason "
                f"and the documents of each are in {self.run_dir / SKIPPED_STEPS}; lower train.learning_rate and "
                "start again, which continues from the last checkpoint"
            )

    def _metrics(
        self, totals: Totals, normalizers_of: list[LossNormalizers], lr: float, applied: bool, step_s: float
    ) -> StepMetrics:
        """Put together what is recorded of a step.

        Args:
            totals: sums over ranks, and what is the same on all.
        """
        norm = self.engine.basic_optimizer.norm
        images, tokens, labels = (int(totals[key]) for key in ("images", "tokens", "text_tokens"))
        slots = self.config.train.global_batch_rows * self.config.data.row_tokens
        grids = None
        if self.config.model.vision.resolution == "native":
            grids = GridWork(totals["grids", "patches"], totals["image_tokens"], totals["grids", "squares"])
        work = StepWork(images, slots, totals["token_squares"], labels, *contrastive_work(normalizers_of), grids)
        flops = total(self._flops.of(work)).model
        return StepMetrics(
            step=self.progress.step,
            losses={name: totals[name] for name in ("loss", *self.objective.losses)},
            reports={name: totals[name] for name in self.objective.reports},
            grad_norm=float(self.engine.get_global_grad_norm() or 0.0) if norm is None else norm,
            lr=lr,
            images=images,
            image_tokens=images * self.objective.model.kept_tokens if grids is None else int(grids.tokens),
            documents=int(totals["documents"]),
            tokens=tokens,
            text_tokens=labels,
            token_squares=int(totals["token_squares"]),
            padding_fraction=1 - tokens / slots,
            images_per_s=images / step_s,
            tokens_per_s=tokens / step_s,
            step_s=step_s,
            data_s=self._pace.draw_s,
            skipped_samples=int(totals["skipped_samples"]),
            sources={
                name: SourceCounts(int(totals["documents", name]), int(totals["images", name]))
                for name in self.source_names
            },
            applied=applied,
            mfu=flops / (step_s * self.rank_info.world_size * self._peak) if self._peak else None,
            memory_gb=peak_memory_gb(self.rank_info.device),
            tflop=flops / 1e12,
            **self._pace.metrics([busy_s for _, busy_s, *_ in self._rows]),
        )


def is_saved(step: int, config: Config) -> bool:
    """Say whether a step ends with a checkpoint: the same ones, wherever a run was stopped and continued.

    ``checkpoint.keep_every`` counts on it: one stop must not shift all later checkpoints past the steps it keeps.
    """
    return step == last_step_of_phase(config, step) or step % config.checkpoint.every == 0


def outputs_to_sum(objective: Objective) -> tuple[str, ...]:
    """Name the outputs that are summed over micro-steps and ranks, the weighted total first."""
    return (
        "loss",
        *objective.losses,
        *(name for name, combination in objective.reports.items() if combination == "sum"),
    )


def summed_metrics(batches: list[Batch]) -> dict[str, int]:
    """Count what this rank saw, under the keys of the metrics that are summed over ranks.

    Tokens of images that are all squares follow from their number.
    """
    return {
        "images": sum(batch.image_count for batch in batches),
        "image_tokens": sum(grid.tokens for batch in batches for grid in batch.grids),
        "documents": sum(batch.document_count for batch in batches),
        "tokens": sum(batch.token_count for batch in batches),
        "text_tokens": sum(len(batch.labels) for batch in batches),
        "token_squares": sum(batch.token_squares for batch in batches),
        "skipped_samples": sum(batch.skipped_samples for batch in batches),
    }


def summed_grids(batches: list[Batch]) -> dict[tuple[str, str], float]:
    """Count what the operations depend on beside ``image_tokens`` where images keep their aspect ratio."""
    work = GridWork.of(grid for batch in batches for grid in batch.grids)
    return {("grids", "patches"): work.patches, ("grids", "squares"): work.squares}


def contrastive_work(normalizers_of: list[LossNormalizers]) -> tuple[int, int]:
    """Count the contrastive pairs of all ranks in a step, and the sum over micro-steps of their squares."""
    pairs = [sum(normalizers["pairs"].per_rank or ()) for normalizers in normalizers_of if "pairs" in normalizers]
    return sum(pairs), sum(count**2 for count in pairs)


def summed_by_source(batches: list[Batch], names: list[str]) -> dict[tuple[str, str], int]:
    """Count this rank's documents and images of each source."""
    seen = {name: [batch.sources[name] for batch in batches if name in batch.sources] for name in names}
    documents = {("documents", name): sum(counts.documents for counts in of_source) for name, of_source in seen.items()}
    return documents | {
        ("images", name): sum(counts.images for counts in of_source) for name, of_source in seen.items()
    }


def step_seed(seed: int, rank: int, step: int) -> int:
    """Make the seed of dropout of one step on one rank: a continued run draws what an uninterrupted one draws."""
    return int(np.random.SeedSequence([seed, rank, step]).generate_state(1, np.uint64)[0] >> np.uint64(1))
