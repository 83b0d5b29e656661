"""Checkpoints that are complete or do not exist.

A checkpoint is written into a hidden folder by all ranks, listed in a manifest with sizes, flushed to disk and only
then renamed to ``step_NNNNNNNN``; ``latest`` is replaced after that. A run killed at any moment leaves earlier
checkpoints as they were. DeepSpeed's own ``latest`` is not used: it is written before other ranks have finished.
"""

import hashlib
import io
import json
import logging
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
import yaml
from pydantic import BaseModel, ConfigDict, ValidationError
from torch import distributed as dist

from lcl_ds.config import Config, validate_config
from lcl_ds.data.stream.loader import LoaderState, merge_states
from lcl_ds.errors import UserError
from lcl_ds.files import plain_name, read_json, read_yaml, sentence_of, write_whole, writing
from lcl_ds.metrics import METRICS
from lcl_ds.models.build import build_model
from lcl_ds.models.network import LCLModel
from lcl_ds.training.distributed import RankInfo, gather_objects, on_all_ranks
from lcl_ds.training.preparation import prepare_for_deepspeed

if TYPE_CHECKING:  # what only reads a checkpoint's settings or position does without DeepSpeed
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

logger = logging.getLogger(__name__)

ENGINE_TAG = "engine"
"""Subfolder with DeepSpeed's files."""
MANIFEST = "COMPLETE.json"
STATE = "trainer_state.json"
CONFIG = "config.yaml"


TOKENIZER_FILE = "tokenizer.json"
FOLDERS = {
    "data.tokenizer": (TOKENIZER_FILE,),
    "model.vision.pretrained": ("config.json", "*.safetensors"),
    "model.decoder.pretrained": ("config.json", "*.safetensors"),
    "model.init_from": ("config.yaml", "*.safetensors"),
}
"""Settings that name a folder, and which of its files count."""
PROBE_BYTES = 4 << 20
"""What is written to find out whether a disk is full."""
HASHED_WHOLE = 64 << 20
"""A file that counts is hashed whole up to this size in bytes; of a larger one, its size and both ends are."""


@dataclass
class Progress:
    """Where training stands."""

    step: int = 0
    """Optimizer steps done, skipped ones included."""
    applied_steps: int = 0
    """Steps that changed the weights; the schedule follows these."""
    skipped_in_a_row: int = 0
    recent: dict[str, list[float]] = field(default_factory=dict)
    """What steps usually look like, see :mod:`lcl_ds.training.spikes`."""


class SavedLoader(BaseModel):
    """What ``trainer_state.json`` must hold about the position in the data."""

    model_config = ConfigDict(extra="allow", strict=True)

    next_row: int
    lanes: dict[str, dict[str, Any]]
    lane_count: int
    fingerprint: dict[str, Any]


class SavedState(BaseModel):
    """What ``trainer_state.json`` must hold; further keys are kept."""

    model_config = ConfigDict(extra="allow", strict=True)

    progress: dict[str, int | dict[str, list[float]]]
    loader: SavedLoader
    world_size: int
    zero_stage: int
    vocab_size: int


def value_of(config: Config, key: str) -> Any:
    """Return a setting by its dotted name."""
    value: Any = config
    for name in key.split("."):
        value = getattr(value, name)
    return value


def folder_contents(config: Config) -> dict[str, str]:
    """Hash what stands in the folders that settings name, by setting; folders that are not there are left out."""
    contents = {}
    for key, patterns in FOLDERS.items():
        value = value_of(config, key)
        files = [path for pattern in patterns for path in sorted(Path(value).glob(pattern))] if value else []
        if files:
            hashes = (_file_contents(path, path.stat().st_size, path.stat().st_mtime_ns) for path in files)
            contents[key] = hashlib.sha256(b"".join(hashes)).hexdigest()
    return contents


