"""Steps that are a spike, on two real ranks: left out without a trace, or taken back with their rows passed over."""

import json

import pytest

from lcl_ds.metrics import read_metrics
from tests.support.rank_tasks.spikes import SPIKE_CASES, SPIKE_STEP
from tests.support.ranks import all_on_ranks
from tests.support.runs import without_timing

pytestmark = pytest.mark.timeout(400)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("odd")


@pytest.fixture(scope="module")
def results(folder, demo_folder):
    """What both tasks returned on each of two ranks, which are started once."""
    overrides = [
        f"data.shards={demo_folder}/train-*-*.tar",
        f"data.tokenizer={demo_folder}/tokenizer",
        *("data.row_tokens=96", "data.row_images=4", "data.lanes=4", "data.pack_window=16", "evaluation.shards=null"),
        *("train.global_batch_rows=8", "train.accumulation_steps=2", "train.warmup_steps=0", "precision=bf16"),
        *("checkpoint.every=4", "checkpoint.keep=3"),
    ]
    (folder / "rollback.json").write_text(json.dumps(overrides))
    return all_on_ranks(2, ["skipped_spikes", "rolled_back"], folder, timeout=390)


@pytest.mark.parametrize("case", SPIKE_CASES)
def test_a_spike_that_is_skipped_leaves_weights_moments_and_counters_as_they_were(results, folder, case):
    for rank in results["skipped_spikes"]:
        assert rank[case]["changed"] == [step != SPIKE_STEP for step in range(2, SPIKE_STEP + 2)]
        assert rank[case]["applied_steps"] == SPIKE_STEP
    rows = read_metrics(folder / "skipped_spikes" / case)
    assert [row["applied"] for row in rows] == [True] * (SPIKE_STEP - 1) + [False, True]
    (record,) = records(folder / "skipped_spikes" / case)
    assert (record["step"], record["applied"], record["rolled_back_to"]) == (SPIKE_STEP, False, None)
    assert record["reason"].startswith("gradient norm")
    assert record["grad_norm"] == rows[SPIKE_STEP - 1]["grad_norm"] > 100 * rows[SPIKE_STEP - 2]["grad_norm"]
    keys = [f"test/{100 * micro + 10 * rank + i}" for rank in (0, 1) for micro in (10, 11) for i in range(4)]
    assert record["documents"] == keys


@pytest.mark.parametrize("case", SPIKE_CASES)
def test_features_that_are_all_the_same_and_weights_without_gradients_are_named_once(results, case):
    first, second = (rank[case]["said"] for rank in results["skipped_spikes"])
    assert second == []
    about_features, about_weights = first
    assert about_features.startswith("step 4: image features are all the same")
    assert "9 of " in about_weights
    assert "model.pooling.query, model.pooling.norm_q.weight" in about_weights
    assert about_weights.count("model.") == 5
    assert "and 4 more" in about_weights


@pytest.fixture(scope="module")
def documents(results):
    """Documents of each step on each rank, by run."""
    first = results["rolled_back"][0]
    size = first["accumulation"]
    runs = {}
    for name in ("plain", "rollback", "killed"):
        ranks = [rank[name] for rank in results["rolled_back"]]
        steps = range(0, len(ranks[0]), size)
        runs[name] = [[key for rank in ranks for batch in rank[at : at + size] for key in batch] for at in steps]
    return runs


def test_a_spike_is_taken_back_and_its_rows_are_passed_over(results, documents, folder):
    plain = documents["plain"]
    assert documents["rollback"] == [*plain[:7], *plain[4:6], *plain[7:11]]
    rows = read_metrics(folder / "rolled_back" / "rollback")
    assert [row["step"] for row in rows] == list(range(1, 11))
    assert all(row["applied"] and row["loss"] < 20 for row in rows)
    assert {row["slowest_rank"] for row in rows} <= {0, 1}
    assert all(row["slowest_rank_s"] >= row["median_rank_s"] > 0 for row in rows)
    (record,) = records(folder / "rolled_back" / "rollback")
    assert (record["step"], record["rolled_back_to"], record["rows"]) == (7, 4, [48, 56])
    assert record["documents"] == plain[6]
    assert results["rolled_back"][0]["spike"] in plain[6]


def test_a_run_that_was_killed_while_it_went_back_continues_as_one_that_was_not(documents, folder):
    assert documents["killed"] == documents["rollback"][7:]
    runs = [without_timing(read_metrics(folder / "rolled_back" / name)) for name in ("rollback", "killed")]
    assert runs[0] == runs[1]


def records(run_dir):
    return [json.loads(line) for line in (run_dir / "skipped_steps.jsonl").read_text().splitlines()]
