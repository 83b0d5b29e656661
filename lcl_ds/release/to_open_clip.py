"""Write the encoder as open_clip loads it: as the vision tower of a CLIP whose text tower is a stand-in.

open_clip has no pooling like ours, so what it pools is the mean of the patch tokens after the final norm.
"""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from lcl_ds.errors import UserError
from lcl_ds.models.network import LCLModel
from lcl_ds.release.card import write_card
from lcl_ds.release.options import DEFAULTS, ReleaseOptions
from lcl_ds.release.origin import WeightOrigin
from lcl_ds.release.parity import OTHER_CODE, TOLERANCES, largest_difference, parity_sentence, trained_features
from lcl_ds.release.plain import ARCHITECTURES, PlainTransformer, plain_transformer, renamed, with_bias_in_positions
from lcl_ds.release.to_timm import LEFT_OUT, timm_arguments, timm_weights
from lcl_ds.release.vision import in_dtype, weight_metadata

NAMES = [
    (r"^cls_token$", "class_embedding"),
    (r"^pos_embed$", "positional_embedding"),
    (r"^patch_embed\.proj\.", "conv1."),
    (r"^norm_pre\.", "ln_pre."),
    (r"^norm\.", "ln_post."),
    (r"^blocks\.", "transformer.resblocks."),
    (r"\.norm([12])\.", r".ln_\1."),
    (r"\.attn\.qkv\.", ".attn.in_proj_"),
    (r"\.attn\.proj\.", ".attn.out_proj."),
    (r"\.mlp\.fc1\.", ".mlp.c_fc."),
    (r"\.mlp\.fc2\.", ".mlp.c_proj."),
    (r"\.ls([12])\.", r".ls_\1."),
]
"""Patterns of names in timm, and what open_clip's own vision transformer calls the same."""
USAGE = """\
```python
import open_clip
import torch
from PIL import Image

image = Image.new("RGB", (640, 480), "red")  # yours: Image.open("photo.jpg")
model, preprocess = open_clip.create_model_from_pretrained("local-dir:{folder}")
model.eval()
with torch.no_grad():
    features = model.encode_image(preprocess(image).unsqueeze(0))  # [images, {width}], the mean of the patches
    {tokens}  # [images, {patches}, {width}]
```

open_clip builds no vision tower without a text tower. **The text tower here is a stand-in of zeros**: every text
has the feature 0, so similarities say nothing. Training reads the **patch tokens after the final norm**{pooling}.
"""
NATIVE_TOKENS = """model.visual.output_tokens = True
    _, patches = model.visual(preprocess(image).unsqueeze(0))"""
TRUNK_TOKENS = "patches = model.visual.trunk.forward_features(preprocess(image).unsqueeze(0))"


