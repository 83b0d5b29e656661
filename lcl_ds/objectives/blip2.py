"""Contrastive, captioning and matching loss on pairs (Table 1: "Con+Cap+Mat", as BLIP-2 on MMC4-Pair).

Follows BLIP-2's first stage (Li et al. 2023, section 3.2): the three losses with equal weights, the matching loss as a
two-way classification whose negatives are hard ones drawn by similarity within a rank. Ours: the decoder of LCL takes
the Q-Former's place and reads a pair in three passes; each text gets one mismatched image, drawn with the probabilities
of the softmax over the similarities of its own image to the others (BLIP-2 draws by image-text similarity, which here
is known only after the decoder has run); the match is read at the end of the text.
"""

from collections.abc import Mapping
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from lcl_ds.batch import Batch
from lcl_ds.data.sequences import PairView
from lcl_ds.metrics import Combination
from lcl_ds.models.counter_rng import uniform
from lcl_ds.models.network import LCLModel
from lcl_ds.objectives import base
from lcl_ds.objectives.base import LossNormalizers, ObjectiveSettings


class Settings(ObjectiveSettings):
    """BLIP-2, first stage."""

    name: Literal["blip2"] = "blip2"
    contrastive_weight: float = Field(1.0, gt=0, description="Weight of the contrastive loss (BLIP-2: 1).")
    generation_weight: float = Field(1.0, gt=0, description="Weight of the captioning loss (BLIP-2: 1).")
    matching_weight: float = Field(1.0, gt=0, description="Weight of the matching loss (BLIP-2: 1).")


def view(settings: Settings, image_first_probability: float) -> PairView:
    """Show the text alone, after its image, and after another image."""
    return PairView(("text", "caption", "match"))


class Objective(base.Objective):
    """The weighted sum of the three losses."""

    losses: ClassVar[tuple[str, ...]] = ("contrastive_loss", "generation_loss", "matching_loss")
    reports: Mapping[str, Combination] = {"logit_scale": "same"}
    decoder_passes: ClassVar[int] = 3

    def __init__(self, model: LCLModel, settings: Settings):
        super().__init__(model)
        self.settings = settings
        width = model.decoder.config.hidden_size
        self.matching_head = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 2))

    def count_terms(self, batch: Batch) -> dict[str, int]:
        pairs = len(batch.readouts["context"])
        # One image alone has no other to be mistaken for.
        return {"labels": len(batch.labels), "pairs": pairs, "matches": 2 * pairs if pairs > 1 else 0}

    def count_head_states(self, images: float, pairs: float) -> float:
        return 2 * pairs

    def forward(self, batch: Batch, normalizers: LossNormalizers) -> dict[str, Tensor]:
        """Compute the shares of the losses, and the ``logit_scale`` [1] that was used."""
        pooled, tokens = self.model.encode_images(batch.images, batch.image_seeds)
        settings = self.settings
        other = mismatched_images(pooled, self.model.logit_scale(), batch.image_seeds)
        slot_images = with_mismatched_images(batch, other)
        hidden_states = self.model.decode(batch, tokens.index_select(0, slot_images))
        generation = self.generation(hidden_states, batch, normalizers)
        contrastive, scale = self.contrastive(hidden_states, pooled, batch, normalizers, settings.normalize)
        matching = self._matching(hidden_states, batch) / normalizers["matches"].divisor
        total = settings.contrastive_weight * contrastive + settings.generation_weight * generation
        return {
            "loss": total + settings.matching_weight * matching,
            "contrastive_loss": contrastive,
            "generation_loss": generation,
            "matching_loss": matching,
            "logit_scale": scale,
        }

    def _matching(self, hidden_states: Tensor, batch: Batch) -> Tensor:
        """Sum the two-way cross-entropies of matched (1) and mismatched (0) images and texts."""
        positions = [batch.readouts[name].positions for name in ("mismatched", "matched")]
        logits = self.matching_head(hidden_states.index_select(0, torch.cat(positions))).float()
        target = torch.arange(2, device=logits.device).repeat_interleave(len(positions[0]))
        summed = F.cross_entropy(logits, target, reduction="sum")
        return summed if self.count_terms(batch)["matches"] else summed * 0


@torch.no_grad()
def mismatched_images(pooled: Tensor, scale: Tensor, seeds: Tensor) -> Tensor:
    """Draw another image for each of [M, H], int64 [M], by softmax of ``scale`` x cosine similarity.

    The draw is the largest of similarity plus Gumbel noise, and the noise a function of ``seeds`` [M].
    """
    features = F.normalize(pooled.float(), dim=-1)
    logits = scale * features @ features.T
    noise = -torch.log(-torch.log(uniform(seeds, len(seeds))))
    return (logits + noise).fill_diagonal_(float("-inf")).argmax(dim=1)


def with_mismatched_images(batch: Batch, other: Tensor) -> Tensor:
    """Put the images of ``other`` into every second slot, a pair's mismatched one; returns the new slot images."""
    in_pairs = 2 * len(batch.readouts["context"])
    caption, match = batch.slot_images[:in_pairs].view(-1, 2).unbind(1)
    swapped = torch.stack([caption, other.index_select(0, match)], dim=1).flatten()
    return torch.cat([swapped, batch.slot_images[in_pairs:]])
