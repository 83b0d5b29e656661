"""Write the encoder as transformers loads it: plainly as a model of its family, and with code of its own that pools."""

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModel, CLIPImageProcessorPil, Siglip2ImageProcessorPil
from transformers.utils import logging as transformers_logging

from lcl_ds import __version__
from lcl_ds.errors import UserError
from lcl_ds.models.encoders import family_of
from lcl_ds.models.network import LCLModel
from lcl_ds.models.pooling import POOLING_FILE
from lcl_ds.models.vision import family_inputs, image_tokens, released_patch_tokens, released_weights
from lcl_ds.release.card import write_card
from lcl_ds.release.options import DEFAULTS, DTYPES, Dtype, ReleaseOptions
from lcl_ds.release.origin import WeightOrigin
from lcl_ds.release.parity import TOLERANCES, TrainedFeatures, largest_difference, parity_sentence, trained_features
from lcl_ds.release.remote import modeling_lcl

WITH_CODE = """\
Training reads the **patch tokens after the final norm**{and_pooling}; where there is a class token,
no loss reads it. Code in this folder computes them:

```python
import torch
from PIL import Image
from transformers import AutoImageProcessor, AutoModel  # version 4.57 or later

image = Image.new("RGB", (640, 480), "red")  # yours: Image.open("photo.jpg")
model = AutoModel.from_pretrained("{folder}", trust_remote_code=True)
processor = AutoImageProcessor.from_pretrained("{folder}")
with torch.no_grad():
    outputs = model(**processor(images=image, return_tensors="pt"))
patches = outputs.last_hidden_state  # [images, {patches}, {width}]
{pooled}```
"""
POOLED = "features = outputs.pooler_output  # [images, {width}], what the attentive pooling makes of the patches\n"
PLAIN = """\
Without that code it is a model of transformers:

```python
import torch
from PIL import Image
from transformers import AutoImageProcessor, {model_class}  # version 4.57 or later

image = Image.new("RGB", (640, 480), "red")  # yours: Image.open("photo.jpg")
model = {model_class}.from_pretrained("{folder}")
processor = AutoImageProcessor.from_pretrained("{folder}")
with torch.no_grad():
    outputs = model(**processor(images=image, return_tensors="pt"))
    patches = {tokens}  # [images, {patches}, {width}]
```
"""


def release_vision(model: LCLModel, origin: WeightOrigin, folder: Path, options: ReleaseOptions = DEFAULTS) -> str:
    """Write the encoder for ``transformers`` and compare it with the training model, read in both ways.

    Returns:
        One sentence with the largest difference.

    Raises:
        UserError: the features are not finite, or the weights do not fit into the dtype.
        RuntimeError: the release computes other features than the training model.
    """
    features = trained_features(model, origin)
    transformers_logging.disable_progress_bar()
    write_encoder(model, folder, options)
    write_code(model, origin, folder, options.dtype)
    add_metadata(folder, weight_metadata(origin))
    image_processor(model.vision.model.config).save_pretrained(folder)
    tolerance = TOLERANCES[options.dtype]
    differences = [read(model, features, folder, tolerance) for read in (_plain_difference, _difference)]
    checked = parity_sentence(max(differences), tolerance, origin)
    write_card(folder, model, origin, options, usage_of(model, origin, options.name_in_code(folder)), checked)
    return checked


def write_encoder(model: LCLModel, folder: Path, options: ReleaseOptions) -> None:
    """Write ``config.json`` and the weights of the encoder; transformers splits them into files."""
    encoder = model.vision.model
    weights = in_dtype(released_weights(encoder), options.dtype)
    encoder.save_pretrained(folder, state_dict=weights, max_shard_size=options.shard_size)


def in_dtype(weights: dict[str, Tensor], dtype: Dtype) -> dict[str, Tensor]:
    """Round weights to the dtype of their files. Raises: UserError, one is no number, or too large for it."""
    if wrong := [name for name, weight in weights.items() if not weight.isfinite().all()]:
        raise UserError(f"the weight {wrong[0]} is not finite; release an earlier checkpoint")
    rounded = {name: weight.detach().to(DTYPES[dtype]) for name, weight in weights.items()}
    if wrong := [name for name, weight in rounded.items() if not weight.isfinite().all()]:
        raise UserError(f"--dtype {dtype}: the weight {wrong[0]} is too large for it; use bf16 or fp32")
    return rounded


