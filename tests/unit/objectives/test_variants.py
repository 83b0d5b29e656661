"""Losses by other rules than the published ones, each against its definition in float64."""

import math

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from lcl_ds.assembly import attach_objective
from lcl_ds.data.documents import Document
from lcl_ds.errors import UserError
from lcl_ds.objectives import trained_losses
from lcl_ds.objectives.base import local_normalizers
from lcl_ds.objectives.lcl import LARGEST_FRACTION, matched_probability, unmatched_fraction
from tests.support.small import objective_batch, shake, small_config, small_model

DOCUMENTS = [
    Document("first", ("abc", 0, "d", 1), ("0.jpg", "1.jpg")),
    Document("second", ("efg", 0), ("0.jpg",)),
    Document("third", ("hi", 0, "jk", 1), ("0.jpg", "1.jpg")),
]
OF_DOCUMENT = torch.tensor([0, 0, 1, 2, 2])
SAME = OF_DOCUMENT[:, None] == OF_DOCUMENT


def prepared(*overrides, seed=0):
    """An objective whose weights are not its first ones, and a batch of five pairs of three documents."""
    config = small_config(*overrides)
    objective = attach_objective(small_model(config), config)
    shake(objective, seed=seed)
    return objective, objective_batch(config, *([document] for document in DOCUMENTS))


def outputs_of(objective, batch):
    return objective(batch, *local_normalizers(objective, batch))


def features_of(objective, batch):
    """Image and context features in float64, with gradients, and the multiplier."""
    image, context = objective.model.pair_features(*objective.model(batch), batch)
    return image.double(), context.double(), objective.model.logit_scale().double()


def check_gradient(objective, actual, expected):
    """A weight of the pooling gets the same gradient from both losses."""
    ours, theirs = (torch.autograd.grad(loss, objective.model.pooling.q.weight)[0] for loss in (actual, expected))
    assert theirs.any()
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("override", ["objective.name=siglip", "objective.contrastive=sigmoid"])
def test_the_sigmoid_loss_asks_of_every_image_and_text_whether_they_belong_together(override):
    objective, batch = prepared(override)
    outputs = outputs_of(objective, batch)
    image, context, scale = features_of(objective, batch)
    bias = objective.logit_bias().double()
    logits = scale * image @ context.T + bias
    expected = F.binary_cross_entropy_with_logits(logits, torch.eye(len(logits)).double(), reduction="sum")
    expected = expected / len(logits)
    torch.testing.assert_close(outputs["contrastive_loss"].double(), expected, rtol=1e-5, atol=1e-6)
    assert outputs["logit_bias"].item() == bias.item() != -10
    check_gradient(objective, outputs["contrastive_loss"], expected)


def softmax_over(logits, left_out, positives):
    """Mean over rows and columns of the mean over positives, with some entries left out of the sums."""
    losses = []
    for scores in (logits, logits.T):
        log_probabilities = scores.masked_fill(left_out, -math.inf).log_softmax(1)
        losses.append(-(log_probabilities.where(positives, 0)).sum(1) / positives.sum(1))
    return sum(losses) / 2


@pytest.mark.parametrize("same_document", ["negative", "ignore", "positive"])
def test_images_of_one_document_are_to_each_other_what_the_setting_says(same_document):
    objective, batch = prepared(f"objective.same_document={same_document}")
    readouts = batch.readouts["context"]
    assert torch.equal(readouts.documents[:, None] == readouts.documents, SAME)
    outputs = outputs_of(objective, batch)
    image, context, scale = features_of(objective, batch)
    own = torch.eye(len(image)).bool()
    left_out = SAME & ~own if same_document == "ignore" else torch.zeros_like(SAME)
    positives = SAME if same_document == "positive" else own
    expected = softmax_over(scale * image @ context.T, left_out, positives).mean()
    torch.testing.assert_close(outputs["contrastive_loss"].double(), expected, rtol=1e-5, atol=1e-6)
    check_gradient(objective, outputs["contrastive_loss"], expected)


def test_pieces_and_pairs_of_a_document_are_of_that_document_on_any_rank():
    config = small_config("objective.name=clip")
    first, second, third = DOCUMENTS
    here = objective_batch(config, [first, second]).readouts["context"].documents
    assert torch.equal(here[:, None] == here, SAME[:3, :3])
    there = objective_batch(config, [third], [first]).readouts["context"].documents
    assert torch.equal(there[2:], here[:2])
    assert not set(there[:2].tolist()) & set(here.tolist())


