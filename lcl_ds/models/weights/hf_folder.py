"""A local Hugging Face folder: the architecture in its config.json and the weights in its safetensors files."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import CONFIG_MAPPING, PreTrainedConfig

from lcl_ds.models.decoder import DROPOUT_ENDINGS
from lcl_ds.models.encoders import FAMILIES, IMAGE_MEAN, IMAGE_STD

WEIGHTS = "model.safetensors"
INDEX = f"{WEIGHTS}.index.json"
NOT_ARCHITECTURE = frozenset(
    {"vocab_size", "bos_token_id", "eos_token_id", "pad_token_id", "tie_word_embeddings", "use_cache"}
    | {"num_patches", "vision_use_head", "use_mask_token", "stage_names", "out_features", "out_indices"}
    | {"auto_map", "lcl_release"}
)
"""Keys of a folder that a model here decides by itself, and those that releases of ours have for their code."""
FREE = frozenset({"image_size", "image_mean", "image_std"})
"""Architecture that a recipe may set otherwise."""


@dataclass(frozen=True)
class Architecture:
    """What a folder says about one tower."""

    model_type: str
    keys: dict[str, Any]
    aliases: dict[str, str]
    """Other names that the family takes for some keys."""
    is_tied: bool
    """Whether the vocabulary head is the embedding."""


def read_architecture(folder: Path, tower: Literal["vision", "decoder"]) -> Architecture:
    """Read the tower in ``config.json``; a folder of a whole CLIP or SigLIP has the vision tower inside.

    Raises:
        ValueError: no such file, or no tower that transformers knows.
    """
    tree = _read_json(folder / "config.json")
    if tower == "vision" and "vision_config" in tree:
        tree = {"model_type": f"{tree.get('model_type')}_vision_model", **tree["vision_config"]}
    model_type = str(tree.get("model_type"))
    if model_type not in CONFIG_MAPPING:
        raise ValueError(f"{folder}: config.json: transformers has no model_type {model_type!r}")
    if tower == "decoder" and "text_config" in tree:
        raise ValueError(
            f"{folder}: {model_type} holds more than a decoder; a folder of its language model is expected"
        )
    try:
        config = CONFIG_MAPPING[model_type].from_dict(tree)
    except (StrictDataclassError, TypeError, ValueError) as error:
        raise ValueError(f"{folder / 'config.json'}: {' '.join(str(error).split())}") from error
    keys = {k: v for k, v in config.to_dict().items() if k not in NOT_ARCHITECTURE and not k.endswith(DROPOUT_ENDINGS)}
    keys = {key: value for key, value in keys.items() if key not in PreTrainedConfig().to_dict()}
    if tower == "vision":
        keys |= read_pixels(folder, model_type, config)
    elif "rope_parameters" not in keys:
        # Learned positions are cut to the length of a row.
        keys.pop(config.attribute_map.get("max_position_embeddings", "max_position_embeddings"), None)
    return Architecture(model_type, keys, dict(config.attribute_map), getattr(config, "tie_word_embeddings", False))


def read_pixels(folder: Path, model_type: str, config: Any) -> dict[str, Any]:
    """Read size and statistics of the images that the tower was trained with.

    Raises:
        ValueError: a file cannot be read.
    """
    processor = _read_json(folder / "preprocessor_config.json", missing_ok=True)
    family = FAMILIES.get(model_type)
    mean, std = (family.image_mean, family.image_std) if family else (IMAGE_MEAN, IMAGE_STD)
    size = getattr(config, "image_size", None) or round(config.num_patches**0.5) * config.patch_size
    return {
        "image_size": size,
        "image_mean": list(processor.get("image_mean", mean)),
        "image_std": list(processor.get("image_std", std)),
    }


def with_architecture(values: dict[str, Any], tower: Literal["vision", "decoder"]) -> dict[str, Any]:
    """Complete a recipe's tower settings with what the folder ``pretrained`` says.

    Raises:
        ValueError: a key of the recipe contradicts the folder; names the key and both values.
    """
    folder = Path(values["pretrained"])
    architecture = read_architecture(folder, tower)
    theirs = {"model_type": architecture.model_type, **architecture.keys}
    ours = {architecture.aliases.get(key, key): value for key, value in values.items()}
    conflicts = [
        f"{key}: the recipe says {ours[key]!r}, {folder / 'config.json'} {value!r}"
        for key, value in theirs.items()
        if key in ours and key not in FREE and ours[key] != value
    ]
    if conflicts:
        raise ValueError("; ".join(conflicts) + "; leave the key out to follow the folder")
    return {**theirs, **ours}


@dataclass(frozen=True)
class WeightFolder:
    """Weights by name, read one at a time."""

    path: Path
    file_of: dict[str, Path]

    def read(self, name: str) -> Tensor:
        """Read one weight, on the CPU, in the dtype of the file. Raises: ValueError when it cannot be read."""
        try:
            with safe_open(self.file_of[name], framework="pt") as file:
                return file.get_tensor(name)
        except SafetensorError as error:
            raise ValueError(f"{self.file_of[name]}: {name}: cannot be read as safetensors: {error}") from error

    def shape(self, name: str) -> list[int]:
        """Return the shape of a weight, without reading it."""
        with safe_open(self.file_of[name], framework="pt") as file:
            return file.get_slice(name).get_shape()


def open_weights(folder: Path) -> WeightFolder:
    """Open the safetensors files of a folder, sharded or not. Nothing is unpickled.

    Raises:
        ValueError: there are none, a shard is missing, or one cannot be read.
    """
    if (folder / INDEX).is_file():
        files = sorted({folder / name for name in _read_json(folder / INDEX).get("weight_map", {}).values()})
    elif (folder / WEIGHTS).is_file():  # a release of ours has its pooling beside it
        files = [folder / WEIGHTS]
    else:
        files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise ValueError(f"{folder}: no *.safetensors files; other formats are not read, convert them first")
    file_of: dict[str, Path] = {}
    for file in files:
        try:
            with safe_open(file, framework="pt") as opened:
                file_of |= dict.fromkeys(opened.keys(), file)
        except (OSError, SafetensorError) as error:
            raise ValueError(f"{file}: cannot be read as safetensors: {error}") from error
    return WeightFolder(folder, file_of)


def _read_json(path: Path, missing_ok: bool = False) -> dict[str, Any]:
    if missing_ok and not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: cannot be read as JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path}: a JSON object is expected")
    return content
