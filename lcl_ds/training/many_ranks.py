"""Describe how a run spreads over ranks that are not there: ``launch/train.py --dry_run --gpus 64``."""

import math
from collections.abc import Iterator
from typing import Any

from lcl_ds.batch import Batch
from lcl_ds.config import Config
from lcl_ds.data.stream.loader import BatchLoader
from lcl_ds.training.engine import rows_per_micro_step


def spread(config: Config, loader: BatchLoader, batches: dict[int, Batch], ranks: int) -> dict[str, Any]:
    """Describe how the rows of a step are spread over so many ranks.

    Args:
        loader: of any rank.
        batches: first micro-batch of some ranks, by rank.
    """
    rows = rows_per_micro_step(config, ranks)
    processes = ranks * max(1, config.data.workers)
    lanes = loader.settings.lanes
    described: dict[str, Any] = {
        "ranks": ranks,
        "rows_of_a_rank_and_micro_step": rows,
        "groups_of_a_rank_and_micro_step": rows // config.data.group_rows,
        "loader_processes": processes,
        "lanes": lanes,
        "images_of_first_micro_batch": {f"rank {rank}": batch.image_count for rank, batch in batches.items()},
        "tokens_of_first_micro_batch": {f"rank {rank}": batch.token_count for rank, batch in batches.items()},
    }
    if notes := list(_notes(processes, lanes, batches)):
        described["notes"] = notes
    return described


def _notes(processes: int, lanes: int, batches: dict[int, Batch]) -> Iterator[str]:
    """Say what works and costs something."""
    packers = processes // math.gcd(processes, lanes)
    if packers > 1:
        yield (
            f"data.lanes: {processes} loader processes take rows from {lanes} lanes, so {packers} of them read and "
            f"pack every document; a new run would rather have data.lanes={processes} or a multiple"
        )
    for rank, batch in batches.items():
        if not batch.image_count:
            yield f"rank {rank} has no image in its first micro-batch: raise the rows of a rank, or data.group_rows"
