"""Take weights of a folder for parts of the network, one at a time, when :mod:`lcl_ds.models.initial` asks for them.

Nothing stays random unnoticed: a weight that is missing, unknown to the network or of another shape ends the run,
unless the settings allow it by name. All of that is seen before the first weight is read.
"""

import math
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor, nn
from torch.nn import functional as F

from lcl_ds.errors import UserError
from lcl_ds.models.build import vision_config
from lcl_ds.models.decoder import DROPOUT_ENDINGS, build_decoder_config
from lcl_ds.models.encoders import family_of
from lcl_ds.models.initial import GivenWeights
from lcl_ds.models.network import LCLModel
from lcl_ds.models.settings import ModelSettings, part_of
from lcl_ds.models.weights.hf_folder import WeightFolder, open_weights, read_architecture
from lcl_ds.models.weights.published import read_published_config

COMPUTED = re.compile(r"(^|\.)(attn\.bias|attn\.masked_bias|rotary_emb\.inv_freq|position_ids)$")
"""Masks and tables that files of older releases hold and that are computed here."""
NOT_BUILT = re.compile(r"^(head\.|embeddings\.mask_token$)")
"""Weights of a vision tower that no patch token depends on."""
RENAMED = {
    "attention.attention.query.": "attention.q_proj.",
    "attention.attention.key.": "attention.k_proj.",
    "attention.attention.value.": "attention.v_proj.",
    "attention.output.dense.": "attention.o_proj.",
}
"""Parts of names in files of DINOv2, and what transformers 5 calls them."""
DECODER_POSITIONS = ("wpe.weight", "embed_positions.weight")

Adapt = Callable[[Tensor, Tensor], Tensor]
"""(their weight, our weight) to a weight of our shape; raises ValueError where it cannot. Either may be without memory,
to learn what would come out."""


@dataclass
class Transfer:
    """One folder of weights and where they go; names are those of the folder, without the prefix of its class."""

    setting: str
    folder: WeightFolder
    targets: dict[str, Tensor]
    names: dict[str, str]
    """The name in the file for each name."""
    adapt: dict[str, Adapt] = field(default_factory=dict)
    note: str = ""

    def read(self, name: str) -> Tensor:
        """Read one weight, fp32 on the CPU, in our shape."""
        return self._adapted(name, self.folder.read(self.names[name]).float())

    def shape(self, name: str) -> torch.Size:
        """Say what shape a weight will have, without reading it. Raises: ValueError when it cannot be adapted."""
        return self._adapted(name, torch.empty(self.folder.shape(self.names[name]), device="meta")).shape

    def _adapted(self, name: str, value: Tensor) -> Tensor:
        return self.adapt[name](value, self.targets[name]) if name in self.adapt else value


@dataclass(frozen=True)
class Release:
    """All weights of a network, and its settings."""

    folder: WeightFolder
    settings: ModelSettings
    note: str = ""


def open_release(path: Path) -> Release:
    """Open what ``lcl_ds.convert --part full`` wrote.

    Raises:
        ValueError: it is no such folder, or of another version.
    """
    return Release(open_weights(path), release_settings(path))


def given_weights(
    model: LCLModel,
    settings: ModelSettings,
    text_size: int,
    seed: int,
    open_start: Callable[[Path], Release] = open_release,
) -> tuple[GivenWeights, list[str]]:
    """Find the weights of the parts for which the settings name a folder.

    Args:
        model: with or without memory.
        text_size: tokens of the tokenizer; the control tokens follow them.
        seed: of the rows of tokens that the folder does not know.
        open_start: opens what ``model.init_from`` names.

    Returns:
        What reads each weight, and one sentence per folder.

    Raises:
        UserError: names every weight that is missing, unexpected or of another shape.
    """
    folders: list[tuple[str, str | None, Callable[[Path], Transfer]]] = [
        ("model.vision.pretrained", settings.vision.pretrained, lambda path: vision_transfer(model, settings, path)),
        (
            "model.decoder.pretrained",
            settings.decoder.pretrained,
            lambda path: decoder_transfer(model, path, text_size, seed),
        ),
        ("model.init_from", settings.init_from, lambda path: release_transfer(model, settings, open_start(path))),
    ]
    names: dict[Tensor, str] = {weight: name for name, weight in model.named_parameters()}
    given: dict[str, Callable[[], Tensor]] = {}
    sentences, problems = [], []
    for setting, path, prepare in folders:
        if path is None:
            continue
        try:
            transfer = prepare(Path(path))
            sentence, misfits = _check(transfer, settings)
        except ValueError as error:
            problems.append(f"{setting}: {error}")
            continue
        sentences.append(sentence)
        problems += misfits
        for name in transfer.targets.keys() & transfer.names.keys():
            target = transfer.targets[name]
            given[names[target]] = partial(transfer.read, name)
    if problems:
        raise UserError(problems)
    if settings.decoder.pretrained:
        for kind, _ in model.context_head.norm.named_parameters():
            if (same := given.get(f"lm_head.norm.{kind}")) is not None:
                given[f"context_head.norm.{kind}"] = same
    return given, sentences


