"""Next-token loss on text and regression of image features, on interleaved documents (Table 1: "Gen+Reg", as Emu).

Follows Emu (Sun et al. 2023, section 2.2): the decoder predicts whatever comes next, text by classification and image
tokens by regression with an l2 loss. Ours: the targets are the image tokens that the decoder receives, and gradients
reach them unless ``detach_targets`` is set. Nothing then keeps the encoder from making them easy to predict, which is
what the published figure (5.7 on ImageNet, below generation alone) looks like.
"""

from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from lcl_ds.batch import Batch
from lcl_ds.data.sequences import DocumentView
from lcl_ds.models.network import LCLModel
from lcl_ds.objectives import base
from lcl_ds.objectives.base import LossNormalizers, ObjectiveSettings


class Settings(ObjectiveSettings):
    """Generation and regression."""

    name: Literal["generation_regression"] = "generation_regression"
    regression_weight: float = Field(1.0, gt=0, description="Weight of the regression loss (Emu: 1).")
    detach_targets: bool = Field(False, description="Whether the regressed image tokens are constants.")


def view(settings: Settings, image_first_probability: float) -> DocumentView:
    """Show whole documents."""
    return DocumentView(image_first_probability=image_first_probability)


class Objective(base.Objective):
    """``generation + regression_weight * regression``."""

    losses: ClassVar[tuple[str, ...]] = ("generation_loss", "regression_loss")

    def __init__(self, model: LCLModel, settings: Settings):
        super().__init__(model)
        self.settings = settings
        width = model.decoder.config.hidden_size
        self.regression_head = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width))

    @property
    def unused(self) -> tuple[nn.Module | nn.Parameter, ...]:
        return self.model.contrastive_parts()

    def count_terms(self, batch: Batch) -> dict[str, int]:
        return {"labels": len(batch.labels), "images": batch.image_count}

    def count_head_states(self, images: float, pairs: float) -> float:
        return images * self.model.kept_tokens

    def forward(self, batch: Batch, normalizers: LossNormalizers) -> dict[str, Tensor]:
        """Compute this rank's shares; regression is the mean squared error over an image's tokens and channels."""
        _, tokens = self.model.encode_images(batch.images, batch.image_seeds)
        tokens = tokens.index_select(0, batch.slot_images)
        hidden_states = self.model.decode(batch, tokens)
        generation = self.generation(hidden_states, batch, normalizers)
        regression = self._regression(hidden_states, tokens, batch) / normalizers["images"].divisor
        return {
            "loss": generation + self.settings.regression_weight * regression,
            "generation_loss": generation,
            "regression_loss": regression,
        }

    def _regression(self, hidden_states: Tensor, tokens: Tensor, batch: Batch) -> Tensor:
        """Sum over images; each image token is predicted at the position before it, the first at ``<soi>``."""
        count = batch.image_count  # 0 where the only image is the constant one
        before = batch.slot_positions[:count, None] - 1 + torch.arange(tokens.shape[1], device=tokens.device)
        predicted = self.regression_head(hidden_states.index_select(0, before.flatten()))
        targets = tokens[:count].flatten(0, 1)
        if self.settings.detach_targets:
            targets = targets.detach()
        squares = F.mse_loss(predicted.float(), targets.float(), reduction="sum")
        return squares / (tokens.shape[1] * tokens.shape[2])
