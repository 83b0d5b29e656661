"""How exact the losses are where others lose their digits; float64 on the same rounded inputs is the truth.

``python -m tests.kernels.test_numerics`` prints the errors as a table.
"""

import math

import pytest
import torch
import torch.nn.functional as F
from lcl_kernels import (
    reference_contrastive_loss,
    reference_linear_cross_entropy,
    reference_sigmoid_contrastive_loss,
)
from lcl_kernels import torch_linear_cross_entropy as torch_linear
from lcl_kernels import triton_linear_cross_entropy as triton_linear
from lcl_kernels.sweep import Counted, Inputs, Options, Wanted, empty_rows
from torch import Tensor

from tests.kernels.checks import (
    DEVICE,
    contrastive_loss,
    leaf,
    linear_cross_entropy,
    relative_error,
    running,
    seeded,
    sigmoid_contrastive_loss,
)

REGIMES = {  # how far the target stands above the other logits, in nats, and their spread
    "random, spread 1": (0.0, 1.0),
    "random, spread 3": (0.0, 3.0),
    "trained, loss about 2": (8.0, 3.0),
    "trained, loss about 1e-3": (19.0, 3.0),
    (NEARLY_CERTAIN := "trained, loss about 1e-7"): (27.0, 3.0),
}
PAIRS = {  # noise between the two features of a pair, scale
    "learned, scale 14.3": (0.6, 14.3),
    "faint, scale 14.3": (2.0, 14.3),
    "learned, below the safe bound": (1.2, 39.9),
    "learned, above the safe bound": (1.2, 40.1),
    "learned, scale 100": (1.5, 100.0),
    "faint, scale 100": (2.0, 100.0),
}
SIGMOID_PAIRS = {  # noise between the two features of a pair, scale, bias
    "start, scale 10, bias -10": (2.0, 10.0, -10.0),
    "learned, scale 14.3, bias -10": (0.6, 14.3, -10.0),
    "faint, scale 100, bias -10": (2.0, 100.0, -10.0),
    (CERTAIN_PAIRS := "learned, scale 100, bias -60"): (0.4, 100.0, -60.0),
    "without a bias, scale 14.3": (0.6, 14.3, 0.0),
}
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
BARS = {torch.float32: 1e-5, torch.bfloat16: 3e-3, torch.float16: 5e-4}
"""Of gradients in the dtype of the inputs. Rounding exact gradients to bfloat16 alone costs 1.7e-3."""


def tokens(gap: float, spread: float, dtype: torch.dtype, n: int = 48, h: int = 64, v: int = 500):
    """hidden, weight and labels of rows whose target logit is about `gap` above the mean."""
    weight = torch.randn(v, h, generator=seeded(), dtype=torch.float64)
    labels = torch.randint(0, v, (n,), generator=seeded(1))
    hidden = torch.randn(n, h, generator=seeded(2), dtype=torch.float64) * spread / math.sqrt(h)
    hidden += gap * weight[labels] / weight[labels].square().sum(1, keepdim=True)
    return hidden.to(dtype), weight.to(dtype), labels


