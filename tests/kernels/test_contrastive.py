"""`contrastive_loss` in one process."""

import math
from pathlib import Path

import pytest
import torch
from lcl_kernels import reference_contrastive_loss
from safetensors.torch import load_file

from tests.kernels.checks import DEVICE, contrastive_loss, few_rows, leaf, memory_of, relative_error, seeded

pytestmark = pytest.mark.usefixtures("backend")
GOLDEN = Path(__file__).parents[1] / "data" / "golden"
BARS = {torch.float64: 1e-11, torch.float32: 1e-5, torch.bfloat16: 4e-3, torch.float16: 4e-3}


def pairs(m=23, d=16, *, dtype=torch.float32, noise=1.0, seed=0):
    generator = seeded(seed)
    x = torch.randn(m, d, generator=generator, dtype=torch.float64)
    y = x + noise * torch.randn(m, d, generator=generator, dtype=torch.float64)
    x, y = (torch.nn.functional.normalize(t, dim=1).to(dtype) for t in (x, y))
    return x, y


def both(x, y, scale, upstream=1.0, **options):
    """(loss, gradients) of the kernel, and of the reference in float64 on the same values."""
    results = []
    for function, dtype in ((contrastive_loss, x.dtype), (reference_contrastive_loss, torch.float64)):
        leaves = [leaf(x, dtype), leaf(y, dtype), leaf(torch.tensor(scale), max(dtype, torch.float32, key=precision))]
        loss = function(*leaves, **(options if function is contrastive_loss else {}))
        (upstream * loss).backward()
        results.append((loss, [t.grad for t in leaves]))
    return results


def precision(dtype):
    return -torch.finfo(dtype).eps


@pytest.mark.parametrize("dtype", BARS, ids=str)
@pytest.mark.parametrize("scale", [1e-4, 1.0, 14.3, 100.0])
@pytest.mark.parametrize("few", [False, True])
def test_equals_the_reference(dtype, scale, few):
    if dtype == torch.float16 and scale < 1:
        pytest.skip("gradients below the range of float16")
    options = {"workspace_mb": few_rows()} if few else {}
    (loss, gradients), (expected, expected_gradients) = both(*pairs(dtype=dtype), scale, **options)
    assert loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert relative_error(loss, expected) < min(BARS[dtype], 1e-5)
    for actual, wanted in zip(gradients[:2], expected_gradients[:2], strict=True):
        assert actual.dtype == dtype
        assert relative_error(actual, wanted) < BARS[dtype]
    assert relative_error(gradients[2], expected_gradients[2]) < (1e-10 if dtype == torch.float64 else 2e-5)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_keys_may_be_constants(dtype):
    x, y = pairs(dtype=dtype)
    results = []
    for function, kind in ((contrastive_loss, dtype), (reference_contrastive_loss, torch.float64)):
        leaves = [leaf(x, kind), leaf(y, kind), leaf(torch.tensor(14.3), kind)]
        function(*leaves, detach_keys=True).backward()
        results.append([t.grad for t in leaves])
    for actual, wanted in zip(*results, strict=True):
        assert relative_error(actual, wanted) < 2e-5


def test_numerical_gradients():
    x, y = pairs(6, 4, dtype=torch.float64)
    scale = torch.tensor([5.0], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda x, y, s: contrastive_loss(x, y, s, workspace_mb=few_rows()), (leaf(x), leaf(y), scale)
    )


@pytest.mark.parametrize("name", ["pairs", "documents"])
def test_golden_loss_of_the_published_code(name):
    golden = load_file(GOLDEN / f"{name}.safetensors", device=DEVICE)
    arguments = [golden[f"expected.{key}"] for key in ("image_features", "text_features", "logit_scale_exp")]
    expected = golden["expected.contrastive_loss_weighted"].item()
    for normalize in ("global", "per_rank"):
        assert 0.1 * contrastive_loss(*arguments, normalize=normalize).item() == pytest.approx(expected, rel=1e-5)
    assert 0.1 * reference_contrastive_loss(*arguments).item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("normalize", ["global", "per_rank"])
@pytest.mark.parametrize("detach_remote", [False, True])
@pytest.mark.parametrize("m", [0, 1])
def test_without_negatives_the_loss_is_zero_with_zero_gradients(m, normalize, detach_remote):
    x, y, scale = (leaf(t) for t in (*pairs(m), torch.tensor([100.0])))
    loss = contrastive_loss(x, y, scale, normalize=normalize, detach_remote=detach_remote)
    loss.backward()
    assert loss.item() == 0
    for tensor in (x, y, scale):
        assert torch.equal(tensor.grad, torch.zeros_like(tensor))


def test_one_process_has_no_use_for_the_rank_options():
    x, y = pairs()
    expected = contrastive_loss(x, y, torch.tensor(10.0))
    for options in ({"normalize": "per_rank"}, {"detach_remote": True}):
        assert torch.equal(contrastive_loss(x, y, torch.tensor(10.0), **options), expected)


