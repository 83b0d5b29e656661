"""Read what is released: the weights of a run or of a published checkpoint, and where they come from."""

import re
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from lcl_ds import __version__
from lcl_ds.config import Config
from lcl_ds.data.documents import BadSampleError, read_document
from lcl_ds.data.images import decode_image
from lcl_ds.data.shards.shard import index_shard
from lcl_ds.data.shards.source import Source
from lcl_ds.data.shards.storage import expand_paths
from lcl_ds.errors import UserError
from lcl_ds.models.network import LCLModel
from lcl_ds.models.settings import Part
from lcl_ds.models.weights.published import load_published, read_published_config, read_published_json
from lcl_ds.objectives import build_empty_objective, objective_module, trained_losses
from lcl_ds.objectives.base import ObjectiveSettings
from lcl_ds.phases import config_of_step
from lcl_ds.release.record import RunRecord, read_record
from lcl_ds.tokens import CONTROL_TOKENS, Vocabulary
from lcl_ds.training.checkpoint import load_config_of, load_model, read_state, resolve_checkpoint

PARITY_IMAGES = 16
"""Pictures on which a release is compared with the training model."""
PARITY_SHARDS, PARITY_SAMPLES = 8, 64
"""Shards of a source, and samples of a shard, in which pictures for the parity check are looked for."""
PUBLISHED = ("precision", "model", "objective", "train")
"""Groups of a run's settings that a card shows."""
PUBLISHED_OF_DATA = (
    *("row_tokens", "document_tokens", "row_images", "row_image_tokens", "image_first_probability", "crop_scale"),
    "mix_by",
)
"""Settings of the data that a card shows."""
PLACES = ("pretrained", "init_from", "init_ema", "init_parts")
"""Settings that say where first weights came from, even where they look like words."""


@dataclass(frozen=True)
class WeightOrigin:
    """Where a model comes from, for its card."""

    name: str
    history: str
    """One clause: what was trained, with what, how long."""
    settings: dict[str, Any]
    """Those that others may see."""
    pixels: np.ndarray
    """uint8 [K, 3, H, W], what the release is compared on."""
    pixels_kind: str
    pools: bool = True
    """Whether the attentive pooling was trained: a loss read its output."""
    record: RunRecord = field(default_factory=RunRecord)
    config: Config | None = None
    """Of the run; None: the published code trained it."""
    tokenizer_contents: str | None = None
    """Hash of the tokenizer's folder when the run saved; None: it was none."""


def read_run(
    run_or_checkpoint: Path, parts: Collection[Part] = (), ema: bool = False
) -> tuple[LCLModel, WeightOrigin, Vocabulary]:
    """Read the newest, or the named, checkpoint of a run.

    Args:
        parts: the only parts to read; see :func:`lcl_ds.training.checkpoint.load_model`.
        ema: take the vision tower from its moving average.

    Raises:
        UserError: there is none, or it is damaged, or it has no moving average.
    """
    checkpoint = resolve_checkpoint(run_or_checkpoint)
    with _damage_named(checkpoint):
        state = read_state(checkpoint)
        step, vocab_size = state["progress"]["step"], state["vocab_size"]
        config = config_of_step(load_config_of(checkpoint), step)
        model = load_model(checkpoint, parts=parts, ema=ema)
    history = f"with lcl_ds {__version__}, step {step} of {config.train.steps}"
    if ema:
        history += f", moving average of its weights (decay {config.train.ema_decay})"
    origin = WeightOrigin(
        config.name,
        history,
        published_settings(config.model_dump(mode="json")),
        *_pixels_of(config, model.vision.model.config.image_size),
        pools=pools(model, config.objective),
        record=read_record(checkpoint, step, ema),
        config=config,
        tokenizer_contents=state.get("folders", {}).get("data.tokenizer"),
    )
    return model, origin, Vocabulary(vocab_size - len(CONTROL_TOKENS))


def read_published(file: Path, config_file: Path | None) -> tuple[LCLModel, WeightOrigin, Vocabulary]:
    """Read a checkpoint of the published code. Raises: UserError, it cannot be read or has no configuration."""
    if config_file is None:
        raise UserError("--from reference needs --config, the JSON model configuration of the published code")
    config = read_published_json(config_file)
    vocabulary = read_published_config(config, str(config_file)).vocabulary
    model = load_published(file, config)
    history = f"with the published code, imported by lcl_ds {__version__}"
    size = model.vision.model.config.image_size
    origin = WeightOrigin(config_file.stem, history, without_places(config), _noise(size), "images of noise")
    return model, origin, vocabulary


