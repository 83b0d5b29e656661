"""Glue to DeepSpeed: its configuration checked and completed, the engine started."""

import json
import logging
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import deepspeed
import torch
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
from deepspeed.runtime.zero.parameter_offload import FWD_MODULE_STACK
from deepspeed.runtime.zero.partitioned_param_coordinator import PartitionedParameterCoordinator
from deepspeed.utils import (
    safe_get_full_fp32_param,
    safe_get_local_fp32_param,
    safe_set_full_fp32_param,
    safe_set_local_fp32_param,
)
from pydantic import ValidationError
from torch import Tensor, nn
from torch import distributed as dist

from lcl_ds.config import Config
from lcl_ds.errors import UserError
from lcl_ds.flops import size_of
from lcl_ds.models.blocks import blocks_of
from lcl_ds.models.heads import ExactScalar
from lcl_ds.models.initial import GivenWeights, fill_weights, units
from lcl_ds.objectives.base import Objective
from lcl_ds.settings import suggest
from lcl_ds.training.checkpoint import MOMENTS, WEIGHTS, check_names, read_manifest, read_state, slice_of, slices_of
from lcl_ds.training.compiling import check_compiler, compile_blocks
from lcl_ds.training.distributed import RankInfo, on_all_ranks
from lcl_ds.training.engine_state import (
    held_parts,
    set_optimizer_steps,
    share_memory_of_masters,
    spread_weights,
    stage_0_master,
)
from lcl_ds.training.muon import Muon
from lcl_ds.training.optimizer import BoundedAdamW, freeze_parts, parameter_groups
from lcl_ds.training.resizing import ResizingReader, tower_of

logger = logging.getLogger(__name__)

ENGINE_KEYS = frozenset(
    {
        "zero_optimization",
        "communication_data_type",
        "data_types",
        "prescale_gradients",
        "gradient_predivide_factor",
        "disable_allgather",
        "wall_clock_breakdown",
        "memory_breakdown",
        "dump_state",
        "comms_logger",
        "flops_profiler",
        "aio",
    }
)
"""What a ds_config may set."""

LEAST_SUB_GROUP = 10**7
"""Weights that the optimizer steps over at once, however small the network."""
SHOWN_RANKS = 4
"""Numbers of ranks that are proposed where the global batch does not divide."""

RECIPE_KEYS = {
    "train_batch_size": "train.global_batch_rows",
    "train_micro_batch_size_per_gpu": "train.global_batch_rows and train.accumulation_steps",
    "gradient_accumulation_steps": "train.accumulation_steps",
    "gradient_clipping": "train.gradient_clipping",
    "bf16": "precision",
    "bfloat16": "precision",
    "fp16": "precision",
    "optimizer": "train.optimizer, train.learning_rate, train.betas, train.weight_decay",
    "scheduler": "train.warmup_steps, train.learning_rate",
    "steps_per_print": "log.every",
    "checkpoint": "checkpoint.every, checkpoint.keep, checkpoint.asynchronous",
    "activation_checkpointing": "model.vision.activation_checkpointing, model.decoder.activation_checkpointing",
}
"""What belongs in the recipe, and under which name."""


def load_ds_config(path: Path) -> dict[str, Any]:
    """Read and check a DeepSpeed configuration before anything is built.

    DeepSpeed itself ignores unknown keys at top level and takes ``"auto"`` for a default, so both are refused here.

    Raises:
        UserError: with every problem found, each naming file and key.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise UserError(f"{path}: cannot be read as JSON: {error}") from None
    if not isinstance(values, dict):
        raise UserError(f"{path}: a JSON object is expected")
    problems = []
    for key in values:
        if key in RECIPE_KEYS:
            problems.append(f"{path}: {key}: belongs in the recipe, as {RECIPE_KEYS[key]}")
        elif key not in ENGINE_KEYS:
            problems.append(f"{path}: {key}: unknown key{suggest(key, ENGINE_KEYS)}")
    problems += [
        f'{path}: {key}: "auto" has no meaning here; give a value or leave the key out' for key in _autos(values)
    ]
    zero = values.get("zero_optimization", {})
    if not isinstance(zero, dict):
        problems.append(f"{path}: zero_optimization: a JSON object is expected")
    elif not problems:
        try:
            settings = DeepSpeedZeroConfig(**zero)
            problems = [f"{path}: zero_optimization.{key}: {reason}" for key, reason in _refused(settings)]
        except ValidationError as error:
            for e in error.errors():
                key = ".".join(map(str, ("zero_optimization", *e["loc"])))
                unknown = f"unknown key{suggest(str(e['loc'][-1]), DeepSpeedZeroConfig.model_fields)}"
                problems.append(f"{path}: {key}: {unknown if e['type'] == 'extra_forbidden' else e['msg']}")
    if problems:
        raise UserError(problems)
    return values


def zero_settings(ds_config: dict[str, Any]) -> DeepSpeedZeroConfig:
    """Return the settings of ZeRO of a configuration from :func:`load_ds_config`, with DeepSpeed's defaults."""
    return DeepSpeedZeroConfig(**ds_config.get("zero_optimization", {}))


