"""Contrastive loss between images and whole texts, on pairs (Table 1: "Con", CLIP on MMC4-Pair).

Follows CLIP (Radford et al. 2021, section 2.3): symmetric InfoNCE between an image's pooled feature and its text's
feature, read at the end of the text by a causal text tower. Ours: the text tower is the decoder and the feature goes
through the context head, so that nothing but the loss differs from LCL.
"""

from collections.abc import Mapping
from typing import ClassVar, Literal

from torch import Tensor, nn

from lcl_ds.batch import Batch
from lcl_ds.data.sequences import PairView
from lcl_ds.metrics import Combination
from lcl_ds.models.network import LCLModel
from lcl_ds.objectives import base
from lcl_ds.objectives.base import LossNormalizers, ObjectiveSettings


class Settings(ObjectiveSettings):
    """CLIP."""

    name: Literal["clip"] = "clip"


def view(settings: Settings, image_first_probability: float) -> PairView:
    """Show the text alone."""
    return PairView(("text",))


class Objective(base.Objective):
    """The contrastive loss alone."""

    losses: ClassVar[tuple[str, ...]] = ("contrastive_loss",)
    takes_native: ClassVar[bool] = True
    reports: Mapping[str, Combination] = {"logit_scale": "same"}

    def __init__(self, model: LCLModel, settings: Settings):
        super().__init__(model)
        self.settings = settings

    @property
    def unused(self) -> tuple[nn.Module | nn.Parameter, ...]:
        return (self.model.lm_head,)

    def count_terms(self, batch: Batch) -> dict[str, int]:
        return {"pairs": len(batch.readouts["context"])}

    def forward(self, batch: Batch, normalizers: LossNormalizers) -> dict[str, Tensor]:
        """Compute the share of the loss, and the ``logit_scale`` [1] that was used."""
        hidden_states, pooled = self.model(batch)
        loss, scale = self.contrastive(hidden_states, pooled, batch, normalizers, self.settings.normalize)
        return {"loss": loss, "contrastive_loss": loss, "logit_scale": scale}
