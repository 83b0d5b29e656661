"""`sigmoid_contrastive_loss` on several gloo ranks equals one process that has all the pairs."""

import pytest
import torch
from lcl_kernels import reference_sigmoid_contrastive_loss

from tests.kernels.checks import leaf, relative_error
from tests.kernels.ranks import TIMEOUT_S, features, own_slice, runs_here
from tests.kernels.sigmoid_ranks import COUNTS, SIGMOID_CASES

pytestmark = [pytest.mark.timeout(TIMEOUT_S + 60), pytest.mark.usefixtures("on_a_cpu")]
BARS = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 4e-3}
"""Of the gradients of features, relative."""


def expected_of(case):
    """Per rank: its share and the gradients of its x, y and of the scalars from its share, in float64."""
    world = range(len(case.counts))
    x, y = (leaf(t, torch.float64) for t in features(case))
    scalars = [
        [torch.tensor([s], dtype=torch.float32).double().requires_grad_() for s in (case.scale, case.bias)]
        for _ in world
    ]
    shares = [reference_sigmoid_contrastive_loss(x, y, *scalars[rank], counts=case.counts, rank=rank) for rank in world]
    sum(shares).backward()
    own = [own_slice(case.counts, rank) for rank in world]
    return [(shares[r].detach(), x.grad[own[r]], y.grad[own[r]], *(s.grad for s in scalars[r])) for r in world]


def name(case):
    counts, dtype = "_".join(map(str, case.counts)), str(case.dtype).removeprefix("torch.")
    return f"{counts}-{case.scale:g}-{case.bias:g}-{dtype}-{case.exchange}-{case.backend}"


@pytest.mark.parametrize("case", SIGMOID_CASES, ids=name)
def test_equals_one_process(ranks, case):
    if not runs_here(case):
        pytest.skip("Triton 3.6's interpreter does not run with NumPy 2.5")
    scalar_bar = 1e-6 if case.dtype == torch.float64 else 1e-5  # the scalars are float32
    for rank, wanted in enumerate(expected_of(case)):
        first, *others = ranks[rank][case]
        for again in others:
            assert all(torch.equal(tensor, repeated) for tensor, repeated in zip(first, again, strict=True))
        loss, d_x, d_y, *_ = first
        assert loss.item() == pytest.approx(wanted[0].item(), rel=1e-6)
        for actual, expected in ((d_x, wanted[1]), (d_y, wanted[2])):
            assert actual.dtype == case.dtype
            assert actual.shape == expected.shape
            assert relative_error(actual, expected) < BARS[case.dtype] or expected.norm() < 1e-12
    for of_scalar in (3, 4):
        parts = [ranks[rank][case][0][of_scalar].double() for rank in range(len(case.counts))]
        whole = sum(wanted[of_scalar] for wanted in expected_of(case))
        assert torch.allclose(sum(parts), whole, rtol=scalar_bar, atol=scalar_bar)


@pytest.mark.parametrize("counts", COUNTS)
def test_the_shares_sum_to_the_mean_over_all_pairs(ranks, counts):
    case = next(case for case in SIGMOID_CASES if case.counts == counts)
    expected = reference_sigmoid_contrastive_loss(
        *features(case), *(torch.tensor(s).double() for s in (case.scale, case.bias))
    )
    shares = [ranks[rank][case][0][0] for rank in range(len(counts))]
    assert sum(shares).item() == pytest.approx(expected.item(), rel=1e-6)


def test_a_rank_without_pairs_has_a_loss_of_zero_and_gradients_of_zero(ranks):
    case = next(case for case in SIGMOID_CASES if case.counts == (5, 0, 3, 1))
    loss, *gradients = ranks[1][case][0]
    assert loss == 0
    assert all(gradient.count_nonzero() == 0 for gradient in gradients)
