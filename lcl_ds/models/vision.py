"""The vision tower: a transformers encoder whose patch tokens are what the decoder sees."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, PreTrainedModel

from lcl_ds.grids import PackedImages
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

    def choose_attention(self) -> None:
        """Use the attention implementation that suits the settings, the device and the dtype of the tower."""
        wanted: str = self.attention
        preferred: tuple[str, ...] = ("sdpa", "eager")
        if self.is_native:
            wanted = varlen.IMAGES if wanted in ("auto", varlen.NAME) else wanted
            preferred = (varlen.IMAGES, *preferred)
        use_best_implementation(self.model, wanted, preferred=preferred)

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
        return self._final_norm(hidden_states[:, prefix:])

    def all_tokens(self, pixel_values: Tensor) -> tuple[Tensor, Tensor | None]:
        """Encode images [M, 3, H, W]: patch tokens [M, N, width] as above, and the class token [M, width] where there
        is one, after the same norm. No loss reads the class token: it is for evaluation."""
        hidden_states, prefix = self._hidden_states(pixel_values, None)
        class_token = self._final_norm(hidden_states[:, 0]) if prefix else None
        return self._final_norm(hidden_states[:, prefix:]), class_token

    def _hidden_states(self, pixel_values: Tensor, kept: Tensor | None) -> tuple[Tensor, int]:
        """Compute the states after the last block, and how many of them stand before the patches."""
        tokens = _embed(self.model, pixel_values)
        prefix = tokens.shape[1] - self.patch_tokens
        if kept is not None:
            patches = tokens[:, prefix:].gather(1, kept[..., None].expand(-1, -1, tokens.shape[2]))
            tokens = torch.cat([tokens[:, :prefix], patches], dim=1)
        model: Any = self.model
        family = family_of(model.config)
        if family.first_norm is not None:
            tokens = getattr(model, family.first_norm)(tokens)
        return model.encoder(tokens).last_hidden_state, prefix

    def packed(self, patches: Tensor, images: PackedImages, image_seeds: Tensor) -> Tensor:
        """Encode the normalised patches [N, 3, P, P] of images of different shapes: image tokens [U, width].

        Modules run in the order in which :meth:`forward` runs them: at ZeRO stage 3 ranks with squares and ranks with
        other shapes gather the same weights at the same time.

        Args:
            image_seeds: int64 [M], from which the patches are drawn that patch dropout keeps.
        """
        model: Any = self.model
        family = family_of(model.config)
        row_weights = self.axis_weights(images.row_places, images.grids)
        column_weights = self.axis_weights(images.column_places, images.grids)
        # The module itself is called, so that ZeRO gathers its weights.
        model.embeddings.forward = partial(_embed_packed, model.embeddings, family, row_weights, column_weights)
        try:
            tokens, class_token = model.embeddings(patches)
        finally:
            del model.embeddings.forward
        if images.drops_patches:
            tokens = tokens.index_select(0, kept_of_packed(image_seeds, images))
        bounds, longest, places = images.cu_tokens, images.longest, None
        if class_token is not None:
            count = len(images.grids)
            bounds, longest = bounds + torch.arange(count + 1, dtype=torch.int32, device=bounds.device), longest + 1
            places = torch.arange(len(tokens), device=tokens.device) + images.token_images + 1
            whole = tokens.new_zeros(len(tokens) + count, tokens.shape[1]).index_copy(0, places, tokens)
            tokens = whole.index_copy(0, bounds[:-1].long(), class_token.expand(count, -1))
        tokens = tokens[None]
        if family.first_norm is not None:
            tokens = getattr(model, family.first_norm)(tokens)
        hidden_states = model.encoder(
            tokens, attention_mask=bounds_of_images(model, tokens, bounds, longest)
        ).last_hidden_state[0]
        return self._final_norm(hidden_states if places is None else hidden_states.index_select(0, places))

    def _final_norm(self, hidden_states: Tensor) -> Tensor:
        return getattr(self.model, family_of(self.model.config).final_norm)(hidden_states)


def _embed(model: Any, pixel_values: Tensor) -> Tensor:
    """Embed patches with positions, class token first where the family has one."""
    if not family_of(model.config).reads_flat_patches:
        return model.embeddings(pixel_values)
    # Its own forward resizes the positions for every image by itself. All images here have the size of the positions.
    patches = model.embeddings.patch_embedding(flat_patches(pixel_values, model.config.patch_size))
    return patches + model.embeddings.position_embedding(torch.arange(patches.shape[1], device=patches.device))


def _embed_packed(
    embeddings: Any, family: EncoderFamily, row_weights: Tensor, column_weights: Tensor, patches: Tensor
) -> tuple[Tensor, Tensor | None]:
    """Embed patches [N, 3, P, P] with positions: tokens [N, width], and the class token [1, width] where there is one.

    Args:
        row_weights, column_weights: fp32 [N, side], how much of each row and column of positions a patch gets.
    """
    if family.reads_flat_patches:
        patches = patches.permute(0, 2, 3, 1).flatten(1)
    tokens = getattr(embeddings, family.patch_embedding)(patches).flatten(1)
    name = family.positions.removeprefix("embeddings.").removesuffix(".weight")
    table: Any = getattr(embeddings, name)
    if isinstance(table, nn.Embedding):
        positions = table(torch.arange(table.num_embeddings, device=tokens.device))
    else:
        positions = table[0]
    prefix = int(family.has_class_token)
    weights = (row_weights[:, :, None] * column_weights[:, None]).flatten(1)
    tokens = tokens + (weights @ positions[prefix:].float()).to(tokens.dtype)
    dropout = getattr(embeddings, "dropout", nn.Identity())
    if family.class_embedding is None:
        return dropout(tokens), None
    class_token = getattr(embeddings, family.class_embedding).view(1, -1) + positions[:1]
    tokens = dropout(torch.cat([class_token, tokens]))
    return tokens[1:], tokens[:1]


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
