"""Probe and retrieval figures on data where the right answer is known."""

import pytest
import torch

from lcl_ds.evaluation.probe import linear_probe
from lcl_ds.evaluation.retrieval import pair_features, retrieval_scores
from tests.support.small import ROW_TOKENS, VOCABULARY, sequence, small_model


def split(count):
    order = torch.randperm(count, generator=torch.Generator().manual_seed(0))
    return order[: count // 2], order[count // 2 :]


def test_a_probe_finds_what_is_linear_and_nothing_in_noise():
    generator = torch.Generator().manual_seed(0)
    classes = torch.randint(0, 4, (600,), generator=generator)
    noise = torch.randn(600, 32, generator=generator)
    train, test = split(600)
    assert linear_probe(noise, classes, train, test).accuracy < 0.35
    assert linear_probe(noise + 3 * torch.eye(4, 32)[classes], classes, train, test).accuracy > 0.9


def test_a_probe_does_not_see_the_test_images():
    generator = torch.Generator().manual_seed(0)
    classes = torch.randint(0, 2, (200,), generator=generator)
    memory = torch.eye(200)
    train, test = split(200)
    assert linear_probe(memory, classes, train, test).accuracy < 0.65


def test_retrieval_scores_of_a_perfect_a_constant_and_a_shifted_feature():
    eye = torch.eye(10)
    perfect = {"recall_at_1": 1.0, "recall_at_5": 1.0, "recall_at_10": 1.0, "median_rank": 1.0}
    assert retrieval_scores(eye, eye) == {"pairs": 10, "chance": 0.1, **perfect, "reverse": perfect}
    constant = torch.ones(10, 10)
    assert retrieval_scores(constant, constant)["recall_at_1"] == 0
    shifted = retrieval_scores(eye, eye.roll(1, dims=0))
    assert (shifted["recall_at_1"], shifted["recall_at_5"]) == (0.0, 0.0)


def test_pairs_of_held_out_documents_are_the_images_with_context():
    sequences = [sequence(["abc", 0, "de", 1], 1), sequence([0, "f"], 2), sequence(["gh", 0], 3)]
    pairs = pair_features(small_model().eval(), sequences, VOCABULARY, ROW_TOKENS, 4)
    assert pairs.image.shape == pairs.context.shape == (3, 32)
    assert pairs.pixels.shape[0] == len(pairs.context_ids) == 3
    torch.testing.assert_close(pairs.image.norm(dim=1), torch.ones(3))
    lengths = sorted(len(ids) for ids in pairs.context_ids)
    assert lengths == [3, 4, 4 + 6 + 2]


@pytest.mark.parametrize("rows_per_batch", [1, 16])
def test_pair_features_do_not_depend_on_batching(rows_per_batch):
    sequences = [sequence(["abc" * (1 + i % 3), 0], i) for i in range(12)]
    model = small_model().eval()
    whole = pair_features(model, sequences, VOCABULARY, ROW_TOKENS, 4, 16)
    batched = pair_features(model, sequences, VOCABULARY, ROW_TOKENS, 4, rows_per_batch)
    torch.testing.assert_close(batched.context, whole.context, rtol=1e-4, atol=1e-5)
