"""The checks of ``first_light``: every kernel once, at a real shape and dtype, against float64.

A check is a function without arguments that returns errors and their bars. `CHECKS` has them in order of importance.
On a machine without a GPU the same functions run at tiny size in Triton's interpreter.
"""

import math
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import lcl_kernels
import torch
from lcl_kernels import contrastive_loss, linear_cross_entropy, sigmoid_contrastive_loss
from torch import Tensor

from launch.gpu_check.truth import Truth, exact_contrastive, exact_linear, exact_sigmoid
from lcl_ds.bench.contrastive import ContrastiveCase
from lcl_ds.bench.losses import LossCase
from lcl_ds.bench.peers import IGNORED

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # what cuBLAS needs to give the same bits every time
GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
BACKEND: Any = "triton"
BARS = {
    # Relative Frobenius errors of the loss and of gradients, which are rounded to the dtype of the inputs.
    "bf16": {"loss": 2e-5, "gradient": 4e-3},
    "fp16": {"loss": 2e-5, "gradient": 4e-3},
    "fp32": {"loss": 1e-5, "gradient": 1e-5},
}
SCALE_BAR = 1e-3
"""Of the gradient of a logit scale or bias: a sum of terms that cancel."""
SAME_BITS = 0.0

Errors = dict[str, tuple[float, float]]
"""(error, bar) by what was compared; larger than its bar, or NaN, is a failure."""


class Skip(Exception):
    """The check does not apply here; the message says why."""


CHECKS: dict[str, Callable[[], Errors]] = {}


def check(function: Callable[[], Errors]) -> Callable[[], Errors]:
    """Add a check to `CHECKS` under the name of its function."""
    CHECKS[function.__name__] = function
    return function


# --- helpers ----------------------------------------------------------------------------------------------------------


def relative_error(found: Tensor, truth: Tensor) -> float:
    """Frobenius norm of the difference over that of the truth, 0 for two zeros; NaN stays NaN."""
    difference = float((found.detach().double() - truth.double()).norm())
    return difference and difference / max(float(truth.double().norm()), 1e-30)


def same(found: Tensor, wanted: Tensor) -> tuple[float, float]:
    """0 where all bits agree."""
    return float(not torch.equal(found, wanted)), SAME_BITS


def compare(found: dict[str, Tensor], truth: Truth, dtype: str) -> Errors:
    """Errors of everything that was found."""
    bars = BARS[dtype]
    own = {"loss": bars["loss"], "row_loss": bars["loss"], "d_scale": SCALE_BAR, "d_logit_bias": SCALE_BAR}
    return {
        name: (relative_error(tensor, truth[name]), own.get(name, bars["gradient"])) for name, tensor in found.items()
    }


def tiny(number: int, size: int) -> int:
    """On a CPU: `size`, odd where `number` is."""
    return number if GPU else size + number % 2


@contextmanager
def poisoned() -> Iterator[None]:
    """New memory is NaN until written, so that nothing unwritten passes."""
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


class Linear(NamedTuple):
    """Data of one linear cross entropy: leaves, and how hidden states come from the first of them."""

    leaf: Tensor
    weight: Tensor
    labels: Tensor
    view: Callable[[Tensor], Tensor] = lambda leaf: leaf

    @property
    def counted(self) -> Tensor:
        return self.labels != IGNORED

    def call(self, **options: Any) -> Any:
        return linear_cross_entropy(self.view(self.leaf), self.weight, self.labels, backend=BACKEND, **options)

    def step(self, **options: Any) -> Tensor:
        """Forward and backward; the loss."""
        self.leaf.grad = self.weight.grad = None
        loss: Tensor = self.call(**options)
        loss.sum().backward()
        return loss.detach()

    def gradients(self) -> list[Tensor]:
        return [tensor.grad for tensor in (self.leaf, self.weight) if tensor.grad is not None]