def _refused(zero: DeepSpeedZeroConfig) -> Iterator[tuple[str, str]]:
    """Name the settings of ZeRO under which a run would fail, or save something else than it has learned, and why."""
    if zero.round_robin_gradients:
        yield (
            "round_robin_gradients",
            "DeepSpeed then mistakes one weight for another, and a checkpoint would mix them up",
        )
    if zero.zero_quantized_nontrainable_weights:
        yield "zero_quantized_nontrainable_weights", "a checkpoint would lack the exact values of frozen weights"
    if zero.zero_quantized_weights and not torch.cuda.is_available():
        yield "zero_quantized_weights", "DeepSpeed has its kernel for GPUs alone; leave it out here"
    if zero.zenflow is not None:
        yield "zenflow", "it replaces the optimizer, which is the recipe's"
    optimizer, weights = zero.offload_optimizer, zero.offload_param
    if optimizer is not None and (optimizer.ratio < 1 or optimizer.super_offload):
        yield "offload_optimizer", "ratio and super_offload need DeepSpeed's own optimizer; leave them out"
    for name, offload in (("offload_optimizer", optimizer), ("offload_param", weights)):
        if offload is not None and offload.device == "nvme":
            yield f"{name}.device", "a checkpoint cannot be taken from nvme; name cpu or none"


def _autos(values: Any, prefix: str = "") -> list[str]:
    """List the keys, however deep, whose value is ``auto``."""
    if isinstance(values, dict):
        keys = {key: f"{prefix}.{key}" if prefix else key for key in values}
        return [auto for key, value in values.items() for auto in _autos(value, keys[key])]
    return [prefix] if values == "auto" else []


def rows_per_micro_step(config: Config, world_size: int) -> int:
    """Compute the rows of one rank in one micro-step.

    Raises:
        UserError: the global batch does not divide; names the numbers of ranks that it divides by.
    """
    train, group = config.train, config.data.group_rows
    if fits(config, world_size):
        return train.global_batch_rows // (train.accumulation_steps * world_size)
    factors, numbers = "train.accumulation_steps x ranks", f"{train.accumulation_steps} x {world_size}"
    if group > 1:
        factors, numbers = f"{factors} x data.group_rows", f"{numbers} x {group}"
    groups = train.global_batch_rows // train.accumulation_steps // group
    fitting = [ranks for ranks in range(1, groups + 1) if fits(config, ranks)]
    near = sorted(sorted(fitting, key=lambda ranks: abs(ranks - world_size))[:SHOWN_RANKS])
    remedy = f"{', '.join(map(str, near))} ranks would do" if near else "no number of ranks would do"
    raise UserError(
        f"train.global_batch_rows: {train.global_batch_rows} is not a multiple of {factors} ({numbers}); {remedy}, or "
        "change these settings"
    )


def fits(config: Config, world_size: int) -> bool:
    """Say whether that many ranks can share the global batch."""
    return config.train.global_batch_rows % (config.train.accumulation_steps * world_size * config.data.group_rows) == 0


