"""Option matrices of other projects' tests through `linear_cross_entropy`: ``python -m tests.kernels.peer_matrices``.

Torch's own samples are taken from torch. Those of Liger (fused linear cross entropy), CCE and QuACK are stated anew, as
grids of their parameters at small shapes. Truth is the dense computation in float64, on the same rounded values, with
gradients. For each matrix the table says how many cases ran on each backend, how many were wrong, and how many our
function cannot express, with reasons. Triton runs every `--every`-th case, in its interpreter where there is no GPU.
"""

from __future__ import annotations

import argparse
import itertools
import os
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when lcl_kernels is imported

from lcl_kernels import linear_cross_entropy, reference_linear_cross_entropy
from lcl_kernels.reference import reference_logits
from torch import Tensor

BARS = {torch.float64: 1e-10, torch.float32: 1e-5, torch.bfloat16: 4e-3, torch.float16: 4e-3}
"""Of the relative error of loss and gradients, as a Frobenius norm."""


@dataclass
class Case:
    """A call, or why there is none."""

    tensors: tuple[Tensor, ...] = ()
    """hidden, weight and labels."""
    options: dict[str, Any] = field(default_factory=dict)
    truth: Callable[..., Tensor] | None = None
    """Of float64 tensors and options; None: `reference_linear_cross_entropy`."""
    reads_lse: bool = False
    """Whether gradients also come from the log-sum-exp."""
    not_expressible: str = ""


def torch_samples(dtypes: tuple[torch.dtype, ...] = tuple(BARS)) -> Iterator[Case]:
    """Samples of torch.nn.functional.linear_cross_entropy; what its options= say about chunks is our own choice."""
    from torch.testing._internal.common_methods_invocations import op_db  # needs the package expecttest

    for info in (info for info in op_db if info.name == "nn.functional.linear_cross_entropy"):
        for dtype in dtypes:
            for sample in info.sample_inputs("cpu", dtype, requires_grad=False):
                yield _of_torch((sample.input, *sample.args), sample.kwargs)


def _of_torch(tensors: tuple[Tensor, Tensor, Tensor], options: dict[str, Any]) -> Case:
    weight, labels = tensors[1:]
    if labels.is_floating_point():
        return Case(not_expressible="probabilities of classes as labels")
    if weight.dim() != 2:
        return Case(not_expressible="one weight for each position of the output")
    names = {"weight": "class_weight", "linear_bias": "bias"}
    ours = {names.get(name, name): value for name, value in options.items() if name != "options"}
    return Case(tensors, ours, _torch_function)


def _torch_function(hidden: Tensor, weight: Tensor, labels: Tensor, **options: Any) -> Tensor:
    names = {"class_weight": "weight", "bias": "linear_bias"}
    return F.linear_cross_entropy(hidden, weight, labels, **{names.get(name, name): v for name, v in options.items()})


def _inputs(shape: tuple[int, ...], vocab: int, dtype: torch.dtype, invalid: float, ignore_index: int, seed: int = 0):
    """hidden [*shape], weight, bias, class weight and labels, about `invalid` of which are ignored."""
    generator = torch.Generator().manual_seed(seed)
    width = shape[-1]
    hidden = torch.randn(shape, generator=generator)
    weight = torch.randn(vocab, width, generator=generator) * width**-0.5
    bias = torch.randn(vocab, generator=generator)
    class_weight = torch.rand(vocab, generator=generator) + 0.1
    labels = torch.randint(0, vocab, shape[:-1], generator=generator)
    labels[torch.rand(shape[:-1], generator=generator) < invalid] = ignore_index
    return hidden.to(dtype), weight.to(dtype), bias.to(dtype), class_weight, labels


