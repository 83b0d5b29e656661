"""Keep an exponential moving average (EMA) of the vision tower beside the weights that train.

It is what many encoders are released from. Each rank keeps the elements that it would write into a checkpoint, in fp32,
where the optimizer's weights lie: 4 bytes for each of its share of the tower, at every ZeRO stage, with or without
offload.
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.optim.swa_utils import get_ema_multi_avg_fn

from lcl_ds.models.settings import part_of
from lcl_ds.training.checkpoint import EMA, WEIGHT, holds, read_manifest, slices_of
from lcl_ds.training.distributed import RankInfo, on_all_ranks
from lcl_ds.training.engine_state import held_parts, own_share
from lcl_ds.training.resizing import ResizingReader, tower_of
from lcl_ds.training.slices import Slice


class EncoderAverage:
    """``average = decay * average + (1 - decay) * weight`` after every applied step.

    It begins with the weights of the moment it is made. Frozen weights are their own average and are left out.
    """

    def __init__(self, engine: Any, decay: float):
        self._tower = tower_of(engine.module)
        self.slices: list[Slice] = []
        """This rank's, in memory that :meth:`update` changes."""
        self._weights: list[Tensor] = []
        """fp32 [elements] of each slice, views of what the optimizer changes."""
        for part in held_parts(engine):
            if part_of(part.name) != "vision" or not part.weight.requires_grad:
                continue
            start, values = own_share(part)
            if values[WEIGHT].numel():
                self._weights.append(values[WEIGHT])
                self.slices.append(Slice(part.name, start, part.shape, values[WEIGHT].clone()))
        self._averages = [part.values for part in self.slices]
        self._average = get_ema_multi_avg_fn(decay)

    @torch.no_grad()
    def update(self) -> None:
        """Move towards the weights; to be called after every step that has changed them."""
        if self._averages:
            self._average(self._averages, self._weights, torch.empty(0))

    def load(self, checkpoint: Path, rank_info: RankInfo) -> bool:
        """Continue with the average of a checkpoint, whoever wrote it; collective.

        Returns:
            Whether it has one; without, the average stays what it is.

        Raises:
            UserError: on all ranks: it cannot be read, or belongs to another tower.
        """
        with on_all_ranks(rank_info):
            manifest = read_manifest(checkpoint)
            if not holds(manifest, EMA):
                return False
            reader = ResizingReader(slices_of(checkpoint, EMA, manifest), self._tower)
            for part in self.slices:
                stop = part.start + len(part.values)
                part.values.copy_(reader.read(part.name, part.shape, part.start, stop))
        return True


def start_average(
    engine: Any, decay: float | None, checkpoint: Path | None, rank_info: RankInfo
) -> EncoderAverage | None:
    """Begin the average with the engine's weights, or go on with that of the checkpoint they come from.

    Returns:
        None where ``decay`` says that there is none.
    """
    if decay is None:
        return None
    average = EncoderAverage(engine, decay)
    if checkpoint is not None:
        average.load(checkpoint, rank_info)
    return average
