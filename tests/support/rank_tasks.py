"""What the ranks of the distributed tests do: ``python -m tests.support.rank_tasks FOLDER FUNCTION ...``."""

import gc
import hashlib
import json
import logging
import os
import shutil
import signal
import sys
import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import deepspeed
import torch
from deepspeed.utils import safe_get_full_grad
from torch import distributed as dist
from torch import nn

from lcl_ds.assembly import attach_objective, open_checked_data
from lcl_ds.batch import Batch
from lcl_ds.config import Config
from lcl_ds.data.corpus import open_data
from lcl_ds.data.shards import shard as shard_module
from lcl_ds.data.shards.source import Source
from lcl_ds.data.shards.team import open_together
from lcl_ds.errors import UserError
from lcl_ds.metrics import Combination, read_metrics
from lcl_ds.models.settings import part_of
from lcl_ds.objectives import NAMES, lcl
from lcl_ds.objectives.base import LossNormalizers, Objective
from lcl_ds.training import first_steps, saver
from lcl_ds.training.checkpoint import ManifestEntry, Progress, all_checkpoints, newest_checkpoint
from lcl_ds.training.distributed import (
    RankInfo,
    all_reduce_sum,
    gather_integers,
    gather_objects,
    gather_to_first,
    init_distributed,
    on_all_ranks,
    raise_for_all,
    team_of,
)
from lcl_ds.training.engine import complete_ds_config, load_engine, start_engine
from lcl_ds.training.loop import Trainer
from lcl_ds.training.pulse import PULSE
from lcl_ds.training.resume import check_same_run
from lcl_ds.training.run import prepare, train
from lcl_ds.training.run_folder import check_same_settings, check_seen_by_all
from lcl_ds.training.signals import STOP
from tests.support.disks import no_file_larger_than
from tests.support.small import (
    VOCABULARY,
    batch_with_images,
    batch_without_images,
    small_config,
    small_model,
    three_documents,
)
from tests.support.tars import write_tar

STAGES = (0, 1, 2, 3)
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


def gradients(rank_info: RankInfo, folder: Path) -> dict[str, Any]:
    """Loss and full gradients by (stage, case), through the trainer's own counts and scaling."""
    config = small_config("train.global_batch_rows=4", "train.learning_rate=1e-30")
    results = {}
    for stage in STAGES:
        trainer = trainer_of(config, stage, rank_info, [], folder)
        for case in ("both", "first", "none"):
            batch = batch_of_rank(case, rank_info.rank)
            (normalizers,) = trainer._loss_normalizers([batch])
            losses = trainer.engine(batch, normalizers)
            trainer.engine.backward(losses["loss"] * rank_info.world_size, scale_wrt_gas=False)
            actual = {
                name: safe_get_full_grad(weight).clone() for name, weight in trainer.engine.module.named_parameters()
            }
            trainer.engine.step()
            results[f"{stage} {case}"] = {"loss": all_reduce_sum(losses["loss"].detach().clone()), "gradients": actual}
    return results


def three_steps(rank_info: RankInfo, folder: Path) -> dict[str, Any]:
    """Weights before and after three steps, by stage and precision; a checkpoint of the end is left in ``folder``."""
    results = {}
    for stage, precision in THREE_STEPS:
        config = small_config("train.global_batch_rows=4", "train.steps=3", f"precision={precision}")
        batches = [batch_with_images(100 * step + 10 * rank_info.rank) for step in range(3)]
        trainer = trainer_of(config, stage, rank_info, batches, folder / f"{stage}{precision}")
        before = full_weights(trainer)
        trainer.train()
        after = full_weights(trainer)
        results[f"{stage}{precision}"] = {"before": before, "after": after}
    return results


