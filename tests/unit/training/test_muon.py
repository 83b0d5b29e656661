"""Muon: which weights it takes, what it makes of a matrix, and how the work is divided among ranks."""

import math

import pytest
import torch

from lcl_ds.training.muon import ROUND_ELEMENTS, Matrix, Piece, orthogonalize, rounds_of
from lcl_ds.training.optimizer import parameter_groups
from tests.support.small import VISION_TOWERS, small_config, small_model


@pytest.mark.parametrize("tower", VISION_TOWERS)
@pytest.mark.parametrize("decoder", ["llama", "gpt2"])
def test_it_takes_the_matrices_of_blocks_and_pooling_and_leaves_embeddings_heads_and_vectors_to_adamw(tower, decoder):
    config = small_config("train.optimizer=muon", f"model.vision={VISION_TOWERS[tower]}", decoder=decoder)
    model = small_model(config)
    groups = {group["name"]: group for group in parameter_groups(model, config.train, (0.0, 1.0))}
    (of_adamw, of_muon) = (set[str](), set(groups["matrices"]["param_names"]))
    for name, group in groups.items():
        assert group["is_matrices"] == (name == "matrices")
        of_adamw |= set() if group["is_matrices"] else set(group["param_names"])
    shapes = {name: weight.shape for name, weight in model.named_parameters()}
    assert groups["matrices"]["weight_decay"] == config.train.weight_decay
    assert all(len(shapes[name]) == 2 for name in of_muon)
    assert {name for name in of_adamw if len(shapes[name]) == 2 and not name.startswith("pooling.query")} == {
        name
        for name in shapes
        if len(shapes[name]) == 2
        and (any(s in name for s in ("embed", "wte", "wpe")) or name.startswith(("lm_head", "context_head")))
    }
    assert any(name.startswith("pooling.") for name in of_muon)


@pytest.mark.parametrize("shape", [(5, 12), (12, 5), (7, 7), (1, 9)])
def test_singular_values_become_about_one_and_directions_stay(shape):
    torch.manual_seed(0)
    matrix = torch.randn(shape, dtype=torch.float64)
    u, s, v = torch.linalg.svd(matrix, full_matrices=False)
    actual = u.mT @ orthogonalize(1e-6 * matrix) @ v.mT
    s = s / s.norm()
    for _ in range(5):
        s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
    torch.testing.assert_close(actual, torch.diag(s), rtol=1e-9, atol=1e-9)
    assert 0.6 < float(s.min()) <= float(s.max()) < 1.3
    assert orthogonalize(torch.zeros(shape)).abs().max() == 0


def test_owners_have_about_the_same_work_and_a_round_has_what_fits():
    matrices = [Matrix(n, (1024, 1024 * (1 + 3 * (n % 2))), [Piece(0, 0, 1)], is_split=True) for n in range(96)]
    rounds = list(rounds_of(matrices, 3))
    assert [matrix.number for of_round in rounds for matrix in of_round] == [*range(96)]
    for of_round in rounds:
        work = [sum(matrix.cost for matrix in of_round if matrix.owner == owner) for owner in range(3)]
        assert max(work) - min(work) <= max(matrix.cost for matrix in of_round)
        assert sum(math.prod(matrix.shape) for matrix in of_round) <= 3 * ROUND_ELEMENTS + 4 * 1024**2
    assert len(rounds) == 3
