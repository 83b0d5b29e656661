"""Two real ranks under DeepSpeed compute what one process computes."""

import json
import socket

import pytest
import torch

from lcl_ds.assembly import attach_objective
from lcl_ds.metrics import read_metrics
from lcl_ds.models.initial import units
from lcl_ds.objectives.base import local_normalizers
from lcl_ds.training.checkpoint import checkpoint_of, checkpoints_folder, load_model, problem_of, resolve_checkpoint
from tests.support.rank_tasks.given import STAGES, THREE_STEPS, WAYS, batch_of_rank
from tests.support.ranks import all_on_ranks
from tests.support.small import OBJECTIVES, lcl_objective, merged, small_config, small_model, three_documents

pytestmark = pytest.mark.timeout(600)
TASKS = [
    "building",
    "gradients",
    "objectives",
    "three_steps",
    "non_finite",
    "memory",
    "told_problems",
    "reported_numbers",
    "saving",
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("zero")


@pytest.fixture(scope="module")
def results(folder):
    """What every task returned on each of two ranks, which are started once."""
    return all_on_ranks(2, TASKS, folder, timeout=590)


@pytest.fixture(scope="module")
def gradients(results):
    return results["gradients"]


@pytest.fixture(scope="module")
def reference():
    """Loss and gradients of one process that sees both ranks' rows."""
    results = {}
    for case in ("both", "first", "none"):
        objective = lcl_objective(small_model())
        batch = merged(batch_of_rank(case, 0), batch_of_rank(case, 1))
        losses = objective(batch, *local_normalizers(objective, batch))
        losses["loss"].backward()
        results[case] = losses["loss"].detach(), {n: w.grad for n, w in objective.named_parameters()}
    return results


@pytest.mark.parametrize("case", ["both", "first", "none"])
@pytest.mark.parametrize("way", WAYS)
def test_gradients_equal_one_process_also_where_ranks_have_no_images(gradients, reference, way, case):
    loss, expected = reference[case]
    for rank in gradients:
        actual = rank[f"{way} {case}"]
        torch.testing.assert_close(actual["loss"], loss, rtol=1e-5, atol=0)
        assert actual["gradients"].keys() == expected.keys()
        for name, gradient in expected.items():
            error = (actual["gradients"][name] - gradient).norm()
            # Shifting all keys changes no attention: those gradients are rounding noise around zero.
            assert error <= 1e-5 * gradient.norm() + 1e-8, name


def test_the_first_loss_is_the_same_at_every_stage(gradients):
    losses = [gradients[0][f"{stage} both"]["loss"].item() for stage in STAGES]
    assert losses == pytest.approx([losses[0]] * 4, rel=1e-5)


@pytest.fixture(scope="module")
def building(results):
    return results["building"]


@pytest.mark.parametrize("stage", STAGES)
def test_first_weights_do_not_depend_on_ranks_or_stages(building, stage):
    expected = lcl_objective(small_model()).state_dict()
    expected["model.decoder.layers.1.mlp.up_proj.weight"].fill_(0.5)
    for rank in building:
        weights = rank[str(stage)]["weights"]
        assert weights.keys() == expected.keys()
        assert all(torch.equal(weight, expected[name]) for name, weight in weights.items())


def test_no_rank_holds_more_than_its_share_and_one_unit_while_the_network_is_built(building):
    sizes = [sum(weight.numel() for weight in unit.module.parameters()) for unit in units(small_model())]
    for rank in building:
        assert rank["3"]["held"] == sizes


def test_the_first_rank_alone_reads_given_weights_and_all_hear_of_its_problem(building):
    for rank, results in enumerate(building):
        assert [results[str(stage)]["readers"] for stage in STAGES] == [[0] if rank == 0 else []] * 4
        (problem,) = results["refused"]
        assert "weights.safetensors" in problem
        assert "Input/output error" in problem


@pytest.fixture(scope="module")
def objectives(results):
    return results["objectives"]


@pytest.mark.parametrize("name", OBJECTIVES)
def test_every_objective_at_stage_3_computes_what_one_process_computes(objectives, name):
    config = small_config(*OBJECTIVES[name])
    objective = attach_objective(small_model(config), config)
    batch = merged(three_documents(config, seed=0), three_documents(config, seed=1))
    losses = objective(batch, *local_normalizers(objective, batch))
    losses["loss"].backward()
    for rank in objectives:
        actual = rank[name]
        if name == "blip2":  # a rank draws mismatched images among its own
            assert actual["loss"] == pytest.approx(losses["loss"].item(), rel=0.2)
            continue
        torch.testing.assert_close(actual["loss"], losses["loss"].detach(), rtol=1e-5, atol=0)
        for n, gradient in actual["gradients"].items():
            expected = objective.get_parameter(n).grad
            assert (gradient - expected).norm() <= 1e-5 * expected.norm() + 1e-7, n


@pytest.mark.parametrize("name", OBJECTIVES)
def test_every_weight_that_an_objective_trains_moves_and_no_other(objectives, name):
    config = small_config(*OBJECTIVES[name])
    objective = attach_objective(small_model(config), config)
    before, after = objectives[0][name]["before"], objectives[0][name]["after"]
    for n, weight in objective.named_parameters():
        assert torch.equal(before[n], after[n]) != weight.requires_grad, n


@pytest.fixture(scope="module")
def three_steps(results):
    return results["three_steps"]


@pytest.mark.parametrize("setting", [f"{stage}{precision}" for stage, precision in THREE_STEPS])
def test_every_weight_moves_within_three_steps(three_steps, setting):
    for rank in three_steps:
        before, after = rank[setting]["before"], rank[setting]["after"]
        still = [name for name in before if torch.equal(before[name], after[name])]
        # In bf16 the weight of the temperature moves by less than one unit; what it loses is kept (see test_stages).
        assert still == (["model.logit_scale.log_scale"] if "bf16" in setting and still else [])


@pytest.mark.parametrize("setting", [f"{stage}{precision}" for stage, precision in THREE_STEPS])
def test_a_checkpoint_of_any_stage_loads_without_deepspeed(three_steps, folder, setting):
    model = load_model(resolve_checkpoint(folder / "three_steps" / setting))
    for name, weight in three_steps[0][setting]["after"].items():
        assert torch.equal(model.state_dict()[name.removeprefix("model.")].to(weight.dtype), weight), name


def test_a_non_finite_rank_makes_all_ranks_skip_names_documents_and_stops_in_the_end(results, folder):
    first, second = results["non_finite"]
    assert first == second
    for name, result in first.items():
        assert result["finite"], name
        assert result["applied_steps"] == 2, name
        assert result["stopped"].startswith("step 6: 3 steps in a row"), name
        metrics = read_metrics(folder / "non_finite" / name)
        assert [m["applied"] for m in metrics] == [True, False, True, False, False, False], name
        assert metrics[1]["lr"] == metrics[2]["lr"], name
        skipped = [
            json.loads(line) for line in (folder / "non_finite" / name / "skipped_steps.jsonl").read_text().splitlines()
        ]
        assert [s["step"] for s in skipped] == [2, 4, 5, 6], name
        assert skipped[0]["documents"] == [f"test/{100 + 10 * rank + i}" for rank in (0, 1) for i in range(4)], name


def test_stage_3_gathers_a_block_at_once(results):
    for rank in results["non_finite"]:
        assert {name for name, result in rank.items() if result["gathers blocks"]} == {"3fp32", "3bf16"}


def test_a_released_trainer_leaves_nothing_in_memory(results):
    for rank in results["memory"]:
        assert rank == {f"{stage}{precision}": [] for stage, precision in THREE_STEPS}


def test_every_rank_hears_of_the_same_problems_and_who_has_them(results):
    alone = f"rank 1 on {socket.gethostname()}: only rank 1 sees this"
    for told in results["told_problems"]:
        assert told == {"all": ["the same"], "one": [alone], "both": ["the same", alone], "none": []}


def test_what_an_objective_reports_is_combined_as_it_says_by_one_all_reduce_a_step(results):
    first = results["reported_numbers"][0]
    for row in first["rows"]:
        assert [*row][:7] == [
            *("step", "loss", "contrastive_loss", "generation_loss", "predicted", "logit_scale", "rank_factor"),
        ]
        assert row["predicted"] == row["text_tokens"]
        assert row["rank_factor"] == 22  # two micro-steps of 1 and of 10
        assert row["logit_scale"] == pytest.approx(1 / 0.07, rel=0.01)
    # Single numbers are DeepSpeed's norms. Ours are 5 outputs, 7 counts, 2 of each of 2 sources, 2 of grids, 2 of a
    # save; and of each rank its problems, how long it was busy, and 2 counts of 2 micro-steps of the next step, if
    # there is one.
    assert [size for size in first["reduced"] if size > 1] == [12, 20 + 12, 20 + 4]


def test_training_goes_on_while_a_checkpoint_of_an_earlier_moment_is_written(results, folder):
    first = results["saving"][0]
    assert first["published"][3] == []
    assert "step_00000002" in first["published"][5]
    for step in (2, 4, 5):
        model = load_model(checkpoint_of(folder / "saving" / "slow", step))
        for name, weight in first["weights"][step].items():
            assert torch.equal(model.state_dict()[name.removeprefix("model.")], weight), (step, name)


def test_a_disk_that_one_rank_finds_full_ends_all_ranks_and_costs_no_earlier_checkpoint(results, folder):
    for rank in results["saving"]:
        (problem,) = rank["told"]
        assert problem.startswith(f"rank 1 on {socket.gethostname()}: checkpoint step_00000002 could not be written: ")
        assert "ulimit -f" in problem
    run_dir = folder / "saving" / "full"
    assert sorted(path.name for path in checkpoints_folder(run_dir).iterdir()) == ["latest", "step_00000000"]
    assert problem_of(checkpoint_of(run_dir, 0)) is None
