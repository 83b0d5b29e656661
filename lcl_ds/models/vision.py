"""The vision tower: a transformers encoder whose patch tokens are what the decoder sees."""

from collections.abc import Sequence
from functools import partial
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, PreTrainedModel

from lcl_ds.grids import Grid, PackedImages, joined_patches
from lcl_ds.models.attention import varlen
from lcl_ds.models.attention.masks import bounds_of_images, use_best_implementation
from lcl_ds.models.counter_rng import kept_of_packed
from lcl_ds.models.encoders import FAMILIES, IMAGE_MEAN, IMAGE_STD, EncoderFamily, family_of
from lcl_ds.models.positions import AxisWeights


def _shape(patch: int, width: int, depth: int, heads: int, mlp: int) -> dict[str, Any]:
    sizes = {"hidden_size": width, "num_hidden_layers": depth, "num_attention_heads": heads, "intermediate_size": mlp}
    return {"image_size": 224, "patch_size": patch, "hidden_act": "gelu", **sizes}


SHAPES = {
    "vit_b32": _shape(32, 768, 12, 12, 3072),
    "vit_b16": _shape(16, 768, 12, 12, 3072),
    "vit_l14": _shape(14, 1024, 24, 16, 4096),
    "vit_h14": _shape(14, 1280, 32, 16, 5120),
    "vit_g14": _shape(14, 1408, 40, 16, 6144),
    "vit_1b14": _shape(14, 1536, 40, 24, 6144),
    "vit_bigg14": _shape(14, 1664, 48, 16, 8192),
    "vit_6b14": _shape(14, 3200, 48, 25, 12800),
}
"""Sizes by name: OpenCLIP's ViT-B/32 to bigG/14; 1b has those of DINOv2's ViT-g, 6b those of InternViT-6B. Blocks are
those of the chosen family."""


def build_vision_config(
    model_type: str,
    hf_keys: dict[str, Any],
    image_mean: Sequence[float] = IMAGE_MEAN,
    image_std: Sequence[float] = IMAGE_STD,
) -> Any:
    """Make the transformers configuration of the encoder; ``hf_keys`` are that family's own keys.

    It also carries the size and the statistics of images, which are not part of some families' own configuration:
    SigLIP 2 counts positions instead of pixels.

    Raises:
        ValueError: the family is not supported, or images do not divide into square patches.
    """
    if model_type not in FAMILIES:
        raise ValueError(f"vision {model_type}: not supported; use {', '.join(FAMILIES)}")
    family = FAMILIES[model_type]
    config = AutoConfig.for_model(model_type, **{**hf_keys, **family.fixed_keys})
    if family.reads_flat_patches:
        config.image_size = hf_keys.get("image_size") or round(config.num_patches**0.5) * config.patch_size
        if hf_keys.get("num_patches", image_tokens(config)) != image_tokens(config):
            raise ValueError(f"vision: num_patches {config.num_patches} does not follow from image_size and patch_size")
        config.num_patches = image_tokens(config)
    if config.image_size % config.patch_size:
        raise ValueError(f"vision: image_size {config.image_size} is not a multiple of patch_size {config.patch_size}")
    config.image_mean, config.image_std = list(image_mean), list(image_std)
    return config


