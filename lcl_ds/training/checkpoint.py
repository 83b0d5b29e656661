"""Checkpoints that are complete or do not exist.

A checkpoint is written into a hidden folder by all ranks, listed in a manifest with sizes, flushed to disk and only
then renamed to ``step_NNNNNNNN``; ``latest`` is replaced after that. A run killed at any moment leaves earlier
checkpoints as they were. DeepSpeed's own ``latest`` is not used: it is written before other ranks have finished.
"""

import io
import json
import logging
import os
import shutil
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint
from torch import distributed as dist

from lcl_ds.config import Config, validate_config
from lcl_ds.data.loader import LoaderState, merge_states
from lcl_ds.errors import UserError
from lcl_ds.models.build import build_model
from lcl_ds.models.lcl import LCLModel
from lcl_ds.training.distributed import Place, gather_objects

logger = logging.getLogger(__name__)

ENGINE_TAG = "engine"
"""Subfolder with DeepSpeed's files."""
MANIFEST = "COMPLETE.json"
STATE = "trainer_state.json"
CONFIG = "config.yaml"


@dataclass
class Progress:
    """Where training stands."""

    step: int = 0
    """Optimizer steps done, skipped ones included."""
    applied_steps: int = 0
    """Steps that changed the weights; the schedule follows these."""
    skipped_in_a_row: int = 0


def checkpoints_folder(run_dir: Path) -> Path:
    return run_dir / "checkpoints"


def complete_checkpoints(run_dir: Path) -> list[Path]:
    """Complete checkpoints of a run, oldest first; folders whose files do not match their manifest are left out."""
    return [path for path in sorted(checkpoints_folder(run_dir).glob("step_*")) if is_complete(path)]


def is_complete(checkpoint: Path) -> bool:
    """Whether every file of the manifest is there with its size."""
    try:
        sizes = json.loads((checkpoint / MANIFEST).read_text())
    except (OSError, json.JSONDecodeError):
        return False
    return all((checkpoint / n).is_file() and (checkpoint / n).stat().st_size == size for n, size in sizes.items())


def save_checkpoint(
    engine: Any, run_dir: Path, config: Config, progress: Progress, loader_state: LoaderState, vocab_size: int
) -> Path:
    """Write and publish a checkpoint; every rank must call this at the same step.

    Args:
        loader_state: this rank's; those of all ranks are merged, so another number of ranks could read it.
        vocab_size: of the model, to rebuild it.
    """
    folder = checkpoints_folder(run_dir)
    final = folder / f"step_{progress.step:08d}"
    partial = folder / f".partial_{final.name}"
    first = dist.get_rank() == 0
    if first:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    dist.barrier()
    engine.save_checkpoint(str(partial), tag=ENGINE_TAG, save_latest=False)
    states = gather_objects(loader_state)
    if first:
        state = {
            "progress": asdict(progress),
            "loader": merge_states(states),
            "world_size": dist.get_world_size(),
            "zero_stage": engine.zero_optimization_stage(),
            "vocab_size": vocab_size,
        }
        (partial / STATE).write_text(json.dumps(state))
        (partial / CONFIG).write_text(yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False))
        _publish(partial, final, config.checkpoint.keep)
    dist.barrier()
    return final


def _publish(partial: Path, final: Path, keep: int) -> None:
    files = [path for path in partial.rglob("*") if path.is_file()]
    sizes = {str(path.relative_to(partial)): path.stat().st_size for path in files}
    (partial / MANIFEST).write_text(json.dumps(sizes, indent=1))
    for path in [*files, partial / MANIFEST, *(p for p in partial.rglob("*") if p.is_dir()), partial]:
        _flush(path)
    if final.exists():
        shutil.rmtree(final)
    partial.rename(final)
    _flush(final.parent)
    _write_latest(final)
    for old in complete_checkpoints(final.parent.parent)[:-keep]:
        shutil.rmtree(old)


