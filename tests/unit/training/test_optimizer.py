"""Weight-decay groups, the bounded temperature, the guard of stage 0."""

import itertools
import math

import pytest
import torch

from lcl_ds.models.settings import part_of
from lcl_ds.training.optimizer import BoundedAdamW, freeze_parts, parameter_groups
from lcl_ds.training.schedule import learning_rate
from tests.support.small import DECODERS, small_config, small_model

BOUNDS = (0.0, math.log(100))


@pytest.mark.parametrize("family", DECODERS)
def test_every_weight_is_in_one_group_and_only_matrices_decay(family):
    config = small_config(decoder=family)
    model = small_model(config)
    groups = {group["name"]: group for group in parameter_groups(model, config.train, BOUNDS)}
    named = dict(model.named_parameters())
    assert sorted(n for group in groups.values() for n in group["param_names"]) == sorted(named)
    assert all(named[name].ndim >= 2 for name in groups["decay"]["param_names"])
    undecayed = [name for name in groups["no_decay"]["param_names"] if named[name].ndim >= 2]
    expected = ["vision.model.embeddings.position_embedding.weight", "pooling.query"]
    assert sorted(undecayed) == sorted(expected + (["decoder.wpe.weight"] if family == "gpt2" else []))
    assert "vision.model.embeddings.class_embedding" in groups["no_decay"]["param_names"]
    assert groups["logit_scale"]["param_names"] == ["logit_scale.log_scale"]
    assert [groups[name]["weight_decay"] for name in ("decay", "no_decay", "logit_scale")] == [0.1, 0.0, 0.0]


def test_parts_have_learning_rates_of_their_own_or_none():
    config = small_config("train.learning_rate_factors={vision: 0, heads: 0.5}")
    model = small_model(config)
    freeze_parts(model, config.train)
    groups = {group["name"]: group for group in parameter_groups(model, config.train, BOUNDS)}
    assert set(groups) == {"decay", "no_decay", "decay x0.5", "no_decay x0.5", "logit_scale x0.5"}
    assert {part_of(name) for name in groups["decay"]["param_names"]} == {"pooling", "decoder"}
    assert "lm_head.weight" in groups["decay x0.5"]["param_names"]
    assert groups["decay x0.5"]["learning_rate_factor"] == 0.5
    assert groups["logit_scale x0.5"]["bounds"] == BOUNDS
    for name, weight in model.named_parameters():
        assert weight.requires_grad == (part_of(name) != "vision")


def test_grouping_changes_no_weight_and_leaves_frozen_ones_out():
    config = small_config("train.learning_rate_factors={vision: 0}")
    model = small_model(config)
    everything = parameter_groups(model, config.train, BOUNDS)
    assert all(weight.requires_grad for weight in model.parameters())
    assert sum(len(group["params"]) for group in everything) == len(list(model.parameters()))
    model.lm_head.requires_grad_(False)
    grouped = {name for group in parameter_groups(model, config.train, BOUNDS) for name in group["param_names"]}
    assert grouped == {name for name, _ in model.named_parameters() if not name.startswith("lm_head.")}


@pytest.mark.parametrize(("gradient", "bound"), [(-1e3, BOUNDS[1]), (1e3, BOUNDS[0])])
def test_the_temperature_stays_within_its_bounds(gradient, bound):
    config = small_config("train.learning_rate=10")
    scale = torch.nn.Parameter(torch.tensor([2.0]))
    group = {"params": [scale], "weight_decay": 0.0, "bounds": BOUNDS}
    optimizer = BoundedAdamW([group], config.train)
    scale.grad = torch.tensor([gradient])
    optimizer.step()
    assert scale.item() == pytest.approx(bound)


def test_a_step_with_non_finite_gradients_changes_nothing():
    config = small_config()
    weight = torch.nn.Parameter(torch.ones(3))
    optimizer = BoundedAdamW([{"params": [weight], "bounds": None}], config.train, max_norm=1.0)
    weight.grad = torch.tensor([1.0, float("nan"), 0.0])
    optimizer.step()
    assert optimizer.overflow
    assert torch.equal(weight, torch.ones(3))
    assert not optimizer.state


def test_the_schedule_warms_up_and_ends_at_its_minimum():
    train = small_config("train.steps=100", "train.warmup_steps=10", "train.min_learning_rate=1e-5").train
    rates = [learning_rate(step, train) for step in range(101)]
    assert rates[0] == pytest.approx(train.learning_rate / 10)
    assert max(rates) == rates[9] == rates[10] == train.learning_rate
    assert all(a > b for a, b in itertools.pairwise(rates[10:]))
    assert rates[100] == pytest.approx(1e-5)
