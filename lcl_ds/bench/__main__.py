"""``python -m lcl_ds.bench losses|contrastive|sigmoid|train|data``: compare our work with that of other projects.

losses, contrastive and sigmoid compare the losses of lcl_kernels; train compares a whole training step with the
published layout of padded rows, dense masks and full logits, and shows tokens per second too; data compares loading and
packing with other pipelines.

Prints a table per shape: median time of forward and backward, useful TFLOP/s, their share of what a matrix product
reaches in the same run, peak memory without the inputs, and errors against float64. A method that cannot run is named
with the reason. --json keeps everything, and is whole after every row, so an interrupted run leaves what it has.
"""

import argparse
import json
import shlex
import signal
import sys
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from lcl_ds.bench.case import Case
from lcl_ds.bench.contrastive import contrastive_cases
from lcl_ds.bench.figures import draw_contrastive, draw_losses, draw_sigmoid
from lcl_ds.bench.losses import loss_cases
from lcl_ds.bench.measure import DeviceLostError
from lcl_ds.bench.peers import CONTRASTIVE, DTYPES, LOSSES, OURS, SIGMOID
from lcl_ds.bench.runner import Record, describe_environment, give_back_running, new_record, now, run_cases
from lcl_ds.bench.sigmoid import sigmoid_cases
from lcl_ds.bench.table import open_console, show_rows
from lcl_ds.cli import run_command
from lcl_ds.errors import UserError
from lcl_ds.files import check_output, write_whole

METHODS = {"losses": LOSSES, "contrastive": CONTRASTIVE, "sigmoid": SIGMOID}
FIGURES: dict[str, Callable[[dict[str, Any], Path], list[Path]]] = {
    "losses": draw_losses,
    "contrastive": draw_contrastive,
    "sigmoid": draw_sigmoid,
}
LETTERS = {"losses": "N,H,V", "contrastive": "M,D", "sigmoid": "M,D"}
LOSS_JOBS = {
    "losses": "linear layer and cross entropy",
    "contrastive": "symmetric InfoNCE",
    "sigmoid": "pairwise sigmoid loss",
}
SCALES = {"contrastive": 14.3, "sigmoid": 10.0}
REPEATS = {"cuda": 20, "cpu": 3}
SIZES = {
    "rows": "packed rows in a step",
    "context": "tokens of a padded row",
    "row_tokens": "tokens of a packed row",
    "width": "of the decoder, a multiple of 64",
    "layers": "of the decoder",
    "vision_width": "of the vision tower, a multiple of 64",
    "vision_layers": "of the vision tower",
    "image_size": "in pixels, a multiple of 32",
    "vocab_size": "of the decoder",
}
"""Options of ``train``."""


def main(argv: list[str] | None = None) -> int:
    arguments = build_parser().parse_args(argv)
    words = sys.argv[1:] if argv is None else argv
    # A record is for others, to whom folders of this machine mean nothing.
    command = "python -m lcl_ds.bench " + shlex.join(Path(w).name if w.startswith("/") else w for w in words)
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)  # `timeout` ends a run like Ctrl-C
    job: Callable[[argparse.Namespace, str], int]
    job = {"train": run_train, "data": run_data}.get(arguments.job, run)
    try:
        return run_command(lambda: job(arguments, command))
    finally:
        signal.signal(signal.SIGTERM, before)


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m lcl_ds.bench", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    jobs = parser.add_subparsers(dest="job", required=True)
    for job, what in LOSS_JOBS.items():
        sub = jobs.add_parser(job, help=what, description=what)
        sub.add_argument("--json", type=Path, metavar="FILE", help="write all figures there")
        sub.add_argument("--plots", type=Path, metavar="DIR", help="write PNG files there")
        names = ", ".join(METHODS[job])
        sub.add_argument(
            "--peers", metavar="A,B", help=f"compare {OURS} with these alone, '' with none (default: all of {names})"
        )
        sub.add_argument(
            "--shape", action="append", default=[], metavar=LETTERS[job], help="may be repeated (default: by device)"
        )
        sub.add_argument("--dtype", choices=list(DTYPES), help="of the inputs (default: bf16 on a GPU, fp32 on a CPU)")
        sub.add_argument("--repeats", type=int, help="timed steps per method (default: 20 on a GPU, 3 on a CPU)")
        sub.add_argument("--seed", type=int, default=0, help="of the data (default: 0)")
        sub.add_argument("--workspace_mb", type=float, help=f"that of {OURS} (default: its own)")
        sub.add_argument("--no_memory", action="store_true", help="do not measure memory")
        sub.add_argument("--resume", action="store_true", help="keep the rows that the file of --json has")
        if job == "losses":
            sub.add_argument("--valid", metavar="F,F", help="fractions of labels that count (default: by shape)")
            sub.add_argument("--large", action="store_true", help="on a GPU, N 32768, H 4096, V 151936 too")
            continue
        scale = SCALES[job]
        sub.add_argument("--scale", type=float, default=scale, help=f"logit scale (default: {scale:g})")
        if job == "contrastive":
            sub.add_argument("--sweep", metavar="M,M", help="measure memory alone at these M too (default: by device)")
        else:
            sub.add_argument("--bias", type=float, default=-10.0, help="logit bias (default: -10)")
    add_train_parser(jobs)
    what = "loading and packing"
    sub = jobs.add_parser("data", help=what, description=what)
    sub.add_argument("--json", type=Path, metavar="FILE", help="write all figures there")
    sub.add_argument("--images", type=int, default=300, help="JPEGs that are loaded (default: 300)")
    sub.add_argument("--documents", type=int, default=8000, help="documents that are packed (default: 8000)")
    sub.add_argument("--repeats", type=int, default=3, help="passes of which the best counts (default: 3)")
    sub.add_argument("--seed", type=int, default=0, help="of the data (default: 0)")
    sub.add_argument("--memory", type=int, default=0, metavar="N", help="follow memory over N documents (default: no)")
    sub.add_argument("--plots", type=Path, metavar="DIR", help="write a PNG of the memory there")
    return parser


