"""What is shown while a run goes on, and the arithmetic behind ``mfu``."""

import pytest
import torch

from lcl_ds.training.loop import step_seed
from lcl_ds.training.monitor import time_left
from lcl_ds.training.optimizer import freeze_parts
from lcl_ds.training.throughput import flops_per_token
from tests.support.small import small_config, small_model


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [
        (0, "0:00"),
        (724.9, "12:04"),
        (3600, "1:00:00"),
        (48_000, "13:20:00"),
        (86_400, "1d 00:00:00"),
        (480_000, "5d 13:20:00"),
        (float("inf"), "?"),
        (float("nan"), "?"),
    ],
)
def test_a_duration_says_its_days(seconds, shown):
    assert time_left(seconds) == shown


def model_with(*factors):
    config = small_config(*factors)
    model = small_model(config)
    freeze_parts(model, config.train)
    return model


def size(module):
    return sum(weight.numel() for weight in module.parameters())


def test_a_trained_weight_costs_six_a_token():
    model = model_with()
    table = size(model.decoder.get_input_embeddings())
    assert flops_per_token(model) == {
        "vision": 6 * (size(model.vision) + size(model.pooling)),
        "decoder": 6 * (size(model.decoder) - table),
        "head": 6 * size(model.lm_head),
    }


@pytest.mark.parametrize(
    ("frozen", "per_weight"),
    [
        ("vision", {"vision": 2, "pooling": 6, "decoder": 6, "lm_head": 6}),
        ("decoder", {"vision": 6, "pooling": 6, "decoder": 4, "lm_head": 6}),
        ("pooling", {"vision": 6, "pooling": 4, "decoder": 6, "lm_head": 6}),
        ("vision: 0, pooling: 0, decoder", {"vision": 2, "pooling": 2, "decoder": 2, "lm_head": 6}),
        ("vision: 0, pooling: 0, heads", {"vision": 2, "pooling": 2, "decoder": 6, "lm_head": 4}),
    ],
)
def test_a_frozen_weight_costs_its_forward_pass_and_what_passes_through_it(frozen, per_weight):
    model = model_with(f"train.learning_rate_factors={{{frozen}: 0}}")
    flops = flops_per_token(model)
    assert flops["vision"] == sum(per_weight[name] * size(getattr(model, name)) for name in ("vision", "pooling"))
    table = size(model.decoder.get_input_embeddings())
    assert flops["decoder"] == per_weight["decoder"] * (size(model.decoder) - table)
    assert flops["head"] == per_weight["lm_head"] * size(model.lm_head)


def test_weights_that_are_partitioned_count_whole():
    model = model_with()
    whole = flops_per_token(model)
    for weight in model.parameters():  # as DeepSpeed leaves them at stage 3
        weight.ds_numel = weight.numel()
        weight.data = torch.empty(0)
    assert flops_per_token(model) == whole


def test_every_rank_step_and_seed_draws_its_own():
    keys = [(seed, rank, step) for seed in range(4) for rank in range(4) for step in range(20)]
    assert len({step_seed(*key) for key in keys}) == len(keys)
    assert all(0 <= step_seed(*key) < 2**63 for key in keys)
    assert step_seed(1, 2, 3) == step_seed(1, 2, 3)
