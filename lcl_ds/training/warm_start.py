"""Start parts of the network from another run: from its newest checkpoint, or from one that is named.

Weights are read from the checkpoint's slices one at a time, whoever wrote them.
"""

from dataclasses import dataclass
from pathlib import Path

from torch import Tensor
from torch import distributed as dist

from lcl_ds.errors import UserError
from lcl_ds.models.initial import OF_NETWORK
from lcl_ds.models.settings import ModelSettings
from lcl_ds.models.weights.hf_folder import WeightFolder
from lcl_ds.models.weights.transfer import Release, open_release
from lcl_ds.phases import config_of_step
from lcl_ds.training.checkpoint import (
    EMA,
    MANIFEST,
    WEIGHTS,
    check_files,
    checkpoints_folder,
    holds,
    load_config_of,
    read_manifest,
    read_state,
    resolve_checkpoint,
    slices_of,
)
from lcl_ds.training.distributed import RankInfo, on_all_ranks
from lcl_ds.training.slices import SliceReader


@dataclass(frozen=True)
class CheckpointWeights(WeightFolder):
    """The network's weights in a checkpoint, by their names in the network."""

    readers: dict[str, SliceReader]
    """Which slices hold a weight."""

    def read(self, name: str) -> Tensor:
        reader = self.readers[name]
        return reader.whole(f"{OF_NETWORK}{name}", reader.shapes[f"{OF_NETWORK}{name}"])

    def shape(self, name: str) -> list[int]:
        return list(self.readers[name].shapes[f"{OF_NETWORK}{name}"])


def find_start(settings: ModelSettings) -> Path | None:
    """Find the checkpoint that ``model.init_from`` names; None where it names a release, or nothing.

    Raises:
        UserError: it names a run without a checkpoint that can be used.
    """
    path = Path(settings.init_from) if settings.init_from else None
    if path is None or not ((path / MANIFEST).is_file() or checkpoints_folder(path).is_dir()):
        return None
    try:
        return resolve_checkpoint(path)
    except UserError as error:
        raise UserError([f"model.init_from: {problem}" for problem in error.problems]) from None


def agree_on_start(settings: ModelSettings, rank_info: RankInfo) -> Path | None:
    """Find the same on every rank, also while the other run goes on, and compare hashes of what is read; collective.

    Raises:
        UserError: on all ranks: it cannot be used.
    """
    found: list[Path | None] = [None]
    with on_all_ranks(rank_info):
        if rank_info.is_first:
            found = [find_start(settings)]
    dist.broadcast_object_list(found, src=0)
    (checkpoint,) = found
    if checkpoint is not None:
        with on_all_ranks(rank_info):
            manifest = read_manifest(checkpoint)
            read = sorted(name for name in manifest if name.split("/")[0] in (WEIGHTS, EMA))
            check_files(checkpoint, manifest, read[rank_info.rank :: rank_info.world_size])
    return checkpoint


def open_start(settings: ModelSettings, checkpoint: Path | None, path: Path) -> Release:
    """Open what ``model.init_from`` names.

    Args:
        checkpoint: from :func:`find_start`; None: it is a release.
        path: the setting.

    Raises:
        ValueError: it is neither, or has no moving average that is asked for.
    """
    if checkpoint is None:
        if settings.init_ema:
            raise ValueError(f"{path}: is no run or checkpoint of one; leave out model.init_ema")
        return open_release(path)
    manifest, step = read_manifest(checkpoint), read_state(checkpoint)["progress"]["step"]
    if settings.init_ema and not holds(manifest, EMA):
        raise ValueError(f"{checkpoint}: has no moving average of the encoder; leave out model.init_ema")
    weights = slices_of(checkpoint, WEIGHTS, manifest)
    averages = slices_of(checkpoint, EMA, manifest) if settings.init_ema else None
    names = [name for name in weights.shapes if name.startswith(OF_NETWORK)]
    readers = {
        name.removeprefix(OF_NETWORK): averages if averages is not None and name in averages.shapes else weights
        for name in names
    }
    folder = CheckpointWeights(checkpoint, dict.fromkeys(readers, checkpoint), readers)
    note = "; vision from its moving average" if settings.init_ema else ""
    return Release(folder, config_of_step(load_config_of(checkpoint), step).model, note)
