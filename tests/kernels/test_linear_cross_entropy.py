import itertools
import math
import sys

import pytest
import torch
import torch.nn.functional as F
from lcl_kernels import reference_linear_cross_entropy

from tests.kernels.checks import DEVICE, few_rows, leaf, linear_cross_entropy, memory_of, relative_error, seeded

pytestmark = pytest.mark.usefixtures("backend")
on_cpu = pytest.mark.skipif(DEVICE == "cuda", reason="on a GPU an assertion that ends the context, or no interpreter")

BARS = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 4e-3, torch.float16: 4e-3}


def inputs(n=23, h=16, v=31, *, dtype=torch.float32, ignored=0.4, spread=1.0, seed=0):
    """hidden, weight, bias and labels, about `ignored` of which are -100."""
    generator = seeded(seed)
    hidden = torch.randn(n, h, generator=generator, dtype=torch.float64)
    weight = torch.randn(v, h, generator=generator, dtype=torch.float64) * spread / math.sqrt(h)
    bias = torch.randn(v, generator=generator, dtype=torch.float64)
    labels = torch.randint(0, v, (n,), generator=generator)
    labels[torch.rand(n, generator=generator) < ignored] = -100
    return hidden.to(dtype), weight.to(dtype), bias.to(dtype), labels


def both(hidden, weight, bias, labels, upstream=None, workspace_mb=None, counted_rows=None, **options):
    """(loss, gradients) of the kernel, and of the reference in float64 on the same values."""
    results = []
    for function, dtype in ((linear_cross_entropy, hidden.dtype), (reference_linear_cross_entropy, torch.float64)):
        leaves = [leaf(tensor, dtype) for tensor in (hidden, weight, bias)]
        extra = {"workspace_mb": workspace_mb, "counted_rows": counted_rows}
        extra = extra if function is linear_cross_entropy else {}
        loss = function(leaves[0], leaves[1], labels, bias=leaves[2], **options, **extra)
        loss.backward(torch.ones_like(loss) if upstream is None else upstream.to(loss.dtype))
        results.append((loss, [t.grad for t in leaves if t is not None]))
    return results


def check(*args, bar=None, **options):
    dtype = args[0].dtype
    (loss, gradients), (expected, expected_gradients) = both(*args, **options)
    assert loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert relative_error(loss, expected) < min(BARS[dtype], 1e-5)
    for actual, wanted in zip(gradients, expected_gradients, strict=True):
        assert actual.dtype == dtype
        assert relative_error(actual, wanted) < (bar or BARS[dtype])


def options_by_dtype():
    """Every set of options in float32; in other dtypes half of them, in which any three are on and off in every way."""
    for dtype, (use_bias, capped, z_loss, smoothed) in itertools.product(BARS, itertools.product([0, 1], repeat=4)):
        if dtype == torch.float32 or (use_bias + capped + z_loss + smoothed) % 2 == 0:
            yield (
                dtype,
                use_bias,
                dict(softcap=capped * 2.0 or None, z_loss=z_loss * 0.1, label_smoothing=smoothed * 0.1),
            )


@pytest.mark.parametrize(("dtype", "use_bias", "options"), options_by_dtype(), ids=str)
def test_equals_the_reference_with_every_option(dtype, use_bias, options):
    hidden, weight, bias, labels = inputs(dtype=dtype)
    arguments = hidden, weight, bias if use_bias else None, labels
    check(*arguments, **options, reduction="mean")
    check(*arguments, **options, reduction="none")
    check(*arguments, **options, reduction="sum", workspace_mb=few_rows())


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_numerical_gradients(reduction):
    hidden, weight, bias, labels = inputs(5, 3, 7, dtype=torch.float64)
    assert torch.autograd.gradcheck(
        lambda h, w, b: linear_cross_entropy(
            h, w, labels, bias=b, z_loss=0.1, softcap=2.0, reduction=reduction, workspace_mb=few_rows()
        ),
        (leaf(hidden), leaf(weight), leaf(bias)),
    )


