"""What ``launch/gpu_check.sh`` writes down: the machine, its steps and the figures of the training run."""

import argparse
import json
import os
import platform
import statistics
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from lcl_ds.environment import git_commit, gpu_driver, output_of, versions

PACKAGES = ("torch", "triton", "transformers", "deepspeed", "webdataset", "numpy", "pydantic", "pytest-xdist")
CLOCKS = "clocks.sm,clocks.mem,clocks.max.sm,clocks.max.mem,temperature.gpu,power.draw,power.limit,memory.used"
WARM_UP = 10
"""Training steps that count in no median: compilation, allocator and loader settle in them."""
RATES = ("step_s", "data_s", "tokens_per_s", "images_per_s", "mfu", "padding_fraction")
LOSSES = ("loss", "generation_loss", "contrastive_loss")


def query_gpu(fields: str) -> dict[str, str] | None:
    """``nvidia-smi``'s answer for the first GPU."""
    answer = output_of("nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader")
    if not answer:
        return None
    return dict(zip(fields.split(","), (value.strip() for value in answer.splitlines()[0].split(",")), strict=False))


def describe_environment() -> dict[str, Any]:
    """Versions and the GPU; imports torch, and fails where that fails."""
    import torch

    from lcl_ds.bench.measure import PACKAGES as PEERS

    cuda = torch.cuda.is_available()
    nvcc = output_of("nvcc", "--version")
    return {
        "python": platform.python_version(),
        "packages": versions((*PACKAGES, *PEERS)),
        "cuda_available": cuda,
        "gpu": torch.cuda.get_device_name() if cuda else None,
        "gpu_memory_gb": torch.cuda.get_device_properties(0).total_memory / 2**30 if cuda else None,
        "capability": list(torch.cuda.get_device_capability()) if cuda else None,
        "driver": gpu_driver(),
        "cuda_of_torch": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "nvcc": nvcc.splitlines()[-1] if nvcc else None,
        "cores": len(os.sched_getaffinity(0)),
    }


def summarize_training(metrics: list[dict[str, Any]]) -> dict[str, Any]:
    """Medians without the warm-up, and the losses at both ends.

    Args:
        metrics: lines of a run's ``metrics.jsonl``, one per step; a run that was cut short has fewer.
    """
    settled = metrics[min(WARM_UP, len(metrics) // 2) :]
    medians = {
        f"median_{name}": statistics.median(line[name] for line in settled) if name in settled[0] else None
        for name in RATES
    }
    ends = {f"{which}_{name}": metrics[i][name] for name in LOSSES for which, i in (("first", 0), ("last", -1))}
    return {
        "steps": len(metrics),
        "steps_in_medians": len(settled),
        **medians,
        "images_per_step": statistics.mean(line["images"] for line in settled),
        "text_tokens_per_step": statistics.mean(line["text_tokens"] for line in settled),
        "memory_gb": metrics[-1].get("memory_gb"),
        "skipped_steps": sum(not line["applied"] for line in metrics),
        **ends,
    }


def read_steps(path: Path) -> list[dict[str, Any]]:
    """Records of the script, one line each: name, limit, seconds, exit code, command; a skipped step has no code."""
    steps: list[dict[str, Any]] = []
    for line in path.read_text(encoding="utf-8").splitlines():
        name, limit, seconds, code, what = line.split("\t", 4)
        if code == "skipped":
            steps.append({"name": name, "skipped": what})
            continue
        steps.append(
            {
                "name": name,
                "exit_code": int(code),
                "ok": code == "0",
                "timed_out": code in ("124", "137"),
                "seconds": float(seconds),
                "limit_s": int(limit),
                "command": what,
            }
        )
    return steps


def read_json(path: Path) -> Any:
    """None where the step that writes the file did not get so far."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError):
        return None


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Whole lines of a file of JSON lines; a killed step may leave half a line."""
    if not path.is_file():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.endswith("}")]


def read_results(work: Path) -> dict[str, list[dict[str, Any]]]:
    """What the steps have found so far, by step. Of the suite, only what did not pass, and the counts."""
    results = {path.stem: read_lines(path) for path in sorted(work.glob("*.jsonl"))}
    if "suite" in results:
        results["suite"] = [line for line in results["suite"] if line.get("outcome") not in ("passed", "skipped")]
    return results


def assemble(work: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """The contents of the JSON file so far.

    Args:
        work: the script's temporary folder.
    """
    steps = read_steps(work / "steps.tsv")
    metrics = read_lines(work / "run" / "metrics.jsonl")
    return {
        "command": arguments.command,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": git_commit(),
        "dry": arguments.dry,
        "complete": arguments.complete,
        "ok": arguments.complete and all(step.get("ok", True) for step in steps),
        "seconds": arguments.seconds,
        "environment": read_json(work / "environment.json"),
        "gpu_before": read_json(work / "gpu_before.json"),
        "gpu_after": query_gpu(CLOCKS) if arguments.complete else None,
        "steps": steps,
        "compiled_kernels": sum(1 for _ in (work / "triton_cache").rglob("*.cubin")),
        "results": read_results(work),
        "training": summarize_training(metrics) if metrics else None,
    }


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Helper of launch/gpu_check.sh.")
    commands = parser.add_subparsers(dest="action", required=True)
    commands.add_parser("environment", help="print versions and the GPU as JSON")
    commands.add_parser("gpu", help="print clocks, temperature and power as JSON")
    writer = commands.add_parser("assemble", help="write the JSON file")
    writer.add_argument("work", type=Path)
    writer.add_argument("out", type=Path)
    writer.add_argument("--command", required=True)
    writer.add_argument("--seconds", type=float, required=True)
    writer.add_argument("--dry", action="store_true")
    writer.add_argument("--complete", action="store_true")
    arguments = parser.parse_args(argv)
    if arguments.action == "environment":
        print(json.dumps(describe_environment(), indent=1))
    elif arguments.action == "gpu":
        print(json.dumps(query_gpu(CLOCKS)))
    else:
        document = json.dumps(assemble(arguments.work, arguments), indent=1) + "\n"
        whole = arguments.out.with_suffix(f".{os.getpid()}.part")  # a reader sees the old document or the new one
        whole.write_text(document, encoding="utf-8")
        whole.replace(arguments.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
