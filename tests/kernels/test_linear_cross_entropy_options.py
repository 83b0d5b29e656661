"""What adopters of `linear_cross_entropy` ask for: any number of dimensions, a shift, weights, more to read.

Truth is autograd in float64 over the whole matrix of logits.
"""

import importlib.util
import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from lcl_kernels import reference_linear_cross_entropy
from lcl_kernels._common import row_chunks, use_triton
from lcl_kernels.reference import reference_logits

from tests.kernels.checks import (
    DEVICE,
    few_rows,
    leaf,
    linear_cross_entropy,
    memory_of,
    relative_error,
    seeded,
    torch_alone,
    triton_alone,
)
from tests.kernels.launches import CASES, each_further_chunk, linear_step
from tests.kernels.peer_matrices import MATRICES
from tests.kernels.peer_matrices import run as run_cases
from tests.kernels.test_linear_cross_entropy import BARS, both, check, inputs, on_cpu
from tests.kernels.test_numerics import tokens

pytestmark = pytest.mark.usefixtures("backend")


def weights(labels, v, seed=7):
    """token_weight, NaN where the label is ignored, and class_weight, with a 0 in each."""
    token_weight = torch.rand(labels.shape, generator=seeded(seed)) * 2
    token_weight.flatten()[-1:] = 0
    class_weight = torch.rand(v, generator=seeded(seed + 1)) * 3
    class_weight[1] = 0
    return {"token_weight": token_weight.where(labels != -100, math.nan), "class_weight": class_weight}


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize(
    ("dtype", "label_smoothing"),
    [(torch.float64, 0.0), (torch.float64, 0.2), (torch.float32, 0.0), (torch.float32, 0.2), (torch.float16, 0.2)],
)
def test_weights_of_tokens_and_classes(reduction, dtype, label_smoothing):
    hidden, weight, bias, labels = inputs(dtype=dtype)
    both_weights = weights(labels, len(weight))
    options = dict(reduction=reduction, label_smoothing=label_smoothing, z_loss=0.1, softcap=3.0)
    for names in (["token_weight"], ["class_weight"], ["token_weight", "class_weight"]):
        chosen = {name: both_weights[name] for name in names}
        workspace = None if names == ["class_weight"] else few_rows()
        check(hidden, weight, bias, labels, **options, **chosen, workspace_mb=workspace)


@pytest.mark.parametrize("label_smoothing", [0.0, 0.3, 1.0])
def test_class_weights_are_those_of_torch(label_smoothing):
    hidden, weight, bias, labels = inputs()
    class_weight = weights(labels, len(weight))["class_weight"]
    for reduction in ("mean", "sum", "none"):
        options = dict(reduction=reduction, label_smoothing=label_smoothing)
        expected = F.cross_entropy(F.linear(hidden, weight, bias), labels, weight=class_weight, **options)
        actual = linear_cross_entropy(hidden, weight, labels, bias=bias, class_weight=class_weight, **options)
        assert relative_error(actual, expected) < 1e-5


@pytest.mark.parametrize("size", [1e-7, 1e6])
@pytest.mark.parametrize("of", ["token_weight", "class_weight", "upstream", "lse"])
def test_weights_beyond_float16_lose_no_digits_under_autocast(of, size):
    hidden, weight, bias, labels = inputs(dtype=torch.float16)
    class_weight = weights(labels, len(weight))["class_weight"]
    options = dict(
        label_smoothing=0.2,
        reduction="none",
        token_weight=torch.full(labels.shape, size if of == "token_weight" else 1.0),
        class_weight=class_weight * (size if of == "class_weight" else 1.0),
    )
    of_loss, of_lse = (0.0, size) if of == "lse" else (size if of == "upstream" else 1.0, 0.0)
    leaves, truth = ([leaf(t, d) for t in (hidden, weight, bias)] for d in (torch.float32, torch.float64))
    with torch.autocast(DEVICE, dtype=torch.float16):
        losses, statistics = linear_cross_entropy(
            leaves[0], leaves[1], labels, bias=leaves[2], return_statistics=True, differentiable_lse=True, **options
        )
    (losses * of_loss + statistics.lse * of_lse).sum().backward()
    expected = reference_linear_cross_entropy(truth[0], truth[1], labels, bias=truth[2], **options)
    (expected * of_loss + lse_of(*truth, labels) * of_lse).sum().backward()
    for actual, wanted in zip(leaves, truth, strict=True):
        assert relative_error(actual.grad, wanted.grad) < 1e-3