def ten_steps(rank_info: RankInfo, folder: Path) -> dict[str, Any]:
    """Metrics of ten steps at the full learning rate, by stage and precision, and those of the last five again.

    The second five are taken a second time by another engine, from the checkpoint of the first five.
    """
    results: dict[str, Any] = {}
    for precision in ("fp32", "bf16"):
        for stage in STAGES:
            run_dir = folder / f"{stage}{precision}"
            config = small_config(*TEN_STEPS, f"precision={precision}")
            batches = [batch_with_images(100 * step + 10 * rank_info.rank) for step in range(10)]
            trainer_of(config, stage, rank_info, batches, run_dir).train()
            whole = steps_of(run_dir)
            dist.barrier()
            again = trainer_of(config, stage, rank_info, batches[5:], run_dir)
            load_engine(again.engine, run_dir / "checkpoints" / "step_00000005", rank_info)
            again.progress = Progress(step=5, applied_steps=5)
            again.train()
            results[run_dir.name] = {"whole": whole, "again": steps_of(run_dir)}
    return results


def memory(rank_info: RankInfo, folder: Path) -> dict[str, Any]:
    """Which of engine, optimizer, objective and fp32 weights outlive a trainer that was released, by stage."""
    alive = {}
    for stage, precision in THREE_STEPS:
        config = small_config("train.global_batch_rows=4", "train.steps=2", f"precision={precision}")
        batches = [batch_with_images(100 * step + 10 * rank_info.rank) for step in range(2)]
        trainer = trainer_of(config, stage, rank_info, batches, folder / f"{stage}{precision}")
        trainer.train()
        engine = trainer.engine
        held = {"engine": engine, "optimizer": engine.optimizer, "objective": engine.module}
        groups = [group["params"] for group in engine.optimizer.param_groups]  # at stage 3 they are empty between steps
        held |= {f"group {i}": weights[0] for i, weights in enumerate(groups) if weights}
        watched = {name: weakref.ref(thing) for name, thing in held.items()}
        del engine, held, groups
        trainer.release()
        alive[f"{stage}{precision}"] = [name for name, thing in watched.items() if thing() is not None]
    return alive


def steps_of(run_dir: Path) -> list[dict[str, Any]]:
    keys = "step", "loss", "logit_scale", "grad_norm"
    return [{key: row[key] for key in keys} for row in read_metrics(run_dir)]


def full_weights(trainer: Trainer) -> dict[str, torch.Tensor]:
    named = list(trainer.engine.module.named_parameters())
    with deepspeed.zero.GatheredParameters([weight for _, weight in named]):
        return {name: weight.detach().clone() for name, weight in named}


def objectives(rank_info: RankInfo, folder: Path) -> dict[str, Any]:
    """For each objective at stage 3: loss and full gradients of a first step, then weights before and after a few."""
    results = {}
    for name in NAMES:
        config = small_config(
            f"objective.name={name}", "train.global_batch_rows=6", "train.steps=3", "train.warmup_steps=0"
        )
        batches = [three_documents(config, seed=10 * step + rank_info.rank) for step in range(3)]
        trainer = trainer_of(config, 3, rank_info, batches, folder / name)
        first = three_documents(config, seed=rank_info.rank)
        losses = trainer.engine(first, *trainer._loss_normalizers([first]))
        trainer.engine.backward(losses["loss"] * rank_info.world_size, scale_wrt_gas=False)
        learning = {n: w for n, w in trainer.engine.module.named_parameters() if w.requires_grad}
        gradients = {n: safe_get_full_grad(weight).clone() for n, weight in learning.items()}
        trainer.engine.zero_grad()
        before = full_weights(trainer)
        trainer.train()
        results[name] = {
            "loss": all_reduce_sum(losses["loss"].detach().clone()),
            "gradients": gradients,
            "before": before,
            "after": full_weights(trainer),
        }
    return results


def non_finite(rank_info: RankInfo, folder: Path) -> dict[str, Any]:
    """Steps of which the second and the last three are spoiled on rank 1 only."""
    results = {}
    for stage, precision in ((0, "fp32"), (1, "fp32"), (3, "fp32"), (3, "bf16")):
        config = small_config(
            "train.global_batch_rows=4", "train.steps=9", "train.max_skipped_steps=3", f"precision={precision}"
        )
        batches = [batch_with_images(100 * step + 10 * rank_info.rank) for step in range(6)]
        for step in (1, 3, 4, 5):
            if rank_info.rank == 1:
                spoiled = batches[step].images.float() / 255
                spoiled[0] = float("nan")
                object.__setattr__(batches[step], "images", spoiled)
        name = f"{stage}{precision}"
        trainer = trainer_of(config, stage, rank_info, batches, folder / name)
        stopped = ""
        try:
            trainer.train()
        except UserError as error:
            stopped = str(error)
        weights = full_weights(trainer)
        finite = all(bool(torch.isfinite(weight).all()) for weight in weights.values())
        results[name] = {"stopped": stopped, "finite": finite, "applied_steps": trainer.progress.applied_steps}
    return results


