"""A network larger than its device: weights that stay on the host and visit the device, one module at a time."""

import numpy as np
import pytest
import torch
from transformers import SiglipVisionConfig, SiglipVisionModel

from lcl_ds.errors import UserError
from lcl_ds.evaluate import main
from lcl_ds.evaluation.encoder import of_network, open_released
from lcl_ds.evaluation.finetune import FinetuneSettings, finetune
from lcl_ds.evaluation.gazes import pooling_gazes
from lcl_ds.models.placement import device_of, place, visits, weights_of
from tests.support.small import (
    DECODERS,
    IMAGE_SIZE,
    VISION_TOWERS,
    batch_with_images,
    shake,
    small_config,
    small_model,
)

HOST = torch.device("cpu")
IMAGES = np.random.default_rng(0).integers(0, 256, (3, 3, IMAGE_SIZE, IMAGE_SIZE), dtype=np.uint8)


def placed(model, offload=True):
    place(model.eval(), HOST, offload)
    return model


def outputs(model):
    batch = batch_with_images()
    with torch.no_grad():
        hidden_states, pooled = model(batch)
        encoded = of_network(model, "any").encode(torch.from_numpy(IMAGES))
        return [hidden_states, *model.pair_features(hidden_states, pooled, batch), *encoded.vectors().values()]


@pytest.mark.parametrize("vision", VISION_TOWERS)
@pytest.mark.parametrize("decoder", ["llama", "gpt2"])
def test_a_network_whose_weights_visit_gives_the_same_bits(vision, decoder):
    config = small_config(f"model.vision={VISION_TOWERS[vision]}", f"model.decoder={DECODERS[decoder]}")
    whole, visiting = small_model(config).eval(), placed(small_model(config))
    assert visits(visiting)
    assert not visits(whole)
    assert all(map(torch.equal, outputs(whole), outputs(visiting)))
    # Nothing stays behind on the device after a call.
    assert {weight.device.type for weight in visiting.parameters()} == {"meta"}
    assert device_of(visiting) == device_of(whole) == HOST


def test_weights_that_visit_are_found_by_their_names():
    whole, visiting = small_model(), placed(small_model())
    expected = dict(whole.state_dict())
    assert weights_of(visiting).keys() == expected.keys()
    assert all(torch.equal(weight, expected[name]) for name, weight in weights_of(visiting).items())
    assert of_network(whole, "a").identity() == of_network(visiting, "a").identity()
    shake(whole.vision, scale=1e-3)
    assert of_network(whole, "a").identity() != of_network(visiting, "a").identity()


def test_what_the_pooling_looks_at_is_the_same():
    ours, theirs = (pooling_gazes(model, list(IMAGES)) for model in (small_model().eval(), placed(small_model())))
    assert len(ours) == 3
    assert all(np.array_equal(a.weights, b.weights) for a, b in zip(ours, theirs, strict=True))


def test_a_released_head_that_is_no_module_of_its_own_visits_too(tmp_path):
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    SiglipVisionModel(SiglipVisionConfig(**sizes, image_size=IMAGE_SIZE, patch_size=8)).save_pretrained(tmp_path)
    whole, visiting = (open_released(str(tmp_path)) for _ in range(2))
    place(visiting.module, HOST, offload=True)
    with torch.no_grad():
        ours, theirs = (encoder.encode(torch.from_numpy(IMAGES)) for encoder in (whole, visiting))
    assert torch.equal(ours.head, theirs.head)
    assert torch.equal(ours.patches, theirs.patches)
    assert whole.identity() == visiting.identity()


def test_what_trains_all_weights_needs_them_on_the_device(tmp_path, capsys):
    encoder = of_network(placed(small_model()), "runs/large")
    rows = torch.arange(2)
    with pytest.raises(UserError, match="finetune: the weights of runs/large do not fit on cpu"):
        finetune(encoder, [], rows, rows, rows, FinetuneSettings())
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    SiglipVisionModel(SiglipVisionConfig(**sizes, image_size=IMAGE_SIZE, patch_size=8)).save_pretrained(tmp_path)
    assert main([str(tmp_path), "--task", "finetune", "--offload", "--data", str(tmp_path)]) == 2
    assert "--offload: finetune trains all weights" in capsys.readouterr().err