def test_float16_keeps_the_digits_of_classes_that_are_hardly_likely():
    weight = F.normalize(torch.randn(64, 64, generator=seeded()), dim=1).half()
    hidden, labels = weight * 18, torch.arange(64)  # other classes have about 1e-8
    leaves, truth = ([leaf(t, d) for t in (hidden, weight)] for d in (torch.float32, torch.float64))
    with torch.autocast(DEVICE, dtype=torch.float16):
        linear_cross_entropy(*leaves, labels).backward()
    reference_linear_cross_entropy(*truth, labels).backward()
    for actual, wanted in zip(leaves, truth, strict=True):
        assert relative_error(actual.grad, wanted.grad) < 1e-3


def test_the_part_of_z_loss_has_the_dtype_of_the_loss_and_no_overflow_of_its_own():
    labels, options = torch.tensor([0, 1]), dict(token_weight=torch.ones(2, dtype=torch.float64))
    weight = torch.tensor([[1e15], [2e15]])
    for z_loss, expected in ((0.0, 0.0), (1e-30, 8e10)):  # lse is 2e20, whose square float32 has not
        hidden = torch.full((2, 1), 1e5)
        loss, statistics = linear_cross_entropy(
            hidden, weight, labels, z_loss=z_loss, return_statistics=True, reduction="sum", **options
        )
        assert statistics.z_loss.dtype == torch.float32
        assert float(statistics.z_loss) == pytest.approx(expected)
        assert float(loss) == pytest.approx(1e20)


def test_weights_may_have_any_real_dtype_and_layout():
    hidden, weight, bias, labels = inputs()
    mask = torch.rand(labels.shape, generator=seeded(3)) < 0.5
    apart = torch.full((2, len(weight)), math.nan)
    apart[0] = weights(labels, len(weight))["class_weight"]
    for token_weight in (mask, mask.int(), mask.bfloat16(), mask.double(), torch.stack([mask, mask], 1)[:, 1]):
        check(hidden, weight, bias, labels, token_weight=token_weight, class_weight=apart.t().contiguous()[:, 0])


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_weights_that_sum_to_zero_give_zero_as_without_counted_rows(reduction):
    hidden, weight, bias, labels = inputs()
    for zeros in ({"token_weight": torch.zeros(len(labels))}, {"class_weight": torch.zeros(len(weight))}):
        leaves = [leaf(tensor) for tensor in (hidden, weight, bias)]
        loss = linear_cross_entropy(
            leaves[0],
            leaves[1],
            labels,
            bias=leaves[2],
            reduction=reduction,
            z_loss=0.1 * (reduction == "mean"),
            **zeros,
        )
        loss.sum().backward()
        assert torch.equal(loss.detach(), torch.zeros_like(loss))
        assert all(torch.equal(tensor.grad, torch.zeros_like(tensor)) for tensor in leaves)


def test_a_normalizer_replaces_the_sum_of_the_weights():
    hidden, weight, bias, labels = inputs()
    check(hidden, weight, bias, labels, normalizer=17.0, **weights(labels, len(weight)))


SHAPES = [((4, 6), 0), ((4, 6), 2), ((2, 3, 5), 1), ((7,), 3), ((), 0), ((3, 4), 9), ((2, 0), 1), ((0, 5), 2)]


@pytest.mark.parametrize(("shape", "shift"), SHAPES, ids=str)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_any_number_of_dimensions_and_any_shift(shape, shift, reduction):
    rows = math.prod(shape)
    hidden, weight, bias, labels = inputs(rows, ignored=0.3 if rows > 1 else 0.0)
    hidden, labels = hidden.view(*shape, 16), labels.view(shape)
    options = dict(shift=shift, reduction=reduction, z_loss=0.1, **weights(labels, len(weight)))
    if rows:
        (loss, gradients), (expected, expected_gradients) = both(hidden, weight, bias, labels, **options)
        assert loss.shape == expected.shape
        assert torch.allclose(loss.double(), expected, rtol=1e-5)
        for actual, wanted in zip(gradients, expected_gradients, strict=True):
            assert torch.allclose(actual.double(), wanted, rtol=1e-5, atol=1e-6)
    loss, statistics = linear_cross_entropy(hidden, weight, labels, bias=bias, return_statistics=True, **options)
    length = (*shape[:-1], max(0, shape[-1] - shift)) if shape else ()
    assert loss.shape == (length if reduction == "none" else ())
    assert statistics.row_loss.shape == statistics.lse.shape == statistics.rank.shape == length


