"""`sigmoid_contrastive_loss` in one process."""

import importlib
import math

import pytest
import torch
import torch.nn.functional as F
from lcl_kernels import reference_sigmoid_contrastive_loss, torch_sigmoid_contrastive
from lcl_kernels.sigmoid_negatives import Block, gradient_unit
from torch import Tensor

from tests.kernels.checks import (
    DEVICE,
    few_rows,
    leaf,
    memory_of,
    relative_error,
    running,
    seeded,
    sigmoid_contrastive_loss,
)
from tests.kernels.test_numerics import features

pytestmark = pytest.mark.usefixtures("backend")
BARS = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 2.5e-3, torch.float16: 4e-4}
"""Of gradients of features, relative. Rounding exact gradients to bfloat16 alone costs 1.7e-3."""
REGIMES = {  # noise between the two features of a pair, scale, bias
    "start of training": (2.0, 10.0, -10.0),
    "no scale to speak of": (1.0, 1.0, -10.0),
    "learned": (0.1, 14.3, -10.0),
    "learned, scale 100": (0.4, 100.0, -60.0),
    "faint, scale 100": (2.0, 100.0, -10.0),
    "without a bias": (1.0, 14.3, 0.0),
    "wrong side": (1.0, 14.3, 5.0),
    "nothing matches": (1.0, 100.0, -50.0),
    "everything matches": (1.0, 100.0, 50.0),
}


def pairs(m: int = 23, d: int = 16, *, dtype: torch.dtype = torch.float32, noise: float = 1.0) -> tuple[Tensor, Tensor]:
    return features(noise, dtype, m, d)


def both(x, y, scale, bias, upstream=1.0, **options):
    """(loss, gradients) of the kernel, and of the reference in float64 on the same values."""
    results = []
    for function, dtype in ((sigmoid_contrastive_loss, x.dtype), (reference_sigmoid_contrastive_loss, torch.float64)):
        of_scalars = torch.float64 if dtype == torch.float64 else torch.float32
        leaves = [leaf(x, dtype), leaf(y, dtype), *(leaf(torch.tensor(s), of_scalars) for s in (scale, bias))]
        loss = function(*leaves, **(options if function is sigmoid_contrastive_loss else {}))
        (upstream * loss).backward()
        results.append((loss.detach(), [t.grad for t in leaves]))
    return results


@pytest.mark.parametrize("dtype", BARS, ids=str)
@pytest.mark.parametrize("regime", REGIMES)
def test_equals_the_reference(dtype, regime):
    noise, scale, bias = REGIMES[regime]
    x, y = pairs(70, dtype=dtype, noise=noise)  # more than one tile
    (loss, gradients), (expected, expected_gradients) = both(x, y, scale, bias)
    exact = dtype == torch.float64
    assert loss.dtype == (torch.float64 if exact else torch.float32)
    assert relative_error(loss, expected) < (1e-14 if exact else 5e-7)
    for actual, wanted in zip(gradients[:2], expected_gradients[:2], strict=True):
        assert actual.dtype == dtype
        assert relative_error(actual, wanted) < BARS[dtype]
    for actual, wanted in zip(gradients[2:], expected_gradients[2:], strict=True):
        assert actual.shape == ()
        assert relative_error(actual, wanted) < (1e-12 if exact else 5e-6)
    with torch.no_grad():
        assert relative_error(sigmoid_contrastive_loss(x, y, torch.tensor(scale), torch.tensor(bias)), expected) < 5e-7


@pytest.mark.parametrize("bias", [-10.0, -16.0, -40.0])
def test_losses_of_negatives_keep_their_digits(bias):
    """log(1 + e) of a rounded sum has none for e = exp(-17), and two for exp(-10)."""
    x = F.normalize(torch.eye(90) + 0.05 * torch.randn(90, 90, generator=seeded()), dim=1)
    (loss, gradients), (expected, expected_gradients) = both(x, x, -2 * bias, bias)  # positives cost as little
    assert expected.item() < math.exp(0.4 * bias)
    assert relative_error(loss, expected) < 5e-6  # as far as float32 knows the logits
    for actual, wanted in zip(gradients, expected_gradients, strict=True):
        assert relative_error(actual, wanted) < 2e-5