def stop_and_continue(rank_info: RankInfo, folder: Path) -> dict[str, Any]:
    """Three steps of real data at stage 3 and the last of them again from the checkpoint before, by case.

    ``cases.json`` beside ``folder`` holds the overrides of each case.
    """
    cases = json.loads((folder.parent / "cases.json").read_text())
    results = {}
    for name, overrides in cases.items():
        config, run_dir = small_config(*overrides), folder / name
        zero = {"stage": 3, "stage3_param_persistence_threshold": 0}
        ds_config = complete_ds_config({"zero_optimization": zero}, config, rank_info.world_size)
        data, result = open_checked_data(config), {}
        run_dir.mkdir(parents=True, exist_ok=True)
        trainer = prepare(config, ds_config, run_dir, rank_info, data)
        result["before"] = full_weights(trainer)
        trainer.train()
        result["after"] = full_weights(trainer)
        result["whole"] = (run_dir / "metrics.jsonl").read_text()
        dist.barrier()
        if rank_info.is_first:
            shutil.rmtree(run_dir / "checkpoints" / "step_00000003")
        dist.barrier()
        trainer = prepare(config, ds_config, run_dir, rank_info, data, newest_checkpoint(run_dir, rank_info))
        trainer.train()
        result["after_again"] = full_weights(trainer)
        result["again"] = (run_dir / "metrics.jsonl").read_text()
        results[name] = result
    return results


