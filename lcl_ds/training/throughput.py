"""How much arithmetic a step needs, and what share of the GPU's peak that is."""

import torch

from lcl_ds.models.lcl import LCLModel

PEAK_BF16_TFLOPS = {"H200": 989.0, "H100 PCIe": 756.0, "H100": 989.0, "A100": 312.0, "B200": 2250.0, "L40S": 362.0}
"""Dense bf16 tensor-core peaks from the vendor's data sheets; more specific names first."""


def flops_per_token(model: LCLModel) -> dict[str, float]:
    """Forward plus backward matmul FLOPs (6 per weight and token) of each part, without attention scores.

    Returns:
        ``vision`` per patch token, ``decoder`` per row token, ``head`` per label.
    """
    size = {name: sum(w.numel() for w in module.parameters()) for name, module in model.named_children()}
    embeddings = sum(w.numel() for w in model.decoder.get_input_embeddings().parameters())
    return {
        "vision": 6.0 * (size["vision"] + size["pooling"]),
        "decoder": 6.0 * (size["decoder"] - embeddings),
        "head": 6.0 * size["lm_head"],
    }


def peak_flops(device: torch.device) -> float | None:
    """bf16 peak of this GPU in FLOP/s; None on a CPU or an unknown card."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak * 1e12 for part, peak in PEAK_BF16_TFLOPS.items() if part in name), None)
