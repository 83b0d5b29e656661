"""Next-token loss of texts after their images, on pairs (OpenVision 2).

Follows OpenVision 2 (Liu et al. 2025, arXiv 2509.01644, section 3): an encoder, a random third of whose tokens a
decoder sees before it writes the caption; no contrastive loss. Ours: the tokens that are kept stand in raster order,
and the decoder receives them through the value path of the pooling, as in all objectives here.
"""

from typing import ClassVar, Literal

from pydantic import Field
from torch import Tensor, nn

from lcl_ds.batch import Batch
from lcl_ds.data.sequences import PairView
from lcl_ds.grids import kept_count
from lcl_ds.models.counter_rng import kept_patches
from lcl_ds.models.network import LCLModel
from lcl_ds.objectives import base
from lcl_ds.objectives.base import LossNormalizers, ObjectiveSettings


class Settings(ObjectiveSettings):
    """OpenVision 2."""

    name: Literal["captioning"] = "captioning"
    kept_fraction: float = Field(
        0.35,
        gt=0,
        le=1,
        description="Fraction of an image's tokens that the decoder sees in training (paper: 0.35).",
    )

    def tokens_in_slot(self, encoded: int) -> int:
        return kept_count(encoded, 1 - self.kept_fraction)


def view(settings: Settings, image_first_probability: float) -> PairView:
    """Show each image before its text."""
    return PairView(("caption",))


class Objective(base.Objective):
    """The generation loss alone."""

    losses: ClassVar[tuple[str, ...]] = ("generation_loss",)

    def __init__(self, model: LCLModel, settings: Settings):
        super().__init__(model)
        self.settings = settings

    @property
    def unused(self) -> tuple[nn.Module | nn.Parameter, ...]:
        return self.model.contrastive_parts()

    def count_terms(self, batch: Batch) -> dict[str, int]:
        return {"labels": len(batch.labels)}

    def forward(self, batch: Batch, normalizers: LossNormalizers) -> dict[str, Tensor]:
        """Compute the share of the loss."""
        _, tokens = self.model.encode_images(batch.images, batch.image_seeds)
        count = self.settings.tokens_in_slot(tokens.shape[1])
        if self.training and count < tokens.shape[1]:
            kept = kept_patches(batch.image_seeds, tokens.shape[1], count)
            tokens = tokens.gather(1, kept[..., None].expand(-1, -1, tokens.shape[2]))
        hidden_states = self.model.decode(batch, tokens.index_select(0, batch.slot_images))
        loss = self.generation(hidden_states, batch, normalizers)
        return {"loss": loss, "generation_loss": loss}