def complete_ds_config(ds_config: dict[str, Any], config: Config, world_size: int) -> dict[str, Any]:
    """Complete the DeepSpeed configuration: the user's engine settings plus what the recipe decides.

    Raises:
        UserError: the global batch or the ranks do not divide, or gradients are to be added up in a type that stage 0
            has not.
    """
    check_ranks(ds_config, config, world_size)
    stage = ds_config.get("zero_optimization", {}).get("stage", 0)
    if stage == 0 and (ds_config.get("data_types") or {}).get("grad_accum_dtype", config.precision) != config.precision:
        raise UserError(
            "ds_config: data_types.grad_accum_dtype: at ZeRO stage 0 gradients are added up in the precision of the "
            f"recipe, {config.precision}; leave it out or use stage 1, 2 or 3"
        )
    if stage == 3 and config.train.compile:
        # DeepSpeed's own linear function looks at each weight by number, so torch 2.11 compiles every block anew and
        # gives up at the ninth.
        zero = {"memory_efficient_linear": False, **ds_config["zero_optimization"]}
        ds_config = {**ds_config, "zero_optimization": zero}
    return {
        **ds_config,
        "train_batch_size": config.train.global_batch_rows,
        "train_micro_batch_size_per_gpu": rows_per_micro_step(config, world_size),
        "gradient_accumulation_steps": config.train.accumulation_steps,
        "gradient_clipping": 0.0 if _guards_itself(stage, config) else config.train.gradient_clipping,
        # Not looked for weight by weight, which at stages 1 and 2 is thousands of kernels: what is not finite makes the
        # norm so, and our optimizer leaves the step out.
        "bf16": {"enabled": config.precision == "bf16", "check_grad_overflow": False},
        # The optimizer is torch's: DeepSpeed's own ones compile C++ on first use.
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 10**9,
    }


def check_ranks(ds_config: dict[str, Any], config: Config, world_size: int) -> None:
    """Refuse a number of ranks that batch or engine settings do not divide by. Raises: UserError with all of them."""
    problems = []
    try:
        rows_per_micro_step(config, world_size)
    except UserError as error:
        problems += error.problems
    near = zero_settings(ds_config).zero_hpz_partition_size
    if world_size % near:
        problems.append(
            f"ds_config: zero_optimization.zero_hpz_partition_size: {near} does not divide {world_size} ranks; name "
            "the number of GPUs of a host"
        )
    if problems:
        raise UserError(problems)


def _guards_itself(stage: int, config: Config) -> bool:
    """Say whether our optimizer clips and skips, because DeepSpeed wraps it with nothing that does."""
    return stage == 0 and config.precision == "fp32"


def start_engine(
    objective: Objective,
    config: Config,
    ds_config: dict[str, Any],
    rank_info: RankInfo,
    given: GivenWeights | None = None,
    *,
    has_values: bool = True,
) -> Any:
    """Freeze the parts that do not learn, fill and partition ``objective`` under DeepSpeed and log how; collective.

    Args:
        objective: with weights, or without memory.
        ds_config: from :func:`complete_ds_config`.
        given: weights that are read; the others are drawn.
        has_values: False: weights stay NaN, for a checkpoint is loaded next.

    Raises:
        ValueError: the objective has state that no checkpoint would hold.
        UserError: on all ranks: a given weight cannot be read.
    """
    check_saved_whole(objective)
    freeze_parts(objective, config.train)
    ds_config = sized(ds_config, objective, rank_info.world_size)
    stage = ds_config.get("zero_optimization", {}).get("stage", 0)
    if stage == 3:
        gather_blocks_whole(objective)
    if config.train.compile:
        with on_all_ranks(rank_info):
            check_compiler()
        compile_blocks(objective)
    exact = place_weights(objective, config, ds_config, rank_info, given, has_values)
    bounds = 0.0, math.log(config.model.logit_scale_max)
    groups = parameter_groups(objective, config.train, bounds)
    max_norm = config.train.gradient_clipping if _guards_itself(stage, config) else None
    sizes = {group["name"]: size_of(group["params"]) for group in groups}
    total = size_of(objective.parameters())
    if frozen := total - sum(sizes.values()):
        sizes["frozen"] = frozen
    optimizer = make_optimizer(groups, config, rank_info, max_norm)
    optimizer.starting = True
    engine, *_ = deepspeed.initialize(model=objective, optimizer=optimizer, config=ds_config)
    optimizer.starting = False
    optimizer.wrapper = engine.optimizer
    share_memory_of_masters(engine)
    if isinstance(optimizer, Muon):
        optimizer.share_out(engine)
    if engine.bfloat16_enabled():  # DeepSpeed makes its fp32 weights from those that it has just rounded
        for scalar, value in exact.items():
            set_fp32_weight(engine, scalar.weight, value)
    refresh_exact_scalars(engine)
    if rank_info.is_first:
        logger.info(
            "%s, decoder passes per sample %d; world size %d, ZeRO stage %d, %s on %s; %s parameters, %s per rank; "
            "groups: %s",
            config.objective.name,
            objective.decoder_passes,
            rank_info.world_size,
            engine.zero_optimization_stage(),
            config.precision,
            rank_info.device,
            f"{total:,}",
            f"{parameters_of_this_rank(engine):,}",
            ", ".join(f"{name} {size:,}" for name, size in sizes.items()),
        )
    return engine