def add_train_parser(jobs: Any) -> None:
    what = "a whole training step"
    sub = jobs.add_parser("train", help=what, description=what)
    sub.add_argument("--json", type=Path, metavar="FILE", help="write all figures there")
    sub.add_argument("--kind", choices=["documents", "pairs"], help="MMC4-like or LAION-like samples (default: both)")
    sub.add_argument("--dtype", choices=list(DTYPES), help="of the weights (default: bf16 on a GPU, fp32 on a CPU)")
    sub.add_argument("--repeats", type=int, help="timed steps per method (default: 20 on a GPU, 3 on a CPU)")
    sub.add_argument("--seed", type=int, default=0, help="of the data and the weights (default: 0)")
    sub.add_argument("--no_memory", action="store_true", help="do not measure memory")
    for name, help_text in SIZES.items():
        sub.add_argument(f"--{name}", type=int, metavar="N", help=f"{help_text} (default: by device)")
    sub.set_defaults(plots=None)


def run(arguments: argparse.Namespace, command: str) -> int:
    """Compare losses.

    Raises:
        UserError: an option that cannot be used.
    """
    device = this_device()
    names, cases = choose_methods(arguments), choose_cases(arguments, device)
    if arguments.no_memory:
        cases = [case for case in cases if case.timed]

    def measure(console: Console, record: Record, options: dict[str, Any]) -> None:
        run_cases(cases, names, record, show=lambda case, rows: show_rows(console, case, rows), **options)

    return measure_and_write(arguments, command, cases[0].device, cases[0].dtype, measure)


def run_train(arguments: argparse.Namespace, command: str) -> int:
    """Compare training steps.

    Raises:
        UserError: an option that cannot be used.
    """
    # Only here, because they import transformers, which takes seconds.
    from lcl_ds.bench.train import METHODS as names
    from lcl_ds.bench.train import train_cases
    from lcl_ds.bench.train_runner import run_train_cases, show_train_rows

    device = this_device()
    sizes = {name: getattr(arguments, name) for name in SIZES}
    for name, size in sizes.items():
        if size is not None and size < 1:
            raise UserError(f"--{name} {size}: must be 1 or more")
    dtype = arguments.dtype or ("bf16" if device == "cuda" else "fp32")
    kinds = [arguments.kind] if arguments.kind else []
    cases = train_cases(device, dtype, kinds=kinds, seed=arguments.seed, **sizes)
    for case in cases:
        case.packed_rows()  # an error before minutes of work

    def measure(console: Console, record: Record, options: dict[str, Any]) -> None:
        show = partial(show_train_rows, console)
        run_train_cases(cases, names, record, show=show, **options)

    return measure_and_write(arguments, command, cases[0].device, cases[0].dtype, measure)