def liger() -> Iterator[Case]:
    """test_fused_linear_cross_entropy.py: everything with everything."""
    for dtype, (shape, vocab) in itertools.product(
        (torch.float32, torch.bfloat16), (((2, 16, 16), 64), ((1, 47, 31), 123))
    ):
        grid = itertools.product(
            (0.0, 1e-4), (0.0, 0.1), (None, 30.0), (-100, 42), (False, True), (False, True), ("mean", "sum", "none"),
            (False, True),
        )  # fmt: skip
        for z_loss, smoothing, softcap, ignore_index, has_bias, weighted, reduction, predicted in grid:
            if weighted and z_loss and reduction == "mean":
                yield Case(not_expressible="z-loss divided by a count, cross entropy by a sum of weights")
                continue
            *tensors, bias, class_weight, labels = _inputs(shape, vocab, dtype, 0.3, ignore_index)
            options = dict(
                z_loss=z_loss, label_smoothing=smoothing, softcap=softcap, ignore_index=ignore_index,
                reduction=reduction, bias=bias if has_bias else None, class_weight=class_weight if weighted else None,
            )  # fmt: skip
            if predicted:
                options |= {"return_statistics": True, "return_predicted": True}
            yield Case((*tensors, labels), options)


def cce() -> Iterator[Case]:
    """test_cce_loss_forward.py, test_cce_loss_backward.py and test_cce_loss_lse.py."""
    for (batch, length, width), vocab in (((2, 16, 32), 128), ((2, 15, 32), 128), ((2, 15, 31), 123)):
        grid = itertools.product(
            (torch.float32, torch.float16, torch.bfloat16), (None, 20.0), (False, True), (0, 1, 2), (False, True),
            ("mean", "sum", "none"), (False, True),
        )  # fmt: skip
        for dtype, softcap, has_bias, shift, invalids, reduction, lse in grid:
            *tensors, bias, _, labels = _inputs((batch, length, width), vocab, dtype, 0.3 * invalids, -100)
            options = dict(softcap=softcap, bias=bias if has_bias else None, shift=shift, reduction=reduction)
            if lse:
                options |= {"return_statistics": True, "differentiable_lse": True}
            yield Case((*tensors, labels), options, reads_lse=lse)


def quack() -> Iterator[Case]:
    """test_linear_cross_entropy.py: three dimensions, bfloat16, chunks, ignored labels; its vocabularies made small."""
    grid = itertools.product(((2, 24, 32), (48, 32), (3, 16, 64)), (256, 393, 1002), (None, 1e-2), (0.0, 0.3, 0.9),
                             ("mean", "sum", "none"), (False, True))  # fmt: skip
    for shape, vocab, workspace, invalid, reduction, weighted in grid:
        *tensors, _, class_weight, labels = _inputs(shape, vocab, torch.bfloat16, invalid, -100)
        options = dict(reduction=reduction, workspace_mb=workspace, class_weight=class_weight if weighted else None)
        yield Case((*tensors, labels), options)


MATRICES: dict[str, Callable[[], Iterator[Case]]] = {
    "torch": torch_samples,
    "Liger": liger,
    "CCE": cce,
    "QuACK": quack,
}


def errors(case: Case, backend: str) -> list[float]:
    """Relative errors of the loss, of gradients, and 0 or 1 for what must be equal."""
    made, expected = _step(case, backend), _step(case, None)
    return [
        float((a.double() - b.double()).norm() / b.double().norm().clamp(min=1e-12))
        for a, b in zip(made, expected, strict=True)
    ]


