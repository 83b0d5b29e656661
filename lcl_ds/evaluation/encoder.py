"""Read frozen features of any vision encoder: of a network trained here, or of a folder that transformers loads."""

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel
from transformers.utils import cached_file
from transformers.utils import logging as transformers_logging

from lcl_ds.errors import UserError
from lcl_ds.models.encoders import FAMILIES
from lcl_ds.models.network import LCLModel
from lcl_ds.models.placement import device_of, weights_of
from lcl_ds.models.pooling import POOLING_FILE, AttentivePooling, read_released_pooling
from lcl_ds.models.vision import normalize_images, released_patch_tokens
from lcl_ds.models.weights.hf_folder import read_pixels

Kind = Literal["mean", "head", "class"]
KINDS: dict[Kind, str] = {
    "mean": "mean of the patch tokens after the final norm",
    "head": "attentive pooling head",
    "class": "class token after the final norm",
}
"""Vectors that can be read of an image, and what each is."""
FULL_RELEASE_FILE = "modeling_lcl_full.py"
"""Stands in a folder that ``convert --part full`` wrote."""
UNREADABLE = (OSError, ValueError, LookupError, TypeError, AttributeError, RuntimeError, ImportError)
"""What transformers raises where a folder is none of its own, or is damaged."""
NO_ARCHITECTURE = {"_name_or_path", "transformers_version", "dtype", "torch_dtype", "architectures", "auto_map"}
"""Keys of a configuration that change no feature."""


@dataclass(frozen=True)
class Encoded:
    """What an encoder says about images."""

    patches: Tensor
    """[M, N, width], after the final norm."""
    class_token: Tensor | None
    """[M, width]; None: the encoder has none."""
    head: Tensor | None
    """[M, D], what attentive pooling makes of the patches; None: the encoder has no such head."""

    def vectors(self) -> dict[Kind, Tensor]:
        """Give the vectors of :data:`KINDS` that there are, fp32."""
        vectors: dict[Kind, Tensor | None] = {
            "mean": self.patches.float().mean(1),
            "head": self.head,
            "class": self.class_token,
        }
        return {kind: vector.float() for kind, vector in vectors.items() if vector is not None}


