"""What only a GPU can show: graphs, device assertions, large indices, memory."""

import subprocess
import sys

import lcl_kernels
import pytest
import torch

from tests.kernels.checks import contrastive_loss, leaf, linear_cross_entropy, relative_error, seeded

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
    pytest.mark.usefixtures("triton_backend"),
]


@pytest.fixture
def triton_backend():
    torch.use_deterministic_algorithms(False)  # filling new memory with NaN would be part of what is measured


def linear_step(hidden, weight, labels, **options):
    hidden.grad = weight.grad = None
    loss = linear_cross_entropy(hidden, weight, labels, backend="triton", **options)
    loss.backward()
    return loss


def test_linear_cross_entropy_in_a_cuda_graph():
    hidden, weight = (leaf(torch.randn(k, 256, generator=seeded(k)).bfloat16()) for k in (300, 1001))
    labels = torch.randint(0, 1001, (300,), generator=seeded())
    labels[::4] = -100
    counted = int((labels != -100).sum())
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(2):
            linear_step(hidden, weight, labels, counted_rows=counted)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss = linear_step(hidden, weight, labels, counted_rows=counted)
    gradients = hidden.grad, weight.grad
    with torch.no_grad():
        hidden.mul_(1.5)
    graph.replay()
    captured = [t.clone() for t in (loss, *gradients)]
    expected = [linear_step(hidden, weight, labels, counted_rows=counted), hidden.grad, weight.grad]
    assert all(torch.equal(a, b) for a, b in zip(captured, expected, strict=True))


def test_contrastive_loss_in_a_cuda_graph():
    x, y = (torch.nn.functional.normalize(torch.randn(300, 64, generator=seeded(s)), dim=1) for s in (0, 1))
    x, scale = leaf(x.bfloat16()), torch.tensor(14.3)

    def step():
        x.grad = None
        loss = contrastive_loss(x, y.bfloat16(), scale, counts=[300], backend="triton")
        loss.backward()
        return loss

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        step(), step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss = step()
    gradient = x.grad
    scale.fill_(60.0)  # beyond the bound up to which one exponential suffices: the choice is made on the device
    graph.replay()
    captured = loss.clone(), gradient.clone()
    assert torch.equal(captured[0], step())
    assert torch.equal(captured[1], x.grad)


def test_nothing_waits_for_the_device_when_the_count_is_known():
    hidden, weight = (leaf(torch.randn(k, 64).bfloat16()) for k in (128, 500))
    labels = torch.randint(0, 500, (128,))
    linear_step(hidden, weight, labels, counted_rows=128)
    torch.cuda.set_sync_debug_mode("error")
    try:
        linear_step(hidden, weight, labels, counted_rows=128)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("labels", ["[5, 9]", "[5, -1]"])
def test_a_label_out_of_range_is_a_device_assertion(labels):
    program = f"""
import torch
from lcl_kernels import linear_cross_entropy
hidden, weight = torch.randn(2, 16, device="cuda"), torch.randn(9, 16, device="cuda")
linear_cross_entropy(hidden, weight, torch.tensor({labels}, device="cuda"), counted_rows=2, backend="triton")
torch.cuda.synchronize()
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert done.returncode != 0
    assert "assert" in done.stderr.lower()


def test_a_label_out_of_range_is_an_error_where_the_call_waits_anyway():
    hidden, weight = torch.randn(2, 16).bfloat16(), torch.randn(9, 16).bfloat16()
    with pytest.raises(ValueError, match=r"labels\[1\] = 9 is outside"):
        linear_cross_entropy(hidden, weight, torch.tensor([5, 9]), backend="triton")


def test_more_logits_than_32_bits_can_count():
    n, h, v = 16384, 64, 151_936
    hidden, weight = (torch.randn(k, h, generator=seeded(k), dtype=torch.bfloat16) * 0.2 for k in (n, v))
    labels = torch.randint(0, v, (n,), generator=seeded())
    hidden, weight = leaf(hidden), leaf(weight)
    linear_cross_entropy(hidden, weight, labels, backend="triton", reduction="sum", workspace_mb=8192).backward()
    last = slice(n - 64, n)
    few = leaf(hidden[last], torch.float32)
    lcl_kernels.reference_linear_cross_entropy(few, weight.detach().float(), labels[last], reduction="sum").backward()
    assert relative_error(hidden.grad[last], few.grad) < 4e-3


def test_more_similarities_than_32_bits_can_count():
    m, d = 65_536, 16
    x, y = (torch.nn.functional.normalize(torch.randn(m, d, generator=seeded(s)), dim=1).bfloat16() for s in (0, 1))
    x, y = leaf(x), leaf(y)
    contrastive_loss(x, y, torch.tensor(14.3), backend="triton", workspace_mb=16384).backward()
    gradients = x.grad.clone(), y.grad.clone()
    x.grad = y.grad = None
    contrastive_loss(x, y, torch.tensor(14.3), backend="torch", workspace_mb=2048).backward()
    for actual, wanted in zip(gradients, (x.grad, y.grad), strict=True):
        assert relative_error(actual[-64:], wanted[-64:]) < 6e-3


def test_memory_is_linear_in_the_number_of_pairs():
    def peak(m):
        x, y = (leaf(torch.randn(m, 256, dtype=torch.bfloat16) / 16) for _ in range(2))
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        contrastive_loss(x, y, torch.tensor(14.3), backend="triton", workspace_mb=64).backward()
        return torch.cuda.max_memory_allocated() - before

    peak(1024)
    assert peak(65_536) < 2.5 * peak(32_768)


def test_no_memory_is_gained_over_many_steps():
    hidden, weight = (leaf(torch.randn(k, 64).bfloat16()) for k in (512, 1001))
    labels = torch.randint(0, 1001, (512,))
    for _ in range(3):
        linear_step(hidden, weight, labels)
    before = torch.cuda.memory_allocated()
    for _ in range(100):
        linear_step(hidden, weight, labels)
    assert torch.cuda.memory_allocated() == before


def test_without_gradients_only_the_partial_sums_are_kept():
    hidden, weight = torch.randn(4096, 256).bfloat16(), torch.randn(50_000, 256).bfloat16()
    labels = torch.randint(0, 50_000, (4096,))
    linear_cross_entropy(hidden, weight, labels, backend="triton")
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    linear_cross_entropy(hidden, weight, labels, backend="triton")
    assert torch.cuda.max_memory_allocated() - before < 32 * 2**20  # the logits would be 400 MB in bfloat16
