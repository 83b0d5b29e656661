"""Measure every method on one case after another, and keep what is known so far in a JSON file."""

import json
import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import lcl_kernels  # noqa: F401 (imported before memory is measured)
import torch
from torch import Tensor

from lcl_ds.bench.case import Case, Inputs, Row
from lcl_ds.bench.measure import (
    MB,
    Call,
    cpu_peak_extra_bytes,
    describe_environment,
    first_line,
    gpu_peak_extra_bytes,
    in_fresh_process,
    measure_ceilings,
    recover,
    square_matmul,
    time_calls,
    time_graph,
    without_frames,
)
from lcl_ds.bench.peers import OURS, Loss, UnavailableError
from lcl_ds.files import write_whole

MATMUL = "matmul"
PENDING, RUNNING = "pending", "running"
ENDED = "the process ended before it was measured"
WARM_UP_ROWS = 16
"""Rows of a step that sets up thread pools and libraries before memory is measured on a CPU."""


@dataclass
class Record:
    """The JSON document of a run, written after every change; ``path`` None keeps it in memory."""

    path: Path | None
    document: dict[str, Any]
    rows: list[Row] = field(default_factory=list)

    def write(self) -> None:
        """Atomically: a reader sees the old document or the new one."""
        add_ratios(self.rows)
        if self.path is None:
            return
        document = without_nan({**self.document, "rows": self.rows})
        write_whole(self.path, json.dumps(document, indent=1, allow_nan=False) + "\n")