def published_settings(settings: dict[str, Any]) -> dict[str, Any]:
    """Choose the settings of a run that others may see: what it computes, and nothing about where."""
    chosen = {name: settings[name] for name in PUBLISHED}
    chosen["data"] = {name: settings["data"][name] for name in PUBLISHED_OF_DATA}
    return without_places(chosen)


def without_places(settings: dict[str, Any]) -> dict[str, Any]:
    """Leave out what names a file, a folder, an address or a command."""
    kept = {}
    for key, value in settings.items():
        if isinstance(value, dict):
            kept[key] = without_places(value)
        elif key not in PLACES and not str(key).startswith("_") and _is_plain(value):
            kept[key] = value
    return kept


def _is_plain(value: Any) -> bool:
    """Say whether a value is a number, a word, or a list of such: no path, address or command is one."""
    if isinstance(value, dict):
        return False
    if isinstance(value, list):
        return all(_is_plain(entry) for entry in value)
    return not isinstance(value, str) or re.fullmatch(r"[\w.+-]+", value) is not None


def pools(model: LCLModel, settings: ObjectiveSettings) -> bool:
    """Say whether a loss of the objective that ``settings`` name reads what the pooling makes of an image.

    A contrastive loss of no weight reads it in vain.
    """
    if "contrastive_loss" in set(objective_module(settings.name).Objective.losses) - trained_losses(settings):
        return False
    unused = build_empty_objective(model, settings).unused
    weights = (weight for it in unused for weight in ([it] if isinstance(it, nn.Parameter) else it.parameters()))
    return all(weight is not model.pooling.query for weight in weights)


@contextmanager
def _damage_named(checkpoint: Path) -> Iterator[None]:
    """Turn whatever readers of zip, pickle, YAML and JSON say about damaged files into a sentence."""
    try:
        yield
    except (UserError, OSError, MemoryError):
        raise
    except Exception as error:
        said = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        raise UserError(f"{checkpoint}: is damaged and cannot be read ({said}); name another checkpoint") from error


def _pixels_of(config: Config, size: int) -> tuple[np.ndarray, str]:
    """Read images of the run's own data as far as its shards are still here; else make noise."""
    pixels = list(islice(_images_of(config, size), PARITY_IMAGES))
    if not pixels:
        return _noise(size), "images of noise (no image of the run's shards could be read here)"
    return np.stack(pixels), "real images"


def _images_of(config: Config, size: int) -> Iterator[np.ndarray]:
    """Decode images of the held-out and then of the training shards; what cannot be read is passed over.

    A run may be somebody else's, so commands in its settings are not executed, and nothing is fetched.
    """
    for paths in filter(None, [config.evaluation.shards, *(entry.paths for entry in config.data.shards)]):
        for shard in _local_shards(paths)[:PARITY_SHARDS]:
            try:
                source = Source("parity", [index_shard(shard)])
                for number in range(min(len(source), PARITY_SAMPLES)):
                    yield from _images_in(source, number, size, config.data.max_text_bytes)
            except (UserError, OSError):
                continue


def _images_in(source: Source, number: int, size: int, max_text_bytes: int) -> Iterator[np.ndarray]:
    try:
        for suffix in read_document(source, number, max_text_bytes).images:
            yield decode_image(source.read(number, suffix), size)
    except BadSampleError:
        return


def _local_shards(paths: str | Sequence[str]) -> list[str]:
    """List the plain files among a run's locations."""
    locations: list[str] = []
    for path in [paths] if isinstance(paths, str) else paths:
        if "://" not in path:
            try:
                locations += expand_paths(path)
            except (UserError, OSError, ValueError):  # ValueError: braces that do not fit, bytes that are no text
                continue
    # Names of commands and addresses, which braces and lists may yield, are no files.
    return [location for location in locations if Path(location).is_file()]


def _noise(size: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (PARITY_IMAGES, 3, size, size), dtype=np.uint8)