def linear_data(n: int, h: int, v: int, dtype: str = "bf16", valid: float = 0.5, seed: int = 0) -> Linear:
    """Random data with a loss near 3, as in the middle of training."""
    shape = (tiny(n, 40), tiny(h, 64), tiny(v, 150))
    hidden, weight, labels = LossCase(shape, dtype, DEVICE, seed, valid=valid).inputs()
    return Linear(hidden, weight, labels)


def check_linear(data: Linear, dtype: str = "bf16", *, with_bias: bool = False, **options: Any) -> Errors:
    """Loss and gradients of a call with these options."""
    bias = None
    if with_bias:
        bias = torch.randn(len(data.weight), device=DEVICE).to(data.weight.dtype).requires_grad_()
    with poisoned():
        loss = data.step(bias=bias, **options)
    exact_options = {key: options[key] for key in ("z_loss", "softcap", "label_smoothing") if key in options}
    hidden, counted = data.view(data.leaf.detach()), data.counted
    upstream = counted.double() / (1 if options.get("reduction") == "none" else counted.sum().clamp(min=1))
    truth = exact_linear(hidden, data.weight, data.labels, bias, upstream, **exact_options)
    found = {"d_weight": data.weight.grad, "d_bias": None if bias is None else bias.grad, "d_hidden": data.leaf.grad}
    if options.get("reduction") == "none":
        found["row_loss"] = loss
    else:
        found["loss"], truth["loss"] = loss, (truth["row_loss"] * upstream).sum()
    wide = data.leaf.detach().double().requires_grad_()
    data.view(wide).backward(truth["d_hidden"])
    assert wide.grad is not None
    truth["d_hidden"] = wide.grad
    return compare({name: tensor for name, tensor in found.items() if tensor is not None}, truth, dtype)


def contrastive_data(m: int, d: int, scale: float, dtype: str = "bf16") -> tuple[Tensor, Tensor, Tensor]:
    x, y, multiplier = ContrastiveCase((tiny(m, 70), tiny(d, 256)), dtype, DEVICE, scale=scale).inputs()
    return x, y, multiplier


def contrastive_step(x: Tensor, y: Tensor, scale: Tensor, **options: Any) -> Tensor:
    x.grad = y.grad = scale.grad = None
    loss = contrastive_loss(x, y, scale, backend=BACKEND, **options)
    loss.backward()
    return loss.detach()


def check_contrastive(x: Tensor, y: Tensor, scale: Tensor, dtype: str = "bf16", **options: Any) -> Errors:
    with poisoned():
        loss = contrastive_step(x, y, scale, **options)
    assert x.grad is not None and y.grad is not None and scale.grad is not None  # noqa: PT018
    found = {"loss": loss, "d_x": x.grad, "d_y": y.grad, "d_scale": scale.grad}
    return compare(found, exact_contrastive(x, y, scale), dtype)


def check_sigmoid(m: int, d: int, scale: float, bias: float, dtype: str = "bf16") -> Errors:
    x, y, multiplier = contrastive_data(m, d, scale, dtype)
    offset = torch.tensor(bias, device=DEVICE, requires_grad=True)
    with poisoned():
        loss = sigmoid_contrastive_loss(x, y, multiplier, offset, backend=BACKEND)
        loss.backward()
    truth = exact_sigmoid(x, y, multiplier, offset)
    truth["d_logit_bias"] = truth.pop("d_bias")
    assert x.grad is not None and y.grad is not None  # noqa: PT018
    assert multiplier.grad is not None and offset.grad is not None  # noqa: PT018
    found = {"loss": loss.detach(), "d_x": x.grad, "d_y": y.grad}
    return compare({**found, "d_scale": multiplier.grad, "d_logit_bias": offset.grad}, truth, dtype)


def captured(step: Callable[[], Any]) -> tuple[Any, Callable[[], None]]:
    """(what `step` returns, how to run it again), from a CUDA graph; without a GPU from plain calls."""
    if not GPU:
        return step(), lambda: None
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = step()
    return result, graph.replay


def compiled(function: Callable[..., Any], **options: Any) -> Callable[..., Any]:
    """`function` as torch.compile makes it, without a compiler where there is no GPU."""
    torch.compiler.reset()
    return torch.compile(function, fullgraph=True, **(options if GPU else {"backend": "aot_eager"}))


