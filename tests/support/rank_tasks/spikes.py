"""Tasks of ranks about steps whose gradients are a spike."""

import json
import logging
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import distributed as dist
from torch import nn

from lcl_ds.assembly import open_checked_data
from lcl_ds.batch import Batch
from lcl_ds.objectives import lcl
from lcl_ds.objectives.base import LossNormalizers
from lcl_ds.training import first_steps
from lcl_ds.training.checkpoint import newest_checkpoint
from lcl_ds.training.distributed import RankInfo, gather_objects
from lcl_ds.training.engine import complete_ds_config
from lcl_ds.training.loop import Trainer
from lcl_ds.training.run import prepare, train
from tests.support.rank_tasks.given import THREE_STEPS, ListHandler, trainer_of
from tests.support.small import batch_with_images, small_config

SPIKE_STEP = 6

SPIKE_CASES = {
    **{f"{stage} {precision}": ({"stage": stage}, precision) for stage, precision in THREE_STEPS},
    "2 offloaded": ({"stage": 2, "offload_optimizer": {"device": "cpu"}}, "bf16"),
    "3 offloaded": ({"stage": 3, "offload_optimizer": {"device": "cpu"}}, "fp32"),
    "0 muon": ({"stage": 0}, "fp32"),
    "3 muon": ({"stage": 3, "sub_group_size": 3000}, "bf16"),
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
            f"train.optimizer={'muon' if 'muon' in name else 'adamw'}",
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
