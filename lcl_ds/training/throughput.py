"""How much arithmetic a step needs, and what fraction of the GPU's peak that is."""

from collections.abc import Iterable

import torch
from torch import Tensor

from lcl_ds.models.network import LCLModel

PEAK_BF16_TFLOPS = {"H200": 989.0, "H100 PCIe": 756.0, "H100": 989.0, "A100": 312.0, "B200": 2250.0, "L40S": 362.0}
"""Dense bf16 tensor-core peaks from the vendor's data sheets; more specific names first."""


def flops_per_token(model: LCLModel) -> dict[str, float]:
    """Matmul FLOPs of one step per token of each part, without attention scores.

    Per weight: 2 forward, 2 for its own gradient where it is trained, and 2 for the gradient that passes through, where
    the part itself or one before it is trained.

    Args:
        model: also one whose weights ZeRO has partitioned.

    Returns:
        ``vision`` per patch token, ``decoder`` per row token, ``head`` per label.
    """
    flops: dict[str, float] = {}
    learning = False
    for name in ("vision", "pooling", "decoder", "lm_head"):
        weights = list(getattr(model, name).parameters())
        trained = [weight for weight in weights if weight.requires_grad]
        learning = learning or bool(trained)
        if name == "decoder":  # a table that is looked up
            table = model.decoder.get_input_embeddings().weight
            weights, trained = ([w for w in some if w is not table] for some in (weights, trained))
        flops[name] = (4.0 if learning else 2.0) * size_of(weights) + 2.0 * size_of(trained)
    return {"vision": flops["vision"] + flops["pooling"], "decoder": flops["decoder"], "head": flops["lm_head"]}


def step_flops(per_token: dict[str, float], patches: int, tokens: int, labels: int) -> float:
    """Matmul FLOPs of one step, from :func:`flops_per_token` and what the step has seen."""
    return per_token["vision"] * patches + per_token["decoder"] * tokens + per_token["head"] * labels


def size_of(weights: Iterable[Tensor]) -> int:
    """Count the elements of whole weights, also of those that are spread over ranks."""
    return sum(getattr(weight, "ds_numel", weight.numel()) for weight in weights)


def peak_flops(device: torch.device) -> float | None:
    """bf16 peak of this GPU in FLOP/s; None on a CPU or an unknown card."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak * 1e12 for kind, peak in PEAK_BF16_TFLOPS.items() if kind in name), None)


def gpu_memory_gb(device: torch.device) -> float | None:
    """Return the most memory that was allocated on this GPU so far, in GiB; None on a CPU."""
    return torch.cuda.max_memory_allocated(device) / 2**30 if device.type == "cuda" else None