def sized(ds_config: dict[str, Any], objective: nn.Module, world_size: int) -> dict[str, Any]:
    """Complete the buffers of stage 3 by the size of the network where the user has not set them.

    DeepSpeed's own defaults suit networks of several billion weights. Here a buffer holds the largest block; two
    blocks are whole at a time; and the optimizer steps over an eighth of a rank's weights at once.
    """
    zero = ds_config.get("zero_optimization", {})
    if zero.get("stage", 0) != 3:
        return ds_config
    block = max(size_of(unit.module.parameters()) for unit in units(objective))
    share = math.ceil(size_of(objective.parameters()) / world_size)
    sizes = {
        "sub_group_size": max(LEAST_SUB_GROUP, math.ceil(share / 8)),
        "reduce_bucket_size": block,
        "prefetch_bucket_size": block,
        "max_live_parameters": 2 * block,
        "max_reuse_distance": 2 * block,
    }
    chosen = {key.removeprefix("stage3_") for key in zero}  # DeepSpeed takes either name
    sizes = {key: size for key, size in sizes.items() if key not in chosen}
    return {**ds_config, "zero_optimization": {**zero, **sizes}}


def gather_blocks_whole(model: nn.Module) -> None:
    """Let stage 3 gather and release a block of a tower at once, not each of its modules.

    A host that would call hooks at every module needs longer for them than a GPU for the block, and hooks inside of a
    block would cut what is compiled into pieces. No more is whole at a time: :func:`sized` has room for two blocks.
    """
    deepspeed.utils.set_z3_leaf_modules(model, list(dict.fromkeys(type(block) for block in blocks_of(model))))


def place_weights(
    objective: Objective,
    config: Config,
    ds_config: dict[str, Any],
    rank_info: RankInfo,
    given: GivenWeights | None = None,
    has_values: bool = True,
) -> dict[ExactScalar, Tensor]:
    """Put the weights on this rank's device in the engine's precision, one unit after the other; collective.

    At stage 3 each unit is cut up before the next one gets memory, so that no rank ever holds more than its share and
    one unit. The first rank makes the values; DeepSpeed sends them to the others, whatever the stage.

    Returns:
        The fp32 values of the numbers that rounding would coarsen, on all ranks.

    Raises:
        UserError: on all ranks: a given weight cannot be read.
    """
    dtype = torch.bfloat16 if config.precision == "bf16" else torch.float32
    cut = _cutter(ds_config) if ds_config.get("zero_optimization", {}).get("stage", 0) == 3 else None
    exact: dict[ExactScalar, Tensor] = {}

    def place(unit: nn.Module) -> None:
        exact.update({scalar: scalar.weight.detach().to(rank_info.device) for scalar in exact_scalars(unit)})
        for weight in unit.parameters():
            weight.data = weight.data.to(rank_info.device, dtype)
        if cut is not None:
            cut(unit)

    with on_all_ranks(rank_info):
        fill_weights(objective, config.seed("init"), given, place, has_values=has_values and rank_info.is_first)
    for module in objective.modules():
        for name, buffer in module.named_buffers(recurse=False):
            module._buffers[name] = buffer.to(rank_info.device)
    objective.model.choose_attention()
    for value in exact.values():
        dist.broadcast(value, src=0)
    return exact


def _cutter(ds_config: dict[str, Any]) -> Callable[[nn.Module], None]:
    """Make what cuts the weights of a module into one part for each rank, as stage 3 wants them; collective."""
    cut_before: list[Any] = []

    def cut(module: nn.Module) -> None:
        weights = list(module.parameters())
        if cut_before:
            cut_before[0].convert_to_zero_parameters(weights)
        else:
            deepspeed.zero.Init(module=module, config_dict_or_path=ds_config)
            cut_before.extend(weights)

    return cut


def make_optimizer(
    groups: list[dict[str, Any]], config: Config, rank_info: RankInfo, max_norm: float | None
) -> BoundedAdamW:
    """Make the optimizer that ``train.optimizer`` names."""
    if config.train.optimizer == "adamw":
        return BoundedAdamW(groups, config.train, max_norm)
    is_bf16 = config.precision == "bf16" and rank_info.device.type == "cuda"
    return Muon(groups, config.train, max_norm, torch.bfloat16 if is_bf16 else torch.float32)


