"""One step after another: what is counted, summed and recorded."""

from typing import ClassVar

import pytest
import torch

from lcl_ds.errors import UserError
from lcl_ds.metrics import KEYS, SourceCounts, read_metrics
from lcl_ds.objectives import lcl
from lcl_ds.training.distributed import from_first, gather_objects, gather_to_first, on_all_ranks
from lcl_ds.training.exchange import Exchange
from lcl_ds.training.loop import is_saved, outputs_to_sum, step_seed, summed_by_source, summed_metrics
from tests.support.small import batch_with_images, batch_without_images, lcl_objective, small_config, small_model


def test_every_rank_step_and_seed_draws_its_own():
    keys = [(seed, rank, step) for seed in range(4) for rank in range(4) for step in range(20)]
    assert len({step_seed(*key) for key in keys}) == len(keys)
    assert all(0 <= step_seed(*key) < 2**63 for key in keys)
    assert step_seed(1, 2, 3) == step_seed(1, 2, 3)


def test_a_run_that_was_stopped_saves_at_the_steps_of_one_that_was_not():
    config = small_config("checkpoint.every=10", "train.steps=33")
    assert [step for step in range(1, 34) if is_saved(step, config)] == [10, 20, 30, 33]
    assert [step for step in range(14, 34) if is_saved(step, config)] == [20, 30, 33]  # stopped and saved at 13


def test_what_a_rank_counts_are_the_metrics_that_are_summed_over_ranks():
    with_images, without = batch_with_images(), batch_without_images()
    counts = summed_metrics([with_images, without])
    assert set(counts) | {"sources"} == {key for key, whose in KEYS.items() if whose == "all ranks"}
    assert counts["images"] == with_images.image_count
    assert counts["documents"] == with_images.document_count + without.document_count
    assert counts["tokens"] == with_images.token_count + without.token_count
    assert counts["text_tokens"] == len(with_images.labels) + len(without.labels)


def test_sources_are_counted_by_their_names_also_those_that_gave_nothing():
    batch = batch_with_images()
    object.__setattr__(batch, "sources", {"web": SourceCounts(3, 5), "books": SourceCounts(1, 0)})
    counted = summed_by_source([batch, batch], ["books", "web", "none"])
    assert {name: (counted["documents", name], counted["images", name]) for name in ("books", "web", "none")} == {
        "books": (2, 0),
        "web": (6, 10),
        "none": (0, 0),
    }


def test_named_values_come_back_under_their_names(only_rank):
    shares = torch.tensor([0.5, float("nan")], dtype=torch.float64)
    sums = {"loss": shares[0], "other_loss": shares[1]}
    numbers = {("images", "web"): 3, "stop": True}
    totals, rows = Exchange(only_rank, sums, numbers, [1, 2], {"logit_scale": torch.tensor([14.25])}).read()
    assert [*totals] == ["loss", "other_loss", ("images", "web"), "stop", "logit_scale"]
    assert totals["logit_scale"] == 14.25
    assert rows == [[1.0, 2.0]]
    assert (totals["loss"], totals["images", "web"], totals["stop"]) == (0.5, 3.0, 1.0)
    assert totals["other_loss"] != totals["other_loss"]
    assert Exchange(only_rank, row=[]).read() == ({}, [[]])
    assert gather_objects("a") == gather_to_first("a") == ["a"]
    assert from_first(lambda: "b", only_rank) == "b"


class Counting(lcl.Objective):
    """Reports numbers of its own."""

    reports: ClassVar = {"logit_scale": "same", "predicted": "sum", "steepness": "same"}


def test_losses_and_the_reports_that_are_sums_are_added_up():
    objective = Counting(small_model(), lcl.Settings())
    assert outputs_to_sum(objective) == ("loss", "contrastive_loss", "generation_loss", "predicted")
    assert outputs_to_sum(lcl_objective(objective.model)) == ("loss", "contrastive_loss", "generation_loss")


def test_every_step_of_a_run_is_recorded(saved_run):
    run_dir, _ = saved_run
    rows = read_metrics(run_dir)
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    for row in rows:
        assert row["loss"] == pytest.approx(row["generation_loss"] + 0.1 * row["contrastive_loss"], rel=1e-6)
        assert row["images_per_s"] == pytest.approx(row["images"] / row["step_s"])
        assert row["applied"] is True
        assert row["grad_norm"] > 0
        assert "mfu" not in row


def test_a_second_signal_can_say_at_which_step_a_continued_run_goes_on(saved_run):
    assert saved_run[1]["saved_step"] == 4


def test_an_error_of_a_rank_becomes_that_of_all_and_a_mistake_of_ours_crashes(only_rank):
    with pytest.raises(UserError, match="data.shards: no such file"), on_all_ranks(only_rank):
        raise UserError("data.shards: no such file")
    with pytest.raises(KeyError), on_all_ranks(only_rank):
        raise KeyError("ours")
