"""Every kernel once, against float64: ``python -m launch.gpu_check.first_light --out FILE``.

Writes one JSON line per check: its name, errors with their bars, ok, seconds and a message. Checks run in a few worker
processes, so that one which hangs, crashes or breaks the GPU's context loses nothing but itself.
"""

import argparse
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

from launch.gpu_check.pool import Answer, Pool, Task, context_is_lost, one_line, serve

CHECK_S = 45.0
"""Of one check: mostly the compilation of a few kernels."""


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="file of JSON lines")
    parser.add_argument("--seconds", type=float, default=120.0, help="for all checks (default: 120)")
    parser.add_argument("--workers", type=int, default=4, help="processes (default: 4)")
    parser.add_argument("--only", action="append", default=[], metavar="NAME", help="this check alone; may be repeated")
    parser.add_argument("--dry", action="store_true", help="at tiny size, without a GPU")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.worker:
        serve(run_check, broken=context_is_lost)
        return 0
    if options.out is None:
        parser.error("--out is needed")
    return run_checks(options.out, options.only, options.workers, options.seconds, dry=options.dry)


def run_checks(out: Path, only: list[str], workers: int, seconds: float, *, dry: bool) -> int:
    """Run the checks and write a line for each; 1 if any failed."""
    until = time.monotonic() + seconds
    command = [sys.executable, "-m", "launch.gpu_check.first_light", "--worker"]
    failed = 0
    with Pool(command, workers) as pool, out.open("w", encoding="utf-8") as file:
        _, answer = next(pool.run([{"list": True}], limit=CHECK_S, until=until))
        if "names" not in answer:
            print(f"error: no worker came up: {answer}", file=sys.stderr)
            return 1
        if not (answer["gpu"] or dry):
            print("error: no CUDA device; --dry runs tiny sizes without one", file=sys.stderr)
            return 1
        names = only or answer["names"]
        limit = CHECK_S * (5 if dry else 1)  # a dry run may share its machine
        for task, answer in pool.run([{"name": name} for name in names], limit=limit, until=until):
            line = line_of(task, answer)
            failed += not line["ok"]
            file.write(json.dumps(line) + "\n")
            file.flush()
            print(f"{'ok' if line['ok'] else 'FAILED':7}{line['seconds']:7.2f} s  {line['name']}  {line['message']}")
    print(f"{len(names)} checks, {failed} failed")
    return 1 if failed else 0


def line_of(task: Task, answer: Answer) -> dict[str, Any]:
    """The JSON line of a check, also of one that gave no answer."""
    if "ended" in answer:
        answer = {**answer, "ok": False, "message": answer["ended"]}
    if answer.get("broken"):
        answer = {**answer, "ok": False, "message": answer["message"] + "; the GPU's context is lost"}
    return {
        "name": task["name"],
        "ok": answer["ok"],
        "skipped": answer.get("skipped", False),
        "errors": answer.get("errors", {}),
        "seconds": answer.get("seconds", 0.0),
        "message": answer["message"],
    }


def run_check(task: Task) -> Answer:
    """In a worker."""
    from launch.gpu_check import checks

    if task.get("list"):
        return {"names": list(checks.CHECKS), "gpu": checks.GPU}
    try:
        errors = checks.CHECKS[task["name"]]()
    except checks.Skip as reason:
        return {"ok": True, "skipped": True, "message": f"skipped: {reason}"}
    except Exception as error:
        return {"ok": False, "message": one_line(error)}
    ok = checks.passes(errors)
    bad = [f"{what}: {error:.3g} > {bar:g}" for what, (error, bar) in errors.items() if not error <= bar]
    listed = {what: {"error": error if error == error else None, "bar": bar} for what, (error, bar) in errors.items()}
    return {"ok": ok, "errors": listed, "message": "; ".join(bad)}


if __name__ == "__main__":
    # Without a GPU, kernels run in Triton's interpreter; decided before lcl_kernels is imported.
    if "--worker" in sys.argv:
        import torch

        if not torch.cuda.is_available():
            os.environ["TRITON_INTERPRET"] = "1"
    sys.exit(main())
