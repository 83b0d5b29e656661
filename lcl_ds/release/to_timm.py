"""Write the encoder as timm loads it.

timm has no pooling like ours, so what it pools is the mean of the patch tokens after the final norm.
"""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from lcl_ds.models.network import LCLModel
from lcl_ds.release.card import write_card
from lcl_ds.release.options import DEFAULTS, ReleaseOptions
from lcl_ds.release.origin import WeightOrigin
from lcl_ds.release.parity import OTHER_CODE, TOLERANCES, largest_difference, parity_sentence, trained_features
from lcl_ds.release.plain import (
    ARCHITECTURES,
    TIMM_ACTIVATIONS,
    PlainTransformer,
    plain_transformer,
    with_bias_in_positions,
)
from lcl_ds.release.vision import in_dtype, weight_metadata

USAGE = """\
```python
import timm
import torch
from PIL import Image

image = Image.new("RGB", (640, 480), "red")  # yours: Image.open("photo.jpg")
model = timm.create_model("local-dir:{folder}", pretrained=True).eval()
transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
with torch.no_grad():
    patches = model.forward_features(transform(image).unsqueeze(0))[:, {prefix}:]  # [images, {patches}, {width}]
    features = model(transform(image).unsqueeze(0))  # [images, {width}], the mean of the patches
```

Training reads the **patch tokens after the final norm**{pooling}.
"""
LEFT_OUT = " and an attentive pooling of them, which this library lacks; `--format hf` brings it"


def release_timm(model: LCLModel, origin: WeightOrigin, folder: Path, options: ReleaseOptions = DEFAULTS) -> str:
    """Write a folder for ``timm.create_model("local-dir:FOLDER", pretrained=True)`` and compare what it computes.

    Returns:
        One sentence with the largest difference.

    Raises:
        UserError: the encoder is no plain vision transformer, its features are not finite, or timm is missing.
        RuntimeError: timm computes other features than the training model.
    """
    import timm

    plain = plain_transformer(model.vision.model, "timm")
    features = trained_features(model, origin)
    weights = in_dtype(timm_weights(plain), options.dtype)
    save_file(
        {name: weight.contiguous() for name, weight in weights.items()},
        folder / "model.safetensors",
        metadata=weight_metadata(origin),
    )
    config = timm_config(plain, model.vision.model.config, options.license)
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    released = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    tolerance = max(OTHER_CODE, TOLERANCES[options.dtype])
    with torch.no_grad():
        theirs = {
            "patches": released.forward_features(features.images)[:, released.num_prefix_tokens :],
            "mean": released(features.images),
        }
    ours = {"patches": features.patches, "mean": features.patches.mean(1)}
    checked = parity_sentence(largest_difference(ours, theirs, tolerance, "the model in timm"), tolerance, origin)
    usage = USAGE.format(
        folder=options.name_in_code(folder),
        prefix=released.num_prefix_tokens,
        patches=model.vision.patch_tokens,
        width=plain.width,
        pooling=LEFT_OUT if origin.pools else "",
    )
    write_card(folder, model, origin, options, usage, checked, library="timm")
    return checked


def timm_weights(plain: PlainTransformer) -> dict[str, Tensor]:
    """Return weights as timm has them: a bias of the patches exactly where no norm follows."""
    if plain.pre_norm:
        return with_bias_in_positions(plain)
    bias = {"patch_embed.proj.bias": torch.zeros(plain.width)}
    return bias | plain.weights


def timm_arguments(plain: PlainTransformer) -> dict[str, Any]:
    """Name what makes timm's vision transformer this one."""
    arguments = {
        "img_size": plain.size,
        "patch_size": plain.patch,
        "embed_dim": plain.width,
        "depth": plain.depth,
        "num_heads": plain.heads,
        "mlp_ratio": plain.mlp_ratio(),
        "class_token": plain.has_class_token,
        "pre_norm": plain.pre_norm,
        "init_values": plain.layer_scale,
        "act_layer": TIMM_ACTIVATIONS[plain.activation],
        "fc_norm": False,
    }
    return {key: value for key, value in arguments.items() if value is not None}


def timm_config(plain: PlainTransformer, config: Any, license_name: str | None) -> dict[str, Any]:
    """Write down what timm must know to build the model and to prepare images."""
    published = {
        "input_size": [3, plain.size, plain.size],
        "fixed_input_size": True,
        "interpolation": "bicubic",
        "crop_pct": 1.0,
        "crop_mode": "center",
        "mean": list(config.image_mean),
        "std": list(config.image_std),
        "num_classes": 0,
        "pool_size": None,
        "first_conv": "patch_embed.proj",
        "classifier": "head",
    }
    if license_name:
        published["license"] = license_name
    return {
        "architecture": ARCHITECTURES[plain.eps],
        "num_classes": 0,
        "num_features": plain.width,
        "global_pool": "avg",
        "model_args": {"global_pool": "avg", **timm_arguments(plain)},
        "pretrained_cfg": published,
    }