def _check(transfer: Transfer, settings: ModelSettings) -> tuple[str, list[str]]:
    """Compare names and shapes of a folder with the network's; returns a sentence and all problems."""
    where = f"{transfer.setting}: {transfer.folder.path}"
    missing = transfer.targets.keys() - transfer.names.keys()
    unexpected = {name for name in transfer.names.keys() - transfer.targets.keys() if not COMPUTED.search(name)}
    random = sorted(name for name in missing if _matches(name, settings.allow_missing))
    problems = [
        f"{where}: {name} is missing; allow it with model.allow_missing to start from random values"
        for name in sorted(missing.difference(random))
    ]
    problems += [
        f"{where}: {name} is not in the model; allow it with model.allow_unexpected"
        for name in sorted(unexpected)
        if not _matches(name, settings.allow_unexpected)
    ]
    for name in sorted(transfer.targets.keys() & transfer.names.keys()):
        try:
            shape, expected = transfer.shape(name), transfer.targets[name].shape
        except ValueError as error:
            problems.append(f"{where}: {name}: {error}")
            continue
        if shape != expected:
            problems.append(f"{where}: {name} is {list(shape)}, the model has {list(expected)}")
    sentence = f"{where}: {len(transfer.targets) - len(missing)} weights"
    return sentence + transfer.note + (f"; random: {', '.join(random)}" if random else ""), problems