def image_tokens(config: Any) -> int:
    """Count the patch tokens of one image."""
    return (config.image_size // config.patch_size) ** 2


def normalize_images(
    images: Tensor,
    dtype: torch.dtype,
    image_mean: Sequence[float] = IMAGE_MEAN,
    image_std: Sequence[float] = IMAGE_STD,
) -> Tensor:
    """Normalise uint8 [M, 3, H, W], or patches, to ``dtype``; floating images are taken as normalised already."""
    if images.is_floating_point():
        return images.to(dtype)
    mean = torch.tensor(image_mean, device=images.device).view(3, 1, 1) * 255
    std = torch.tensor(image_std, device=images.device).view(3, 1, 1) * 255
    return ((images - mean) / std).to(dtype)


class VisionEncoder(nn.Module):
    """Patch tokens after the final norm, from any of :data:`lcl_ds.models.encoders.FAMILIES`.

    A class token takes part in attention and is then dropped, as in the published ``lcl_model.py``. Square images need
    no mask, so ``auto`` is sdpa: torch takes its own flash kernel then.

    Args:
        is_native: whether images keep their aspect ratio, so that those of a batch may come packed.
    """

    def __init__(self, config: Any, attention: str = "auto", is_native: bool = False):
        super().__init__()
        self.attention, self.is_native = attention, is_native
        self.model: PreTrainedModel = AutoModel.from_config(config)
        self.patch_tokens = image_tokens(config)
        family = family_of(config)
        side = config.image_size // config.patch_size
        self.axis_weights = AxisWeights(side, family.position_mode, family.antialiases_positions)
        self.choose_attention()

    def choose_attention(self, device: torch.device | None = None) -> None:
        """Use the attention implementation that suits the settings, the dtype and the device of the tower."""
        wanted: str = self.attention
        preferred: tuple[str, ...] = ("sdpa", "eager")
        if self.is_native:
            wanted = varlen.IMAGES if wanted in ("auto", varlen.NAME) else wanted
            preferred = (varlen.IMAGES, *preferred)
        use_best_implementation(self.model, wanted, preferred=preferred, device=device)

    def _apply(self, *args: Any, **options: Any) -> "VisionEncoder":
        """Move or cast the tower, as ``to`` and ``bfloat16`` do by this, and choose attention for what it is then."""
        super()._apply(*args, **options)
        self.choose_attention()
        return self

    def normalize(self, images: Tensor) -> Tensor:
        """Normalise uint8 [M, 3, H, W] as the tower expects, in its dtype; floating images are normalised already."""
        config = self.model.config
        return normalize_images(images, self.model.dtype, config.image_mean, config.image_std)

    def forward(self, pixel_values: Tensor, kept: Tensor | None = None) -> Tensor:
        """Encode images [M, 3, H, W] to patch tokens [M, N, width].

        Args:
            kept: int64 [M, K], patches to go on with after positions are added; the blocks then run on these alone and
                [M, K, width] comes out.
        """
        hidden_states, prefix = self._hidden_states(pixel_values, kept)
        return self.final_norm(hidden_states[:, prefix:])

    def all_tokens(self, pixel_values: Tensor) -> tuple[Tensor, Tensor | None]:
        """Encode images [M, 3, H, W]: patch tokens [M, N, width] as above, and the class token [M, width] where there
        is one, after the same norm. No loss reads the class token: it is for evaluation."""
        hidden_states, prefix = self._hidden_states(pixel_values, None)
        class_token = self.final_norm(hidden_states[:, 0]) if prefix else None
        return self.final_norm(hidden_states[:, prefix:]), class_token

    def _hidden_states(self, pixel_values: Tensor, kept: Tensor | None) -> tuple[Tensor, int]:
        """Compute the states after the last block, and how many of them stand before the patches."""
        tokens, prefix = self.embed(pixel_values, kept)
        return self.run_blocks(self.first_norm(tokens)), prefix

    def embed(self, pixel_values: Tensor, kept: Tensor | None = None) -> tuple[Tensor, int]:
        """Embed images with their positions: [M, P + N, width], and P, how many tokens stand before the patches."""
        tokens = _embed(self.model, pixel_values)
        prefix = tokens.shape[1] - self.patch_tokens
        if kept is not None:
            patches = tokens[:, prefix:].gather(1, kept[..., None].expand(-1, -1, tokens.shape[2]))
            tokens = torch.cat([tokens[:, :prefix], patches], dim=1)
        return tokens, prefix

    def packed(self, patches: Tensor, images: PackedImages, image_seeds: Tensor) -> Tensor:
        """Encode the normalised patches [N, 3, P, P] of images of different shapes: image tokens [U, width].

        Where all are squares of the tower's own size, what comes out are the bits of :meth:`forward`. But the graph is
        one for all shapes: ranks have different ones, and ZeRO wants every gradient at the same place on all of them.

        Args:
            image_seeds: int64 [M], from which the patches are drawn that patch dropout keeps.
        """
        model: Any = self.model
        family = family_of(model.config)
        prefix = int(family.has_class_token)
        count = images.count
        # The module itself is called, so that ZeRO gathers its weights.
        model.embeddings.forward = partial(_embed_packed, model.embeddings, family, images, self.axis_weights)
        try:
            tokens = model.embeddings(patches)
        finally:
            del model.embeddings.forward
        places = torch.arange(len(images.token_images), device=tokens.device) + prefix * (images.token_images + 1)
        if images.drops_patches:
            kept = kept_of_packed(image_seeds, images) + prefix * (images.token_images + 1)
            starts = images.cu_patches[:-1] + torch.arange(count, device=tokens.device)
            whole = kept.new_zeros(len(kept) + prefix * count)
            first = (images.cu_tokens[:-1] + torch.arange(count, device=tokens.device)).long()
            whole = whole.index_copy(0, first, starts) if prefix else whole
            tokens = tokens.index_select(0, whole.index_copy(0, places, kept))
        bounds = images.cu_tokens + prefix * torch.arange(count + 1, dtype=torch.int32, device=tokens.device)
        tokens = self.first_norm(tokens[None])
        mask = bounds_of_images(model, tokens, bounds, images.longest + prefix)
        hidden_states = self.run_blocks(tokens, mask)[0]
        return self.final_norm(hidden_states.index_select(0, places) if prefix else hidden_states)

    def first_norm(self, tokens: Tensor) -> Tensor:
        """Normalise tokens [.., width] before the first block, where the family does."""
        name = family_of(self.model.config).first_norm
        return tokens if name is None else getattr(self.model, name)(tokens)

    def run_blocks(self, tokens: Tensor, attention_mask: Any = None) -> Tensor:
        """Run the blocks on rows of tokens [R, L, width].

        Args:
            attention_mask: what each token sees, for a family that :attr:`takes_masks`; None: all of its row.
        """
        encoder: Any = self.model.encoder
        options = {} if attention_mask is None else {"attention_mask": attention_mask}
        return encoder(tokens, **options).last_hidden_state

    @property
    def takes_masks(self) -> bool:
        """Say whether the blocks of this family can be told what each token sees."""
        encoder: Any = self.model.encoder
        return "attention_mask" in signature(type(encoder).forward).parameters

    def final_norm(self, hidden_states: Tensor) -> Tensor:
        """Normalise states [.., width] after the last block."""
        return getattr(self.model, family_of(self.model.config).final_norm)(hidden_states)


def _embed(model: Any, pixel_values: Tensor) -> Tensor:
    """Embed patches with positions, class token first where the family has one."""
    if not family_of(model.config).reads_flat_patches:
        return model.embeddings(pixel_values)
    # Its own forward resizes the positions for every image by itself. All images here have the size of the positions.
    patches = model.embeddings.patch_embedding(flat_patches(pixel_values, model.config.patch_size))
    return patches + model.embeddings.position_embedding(torch.arange(patches.shape[1], device=patches.device))


def _embed_packed(
    embeddings: Any, family: EncoderFamily, images: PackedImages, axis_weights: AxisWeights, patches: Tensor
) -> Tensor:
    """Embed patches [N, 3, P, P] with positions resized to each image, its class token first: [N + M, width].

    Families without class token give [N, width].
    """
    shared = images.shared_grid
    tokens = _embed_patches(getattr(embeddings, family.patch_embedding), family, patches, shared)
    class_token = getattr(embeddings, family.class_embedding) if family.class_embedding else None
    tokens = _with_class_token(tokens, class_token, images)
    positions = _positions(embeddings, family)
    prefix = int(family.has_class_token)
    of_patches, first = positions[prefix:], positions[0] if prefix else None
    row_weights, column_weights = axis_weights(images.row_places, images), axis_weights(images.column_places, images)
    if shared is not None:  # one image's positions are those of all, as they are added to squares
        row_weights, column_weights = row_weights[: shared.patches], column_weights[: shared.patches]
    weights = (row_weights[:, :, None] * column_weights[:, None]).flatten(1)
    resized = (weights @ of_patches.float()).to(tokens.dtype)
    if shared is not None:
        resized = resized if first is None else torch.cat([first[None], resized])
        tokens = (tokens.unflatten(0, (images.count, -1)) + resized).flatten(0, 1)
    else:
        tokens = tokens + _with_class_token(resized, first, images)
    return embeddings.dropout(tokens) if hasattr(embeddings, "dropout") else tokens


def _embed_patches(module: Any, family: EncoderFamily, patches: Tensor, shared: Grid | None) -> Tensor:
    """Make a token [N, width] of each patch; images of one shape are convolved as images, others as one long strip."""
    if family.reads_flat_patches:
        return module(patches.permute(0, 2, 3, 1).flatten(1))
    tokens = module(joined_patches(patches, shared or Grid(1, len(patches), len(patches))))
    return tokens.flatten(2).transpose(1, 2).flatten(0, 1) if tokens.ndim == 4 else tokens.flatten(0, 1)


def _positions(embeddings: Any, family: EncoderFamily) -> Tensor:
    """Return the table of positions, that of the class token first, [side * side + prefix, width]."""
    table: Any = getattr(embeddings, family.positions.removeprefix("embeddings.").removesuffix(".weight"))
    if isinstance(table, nn.Embedding):
        return table(torch.arange(table.num_embeddings, device=table.weight.device))
    return table[0]


def _with_class_token(tokens: Tensor, class_token: Tensor | None, images: PackedImages) -> Tensor:
    """Put a class token before the patches of each image, [N, width] to [N + M, width]; None: there is none."""
    if class_token is None:
        return tokens
    count, width = images.count, tokens.shape[1]
    if images.shared_grid is not None:
        return torch.cat(
            [class_token.view(1, 1, -1).expand(count, -1, -1), tokens.unflatten(0, (count, -1))], 1
        ).flatten(0, 1)
    places = torch.arange(len(tokens), device=tokens.device) + images.patch_images + 1
    whole = tokens.new_zeros(len(tokens) + count, width).index_copy(0, places, tokens)
    starts = images.cu_patches[:-1] + torch.arange(count, device=tokens.device)
    return whole.index_copy(0, starts, class_token.view(1, -1).expand(count, -1))


def flat_patches(images: Tensor, patch_size: int) -> Tensor:
    """Cut [M, 3, H, W] into patches [M, N, patch_size * patch_size * 3], in raster order, channels last in each."""
    tiles = images.unflatten(3, (-1, patch_size)).unflatten(2, (-1, patch_size))
    return tiles.permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)


