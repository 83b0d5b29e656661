"""Sigmoid contrastive loss between images and whole texts, on pairs (SigLIP).

Follows SigLIP (Zhai et al. 2023, arXiv 2303.15343, section 3.1): every image with every text of all ranks is a question
of its own, whether they belong together. Temperature and bias are learned; the paper starts at 10
(``model.logit_scale_init``) and -10. Ours: the text tower is the causal decoder, read at the end of the text, as in
``clip``; the published one sees in both directions.
"""

from collections.abc import Mapping
from typing import ClassVar, Literal

from pydantic import Field, model_validator
from torch import Tensor, nn

from lcl_ds.batch import Batch
from lcl_ds.data.sequences import PairView
from lcl_ds.metrics import Combination
from lcl_ds.models.heads import LogitBias
from lcl_ds.models.network import LCLModel
from lcl_ds.objectives import base
from lcl_ds.objectives.base import LossNormalizers, ObjectiveSettings, sigmoid_loss_of_guessing


class Settings(ObjectiveSettings):
    """SigLIP."""

    name: Literal["siglip"] = "siglip"
    logit_bias_init: float = Field(-10.0, description="First value of what is added to similarities (paper: -10).")

    @model_validator(mode="after")
    def _over_all_ranks(self) -> "Settings":
        if self.normalization == "reference":
            raise ValueError("normalization: reference is what LCL published; siglip divides by the pairs of all ranks")
        return self

    def loss_of_guessing(self, pairs: int) -> float:
        return sigmoid_loss_of_guessing(pairs)


def view(settings: Settings, image_first_probability: float) -> PairView:
    """Show the text alone."""
    return PairView(("text",))


class Objective(base.Objective):
    """The sigmoid loss alone."""

    losses: ClassVar[tuple[str, ...]] = ("contrastive_loss",)
    takes_native: ClassVar[bool] = True
    reports: Mapping[str, Combination] = {"logit_scale": "same", "logit_bias": "same"}

    def __init__(self, model: LCLModel, settings: Settings):
        super().__init__(model)
        self.logit_bias = LogitBias(settings.logit_bias_init)

    @property
    def unused(self) -> tuple[nn.Module | nn.Parameter, ...]:
        return (self.model.lm_head,)

    def count_terms(self, batch: Batch) -> dict[str, int]:
        return {"pairs": len(batch.readouts["context"])}

    def forward(self, batch: Batch, normalizers: LossNormalizers) -> dict[str, Tensor]:
        """Compute the share of the loss, and the ``logit_scale`` [1] and ``logit_bias`` [1] that were used."""
        hidden_states, pooled = self.model(batch)
        loss, scale, bias = self.sigmoid_contrastive(hidden_states, pooled, batch, normalizers, self.logit_bias)
        return {"loss": loss, "contrastive_loss": loss, "logit_scale": scale, "logit_bias": bias}