def test_swapping_the_sides_swaps_the_gradients():
    x, y = pairs()
    (loss, (dx, dy, ds)), _ = both(x, y, 20.0)
    (swapped, (dy2, dx2, ds2)), _ = both(y, x, 20.0)
    for a, b in ((loss, swapped), (dx, dx2), (dy, dy2), (ds, ds2)):
        assert relative_error(a, b) < 1e-5


def test_the_order_of_the_pairs_does_not_matter():
    x, y = pairs()
    order = torch.randperm(len(x), generator=seeded(1))
    (loss, gradients), _ = both(x, y, 20.0)
    (shuffled, shuffled_gradients), _ = both(x[order], y[order], 20.0)
    assert relative_error(shuffled, loss) < 1e-5
    assert relative_error(shuffled_gradients[0], gradients[0][order]) < 1e-5
    assert relative_error(shuffled_gradients[1], gradients[1][order]) < 1e-5


def test_identical_features_cost_log_m():
    x = torch.ones(37, 4) / 2
    assert contrastive_loss(x, x, torch.tensor(100.0)).item() == pytest.approx(math.log(37), rel=1e-6)


def test_losses_of_learned_pairs_keep_their_digits():
    """At a scale of 15 orthogonal pairs cost about 1e-5, which lse - logit would give with two digits."""
    (loss, gradients), (expected, expected_gradients) = both(torch.eye(32), torch.eye(32), 15.0)
    assert expected.item() < 1e-5
    assert relative_error(loss, expected) < 1e-5
    for actual, wanted in zip(gradients, expected_gradients, strict=True):
        assert relative_error(actual, wanted) < 1e-5


@pytest.mark.parametrize("norm", [1e-3, 1.0, 1e3])
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_features_of_any_norm_and_sign_stay_finite(norm, sign):
    x, y = pairs(noise=0.1)
    (loss, gradients), (expected, _) = both(norm * x, sign * y, 100.0)
    assert torch.allclose(loss.double(), expected, rtol=1e-4, atol=1e-6)
    assert all(g.isfinite().all() for g in gradients)
    zeros = torch.zeros(5, 8)
    assert contrastive_loss(zeros, zeros, torch.tensor(14.3)).item() == pytest.approx(math.log(5), rel=1e-6)


