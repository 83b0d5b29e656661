"""What a worker of ``tune`` does with one tile setting: is it right, what does it need, how long does it take."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any
from unittest import mock

import lcl_kernels
import torch
from lcl_kernels import tiles
from torch import Tensor
from triton.runtime import JITFunction

from launch.gpu_check.pool import Answer, Task
from launch.gpu_check.timing import DEVICE, GPU, kernels_of, median_ms
from lcl_ds.bench.contrastive import ContrastiveCase
from lcl_ds.bench.losses import LossCase

BAR = 6e-3
"""Relative error against the torch backend, whose products cuBLAS makes: twice the rounding of bfloat16 gradients."""
CALLS = 5 if GPU else 1
SAMPLE = 1024
"""Rows of a gradient that are compared."""
FUNCTIONS = {
    "logits": "exp_logits_kernel",
    "logits_general": "exp_logits_kernel",
    "logits_crowded": "exp_logits_kernel",
    "statistics": "similarity_statistics_kernel",
    "statistics_two": "similarity_statistics_kernel",
    "statistics_crowded": "similarity_statistics_kernel",
    "gradient": "similarity_gradient_kernel",
    "gradient_crowded": "similarity_gradient_kernel",
    "sigmoid": "sigmoid_negatives_kernel",
}
"""Part of the name of the Triton function of each kernel."""
OPTIONS: dict[str, dict[str, Any]] = {
    "logits_general": {"label_smoothing": 0.1},
    "logits_crowded": {"softcap": 30.0},
    "statistics_crowded": {"return_statistics": True},
    "gradient_crowded": {"same_group": "positive"},
}
"""What makes a loss take each kernel."""
SCALES = {"statistics_two": 60.0}
"""Multipliers of contrastive logits beyond what one exponential can serve."""

_wanted: dict[tuple[Any, ...], list[Tensor]] = {}


def run(task: Task) -> Answer:
    """Answer a task of ``tune``."""
    if task["do"] == "describe":
        kernels = [kernel for kernel in FUNCTIONS if kernel in tiles.TILES]
        return {"device": torch.cuda.get_device_name() if GPU else "cpu", "gpu": GPU, "kernels": kernels}
    with using(task):
        return try_tile(task) if task["do"] == "try" else time_tile(task)


@contextmanager
def using(task: Task) -> Iterator[None]:
    """The kernel of the task takes the task's tile; every other one, and the kernel for a tile of None, its default."""
    records: tuple[tiles.TunedTile, ...] = ()
    if task["tile"] is not None:
        name = torch.cuda.get_device_name() if GPU else "cpu"
        records = (tiles.TunedTile(name, task["kernel"], task["width"], task["columns"], tiles.Tile(**task["tile"])),)
    with mock.patch.object(tiles, "tuned_tiles", return_value=records):
        yield


def step_of(task: Task, backend: str) -> Callable[[], list[Tensor]]:
    """A forward and backward pass that runs the kernel: loss and gradients."""
    kernel, device = task["kernel"], DEVICE.type
    options: dict[str, Any]
    loss: Callable[[], Tensor]
    if kernel.startswith("logits"):
        inputs = LossCase((task["rows"], task["width"], task["columns"]), "bf16", device).inputs()
        options = {"backend": backend, "counted_rows": len(inputs[2]), **OPTIONS.get(kernel, {})}
        loss = partial(lcl_kernels.linear_cross_entropy, *inputs, **options)
    else:
        scale_of = SCALES.get(kernel, 14.3)
        inputs = ContrastiveCase((task["columns"], task["width"]), "bf16", device, scale=scale_of).inputs()
        x, y, scale = inputs
        options = {"backend": backend, "counts": [task["columns"]], **OPTIONS.get(kernel, {})}
        if kernel == "gradient_crowded":
            options["group_ids"] = torch.arange(task["columns"], device=DEVICE) // 2
        if kernel == "sigmoid":
            bias = torch.full((), -10.0, device=DEVICE, requires_grad=True)
            loss = partial(lcl_kernels.sigmoid_contrastive_loss, x, y, scale, bias, **options)
        else:
            loss = partial(lcl_kernels.contrastive_loss, x, y, scale, **options)

    def step() -> list[Tensor]:
        for tensor in inputs:
            tensor.grad = None
        value = loss()
        value = value[0] if isinstance(value, tuple) else value
        value.backward()
        return [value.detach(), *(tensor.grad for tensor in inputs[:2] if tensor.grad is not None)]

    return step


def try_tile(task: Task) -> Answer:
    """Compile a tile, and compare what it gives with the torch backend."""
    before = set(map(id, compiled(task["kernel"])))
    found = step_of(task, "triton")()
    key = tuple(task[name] for name in ("kernel", "rows", "width", "columns"))
    if key not in _wanted:
        _wanted.clear()  # of the group before
        _wanted[key] = [tensor[:SAMPLE].clone() if tensor.dim() else tensor for tensor in step_of(task, "torch")()]
    errors = []
    for tensor, wanted in zip(found, _wanted[key], strict=True):
        part = tensor[:SAMPLE] if tensor.dim() else tensor
        errors.append(float((part.float() - wanted.float()).norm() / wanted.float().norm().clamp(min=1e-30)))
    ok = all(error <= BAR for error in errors)
    made = [kernel for kernel in compiled(task["kernel"]) if id(kernel) not in before]
    return {"ok": ok, "message": "" if ok else f"wrong: errors {errors}", **resources(made)}


def time_tile(task: Task) -> Answer:
    """Milliseconds of the kernel in one call, or of the whole call where the profiler sees no kernels."""
    step = step_of(task, "triton")
    call_ms = median_ms(step, CALLS, warm_up=2 if GPU else 0)
    kernels = kernels_of(step, CALLS) if GPU else []
    ms = sum(row["ms"] for row in kernels if FUNCTIONS[task["kernel"]] in row["kernel"])
    return {"ok": True, "ms": ms or call_ms, "of": "kernel" if ms else "call", "call_ms": call_ms, "message": ""}


def compiled(kernel: str) -> list[Any]:
    """What Triton has compiled in this process from the function of a kernel."""
    modules = [module for name, module in list(sys.modules.items()) if name.startswith("lcl_kernels.")]
    functions = {
        id(value): value
        for module in modules
        for value in vars(module).values()
        if isinstance(value, JITFunction) and FUNCTIONS[kernel] in value.__name__
    }
    return [
        made
        for function in functions.values()
        for cache in function.device_caches.values()
        for made in cache[0].values()
    ]


def resources(made: list[Any]) -> dict[str, Any]:
    """The most registers, spilled bytes and shared memory of compiled kernels that run in every call.

    Those of a retry run only when a token costs more than about 70 nats, and may spill.
    """
    usual = [kernel for kernel in made if not is_retry(kernel)]
    most = lambda values: max((value for value in values if value is not None), default=None)  # noqa: E731
    return {
        "registers": most(getattr(kernel, "n_regs", None) for kernel in usual),
        "spills": most(getattr(kernel, "n_spills", None) for kernel in usual),
        "shared": most(getattr(kernel.metadata, "shared", None) for kernel in usual),
    }


def is_retry(kernel: Any) -> bool:
    names, constants = kernel.src.fn.arg_names, kernel.src.constants
    return any(value is True and names[place[0]] == "RETRY" for place, value in constants.items() if len(place) == 1)