def dense_linear(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """What users have: logits in the dtype of the inputs, cross entropy in float32."""
    return F.cross_entropy(F.linear(hidden, weight).float(), labels)


def float32_linear_gradients(hidden: Tensor, weight: Tensor, labels: Tensor) -> list[Tensor]:
    """Gradients of the sum of the losses as the operator makes them, before they are rounded to the input dtype."""
    inputs = Inputs(hidden, weight, None, labels)
    options, backend = Options(), triton_linear if running.backend == "triton" else torch_linear
    rows_made = empty_rows(inputs, options)
    scan = backend.scan(inputs, options, len(labels), rows_made)
    return list(backend.sweep(inputs, Counted(scan.rows, scan.labels), options, Wanted(True, True), rows_made)[:2])


def features(noise: float, dtype: torch.dtype, m: int = 200, d: int = 64) -> tuple[Tensor, Tensor]:
    x = torch.randn(m, d, generator=seeded(), dtype=torch.float64)
    y = x + noise * torch.randn(m, d, generator=seeded(1), dtype=torch.float64)
    return F.normalize(x, dim=1).to(dtype), F.normalize(y, dim=1).to(dtype)


def dense_contrastive(x: Tensor, y: Tensor, scale: Tensor) -> Tensor:
    logits = scale.to(x.dtype) * x @ y.t()
    target = torch.arange(len(x))
    return (F.cross_entropy(logits.float(), target) + F.cross_entropy(logits.t().float(), target)) / 2


def dense_sigmoid(x: Tensor, y: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    logits = scale.to(x.dtype) * x @ y.t() + bias.to(x.dtype)
    return -F.logsigmoid((2 * torch.eye(len(x)) - 1) * logits.float()).sum() / len(x)


def errors(function, truth, tensors: list[Tensor], *rest) -> list[float]:
    """Relative errors of the loss and of the gradients of `tensors`."""
    results = []
    for f, dtype in ((function, None), (truth, torch.float64)):
        leaves = [leaf(t, dtype) for t in tensors]
        constants = [c.double() if f is truth and c.is_floating_point() else c for c in rest]
        loss = f(*leaves, *constants)
        loss.backward()
        results.append([loss, *(t.grad for t in leaves)])
    return [relative_error(a, b) for a, b in zip(*results, strict=True)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("regime", REGIMES)
def test_linear_cross_entropy(regime, dtype, backend):
    if dtype == torch.float16 and regime == NEARLY_CERTAIN:
        pytest.skip("gradients below the range of float16")
    hidden, weight, labels = tokens(*REGIMES[regime], dtype)
    ours = errors(linear_cross_entropy, reference_linear_cross_entropy, [hidden, weight], labels)
    dense = errors(dense_linear, reference_linear_cross_entropy, [hidden, weight], labels)
    assert ours[0] < 1e-5
    for mine, theirs in zip(ours[1:], dense[1:], strict=True):
        assert mine < BARS[dtype]
        assert mine < max(1.2 * theirs, 1e-6)


@pytest.mark.parametrize("regime", REGIMES)
def test_bfloat16_gradients_before_rounding(regime, backend):
    hidden, weight, labels = tokens(*REGIMES[regime], torch.bfloat16)
    leaves = [leaf(hidden, torch.float64), leaf(weight, torch.float64)]
    reference_linear_cross_entropy(*leaves, labels, reduction="sum").backward()
    for actual, tensor in zip(float32_linear_gradients(hidden, weight, labels), leaves, strict=True):
        assert relative_error(actual, tensor.grad) < 2e-3


def test_dense_bfloat16_logits_lose_what_we_keep(backend):
    hidden, weight, labels = tokens(*REGIMES[NEARLY_CERTAIN], torch.bfloat16)
    dense = errors(dense_linear, reference_linear_cross_entropy, [hidden, weight], labels)
    ours = errors(linear_cross_entropy, reference_linear_cross_entropy, [hidden, weight], labels)
    assert min(dense) > 1e-2
    assert max(ours) < 3e-3

    noise, scale = PAIRS["faint, scale 100"]
    x, y = features(noise, torch.bfloat16)
    dense = errors(dense_contrastive, reference_contrastive_loss, [x, y], torch.tensor(scale))
    ours = errors(contrastive_loss, reference_contrastive_loss, [x, y], torch.tensor(scale))
    assert min(dense[1:]) > 1e-2
    assert max(ours[1:]) < 2e-3


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", PAIRS)
def test_contrastive(case, dtype, backend):
    noise, scale = PAIRS[case]
    x, y = features(noise, dtype)
    ours = errors(contrastive_loss, reference_contrastive_loss, [x, y], torch.tensor(scale))
    dense = errors(dense_contrastive, reference_contrastive_loss, [x, y], torch.tensor(scale))
    assert ours[0] < 2e-5
    for mine, theirs in zip(ours[1:], dense[1:], strict=True):
        assert mine < BARS[dtype]
        assert mine < max(1.2 * theirs, 3e-6)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", SIGMOID_PAIRS)
def test_sigmoid(case, dtype, backend):
    if dtype == torch.float16 and case == CERTAIN_PAIRS:
        pytest.skip("gradients below the range of float16")
    noise, *scalars = SIGMOID_PAIRS[case]
    inputs = [list(features(noise, dtype)), *(torch.tensor(s) for s in scalars)]
    ours = errors(sigmoid_contrastive_loss, reference_sigmoid_contrastive_loss, *inputs)
    dense = errors(dense_sigmoid, reference_sigmoid_contrastive_loss, *inputs)
    assert ours[0] < 5e-6
    for mine, theirs in zip(ours[1:], dense[1:], strict=True):
        assert mine < BARS[dtype]
        assert mine < max(1.2 * theirs, 5e-6)


def main() -> None:
    print(
        "relative errors of the loss and of both gradients against float64; in brackets dense, logits in the dtype of"
    )
    print("the inputs; last, for bfloat16, our gradients in float32, before they are rounded to bfloat16")
    for backend in ("torch", "triton"):
        running.backend = backend
        for dtype in DTYPES:
            for regime, setting in REGIMES.items():
                inputs = tokens(*setting, dtype)
                mine = errors(linear_cross_entropy, reference_linear_cross_entropy, list(inputs[:2]), inputs[2])
                theirs = errors(dense_linear, reference_linear_cross_entropy, list(inputs[:2]), inputs[2])
                _show("linear", backend, dtype, regime, mine, theirs, _before_rounding(*inputs))
            for case, (noise, scale) in PAIRS.items():
                x, y = features(noise, dtype)
                mine = errors(contrastive_loss, reference_contrastive_loss, [x, y], torch.tensor(scale))
                theirs = errors(dense_contrastive, reference_contrastive_loss, [x, y], torch.tensor(scale))
                _show("contrastive", backend, dtype, case, mine, theirs, [])
            for case, (noise, *scalars) in SIGMOID_PAIRS.items():
                arguments = [list(features(noise, dtype)), *(torch.tensor(s) for s in scalars)]
                mine = errors(sigmoid_contrastive_loss, reference_sigmoid_contrastive_loss, *arguments)
                theirs = errors(dense_sigmoid, reference_sigmoid_contrastive_loss, *arguments)
                _show("sigmoid", backend, dtype, case, mine, theirs, [])


def _before_rounding(hidden: Tensor, weight: Tensor, labels: Tensor) -> list[float]:
    if hidden.dtype != torch.bfloat16:
        return []
    leaves = [leaf(hidden, torch.float64), leaf(weight, torch.float64)]
    reference_linear_cross_entropy(*leaves, labels, reduction="sum").backward()
    made = float32_linear_gradients(hidden, weight, labels)
    return [relative_error(a, t.grad) for a, t in zip(made, leaves, strict=True)]


def _show(loss: str, backend: str, dtype: torch.dtype, name: str, mine, theirs, unrounded) -> None:
    columns = [f"{a:.1e} ({b:.1e})" for a, b in zip(mine, theirs, strict=True)] + [f"{e:.1e}" for e in unrounded]
    print(f"{loss:12} {backend:7} {str(dtype)[6:]:9} {name:30} {'  '.join(columns)}")


if __name__ == "__main__":
    with torch.device(DEVICE):
        main()
