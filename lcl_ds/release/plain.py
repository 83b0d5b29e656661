"""Read an encoder as a plain vision transformer with the names of timm, whatever its family calls its weights."""

import re
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lcl_ds.errors import UserError
from lcl_ds.models.encoders import family_of
from lcl_ds.models.vision import released_weights
from lcl_ds.models.weights.transfer import RENAMED

TIMM_NAMES = [
    (r"^embeddings\.(class_embedding|cls_token)$", "cls_token"),
    (r"^embeddings\.position_embedding(s|\.weight)$", "pos_embed"),
    (r"^embeddings\.(patch_embedding|patch_embeddings\.projection)\.", "patch_embed.proj."),
    (r"^encoder\.layers?\.(\d+)\.", r"blocks.\1."),
    (r"\.layer_norm([12])\.", r".norm\1."),
    (r"\.(self_attn|attention)\.(out_proj|o_proj)\.", ".attn.proj."),
    (r"\.(self_attn|attention)\.([qkv])_proj\.", r".attn.\2."),
    (r"\.layer_scale([12])\.lambda1$", r".ls\1.gamma"),
]
"""Patterns of names in transformers, and what timm calls the same; the norms at both ends the family's record names."""
TIMM_NAME = re.compile(
    r"(cls_token|pos_embed|(patch_embed\.proj|norm_pre|norm)\.(weight|bias)|"
    r"blocks\.\d+\.((norm[12]|attn\.qkv|attn\.proj|mlp\.fc[12])\.(weight|bias)|ls[12]\.gamma))"
)
TIMM_ACTIVATIONS = {"gelu": "gelu", "quick_gelu": "quick_gelu", "gelu_pytorch_tanh": "gelu_tanh"}
"""Names of activations in transformers and in timm."""
ARCHITECTURES = {1e-5: "vit_base_patch16_clip_224", 1e-6: "vit_base_patch16_224"}
"""timm's vision transformers by the epsilon of their norms, which is all that their arguments cannot say."""


@dataclass(frozen=True)
class PlainTransformer:
    """A vision transformer of which every part has a name in timm."""

    weights: dict[str, Tensor]
    """fp32, by timm's names."""
    width: int
    depth: int
    heads: int
    mlp: int
    patch: int
    size: int
    """Of the images in pixels."""
    activation: str
    """As transformers names it."""
    eps: float
    """Of all norms."""

    @property
    def has_class_token(self) -> bool:
        return "cls_token" in self.weights

    @property
    def pre_norm(self) -> bool:
        return "norm_pre.weight" in self.weights

    @property
    def layer_scale(self) -> float | None:
        """Any value but 0 asks for layer scale; the weights bring their own."""
        return 1.0 if "blocks.0.ls1.gamma" in self.weights else None

    def mlp_ratio(self) -> float:
        """Return what times the width, rounded down, is the width of the MLP."""
        ratio = self.mlp / self.width
        return ratio if int(self.width * ratio) == self.mlp else (self.mlp + 0.5) / self.width


def plain_transformer(encoder: Any, layout: str) -> PlainTransformer:
    """Read an encoder as a plain vision transformer.

    Args:
        layout: what ``--format`` said, for the message.

    Raises:
        UserError: it computes something that such a transformer does not.
    """
    config = encoder.config
    weights = {_timm_name(encoder, theirs): weight for theirs, weight in released_weights(encoder).items()}
    weights = {name: weight.detach().float() for name, weight in _with_joint_attention(weights).items()}
    epsilons = {module.eps for module in encoder.modules() if isinstance(module, nn.LayerNorm)}
    problems = [f"the weight {name}" for name in sorted(weights) if not TIMM_NAME.fullmatch(name)][:1]
    problems += [f"norms with epsilon {eps}" for eps in epsilons if eps not in ARCHITECTURES or len(epsilons) > 1]
    if config.hidden_act not in TIMM_ACTIVATIONS:
        problems.append(f"the activation {config.hidden_act}")
    if problems:
        raise UserError(
            f"--format {layout}: its vision transformers have no place for {' and '.join(problems)} of this "
            f"{config.model_type}; use --format hf"
        )
    width, patch = config.hidden_size, config.patch_size
    kernel = weights["patch_embed.proj.weight"]
    if family_of(config).reads_flat_patches:  # a patch is laid out with its channels last
        weights["patch_embed.proj.weight"] = kernel.unflatten(1, (patch, patch, -1)).permute(0, 3, 1, 2)
    for single in ("cls_token", "pos_embed"):
        if single in weights:
            weights[single] = weights[single].reshape(1, -1, width)
    return PlainTransformer(
        weights=weights,
        width=width,
        depth=config.num_hidden_layers,
        heads=config.num_attention_heads,
        mlp=len(weights["blocks.0.mlp.fc1.bias"]),
        patch=patch,
        size=config.image_size,
        activation=config.hidden_act,
        eps=epsilons.pop(),
    )


def _timm_name(encoder: Any, name: str) -> str:
    """Say what timm calls a weight; one that it has not keeps a name that :data:`TIMM_NAME` does not know."""
    family = family_of(encoder.config)
    name = name.removeprefix(family.published_prefix)
    for norm, theirs in ((family.first_norm, "norm_pre."), (family.final_norm, "norm.")):
        if norm is not None and name.startswith(f"{norm}."):
            return theirs + name.removeprefix(f"{norm}.")
    for older, newer in RENAMED.items():
        name = name.replace(older, newer)
    return renamed(name, TIMM_NAMES)


def renamed(name: str, patterns: list[tuple[str, str]]) -> str:
    """Replace each pattern in a name."""
    for pattern, replacement in patterns:
        name = re.sub(pattern, replacement, name)
    return name


def _with_joint_attention(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Join the projections to queries, keys and values; a bias that a family leaves out is 0."""
    joint = dict(weights)
    for name in weights:
        if match := re.fullmatch(r"(blocks\.\d+\.attn\.)q\.(weight|bias)", name):
            parts = [joint.pop(f"{match[1]}{part}.{match[2]}") for part in "qkv"]
            joint[f"{match[1]}qkv.{match[2]}"] = torch.cat(parts)
            joint.setdefault(f"{match[1]}qkv.bias", torch.zeros(3 * len(parts[0])))
    return joint


def with_bias_in_positions(plain: PlainTransformer) -> dict[str, Tensor]:
    """Move the bias of the patches to their positions, which are added right after it."""
    weights = dict(plain.weights)
    bias = weights.pop("patch_embed.proj.bias", None)
    if bias is not None:
        positions = weights["pos_embed"].clone()
        positions[:, int(plain.has_class_token) :] += bias
        weights["pos_embed"] = positions
    return weights