def _step(case: Case, backend: str | None) -> list[Tensor]:
    """Loss, gradients, log-sum-exp and predicted classes as asked for; backend None: the truth."""
    *tensors, labels = case.tensors
    options = {**case.options}
    bias = options.pop("bias", None)
    exact = backend is None
    leaves = [None if t is None else t.detach().to(torch.float64 if exact else t.dtype) for t in (*tensors, bias)]
    leaves = [None if t is None else t.clone().requires_grad_() for t in leaves]
    asks = {name: options.pop(name, False) for name in ("return_statistics", "return_predicted", "differentiable_lse")}
    more: list[Tensor] = []
    if exact:
        function = case.truth or reference_linear_cross_entropy
        options.pop("workspace_mb", None)
        if options.get("class_weight") is not None:
            options["class_weight"] = options["class_weight"].double()
        if leaves[2] is not None:
            options["bias"] = leaves[2]
        loss = function(leaves[0], leaves[1], labels, **options)
        if any(asks.values()):
            more = _dense_statistics(leaves, labels, options)
    else:
        made = linear_cross_entropy(leaves[0], leaves[1], labels, bias=leaves[2], backend=backend, **options, **asks)
        loss = made
        if any(asks.values()):
            loss, statistics = made
            more = [statistics.lse, statistics.predicted if asks["return_predicted"] else statistics.rank]
    upstream = torch.linspace(0.5, 1.5, loss.numel(), dtype=torch.float64).view(loss.shape)
    objective = (loss * upstream).sum()
    if case.reads_lse:
        objective = objective + 0.1 * more[0].square().sum()
    objective.backward()
    if more and not asks["return_predicted"]:
        more = more[:1]
    return [t.detach() for t in (loss, *more)] + [t.grad for t in leaves if t is not None]


def _dense_statistics(leaves: list[Any], labels: Tensor, options: dict[str, Any]) -> list[Tensor]:
    shift = options.get("shift", 0)
    hidden, labels = leaves[0], labels[..., shift:]
    if shift:
        hidden = hidden[..., :-shift, :]
    logits = reference_logits(hidden, leaves[1], leaves[2], options.get("softcap"))
    counted = labels != options.get("ignore_index", -100)
    return [logits.logsumexp(-1).where(counted, 0), logits.argmax(-1).where(counted, -1)]


class Outcome(NamedTuple):
    cases: int
    run: Counter[str]
    wrong: list[str]
    not_expressible: Counter[str]


def run(cases: Iterator[Case], every: int, start: int = 0, step: int = 1) -> Outcome:
    """Every `step`-th case from `start` on in torch, and every `every`-th of those in Triton too."""
    total, ran, wrong, not_expressible = 0, Counter[str](), [], Counter[str]()
    for i, case in enumerate(itertools.islice(cases, start, None, step)):
        total += 1
        if case.not_expressible:
            not_expressible[case.not_expressible] += 1
            continue
        dtype = case.tensors[0].dtype
        for backend in ("torch", "triton"):
            if backend == "triton" and (i % every or dtype == torch.float64):
                continue
            ran[backend] += 1
            found = errors(case, backend)
            if not all(error < BARS[dtype] for error in found):
                shown = {k: (list(v.shape) if isinstance(v, Tensor) else v) for k, v in case.options.items()}
                shapes = [list(t.shape) for t in case.tensors]
                wrong.append(f"{backend} {dtype} {shapes} {shown}: {', '.join(f'{e:.1e}' for e in found)}")
    return Outcome(total, ran, wrong, not_expressible)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.kernels.peer_matrices", description=__doc__)
    parser.add_argument("--matrix", action="append", choices=MATRICES, help="default: all")
    parser.add_argument("--every", type=int, default=20, help="run every so many-th case in Triton too; default: 20")
    options = parser.parse_args(arguments)
    failed = False
    for name in options.matrix or MATRICES:
        outcome = run(MATRICES[name](), options.every)
        reasons = "".join(f"\n    {count}: {reason}" for reason, count in outcome.not_expressible.most_common())
        print(
            f"{name}: {outcome.cases} cases, run {outcome.run['torch']} in torch, {outcome.run['triton']} in Triton, "
            f"wrong {len(outcome.wrong)}, not expressible {outcome.not_expressible.total()}{reasons}",
            flush=True,
        )
        print(*(f"    WRONG {line}\n" for line in outcome.wrong), sep="", end="")
        failed |= bool(outcome.wrong)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
