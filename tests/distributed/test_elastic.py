"""A run goes on with any number of ranks, at any ZeRO stage, with or without offload, in either precision."""

import json
import math
from pathlib import Path
from typing import Any

import pytest

from tests.support.ranks import on_ranks

pytestmark = pytest.mark.timeout(900)

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
WAYS = {
    2: ["3", "2", "0", "3 offload"],
    4: ["1", "3 small groups", "0", "2"],
    1: ["3", "2 offload", "3 gathered"],
    3: ["3", "1"],
}
"""What a run goes through, two steps at each: ZeRO settings by number of ranks."""
LEGS = [(ranks, zero) for ranks, ways in WAYS.items() for zero in ways]
STEPS = 2 * len(LEGS)


def run_legs(folder: Path, ranks: int, legs: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Run legs on so many ranks; returns what the first saw of each."""
    here = folder / f"{ranks} ranks"
    here.mkdir()
    (here / "legs.json").write_text(json.dumps(legs))
    (here / "runs").symlink_to(folder / "runs", target_is_directory=True)
    return on_ranks(ranks, "legs", here, timeout=300)[0]


@pytest.fixture(scope="module")
def shared(demo_folder) -> list[str]:
    return [
        f"data.shards=[{{name: documents, paths: {demo_folder}/train-documents-*.tar}}, "
        f"{{name: pairs, paths: {demo_folder}/train-pairs-*.tar}}]",
        f"data.tokenizer={demo_folder}/tokenizer",
        *("data.row_tokens=96", "data.row_images=4", "data.lanes=4", "data.pack_window=16", "evaluation.shards=null"),
        *("train.global_batch_rows=12", "train.warmup_steps=4", "train.weight_decay=0.1"),
        *(f"train.steps={STEPS}", "train.learning_rate=1e-3"),
    ]


def leg(run: str, zero: str, overrides: list[str], stop: int | None = None) -> dict[str, Any]:
    return {"run": run, "zero": ZERO[zero], "overrides": overrides, "stop": stop}


@pytest.fixture(scope="module")
def results(tmp_path_factory, shared) -> dict[str, Any]:
    """An uninterrupted run of each precision on two ranks at stage 3, and runs that go every way of ``WAYS``."""
    folder = tmp_path_factory.mktemp("elastic")
    (folder / "runs").mkdir()
    precisions = {precision: [*shared, f"precision={precision}"] for precision in ("fp32", "bf16")}
    legs = {f"whole {name}": leg(f"whole {name}", "3", overrides) for name, overrides in precisions.items()}
    results: dict[str, Any] = {}
    number = 0
    for ranks, ways in WAYS.items():
        for zero in ways:
            number += 1
            legs |= {
                f"{name} {number}": leg(name, zero, overrides, 2 * number) for name, overrides in precisions.items()
            }
        results |= run_legs(folder, ranks, legs)
        legs = {}
    return results


def seen(results: dict[str, Any], name: str) -> dict[int, list[str]]:
    return {step: rows for n in range(len(LEGS)) for step, rows in results[f"{name} {n + 1}"]["seen"].items()}


def test_every_step_sees_the_same_rows_and_images_as_in_the_uninterrupted_run(results):
    expected = results["whole fp32"]["seen"]
    assert [*expected] == [*range(1, STEPS + 1)]
    assert all(len(set(rows)) == 12 for rows in expected.values())
    assert seen(results, "fp32") == expected
    assert seen(results, "bf16") == expected


@pytest.mark.parametrize(("precision", "tolerance"), [("fp32", 1e-5), ("bf16", 2e-2)])
@pytest.mark.parametrize("key", ["loss", "contrastive_loss", "generation_loss", "lr", "tokens", "logit_scale"])
def test_its_figures_are_those_of_the_uninterrupted_run(results, precision, tolerance, key):
    whole, changing = (results[f"{name}"]["metrics"] for name in (f"whole {precision}", f"{precision} {len(LEGS)}"))
    assert [row["step"] for row in changing] == [row["step"] for row in whole]
    for one, other in zip(changing, whole, strict=True):
        assert math.isclose(one[key], other[key], rel_tol=tolerance), one["step"]