@lru_cache
def _file_contents(path: Path, size: int, _mtime_ns: int) -> bytes:
    """Hash name, size and bytes, once for all checkpoints as long as the file is not touched.

    Large files are weights, whose header and last values tell them apart. A tokenizer counts by its values, however
    they are set out, and without its rules for truncation and padding, which we never use.
    """
    if path.name == TOKENIZER_FILE and (value := _tokenizer_of(path)) is not None:
        return hashlib.sha256(value).digest()
    hashed = hashlib.sha256(f"{path.name} {size}".encode())
    with path.open("rb") as file:
        if size <= HASHED_WHOLE:
            hashed.update(file.read())
        else:
            hashed.update(file.read(HASHED_WHOLE // 2))
            file.seek(-HASHED_WHOLE // 2, os.SEEK_END)
            hashed.update(file.read())
    return hashed.digest()


def _tokenizer_of(path: Path) -> bytes | None:
    """Read what a ``tokenizer.json`` says about tokens; None where it is none."""
    try:
        tree = read_json(path)
    except UserError:
        return None
    if not isinstance(tree, dict):
        return None
    return json.dumps(tree | {"truncation": None, "padding": None}, sort_keys=True).encode()


def checkpoints_folder(run_dir: Path) -> Path:
    return run_dir / "checkpoints"


def checkpoint_of(run_dir: Path, step: int) -> Path:
    """Name the folder of the checkpoint after ``step`` steps, if there is one."""
    return checkpoints_folder(run_dir) / f"step_{step:08d}"


def complete_checkpoints(run_dir: Path) -> list[Path]:
    """List the checkpoints of a run that can be used, oldest first."""
    return [path for path in sorted(checkpoints_folder(run_dir).glob("step_*")) if problem_of(path) is None]


def problem_of(checkpoint: Path) -> str | None:
    """Say why a checkpoint cannot be used; None where every file is as the manifest says and can be read."""
    try:
        _check_files(checkpoint)
        load_config_of(checkpoint)
        read_state(checkpoint)
    except UserError as error:
        return error.problems[0].removeprefix(f"{checkpoint}/")
    return None


def _check_files(checkpoint: Path) -> None:
    """Compare files with the manifest. Raises: UserError when one is missing or another, or there is no manifest."""
    manifest = read_json(checkpoint / MANIFEST)
    if not isinstance(manifest, dict) or not {STATE, CONFIG} <= manifest.keys():
        raise UserError(f"{checkpoint / MANIFEST}: is no list of the checkpoint's files")
    for name, entry in manifest.items():
        path = checkpoint / name
        size, digest = (entry.get("bytes"), entry.get("sha256")) if isinstance(entry, dict) else (entry, None)
        if not path.is_file():
            raise UserError(f"{path}: is missing")
        if path.stat().st_size != size:
            raise UserError(f"{path}: has {path.stat().st_size} bytes, the manifest says {size}")
        if digest is not None and _sha256(path) != digest:
            raise UserError(f"{path}: is not what was written: its hash differs from the manifest's")


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def save_checkpoint(
    engine: Any,
    run_dir: Path,
    config: Config,
    progress: Progress,
    loader_state: LoaderState,
    vocab_size: int,
    metrics: bytes = b"",
) -> Path:
    """Write and publish a checkpoint; every rank must call this at the same step.

    Args:
        loader_state: this rank's; those of all ranks are merged, so another number of ranks could read it.
        vocab_size: of the model, to rebuild it.
        metrics: lines of ``metrics.jsonl`` since the checkpoint before, kept as a copy.

    Raises:
        UserError: the disk took no whole checkpoint; those before are as they were.
    """
    final = checkpoint_of(run_dir, progress.step)
    partial = final.with_name(f".partial_{final.name}")
    first = dist.get_rank() == 0
    with _disk_errors_named(partial):
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
                "sub_group_size": engine.zero_sub_group_size() if engine.zero_optimization_stage() == 3 else None,
                "vocab_size": vocab_size,
                "folders": folder_contents(config),
            }
            (partial / STATE).write_text(json.dumps(state))
            (partial / CONFIG).write_text(yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False))
            (partial / METRICS).write_bytes(metrics)
            _publish(partial, final, config.checkpoint.keep)
    dist.barrier()
    return final


@contextmanager
def _disk_errors_named(partial: Path) -> Iterator[None]:
    """Turn what a disk refuses into a sentence, and remove what was written so far.

    Raises:
        UserError: on this rank alone.
    """
    try:
        yield
    except (OSError, RuntimeError) as error:  # torch's writer has errors of its own, which do not say why
        reason = sentence_of(error) if isinstance(error, OSError) else _what_the_disk_says(partial)
        if reason is None:
            raise
        shutil.rmtree(partial, ignore_errors=True)
        step = partial.name.removeprefix(".partial_")
        raise UserError(
            f"checkpoint {step} could not be written: {reason}; those before it are whole, and running the same "
            "command again continues from the newest",
            on_every_rank=False,
        ) from error


def _what_the_disk_says(folder: Path) -> str | None:
    try:
        with writing(folder / "probe") as file:
            file.write(bytes(PROBE_BYTES))
        (folder / "probe").unlink()
    except OSError as error:
        return sentence_of(error)
    return None


def _publish(partial: Path, final: Path, keep: int) -> None:
    files = [path for path in partial.rglob("*") if path.is_file()]
    manifest = {str(path.relative_to(partial)): _manifest_entry(path) for path in files}
    (partial / MANIFEST).write_text(json.dumps(manifest, indent=1))
    for path in [*files, partial / MANIFEST, *(p for p in partial.rglob("*") if p.is_dir()), partial]:
        _flush(path)
    if final.exists():
        shutil.rmtree(final)
    partial.rename(final)
    _flush(final.parent)
    write_whole(final.parent / "latest", final.name + "\n")
    _flush(final.parent)
    for old in complete_checkpoints(final.parent.parent)[:-keep]:
        shutil.rmtree(old)


def _manifest_entry(path: Path) -> dict[str, Any]:
    """Record the size of a file; of the small ones, which people can read and change, the hash as well."""
    entry: dict[str, Any] = {"bytes": path.stat().st_size}
    if path.name in (STATE, CONFIG, METRICS):
        entry["sha256"] = _sha256(path)
    return entry


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def newest_checkpoint(run_dir: Path, rank_info: RankInfo) -> Path | None:
    """Find the newest checkpoint that can be used, as the first rank sees it, on every rank; others are named.

    Raises:
        UserError: on every rank, when there are checkpoints and none can be used.
    """
    newest: list[Any] = [None]
    with on_all_ranks(rank_info):
        if rank_info.is_first:
            problems = {path: problem_of(path) for path in sorted(checkpoints_folder(run_dir).glob("step_*"))}
            for path, problem in problems.items():
                if problem is not None:
                    logger.warning("checkpoint %s is incomplete and is not used: %s", path, problem)
            usable = [str(path) for path, problem in problems.items() if problem is None]
            if problems and not usable:
                raise UserError(
                    f"{checkpoints_folder(run_dir)}: none of the {len(problems)} checkpoints can be used (see above); "
                    "restore one of them, or start again in another --run_dir"
                )
            newest = [usable[-1] if usable else None]
    dist.broadcast_object_list(newest, src=0)
    return Path(newest[0]) if newest[0] else None


def read_state(checkpoint: Path) -> dict[str, Any]:
    """Read ``progress``, ``loader``, ``world_size``, ``zero_stage`` and ``vocab_size`` of a checkpoint.

    Raises:
        UserError: the file cannot be read or lacks one of them.
    """
    state = read_json(checkpoint / STATE)
    try:
        Progress(**cast(dict[str, Any], SavedState.model_validate(state).progress))
    except TypeError as error:
        raise UserError(f"{checkpoint / STATE}: progress: {error}") from None
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, first["loc"]))
        raise UserError(f"{checkpoint / STATE}: {key or 'whole file'}: {first['msg'].lower()}") from None
    return state


