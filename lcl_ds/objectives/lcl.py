"""Latent Compression Learning: contrastive plus generation loss from one causal pass (paper, equation for L)."""

from typing import ClassVar, Literal

from pydantic import Field, model_validator
from torch import Tensor

from lcl_ds.batch import Batch
from lcl_ds.data.sequences import DocumentView
from lcl_ds.metrics import Combination
from lcl_ds.models.network import LCLModel
from lcl_ds.objectives import base
from lcl_ds.objectives.base import LossNormalizers, ObjectiveSettings


class Settings(ObjectiveSettings):
    """Latent Compression Learning."""

    name: Literal["lcl"] = "lcl"
    contrastive_weight: float = Field(0.1, ge=0, description="Weight of the contrastive loss (paper: 0.1).")
    generation_weight: float = Field(1.0, ge=0, description="Weight of the generation loss (paper: 1).")
    context_rule: Literal["text_before", "reference"] = Field(
        "text_before",
        description="Which images count in the contrastive loss: those with text of their document before them, or, "
        "as published, all that do not stand at the very start of a row.",
    )
    gather_with_grad: bool = Field(
        True, description="Whether features also learn as negatives of others (published scripts: yes)."
    )

    @model_validator(mode="after")
    def _some_weight(self) -> "Settings":
        if self.contrastive_weight == 0 and self.generation_weight == 0:
            raise ValueError("contrastive_weight and generation_weight are both 0: nothing would train")
        return self


def view(settings: Settings, image_first_probability: float) -> DocumentView:
    """Show whole documents."""
    return DocumentView(settings.context_rule, image_first_probability)


class Objective(base.Objective):
    """``generation_weight * generation + contrastive_weight * contrastive``."""

    losses: ClassVar[tuple[str, ...]] = ("contrastive_loss", "generation_loss")
    takes_native: ClassVar[bool] = True
    reports: ClassVar[dict[str, Combination]] = {"logit_scale": "same"}

    def __init__(self, model: LCLModel, settings: Settings):
        super().__init__(model)
        self.settings = settings

    def count_terms(self, batch: Batch) -> dict[str, int]:
        return {"labels": len(batch.labels), "pairs": len(batch.readouts["context"])}

    def forward(self, batch: Batch, normalizers: LossNormalizers) -> dict[str, Tensor]:
        """Compute the shares of the losses, and the ``logit_scale`` [1] that was used."""
        hidden_states, pooled = self.model(batch)
        generation = self.generation(hidden_states, batch, normalizers)
        settings = self.settings
        contrastive, scale = self.contrastive(
            hidden_states, pooled, batch, normalizers, settings.normalize, detach_keys=not settings.gather_with_grad
        )
        return {
            "loss": settings.generation_weight * generation + settings.contrastive_weight * contrastive,
            "contrastive_loss": contrastive,
            "generation_loss": generation,
            "logit_scale": scale,
        }