@dataclass(frozen=True)
class FrozenEncoder:
    """An encoder in evaluation mode, and the size of image it takes."""

    name: str
    module: nn.Module
    """All of its weights."""
    encode: Callable[[Tensor], Encoded]
    """Of uint8 images [M, 3, H, W] on its device."""
    image_size: int
    transform: str
    """See :func:`described`."""

    @property
    def device(self) -> torch.device:
        return device_of(self.module)

    @property
    def dtype(self) -> torch.dtype:
        return next(self.module.parameters()).dtype

    def identity(self) -> str:
        """Hash everything that features depend on: names, shapes and values of the weights, dtype, transform."""
        digest = hashlib.sha256(f"{type(self.module).__name__} {self.image_size} {self.transform}".encode())
        for name, weight in sorted(weights_of(self.module).items()):
            digest.update(f"{name} {weight.dtype} {tuple(weight.shape)}".encode())
            digest.update(weight.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
        return digest.hexdigest()


def of_network(model: LCLModel, name: str, with_head: bool = True) -> FrozenEncoder:
    """Wrap the vision tower and the pooling head of a network trained here.

    Args:
        with_head: False where only the tower has weights, as that of a moving average.
    """
    vision, config = model.vision, model.vision.model.config

    def encode(images: Tensor) -> Encoded:
        patches, class_token = vision.all_tokens(vision.normalize(images))
        return Encoded(patches, class_token, model.pooling(patches)[0] if with_head else None)

    parts = {"vision": vision, "pooling": model.pooling} if with_head else {"vision": vision}
    transform = described(config, config.image_mean, config.image_std, model.pooling.num_heads)
    return FrozenEncoder(name, nn.ModuleDict(parts), encode, config.image_size, transform)


def described(config: Any, mean: Any, std: Any, pooling_heads: int = 0) -> str:
    """Write down what features depend on beside weights: the architecture, and how pixels are normalised."""
    architecture = {key: value for key, value in config.to_dict().items() if key not in NO_ARCHITECTURE}
    return json.dumps([architecture, list(mean), list(std), pooling_heads], sort_keys=True, default=str)


def open_released(folder_or_name: str) -> FrozenEncoder:
    """Load a vision encoder with transformers: a folder that ``lcl_ds.convert`` wrote, or any other model or its name.

    Of a whole CLIP or SigLIP the vision tower is taken. Weights come from safetensors alone: nothing is unpickled.

    Raises:
        UserError: there is no such model, it is no vision encoder, or weights are missing.
    """
    transformers_logging.disable_progress_bar()
    if (Path(folder_or_name) / FULL_RELEASE_FILE).is_file():
        raise UserError(
            f"{folder_or_name}: holds the whole network; name the run, or release its encoder (convert RUN OUT)"
        )
    try:
        config: Any = AutoConfig.from_pretrained(folder_or_name, trust_remote_code=False)
        if not any(hasattr(config, key) for key in ("patch_size", "num_channels", "vision_config")):
            raise UserError(f"{folder_or_name}: {config.model_type} is no vision encoder; name another model")
        model, loading = AutoModel.from_pretrained(
            folder_or_name,
            dtype=torch.float32,
            use_safetensors=True,
            output_loading_info=True,
            trust_remote_code=False,
        )
        pooling = _pooling_of(folder_or_name, config)
    except (
        OSError,
        ValueError,
        LookupError,
        TypeError,
        AttributeError,
        RuntimeError,
        ImportError,
        SafetensorError,
    ) as error:
        said = " ".join(str(error).split())[:160]
        raise UserError(
            f"{folder_or_name}: neither a run, a checkpoint nor a vision model that transformers loads ({said})"
        ) from error
    if hasattr(config, "vision_config"):
        model, config = model.vision_model, config.vision_config
    missing = sorted(name for name in loading["missing_keys"] if "pooler" not in name and "text" not in name)
    if missing:
        raise UserError(
            f"{folder_or_name}: {len(missing)} weights are missing, as {missing[0]}: they would be random; name a "
            "folder whose weights are those of its config.json"
        )
    family = FAMILIES.get(config.model_type)
    try:
        pixels = read_pixels(Path(folder_or_name), config.model_type, config)
    except (AttributeError, TypeError, ValueError) as error:
        raise UserError(
            f"{folder_or_name}: {config.model_type}: the size of its images is not known ({error})"
        ) from error
    mean, std, size = pixels["image_mean"], pixels["image_std"], pixels["image_size"]
    config.image_size = size

    def encode(images: Tensor) -> Encoded:
        inputs = normalize_images(images, next(model.parameters()).dtype, mean, std)
        encoded = (
            _encoded_by_family(model, inputs) if family is not None else _encoded_of(model(pixel_values=inputs), config)
        )
        return encoded if pooling is None else replace(encoded, head=pooling(encoded.patches)[0])

    module = model if pooling is None else nn.ModuleDict({"vision": model, "pooling": pooling})
    return FrozenEncoder(folder_or_name, module.eval(), encode, size, described(config, mean, std))


def _pooling_of(folder_or_name: str, config: Any) -> AttentivePooling | None:
    """Read the attentive pooling that a release of ours brings; its code is not run for that."""
    sizes = (getattr(config, "lcl_release", None) or {}).get("pooling")
    if sizes is None:
        return None
    return read_released_pooling(Path(str(cached_file(folder_or_name, POOLING_FILE))), sizes)


def _encoded_by_family(model: Any, inputs: Tensor) -> Encoded:
    """Encode normalised images with a model of a family that is trained here."""
    family, patches = FAMILIES[model.config.model_type], released_patch_tokens(model, inputs)
    if family.reads_flat_patches or not (family.has_class_token or getattr(model, "use_head", False)):
        return Encoded(patches, None, None)
    pooled = model(pixel_values=inputs).pooler_output
    return Encoded(patches, pooled, None) if family.has_class_token else Encoded(patches, None, pooled)


def _encoded_of(outputs: Any, config: Any) -> Encoded:
    """Read the outputs of a family that is not trained here: tokens before the patches are a class token and registers;
    what it pools is the head where there is no class token."""
    tokens = outputs.last_hidden_state
    if tokens.ndim == 4:  # feature maps of a convolutional network
        tokens = tokens.flatten(2).transpose(1, 2)
    count = (config.image_size // config.patch_size) ** 2 if hasattr(config, "patch_size") else tokens.shape[1]
    prefix = max(0, tokens.shape[1] - count)
    pooled = getattr(outputs, "pooler_output", None)
    head = pooled.flatten(1) if pooled is not None and not prefix else None
    return Encoded(tokens[:, prefix:], tokens[:, 0] if prefix else None, head)
