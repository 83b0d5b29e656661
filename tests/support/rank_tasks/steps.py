"""Tasks of ranks about single steps: gradients, every stage, what is skipped, summed and told."""

import weakref
from pathlib import Path
from typing import Any, ClassVar

import torch
from deepspeed.utils import get_z3_leaf_modules, safe_get_full_grad
from torch import distributed as dist

from lcl_ds.batch import Batch
from lcl_ds.config import Config
from lcl_ds.errors import UserError
from lcl_ds.metrics import Combination, read_metrics
from lcl_ds.models.blocks import blocks_of
from lcl_ds.models.build import build_empty_model
from lcl_ds.models.initial import fill_weights
from lcl_ds.objectives import build_empty_objective, lcl
from lcl_ds.objectives.base import LossNormalizers, prepare_network
from lcl_ds.training import engine as training_engine
from lcl_ds.training.checkpoint import Progress
from lcl_ds.training.distributed import RankInfo, all_reduce_sum, raise_for_all
from lcl_ds.training.engine import complete_ds_config, fp32_weight, load_engine, start_engine
from tests.support.native import NATIVE, NATIVE_WAYS, native_batch, rows_of_rank
from tests.support.rank_tasks.given import (
    STAGES,
    TEN_STEPS,
    THREE_STEPS,
    WAYS,
    batch_of_rank,
    full_weights,
    normalizers_of,
    steps_of,
    trainer_of,
)
from tests.support.small import (
    OBJECTIVES,
    ROW_TOKENS,
    VISION_TOWERS,
    VOCABULARY,
    batch_with_images,
    small_config,
    small_model,
    three_documents,
)


def gradients(rank_info: RankInfo, folder: Path) -> dict[str, Any]:
    """Loss and full gradients by (way, case), through the trainer's own counts and scaling."""
    results = {}
    for way, (stage, settings) in WAYS.items():
        config = small_config("train.global_batch_rows=4", "train.learning_rate=1e-30", *settings)
        trainer = trainer_of(config, stage, rank_info, [], folder)
        for case in ("both", "first", "none"):
            batch = batch_of_rank(case, rank_info.rank)
            losses = trainer.engine(batch, normalizers_of(trainer, batch))
            trainer.engine.backward(losses["loss"] * rank_info.world_size, scale_wrt_gas=False)
            actual = {
                name: safe_get_full_grad(weight).clone() for name, weight in trainer.engine.module.named_parameters()
            }
            trainer.engine.step()
            results[f"{way} {case}"] = {"loss": all_reduce_sum(losses["loss"].detach().clone()), "gradients": actual}
    return results


def native_gradients(rank_info: RankInfo, folder: Path) -> dict[str, Any]:
    """Loss and full gradients by (stage, family, case) where images keep their aspect ratio."""
    results = {}
    for stage, family in NATIVE_WAYS:
        tower = f"model.vision={VISION_TOWERS[family]}"
        config = small_config("train.global_batch_rows=4", "train.learning_rate=1e-30", tower, *NATIVE)
        trainer = trainer_of(config, stage, rank_info, [], folder)
        for case in ("shapes", "squares", "none"):
            batch = native_batch(*rows_of_rank(case, rank_info.rank))
            losses = trainer.engine(batch, normalizers_of(trainer, batch))
            trainer.engine.backward(losses["loss"] * rank_info.world_size, scale_wrt_gas=False)
            weights = trainer.engine.module.named_parameters()
            actual = {name: safe_get_full_grad(weight).clone() for name, weight in weights}
            trainer.engine.step()
            loss = all_reduce_sum(losses["loss"].detach().clone())
            key = f"{stage} {family} {case}"
            results[key] = {"loss": loss, "gradients": actual, "shapes": len({*batch.packed.grids})}
    return results


def building(rank_info: RankInfo, folder: Path) -> dict[str, Any]:
    """Engines of networks that were built without memory: their weights, what each rank held meanwhile and who read."""
    results: dict[str, Any] = {}
    name = "decoder.layers.1.mlp.up_proj.weight"
    for stage in STAGES:
        config = small_config("train.global_batch_rows=4")
        objective, held, readers = empty_objective(config), [], []

        def read(readers: list[int] = readers) -> torch.Tensor:
            readers.append(rank_info.rank)
            return torch.full((48, 32), 0.5)

        def fill(*arguments: Any, held: list[int] = held, objective: Any = objective, **options: Any) -> None:
            *rest, place = arguments

            def noted(unit: torch.nn.Module) -> None:
                held.append(sum(weight.numel() for weight in objective.parameters() if not weight.is_meta))
                place(unit)

            fill_weights(*rest, noted, **options)

        ds_config = {"zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0}}
        training_engine.fill_weights = fill
        ds_config = complete_ds_config(ds_config, config, rank_info.world_size)
        engine = start_engine(objective, config, ds_config, rank_info, {name: read})
        training_engine.fill_weights = fill_weights
        weights = {n: fp32_weight(engine, weight).view(shape_of(weight)) for n, weight in objective.named_parameters()}
        results[str(stage)] = {"weights": weights, "held": held, "readers": readers}

    def broken() -> torch.Tensor:
        raise OSError(5, "Input/output error", "weights.safetensors")

    try:
        start_engine(empty_objective(config), config, ds_config, rank_info, {name: broken})
    except UserError as error:
        results["refused"] = error.problems
    return results


def empty_objective(config: Config) -> Any:
    objective = build_empty_objective(build_empty_model(config.model, VOCABULARY.size, ROW_TOKENS), config.objective)
    prepare_network(objective)
    return objective


def shape_of(weight: Any) -> torch.Size:
    return getattr(weight, "ds_shape", weight.shape)


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


def objectives(rank_info: RankInfo, folder: Path) -> dict[str, Any]:
    """For each objective at stage 3: loss and full gradients of a first step, then weights before and after a few."""
    results = {}
    for name, overrides in OBJECTIVES.items():
        config = small_config(*overrides, "train.global_batch_rows=6", "train.steps=3", "train.warmup_steps=0")
        batches = [three_documents(config, seed=10 * step + rank_info.rank) for step in range(3)]
        trainer = trainer_of(config, 3, rank_info, batches, folder / name)
        first = three_documents(config, seed=rank_info.rank)
        losses = trainer.engine(first, normalizers_of(trainer, first))
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
    for stage, precision in ((0, "fp32"), (0, "bf16"), (1, "fp32"), (2, "bf16"), (3, "fp32"), (3, "bf16")):
        config = small_config(
            "train.global_batch_rows=4", "train.steps=9", "train.max_skipped_steps=3", f"precision={precision}"
        )
        batches = [batch_with_images(100 * step + 10 * rank_info.rank) for step in range(7)]
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
        whole = get_z3_leaf_modules(trainer.engine.module)
        results[name] = {
            "stopped": stopped,
            "finite": finite,
            "applied_steps": trainer.progress.applied_steps,
            "gathers blocks": whole == blocks_of(trainer.engine.module),
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