def run_data(arguments: argparse.Namespace, command: str) -> int:
    """Compare loading and packing.

    Raises:
        UserError: an option that cannot be used.
    """
    from lcl_ds.bench.data import LEAST_DOCUMENTS, draw_memory, measure_data, resident_memory, show_data

    for name, least in (("images", 1), ("documents", LEAST_DOCUMENTS), ("repeats", 1)):
        if getattr(arguments, name) < least:
            raise UserError(f"--{name} {getattr(arguments, name)}: must be {least} or more")
    check_output("--json", arguments.json)
    check_output("--plots", arguments.plots, folder=True)
    with tempfile.TemporaryDirectory() as folder:
        sizes = arguments.images, arguments.documents, arguments.repeats
        figures = measure_data(Path(folder), *sizes, seed=arguments.seed)
    console = open_console()
    show_data(console, figures)
    if arguments.memory:
        figures["memory_mib"] = taken = resident_memory(arguments.memory, every=max(1, arguments.memory // 100))
        early, late = taken[len(taken) // 10][1], taken[-1][1]
        console.print(f"resident memory: {early:.0f} MiB after {taken[len(taken) // 10][0]:,} documents, ", end="")
        console.print(f"{late:.0f} MiB after {taken[-1][0]:,}", highlight=False)
        if arguments.plots:
            console.print(str(draw_memory(taken, arguments.plots)), highlight=False, soft_wrap=True)
    if arguments.json:
        environment = describe_environment(torch.device("cpu"))
        record = {"command": command, "date": now(), "environment": environment, **figures}
        write_whole(arguments.json, json.dumps(record, indent=1) + "\n")
        console.print(str(arguments.json), highlight=False, soft_wrap=True)
    return 0


def this_device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def measure_and_write(
    arguments: argparse.Namespace,
    command: str,
    device: torch.device,
    dtype: torch.dtype,
    measure: Callable[[Console, Record, dict[str, Any]], None],
) -> int:
    """Name the machine, call ``measure`` and write what it found, be it interrupted."""
    repeats = REPEATS[device.type] if arguments.repeats is None else arguments.repeats
    if repeats < 1:
        raise UserError(f"--repeats {repeats}: must be 1 or more")
    check_output("--json", arguments.json)
    check_output("--plots", arguments.plots, folder=True)
    console = open_console()
    if device.type == "cpu":
        console.print("no GPU: torch paths at small shapes; these are not GPU figures")
    record = new_record(command, arguments.json, device, dtype, resume=getattr(arguments, "resume", False))
    show_machine(console, record)
    try:
        measure(console, record, {"repeats": repeats, "memory": not arguments.no_memory})
    except KeyboardInterrupt:
        give_back_running(record)
        print("interrupted: what is measured so far is kept", file=sys.stderr)
        return 130
    except DeviceLostError as error:
        print(f"error: the GPU takes no more work from this process: {error}", file=sys.stderr)
        return 1
    finally:
        write_results(console, arguments, record)
    return 0


def choose_methods(arguments: argparse.Namespace) -> list[str]:
    """Names of methods, ours first."""
    known = METHODS[arguments.job]
    if arguments.peers is None:
        return list(known)
    asked = [name.strip() for name in arguments.peers.split(",") if name.strip()]
    unknown = [name for name in asked if name not in known]
    if unknown:
        raise UserError(f"--peers: {', '.join(unknown)} is none of {', '.join(known)}")
    return [name for name in known if name == OURS or name in asked]


def choose_cases(arguments: argparse.Namespace, device: str) -> Sequence[Case]:
    dtype = arguments.dtype or ("bf16" if device == "cuda" else "fp32")
    letters = LETTERS[arguments.job]
    shapes: list[Any] = [read_numbers("--shape", text, int, letters) for text in arguments.shape]
    if arguments.workspace_mb is not None and not arguments.workspace_mb > 0:
        raise UserError(f"--workspace_mb {arguments.workspace_mb:g}: must be positive")
    common: dict[str, Any] = {"shapes": shapes, "seed": arguments.seed, "workspace_mb": arguments.workspace_mb}
    if arguments.job == "losses":
        fractions = read_numbers("--valid", arguments.valid, float) if arguments.valid else ()
        if any(fraction > 1 for fraction in fractions):
            raise UserError(f"--valid {arguments.valid}: fractions are at most 1")
        return loss_cases(device, dtype, fractions=fractions, large=arguments.large, **common)
    if arguments.job == "sigmoid":
        return sigmoid_cases(device, dtype, scale=arguments.scale, bias=arguments.bias, **common)
    sweep = None if arguments.sweep is None else read_numbers("--sweep", arguments.sweep, int)
    return contrastive_cases(device, dtype, sweep=sweep, scale=arguments.scale, **common)


def read_numbers(option: str, text: str, kind: type, letters: str | None = None) -> tuple[Any, ...]:
    """Positive numbers between commas; as many as `letters` names."""
    try:
        numbers = tuple(kind(part) for part in text.split(","))
    except ValueError:
        numbers = ()
    if not numbers or not all(number > 0 for number in numbers):
        raise UserError(f"{option} {text}: must be positive numbers, {letters or 'separated by commas'}")
    if letters and len(numbers) != len(letters.split(",")):
        raise UserError(f"{option} {text}: must be {letters}, {len(letters.split(','))} numbers")
    return numbers


def show_machine(console: Console, record: Record) -> None:
    environment, ceilings = record.document["environment"], record.document["ceilings"]
    machine = environment["gpu"] or f"{environment['cpu']}, {environment['threads']} threads"
    n, dtype = ceilings["matmul_n"], ceilings["matmul_dtype"]
    console.print(
        f"{machine}; torch {environment['torch']}, triton {environment['triton']}; {dtype} matmul of {n}: "
        f"{ceilings['matmul_tflops']:.4g} TFLOP/s, copy: {ceilings['copy_tb_per_s']:.3g} TB/s\n",
        highlight=False,
    )


def write_results(console: Console, arguments: argparse.Namespace, record: Record) -> None:
    """The files that were asked for, of whatever rows there are."""
    record.write()
    if arguments.json:
        console.print(str(arguments.json), highlight=False, soft_wrap=True)
    if arguments.plots:
        for path in FIGURES[arguments.job]({**record.document, "rows": record.rows}, arguments.plots):
            console.print(str(path), highlight=False, soft_wrap=True)


if __name__ == "__main__":
    sys.exit(main())