class ListHandler(logging.Handler):
    """Keeps what is logged."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


def saved_run(rank_info: RankInfo, folder: Path) -> dict[str, Any]:
    """Four steps at stage 0 with a frozen and a slower part; a checkpoint after each, two are kept."""
    config = small_config(
        *("train.global_batch_rows=2", "train.steps=4", "train.warmup_steps=0", "checkpoint.every=1"),
        *("checkpoint.keep=2", "train.learning_rate_factors={vision: 0, decoder: 0.1}"),
    )
    log = ListHandler()
    logging.getLogger("lcl_ds").addHandler(log)
    logging.getLogger("lcl_ds").setLevel(logging.INFO)
    trainer = trainer_of(config, 0, rank_info, [batch_with_images(10 * step) for step in range(4)], folder)
    before = full_weights(trainer)
    trainer.train()
    after = full_weights(trainer)
    still = {name for name in before if torch.equal(before[name], after[name])}
    frozen = {part_of(name) for name in still}
    PULSE.saved_step = 0  # as in a new process, which goes on at step 4
    Trainer(trainer.engine, GivenBatches([]), config, rank_info, folder, VOCABULARY.size, Progress(step=4)).train()
    return {
        "saved_step": PULSE.saved_step,
        "log": "\n".join(log.lines),
        "after": after,
        "frozen": sorted(frozen),
        "moved": [name not in still for name in before if part_of(name) not in frozen],
    }


def saving(rank_info: RankInfo, folder: Path) -> dict[str, Any]:
    """A save that is not on disk before the next step has been taken, and one that the disk of the last rank refuses.

    Returns the weights after every step, and which checkpoints there were then; and what each rank was told.
    """
    config = small_config(*TEN_STEPS, "train.steps=5", "checkpoint.every=2", "checkpoint.keep=9")
    batches = [batch_with_images(100 * step + 10 * rank_info.rank) for step in range(10)]
    weights, published = {}, {}
    trainer = trainer_of(config, 2, rank_info, batches[:5], folder / "slow")
    third_step = threading.Event()
    write, advance = saver.write_files, trainer._advance

    def held_up(files: saver.RankFiles) -> dict[str, ManifestEntry]:
        assert third_step.wait(60)
        return write(files)

    def remembered(applied: bool) -> None:
        advance(applied)
        step = trainer.progress.step
        weights[step] = full_weights(trainer)
        published[step] = [path.name for path in all_checkpoints(folder / "slow")]
        if step == 3:
            third_step.set()

    saver.write_files, trainer._advance = held_up, remembered  # type: ignore[method-assign]
    try:
        trainer.train()
    finally:
        saver.write_files = write
    trainer = trainer_of(config, 2, rank_info, batches[5:], folder / "full")
    trainer.save()
    trainer.saver.finish()
    too_small = rank_info.rank == rank_info.world_size - 1
    with no_file_larger_than(10_000) if too_small else nullcontext():
        try:
            trainer.train()
            told = []
        except UserError as error:
            told = error.problems
    return {"weights": weights, "published": published, "told": told}


CHANGES = {
    "weight_decay": "100",
    "betas": "[0.1, 0.1]",
    "eps": "0.1",
    "gradient_clipping": "0.001",
    "learning_rate_factors": "{vision: 0.1, pooling: 0.1, decoder: 0.1, heads: 0.1}",
}
"""Settings of the optimizer, each so far from its default that it changes the next step."""


def changed_settings(rank_info: RankInfo, folder: Path) -> dict[str, Any]:
    """Losses of four steps, and of the last two again with one setting changed, with what is said about it, by stage.

    ``shared.json`` beside ``folder`` holds the overrides of all runs.
    """
    shared = json.loads((folder.parent / "shared.json").read_text())
    results: dict[str, Any] = {}
    for stage in (1, 3):
        whole = folder / f"stage{stage}"
        whole.mkdir(parents=True, exist_ok=True)
        results[whole.name] = {"whole": losses_of_run(shared, stage, rank_info, whole)[0]}
        for name, value in CHANGES.items():
            run_dir = folder / f"stage{stage} {name}"
            if rank_info.is_first:
                shutil.copytree(whole, run_dir)
                shutil.rmtree(run_dir / "checkpoints" / "step_00000004")
            dist.barrier()
            overrides = [*shared, f"train.{name}={value}"]
            results[whole.name][name] = losses_of_run(overrides, stage, rank_info, run_dir)
    return results


def legs(rank_info: RankInfo, folder: Path) -> dict[str, Any]:
    """Train runs a few steps further, on as many ranks as there are, each as ``legs.json`` beside ``folder`` says.

    A leg names its ``run``, the ZeRO settings, overrides and the step to stop after; runs begin where the last leg left
    them. Returns metrics, what every step of the leg saw, and what was said about changed settings, by leg.
    """
    plan = json.loads((folder.parent / "legs.json").read_text())
    results: dict[str, Any] = {}
    for name, leg in plan.items():
        run_dir = folder.parent / "runs" / leg["run"]
        run_dir.mkdir(parents=True, exist_ok=True)
        config = small_config(*leg["overrides"])
        ds_config = complete_ds_config({"zero_optimization": leg["zero"]}, config, rank_info.world_size)
        checkpoint = newest_checkpoint(run_dir, rank_info)
        sentences = check_same_run(checkpoint, config) if checkpoint else []
        trainer = prepare(config, ds_config, run_dir, rank_info, open_checked_data(config), checkpoint)
        seen = Seen(trainer)
        stop_after(trainer, leg.get("stop"))
        with suppress(Stopped):
            trainer.train()
        trainer.release()
        dist.barrier()  # the first rank writes the metrics
        results[name] = {"metrics": read_metrics(run_dir), "seen": seen.by_step, "sentences": sentences}
    return results


class Stopped(Exception):
    """A leg is at its end."""


def stop_after(trainer: Trainer, step: int | None) -> None:
    """Let a trainer save and end after a step, with the schedule of its whole run."""
    check = trainer._check_skipped

    def checked() -> None:
        check()
        if trainer.progress.step == step:
            trainer.save()
            trainer.saver.finish()
            raise Stopped

    trainer._check_skipped = checked  # type: ignore[method-assign]


class Seen:
    """Remembers what every step of a trainer saw, over all ranks: a hash of each row's tokens and images."""

    def __init__(self, trainer: Trainer):
        self.by_step: dict[int, list[str]] = {}
        draw = trainer._draw

        def remembered() -> list[Batch]:
            batches = draw()
            own = [row_hash(batch, row) for batch in batches for row in range(len(batch.input_ids))]
            rows = sorted(row for rank in gather_objects(own) for row in rank)
            self.by_step[trainer.progress.step + 1] = rows
            return batches

        trainer._draw = remembered  # type: ignore[method-assign]


