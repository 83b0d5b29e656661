"""Next-token loss of one transformer that reads patches and then their text, on pairs (GenLIP).

Follows GenLIP (Fang et al. 2026, arXiv 2605.00809, and its published code): patches are embedded and stand before the
text in one sequence; tokens of an image see their image, tokens of the text all that precedes them; the loss is that of
the text alone. Its lower part is the encoder, and gives of an image alone exactly what it gives before a text. Ours:
the lower part is the vision tower, whose blocks read the text as well, and the decoder is the upper one, of as many
blocks as it has. GenLIP has no upper part: set ``model.decoder.num_hidden_layers=0``. Ours are also the tower's own
kind of blocks and positions, where GenLIP has gated attention and rotary positions in three dimensions: to the texts'
embeddings in the tower fixed sines are added. A class token stands where ``<soi>`` would.
"""

import math
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lcl_ds.batch import Batch
from lcl_ds.data.sequences import PairView
from lcl_ds.errors import UserError
from lcl_ds.models.attention.masks import Mode, attention_arguments, image_blocks
from lcl_ds.models.counter_rng import kept_patches
from lcl_ds.models.network import LCLModel
from lcl_ds.objectives import base
from lcl_ds.objectives.base import LossNormalizers, ObjectiveSettings

MASKED = ("sdpa", "eager", "flex_attention")
"""Attention implementations that are told what each token sees."""
POSITION_SCALE = 0.02
"""Of the sines, that they do not drown the embeddings they are added to, which are about as large at first."""


class Settings(ObjectiveSettings):
    """GenLIP."""

    name: Literal["genlip"] = "genlip"


def view(settings: Settings, image_first_probability: float) -> PairView:
    """Show each image before its text."""
    return PairView(("caption",))


class Objective(base.Objective):
    """The generation loss alone."""

    losses: ClassVar[tuple[str, ...]] = ("generation_loss",)
    attention_mode: ClassVar[Mode] = "prefix"
    one_transformer: ClassVar[bool] = True

    def __init__(self, model: LCLModel, settings: Settings):
        super().__init__(model)
        if not model.vision.takes_masks:
            family = model.vision.model.config.model_type
            raise UserError(
                f"model.vision.model_type: the blocks of {family} cannot be told what a token sees, as genlip has to; "
                "use siglip_vision_model or clip_vision_model"
            )
        if model.vision.attention not in ("auto", *MASKED):
            raise UserError(
                f"model.vision.attention: {model.vision.attention} cannot be told what a token sees, as genlip has to; "
                "use auto"
            )
        width, inner = model.vision.model.config.hidden_size, model.decoder.config.hidden_size
        self.text_in, self.states_out = nn.Linear(inner, width), nn.Linear(width, inner)

    @property
    def unused(self) -> tuple[nn.Module | nn.Parameter, ...]:
        return self.model.pooling, self.model.context_head, self.model.logit_scale

    def count_terms(self, batch: Batch) -> dict[str, int]:
        return {"labels": len(batch.labels)}

    def forward(self, batch: Batch, normalizers: LossNormalizers) -> dict[str, Tensor]:
        """Compute the share of the loss."""
        if not self.training:  # an evaluation takes features of images where the encoder makes them of images alone
            self.model.encode_images(batch.images, batch.image_seeds)
        states, blocks = self._lower_part(batch)
        hidden_states = self.model.run_decoder(batch, self.states_out(states), self.attention_mode, blocks)
        loss = self.generation(hidden_states, batch, normalizers)
        return {"loss": loss, "generation_loss": loss}

    def _lower_part(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Run the vision tower on whole rows.

        Returns:
            States [R, L, width] after its last norm, and of which image each token is, int64 [R, L], -1 for none.
        """
        model, vision = self.model, self.model.vision
        kept = None
        if self.training and model.kept_tokens < vision.patch_tokens:
            kept = kept_patches(batch.image_seeds, vision.patch_tokens, model.kept_tokens)
        images, prefix = vision.embed(vision.normalize(batch.images), kept)
        text = self.text_in(model.decoder.get_input_embeddings()(batch.input_ids))
        text = text + POSITION_SCALE * sines(batch.position_ids, text.shape[-1]).to(text.dtype)
        # A rank without images has rows of padding alone: the class token of its constant image may stand in one.
        starts = batch.slot_positions - prefix
        places = starts[:, None] + torch.arange(images.shape[1], device=text.device)
        flat = F.pad(text.flatten(0, 1), (0, 0, 0, images.shape[1]))
        images = images.index_select(0, batch.slot_images).flatten(0, 1)
        flat = flat.index_copy(0, places.flatten(), images.to(flat.dtype))
        rows = vision.first_norm(flat[: batch.input_ids.numel()].view_as(text))
        numbers = torch.arange(len(places), device=text.device).repeat_interleave(places.shape[1])
        blocks = image_blocks(batch.position_ids, places.flatten(), numbers, places.shape[1])
        attention = attention_arguments(
            vision.model, rows, batch.position_ids, mode=self.attention_mode, image_blocks=blocks
        )
        return vision.final_norm(vision.run_blocks(rows, attention["attention_mask"])), blocks


def sines(position_ids: Tensor, width: int) -> Tensor:
    """Encode positions [R, L] as sines and cosines, fp32 [R, L, width] (Vaswani et al. 2017, section 3.5)."""
    half = width // 2
    rates = torch.exp(torch.arange(half, device=position_ids.device) * (-math.log(10_000) / half))
    angles = position_ids[..., None] * rates
    return F.pad(torch.cat([angles.sin(), angles.cos()], dim=-1), (0, width - 2 * half))
