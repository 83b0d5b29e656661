"""Every objective: what it learns from, what it leaves alone, and that its losses are what their names say."""

import re

import pytest
import torch
from torch.nn import functional as F

from lcl_ds.assembly import attach_objective
from lcl_ds.data.documents import Document
from lcl_ds.data.sequences import PairView
from lcl_ds.models.vision import flat_patches
from lcl_ds.objectives import NAMES, build_objective, objective_module, view_of
from lcl_ds.objectives.base import Objective, local_normalizers
from lcl_ds.objectives.blip2 import mismatched_images, with_mismatched_images
from lcl_ds.objectives.masked import without_patches
from lcl_ds.training.optimizer import parameter_groups
from tests.support.ranks import ROOT
from tests.support.small import IMAGE_TOKENS, merged, objective_batch, small_config, small_model, three_documents

CONTRASTIVE = [name for name in NAMES if "contrastive_loss" in objective_module(name).Objective.losses]


def prepared(name, *overrides):
    """An objective, its settings and a batch."""
    config = small_config(f"objective.name={name}", *overrides)
    return attach_objective(small_model(config), config), config, three_documents(config)


def losses_of(objective, batch):
    return objective(batch, *local_normalizers(objective, batch))


def test_the_objectives_of_the_papers_table_are_there():
    of_the_table = {"lcl", "clip", "coca", "generation", "generation_regression", "masked", "blip2"}
    assert set(NAMES) == of_the_table | {"siglip", "captioning", "genlip"}
    passes = {name: objective_module(name).Objective.decoder_passes for name in NAMES}
    assert [passes[name] for name in ("lcl", "clip", "coca", "blip2")] == [1, 1, 2, 3]


@pytest.mark.parametrize("name", NAMES)
def test_every_weight_that_is_not_frozen_learns(name):
    objective, config, batch = prepared(name)
    losses_of(objective, batch)["loss"].backward()
    groups = parameter_groups(objective, config.train, (0.0, 4.6))
    learning = {n for group in groups for n in group["param_names"]}
    for n, weight in objective.named_parameters():
        assert (n in learning) == weight.requires_grad, n
        # Shifting all keys of a softmax changes nothing: those gradients are rounding noise or 0.
        if weight.requires_grad and not n.endswith(("k.bias", "k_proj.bias")):
            assert weight.grad.any(), n


@pytest.mark.parametrize("name", NAMES)
def test_an_objective_freezes_nothing_by_itself_but_says_what_it_leaves_unused(name):
    config = small_config(f"objective.name={name}")
    objective = build_objective(small_model(config), config.objective, seed=0)
    assert all(weight.requires_grad for weight in objective.parameters())
    assert objective.model.attention_mode == "causal"
    objective.model.use_attention_mode(objective.attention_mode or "causal")
    losses_of(objective, three_documents(config))["loss"].backward()
    unused = [getattr(part, "parameters", lambda part=part: [part])() for part in objective.unused]
    assert {id(w) for w in objective.parameters() if w.grad is None} == {id(w) for part in unused for w in part}


@pytest.mark.parametrize("name", NAMES)
def test_every_output_of_an_objective_is_recorded_under_its_name(name):
    objective, _, batch = prepared(name)
    outputs = losses_of(objective, batch)
    assert set(outputs) == {"loss", *objective.losses, *objective.reports}
    assert all(value.numel() == 1 for value in outputs.values())


@pytest.mark.parametrize(
    ("losses", "reports", "message"),
    [
        (("accuracy",), {}, "accuracy: the name of a loss must end in _loss"),
        ((), {"loss": "same"}, "loss: the name of a loss or of another metric"),
        ((), {"other_loss": "sum"}, "other_loss: the name of a loss"),
        ((), {"images": "sum"}, "images: the name of a loss or of another metric"),
    ],
)
def test_names_that_a_reader_of_the_metrics_would_mistake_are_refused(losses, reports, message):
    with pytest.raises(ValueError, match=message):
        type("Mistaken", (Objective,), {"losses": losses, "reports": reports})


@pytest.mark.parametrize("name", NAMES)
def test_the_encoder_is_never_frozen_by_an_objective(name):
    objective, _, _ = prepared(name)
    assert all(weight.requires_grad for weight in objective.model.vision.parameters())


@pytest.mark.parametrize("name", NAMES)
def test_the_total_is_the_weighted_sum_of_what_is_reported(name):
    objective, config, batch = prepared(name)
    losses = losses_of(objective, batch)
    weight = {key.replace("_weight", "_loss"): value for key, value in config.objective if key.endswith("_weight")}
    expected = sum(weight.get(key, 1.0) * losses[key] for key in objective.losses)
    torch.testing.assert_close(losses["loss"], expected)


@pytest.mark.parametrize("name", NAMES)
def test_a_batch_without_images_gives_finite_losses_and_reaches_every_weight(name):
    objective, config, _ = prepared(name)
    takes_pairs = isinstance(view_of(config.objective, 0.5), PairView)
    text = objective_batch(config, *([] if takes_pairs else [[Document("a", ("abcd",), ())]]))
    text = text if len(text.input_ids) else objective_batch(config, [])
    losses = losses_of(objective, text)
    losses["loss"].backward()
    assert all(torch.isfinite(loss).all() for loss in losses.values())
    for n, weight in objective.named_parameters():
        assert weight.grad is not None or not weight.requires_grad, n