@pytest.mark.parametrize(("dtype", "bar"), [(torch.bfloat16, 3e-3), (torch.float16, 5e-4)], ids=str)
def test_half_precision_products_keep_faint_negatives(dtype, bar, backend):
    """Their gradients are near 1e-7. Called directly: on a CPU the operator makes float32 of its features."""
    if backend == "torch" and DEVICE == "cpu":
        pytest.skip("on a CPU torch multiplies in float32")
    module = importlib.import_module(f"lcl_kernels.{backend}_sigmoid_contrastive")
    x, y = pairs(90, dtype=dtype)
    results = []
    for function, kind, scalars in ((module, dtype, torch.float32), (torch_sigmoid_contrastive, *2 * [torch.float64])):
        d_x = torch.zeros(x.shape, dtype=scalars)
        scale, bias = (torch.tensor(s, dtype=scalars) for s in (1.0, -16.0))
        block = Block(x.to(kind), y.to(kind), scale, bias, diagonal=True)
        made = function.negatives(block, gradients=True, d_x=d_x, want_y=True, workspace_mb=1.0)
        unit = gradient_unit(x.to(kind))
        results.append((made.sums, d_x / unit, made.d_y / unit))
    for actual, wanted, most in zip(*results, (1e-6, bar, bar), strict=True):
        assert relative_error(actual, wanted) < most


def test_numerical_gradients():
    x, y = pairs(6, 4, dtype=torch.float64)
    scalars = (torch.tensor([s], dtype=torch.float64, requires_grad=True) for s in (5.0, -2.0))
    assert torch.autograd.gradcheck(
        lambda *tensors: sigmoid_contrastive_loss(*tensors, workspace_mb=few_rows()), (leaf(x), leaf(y), *scalars)
    )


def test_workspaces_of_any_size_give_the_same():
    x, y = pairs(150)
    (loss, gradients), _ = both(x, y, 14.3, -5.0)
    for megabytes in (few_rows(), 0.05):
        (again, others), _ = both(x, y, 14.3, -5.0, workspace_mb=megabytes)
        for a, b in zip((again, *others), (loss, *gradients), strict=True):
            assert relative_error(a, b) < 1e-6
    with torch.no_grad():
        for megabytes in (1e-4, 1.0):
            again = sigmoid_contrastive_loss(x, y, torch.tensor(14.3), torch.tensor(-5.0), workspace_mb=megabytes)
            assert relative_error(again, loss) < 1e-6


def test_no_pairs_cost_nothing():
    leaves = [leaf(t) for t in (*pairs(0), torch.tensor([10.0]), torch.tensor(-10.0))]
    loss = sigmoid_contrastive_loss(*leaves)
    loss.backward()
    assert loss.item() == 0
    assert all(torch.equal(tensor.grad, torch.zeros_like(tensor)) for tensor in leaves)


def test_one_pair_has_no_negatives():
    (loss, gradients), (expected, expected_gradients) = both(*pairs(1), 10.0, -10.0)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    for actual, wanted in zip(gradients, expected_gradients, strict=True):
        assert relative_error(actual, wanted) < 1e-6


@pytest.mark.parametrize("norm", [1e-3, 1e3, 1e18])
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_features_of_any_norm_and_sign(norm, sign):
    x, y = pairs(noise=0.1)
    (loss, gradients), (expected, expected_gradients) = both(norm * x, sign * y, 100.0, -10.0)
    assert relative_error(loss, expected) < 1e-5
    for actual, wanted in zip(gradients, expected_gradients, strict=True):
        assert relative_error(actual, wanted) < 1e-4


def test_what_is_not_finite_is_seen():
    x, y = pairs()
    for broken in (torch.nan, torch.inf):
        spoilt = x.clone()
        spoilt[3, 2] = broken
        assert not sigmoid_contrastive_loss(spoilt, y, torch.tensor(10.0), torch.tensor(-10.0)).isfinite()
    assert sigmoid_contrastive_loss(x, y, torch.tensor(10.0), torch.tensor(torch.nan)).isnan()


