"""Checkpoints that are complete or do not exist, and that any number of ranks can read.

A checkpoint is a folder ``step_NNNNNNNN``: settings, position and metrics as text; fp32 weights, the optimizer's
moments and the encoder's moving average as slices (:mod:`lcl_ds.training.slices`); and a manifest with size and hash of
every file. It is written by :mod:`lcl_ds.training.saver` under a hidden name and renamed when all of it is on disk, so
a run killed at any moment leaves earlier checkpoints as they were. What is read is compared with the manifest first.
"""

import hashlib
import logging
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, cast

from pydantic import BaseModel, ConfigDict, ValidationError
from torch import distributed as dist

from lcl_ds.config import Config, validate_config
from lcl_ds.errors import UserError
from lcl_ds.files import read_json, read_yaml, sentence_of
from lcl_ds.metrics import METRICS, read_metrics
from lcl_ds.models.build import build_empty_model
from lcl_ds.models.initial import OF_NETWORK, fill_weights
from lcl_ds.models.network import LCLModel
from lcl_ds.models.settings import Part
from lcl_ds.phases import config_of_step
from lcl_ds.training.distributed import RankInfo, gather_objects, on_all_ranks
from lcl_ds.training.slices import SUFFIX, SliceReader

logger = logging.getLogger(__name__)

MANIFEST = "COMPLETE.json"
STATE = "trainer_state.json"
CONFIG = "config.yaml"
WEIGHTS, MOMENTS = "weights", "moments"
"""Subfolders with the slices of the fp32 weights, and of AdamW's two moments."""
EMA = "ema"
"""The subfolder with the slices of the vision tower's moving average, where the run keeps one."""
WEIGHT = "weight"
"""The kind of values that is the weight itself, beside AdamW's names for its moments."""
LATEST, BEST = "latest", "best"
"""Files beside the checkpoints that name one of them."""
STEP, PARTIAL = "step_", ".partial_"
"""How the names of checkpoints begin, and of what was not finished."""
OF_EARLIER_VERSIONS = "engine"
"""The subfolder where those let DeepSpeed write what only the same number of ranks could read."""
NAMED = 5
"""How many damaged files of a checkpoint are named."""


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
    optimizer_steps: int
    loader: SavedLoader
    vocab_size: int


class ManifestEntry(BaseModel):
    """What ``COMPLETE.json`` says of one file."""

    model_config = ConfigDict(extra="forbid", strict=True)

    bytes: int
    sha256: str


def checkpoints_folder(run_dir: Path) -> Path:
    return run_dir / "checkpoints"


def checkpoint_of(run_dir: Path, step: int) -> Path:
    """Name the folder of the checkpoint after ``step`` steps, if there is one."""
    return checkpoints_folder(run_dir) / f"{STEP}{step:08d}"


def step_of(checkpoint: Path) -> int:
    """Read the step from a checkpoint's name."""
    return int(checkpoint.name.removeprefix(STEP))


def all_checkpoints(run_dir: Path) -> list[Path]:
    """List the folders of a run's checkpoints, oldest first, whatever is in them."""
    return sorted(path for path in checkpoints_folder(run_dir).glob(f"{STEP}*") if path.name[len(STEP) :].isdigit())


def complete_checkpoints(run_dir: Path) -> list[Path]:
    """List the checkpoints of a run that are whole, oldest first; hashes of large files are not looked at."""
    return [path for path in all_checkpoints(run_dir) if problem_of(path) is None]


def problem_of(checkpoint: Path) -> str | None:
    """Say why a checkpoint cannot be used; None where sizes of all files, and the text files themselves, are right."""
    try:
        manifest = read_manifest(checkpoint)
        check_files(checkpoint, manifest, [name for name in manifest if not name.endswith(SUFFIX)])
        load_config_of(checkpoint)
        read_state(checkpoint)
    except UserError as error:
        return error.problems[0].removeprefix(f"{checkpoint}/")
    return None