def check_saved_whole(model: nn.Module) -> None:
    """Refuse state beside the weights: checkpoints hold parameters alone. Raises: ValueError naming it."""
    if lost := sorted(model.state_dict().keys() - {name for name, _ in model.named_parameters(remove_duplicate=False)}):
        raise ValueError(
            f"{', '.join(lost)}: checkpoints hold parameters alone, so a continued run would lose this; make it a "
            "parameter without gradients or, where it can be computed again, a buffer with persistent=False"
        )


def parameters_of_this_rank(engine: Any) -> int:
    """Count the elements of weights that this rank holds all the time: its partition at stage 3, all of them below."""
    weights = engine.module.parameters()
    return sum(weight.ds_tensor.numel() if hasattr(weight, "ds_tensor") else weight.numel() for weight in weights)


def exact_scalars(model: nn.Module) -> list[ExactScalar]:
    """List the numbers a model learns that bf16 would coarsen."""
    scalars = [module for module in model.modules() if isinstance(module, ExactScalar)]
    return [scalar for scalar in scalars if scalar.weight.requires_grad]


def refresh_exact_scalars(engine: Any) -> None:
    """Let the model compute with the optimizer's fp32 values of its :class:`ExactScalar` numbers; collective.

    To be called whenever the optimizer's weights have changed. A frozen one stays as bf16 has it.
    """
    if not engine.bfloat16_enabled():
        return
    for scalar in exact_scalars(engine.module):
        scalar.remember(fp32_weight(engine, scalar.weight))


def fp32_weight(engine: Any, weight: nn.Parameter) -> Tensor:
    """Return the optimizer's fp32 value of a trained weight, on every rank; collective."""
    if (master := _master_of_every_rank(engine, weight)) is not None:
        return master.detach()
    value = safe_get_full_fp32_param(weight)
    assert value is not None, "DeepSpeed no longer links weights to the optimizer's"
    return value.to(weight.device)


def set_fp32_weight(engine: Any, weight: nn.Parameter, value: Tensor) -> None:
    """Replace the optimizer's fp32 value of a weight by ``value`` [1]; collective. The model's copy stays as it is."""
    if (master := _master_of_every_rank(engine, weight)) is not None:
        master.data.copy_(value)
    elif engine.zero_optimization_partition_weights():
        # DeepSpeed's setter of whole weights fails where there are fewer elements than ranks.
        local = safe_get_local_fp32_param(weight)
        safe_set_local_fp32_param(weight, torch.full_like(local, value.item()))
    else:
        safe_set_full_fp32_param(weight, value.to(weight.device))


def _master_of_every_rank(engine: Any, weight: nn.Parameter) -> Tensor | None:
    """Find the fp32 weight that every rank holds, at stage 0."""
    return None if engine.zero_optimization_stage() > 0 else stage_0_master(engine.optimizer, weight)


@torch.no_grad()
def load_engine(engine: Any, checkpoint: Path, rank_info: RankInfo) -> None:
    """Continue with weights, moments and the count of steps of a checkpoint, whoever wrote it; collective.

    Every rank reads what it holds.

    Raises:
        UserError: on all ranks: the checkpoint's weights are not those of this model.
    """
    parts = held_parts(engine)
    with on_all_ranks(rank_info):
        manifest = read_manifest(checkpoint)
        slices = {folder: slices_of(checkpoint, folder, manifest) for folder in (WEIGHTS, MOMENTS)}
        readers = {folder: ResizingReader(reader, tower_of(engine.module)) for folder, reader in slices.items()}
        check_names(checkpoint, slices[WEIGHTS].shapes, (name for name, _ in engine.module.named_parameters()))
        for part in parts:
            for kind, values in part.values.items():
                folder, name = slice_of(part.name, kind)
                values.copy_(readers[folder].read(name, part.shape, part.start, part.start + len(values)))
        set_optimizer_steps(engine, read_state(checkpoint)["optimizer_steps"])
    spread_weights(engine, parts)
    refresh_exact_scalars(engine)


def release_engine(engine: Any) -> None:
    """Let go of everything that DeepSpeed holds of an engine once the caller's own references are gone."""
    engine.destroy()
    # Stage 3 keeps modules in a list and in the cache of a method, which live as long as the process.
    FWD_MODULE_STACK.clear()
    for method in vars(PartitionedParameterCoordinator).values():
        for cell in getattr(method, "__closure__", None) or ():  # the cache is inside DeepSpeed's own decorator
            if hasattr(cell.cell_contents, "cache_clear"):
                cell.cell_contents.cache_clear()
