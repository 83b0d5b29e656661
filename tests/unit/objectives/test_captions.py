"""Objectives that learn from captions alone: what of an image the decoder sees, and one transformer for both."""

import copy

import pytest
import torch
from torch.nn import functional as F

from lcl_ds.assembly import attach_objective, lane_settings
from lcl_ds.data.documents import Document
from lcl_ds.errors import UserError
from lcl_ds.models.build import build_empty_model
from lcl_ds.models.counter_rng import patch_order
from lcl_ds.models.vision import VisionEncoder
from lcl_ds.objectives.base import local_normalizers
from lcl_ds.objectives.genlip import POSITION_SCALE, sines
from lcl_ds.training.evaluating import Recorded, recording
from tests.support.small import (
    DECODERS,
    IMAGE_TOKENS,
    SIZES,
    VISION_TOWERS,
    VOCABULARY,
    objective_batch,
    shake,
    small_config,
    small_model,
)

CAPTIONS = ("abc", "defgh", "ij")
MASKED_TOWERS = [
    name
    for name, tower in VISION_TOWERS.items()
    if build_empty_model(small_config(f"model.vision={tower}").model, VOCABULARY.size, 48).vision.takes_masks
]


def batch_for(config, *, texts=CAPTIONS, seed=0):
    """Two rows, the first with two captions."""
    documents = [Document(text, (text, 0), ("0.jpg",), is_pair=True) for text in texts]
    return objective_batch(config, documents[:2], documents[2:], seed=seed)


def prepared(*overrides):
    config = small_config(*overrides)
    objective = attach_objective(small_model(config), config)
    shake(objective)
    return objective, batch_for(config), config


def loss_of(objective, batch):
    return objective(batch, *local_normalizers(objective, batch))["loss"]


def text_ids(batch, number):
    """The tokens of a caption with those around it, and its labels with their positions, by the number of its image."""
    start = int(batch.slot_positions[number]) - 2
    end = min(bound for bound in batch.cu_seqlens.tolist() if bound > start)
    inside = (batch.label_positions >= start) & (batch.label_positions < end)
    return batch.input_ids.flatten()[start:end], batch.label_positions[inside] - start, batch.labels[inside]


# Captioning


