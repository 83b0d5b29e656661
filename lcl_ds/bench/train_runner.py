"""Measure the methods of ``python -m lcl_ds.bench train`` and show them."""

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from lcl_ds.batch import Batch
from lcl_ds.bench.case import Row
from lcl_ds.bench.measure import (
    MB,
    Call,
    cpu_peak_extra_bytes,
    first_line,
    gpu_peak_extra_bytes,
    in_fresh_process,
    recover,
    time_calls,
)
from lcl_ds.bench.runner import Record, relative_error
from lcl_ds.bench.table import milliseconds, note_of, number
from lcl_ds.bench.train import OURS, PADDED, PUBLISHED, TrainCase, is_packed, loss_of
from lcl_ds.flops import StepFlops, StepWork, total
from lcl_ds.models.network import LCLModel
from lcl_ds.objectives import lcl

SHORT = 512
"""Tokens of the rows that are compared, and that set up thread pools before memory is measured."""


def step(loss: Callable[[], Tensor], model: LCLModel) -> Tensor:
    """Forward and backward; the loss."""
    model.zero_grad(set_to_none=True)
    value = loss()
    value.backward()
    return value.detach()


def run_train_cases(
    cases: Sequence[TrainCase],
    names: Sequence[str],
    record: Record,
    *,
    repeats: int,
    memory: bool,
    show: Callable[[TrainCase, list[Row]], None],
) -> None:
    """Measure ``names`` on every case; ``show`` gets the rows of a case when they are whole."""
    began = time.perf_counter()
    for case in cases:
        results: list[Row] = [
            {"method": name, **case.describe(), "status": "pending", "reason": None} for name in names
        ]
        record.rows += results
        _compare(case, results)
        _time(case, results, repeats)
        record.write()
        for result in results if memory else []:
            _measure_memory(case, result)
            record.write()
        record.document["seconds"] = time.perf_counter() - began
        show(case, results)
    record.document["complete"] = True
    record.write()


def shortened(case: TrainCase) -> TrainCase:
    """One row of at most 512 tokens of the same kind."""
    return replace(case, rows=1, context=min(case.context, SHORT), row_tokens=min(case.row_tokens, SHORT))


def _compare(case: TrainCase, results: list[Row]) -> None:
    """Loss and gradients of one short row against those of the published layout, in the precision of the run."""
    small = shortened(case)
    model = small.model()

    def gradients(method: str) -> Tensor:
        loss = step(loss_of(method, model, small.batch(is_packed(method))), model)
        return torch.cat([loss.view(1), *(w.grad.flatten() for w in model.parameters() if w.grad is not None)])

    truth = gradients(PUBLISHED)
    for result in results:
        found = gradients(result["method"])
        result["errors"] = {
            "loss": relative_error(found[:1], truth[:1]),
            "gradient": relative_error(found[1:], truth[1:]),
        }


def _time(case: TrainCase, results: list[Row], repeats: int) -> None:
    model = case.model()
    flops = StepFlops(lcl.Objective(model, lcl.Settings()))
    losses: dict[str, Tensor] = {}
    calls: dict[str, Call] = {}

    def call(method: str, loss: Callable[[], Tensor]) -> None:
        losses[method] = step(loss, model)

    for result in results:
        method = result["method"]
        batch = case.batch(is_packed(method))
        slots = batch.input_ids.numel()
        result.update(
            documents=batch.document_count,
            rows=len(batch.input_ids),
            tokens=slots,
            useful_tokens=batch.token_count,
            images=batch.image_count,
            padding_fraction=1 - batch.token_count / slots,
            flops=total(flops.of(work_of(method, batch))).model,
        )
        calls[method] = partial(call, method, loss_of(method, model, batch))
    times = time_calls(calls, case.device, repeats)
    for result in results:
        seconds = times[result["method"]]
        if isinstance(seconds, Exception):
            result.update(status="failed", reason=first_line(seconds))
            continue
        median = statistics.median(seconds)
        result.update(
            status="ok",
            loss=float(losses[result["method"]]),
            times_ms=[1e3 * second for second in seconds],
            median_ms=1e3 * median,
            tokens_per_s=result["tokens"] / median,
            useful_tokens_per_s=result["useful_tokens"] / median,
        )
    _add_ratios(results)
    model.zero_grad(set_to_none=True)
    recover(case.device)


def work_of(method: str, batch: Batch) -> StepWork:
    """Count what a method computes on its batch; the published layout's attention spans whole rows."""
    pairs, tokens = len(batch.readouts["context"]), batch.input_ids.numel()
    squares = batch.token_squares if method in (OURS, PADDED) else tokens * batch.input_ids.shape[1]
    return StepWork(batch.image_count, tokens, squares, len(batch.labels), pairs, pairs**2)


def _add_ratios(results: list[Row]) -> None:
    """Time, memory and arithmetic over those of ours."""
    ours = next((result for result in results if result["method"] == OURS), {})
    ratios = {"median_ms": "ratio_to_ours", "peak_extra_mb": "memory_ratio_to_ours", "flops": "flops_ratio_to_ours"}
    for result in results:
        for key, ratio in ratios.items():
            if key in result and ours.get(key):
                result[ratio] = result[key] / ours[key]


def _measure_memory(case: TrainCase, result: Row) -> None:
    """The peak beside the weights; its failure leaves the times as they are."""
    try:
        measure = peak_of_step if case.device.type == "cuda" else partial(in_fresh_process, peak_of_step)
        result["peak_extra_mb"] = measure(case, result["method"]) / MB
    except Exception as error:
        result["memory_failure"] = first_line(error)


def peak_of_step(case: TrainCase, method: str) -> int:
    """Bytes that one step takes at its peak beside weights and batch, gradients included."""
    model = case.model()
    step(loss_of(method, model, shortened(case).batch(is_packed(method))), model)
    model.zero_grad(set_to_none=True)
    loss = loss_of(method, model, case.batch(is_packed(method)))
    if case.device.type == "cuda":
        return gpu_peak_extra_bytes(lambda: step(loss, model), case.device)
    return cpu_peak_extra_bytes(lambda: step(loss, model))


def show_train_rows(console: Console, case: TrainCase, results: list[Row]) -> None:
    """One line per method."""
    _add_ratios(results)
    table = Table()
    table.add_column("method", no_wrap=True)
    headings = ("ms", "x ours", "GFLOP", "x ours", "rows", "padding", "useful tokens/s", "extra MiB")
    for heading in (*headings, "x ours", "loss", "error of loss", "error of gradient"):
        table.add_column(heading, justify="right")
    table.add_column("note")
    for result in results:
        errors = result.get("errors", {})
        table.add_row(
            result["method"],
            milliseconds(result.get("median_ms")),
            number(result.get("ratio_to_ours"), ".2f"),
            number(result["flops"] / 1e9 if "flops" in result else None, ",.0f"),
            number(result.get("flops_ratio_to_ours"), ".2f"),
            number(result.get("rows"), "d"),
            number(result.get("padding_fraction"), ".0%"),
            number(result.get("useful_tokens_per_s"), ",.0f"),
            number(result.get("peak_extra_mb"), ".0f"),
            number(result.get("memory_ratio_to_ours"), ".2f"),
            number(result.get("loss"), ".4f"),
            number(errors.get("loss"), ".1e"),
            number(errors.get("gradient"), ".1e"),
            note_of(result),
        )
    console.print(case.title, style="bold", highlight=False)
    console.print(table)
