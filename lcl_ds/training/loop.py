"""The training loop."""

import gc
import json
import logging
import signal
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lcl_ds.batch import Batch
from lcl_ds.config import Config
from lcl_ds.data.stream.loader import BatchLoader
from lcl_ds.errors import UserError
from lcl_ds.objectives.base import LossNormalizer, LossNormalizers, Objective
from lcl_ds.training.checkpoint import Progress, save_checkpoint
from lcl_ds.training.distributed import RankInfo, all_reduce_sum, gather_integers, gather_objects, on_all_ranks
from lcl_ds.training.engine import refresh_exact_scalars, release_engine
from lcl_ds.training.monitor import Monitor
from lcl_ds.training.schedule import learning_rate
from lcl_ds.training.signals import StopRequest
from lcl_ds.training.throughput import flops_per_token, peak_flops
from lcl_ds.training.trackers import open_trackers

logger = logging.getLogger(__name__)

SUMMED_METRICS = ("images", "documents", "tokens", "text_tokens", "skipped_samples")


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

    @property
    def objective(self) -> Objective:
        return self.engine.module

    @property
    def losses(self) -> tuple[str, ...]:
        """What is logged, the weighted total first."""
        return "loss", *self.objective.losses

    def train(self) -> int | None:
        """Run to the last step.

        Returns:
            None at the end; the signal's number if one asked to stop, after a checkpoint was saved.

        Raises:
            UserError: on all ranks: ``train.max_skipped_steps`` steps in a row had no finite gradient, or what a rank
                finds wrong with its data.
        """
        first, done = self.rank_info.is_first, self.progress.step
        trackers = open_trackers(self.config, self.run_dir, done) if first else None
        monitor = Monitor(self.run_dir, self.config.train.steps, done, self.config.log.every, first, trackers)
        self._flops = flops_per_token(self.engine.module.model)
        self._peak = peak_flops(self.rank_info.device)
        try:
            with StopRequest() as stop:
                return self._run(monitor, stop)
        finally:
            monitor.close()

    def _run(self, monitor: Monitor, stop: StopRequest) -> int | None:
        last_saved = self.progress.step
        while self.progress.step < self.config.train.steps:
            metrics, received = self._step(stop.received or 0)
            monitor.step(metrics)
            self._check_skipped()
            at_end = self.progress.step == self.config.train.steps
            if at_end or received or self.progress.step - last_saved >= self.config.checkpoint.every:
                path = self.save(monitor.unsaved_lines())
                monitor.saved()
                last_saved = self.progress.step
                if received and self.rank_info.is_first:
                    logger.info("signal %d: saved %s; run the same command again to continue", received, path)
            if received and not at_end:
                return received
        return None

    def save(self, metrics: bytes = b"") -> Path:
        """A checkpoint of this moment, with the lines of metrics since the last one; collective."""
        return save_checkpoint(
            self.engine, self.run_dir, self.config, self.progress, self.loader.state(), self.vocab_size, metrics
        )

    def release(self) -> None:
        """Give back the memory of weights, optimizer and batches; the trainer is of no use any more."""
        release_engine(self.engine)
        del self.engine, self.loader
        gc.collect()
        if self.rank_info.device.type == "cuda":
            torch.cuda.empty_cache()

    def _step(self, stop_signal: int) -> tuple[dict[str, Any], int]:
        """One optimizer step; returns its metrics and the signal that this or, as SIGTERM, another rank received."""
        started = time.perf_counter()
        with on_all_ranks(self.rank_info):
            batches = [next(self.loader) for _ in range(self.config.train.accumulation_steps)]
        torch.manual_seed(step_seed(self.config.train.seed, self.rank_info.rank, self.progress.step))
        data_s = time.perf_counter() - started
        lr = learning_rate(self.progress.applied_steps, self.config.train)
        for group in self.engine.optimizer.param_groups:
            group["lr"] = lr * group["learning_rate_factor"]
        batches = [batch.to(self.rank_info.device) for batch in batches]
        sums = torch.zeros(len(self.losses), dtype=torch.float64, device=self.rank_info.device)
        for batch, normalizers in zip(batches, self._loss_normalizers(batches), strict=True):
            outputs = self.engine(batch, normalizers)
            # DeepSpeed averages gradients over ranks; the losses are shares of a sum over ranks.
            self.engine.backward(outputs["loss"] * self.rank_info.world_size, scale_wrt_gas=False)
            sums += torch.stack([outputs[name].detach() for name in self.losses])
            self.engine.step()
        applied = self.engine.was_step_applied()
        if applied:
            refresh_exact_scalars(self.engine)
        self._advance(applied, batches)
        mine = sums.new_tensor([*self._counts(batches), *self._source_counts(batches), float(stop_signal > 0)])
        totals = all_reduce_sum(torch.cat([sums, mine])).tolist()
        step_s = time.perf_counter() - started
        metrics = self._metrics(totals, outputs.get("logit_scale"), lr, applied, step_s, data_s)
        return metrics, (stop_signal or signal.SIGTERM) if totals[-1] else 0

    def _loss_normalizers(self, batches: list[Batch]) -> list[LossNormalizers]:
        """What each micro-step's losses are divided by.

        The ranks tell each other before the step, when nothing runs yet, so that no loss has to wait for the device.
        """
        mine = [self.objective.count_terms(batch) for batch in batches]
        names = list(mine[0])
        flat = gather_integers([table[name] for table in mine for name in names], self.rank_info.device)
        table = torch.tensor(flat).view(self.rank_info.world_size, len(batches), len(names))
        as_published = self.config.objective.normalization == "reference"
        parts = self.rank_info.world_size * len(batches)

        def count(step: int, number: int) -> LossNormalizer:
            everywhere = max(1, int(table[:, :, number].sum()))
            per_rank = table[:, step, number].tolist()
            if as_published:  # every rank's own mean, averaged over ranks and micro-steps
                divisor, share = max(1, per_rank[self.rank_info.rank]) * parts, 1 / parts
            else:
                divisor, share = everywhere, sum(per_rank) / everywhere
            both = torch.tensor([divisor, share], dtype=torch.float32).to(self.rank_info.device, non_blocking=True)
            return LossNormalizer(both[0], both[1], per_rank)

        return [{name: count(step, n) for n, name in enumerate(names)} for step in range(len(batches))]

    def _advance(self, applied: bool, batches: list[Batch]) -> None:
        self.progress.step += 1
        if applied:
            self.progress.applied_steps += 1
            self.progress.skipped_in_a_row = 0
            return
        self.progress.skipped_in_a_row += 1
        keys = [key for rank in gather_objects([k for batch in batches for k in batch.keys]) for key in rank]
        if self.rank_info.is_first:
            logger.warning("step %d: gradients are not finite, skipped on all ranks", self.progress.step)
            with (self.run_dir / "skipped_steps.jsonl").open("a", encoding="utf-8") as file:
                file.write(json.dumps({"step": self.progress.step, "documents": keys}) + "\n")

    def _check_skipped(self) -> None:
        if self.progress.skipped_in_a_row >= self.config.train.max_skipped_steps:
            raise UserError(
                f"step {self.progress.step}: {self.progress.skipped_in_a_row} steps in a row had no finite gradient; "
                f"the documents of each are in {self.run_dir / 'skipped_steps.jsonl'}; lower train.learning_rate and "
                "start again, which continues from the last checkpoint"
            )

    def _counts(self, batches: list[Batch]) -> list[float]:
        """This rank's part of ``SUMMED_METRICS``."""
        rows = [(b.image_count, b.document_count, b.token_count, len(b.labels), b.skipped_samples) for b in batches]
        return [float(sum(column)) for column in zip(*rows, strict=True)]

    def _source_counts(self, batches: list[Batch]) -> list[float]:
        """This rank's documents and images of each source, in the order of the settings."""
        seen = [batch.sources.get(source.name, (0, 0)) for source in self.config.data.shards for batch in batches]
        pairs = torch.tensor(seen).view(-1, len(batches), 2).sum(1)
        return [float(count) for count in pairs.flatten()]

    def _metrics(
        self, totals: list[float], logit_scale: Tensor | None, lr: float, applied: bool, step_s: float, data_s: float
    ) -> dict[str, Any]:
        losses = dict(zip(self.losses, totals, strict=False))
        counts = {name: int(n) for name, n in zip(SUMMED_METRICS, totals[len(losses) :], strict=False)}
        by_source = iter(int(n) for n in totals[len(losses) + len(SUMMED_METRICS) : -1])
        names = [source.name for source in self.config.data.shards]
        sources = {name: {"documents": next(by_source), "images": next(by_source)} for name in names}
        skipped = counts.pop("skipped_samples")
        slots = self.config.train.global_batch_rows * self.config.data.row_tokens
        metrics = {
            "step": self.progress.step,
            **losses,
            **({} if logit_scale is None else {"logit_scale": float(logit_scale)}),
            "grad_norm": float(self.engine.get_global_grad_norm() or 0.0),
            "lr": lr,
            **counts,
            "padding_fraction": 1 - counts["tokens"] / slots,
            "images_per_s": counts["images"] / step_s,
            "tokens_per_s": counts["tokens"] / step_s,
            "step_s": step_s,
            "data_s": data_s,
            "skipped_samples": skipped,
            "sources": sources,
            "applied": applied,
        }
        if self.rank_info.device.type == "cuda":
            metrics |= self._gpu_metrics(counts, step_s)
        return metrics

    def _gpu_metrics(self, counts: dict[str, int], step_s: float) -> dict[str, float]:
        patches = counts["images"] * self.loader.settings.image_tokens
        flops = (
            self._flops["vision"] * patches
            + self._flops["decoder"] * counts["tokens"]
            + self._flops["head"] * counts["text_tokens"]
        )
        memory = {"memory_gb": torch.cuda.max_memory_allocated(self.rank_info.device) / 2**30}
        if self._peak is None:
            return memory
        return {"mfu": flops / step_s / self.rank_info.world_size / self._peak, **memory}


def step_seed(seed: int, rank: int, step: int) -> int:
    """What dropout draws from at one step on one rank: a continued run draws what an uninterrupted one draws."""
    return int(np.random.SeedSequence([seed, rank, step]).generate_state(1, np.uint64)[0] >> np.uint64(1))
