"""What a rank takes in a step, and what its losses are divided by once all ranks know of each other."""

from dataclasses import dataclass

import torch

from lcl_ds.batch import Batch
from lcl_ds.data.stream.loader import LoaderState
from lcl_ds.objectives.base import LossNormalizer, LossNormalizers, ObjectiveSettings
from lcl_ds.training.distributed import RankInfo
from lcl_ds.training.exchange import Exchange
from lcl_ds.training.odd_steps import DrawnRows

Terms = list[dict[str, int]]
"""What the losses of each micro-step are averaged over, by the names of the objective."""


@dataclass(frozen=True)
class DrawnStep:
    """What this rank takes in a step."""

    batches: list[Batch]
    """Of each micro-step, on the device."""
    terms: Terms
    rows: DrawnRows
    position: LoaderState
    """Of the data after the step."""
    problems: list[str]
    """What is wrong with the data of this rank, which all ranks hear of when the step is to begin."""


def flat(terms: Terms) -> list[int]:
    """Lay counts end to end, as :func:`loss_normalizers` takes them."""
    return [count for micro_step in terms for count in micro_step.values()]


def exchanged_normalizers(terms: Terms, rank_info: RankInfo, settings: ObjectiveSettings) -> list[LossNormalizers]:
    """Make what the losses of some micro-steps are divided by that are not those of a step; collective."""
    _, counts = Exchange(rank_info, row=flat(terms)).read()
    return loss_normalizers([*terms[0]], counts, rank_info, settings)


def loss_normalizers(
    names: list[str], counts: list[list[float]], rank_info: RankInfo, settings: ObjectiveSettings
) -> list[LossNormalizers]:
    """Make what each micro-step's losses are divided by; no loss has to wait for the device.

    Args:
        names: of what is counted.
        counts: of each rank, as :func:`flat` lays them.
        settings: with ``normalization: reference`` every rank's own mean is averaged over ranks and micro-steps.
    """
    table = torch.tensor(counts, dtype=torch.int64).view(rank_info.world_size, -1, len(names))
    per_rank = table.permute(1, 2, 0)  # micro-step, name, rank
    everywhere = table.sum(dim=(0, 1)).clamp(min=1)
    if settings.normalization == "reference":
        passes = rank_info.world_size * len(per_rank)
        divisors = per_rank[:, :, rank_info.rank].clamp(min=1) * passes
        shares = torch.full_like(divisors, 1 / passes, dtype=torch.float64)
    else:
        divisors = everywhere.expand(len(per_rank), -1)
        shares = per_rank.sum(dim=2) / everywhere.double()
    both = torch.stack([divisors.double(), shares]).float()
    if rank_info.device.type == "cuda":
        both = both.pin_memory().to(rank_info.device, non_blocking=True)
    of_ranks = per_rank.tolist()
    return [
        {name: LossNormalizer(both[0, step, n], both[1, step, n], of_ranks[step][n]) for n, name in enumerate(names)}
        for step in range(len(of_ranks))
    ]
