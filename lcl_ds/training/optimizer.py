"""AdamW, and the groups of weights that an optimizer treats in the same way."""

import math
from typing import Any, get_args

import torch
from torch import Tensor, nn

from lcl_ds.models.encoders import FAMILIES
from lcl_ds.models.heads import LogitScale
from lcl_ds.models.settings import Part, part_of
from lcl_ds.training.settings import TrainSettings

VECTORS = {"wpe", "query", *(name for family in FAMILIES.values() for name in family.vectors)}
"""Weights of no norm that are no matrices: one vector per position or class, or a scale per channel. They do not
decay."""


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
        # Fused: no temporaries as large as what it steps over, and one pass over memory, on CPUs too.
        super().__init__(groups, lr=settings.learning_rate, betas=settings.betas, eps=settings.eps, fused=True)
        self.max_norm = max_norm
        self.norm_limit, self.left_out = math.inf, False
        self.norm: float | None = None
        """Global norm of the gradients of the last step; None where it got no further than its norm."""
        self.wrapper: Any = self
        """What knows the global norm of the gradients when it calls :meth:`step`: DeepSpeed's optimizer around this one
        or, where it puts none around it, this one."""
        self.starting = False
        """While DeepSpeed starts it takes steps with gradients of 0, to make room; they do not train anything."""
        self.overflow, self._global_grad_norm = False, 0.0

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        if self.starting:
            return
        if self.max_norm is not None and not self._gradients_are_finite():
            return
        if self._is_left_out():
            return
        self._update(closure)
        for group in self.param_groups:
            if group["bounds"] is not None:
                for weight in group["params"]:
                    weight.clamp_(*group["bounds"])

    def _update(self, closure: Any) -> None:
        super().step(closure)

    def limit_norm(self, limit: float) -> None:
        """Leave out the next step if the global norm of its gradients is above ``limit`` or not finite.

        Nothing changes then, and ``left_out`` says so. The norm is the same on all ranks, and so is the decision.
        """
        self.norm_limit, self.left_out, self.norm = limit, False, None

    def _is_left_out(self) -> bool:
        if self.norm is None:  # read now: DeepSpeed has just waited for it, and nothing else is queued yet
            self.norm = float(self.wrapper._global_grad_norm or 0.0)
            self.left_out = not (math.isfinite(self.norm) and self.norm <= self.norm_limit)
        return self.left_out

    def _gradients_are_finite(self) -> bool:
        weights = [weight for group in self.param_groups for weight in group["params"]]
        limit = self.max_norm or float("inf")
        norm = float(torch.nn.utils.clip_grad_norm_(weights, limit))
        self.overflow = not norm < float("inf")
        self._global_grad_norm = norm
        return not self.overflow


def freeze_parts(model: nn.Module, settings: TrainSettings) -> None:
    """Take the gradients from the weights of the parts whose learning-rate factor is 0."""
    for name, weight in model.named_parameters():
        if settings.learning_rate_factors.get(part_of(name), 1.0) == 0:
            weight.requires_grad_(False)


def parameter_groups(model: nn.Module, settings: TrainSettings, log_scale_bounds: tuple[float, float]) -> list[dict]:
    """Group weights by module type, name and learning-rate factor, made before ZeRO flattens shapes.

    Decay acts on matrices and token embeddings; not on norms, biases, position and class embeddings, the pooling
    query and the temperature. Frozen weights stay out. Under Muon the matrices of the towers' blocks and of the pooling
    are a group of their own; see :func:`is_hidden_matrix`.

    Raises:
        AssertionError: no weight of a kind was found, which means that names no longer match.
    """
    base = base_factor(settings)
    kinds: dict[tuple[str, float], list[tuple[str, Tensor]]] = {
        (kind, base): [] for kind in ("decay", "no_decay", "logit_scale")
    }
    for module_name, module in model.named_modules():
        for name, weight in module.named_parameters(module_name, recurse=False):
            factor = settings.learning_rate_factors.get(part_of(name), 1.0)
            if not weight.requires_grad:
                continue
            if isinstance(module, LogitScale):
                kinds.setdefault(("logit_scale", factor), []).append((name, weight))
            elif _is_norm(module) or name.endswith("bias") or _is_position_or_class(name):
                kinds.setdefault(("no_decay", factor), []).append((name, weight))
            elif settings.optimizer == "muon" and is_hidden_matrix(name, module, weight):
                kinds.setdefault(("matrices", factor), []).append((name, weight))
            else:
                kinds.setdefault(("decay", factor), []).append((name, weight))
    in_use = {kind for (kind, _), weights in kinds.items() if weights}
    assert in_use >= {"decay", "no_decay"} or settings.learning_rate_factors, "names no longer match"
    return [
        _group(
            kind,
            factor,
            weights,
            settings.weight_decay if kind in ("decay", "matrices") else 0.0,
            log_scale_bounds if kind == "logit_scale" else None,
        )
        for (kind, factor), weights in kinds.items()
        if weights
    ]


def base_factor(settings: TrainSettings) -> float:
    """Find the factor whose groups come first: 1, or that of the first part that learns where none has 1."""
    factors = [settings.learning_rate_factors.get(part, 1.0) for part in get_args(Part)]
    return 1.0 if 1.0 in factors else next((factor for factor in factors if factor), 1.0)


def frozen_parts(settings: TrainSettings) -> list[str]:
    """List the parts that do not learn."""
    return [part for part in get_args(Part) if settings.learning_rate_factors.get(part, 1.0) == 0]


def _group(
    kind: str,
    factor: float,
    named: list[tuple[str, Tensor]],
    weight_decay: float,
    bounds: tuple[float, float] | None,
) -> dict[str, Any]:
    return {
        "name": kind if factor == 1 else f"{kind} x{factor:g}",
        "params": [weight for _, weight in named],
        "param_names": [key for key, _ in named],
        "weight_decay": weight_decay,
        "learning_rate_factor": factor,
        "bounds": bounds,
        "is_matrices": kind == "matrices",
    }


def is_hidden_matrix(name: str, module: nn.Module, weight: Tensor) -> bool:
    """Say whether a weight turns hidden states into hidden states, which is what Muon is made for.

    All else stays with AdamW, as is usual: embeddings of tokens, positions and patches, whose rows or filters have
    gradients of their own; heads, which end in logits and features; and all that is no matrix.
    """
    shape = getattr(weight, "ds_shape", weight.shape)
    is_embedding = isinstance(module, nn.Embedding) or "embeddings" in name.split(".")
    return len(shape) == 2 and not is_embedding and part_of(name) != "heads"


def _is_norm(module: nn.Module) -> bool:
    return isinstance(module, (nn.LayerNorm, nn.GroupNorm)) or type(module).__name__.endswith("Norm")


def _is_position_or_class(name: str) -> bool:
    return any(step in VECTORS for step in name.split("."))
