"""`contrastive_loss` with groups of pairs, weights of pairs and statistics about them, in one process."""

import collections
import math
from unittest import mock

import pytest
import torch
import triton
import triton.language as tl
from lcl_kernels import contrastive, reference_contrastive_loss
from lcl_kernels.tiles import log1p_exact
from torch.utils._python_dispatch import TorchDispatchMode

from tests.kernels.checks import (
    DEVICE,
    contrastive_loss,
    few_rows,
    leaf,
    memory_of,
    relative_error,
    seeded,
    triton_alone,
)
from tests.kernels.test_contrastive import BARS, pairs

pytestmark = pytest.mark.usefixtures("backend")
M = 23


@triton.jit
def log1p_kernel(x, out, SIZE: tl.constexpr):
    i = tl.arange(0, SIZE)
    tl.store(out + i, log1p_exact(tl.load(x + i)))


SETTINGS = [(torch.float64, 14.3), (torch.float32, 14.3), (torch.float32, 100.0), (torch.bfloat16, 14.3)]


def group_ids(kind="mixed", m=M):
    return {
        "distinct": lambda: torch.randperm(m, generator=seeded(1)) - 2**40,
        "equal": lambda: torch.full((m,), -(2**63)),
        "mixed": lambda: torch.randint(0, m // 2, (m,), generator=seeded(1)),
        "int32": lambda: torch.randint(-3, 3, (m,), generator=seeded(1), dtype=torch.int32),
    }[kind]()


def pair_weight(kind="random", m=M):
    weights = torch.rand(m, generator=seeded(2))
    return {
        "random": weights,
        "equal": torch.full_like(weights, 3.0),
        "many zeros": torch.where(weights < 0.7, 0.0, weights),
        "one pair": torch.zeros_like(weights).index_fill(0, torch.tensor([m // 2]), 1e30),
        "tiny": (1e-30 * weights),
        "bfloat16": weights.bfloat16(),
    }[kind]


def loss_and_gradients(function, x, y, scale, dtype, **options):
    leaves = [
        leaf(x, dtype),
        leaf(y, dtype),
        leaf(torch.tensor(scale, dtype=torch.float64 if dtype == torch.float64 else torch.float32)),
    ]
    loss = function(*leaves, **options)
    loss.backward()
    return [loss.detach(), *(tensor.grad for tensor in leaves)]


def check(dtype=torch.float32, scale=14.3, m=M, **options):
    """Loss and gradients equal those of the reference in float64 on the same values."""
    x, y = pairs(m, dtype=dtype)
    reference = {key: value for key, value in options.items() if key != "workspace_mb"}
    loss, *gradients = loss_and_gradients(contrastive_loss, x, y, scale, dtype, **options)
    expected, *expected_gradients = loss_and_gradients(
        reference_contrastive_loss, x, y, scale, torch.float64, **reference
    )
    assert relative_error(loss, expected) < min(BARS[dtype], 1e-5)
    for actual, wanted in zip(gradients[:2], expected_gradients[:2], strict=True):
        assert actual.dtype == dtype
        assert relative_error(actual, wanted) < BARS[dtype]
    bar = 1e-12 if dtype == torch.float64 else 1e-7  # absolute as well: its parts cancel
    assert torch.allclose(gradients[2].double(), expected_gradients[2], rtol=200 * bar, atol=bar)


@pytest.mark.parametrize(("dtype", "scale"), SETTINGS)
@pytest.mark.parametrize("kind", ["mixed", "int32"])
@pytest.mark.parametrize("same_group", ["ignore", "positive"])
def test_groups_equal_the_reference(dtype, scale, kind, same_group):
    check(dtype, scale, group_ids=group_ids(kind), same_group=same_group)


@pytest.mark.parametrize("same_group", ["ignore", "positive"])
@pytest.mark.parametrize("scale", [14.3, 100.0])
def test_groups_and_weights_in_several_blocks_of_rows(same_group, scale):
    m = 150
    options = {"group_ids": group_ids(m=m), "pair_weight": pair_weight(m=m), "workspace_mb": few_rows()}
    check(torch.float32, scale, m, same_group=same_group, **options)


@pytest.mark.parametrize("same_group", ["ignore", "positive"])
def test_groups_of_one_pair_change_nothing(same_group):
    x, y = pairs()
    expected = loss_and_gradients(contrastive_loss, x, y, 14.3, x.dtype)
    options = {"group_ids": group_ids("distinct"), "same_group": same_group}
    for actual, wanted in zip(
        loss_and_gradients(contrastive_loss, x, y, 14.3, x.dtype, **options), expected, strict=True
    ):
        assert relative_error(actual, wanted) < 1e-6


def test_pairs_of_one_group_have_no_negatives():
    x, y = pairs()
    for result in loss_and_gradients(contrastive_loss, x, y, 14.3, x.dtype, group_ids=group_ids("equal")):
        assert torch.equal(result, torch.zeros_like(result))
    check(group_ids=group_ids("equal"), same_group="positive")


@pytest.mark.parametrize("same_group", ["ignore", "positive"])
def test_losses_of_learned_groups_keep_their_digits(same_group):
    """Orthogonal groups: at a scale of 15 only their pairs are alike."""
    ids = torch.arange(32) // 2 if same_group == "positive" else torch.arange(32)
    x = torch.eye(32)[ids]
    options = {"group_ids": ids, "same_group": same_group}
    actual = loss_and_gradients(contrastive_loss, x, x, 15.0, torch.float32, **options)
    expected = loss_and_gradients(reference_contrastive_loss, x, x, 15.0, torch.float64, **options)
    if same_group == "ignore":
        assert expected[0] < 1e-5
        assert all(relative_error(a, b) < 1e-5 for a, b in zip(actual, expected, strict=True))
    else:  # log 2 remains, and gradients that are differences of softmaxes and shares
        assert relative_error(actual[0], expected[0]) < 1e-6
        assert all(torch.allclose(a.double(), b, atol=3e-7) for a, b in zip(actual, expected, strict=True))


@pytest.mark.parametrize("normalize", ["global", "per_rank"])
@pytest.mark.parametrize("kind", ["random", "many zeros", "one pair", "tiny", "bfloat16"])
def test_weights_equal_the_reference(kind, normalize):
    check(pair_weight=pair_weight(kind), normalize=normalize)


@pytest.mark.parametrize(("dtype", "scale"), SETTINGS)
def test_weights_in_every_dtype(dtype, scale):
    check(dtype, scale, pair_weight=pair_weight().to(dtype))


def test_equal_weights_change_nothing():
    x, y = pairs()
    expected = loss_and_gradients(contrastive_loss, x, y, 14.3, x.dtype)
    weighted = loss_and_gradients(contrastive_loss, x, y, 14.3, x.dtype, pair_weight=pair_weight("equal"))
    for actual, wanted in zip(weighted, expected, strict=True):
        assert relative_error(actual, wanted) < 1e-6


@pytest.mark.parametrize("normalize", ["global", "per_rank"])
def test_weights_of_zero_are_a_loss_of_zero_with_zero_gradients(normalize):
    for m in (0, M):
        options = {"pair_weight": torch.zeros(m), "normalize": normalize}
        for result in loss_and_gradients(contrastive_loss, *pairs(m), 100.0, torch.float32, **options):
            assert torch.equal(result, torch.zeros_like(result))


@pytest.mark.parametrize("detach", [(True, False), (False, True), (True, True)])
@pytest.mark.parametrize("same_group", ["ignore", "positive"])
def test_detached_features_with_groups_and_weights(detach, same_group):
    """With both options the keys are constants, as with `detach_keys` alone."""
    options = {"group_ids": group_ids(), "same_group": same_group, "pair_weight": pair_weight()}
    check(detach_remote=detach[0], detach_keys=detach[1], **options)


def brute_force(x, y, scale, groups):
    """What `PairStatistics` holds, pair by pair."""
    s, m = scale * x.double() @ y.double().t(), range(len(x))
    x_first = [all(s[i, i] > s[i, j] for j in m if groups[j] != groups[i]) for i in m]
    y_first = [all(s[i, i] > s[j, i] for j in m if groups[j] != groups[i]) for i in m]
    return torch.tensor(x_first), torch.tensor(y_first), s.diagonal() / scale


@pytest.mark.parametrize("scale", [14.3, 100.0, -14.3])
@pytest.mark.parametrize("same_group", [None, "ignore", "positive"])
def test_statistics_equal_brute_force(same_group, scale):
    x, y = pairs(70, noise=2.0)
    y = math.copysign(1.0, scale) * y
    ids, weights = group_ids("int32", m=70), pair_weight(m=70)
    options = {} if same_group is None else {"group_ids": ids, "same_group": same_group}
    x = leaf(x)
    loss, statistics = contrastive_loss(
        x, y, torch.tensor(scale), pair_weight=weights, return_statistics=True, workspace_mb=few_rows(), **options
    )
    assert relative_error(loss, contrastive_loss(x, y, torch.tensor(scale), pair_weight=weights, **options)) < 1e-6
    assert relative_error((weights * statistics.pair_loss).sum() / weights.sum(), loss) < 1e-6
    x_first, y_first, similarity = brute_force(x, y, scale, torch.arange(70) if same_group is None else ids)
    assert torch.equal(statistics.x_first, x_first)
    assert torch.equal(statistics.y_first, y_first)
    assert relative_error(statistics.similarity, similarity) < 1e-6
    assert 0 < x_first.sum() < 70
    assert not any(value.requires_grad for value in statistics)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("d", [7, 100])
def test_a_positive_that_equals_a_negative_is_not_first(dtype, d):
    x, y = pairs(65, d, dtype=dtype, noise=0.1)
    y[64], x[10] = y[3], x[4]
    _, statistics = contrastive_loss(x, y, torch.tensor(14.3), return_statistics=True)
    assert (~statistics.x_first).nonzero().flatten().tolist()[:1] == [3]
    assert not statistics.x_first[[3, 64]].any()
    assert not statistics.y_first[[4, 10]].any()
    assert statistics.x_first.sum() > 60


def test_statistics_of_no_pairs_and_of_one():
    for m in (0, 1):
        loss, statistics = contrastive_loss(*pairs(m), torch.tensor(14.3), return_statistics=True)
        assert loss == 0
        assert statistics.x_first.tolist() == statistics.y_first.tolist() == [True] * m
        assert statistics.pair_loss.tolist() == [0.0] * m


def test_the_mean_of_the_pair_losses_is_the_loss():
    loss, statistics = contrastive_loss(*pairs(dtype=torch.float64), torch.tensor(14.3), return_statistics=True)
    assert statistics.pair_loss.dtype == torch.float64
    assert statistics.pair_loss.mean().item() == pytest.approx(loss.item(), rel=1e-12)


def test_same_bits_every_time_with_everything_on():
    x, y = pairs(200, 32)
    results = []
    for _ in range(3):
        leaves = [leaf(x), leaf(y), leaf(torch.tensor(50.0))]
        options = {"group_ids": group_ids(m=200), "same_group": "positive", "pair_weight": pair_weight(m=200)}
        loss, statistics = contrastive_loss(*leaves, return_statistics=True, **options)
        loss.backward()
        results.append([loss, *statistics, *(tensor.grad for tensor in leaves)])
    for again in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], again, strict=True))


def test_no_more_than_the_workspace_is_kept_with_everything_on():
    x, y, scale = *(leaf(t) for t in pairs(512, 8)), leaf(torch.tensor(14.3))
    options = {"group_ids": group_ids(m=512), "same_group": "positive", "pair_weight": pair_weight(m=512)}

    def peak(megabytes):
        def step():
            contrastive_loss(x, y, scale, return_statistics=True, workspace_mb=megabytes, **options)[0].backward()

        return memory_of(step).peak

    megabytes, other = 0.25, 0.25
    assert peak(megabytes) < (megabytes + other) * 2**20
    assert peak(1e6) > (megabytes + other) * 2**20


@triton_alone
@pytest.mark.skipif(DEVICE == "cuda", reason="counts launches of Triton's interpreter")
def test_a_call_costs_few_launches():
    """Of kernels: all operators of torch that start one, and Triton's, which are counted and not run."""
    from triton.runtime.interpreter import GridExecutor

    launches = collections.Counter()
    views = {"slice", "t", "unsqueeze", "view", "expand", "detach", "select", "alias", "split_with_sizes", "empty_like"}

    class Count(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            name = function.overloadpacket.__name__
            if name not in views and not name.endswith("empty"):
                launches[name] += 1
            return function(*args, **(kwargs or {}))

    torch.use_deterministic_algorithms(False)  # they fill new memory, which is a launch
    x, y = pairs(256, 64)
    arguments = (None, None, "", "global", "none", "ignore", None, "auto", False, True, 64.0)
    with (
        mock.patch.object(GridExecutor, "__call__", lambda self, *a, **k: launches.update([self.fn.__name__])),
        torch.no_grad(),
        Count(),
    ):
        contrastive._contrastive(x, y, torch.tensor(14.3), *arguments, True, True, True)
    assert launches["similarity_statistics_kernel"] == 2
    assert sum(launches.values()) <= 24


def test_only_the_operator_that_waits_is_kept_out_of_cuda_graphs():
    waiting, other = torch.ops.lcl_kernels.contrastive_waiting, torch.ops.lcl_kernels.contrastive
    assert torch.Tag.cudagraph_unsafe in waiting.default.tags
    assert torch.Tag.cudagraph_unsafe not in other.default.tags


@triton_alone
def test_log1p_keeps_its_digits():
    x = torch.logspace(-30, 30, 4096)
    x[0] = 0
    out = torch.empty_like(x)
    log1p_kernel[(1,)](x, out, SIZE=4096)
    assert ((out.double() - x.double().log1p()).abs() <= 4e-7 * x.double().log1p()).all()


def test_unusable_arguments_are_named():
    x, y = pairs()
    ids, weights = group_ids(), pair_weight()

    def refused(match, error=ValueError, **options):
        with pytest.raises(error, match=match):
            contrastive_loss(x, y, torch.tensor(1.0), **options)

    refused(
        r"group_ids must be \[23\], one for each pair, of int64, int32; got \[22\] of torch.int64", group_ids=ids[1:]
    )
    refused("group_ids must be", group_ids=ids[:, None])
    refused("group_ids must be .* of torch.float32", group_ids=ids.float())
    refused("group_ids must be .* of torch.bool", group_ids=ids > 0)
    refused("group_ids must be a tensor, got list", group_ids=ids.tolist())
    refused("pair_weight must be a tensor, got float", pair_weight=1.0)
    refused("devices do not match: x .*, group_ids meta", group_ids=ids.to("meta"))
    refused("same_group must be 'ignore' or 'positive', not 'negative'", group_ids=ids, same_group="negative")
    refused("same_group='positive' needs group_ids", same_group="positive")
    refused(r"pair_weight must be \[23\], .*; got \[1\] of torch.float32", pair_weight=weights[:1])
    refused("pair_weight must be .* of torch.int64", pair_weight=ids)
    refused("pair_weight is a constant and gets no gradient", pair_weight=leaf(weights))
    if DEVICE == "cpu":  # on a GPU a device assertion, which ends the CUDA context
        for bad in (-1.0, math.inf, math.nan):
            refused(
                "pair_weight must be at least 0 and finite", pair_weight=weights.index_fill(0, torch.tensor(3), bad)
            )


@pytest.mark.parametrize("same_group", ["ignore", "positive"])
def test_groups_weights_and_statistics_in_one_graph(same_group):
    torch.compiler.reset()

    def step(x, y, scale, ids, weights):
        loss, statistics = contrastive_loss(
            x, y, scale.exp(), group_ids=ids, same_group=same_group, pair_weight=weights, return_statistics=True
        )
        return loss * 2, statistics.x_first.float().mean(), statistics.pair_loss

    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend="aot_eager")
    for m in (7, 12):
        results = []
        for function in (step, compiled):
            x, y, scale = *(leaf(t) for t in pairs(m, 8)), leaf(torch.tensor(2.5))
            loss, recall, losses = function(x, y, scale, group_ids(m=m), pair_weight(m=m))
            loss.backward()
            results.append([loss, recall, losses, x.grad, y.grad, scale.grad])
        for actual, wanted in zip(*results, strict=True):
            assert relative_error(actual, wanted) < 1e-6