def test_the_decoder_sees_a_random_part_of_an_image_in_training_and_all_of_it_otherwise():
    objective, batch, config = prepared("objective.name=captioning", "objective.kept_fraction=0.5")
    assert lane_settings(config).image_tokens == IMAGE_TOKENS // 2
    assert lane_settings(config, training=False).image_tokens == IMAGE_TOKENS
    model = objective.model
    with torch.no_grad():
        actual = loss_of(objective, batch)
        tokens = model.pooling(model.vision(model.vision.normalize(batch.images)))[1]
        kept = [sorted(order[: IMAGE_TOKENS // 2]) for order in patch_order(batch.image_seeds, IMAGE_TOKENS).tolist()]
        shown = torch.stack([image[numbers] for image, numbers in zip(tokens, kept, strict=True)])
        states = model.lm_head.norm(model.decode(batch, shown)).double()[batch.label_positions]
        expected = F.cross_entropy(states @ model.lm_head.weight.double().T, batch.labels)
    torch.testing.assert_close(actual.double(), expected, rtol=1e-5, atol=0)
    assert len({tuple(numbers) for numbers in kept}) > 1

    whole = batch_for(small_config("objective.name=captioning", "objective.kept_fraction=1"))
    with torch.no_grad():
        states = model.lm_head.norm(model.eval().decode(whole, tokens)).double()[whole.label_positions]
        expected = F.cross_entropy(states @ model.lm_head.weight.double().T, whole.labels)
        torch.testing.assert_close(loss_of(objective.eval(), whole).double(), expected, rtol=1e-5, atol=0)


def test_labels_are_those_of_the_text_after_the_image():
    for name in ("captioning", "genlip"):
        _, batch, _ = prepared(f"objective.name={name}")
        text = [label for label in batch.labels.tolist() if label < VOCABULARY.text_size]
        assert text == [ord(letter) % 60 for letter in "".join(CAPTIONS)]


# One transformer


@pytest.mark.parametrize("tower", MASKED_TOWERS)
def test_an_image_before_a_text_is_encoded_as_the_released_encoder_does_alone(tower):
    objective, batch, _ = prepared("objective.name=genlip", f"model.vision={VISION_TOWERS[tower]}")
    vision = objective.model.vision
    with torch.no_grad():
        states, _ = objective._lower_part(batch)
        alone = vision(vision.normalize(batch.images))
    places = batch.slot_positions[:, None] + torch.arange(IMAGE_TOKENS)
    torch.testing.assert_close(states.flatten(0, 1)[places], alone[batch.slot_images], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("tower", MASKED_TOWERS)
@pytest.mark.parametrize("decoder", ["llama", "gpt2"])
def test_the_loss_is_that_of_each_caption_alone_in_float64(tower, decoder):
    objective, batch, _ = prepared(
        "objective.name=genlip", f"model.vision={VISION_TOWERS[tower]}", f"model.decoder={DECODERS[decoder]}"
    )
    exact = copy.deepcopy(objective).double()
    model, vision = exact.model, exact.model.vision
    losses = []
    with torch.no_grad():
        for number in range(len(CAPTIONS)):
            ids, positions, labels = text_ids(batch, number)
            images, prefix = vision.embed(vision.normalize(batch.images[number : number + 1]).double())
            text = exact.text_in(model.decoder.get_input_embeddings()(ids[None]))
            text = text + POSITION_SCALE * sines(torch.arange(len(ids))[None], text.shape[-1])
            first = 2 - prefix  # <sot>, and <soi> unless a class token stands there
            row = torch.cat([text[:, :first], images, text[:, first + images.shape[1] :]], 1)
            sees = torch.ones(len(ids), len(ids)).tril().bool()
            of_image = torch.zeros(len(ids)).bool()
            of_image[first : first + images.shape[1]] = True
            sees[of_image] = of_image
            mask = torch.zeros(len(ids), len(ids)).double().masked_fill(~sees, -torch.inf)[None, None]
            states = exact.states_out(vision.final_norm(vision.run_blocks(vision.first_norm(row), mask)))
            states = model.decoder(
                inputs_embeds=states, position_ids=torch.arange(len(ids))[None], attention_mask=mask, use_cache=False
            ).last_hidden_state[0]
            logits = model.lm_head.norm(states)[positions] @ model.lm_head.weight.T
            losses.append(F.cross_entropy(logits, labels, reduction="sum"))
        expected = sum(losses) / len(batch.labels)
        torch.testing.assert_close(loss_of(objective, batch).double(), expected, rtol=1e-5, atol=0)


def test_an_evaluation_while_training_finds_the_features_of_images_alone():
    objective, batch, _ = prepared("objective.name=genlip")
    recorded = Recorded()
    with torch.no_grad(), recording(objective.model, recorded, keep_patches=True):
        loss_of(objective.eval(), batch)
        vision = objective.model.vision
        expected = vision.all_tokens(vision.normalize(batch.images))[0]
    assert torch.equal(torch.cat(recorded.patches), expected)
    assert len(torch.cat(recorded.pooled)) == len(CAPTIONS)


def test_without_an_upper_part_it_is_the_published_transformer():
    decoder = f"{{model_type: llama, {SIZES.replace('num_hidden_layers: 2', 'num_hidden_layers: 0')}}}"
    objective, batch, _ = prepared("objective.name=genlip", f"model.decoder={decoder}")
    loss_of(objective, batch).backward()
    assert not list(objective.model.decoder.layers)
    assert all(w.grad is not None for w in objective.parameters() if w.requires_grad)


def test_patches_that_training_leaves_out_stand_in_no_row():
    objective, batch, config = prepared("objective.name=genlip", "model.vision.patch_dropout=0.5")
    assert lane_settings(config).image_tokens == IMAGE_TOKENS // 2
    loss_of(objective, batch).backward()
    assert objective.model.vision.model.embeddings.patch_embedding.weight.grad.any()


def test_a_tower_that_cannot_hide_texts_from_images_is_refused(monkeypatch):
    config = small_config("objective.name=genlip", "model.vision.attention=flash_attention_2")
    with pytest.raises(UserError, match="model.vision.attention: flash_attention_2 cannot be told"):
        attach_objective(small_model(config), config)
    config = small_config("objective.name=genlip")
    monkeypatch.setattr(VisionEncoder, "takes_masks", False)  # as dinov2 in older releases of transformers
    with pytest.raises(UserError, match="model.vision.model_type: the blocks of clip_vision_model cannot be told"):
        attach_objective(small_model(config), config)
