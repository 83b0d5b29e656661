"""What several tasks of ranks are made of: stages, batches made by a test, a trainer of these, what it has learned."""

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import deepspeed
import torch

from lcl_ds.assembly import attach_objective
from lcl_ds.batch import Batch
from lcl_ds.config import Config
from lcl_ds.metrics import read_metrics
from lcl_ds.objectives.base import LossNormalizers, Objective
from lcl_ds.training.checkpoint import Progress
from lcl_ds.training.distributed import RankInfo
from lcl_ds.training.drawing import exchanged_normalizers
from lcl_ds.training.engine import complete_ds_config, start_engine
from lcl_ds.training.loop import Trainer
from tests.support.small import VOCABULARY, batch_with_images, batch_without_images, small_model

STAGES = (0, 1, 2, 3)

RECOMPUTED = ("model.vision.activation_checkpointing=true", "model.decoder.activation_checkpointing=2")
WAYS: dict[str, tuple[int, tuple[str, ...]]] = {
    **{str(stage): (stage, ()) for stage in STAGES},
    "3, recomputed": (3, RECOMPUTED),
}
"""ZeRO stages and settings that must make no difference to a gradient."""

THREE_STEPS = ((0, "fp32"), (0, "bf16"), (1, "bf16"), (2, "fp32"), (3, "fp32"), (3, "bf16"))

TEN_STEPS = (
    *("train.global_batch_rows=4", "train.steps=10", "train.warmup_steps=0", "train.learning_rate=1e-3"),
    *("train.weight_decay=0.1", "checkpoint.every=5"),
)


class GivenBatches:
    """Stands where the loader stands, with batches made by the test."""

    def __init__(self, batches: list[Batch]):
        self._batches = iter(batches)
        self._drawn = 0

    def __iter__(self) -> Iterator[Batch]:
        return self._batches

    def __next__(self) -> Batch:
        self._drawn += 1
        return next(self._batches)

    @property
    def next_row(self) -> int:
        """One for each batch: what matters is that no two have the same."""
        return self._drawn

    def state(self) -> dict[str, Any]:
        return {"next_row": 0, "lanes": {}, "lane_count": 4, "fingerprint": {}}


def trainer_of(
    config: Config,
    zero: int | dict[str, Any],
    rank_info: RankInfo,
    batches: list[Batch],
    run_dir: Path,
    objective: Objective | None = None,
) -> Trainer:
    # No parameter is small enough to stay whole: partitioning is what is tested.
    settings = {"stage": zero} if isinstance(zero, int) else zero
    settings = {**settings, "stage3_param_persistence_threshold": 0}
    ds_config = complete_ds_config({"zero_optimization": settings}, config, rank_info.world_size)
    objective = objective or attach_objective(small_model(config), config)
    engine = start_engine(objective, config, ds_config, rank_info)
    run_dir.mkdir(parents=True, exist_ok=True)
    return Trainer(engine, GivenBatches(batches), config, rank_info, run_dir, VOCABULARY.size, Progress())


def batch_of_rank(case: str, rank: int) -> Batch:
    """Images on both ranks, on the first only, or on none."""
    has_images = {"both": True, "first": rank == 0, "none": False}[case]
    return batch_with_images(10 * rank) if has_images else batch_without_images(10 * rank)


def normalizers_of(trainer: Trainer, batch: Batch) -> LossNormalizers:
    """What the losses of a step are divided by that consists of this batch on every rank; collective."""
    terms = trainer.objective.count_terms(batch)
    return exchanged_normalizers([terms], trainer.rank_info, trainer.config.objective)[0]


def steps_of(run_dir: Path) -> list[dict[str, Any]]:
    keys = "step", "loss", "logit_scale", "grad_norm"
    return [{key: row[key] for key in keys} for row in read_metrics(run_dir)]


def full_weights(trainer: Trainer) -> dict[str, torch.Tensor]:
    named = list(trainer.engine.module.named_parameters())
    with deepspeed.zero.GatheredParameters([weight for _, weight in named]):
        return {name: weight.detach().clone() for name, weight in named}


class ListHandler(logging.Handler):
    """Keeps what is logged."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())
