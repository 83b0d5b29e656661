"""Edge cases of `linear_cross_entropy` beyond its options: shapes, layouts, far targets, invariances."""

import math

import pytest
import torch
from lcl_kernels import triton_linear_cross_entropy as triton_linear

from tests.kernels.checks import DEVICE, few_rows, leaf, linear_cross_entropy, relative_error, seeded
from tests.kernels.test_linear_cross_entropy import both, check, inputs, on_cpu

pytestmark = [
    pytest.mark.usefixtures("backend"),
    pytest.mark.filterwarnings("ignore:overflow encountered in exp2"),
]


@pytest.mark.parametrize("v", [2, 127, 128, 129, 257, 49_411])
def test_vocabularies(v):
    check(*inputs(9, 24, v, ignored=0.2))


@pytest.mark.parametrize("h", [8, 16, 31, 64, 65, 100, 1000])
def test_widths_aligned_or_not(h):
    check(*inputs(17, h, 150))
    check(*inputs(17, h, 150, dtype=torch.bfloat16))


@pytest.mark.parametrize("n", [63, 64, 65, 127, 128, 129])
def test_numbers_of_rows_around_the_tile(n):
    check(*inputs(n, 16, 40, ignored=0.0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_targets_far_below_other_logits(dtype):
    """Anchored at the target, these rows overflow; they share tiles with rows that do not."""
    gaps = torch.tensor([0.0, 60.0, 69.0, 72.0, 98.0, 144.0, 300.0, 5.0, -20.0, 1.0])
    hidden = torch.zeros(len(gaps), 16)
    hidden[:, 0] = gaps
    hidden[:, 1:] = torch.randn(len(gaps), 15, generator=seeded())
    weight = torch.randn(200, 16, generator=seeded(1)) * 0.3
    weight[:, 0] = 0.0
    weight[7, 0] = 1.0  # class 7 lies `gap` above the others
    labels = torch.arange(20, 20 + len(gaps))
    check(hidden.to(dtype), weight.to(dtype), None, labels, z_loss=1e-3)
    check(hidden.to(dtype), weight.to(dtype), None, labels, reduction="none")
    far = gaps > 50
    check(hidden[far].to(dtype), weight.to(dtype), None, labels[far], label_smoothing=0.1)


@pytest.mark.parametrize("magnitude", [0.0, 1e-3, 1e3])
def test_logits_of_any_magnitude(magnitude):
    hidden, weight, _, labels = inputs(spread=1.0)
    (loss, gradients), (expected, expected_gradients) = both(hidden * magnitude, weight, None, labels)
    assert relative_error(loss, expected) < 1e-5
    for actual, wanted in zip(gradients, expected_gradients, strict=True):
        assert actual.isfinite().all()
        assert relative_error(actual, wanted) < (1e-3 if magnitude > 1 else 1e-5)  # a logit of 1e4 resolves 1e-3


@pytest.mark.parametrize("rows", [[0], [22], [0, 22], list(range(11))])
def test_only_some_rows_count(rows):
    hidden, weight, bias, labels = inputs(ignored=0.0)
    some = torch.full_like(labels, -100)
    some[rows] = labels[rows]
    check(hidden, weight, bias, some, workspace_mb=few_rows())


def test_layouts():
    hidden, weight, bias, labels = inputs(24, 16, 31)
    expected = both(hidden, weight, bias, labels)[0]
    layouts = {
        "transposed": hidden.t().contiguous().t(),
        "stride of two": torch.stack([hidden, hidden], 2).flatten(1)[:, ::2],
        "slice of a wider one": torch.cat([hidden, hidden], 1)[:, :16],
        "unaligned start": torch.cat([torch.zeros(1), hidden.flatten()])[1:].view(24, 16),
    }
    for name, same in layouts.items():
        assert torch.equal(same, hidden), name
        loss = linear_cross_entropy(same, weight, labels, bias=bias)
        assert torch.allclose(loss, expected[0], rtol=1e-6), name
    table = torch.cat([weight, weight])
    assert torch.allclose(linear_cross_entropy(hidden, table[:31], labels, bias=bias), expected[0], rtol=1e-6)
    unaligned = torch.cat([torch.zeros(1, dtype=torch.int64), labels])[1:]
    assert torch.equal(linear_cross_entropy(hidden, weight, unaligned, bias=bias), expected[0])


def laid_out(tensor):
    """(name, the same values in other memory) for every layout that comes to mind; what lies between is NaN."""
    apart = torch.full((*tensor.shape, 2), torch.nan if tensor.is_floating_point() else 2**40, dtype=tensor.dtype)
    apart[..., 1] = tensor
    yield "a column of a wider one", apart[..., 1]
    yield "last dimension first", tensor.movedim(-1, 0).contiguous().movedim(0, -1)
    if tensor.dim() == 2:
        wide = torch.full((len(tensor), tensor.shape[1] + 3), torch.nan, dtype=tensor.dtype)
        wide[:, 1:-2] = tensor
        yield "rows of a wider one", wide[:, 1:-2]


def step(tensors, **options):
    """Loss and gradients, of views also."""
    hidden, weight, labels, bias = tensors
    leaves = [tensor.detach().requires_grad_() for tensor in (hidden, weight, bias)]  # keeps the layout
    loss = linear_cross_entropy(leaves[0], leaves[1], labels, bias=leaves[2], **options)
    loss.sum().backward()
    return [loss.detach(), *(tensor.grad for tensor in leaves)]


@pytest.mark.parametrize("argument", range(4), ids=["hidden", "weight", "labels", "bias"])
@pytest.mark.parametrize("options", [{}, {"reduction": "none", "softcap": 3.0}, {"label_smoothing": 0.1}], ids=str)
def test_any_argument_in_any_layout(argument, options):
    hidden, weight, bias, labels = inputs(24, 16, 31)
    tensors = [hidden, weight, labels, bias]
    expected = step(tensors, **options)
    for name, same in laid_out(tensors[argument]):
        assert torch.equal(same, tensors[argument]), name
        arguments = [*tensors]
        arguments[argument] = same
        for actual, wanted in zip(step(arguments, **options), expected, strict=True):
            assert relative_error(actual, wanted) < 1e-6, name


@pytest.mark.parametrize("argument", range(4), ids=["hidden", "weight", "labels", "bias"])
@pytest.mark.parametrize("ignored", [0.0, 0.4])
def test_rows_that_share_memory(argument, ignored):
    """Expanded from one row, or windows over a line that overlap."""
    hidden, weight, bias, labels = inputs(24, 16, 31, ignored=ignored)
    tensors = [hidden, weight, labels, bias]
    one = tensors[argument]
    shared = [one[:1].expand_as(one)]
    if one.dim() == 2:
        shared.append(one.flatten().as_strided(one.shape, (3, 1)))
    for view in shared:
        arguments = [*tensors]
        arguments[argument] = view
        actual = step(arguments)
        arguments[argument] = view.clone(memory_format=torch.contiguous_format)
        for value, wanted in zip(actual, step(arguments), strict=True):
            assert torch.allclose(value, wanted, rtol=1e-5, atol=1e-6)  # equal classes have gradients of 0


def test_one_row_of_any_stride():
    hidden, weight, bias, _ = inputs(1, 16, 31)
    expected = linear_cross_entropy(hidden, weight, torch.tensor([3]), bias=bias)
    for stride in (0, 1, 7):
        row = hidden.as_strided((1, 16), (stride, 1))
        assert torch.equal(linear_cross_entropy(row, weight, torch.tensor([3]), bias=bias), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    "options", [{}, {"reduction": "none"}, {"label_smoothing": 0.1}, {"z_loss": 1e-3, "reduction": "sum"}], ids=str
)
@pytest.mark.filterwarnings("ignore:invalid value encountered")
def test_a_label_that_the_bias_hides_costs_infinity_and_harms_no_gradient(dtype, options):
    """As padded classes are hidden: -inf for some of them, one of which is a label by mistake."""
    hidden, weight, bias, labels = inputs(12, 16, 31, dtype=dtype, ignored=0.0)
    bias[[3, 7, 30]] = -math.inf
    labels[[2, 5]] = torch.tensor([3, 30])
    labels[:2] = 6
    (loss, gradients), (expected, expected_gradients) = both(hidden, weight, bias, labels, **options)
    finite = expected.isfinite()
    assert not finite.all()
    assert torch.equal(loss[~finite].double(), expected[~finite])
    assert torch.allclose(loss[finite].double(), expected[finite], rtol=1e-5)
    for actual, wanted in zip(gradients, expected_gradients, strict=True):
        assert wanted.isfinite().all()
        assert relative_error(actual, wanted) < (1e-5 if dtype == torch.float32 else 4e-3)


@pytest.mark.filterwarnings("ignore:invalid value encountered")
def test_hidden_classes_that_are_no_labels_change_nothing_else():
    hidden, weight, bias, labels = inputs(12, 16, 31, ignored=0.0)
    labels = labels % 20
    bias[20:] = -math.inf
    (loss, gradients), _ = both(hidden, weight, bias, labels)
    (expected, few), _ = both(hidden, weight[:20], bias[:20], labels)
    assert relative_error(loss, expected) < 1e-6
    assert relative_error(gradients[0], few[0]) < 1e-6
    assert relative_error(gradients[1][:20], few[1]) < 1e-6
    assert torch.equal(gradients[1][20:], torch.zeros_like(gradients[1][20:]))


@pytest.mark.filterwarnings("ignore:invalid value encountered", "ignore:divide by zero")
def test_a_row_without_any_class_is_nan_as_in_torch():
    hidden, weight, bias, labels = inputs(3, 16, 31, ignored=0.0)
    loss = linear_cross_entropy(hidden, weight, labels, bias=torch.full_like(bias, -math.inf), reduction="none")
    assert loss.isnan().all()


@pytest.mark.parametrize("far", [1e3, 1e5])
def test_the_log_sum_exp_has_its_digits_where_the_target_is_far_below(far):
    hidden, weight, bias, labels = inputs(6, 16, 31, ignored=0.0)
    bias[labels] = -far
    logits = torch.nn.functional.linear(hidden.double(), weight.double(), bias.double())
    _, statistics = linear_cross_entropy(hidden, weight, labels, bias=bias, return_statistics=True)
    assert torch.allclose(statistics.lse.double(), logits.logsumexp(1), rtol=1e-6)
    check(hidden, weight, bias, labels, z_loss=0.1)


@pytest.mark.parametrize("softcap", [0.2, 1.0, 50.0, 1e3, 1e5, 1e9, 1e20, 1e30, 1e38, 1e300, math.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_softcaps_of_any_size(softcap, dtype):
    check(*inputs(dtype=dtype, spread=2.0), softcap=softcap, bar=1e-5)


@pytest.mark.parametrize("softcap", [1e-30, 1e-9, 1e-3])
def test_softcaps_below_all_logits(softcap):
    (loss, gradients), (expected, expected_gradients) = both(*inputs(), softcap=softcap)
    assert relative_error(loss, expected) < 1e-6
    for actual, wanted in zip(gradients, expected_gradients, strict=True):
        assert torch.allclose(actual.double(), wanted, rtol=1e-4, atol=1e-12)  # 0 but where a logit is near 0


def test_gradients_keep_their_digits_where_the_cap_binds():
    """The slope is 6e-8 there, which 1 - tanh^2 gives as 0 or noise in float32."""
    hidden, weight = torch.ones(1, 1), torch.tensor([[9.0], [-9.0], [8.0]])
    check(hidden, weight, None, torch.tensor([0]), softcap=1.0)
    check(hidden, weight, None, torch.tensor([1]), softcap=1.0)


def test_a_smoothing_of_one_is_that_of_torch():
    check(*inputs(), label_smoothing=1.0)
    check(*inputs(), label_smoothing=1.0, reduction="none", z_loss=0.1)


def test_an_ignore_index_that_the_labels_cannot_hold():
    hidden, weight, bias, labels = inputs(ignored=0.0)
    expected = linear_cross_entropy(hidden, weight, labels, bias=bias)
    for value in (-(2**63), 2**40, 2**63 - 1):
        assert torch.equal(linear_cross_entropy(hidden, weight, labels.int(), bias=bias, ignore_index=value), expected)


def test_autocast_leaves_float64_alone_as_a_linear_layer_does():
    hidden, weight, bias, labels = inputs(dtype=torch.float64)
    expected = linear_cross_entropy(hidden, weight, labels, bias=bias)
    with torch.autocast(DEVICE, torch.bfloat16):
        assert torch.equal(linear_cross_entropy(hidden, weight, labels, bias=bias), expected)
        with pytest.raises(ValueError, match="dtypes do not match: hidden torch.float64, weight torch.bfloat16"):
            linear_cross_entropy(hidden, weight.float(), labels)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.complex64], ids=str)
@pytest.mark.parametrize("autocast", [False, True])
def test_dtypes_without_a_loss_are_refused(dtype, autocast):
    hidden, weight, bias, labels = inputs()
    with torch.autocast(DEVICE, torch.bfloat16, enabled=autocast):
        for i, name in enumerate(("hidden", "weight", "bias")):
            tensors = [hidden, weight, bias]
            tensors[i] = tensors[i].to(dtype)
            with pytest.raises(ValueError, match=f"{name} must have one of the dtypes float32, .*, got {dtype}"):
                linear_cross_entropy(tensors[0], tensors[1], labels, bias=tensors[2])


def test_many_rows_with_the_same_label():
    """The target's part of the weight gradient is summed over long runs of rows, in float32."""
    hidden, weight, bias, labels = inputs(150, 8, 31, dtype=torch.bfloat16, ignored=0.1)
    labels = torch.where(labels > 15, 3, labels)
    check(hidden, weight, bias, labels)
    check(hidden, weight, bias, torch.full_like(labels, 30))


def test_counted_rows_known_beforehand():
    hidden, weight, bias, labels = inputs()
    counted = int((labels != -100).sum())
    expected = both(hidden, weight, bias, labels)[0]
    loss, gradients = both(hidden, weight, bias, labels, counted_rows=counted)[0]
    assert torch.equal(loss, expected[0])
    assert all(torch.equal(a, b) for a, b in zip(gradients, expected[1], strict=True))
    whole = inputs(ignored=0.0)
    assert torch.equal(both(*whole, counted_rows=23)[0][0], both(*whole)[0][0])


@on_cpu
def test_a_wrong_number_of_counted_rows_is_refused():
    hidden, weight, _, labels = inputs()
    counted = int((labels != -100).sum())
    with pytest.raises(ValueError, match=f"counted_rows is 23, but {counted} labels count"):
        linear_cross_entropy(hidden, weight, labels, counted_rows=23)


def test_a_row_costs_the_same_alone_and_in_any_company(backend):
    hidden, weight, _, labels = inputs(70, 16, 300, ignored=0.0)
    rows = linear_cross_entropy(hidden, weight, labels, reduction="none")
    for i in (0, 33, 69):
        alone = linear_cross_entropy(hidden[i : i + 1], weight, labels[i : i + 1], reduction="none")
        assert torch.equal(alone[0], rows[i]) if backend == "triton" else torch.allclose(alone[0], rows[i], rtol=1e-6)
    order = torch.randperm(70, generator=seeded())
    shuffled = linear_cross_entropy(hidden[order], weight, labels[order], reduction="none")
    assert torch.allclose(shuffled, rows[order], rtol=1e-6)


def test_halves_accumulate_to_the_whole():
    hidden, weight, bias, labels = inputs()
    _, expected = both(hidden, weight, bias, labels, reduction="sum")[0]
    leaves = [leaf(t) for t in (hidden, weight, bias)]
    for part in (slice(0, 9), slice(9, 23)):
        linear_cross_entropy(leaves[0][part], leaves[1], labels[part], bias=leaves[2], reduction="sum").backward()
    for tensor, wanted in zip(leaves, expected, strict=True):
        assert relative_error(tensor.grad, wanted) < 1e-6


def test_no_memory_is_kept_between_calls():
    hidden, weight, _, labels = inputs(9, 16, 31)
    hidden, weight = leaf(hidden), leaf(weight)
    first = None
    for _ in range(3):
        hidden.grad = weight.grad = None
        linear_cross_entropy(hidden, weight, labels).backward()
        first = weight.grad.clone() if first is None else first
        assert torch.equal(weight.grad, first)


def test_smoothed_uniform_rows_cost_log_v():
    loss = linear_cross_entropy(torch.zeros(3, 4), torch.randn(129, 4), torch.tensor([0, 64, 128]), label_smoothing=0.3)
    assert loss.item() == pytest.approx(math.log(129), rel=1e-6)


@pytest.mark.parametrize("rows", [triton_linear.ROW_BLOCK - 1, triton_linear.ROW_BLOCK])
def test_rows_are_not_made_again_because_of_what_was_in_memory(rows, monkeypatch):
    marked, finish = [], triton_linear._finish_rows

    def watched(call, part):
        marked.append(part.buffers.marked[: rows + 1].tolist())
        finish(call, part)

    monkeypatch.setattr(triton_linear, "_finish_rows", watched)
    hidden, labels = torch.ones(rows, 8), torch.zeros(rows, dtype=torch.int64)
    linear_cross_entropy(hidden, torch.ones(5, 8), labels, backend="triton")
    assert marked == [[0] * (rows + 1)]
