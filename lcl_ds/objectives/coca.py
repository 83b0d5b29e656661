"""Contrastive and captioning loss on pairs (Table 1: "Con+Cap", CoCa on MMC4-Pair).

Follows CoCa (Yu et al. 2022, section 3.2): the text is read once without the image for the contrastive loss and once
after the image for the captioning loss, weights 1 and 2. Ours: one decoder of the same size as LCL's does both, in two
passes, where CoCa adds cross-attention layers to the second; the image is a prefix, as in LCL.
"""

from collections.abc import Mapping
from typing import ClassVar, Literal

from pydantic import Field
from torch import Tensor

from lcl_ds.batch import Batch
from lcl_ds.data.sequences import PairView
from lcl_ds.metrics import Combination
from lcl_ds.models.network import LCLModel
from lcl_ds.objectives import base
from lcl_ds.objectives.base import LossNormalizers, ObjectiveSettings


class Settings(ObjectiveSettings):
    """CoCa."""

    name: Literal["coca"] = "coca"
    contrastive_weight: float = Field(1.0, gt=0, description="Weight of the contrastive loss (CoCa: 1).")
    generation_weight: float = Field(2.0, gt=0, description="Weight of the captioning loss (CoCa: 2).")


def view(settings: Settings, image_first_probability: float) -> PairView:
    """Show the text alone, and after its image."""
    return PairView(("text", "caption"))


class Objective(base.Objective):
    """``contrastive_weight * contrastive + generation_weight * captioning``."""

    losses: ClassVar[tuple[str, ...]] = ("contrastive_loss", "generation_loss")
    takes_native: ClassVar[bool] = True
    reports: Mapping[str, Combination] = {"logit_scale": "same"}
    decoder_passes: ClassVar[int] = 2

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
        contrastive, scale = self.contrastive(hidden_states, pooled, batch, normalizers, settings.normalize)
        return {
            "loss": settings.contrastive_weight * contrastive + settings.generation_weight * generation,
            "contrastive_loss": contrastive,
            "generation_loss": generation,
            "logit_scale": scale,
        }
