"""A run goes on with any number of ranks, at any ZeRO stage, with or without offload, in either precision."""

import math
from typing import Any

import pytest

from tests.support.legs import corpus_settings, leg, run_legs

pytestmark = pytest.mark.timeout(900)

WAYS = {
    2: ["3", "2", "0", "3 offload"],
    4: ["1", "3 small groups"],
    1: ["3", "2 offload", "3 gathered"],
    3: ["3", "1"],
}
"""What a run goes through, two steps at each: ZeRO settings by number of ranks."""
LEGS = [(ranks, zero) for ranks, ways in WAYS.items() for zero in ways]
STEPS = 2 * len(LEGS)


@pytest.fixture(scope="module")
def results(tmp_path_factory, demo_folder) -> dict[str, Any]:
    """An uninterrupted run of each precision on two ranks at stage 3, and runs that go every way of ``WAYS``."""
    folder = tmp_path_factory.mktemp("elastic")
    shared = [*corpus_settings(demo_folder), f"train.steps={STEPS}"]
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
