"""Latent Compression Learning: contrastive plus generation loss from one causal pass (paper, equation for L).

Ours, each by a setting and off by default: the sigmoid loss in place of the softmax (SigLIP, arXiv 2303.15343); images
of one document that are no negatives of each other, or positives (UniCL, arXiv 2204.03610); a weight of the contrastive
loss that changes over the run; and pairs that count by the probability that they belong together, for contexts that say
nothing about their image (``matching``).
"""

import math
from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import torch
from lcl_kernels import contrastive_loss
from pydantic import Field, model_validator
from torch import Tensor
from torch import distributed as dist

from lcl_ds.batch import Batch
from lcl_ds.data.sequences import DocumentView
from lcl_ds.metrics import Combination
from lcl_ds.models.heads import LogitBias
from lcl_ds.models.network import LCLModel
from lcl_ds.objectives import base
from lcl_ds.objectives.base import LossNormalizers, ObjectiveSettings, sigmoid_loss_of_guessing

HALVINGS = 20
"""Of the interval in which the fraction of pairs that do not belong together is looked for."""
LARGEST_FRACTION = 0.9
"""That is estimated: some pairs count in any case."""


class Settings(ObjectiveSettings):
    """Latent Compression Learning."""

    name: Literal["lcl"] = "lcl"
    contrastive_weight: float = Field(0.1, ge=0, description="Weight of the contrastive loss (paper: 0.1).")
    contrastive_weight_end: float | None = Field(
        None, ge=0, description="Weight after the last step, to which it changes evenly; not set: it stays as it is."
    )
    generation_weight: float = Field(1.0, ge=0, description="Weight of the generation loss (paper: 1).")
    context_rule: Literal["text_before", "reference"] = Field(
        "text_before",
        description="Which images count in the contrastive loss: those with text of their document before them, or, "
        "as published, all that do not stand at the very start of a row.",
    )
    gather_with_grad: bool = Field(
        True, description="Whether features also learn as negatives of others (published scripts: yes)."
    )
    contrastive: Literal["softmax", "sigmoid"] = Field(
        "softmax", description="Contrastive loss: over all features (published), or of every pair for itself."
    )
    logit_bias_init: float = Field(-10.0, description="First value of what the sigmoid adds (SigLIP: -10).")
    same_document: Literal["negative", "ignore", "positive"] = Field(
        "negative",
        description="What an image and the context of another one of its document are to each other: a negative as any "
        "other (published), left out, or a second positive.",
    )
    matching: Literal["given", "estimated"] = Field(
        "given",
        description="Whether every context describes its image (published), or a pair counts by the estimated "
        "probability that it does.",
    )

    @model_validator(mode="after")
    def _some_weight(self) -> "Settings":
        if not (self.contrastive_weight or self.contrastive_weight_end or self.generation_weight):
            raise ValueError("contrastive_weight and generation_weight are both 0: nothing would train")
        return self

    @model_validator(mode="after")
    def _sigmoid_alone(self) -> "Settings":
        if self.contrastive == "softmax":
            return self
        of_softmax = {
            "normalization": "global",
            "gather_with_grad": True,
            "same_document": "negative",
            "matching": "given",
        }
        for key, only in of_softmax.items():
            if getattr(self, key) != only:
                raise ValueError(f"{key}: {getattr(self, key)} needs the softmax; leave it out, or contrastive=sigmoid")
        return self

    def weight_at(self, progress: float) -> float:
        """Return the weight of the contrastive loss where that fraction of the run is done."""
        end = self.contrastive_weight if self.contrastive_weight_end is None else self.contrastive_weight_end
        return self.contrastive_weight + progress * (end - self.contrastive_weight)

    def loss_of_guessing(self, pairs: int) -> float:
        if self.contrastive == "sigmoid":
            return sigmoid_loss_of_guessing(pairs)
        return super().loss_of_guessing(pairs)


def view(settings: Settings, image_first_probability: float) -> DocumentView:
    """Show whole documents."""
    return DocumentView(settings.context_rule, image_first_probability)


