"""The network: what may see what, and what stays the same."""

import pytest
import torch

from lcl_ds.models.decoder import build_decoder_config
from lcl_ds.models.encoders import IMAGE_MEAN, IMAGE_STD
from lcl_ds.models.network import LCLModel
from lcl_ds.models.pooling import AttentivePooling
from lcl_ds.models.vision import normalize_images
from lcl_ds.objectives.base import local_normalizers
from tests.support.small import (
    DECODERS,
    IMAGE_TOKENS,
    ROW_TOKENS,
    batch_of,
    batch_with_images,
    batch_without_images,
    lcl_objective,
    sequence,
    small_config,
    small_model,
)


def states(model, batch):
    with torch.no_grad():
        return model(batch)[0].view(*batch.input_ids.shape, -1)


@pytest.mark.parametrize("family", DECODERS)
def test_a_packed_document_equals_the_same_document_alone(family):
    model = small_model(small_config(decoder=family)).eval()
    first, second = sequence(["abc", 0, "de"], seed=1), sequence(["xyz", 0, "w"], seed=9)
    length, end = len(first.tokens.input_ids), len(second.tokens.input_ids)
    packed = states(model, batch_of([first, second]))[0, length : length + end]
    alone = states(model, batch_of([second]))[0, :end]
    torch.testing.assert_close(packed, alone, rtol=1e-4, atol=1e-5)


def test_dropout_is_off_unless_asked_for():
    assert build_decoder_config("gpt2", {}, 100, 64).attn_pdrop == 0
    assert build_decoder_config("gpt2", {"attn_pdrop": 0.1}, 100, 64).attn_pdrop == 0.1


def test_an_image_changes_what_follows_it_and_nothing_before():
    model = small_model().eval()
    document = sequence(["abc", 0, "de"])
    start = document.tokens.slots[0].position
    ours = states(model, batch_of([document]))[0]
    changed = batch_of([document])
    changed.images.add_(17)
    theirs = states(model, changed)[0]
    assert torch.equal(ours[:start], theirs[:start])
    assert not torch.equal(ours[start + IMAGE_TOKENS], theirs[start + IMAGE_TOKENS])


def test_the_constant_image_of_a_batch_without_images_reaches_nothing():
    objective = lcl_objective(small_model())
    batch = batch_without_images()
    losses = objective(batch, *local_normalizers(objective, batch))
    losses["loss"].backward()
    assert losses["contrastive_loss"] == 0
    for name, weight in objective.named_parameters():
        assert weight.grad is not None, name
        if name.startswith(("model.vision", "model.pooling", "model.context_head", "model.logit_scale")):
            assert not weight.grad.any(), name
    again = objective(batch, *local_normalizers(objective, batch))["loss"]
    batch.images.fill_(3)
    assert torch.equal(objective(batch, *local_normalizers(objective, batch))["loss"], again)


def test_the_pooled_vector_is_a_weighted_mean_of_what_the_decoder_receives():
    pooling = AttentivePooling(32, 24, 1).eval()
    pooled, tokens = pooling(torch.randn(5, 7, 32))
    weights = torch.linalg.lstsq(tokens.transpose(1, 2), pooled[..., None]).solution.squeeze(-1)
    torch.testing.assert_close(weights.sum(1), torch.ones(5), rtol=1e-3, atol=1e-3)
    assert (weights > 0).all()


def test_the_weights_of_the_pooling_query_are_those_of_its_heads():
    pooling = AttentivePooling(32, 24, 3).double().eval()
    patches = torch.randn(5, 7, 32, dtype=torch.float64)
    by_head = pooling.v(pooling.norm_v(patches)).unflatten(-1, (3, 8))
    weighted = torch.einsum("mhn,mnhd->mhd", pooling.weights(patches).double(), by_head)
    pooled, _ = pooling(patches)
    torch.testing.assert_close(pooling.proj(weighted.flatten(1)), pooled, rtol=1e-5, atol=1e-6)


def test_uint8_images_are_normalised_and_floating_ones_taken_as_they_are():
    white = normalize_images(torch.full((1, 3, 2, 2), 255, dtype=torch.uint8), torch.float32)
    expected = [(1 - mean) / std for mean, std in zip(IMAGE_MEAN, IMAGE_STD, strict=True)]
    torch.testing.assert_close(white[0, :, 0, 0], torch.tensor(expected))
    ready = torch.randn(1, 3, 2, 2)
    assert torch.equal(normalize_images(ready, torch.float32), ready)


def test_losses_start_near_chance():
    objective = lcl_objective(small_model())
    batch = batch_with_images()
    losses = objective(batch, *local_normalizers(objective, batch))
    assert abs(losses["generation_loss"].item() - torch.tensor(65.0).log().item()) < 0.3
    assert 0 < losses["contrastive_loss"].item() < 10
    expected = losses["generation_loss"] + 0.1 * losses["contrastive_loss"]
    assert losses["loss"].item() == pytest.approx(expected.item())


@pytest.mark.parametrize("part", ["vision", "decoder"])
def test_activation_checkpointing_changes_no_bit_and_keeps_less(part):
    batch = batch_with_images()
    gradients, kept = [], []
    for setting in ("false", "2", "true"):
        config = small_config(f"model.{part}.activation_checkpointing={setting}")
        objective = lcl_objective(small_model(config)).train()
        saved = SavedBytes()
        with saved:
            loss = objective(batch, *local_normalizers(objective, batch))["loss"]
        loss.backward()
        gradients.append([weight.grad for weight in objective.parameters()])
        kept.append(saved.total)
    for others in gradients[1:]:
        assert all(torch.equal(a, b) for a, b in zip(gradients[0], others, strict=True))
    none, every_second, all_blocks = kept
    assert none > every_second > all_blocks


class SavedBytes(torch.autograd.graph.saved_tensors_hooks):
    """Bytes of the storages that a forward pass keeps for backward."""

    def __init__(self):
        self._storages = {}
        super().__init__(self._pack, lambda tensor: tensor)

    def _pack(self, tensor):
        storage = tensor.untyped_storage()
        self._storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    @property
    def total(self):
        return sum(self._storages.values())


def test_the_same_seed_gives_the_same_weights_whatever_was_drawn_before():
    first = small_model().state_dict()
    torch.rand(10)
    second = small_model().state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_heads_read_the_states_before_any_final_norm():
    model = small_model()
    assert isinstance(model, LCLModel)
    assert isinstance(model.decoder.norm, torch.nn.Identity)
    assert model.lm_head.norm is not model.context_head.norm
    assert batch_with_images().input_ids.shape[1] == ROW_TOKENS