def check_resumable(checkpoint: Path, state: dict[str, Any], world_size: int, zero: "DeepSpeedZeroConfig") -> None:
    """Refuse what the engine's files cannot continue.

    Raises:
        UserError: another number of ranks, another ZeRO stage, or at stage 3 other groups of weights.
    """
    now = {"world_size": world_size, "zero_stage": int(zero.stage), "sub_group_size": _sub_group_size(zero)}
    for name, value in now.items():
        before = state.get(name, value)  # older checkpoints lack the last one
        if before != value:
            raise UserError(
                f"{checkpoint}: was written with {name} {before}, this run has {value}; "
                f"continue with {name} {before} or start a new --run_dir"
            )


def _sub_group_size(zero: "DeepSpeedZeroConfig") -> int | None:
    """Say into how large groups stage 3 cuts the optimizer's state; None at other stages, which do not."""
    return zero.sub_group_size if zero.stage == 3 else None


def load_engine(engine: Any, checkpoint: Path) -> None:
    """Load weights and optimizer state into the engine.

    Raises:
        RuntimeError: DeepSpeed found nothing to load.
    """
    with plain_name(checkpoint) as folder:
        path, _ = engine.load_checkpoint(str(folder), tag=ENGINE_TAG)
    if path is None:
        raise RuntimeError(f"{checkpoint}: DeepSpeed loaded nothing")