@pytest.mark.parametrize("upstream", [3.5, 0.0, -2.0])
def test_upstream_gradient(upstream):
    (_, gradients), (_, expected) = both(*pairs(), 14.3, upstream=upstream)
    for actual, wanted in zip(gradients, expected, strict=True):
        assert torch.allclose(actual.double(), wanted, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("which", [0, 1, 2])
def test_only_wanted_gradients_are_made(which):
    arguments = [*pairs(), torch.tensor(14.3)]
    expected = both(*pairs(), 14.3)[0][1][which]
    arguments[which] = leaf(arguments[which])
    contrastive_loss(*arguments).backward()
    assert torch.equal(arguments[which].grad, expected)
    assert all(t.grad is None for i, t in enumerate(arguments) if i != which)


def test_logit_scale_keeps_its_shape_and_chain():
    x, y = pairs()
    log_scale = torch.tensor([2.0], requires_grad=True)
    contrastive_loss(x, y, log_scale.exp()).backward()
    expected = torch.tensor([2.0], requires_grad=True)
    reference_contrastive_loss(x, y, expected.exp()).backward()
    assert log_scale.grad.shape == (1,)
    assert relative_error(log_scale.grad, expected.grad) < 1e-5


def test_a_kept_graph_can_be_used_again():
    x, y = pairs()
    x = leaf(x)
    loss = contrastive_loss(x, y, torch.tensor(14.3))
    loss.backward(retain_graph=True)
    first = x.grad.clone()
    (2 * loss).backward()
    assert torch.allclose(x.grad, 3 * first)


def test_same_bits_every_time():
    first = both(*pairs(200, 32), 50.0)[0]
    for _ in range(3):
        loss, gradients = both(*pairs(200, 32), 50.0)[0]
        assert torch.equal(loss, first[0])
        assert all(torch.equal(a, b) for a, b in zip(gradients, first[1], strict=True))


def test_features_may_be_slices():
    x, y = pairs()
    wide = torch.cat([y, x, y], 1)
    expected = contrastive_loss(x, y, torch.tensor(14.3))
    assert torch.equal(contrastive_loss(wide[:, 16:32], wide[:, 32:], torch.tensor(14.3)), expected)


@pytest.mark.parametrize("side", [0, 1])
@pytest.mark.parametrize("layout", ["apart", "transposed", "expanded", "overlapping", "one row"])
def test_features_in_any_layout(side, layout):
    tensors = list(pairs(1 if layout == "one row" else 23))
    plain = tensors[side]
    view = {
        "apart": lambda: torch.stack([plain, plain], 2)[..., 1],
        "transposed": lambda: plain.t().contiguous().t(),
        "expanded": lambda: plain[:1].expand_as(plain),
        "overlapping": lambda: plain.flatten().as_strided(plain.shape, (3, 1)),
        "one row": lambda: plain.as_strided(plain.shape, (0, 1)),
    }[layout]()
    results = []
    for same in (view, view.clone(memory_format=torch.contiguous_format)):
        tensors[side] = same
        leaves = [tensor.detach().requires_grad_() for tensor in tensors]
        loss = contrastive_loss(*leaves, torch.tensor(14.3))
        loss.backward()
        results.append([loss, *(tensor.grad for tensor in leaves)])
    for actual, wanted in zip(*results, strict=True):
        assert relative_error(actual, wanted) < 1e-6


@pytest.mark.parametrize(
    "view", [lambda s: s[1], lambda s: s[1:2, None], lambda s: s[1].expand(1, 1, 1), lambda s: s.flip(0)[1:2]]
)
def test_logit_scale_may_be_a_view(view):
    x, y = pairs()
    scales = torch.tensor([torch.nan, 14.3, torch.nan], requires_grad=True)
    plain = torch.tensor(14.3, requires_grad=True)
    for scale in (view(scales), plain):
        contrastive_loss(x, y, scale).backward()
    assert scales.grad[1] == plain.grad


def test_autocast_does_not_reach_the_logits():
    x, y = pairs()
    expected = both(x, y, 100.0)[0]
    with torch.autocast(DEVICE, torch.bfloat16):
        loss, gradients = both(x, y, 100.0)[0]
    assert torch.equal(loss, expected[0])
    assert torch.equal(gradients[0], expected[1][0])


def memory_of_a_step(megabytes, *, m=512, gradients=True):
    """All that a call with its backward allocates, float32."""
    x, y = pairs(m, 8)
    scale = torch.tensor(14.3)
    if gradients:
        x, y, scale = leaf(x), leaf(y), leaf(scale)

    def step():
        loss = contrastive_loss(x, y, scale, workspace_mb=megabytes)
        if gradients:
            loss.backward()

    return memory_of(step)


def test_no_more_than_the_workspace_is_kept_of_the_similarities():
    """Of 1 MB. Two blocks at once would not fit."""
    megabytes, other = 0.25, 0.2
    memory = memory_of_a_step(megabytes)
    assert memory.peak < (megabytes + other) * 2**20
    assert memory.elements <= megabytes * 2**20 / 4


def test_a_larger_workspace_is_used_and_seen():
    """Were the measure blind to what happens inside of the operator, the test above would mean nothing."""
    memory = memory_of_a_step(1e6)
    assert memory.elements >= 512 * 512
    assert memory.peak >= 512 * 512 * 4


def test_without_gradients_no_more_than_the_workspace_is_kept_of_the_sums(backend):
    """In Triton two numbers for each row and column of a tile."""
    megabytes, other = 0.05, 0.1
    assert memory_of_a_step(megabytes, m=1024, gradients=False).peak < (megabytes + other) * 2**20
    assert memory_of_a_step(1e6, m=1024, gradients=False).peak > (megabytes + other) * 2**20


def test_second_derivatives_are_refused():
    x, y = pairs()
    x = leaf(x)
    with pytest.raises(RuntimeError, match="differentiated once only"):
        torch.autograd.grad(contrastive_loss(x, y, torch.tensor(1.0)), x, create_graph=True)


def test_unusable_arguments_are_named():
    x, y = pairs()
    scale = torch.tensor(1.0)

    def refused(match, *args, error=ValueError, **options):
        with pytest.raises(error, match=match):
            contrastive_loss(*args, **options)

    refused(r"x and y must both be \[m, D\]", x, y[1:], scale)
    refused(r"x and y must both be \[m, D\]", x[0], y[0], scale)
    refused("dtypes do not match: x torch.float32, y torch.bfloat16", x, y.bfloat16(), scale)
    refused("x must have one of the dtypes float32, .*, got torch.int64", x.long(), y.long(), scale)
    refused("logit_scale must be a floating point tensor of one element", x, y, torch.ones(2))
    refused("logit_scale must be a floating point tensor of one element", x, y, 14.3)
    refused("x must have one of the dtypes", x.to(torch.float8_e5m2), y.to(torch.float8_e5m2), scale)
    refused("logit_scale must have one of the dtypes", x, y, scale.to(torch.float8_e5m2))
    refused("devices do not match", x, y.to("meta"), scale)
    refused("normalize must be", x, y, scale, normalize="local")
    for megabytes in (0, -1, math.inf, math.nan):
        refused("workspace_mb must be positive and finite", x, y, scale, workspace_mb=megabytes)
    refused("backend must be", x, y, scale, backend="cuda")
    refused("no float64 kernels", x.double(), y.double(), scale, backend="triton")
    refused("exchange must be", x, y, scale, exchange="tree")
    refused(r"counts \[5\] do not match: 1 ranks, 23 pairs", x, y, scale, counts=[5])