def released_weights(model: PreTrainedModel) -> dict[str, Tensor]:
    """Return an encoder's weights under the names that published checkpoints of its family have.

    transformers 5 took the outer ``vision_model`` away from CLIP and SigLIP and adds it when it reads; transformers 4
    reads nothing else and would leave every weight random.
    """
    prefix = family_of(model.config).published_prefix
    return {prefix + name.removeprefix(prefix): weight for name, weight in model.state_dict().items()}


def family_inputs(model: Any, pixel_values: Tensor) -> dict[str, Tensor]:
    """Lay normalised images [M, 3, H, W] out as the model's class in transformers takes them."""
    if not family_of(model.config).reads_flat_patches:
        return {"pixel_values": pixel_values}
    patches = flat_patches(pixel_values, model.config.patch_size)
    side = model.config.image_size // model.config.patch_size
    shapes = torch.tensor([[side, side]], device=patches.device).expand(len(patches), -1)
    mask = torch.ones(patches.shape[:2], dtype=torch.int64, device=patches.device)
    return {"pixel_values": patches, "spatial_shapes": shapes, "pixel_attention_mask": mask}


def released_patch_tokens(model: Any, pixel_values: Tensor) -> Tensor:
    """Compute patch tokens [M, N, width] of a released folder's model, by the forward of its transformers class."""
    family = family_of(model.config)
    hidden_states = model(**family_inputs(model, pixel_values)).last_hidden_state[:, -image_tokens(model.config) :]
    if family.releases_unnormed_patches:
        hidden_states = getattr(model, family.final_norm)(hidden_states)
    return hidden_states
