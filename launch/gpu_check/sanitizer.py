"""compute-sanitizer's memcheck over one tiny call of each loss: ``python -m launch.gpu_check.sanitizer --out FILE``.

The calls run side by side, because the tool makes each of them some fifty times as slow. Where it is missing, nothing
is checked and the line says so; ``--dry`` makes one call without it.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

TOOL = ("compute-sanitizer", "--tool", "memcheck", "--error-exitcode", "9")
CALLS = ("linear", "contrastive", "sigmoid")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="file of JSON lines")
    parser.add_argument("--seconds", type=float, default=60.0, help="for each call (default: 60)")
    parser.add_argument("--dry", action="store_true", help="one call, without the tool")
    parser.add_argument("--call", choices=CALLS, help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.call:
        make_call(options.call)
        return 0
    if options.out is None:
        parser.error("--out is needed")
    tool = [] if options.dry else list(TOOL)
    if tool and not shutil.which(tool[0]):
        lines = [{"name": "memcheck", "ok": True, "skipped": True, "message": f"{tool[0]} is not installed"}]
    else:
        calls = CALLS[-1:] if options.dry else CALLS
        with ThreadPoolExecutor(len(calls)) as threads:
            lines = list(threads.map(lambda call: run_call(call, tool, options.seconds), calls))
    options.out.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    print(*(json.dumps(line) for line in lines), sep="\n")
    return 0 if all(line["ok"] for line in lines) else 1


def run_call(call: str, tool: list[str], seconds: float) -> dict[str, Any]:
    """One call under the tool, and what the tool found first."""
    command = [*tool, sys.executable, "-m", "launch.gpu_check.sanitizer", "--call", call]
    # Every tensor then has an allocation of its own, whose ends the tool knows.
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    began = time.monotonic()
    try:
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=seconds)
        code, output = done.returncode, done.stdout + done.stderr
    except subprocess.TimeoutExpired:
        code, output = 124, f"no end within {seconds:g} s"
    words = [line.strip("= ") for line in output.splitlines() if "Invalid" in line or "Error" in line]
    message = "" if code == 0 else (words or output.splitlines() or [f"exit code {code}"])[0][:300]
    return {"name": call, "ok": code == 0, "seconds": round(time.monotonic() - began, 2), "message": message}


def make_call(call: str) -> None:
    """One step with ragged sizes."""
    from launch.gpu_check import checks

    if call == "linear":
        data = checks.linear_data(100, 136, 1003) if checks.GPU else checks.linear_data(9, 9, 9)
        data.step()
    elif call == "contrastive":
        checks.contrastive_step(*checks.contrastive_data(130, 136, 14.3))
    else:
        checks.check_sigmoid(130, 136, 14.3, -10.0)


if __name__ == "__main__":
    if "--call" in sys.argv:
        import torch

        if not torch.cuda.is_available():
            os.environ["TRITON_INTERPRET"] = "1"  # before lcl_kernels is imported
    sys.exit(main())