def _matches(name: str, patterns: list[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def vision_transfer(model: LCLModel, settings: ModelSettings, path: Path) -> Transfer:
    """Prepare a folder of a vision tower, or of a whole CLIP or SigLIP, whose text tower is left alone."""
    folder = open_weights(path)
    inside = {name.removeprefix("vision_model."): name for name in folder.file_of if name.startswith("vision_model.")}
    names = inside or {name: name for name in folder.file_of}
    names = {_renamed(name): there for name, there in names.items() if not NOT_BUILT.match(name)}
    targets: dict[str, Tensor] = dict(model.vision.model.named_parameters())
    return Transfer("model.vision.pretrained", folder, targets, names, _adapt_positions(model, settings, targets))


def _renamed(name: str) -> str:
    for old, new in RENAMED.items():
        name = name.replace(old, new)
    return name


def decoder_transfer(model: LCLModel, path: Path, text_size: int, seed: int) -> Transfer:
    """Prepare a folder of a causal language model: blocks go to the decoder, final norm and head to our head.

    Rows of the embedding and of the head are those of the tokenizer's ids. Rows beyond the tokenizer, which pad the
    vocabulary of many models, are left out; control tokens, and tokens that the folder has no row for, get new rows.

    Raises:
        ValueError: its head computes what ours cannot.
    """
    folder, architecture, decoder = open_weights(path), read_architecture(path, "decoder"), model.decoder
    keys = architecture.keys
    scaling = {key: keys[key] for key in ("logit_scale", "logits_scaling") if keys.get(key, 1) != 1}
    if scaling:
        raise ValueError(f"{path}: its head scales logits ({scaling}), which the head here does not")
    prefix = f"{decoder.base_model_prefix}."
    names = {name.removeprefix(prefix): name for name in folder.file_of}
    (norm,) = (name for name, module in decoder.named_modules() if isinstance(module, nn.Identity))
    embedding_weight = decoder.get_input_embeddings().weight
    (embedding,) = (name for name, weight in decoder.named_parameters() if weight is embedding_weight)
    if architecture.is_tied and embedding in names:
        names.setdefault("lm_head.weight", names[embedding])
    targets: dict[str, Tensor] = dict(decoder.named_parameters())
    targets |= {f"{norm}.{kind}": weight for kind, weight in model.lm_head.norm.named_parameters()}
    targets["lm_head.weight"] = model.lm_head.weight

    def rows(theirs: Tensor, ours: Tensor) -> Tensor:
        return vocabulary_rows(theirs, text_size, len(ours), torch.Generator().manual_seed(seed))

    adapt: dict[str, Adapt] = {name: _cut_positions for name in targets if name.endswith(DECODER_POSITIONS)}
    adapt |= {embedding: rows, "lm_head.weight": rows}
    unknown = text_size - folder.shape(names[embedding])[0] if embedding in names else 0
    note = f"; {unknown} tokens of the tokenizer are new to it" if unknown > 0 else ""
    return Transfer("model.decoder.pretrained", folder, targets, names, adapt, note)


def release_transfer(model: LCLModel, settings: ModelSettings, release: Release) -> Transfer:
    """Prepare all weights of a network, for the chosen parts.

    Raises:
        ValueError: the parts have another architecture there; names the keys with both values.
    """
    folder, path = release.folder, release.folder.path
    differences = _differences(settings, release.settings)
    if differences:
        raise ValueError("; ".join(f"{key}: here {ours!r}, {path} {theirs!r}" for key, ours, theirs in differences))
    targets: dict[str, Tensor] = {n: w for n, w in model.named_parameters() if part_of(n) in settings.init_parts}
    names = {name: name for name in folder.file_of if part_of(name) in settings.init_parts}
    adapt = _adapt_positions(model, settings, targets)
    return Transfer("model.init_from", folder, targets, names, adapt, release.note)


def release_settings(path: Path) -> ModelSettings:
    """Read the settings of the network that a full release holds.

    Raises:
        ValueError: there are none, or this version does not understand them.
    """
    file = path / "config.yaml"
    try:
        tree = yaml.safe_load(file.read_text(encoding="utf-8"))
        if "vision_cfg" in tree:
            return read_published_config(tree, str(file)).model
        return ModelSettings.model_validate(tree["model"])
    except (OSError, UnicodeDecodeError, yaml.YAMLError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{file}: no settings of a full release: {error}") from error


def _differences(ours: ModelSettings, theirs: ModelSettings) -> list[tuple[str, Any, Any]]:
    """Find what the chosen parts compute differently, beyond the number of patches and of positions."""
    differences = []
    if "vision" in ours.init_parts:
        differences += _different_keys("model.vision", vision_config(ours), vision_config(theirs))
    if "pooling" in ours.init_parts and ours.pooling != theirs.pooling:
        differences.append(("model.pooling", ours.pooling.model_dump(), theirs.pooling.model_dump()))
    if {"decoder", "heads"} & set(ours.init_parts):
        decoders = (build_decoder_config(s.decoder.model_type, s.decoder.hf_keys, 8, 8) for s in (ours, theirs))
        differences += _different_keys("model.decoder", *decoders)
    return differences


def _different_keys(tower: str, ours: Any, theirs: Any) -> list[tuple[str, Any, Any]]:
    free = {"image_size", "num_patches", ours.attribute_map.get("max_position_embeddings", "max_position_embeddings")}
    a, b = ours.to_dict(), theirs.to_dict()
    keys = sorted(key for key in {*a, *b} - free if not key.endswith(DROPOUT_ENDINGS))
    return [(f"{tower}.{key}", a.get(key), b.get(key)) for key in keys if a.get(key) != b.get(key)]


def _adapt_positions(model: LCLModel, settings: ModelSettings, targets: dict[str, Tensor]) -> dict[str, Adapt]:
    family = family_of(model.vision.model.config)

    def to_our_patches(theirs: Tensor, ours: Tensor) -> Tensor:
        patches = model.vision.patch_tokens
        prefix = ours.shape[-2] - patches
        old, new = math.isqrt(max(0, theirs.shape[-2] - prefix)), math.isqrt(patches)
        if old == new or old**2 != theirs.shape[-2] - prefix:
            return theirs
        if not settings.vision.interpolate_positions:
            raise ValueError(
                f"positions of {old} x {old} patches, image_size and patch_size here make {new} x {new}; set "
                f"model.vision.interpolate_positions=true to resize them, or another model.vision.image_size"
            )
        return resize_positions(theirs, prefix, new, family.position_mode)

    adapt: dict[str, Adapt] = {name: to_our_patches for name in targets if name.endswith(family.positions)}
    return adapt | {name: _cut_positions for name in targets if name.endswith(DECODER_POSITIONS)}


def resize_positions(positions: Tensor, prefix: int, side: int, mode: str = "bicubic") -> Tensor:
    """Resize position embeddings to a grid of ``side`` x ``side`` patches, antialiased as in OpenCLIP and timm.

    Args:
        positions: [..., prefix + old patches, width], the old patches a square in raster order.
        prefix: rows of class tokens and the like in front; they stay.
        mode: bicubic, or bilinear as SigLIP 2 does for itself.
    """
    class_rows, patches = positions[..., :prefix, :], positions[..., prefix:, :]
    grid = patches.reshape(1, math.isqrt(patches.shape[-2]), -1, patches.shape[-1]).permute(0, 3, 1, 2)
    resized = F.interpolate(grid, size=(side, side), mode=mode, align_corners=False, antialias=True)
    resized = resized.flatten(2).transpose(1, 2).reshape(*positions.shape[:-2], side * side, -1)
    return torch.cat([class_rows, resized], dim=-2)


def _cut_positions(theirs: Tensor, ours: Tensor) -> Tensor:
    if len(theirs) < len(ours):
        raise ValueError(
            f"positions for {len(theirs)} tokens, the model has {len(ours)}; lower data.document_tokens (by default "
            f"data.row_tokens) by {len(ours) - len(theirs)} or more"
        )
    return theirs[: len(ours)]


def vocabulary_rows(weight: Tensor, text_size: int, rows: int, generator: torch.Generator) -> Tensor:
    """Turn [V, H] into [rows, H]: the rows of the tokenizer's tokens, then new ones with their mean and deviation."""
    known = weight[:text_size]
    fresh = torch.randn(rows - len(known), weight.shape[1], generator=generator).to(weight.device)
    return torch.cat([known, known.mean(0) + known.std(0) * fresh])
