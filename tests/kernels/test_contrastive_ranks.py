"""`contrastive_loss` on several gloo ranks equals one process that has all the pairs."""

import pytest
import torch
from lcl_kernels import reference_contrastive_loss

from tests.kernels.checks import leaf, relative_error
from tests.kernels.ranks import CASES, COUNTS, MISMATCHES, TIMEOUT_S, Case, extras, features, own_slice, runs_here

pytestmark = [pytest.mark.timeout(TIMEOUT_S + 60), pytest.mark.usefixtures("on_a_cpu")]


def expected_of(case):
    """Per rank: its share, the gradients of its features, and that of the scale from its share, in float64."""
    world = range(len(case.counts))
    x, y = (leaf(t, torch.float64) for t in features(case))
    scales = [torch.tensor(case.scale, dtype=torch.float32).double().requires_grad_() for _ in world]
    shares = [
        reference_contrastive_loss(
            *(x, y, scales[rank]),
            counts=case.counts,
            rank=rank,
            normalize=case.normalize,
            detach_remote=case.detach_remote,
            detach_keys=case.detach_keys,
            same_group=case.same_group or "ignore",
            return_statistics=True,
            **extras(case),
        )
        for rank in world
    ]
    sum(share for share, _ in shares).backward()
    own = [own_slice(case.counts, rank) for rank in world]
    return [
        (share.detach(), x.grad[own[r]], y.grad[own[r]], scales[r].grad.reshape(1), *statistics)
        for r, (share, statistics) in enumerate(shares)
    ]


def name(case):
    counts = "_".join(map(str, case.counts))
    mode = "keys" if case.detach_keys else "detached" if case.detach_remote else "exact"
    dtype = str(case.dtype).removeprefix("torch.")
    extra = f"-{case.same_group}{'-weighted' * case.weighted}" if case.same_group else ""
    return f"{counts}-{case.normalize}-{mode}-{case.scale:g}-{dtype}-{case.exchange}-{case.backend}{extra}"


# Relative for the gradients of features; absolute for the loss and the gradient of the scale, because a float32 logit
# near 100 resolves 8e-6 at best.
BARS = {torch.float64: (1e-10, 1e-12), torch.float32: (1e-6, 1e-6), torch.bfloat16: (4e-3, 1e-6)}


@pytest.mark.parametrize("case", CASES, ids=name)
def test_equals_one_process(ranks, case):
    if not runs_here(case):
        pytest.skip("Triton 3.6's interpreter does not run with NumPy 2.5")
    gradient_bar, loss_bar = BARS[case.dtype]
    gradient_bar *= 1 if case.scale < 100 else 10
    for rank, wanted in enumerate(expected_of(case)):
        first, *others = ranks[rank][case]
        assert all(torch.isfinite(tensor).all() for tensor in first)
        for again in others:
            assert all(torch.equal(tensor, repeated) for tensor, repeated in zip(first, again, strict=True))
        loss, d_x, d_y, _, *statistics = first
        assert len(statistics) == (4 if case.same_group else 0)
        for actual, expected in zip(statistics, wanted[4:], strict=False):
            assert torch.allclose(actual.double(), expected.double(), rtol=1e-6, atol=loss_bar)
        assert loss.item() == pytest.approx(wanted[0].item(), rel=1e-6, abs=loss_bar)
        for actual, expected in ((d_x, wanted[1]), (d_y, wanted[2])):
            assert actual.dtype == case.dtype
            assert actual.shape == expected.shape
            assert relative_error(actual, expected) < gradient_bar or expected.norm() < 1e-12
    d_scale = sum(ranks[rank][case][0][3].double() for rank in range(len(case.counts)))
    assert torch.allclose(d_scale, sum(wanted[3] for wanted in expected_of(case)), rtol=1e-5, atol=loss_bar)


@pytest.mark.parametrize("counts", COUNTS)
def test_the_shares_of_global_normalisation_sum_to_the_mean_over_all_pairs(ranks, counts):
    case = Case(counts, "global", False, 14.3)
    x, y = features(case)
    scale = torch.tensor(14.3, requires_grad=True)
    expected = reference_contrastive_loss(x, y, scale.double())
    expected.backward()
    results = [ranks[rank][case][0] for rank in range(len(counts))]
    assert sum(r[0] for r in results).item() == pytest.approx(expected.item(), rel=1e-6)
    assert sum(r[3] for r in results).item() == pytest.approx(scale.grad.item(), rel=1e-5)


def test_a_rank_may_want_no_gradient(ranks):
    case = Case((5, 0, 3, 0), "global", False, 14.3)
    for rank, wanted in enumerate(expected_of(case)):
        loss, *gradients = ranks[rank]["partly"]
        assert loss.item() == pytest.approx(wanted[0].item(), rel=1e-6)
        for actual, expected in zip(gradients, wanted[1:3], strict=False):
            assert relative_error(actual, expected) < 1e-6


@pytest.mark.parametrize("index", range(len(MISMATCHES)))
def test_a_mismatch_between_ranks_is_an_error_on_all_of_them(ranks, index):
    for results in ranks:
        assert results["mismatch"][index].startswith("contrastive_loss was called differently by the ranks")


def test_a_process_outside_the_group_is_told_so(ranks):
    assert all("not a member of the group" in results["outsider"] for results in ranks[2:])
