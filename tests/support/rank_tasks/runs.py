"""Tasks of ranks about runs that are saved, stopped, changed and continued."""

import hashlib
import json
import logging
import shutil
import signal
import threading
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import distributed as dist

from lcl_ds.assembly import open_checked_data
from lcl_ds.batch import Batch
from lcl_ds.errors import UserError
from lcl_ds.metrics import read_metrics
from lcl_ds.models.settings import part_of
from lcl_ds.objectives.base import LossNormalizers
from lcl_ds.training import saver
from lcl_ds.training.checkpoint import ManifestEntry, Progress, all_checkpoints, newest_checkpoint
from lcl_ds.training.distributed import RankInfo, gather_objects
from lcl_ds.training.drawing import DrawnStep
from lcl_ds.training.engine import complete_ds_config
from lcl_ds.training.loop import Trainer
from lcl_ds.training.pulse import PULSE
from lcl_ds.training.resume import check_same_run
from lcl_ds.training.run import prepare, train
from lcl_ds.training.signals import STOP
from tests.support.disks import no_file_larger_than
from tests.support.rank_tasks.given import TEN_STEPS, GivenBatches, ListHandler, full_weights, trainer_of
from tests.support.small import VOCABULARY, batch_with_images, small_config


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

    def remembered(applied: bool, drawn: DrawnStep) -> None:
        advance(applied, drawn)
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

    A leg names its ``run``, the ZeRO settings, overrides, the step to stop after and one that is to be skipped; runs
    begin where the last leg left them. Returns metrics, what every step of the leg saw, and what was said about changed
    settings, by leg.
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
        data, seen, trainers = open_checked_data(config), Seen(), list[Trainer]()

        def start(
            checkpoint: Path | None,
            leg: dict[str, Any] = leg,
            run: tuple[Any, ...] = (config, ds_config, run_dir, rank_info, data),
            watched: tuple[Seen, list[Trainer]] = (seen, trainers),
        ) -> Trainer:
            trainer = prepare(*run, checkpoint)
            watched[0].watch(trainer)
            watched[1][:] = [trainer]
            stop_after(trainer, leg.get("stop"))
            if "skip" in leg:
                skip_step(trainer, leg["skip"])
            return trainer

        try:
            train(start(checkpoint), lambda start=start, folder=run_dir: start(newest_checkpoint(folder, rank_info)))
        except Stopped:
            trainers[-1].release()
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


def skip_step(trainer: Trainer, step: int) -> None:
    """Let the optimizer leave out a step, as one whose gradients are a spike."""
    begin = trainer._begin

    def limited(number: int) -> tuple[DrawnStep, list[LossNormalizers]]:
        begun = begin(number)
        if number == step:
            trainer.engine.basic_optimizer.limit_norm(0.0)
        return begun

    trainer._begin = limited  # type: ignore[method-assign]


class Seen:
    """Remembers what every step of trainers saw, over all ranks: a hash of each row's tokens and images."""

    def __init__(self) -> None:
        self.by_step: dict[int, list[str]] = {}

    def watch(self, trainer: Trainer) -> None:
        """Remember what a trainer is to see."""
        begin = trainer._begin

        def remembered(number: int) -> tuple[DrawnStep, list[LossNormalizers]]:
            drawn, normalizers = begin(number)
            own = [row_hash(batch, row) for batch in drawn.batches for row in range(len(batch.input_ids))]
            self.by_step[number] = sorted(row for rank in gather_objects(own) for row in rank)
            return drawn, normalizers

        trainer._begin = remembered  # type: ignore[method-assign]


def row_hash(batch: Batch, row: int) -> str:
    """Hash the tokens and the images of one row."""
    length = batch.input_ids.shape[1]
    here = (batch.slot_positions // length == row) & (batch.slot_images < batch.image_count)
    hashed = hashlib.sha256(batch.input_ids[row].numpy().tobytes())
    for image in batch.slot_images[here].unique().tolist():
        hashed.update(batch.picture(image).numpy().tobytes())
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
