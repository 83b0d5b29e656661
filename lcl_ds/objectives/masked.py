"""Masked text and masked patches on interleaved documents (Table 1: "Mask", as BEiT-3 on MMC4).

Follows BEiT-3 (Wang et al. 2022, section 2.2): half of the text tokens of a document with images and two fifths of each
image's patches are hidden, and a network that sees in both directions predicts them. Ours: the decoder of LCL is that
network, without its causal mask; hidden patches are grey before they reach the encoder, and what is predicted of them
is their pixels, each patch normalised by its own mean and deviation (He et al. 2022, MAE, section 3), because BEiT's
visual tokens come from a pre-trained tokenizer.
"""

from typing import ClassVar, Literal

from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from lcl_ds.batch import Batch
from lcl_ds.data.sequences import MaskedView
from lcl_ds.errors import UserError
from lcl_ds.models.counter_rng import patch_order
from lcl_ds.models.network import LCLModel
from lcl_ds.models.vision import flat_patches
from lcl_ds.objectives import base
from lcl_ds.objectives.base import LossNormalizers, ObjectiveSettings


class Settings(ObjectiveSettings):
    """Masked modelling."""

    name: Literal["masked"] = "masked"
    text_share: float = Field(0.5, gt=0, lt=1, description="Fraction of text tokens that are hidden (BEiT-3: 0.5).")
    image_share: float = Field(0.4, gt=0, lt=1, description="Fraction of patches that are hidden (BEiT-3: 0.4).")
    image_weight: float = Field(1.0, gt=0, description="Weight of the loss on patches.")


def view(settings: Settings, image_first_probability: float) -> MaskedView:
    """Show whole documents with hidden text."""
    return MaskedView(image_first_probability=image_first_probability, text_share=settings.text_share)


class Objective(base.Objective):
    """``generation + image_weight * image``; the generation loss is that of the hidden text tokens."""

    losses: ClassVar[tuple[str, ...]] = ("generation_loss", "image_loss")

    def __init__(self, model: LCLModel, settings: Settings):
        super().__init__(model)
        if model.kept_tokens < model.vision.patch_tokens:
            raise UserError("model.vision.patch_dropout: the masked objective predicts every patch; set it to 0")
        self.settings = settings
        width, self.patch_size = model.decoder.config.hidden_size, model.vision.model.config.patch_size
        self.hidden_patches = max(1, round(settings.image_share * model.vision.patch_tokens))
        self.pixel_head = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 3 * self.patch_size**2))

    @property
    def unused(self) -> tuple[nn.Module | nn.Parameter, ...]:
        return self.model.contrastive_parts()

    def count_terms(self, batch: Batch) -> dict[str, int]:
        return {"labels": len(batch.labels), "images": batch.image_count}

    def count_head_states(self, images: float, pairs: float) -> float:
        return images * self.hidden_patches

    def forward(self, batch: Batch, normalizers: LossNormalizers) -> dict[str, Tensor]:
        """Compute the shares; that of images is the mean squared error over hidden patches and their pixels."""
        pixels = self.model.vision.normalize(batch.images)
        hidden = patch_order(batch.image_seeds, self.model.vision.patch_tokens)[:, : self.hidden_patches]
        _, tokens = self.model.encode_images(without_patches(pixels, hidden, self.patch_size), batch.image_seeds)
        hidden_states = self.model.decode(batch, tokens.index_select(0, batch.slot_images), mode="bidirectional")
        generation = self.generation(hidden_states, batch, normalizers)
        patches = flat_patches(pixels, self.patch_size)
        image = self._image_loss(hidden_states, patches, hidden, batch) / normalizers["images"].divisor
        return {
            "loss": generation + self.settings.image_weight * image,
            "generation_loss": generation,
            "image_loss": image,
        }

    def _image_loss(self, hidden_states: Tensor, patches: Tensor, hidden: Tensor, batch: Batch) -> Tensor:
        """Sum over images of the mean over their hidden patches; every image has one slot."""
        count = batch.image_count  # 0 where the only image is the constant one
        positions = batch.slot_positions[:count, None] + hidden[:count]
        predicted = self.pixel_head(hidden_states.index_select(0, positions.flatten())).float()
        wanted = patches.float()
        mean, variance = wanted.mean(-1, keepdim=True), wanted.var(-1, keepdim=True)
        wanted = (wanted - mean) * (variance + 1e-6).rsqrt()
        wanted = wanted.gather(1, hidden[..., None].expand(-1, -1, wanted.shape[2]))[:count]
        return F.mse_loss(predicted, wanted.flatten(0, 1), reduction="sum") / (hidden.shape[1] * wanted.shape[2])


def without_patches(images: Tensor, hidden: Tensor, size: int) -> Tensor:
    """Put 0, the mean colour, into the patches of square images [M, C, H, W] that ``hidden`` [M, K] numbers."""
    side = images.shape[2] // size
    shown = images.new_ones(len(images), side * side).scatter(1, hidden, 0.0)
    return images * shown.view(-1, 1, side, side).repeat_interleave(size, 2).repeat_interleave(size, 3)
