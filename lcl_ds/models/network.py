"""The network of Latent Compression Learning (paper, section 3): vision tower, pooling, causal decoder, heads."""

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lcl_ds.batch import Batch
from lcl_ds.grids import PackedImages, kept_count
from lcl_ds.models.attention.masks import BY_IMAGES, Mode, attention_arguments, image_blocks, use_best_implementation
from lcl_ds.models.blocks import recompute_blocks
from lcl_ds.models.counter_rng import kept_patches
from lcl_ds.models.decoder import build_decoder
from lcl_ds.models.heads import ContextHead, LMHead, LogitScale
from lcl_ds.models.pooling import AttentivePooling
from lcl_ds.models.vision import VisionEncoder


class LCLModel(nn.Module):
    """Images and text in one causal sequence.

    Args:
        vision_config, decoder_config: transformers configurations.
        pooling_heads: heads of the pooling query.
        logit_scale_init: first temperature multiplier.
        checkpoint_vision, checkpoint_decoder: recompute every k-th block of that tower in backward; 0: none.
        vision_attention, decoder_attention: ``auto``, or an attention implementation of transformers.
        bidirectional_images: whether tokens of an image see each other in the decoder, not only those before them.
        patch_dropout: fraction of an image's patches that training leaves out before the first block.
        is_native: whether images keep their aspect ratio, so that those of a batch may come packed.
    """

    def __init__(
        self,
        vision_config: Any,
        decoder_config: Any,
        pooling_heads: int,
        logit_scale_init: float = 1 / 0.07,
        checkpoint_vision: int = 0,
        checkpoint_decoder: int = 0,
        vision_attention: str = "auto",
        decoder_attention: str = "auto",
        bidirectional_images: bool = False,
        patch_dropout: float = 0.0,
        is_native: bool = False,
    ):
        super().__init__()
        width = decoder_config.hidden_size
        self.attention = decoder_attention
        self.attention_mode: Mode = "images" if bidirectional_images else "causal"
        self.vision = VisionEncoder(vision_config, vision_attention, is_native)
        self.kept_tokens = kept_count(self.vision.patch_tokens, patch_dropout)
        self.pooling = AttentivePooling(vision_config.hidden_size, width, pooling_heads)
        self.decoder, norm = build_decoder(decoder_config)
        self.lm_head = LMHead(
            norm, width, decoder_config.vocab_size, softcap=getattr(decoder_config, "final_logit_softcapping", None)
        )
        self.context_head = ContextHead(copy.deepcopy(norm), width, width)
        self.logit_scale = LogitScale(logit_scale_init)
        recompute_blocks(self.vision.model, checkpoint_vision)
        recompute_blocks(self.decoder, checkpoint_decoder)
        self.choose_attention()

    def choose_attention(self, device: torch.device | None = None) -> None:
        """Let both towers use the attention implementation that suits the settings, their dtype and their device.

        Args:
            device: where they compute; None: where their weights are now.
        """
        self.vision.choose_attention(device)
        use_best_implementation(self.decoder, self.attention, self.attention_mode, device=device)

    def use_attention_mode(self, mode: Mode) -> None:
        """Let tokens of the decoder see what ``mode`` says, not the settings, by an implementation that can."""
        self.attention_mode = mode
        self.choose_attention()

    def _apply(self, *args: Any, **options: Any) -> "LCLModel":
        """Move or cast the network, as ``to`` and ``bfloat16`` do by this, and choose attention for what it is then."""
        super()._apply(*args, **options)
        self.choose_attention()
        return self

    def encode_images(
        self, images: Tensor, image_seeds: Tensor, packed: PackedImages | None = None
    ) -> tuple[Tensor, Tensor]:
        """Encode images [M, 3, H, W], uint8 or normalised: pooled [M, H], tokens for the decoder [M, N, H].

        In training N are the patches that patch dropout keeps, drawn from ``image_seeds`` [M].

        Args:
            packed: how images of different shapes lie in ``images``; tokens are then [U, H].
        """
        if packed is not None:
            return self.pooling(self.vision.packed(self.vision.normalize(images), packed, image_seeds), packed)
        every, kept = self.vision.patch_tokens, None
        if self.training and self.kept_tokens < every:
            kept = kept_patches(image_seeds, every, self.kept_tokens)
        return self.pooling(self.vision(self.vision.normalize(images), kept))

    def decode(self, batch: Batch, image_tokens: Tensor, mode: Mode | None = None) -> Tensor:
        """Run the decoder; returns its states before any final norm, rows laid end to end [R*L, H].

        Args:
            image_tokens: [S, N, H], what stands in each slot of ``batch``; [W, H] where its images are packed.
            mode: what a token sees of its document; None: what the settings say. :data:`BY_IMAGES` only where they do.
        """
        embeddings = self.decoder.get_input_embeddings()(batch.input_ids)
        places, beyond = _slot_places(batch, image_tokens)
        image_tokens = image_tokens.flatten(0, -2)
        flat = F.pad(embeddings.flatten(0, 1), (0, 0, 0, beyond))
        flat = flat.index_copy(0, places, image_tokens.to(flat.dtype))
        inputs_embeds = flat[: batch.input_ids.numel()].view_as(embeddings)
        mode = mode or self.attention_mode
        blocks = None
        if mode in BY_IMAGES:
            packed = batch.packed
            numbers = torch.arange(len(places), device=flat.device) // beyond if packed is None else packed.slot_numbers
            blocks = image_blocks(batch.position_ids, places, numbers, beyond)
        return self.run_decoder(batch, inputs_embeds, mode, blocks)

    def run_decoder(self, batch: Batch, inputs_embeds: Tensor, mode: Mode, blocks: Tensor | None) -> Tensor:
        """Run the decoder on what stands in the rows [R, L, H]; see :meth:`decode`.

        Args:
            blocks: int64 [R, L], number of the image that a token is of, for :data:`BY_IMAGES`.
        """
        attention = attention_arguments(
            self.decoder,
            inputs_embeds,
            batch.position_ids,
            mode=mode,
            image_blocks=blocks,
            cu_seqlens=batch.cu_seqlens,
            max_seqlen=batch.max_seqlen,
        )
        hidden_states = self.decoder(inputs_embeds=inputs_embeds, use_cache=False, **attention).last_hidden_state
        return hidden_states.flatten(0, 1)

    def forward(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return decoder states [R*L, H] and pooled features [M, H], with every image in its own slots."""
        pooled, tokens = self.encode_images(batch.images, batch.image_seeds, batch.packed)
        in_slots = batch.slot_images if batch.packed is None else batch.packed.slot_tokens
        return self.decode(batch, tokens.index_select(0, in_slots)), pooled

    def pair_features(self, hidden_states: Tensor, pooled: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return L2-normalised image and context features [P, H] of the contrastive pairs.

        They are normalised in fp32 and then take the dtype of the towers: similarities of bf16 features are still
        summed in fp32, at many times the speed.
        """
        pairs = batch.readouts["context"]
        image = pooled.index_select(0, pairs.images)
        context = self.context_head(hidden_states.index_select(0, pairs.positions))
        return (
            F.normalize(image.float(), dim=-1).to(image.dtype),
            F.normalize(context.float(), dim=-1).to(context.dtype),
        )

    def contrastive_parts(self) -> tuple[nn.Module | nn.Parameter, ...]:
        """List what only features of contrastive pairs depend on: no loss on decoder states alone reaches it."""
        pooling = self.pooling
        attention = pooling.query, pooling.norm_q, pooling.norm_k, pooling.q, pooling.k
        return self.context_head, self.logit_scale, *attention


def _slot_places(batch: Batch, image_tokens: Tensor) -> tuple[Tensor, int]:
    """Give the flat positions [W] of all tokens in slots, and how many of them may lie beyond the rows.

    One image's worth: a rank without images writes its constant image there, so that every rank runs the same modules
    and the constant image's features reach nothing.
    """
    if batch.packed is not None:
        return batch.packed.slot_places, batch.packed.beyond
    count = image_tokens.shape[1]
    places = batch.slot_positions[:, None] + torch.arange(count, device=image_tokens.device)
    return places.flatten(), count
