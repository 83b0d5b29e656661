"""What is said in the first steps; weights and features of real ranks are in tests/distributed/test_odd_steps.py."""

import logging
import math

import pytest
import torch

from lcl_ds.objectives.base import LossNormalizer
from lcl_ds.training.first_steps import CHANCE_AT, CHANCE_STEPS, LEAST_SPREAD, FirstSteps, chance_loss, spread
from tests.support.runs import step_metrics
from tests.support.small import small_config

PAIRS = [30, 34]
WHOLE, PUBLISHED = (small_config(f"objective.normalization={name}").objective for name in ("global", "reference"))


def said(only_rank, caplog, loss_of_step, *overrides, done=0, pairs=PAIRS):
    """What is logged in the steps up to the one at which the contrastive loss is judged."""
    caplog.set_level(logging.WARNING, "lcl_ds")
    first_steps = FirstSteps(small_config("train.warmup_steps=10", *overrides), 20, only_rank)  # past the features
    normalizers = [{"pairs": LossNormalizer(torch.ones(()), torch.ones(()), pairs)}]
    for step in range(done + 1, CHANCE_AT + 11):
        losses = {"loss": 5.0, "contrastive_loss": loss_of_step(step)}
        first_steps.judge(step_metrics(step, losses=losses), normalizers, engine=None)
    return [record.getMessage() for record in caplog.records]


def test_a_contrastive_loss_that_stands_at_the_one_of_guessing_is_named(only_rank, caplog):
    (sentence,) = said(only_rank, caplog, lambda step: math.log(64) + 0.01 * math.sin(step))
    assert sentence.startswith(f"step {CHANCE_AT + 10}: contrastive_loss is 4.15")
    assert "gives 4.159" in sentence


def test_so_is_one_that_is_worse(only_rank, caplog):
    assert len(said(only_rank, caplog, lambda step: 9.0)) == 1


@pytest.mark.parametrize(
    ("overrides", "options", "loss"),
    [
        ([], {}, lambda step: math.log(64) * (0.95 if step > 100 else 1.0)),
        (["objective.contrastive_weight=0"], {}, lambda step: math.log(64)),
        ([], {"pairs": [1, 0]}, lambda step: 0.0),
        ([], {"done": CHANCE_AT + 11 - CHANCE_STEPS}, lambda step: math.log(64)),
    ],
    ids=["it began to fall", "it is not trained", "one pair has no other", "too few steps of this start"],
)
def test_nothing_is_said_where(only_rank, caplog, overrides, options, loss):
    assert said(only_rank, caplog, loss, *overrides, **options) == []


def test_guessing_is_averaged_as_the_loss_is():
    assert chance_loss([[8, 8]], WHOLE) == pytest.approx(math.log(16))
    of_all = (16 * math.log(16) + 4 * math.log(4)) / 20
    assert chance_loss([[8, 8], [4, 0]], WHOLE) == pytest.approx(of_all)
    of_ranks = (2 * math.log(16) + math.log(4)) / 4
    assert chance_loss([[8, 8], [4, 0]], PUBLISHED) == pytest.approx(of_ranks)
    assert chance_loss([[0, 0]], WHOLE) == 0


def test_guessing_under_the_sigmoid_answers_every_question_with_the_fraction_of_pairs():
    scores = torch.full((16, 16), math.log(1 / 15))  # the sigmoid of which is 1 / 16
    belongs = torch.eye(16)
    expected = torch.nn.functional.binary_cross_entropy_with_logits(scores, belongs, reduction="sum") / 16
    for settings in (small_config("objective.name=siglip"), small_config("objective.contrastive=sigmoid")):
        assert chance_loss([[8, 8]], settings.objective) == pytest.approx(expected.item(), rel=1e-6)
        assert chance_loss([[1, 0]], settings.objective) == 0


def test_equal_features_have_no_spread_in_any_dtype_and_different_ones_much():
    torch.manual_seed(0)
    one = torch.randn(1, 64)
    for dtype in (torch.float32, torch.bfloat16):
        assert spread(one.expand(8, -1).to(dtype)) < LEAST_SPREAD / 10
        noise = torch.randn(8, 64)
        assert spread((one + 1e-3 * noise).to(dtype)) < LEAST_SPREAD
        assert spread((one + 0.1 * noise).to(dtype)) > 2 * LEAST_SPREAD
    assert spread(torch.zeros(3, 4)) == 0