def test_a_shift_is_that_of_the_slices():
    hidden, weight, bias, labels = inputs(24)
    hidden, labels = hidden.view(4, 6, 16), labels.view(4, 6)
    options = dict(bias=bias, return_statistics=True, return_predicted=True, counted_rows=None, z_loss=0.1)
    counted = int((labels[:, 2:] != -100).sum())
    loss, statistics = linear_cross_entropy(hidden, weight, labels, shift=2, **{**options, "counted_rows": counted})
    expected, of_slices = linear_cross_entropy(hidden[:, :-2], weight, labels[:, 2:], **options)
    assert torch.allclose(loss, expected, rtol=1e-6)
    for actual, wanted in zip(statistics, of_slices, strict=True):
        assert torch.allclose(actual, wanted, rtol=1e-6)


def test_a_shift_copies_nothing_of_hidden(backend):
    """1 MB of hidden, almost all of whose labels are ignored."""
    hidden, weight, labels = torch.randn(4, 64, 1024), torch.randn(8, 1024), torch.full((4, 64), -100)
    labels[:, 5] = 3
    memory = memory_of(lambda: linear_cross_entropy(hidden, weight, labels, shift=1, workspace_mb=0.1))
    assert memory.peak < 0.3 * 2**20


def lse_of(hidden, weight, bias, labels, softcap=None):
    logits = reference_logits(hidden, weight, bias, softcap)
    return logits.logsumexp(-1).where(labels != -100, 0)


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("options", [{}, {"label_smoothing": 0.1, "softcap": 3.0}], ids=str)
def test_a_differentiable_log_sum_exp(reduction, dtype, options):
    hidden, weight, bias, labels = inputs(dtype=dtype)
    of_lse = torch.randn(len(labels), generator=seeded(5))
    leaves, truth = ([leaf(t, d) for t in (hidden, weight, bias)] for d in (dtype, torch.float64))
    loss, statistics = linear_cross_entropy(
        leaves[0], leaves[1], labels, bias=leaves[2], reduction=reduction, return_statistics=True,
        differentiable_lse=True, **options,
    )  # fmt: skip
    (loss.sum() + (of_lse * statistics.lse).sum()).backward()
    expected = reference_linear_cross_entropy(truth[0], truth[1], labels, bias=truth[2], reduction=reduction, **options)
    lse = lse_of(*truth, labels, options.get("softcap"))
    (expected.sum() + (of_lse * lse).sum()).backward()
    assert relative_error(statistics.lse, lse) < 1e-5
    for actual, wanted in zip(leaves, truth, strict=True):
        assert relative_error(actual.grad, wanted.grad) < BARS[dtype]


@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
def test_gradients_of_the_log_sum_exp_alone_and_against_that_of_the_loss(label_smoothing):
    """loss - lse leaves nothing but the logits of the labels: what both products are multiplied with is 0."""
    hidden, weight, bias, labels = inputs()
    for share in (0.0, -1.0):
        leaves, truth = ([leaf(t, d) for t in (hidden, weight, bias)] for d in (None, torch.float64))
        _, statistics = linear_cross_entropy(
            leaves[0], leaves[1], labels, bias=leaves[2], return_statistics=True, differentiable_lse=True
        )
        loss, statistics = linear_cross_entropy(
            leaves[0], leaves[1], labels, bias=leaves[2], return_statistics=True, differentiable_lse=True,
            reduction="sum", label_smoothing=label_smoothing,
        )  # fmt: skip
        (share * loss + statistics.lse.sum()).backward()
        expected = reference_linear_cross_entropy(
            truth[0], truth[1], labels, bias=truth[2], reduction="sum", label_smoothing=label_smoothing
        )
        (share * expected + lse_of(*truth, labels).sum()).backward()
        for actual, wanted in zip(leaves, truth, strict=True):
            assert relative_error(actual.grad, wanted.grad) < 1e-5


