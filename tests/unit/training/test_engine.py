"""What DeepSpeed is told, and what is refused before it starts."""

import json

import pytest
import torch

from lcl_ds.assembly import attach_objective
from lcl_ds.errors import UserError
from lcl_ds.objectives import NAMES
from lcl_ds.training.engine import check_saved_whole, complete_ds_config, load_ds_config, rows_per_micro_step
from tests.support.small import small_config, small_model

NVME = {"device": "nvme", "nvme_path": "/tmp"}


@pytest.fixture
def written(tmp_path):
    def written(values):
        path = tmp_path / "engine.json"
        path.write_text(values if isinstance(values, str) else json.dumps(values))
        return path

    return written


@pytest.mark.parametrize(
    ("values", "problems"),
    [
        ("{", ["cannot be read as JSON"]),
        ([1], ["a JSON object is expected"]),
        (
            {"bf16": {}, "optimizer": {}},
            ["bf16: belongs in the recipe, as precision", "optimizer: belongs"],
        ),
        ({"zero_optimisation": {}}, ["zero_optimisation: unknown key (did you mean 'zero_optimization'?)"]),
        ({"zero_optimization": {"stage": "auto"}}, ['zero_optimization.stage: "auto" has no meaning here']),
        ({"zero_optimization": 3}, ["zero_optimization: a JSON object is expected"]),
        ({"zero_optimization": {"stages": 3}}, ["zero_optimization.stages: unknown key (did you mean 'stage'?)"]),
        ({"zero_optimization": {"stage": 4}}, ["zero_optimization.stage: Input should be"]),
        (
            {"zero_optimization": {"stage": 2, "round_robin_gradients": True}},
            ["zero_optimization.round_robin_gradients: DeepSpeed then mistakes one weight for another"],
        ),
        (
            {"zero_optimization": {"stage": 3, "offload_optimizer": NVME, "offload_param": NVME}},
            [f"zero_optimization.{name}.device: a checkpoint" for name in ("offload_optimizer", "offload_param")],
        ),
        (
            {"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "cpu", "ratio": 0.5}}},
            ["zero_optimization.offload_optimizer: ratio and super_offload need DeepSpeed's own optimizer"],
        ),
        (
            {"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "cpu", "super_offload": True}}},
            ["zero_optimization.offload_optimizer: ratio and super_offload need DeepSpeed's own optimizer"],
        ),
        (
            {"zero_optimization": {"stage": 3, "zero_quantized_nontrainable_weights": True}},
            ["zero_optimization.zero_quantized_nontrainable_weights: a checkpoint would lack"],
        ),
        (
            {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}, "zenflow": {}}},
            ["zero_optimization.zenflow: it replaces the optimizer"],
        ),
        ({"zero_optimization": {"stage": 3, "mics_shard_size": 2}}, ["zero_optimization.mics_shard_size: unknown key"]),
        ({"checkpoint": {"load_universal": True}}, ["checkpoint: belongs in the recipe, as checkpoint.every"]),
    ],
    ids=str,
)
def test_a_mistake_in_the_engine_settings_is_named(written, values, problems):
    path = written(values)
    with pytest.raises(UserError) as error:
        load_ds_config(path)
    assert len(error.value.problems) == len(problems)
    assert all(
        actual.startswith(f"{path}: {start}") for actual, start in zip(error.value.problems, problems, strict=True)
    )


def test_good_engine_settings_are_taken_as_they_are(written):
    values = {"zero_optimization": {"stage": 2}, "wall_clock_breakdown": True}
    assert load_ds_config(written(values)) == values


def test_the_recipe_decides_about_batches_precision_and_clipping():
    config = small_config("train.global_batch_rows=24", "train.accumulation_steps=3", "train.gradient_clipping=0.5")
    complete = complete_ds_config({"zero_optimization": {"stage": 3}, "dump_state": False}, config, world_size=2)
    assert complete["zero_optimization"] == {"stage": 3}
    assert complete["dump_state"] is False
    assert complete["train_batch_size"] == 24
    assert complete["train_micro_batch_size_per_gpu"] == 4
    assert complete["gradient_accumulation_steps"] == 3
    assert complete["gradient_clipping"] == 0.5
    assert complete["bf16"]["enabled"] is False


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"stage": 3}, {"stage": 3, "memory_efficient_linear": False}),
        ({"stage": 3, "memory_efficient_linear": True}, {"stage": 3, "memory_efficient_linear": True}),
        ({"stage": 2}, {"stage": 2}),
    ],
)
def test_compiled_blocks_are_of_linear_layers_that_share_a_graph(given, expected):
    config = small_config("train.compile=true")
    assert complete_ds_config({"zero_optimization": given}, config, world_size=1)["zero_optimization"] == expected


@pytest.mark.parametrize(("stage", "precision", "clipping"), [(0, "fp32", 0.0), (0, "bf16", 1.0), (1, "fp32", 1.0)])
def test_deepspeed_clips_wherever_it_can(stage, precision, clipping):
    config = small_config(f"precision={precision}", "train.gradient_clipping=1")
    complete = complete_ds_config({"zero_optimization": {"stage": stage}}, config, world_size=1)
    assert complete["gradient_clipping"] == clipping


def test_a_type_of_gradients_that_stage_0_does_not_have_is_refused():
    config = small_config("precision=bf16")
    for_fp32 = {"data_types": {"grad_accum_dtype": "fp32"}}
    with pytest.raises(UserError, match=r"grad_accum_dtype: at ZeRO stage 0 .* of the recipe, bf16; leave it out"):
        complete_ds_config(for_fp32, config, world_size=1)
    for settings in (
        {"data_types": {"grad_accum_dtype": "bf16"}},
        {"data_types": {}},
        {**for_fp32, "zero_optimization": {"stage": 1}},
    ):
        assert complete_ds_config(settings, config, world_size=1)["data_types"] == settings["data_types"]


def test_rows_that_do_not_divide_are_refused_by_their_numbers():
    config = small_config("train.global_batch_rows=12", "train.accumulation_steps=2")
    assert rows_per_micro_step(config, 3) == 2
    with pytest.raises(UserError, match=r"12 is not a multiple of train.accumulation_steps x ranks \(2 x 4\)"):
        rows_per_micro_step(config, 4)
    with pytest.raises(UserError, match="1, 2, 3, 6 ranks would do, or change these settings"):
        rows_per_micro_step(config, 4)
    in_groups = small_config("train.global_batch_rows=96", "data.group_rows=4")
    assert rows_per_micro_step(in_groups, 12) == 8
    with pytest.raises(UserError, match=r"ranks x data.group_rows \(1 x 16 x 4\); 6, 8, 12, 24 ranks would do"):
        rows_per_micro_step(in_groups, 16)


@pytest.mark.parametrize("name", NAMES)
def test_no_objective_learns_anything_that_a_checkpoint_does_not_hold(name):
    config = small_config(f"objective.name={name}")
    objective = attach_objective(small_model(config), config)
    check_saved_whole(objective)
    objective.register_buffer("average", torch.zeros(3))
    with pytest.raises(ValueError, match="average: checkpoints hold parameters alone"):
        check_saved_whole(objective)


def test_a_start_says_what_is_trained_and_what_is_frozen(saved_run):
    _, result = saved_run
    assert result["frozen"] == ["vision"]
    line = result["log"]
    assert "lcl, decoder passes per sample 1; world size 1, ZeRO stage 0, fp32 on cpu" in line
    assert "decay x0.1" in line
    assert ", frozen " in line
    assert torch.tensor(result["moved"]).all()