@pytest.mark.parametrize("upstream", [3.5, 0.0, -2.0])
def test_upstream_gradient(upstream):
    (_, gradients), (_, expected) = both(*pairs(), 14.3, -5.0, upstream=upstream)
    for actual, wanted in zip(gradients, expected, strict=True):
        assert torch.allclose(actual.double(), wanted, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("which", range(4))
def test_only_wanted_gradients_are_made(which):
    arguments = [*pairs(), torch.tensor(14.3), torch.tensor(-10.0)]
    expected = both(*pairs(), 14.3, -10.0)[0][1][which]
    arguments[which] = leaf(arguments[which])
    sigmoid_contrastive_loss(*arguments).backward()
    assert torch.equal(arguments[which].grad, expected)
    assert all(t.grad is None for i, t in enumerate(arguments) if i != which)


def test_scalars_keep_their_shape_dtype_and_chain():
    x, y = pairs()
    scales = torch.tensor([torch.nan, 2.0, torch.nan], requires_grad=True)
    bias = torch.tensor([[-3.0]], dtype=torch.bfloat16, requires_grad=True)
    sigmoid_contrastive_loss(x, y, scales[1:2].exp(), bias).backward()
    plain, plain_bias = torch.tensor(2.0, requires_grad=True), torch.tensor(-3.0, requires_grad=True)
    reference_sigmoid_contrastive_loss(x, y, plain.exp(), plain_bias).backward()
    assert relative_error(scales.grad[1], plain.grad) < 1e-5
    assert (bias.grad.shape, bias.grad.dtype) == ((1, 1), torch.bfloat16)
    assert relative_error(bias.grad, plain_bias.grad) < 4e-3


def test_a_kept_graph_can_be_used_again():
    x, y = pairs()
    x = leaf(x)
    loss = sigmoid_contrastive_loss(x, y, torch.tensor(14.3), torch.tensor(-10.0))
    loss.backward(retain_graph=True)
    first = x.grad.clone()
    (2 * loss).backward()
    assert torch.allclose(x.grad, 3 * first)


def test_same_bits_every_time():
    (loss, gradients), _ = both(*pairs(200, 32), 50.0, -10.0)
    for _ in range(4):
        (again, others), _ = both(*pairs(200, 32), 50.0, -10.0)
        assert all(torch.equal(a, b) for a, b in zip((again, *others), (loss, *gradients), strict=True))


@pytest.mark.parametrize("layout", ["slices", "apart", "transposed", "expanded", "overlapping", "one row"])
def test_features_in_any_layout(layout):
    x, y = pairs(1 if layout == "one row" else 23)
    view = {
        "slices": lambda plain: torch.cat([y, plain, x], 1)[:, 16:32],
        "apart": lambda plain: torch.stack([plain, plain], 2)[..., 1],
        "transposed": lambda plain: plain.t().contiguous().t(),
        "expanded": lambda plain: plain[:1].expand_as(plain),
        "overlapping": lambda plain: plain.flatten().as_strided(plain.shape, (3, 1)),
        "one row": lambda plain: plain.as_strided(plain.shape, (0, 1)),
    }[layout]
    results = []
    for kind in (view, lambda plain: view(plain).clone(memory_format=torch.contiguous_format)):
        leaves = [kind(tensor).detach().requires_grad_() for tensor in (x, y)]
        loss = sigmoid_contrastive_loss(*leaves, torch.tensor(14.3), torch.tensor(-5.0))
        loss.backward()
        results.append([loss, *(tensor.grad for tensor in leaves)])
    for actual, wanted in zip(*results, strict=True):
        assert relative_error(actual, wanted) < 1e-6


@pytest.mark.parametrize("width", [1, 7, 65])
def test_features_of_any_width(width):
    x, y = (torch.randn(33, width, generator=seeded(s)) for s in (0, 1))
    (loss, gradients), (expected, expected_gradients) = both(x, y, 1.5, -2.0)
    for actual, wanted in zip((loss, *gradients), (expected, *expected_gradients), strict=True):
        assert relative_error(actual, wanted) < 5e-6


def test_autocast_does_not_reach_the_logits():
    x, y = pairs()
    expected = both(x, y, 100.0, -10.0)[0]
    with torch.autocast(DEVICE, torch.bfloat16):
        loss, gradients = both(x, y, 100.0, -10.0)[0]
    assert torch.equal(loss, expected[0])
    assert torch.equal(gradients[0], expected[1][0])


def peak_of_a_step(megabytes: float, *, m: int, gradients: bool = True) -> int:
    """The most bytes that a call with its backward has at a time, float32."""
    leaves = [*pairs(m, 8), torch.tensor(14.3), torch.tensor(-10.0)]
    if gradients:
        leaves = [leaf(tensor) for tensor in leaves]

    def step():
        loss = sigmoid_contrastive_loss(*leaves, workspace_mb=megabytes)
        if gradients:
            loss.backward()

    return memory_of(step).peak


def test_no_more_than_the_workspace_is_kept_of_the_similarities():
    """Of 1 MB. A larger workspace is used, and seen."""
    megabytes, other = 0.25, 0.2
    assert peak_of_a_step(megabytes, m=512) < (megabytes + other) * 2**20
    assert peak_of_a_step(1e6, m=512) >= 512 * 512 * 4


def test_without_gradients_there_is_no_gradient_workspace():
    if running.backend == "torch":
        assert peak_of_a_step(0.1, m=512, gradients=False) < 0.2 * 2**20
    else:
        assert peak_of_a_step(1e6, m=512, gradients=False) < 0.1 * 2**20


def test_memory_is_linear_in_the_number_of_pairs():
    """What is quadratic stays within the workspace, one row of similarities at least."""
    small, large = (peak_of_a_step(0.05, m=m) for m in (128, 512))
    assert large < 4 * small


def test_second_derivatives_are_refused():
    x, y = pairs()
    x = leaf(x)
    with pytest.raises(RuntimeError, match="differentiated once only"):
        torch.autograd.grad(sigmoid_contrastive_loss(x, y, torch.tensor(1.0), torch.tensor(0.0)), x, create_graph=True)


def test_unusable_arguments_are_named():
    x, y = pairs()
    scale, bias = torch.tensor(1.0), torch.tensor(-10.0)

    def refused(match, *args, **options):
        with pytest.raises(ValueError, match=match):
            sigmoid_contrastive_loss(*args, **options)

    refused(r"x and y must both be \[m, D\]", x, y[1:], scale, bias)
    refused("dtypes do not match: x torch.float32, y torch.bfloat16", x, y.bfloat16(), scale, bias)
    refused("x must have one of the dtypes float32, .*, got torch.int64", x.long(), y.long(), scale, bias)
    refused("logit_scale must be a floating point tensor of one element", x, y, torch.ones(2), bias)
    refused("logit_bias must be a floating point tensor of one element", x, y, scale, torch.ones(0))
    refused("logit_bias must be a floating point tensor of one element", x, y, scale, -10.0)
    refused("logit_bias must be a floating point tensor of one element", x, y, scale, torch.tensor(-10))
    refused("logit_bias must have one of the dtypes", x, y, scale, bias.to(torch.float8_e5m2))
    refused("devices do not match", x, y, scale, bias.to("meta"))
    refused("workspace_mb must be positive and finite", x, y, scale, bias, workspace_mb=0)
    refused("backend must be", x, y, scale, bias, backend="cuda")
    refused("no float64 kernels", x.double(), y.double(), scale, bias, backend="triton")
    refused("exchange must be", x, y, scale, bias, exchange="tree")
    refused(r"counts \[5\] do not match: 1 ranks, 23 pairs", x, y, scale, bias, counts=[5])


def test_kernels_start_on_the_device_of_the_features_whichever_is_current(monkeypatch):
    entered, device_of = [], torch.cuda.device_of
    monkeypatch.setattr(torch.cuda, "device_of", lambda tensor: (entered.append(tensor.shape), device_of(tensor))[1])
    sigmoid_contrastive_loss(torch.ones(3, 5), torch.ones(3, 5), torch.tensor(1.0), torch.tensor(0.0))
    assert entered == [(3, 5)]
