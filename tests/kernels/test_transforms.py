"""Ways to differentiate other than `backward`: right, or refused with a sentence; never silently zero."""

import pytest
import torch
from lcl_kernels import (
    reference_contrastive_loss,
    reference_linear_cross_entropy,
    reference_sigmoid_contrastive_loss,
)
from torch import func
from torch.autograd import forward_ad

from tests.kernels.checks import (
    contrastive_loss,
    leaf,
    linear_cross_entropy,
    relative_error,
    seeded,
    sigmoid_contrastive_loss,
    torch_alone,
)

LABELS = [0, 1, -100, 3, 2]


def linear(function, reduction):
    weight, labels = torch.randn(9, 8, generator=seeded(1)), torch.tensor(LABELS)
    return lambda hidden: function(hidden, weight.to(hidden.dtype), labels, reduction=reduction)


def contrastive(function):
    y, scale = torch.randn(5, 8, generator=seeded(1)), torch.tensor(3.0)
    return lambda x: function(x, y.to(x.dtype), scale.to(x.dtype))


def sigmoid(function):
    y, scale, bias = torch.randn(5, 8, generator=seeded(1)), torch.tensor(3.0), torch.tensor(-2.0)
    return lambda x: function(x, *(t.to(x.dtype) for t in (y, scale, bias)))


def losses_of_features():
    """(name, our loss as a function of features [5, 8], its reference)"""
    yield "mean", linear(linear_cross_entropy, "mean"), linear(reference_linear_cross_entropy, "mean")
    yield "none", linear(linear_cross_entropy, "none"), linear(reference_linear_cross_entropy, "none")
    yield "contrastive", contrastive(contrastive_loss), contrastive(reference_contrastive_loss)
    yield "sigmoid", sigmoid(sigmoid_contrastive_loss), sigmoid(reference_sigmoid_contrastive_loss)


@pytest.fixture(params=["mean", "none", "contrastive", "sigmoid"])
def losses(request, backend):
    """(our loss, its reference)"""
    return next((ours, reference) for name, ours, reference in losses_of_features() if name == request.param)


@pytest.fixture
def features():
    return torch.randn(5, 8, generator=seeded())


@pytest.mark.parametrize(
    "differentiate",
    [
        lambda f, x: func.jvp(f, (x,), (x,)),
        lambda f, x: func.jacfwd(f)(x),
        lambda f, x: func.jvp(lambda t: f(2 * t.detach() + t), (x,), (x,)),
        lambda f, x: func.jvp(func.vmap(f), (x.expand(2, -1, -1),), (x.expand(2, -1, -1),)),
        lambda f, x: func.vmap(lambda t: func.jvp(f, (t,), (t,)))(x.expand(2, -1, -1)),
    ],
)
def test_forward_mode_is_refused(differentiate, losses, features):
    with pytest.raises(RuntimeError, match="no forward-mode derivative"):
        differentiate(losses[0], features)


@torch_alone  # what is compiled is the operator, which both backends share
def test_forward_mode_is_refused_when_compiled(losses, features):
    torch.compiler.reset()
    with pytest.raises(RuntimeError, match="no forward-mode derivative"):
        torch.compile(lambda x: func.jvp(losses[0], (x,), (x,)), backend="aot_eager")(features)


@pytest.mark.parametrize("leaves", [False, True])
def test_dual_tensors_are_refused(leaves, losses, features):
    losses[0](features)
    refuse_dual(losses[0], features, leaves)


@torch_alone  # what is compiled is the operator, which both backends share
@pytest.mark.parametrize("leaves", [False, True])
def test_dual_tensors_are_refused_when_compiled(leaves, losses, features):
    torch.compiler.reset()
    loss = torch.compile(losses[0], backend="aot_eager")
    loss(features)
    refuse_dual(loss, features, leaves)


def refuse_dual(loss, features, leaves):
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(leaf(features) if leaves else features, features)
        with pytest.raises(RuntimeError, match="no forward-mode derivative"):
            loss(dual)


@pytest.mark.parametrize("transform", [func.grad, func.jacrev, func.hessian, lambda f: func.vmap(func.grad(f))])
def test_derivatives_by_torch_func_are_refused(transform, losses, features):
    features = features if transform in (func.grad, func.jacrev, func.hessian) else features.expand(2, -1, -1)
    with pytest.raises(RuntimeError, match="cannot be differentiated by torch.func"):
        transform(lambda x: losses[0](x).sum())(features)


def test_other_inputs_may_be_differentiated_in_any_way(losses, features):
    loss = losses[0]
    value, tangent = func.jvp(lambda x: loss(features).sum() + x.sum(), (features,), (features,))
    assert torch.equal(value, loss(features).sum() + features.sum())
    assert torch.equal(tangent, features.sum())
    assert torch.equal(func.grad(lambda x: loss(x.detach()).sum() + x.sum())(features), torch.ones_like(features))


def test_batches_of_upstream_gradients(losses, features):
    """`is_grads_batched`, and so `torch.autograd.functional.jacobian(vectorize=True)`."""
    results = []
    for loss, dtype in zip(losses, (torch.float32, torch.float64), strict=True):
        x = leaf(features, dtype)
        value = loss(x)
        upstream = torch.randn(4, *value.shape, generator=seeded(2)).to(dtype)
        results.append(torch.autograd.grad(value, x, upstream, is_grads_batched=True)[0])
    assert relative_error(*results) < 1e-6
    jacobians = [torch.autograd.functional.jacobian(loss, features, vectorize=True) for loss in losses]
    assert relative_error(*jacobians) < 1e-5


def test_a_batch_of_losses_and_its_gradient(losses, features):
    results = []
    for loss, transform in zip(losses, (func.vmap, lambda f: lambda xs: torch.stack([f(x) for x in xs])), strict=True):
        x = leaf(torch.stack([features, 2 * features]))
        values = transform(loss)(x)
        values.square().sum().backward()
        results.append((values, x.grad))
    for actual, wanted in zip(*results, strict=True):
        assert relative_error(actual, wanted) < 1e-5
