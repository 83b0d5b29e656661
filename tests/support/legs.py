"""Runs that go a few steps on so many ranks, then on others."""

import json
from pathlib import Path
from typing import Any

from tests.support.ranks import on_ranks

ON_CPU = {"device": "cpu"}
ZERO = {
    "0": {"stage": 0},
    "1": {"stage": 1},
    "2": {"stage": 2},
    "3": {"stage": 3},
    "3 gathered": {"stage": 3, "stage3_param_persistence_threshold": 100_000},
    "3 small groups": {"stage": 3, "sub_group_size": 3000},
    "2 offload": {"stage": 2, "offload_optimizer": ON_CPU},
    "3 offload": {"stage": 3, "offload_optimizer": ON_CPU, "offload_param": ON_CPU},
}
"""Ways to keep weights and moments."""


def corpus_settings(demo: Path) -> list[str]:
    """Overrides of a small run on documents and pairs."""
    return [
        f"data.shards=[{{name: documents, paths: {demo}/train-documents-*.tar}}, "
        f"{{name: pairs, paths: {demo}/train-pairs-*.tar}}]",
        f"data.tokenizer={demo}/tokenizer",
        *("data.row_tokens=96", "data.row_images=4", "data.lanes=4", "data.pack_window=16", "evaluation.shards=null"),
        *("train.global_batch_rows=12", "train.warmup_steps=4", "train.weight_decay=0.1", "train.learning_rate=1e-3"),
    ]


def leg(run: str, zero: str, overrides: list[str], stop: int | None = None) -> dict[str, Any]:
    """Describe one leg of a run: which run, how its state is kept, its settings, and the step to stop after."""
    return {"run": run, "zero": ZERO[zero], "overrides": overrides, "stop": stop}


def run_legs(folder: Path, ranks: int, legs: dict[str, dict[str, Any]], timeout: float = 300) -> dict[str, Any]:
    """Go legs on so many ranks, one after the other; returns by leg what the first rank saw.

    Runs go on where earlier legs in the same ``folder`` left them, whatever number of ranks those had.
    """
    (folder / "runs").mkdir(exist_ok=True)
    here = folder / f"start {len(list(folder.iterdir()))}"
    here.mkdir()
    (here / "legs.json").write_text(json.dumps(legs))
    (here / "runs").symlink_to(folder / "runs", target_is_directory=True)
    return on_ranks(ranks, "legs", here, timeout)[0]