def test_the_log_sum_exp_is_a_constant_unless_asked_for():
    hidden, weight, bias, labels = inputs()
    for reduction in ("mean", "none"):
        _, statistics = linear_cross_entropy(
            leaf(hidden), weight, labels, bias=bias, return_statistics=True, reduction=reduction
        )
        assert not statistics.lse.requires_grad


@pytest.mark.parametrize("options", [{}, {"softcap": 3.0}, {"label_smoothing": 0.1}], ids=str)
def test_the_predicted_class(options):
    hidden, weight, bias, labels = inputs(40, 16, 300)
    logits = reference_logits(hidden, weight, bias, options.get("softcap"))
    _, statistics = linear_cross_entropy(
        leaf(hidden), weight, labels, bias=bias, return_statistics=True, return_predicted=True, **options
    )
    assert statistics.predicted.dtype == torch.int64
    assert torch.equal(statistics.predicted, logits.argmax(1).where(labels != -100, -1))
    right = statistics.rank == 0
    assert torch.equal(statistics.predicted[right], labels[right])


def test_a_row_of_nan_has_a_predicted_class_too():
    hidden, weight, bias, labels = inputs(5, ignored=0.0)
    hidden[2] = math.nan
    _, statistics = linear_cross_entropy(
        hidden, weight, labels, bias=bias, return_statistics=True, return_predicted=True
    )
    assert torch.equal(statistics.predicted, F.linear(hidden, weight, bias).argmax(1))


def test_of_equal_classes_the_first_is_predicted():
    """Across tiles and within one, with the label among them, before them and after them."""
    hidden, weight = torch.eye(4)[[0, 0, 0, 0, 1, 2]], torch.zeros(300, 4)
    weight[[7, 9, 130, 290], 0] = 2.0
    weight[[5, 299], 1] = -1.0
    weight[:, 2] = -3.0
    labels = torch.tensor([7, 290, 3, 299, 0, 299])
    _, statistics = linear_cross_entropy(hidden, weight, labels, return_statistics=True, return_predicted=True)
    assert statistics.predicted.tolist() == [7, 7, 7, 7, 0, 0]

    weight = torch.zeros(33_000, 4)  # more tiles than are compared at once
    weight[[40, 32_990], 0] = 2.0
    _, statistics = linear_cross_entropy(hidden[:1], weight, labels[:1], return_statistics=True, return_predicted=True)
    assert statistics.predicted.tolist() == [40]


@pytest.mark.filterwarnings("ignore:overflow encountered in exp2")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_rows_that_overflow_at_first_have_every_option_too(dtype):
    hidden, weight, bias, labels = inputs(12, 16, 300, ignored=0.0)
    bias[7] = 100.0
    labels[:3] = 7
    options = weights(labels, len(weight))
    for smoothing in (0.0, 0.1):
        check(*(t.to(dtype) for t in (hidden, weight, bias)), labels, **options, z_loss=1e-3, label_smoothing=smoothing)
    _, statistics = linear_cross_entropy(
        hidden, weight, labels, bias=bias, return_statistics=True, return_predicted=True
    )
    assert statistics.predicted.tolist() == [7] * 12
    assert statistics.rank[:3].tolist() == [0] * 3
    assert (statistics.rank[3:] >= 1).all()


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_float32_weights_get_gradients_that_were_never_rounded(reduction, backend):
    """Under autocast. Rounding to bfloat16, as the cast outside of the operator did, costs 1.7e-3."""
    hidden, weight, labels = tokens(0.0, 1.0, torch.bfloat16)
    weight, truth = leaf(weight, torch.float32), leaf(weight, torch.float64)
    with torch.autocast(DEVICE, torch.bfloat16):
        linear_cross_entropy(leaf(hidden), weight, labels, reduction=reduction).sum().backward()
    reference_linear_cross_entropy(hidden.double(), truth, labels, reduction=reduction).sum().backward()
    assert weight.grad.dtype == torch.float32
    assert relative_error(weight.grad, truth.grad) < (3e-4 if backend == "triton" else 1e-6)


def test_every_tensor_gets_a_gradient_of_its_own_dtype_under_autocast():
    hidden, weight, bias, labels = inputs()
    leaves = [leaf(hidden.bfloat16()), leaf(weight), leaf(bias.half())]
    with torch.autocast(DEVICE, torch.bfloat16):
        linear_cross_entropy(leaves[0], leaves[1], labels, bias=leaves[2]).backward()
    assert [tensor.grad.dtype for tensor in leaves] == [torch.bfloat16, torch.float32, torch.float16]


