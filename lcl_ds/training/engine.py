"""Glue to DeepSpeed: its configuration checked and completed, the engine started."""

import difflib
import json
import logging
import math
from pathlib import Path
from typing import Any

import deepspeed
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
from pydantic import ValidationError

from lcl_ds.config import Config
from lcl_ds.errors import UserError
from lcl_ds.objectives.common import Objective
from lcl_ds.training.distributed import Place
from lcl_ds.training.optimizer import BoundedAdamW, parameter_groups

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
        "checkpoint",
    }
)
"""What a ds_config may set."""

RECIPE_KEYS = {
    "train_batch_size": "train.global_batch_rows",
    "train_micro_batch_size_per_gpu": "train.global_batch_rows and train.accumulation_steps",
    "gradient_accumulation_steps": "train.accumulation_steps",
    "gradient_clipping": "train.gradient_clipping",
    "bf16": "precision",
    "bfloat16": "precision",
    "fp16": "precision",
    "optimizer": "train.learning_rate, train.betas, train.weight_decay",
    "scheduler": "train.warmup_steps, train.learning_rate",
    "steps_per_print": "log.every",
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
            close = difflib.get_close_matches(key, ENGINE_KEYS, n=1)
            hint = f" (did you mean {close[0]!r}?)" if close else ""
            problems.append(f"{path}: {key}: unknown key{hint}")
    problems += [
        f'{path}: {key}: "auto" has no meaning here; give a value or leave the key out' for key in _autos(values)
    ]
    zero = values.get("zero_optimization", {})
    if not isinstance(zero, dict):
        problems.append(f"{path}: zero_optimization: a JSON object is expected")
    elif not problems:
        try:
            DeepSpeedZeroConfig(**zero)
        except ValidationError as error:
            for e in error.errors():
                key = ".".join(map(str, ("zero_optimization", *e["loc"])))
                close = difflib.get_close_matches(str(e["loc"][-1]), DeepSpeedZeroConfig.model_fields, n=1)
                unknown = f"unknown key{f' (did you mean {close[0]!r}?)' if close else ''}"
                problems.append(f"{path}: {key}: {unknown if e['type'] == 'extra_forbidden' else e['msg']}")
    if problems:
        raise UserError(problems)
    return values


def _autos(values: Any, prefix: str = "") -> list[str]:
    if isinstance(values, dict):
        return [found for key, value in values.items() for found in _autos(value, f"{prefix}.{key}" if prefix else key)]
    return [prefix] if values == "auto" else []


def rows_per_micro_step(config: Config, world_size: int) -> int:
    """Rows of one rank in one micro-step.

    Raises:
        UserError: the global batch does not divide.
    """
    train = config.train
    rows, rest = divmod(train.global_batch_rows, train.accumulation_steps * world_size)
    if rest:
        raise UserError(
            f"train.global_batch_rows: {train.global_batch_rows} is not a multiple of "
            f"train.accumulation_steps x ranks ({train.accumulation_steps} x {world_size})"
        )
    return rows


def complete_ds_config(ds_config: dict[str, Any], config: Config, world_size: int) -> dict[str, Any]:
    """The whole DeepSpeed configuration: the user's engine settings plus what the recipe decides."""
    stage = ds_config.get("zero_optimization", {}).get("stage", 0)
    return {
        **ds_config,
        "train_batch_size": config.train.global_batch_rows,
        "train_micro_batch_size_per_gpu": rows_per_micro_step(config, world_size),
        "gradient_accumulation_steps": config.train.accumulation_steps,
        "gradient_clipping": 0.0 if _guards_itself(stage, config) else config.train.gradient_clipping,
        "bf16": {"enabled": config.precision == "bf16"},
        # The optimizer is torch's: DeepSpeed's own ones compile C++ on first use.
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 10**9,
    }


def _guards_itself(stage: int, config: Config) -> bool:
    """Whether our optimizer clips and skips, because DeepSpeed wraps it with nothing that does."""
    return stage == 0 and config.precision == "fp32"


def start_engine(objective: Objective, config: Config, ds_config: dict[str, Any], place: Place) -> Any:
    """Partition ``objective`` under DeepSpeed and log how.

    Args:
        ds_config: from :func:`complete_ds_config`.
    """
    bounds = 0.0, math.log(config.model.logit_scale_max)
    groups = parameter_groups(objective, config.train, bounds)
    stage = ds_config.get("zero_optimization", {}).get("stage", 0)
    max_norm = config.train.gradient_clipping if _guards_itself(stage, config) else None
    sizes = {group["name"]: sum(weight.numel() for weight in group["params"]) for group in groups}
    total = sum(weight.numel() for weight in objective.parameters())
    if frozen := total - sum(sizes.values()):
        sizes["frozen"] = frozen
    optimizer = BoundedAdamW(groups, config.train, max_norm)
    engine, *_ = deepspeed.initialize(model=objective, optimizer=optimizer, config=ds_config)
    if place.is_first:
        logger.info(
            "%s, decoder passes per sample %d; world size %d, ZeRO stage %d, %s on %s; %s parameters, %s per rank; "
            "groups: %s",
            config.objective.name,
            objective.decoder_passes,
            place.world_size,
            engine.zero_optimization_stage(),
            config.precision,
            place.device,
            f"{total:,}",
            f"{parameters_of_this_rank(engine):,}",
            ", ".join(f"{name} {size:,}" for name, size in sizes.items()),
        )
    return engine


def parameters_of_this_rank(engine: Any) -> int:
    """Elements of the weights that this rank holds for good: its partition at stage 3, all of them below."""
    weights = engine.module.parameters()
    return sum(weight.ds_tensor.numel() if hasattr(weight, "ds_tensor") else weight.numel() for weight in weights)