def write_code(model: LCLModel, origin: WeightOrigin, folder: Path, dtype: Dtype) -> None:
    """Write the code that ``trust_remote_code=True`` runs, what it must know of the family, and the pooling."""
    shutil.copyfile(modeling_lcl.__file__, folder / Path(modeling_lcl.__file__).name)
    if origin.pools:
        save_file(in_dtype(model.pooling.state_dict(), dtype), folder / POOLING_FILE, metadata={"format": "pt"})
    file = folder / "config.json"
    config = json.loads(file.read_text(encoding="utf-8"))
    config["dtype"] = str(DTYPES[dtype]).removeprefix("torch.")
    config["auto_map"] = {"AutoModel": "modeling_lcl.LclVisionModel"}
    config["lcl_release"] = family_facts(model, origin.pools)
    file.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def family_facts(model: LCLModel, has_pooling: bool) -> dict[str, Any]:
    """Say what the code of a release must know, see :mod:`lcl_ds.release.remote.modeling_lcl`."""
    pooling, family = model.pooling, family_of(model.vision.model.config)
    sizes = {
        "width": pooling.q.in_features,
        "output_width": pooling.q.out_features,
        "heads": pooling.num_heads,
        "eps": pooling.norm_q.eps,
    }
    return {
        "weight_prefix": family.published_prefix,
        "prefix_tokens": int(family.has_class_token),
        "final_norm": family.final_norm if family.releases_unnormed_patches else None,
        "pooling": sizes if has_pooling else None,
    }


def weight_metadata(origin: WeightOrigin) -> dict[str, str]:
    """Say in words, for the header of files of weights, where they come from; what is not known is left out."""
    record = origin.record
    values = {
        "recipe": origin.name,
        "step": record.step,
        "images_seen": record.images,
        "git_commit": record.commit,
        "lcl_ds": __version__,
    }
    return {"format": "pt"} | {key: str(value) for key, value in values.items() if value is not None}


def add_metadata(folder: Path, metadata: dict[str, str]) -> None:
    """Write the header of each file of weights anew, which transformers lets nobody add to."""
    for file in folder.glob("*.safetensors"):
        partial = file.with_suffix(".partial")
        save_file(load_file(file), partial, metadata=metadata)
        partial.replace(file)


@torch.no_grad()
def _plain_difference(model: LCLModel, features: TrainedFeatures, folder: Path, tolerance: float) -> float:
    """Compare patch tokens with those of the family's class; see :func:`release_vision` for errors."""
    released, loading = AutoModel.from_pretrained(folder, **_as_trained(model))
    _refuse_misfits(loading)
    theirs = {"patches": released_patch_tokens(released.eval(), features.images)}
    return largest_difference({"patches": features.patches}, theirs, tolerance, "the released encoder")


@torch.no_grad()
def _difference(model: LCLModel, features: TrainedFeatures, folder: Path, tolerance: float) -> float:
    """Compare patch tokens and pooled features with those of the code in the folder; errors as above."""
    released, loading = modeling_lcl.LclVisionModel.from_pretrained(folder, **_as_trained(model))
    _refuse_misfits(loading)
    outputs = released(**family_inputs(released, features.images))
    theirs = {"patches": outputs.last_hidden_state, "pooled": outputs.pooler_output}
    return largest_difference(features.by_name(), theirs, tolerance, "the released code")


def _as_trained(model: LCLModel) -> dict[str, Any]:
    """Say how to load a release for the comparison: other kernels round differently, more so in large models."""
    implementation = model.vision.model.config._attn_implementation
    return {"attn_implementation": implementation, "dtype": torch.float32, "output_loading_info": True}


def _refuse_misfits(loading: dict[str, Any]) -> None:
    if wrong := {kind: names for kind, names in loading.items() if names}:
        raise RuntimeError(f"the release does not load as it was written: {wrong}")


def image_processor(config: Any, flat_patches: bool | None = None) -> Any:
    """Make what turns pictures of any size into the tower's inputs.

    For SigLIP 2 these are flattened patches that keep the aspect, for the others a square in the middle.

    Args:
        flat_patches: whether the reader takes flattened patches; None: as the family's class in transformers does.
    """
    statistics: dict[str, Any] = {"image_mean": list(config.image_mean), "image_std": list(config.image_std)}
    if family_of(config).reads_flat_patches if flat_patches is None else flat_patches:
        return Siglip2ImageProcessorPil(
            patch_size=config.patch_size, max_num_patches=image_tokens(config), **statistics
        )
    size = config.image_size
    return CLIPImageProcessorPil(size={"shortest_edge": size}, crop_size={"height": size, "width": size}, **statistics)


def usage_of(model: LCLModel, origin: WeightOrigin, folder: str) -> str:
    """Write how to load the folder and read its features."""
    encoder = model.vision.model
    family = family_of(encoder.config)
    tokens = "outputs.last_hidden_state" + ("[:, 1:]" if family.has_class_token else "")
    if family.releases_unnormed_patches:
        # Its tower is the model itself in transformers 5, and a part of it in 4.
        tokens = f'getattr(model, "vision_model", model).{family.final_norm}({tokens})'
    sizes = {"folder": folder, "patches": model.vision.patch_tokens, "width": encoder.config.hidden_size}
    pooled = POOLED.format(width=model.pooling.q.out_features) if origin.pools else ""
    with_code = WITH_CODE.format(
        **sizes, pooled=pooled, and_pooling=" and an **attentive pooling** of them" if pooled else ""
    )
    return f"{with_code}\n{PLAIN.format(**sizes, model_class=type(encoder).__name__, tokens=tokens)}"