def resolve_checkpoint(run_or_checkpoint: Path) -> Path:
    """Find a checkpoint folder from itself or from its run (the newest complete one).

    Raises:
        UserError: there is none.
    """
    if (run_or_checkpoint / MANIFEST).is_file():
        if problem := problem_of(run_or_checkpoint):
            raise UserError(f"{run_or_checkpoint}: this checkpoint cannot be used: {problem}")
        return run_or_checkpoint
    complete = complete_checkpoints(run_or_checkpoint)
    if not complete:
        if steps := sorted(checkpoints_folder(run_or_checkpoint).glob("step_*")):
            newest = f"{steps[-1].name}: {problem_of(steps[-1])}"
            raise UserError(f"{run_or_checkpoint}: none of its {len(steps)} checkpoints can be used; {newest}")
        raise UserError(f"{run_or_checkpoint}: neither a complete checkpoint nor a run folder with one")
    return complete[-1]


def load_config_of(checkpoint: Path) -> Config:
    """Read the settings a checkpoint was trained with.

    Raises:
        UserError: the file cannot be read, or not by this version.
    """
    tree = read_yaml(checkpoint / CONFIG)
    if not isinstance(tree, dict):
        raise UserError(f"{checkpoint / CONFIG}: a mapping of settings is expected, found {type(tree).__name__}")
    return validate_config(tree, str(checkpoint / CONFIG))


def load_model(checkpoint: Path) -> LCLModel:
    """Load the trained network in fp32 on the CPU, without DeepSpeed, from any ZeRO stage and number of ranks."""
    config, state = load_config_of(checkpoint), read_state(checkpoint)
    model = build_model(config.model, state["vocab_size"], config.data.longest_document, config.seed("init"))
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
        prepare_for_deepspeed()
        from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

        nowhere = io.StringIO()  # it prints its progress
        with plain_name(checkpoint) as plain, redirect_stdout(nowhere), redirect_stderr(nowhere):
            return get_fp32_state_dict_from_zero_checkpoint(str(plain), tag=ENGINE_TAG)
    states = torch.load(folder / "mp_rank_00_model_states.pt", map_location="cpu", weights_only=False)
    optimizer = states.get("optimizer") or {}
    if "fp32_groups" not in optimizer:  # fp32: the weights themselves
        return states["module"]
    names = [group["param_names"] for group in optimizer["optimizer_state_dict"]["param_groups"]]
    exact = zip(names, optimizer["fp32_groups"], strict=True)
    return states["module"] | {name: w.detach() for group in exact for name, w in zip(*group, strict=True)}
