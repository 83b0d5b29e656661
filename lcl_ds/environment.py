"""Describe what something ran on: versions of packages, the machine, the state of the code."""

import os
import platform
import subprocess
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path
from typing import Any

CODE = Path(__file__).resolve().parents[1]
"""The checkout, where this is one."""
PACKAGES = ("torch", "deepspeed", "transformers", "accelerate", "webdataset", "triton", "safetensors", "numpy")
"""What a run depends on."""


def versions(packages: Iterable[str] = PACKAGES) -> dict[str, str | None]:
    """Look up versions of installed packages by name; None where one is not installed."""
    return {name: version_of(name) for name in packages}


def version_of(package: str) -> str | None:
    """Look up the version of an installed package; None where it is not installed."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def output_of(*command: str) -> str | None:
    """Return what a command prints, without blanks around it; None where it is missing, fails or prints nothing."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() or None


def git_commit() -> str | None:
    """Read the commit of the checkout that runs; None for an installed package, wherever its environment lies."""
    if not (CODE / ".git").exists():
        return None
    return output_of("git", "-C", str(CODE), "rev-parse", "HEAD")


def git_modified(*paths: str) -> bool:
    """Say whether tracked or new files under ``paths`` of the checkout differ from the commit; no paths: anywhere."""
    return output_of("git", "-C", str(CODE), "status", "--porcelain", "--", *paths) is not None


def gpu_driver() -> str | None:
    """Look up the version of the driver of the first NVIDIA GPU; None without one."""
    printed = output_of("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    return printed.partition("\n")[0] if printed else None


def cpu_name() -> str:
    """Return the name that the processor gives itself."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def machine() -> dict[str, Any]:
    """Describe the operating system, Python, the first GPU and the number of processors."""
    import torch  # here, because the rest also describes machines on which it does not work

    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "cpu_count": os.cpu_count(),
    }
