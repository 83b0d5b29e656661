"""The blocks of transformers towers: what is recomputed, compiled, gathered and given its first weights as one."""

from typing import Any

from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer


def blocks_of(model: nn.Module) -> list[GradientCheckpointingLayer]:
    """List the blocks of a tower, or of all towers of a model, in their order."""
    return [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]


def recompute_blocks(tower: Any, every: int) -> None:
    """Keep no activations of every `every`-th block of a transformers model, the first included; 0: keep all."""
    if not every:
        return
    # transformers 5.17 knows only the older name, which later releases deprecate.
    enable = getattr(tower, "activation_checkpointing_enable", None) or tower.gradient_checkpointing_enable
    enable()
    for number, block in enumerate(blocks_of(tower)):
        block.gradient_checkpointing = number % every == 0