def test_the_weight_of_the_contrastive_loss_changes_evenly_over_the_run():
    objective, batch = prepared("objective.contrastive_weight=0", "objective.contrastive_weight_end=2")
    for progress, weight in ((0.0, 0.0), (0.25, 0.5), (1.0, 2.0)):
        objective.progress = progress
        outputs = outputs_of(objective, batch)
        expected = outputs["generation_loss"] + weight * outputs["contrastive_loss"]
        torch.testing.assert_close(outputs["loss"], expected)
    assert trained_losses(objective.settings) == {"contrastive_loss", "generation_loss"}
    constant = small_config("objective.contrastive_weight=0").objective
    assert trained_losses(constant) == {"generation_loss"}
    assert constant.weight_at(0.5) == 0


def test_pairs_that_count_by_their_probability_follow_the_likelihood_of_a_mixture():
    objective, batch = prepared("objective.matching=estimated", seed=4)  # some pairs seem to belong together
    with torch.no_grad():
        objective.model.logit_scale.log_scale.fill_(math.log(8.0))
    outputs = outputs_of(objective, batch)
    image, context, scale = features_of(objective, batch)
    count = len(image)
    none, own = torch.zeros_like(SAME), torch.eye(count).bool()
    pair_loss = softmax_over(scale * image @ context.T, none, own)

    def likelihood(fraction):
        return ((1 - fraction) * (-pair_loss).exp() + fraction / count).log().sum()

    tried = torch.linspace(0, LARGEST_FRACTION, 4001).double()
    best = tried[torch.stack([likelihood(fraction) for fraction in tried]).argmax()]
    assert 0.05 < best < LARGEST_FRACTION - 0.05
    fraction = outputs["unmatched_fraction"].double()
    assert fraction.item() == pytest.approx(best.item(), abs=1e-3)
    # The gradient is that of the likelihood, for as many pairs as belong together.
    with torch.no_grad():
        matched = (1 - fraction) * (-pair_loss).exp() / likelihood_of_each(pair_loss, fraction)
    expected = -likelihood(fraction.squeeze()) / matched.sum()
    check_gradient(objective, outputs["contrastive_loss"], expected)
    weighted = (matched * pair_loss).sum() / matched.sum()
    torch.testing.assert_close(outputs["contrastive_loss"].double(), weighted.detach(), rtol=1e-4, atol=1e-6)


def likelihood_of_each(pair_loss, fraction):
    return (1 - fraction) * (-pair_loss).exp() + fraction / len(pair_loss)


@pytest.mark.parametrize("planted", [0.0, 0.2, 0.6])
def test_the_fraction_of_pairs_that_do_not_belong_together_is_found(planted):
    rng = np.random.default_rng(0)
    features = rng.normal(size=(2000, 24))
    features /= np.linalg.norm(features, axis=1, keepdims=True)
    noisy = features + 0.1 * rng.normal(size=features.shape)
    wrong = rng.permutation(2000)[: round(planted * 2000)]
    noisy[wrong] = noisy[np.roll(wrong, 1)]
    logits = torch.from_numpy(20 * features @ noisy.T)
    own = torch.eye(2000).bool()
    pair_loss = softmax_over(logits, torch.zeros_like(own), own)
    fraction = unmatched_fraction(pair_loss)
    assert fraction.item() == pytest.approx(planted, abs=0.03)
    probability = matched_probability(pair_loss, fraction, 2000)
    assert probability.mean().item() == pytest.approx(1 - fraction.item(), abs=1e-3)
    if planted:
        is_wrong = np.isin(np.arange(2000), wrong)
        assert probability[is_wrong].mean() < 0.1 < 0.9 < probability[~is_wrong].mean()


@pytest.mark.parametrize("loss", [0.0, 250.0, math.log(7)])
def test_equal_losses_of_any_size_give_finite_weights(loss):
    pair_loss = torch.full((7,), loss)
    fraction = unmatched_fraction(pair_loss)
    assert 0 <= fraction <= LARGEST_FRACTION
    assert matched_probability(pair_loss, fraction, 7).isfinite().all()
    assert unmatched_fraction(pair_loss[:0]) == 0


@pytest.mark.parametrize(
    "key", ["normalization=reference", "gather_with_grad=false", "same_document=ignore", "matching=estimated"]
)
def test_what_the_softmax_alone_can_do_is_refused_beside_the_sigmoid(key):
    with pytest.raises(UserError, match=f"objective: {key.split('=')[0]}: .* needs the softmax"):
        small_config("objective.contrastive=sigmoid", f"objective.{key}")


def test_siglip_divides_by_the_pairs_of_all_ranks():
    with pytest.raises(UserError, match="normalization: reference is what LCL published"):
        small_config("objective.name=siglip", "objective.normalization=reference")