class Objective(base.Objective):
    """``generation_weight * generation + contrastive_weight * contrastive``."""

    losses: ClassVar[tuple[str, ...]] = ("contrastive_loss", "generation_loss")
    takes_native: ClassVar[bool] = True
    reports: Mapping[str, Combination] = {"logit_scale": "same"}

    def __init__(self, model: LCLModel, settings: Settings):
        super().__init__(model)
        self.settings = settings
        if settings.contrastive == "sigmoid":
            self.logit_bias = LogitBias(settings.logit_bias_init)
            self.reports = {**self.reports, "logit_bias": "same"}
        if settings.matching == "estimated":
            self.reports = {**self.reports, "unmatched_fraction": "same"}

    def count_terms(self, batch: Batch) -> dict[str, int]:
        return {"labels": len(batch.labels), "pairs": len(batch.readouts["context"])}

    def forward(self, batch: Batch, normalizers: LossNormalizers) -> dict[str, Tensor]:
        """Compute the shares of the losses, and the ``logit_scale`` [1] that was used; see ``reports``."""
        hidden_states, pooled = self.model(batch)
        generation = self.generation(hidden_states, batch, normalizers)
        settings = self.settings
        if settings.contrastive == "sigmoid":
            contrastive, scale, bias = self.sigmoid_contrastive(
                hidden_states, pooled, batch, normalizers, self.logit_bias
            )
            reports = {"logit_scale": scale, "logit_bias": bias}
        else:
            contrastive, reports = self._softmax(hidden_states, pooled, batch, normalizers)
        weight = settings.weight_at(self.progress)
        return {
            "loss": settings.generation_weight * generation + weight * contrastive,
            "contrastive_loss": contrastive,
            "generation_loss": generation,
            **reports,
        }

    def _softmax(
        self, hidden_states: Tensor, pooled: Tensor, batch: Batch, normalizers: LossNormalizers
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Compute the share of the softmax loss, and what is reported of it."""
        image, context = self.model.pair_features(hidden_states, pooled, batch)
        scale, pairs, settings = self.model.logit_scale(), normalizers["pairs"], self.settings
        options: dict[str, Any] = {
            "normalize": settings.normalize,
            "detach_keys": not settings.gather_with_grad,
            "counts": pairs.per_rank,
        }
        if settings.same_document != "negative":
            options |= {
                "group_ids": batch.readouts["context"].documents,
                "same_group": settings.same_document,
            }
        reports = {"logit_scale": scale.detach()}
        if settings.matching == "estimated":
            with torch.no_grad():
                _, known = contrastive_loss(image, context, scale, return_statistics=True, **options)
                everyone = of_all_ranks(known.pair_loss, pairs.per_rank)
                unmatched = unmatched_fraction(everyone)
                weight = matched_probability(known.pair_loss, unmatched, len(everyone))
            options["pair_weight"] = weight
            reports["unmatched_fraction"] = unmatched.view(1)
        return pairs.share * contrastive_loss(image, context, scale, **options), reports


def matched_probability(pair_loss: Tensor, unmatched: Tensor, pairs: int) -> Tensor:
    """Say how probable it is that pairs [m] belong together, given their contrastive losses.

    Of two explanations one has drawn a pair: the features, which give it the probability exp(-loss) among ``pairs``, or
    chance, which gives each 1 / pairs. Weighing the losses with the result is the M-step of the EM algorithm.

    Args:
        unmatched: fraction of all pairs that chance has drawn.
    """
    # The odds of the features against chance, as a logarithm: exp(-loss) alone would round to 0.
    return torch.sigmoid(torch.logit(1 - unmatched) - pair_loss + math.log(max(1, pairs)))


def unmatched_fraction(pair_loss: Tensor) -> Tensor:
    """Estimate the fraction of pairs [M] that chance has drawn, from 0 to :data:`LARGEST_FRACTION`; a scalar.

    It is what makes the pairs' losses most likely, which is where the mean of the probabilities is the fraction itself.
    There is one such place, since the likelihood is concave in the fraction.
    """
    low = pair_loss.new_zeros(())
    high = low + LARGEST_FRACTION
    if not len(pair_loss):
        return low
    gain = pair_loss.double().exp() / len(pair_loss) - 1  # of chance over the features, of each pair
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        rises = (gain / (1 + middle * gain)).sum() > 0
        low, high = torch.where(rises, middle, low), torch.where(rises, high, middle)
    return (low + high) / 2


def of_all_ranks(values: Tensor, per_rank: list[int] | None) -> Tensor:
    """Gather a vector [m] from every rank, in the order of ranks; collective.

    Args:
        per_rank: lengths on every rank; None: the only rank is this one.
    """
    if per_rank is None or len(per_rank) == 1:
        assert not dist.is_initialized() or dist.get_world_size() == 1, "other ranks have pairs of their own"
        return values
    longest = max(per_rank)
    padded = torch.nn.functional.pad(values, (0, longest - len(values)))
    gathered = values.new_empty(len(per_rank) * longest)
    dist.all_gather_into_tensor(gathered, padded)
    return torch.cat([part[:length] for part, length in zip(gathered.split(longest), per_rank, strict=True)])
