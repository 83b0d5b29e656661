"""AdamW and the groups of weights it treats alike."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from lcl_ds.config import TrainSettings
from lcl_ds.models.heads import LogitScale

NO_DECAY_NAMES = ("class_embedding", "position_embedding", "position_embeddings", "wpe", "query", "cls_token")
"""Weights of two or more dimensions that are no matrices: one vector per position or class."""


class BoundedAdamW(torch.optim.AdamW):
    """AdamW that keeps a group's values within its ``bounds`` after every applied step.

    DeepSpeed hands the fp32 master weights of each group to this optimizer at every ZeRO stage, so the bound holds for
    the masters and for what the model sees, without a collective.

    Args:
        max_norm: with a number, clip to this global norm (0: no clipping) and leave out a step whose gradients are not
            finite. For ZeRO stage 0, where DeepSpeed itself does neither in fp32; gradients are then equal on all
            ranks, and so is the decision.
    """

    def __init__(self, groups: list[dict[str, Any]], settings: TrainSettings, max_norm: float | None = None):
        super().__init__(groups, lr=settings.learning_rate, betas=settings.betas, eps=settings.eps)
        self.max_norm = max_norm
        if max_norm is not None:
            self.overflow = False
            self._global_grad_norm = 0.0

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        if self.max_norm is not None and not self._gradients_are_finite():
            return
        super().step(closure)
        for group in self.param_groups:
            if group["bounds"] is not None:
                for weight in group["params"]:
                    weight.clamp_(*group["bounds"])

    def _gradients_are_finite(self) -> bool:
        weights = [weight for group in self.param_groups for weight in group["params"]]
        limit = self.max_norm or float("inf")
        norm = float(torch.nn.utils.clip_grad_norm_(weights, limit))
        self.overflow = not norm < float("inf")
        self._global_grad_norm = norm
        return not self.overflow


def parameter_groups(model: nn.Module, settings: TrainSettings, log_scale_bounds: tuple[float, float]) -> list[dict]:
    """Groups by module type and name, made before ZeRO flattens shapes.

    Decay acts on matrices and token embeddings; not on norms, biases, position and class embeddings, the pooling
    query and the temperature.

    Raises:
        AssertionError: a group is empty, which means that names no longer match.
    """
    decay: list[tuple[str, Tensor]] = []
    no_decay: list[tuple[str, Tensor]] = []
    scale: list[tuple[str, Tensor]] = []
    for module_name, module in model.named_modules():
        for name, weight in module.named_parameters(module_name, recurse=False):
            if isinstance(module, LogitScale):
                scale.append((name, weight))
            elif _is_norm(module) or name.endswith("bias") or _is_position_or_class(name):
                no_decay.append((name, weight))
            else:
                decay.append((name, weight))
    groups = [
        _group("decay", decay, settings.weight_decay),
        _group("no_decay", no_decay, 0.0),
        _group("logit_scale", scale, 0.0, log_scale_bounds),
    ]
    assert all(group["params"] for group in groups), "a weight-decay group is empty"
    return groups


def _group(
    name: str, weights: Iterable[tuple[str, Tensor]], weight_decay: float, bounds: tuple[float, float] | None = None
) -> dict[str, Any]:
    named = list(weights)
    return {
        "name": name,
        "params": [weight for _, weight in named],
        "param_names": [key for key, _ in named],
        "weight_decay": weight_decay,
        "bounds": bounds,
    }


def _is_norm(module: nn.Module) -> bool:
    return isinstance(module, (nn.LayerNorm, nn.GroupNorm)) or type(module).__name__.endswith("Norm")


def _is_position_or_class(name: str) -> bool:
    return any(part in NO_DECAY_NAMES for part in name.split("."))
