"""The losses inside torch.compile, and as well-behaved custom operators."""

import shutil

import pytest
import torch

from tests.kernels.checks import (
    DEVICE,
    contrastive_loss,
    leaf,
    linear_cross_entropy,
    relative_error,
    seeded,
    sigmoid_contrastive_loss,
    torch_alone,
)

pytestmark = pytest.mark.usefixtures("backend")


@pytest.fixture(autouse=True)
def _compiler():
    torch.compiler.reset()


def linear_inputs(n: int, dtype: torch.dtype = torch.float32):
    hidden = torch.randn(n, 16, generator=seeded(n), dtype=dtype)
    weight = torch.randn(31, 16, generator=seeded(1), dtype=dtype)
    labels = torch.randint(0, 31, (n,), generator=seeded(2))
    labels[::3] = -100
    return hidden, weight, labels


def gradients_of(function, tensors, *rest):
    leaves = [leaf(t) for t in tensors]
    loss = function(*leaves, *rest)
    loss.sum().backward()
    return [loss.detach(), *(t.grad for t in leaves)]


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_linear_cross_entropy_in_one_graph(reduction):
    def step(hidden, weight, labels):
        loss = linear_cross_entropy(hidden * 2, weight, labels, reduction=reduction, z_loss=1e-3, softcap=20.0)
        return loss * 3

    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend="aot_eager")
    for n in (9, 14, 30):  # the number of rows is dynamic
        hidden, weight, labels = linear_inputs(n)
        expected = gradients_of(step, (hidden, weight), labels)
        for actual, wanted in zip(gradients_of(compiled, (hidden, weight), labels), expected, strict=True):
            assert relative_error(actual, wanted) < 1e-6


OPTIONS = {
    "normalizer": [12.0, 13.5, 7, 1],
    "z_loss": [1e-4, 1e-3, 0.0],
    "softcap": [30.0, 20.5, None, 1e35],
    "label_smoothing": [0.1, 0.2, 0.0],
    "workspace_mb": [1.0, 2.5, 3],
    "ignore_index": [-100, -7, 31],
}


@torch_alone  # what is compiled is the operator, which both backends share
@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("dynamic", [None, True])  # a constant that becomes a variable, and a variable from the start
def test_options_that_change_from_call_to_call_stay_in_one_graph(option, dynamic):
    def step(hidden, weight, labels, value):
        return linear_cross_entropy(hidden, weight, labels, **{option: value})

    compiled = torch.compile(step, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for value in OPTIONS[option]:
        hidden, weight, labels = linear_inputs(12)
        if option == "ignore_index":
            labels[::3] = value
        expected = gradients_of(step, (hidden, weight), labels, value)
        for actual, wanted in zip(gradients_of(compiled, (hidden, weight), labels, value), expected, strict=True):
            assert relative_error(actual, wanted) < 1e-6


@pytest.mark.parametrize(("known", "label_smoothing"), [(False, 0.1), (True, 0.0)])
def test_sequences_with_weights_and_all_that_can_be_read_in_one_graph(known, label_smoothing):
    def step(hidden, weight, labels, token_weight, class_weight, counted):
        loss, statistics = linear_cross_entropy(
            hidden, weight, labels, shift=1, token_weight=token_weight, class_weight=class_weight,
            label_smoothing=label_smoothing, counted_rows=counted, return_statistics=True, return_predicted=True,
            differentiable_lse=True,
        )  # fmt: skip
        return loss + 0.1 * statistics.lse.square().sum() + (statistics.predicted == labels[..., 1:]).sum()

    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend="aot_eager")
    for n in (12, 18):
        hidden, weight, labels = linear_inputs(n)
        labels = labels.view(3, -1)
        weights = torch.rand(labels.shape, generator=seeded(3)), torch.rand(len(weight), generator=seeded(4))
        arguments = (labels, *weights, int((labels[:, 1:] != -100).sum()) if known else None)
        expected = gradients_of(step, (hidden.view(3, -1, 16), weight), *arguments)
        actual = gradients_of(compiled, (hidden.view(3, -1, 16), weight), *arguments)
        for value, wanted in zip(actual, expected, strict=True):
            assert relative_error(value, wanted) < 1e-6


@pytest.mark.parametrize("dynamic", [None, True])
def test_a_normalizer_of_zero_in_one_graph(dynamic):
    compiled = torch.compile(
        lambda h, w, y, n: linear_cross_entropy(h, w, y, normalizer=n),
        fullgraph=True,
        dynamic=dynamic,
        backend="aot_eager",
    )
    hidden, weight, labels = linear_inputs(12)
    assert compiled(hidden, weight, torch.full_like(labels, -100), 0.0) == 0
    if DEVICE == "cpu":  # on a GPU a device assertion, which ends the CUDA context
        with pytest.raises(RuntimeError, match="normalizer is 0, but labels count"):
            compiled(hidden, weight, labels, 0.0)