@pytest.mark.parametrize("name", sorted(set(NAMES) - set(CONTRASTIVE)))
def test_shares_of_two_ranks_sum_to_the_loss_of_one_process(name):
    objective, config, first = prepared(name)
    second = objective_batch(config, [Document("x", ("mnopqr", 0, "st"), ("0.jpg",))], seed=9)
    with torch.no_grad():
        counts = local_normalizers(objective, first, second)
        shares = [objective(batch, count)["loss"] for batch, count in zip((first, second), counts, strict=True)]
        torch.testing.assert_close(sum(shares), losses_of(objective, merged(first, second))["loss"])


@pytest.mark.parametrize("name", sorted({*CONTRASTIVE} - {"siglip"}))
def test_the_contrastive_loss_is_symmetric_cross_entropy_over_all_pairs(name):
    objective, _, batch = prepared(name)
    with torch.no_grad():
        actual = losses_of(objective, batch)["contrastive_loss"]
        image, context = objective.model.pair_features(*objective.model(batch), batch)
        logits = objective.model.logit_scale().double() * image.double() @ context.double().T
    target = torch.arange(len(logits))
    expected = (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2
    assert len(logits) == 3
    torch.testing.assert_close(actual.double(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["coca", "blip2"])
def test_captions_follow_their_image_and_text_features_do_not_see_it(name):
    objective, _, batch = prepared(name)
    with torch.no_grad():
        before, _ = objective.model(batch)
        batch.images.add_(31)
        after, _ = objective.model(batch)
        batch.images.sub_(31)
    pairs, matched = batch.readouts["context"].positions, batch.readouts["matched"].positions
    assert torch.equal(before[pairs], after[pairs])
    assert (before[matched] != after[matched]).any(dim=1).all()
    text = [letter for letter in batch.labels.tolist() if letter < 60]
    assert text == [ord(letter) % 60 for letter in "abcefghi"]


def test_masked_text_is_predicted_from_both_sides_and_hidden_patches_are_never_seen():
    objective, _, batch = prepared("masked", "objective.text_share=0.5")
    ids = batch.input_ids.flatten()
    assert (ids[batch.label_positions] == 60 + 2).all()  # <image>
    assert all(label < 60 for label in batch.labels.tolist())
    model = objective.model
    with torch.no_grad():
        _, tokens = model.encode_images(batch.images, batch.image_seeds)
        tokens = tokens[batch.slot_images]
        first = model.decode(batch, tokens, mode="bidirectional")
        changed = batch.input_ids.clone()
        last = int((batch.position_ids[0] == 0).nonzero()[1]) - 1  # the end of the first document
        batch.input_ids[0, last] = 7
        second = model.decode(batch, tokens, mode="bidirectional")
        batch.input_ids.copy_(changed)
    assert (first[:last] != second[:last]).any(dim=1).all()
    assert torch.equal(first[last + 1 :], second[last + 1 :])

    seen = []
    model.vision.register_forward_pre_hook(lambda module, arguments: seen.append(arguments[0]))
    losses_of(objective, batch)
    hidden = (flat_patches(seen[0], objective.patch_size) == 0).all(dim=2)
    assert hidden.sum(dim=1).tolist() == [objective.hidden_patches] * 3 == [round(0.4 * IMAGE_TOKENS)] * 3


def test_hidden_patches_are_grey_and_all_others_as_they_were():
    images = torch.randn(2, 3, 8, 8)
    shown = without_patches(images, torch.tensor([[1], [2]]), 4)
    assert not shown[0, :, :4, 4:].any()
    assert not shown[1, :, 4:, :4].any()
    assert (shown == images).float().mean() == 0.75


def test_a_mismatched_image_is_another_one_and_more_often_a_similar_one():
    pooled = F.normalize(torch.randn(8, 16, generator=torch.Generator().manual_seed(0)), dim=-1)
    pooled[1] = F.normalize(pooled[0] + 0.1 * pooled[2], dim=-1)
    drawn = torch.stack([mismatched_images(pooled, torch.tensor([5.0]), torch.arange(8) + 8 * n) for n in range(300)])
    assert (drawn != torch.arange(8)).all()
    weights = (5.0 * pooled[0] @ pooled.T).exp()
    weights[0] = 0
    expected = weights / weights.sum()
    actual = torch.bincount(drawn[:, 0], minlength=8) / len(drawn)
    assert expected[1] > 0.4
    torch.testing.assert_close(actual, expected, rtol=0, atol=0.1)


def test_only_the_mismatched_slots_get_another_image():
    _, _, batch = prepared("blip2")
    assert batch.slot_images.tolist() == [0, 0, 1, 1, 2, 2]
    assert with_mismatched_images(batch, torch.tensor([2, 0, 1])).tolist() == [0, 2, 1, 0, 2, 1]


def test_regressed_image_tokens_are_constants_when_asked_for():
    gradients = []
    for detach in ("false", "true"):
        objective, _, batch = prepared("generation_regression", f"objective.detach_targets={detach}")
        losses_of(objective, batch)["regression_loss"].backward()
        gradients.append(objective.model.pooling.proj.weight.grad)
    assert not torch.allclose(*gradients)


def test_a_new_objective_touches_no_other_file():
    """Objectives are found by their module's name; only the published one is named elsewhere, as the default."""
    named = re.compile(rf"objectives(\.| import )({'|'.join(set(NAMES) - {'lcl'})})\b")
    sources = [path for folder in ("lcl_ds", "launch") for path in (ROOT / folder).rglob("*.py")]
    assert [path for path in sources if named.search(path.read_text(encoding="utf-8"))] == []
