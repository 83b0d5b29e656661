"""Show that a run does not depend on how many ranks take its steps: ``python -m tests.chaos.elastic``.

Prints, for every way a run can be taken up by other ranks or kept in another way, how far its losses are from those of
the uninterrupted run, and whether every step saw the same rows, images and crops. Takes some minutes; exits 1 when a
line does not hold.
"""

import sys
import tempfile
from pathlib import Path
from typing import Any

from lcl_ds.data.demo.corpus import build_demo
from lcl_ds.objectives import NAMES
from tests.support.legs import corpus_settings, leg, run_legs

FP32, BF16, SAME = 1e-5, 2e-2, 0.0
"""Largest relative difference of a loss."""
OBJECTIVES = dict.fromkeys(NAMES, FP32) | {"blip2": 5e-2}
"""BLIP-2 matches texts with other images of their own rank, so what it learns from depends a little on the ranks."""
WHOLE = [(60, 2, "3")]
WAYS: dict[str, tuple[str, float, list[tuple[int, int, str]]]] = {
    "2 ranks to 20, 4 to 40, 1 to 60": ("fp32", FP32, [(20, 2, "3"), (40, 4, "3"), (60, 1, "3")]),
    "2, 3, 1, 4, 2 ranks": (
        "fp32",
        FP32,
        [(12, 2, "3"), (24, 3, "3"), (36, 1, "3"), (48, 4, "3"), (60, 2, "3")],
    ),
    "stage 3 to 2 to 0 to 3": ("fp32", FP32, [(15, 2, "3"), (30, 2, "2"), (45, 2, "0"), (60, 2, "3")]),
    "stage 3 to 1 to 3 in bf16": ("bf16", BF16, [(20, 2, "3"), (40, 2, "1"), (60, 2, "3")]),
    "offload off, on, off": ("fp32", FP32, [(20, 2, "3"), (40, 2, "3 offload"), (60, 2, "3")]),
    "offload on at stage 2, off at 3": ("fp32", FP32, [(30, 2, "2 offload"), (60, 2, "3")]),
    "the same ranks, stopped twice": ("fp32", SAME, [(20, 2, "3"), (40, 2, "3"), (60, 2, "3")]),
    "the same ranks, stopped twice, in bf16": ("bf16", SAME, [(20, 2, "3"), (40, 2, "3"), (60, 2, "3")]),
    "2 ranks to 20, 4 to 40, 1 to 60 in bf16": ("bf16", BF16, [(20, 2, "3"), (40, 4, "3"), (60, 1, "3")]),
}
"""By description: precision, tolerance, and until which step on how many ranks with which ZeRO settings."""


def go(folder: Path, run: str, shared: list[str], ways: list[tuple[int, int, str]]) -> dict[str, Any]:
    """Take a run through all its legs; returns metrics of the whole and what every step saw."""
    overrides = [*shared, f"train.steps={ways[-1][0]}"]
    seen: dict[int, list[str]] = {}
    for stop, ranks, zero in ways:
        result = run_legs(folder, ranks, {run: leg(run, zero, overrides, stop)})[run]
        seen |= result["seen"]
    return {"metrics": result["metrics"], "seen": seen}


def compared(name: str, one: dict[str, Any], other: dict[str, Any], tolerance: float) -> bool:
    """Print how two runs differ; returns whether they are equal as far as they have to be."""
    pairs = list(zip(one["metrics"], other["metrics"], strict=True))
    losses = [key for key in pairs[0][0] if key == "loss" or key.endswith("_loss")]
    worst = max(abs(a[key] - b[key]) / abs(b[key]) for a, b in pairs for key in losses)
    same = one["seen"] == other["seen"] and [*one["seen"]] == [a["step"] for a, _ in pairs]
    holds = same and worst <= tolerance
    rows = f"rows, images, crops {'the same' if same else 'DIFFER'}"
    print(f"{'ok' if holds else 'FAILS':6}{name:44}{len(pairs):3} steps  losses within {worst:.1e}  {rows}", flush=True)
    return holds


def main() -> int:
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        demo, runs = folder / "demo", folder / "work"
        runs.mkdir()
        build_demo(demo, documents=160, pairs=120, heldout_documents=8, shard_size=64)
        shared = corpus_settings(demo)
        whole = {p: go(runs, f"whole {p}", [*shared, f"precision={p}"], WHOLE) for p in ("fp32", "bf16")}
        good = True
        for name, (precision, tolerance, ways) in WAYS.items():
            run = go(runs, name, [*shared, f"precision={precision}"], ways)
            good &= compared(name, run, whole[precision], tolerance)
        for objective, tolerance in OBJECTIVES.items():
            overrides = [*shared, f"objective.name={objective}"]
            one = go(runs, f"{objective} whole", overrides, [(9, 2, "3")])
            other = go(runs, objective, overrides, [(3, 2, "3"), (6, 4, "2"), (9, 1, "0")])
            good &= compared(f"{objective}: 2, 4, 1 ranks, stage 3, 2, 0", other, one, tolerance)
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