def test_contrastive_loss_in_one_graph():
    def step(x, y, log_scale):
        x, y = (torch.nn.functional.normalize(t, dim=1) for t in (x, y))
        return contrastive_loss(x, y, log_scale.exp()) * 0.1

    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend="aot_eager")
    for m in (7, 12):
        x, y = (torch.randn(m, 8, generator=seeded(s)) for s in (m, m + 1))
        tensors = x, y, torch.tensor([2.5])
        expected = gradients_of(step, tensors)
        for actual, wanted in zip(gradients_of(compiled, tensors), expected, strict=True):
            assert relative_error(actual, wanted) < 1e-6


def test_sigmoid_contrastive_loss_in_one_graph():
    def step(x, y, log_scale, bias):
        x, y = (torch.nn.functional.normalize(t, dim=1) for t in (x, y))
        return sigmoid_contrastive_loss(x, y, log_scale.exp(), bias * 2) * 0.1

    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend="aot_eager")
    for m in (7, 12):
        x, y = (torch.randn(m, 8, generator=seeded(s)) for s in (m, m + 1))
        tensors = x, y, torch.tensor([2.5]), torch.tensor(-5.0)
        expected = gradients_of(step, tensors)
        for actual, wanted in zip(gradients_of(compiled, tensors), expected, strict=True):
            assert relative_error(actual, wanted) < 1e-6


@pytest.mark.skipif(DEVICE == "cpu" and not shutil.which("g++"), reason="on a CPU inductor needs a C++ compiler")
def test_inductor():
    compiled = torch.compile(lambda h, w, y: linear_cross_entropy(h * 2, w, y), fullgraph=True)
    hidden, weight, labels = linear_inputs(40)
    expected = gradients_of(lambda h, w, y: linear_cross_entropy(h * 2, w, y), (hidden, weight), labels)
    for actual, wanted in zip(gradients_of(compiled, (hidden, weight), labels), expected, strict=True):
        assert relative_error(actual, wanted) < 1e-5


@pytest.mark.parametrize("gradients", [(True, True, False), (False, False, False)])
def test_the_linear_operators_keep_the_rules_of_torch(gradients, backend):
    hidden, weight, labels = linear_inputs(6)
    settings = (1, -100, None, 1e-3, 20.0, 0.1, True, True, torch.float32, backend == "triton", 1.0)
    leaves = [leaf(hidden), leaf(weight), None, labels] if any(gradients) else [hidden, weight, None, labels]
    leaves += [torch.rand(labels.shape), torch.rand(len(weight))]
    checks = ("test_schema", "test_faketensor", "test_autograd_registration")
    operator = torch.ops.lcl_kernels.linear_cross_entropy_sum_waiting
    torch.library.opcheck(operator, (*leaves, None, *settings, *gradients), test_utils=checks)
    torch.library.opcheck(
        torch.ops.lcl_kernels.linear_cross_entropy_rows_waiting, (*leaves, *settings), test_utils=checks
    )


def test_the_contrastive_operator_keeps_the_rules_of_torch(backend):
    x, y = (leaf(torch.randn(5, 8, generator=seeded(s))) for s in (0, 1))
    scale = torch.tensor([3.0], requires_grad=True)
    checks = ("test_schema", "test_faketensor", "test_autograd_registration", "test_aot_dispatch_dynamic")
    for given in ((None, None), (torch.tensor([3, 1, 3, 2, 1]), torch.arange(5.0))):
        options = ("ignore", None, "auto", given[0] is not None)
        settings = (*given, "", "global", "none", *options, backend == "triton", 1.0, True, True, True)
        torch.library.opcheck(torch.ops.lcl_kernels.contrastive, (x, y, scale, *settings), test_utils=checks)


def test_the_sigmoid_operator_keeps_the_rules_of_torch(backend):
    x, y = (leaf(torch.randn(5, 8, generator=seeded(s))) for s in (0, 1))
    scale, bias = torch.tensor([3.0], requires_grad=True), torch.tensor(-5.0, requires_grad=True)
    settings = ("", None, "auto", backend == "triton", 1.0, True, True, True, True)
    checks = ("test_schema", "test_faketensor", "test_autograd_registration", "test_aot_dispatch_dynamic")
    operator = torch.ops.lcl_kernels.sigmoid_contrastive
    waiting = torch.ops.lcl_kernels.sigmoid_contrastive_waiting.default
    unsafe = torch.Tag.cudagraph_unsafe
    assert [unsafe in variant.tags for variant in (operator.default, waiting)] == [False, True]
    torch.library.opcheck(operator, (x, y, scale, bias, *settings), test_utils=checks)