def _write_latest(checkpoint: Path) -> None:
    temporary = checkpoint.parent / ".latest.tmp"
    temporary.write_text(checkpoint.name + "\n")
    _flush(temporary)
    temporary.replace(checkpoint.parent / "latest")
    _flush(checkpoint.parent)


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def newest_checkpoint(run_dir: Path, place: Place) -> Path | None:
    """The newest complete checkpoint, as the first rank sees it, on every rank."""
    found: list[Any] = [None]
    if place.is_first:
        complete = complete_checkpoints(run_dir)
        found = [str(complete[-1]) if complete else None]
        for path in checkpoints_folder(run_dir).glob("step_*"):
            if path not in complete:
                logger.warning("checkpoint %s is incomplete and is not used", path)
    dist.broadcast_object_list(found, src=0)
    return Path(found[0]) if found[0] else None


def read_state(checkpoint: Path) -> dict[str, Any]:
    """``progress``, ``loader``, ``world_size``, ``zero_stage`` and ``vocab_size`` of a checkpoint."""
    return json.loads((checkpoint / STATE).read_text())


def check_resumable(checkpoint: Path, state: dict[str, Any], world_size: int, zero_stage: int) -> None:
    """Refuse what the engine's files cannot continue.

    Raises:
        UserError: another number of ranks or another ZeRO stage.
    """
    for name, now in (("world_size", world_size), ("zero_stage", zero_stage)):
        if state[name] != now:
            raise UserError(
                f"{checkpoint}: was written with {name} {state[name]}, this run has {now}; "
                f"continue with {name} {state[name]} or start a new --run_dir"
            )


def load_engine(engine: Any, checkpoint: Path) -> None:
    """Weights and optimizer state into the engine.

    Raises:
        RuntimeError: DeepSpeed found nothing to load.
    """
    path, _ = engine.load_checkpoint(str(checkpoint), tag=ENGINE_TAG)
    if path is None:
        raise RuntimeError(f"{checkpoint}: DeepSpeed loaded nothing")


def resolve_checkpoint(run_or_checkpoint: Path) -> Path:
    """A checkpoint folder from itself or from its run (the newest complete one).

    Raises:
        UserError: there is none.
    """
    if (run_or_checkpoint / MANIFEST).is_file():
        if not is_complete(run_or_checkpoint):
            raise UserError(f"{run_or_checkpoint}: files of this checkpoint are missing or cut short")
        return run_or_checkpoint
    complete = complete_checkpoints(run_or_checkpoint)
    if not complete:
        raise UserError(f"{run_or_checkpoint}: neither a complete checkpoint nor a run folder with one")
    return complete[-1]


def load_config_of(checkpoint: Path) -> Config:
    """The settings a checkpoint was trained with."""
    return validate_config(yaml.safe_load((checkpoint / CONFIG).read_text()), str(checkpoint / CONFIG))


def load_model(checkpoint: Path) -> LCLModel:
    """The trained network in fp32 on the CPU, without DeepSpeed; from any ZeRO stage and number of ranks."""
    config, state = load_config_of(checkpoint), read_state(checkpoint)
    model = build_model(config.model, state["vocab_size"], config.data.row_tokens, config.seed("init"))
    prefix = "model."
    weights = {
        name.removeprefix(prefix): weight.float()
        for name, weight in _fp32_weights(checkpoint).items()
        if name.startswith(prefix)
    }
    model.load_state_dict(weights, strict=True)
    return model.eval()


def _fp32_weights(checkpoint: Path) -> dict[str, torch.Tensor]:
    folder = checkpoint / ENGINE_TAG
    if any(folder.glob("*zero_pp_rank_*_optim_states.pt")):
        with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):  # it prints its progress
            return get_fp32_state_dict_from_zero_checkpoint(str(checkpoint), tag=ENGINE_TAG)
    states = torch.load(folder / "mp_rank_00_model_states.pt", map_location="cpu", weights_only=False)
    return states["module"]
