"""What data sheets say of GPUs: peak, memory, and the speed of what connects them."""

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch

from lcl_ds.errors import UserError
from lcl_ds.files import read_json, read_yaml


@dataclass(frozen=True)
class Gpu:
    """One kind of GPU. Speeds are those of one GPU in one direction."""

    name: str
    peak_tflops: float
    """bf16 on the matrix units, without sparsity."""
    memory_gib: float
    """What torch can allocate from, which is a little less than the data sheet's figure."""
    memory_gb_per_s: float
    link_gb_per_s: float
    """To the other GPUs of its host."""
    network_gb_per_s: float
    """To other hosts; hosts differ, this is the usual one."""
    source: str
    cuda_name: str | None = None
    """What the driver's name of the card contains."""


GPUS = {
    "h100_pcie": Gpu(
        "H100 PCIe", 756, 79.2, 2000, 64, 25, "NVIDIA H100 data sheet (PCIe 5 x16, 200 Gbit/s network)", "H100 PCIe"
    ),
    "h100": Gpu(
        "H100 SXM", 989, 79.2, 3350, 450, 50,
        "NVIDIA H100 data sheet; NVLink 900 GB/s both ways; DGX H100: 400 Gbit/s a GPU; memory as torch reports it",
        "H100",
    ),
    "h200": Gpu(
        "H200 SXM", 989, 139.8, 4800, 450, 50,
        "NVIDIA H200 data sheet (141 GB); NVLink 900 GB/s both ways; DGX H200: 400 Gbit/s a GPU",
        "H200",
    ),
    "b200": Gpu(
        "B200 SXM", 2250, 178, 7700, 900, 50,
        "NVIDIA HGX B200 data sheet (180 GB, 4.5 PFLOPS with sparsity); NVLink 1.8 TB/s both ways; 400 Gbit/s a GPU",
        "B200",
    ),
    "a100": Gpu(
        "A100 SXM 80 GB", 312, 79.2, 2039, 300, 25,
        "NVIDIA A100 data sheet; NVLink 600 GB/s both ways; DGX A100: 200 Gbit/s a GPU",
        "A100",
    ),
    "l40s": Gpu("L40S", 362, 44.4, 864, 32, 12.5, "NVIDIA L40S data sheet (PCIe 4 x16, 100 Gbit/s network)", "L40S"),
    "mi300x": Gpu(
        "MI300X", 1307, 191.5, 5300, 448, 50,
        "AMD Instinct MI300X data sheet (192 GB); Infinity Fabric 896 GB/s both ways; 400 Gbit/s a GPU",
        "MI300X",
    ),
}  # fmt: skip
"""By the name that a user gives; of names that contain each other the more specific one comes first."""


def gpu_of(name_or_path: str) -> Gpu:
    """Find a GPU by its name in :data:`GPUS`, or read it from a YAML or JSON file with the fields of :class:`Gpu`.

    Raises:
        UserError: there is no such name or file, or a field of it is missing, unknown or no positive number.
    """
    path = Path(name_or_path)
    if name_or_path in GPUS:
        return GPUS[name_or_path]
    if path.suffix not in (".yaml", ".yml", ".json") or not path.is_file():
        raise UserError(
            f"--gpu {name_or_path}: there is no such GPU or file; known: {', '.join(GPUS)}; or name a YAML or JSON "
            "file that describes one (docs/planning.md)"
        )
    values = read_json(path) if path.suffix == ".json" else read_yaml(path)
    if not isinstance(values, dict):
        raise UserError(f"{path}: a mapping is expected that describes a GPU")
    return _checked(path, {"name": path.stem, "source": str(path), **values})


def _checked(path: Path, values: dict[str, Any]) -> Gpu:
    known = {field.name: field for field in fields(Gpu)}
    problems = [f"{path}: {name}: unknown; a GPU has {', '.join(known)}" for name in values.keys() - known.keys()]
    for name, entry in known.items():
        if entry.type is not float:
            continue
        value = values.get(name)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < float("inf"):
            problems.append(f"{path}: {name}: a positive number is expected, got {value!r}")
    if problems:
        raise UserError(problems)
    return Gpu(**values)


def peak_flops(device: torch.device) -> float | None:
    """Return the bf16 peak of this GPU in operations a second; None on a CPU or an unknown card."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((gpu.peak_tflops * 1e12 for gpu in GPUS.values() if gpu.cuda_name and gpu.cuda_name in name), None)
