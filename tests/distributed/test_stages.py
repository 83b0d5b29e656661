"""Every ZeRO stage takes the same steps, in fp32 and in bf16.

``python -m tests.distributed.test_stages`` prints them.
"""

import json
import signal
import tempfile
from pathlib import Path

import pytest

from tests.support.rank_tasks.given import STAGES
from tests.support.rank_tasks.runs import CHANGES
from tests.support.ranks import all_on_ranks, on_ranks

BF16_LOSS, BF16_NORM = 4e-3, 5e-2
"""Relative: bf16 keeps 8 bits, so a loss of many terms is right to one part in 2^8 and a gradient's norm to a few."""


pytestmark = pytest.mark.timeout(600)


@pytest.fixture(scope="module")
def results(tmp_path_factory, demo_folder):
    """What the tasks of this file returned on the first of two ranks, which are started once."""
    folder = tmp_path_factory.mktemp("stages")
    shared = [
        f"data.shards={demo_folder}/train-*-*.tar",
        f"data.tokenizer={demo_folder}/tokenizer",
        *("data.row_tokens=96", "data.row_images=4", "data.lanes=4", "data.pack_window=16", "evaluation.shards=null"),
        *("train.steps=4", "train.global_batch_rows=4", "train.warmup_steps=0", "checkpoint.every=2"),
    ]
    (folder / "shared.json").write_text(json.dumps(shared))
    ranks = all_on_ranks(2, ["ten_steps", "changed_settings", "stopped_within_a_step"], folder, timeout=590)
    assert [of_rank["3"]["code"] for of_rank in ranks["stopped_within_a_step"]] == [signal.SIGINT] * 2
    return {name: of_ranks[0] for name, of_ranks in ranks.items()}


@pytest.fixture(scope="module")
def runs(results):
    return results["ten_steps"]


def column(run, key):
    return [step[key] for step in run["whole"]]


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("key", ["loss", "logit_scale", "grad_norm"])
def test_fp32_steps_are_those_of_stage_0(runs, stage, key):
    assert column(runs[f"{stage}fp32"], key) == pytest.approx(column(runs["0fp32"], key), rel=2e-5)


@pytest.mark.parametrize("stage", STAGES)
def test_bf16_steps_are_those_of_fp32_within_the_rounding_of_bf16(runs, stage):
    exact, rounded = runs["0fp32"], runs[f"{stage}bf16"]
    assert column(rounded, "loss") == pytest.approx(column(exact, "loss"), rel=BF16_LOSS)
    assert column(rounded, "grad_norm") == pytest.approx(column(exact, "grad_norm"), rel=BF16_NORM)


@pytest.mark.parametrize("stage", STAGES)
def test_the_temperature_of_a_bf16_run_is_not_rounded_to_bf16(runs, stage):
    exact, rounded = column(runs["0fp32"], "logit_scale"), column(runs[f"{stage}bf16"], "logit_scale")
    assert rounded[0] == pytest.approx(1 / 0.07, rel=1e-6)
    assert len(set(rounded)) == 10
    # A unit of bf16 is 1.6 % here; Adam moves the logarithm by at most the learning rate a step.
    assert rounded == pytest.approx(exact, rel=1e-3)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("stage", STAGES)
def test_a_continued_run_takes_the_same_steps_to_the_last_bit(runs, stage, precision):
    run = runs[f"{stage}{precision}"]
    assert run["again"] == run["whole"]


@pytest.mark.parametrize("name", CHANGES)
@pytest.mark.parametrize("stage", ["stage1", "stage3"])
def test_an_optimizer_setting_changed_at_a_restart_is_that_of_the_groups(results, stage, name):
    """It changes the losses after the restart, and only those, although the checkpoint brings the earlier one back."""
    whole = results["changed_settings"][stage]["whole"]
    losses, sentences = results["changed_settings"][stage][name]
    assert losses[:3] == whole[:3]
    assert losses[3] != whole[3]
    assert any(f"applied from now on: train.{name}" in sentence for sentence in sentences)


@pytest.mark.parametrize("stage", ["0", "2", "3"])
def test_a_step_in_which_a_rank_is_asked_to_stop_is_given_up_and_taken_again(results, stage):
    """Of four micro-steps of the third step two are done; what is saved is the end of the second step."""
    stopped = results["stopped_within_a_step"][stage]
    assert (stopped["passes"], stopped["checkpoint"]) == (10, "step_00000002")
    assert stopped["again"] == stopped["whole"]


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        runs = on_ranks(2, "ten_steps", Path(folder), timeout=400)[0]
    for key in ("loss", "logit_scale", "grad_norm"):
        print(f"{key:12}" + "".join(f"{name:>12}" for name in runs))
        for step in range(10):
            print(f"{step + 1:12}" + "".join(f"{run['whole'][step][key]:12.5f}" for run in runs.values()))


if __name__ == "__main__":
    main()
