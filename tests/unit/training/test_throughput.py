"""The arithmetic behind ``mfu``."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from lcl_ds.objectives.base import local_normalizers
from lcl_ds.training.optimizer import freeze_parts
from lcl_ds.training.throughput import flops_per_token, gpu_memory_gb, peak_flops, step_flops
from tests.support.small import (
    IMAGE_TOKENS,
    VISION_TOWERS,
    batch_with_images,
    lcl_objective,
    small_config,
    small_model,
)


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


@pytest.mark.parametrize("frozen", [None, "vision", "decoder"])
def test_the_figure_is_what_torch_counts(frozen):
    """Within a tenth: the patches' own gradient and all but one of the pooling's queries are counted too much."""
    factors = "{}" if frozen is None else f"{{{frozen}: 0}}"
    tower = VISION_TOWERS["siglip_vision_model"]  # a class token would be computed and not counted
    config = small_config(f"train.learning_rate_factors={factors}", f"model.vision={tower}")
    model, batch = small_model(config), batch_with_images()
    freeze_parts(model, config.train)
    objective = lcl_objective(model)
    with FlopCounterMode(display=False) as counter:
        objective(batch, *local_normalizers(objective, batch))["loss"].backward()
    patches = batch.image_count * IMAGE_TOKENS
    ours = step_flops(flops_per_token(model), patches, batch.input_ids.numel(), len(batch.labels))
    assert 1.0 <= ours / counter.get_total_flops() <= 1.1


def test_a_cpu_has_neither_a_peak_nor_memory_of_its_own():
    assert peak_flops(torch.device("cpu")) is None
    assert gpu_memory_gb(torch.device("cpu")) is None
