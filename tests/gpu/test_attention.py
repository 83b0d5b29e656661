"""Packed documents under the attention kernels that run on a GPU alone, for every decoder family."""

import pytest
import torch

from lcl_ds.models.attention.masks import PREFERRED, unavailable, unsupported
from tests.support.small import DECODERS, batch_of, batch_with_images, sequence, small_config, small_model

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")]
CUDA = torch.device("cuda")


def model_of(family, implementation):
    if reason := unavailable(implementation, "cuda", torch.bfloat16):
        pytest.skip(f"{implementation}: {reason}")
    model = small_model(small_config(decoder=family))
    if reason := unsupported(model.decoder, implementation):
        pytest.skip(f"{implementation}: {reason}")
    model.attention = implementation
    return model.to(CUDA, torch.bfloat16)


def decode(model, batch, mode):
    model.attention_mode = mode
    model.choose_attention()
    return model(batch)[0]


def modes_of(model, implementation):
    modes = ("causal", "images", "bidirectional")
    return [mode for mode in modes if unsupported(model.decoder, implementation, mode) is None]


@pytest.mark.parametrize("implementation", PREFERRED)
@pytest.mark.parametrize("family", DECODERS)
def test_a_document_does_not_change_a_bit_of_its_neighbour(family, implementation):
    second = sequence(["xyz", 0, "w"], seed=9)
    first, other = sequence(["abc", 0, "de"], seed=1), sequence(["qrs", 0, "tu"], seed=2)
    length = len(first.tokens.input_ids)
    model = model_of(family, implementation).eval()
    for mode in modes_of(model, implementation):
        with torch.no_grad():
            ours, theirs = (decode(model, batch_of([each, second]).to(CUDA), mode) for each in (first, other))
        assert model.decoder.config._attn_implementation == implementation
        assert not torch.equal(ours[:length], theirs[:length])
        assert torch.equal(ours[length:], theirs[length:])


@pytest.mark.parametrize("implementation", PREFERRED[:-1])
@pytest.mark.parametrize("family", DECODERS)
def test_states_and_gradients_are_those_of_eager_attention_in_fp32(family, implementation):
    model, batch = model_of(family, implementation), batch_with_images()
    reference = small_model(small_config("model.decoder.attention=eager", decoder=family))
    for mode in modes_of(model, implementation):
        results = []
        for each, rows in ((reference, batch), (model, batch.to(CUDA))):
            each.zero_grad()
            hidden = decode(each, rows, mode)
            hidden.float().square().mean().backward()
            results.append((hidden, each.pooling.proj.weight.grad))
        for expected, actual in zip(*results, strict=True):
            error = (actual.float().cpu() - expected).norm() / expected.norm()
            assert error < 0.05, (mode, error)


@pytest.mark.parametrize("family", DECODERS)
def test_auto_trains(family):
    model = small_model(small_config(decoder=family)).to(CUDA, torch.bfloat16).train()
    hidden, pooled = model(batch_with_images().to(CUDA))
    (hidden.float().square().mean() + pooled.float().square().mean()).backward()
    assert all(weight.grad is None or weight.grad.isfinite().all() for weight in model.parameters())
