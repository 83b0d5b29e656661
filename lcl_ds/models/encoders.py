"""Describe each family of vision encoders in one record."""

from dataclasses import dataclass, field
from typing import Any, Literal

Statistics = tuple[float, float, float]
IMAGE_MEAN: Statistics = (0.48145466, 0.4578275, 0.40821073)
"""Per-channel mean of CLIP's images, the convention of OpenCLIP and of the published LCL."""
IMAGE_STD: Statistics = (0.26862954, 0.26130258, 0.27577711)
"""Per-channel standard deviation that belongs to :data:`IMAGE_MEAN`."""
HALVES: Statistics = (0.5, 0.5, 0.5)


@dataclass(frozen=True)
class EncoderFamily:
    """How one family of transformers differs from the others."""

    final_norm: str
    """Module that normalises the patch tokens after the last block."""
    positions: str
    """End of the name of the weight that holds one row per position."""
    first_norm: str | None = None
    """Module that normalises tokens before the first block."""
    vectors: tuple[str, ...] = ()
    """Names of weights that are one vector per position or class, or a scale per channel: they do not decay."""
    image_mean: Statistics = IMAGE_MEAN
    """Mean of the pixels that the published models of the family expect."""
    image_std: Statistics = IMAGE_STD
    """Standard deviation of the pixels that the published models of the family expect."""
    fixed_keys: dict[str, Any] = field(default_factory=dict)
    """Configuration that leaves out weights which no patch token depends on: they would never train."""
    class_embedding: str | None = None
    """Weight of the embeddings that is the class token, which stands before the patches; None: there is none."""
    patch_embedding: str = "patch_embedding"
    """Module of the embeddings that makes a token of a patch."""
    reads_flat_patches: bool = False
    """Whether its model takes flattened patches and counts positions instead of pixels."""
    position_mode: Literal["bicubic", "bilinear"] = "bicubic"
    """How positions are resized to another number of patches."""
    antialiases_positions: bool = False
    """Whether its own class resizes positions to an image's patches with antialiasing."""
    published_prefix: str = ""
    """What stands before the name of every weight in published checkpoints."""
    releases_unnormed_patches: bool = False
    """Whether the model applies its final norm to the class token alone, so that a reader has to normalise patches."""

    @property
    def has_class_token(self) -> bool:
        return self.class_embedding is not None


FAMILIES = {
    "clip_vision_model": EncoderFamily(
        final_norm="post_layernorm",
        first_norm="pre_layrnorm",
        positions="embeddings.position_embedding.weight",
        vectors=("class_embedding", "position_embedding"),
        class_embedding="class_embedding",
        published_prefix="vision_model.",
        releases_unnormed_patches=True,
    ),
    "siglip_vision_model": EncoderFamily(
        final_norm="post_layernorm",
        positions="embeddings.position_embedding.weight",
        vectors=("position_embedding",),
        image_mean=HALVES,
        image_std=HALVES,
        fixed_keys={"vision_use_head": False},
        published_prefix="vision_model.",
    ),
    "siglip2_vision_model": EncoderFamily(
        final_norm="post_layernorm",
        positions="embeddings.position_embedding.weight",
        vectors=("position_embedding",),
        image_mean=HALVES,
        image_std=HALVES,
        fixed_keys={"vision_use_head": False},
        reads_flat_patches=True,
        position_mode="bilinear",
        antialiases_positions=True,
        published_prefix="vision_model.",
    ),
    "dinov2": EncoderFamily(
        final_norm="layernorm",
        positions="embeddings.position_embeddings",
        vectors=("cls_token", "position_embeddings", "lambda1"),
        image_mean=(0.485, 0.456, 0.406),
        image_std=(0.229, 0.224, 0.225),
        fixed_keys={"use_mask_token": False},
        class_embedding="cls_token",
        patch_embedding="patch_embeddings",
    ),
}
"""By transformers' ``model_type``. A new family is a new record here, and nothing else."""


def family_of(config: Any) -> EncoderFamily:
    """Return the record of the family that a transformers configuration belongs to."""
    return FAMILIES[config.model_type]
