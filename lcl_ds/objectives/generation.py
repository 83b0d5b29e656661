"""Next-token loss alone on interleaved documents (Table 1: "Gen", as Flamingo on MMC4).

LCL without its contrastive term (paper, section 3; Flamingo, Alayrac et al. 2022, section 2.4, trains on the same
loss). Ours: the image is a prefix in the sequence as in LCL, where Flamingo adds cross-attention layers.
"""

from typing import ClassVar, Literal

from torch import Tensor, nn

from lcl_ds.batch import Batch
from lcl_ds.data.sequences import DocumentView
from lcl_ds.models.network import LCLModel
from lcl_ds.objectives import base
from lcl_ds.objectives.base import LossNormalizers, ObjectiveSettings


class Settings(ObjectiveSettings):
    """Generation."""

    name: Literal["generation"] = "generation"


def view(settings: Settings, image_first_probability: float) -> DocumentView:
    """Show whole documents."""
    return DocumentView(image_first_probability=image_first_probability)


class Objective(base.Objective):
    """The generation loss alone."""

    losses: ClassVar[tuple[str, ...]] = ("generation_loss",)
    takes_native: ClassVar[bool] = True

    def __init__(self, model: LCLModel, settings: Settings):
        super().__init__(model)

    @property
    def unused(self) -> tuple[nn.Module | nn.Parameter, ...]:
        return self.model.contrastive_parts()

    def count_terms(self, batch: Batch) -> dict[str, int]:
        return {"labels": len(batch.labels)}

    def forward(self, batch: Batch, normalizers: LossNormalizers) -> dict[str, Tensor]:
        """Compute the share of the loss."""
        hidden_states, _ = self.model(batch)
        loss = self.generation(hidden_states, batch, normalizers)
        return {"loss": loss, "generation_loss": loss}