# --- the checks, most important first -----------------------------------------------------------------------------


@check
def linear_half_of_the_labels_count() -> Errors:
    return check_linear(linear_data(8192, 768, 49411))


@check
def contrastive_at_scale_14() -> Errors:
    return check_contrastive(*contrastive_data(32768, 768, 14.3))


@check
def linear_all_labels_count_and_the_caller_says_so() -> Errors:
    data = linear_data(8192, 768, 49411, valid=1.0)
    return check_linear(data, counted_rows=len(data.labels))


@check
def linear_rows_far_above_their_label_are_made_again() -> Errors:
    data = linear_data(4096, 768, 49411)
    with torch.no_grad():  # a fifth of the rows: some other class leads by about 100 nats, so their sums overflow
        rows = slice(0, len(data.leaf) // 5)
        other = (data.labels[rows].clamp(min=0) + 1) % len(data.weight)
        chosen = data.weight[other].float()
        data.leaf[rows] = (chosen * (100 / chosen.square().sum(1, keepdim=True))).to(data.leaf.dtype)
    return check_linear(data)


@check
def contrastive_at_scale_100() -> Errors:
    return check_contrastive(*contrastive_data(32768, 768, 100.0))


@check
def sigmoid_at_its_first_step() -> Errors:
    return check_sigmoid(32768, 768, 10.0, -10.0)


@check
def linear_few_labels_count() -> Errors:
    data = linear_data(8192, 768, 49411, valid=0.12)
    return check_linear(data, counted_rows=int(data.counted.sum()))


@check
def linear_in_several_chunks() -> Errors:
    return check_linear(linear_data(16384, 2048, 128256), workspace_mb=1024 if GPU else 0.005)


@check
def linear_in_a_cuda_graph() -> Errors:
    data = linear_data(2048, 768, 49411)
    counted = int(data.counted.sum())
    loss, replay = captured(lambda: data.step(counted_rows=counted))
    replayed = data.gradients()
    if GPU:
        with torch.no_grad():
            data.leaf.mul_(1.25)
    replay()
    first = [tensor.clone() for tensor in (loss, *replayed)]
    wanted = [data.step(counted_rows=counted), *data.gradients()]
    return {name: same(*pair) for name, *pair in zip(("loss", "d_hidden", "d_weight"), first, wanted, strict=True)}


@check
def linear_forward_alone() -> Errors:
    data = linear_data(8192, 768, 49411)
    with torch.no_grad(), poisoned():
        loss = data.call(reduction="sum")
    upstream = data.counted.double()
    truth = exact_linear(data.leaf, data.weight, data.labels, None, upstream)
    return compare({"loss": loss}, {"loss": truth["row_loss"].sum()}, "bf16")


@check
def linear_with_bias() -> Errors:
    return check_linear(linear_data(4096, 768, 49411), with_bias=True)


@check
def linear_with_softcap() -> Errors:
    return check_linear(linear_data(4096, 768, 49411), softcap=30.0)


@check
def linear_with_z_loss() -> Errors:
    return check_linear(linear_data(4096, 768, 49411), z_loss=1e-4)


@check
def linear_with_label_smoothing() -> Errors:
    return check_linear(linear_data(4096, 768, 49411), label_smoothing=0.1)


@check
def linear_float16() -> Errors:
    return check_linear(linear_data(4096, 768, 49411, "fp16"), "fp16")


@check
def linear_width_771_which_no_descriptor_serves() -> Errors:
    return check_linear(linear_data(4096, 771, 49411))


@check
def linear_more_logits_than_32_bits_count() -> Errors:
    return check_linear(linear_data(16384, 64, 151_936, valid=1.0), workspace_mb=8192)


@check
def linear_one_hidden_state_expanded() -> Errors:
    data = linear_data(4096, 768, 49411)
    one = data.leaf.detach()[:1].clone().requires_grad_()
    return check_linear(data._replace(leaf=one, view=lambda leaf: leaf.expand(len(data.labels), -1)))


@check
def linear_rows_that_are_slices() -> Errors:
    data = linear_data(4096, 768, 49411)
    wide = torch.cat([data.leaf.detach(), data.leaf.detach()], 1).requires_grad_()
    width = data.leaf.shape[1]
    return check_linear(data._replace(leaf=wide, view=lambda leaf: leaf[:, width:]))


@check
def linear_transposed_hidden() -> Errors:
    data = linear_data(4096, 768, 49411)
    return check_linear(data._replace(leaf=data.leaf.detach().t().contiguous().requires_grad_(), view=lambda t: t.t()))


@check
def linear_statistics() -> Errors:
    data = linear_data(4096, 768, 49411)
    with poisoned():
        _, statistics = data.call(return_statistics=True)
    hidden, weight, rows = data.leaf.detach().double(), data.weight.detach().double(), slice(0, 512)
    logits, counted = hidden[rows] @ weight.T, data.counted[rows]
    own = logits.gather(1, data.labels[rows].clamp(min=0).unsqueeze(1))
    rank = (logits > own).sum(1).where(counted, -1)
    # In fp32 a logit that differs from the target's in the last digit alone may count or not.
    off = float((statistics.rank[rows] - rank).abs().max())
    lse = logits.logsumexp(1).where(counted, 0)
    return {"lse": (relative_error(statistics.lse[rows], lse), BARS["bf16"]["loss"]), "rank": (off, 1.0)}


@check
def linear_loss_of_every_row() -> Errors:
    return check_linear(linear_data(4096, 768, 49411), reduction="none")


@check
def contrastive_in_a_cuda_graph() -> Errors:
    x, y, scale = contrastive_data(4096, 768, 14.3)
    loss, replay = captured(lambda: contrastive_step(x, y, scale, counts=[len(x)]))
    assert x.grad is not None
    replayed = x.grad
    if GPU:
        with torch.no_grad():
            scale.fill_(60.0)  # beyond the bound up to which one exponential does: the device makes the choice
    replay()
    first = loss.clone(), replayed.clone()
    wanted = contrastive_step(x, y, scale, counts=[len(x)])
    return {"loss": same(first[0], wanted), "d_x": same(first[1], x.grad)}


@check
def linear_compiled() -> Errors:
    return _compiled_linear()


@check
def linear_compiled_with_cuda_graphs() -> Errors:
    return _compiled_linear(mode="reduce-overhead")


def _compiled_linear(**options: Any) -> Errors:
    data = linear_data(2048, 768, 49411)
    counted = int(data.counted.sum())
    wanted = [data.step(counted_rows=counted), *data.gradients()]
    function = compiled(
        lambda hidden, weight, labels: linear_cross_entropy(
            hidden, weight, labels, counted_rows=counted, backend=BACKEND
        ),
        **options,
    )
    for _ in range(3):  # cuda graphs are recorded at the second call
        data.leaf.grad = data.weight.grad = None
        loss = function(data.leaf, data.weight, data.labels)
        loss.backward()
        found = [tensor.detach().clone() for tensor in (loss, *data.gradients())]
    names = ("loss", "d_hidden", "d_weight")
    return {name: (relative_error(*pair), 1e-6) for name, *pair in zip(names, found, wanted, strict=True)}


@check
def contrastive_compiled() -> Errors:
    x, y, scale = contrastive_data(2048, 768, 14.3)
    wanted = contrastive_step(x, y, scale), x.grad
    x.grad = y.grad = scale.grad = None
    loss = compiled(lambda *inputs: contrastive_loss(*inputs, backend=BACKEND))(x, y, scale)
    loss.backward()
    assert wanted[1] is not None and x.grad is not None  # noqa: PT018
    return {"loss": (relative_error(loss, wanted[0]), 1e-6), "d_x": (relative_error(x.grad, wanted[1]), 1e-6)}


@check
def linear_autocast_with_a_float32_weight() -> Errors:
    data = linear_data(4096, 768, 49411)
    weight = data.weight.detach().float().requires_grad_()
    with torch.autocast(DEVICE, torch.bfloat16):
        errors = check_linear(data._replace(weight=weight))
    assert weight.grad is not None
    return {**errors, "d_weight is float32": (float(weight.grad.dtype != torch.float32), SAME_BITS)}


@check
def linear_float32() -> Errors:
    data = linear_data(2048, 768, 49411, "fp32")
    return check_linear(data, "fp32")


@check
def nothing_waits_for_the_device() -> Errors:
    if not GPU:
        raise Skip("no GPU")
    data = linear_data(2048, 768, 49411)
    x, y, scale = contrastive_data(4096, 768, 14.3)
    counted = int(data.counted.sum())
    for mode in ("default", "error"):
        torch.cuda.set_sync_debug_mode(mode)
        try:
            data.step(counted_rows=counted)
            contrastive_step(x, y, scale, counts=[len(x)])
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return {}


@check
def the_same_inputs_give_the_same_bits() -> Errors:
    data = linear_data(4096, 768, 49411)
    x, y, scale = contrastive_data(8192, 768, 14.3)
    runs = []
    for _ in range(3):
        linear = [data.step(), *data.gradients()]
        pairs = [contrastive_step(x, y, scale), x.grad, y.grad, scale.grad]
        runs.append([tensor.clone() for tensor in (*linear, *pairs) if tensor is not None])
    first, *others = runs
    return {f"run {i + 2}, tensor {j}": same(t, first[j]) for i, run in enumerate(others) for j, t in enumerate(run)}


@check
def memory_stays_within_the_workspace() -> Errors:
    if not GPU:
        raise Skip("no GPU")
    data = linear_data(8192, 768, 49411)
    data.step()
    data.leaf.grad = data.weight.grad = None
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    data.step(workspace_mb=256)
    gradients = 6 * (data.leaf.numel() + data.weight.numel())  # in float32, then rounded
    extra = torch.cuda.max_memory_allocated() - before - gradients
    return {"MiB beside the gradients": (extra / 2**20, 256 * 1.25 + 64)}


@check
def contrastive_float16() -> Errors:
    return check_contrastive(*contrastive_data(8192, 512, 14.3, "fp16"), "fp16")


@check
def contrastive_width_771() -> Errors:
    return check_contrastive(*contrastive_data(4099, 771, 14.3))


@check
def contrastive_float32() -> Errors:
    return check_contrastive(*contrastive_data(4096, 512, 14.3, "fp32"), "fp32")


@check
def contrastive_more_similarities_than_32_bits_count() -> Errors:
    return check_contrastive(*contrastive_data(65_536, 64, 14.3), workspace_mb=12_288)


@check
def sigmoid_at_scale_100() -> Errors:
    return check_sigmoid(8192, 768, 100.0, -12.0)


@check
def sigmoid_width_771() -> Errors:
    return check_sigmoid(4099, 771, 14.3, -10.0)


@check
def linear_only_the_weight_is_trained() -> Errors:
    data = linear_data(2048, 768, 49411)
    step = [data.step(), *data.gradients()]
    frozen = data._replace(leaf=data.leaf.detach())
    return {"loss": same(frozen.step(), step[0]), "d_weight": same(frozen.gradients()[0], step[2])}


@check
def linear_no_label_counts() -> Errors:
    data = linear_data(1024, 768, 49411)
    data.labels.fill_(IGNORED)
    with poisoned():
        loss = data.step()
    largest = max(float(tensor.abs().max()) for tensor in (loss, *data.gradients()))
    return {"largest number": (largest, SAME_BITS)}


@check
def linear_everything_together() -> Errors:
    data = linear_data(4096, 768, 49411)
    return check_linear(data, with_bias=True, softcap=30.0, z_loss=1e-4, label_smoothing=0.1)


@check
def linear_options_of_language_models() -> Errors:
    """Batches of sequences, shifted labels, and weights of tokens and classes."""
    data = linear_data(4096, 768, 49411)
    rows, width = data.leaf.shape
    labels = data.labels.view(4, rows // 4)
    of_token = torch.rand(labels.shape, device=DEVICE)
    of_class = torch.rand(len(data.weight), device=DEVICE)
    options: dict[str, Any] = {"shift": 1, "token_weight": of_token, "class_weight": of_class, "reduction": "sum"}
    sequences = data._replace(labels=labels, view=lambda leaf: leaf.view(4, rows // 4, width))
    with poisoned():
        loss = sequences.step(**options)
    ignored = torch.full_like(labels[:, :1], IGNORED)
    aligned = torch.cat([labels[:, 1:], ignored], 1).reshape(-1)  # what position i predicts stands at i + 1
    weights = torch.cat([of_token[:, 1:], torch.zeros_like(of_token[:, :1])], 1).reshape(-1)
    upstream = (weights * of_class[aligned.clamp(min=0)]).double().where(aligned != IGNORED, 0)
    truth = exact_linear(data.leaf, data.weight, aligned, None, upstream)
    truth["loss"] = (truth["row_loss"] * upstream).sum()
    assert data.leaf.grad is not None and data.weight.grad is not None  # noqa: PT018
    return compare({"loss": loss, "d_hidden": data.leaf.grad, "d_weight": data.weight.grad}, truth, "bf16")


@check
def linear_predicted_class_and_differentiable_lse() -> Errors:
    data = linear_data(2048, 768, 49411, valid=1.0)
    options: dict[str, Any] = {"return_statistics": True, "return_predicted": True, "differentiable_lse": True}
    with poisoned():
        loss, statistics = data.call(reduction="sum", **options)
        (loss + statistics.lse.square().sum()).backward()
    hidden, weight = (t.detach().double().requires_grad_() for t in (data.leaf, data.weight))
    logits = hidden @ weight.T
    lse = logits.logsumexp(1)
    chosen = logits.detach().gather(1, statistics.predicted.unsqueeze(1)).squeeze(1)
    own = logits.gather(1, data.labels.unsqueeze(1)).squeeze(1)
    (lse - own + lse.square()).sum().backward()
    assert hidden.grad is not None and data.leaf.grad is not None  # noqa: PT018
    return {
        "lse": (relative_error(statistics.lse, lse.detach()), BARS["bf16"]["loss"]),
        # In fp32 a logit that is larger in the last digits alone may be passed over.
        "predicted": (float((logits.detach().amax(1) - chosen).abs().max()), 1e-4),
        "d_hidden": (relative_error(data.leaf.grad, hidden.grad), BARS["bf16"]["gradient"]),
    }


@check
def contrastive_groups_of_pairs() -> Errors:
    """Pairs of one group are no negatives of each other, or positives; some pairs weigh more."""
    x, y, scale = contrastive_data(4096, 768, 14.3)
    ids = torch.randint(len(x) // 3, (len(x),), device=DEVICE)
    weight = torch.rand(len(x), device=DEVICE)
    errors: Errors = {}
    for same_group in ("ignore", "positive"):
        options: dict[str, Any] = {"group_ids": ids, "pair_weight": weight, "same_group": same_group}
        with poisoned():
            loss = contrastive_step(x, y, scale, **options)
        wide = [tensor.detach().double().requires_grad_() for tensor in (x, y, scale)]
        truth = lcl_kernels.reference_contrastive_loss(*wide, **options)
        truth.backward()
        names = ("loss", "d_x", "d_y")
        wanted = dict(zip(names, (truth.detach(), wide[0].grad, wide[1].grad), strict=True))
        found = dict(zip(names, (loss, x.grad, y.grad), strict=True))
        compared = compare(found, wanted, "bf16")  # type: ignore[arg-type]
        errors |= {f"{same_group}: {name}": error for name, error in compared.items()}
    return errors


def passes(errors: Errors) -> bool:
    """Whether every error is within its bar; NaN is not."""
    return all(math.isfinite(error) and error <= bar for error, bar in errors.values())