def read_manifest(checkpoint: Path) -> dict[str, ManifestEntry]:
    """Read which files a checkpoint has, and find all of them in their size.

    Raises:
        UserError: the manifest cannot be read, or names a file that is missing or has another size.
    """
    path = checkpoint / MANIFEST
    tree = read_json(path)
    if not isinstance(tree, dict) or not {STATE, CONFIG} <= tree.keys():
        raise UserError(f"{path}: is no list of the checkpoint's files")
    if any(name.startswith(f"{OF_EARLIER_VERSIONS}/") for name in tree):
        raise UserError(
            f"{path}: is of an earlier version of this program, which alone can continue it or convert it; "
            "environment.json in the run's folder names its commit"
        )
    try:
        manifest = {name: ManifestEntry.model_validate(entry) for name, entry in tree.items()}
    except ValidationError:
        raise UserError(f"{path}: has entries without size and hash") from None
    for name, entry in manifest.items():
        file = checkpoint / name
        try:
            size = file.stat().st_size if file.is_file() else None
        except OSError as error:
            raise UserError(f"{file}: cannot be read: {sentence_of(error) or error}") from error
        if size is None:
            raise UserError(f"{file}: is missing")
        if size != entry.bytes:
            raise UserError(f"{file}: has {size} bytes, the manifest says {entry.bytes}")
    return manifest


def check_files(checkpoint: Path, manifest: dict[str, ManifestEntry], names: list[str]) -> None:
    """Read files and compare their hashes with the manifest's. Raises: UserError naming those that differ."""
    damaged = [name for name in names if hash_of(checkpoint / name) != manifest[name].sha256]
    problems = [
        f"{checkpoint / name}: is not what was written: its hash differs from the manifest's" for name in damaged
    ]
    if problems:
        raise UserError(problems)


def hash_of(path: Path) -> str:
    """Compute the SHA-256 of a file. Raises: UserError when it cannot be read."""
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {sentence_of(error) or error}") from error


def newest_checkpoint(run_dir: Path, rank_info: RankInfo, ignore_damaged: bool = False) -> Path | None:
    """Find the newest checkpoint that can be used, the same on every rank; others are named; collective.

    Ranks read all of it together, each a part of the files, to compare hashes.

    Args:
        ignore_damaged: begin anew where none can be used; what is there is kept under other names.

    Raises:
        UserError: on every rank, when the run has saved something and nothing of it can be used.
    """
    for checkpoint in _candidates(run_dir, rank_info):
        problems = _damage(checkpoint, rank_info)
        if not problems:
            return checkpoint
        if rank_info.is_first:
            more = f" and {len(problems) - NAMED} more" if len(problems) > NAMED else ""
            named = "; ".join(problems[:NAMED])
            logger.warning("checkpoint %s cannot be used: %s%s", checkpoint, named, more)
    with on_all_ranks(rank_info):
        if rank_info.is_first:
            _begin_anew(run_dir, ignore_damaged)
    return None


def _candidates(run_dir: Path, rank_info: RankInfo) -> Iterator[Path]:
    """Give the checkpoints of a run, newest first, as the first rank sees them, one after the other on all ranks."""
    found: list[Any] = [[str(path) for path in reversed(all_checkpoints(run_dir))] if rank_info.is_first else None]
    dist.broadcast_object_list(found, src=0)
    yield from map(Path, found[0])


def _damage(checkpoint: Path, rank_info: RankInfo) -> list[str]:
    """List what all ranks together find wrong with a checkpoint, the same on every rank."""
    problems: list[str] = []
    try:
        if rank_info.is_first and (problem := problem_of(checkpoint)):
            raise UserError(problem)
        manifest = read_manifest(checkpoint)
        large = sorted(name for name in manifest if name.endswith(SUFFIX))
        check_files(checkpoint, manifest, large[rank_info.rank :: rank_info.world_size])
    except UserError as error:
        problems = [problem.removeprefix(f"{checkpoint}/") for problem in error.problems]
    return list(dict.fromkeys(problem for of_rank in gather_objects(problems) for problem in of_rank))


def _begin_anew(run_dir: Path, ignore_damaged: bool) -> None:
    """Let a run without a usable checkpoint begin, unless it has saved one before.

    Raises:
        UserError: it has, and nobody asked to begin anew.
    """
    folder = checkpoints_folder(run_dir)
    damaged = all_checkpoints(run_dir)
    if not damaged and not (folder / LATEST).exists() and not _must_have_saved(run_dir):
        return
    if not ignore_damaged:
        unusable = f"none of the {len(damaged)} checkpoints can be used (see above)"
        what = unusable if damaged else "its checkpoints are gone"
        raise UserError(
            f"{folder}: {what}; restore one of them, start again in another --run_dir, or let this run begin anew with "
            "checkpoint.ignore_damaged=true"
        )
    for path in [*damaged, folder / LATEST, run_dir / METRICS]:
        if path.exists():
            path.rename(_aside(path))
    logger.warning("%s: nothing can be used; the run begins anew, and what was there has .damaged in its name", run_dir)