def release_open_clip(model: LCLModel, origin: WeightOrigin, folder: Path, options: ReleaseOptions = DEFAULTS) -> str:
    """Write a folder for ``open_clip.create_model("local-dir:FOLDER")`` and compare what its vision tower computes.

    Returns:
        One sentence with the largest difference.

    Raises:
        UserError: the encoder is no plain vision transformer, or the open_clip that is installed has none like it, or
            its features are not finite.
        RuntimeError: open_clip computes other features than the training model.
    """
    import open_clip

    config = model.vision.model.config
    plain = plain_transformer(model.vision.model, "open_clip")
    features = trained_features(model, origin)
    model_config = open_clip_config(plain)
    whole = open_clip.CLIP(**model_config)
    whole.visual.load_state_dict(open_clip_weights(plain), strict=True)
    weights = {
        name: weight if name.startswith("visual.") else torch.zeros_like(weight)
        for name, weight in whole.state_dict().items()
    }
    save_file(
        {name: weight.contiguous() for name, weight in in_dtype(weights, options.dtype).items()},
        folder / "open_clip_model.safetensors",
        metadata=weight_metadata(origin),
    )
    preprocessing = {"mean": list(config.image_mean), "std": list(config.image_std), "interpolation": "bicubic"}
    tree = {"model_cfg": model_config, "preprocess_cfg": preprocessing | {"resize_mode": "shortest"}}
    (folder / "open_clip_config.json").write_text(json.dumps(tree, indent=2) + "\n", encoding="utf-8")
    released = open_clip.create_model(f"local-dir:{folder}").eval()
    tolerance = max(OTHER_CODE, TOLERANCES[options.dtype])
    with torch.no_grad():
        theirs = {
            "mean": released.encode_image(features.images),
            "patches": _open_clip_tokens(released, features.images),
        }
    ours = {"patches": features.patches, "mean": features.patches.mean(1)}
    checked = parity_sentence(largest_difference(ours, theirs, tolerance, "the model in open_clip"), tolerance, origin)
    usage = USAGE.format(
        folder=options.name_in_code(folder),
        patches=model.vision.patch_tokens,
        width=plain.width,
        tokens=NATIVE_TOKENS if plain.has_class_token else TRUNK_TOKENS,
        pooling=LEFT_OUT if origin.pools else "",
    )
    write_card(folder, model, origin, options, usage, checked, library="open_clip")
    return checked


def _open_clip_tokens(released: Any, images: Tensor) -> Tensor:
    if hasattr(released.visual, "trunk"):
        return released.visual.trunk.forward_features(images)
    released.visual.output_tokens = True
    return released.visual(images)[1]


def open_clip_config(plain: PlainTransformer) -> dict[str, Any]:
    """Write down what open_clip must know to build the model.

    Its own vision transformer always has a class token; one without is timm's.

    Raises:
        UserError: the open_clip that is installed cannot be told the sizes of one of timm's.
    """
    vision = _native_tower(plain) if plain.has_class_token else _timm_tower(plain)
    return {
        "embed_dim": plain.width,
        "quick_gelu": plain.activation == "quick_gelu",
        "vision_cfg": {"image_size": plain.size, **vision},
        # As small as its tokenizer lets it be.
        "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 8, "heads": 1, "layers": 1},
    }


def _native_tower(plain: PlainTransformer) -> dict[str, Any]:
    tower = {
        "layers": plain.depth,
        "width": plain.width,
        "head_width": plain.width // plain.heads,
        "mlp_ratio": plain.mlp_ratio(),
        "patch_size": plain.patch,
        "no_ln_pre": not plain.pre_norm,
        "pool_type": "avg",
        "norm_kwargs": {"eps": plain.eps},
    }
    if plain.layer_scale is not None:
        tower["ls_init_value"] = plain.layer_scale
    if plain.activation == "gelu_pytorch_tanh":
        tower["act_kwargs"] = {"approximate": "tanh"}
    return tower


def _timm_tower(plain: PlainTransformer) -> dict[str, Any]:
    import open_clip

    if "timm_model_kwargs" not in open_clip.CLIPVisionCfg.__dataclass_fields__:
        raise UserError(
            f"--format open_clip: open_clip {open_clip.__version__} has no vision transformer without a class token in "
            "this size; install a version after 3.3, or use --format timm"
        )
    return {
        "timm_model_name": ARCHITECTURES[plain.eps],
        "timm_pool": "avg",
        "timm_proj": "none",
        "timm_model_kwargs": timm_arguments(plain),
    }


def open_clip_weights(plain: PlainTransformer) -> dict[str, Tensor]:
    """Return the weights of open_clip's vision tower."""
    if not plain.has_class_token:
        return {f"trunk.{name}": weight for name, weight in timm_weights(plain).items()}
    weights = {renamed(name, NAMES): weight for name, weight in with_bias_in_positions(plain).items()}
    weights["class_embedding"] = weights["class_embedding"].flatten()
    weights["positional_embedding"] = weights["positional_embedding"].squeeze(0)
    return weights | {"proj": torch.eye(plain.width)}
