"""Put a network where it computes: on a device, or, where it is larger, on the host with its weights as visitors."""

import logging
from typing import Any

import torch
from accelerate import cpu_offload
from accelerate.hooks import AlignDevicesHook, SequentialHook
from torch import Tensor, nn

logger = logging.getLogger(__name__)

ROOM = 0.8
"""Fraction of a device's free memory that weights may take; the rest is for activations."""


def place(module: nn.Module, device: torch.device, offload: bool = False) -> None:
    """Move a frozen network that lies on the host to ``device``, if its weights fit there.

    Where they do not, they stay on the host, and each module's weights are on the device while it computes. Every call
    then moves all of them: that costs time, not results.

    Args:
        offload: leave the weights on the host in any case.
    """
    if not offload and fits(module, device):
        module.to(device)
        return
    logger.info("the weights stay on the host and visit %s one module at a time", device)
    tower: Any
    for tower in module.modules():
        if hasattr(tower, "choose_attention"):
            tower.choose_attention(device)
    # torch's attention module reads the weights of its projection without calling it.
    cpu_offload(module, execution_device=device, preload_module_classes=["MultiheadAttention"])


def fits(module: nn.Module, device: torch.device) -> bool:
    """Say whether the weights leave room for activations in what is free of the memory of ``device``."""
    if device.type != "cuda":
        return True
    needed = sum(weight.numel() * weight.element_size() for weight in module.parameters())
    return needed < ROOM * torch.cuda.mem_get_info(device)[0]


def device_of(module: nn.Module) -> torch.device:
    """Return the device that a network computes on, which is not where weights are that only visit it."""
    for child in module.modules():
        if (hook := _visiting(child)) is not None:
            return torch.device(hook.execution_device)
    return next(module.parameters()).device


def weights_of(module: nn.Module) -> dict[str, Tensor]:
    """Return weights and buffers by name, wherever they lie."""
    weights = module.state_dict()
    for prefix, child in module.named_modules():
        if (hook := _visiting(child)) is not None:
            own = (name for name, _ in child.named_parameters(recurse=hook.place_submodules))
            weights |= {f"{prefix}.{name}".removeprefix("."): hook.weights_map[name] for name in own}
    return weights


def visits(module: nn.Module) -> bool:
    """Say whether the weights of a network stay on the host and visit the device."""
    return any(_visiting(child) is not None for child in module.modules())


def _visiting(module: nn.Module) -> AlignDevicesHook | None:
    """Return what fetches a module's own weights from the host, if they visit the device."""
    hook = getattr(module, "_hf_hook", None)
    hooks = hook.hooks if isinstance(hook, SequentialHook) else (hook,)
    return next((each for each in hooks if isinstance(each, AlignDevicesHook) and each.offload), None)
