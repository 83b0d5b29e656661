"""Blocks of the towers under torch.compile, here with its backend that keeps torch's own operators."""

import copy

import pytest
import torch
from torch._dynamo.utils import counters
from transformers import CLIPVisionConfig, CLIPVisionModel

from lcl_ds.errors import UserError
from lcl_ds.models.attention.masks import attention_arguments
from lcl_ds.training.compiling import check_compiler, compile_blocks
from tests.support.small import small_model


def result_and_gradients(tower, images):
    tower.zero_grad()
    features = tower(images).last_hidden_state
    features.square().sum().backward()
    return features.detach(), {
        name: weight.grad for name, weight in tower.named_parameters() if weight.grad is not None
    }


@pytest.fixture(scope="module")
def computed():
    """What the same blocks compute compiled and not, by number of images, and how many graphs there were by then."""
    torch._dynamo.reset()
    counters.clear()
    shape = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2}
    tower = CLIPVisionModel(CLIPVisionConfig(**shape, image_size=16, patch_size=8))
    compiled = copy.deepcopy(tower)
    compile_blocks(compiled, backend="aot_eager")
    results = []
    for count in (3, 2, 5):
        images = torch.randn(count, 3, 16, 16, generator=torch.Generator().manual_seed(count))
        pair = [result_and_gradients(either, images) for either in (compiled, tower)]
        results.append((*pair, counters["stats"]["unique_graphs"]))
    return results


def test_compiled_blocks_compute_what_the_others_do(computed):
    for (features, gradients), (expected, expected_gradients), _ in computed:
        torch.testing.assert_close(features, expected, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(gradients, expected_gradients, rtol=1e-4, atol=1e-4)


def test_blocks_share_a_graph_and_a_third_number_of_images_needs_no_other(computed):
    assert [graphs for *_, graphs in computed] == [1, 2, 2]


def test_a_compiler_must_be_there(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(
        UserError, match="there is no g\\+\\+ or clang\\+\\+ or c\\+\\+ on this host; install one, or set"
    ):
        check_compiler()
    mine = tmp_path / "mine"
    mine.write_text("")
    mine.chmod(0o700)
    monkeypatch.setenv("CXX", "mine")
    check_compiler()


def test_rows_of_other_documents_need_no_further_graph():
    torch._dynamo.reset()
    counters.clear()
    decoder = small_model().decoder
    compile_blocks(decoder, backend="aot_eager")
    graphs = []
    for lengths in ([5, 11], [4, 6, 6], [2, 2, 3, 9], [16]):
        positions = torch.cat([torch.arange(length) for length in lengths])[None]
        embeddings = torch.randn(1, 16, decoder.config.hidden_size)
        decoder(inputs_embeds=embeddings, use_cache=False, **attention_arguments(decoder, embeddings, positions))
        graphs.append(counters["stats"]["unique_graphs"])
    assert graphs[1:] == [graphs[1]] * 3