def without_nan(value: Any) -> Any:
    """The same with null for numbers that are not finite, which JSON lacks."""
    if isinstance(value, dict):
        return {key: without_nan(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [without_nan(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def now() -> str:
    """Date and time in UTC."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def new_record(
    command: str, path: Path | None, device: torch.device, dtype: torch.dtype, *, resume: bool = False
) -> Record:
    """A document without rows, or with those that an earlier run left in `path`; measures what the machine reaches."""
    document = {
        "command": command,
        "date": now(),
        "complete": False,
        "seconds": 0.0,
        "environment": describe_environment(device),
        "ceilings": measure_ceilings(device, dtype),
    }
    record = Record(path, document, rows_left_in(path) if resume and path else [])
    record.write()
    return record


def give_back_running(record: Record) -> None:
    """Let a later run try what was running when this one was interrupted."""
    for row in record.rows:
        if row["status"] == RUNNING:
            row["status"] = PENDING


def rows_left_in(path: Path) -> list[Row]:
    """The rows of an earlier run. What was running when it ended counts as failed, and is not tried again."""
    if not path.is_file():
        return []
    rows: list[Row] = json.loads(path.read_text(encoding="utf-8"))["rows"]
    for row in rows:
        if row["status"] == RUNNING:
            row.update(status="failed", reason=ENDED)
    return rows


def run_cases(
    cases: Sequence[Case],
    names: Sequence[str],
    record: Record,
    *,
    repeats: int,
    memory: bool,
    show: Callable[[Case, list[Row]], None],
) -> None:
    """Measure `names` on every case; `show` gets the rows of a case when they are whole.

    Raises:
        DeviceLostError: a method broke the GPU's context; the record says which rows are missing.
    """
    began = time.perf_counter()
    table = [(case, [row_of(record, case, name) for name in names]) for case in cases]

    def note() -> None:
        record.document["seconds"] = time.perf_counter() - began
        record.write()

    note()
    try:
        for part in parts_of(table):
            for case, rows in part:
                for row in rows:
                    row["status"] = RUNNING
                note()
                _run_case(case, rows, record, repeats, memory)
                note()
            for case, rows in part:
                _time_graphs(case, rows, record, repeats)
    finally:
        note()
        for case, rows in table:
            show(case, rows)
    record.document["complete"] = True
    record.write()


def row_of(record: Record, case: Case, name: str) -> Row:
    """The row of a method: one that an earlier run left in the record, or a new one."""
    described = {"method": name, **case.describe()}
    for row in record.rows:
        if all(row.get(key) == value for key, value in described.items()):
            return row
    record.rows.append({**described, "status": PENDING, "reason": None})
    return record.rows[-1]


def parts_of(table: list[tuple[Case, list[Row]]]) -> list[list[tuple[Case, list[Row]]]]:
    """In which order rows are measured; those that have been are left out.

    On a CPU all methods of a case take turns. On a GPU each method runs on all cases before the next one begins: should
    the time run out, the last methods lack figures, and no case lacks all.
    """
    waiting = [(case, [row for row in rows if row["status"] == PENDING]) for case, rows in table]
    waiting = [(case, rows) for case, rows in waiting if rows]
    if all(case.device.type == "cpu" for case, _ in waiting):
        return [[part] for part in waiting]
    names = dict.fromkeys(row["method"] for _, rows in table for row in rows)
    parts = [[(case, [row for row in rows if row["method"] == name]) for case, rows in waiting] for name in names]
    return [[(case, rows) for case, rows in part if rows] for part in parts]


def _run_case(case: Case, rows: list[Row], record: Record, repeats: int, memory: bool) -> None:
    losses: dict[str, Loss] = {}
    for row in rows:
        try:
            losses[row["method"]] = case.methods[row["method"]].function(case)
        except UnavailableError as reason:
            row.update(status="unavailable", reason=str(reason))
        except Exception as error:
            row.update(status="failed", reason=first_line(error))
    runnable = [row for row in rows if row["method"] in losses]
    if not runnable:
        return
    try:
        inputs = case.inputs()
    except Exception as error:
        for row in runnable:
            row.update(status="failed", reason=f"inputs: {first_line(error)}")
        return
    if case.timed:
        _time(case, runnable, losses, inputs, repeats)
        record.write()
    for row in runnable:
        if memory and row["status"] != "failed":
            _measure_memory(case, row, losses[row["method"]], inputs)
            record.write()
    if case.timed and case.checked:
        _measure_errors(case, [row for row in runnable if row["status"] == "ok"], losses, inputs, record)


def _time_graphs(case: Case, rows: list[Row], record: Record, repeats: int) -> None:
    """On a GPU: the time of a CUDA graph of the same step, or why there can be none."""
    for row in rows if case.device.type == "cuda" and case.timed else []:
        if row["status"] != "ok":
            continue
        if case.methods[row["method"]].waits:
            row["graph_failure"] = "waits for the device"
            continue
        row["graph_failure"] = ENDED  # should the process not live to say otherwise
        record.write()
        inputs: Inputs = ()
        try:
            loss, inputs = case.methods[row["method"]].function(case), case.inputs()
            seconds = time_graph(partial(step, loss, inputs), case.device, repeats)
            row["graph_ms"] = 1e3 * statistics.median(seconds)
            del row["graph_failure"]
        except Exception as error:
            row["graph_failure"] = first_line(without_frames(error))
        finally:
            clear_gradients(inputs)
        record.write()
        recover(case.device)


def step(loss: Loss, inputs: Inputs) -> Tensor:
    """Forward and backward; the loss. Gradients of an earlier step are dropped first, as zero_grad does."""
    clear_gradients(inputs)
    value = loss(*inputs)
    value.backward()
    return value.detach()


def clear_gradients(inputs: Inputs) -> None:
    for tensor in inputs:
        tensor.grad = None


def _time(case: Case, rows: list[Row], losses: dict[str, Loss], inputs: Inputs, repeats: int) -> None:
    """Time the methods of `rows`, and beside them, under the same clocks and noise, a matrix product."""
    values: dict[str, Tensor] = {}

    def call(name: str) -> None:
        values[name] = step(losses[name], inputs)

    matmul, matmul_flops = square_matmul(case.device, case.dtype)
    calls: dict[str, Call] = {MATMUL: matmul, **{row["method"]: partial(call, row["method"]) for row in rows}}
    compiling = [name for name, method in case.methods.items() if method.compiles]
    times = time_calls(calls, case.device, repeats, compiling)
    matmul_times = times[MATMUL]
    if isinstance(matmul_times, Exception):
        raise matmul_times
    matmul_tflops = matmul_flops / statistics.median(matmul_times) / 1e12
    for row in rows:
        seconds = times[row["method"]]
        if isinstance(seconds, Exception):
            row.update(status="failed", reason=first_line(seconds))
            continue
        median = statistics.median(seconds)
        tflops = case.useful_flops / median / 1e12
        row.update(
            status="ok",
            reason=None,
            loss=float(values[row["method"]]),
            times_ms=[1e3 * second for second in seconds],
            median_ms=1e3 * median,
            useful_tflops=tflops,
            matmul_tflops=matmul_tflops,
            share_of_matmul=tflops / matmul_tflops,
            floor_ms=case.useful_flops / matmul_tflops / 1e9,
        )


def _measure_memory(case: Case, row: Row, loss: Loss, inputs: Inputs) -> None:
    """Fill in the peak of extra memory; its failure leaves the times as they are."""
    try:
        if case.device.type == "cuda":
            if not case.timed:
                step(loss, inputs)  # compiles
            clear_gradients(inputs)
            extra = gpu_peak_extra_bytes(lambda: step(loss, inputs), case.device)
        else:
            extra = in_fresh_process(peak_of_step, case, row["method"])
        row["peak_extra_mb"] = extra / MB
        row["status"] = "ok"
    except Exception as error:
        reason = str(error) if isinstance(error, RuntimeError) and case.device.type == "cpu" else first_line(error)
        row.update({"memory_failure": reason} if case.timed else {"status": "failed", "reason": reason})
    finally:
        clear_gradients(inputs)
        recover(case.device)


def peak_of_step(case: Case, name: str) -> int:
    """Bytes that one step takes at its peak on a CPU, gradients included; for a process of its own.

    A method that compiles has done a whole step before, so that its compiler is not counted.
    """
    method, inputs = case.methods[name], case.inputs()
    loss = method.function(case)
    step(loss, inputs if method.compiles else case.first_rows(inputs, WARM_UP_ROWS))
    clear_gradients(inputs)
    return cpu_peak_extra_bytes(lambda: step(loss, inputs))


def _measure_errors(case: Case, rows: list[Row], losses: dict[str, Loss], inputs: Inputs, record: Record) -> None:
    """Relative Frobenius errors against float64 at fewer rows of the same data."""
    count = min(case.truth_rows, case.shape[0])
    small = case.first_rows(inputs, count)
    try:
        exact = tuple(t.detach().double().requires_grad_() if t.requires_grad else t for t in small)
        truth = results_of(case.truth, exact, case)
    except Exception as error:
        for row in rows:
            row["error_failure"] = f"float64: {first_line(error)}"
        return
    finally:
        exact = ()
    for row in rows:
        row["error_rows"] = count
        try:
            found = results_of(losses[row["method"]], small, case)
            row["errors"] = {name: relative_error(found[name], truth[name]) for name in truth}
        except Exception as error:
            row["error_failure"] = first_line(without_frames(error))
        recover(case.device)
        record.write()


def results_of(loss: Loss, inputs: Inputs, case: Case) -> dict[str, Tensor]:
    """The loss and the gradients that are compared, by name."""
    value = step(loss, inputs)
    results = [value, *(t.grad for t in inputs if t.requires_grad)]
    return {name: tensor for name, tensor in zip(case.result_names, results, strict=False) if tensor is not None}


def relative_error(found: Tensor, truth: Tensor) -> float:
    """Frobenius norm of the difference over that of the truth."""
    return float((found.double() - truth).norm() / truth.norm())


def add_ratios(rows: list[Row]) -> None:
    """``ratio_to_ours``: median time over that of lcl_kernels on the same case."""
    keys = ("shape", "valid_fraction", "dtype")
    ours = {str([row.get(key) for key in keys]): row for row in rows if row["method"] == OURS}
    for row in rows:
        reference = ours.get(str([row.get(key) for key in keys]), {})
        if "median_ms" in row and "median_ms" in reference:
            row["ratio_to_ours"] = row["median_ms"] / reference["median_ms"]