def row_hash(batch: Batch, row: int) -> str:
    """Hash the tokens and the images of one row."""
    length = batch.input_ids.shape[1]
    here = (batch.slot_positions // length == row) & (batch.slot_images < batch.image_count)
    hashed = hashlib.sha256(batch.input_ids[row].numpy().tobytes())
    hashed.update(batch.images[batch.slot_images[here].unique()].numpy().tobytes())
    return hashed.hexdigest()


def losses_of_run(
    overrides: list[str], stage: int, rank_info: RankInfo, run_dir: Path
) -> tuple[list[float], list[str]]:
    """Begin or continue a run as a start of ``launch/train.py`` does, without its files about the start."""
    config = small_config(*overrides)
    ds_config = complete_ds_config({"zero_optimization": {"stage": stage}}, config, rank_info.world_size)
    checkpoint = newest_checkpoint(run_dir, rank_info)
    sentences = check_same_run(checkpoint, config) if checkpoint else []
    trainer = prepare(config, ds_config, run_dir, rank_info, open_checked_data(config), checkpoint)
    trainer.train()
    trainer.release()
    dist.barrier()  # the first rank writes the metrics
    return [row["loss"] for row in read_metrics(run_dir)], sentences


def stopped_within_a_step(rank_info: RankInfo, folder: Path) -> dict[str, Any]:
    """What a run returns, has saved and computes when rank 1 is asked to stop within step 3, and goes on; by stage.

    ``shared.json`` beside ``folder`` holds the overrides of all runs.
    """
    overrides = json.loads((folder.parent / "shared.json").read_text())
    overrides += ["train.global_batch_rows=8", "train.accumulation_steps=4", "checkpoint.every=100"]
    results = {}
    for stage in (0, 2, 3):
        whole, stopped = folder / f"whole {stage}", folder / f"stopped {stage}"
        for run_dir in (whole, stopped):
            run_dir.mkdir(parents=True, exist_ok=True)
        losses, _ = losses_of_run(overrides, stage, rank_info, whole)
        config = small_config(*overrides)
        ds_config = complete_ds_config({"zero_optimization": {"stage": stage}}, config, rank_info.world_size)
        trainer = prepare(config, ds_config, stopped, rank_info, open_checked_data(config))
        passes: list[int] = []

        def ask(*_: Any, passes: list[int] = passes) -> None:
            passes.append(1)
            if len(passes) == 10 and rank_info.rank == 1:  # the second micro-step of step 3
                STOP.received = signal.SIGINT

        trainer.engine.module.register_forward_pre_hook(ask)
        code = trainer.train()
        trainer.release()
        STOP.received = 0
        checkpoint = newest_checkpoint(stopped, rank_info)
        assert checkpoint is not None
        again, _ = losses_of_run(overrides, stage, rank_info, stopped)
        results[str(stage)] = {
            **{"code": code, "passes": len(passes), "checkpoint": checkpoint.name, "whole": losses, "again": again}
        }
    return results


class Reporting(lcl.Objective):
    """LCL that reports numbers of its own."""

    reports: ClassVar[dict[str, Combination]] = {"predicted": "sum", "logit_scale": "same", "rank_factor": "sum"}

    def forward(self, batch: Batch, normalizers: LossNormalizers) -> dict[str, torch.Tensor]:
        predicted = torch.tensor([float(len(batch.labels))], device=batch.labels.device)
        rank_factor = torch.tensor(10.0 ** dist.get_rank(), device=batch.labels.device)
        return super().forward(batch, normalizers) | {"predicted": predicted, "rank_factor": rank_factor}


def reported_numbers(rank_info: RankInfo, folder: Path) -> dict[str, Any]:
    """Metrics of two steps of two micro-steps each, and how many all-reduces of float64 the steps took."""
    config = small_config("train.global_batch_rows=8", "train.accumulation_steps=2", "train.steps=2")
    batches = [batch_with_images(100 * step + 10 * rank_info.rank) for step in range(4)]
    trainer = trainer_of(config, 3, rank_info, batches, folder, Reporting(small_model(config), config.objective))
    reduced: list[int] = []
    all_reduce = dist.all_reduce

    def counted(tensor: torch.Tensor, *args: Any, **options: Any) -> Any:
        if tensor.dtype == torch.float64:
            reduced.append(tensor.numel())
        return all_reduce(tensor, *args, **options)

    dist.all_reduce = counted
    try:
        trainer.train()
    finally:
        dist.all_reduce = all_reduce
    return {"rows": read_metrics(folder), "reduced": reduced}


SPIKE_STEP = 6
SPIKE_CASES = {
    **{f"{stage} {precision}": ({"stage": stage}, precision) for stage, precision in THREE_STEPS},
    "2 offloaded": ({"stage": 2, "offload_optimizer": {"device": "cpu"}}, "bf16"),
    "3 offloaded": ({"stage": 3, "offload_optimizer": {"device": "cpu"}}, "fp32"),
}


@contextmanager
def spikes_at(*keys: str) -> Iterator[list[list[str]]]:
    """Let every loss of a batch with one of these documents be 10,000 times as large; gives all batches' documents."""
    forward, seen = lcl.Objective.forward, list[list[str]]()

    def spiked(self: lcl.Objective, batch: Batch, normalizers: LossNormalizers) -> dict[str, torch.Tensor]:
        seen.append(list(batch.keys))
        factor = 1e4 if set(keys) & set(batch.keys) else 1.0
        return {name: value * factor for name, value in forward(self, batch, normalizers).items()}

    lcl.Objective.forward = spiked
    try:
        yield seen
    finally:
        lcl.Objective.forward = forward


def local_state(trainer: Trainer) -> list[torch.Tensor]:
    """What this rank holds of weights, fp32 weights, moments and counters, copied."""
    weights = [getattr(weight, "ds_tensor", weight) for weight in trainer.engine.module.parameters()]
    state = trainer.engine.basic_optimizer.state
    held = weights + [tensor for weight, values in state.items() for tensor in (weight, *values.values())]
    return [tensor.detach().clone() for tensor in held]


def constant(module: nn.Module, _: Any, output: tuple[torch.Tensor, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Pool every image to the same features, whatever the weights are."""
    pooled, tokens = output
    return torch.zeros_like(pooled) * pooled + 1, tokens


def skipped_spikes(rank_info: RankInfo, folder: Path) -> dict[str, Any]:
    """By stage, precision and offload: whether a step whose gradients are a spike on rank 1 alone changed anything.

    All image features are the same, and what is said about that is returned as well.
    """
    results = {}
    log = ListHandler()
    logging.getLogger("lcl_ds.training.first_steps").addHandler(log)
    first_steps.LOOK_AT = 4
    for name, (zero, precision) in SPIKE_CASES.items():
        config = small_config(
            *("train.global_batch_rows=8", "train.accumulation_steps=2", "train.warmup_steps=0"),
            *(f"train.steps={SPIKE_STEP + 1}", f"precision={precision}", "train.on_spike=skip"),
        )
        batches = [batch_with_images(100 * number + 10 * rank_info.rank) for number in range(2 * SPIKE_STEP + 2)]
        trainer = trainer_of(config, zero, rank_info, batches, folder / name)
        states, take_step = [], trainer._step

        def step_after_copy() -> Any:
            states.append(local_state(trainer))  # noqa: B023
            return take_step()  # noqa: B023

        trainer._step = step_after_copy
        trainer.objective.model.pooling.register_forward_hook(constant)
        with spikes_at(f"test/{100 * (2 * SPIKE_STEP - 1) + 10}"):  # in the second micro-step, on rank 1
            trainer.train()
        states.append(local_state(trainer))
        changed = [
            any(not torch.equal(*pair) for pair in zip(*states[step : step + 2], strict=True))
            for step in range(1, SPIKE_STEP + 1)  # the first one makes the moments
        ]
        results[name] = {"changed": changed, "applied_steps": trainer.progress.applied_steps, "said": log.lines}
        log.lines = []
        trainer.release()
    return results


def rolled_back(rank_info: RankInfo, folder: Path) -> dict[str, Any]:
    """Documents of each micro-step of a run, of one that goes back behind a spike, and of one killed while it did.

    ``rollback.json`` beside ``folder`` holds the overrides of all of them. The spike is at step 7, checkpoints are at 4
    and 8.
    """
    shared = json.loads((folder.parent / "rollback.json").read_text())
    data = open_checked_data(small_config(*shared))

    def documents_of(run_dir: Path, *overrides: str, spike: str = "") -> list[list[str]]:
        config = small_config(*shared, *overrides)
        ds_config = complete_ds_config({"zero_optimization": {"stage": 2}}, config, rank_info.world_size)
        run_dir.mkdir(parents=True, exist_ok=True)

        def prepared() -> Trainer:
            return prepare(config, ds_config, run_dir, rank_info, data, newest_checkpoint(run_dir, rank_info))

        with spikes_at(spike) as seen:
            train(prepared(), prepared)
        dist.barrier()
        return seen

    plain = documents_of(folder / "plain", "train.steps=11", "checkpoint.every=11")
    accumulation = small_config(*shared).train.accumulation_steps
    at_seven = gather_objects(plain[6 * accumulation : 7 * accumulation])[0]
    other = gather_objects(plain[: 6 * accumulation] + plain[7 * accumulation :])
    elsewhere = {key for of_rank in other for batch in of_rank for key in batch}
    spike = next(key for batch in at_seven for key in batch if key not in elsewhere)
    rollback = "train.steps=10", "train.on_spike=rollback"
    seen = documents_of(folder / "rollback", *rollback, spike=spike)
    if rank_info.is_first:
        killed = folder / "killed"
        shutil.copytree(folder / "rollback", killed)
        for step in (8, 10):
            shutil.rmtree(killed / "checkpoints" / f"step_{step:08d}")
    dist.barrier()
    again = documents_of(folder / "killed", *rollback, spike=spike)
    return {"accumulation": accumulation, "plain": plain, "spike": spike, "rollback": seen, "killed": again}


def shared_data(rank_info: RankInfo, folder: Path) -> dict[str, Any]:
    """Which headers and indices each rank reads of shards that the ranks open together, and what they all hold then.

    By case: there are no indices, there are, none can be written anywhere, and none beside the shards while each rank
    has a cache of its own, as on hosts of their own.
    """
    tars = [folder.parent / f"shards/{n}.tar" for n in range(7)]
    if rank_info.is_first:
        tars[0].parent.mkdir()
        for n, tar in enumerate(tars):
            write_tar(tar, [(f"{n}{i}.json", b"{}") for i in range(n + 1)])
    dist.barrier()
    results = {}
    counted = {"scans": shard_module.scan_shard, "checks": shard_module.read_facts}
    caches = {
        "first start": (folder, True),
        "second start": (folder, True),
        "nothing can be written": (folder.parent / "shards/0.tar", False),
        "own caches": (folder / str(rank_info.rank), False),
    }
    for case, (cache, may_write_beside) in caches.items():
        dist.barrier()  # the others have read what they need of the case before
        if not may_write_beside and rank_info.is_first:
            for tar in tars:
                beside = Path(f"{tar}.index")
                if beside.is_file():
                    beside.unlink()
                beside.mkdir(exist_ok=True)
        dist.barrier()
        calls: dict[str, list[str]] = {name: [] for name in counted}

        def noting(name: str, calls: dict[str, list[str]] = calls) -> Any:
            def called(location: str, *rest: Any) -> Any:
                calls[name].append(location)
                return counted[name](location, *rest)

            return called

        shard_module.scan_shard, shard_module.read_facts = noting("scans"), noting("checks")
        team = team_of(replace(rank_info, local_rank=0) if case == "own caches" else rank_info)
        opened = open_together([*map(str, tars)], cache, team)
        at_start = len(calls["scans"])
        source = Source("s", [shard for shard in opened.shards if shard])
        keys = [source.sample(i).key for i in range(len(source))]  # which scans where an index is out of reach
        results[case] = {
            "scans at the start": at_start,
            "calls": {name: [Path(path).name for path in paths] for name, paths in calls.items()},
            "keys": keys,
            "fingerprint": source.fingerprint(),
        }
    shard_module.scan_shard, shard_module.read_facts = counted["scans"], counted["checks"]
    return results


def checks_at_the_start(rank_info: RankInfo, folder: Path) -> dict[str, Any]:
    """What each rank hears at the start where ranks differ in what they see, as on hosts without a common disk."""
    own = folder / f"disk{rank_info.rank}"
    common = folder / "common"
    for place in (own, common):
        place.mkdir(parents=True, exist_ok=True)
    if rank_info.is_first:
        write_tar(own / "a.tar", [("0.json", b"{}")])
        write_tar(own / "b.tar", [("0.json", b"{}")])
        write_tar(common / "a.tar", [("0.json", b"{}")])
        (common / "broken.tar").write_bytes(b"no tar" * 999)
    write_tar(own / "own.tar", [(f"{rank_info.rank}.json", b"{}")])
    dist.barrier()
    # One process for each host, each in a folder of its own.
    team = team_of(replace(rank_info, local_rank=0))
    os.chdir(own)
    tokenizer = folder.parent / "tokenizer"

    def data(*paths: str) -> Any:
        overrides = [f"data.shards={[*paths]}", f"data.tokenizer={tokenizer}", f"data.cache={own}/cache"]
        return open_data(small_config(*overrides).data, team)

    actions = {
        "folder of all": lambda: check_seen_by_all(common, rank_info),
        "own folders": lambda: check_seen_by_all(own, rank_info, patience_s=0.3),
        "same settings": lambda: check_same_settings(small_config(), {"a": {"b": 1}}, rank_info),
        "other settings": lambda: check_same_settings(
            small_config(f"train.seed={rank_info.rank}"), {"a": {"b": 1, "c": rank_info.rank}}, rank_info
        ),
        "shards that one host lacks": lambda: data("a.tar", "b.tar"),
        "a broken shard": lambda: data(f"{common}/*.tar"),
        "no shards": lambda: data("none-*.tar"),
        "a command on each host": lambda: data(f"pipe:echo >> runs; cat {common}/a.tar"),
        "a command that fails on some hosts": lambda: data("pipe:cat $PWD/a.tar"),
        "a command that writes something else on each host": lambda: data("pipe:cat own.tar"),
    }
    told = {}
    for name, action in actions.items():
        try:
            with on_all_ranks(rank_info):
                action()
            told[name] = []
        except UserError as error:
            told[name] = error.problems
    told["gathered"] = [gather_to_first(rank_info.rank), gather_integers([rank_info.rank, 7], rank_info.device)]
    told["left"] = [path.name for path in common.iterdir() if "seen_by_all" in path.name]
    return told


def told_problems(rank_info: RankInfo, folder: Path) -> dict[str, Any]:
    """What each rank hears of problems that all ranks have, that one has, and that none has."""
    own = [f"only rank {rank_info.rank} sees this"] if rank_info.rank else []
    told = {}
    for name, problems in {"all": ["the same"], "one": own, "both": ["the same", *own], "none": []}.items():
        try:
            raise_for_all(problems, rank_info)
            told[name] = []
        except UserError as error:
            told[name] = error.problems
    return told


if __name__ == "__main__":
    folder, names = Path(sys.argv[1]), sys.argv[2:]
    gc.freeze()  # DeepSpeed collects garbage for every engine: not among what was imported
    here = init_distributed()
    for name in names:
        torch.save(globals()[name](here, folder / name), folder / f"{name}.{here.rank}.pt")
    dist.destroy_process_group()