def test_unusable_weights_shifts_and_requests_are_named():
    hidden, weight, _, labels = inputs()

    def refused(match, *args, **options):
        with pytest.raises(ValueError, match=match):
            linear_cross_entropy(hidden, weight, labels, **options)

    refused("shift must not be negative, got -1", shift=-1)
    refused(r"token_weight must be \[23\], got \[22\]", token_weight=torch.ones(22))
    refused(r"class_weight must be \[31\], got \[30\]", class_weight=torch.ones(30))
    refused("token_weight is a constant", token_weight=leaf(torch.ones(23)))
    refused("class_weight is a constant", class_weight=leaf(torch.ones(31)))
    refused("class_weight must have real numbers", class_weight=torch.ones(31, dtype=torch.complex64))
    refused("devices do not match", class_weight=torch.ones(31, device="meta"))
    refused("set return_statistics=True", return_predicted=True)
    refused("set return_statistics=True", differentiable_lse=True)
    with pytest.raises(ValueError, match="shift needs labels with a sequence dimension"):
        linear_cross_entropy(hidden[0], weight, labels[0], shift=1)


def test_a_bad_label_is_named_by_its_place():
    hidden, weight, _, labels = inputs(24, ignored=0.0)
    labels = labels.view(2, 3, 4)
    labels[1, 0, 2] = 77
    for shift, shown in itertools.product((0, 2), (r"labels\[1, 0, 2\] = 77",)):
        with pytest.raises(ValueError, match=shown):
            linear_cross_entropy(hidden.view(2, 3, 4, 16), weight, labels, shift=shift)
    with pytest.raises(ValueError, match=r"labels = 31 is outside"):
        linear_cross_entropy(hidden[0], weight, torch.tensor(31))
    linear_cross_entropy(hidden.view(2, 3, 4, 16), weight, labels, shift=3)  # nothing predicts that label


@triton_alone
@pytest.mark.parametrize("shape", [(8192, 768, 49_411), (4096, 4096, 128_256), (8192, 4096, 128_256)], ids=str)
def test_usual_shapes_are_one_chunk_on_a_gpu(shape):
    n, _, v = shape
    from lcl_kernels._common import WORKSPACE_MB
    from lcl_kernels.triton_linear_cross_entropy import bytes_per_row

    per_row = bytes_per_row(v, itemsize=2, stored=True, partials=2, column_tiles=-(-v // 256))
    assert len([*row_chunks(n, per_row, WORKSPACE_MB["cuda"], 128)]) == 1


def test_float32_is_left_to_torch_on_a_gpu():
    class OnGPU:
        is_cuda = True

    chosen = {dtype: use_triton("auto", OnGPU, dtype) for dtype in BARS}
    assert [dtype for dtype, triton in chosen.items() if triton] == [torch.bfloat16, torch.float16]
    assert use_triton("triton", OnGPU, torch.float32)


@on_cpu
@triton_alone
@pytest.mark.parametrize("case", CASES)
def test_one_call_launches_little(case):
    assert linear_step(1, **CASES[case]).total() <= 24
    assert each_further_chunk(CASES[case]).total() <= 10


@pytest.mark.parametrize("kind", ["sum", "rows"])
def test_only_operators_that_wait_are_refused_by_cuda_graphs(kind):
    quick, waiting = (getattr(torch.ops.lcl_kernels, f"linear_cross_entropy_{kind}{s}") for s in ("", "_waiting"))
    assert torch.Tag.cudagraph_unsafe in waiting.default.tags
    assert torch.Tag.cudagraph_unsafe not in quick.default.tags


def peer_samples():
    """A few cases of each project's matrix; torch's need a package that its own tests import."""
    for name, cases in MATRICES.items():
        missing = name == "torch" and not importlib.util.find_spec("expecttest")
        marks = [pytest.mark.skip(reason="torch's samples need the package expecttest")] if missing else []
        yield pytest.param(cases, id=name, marks=marks)


@on_cpu
@torch_alone  # it runs both
@pytest.mark.parametrize("cases", peer_samples())
def test_cases_of_other_projects(cases):
    outcome = run_cases(cases(), every=5, start=7, step=43)
    assert outcome.run["torch"] >= 5
    assert outcome.wrong == []
