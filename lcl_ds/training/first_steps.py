"""Say in the first steps of a run what will not get better later: a contrastive loss that is no better than guessing,
features that are the same for all images, weights that no gradient reaches.
"""

import logging
from collections import deque
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lcl_ds.config import Config
from lcl_ds.metrics import StepMetrics
from lcl_ds.models.network import LCLModel
from lcl_ds.objectives import trained_losses
from lcl_ds.objectives.base import LossNormalizers, ObjectiveSettings
from lcl_ds.training.checkpoint import WEIGHT
from lcl_ds.training.distributed import RankInfo, all_reduce_sum, gather_objects
from lcl_ds.training.engine_state import held_parts

logger = logging.getLogger(__name__)

LOOK_AT = 20
"""Step at which features and weights are looked at."""
CHANCE_AT = 100
"""Steps after the warm-up by which a contrastive loss must be better than guessing."""
CHANCE_STEPS = 20
"""Steps up to there whose mean counts."""
LEAST_GAIN = 0.02
"""Of the loss of guessing: how much better a contrastive loss must be."""
LEAST_SPREAD = 0.01
"""Of the length of features: how far those of different images must be apart."""
NAMED = 5
"""Most weights that are named one by one."""

FEATURES = {"pooling": "image features", "context_head": "context features"}
"""Modules of the network that compute features, and what they compute."""


class FirstSteps:
    """Watches the first steps of a run, on every rank alike; what an earlier start was past is not said again.

    Args:
        done: steps that were done before this start.
    """

    def __init__(self, config: Config, done: int, rank_info: RankInfo):
        self.rank_info = rank_info
        self.chance_at = config.train.warmup_steps + CHANCE_AT
        self._objective = config.objective
        self._is_contrastive = "contrastive_loss" in trained_losses(config.objective)
        self._is_looked_at = done >= LOOK_AT
        self._losses: deque[tuple[float, float]] = deque(maxlen=CHANCE_STEPS)
        """Contrastive loss, and that of guessing."""
        self._hooks: list[Any] = []
        self._spreads: dict[str, Tensor] = {}

    def begin(self, step: int, model: LCLModel) -> None:
        """Prepare for a step: in the one that is looked at, features are measured as they are computed."""
        if not self._is_looked_at and step >= LOOK_AT and not self._hooks:
            for attribute, name in FEATURES.items():
                module: nn.Module = getattr(model, attribute)
                self._hooks.append(module.register_forward_hook(partial(self._measure, name)))

    def _measure(self, name: str, _: nn.Module, __: Any, output: Tensor | tuple[Tensor, Tensor]) -> None:
        features = output if isinstance(output, Tensor) else output[0]
        if len(features) > 1:
            self._spreads[name] = spread(features.detach())

    def judge(self, metrics: StepMetrics, normalizers: list[LossNormalizers], engine: Any) -> None:
        """Say what is wrong after a step; collective in the one that is looked at.

        Args:
            normalizers: of its micro-steps.
        """
        sentences: list[str] = []
        is_contrastive = self._is_contrastive and "pairs" in normalizers[0]
        if metrics.step <= self.chance_at and is_contrastive and metrics.applied:
            per_rank = [micro_step["pairs"].per_rank or [] for micro_step in normalizers]
            self._losses.append((metrics.losses["contrastive_loss"], chance_loss(per_rank, self._objective)))
        if metrics.step == self.chance_at:
            sentences += self._about_chance()
        if self._hooks and metrics.applied:  # which makes the optimizer's state
            sentences += self._about_features() + self._about_weights(engine)
            for hook in self._hooks:
                hook.remove()
            self._hooks, self._is_looked_at = [], True
        for sentence in sentences if self.rank_info.is_first else []:
            logger.warning("step %d: %s", metrics.step, sentence)

    def _about_chance(self) -> list[str]:
        if len(self._losses) < CHANCE_STEPS:
            return []
        losses, of_guessing = (sum(values) / len(values) for values in zip(*self._losses, strict=True))
        if losses < (1 - LEAST_GAIN) * of_guessing or not of_guessing:
            return []
        return [
            f"contrastive_loss is {losses:.3f}, and guessing among the images of a micro-step gives "
            f"{of_guessing:.3f}: image and context features have nothing in common yet; look whether images and texts "
            "belong together (python -m lcl_ds.data inspect), at train.learning_rate and at given weights"
        ]

    def _about_features(self) -> list[str]:
        """Name the features that are the same on all ranks that have some to compare; collective."""
        everywhere = gather_objects({name: float(value) for name, value in self._spreads.items()})
        sentences = []
        for name in FEATURES.values():
            spreads = [of_rank[name] for of_rank in everywhere if name in of_rank]
            if spreads and max(spreads) < LEAST_SPREAD:
                sentences.append(
                    f"{name} are all the same: they differ by {max(spreads):.1g} of their length; look at the data "
                    "(python -m lcl_ds.data inspect), at given weights and whether train.learning_rate is too high"
                )
        return sentences

    def _about_weights(self, engine: Any) -> list[str]:
        """Name the weights that no gradient has reached; collective."""
        named = [name for name, weight in engine.module.named_parameters() if weight.requires_grad]
        moved = {
            part.name
            for part in held_parts(engine)
            if any(bool(moment.any()) for kind, moment in part.values.items() if kind != WEIGHT)
        }
        reached = [name in moved for name in named]
        on_ranks = all_reduce_sum(torch.tensor(reached, dtype=torch.float32, device=self.rank_info.device)).tolist()
        still = [name for name, ranks in zip(named, on_ranks, strict=True) if not ranks]
        if not still:
            return []
        more = f" and {len(still) - NAMED} more" if len(still) > NAMED else ""
        return [
            f"{len(still)} of {len(named)} weights have had no gradient so far: {', '.join(still[:NAMED])}{more}; "
            "if the data needs none of them that is right; otherwise look for what keeps the losses from them"
        ]


def spread(features: Tensor) -> Tensor:
    """Measure how far features [M, D] are from their mean, as a fraction of their length: 0 where all are the same."""
    features = features.float()
    return (features - features.mean(dim=0)).norm() / features.norm().clamp(min=torch.finfo(torch.float32).tiny)


def chance_loss(pairs: list[list[int]], objective: ObjectiveSettings) -> float:
    """Return the contrastive loss of features that tell nothing apart, averaged as the loss is.

    Args:
        pairs: of each rank in each micro-step.
    """
    as_published = objective.normalization == "reference"  # every rank's own mean counts as much as that of any other
    weights = [sum(count > 0 for count in ranks) if as_published else sum(ranks) for ranks in pairs]
    whole = sum(len(ranks) for ranks in pairs) if as_published else sum(weights)
    parts = [weight * objective.loss_of_guessing(sum(ranks)) for weight, ranks in zip(weights, pairs, strict=True)]
    return sum(parts) / max(1, whole)
