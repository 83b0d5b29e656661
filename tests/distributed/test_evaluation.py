"""Evaluations during training: the same on any number of ranks, and nothing that trains hears of them."""

from typing import Any

import pytest

from lcl_ds.evaluation.settings import EvaluationSettings
from tests.support.legs import corpus_settings, leg, run_legs
from tests.support.runs import without_timing

pytestmark = pytest.mark.timeout(600)
LOSSES = ["contrastive_loss", "generation_loss"]
TASKS = "evaluation.tasks=[linear,attentive,knn,retrieval]"


@pytest.fixture(scope="module")
def results(tmp_path_factory, demo_folder) -> dict[str, Any]:
    """Four steps with and without evaluations on two ranks, with a stop in between, and on one rank."""
    folder = tmp_path_factory.mktemp("evaluation")
    plain = [*corpus_settings(demo_folder), "train.steps=4", "checkpoint.every=2"]
    held_out = f"evaluation.shards={demo_folder}/heldout-documents-*.tar"
    evaluated = [
        *(*plain, held_out, TASKS, "evaluation.every=2", "evaluation.documents_in_training=20"),
        *("evaluation.probe_labels=[colour]", "checkpoint.keep=1", "checkpoint.keep_best=generation_loss"),
    ]
    legs = {
        "plain": leg("plain", "3", plain),
        "evaluated": leg("evaluated", "3", evaluated),
        "stopped": leg("stopped", "3", evaluated, 2),
        "continued": leg("stopped", "3", evaluated),
    }
    results = run_legs(folder, 2, legs) | run_legs(folder, 1, {"alone": leg("alone", "1", evaluated)})
    return {name: without_timing(of_leg["metrics"]) for name, of_leg in results.items()}


def without_evaluation(rows):
    return [{key: value for key, value in row.items() if key != "evaluation"} for row in rows]


def test_training_takes_the_same_steps_bit_for_bit_as_without_evaluations(results):
    assert without_evaluation(results["evaluated"]) == results["plain"]
    assert [row["step"] for row in results["evaluated"] if "evaluation" in row] == [2, 4]


def test_a_continued_run_evaluates_as_an_uninterrupted_one(results):
    assert results["continued"] == results["evaluated"]


def test_every_figure_that_the_settings_name_is_there(results):
    settings = EvaluationSettings(tasks=["linear", "attentive", "knn", "retrieval"], probe_labels=["colour"])
    for row in results["evaluated"]:
        if "evaluation" in row:
            assert sorted(row["evaluation"]) == sorted([*LOSSES, *settings.names(has_pairs=True)])


def test_figures_do_not_depend_on_the_number_of_ranks(results):
    for one, two in zip(results["alone"], results["evaluated"], strict=True):
        assert one.get("evaluation", {}) == pytest.approx(two.get("evaluation", {}), rel=1e-4)
