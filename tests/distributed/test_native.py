"""Runs whose images keep their aspect ratio: on any ranks the same rows, losses and gradients."""

import math
from typing import Any

import pytest
import torch

from lcl_ds.objectives.base import local_normalizers
from tests.support.legs import corpus_settings, leg, run_legs
from tests.support.native import NATIVE, NATIVE_WAYS, native_batch, rows_of_rank
from tests.support.ranks import on_ranks
from tests.support.runs import without_timing
from tests.support.shapes import write_shapes
from tests.support.small import VISION_TOWERS, lcl_objective, small_config, small_model

pytestmark = pytest.mark.timeout(600)
STEPS = 6


@pytest.fixture(scope="module")
def gradients(tmp_path_factory):
    return on_ranks(2, "native_gradients", tmp_path_factory.mktemp("gradients"), timeout=300)


@pytest.mark.parametrize("case", ["shapes", "squares", "none"])
@pytest.mark.parametrize(("stage", "family"), NATIVE_WAYS)
def test_gradients_equal_one_process_whatever_shapes_a_rank_has(gradients, stage, family, case):
    name = f"{stage} {family} {case}"
    assert [rank[name]["shapes"] for rank in gradients] == [4, 4 if case == "shapes" else 1]
    objective = lcl_objective(small_model(small_config(f"model.vision={VISION_TOWERS[family]}", *NATIVE)))
    batch = native_batch(*rows_of_rank(case, 0), *rows_of_rank(case, 1))
    loss = objective(batch, *local_normalizers(objective, batch))["loss"]
    loss.backward()
    for rank in gradients:
        actual = rank[name]
        torch.testing.assert_close(actual["loss"], loss.detach(), rtol=1e-5, atol=0)
        for weight_name, weight in objective.named_parameters():
            error = (actual["gradients"][weight_name] - weight.grad).norm()
            assert error <= 1e-5 * weight.grad.norm() + 1e-8, weight_name


@pytest.fixture(scope="module")
def results(tmp_path_factory, demo_folder) -> dict[str, Any]:
    """A run of two ranks without a stop, one that goes on with other ranks, stages and loaders, and squares."""
    folder = tmp_path_factory.mktemp("native")
    write_shapes(folder / "shapes.tar")
    shared = [
        *corpus_settings(demo_folder),
        *(f"data.shards={folder}/shapes.tar", f"train.steps={STEPS}", "train.global_batch_rows=6"),
        *("model.vision.resolution=native", "model.vision.max_image_tokens=12", "model.vision.min_image_tokens=3"),
    ]
    squares = [*corpus_settings(demo_folder), f"train.steps={STEPS}"]
    legs = {
        "whole": leg("whole", "3", shared),
        "2": leg("changing", "3", shared, 2),
        "squares": leg("squares", "3", squares),
        "native squares": leg("native squares", "3", [*squares, "model.vision.resolution=native"]),
    }
    runs = tmp_path_factory.mktemp("runs")
    results = run_legs(runs, 2, legs)
    results |= run_legs(runs, 1, {"4": leg("changing", "0", [*shared, "data.workers=2"], 4)})
    return results | run_legs(runs, 3, {"6": leg("changing", "3", [*shared, "model.vision.attention=sdpa"])})


def test_every_step_sees_the_rows_and_images_of_the_uninterrupted_run(results):
    assert results["2"]["seen"] | results["4"]["seen"] | results["6"]["seen"] == results["whole"]["seen"]
    assert [*results["whole"]["seen"]] == [*range(1, STEPS + 1)]


@pytest.mark.parametrize("key", ["loss", "contrastive_loss", "generation_loss", "image_tokens", "tflop"])
def test_its_figures_are_those_of_the_uninterrupted_run(results, key):
    for one, other in zip(results["6"]["metrics"], results["whole"]["metrics"], strict=True):
        assert math.isclose(one[key], other[key], rel_tol=1e-5), one["step"]


def test_images_have_as_many_tokens_as_their_own_size_gives_within_the_bounds(results):
    images = [(row["images"], row["image_tokens"]) for row in results["whole"]["metrics"]]
    assert all(8 * count < tokens < 12 * count for count, tokens in images)


def test_a_run_whose_pictures_are_square_equals_a_run_of_squares_bit_for_bit(results):
    squares, native = (results[name] for name in ("squares", "native squares"))
    assert native["seen"] == squares["seen"]
    assert without_timing(native["metrics"]) == without_timing(squares["metrics"])
    assert len(squares["metrics"]) == STEPS