def _must_have_saved(run_dir: Path) -> bool:
    """Say whether figures go on beyond the second checkpoint that was due, before which the first one is published.

    So a disk that is not mounted is not taken for a run that has just begun.
    """
    try:
        rows, every = read_metrics(run_dir), load_config_of(run_dir).checkpoint.every
    except UserError:  # nothing was trained, or nobody can tell
        return False
    return bool(rows) and rows[-1]["step"] > 2 * every


def _aside(path: Path) -> Path:
    """Name a place beside ``path`` that is free."""
    number = 1
    while (other := path.with_name(f"{path.name}.damaged{number}")).exists():
        number += 1
    return other


def read_state(checkpoint: Path) -> dict[str, Any]:
    """Read what :class:`SavedState` names of a checkpoint, and what else its state holds.

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
        if steps := all_checkpoints(run_or_checkpoint):
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


def slice_of(name: str, kind: str) -> tuple[str, str]:
    """Say in which subfolder, and under which name, a checkpoint holds a weight or, by its kind, one of its moments."""
    return (WEIGHTS, name) if kind == WEIGHT else (MOMENTS, f"{kind}.{name}")


def holds(manifest: dict[str, ManifestEntry], folder: str) -> bool:
    """Say whether a checkpoint has a subfolder."""
    return any(name.startswith(f"{folder}/") for name in manifest)


def slices_of(checkpoint: Path, folder: str, manifest: dict[str, ManifestEntry]) -> SliceReader:
    """Open the slices in a subfolder that the manifest names: others are nobody's, and their hashes are not known."""
    names = sorted(name.removeprefix(f"{folder}/") for name in manifest if name.startswith(f"{folder}/"))
    return SliceReader(checkpoint / folder, names)


def check_names(checkpoint: Path, saved: Iterable[str], expected: Iterable[str]) -> None:
    """Refuse a checkpoint with weights that a model would leave behind. Raises: UserError naming one."""
    if unknown := sorted(set(saved) - set(expected)):
        raise UserError(f"{checkpoint}: holds {unknown[0]}, which the model that its settings describe does not have")


def load_model(checkpoint: Path, parts: Collection[Part] = (), ema: bool = False) -> LCLModel:
    """Load the trained network in fp32 on the host, one weight at a time; needs neither DeepSpeed nor the objective.

    Args:
        parts: the only parts to load, none named: all; the others take no memory and cannot be used.
        ema: take the vision tower from its moving average.

    Raises:
        UserError: a file of weights is not what was written, or there is no moving average.
    """
    manifest = read_manifest(checkpoint)
    if ema and not holds(manifest, EMA):
        raise UserError(f"{checkpoint}: has no moving average of the encoder; train.ema_decay was not set in its run")
    folders = (WEIGHTS, EMA) if ema else (WEIGHTS,)
    check_files(checkpoint, manifest, [name for name in manifest if name.split("/")[0] in folders])
    config, state = load_config_of(checkpoint), read_state(checkpoint)
    config = config_of_step(config, state["progress"]["step"])
    model = build_empty_model(config.model, state["vocab_size"], config.data.longest_document)
    reader = slices_of(checkpoint, WEIGHTS, manifest)
    averages = slices_of(checkpoint, EMA if ema else WEIGHTS, manifest)
    shapes = {f"{OF_NETWORK}{name}": tuple(weight.shape) for name, weight in model.named_parameters()}
    check_names(checkpoint, (name for name in reader.shapes if name.startswith(OF_NETWORK)), shapes)
    given = {
        name.removeprefix(OF_NETWORK): partial((averages if name in averages.shapes else reader).whole, name, shape)
        for name, shape in shapes.items()
    }
    fill_weights(model, 0, given, within=parts)
    for part in parts or ("",):
        model.get_submodule(part).to("cpu")  # also buffers, and with attention that suits the host
    return model.eval()