@pytest.mark.parametrize("v", [1, 2, 31, 127, 129, 1001])
@pytest.mark.parametrize("n", [1, 2, 65])
def test_sizes(n, v):
    hidden, weight, bias, labels = inputs(n, 8, v, ignored=0.0)
    (loss, gradients), (expected, expected_gradients) = both(hidden, weight, bias, labels)
    assert torch.allclose(loss.double(), expected, rtol=1e-5, atol=1e-7)
    for actual, wanted in zip(gradients, expected_gradients, strict=True):
        assert torch.allclose(actual.double(), wanted, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("rows_per_chunk", [1, 2, 12, 13, 14, 22, 23, 24])
def test_every_chunk_size_gives_the_same(rows_per_chunk, backend):
    if backend == "triton" and DEVICE == "cpu" and rows_per_chunk < 12:
        pytest.skip("too many launches for the interpreter")
    hidden, weight, bias, labels = inputs(ignored=0.0)
    workspace = (rows_per_chunk + 0.5) * len(weight) * 4 / 2**20
    check(hidden, weight, bias, labels, workspace_mb=workspace)


def test_padding_rows_change_nothing():
    hidden, weight, _, labels = inputs(ignored=0.0)
    plain = both(hidden, weight, None, labels)[0]
    padded_hidden = torch.cat([hidden, torch.full((9, hidden.shape[1]), torch.nan)])
    padded_labels = F.pad(labels, (0, 9), value=-100)
    padded = both(padded_hidden, weight, None, padded_labels)[0]
    assert torch.equal(plain[0], padded[0])
    assert torch.equal(plain[1][0], padded[1][0][: len(hidden)])
    assert torch.equal(padded[1][0][len(hidden) :], torch.zeros(9, hidden.shape[1]))
    assert torch.equal(plain[1][1], padded[1][1])


@pytest.mark.parametrize("ignore_index", [-100, 0, 30, 31, 1000])
def test_ignored_labels_stay_in_the_softmax(ignore_index):
    hidden, weight, bias, labels = inputs()
    labels = torch.where(labels == -100, ignore_index, labels)
    check(hidden, weight, bias, labels, ignore_index=ignore_index)


@pytest.mark.parametrize("make", [float, torch.tensor, lambda n: torch.tensor([n]), lambda n: torch.tensor(int(n))])
def test_normalizer_replaces_the_count(make):
    hidden, weight, bias, labels = inputs()
    normalizer = make(57.0)
    summed = linear_cross_entropy(hidden, weight, labels, bias=bias, reduction="sum")
    assert torch.allclose(
        linear_cross_entropy(hidden, weight, labels, bias=bias, normalizer=normalizer), summed / 57, rtol=1e-6
    )
    check(hidden, weight, bias, labels, normalizer=normalizer)


@pytest.mark.parametrize("upstream", [1.0, 3.5, 0.0, -2.0])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_upstream_gradient(upstream, reduction):
    check(*inputs(), upstream=torch.tensor(upstream), reduction=reduction)


def test_upstream_gradient_per_row():
    upstream = torch.randn(23, generator=seeded(1))
    for workspace in (None, few_rows()):
        check(*inputs(), upstream=upstream, reduction="none", z_loss=0.1, workspace_mb=workspace)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("n", [0, 5])
@pytest.mark.parametrize("normalizer", [None, 0, torch.tensor(0.0)])
def test_no_counted_row_gives_zero_with_zero_gradients(n, reduction, normalizer):
    hidden, weight, bias = (leaf(tensor) for tensor in inputs(n)[:3])
    labels = torch.full((n,), -100)
    options = {"normalizer": normalizer} if reduction == "mean" else {}
    loss = linear_cross_entropy(hidden, weight, labels, bias=bias, z_loss=0.1, reduction=reduction, **options)
    assert loss.requires_grad
    assert torch.equal(loss.detach(), torch.zeros(n if reduction == "none" else ()))
    loss.sum().backward()
    for tensor in (hidden, weight, bias):
        assert torch.equal(tensor.grad, torch.zeros_like(tensor))


def test_statistics_on_request():
    hidden, weight, bias, labels = inputs()
    counted = labels != -100
    logits = F.linear(hidden, weight, bias)
    lse = logits.logsumexp(1).where(counted, 0)
    rank = (logits > logits.gather(1, labels.clamp(min=0)[:, None])).sum(1).where(counted, -1)
    options = dict(bias=bias, z_loss=0.1, return_statistics=True)
    loss, statistics = linear_cross_entropy(leaf(hidden), weight, labels, **options)
    assert torch.allclose(statistics.lse, lse, atol=1e-6)
    assert torch.equal(statistics.rank, rank)
    assert torch.allclose(statistics.z_loss, 0.1 * lse.square().sum() / counted.sum())
    assert torch.allclose(loss - statistics.z_loss, linear_cross_entropy(hidden, weight, labels, bias=bias))
    assert loss.requires_grad
    assert not any(tensor.requires_grad for tensor in statistics[:4])
    assert statistics.predicted is None
    row_loss, of_rows = linear_cross_entropy(hidden, weight, labels, reduction="none", **options)
    assert torch.equal(statistics.row_loss, row_loss)
    assert torch.allclose(of_rows.z_loss, 0.1 * lse.square(), atol=1e-6)
    assert torch.equal(of_rows.rank, rank)


@pytest.mark.parametrize("gap", [8.0, 12.0, 15.0])
def test_losses_of_confident_rows_keep_their_digits(gap):
    """lse - logit would give 0 or noise: float32 near the logit resolves 1e-6, the loss at a gap of 15 is 3e-6."""
    hidden, _, _, labels = inputs(16, 8, 8, ignored=0.0)
    weight = torch.eye(8)
    hidden = (gap * torch.eye(8))[labels] + 20.0
    (loss, gradients), (expected, expected_gradients) = both(hidden, weight, None, labels)
    assert relative_error(loss, expected) < 1e-5
    for actual, wanted in zip(gradients, expected_gradients, strict=True):
        assert relative_error(actual, wanted) < 1e-5


@pytest.mark.filterwarnings("ignore:overflow encountered in exp2")
@pytest.mark.parametrize("gap", [60.0, 100.0, 300.0, 1e4])
def test_very_wrong_rows_stay_finite(gap):
    hidden, weight = torch.eye(4) * gap, torch.eye(4)
    check(hidden, weight, None, torch.tensor([1, 2, 3, 0]), z_loss=1e-4)
    check(-hidden, weight, None, torch.tensor([0, 1, 2, 3]))


def test_uniform_rows_cost_log_v():
    loss = linear_cross_entropy(torch.zeros(3, 4), torch.randn(129, 4), torch.tensor([0, 64, 128]))
    assert loss.item() == pytest.approx(math.log(129), rel=1e-6)


def test_a_bad_row_stays_in_its_row():
    hidden, weight, _, labels = inputs(ignored=0.0)
    expected = linear_cross_entropy(hidden, weight, labels, reduction="none")
    hidden[3] = torch.nan
    loss = linear_cross_entropy(hidden, weight, labels, reduction="none")
    assert loss[3].isnan()
    others = torch.arange(len(labels)) != 3
    assert torch.allclose(loss[others], expected[others])


@pytest.mark.parametrize("wanted", itertools.product([False, True], repeat=3))
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_only_wanted_gradients_are_made(wanted, reduction):
    hidden, weight, bias, labels = inputs()
    expected = both(hidden, weight, bias, labels, reduction=reduction)[0][1]
    tensors = [t.clone().requires_grad_(want) for t, want in zip((hidden, weight, bias), wanted, strict=True)]
    loss = linear_cross_entropy(tensors[0], tensors[1], labels, bias=tensors[2], reduction=reduction).sum()
    assert loss.requires_grad == any(wanted)
    if any(wanted):
        loss.backward()
    for tensor, want, gradient in zip(tensors, wanted, expected, strict=True):
        assert torch.equal(tensor.grad, gradient) if want else tensor.grad is None


def test_a_kept_graph_can_be_used_again():
    for reduction in ("mean", "none"):
        hidden, weight, _, labels = inputs()
        hidden, weight = leaf(hidden), leaf(weight)
        loss = linear_cross_entropy(hidden, weight, labels, reduction=reduction).sum()
        loss.backward(retain_graph=True)
        first = [hidden.grad.clone(), weight.grad.clone()]
        (2 * loss).backward()
        assert torch.allclose(hidden.grad, 3 * first[0])
        assert torch.allclose(weight.grad, 3 * first[1])


def test_a_tied_weight_collects_both_gradients():
    _, weight, _, labels = inputs()
    tokens = torch.arange(len(labels)) % len(weight)
    tied, plain = leaf(weight), leaf(weight)
    (linear_cross_entropy(tied[tokens], tied, labels)).backward()
    reference_linear_cross_entropy(plain[tokens], plain, labels).backward()
    assert relative_error(tied.grad, plain.grad) < 1e-5


def test_strides_and_label_dtypes():
    hidden, weight, bias, labels = inputs(46, 16, 31)
    expected = linear_cross_entropy(hidden[::2].contiguous(), weight, labels[::2].contiguous(), bias=bias)
    assert torch.equal(linear_cross_entropy(hidden[::2], weight, labels[::2].int(), bias=bias), expected)
    transposed = weight.t().contiguous().t()
    assert torch.allclose(
        linear_cross_entropy(hidden.t().contiguous().t()[::2], transposed, labels[::2], bias=bias), expected
    )
    row = torch.randn(1, 16).expand(5, 16)
    assert torch.isfinite(linear_cross_entropy(row, weight, torch.arange(5)))


def test_same_bits_every_time():
    first = both(*inputs(64, 32, 301))[0]
    for _ in range(3):
        loss, gradients = both(*inputs(64, 32, 301))[0]
        assert torch.equal(loss, first[0])
        assert all(torch.equal(a, b) for a, b in zip(gradients, first[1], strict=True))


def test_bfloat16_weight_gradient_is_summed_in_float32():
    """Many chunks of one row each: sums kept in bfloat16 would lose most of what they add."""
    hidden, weight, _, labels = inputs(200, 8, 5, dtype=torch.bfloat16, ignored=0.0)
    check(hidden, weight, None, labels, workspace_mb=few_rows())


def test_autocast_casts_as_a_linear_layer_does():
    hidden, weight, bias, labels = inputs()
    weight = leaf(weight)
    with torch.autocast(DEVICE, torch.bfloat16):
        loss = linear_cross_entropy(hidden, weight, labels, bias=bias)
        loss.backward()
    low = [t.detach().bfloat16() for t in (hidden, weight, bias)]
    assert torch.equal(loss, linear_cross_entropy(low[0], low[1], labels, bias=low[2]))
    assert weight.grad.dtype == torch.float32


def memory_of_a_step(megabytes, *, n=384, v=512, gradients=True, **options):
    """All that a call with its backward allocates, float32: logits of all rows would be 0.75 MB."""
    hidden, weight, bias, labels = inputs(n, 8, v, ignored=0.0)
    if gradients:
        hidden, weight, bias = leaf(hidden), leaf(weight), leaf(bias)

    def step():
        options.setdefault("return_statistics", True)
        loss, _ = linear_cross_entropy(hidden, weight, labels, bias=bias, workspace_mb=megabytes, **options)
        if gradients:
            loss.sum().backward()

    return memory_of(step)


@pytest.mark.parametrize(
    "options",
    [{}, {"reduction": "none"}, {"softcap": 2.0, "label_smoothing": 0.1}],
    ids=str,
)
def test_no_more_than_the_workspace_is_kept_of_the_logits(options):
    """Three chunks of 128 rows. Two of them at once, or anything else of the size of one, would not fit."""
    megabytes, other = 0.28, 0.2
    memory = memory_of_a_step(megabytes, **options)
    assert memory.peak < (megabytes + other) * 2**20
    assert memory.elements <= megabytes * 2**20 / 4


def test_a_larger_workspace_is_used_and_seen():
    """Were the measure blind to what happens inside of the operator, the tests beside this one would mean nothing."""
    memory = memory_of_a_step(1e6)
    assert memory.elements >= 384 * 512
    assert memory.peak >= 384 * 512 * 4


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_without_gradients_there_is_no_gradient_workspace(context, backend):
    hidden, weight, bias, labels = inputs(64, 16, 127, ignored=0.0)
    expected = linear_cross_entropy(leaf(hidden), leaf(weight), labels, bias=bias)
    with context():
        loss = linear_cross_entropy(leaf(hidden), leaf(weight), labels, bias=bias)
        memory = memory_of_a_step(0.05 if backend == "torch" else 1e6, gradients=False)
    assert not loss.requires_grad
    assert torch.allclose(loss, expected)
    assert memory.peak < 0.15 * 2**20


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_second_derivatives_are_refused(reduction):
    hidden, weight, _, labels = inputs()
    hidden = leaf(hidden)
    loss = linear_cross_entropy(hidden, weight, labels, reduction=reduction).sum()
    with pytest.raises(RuntimeError, match="differentiated once only"):
        torch.autograd.grad(loss, hidden, create_graph=True)


@pytest.mark.parametrize("value", [31, -1, 2**31 + 3])
def test_label_out_of_range(value):
    hidden, weight, _, labels = inputs()
    labels[7] = labels[11] = value
    with pytest.raises(ValueError, match=rf"labels\[7\] = {value} is outside \[0, 31\)"):
        linear_cross_entropy(hidden, weight, labels)


class FakeDTensor(torch.Tensor):
    """Stands for DTensor, which needs a process group."""


def test_unusable_arguments_are_named(monkeypatch):
    hidden, weight, bias, labels = inputs()

    def refused(match, *args, error=ValueError, **options):
        with pytest.raises(error, match=match):
            linear_cross_entropy(*args, **options)

    refused("weight is empty: under ZeRO-3", hidden, torch.empty(0), labels)
    refused("weight is empty", hidden, weight[:0], labels)
    refused(r"hidden must be \[\.\.\., H\]", hidden[:, :8], weight, labels)
    refused(r"labels must have the dimensions of hidden but the last, \[1, 23\]", hidden[None], weight, labels)
    refused(r"labels must have the dimensions .* \[23\], got \[22\]", hidden, weight, labels[1:])
    refused("bias must be", hidden, weight, labels, bias=bias[1:])
    refused("labels must be int64", hidden, weight, labels.float())
    refused("hidden must have one of the dtypes float32, .*, got torch.int64", hidden.long(), weight, labels)
    refused("dtypes do not match: hidden torch.float32, weight torch.bfloat16", hidden, weight.bfloat16(), labels)
    refused("dtypes do not match", hidden, weight, labels, bias=bias.double())
    refused("devices do not match", hidden, weight.to("meta"), labels)
    refused("reduction must be", hidden, weight, labels, reduction="max")
    refused("no meaning with 'sum'", hidden, weight, labels, reduction="sum", normalizer=3)
    refused("normalizer must be", hidden, weight, labels, normalizer=-1)
    refused("normalizer must be", hidden, weight, labels, normalizer=math.nan)
    refused("normalizer must have one element", hidden, weight, labels, normalizer=torch.ones(2))
    refused("normalizer is 0, but", hidden, weight, labels, normalizer=0)
    for value in (0.0, -1.0, 1e-45, math.nan):
        refused("softcap must be positive", hidden, weight, labels, softcap=value)
    for value in (None, -100.0, "no"):
        refused("ignore_index must be an integer", hidden, weight, labels, ignore_index=value)
    refused("ignore_index must fit into int64", hidden, weight, labels, ignore_index=2**63)
    for dtype in (torch.uint8, torch.int16, torch.bool):
        refused("labels must be int64 or int32", hidden, weight, labels.clamp(min=0).to(dtype))
    for value in (-0.1, math.inf, math.nan):
        refused("z_loss must be finite and must not be negative", hidden, weight, labels, z_loss=value)
    refused("workspace_mb must be positive", hidden, weight, labels, workspace_mb=0)
    refused("backend must be", hidden, weight, labels, backend="cuda")
    refused("label_smoothing must be", hidden, weight, labels, label_smoothing=1.1)
    refused(r"counted_rows must be in \[0, 23\]", hidden, weight, labels, counted_rows=24)
    refused("no float64 kernels", hidden.double(), weight.double(), labels, backend="triton")

    fake = type(sys)("torch.distributed.tensor")
    fake.DTensor = FakeDTensor
    monkeypatch.setitem(sys.modules, "torch.distributed.tensor", fake)
    refused("weight is a DTensor", hidden, weight.as_subclass(FakeDTensor), labels)
